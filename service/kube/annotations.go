package kube

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// The annotations of a ServiceAccount that this package reads (K-01, GKE's annotations).
const (
	AnnotationEmail     = "iam.gke.io/gcp-service-account"
	AnnotationPrincipal = "iam.gke.io/return-principal-id-as-email"
	AnnotationQuota     = "iam.gke.io/credential-quota-project"
)

const (
	maxEmail  = 254 // RFC 5321's path, less the brackets
	maxLocal  = 64
	maxQuoted = 80 // bytes of a bad value in errors
	label     = `[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?`
)

var (
	// email matches every form of a Google service account's email, in every universe:
	//
	//	NAME@PROJECT.iam.gserviceaccount.com
	//	NAME@PROJECT.example.com.iam.gserviceaccount.com (domain-scoped project)
	//	NUMBER-compute@developer.gserviceaccount.com  PROJECT[.example.com]@appspot.gserviceaccount.com
	//
	// Emails of other universes need not end so (G-09, universe domains), but have one of the two
	// words below the project. IAM decides whether the account exists. The check here ensures that no
	// character has a meaning in a URL or a header.
	email = regexp.MustCompile(`^` + label + `(?:\.` + label + `)*@(?:` + label + `\.)+(?:iam|gserviceaccount)(?:\.` +
		label + `)+$`)

	// project matches an id, an id with the domain that owns it, or a number.
	project = regexp.MustCompile(`^(?:[a-z][a-z0-9-]{4,28}[a-z0-9]|(?:` + label + `\.)+` + label +
		`:[a-z](?:[a-z0-9-]{0,28}[a-z0-9])?|[1-9][0-9]{0,19})$`)
)

// ParseAccount reads a ServiceAccount's annotations. They are hostile input, since everybody who
// may edit the ServiceAccount writes them (K-00, untrusted annotations). An absent annotation, and
// an empty one as templates leave it, means "not set". A bad annotation is an
// *AnnotationError.
func ParseAccount(sa workload.ServiceAccount, annotations map[string]string) (workload.Account, error) {
	var a workload.Account
	bad := func(key, want string) (workload.Account, error) {
		return workload.Account{}, &AnnotationError{ServiceAccount: sa, Key: key,
			Reason: fmt.Sprintf("%s is not %s: run: kubectl annotate --overwrite serviceaccount -n %s %s %s=VALUE",
				quoted(annotations[key]), want, sa.Namespace, sa.Name, key)}
	}
	if v := annotations[AnnotationEmail]; v != "" {
		local, _, _ := strings.Cut(v, "@")
		if len(v) > maxEmail || len(local) > maxLocal || !email.MatchString(v) {
			return bad(AnnotationEmail, "the email of a Google service account (NAME@PROJECT.iam.gserviceaccount.com, in "+
				"lower case)")
		}
		a.GoogleEmail = v
	}
	if v := annotations[AnnotationPrincipal]; v != "" {
		if v != "true" && v != "false" {
			return bad(AnnotationPrincipal, `"true" or "false"`)
		}
		a.PrincipalAsEmail = v == "true"
	}
	if v := annotations[AnnotationQuota]; v != "" {
		if len(v) > maxEmail || !project.MatchString(v) {
			return bad(AnnotationQuota, "the id or the number of a Google Cloud project")
		}
		a.QuotaProject = v
	}
	return a, nil
}

// quoted returns a hostile value on one line, in ASCII and of bounded length.
func quoted(v string) string {
	if len(v) <= maxQuoted {
		return strconv.QuoteToASCII(v)
	}
	return strconv.QuoteToASCII(v[:maxQuoted]) + fmt.Sprintf("… (%d bytes)", len(v))
}
