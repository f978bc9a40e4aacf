import com.google.auth.oauth2.AccessToken;
import com.google.auth.oauth2.ComputeEngineCredentials;
import com.google.auth.oauth2.GoogleCredentials;
import com.google.auth.oauth2.IdTokenCredentials;
import com.google.auth.oauth2.IdTokenProvider;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** Driver of Google's library for Java; ring/client.go has the questions. */
public class Client {
  static final String SCOPE = "https://www.googleapis.com/auth/devstorage.read_only";
  static final String PLATFORM = "https://www.googleapis.com/auth/cloud-platform";
  static final String AUDIENCE = "https://run.example.com";
  static final Map<String, GoogleCredentials> kept = new HashMap<>();

  static GoogleCredentials credentials(String scope) throws Exception {
    GoogleCredentials c = kept.get(scope);
    if (c == null) {
      c = GoogleCredentials.getApplicationDefault().createScoped(scope);
      kept.put(scope, c);
    }
    return c;
  }

  static String token(String scope) throws Exception {
    Map<String, List<String>> headers = credentials(scope).getRequestMetadata(URI.create("https://storage.googleapis.com/"));
    return headers.get("Authorization").get(0).substring("Bearer ".length());
  }

  static String id() throws Exception {
    AccessToken t =
        IdTokenCredentials.newBuilder()
            .setIdTokenProvider((IdTokenProvider) credentials(PLATFORM))
            .setTargetAudience(AUDIENCE)
            .setOptions(List.of(IdTokenProvider.Option.FORMAT_FULL))
            .build()
            .refreshAccessToken();
    return t.getTokenValue();
  }

  /** Returns null if the library has no such function. */
  static String ask(String question) throws Exception {
    switch (question) {
      case "version": // the jar's file has it
        Path jar = Path.of(GoogleCredentials.class.getProtectionDomain().getCodeSource().getLocation().toURI());
        try (var all = Files.list(jar.getParent())) {
          return all.map(p -> p.getFileName().toString())
              .filter(n -> n.matches("google-auth-library-oauth2-http-[0-9.]+\\.jar"))
              .map(n -> n.replaceAll(".*-([0-9.]+)\\.jar", "$1"))
              .findFirst()
              .orElse("?");
        }
      case "detect":
        return String.valueOf(credentials(PLATFORM) instanceof ComputeEngineCredentials);
      case "token":
        return token(PLATFORM);
      case "scoped":
        return token(SCOPE);
      case "id":
        return id();
      case "email":
        return ((ComputeEngineCredentials) credentials(PLATFORM)).getAccount();
      default:
        return null;
    }
  }

  static String quote(String s) {
    StringBuilder b = new StringBuilder("\"");
    for (char c : s.toCharArray()) {
      if (c == '"' || c == '\\') b.append('\\');
      b.append(c < ' ' ? ' ' : c);
    }
    return b.append('"').toString();
  }

  public static void main(String[] args) throws Exception {
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    for (String line; (line = in.readLine()) != null; ) {
      String answer;
      try {
        String value = ask(line);
        answer = value == null ? "{\"none\":true}" : "{\"value\":" + quote(value) + "}";
      } catch (Exception e) {
        answer = "{\"error\":" + quote(String.valueOf(e)) + "}";
      }
      System.out.println(answer);
      System.out.flush();
    }
  }
}
