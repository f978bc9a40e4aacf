package config

import (
	"path"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// HostIdentity gives processes of the node the identity of a ServiceAccount. Either Unit or Cgroup
// is set. Both are patterns of [path.Match].
type HostIdentity struct {
	Unit           string // kubelet.service
	Cgroup         string // from the root of the hierarchy: /system.slice/docker-*.scope
	ServiceAccount workload.ServiceAccount
}

const identityForm = "{unit: kubelet.service, serviceAccount: NAMESPACE/NAME}, or cgroup: in place of unit:"

var (
	unitPattern    = regexp.MustCompile(`^[A-Za-z0-9:_.@*?\[\]\\-]+\.(service|scope|slice)$`)
	cgroupPattern  = regexp.MustCompile(`^(/[A-Za-z0-9:_.@*?\[\]\\-]+)+$`)
	serviceAccount = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
)

// splitIdentities reads the form of a flag:
// unit:PATTERN=NAMESPACE/NAME,cgroup:PATTERN=NAMESPACE/NAME.
func splitIdentities(s string) (items []item) {
	for part := range strings.SplitSeq(s, ",") {
		name, text, _ := strings.Cut(strings.TrimSpace(part), "=")
		items = append(items, item{name: name, text: text})
	}
	return items
}

// readIdentities reads a list of maps. Each becomes an item in the form of a flag.
func (l *loader) readIdentities(k Key, n *yaml.Node) (items []item) {
	wrong := func(n *yaml.Node, format string, args ...any) {
		l.complain(k.Path, n.Line, bad("write "+identityForm, format, args...))
	}
	if n.Kind != yaml.SequenceNode {
		wrong(n, "must be a list, not %s", kindOf(n))
		return nil
	}
	for _, entry := range n.Content {
		if entry.Kind != yaml.MappingNode {
			wrong(entry, "must be an identity, not %s", kindOf(entry))
			continue
		}
		given, good := map[string]string{}, true
		for i := 0; i+1 < len(entry.Content); i += 2 {
			name, v := entry.Content[i], entry.Content[i+1]
			_, twice := given[name.Value]
			given[name.Value] = v.Value
			switch {
			case !slices.Contains([]string{"unit", "cgroup", "serviceAccount"}, name.Value):
				wrong(name, "unknown key %s of an identity", quote(name.Value))
			case twice:
				wrong(name, "%s is given twice", name.Value)
			case v.Kind != yaml.ScalarNode || !plainTag(v):
				wrong(v, "must be one value, not %s", kindOf(v))
			default:
				continue
			}
			good = false
		}
		kind := "unit"
		if given["cgroup"] != "" {
			kind = "cgroup"
		}
		if good && (given["unit"] == "") == (given["cgroup"] == "") {
			wrong(entry, "an identity has either a unit or a cgroup")
			good = false
		}
		if good {
			items = append(items, item{line: entry.Line, name: kind + ":" + given[kind], text: given["serviceAccount"]})
		}
	}
	return items
}

// setIdentities turns items into identities. It reports the faults of every item.
func setIdentities(items []item, complain func(line int, t *trouble)) (all []HostIdentity) {
	for _, it := range items {
		id, t := hostIdentity(it.name)
		if t == nil && slices.ContainsFunc(all, func(other HostIdentity) bool {
			return other.Unit == id.Unit &&
				other.Cgroup == id.Cgroup
		}) {
			t = bad("keep one of them: the first match counts", "%s is given twice", quote(id.Unit+id.Cgroup))
		}
		if t != nil {
			complain(it.line, t)
		}
		account, wrong := accountName(it.text)
		if wrong != nil {
			complain(it.line, wrong)
		}
		if t == nil && wrong == nil {
			id.ServiceAccount.Namespace, id.ServiceAccount.Name, _ = strings.Cut(account, "/")
			all = append(all, id)
		}
	}
	return all
}

func accountName(s string) (string, *trouble) {
	return match(s, serviceAccount, "a ServiceAccount", "write NAMESPACE/NAME, as in kube-system/image-puller")
}

// hostIdentity reads unit:PATTERN or cgroup:PATTERN.
func hostIdentity(s string) (HostIdentity, *trouble) {
	kind, pattern, _ := strings.Cut(s, ":")
	_, err := path.Match(pattern, "")
	switch {
	case kind == "unit" && (err != nil || !unitPattern.MatchString(pattern)):
		return HostIdentity{}, bad("write its full name as systemctl prints it, such as kubelet.service or docker-*.scope",
			"%s is not a systemd unit", quote(pattern))
	case kind == "unit":
		return HostIdentity{Unit: pattern}, nil
	case kind == "cgroup" && (err != nil || !cgroupPattern.MatchString(pattern) || path.Clean(pattern) != pattern):
		return HostIdentity{}, bad("write it from the root of the hierarchy, as /proc/PID/cgroup shows it after 0::, such "+
			"as /system.slice/docker-*.scope", "%s is not a cgroup", quote(pattern))
	case kind == "cgroup":
		return HostIdentity{Cgroup: pattern}, nil
	}
	return HostIdentity{}, bad("write unit:UNIT=NAMESPACE/NAME or cgroup:PATH=NAMESPACE/NAME",
		"%s names no process of the node", quote(s))
}

func showIdentities(all []HostIdentity, indent string) string {
	if len(all) == 0 {
		return " []"
	}
	var b strings.Builder
	for _, id := range all {
		key, pattern := "unit", id.Unit
		if id.Cgroup != "" {
			key, pattern = "cgroup", id.Cgroup
		}
		b.WriteString("\n" + indent + "  - {" + key + ": " + flow(pattern) + ", serviceAccount: " +
			flow(id.ServiceAccount.String()) + "}")
	}
	return b.String()
}

// flow quotes a text only where YAML would read it differently between braces.
func flow(s string) string {
	if s = scalar(s); strings.ContainsAny(s, "[]{},") && !strings.HasPrefix(s, "'") && !strings.HasPrefix(s, `"`) {
		return "'" + s + "'"
	}
	return s
}

func (l *loader) checkHostIdentities() {
	if len(l.HostIdentities) > 0 && l.Attestation.Mode == "source-ip" && !l.broken["attestation.mode"] {
		l.complain("hostIdentities", 0, bad("remove them, or set attestation.mode to kernel",
			"attestation.mode source-ip cannot identify processes of the node"))
	}
}
