package status

import (
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token"
)

// busy is a service with names as long as they are in large clusters, and with every kind of fault.
func busy(now time.Time) Status {
	const (
		namespace = "machine-learning-platform-production"
		account   = "feature-store-online-serving-writer"
		gsa       = "feature-store-online-serving@acme-ml-platform-production.iam.gserviceaccount.com"
		away      = `the Kubernetes API is unavailable since 2026-11-25T11:00:00Z: Get "https://10.0.0.1:6443/api/v1/pods?` +
			`allowWatchBookmarks=true&fieldSelector=spec.nodeName%3Dnode-1&resourceVersion=1003&watch=true": dial tcp ` +
			`10.0.0.1:6443: connect: connection refused`
	)
	return Status{Version: "1.2.3", Started: now.Add(-time.Hour), State: "serving", Reason: away,
		ConfigFile: "the configuration on disk does not load: the previous one stays in force, and a restart would refuse " +
			`pods: /etc/gke-metadata-emulator/config.yaml:6: prefetch: "sometimes" is not one of linked, all, none`,
		Listen: "169.254.169.252:988", Listen6: "[fd20:ce::252]:988", Requests: 7, Requests6: 2, Unreachable: away,
		Attestation: Attestation{Mode: "kernel",
			Kernel: &attest.KernelStatus{Problem: "connect: connection refused", Since: now.Add(-time.Minute),
				Lacks: []string{"no cgroup v2: pods on the host network are refused, and containers of a pod are not told apart"},
				Conflicts: []attest.Conflict{{Address: netip.MustParseAddr("10.0.0.7"), LastSeen: now,
					Between: [2]string{"u", "network namespace 4026532249 of /system.slice/containerd.service"}}}},
			HostIdentities: []HostIdentity{{Unit: "image-credential-provider-refresh.service",
				HostStatus: kube.HostStatus{ServiceAccount: "kube-system/image-puller-of-the-node",
					AccountStatus: kube.AccountStatus{GoogleEmail: gsa, AccountError: away}}}}},
		Routing: &routing.State{Desired: routing.Installed, Mode: routing.ModeIPTables, Listen: "169.254.169.252:988",
			Listen6: "[fd20:ce::252]:988", IPv6: "ip6tables: can't initialize ip6tables table `nat': Table does not exist",
			Reason: "iptables 1.8.9 (nf_tables) sees what pods send on this node's network", Since: now,
			HostNetwork: "left alone: none of the host's own cgroups was found, which needs cgroup v2",
			Standing: routing.Standing{Time: now, Faults: []string{"missing: iptables -w -t nat -A PREROUTING -d " +
				"169.254.169.254/32 -p tcp -m tcp --dport 80 -m comment --comment gke-metadata-emulator -j GME-PREROUTING"}}},
		LastInstall: &routing.Failure{Error: "iptables: Resource temporarily unavailable", Times: 3, Last: now},
		Cluster: &kube.Status{Kubeconfig: "/etc/kubernetes/kubelet.conf (read from its copy " +
			"/run/gke-metadata-emulator/credential/kubeconfig)", Credential: "client certificate", Server: "https://10.0.0.1",
			Problem: away, LastError: away + "!", LastErrorAt: &now, NodeNameProblem: `nodeName is "a", but the credential ` +
				`belongs to node "ip-10-1-2-3.eu-central-1.compute.internal"`,
			Pods: []kube.PodStatus{{Namespace: namespace, Name: "feature-store-online-serving-7d9f8b6c5d-x2x4z", UID: "u",
				Addresses: []netip.Addr{netip.MustParseAddr("10.244.113.7"), netip.MustParseAddr("fd00:10:244:113:1::7")},
				Evidence:  "cgroup", ServiceAccount: account, AccountStatus: kube.AccountStatus{GoogleEmail: gsa}},
				{Namespace: "kube-system", Name: "kube-proxy-4x7xq", HostNetwork: true, ServiceAccount: "kube-proxy",
					AccountStatus: kube.AccountStatus{AccountError: away}}}},
		Tokens: []token.EntryStatus{{ServiceAccount: namespace + "/" + account, GoogleServiceAccount: gsa, LastError: away,
			Scopes: "https://www.googleapis.com/auth/cloud-platform https://www.googleapis.com/auth/userinfo.email"},
			{ServiceAccount: namespace + "/" + account, GoogleServiceAccount: gsa, Audience: "https://example.com/a/long/path"}},
		SkippedHostPods: []SkippedHostPod{{ServiceAccount: "kube-system/aws-node", Requests: 7}},
	}
}

// On a terminal no line is longer than 100 columns, whatever is shown, and nothing is lost.
func TestTextFits(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	words := func(look look) (all string) {
		var text strings.Builder
		if err := busy(now).text(&text, now, look); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(text.String()) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); look.Width > 0 && n > look.Width {
				t.Errorf("%d columns, and %d are the most: %s", n, look.Width, line)
			}
			if line != strings.TrimRight(line, " \n")+"\n" {
				t.Errorf("spaces at the end of %q", line)
			}
		}
		return text.String()
	}
	whole := words(look{})
	for _, width := range []int{maxWidth, 80, 60} {
		narrow := strings.Join(strings.Fields(words(look{Width: width})), "")
		for _, s := range []string{"prefetch:\"sometimes\"isnotoneoflinked,all,none", "dialtcp10.0.0.1:6443:connect:connectionrefused",
			"TOKENS:2", "gke-metadata-emulator-jGME-PREROUTING"} {
			if !strings.Contains(narrow, s) {
				t.Errorf("%d columns: no %q", width, s)
			}
		}
	}
	if strings.Contains(whole, "\x1b") {
		t.Error("an escape without Color")
	}
	var text strings.Builder
	if err := busy(now).text(&text, now, look{Width: maxWidth, Color: true}); err != nil {
		t.Fatal(err)
	}
	if uncolored := strings.NewReplacer("\x1b[31m", "", "\x1b[1m", "", "\x1b[0m", "").Replace(text.String()); uncolored ==
		text.String() || uncolored != words(look{Width: maxWidth}) {
		t.Errorf("colors change more than colors:\n%s", &text)
	}
}

// Only a terminal has a width and colors, and NO_COLOR takes the colors away.
func TestLookOf(t *testing.T) {
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	file, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for what, got := range map[string]look{"a buffer": lookOf(new(strings.Builder)), "a file": lookOf(file)} {
		if got != (look{}) {
			t.Errorf("%s: %+v", what, got)
		}
	}
	terminal := openTerminal(t)
	for _, c := range []struct {
		noColor, term string
		columns       uint16
		want          look
	}{
		{"", "xterm", 0, look{maxWidth, true}}, // a serial console does not know its size
		{"", "xterm", 200, look{maxWidth, true}},
		{"", "xterm", 80, look{80, true}},
		{"1", "xterm", 80, look{80, false}},
		{"", "dumb", 80, look{80, false}},
	} {
		t.Setenv("NO_COLOR", c.noColor)
		t.Setenv("TERM", c.term)
		if err := unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: c.columns}); err != nil {
			t.Fatal(err)
		}
		if got := lookOf(terminal); got != c.want {
			t.Errorf("%+v: %+v", c, got)
		}
	}
}

// openTerminal returns a terminal of its own, without a program at the other end.
func openTerminal(t *testing.T) *os.File {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile("/dev/pts/"+strconv.FormatUint(uint64(n), 10), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return terminal
}
