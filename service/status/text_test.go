package status

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// What continues a line stands below that line.
func TestRulesText(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	s := Status{Routing: &routing.State{Desired: routing.Installed, Mode: routing.ModeIPTables,
		Listen: "169.254.169.252:988", Reason: "it fits",
		Since: now.Add(-time.Hour), HostNetwork: "left alone", Standing: routing.Standing{Time: now.Add(-time.Second),
			Faults: []string{"missing: a"}}}}
	var text strings.Builder
	if err := s.Text(&text, now); err != nil {
		t.Fatal(err)
	}
	want := `(?m)^rules +mode iptables to 169\.254\.169\.252:988, installed 1h0m0s ago
 +auto: it fits
 +checked 1s ago: NOT as desired
 +missing: a
host pods +left alone$`
	if !regexp.MustCompile(want).MatchString(text.String()) {
		t.Errorf("no\n%s\nin\n%s", want, &text)
	}
}

// A conflict names pods as people know them, and what is no pod as it is.
func TestConflictText(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	s := Status{Cluster: &kube.Status{Pods: []kube.PodStatus{{UID: "u", Namespace: "ns", Name: "p"}}},
		Attestation: Attestation{Mode: "kernel", Kernel: &attest.KernelStatus{
			Helper: true, Conflicts: []attest.Conflict{{Address: netip.MustParseAddr("10.0.0.7"),
				Between: [2]string{"u", "network namespace 7 of /x"}, Refused: 3, LastSeen: now.Add(-time.Minute)}},
		}}}
	var text strings.Builder
	if err := s.Text(&text, now); err != nil {
		t.Fatal(err)
	}
	const want = "conflict     10.0.0.7: ns/p and network namespace 7 of /x have sockets with this address: 3 " +
		"connections refused, the last 1m0s ago: remove the address from the one that does not own it\n"
	if !strings.Contains(text.String(), want) {
		t.Errorf("no %q in\n%s", want, &text)
	}
}

// What mode observe counted is shown by the name of the pod where that is known.
func TestObservedText(t *testing.T) {
	s := routing.State{Desired: routing.Installed, Mode: routing.ModeObserve, Observed: []routing.Observation{
		{Cgroup: "/kubepods.slice/kubepods-pod11111111_2222_3333_4444_555555555555.slice/cri-containerd-a.scope",
			Connects: 7},
		{Cgroup: "/kubepods/besteffort/podbeefbeef-2222-3333-4444-555555555555/b", Connects: 3, HostNetwork: true},
		{Connects: 2},
	}}
	var text strings.Builder
	st := Status{Routing: &s,
		Cluster: &kube.Status{Pods: []kube.PodStatus{{Namespace: "default", Name: "reader",
			UID: "11111111-2222-3333-4444-555555555555"}}}}
	if err := st.Text(&text, time.Date(2026, 1, 1, 0, 1, 0, 0, time.UTC)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"connections are counted and not redirected", `
OBSERVED: 3
CONNECTS  NETWORK  POD OR CGROUP
7         pod      default/reader
3         host     /kubepods/besteffort/podbeefbeef-2222-3333-4444-555555555555/b
2         pod      a cgroup that was removed
`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%s\ndoes not say %s", text.String(), want)
		}
	}
}

// Rules of a mode whose install failed are not called installed.
func TestFailedInstallText(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	s := Status{LastInstall: &routing.Failure{Error: "no bpf", Last: now, Times: 1},
		Routing: &routing.State{Desired: routing.Installed, Mode: routing.ModeEBPF, Listen: "169.254.169.252:988",
			Since: now.Add(-time.Minute)}}
	var text strings.Builder
	if err := s.Text(&text, now); err != nil {
		t.Fatal(err)
	}
	const want = "mode ebpf to 169.254.169.252:988, NOT installed (the last install failed), wanted since 1m0s ago\n"
	if !strings.Contains(text.String(), want) {
		t.Errorf("no %q in\n%s", want, &text)
	}
}

// TestPrintable: texts of the API server, Google and programs of the node do not reach a terminal
// as they are.
func TestPrintable(t *testing.T) {
	t.Parallel()
	const hostile = "a\x1b]0;title\x07\x1b[2J\rb\u009b31m\x9bc\u202ed\x7f\te"
	for name, text := range map[string]string{"OneLine": OneLine(hostile + "\nf"), "Bounded": Bounded(hostile),
		"a long text": Bounded(hostile + strings.Repeat("x", 300))} {
		if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) || !utf8.ValidString(text) ||
			!strings.HasPrefix(text, "a�]0;title��[2J�b") {
			t.Errorf("%s: %q", name, text)
		}
	}
	if got, want := OneLine(" größer → 5 ms; „x“…\n2 "), "größer → 5 ms; „x“…; 2"; got != want {
		t.Errorf("%q, want %q", got, want)
	}

	now := time.Now()
	s := busy(now)
	for _, field := range []*string{&s.Reason, &s.ConfigFile, &s.Unreachable, &s.LastInstall.Error, &s.Tokens[0].LastError,
		&s.Tokens[0].Audience, &s.Cluster.Problem, &s.Cluster.LastError, &s.Cluster.Pods[0].AccountError,
		&s.Cluster.Pods[0].GoogleEmail, &s.Attestation.Kernel.Problem, &s.Attestation.HostIdentities[0].AccountError,
		&s.Routing.Standing.Faults[0], &s.Routing.IPv6} {
		*field = hostile
	}
	for _, look := range []look{{}, {Width: 80}} {
		var text strings.Builder
		if err := s.text(&text, now, look); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(text.String()) {
			line = strings.TrimSuffix(line, "\n")
			if strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%+v: %q", look, line)
			}
		}
	}
}
