package config

import (
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
)

var (
	digits = regexp.MustCompile(`^[1-9][0-9]{0,18}$`)
	// with the domain of a domain-scoped project
	project   = regexp.MustCompile(`^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$`)
	poolPart  = regexp.MustCompile(`^[a-z0-9-]{4,32}$`)
	namespace = regexp.MustCompile(`^[a-z][a-z0-9.:-]{2,126}[a-z0-9]$`) // my-project.svc.id.goog
	dnsName   = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,` +
		`61}[A-Za-z0-9])?$`)
	plainWord   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$`)
	zoneName    = regexp.MustCompile(`^[a-z][a-z0-9-]{0,61}[a-z0-9]$`)
	linkName    = regexp.MustCompile(`^[A-Za-z0-9_.@-]{1,15}$`) // stricter than the kernel's, since rules contain it
	segmentName = regexp.MustCompile(`^[A-Za-z0-9_.@:-]+$`)
	poolEmail   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9@.:_-]{0,252}[A-Za-z0-9]$`)
	googleEmail = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}@([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,` +
		`61}[a-z0-9]$`)
)

const (
	providerForm  = "projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER"
	namespaceForm = "identitynamespace:POOL:ISSUER"
	iamDomain     = "//iam.googleapis.com/" // in every universe (G-03, STS audience; G-09, other universes)
)

// provider reads a workload identity provider in the forms of Google's documentation, gcloud and
// the console.
func provider(s string) (string, *trouble) {
	if rest, ok := strings.CutPrefix(s, "identitynamespace:"); ok {
		pool, issuer, found := strings.Cut(rest, ":https://")
		if !found || !namespace.MatchString(pool) {
			return "", bad("write "+namespaceForm+", with the issuer's https URL", "%s is not %s", quote(s), namespaceForm)
		}
		if _, t := endpoint("https://" + issuer); t != nil {
			return "", t
		}
		return s, nil
	}
	name := strings.TrimPrefix(strings.TrimPrefix(s, "https:"), iamDomain)
	p := strings.Split(name, "/")
	if len(p) >= 4 && p[2] == "locations" && p[3] != "global" || strings.Contains(name, "workforcePools") {
		return "", bad("write "+providerForm, "%s is not the provider of a workload identity pool: their location is global",
			quote(s))
	}
	if len(p) == 6 && p[4] == "workloadIdentityPools" {
		return "", bad("append /providers/PROVIDER: gcloud iam workload-identity-pools providers list --location=global "+
			"--workload-identity-pool=POOL",
			"%s names a pool and not its provider", quote(s))
	}
	if len(p) != 8 || p[0] != "projects" || p[2] != "locations" || p[4] != "workloadIdentityPools" || p[6] != "providers" {
		return "", bad("write "+providerForm, "%s is not a workload identity provider", quote(s))
	}
	if !digits.MatchString(p[1]) {
		return "", bad("gcloud projects describe PROJECT --format='value(projectNumber)'", "%s is not a project's number",
			quote(p[1]))
	}
	for _, id := range []string{p[5], p[7]} {
		if !poolPart.MatchString(id) {
			return "", bad("it has 4 to 32 of a-z, 0-9 and -", "%s is not the id of a pool or provider", quote(id))
		}
	}
	return name, nil
}

// identity returns the meaning of a provider in its normal form, and the number of its project.
func identity(provider string) (w WorkloadIdentity, projectNumber string) {
	if rest, ok := strings.CutPrefix(provider, "identitynamespace:"); ok {
		pool, _, _ := strings.Cut(rest, ":https://")
		return WorkloadIdentity{Audience: provider, Pool: pool}, ""
	}
	p := strings.Split(provider, "/")
	return WorkloadIdentity{Audience: iamDomain + provider, Pool: p[5], PoolName: strings.Join(p[:6], "/")}, p[1]
}

func projectID(s string) (string, *trouble) {
	if digits.MatchString(s) {
		return "", bad("gcloud projects describe NUMBER --format='value(projectId)'",
			"%s is a project's number and not its ID", quote(s))
	}
	return match(s, project, "the ID of a project", "it has 6 to 30 of a-z, 0-9 and -, and begins with a letter")
}

// quotaProject takes what Google takes in X-Goog-User-Project: an ID or a number.
func quotaProject(s string) (string, *trouble) {
	if digits.MatchString(s) {
		return s, nil
	}
	return projectID(s)
}

func projectNumber(s string) (string, *trouble) {
	if project.MatchString(s) {
		return "", bad("gcloud projects describe PROJECT --format='value(projectNumber)'",
			"%s is a project's ID and not its number", quote(s))
	}
	return match(s, digits, "a project's number", "write digits only")
}

func instanceID(s string) (string, *trouble) {
	if n, err := strconv.ParseInt(s, 10, 64); err != nil || n < 1 || !digits.MatchString(s) {
		return "", bad("write a positive number below 2^63: clients keep it as one", "%s is not an instance id", quote(s))
	}
	return s, nil
}

func nodeName(s string) (string, *trouble) {
	if s != strings.ToLower(s) {
		return "", bad("write it as `kubectl get nodes` does", "%s has capitals, which no node's name has", quote(s))
	}
	return domain(s)
}

func domain(s string) (string, *trouble) {
	if len(s) > 253 {
		return "", bad("a name has at most 253 characters", "%s is too long for a name", quote(s))
	}
	return match(s, dnsName, "a DNS name", "write letters, digits, - and dots")
}

func label(s string) (string, *trouble) {
	return match(s, plainWord, "a name", "write letters, digits, dots, - and _")
}

// byAddress reads a RuntimeClass, or a ServiceAccount, which has a slash in it.
func byAddress(s string) (string, *trouble) {
	namespace, name, account := strings.Cut(s, "/")
	switch {
	case !account:
		return label(s)
	case name == "*":
		if _, t := accountName(namespace + "/default"); t == nil {
			return s, nil
		}
	}
	if _, t := accountName(s); t != nil {
		return "", bad("write a RuntimeClass, NAMESPACE/NAME or NAMESPACE/*", "%s is not a ServiceAccount", quote(s))
	}
	return s, nil
}

func zone(s string) (string, *trouble) {
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		return "", bad("write the part after the last slash, such as europe-west4-a", "%s is not the short form of a zone",
			quote(s))
	}
	return match(s, zoneName, "a zone", "write it as europe-west4-a")
}

func interfaceName(s string) (string, *trouble) {
	return match(s, linkName, "the name of an interface", "write one name as `ip link` shows it, without a wildcard")
}

func interfacePattern(s string) (string, *trouble) {
	name, t := interfaceName(strings.TrimSuffix(s, "+"))
	if t != nil || len(s) > 15 {
		return "", bad("write one name as `ip link` shows it, or its beginning and a +",
			"%s is not the name of an interface", quote(s))
	}
	return name + s[len(name):], nil
}

func unlinkedEmail(s string) (string, *trouble) {
	if s == "default" {
		return "", bad("write another", `"default" is a name that every ServiceAccount has already`)
	}
	return match(s, poolEmail, "an email or the name of a pool", "write letters, digits and any of @ . : _ -")
}

func audience(s string) (string, *trouble) {
	if len(s) > 1024 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", bad("write one of the provider's allowed audiences, on one line and without spaces",
			"%s is not an audience", quote(s))
	}
	return s, nil
}

func tokenLifetime(s string) (string, *trouble) {
	const least, most = 10 * time.Minute, 12 * time.Hour // as in Google's credential configurations
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return "", bad("write a number with a unit, such as 1h or 45m", "%s is not a duration", quote(s))
	case d < least || d > most || d%time.Second != 0:
		return "", bad("write a duration from 10m to 12h; more than 1h needs the organisation's consent",
			"%s is not a lifetime that Google gives", quote(s))
	}
	return s, nil
}

// filePath refuses a text that cannot be a file's name, such as the file's content.
func filePath(s string) (string, *trouble) {
	if len(s) > 4096 || strings.HasPrefix(s, "{") || strings.ContainsFunc(s, unicode.IsControl) {
		return "", bad("write the path of the file, not its content", "this is not the path of a file")
	}
	return filepath.Clean(s), nil
}

func addrPort(s string) (netip.AddrPort, *trouble) {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Addr().Zone() != "" || a.Addr().IsMulticast() {
		return a, bad("write ADDRESS:PORT with a numeric address, such as 169.254.169.252:988, or [ADDRESS]:PORT in quotes "+
			"for IPv6", "%s is not an address and a port", quote(s))
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

// network reads an address or a network, and returns the network.
func network(s string) (string, *trouble) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return "", bad("write a network such as 10.0.0.0/8", "%s is not a network", quote(s))
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() {
		return "", bad("write it as IPv4, such as 10.0.0.0/8", "%s is an IPv4 network written as IPv6", quote(s))
	}
	return p.Masked().String(), nil
}

// endpoint reads a URL that tokens are sent to. It must be https for every host, and unambiguous.
func endpoint(s string) (*url.URL, *trouble) {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Opaque != "" || u.RawPath != "" || strings.ContainsAny(s, "\\ "):
		return nil, bad("write https://HOST/PATH", "this is not a URL")
	case u.User != nil || strings.Contains(u.Host, "@"): // not shown: it may hold a password
		return nil, bad("write https://HOST/PATH", "the URL holds a user's name or password")
	case u.Scheme == "http":
		return nil, bad("write https://; google.caFile names the authority of a private endpoint",
			"%s would send tokens unencrypted", quote(s))
	case u.Scheme != "https" || u.Hostname() == "":
		return nil, bad("write https://HOST/PATH", "%s is not an https URL", quote(s))
	case strings.ContainsAny(s, "?#"):
		return nil, bad("remove what stands after ? or #", "%s is not the URL of a service", quote(s))
	case u.Path != "" && u.JoinPath().Path != u.Path:
		return nil, bad("write the path without //, . and ..", "%s has an ambiguous path", quote(s))
	}
	if _, err := netip.ParseAddr(u.Hostname()); err != nil && !dnsName.MatchString(u.Hostname()) {
		return nil, bad("write https://HOST/PATH", "%s has no host's name", quote(s))
	}
	if p := u.Port(); p != "" || strings.HasSuffix(u.Host, ":") {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return nil, bad("write a port from 1 to 65535, or none", "%s has no port after the colon", quote(s))
		}
	}
	u.Host = strings.ToLower(u.Host)
	return u, nil
}

// stsURL adds the path to a bare host, as regional and private endpoints are documented (G-08, STS
// URL).
func stsURL(s string) (string, *trouble) {
	u, t := endpoint(s)
	if t != nil {
		return "", t
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/token"
	}
	return u.String(), nil
}

// iamCredentialsURL returns scheme and host. The API defines the paths of its methods.
func iamCredentialsURL(s string) (string, *trouble) {
	u, t := endpoint(s)
	if t != nil {
		return "", t
	}
	if p := strings.TrimSuffix(u.Path, "/"); p != "" && p != "/v1" {
		return "", bad("write https://HOST", "%s has a path, which this service adds itself", quote(s))
	}
	return "https://" + u.Host, nil
}

// metadataPath reads a path of extraMetadata, with or without /computeMetadata/v1/ before it.
func metadataPath(s string) (string, *trouble) {
	p := strings.TrimPrefix(strings.TrimPrefix(s, "/"), "computeMetadata/v1/")
	for segment := range strings.SplitSeq(p, "/") {
		if !segmentName.MatchString(segment) || segment == "." || segment == ".." {
			return "", bad("write path: value, such as instance/machine-type: n2-standard-4",
				"%s is not a path below /computeMetadata/v1/", quote(s))
		}
	}
	if p == "instance/service-accounts" || strings.HasPrefix(p, "instance/service-accounts/") {
		return "", bad("remove it: a pod's identity comes from its ServiceAccount only", "%s is derived from the caller",
			quote(s))
	}
	if key, own := ownPaths[p]; own {
		return "", bad(fmt.Sprintf("set %s instead", key), "%s has its own key", quote(s))
	}
	return p, nil
}

var ownPaths = map[string]string{
	"instance/hostname":                    "instance.hostname",
	"instance/id":                          "instance.id",
	"instance/zone":                        "instance.zone",
	"instance/name":                        "instance.name",
	"instance/attributes/cluster-name":     "cluster.name",
	"instance/attributes/cluster-location": "cluster.location",
	"instance/attributes/cluster-uid":      "cluster.uid",
	"project/project-id":                   "projectID",
	"project/numeric-project-id":           "numericProjectID",
	"universe/universe-domain":             "google.universeDomain",
}

func match(s string, grammar *regexp.Regexp, what, remedy string) (string, *trouble) {
	if !grammar.MatchString(s) {
		return "", bad(remedy, "%s is not %s", quote(s), what)
	}
	return s, nil
}
