package attest

import (
	"errors"
	"testing"
)

// two containers in one pod's namespace are told apart, and so are a pod on the host network and a unit of the node.
func TestIdentities(t *testing.T) {
	b := newBed(t)
	one, err := b.node.AddPod("one")
	if err != nil {
		t.Fatal(err)
	}
	two, err := b.node.AddRoutedPod("two")
	if err != nil {
		t.Fatal(err)
	}
	a, side := b.client(containerPath(1, 1), one), b.client(containerPath(1, 2), one)
	other := b.client(containerPath(2, 3), two)
	host := b.client(containerPath(3, 4), b.node.NS)
	unit := b.client("/system.slice/kubelet.service", b.node.NS)
	b.startHelper()
	dial := "dial tcp4 " + metadataAddr
	b.mustBe(a, dial, podUID(1), containerIDOf(1))
	b.mustBe(side, dial, podUID(1), containerIDOf(2))
	b.mustBe(other, dial, podUID(2), containerIDOf(3))
	b.mustBe(host, dial, podUID(3), containerIDOf(4))
	e, _ := b.mustBe(unit, dial, "", "")
	if e.Unit() != "kubelet.service" {
		t.Errorf("Unit = %q", e.Unit())
	}
	b.mustBe(a, "mapped "+metadataAddr, podUID(1), containerIDOf(1))
	b.mustBe(a, "bound eth0 "+metadataAddr, podUID(1), containerIDOf(1))
	b.mustBe(a, "mptcp "+metadataAddr, podUID(1), containerIDOf(1))
	b.mustBe(host, "dial tcp4 "+metadataAddr+" 127.0.0.1:0", podUID(3), containerIDOf(4))
}

var _ = errors.Is
