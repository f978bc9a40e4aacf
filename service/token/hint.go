package token

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// bindingHint returns the command for what is missing when IAM refuses (T-07, texts of refusals).
func (g *Google) bindingHint(r Request, status int) string {
	email := r.Account.GoogleEmail
	switch status {
	case http.StatusForbidden:
		member := g.member(r.ServiceAccount)
		if member == "" || !plain.MatchString(email) {
			return fmt.Sprintf("grant roles/iam.workloadIdentityUser on the Google service account to ServiceAccount %s.",
				r.ServiceAccount)
		}
		return fmt.Sprintf("if the binding is missing: gcloud iam service-accounts add-iam-policy-binding %s --role "+
			"roles/iam.workloadIdentityUser --member %q", email, member)
	case http.StatusNotFound:
		return fmt.Sprintf("create the Google service account, or correct annotation iam.gke.io/gcp-service-account of "+
			"ServiceAccount %s.", r.ServiceAccount)
	}
	return ""
}

// ofProject reports whether IAM refuses for the project's sake: its API is not enabled, or a
// perimeter of VPC Service Controls keeps the node out. No binding changes that, and Google's
// message says what does.
func (e *GoogleError) ofProject() bool {
	return e.reason == "SERVICE_DISABLED" || e.reason == "SECURITY_POLICY_VIOLATED" ||
		strings.Contains(e.Message, "has not been used in project") || // where nothing is said beside it
		strings.Contains(e.Message, "prohibited by organization's policy")
}

// plain matches a text that can be pasted into a shell. The email is an untrusted annotation.
var plain = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.:_@-]*$`)

// member returns sa as an IAM policy names it with the mapping google.subject=assertion.sub.
func (g *Google) member(sa workload.ServiceAccount) string {
	if g.o.PoolName != "" {
		return "principal://iam.googleapis.com/" + g.o.PoolName + "/subject/" + sa.Subject()
	}
	if rest, ok := strings.CutPrefix(g.o.Audience, "identitynamespace:"); ok {
		pool, _, _ := strings.Cut(rest, ":")
		return fmt.Sprintf("serviceAccount:%s[%s/%s]", pool, sa.Namespace, sa.Name)
	}
	return ""
}

// longSubjectHint is added to a refusal of STS only, since a provider may map a shorter subject
// (G-06, length of google.subject).
func longSubjectHint(sa workload.ServiceAccount) string {
	return fmt.Sprintf("google.subject is too long: %s has %d bytes and the limit is %d: map a shorter value in the "+
		"provider's attribute mapping, or shorten the names.",
		sa.Subject(), len(sa.Subject()), maxSubject)
}
