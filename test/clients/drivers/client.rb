# Driver of Google's libraries for Ruby; ring/client.go has the questions. Argument: the library.
require "json"

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only".freeze
PLATFORM = "https://www.googleapis.com/auth/cloud-platform".freeze
AUDIENCE = "https://run.example.com".freeze

def googleauth
  require "googleauth"
  kept = Hash.new { |all, scope| all[scope] = Google::Auth.get_application_default(scope) }
  token = ->(scope) { kept[scope].apply({})[:authorization].delete_prefix("Bearer ") }
  {
    "version" => -> { Gem.loaded_specs["googleauth"]&.version.to_s },
    "detect" => -> { Google::Auth::GCECredentials.on_gce?.to_s },
    "token" => -> { token.call(PLATFORM) },
    "scoped" => -> { token.call(SCOPE) },
    "id" => -> { Google::Auth::GCECredentials.new(target_audience: AUDIENCE).fetch_access_token!["id_token"] }
  }
end

def cloud_env
  require "google/cloud/env"
  require "google/cloud/env/version"
  env = Google::Cloud.env
  {
    "version" => -> { Google::Cloud::Env::VERSION },
    "detect" => -> { env.metadata?.to_s },
    "email" => -> { env.lookup_metadata("instance", "service-accounts/default/email") },
    "project" => -> { env.project_id }
  }
end

ask = { "googleauth" => method(:googleauth), "google-cloud-env" => method(:cloud_env) }.fetch(ARGV.shift).call
$stdin.each_line(chomp: true) do |question|
  answer = {}
  if ask.key?(question)
    begin
      answer["value"] = ask[question].call
    rescue StandardError => e
      answer["error"] = "#{e.class}: #{e.message}"[0, 500]
    end
  else
    answer["none"] = true
  end
  puts JSON.generate(answer)
  $stdout.flush
end
