package config

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
)

const everything = `
workloadIdentityProvider: //iam.googleapis.com/` + testProvider + `
credentialConfigFile: /credential.json
projectID: my-project
numericProjectID: 42
kubeconfig: /etc/node.conf
nodeName: node-1
tokenAudience: "https://example.com/a#b"
listen: 169.254.169.254:80
dns: answer
healthListen: "[::1]:9000"
healthAllow: [10.0.0.0/8, "fd00::/8"]
routing: {mode: loopback, uplinks: [eth0], excludeInterfaces: [docker0, virbr0], interceptHostPods: off, link: gme0, guard: ["169.254.169.254:80"], force: true, onStop: keep}
attestation: {mode: kernel, byAddress: [gvisor, ci/runner, builds/*], proxies: [istio-system/ztunnel]}
hostIdentities:
- {unit: "docker-[0-9]*.scope", serviceAccount: kube-system/image-puller}
- {cgroup: /docker/*, serviceAccount: ns/docker}
google: {caFile: /ca.pem}
instance: {hostname: node-1.example.com, id: 17, zone: europe-west4-a, name: node-1}
cluster: {name: "123", location: europe-west4, uid: "true"}
extraMetadata: {instance/a: "two\nlines: \"x\"", instance/b: "null", instance/c: "", instance/d: " - x # y"}
emailForUnlinked: pool.example.com
impersonateUnlinked: true
prefetch: all
limits: {connectionsPerPod: 1, requestsPerPod: 4, mintsPerPod: 2, keysPerPod: 3}
hostCheck: false
log: {level: debug, format: json}
`

func TestShow(t *testing.T) {
	ca, err := os.ReadFile("testdata/ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	disk := files{"/credential.json": credentialText, "/ca.pem": string(ca)}
	c := mustLoad(t, everything, nil, disk)
	golden(t, "testdata/everything.yaml", c.YAML())
	again := mustLoad(t, c.YAML(), nil, disk)
	if !reflect.DeepEqual(c, again) {
		t.Errorf("what is shown is another configuration:\n%+v\n%+v", c, again)
	}
	c.Passthrough = []string{"kube-system/aws-node"} // cannot be had with the link
	if !strings.Contains(c.YAML(), "\npassthrough: [kube-system/aws-node]\n") {
		t.Errorf("%s", c.YAML())
	}
	for _, k := range Keys() { // so that a key that is added to the table is added to this test
		var had, has raw
		has.Config, has.provider, has.impersonateUnlinked = c, "set", true
		had = defaults()
		if reflect.DeepEqual(k.field(&had), k.field(&has)) && k.Path != "routing.mode" && k.Path != "attestation.mode" &&
			k.Path != "google.universeDomain" && k.Path != "listen6" {
			t.Errorf("%s has its default in this test", k.Path)
		}
	}
}

func TestShowMinimal(t *testing.T) {
	for _, text := range []string{minimal, minimal + "listen6: '[fd20:ce::252]:988'",
		"projectID: my-project\nnumericProjectID: 5\nworkloadIdentityProvider: " +
			"identitynamespace:my-project.svc.id.goog:https://x/y"} {
		c := mustLoad(t, text, nil, nil)
		if again := mustLoad(t, c.YAML(), nil, nil); !reflect.DeepEqual(c, again) {
			t.Errorf("what is shown is another configuration:\n%+v\n%+v", c, again)
		}
	}
}

func TestReference(t *testing.T) {
	golden(t, "testdata/reference.yaml", Reference())

	_, err := load(Reference(), nil, nil)
	var faults *Error
	if !errors.As(err, &faults) || len(faults.Faults) != 2 || strings.Count(err.Error(), "is not set") != 2 {
		t.Errorf("the reference lacks more than the provider and the project: %v", err)
	}
	flags := map[string]string{"workloadIdentityProvider": testProvider, "projectID": "my-project"}
	if got, want := mustLoad(t, Reference(), flags, nil), mustLoad(t, minimal, nil, nil); !reflect.DeepEqual(got, want) {
		t.Errorf("the reference is not the defaults:\n%+v\n%+v", got, want)
	}
	for _, k := range Keys() {
		if !strings.Contains(Reference(), k.Usage) {
			t.Errorf("the reference does not say what %s is", k.Path)
		}
	}
}
