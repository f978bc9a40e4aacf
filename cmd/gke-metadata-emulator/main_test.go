package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){program: main})
}

// The user's manual, executed: each file of testdata/script is a page of it.
func TestScripts(t *testing.T) {
	testscript.Run(t, params("testdata/script"))
}

// The pages about routing change rules, so each runs in a network namespace that nobody else has.
func TestRoutingScripts(t *testing.T) {
	const inside = "GME_TEST_INSIDE_NETNS"
	if file := os.Getenv(inside); file != "" {
		p := params("")
		p.Files = []string{file}
		testscript.Run(t, p)
		return
	}
	if os.Geteuid() != 0 {
		lacking(t, "a network namespace needs root")
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		lacking(t, "there is no iptables: apt-get install iptables")
	}
	files, err := filepath.Glob("testdata/netns/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			out, err := inNewNetwork(t, os.Args[0], inside+"="+file)
			if errors.Is(err, unix.EPERM) {
				lacking(t, "a network namespace needs CAP_SYS_ADMIN")
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			t.Logf("%s", out)
		})
	}
}

func inNewNetwork(t *testing.T, program, variable string) (out []byte, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine, and the namespace with its last process
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		cmd := exec.CommandContext(t.Context(), program, "-test.run=^TestRoutingScripts$",
			"-test.v="+strconv.FormatBool(testing.Verbose()))
		cmd.Env = append(os.Environ(), variable)
		out, err = cmd.CombinedOutput()
	}()
	<-done
	return out, err
}

// lacking skips a test that cannot run here; CI has to have what is lacking.
func lacking(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

func params(dir string) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_GOLDEN") != "",
		Setup: func(e *testscript.Env) error {
			e.Setenv("GKE_METADATA_EMULATOR_RUN", e.WorkDir+"/run") // never the machine's own service
			e.Setenv("GORACE", "atexit_sleep_ms=0")                 // else the race detector makes each command a second longer
			e.Setenv("PROVIDER", testProvider)
			taken, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			e.Defer(func() { taken.Close() })
			e.Setenv("TAKEN", taken.Addr().String())
			return os.Mkdir(e.WorkDir+"/run", 0o755)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exitcode":   exitCode,
			"eventually": eventually,
			"signal":     sendSignal,
			"cluster":    cluster,
			"grant":      grant,
			"secrets":    secrets,
		},
	}
}

const testProvider = "projects/123456789/locations/global/workloadIdentityPools/my-pool/providers/my-cluster"

// exitCode: `exitcode N command…` runs the command and wants N of it.
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode N command…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exited *exec.ExitError
	switch err := ts.Exec(args[1], args[2:]...); {
	case errors.As(err, &exited):
		got = exited.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// eventually: `eventually command…` runs the command until it succeeds.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: eventually command…")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			ts.Fatalf("not within 30 s: %v", err)
		}
	}
}

// sendSignal: `signal NAME` sends SIGNAME to the command that was put into the background last.
func sendSignal(ts *testscript.TestScript, neg bool, args []string) {
	background := ts.BackgroundCmds()
	if neg || len(args) != 1 || len(background) == 0 {
		ts.Fatalf("usage: signal NAME, with a command in the background")
	}
	ts.Check(background[len(background)-1].Process.Signal(unix.SignalNum("SIG" + args[0])))
}

// cluster: `cluster FILE` runs a Kubernetes and a Google with one linked pod of node1, and writes a
// configuration for them, kubeconfig and all, to the file.
func cluster(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: cluster FILE")
	}
	const email, audience = "reader@my-project.iam.gserviceaccount.com", "//iam.googleapis.com/" + testProvider
	kube, err := kubetest.New(kubetest.Options{})
	ts.Check(err)
	ts.Defer(kube.Close)
	kube.GrantAudience(audience)
	kube.SetServiceAccount("default", "reader", map[string]string{"iam.gke.io/gcp-service-account": email})
	kube.SetPod(kubetest.Pod{Namespace: "default", Name: "pod", ServiceAccount: "reader", Node: "node1",
		Addresses: []string{"10.1.2.3"}})
	google, err := googletest.New(
		googletest.Options{Providers: map[string]googletest.Provider{audience: {Issuer: kube.Issuer(), JWKS: kube.JWKS}}},
	)
	ts.Check(err)
	ts.Defer(google.Close)
	google.Allow("system:serviceaccount:default:reader", email)
	ts.Check(google.WriteCA(ts.MkAbs("ca.pem")))
	kubeconfig, err := kube.Kubeconfig("node1")
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("kubeconfig"), kubeconfig, 0o600))
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), fmt.Appendf(nil,
		"workloadIdentityProvider: %s\nprojectID: my-project\nkubeconfig: %s\n"+
			"google: {stsURL: %s, iamCredentialsURL: %s, caFile: %s}\nhealthListen: 127.0.0.1:16322\n", testProvider,
		ts.MkAbs("kubeconfig"), google.STSURL(), google.URL(), ts.MkAbs("ca.pem")), 0o600))
	world[ts.Getenv("WORK")] = standIns{kube, google}
}

// standIns are what `cluster` started, by the script's directory.
type standIns struct {
	kube   *kubetest.Server
	google *googletest.Server
}

var world = map[string]standIns{}

// grant: `grant` and `! grant` give and take the right to ask for tokens with Google's audience.
func grant(ts *testscript.TestScript, neg bool, _ []string) {
	const audience = "//iam.googleapis.com/" + testProvider
	if neg {
		world[ts.Getenv("WORK")].kube.RevokeAudience(audience)
	} else {
		world[ts.Getenv("WORK")].kube.GrantAudience(audience)
	}
}

// secrets: `! secrets FILE…` wants none of the tokens that were given out in the files.
func secrets(ts *testscript.TestScript, neg bool, files []string) {
	w := world[ts.Getenv("WORK")]
	given := append(w.kube.IssuedTokens(), w.google.Secrets()...)
	if !neg || len(files) == 0 || len(given) == 0 {
		ts.Fatalf("usage: ! secrets FILE…, after tokens were given out")
	}
	for _, f := range files {
		text := ts.ReadFile(f)
		for _, s := range given {
			if strings.Contains(text, s) {
				ts.Fatalf("%s holds a token", f)
			}
		}
	}
}

// Flags are made of the table, and --help shows each with its default.
func TestHelpOfEveryKey(t *testing.T) {
	for _, args := range [][]string{{"serve"}, {"routing", "install"}, {"routing", "check"}, {"routing", "remove"},
		{"routing", "show"}, {"routing", "watch"}, {"config", "check"}, {"config", "show"}, {"doctor"}} {
		var out, errs bytes.Buffer
		if code := run(append(args, "--help"), &out, &errs); code != 0 || errs.Len() > 0 {
			t.Fatalf("%v --help: exit code %d, %s", args, code, &errs)
		}
		for _, k := range config.Keys() {
			line := regexp.MustCompile(`(?m)^ +--` + regexp.QuoteMeta(k.Flag()) + `[ \[].*$`).FindString(out.String())
			text := strings.ReplaceAll(k.Usage, "`", "'")
			if k.Usage == "" || !strings.Contains(line, text) {
				t.Errorf("%v --help does not say what --%s is: %q", args, k.Flag(), line)
			}
			if k.Default != "" && !strings.HasSuffix(line, "(default "+k.Default+")") {
				t.Errorf("%v --help does not say that the default of --%s is %s: %q", args, k.Flag(), k.Default, line)
			}
			for _, v := range k.Values {
				if !strings.Contains(line, v) {
					t.Errorf("%v --help does not say that --%s may be %s: %q", args, k.Flag(), v, line)
				}
			}
		}
	}
}

// Every flag reaches the configuration: each is given the text of an item that the key cannot take
// or, where any text will do, its default.
func TestEveryFlagIsRead(t *testing.T) {
	for _, k := range config.Keys() {
		var out, errs bytes.Buffer
		code := run([]string{"config", "check", "--config=", "--" + k.Flag() + "= \x01"}, &out, &errs)
		if code != exitConfig || !strings.Contains(errs.String(), "--"+k.Flag()+": ") {
			t.Errorf("--%s: exit code %d, %s", k.Flag(), code, &errs)
		}
	}
}
