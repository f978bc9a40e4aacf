package service

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/doctor"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

const doctorDir = "GME_DOCTOR_DIR" // of the test node, for a process in the role of doctor

// doctorProcess prints the report of doctor, which runs as a process of the node.
func doctorProcess() error {
	var plan routing.Plan
	if err := json.Unmarshal([]byte(os.Getenv(routingPlan)), &plan); err != nil {
		return err
	}
	dir := os.Getenv(doctorDir)
	r := doctor.Run(context.Background(), doctor.Options{
		Load:   func() (config.Config, error) { return config.Load(filepath.Join(dir, "config.yaml"), nil) },
		Plan:   func(config.Config, error) routing.Plan { return plan },
		Unit:   func(context.Context, string) status.Unit { return status.Unit{} },
		RunDir: dir, StatusSocket: filepath.Join(dir, "status.sock"),
	})
	return json.NewEncoder(os.Stdout).Encode(r)
}

// doctor returns what doctor finds on the node, by the names of its checks.
func (k *kernelNode) doctor(t *testing.T) map[string]doctor.Finding {
	t.Helper()
	plan, err := json.Marshal(k.plan)
	if err != nil {
		t.Fatal(err)
	}
	cmd := k.command("doctor")
	cmd.Env = append(cmd.Env, doctorDir+"="+k.dir, routingPlan+"="+string(plan))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err = k.cgroups.Start(k.node.NS, "/user.slice/doctor.scope", cmd); err == nil {
		err = cmd.Wait()
	}
	var r doctor.Report
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &r)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	found := map[string]doctor.Finding{}
	for _, f := range r.Checks {
		found[f.Check] = f
	}
	return found
}

// What leaves doctor's connection alone and breaks only the evidence is not green: pods are refused
// then.
func TestDoctorEvidence(t *testing.T) {
	t.Parallel()
	k := newKernelNode(t)
	is := func(what string, verdict doctor.Verdict, text string) {
		t.Helper()
		found := k.doctor(t)
		if f := found["connection"]; f.Verdict != doctor.OK {
			t.Errorf("%s: %+v", what, f)
		}
		if f := found["evidence"]; f.Verdict != verdict || !strings.Contains(f.Finding, text) {
			t.Errorf("%s: %+v", what, f)
		}
	}
	before := statusOf(t, k.dir).Requests
	is("healthy", doctor.OK, "by interface gme-doctor and from 2001:2::")
	if n := statusOf(t, k.dir).Requests; n != before {
		t.Errorf("doctor's requests count as those of pods: %d, and then %d", before, n)
	}

	k.run("iptables -t nat -A INPUT -p tcp --dport 988 -j SNAT --to-source 198.51.100.7")
	// refused by a rule
	if f := k.doctor(t)["connection"]; f.Verdict != doctor.Fail || !strings.Contains(f.Finding, "GME-") {
		t.Errorf("another program rewrites who asks: %+v", f)
	}
	k.run("iptables -t nat -D INPUT -p tcp --dport 988 -j SNAT --to-source 198.51.100.7")
	is("and no longer", doctor.OK, "the socket of doctor's connection")

	k.kill(k.helper)
	k.eventually(t, "the helper is away", func() bool { return !statusOf(t, k.dir).Attestation.Kernel.Helper })
	is("no helper", doctor.Fail, "503")
}
