package service

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
)

// trialProcess is what doctor's trials say, as a process of the node.
func trialProcess() string {
	p := &patient{plan: routing.Plan{Mode: routing.ModeIPTables},
		status: &Status{State: "serving", Attestation: Attestation{Mode: "kernel"}}}
	p.trial, p.trial6 = tryConnections(context.Background(), routing.MetadataServer(), true, true)
	text, err := json.Marshal(map[string]Finding{"connection": p.connection(p.trial, p.plan.Listen),
		"evidence": evidenceCheck(p)})
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// What leaves doctor's connection alone and breaks only the evidence is not green: pods are refused
// then.
func TestDoctorEvidence(t *testing.T) {
	t.Parallel()
	k := newKernelBed(t)
	tried := func() map[string]Finding {
		t.Helper()
		cmd := k.command("trial")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, os.Stderr
		err := k.cgroups.Start(k.node.NS, "/user.slice/doctor.scope", cmd)
		if err == nil {
			err = cmd.Wait()
		}
		found := map[string]Finding{}
		if err == nil {
			err = json.Unmarshal(out.Bytes(), &found)
		}
		if err != nil {
			t.Fatalf("%v: %s", err, &out)
		}
		return found
	}
	is := func(what string, verdict Verdict, text string) {
		t.Helper()
		found := tried()
		if f := found["connection"]; f.Verdict != OK {
			t.Errorf("%s: %+v", what, f)
		}
		if f := found["evidence"]; f.Verdict != verdict || !strings.Contains(f.Finding, text) {
			t.Errorf("%s: %+v", what, f)
		}
	}
	before := statusOf(t, k.dir).Requests
	is("healthy", OK, "by interface gme-doctor and from 2001:2::")
	if n := statusOf(t, k.dir).Requests; n != before {
		t.Errorf("doctor's requests count as those of pods: %d, and then %d", before, n)
	}

	k.sh("iptables -t nat -A INPUT -p tcp --dport 988 -j SNAT --to-source 198.51.100.7")
	if f := tried()["connection"]; f.Verdict != Fail || !strings.Contains(f.Finding, "GME-") { // refused by a rule
		t.Errorf("another program rewrites who asks: %+v", f)
	}
	k.sh("iptables -t nat -D INPUT -p tcp --dport 988 -j SNAT --to-source 198.51.100.7")
	is("and no longer", OK, "doctor's own socket")

	k.kill(k.helper)
	k.eventually(t, "the helper is away", func() bool { return !statusOf(t, k.dir).Attestation.Kernel.Helper })
	is("no helper", Fail, "503")
}
