package service

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/doctor"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

// A state in which pods get nothing has one text: of /readyz, of status, of doctor, of systemctl
// status, and, to those who may not ask for the status, of all of them too.
func TestOneTextForEachState(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sick   func(*testing.T, *testNode)
		begins string
		check  string // of doctor, beside service
	}{
		"unconfigured": {func(*testing.T, *testNode) {}, "not configured: ", "configuration"},
		"broken": {func(t *testing.T, b *testNode) {
			b.write(t, "config.yaml", "projectID: "+secretValue+"\nroutign: {}\nworkloadIdentityProvider: x\n")
		}, "not configured: 3 faults: ", "configuration"},
		"the API server is away": {func(t *testing.T, b *testNode) {
			b.configure(t)
			b.replace(t, "config.yaml", "healthListen: 127.0.0.1:0", "healthListen: "+b.health.String())
			b.kube.Close()
		}, "the Kubernetes API is unavailable since ", "credential"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newWorld(t)
			b.health = freeAddress(t)
			c.sick(t, b)
			b.start(t)

			var words string
			var st status.Status
			b.eventually(t, "the state, and /readyz and status have it", func() bool {
				err := b.readiness(t.Context())
				read, answered := status.FetchReadiness(t.Context(), b.health)
				if st = statusOf(t, b.dir); err == nil || !answered || st.State == "" {
					return false
				}
				words = lastTry(err.Error())
				return words == lastTry(read) && strings.HasPrefix(words, c.begins) &&
					!strings.Contains(words, errNotYetTried)
			})
			if c.check == "configuration" && !strings.HasSuffix(words, "`gke-metadata-emulator config check`") ||
				strings.Contains(words, secretValue) { // a value of the file, which may be a secret in the wrong place
				t.Errorf("%q", words)
			}
			if strings.Contains(words, "\n") {
				t.Errorf("more than a line: %q", words)
			}
			if lastTry(st.Reason) != words {
				t.Errorf("status: %q, and /readyz says %q", st.Reason, words)
			}
			var text strings.Builder
			if err := st.Text(&text, time.Now()); err != nil || !strings.Contains(lastTry(text.String()), words+"\n") ||
				strings.Count(lastTry(text.String()), words) != 1 {
				t.Errorf("status does not say %q once (%v):\n%s", words, err, &text)
			}
			if s := lastTry(b.summary()); !strings.HasSuffix(s, words) {
				t.Errorf("STATUS=%s, and /readyz says %q", s, words)
			}
			err := status.Denied(t.Context(), fs.ErrPermission, b.health)
			if !errors.Is(err, fs.ErrPermission) || !strings.HasSuffix(lastTry(err.Error()), words) {
				t.Errorf("status of another user: %v", err)
			}

			plan, err := json.Marshal(routing.Plan{Closed: true})
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0]) // a process of its own, as klog's logger is global
			cmd.Env = append(os.Environ(), benchServer+"=doctor", doctorDir+"="+b.dir, routingPlan+"="+string(plan))
			cmd.Stderr = os.Stderr
			var report doctor.Report
			if out, err := cmd.Output(); err != nil {
				t.Fatal(err)
			} else if err := json.Unmarshal(out, &report); err != nil {
				t.Fatal(err)
			}
			for _, check := range []string{"service", c.check} {
				for _, f := range report.Checks {
					if f.Check == check && (f.Verdict != doctor.Fail || !strings.HasSuffix(lastTry(f.Finding), words)) {
						t.Errorf("%+v, and /readyz says %q", f, words)
					}
				}
			}
			if c.check == "configuration" { // it is what pods are told, and said once in the log
				if body := b.ask(t, linked, "GET", accts+"default/token", "").body; !strings.Contains(body, words) {
					t.Errorf("a pod is told %q, and /readyz says %q", body, words)
				}
				quoted := strings.ReplaceAll(words, `"`, `\"`)
				if log := b.log.String(); strings.Count(log, "not configured") != strings.Count(log, `"level":"error"`)+
					strings.Count(log, `"msg":"refused: `) || !strings.Contains(log, quoted+"; until then pods are answered 503") {
					t.Errorf("the log:\n%s", log)
				}
			}
		})
	}
}

// secretValue is no project's ID.
const secretValue = "s3cret pasted into the wrong place"

// errNotYetTried is the text until the first answer, or none, of an API server.
const errNotYetTried = "have not been listed yet"

// lastTry leaves out the URL of the last try, which has another timeout each time.
func lastTry(text string) string { return urls.ReplaceAllString(text, "Get URL") }

var urls = regexp.MustCompile(`Get "[^"]*"`)

// freeAddress returns an address of loopback at which nothing listened a moment ago.
func freeAddress(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return addrPortOf(l)
}
