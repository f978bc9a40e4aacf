package token

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// bindingHint says what is missing when IAM refuses (T-07): the command that grants it.
func (g *Google) bindingHint(r Request, status int) string {
	email := r.Account.GoogleEmail
	switch status {
	case http.StatusForbidden:
		member := g.member(r.ServiceAccount)
		if member == "" || !plain.MatchString(email) {
			return fmt.Sprintf("grant roles/iam.workloadIdentityUser on the Google service account to ServiceAccount %s.", r.ServiceAccount)
		}
		return fmt.Sprintf("if the binding is missing: gcloud iam service-accounts add-iam-policy-binding %s --role roles/iam.workloadIdentityUser --member %q", email, member)
	case http.StatusNotFound:
		return fmt.Sprintf("does the Google service account exist that ServiceAccount %s names in its annotation iam.gke.io/gcp-service-account?", r.ServiceAccount)
	}
	return ""
}

// plain is what can be pasted into a shell as it is; the email is somebody's annotation.
var plain = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.:_@-]*$`)

// member names sa in an IAM policy, as the mapping google.subject=assertion.sub does.
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

// longSubjectHint comes with STS's refusal only: a provider may map something shorter (G-06).
func longSubjectHint(sa workload.ServiceAccount) string {
	return fmt.Sprintf("%s has %d bytes, and Google takes %d in google.subject: map something shorter in the provider's attribute mapping, or shorten the names.",
		sa.Subject(), len(sa.Subject()), longestSubject)
}
