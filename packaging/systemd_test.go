package packaging

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// oldest is RHEL 8's systemd. What came later may be missing and must not matter: a systemd that
// does not know a directive warns, ignores the line and loads the unit. A value that it does not
// know is another matter for some directives, so values have a table of their own.
const oldest = 239

// since is the version of systemd that brought each directive of our units, as its manual pages
// say; 0 is older than they tell, and each of those is in 239's own table
// (src/core/load-fragment-gperf.gperf.m4).
var since = map[string]int{
	// [Unit]
	"After": 0, "Before": 0, "ConditionPathExists": 0, "DefaultDependencies": 0, "Description": 0,
	"Documentation": 0, "PartOf": 0, "ReloadPropagatedFrom": 0,
	"Requires": 0, "StartLimitIntervalSec": 229, "Wants": 0,
	// [Install], [Path], [Socket]
	"Also": 0, "WantedBy": 0, "PathChanged": 0,
	"Backlog": 0, "FreeBind": 0, "ListenDatagram": 0, "ListenStream": 0, "NoDelay": 216, "Service": 0,
	"TriggerLimitIntervalSec": 230,
	// [Service]: how it runs
	"Environment": 0, "EnvironmentFile": 0, "ExecReload": 0, "ExecStart": 0, "ExecStartPre": 0, "ExecStopPost": 0,
	"FileDescriptorStoreMax": 219, "Group": 0, "KillMode": 187, "NotifyAccess": 0, "Restart": 0, "RestartSec": 0,
	"RuntimeDirectory": 211, "RuntimeDirectoryMode": 211, "RuntimeDirectoryPreserve": 235, "TimeoutStartSec": 188,
	"TimeoutStopSec": 188, "Type": 0, "UMask": 0, "User": 0, "WatchdogSec": 0,
	// what it may take
	"LimitCORE": 0, "LimitNOFILE": 0, "MemoryHigh": 231, "MemoryMax": 231, "OOMScoreAdjust": 0, "TasksMax": 227,
	// what it may do
	"CapabilityBoundingSet": 0, "DevicePolicy": 208, "IPAddressAllow": 235, "IPAddressDeny": 235, "KeyringMode": 235,
	"LockPersonality":        235,
	"MemoryDenyWriteExecute": 231, "NoNewPrivileges": 187, "PrivateDevices": 209, "PrivateIPC": 248, "PrivateMounts": 239,
	"PrivateNetwork": 0,
	"PrivateTmp":     0, "ProcSubset": 247, "ProtectClock": 245, "ProtectControlGroups": 232, "ProtectHome": 214,
	"ProtectHostname": 242, "ProtectKernelLogs": 244, "ProtectKernelModules": 232, "ProtectKernelTunables": 232,
	"ProtectProc": 247, "ProtectSystem": 214, "ReadWritePaths": 231, "RemoveIPC": 232, "RestrictAddressFamilies": 211,
	"RestrictNamespaces": 233, "RestrictRealtime": 231, "RestrictSUIDSGID": 242, "SystemCallArchitectures": 209,
	"SystemCallErrorNumber": 209, "SystemCallFilter": 187,
}

// hardening is what only takes rights away: without it the service does the same.
var hardening = map[string]bool{
	"PrivateIPC": true, "ProcSubset": true, "ProtectClock": true, "ProtectHostname": true, "ProtectKernelLogs": true,
	"ProtectProc": true, "RestrictSUIDSGID": true,
}

// values are what 239 understands of the directives that our units use. An older or newer form
// makes it refuse the unit for some, run it without the line for others, so a form that is not here
// has to be looked up. The number is the version whose NEWS has it.
var values = map[string]string{
	"After": unitNames, "Also": unitNames, "Before": unitNames, "ReloadPropagatedFrom": unitNames, "Requires": unitNames,
	"WantedBy": unitNames, "Wants": unitNames,
	"Description": `.*`, "Documentation": `(man:[a-z-]+\([58]\) )+https://\S+`, // man: 201
	"ExecStart": `/[^%]+`, // a name without a path is 239's; 247's `systemd-analyze verify` calls it a mistake
	// + is full rights for one command: 231
	"ExecStartPre": `[+-]?/[^%]+`, "ExecReload": `\+?/[^%]+`, "ExecStopPost": `\+?/[^%]+`,
	"Environment": `[A-Z_]+=[^%]*`, "EnvironmentFile": `-/[^%]+`, "Group": `[a-z-]+`, "User": `[a-z-]+`,
	"ListenDatagram": `[0-9.:]+`, "ConditionPathExists": `/[^%]+`, "PartOf": unitNames, "Service": unitNames,
	"ListenStream": `[0-9.:]+`, "PathChanged": `/[^%]+`, "ReadWritePaths": `/[^%]+`,
	"RuntimeDirectory": `[a-z-]+(/[a-z-]+)?`, // one in another: 235
	"KillMode":         `mixed`,              // 209
	"NotifyAccess":     `main`, "Restart": `always`, "Type": `notify|oneshot`,
	"MemoryHigh": `\d+M`, "MemoryMax": `\d+M`,
	"SystemCallFilter": `@system-service|~@privileged @resources`,  // 239; groups at all, and several, 231
	"ProtectHome":      `yes|read-only`, "ProtectSystem": `strict`, // 214, 232
	"DevicePolicy": `closed`, "KeyringMode": `private`, "IPAddressAllow": `[0-9.]+`, "IPAddressDeny": `any`,
	"RestrictNamespaces":      `yes|net`,                                                      // names of namespaces: 233
	"RestrictAddressFamilies": `AF_(UNIX|NETLINK|INET|INET6)( AF_(NETLINK|INET|INET6|UNIX))*`, // 211
	"CapabilityBoundingSet":   `|CAP_[A-Z_]+( CAP_[A-Z_]+)*`, "SystemCallArchitectures": `native`,
	"SystemCallErrorNumber": `EPERM`,
}

const (
	unitNames = `[\w.-]+( [\w.-]+)*`
	plainly   = `yes|no|-?\d+(ms|s|min)?` // and what has no line above
)

// Every directive of our units is known to the oldest systemd or is nothing but hardening, and so
// is every form of value.
func TestOldestSystemd(t *testing.T) {
	files, err := filepath.Glob("../systemd/" + program + "*")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	used := map[string]bool{}
	for _, file := range append(files, "../systemd/kubelet-wait.conf", "examples/exec-plugin.conf") {
		for _, line := range directives(t, file) {
			name, value, _ := strings.Cut(line, "=")
			used[name] = true
			version, known := since[name]
			form, special := values[name]
			if !special {
				form = plainly
			}
			switch {
			case !known:
				t.Errorf("%s: %s: which systemd brought it? See its manual pages, and write it down in since", file, line)
			case version > oldest && !hardening[name]:
				t.Errorf("%s: %s needs systemd %d, RHEL 8 has %d", file, line, version, oldest)
			case version > oldest: // ignored there
			case !regexp.MustCompile("^(" + form + ")$").MatchString(value):
				t.Errorf("%s: %s: does systemd %d understand this? See its manual pages, and write it down in values", file, line,
					oldest)
			}
		}
	}
	for name := range since {
		if !used[name] {
			t.Errorf("no unit uses %s any more: remove it from since", name)
		}
	}
	for name := range values {
		if !used[name] {
			t.Errorf("no unit uses %s any more: remove it from values", name)
		}
	}
}

// directives are the lines of a unit that say something.
func directives(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var lines []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if line == "" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, "[") {
			continue
		}
		if strings.HasSuffix(line, `\`) || !strings.Contains(line, "=") {
			t.Errorf("%s: %q: one directive a line, please", file, line)
		}
		lines = append(lines, line)
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return lines
}

// The generator runs in every boot, before anything is mounted, with whatever sh there is. It
// writes one drop-in, where a configuration that loads says where to listen; without one, with a
// broken one and without the program it does nothing.
func TestGenerator(t *testing.T) {
	t.Parallel()
	root, run := machineOf(t, "GME_TEST_RECIPES")
	place(t, root, "new.deb", built(t, packages, "*.deb"))
	place(t, root, "mine.yaml", "examples/config.yaml")
	run(`dpkg -i /tmp/new.deb
etc=/etc/gke-metadata-emulator bin=/usr/bin/gke-metadata-emulator
for sh in dash bash 'busybox sh'; do
	generate() { rm -rf /tmp/out; mkdir /tmp/out; $sh /usr/lib/systemd/system-generators/gke-metadata-emulator /tmp/out /tmp/out /tmp/out; }
	nothing() { generate; test -z "$(ls /tmp/out)"; }
	echo 'listen: 10.0.0.1:900' >$etc/config.yaml; nothing
	cat /tmp/mine.yaml >>$etc/config.yaml; generate
	printf '[Socket]\nListenStream=\nListenStream=10.0.0.1:900\nTransparent=no\n' | cmp - /tmp/out/gke-metadata-emulator.socket.d/10-listen.conf
	{ cat /tmp/mine.yaml; echo "listen6: '[fd20:ce::252]:988'"; } >$etc/config.yaml; generate
	ipv6=; [ ! -e /proc/net/if_inet6 ] || ipv6='ListenStream=[fd20:ce::252]:988\n'
	printf "[Socket]\nListenStream=\nListenStream=169.254.169.252:988\n${ipv6}Transparent=no\n" | cmp - /tmp/out/gke-metadata-emulator.socket.d/10-listen.conf
	test ! -e /tmp/out/gke-metadata-emulator.socket.wants
	{ cat /tmp/mine.yaml; echo '"dns" : answer'; } >$etc/config.yaml; generate
	printf '[Socket]\nListenDatagram=\nListenDatagram=169.254.169.252:988\n' | cmp - /tmp/out/gke-metadata-emulator-dns.socket.d/10-listen.conf
	cmp /tmp/out/gke-metadata-emulator.socket.wants/gke-metadata-emulator-dns.socket /usr/lib/systemd/system/gke-metadata-emulator-dns.socket
	echo "listen6: '[fd20:ce::252]:988'" >>$etc/config.yaml; generate
	[ -z "$ipv6" ] || ipv6='ListenDatagram=[fd20:ce::252]:988\n'
	printf "[Socket]\nListenDatagram=\nListenDatagram=169.254.169.252:988\n$ipv6" | cmp - /tmp/out/gke-metadata-emulator-dns.socket.d/10-listen.conf
	{ cat /tmp/mine.yaml; printf 'dns: answer\nrouting: {mode: loopback}\n'; } >$etc/config.yaml; generate
	test ! -e /tmp/out/gke-metadata-emulator.socket.wants
	mv $bin /tmp; nothing; mv /tmp/gke-metadata-emulator $bin
	cp /tmp/mine.yaml $etc/config.yaml; nothing
	rm $etc/config.yaml; nothing
done`)
}
