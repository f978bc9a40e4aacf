package service

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const (
	scopeCloudPlatform = "https://www.googleapis.com/auth/cloud-platform"
	scopeEmail         = "https://www.googleapis.com/auth/userinfo.email"

	v1       = "/computeMetadata/v1/"
	accts    = v1 + "instance/service-accounts/"
	gsa      = "reader@my-project.iam.gserviceaccount.com"
	poolName = "projects/123456789012/locations/global/workloadIdentityPools/my-pool"
)

// Pods of the test node, by the address that they ask from.
const (
	linked    = "127.0.0.2" // default/reader, linked to gsa
	unlinked  = "127.0.0.3" // default/plain
	principal = "127.0.0.4" // default/principal: return-principal-id-as-email
	hostile   = "127.0.0.5" // default/hostile: an annotation that is no email
	denied    = "127.0.0.6" // default/denied: linked, without a policy binding
	missing   = "127.0.0.7" // default/missing: linked to an account that does not exist
	stranger  = "127.0.0.99"
)

const principalEmail = "principal://iam.googleapis.com/" + poolName + "/subject/system:serviceaccount:default:principal"

// TestContract asks what clients ask, on the wire, and compares what they compare. Each row names
// its contract ID.
func TestContract(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	for _, tt := range []struct {
		id     string
		from   string // default: linked
		method string
		path   string
		header string // lines; "-" sends no Metadata-Flavor
		status int    // default: 200
		kind   string // Content-Type; default: application/text
		body   string // exact, unless it is a /regexp/
		has    string // a response header "Name: value"
	}{
		{id: "E-01", path: "/", body: "computeMetadata/\n"},
		{id: "E-02 no header", path: "/", header: "-", body: "computeMetadata/\n"},
		{id: "E-02 a stranger", path: "/", from: stranger, header: "-", body: "computeMetadata/\n"},
		{id: "E-03", path: "/computeMetadata/", body: "v1/\n"},
		{id: "E-04", path: v1, body: "instance/\nproject/\nuniverse/\n"},
		{id: "E-06", path: v1 + "project/project-id", body: "my-project"},
		{id: "E-07", path: v1 + "project/numeric-project-id", body: "123456789012"},
		{id: "E-08", path: v1 + "project/attributes/", status: 404, body: "Not Found\n"},
		{id: "E-09", path: v1 + "instance/hostname", body: "node1.example.com"},
		{id: "E-10", path: v1 + "instance/id", body: "4503599627370497"},
		{id: "E-11", path: v1 + "instance/zone", body: "projects/123456789012/zones/europe-west4-a"},
		{id: "E-12", path: v1 + "instance/name", status: 404, body: "Not Found\n"},
		{id: "E-13", path: v1 + "instance/network-interfaces/", status: 404, body: "Not Found\n"},
		{id: "E-13 configured, U-17", path: v1 + "instance/machine-type", body: "projects/1/machineTypes/n2-standard-4"},
		{id: "E-14", path: v1 + "instance/", body: "attributes/\nhostname\nid\nmachine-type\nservice-accounts/\nzone\n"},
		{id: "E-15", path: v1 + "instance/attributes/", body: "cluster-location\ncluster-name\ncluster-uid\n"},
		{id: "E-16", path: v1 + "instance/attributes/cluster-name", body: "my-cluster"},
		{id: "E-17", path: v1 + "instance/attributes/kube-env", status: 404, body: "Not Found\n"},
		{id: "E-18", path: accts, body: "default/\n" + gsa + "/\n"},
		{id: "E-19", path: accts + "default/", body: "aliases\nemail\nidentity\nscopes\ntoken\n"},
		{id: "E-20", path: accts + "default/?recursive=true", kind: "application/json",
			body: `{"aliases":["default"],"email":"` + gsa + `","scopes":["` + scopeCloudPlatform + `","` + scopeEmail + `"]}`},
		{id: "E-21", path: accts + "?recursive=true", kind: "application/json", body: `/^\{"default":\{"aliases".*\},"` +
			regexp.QuoteMeta(gsa) + `":\{.*\}\}$/`},
		{id: "E-22 by email", path: accts + gsa + "/email", body: gsa},
		{id: "E-22 %40", path: accts + strings.Replace(gsa, "@", "%40", 1) + "/email", body: gsa},
		{id: "E-22 somebody else's", from: unlinked, path: accts + gsa + "/token", status: 404, body: "Not Found\n"},
		{id: "E-23", path: accts + "default/email", body: gsa},
		{id: "E-24", from: unlinked, path: accts + "default/email", body: "my-pool"},
		{id: "E-25", from: principal, path: accts + "default/email", body: principalEmail},
		{id: "E-26 listed", from: principal, path: accts, body: "default/\n" + principalEmail + "/\n"},
		{id: "E-26 raw", from: principal, path: accts + principalEmail + "/email", body: principalEmail},
		{id: "E-26 encoded", from: principal, path: accts + strings.NewReplacer(":", "%3A", "/",
			"%2F").Replace(principalEmail) + "/email", body: principalEmail},
		{id: "E-26 token", from: principal, path: accts + principalEmail + "/token", kind: "application/json",
			body: `/^\{"access_token":"[^"]+","expires_in":3\d\d\d,"token_type":"Bearer"\}$/`},
		{id: "E-27", path: accts + "default/aliases", body: "default\n"},
		{id: "E-28", path: accts + "default/scopes", body: scopeCloudPlatform + "\n" + scopeEmail + "\n"},
		{id: "E-29", path: accts + "default/scopes?alt=json", kind: "application/json", body: `["` + scopeCloudPlatform +
			`","` + scopeEmail + `"]`},
		{id: "E-30", path: v1 + "universe/universe-domain", body: "googleapis.com"},
		{id: "E-31", path: v1 + "universe/universe_domain", status: 404, body: "Not Found\n"},
		{id: "E-32", path: v1 + "instance/platform-security/auto-mtls-configuration", status: 404, body: "Not Found\n"},
		{id: "E-32 0.1", path: "/0.1/meta-data/", status: 404, body: "Not Found\n"},
		{id: "E-32 v1beta1", path: "/computeMetadata/v1beta1/instance/", status: 404, body: "Not Found\n"},
		{id: "E-34 AWS", path: "/latest/meta-data/", status: 404, body: "Not Found\n"},
		{id: "E-34 AWS without our header", path: "/latest/meta-data/", header: "-", status: 403,
			body: "/Missing required header/"},
		{id: "E-34 IMDSv2", method: "PUT", path: "/latest/api/token", status: 405, body: "/GET or HEAD/"},

		{id: "T-01", path: accts + "default/token", kind: "application/json",
			body: `/^\{"access_token":"[^"]+","expires_in":3\d\d\d,"token_type":"Bearer"\}$/`},
		{id: "T-03", path: accts +
			"default/token?scopes=https://www.googleapis.com/auth/devstorage.read_only,https://www.googleapis.com/auth/pubsub",
			kind: "application/json", body: `/access_token/`},
		{id: "T-04", path: accts + "default/token?transport=grpc&binding-enforcement=on&recursive=true&alt=text",
			kind: "application/json", body: `/^\{"access_token"/`},
		{id: "T-07 403", from: denied, path: accts + "default/token", status: 403,
			body: `/^Unable to generate access token; IAM returned 403 Forbidden: ` +
				`Permission 'iam.serviceAccounts.getAccessToken' ` +
				`denied.*roles/iam.workloadIdentityUser/`},
		{id: "T-07 404", from: missing, path: accts + "default/token", status: 404,
			body: `/^Unable to generate access token; IAM returned 404 Not Found: /`},
		{id: "T-08", from: unlinked, path: accts + "default/token", kind: "application/json", body: `/^\{"access_token":/`},
		// 127.0.0.99 is the node's own
		{id: "T-10 attestation", from: stranger, path: accts + "default/token", status: 403, body: "/not a pod/"},

		{id: "I-01", path: accts + "default/identity?audience=https://example.com", body: `/^[\w-]+\.[\w-]+\.[\w-]+$/`},
		{id: "I-02", path: accts + "default/identity", status: 400, body: "non-empty audience parameter required\n"},
		{id: "I-03", path: accts + "default/identity?audience=a&format=full&licenses=TRUE",
			body: `/^[\w-]+\.[\w-]+\.[\w-]+$/`},
		{id: "I-04", from: unlinked, path: accts + "default/identity?audience=a", status: 404,
			body: "/default/plain.*iam.gke.io/gcp-service-account/"},
		{id: "I-05", path: accts + "default/identity?audience=https://example.com:8080/;x=y",
			body: `/^[\w-]+\.[\w-]+\.[\w-]+$/`},

		{id: "H-01 missing", path: v1 + "project/project-id", header: "-", status: 403,
			body: "/Missing required header \"Metadata-Flavor\": \"Google\"/"},
		{id: "H-01 wrong", path: v1 + "project/project-id", header: "-\nMetadata-Flavor: google", status: 403,
			body: "/Missing required header/"},
		{id: "H-01 name in lower case", path: v1 + "project/project-id", header: "-\nmetadata-flavor: Google",
			body: "my-project"},
		{id: "H-08", path: v1 + "instance?alt=json&recursive=true", header: "Host: metadata.google.internal", status: 301,
			body: "", has: "Location: http://metadata.google.internal/computeMetadata/v1/instance/?alt=json&recursive=true"},
		{id: "H-08 gsutil", path: v1 + "instance/service-accounts", header: "Host: 169.254.169.254", status: 301, body: "",
			has: "Location: http://169.254.169.254/computeMetadata/v1/instance/service-accounts/"},
		{id: "H-09", path: v1 + "project/project-id/", status: 404, body: "Not Found\n"},
		{id: "H-11", path: v1 + "project/project-id?alt=json", kind: "application/json", body: `"my-project"`},
		{id: "H-11 no such form", path: v1 + "project/project-id?alt=xml", status: 400, body: "/xml/"},
		{id: "H-12 at once", path: v1 + "instance/hostname?wait_for_change=true", body: "node1.example.com"},
		{id: "H-12 another etag", path: v1 + "instance/hostname?wait_for_change=true&last_etag=0", body: "node1.example.com"},
		{id: "H-13", path: v1 + "project/project-id", header: "X-Forwarded-For: 10.0.0.1", status: 403,
			body: "/X-Forwarded-For/"},
		{id: "H-14 POST", method: "POST", path: v1 + "project/project-id", status: 405, body: "/GET or HEAD/",
			has: "Allow: GET, HEAD"},
		{id: "H-14 HEAD", method: "HEAD", path: v1 + "project/project-id", body: ""},
		{id: "H-16 name", path: v1 + "project/project-id", header: "Host: metadata.google.internal", body: "my-project"},
		{id: "H-16 trailing dot", path: v1 + "project/project-id", header: "Host: metadata.google.internal.",
			body: "my-project"},
		{id: "H-16 port", path: v1 + "project/project-id", header: "Host: metadata.google.internal:80", body: "my-project"},
		{id: "H-16 upper case", path: v1 + "project/project-id", header: "Host: Metadata.Google.Internal",
			body: "my-project"},
		{id: "H-16 short", path: v1 + "project/project-id", header: "Host: metadata", body: "my-project"},
		{id: "H-16 goog", path: v1 + "project/project-id", header: "Host: metadata.goog", body: "my-project"},
		{id: "H-16 IPv6", path: v1 + "project/project-id", header: "Host: [fd20:ce::254]", body: "my-project"},
		{id: "H-16 our own address", path: v1 + "project/project-id", header: "Host: 127.0.0.1", body: "my-project"},
		{id: "H-16 rebound", path: v1 + "project/project-id", header: "Host: attacker.example", status: 403, body: "/Host/"},
		{id: "H-16 rebound, /", path: "/", header: "Host: attacker.example", body: "computeMetadata/\n"},
		{id: "H-18", path: "//computeMetadata/./v1//project/../project/project-id", body: "my-project"},
		{id: "H-18 %2F", path: "/computeMetadata%2Fv1/project%2Fproject-id", body: "my-project"},
		{id: "H-18 no way around H-01", path: "/./computeMetadata/v1/project/project-id", header: "-", status: 403,
			body: "/Missing required header/"},
		{id: "K-00", from: hostile, path: accts + "default/token", status: 400,
			body: "/default/hostile.*iam.gke.io/gcp-service-account/"},
		{id: "K-00 leaves the rest alone", from: hostile, path: v1 + "project/project-id", body: "my-project"},
	} {
		t.Run(strings.ReplaceAll(tt.id, " ", "_"), func(t *testing.T) {
			from, method, status, kind := or(tt.from, linked), or(tt.method, "GET"), tt.status, or(tt.kind, "application/text")
			if status == 0 {
				status = 200
			}
			res := b.ask(t, from, method, tt.path, tt.header)
			if res.StatusCode != status {
				t.Errorf("status %d, want %d; body %q", res.StatusCode, status, res.body)
			}
			if re, ok := strings.CutPrefix(tt.body, "/"); ok {
				if !regexp.MustCompile("(?s)" + strings.TrimSuffix(re, "/")).MatchString(res.body) {
					t.Errorf("body %q does not match %s", res.body, re)
				}
			} else if res.body != tt.body {
				t.Errorf("body %q, want %q", res.body, tt.body)
			}
			for name, want := range map[string]string{ // on every response
				"Metadata-Flavor":  "Google",              // H-04
				"Server":           "GKE Metadata Server", // H-05
				"Content-Type":     kind,                  // H-06
				"X-XSS-Protection": "0",                   // H-07
				"X-Frame-Options":  "SAMEORIGIN",
			} {
				if got := res.Header.Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if res.Header.Get("Content-Length") == "" {
				t.Error("H-07: no Content-Length")
			}
			if etag := res.Header.Get("ETag"); status == 200 && !regexp.MustCompile(`^[0-9a-f]{16}$`).MatchString(etag) {
				t.Errorf("H-07: ETag %q", etag)
			}
			if name, value, ok := strings.Cut(tt.has, ": "); ok && res.Header.Get(name) != value {
				t.Errorf("%s: %q, want %q", name, res.Header.Get(name), value)
			}
			if len(res.body) >= 14336 {
				t.Errorf("T-11: %d bytes", len(res.body))
			}
		})
	}
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// The tokens that pods get are theirs: looked up at the stand-in that issued them.
func TestWhoseToken(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	for from, want := range map[string]string{
		linked:    gsa,
		unlinked:  "system:serviceaccount:default:plain",
		principal: "system:serviceaccount:default:principal",
	} {
		issued, ok := b.google.Lookup(tokenIn(t, b.ask(t, from, "GET", accts+"default/token", "").body))
		if got := or(issued.Email, issued.Subject); !ok || got != want {
			t.Errorf("%s got the token of %q (known: %v), want %q", from, got, ok, want)
		}
	}
}

// E-05: what .NET's Gax looks for in the whole tree, and no secret in it.
func TestWholeTree(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	res := b.ask(t, linked, "GET", v1+"?recursive=TRUE", "")
	var whole struct {
		Project struct {
			ProjectID        string `json:"projectId"`
			NumericProjectID json.Number
		}
		Instance struct {
			ID              json.Number
			Zone            string
			Attributes      map[string]string
			ServiceAccounts map[string]map[string]any
		}
	}
	d := json.NewDecoder(strings.NewReader(res.body))
	d.UseNumber()
	if err := d.Decode(&whole); err != nil {
		t.Fatalf("%v in %s", err, res.body)
	}
	got := fmt.Sprintln(whole.Project.ProjectID, whole.Project.NumericProjectID, whole.Instance.ID, whole.Instance.Zone,
		whole.Instance.Attributes["cluster-name"], whole.Instance.Attributes["cluster-location"])
	if want := "my-project 123456789012 4503599627370497 projects/123456789012/zones/europe-west4-a my-cluster " +
		"europe-west4\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for name, account := range whole.Instance.ServiceAccounts {
		if len(account) != 3 || account["token"] != nil || account["identity"] != nil {
			t.Errorf("E-20: %s: %v", name, account)
		}
	}
	if strings.Contains(res.body, "token") {
		t.Errorf("E-05: a token in %s", res.body)
	}
}

// H-17, H-16: HTTP/1.0 without a Host is answered, and redirected to the address that was dialled.
func TestHTTP10(t *testing.T) {
	b := newTestNode(t)
	b.ready(t)
	raw := b.raw(t, linked, "GET "+v1+"instance HTTP/1.0\r\nMetadata-Flavor: Google\r\n\r\n")
	if !strings.Contains(raw, " 301 ") || !strings.Contains(raw, "Location: http://127.0.0.1"+v1+"instance/\r\n") {
		t.Errorf("got %q", raw)
	}
	raw = b.raw(t, linked, "GET "+v1+"project/project-id HTTP/1.0\r\nMetadata-Flavor: Google\r\n\r\n")
	if !strings.HasSuffix(raw, "\r\n\r\nmy-project") {
		t.Errorf("got %q", raw)
	}
}

// What is not configured is not there (E-16), and what GKE leaves out can be switched on (E-12).
func TestOtherConfigurations(t *testing.T) {
	b := newWorld(t)
	b.configure(t)
	b.replace(t, "config.yaml", "cluster: {name: my-cluster, location: europe-west4, uid: 5f3a}\n", "")
	b.replace(t, "config.yaml", "zone: europe-west4-a", "name: vm-1")
	b.replace(t, "config.yaml", `id: "4503599627370497", `, "")
	b.replace(t, "config.yaml", "caFile: ca.pem", "caFile: ca.pem, universeDomain: example-universe.goog")
	b.start(t)
	b.ready(t)
	for path, want := range map[string]string{
		"instance/attributes/":             "200 ",
		"instance/attributes/cluster-name": "404 Not Found\n",
		"instance/zone":                    "404 Not Found\n",
		"instance/name":                    "200 vm-1",
		"instance/":                        "200 attributes/\nhostname\nid\nmachine-type\nname\nservice-accounts/\n",
		"universe/universe-domain":         "200 example-universe.goog", // E-30
	} {
		res := b.ask(t, linked, "GET", v1+path, "")
		if got := fmt.Sprint(res.StatusCode, " ", res.body); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	// E-10: stable, positive, and the same after a restart.
	id := b.ask(t, linked, "GET", v1+"instance/id", "").body
	if n, err := strconv.ParseInt(id, 10, 64); err != nil || n <= 0 {
		t.Errorf("instance/id: %q", id)
	}
	b.end(t)
	b.start(t)
	b.ready(t)
	if again := b.ask(t, linked, "GET", v1+"instance/id", "").body; again != id {
		t.Errorf("instance/id was %s, and is %s after a restart", id, again)
	}
}

// G-18: the file that gcloud writes instead of the provider; its impersonation is for unlinked
// ServiceAccounts, where the operator says so, and the annotation wins.
func TestCredentialConfigFile(t *testing.T) {
	b := newWorld(t)
	const everybody = "everybody@my-project.iam.gserviceaccount.com"
	b.google.Allow("system:serviceaccount:default:plain", everybody)
	b.write(t, "credential.json", `{"type":"external_account","audience":"`+audience+`",
		"subject_token_type":"urn:ietf:params:oauth:token-type:jwt","token_url":"`+b.google.STSURL()+`",
		"service_account_impersonation_url":"`+b.google.URL()+`/v1/projects/-/serviceAccounts/`+
		everybody+`:generateAccessToken",
		"credential_source":{"file":"/var/run/secrets/token"}}`)
	b.configure(t)
	b.replace(t, "config.yaml", "workloadIdentityProvider: "+provider, "credentialConfigFile: credential.json")
	b.replace(t, "config.yaml", "stsURL: "+b.google.STSURL()+", ", "")
	b.start(t)
	b.ready(t)
	if got := b.ask(t, unlinked, "GET", accts+"default/email", "").body; got != "my-pool" {
		t.Errorf("without impersonateUnlinked: %s", got)
	}
	good, err := os.ReadFile(filepath.Join(b.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	b.write(t, "config.yaml", string(good)+"impersonateUnlinked: true\n")
	b.hangUp()
	b.eventually(t, "it is in force",
		func() bool { return b.ask(t, unlinked, "GET", accts+"default/email", "").body == everybody })
	for from, want := range map[string]string{unlinked: everybody, linked: gsa} {
		issued, _ := b.google.Lookup(tokenIn(t, b.ask(t, from, "GET", accts+"default/token", "").body))
		if issued.Email != want {
			t.Errorf("%s got the token of %s, want %s", from, issued.Email, want)
		}
	}
}

// G-15: the annotation's quota project goes along, and is part of what a token is asked for with.
func TestQuotaProject(t *testing.T) {
	b := newWorld(t)
	b.google.Allow("system:serviceaccount:default:billed", gsa)
	b.addPod("billed", "127.0.0.8", map[string]string{"iam.gke.io/gcp-service-account": gsa,
		"iam.gke.io/credential-quota-project": "other-project"})
	b.configure(t)
	b.start(t)
	b.ready(t)
	issued, _ := b.google.Lookup(tokenIn(t, b.ask(t, "127.0.0.8", "GET", accts+"default/token", "").body))
	if issued.QuotaProject != "other-project" {
		t.Errorf("x-goog-user-project: %q", issued.QuotaProject)
	}
	// T-03, G-07: scopes in any order and form are one token.
	first := b.ask(t, "127.0.0.8", "GET",
		accts+"default/token?scopes=https://www.googleapis.com/auth/b,https://www.googleapis.com/auth/a", "").body
	second := b.ask(t, "127.0.0.8", "GET",
		accts+"default/token?scopes=https%3A%2F%2Fwww.googleapis.com%2Fauth%2Fa&scopes=+https://www.googleapis.com/auth/b",
		"").body
	if tokenIn(t, first) != tokenIn(t, second) {
		t.Error("the same scopes in another form are another token")
	}
}

// H-04: what net/http refuses by itself has our header too. A body that does not come is not waited
// for.
func TestRefusedByNetHTTP(t *testing.T) {
	t.Parallel()
	b := newTestNode(t)
	b.ready(t)
	host := "Host: metadata\r\nMetadata-Flavor: Google\r\n"
	for name, tt := range map[string]struct{ send, status string }{
		"no HTTP":           {"hello\r\n\r\n", "400"},
		"no Host":           {"GET / HTTP/1.1\r\n\r\n", "400"},
		"bad header name":   {"GET / HTTP/1.1\r\n" + host + "a b: c\r\n\r\n", "400"},
		"headers too long":  {"GET / HTTP/1.1\r\n" + host + "X: " + strings.Repeat("x", 40000) + "\r\n\r\n", "431"},
		"unknown Expect":    {"GET / HTTP/1.1\r\n" + host + "Expect: cake\r\n\r\n", "417"},
		"transfer encoding": {"GET / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip\r\n\r\n", "501"},
		"HTTP/2":            {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "405"},
		"OPTIONS *":         {"OPTIONS * HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n", "405"},
		"a body that does not come": {"GET " + v1 + "project/project-id HTTP/1.1\r\n" + host + "Content-Length: 10\r\n\r\n",
			"200"},
	} {
		t.Run(name, func(t *testing.T) {
			got := b.raw(t, linked, tt.send)
			head, _, _ := strings.Cut(got, "\r\n\r\n")
			if !strings.HasPrefix(head, "HTTP/1.1 "+tt.status+" ") || strings.Count(head, "Metadata-Flavor: Google\r\n") != 1 ||
				!strings.Contains(head+"\r\n", "Content-Type: application/text\r\n") || strings.Contains(head, "charset") {
				t.Errorf("got %q, want %s with our headers", got, tt.status)
			}
		})
	}
}
