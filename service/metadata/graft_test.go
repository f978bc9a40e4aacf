package metadata

import (
	"strings"
	"testing"
)

func TestGraft_E13_U17(t *testing.T) {
	before := sample()
	root := before
	for _, path := range []string{"instance/name", "instance/network-interfaces/0/ip",
		"instance/network-interfaces/0/mtu", "instance/attributes/kube-env"} {
		var err error
		if root, err = Graft(root, "computeMetadata/v1/"+path, Value("of "+path)); err != nil {
			t.Fatal(err)
		}
	}
	tree := newTree(t, root)
	for target, want := range map[string]string{
		v1 + "instance/name": "of instance/name",
		v1 + "instance/":     "attributes/\nhostname\nid\nname\nnetwork-interfaces/\nservice-accounts/\nzone\n",
		v1 + "instance/network-interfaces/?recursive=true": `[{"ip":"of instance/network-interfaces/0/ip","mtu":"of ` +
			`instance/network-interfaces/0/mtu"}]`,
		v1 + "instance/attributes/":         "cluster-location\ncluster-name\ncluster-uid\nkube-env\n",
		v1 + "instance/attributes/kube-env": "of instance/attributes/kube-env",
	} {
		if _, a, err := ask(t, tree, linked, target); err != nil || string(a.Body) != want {
			t.Errorf("%s: got %q, %v, want %q", target, a.Body, err, want)
		}
	}
	if _, a, _ := ask(t, newTree(t, before), linked, v1+"instance/"); strings.Contains(string(a.Body), "name\nnetwork") {
		t.Errorf("the tree that was given has changed: %q", a.Body)
	}
}

func TestGraftRefuses_E13(t *testing.T) {
	root, err := Graft(sample(), "computeMetadata/v1/instance/disks/0/mode", Value("x"))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"instance/zone":                       "instance/zone already has a value",
		"instance/zone/x":                     "instance/zone is a value and cannot have entries below it",
		"instance/attributes":                 "instance/attributes is a directory and cannot be a value",
		"instance/service-accounts":           "instance/service-accounts is a directory",
		"instance/service-accounts/default/x": "depends on the caller",
		"instance/disks/0/mode":               "instance/disks/0/mode already has a value",
		"instance/disks/0/mode/x":             "instance/disks/0/mode is a value",
		"instance/disks/0":                    "instance/disks/0 is a directory",
		"":                                    `"" is not a name`,
		"instance/":                           `"" is not a name`,
		"instance//x":                         `"" is not a name`,
		"instance/../x":                       `".." is not a name`,
		"instance/a b":                        `holds a space`,
	} {
		_, err := Graft(root, "computeMetadata/v1/"+path, Value("x"))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(),
			`"computeMetadata/v1/`+path+`"`) {
			t.Errorf("%q: got %v, want it to say %q", path, err, want)
		}
	}
}
