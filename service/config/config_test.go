package config

import (
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

const (
	testProvider = "projects/123456789/locations/global/workloadIdentityPools/my-pool/providers/my-cluster"
	minimal      = "workloadIdentityProvider: " + testProvider + "\nprojectID: my-project\n"
)

// files stands in for the disk. What is not in it does not exist.
type files map[string]string

func (f files) read(name string) ([]byte, error) {
	if text, ok := f[name]; ok {
		return []byte(text), nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

// load reads text as /etc/config.yaml, beside whatever else is on the disk.
func load(text string, flags map[string]string, disk files) (Config, error) {
	all := files{"/etc/config.yaml": text}
	maps.Copy(all, disk)
	return (&loader{read: all.read, file: "/etc/config.yaml"}).load(flags)
}

func mustLoad(t *testing.T, text string, flags map[string]string, disk files) Config {
	t.Helper()
	c, err := load(text, flags, disk)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var someIdentities = []HostIdentity{
	{Unit: "kubelet.service", ServiceAccount: workload.ServiceAccount{Namespace: "kube-system", Name: "image-puller"}},
	{Cgroup: "/system.slice/docker-*.scope", ServiceAccount: workload.ServiceAccount{Namespace: "ns", Name: "docker"}},
}

func TestMinimal(t *testing.T) {
	got := mustLoad(t, minimal, nil, nil)
	want := Config{
		WorkloadIdentity: WorkloadIdentity{
			Audience: "//iam.googleapis.com/" + testProvider, // G-03
			Pool:     "my-pool",
			PoolName: "projects/123456789/locations/global/workloadIdentityPools/my-pool",
		},
		Project:       Project{ID: "my-project", Number: "123456789"},
		TokenAudience: "//iam.googleapis.com/" + testProvider, // G-17
		Listen:        netip.MustParseAddrPort("169.254.169.252:988"),
		DNS:           "off",
		HealthListen:  netip.MustParseAddrPort("127.0.0.1:16322"),
		Routing: Routing{Mode: "iptables", InterceptHostPods: "auto", OnStop: "remove",
			//
			Guard: []netip.AddrPort{
				netip.MustParseAddrPort("169.254.169.254:80"),
				netip.MustParseAddrPort("[fd00:c1::a9fe:a9fe]:80"),
				netip.MustParseAddrPort("[fd00:ec2::254]:80"),
				netip.MustParseAddrPort("[fd20:ce::254]:80"),
			}},
		Attestation: Attestation{Mode: "kernel"},
		Google: Google{UniverseDomain: "googleapis.com", STSURL: "https://sts.googleapis.com/v1/token",
			IAMCredentialsURL: "https://iamcredentials.googleapis.com", TokenLifetime: time.Hour},
		EmailForUnlinked: "my-pool", // E-24
		Prefetch:         "linked",
		Limits:           Limits{ConnectionsPerPod: 256, RequestsPerPod: 1000, MintsPerPod: 16, KeysPerPod: 64},
		HostCheck:        true,
		Log:              Log{Level: "info", Format: "auto"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

func TestResolved(t *testing.T) {
	const namespace = "identitynamespace:my-project.svc.id.goog:https://container.googleapis.com/v1/projects/p/locations/l/clusters/c"
	for _, tt := range []struct {
		name, text string
		flags      map[string]string
		got        func(Config) any
		want       any
	}{
		{"G-03 provider with //", strings.Replace(minimal, "projects/", "//iam.googleapis.com/projects/", 1), nil,
			func(c Config) any { return c.WorkloadIdentity.Audience }, "//iam.googleapis.com/" + testProvider},
		{"G-17 provider with https", strings.Replace(minimal, "projects/", "https://iam.googleapis.com/projects/", 1), nil,
			func(c Config) any { return c.TokenAudience }, "//iam.googleapis.com/" + testProvider},
		{"G-03 identitynamespace", "projectID: my-project\nnumericProjectID: 5\nworkloadIdentityProvider: " + namespace, nil,
			func(c Config) any { return []any{c.WorkloadIdentity, c.TokenAudience, c.EmailForUnlinked} },
			[]any{WorkloadIdentity{Audience: namespace, Pool: "my-project.svc.id.goog"}, "my-project.svc.id.goog",
				"my-project.svc.id.goog"}},
		{"G-17 audience of its own", minimal + "tokenAudience: https://example.com/x", nil,
			func(c Config) any { return c.TokenAudience }, "https://example.com/x"},
		{"G-09 universe", minimal + "google: {universeDomain: example.goog}", nil,
			func(c Config) any { return []string{c.Google.STSURL, c.Google.IAMCredentialsURL} },
			[]string{"https://sts.example.goog/v1/token", "https://iamcredentials.example.goog"}},
		{"G-08 regional endpoint without a path", minimal + "google: {stsURL: https://sts.europe-west4.rep.googleapis.com}",
			nil,
			func(c Config) any { return c.Google.STSURL }, "https://sts.europe-west4.rep.googleapis.com/v1/token"},
		{"G-08 endpoint with a path", minimal + "google: {stsURL: https://sts.internal:8443/x/token}", nil,
			func(c Config) any { return c.Google.STSURL }, "https://sts.internal:8443/x/token"},
		{"G-11 IAM with the API's path", minimal + "google: {iamCredentialsURL: https://IAM.internal/v1/}", nil,
			func(c Config) any { return c.Google.IAMCredentialsURL }, "https://iam.internal"},
		{"the project is not the pool's", minimal + "numericProjectID: 42", nil,
			func(c Config) any { return c.Project.Number }, "42"},
		{"U-17 extra metadata", minimal + "extraMetadata:\n  instance/machine-type: n2\n  " +
			"/computeMetadata/v1/instance/tags: '[]'\n  instance/preemptible: FALSE\n  instance/empty:\n", nil,
			func(c Config) any { return c.ExtraMetadata },
			map[string]string{"instance/machine-type": "n2", "instance/tags": "[]", "instance/preemptible": "FALSE",
				"instance/empty": ""}},
		{"null and empty mean the default", minimal + "listen:\nprefetch: ''\nrouting: {guard: [], mode: ~}\nlimits:\n", nil,
			func(c Config) any {
				return []any{c.Listen.String(), c.Prefetch, len(c.Routing.Guard), c.Routing.Mode, c.Limits.KeysPerPod}
			},
			[]any{"169.254.169.252:988", "linked", 4, "iptables", 64}},
		{"lists replace the default", minimal + "routing: {guard: ['169.254.169.254:80'], excludeInterfaces: [docker0, " +
			"virbr0, docker0]}", nil,
			func(c Config) any { return []any{len(c.Routing.Guard), c.Routing.ExcludeInterfaces} },
			[]any{1, []string{"docker0", "virbr0"}}},
		{"a flag beats the file", minimal + "prefetch: all", map[string]string{"prefetch": "none"},
			func(c Config) any { return c.Prefetch }, "none"},
		{"an empty flag is the default", minimal + "prefetch: all", map[string]string{"prefetch": ""},
			func(c Config) any { return c.Prefetch }, "linked"},
		{"a flag beats a bad value in the file", minimal + "prefetch: whatever", map[string]string{"prefetch": "all"},
			func(c Config) any { return c.Prefetch }, "all"},
		{"lists in flags", minimal, map[string]string{"routing.excludeInterfaces": "docker0, virbr0",
			"extraMetadata": "instance/a=1,instance/b=x=y"},
			func(c Config) any { return []any{c.Routing.ExcludeInterfaces, c.ExtraMetadata} },
			[]any{[]string{"docker0", "virbr0"}, map[string]string{"instance/a": "1", "instance/b": "x=y"}}},
		{"processes of the node", minimal + "kubeconfig: /k\nhostIdentities:\n- {unit: kubelet.service, serviceAccount: " +
			"kube-system/image-puller}\n- cgroup: /system.slice/docker-*.scope\n  serviceAccount: ns/docker\n", nil,
			func(c Config) any { return c.HostIdentities }, someIdentities},
		{"processes of the node in a flag", minimal,
			map[string]string{"hostIdentities": "unit:kubelet.service=kube-system/image-puller, " +
				"cgroup:/system.slice/docker-*.scope=ns/docker"},
			func(c Config) any { return c.HostIdentities }, someIdentities},
		{"U-02", minimal + "passthrough: [kube-system/aws-node, kube-system/ebs-csi-node-sa]", nil,
			func(c Config) any { return c.Passthrough }, []string{"kube-system/aws-node", "kube-system/ebs-csi-node-sa"}},
		{"A-20", minimal + "attestation: {proxies: [istio-system/ztunnel]}", nil,
			func(c Config) any { return c.Attestation }, Attestation{Mode: "kernel", Proxies: []string{"istio-system/ztunnel"}}},
		{"A-14", minimal + "attestation: {byAddress: [gvisor, kata]}", nil,
			func(c Config) any { return c.Attestation }, Attestation{Mode: "kernel", ByAddress: []string{"gvisor", "kata"}}},
		{"R-05 uplinks by their beginning", minimal + "routing: {uplinks: [eth+, bond0]}", nil,
			func(c Config) any { return c.Routing.Uplinks }, []string{"eth+", "bond0"}},
		{"relative to the file", minimal + "kubeconfig: ./kube/../node.conf", nil,
			func(c Config) any { return c.Kubeconfig }, "/etc/node.conf"},
		{"a mapped IPv4 address is one", minimal + "listen: '[::ffff:169.254.1.1]:80'", nil,
			func(c Config) any { return c.Listen.String() }, "169.254.1.1:80"},
		{"R-29 loopback listens where pods ask", minimal + "routing: {mode: loopback, force: true}", nil,
			func(c Config) any { return []any{c.Listen.String(), c.Routing.Force} }, []any{"169.254.169.254:80", true}},
		{"any free port on loopback", minimal + "routing: {mode: none}\nlisten: 127.0.0.1:0", nil,
			func(c Config) any { return c.Listen.String() }, "127.0.0.1:0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.got(mustLoad(t, tt.text, tt.flags, nil)); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}

// TestListen6: off by default; a guard that leaves the real server open by IPv6 is worth a word
// where it is on (H-24).
func TestListen6(t *testing.T) {
	if c := mustLoad(t, minimal, nil, nil); c.Listen6.IsValid() {
		t.Error(c.Listen6)
	}
	const on = minimal + "listen6: '[fd20:ce::252]:988'\n"
	for mode, text := range map[string]string{"iptables": on, "nftables": on + "routing: {mode: nftables}",
		"auto": on + "routing: {mode: auto}"} {
		c := mustLoad(t, text, nil, nil)
		if c.Listen6.String() != "[fd20:ce::252]:988" || !slices.Contains(c.Routing.Guard, metadataServer6) ||
			len(c.Warnings) != 0 {
			t.Errorf("%s: %v %v %q", mode, c.Listen6, c.Routing.Guard, c.Warnings)
		}
	}
	c := mustLoad(t, on+"routing: {guard: ['169.254.169.254:80']}", nil, nil)
	if len(c.Routing.Guard) != 1 || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "[fd20:ce::254]:80") {
		t.Errorf("%v %q", c.Routing.Guard, c.Warnings)
	}
	if c := mustLoad(t, minimal, map[string]string{"listen6": "[fd20:ce::252]:988"}, nil); !c.Listen6.IsValid() {
		t.Error("the flag is not heard")
	}
}

// TestDNS: off by default, and worth a word in a mode that does not see names.
func TestDNS(t *testing.T) {
	if c := mustLoad(t, minimal, nil, nil); c.DNS != "off" {
		t.Error(c.DNS)
	}
	for mode, warned := range map[string]bool{"iptables": false, "nftables": false, "auto": false, "loopback": true,
		"ebpf": true, "none": true, "observe": true} {
		c := mustLoad(t, minimal+"dns: answer\nrouting: {mode: "+mode+"}", nil, nil)
		said := slices.ContainsFunc(c.Warnings, func(w string) bool {
			return strings.HasPrefix(w, "dns: routing.mode "+mode)
		})
		if c.DNS != "answer" || said != warned {
			t.Errorf("%s: %s, %q", mode, c.DNS, c.Warnings)
		}
	}
}

func TestWarnings(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"R-19 ephemeral", "listen: 169.254.169.252:40000", "listen: port 40000 lies in the ephemeral range 40000-50000"},
		{"R-19 ephemeral health", "healthListen: 127.0.0.1:50000", "healthListen: port 50000 lies in the ephemeral range"},
		{"R-19 Lustre", "routing: {mode: none}\nlisten: 0.0.0.0:988", "listen: port 988 on every address is what Lustre"},
		{"health for everybody", "healthListen: 0.0.0.0:16322", "healthListen: 0.0.0.0:16322 is not loopback"},
		{"R-32 guard", "routing: {guard: ['168.63.129.16:80']}", "routing.guard: without 169.254.169.254:80"},
		{"H-16", "hostCheck: false", "hostCheck is off"},
		{"attestation by address", "attestation: {mode: source-ip}", "attestation.mode is source-ip"},
		{"N-07", "hostIdentities: [{unit: kubelet.service, serviceAccount: a/b}]", "hostIdentities: without a kubeconfig"},
		{"U-02 auto", "passthrough: [a/b]", "passthrough: routing.interceptHostPods is auto, which redirects"},
		{"U-02 off", "passthrough: [a/b]\nrouting: {interceptHostPods: off}",
			"passthrough: routing.interceptHostPods is off"},
		{"U-02 loopback", "passthrough: [a/b]\nrouting: {mode: loopback}",
			"passthrough: routing.mode loopback redirects no pod on the host network"},
		{"U-02 none", "passthrough: [a/b]\nrouting: {mode: none}", "passthrough: routing.mode none"},
		{"U-02 on", "passthrough: [a/b]\nrouting: {interceptHostPods: on}", ""},
		{"none", "listen: 169.254.169.252:39999", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := mustLoad(t, minimal+tt.text, nil, files{"/proc/sys/net/ipv4/ip_local_port_range": "40000\t50000\n"})
			if tt.want == "" && len(c.Warnings) == 0 {
				return
			}
			if len(c.Warnings) != 1 || !strings.HasPrefix(c.Warnings[0], tt.want) || tt.want == "" {
				t.Errorf("got %q, want one that begins %q", c.Warnings, tt.want)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	real := write("real.yaml", minimal)
	link := filepath.Join(dir, "link.yaml")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	enough := map[string]string{"workloadIdentityProvider": testProvider, "projectID": "my-project"}
	for _, tt := range []struct {
		name, file string
		flags      map[string]string
		want       string // "" = loads
	}{
		{"a file", real, nil, ""},
		{"a symlink", link, nil, ""},
		{"no file, flags suffice", filepath.Join(dir, "absent"), enough, ""},
		{"no file asked for, flags suffice", "", enough, ""},
		{"no file", filepath.Join(dir, "absent"), nil, "absent: there is no such file: create it"},
		{"no file asked for", "", nil, "--workload-identity-provider: is not set"},
		{"a directory", dir, nil, "is a directory: make it a file"},
		{"a large file", write("large.yaml", minimal+strings.Repeat("#", maxBytes)), nil, "more than 1048576 bytes"},
		{"as large as may be", write("cap.yaml", minimal+strings.Repeat("#", maxBytes-len(minimal))), nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(tt.file, tt.flags)
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var faults *Error
			if !errors.As(err, &faults) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestKeys(t *testing.T) {
	for path, want := range map[string]string{
		"routing.mode": "routing-mode", "workloadIdentityProvider": "workload-identity-provider",
		"routing.interceptHostPods": "routing-intercept-host-pods", "google.stsURL": "google-sts-url",
		"google.iamCredentialsURL": "google-iam-credentials-url", "limits.connectionsPerPod": "limits-connections-per-pod",
		"log.level": "log-level", "projectID": "project-id", "numericProjectID": "numeric-project-id",
		"google.caFile": "google-ca-file",
	} {
		if got := FlagName(path); got != want {
			t.Errorf("the flag of %s is %s, not %s", path, got, want)
		}
	}
	flags := map[string]bool{}
	for _, k := range Keys() {
		if flags[k.Flag()] {
			t.Errorf("two keys have the flag %s", k.Flag())
		}
		flags[k.Flag()] = true
		if k.Usage == "" || strings.ContainsAny(k.Usage, "\n") || strings.HasSuffix(k.Usage, ".") {
			t.Errorf("%s: usage %q is not a line without a full stop", k.Path, k.Usage)
		}
		if (k.Type() == "text" || k.Type() == "list" || k.Type() == "map") && k.check == nil {
			t.Errorf("%s: any text would do", k.Path)
		}
		if k.Values != nil && !slices.Contains(k.Values, k.Default) {
			t.Errorf("%s: the default %q is none of %v", k.Path, k.Default, k.Values)
		}
	}
}

func TestDefaultHoldsWithoutAFile(t *testing.T) {
	c := Default() // what routing's closed guard stands on when the configuration is broken
	if c.Listen.String() != "169.254.169.252:988" || len(c.Routing.Guard) != 4 || c.Google.STSURL == "" {
		t.Errorf("%+v", c)
	}
}

func FuzzLoad(f *testing.F) {
	reference, err := os.ReadFile("testdata/reference.yaml")
	if err != nil {
		f.Fatal(err)
	}
	broken, err := os.ReadFile("testdata/broken.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(minimal), "")
	f.Add([]byte(minimal+"credentialConfigFile: /credential.json"), credentialText)
	f.Add(reference, "")
	f.Add(broken, "{}")
	f.Add([]byte("a: &a [*a]\nb: !!binary aGk=\n<<: {c: 1}\n? [x]\n: y\n---\n"), "[]")
	f.Fuzz(func(t *testing.T, text []byte, credential string) {
		c, err := load(string(text), nil, files{"/credential.json": credential})
		if err != nil {
			var faults *Error
			if !errors.As(err, &faults) || len(faults.Faults) == 0 || strings.Contains(err.Error(), "%!") {
				t.Fatalf("not a list of faults: %v", err)
			}
			for _, f := range faults.Faults {
				if f.Problem == "" || f.Remedy == "" {
					t.Fatalf("a fault without a problem or a remedy: %+v", f)
				}
			}
			return
		}
		again, err := load(c.YAML(), nil, files{"/credential.json": credential})
		if err != nil || !reflect.DeepEqual(c, again) {
			t.Fatalf("what was loaded is not what it shows: %v\n%s\n%+v\n%+v", err, c.YAML(), c, again)
		}
	})
}

// TestBrokenRouting: with an error, Load has what is valid of the keys of routing.
func TestBrokenRouting(t *testing.T) {
	t.Parallel()
	original := Default().Routing
	azure := netip.MustParseAddrPort("168.63.129.16:80")
	for name, c := range map[string]struct {
		text  string
		flags map[string]string
		want  func(*Routing)
	}{
		"valid": {"projectID: X\nrouting: {guard: ['168.63.129.16:80'], uplinks: [wan+], mode: none}", nil,
			validRouting(azure)},
		"not YAML": {"routing: {mode: none\n", nil, func(*Routing) {}},
		"not YAML, flags": {"routing: [\n", map[string]string{"routing.guard": azure.String(), "routing.uplinks": "wan+",
			"routing.mode": "none"}, validRouting(azure)},
		"at fault": {"routing:\n  guard: [x, '168.63.129.16:80']\n  uplinks: [wan+, '/']\n" +
			"  excludeInterfaces: [docker0, '']\n  mode: non", nil, func(r *Routing) { r.Guard = []netip.AddrPort{azure} }},
		"mode twice": {"routing:\n  mode: none\n  mode: observe\n", nil, func(*Routing) {}},
		"at fault beside others": {"routing:\n  mode: ebpf\n  excludeInterfaces: [docker0]\n", nil, func(r *Routing) {
			r.Mode, r.ExcludeInterfaces = "ebpf", []string{"docker0"}
		}},
	} {
		file := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := Load(file, c.flags)
		want := original
		c.want(&want)
		if err == nil || !reflect.DeepEqual(got, Config{Routing: want}) {
			t.Errorf("%s: %v\n%+v, want\n%+v", name, err, got.Routing, want)
		}
	}
}

func validRouting(guard netip.AddrPort) func(*Routing) {
	return func(r *Routing) {
		r.Guard, r.Uplinks, r.Mode = []netip.AddrPort{guard}, []string{"wan+"}, "none"
	}
}
