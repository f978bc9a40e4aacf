package config

import (
	"strings"
	"testing"
	"time"
)

const credentialText = `{
  "universe_domain": "googleapis.com",
  "type": "external_account",
  "audience": "//iam.googleapis.com/` + testProvider + `",
  "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
  "token_url": "https://sts.europe-west4.rep.googleapis.com/v1/token",
  "credential_source": {"file": "/var/run/token", "format": {"type": "text"}},
  "service_account_impersonation_url": "https://iamcredentials.europe-west4.rep.googleapis.com/v1/projects/-/serviceAccounts/robot@my-project.iam.gserviceaccount.com:generateAccessToken",
  "service_account_impersonation": {"token_lifetime_seconds": 2700},
  "quota_project_id": "paying-project"
}`

func TestCredentialG18(t *testing.T) {
	disk := files{"/credential.json": credentialText}
	c := mustLoad(t, "projectID: my-project\ncredentialConfigFile: /credential.json\nimpersonateUnlinked: true", nil, disk)
	want := Google{UniverseDomain: "googleapis.com", STSURL: "https://sts.europe-west4.rep.googleapis.com/v1/token",
		IAMCredentialsURL: "https://iamcredentials.europe-west4.rep.googleapis.com", TokenLifetime: 45 * time.Minute,
		QuotaProject: "paying-project"}
	if c.Google != want || c.WorkloadIdentity.Audience != "//iam.googleapis.com/"+testProvider ||
		c.Project.Number != "123456789" {
		t.Errorf("%+v", c)
	}
	if c.ImpersonateUnlinked != "robot@my-project.iam.gserviceaccount.com" || len(c.Warnings) != 1 {
		t.Errorf("%q, %q", c.ImpersonateUnlinked, c.Warnings)
	}
	c = mustLoad(t, "projectID: my-project\ncredentialConfigFile: credential.json", nil,
		files{"/etc/credential.json": credentialText})
	if c.ImpersonateUnlinked != "" {
		t.Errorf("every pod became %s, and nobody asked for it", c.ImpersonateUnlinked)
	}
	if c.CredentialConfigFile != "/etc/credential.json" {
		t.Errorf("read from %s", c.CredentialConfigFile)
	}
}

func TestCredentialFaultsG18(t *testing.T) {
	const base = "projectID: my-project\ncredentialConfigFile: /credential.json\n"
	swap := func(old, new string) string {
		if !strings.Contains(credentialText, old) {
			t.Fatalf("%s is not in the file", old)
		}
		return strings.Replace(credentialText, old, new, 1)
	}
	const account = "robot@my-project.iam.gserviceaccount.com"
	for _, tt := range []struct{ name, file, extra, want string }{
		{"not JSON", "{\n  \"a\": secret\n}", "", `/credential.json:2: this is not JSON: name the file that gcloud wrote`},
		{"not an object", "[]", "", `/credential.json: this is not a credential configuration`},
		{"wrong type of a field", "{\n\"audience\": 3}", "", `/credential.json:2: audience is not a string`},
		{"a key", `{"type": "service_account", "private_key": "secret"}`, "",
			`/credential.json: type: "service_account" is a key file, which this service never uses: delete it`},
		{"another type", `{"type": "gdch"}`, "", `/credential.json: type: "gdch" is not external_account`},
		{"AWS", swap("oauth:token-type:jwt", "aws:token-type:aws4_request"), "",
			`/credential.json: subject_token_type: "urn:ietf:params:aws:token-type:aws4_request" is not a Kubernetes token's`},
		{"people", swap(`"universe_domain"`, `"workforce_pool_user_project": "p", "universe_domain"`), "",
			`/credential.json: workforce_pool_user_project: is for workforce pools`},
		{"no audience", swap(`"audience"`, `"x"`), "", `/credential.json: audience: is not set`},
		{"token over http", swap("https://sts", "http://sts"), "",
			`/credential.json: token_url: "http://sts.europe-west4.rep.googleapis.com/v1/token" would send tokens unencrypted`},
		{"impersonation over http", swap("https://iamcredentials", "http://iamcredentials"), "",
			`/credential.json: service_account_impersonation_url: `},
		{"K-00 signBlob", swap("generateAccessToken", "signBlob"), "",
			`/credential.json: service_account_impersonation_url: `},
		{"K-00 two accounts", swap(account, account+"/"+account), "",
			`/credential.json: service_account_impersonation_url: `},
		{"K-00 method in the email", swap(account, "x:signBlob?"), "",
			`/credential.json: service_account_impersonation_url: `},
		{"K-00 escaped", swap(account, "x%2F..%2Fy@z.com"), "", `/credential.json: service_account_impersonation_url: `},
		{"K-00 a number", swap(account, "1234567"), "", `/credential.json: service_account_impersonation_url: `},
		{"lifetime", swap("2700", "100000"), "", `/credential.json: service_account_impersonation.token_lifetime_seconds: ` +
			`"27h46m40s" is not a lifetime that Google gives`},
		{"quota project", swap("paying-project", "a/b"), "",
			`/credential.json: quota_project_id: "a/b" is not the ID of a project`},
		{"nobody to impersonate", swap("service_account_impersonation_url", "x"), "impersonateUnlinked: true",
			`/etc/config.yaml:3: impersonateUnlinked: /credential.json names no account to impersonate`},

		{"another provider", credentialText, "workloadIdentityProvider: " + strings.Replace(testProvider, "my-pool",
			"your-pool", 1),
			`/etc/config.yaml:3: workloadIdentityProvider: ` +
				`"projects/123456789/locations/global/workloadIdentityPools/your-pool/providers/my…" contradicts audience of ` +
				`/credential.json`},
		{"another token URL", credentialText, "google: {stsURL: 'https://sts.googleapis.com/v1/token'}",
			`/etc/config.yaml:3: google.stsURL: "https://sts.googleapis.com/v1/token" contradicts token_url of ` +
				`/credential.json`},
		{"another IAM", credentialText, "google: {iamCredentialsURL: 'https://x.example'}",
			`/etc/config.yaml:3: google.iamCredentialsURL: "https://x.example" contradicts`},
		{"another universe", credentialText, "google: {universeDomain: x.example}",
			`/etc/config.yaml:3: google.universeDomain: "x.example" contradicts`},
		{"another lifetime", credentialText, "google: {tokenLifetime: 1h}",
			`/etc/config.yaml:3: google.tokenLifetime: "1h" contradicts service_account_impersonation.token_lifetime_seconds ` +
				`of /credential.json, which says "45m": remove one of the two`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(base+tt.extra, nil, files{"/credential.json": tt.file})
			if err == nil || strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), tt.want) {
				t.Fatalf("got  %v\nwant %s", err, tt.want)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the content is shown: %v", err)
			}
		})
	}
	t.Run("absent", func(t *testing.T) {
		_, err := load(base, nil, nil)
		if want := `/etc/config.yaml:2: credentialConfigFile: "/credential.json": file does not exist: name a ` +
			`file`; err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	})
	t.Run("the same said twice", func(t *testing.T) {
		extra := "workloadIdentityProvider: " + testProvider +
			"\ngoogle: {tokenLifetime: 2700s, stsURL: 'https://sts.europe-west4.rep.googleapis.com'}"
		mustLoad(t, base+extra, nil, files{"/credential.json": credentialText})
	})
}

// What is written by hand, or by an editor of another system, is taken as it is meant.
func TestCredentialByHandG18(t *testing.T) {
	for name, tt := range map[string]struct{ file, want string }{
		"a number":               {strings.Replace(credentialText, `"paying-project"`, "123456789012", 1), "123456789012"},
		"a number in quotes":     {strings.Replace(credentialText, `"paying-project"`, `"123456789012"`, 1), "123456789012"},
		"with a byte order mark": {"\ufeff" + credentialText, "paying-project"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := load("projectID: my-project\ncredentialConfigFile: /credential.json\n", nil,
				files{"/credential.json": tt.file})
			if err != nil || c.Google.QuotaProject != tt.want {
				t.Errorf("%q, %v", c.Google.QuotaProject, err)
			}
		})
	}
}
