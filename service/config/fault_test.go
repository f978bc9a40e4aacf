package config

import (
	"errors"
	"os"
	"strings"
	"testing"
)

func TestFaults(t *testing.T) {
	withProvider := func(p string) string { return "workloadIdentityProvider: " + p + "\nprojectID: my-project\n" }
	const pools = "/locations/global/workloadIdentityPools/"
	for _, tt := range []struct {
		name, text string
		flags      map[string]string
		want       string // the lines of the error, /etc/ left out; a line may be cut after its problem
	}{
		{"missing keys", "", nil, `config.yaml: projectID: is not set
config.yaml: workloadIdentityProvider: is not set`},
		{"only comments", "# nothing\n---\n", nil, `config.yaml: projectID: is not set
config.yaml: workloadIdentityProvider: is not set`},
		{"unknown key", minimal + "kubeConfig: x", nil, `config.yaml:3: kubeConfig: there is no such key: write kubeconfig`},
		{"unknown key, nothing near", minimal + "turbo: true", nil,
			"config.yaml:3: turbo: there is no such key: remove it; `gke-metadata-emulator config show` prints every key"},
		{"group forgotten", minimal + "interceptHostPods: on", nil,
			`config.yaml:3: interceptHostPods: there is no such key: write routing.interceptHostPods`},
		{"the flag's name", minimal + "host-check: true", nil,
			`config.yaml:3: host-check: there is no such key: write hostCheck`},
		{"unknown group", minimal + "limit: {keysPerPod: 1}", nil,
			`config.yaml:3: limit: there is no such key: write limits`},
		{"dotted key", minimal + "log.level: debug", nil,
			`config.yaml:3: log.level: there is no such key: write the part before the dot, and the other indented below it`},
		{"duplicate key", minimal + "projectID: other-project", nil,
			`config.yaml:3: projectID: is already set in line 2: keep one of them`},
		{"text for a boolean", minimal + "hostCheck: yes", nil,
			`config.yaml:3: hostCheck: "yes" is not a boolean: write true or false`},
		{"quoted number", minimal + "limits: {keysPerPod: '4'}", nil,
			`config.yaml:3: limits.keysPerPod: "4" is not a number: write a number such as 64, without quotes`},
		{"number out of range", minimal + "limits: {keysPerPod: 0}", nil,
			`config.yaml:3: limits.keysPerPod: "0" is not a whole number from 1 to 1000000`},
		{"no requests at all", minimal + "limits: {requestsPerPod: 0}", nil,
			`config.yaml:3: limits.requestsPerPod: "0" is not a whole number from 1 to 1000000`},
		{"hexadecimal number", minimal + "limits: {keysPerPod: 0x10}", nil,
			`config.yaml:3: limits.keysPerPod: "0x10" is not a whole number`},
		{"choice", minimal + "routing: {mode: iptabels}", nil,
			`config.yaml:3: routing.mode: "iptabels" is not one of auto, iptables, nftables, loopback, ebpf, observe, none: ` +
				`write iptables`},
		{"list for a text", minimal + "nodeName: [a]", nil, `config.yaml:3: nodeName: must be one value, not a list`},
		{"text for a list", minimal + "routing:\n  excludeInterfaces: docker0", nil,
			`config.yaml:4: routing.excludeInterfaces: must be a list, not the text "docker0": write excludeInterfaces: [ONE, ` +
				`TWO]`},
		{"text for a map", minimal + "extraMetadata: x", nil, `config.yaml:3: extraMetadata: must be a map`},
		{"text for a group", minimal + "routing: iptables", nil,
			`config.yaml:3: routing: must be a group of keys, not the text "iptables"`},
		{"text for everything", "hello", nil, `config.yaml:1: not a configuration`},
		{"alias", minimal + "nodeName: &a x\nkubeconfig: *a", nil,
			`config.yaml:4: kubeconfig: must be one value, not an alias`},
		{"merge key", minimal + "<<: {nodeName: x}", nil,
			`config.yaml:3: must be the name of a setting, not something tagged "!!merge"`},
		{"binary", minimal + "nodeName: !!binary aGk=", nil,
			`config.yaml:3: nodeName: must be one value, not something tagged "!!binary"`},
		{"two documents", minimal + "---\nnodeName: x", nil, `config.yaml:3: a second document begins here`},
		{"not YAML", minimal + "listen: [::1]:80", nil, `config.yaml:3: this is not YAML: `},
		{"tab", minimal + "log:\n\tlevel: info", nil, `config.yaml:4: this is not YAML: `},

		{"G-03 project ID for number", withProvider("projects/my-project" + pools + "pool/providers/prov"), nil,
			`config.yaml:1: workloadIdentityProvider: "my-project" is not a project's number: gcloud projects describe ` +
				`PROJECT --format='value(projectNumber)'`},
		{"G-03 placeholder", withProvider("projects/NUMBER" + pools + "pool/providers/prov"), nil,
			`config.yaml:1: workloadIdentityProvider: "NUMBER" is not a project's number: gcloud projects describe PROJECT`},
		{"G-03 pool only", withProvider("projects/1" + pools + "pool"), nil,
			`config.yaml:1: workloadIdentityProvider: "projects/1/locations/global/workloadIdentityPools/pool" names a pool ` +
				`and not its provider`},
		{"G-03 short pool", withProvider("projects/1" + pools + "abc/providers/prov"), nil,
			`config.yaml:1: workloadIdentityProvider: "abc" is not the id of a pool`},
		{"G-03 capitals", withProvider("projects/1" + pools + "pool/providers/Prov"), nil,
			`config.yaml:1: workloadIdentityProvider: "Prov" is not the id of a pool or provider`},
		{"G-03 workforce", withProvider("//iam.googleapis.com/locations/global/workforcePools/p/providers/q"), nil,
			`config.yaml:1: workloadIdentityProvider: "//iam.googleapis.com/locations/global/workforcePools/p/providers/q" is ` +
				`not the provider of a workload identity pool`},
		{"G-03 region", withProvider("projects/1/locations/europe-west4/workloadIdentityPools/pool/providers/prov"), nil,
			`config.yaml:1: workloadIdentityProvider: ` +
				`"projects/1/locations/europe-west4/workloadIdentityPools/pool/providers/prov" is ` +
				`not the provider of a workload identity pool`},
		{"G-03 something else", withProvider("my-provider"), nil,
			`config.yaml:1: workloadIdentityProvider: "my-provider" is not a workload identity provider`},
		{"G-03 slash at the end", withProvider("projects/1" + pools + "pool/providers/prov/"), nil,
			`config.yaml:1: workloadIdentityProvider: `},
		{"G-03 identitynamespace without issuer", withProvider("identitynamespace:my-project.svc.id.goog"), nil,
			`config.yaml:1: workloadIdentityProvider: "identitynamespace:my-project.svc.id.goog" is not ` +
				`identitynamespace:POOL:ISSUER`},
		{"G-03 identitynamespace over http", withProvider("identitynamespace:my-project.svc.id.goog:http://x"), nil,
			`config.yaml:1: workloadIdentityProvider: `},
		{"E-07 identitynamespace without a number", withProvider("identitynamespace:my-project.svc.id.goog:https://x"), nil,
			`config.yaml: numericProjectID: is not set: write the number`},

		{"number for project", minimal[:strings.Index(minimal, "projectID")] + "projectID: 123", nil,
			`config.yaml:2: projectID: "123" is a project's number and not its ID: gcloud projects describe NUMBER ` +
				`--format='value(projectId)'`},
		{"E-07 project for number", minimal + "numericProjectID: my-project", nil,
			`config.yaml:3: numericProjectID: "my-project" is a project's ID and not its number: gcloud projects describe ` +
				`PROJECT --format='value(projectNumber)'`},
		{"E-10 id too large", minimal + "instance: {id: 9223372036854775808}", nil,
			`config.yaml:3: instance.id: "9223372036854775808" is not an instance id`},
		{"E-10 id zero", minimal + "instance: {id: 0}", nil, `config.yaml:3: instance.id: "0" is not an instance id`},
		{"E-11 zone with its project", minimal + "instance: {zone: projects/1/zones/europe-west4-a}", nil,
			`config.yaml:3: instance.zone: "projects/1/zones/europe-west4-a" is not the short form of a zone`},
		{"E-16 half a cluster", minimal + "cluster:\n  name: c\n  location: l", nil,
			`config.yaml:4: cluster.name: is set without cluster.uid: set all of name, location and uid, or none`},
		{"E-24 default", minimal + "emailForUnlinked: default", nil,
			`config.yaml:3: emailForUnlinked: "default" is a name that every ServiceAccount has already`},
		{"E-24 header injection", minimal + `emailForUnlinked: "a\r\nb"`, nil,
			`config.yaml:3: emailForUnlinked: "a\r\nb" is not an email or the name of a pool`},
		{"G-17 audience with a space", minimal + "tokenAudience: a b", nil,
			`config.yaml:3: tokenAudience: "a b" is not an audience`},
		{"node name with capitals", minimal + "nodeName: Node-1", nil, `config.yaml:3: nodeName: "Node-1" has capitals`},
		{"content for a path", minimal + `google: {caFile: "-----BEGIN CERTIFICATE-----\nMII"}`, nil,
			`config.yaml:3: google.caFile: this is not the path of a file`},
		{"CA file absent", minimal + "google: {caFile: ca.pem}", nil,
			`config.yaml:3: google.caFile: "/etc/ca.pem": file does not exist`},
		{"CA file without a certificate", minimal + "google: {caFile: config.yaml}", nil,
			`config.yaml:3: google.caFile: "/etc/config.yaml" holds no certificate`},

		{"U-02 no ServiceAccount", minimal + "passthrough: [aws-node]", nil,
			`config.yaml:3: passthrough: "aws-node" is not a ServiceAccount: write NAMESPACE/NAME`},
		{"A-20 no ServiceAccount", minimal + "attestation: {proxies: [ztunnel]}", nil,
			`config.yaml:3: attestation.proxies: "ztunnel" is not a ServiceAccount: write NAMESPACE/NAME`},
		{"A-20 by address", minimal + "attestation: {mode: source-ip, proxies: [a/b]}", nil,
			`config.yaml:3: attestation.proxies: attestation.mode source-ip cannot identify a proxy: remove it, or set ` +
				`attestation.mode to kernel`},
		{"U-02 by address", minimal + "passthrough: [a/b]\nattestation: {mode: source-ip}", nil,
			`config.yaml:3: passthrough: attestation.mode source-ip cannot identify pods on the host network: remove it, or ` +
				`set attestation.mode to kernel`},
		{"U-02 with a link", minimal + "passthrough: [a/b]\nrouting: {mode: loopback, link: gme0}", nil,
			`config.yaml:3: passthrough: routing.link makes 169.254.169.254 an address of this node, so the cloud's server ` +
				`cannot be reached: remove it, or use another routing.mode`},
		{"G-08 http", minimal + "google: {stsURL: 'http://127.0.0.1:1/v1/token'}", nil,
			`config.yaml:3: google.stsURL: "http://127.0.0.1:1/v1/token" would send tokens unencrypted`},
		{"G-08 password is not shown", minimal + "google: {stsURL: 'https://me:secret@x/v1/token'}", nil,
			`config.yaml:3: google.stsURL: the URL holds a user's name or password: write https://HOST/PATH`},
		{"G-08 no host", minimal + "google: {stsURL: 'https:///v1/token'}", nil,
			`config.yaml:3: google.stsURL: "https:///v1/token" is not an https URL`},
		{"G-08 query", minimal + "google: {stsURL: 'https://x/v1/token?a'}", nil,
			`config.yaml:3: google.stsURL: "https://x/v1/token?a" is not the URL of a service`},
		{"G-08 dots", minimal + "google: {stsURL: 'https://x/../token'}", nil,
			`config.yaml:3: google.stsURL: "https://x/../token" has an ambiguous path`},
		{"G-08 port", minimal + "google: {stsURL: 'https://x:99999/'}", nil,
			`config.yaml:3: google.stsURL: "https://x:99999/" has no port`},
		{"G-11 path", minimal + "google: {iamCredentialsURL: 'https://x/v1/projects'}", nil,
			`config.yaml:3: google.iamCredentialsURL: "https://x/v1/projects" has a path`},
		{"lifetime without a unit", minimal + "google: {tokenLifetime: 3600}", nil,
			`config.yaml:3: google.tokenLifetime: "3600" is not a duration: write a number with a unit`},
		{"lifetime too short", minimal + "google: {tokenLifetime: 5m}", nil,
			`config.yaml:3: google.tokenLifetime: "5m" is not a lifetime that Google gives`},

		{"R-04 loopback", minimal + "listen: 127.0.0.1:988", nil,
			`config.yaml:3: listen: pods reach 127.0.0.0/8 only with route_localnet`},
		{"R-28 no interface", minimal + "routing: {mode: ebpf, excludeInterfaces: [docker0]}", nil,
			`config.yaml:3: routing.excludeInterfaces: routing.mode ebpf does not know the interface of a connection: leave ` +
				`it empty, or set routing.mode to iptables`},
		{"R-04 no address", minimal + "listen: 0.0.0.0:988", nil,
			`config.yaml:3: listen: routing.mode iptables redirects to one address`},
		{"H-24 IPv6", minimal + "listen: '[fd20:ce::254]:988'", nil,
			`config.yaml:3: listen: routing.mode iptables redirects IPv4 packets, so listen must be an IPv4 address`},
		{"DNS", minimal + "dns: on", nil, `config.yaml:3: dns: "on"`},
		{"H-24 another mode", minimal + "routing: {mode: ebpf}\nlisten6: '[fd20:ce::252]:988'", nil,
			`config.yaml:4: listen6: routing.mode ebpf serves IPv4 alone: remove it, or set routing.mode to iptables or ` +
				`nftables`},
		{"H-24 IPv4", minimal + "listen6: 169.254.169.252:989", nil,
			`config.yaml:3: listen6: 169.254.169.252 is not IPv6: write an address that nobody else uses, such as ` +
				`[fd20:ce::252]:988`},
		{"H-24 a link's own", minimal + "listen6: '[fe80::1]:988'", nil,
			`config.yaml:3: listen6: fe80::1 is not a global unicast address`},
		{"H-24 loopback", minimal + "listen6: '[::1]:988'", nil,
			`config.yaml:3: listen6: ::1 is not a global unicast address`},
		{"H-24 every address", minimal + "listen6: '[::]:988'", nil,
			`config.yaml:3: listen6: :: is not a global unicast address`},
		{"H-24 no port", minimal + "listen6: '[fd20:ce::252]:0'", nil, `config.yaml:3: listen6: has no port`},
		{"H-24 the server's", minimal + "listen6: '[fd20:ce::254]:988'", nil,
			`config.yaml:3: listen6: fd20:ce::254 is the address of a metadata server`},
		{"R-32 guarded", minimal + "listen: 169.254.169.254:8080", nil,
			`config.yaml:3: listen: 169.254.169.254 is in routing.guard`},
		{"a name for an address", minimal + "listen: localhost:988", nil,
			`config.yaml:3: listen: "localhost:988" is not an address and a port`},
		{"no port", minimal + "listen: 169.254.169.252:0", nil, `config.yaml:3: listen: has no port`},
		{"R-29 elsewhere", minimal + "routing: {mode: loopback}\nlisten: 169.254.7.7:80", nil,
			`config.yaml:4: listen: routing.mode loopback redirects nothing, so it listens where pods ask, at ` +
				`169.254.169.254:80`},
		{"a link in another mode", minimal + "routing: {link: gme0}", nil,
			`config.yaml:3: routing.link: routing.mode iptables uses no link: remove it`},
		{"a link's name too long", minimal + "routing: {mode: loopback, link: abcdefghijkl}", nil,
			`config.yaml:3: routing.link: "abcdefghijkl" is too long for the label of its address`},
		{"host pods in loopback", minimal + "routing: {mode: loopback, interceptHostPods: on}", nil,
			`config.yaml:3: routing.interceptHostPods: routing.mode loopback cannot tell pods on the host network from the ` +
				`node itself`},
		{"the same twice", minimal + "routing: {mode: none}\nlisten: 0.0.0.0:16322", nil,
			`config.yaml: healthListen: is the same address as listen`},
		{"R-32 guard without a port", minimal + "routing:\n  guard:\n  - 169.254.169.254:80\n  - 168.63.129.16:0", nil,
			`config.yaml:6: routing.guard: "168.63.129.16:0" names no single server`},
		{"an interface that is more", minimal + `routing: {excludeInterfaces: ["eth0 -j ACCEPT"]}`, nil,
			`config.yaml:3: routing.excludeInterfaces: "eth0 -j ACCEPT" is not the name of an interface`},

		{"a pattern in excludeInterfaces", minimal + "routing: {excludeInterfaces: [br+]}", nil,
			`config.yaml:3: routing.excludeInterfaces: "br+" is not the name of an interface`},
		{"a pattern in the middle", minimal + "routing: {uplinks: [e+h, +]}", nil,
			`config.yaml:3: routing.uplinks: "e+h" is not the name of an interface
config.yaml:3: routing.uplinks: "+" is not the name of an interface`},
		{"U-17 identity", minimal + "extraMetadata: {instance/service-accounts/default/email: x}", nil,
			`config.yaml:3: extraMetadata: "instance/service-accounts/default/email" is derived from the caller`},
		{"U-17 dots", minimal + "extraMetadata:\n  instance/../project/x: 1", nil,
			`config.yaml:4: extraMetadata: "instance/../project/x" is not a path`},
		{"U-17 own key", minimal + "extraMetadata:\n  instance/name: 1", nil,
			`config.yaml:4: extraMetadata: "instance/name" has its own key: set instance.name instead`},
		{"U-17 value and directory", minimal + "extraMetadata:\n  instance/a: 1\n  instance/a/b: 1", nil,
			`config.yaml:5: extraMetadata: "instance/a/b" makes a directory of "instance/a"`},
		{"U-17 twice", minimal + "extraMetadata:\n  instance/a: 1\n  /instance/a: 1", nil,
			`config.yaml:5: extraMetadata: "instance/a" is given twice`},
		{"hostIdentities that are none", minimal + `hostIdentities:
- kubelet.service
- {unit: kubelet, serviceAccount: a/b}
- {unit: kubelet.service}
- {cgroup: system.slice, serviceAccount: a/b}
- {cgroup: /a/../b, serviceAccount: a/b}
- {unit: a.service, cgroup: /a, serviceAccount: a/b}
- {unit: b.service, serviceaccount: a/b}
- {unit: [c.service], serviceAccount: a/b}
- {unit: d.service, unit: e.service, serviceAccount: a/b}
- {unit: "f[.service", serviceAccount: a/b}
- {unit: g.service, serviceAccount: b}
- {unit: g2.service, serviceAccount: a/b}
- {unit: g2.service, serviceAccount: a/c}
`, nil, `config.yaml:4: hostIdentities: must be an identity, not the text "kubelet.service": write {unit: kubelet.service, serviceAccount: NAMESPACE/NAME}, or cgroup:
config.yaml:5: hostIdentities: "kubelet" is not a systemd unit: write its full name
config.yaml:6: hostIdentities: "" is not a ServiceAccount: write NAMESPACE/NAME
config.yaml:7: hostIdentities: "system.slice" is not a cgroup: write it from the root
config.yaml:8: hostIdentities: "/a/../b" is not a cgroup
config.yaml:9: hostIdentities: an identity has either a unit or a cgroup
config.yaml:10: hostIdentities: unknown key "serviceaccount"
config.yaml:11: hostIdentities: must be one value, not a list
config.yaml:12: hostIdentities: unit is given twice
config.yaml:13: hostIdentities: "f[.service" is not a systemd unit
config.yaml:14: hostIdentities: "b" is not a ServiceAccount
config.yaml:16: hostIdentities: "g2.service" is given twice: keep one of them`},
		{"hostIdentities by address", minimal + "attestation: {mode: source-ip}\nhostIdentities: [{unit: a.service, " +
			"serviceAccount: a/b}]", nil, `config.yaml:4: hostIdentities: attestation.mode source-ip cannot identify ` +
			`processes of the node: remove them`},
		{"hostIdentities that are no list", minimal + "hostIdentities: {unit: a.service}", nil,
			`config.yaml:3: hostIdentities: must be a list, not a map`},
		{"hostIdentities in a flag", minimal, map[string]string{"hostIdentities": "kubelet.service=a/b,unit:x.service"},
			`--host-identities: "kubelet.service" names no process of the node: write unit:UNIT=NAMESPACE/NAME
--host-identities: "" is not a ServiceAccount`},
		{"healthAllow", minimal + "healthAllow: [10.0.0.0/8, 10.0.0.0/33, prometheus, '::ffff:10.0.0.0/104']", nil,
			`config.yaml:3: healthAllow: "10.0.0.0/33" is not a network
config.yaml:3: healthAllow: "prometheus" is not a network
config.yaml:3: healthAllow: "::ffff:10.0.0.0/104" is an IPv4 network written as IPv6`},
		{"attestation", minimal + "attestation: {mode: address, byAddress: [a b, a/, A/b, a/b/c, '*/b', kube-system/*]}", nil,
			`config.yaml:3: attestation.mode: "address" is not one of kernel, source-ip
config.yaml:3: attestation.byAddress: "a b" is not a name
config.yaml:3: attestation.byAddress: "a/" is not a ServiceAccount
config.yaml:3: attestation.byAddress: "A/b" is not a ServiceAccount
config.yaml:3: attestation.byAddress: "a/b/c" is not a ServiceAccount
config.yaml:3: attestation.byAddress: "*/b" is not a ServiceAccount`},
		{"G-18 nobody to impersonate", minimal + "impersonateUnlinked: true", nil,
			`config.yaml:3: impersonateUnlinked: no account to impersonate is configured`},

		{"flag", minimal, map[string]string{"routing.mode": "iptabels"},
			`--routing-mode: "iptabels" is not one of auto, iptables, nftables, loopback, ebpf, observe, none: write iptables`},
		{"flag that is none", minimal, map[string]string{"routing.mod": "x"},
			`--routing-mod: there is no such key: write routing.mode`},
		{"flag in conflict", minimal, map[string]string{"cluster.uid": "x"},
			`--cluster-uid: is set without cluster.name and cluster.location`},
		{"no map in a flag", minimal, map[string]string{"extraMetadata": "=1"}, `--extra-metadata: "" is not a path`},
		{"by file, line and flag", "log: {level: warn}\n" + minimal + "prefetch: some\nnodeName: _",
			map[string]string{"hostCheck": "1"},
			`config.yaml:1: log.level: "warn" is not one of debug, info, warning, error: write warning
config.yaml:4: prefetch: "some" is not one of linked, all, none
config.yaml:5: nodeName: "_" is not a DNS name
--host-check: "1" is neither true nor false: write true or false`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(tt.text, tt.flags, nil)
			var faults *Error
			if !errors.As(err, &faults) {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			want := strings.Split(tt.want, "\n")
			if len(faults.Faults) != len(want) {
				t.Fatalf("got\n%v\nwant\n%s", err, tt.want)
			}
			for i, f := range faults.Faults {
				if got := strings.TrimPrefix(f.String(), "/etc/"); !strings.HasPrefix(got, want[i]) || f.Remedy == "" {
					t.Errorf("got  %s\nwant %s", got, want[i])
				}
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("a password is shown: %v", err)
			}
		})
	}
}

// A person who got much wrong reads all of it at once.
func TestEveryFaultAtOnce(t *testing.T) {
	_, err := Load("testdata/broken.yaml", map[string]string{"log.level": "loud", "google.tokenLifetime": "1d"})
	if err == nil {
		t.Fatal("testdata/broken.yaml is not broken")
	}
	golden(t, "testdata/broken.txt", err.Error()+"\n")
}

// golden compares text with a file that a person can read. UPDATE_GOLDEN=1 writes it anew, for that
// person to look at.
func golden(t *testing.T, name, got string) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (UPDATE_GOLDEN=1 writes it anew); got\n%s", name, got)
	}
}

// TestBrief: the text for pods and for every user of the node has the place, the key and the
// remedy, and no text of the configuration, wherever that is.
func TestBrief(t *testing.T) {
	t.Parallel()
	const secret = "s3cret0key1"
	values := []string{secret, "projects/" + secret + "/locations/global/workloadIdentityPools/p/providers/q",
		"projects/1/locations/global/workloadIdentityPools/pool", "[" + secret + "]", "{" + secret + ": " + secret + "}",
		"&" + secret + " x", "*" + secret, "!!" + secret + " x", "'/" + secret + "'", "https://" + secret + ".example/path",
		"https://user:" + secret + "@example.com", "http://" + secret, "identitynamespace:" + secret + ":x",
		"a" + secret + "/" + secret, "123456", "['" + secret + "=', '" + secret + "=']", "\"" + secret + "\\n\"",
		"{instance/id: " + secret + ", instance/x/" + secret + ": 1, instance/x/" + secret + "/y: 1, " + secret + "/..: x}",
		"[{unit: " + secret + ", " + secret + ": x}, {cgroup: " + secret + ", serviceAccount: " + secret + "}]"}
	texts := []string{secret, secret + ": x", secret + ": x\n" + secret + ": x", secret + "." + secret + ": x",
		"log." + secret + ": x", "? [" + secret + "]\n: x", "log: {" + secret + ": x}", "*" + secret + ": x",
		"log: " + secret, "credentialConfigFile: c.json\nprojectID: " + secret, "- " + secret, "x: y: " + secret,
		"a: 1\n---\n" + secret + ": 1"}
	for _, k := range Keys() {
		for _, v := range values {
			if group, name, in := strings.Cut(k.Path, "."); in {
				texts = append(texts, group+":\n  "+name+": "+v)
			} else {
				texts = append(texts, k.Path+": "+v)
			}
		}
	}
	seen := 0
	for _, text := range texts {
		for _, credential := range []string{"", secret, `{"type": "` + secret + `"}`,
			`{"type": "external_account", "audience": "` + secret + `", "token_url": "` + secret +
				`", "service_account_impersonation_url": "https://` + secret + `/x"}`} {
			l := &loader{read: files{"/etc/config.yaml": text, "/etc/c.json": credential}.read, file: "/etc/config.yaml"}
			_, err := l.load(nil)
			if err == nil {
				continue
			}
			if strings.Contains(err.Error(), secret) {
				seen++
			}
			brief := Brief(err)
			placed := strings.Contains(brief, "config.yaml") || strings.Contains(brief, "c.json")
			if strings.Contains(brief, secret) || !placed || strings.Contains(brief, "\n") {
				t.Errorf("%q, credential %q: %s", text, credential, brief)
			}
		}
	}
	if seen < len(Keys()) {
		t.Errorf("only %d of the texts are quoted by the whole error", seen)
	}

	text := "projectID: " + secret + "!\nkubeConfig: x\nroutign: {}\n"
	_, err := (&loader{read: files{"c": text}.read, file: "c"}).load(nil)
	want := "4 faults: c: workloadIdentityProvider: is not set: write " + providerForm +
		", or set credentialConfigFile; " +
		"c:1: projectID: it has 6 to 30 of a-z, 0-9 and -, and begins with a letter; " +
		"c:2: there is no such key: write kubeconfig; c:3: there is no such key: write routing: " +
		"see `gke-metadata-emulator config check`"
	if got := Brief(err); got != want {
		t.Errorf("got\n%s, want\n%s", got, want)
	}
}
