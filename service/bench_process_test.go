package service

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/jsonschema-go/jsonschema"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/status"
)

func median(f []float64) float64 {
	slices.Sort(f)
	return f[len(f)/2]
}

// process is one of the two servers.
type process struct {
	cmd  *exec.Cmd
	in   io.Writer
	out  *bufio.Reader
	addr string
	size int // of the whole answer
}

type measured struct{ rate, cpu, allocs float64 }

func (p *process) measure(b *testing.B, load func(string, int, time.Time) (int, error)) measured {
	cpu, mallocs, start := p.cpu(b), p.mallocs(b), time.Now()
	n, err := load(p.addr, p.size, start.Add(turn))
	if err != nil {
		b.Fatal(err)
	}
	took := time.Since(start)
	return measured{float64(n) / took.Seconds(), (p.cpu(b) - cpu).Seconds() / float64(n),
		(p.mallocs(b) - mallocs) / float64(n)}
}

// cpu is the time that the process spent so far, by /proc/PID/stat (proc_pid_stat(5): utime and
// stime, in 1/100 s).
func (p *process) cpu(b testing.TB) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, s := range f[11:13] {
		n, err := strconv.Atoi(s)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func (p *process) mallocs(b *testing.B) float64 {
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		b.Fatal(err)
	}
	line, err := p.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(line), 64)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// statusOf asks the emulator as `status` does.
func statusOf(b testing.TB, dir string) (st status.Status) {
	client := http.Client{Timeout: testTimeout, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "status.sock"))
		}}}
	res, err := client.Get("http://status/status")
	if err != nil {
		return st
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return st // it ends
	}
	if err := json.Unmarshal(text, &st); err != nil {
		b.Fatal(err)
	}
	fitsSchema(b, text)
	return st
}

// statusSchema is what docs/status.schema.json says.
var statusSchema = sync.OnceValues(func() (*jsonschema.Resolved, error) {
	text, err := os.ReadFile("../docs/status.schema.json")
	if err != nil {
		return nil, err
	}
	s := new(jsonschema.Schema)
	if err := json.Unmarshal(text, s); err != nil {
		return nil, err
	}
	return s.Resolve(nil)
})

// fitsSchema holds every status that a test reads to the schema that operators' programs read it
// by.
func fitsSchema(b testing.TB, text []byte) {
	b.Helper()
	schema, err := statusSchema()
	if err != nil {
		b.Fatal(err)
	}
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		b.Fatal(err)
	}
	if err := schema.Validate(value); err != nil {
		b.Errorf("status is not what docs/status.schema.json says: %v: %s", err, text)
	}
}

// resident is VmRSS in MB (proc_pid_status(5)).
func (p *process) resident(b *testing.B) float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	kB, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return kB / 1024
}

func (p *process) end() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func freeAddr(b *testing.B) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// spawn runs this binary as one of the servers. What it logs goes into a file, as it would.
func spawn(b *testing.B, addr string, env ...string) *process {
	log, err := os.Create(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = log
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	p := &process{cmd: cmd, in: in, out: bufio.NewReader(out), addr: addr}
	b.Cleanup(func() {
		p.end()
		_ = log.Close()
	})
	return p
}

// answerSize is how many bytes an answer has on the wire: the same for each, since all that varies
// is a date.
func answerSize(b *testing.B, addr string) int {
	deadline := time.Now().Add(10 * time.Second)
	c, err := net.Dial("tcp", addr)
	for err != nil {
		if time.Now().After(deadline) {
			b.Fatal(err)
		}
		c, err = net.Dial("tcp", addr)
	}
	defer c.Close()
	if _, err := io.WriteString(c, benchRequest); err != nil {
		b.Fatal(err)
	}
	var all bytes.Buffer
	res, err := http.ReadResponse(bufio.NewReader(io.TeeReader(c, &all)), nil)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		b.Fatal(err)
	}
	return all.Len()
}
