package service

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/kube/kubetest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netnstest"
)

// podNode is a pod, or a process of the node.
type podNode struct {
	k *kernelNode
	kubetest.Pod
	container string
	// from the node's root; "": one that the node does not have, as a sandbox's processes are none of
	// its kernel's
	cgroup string
	ns     *netnstest.NS

	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Reader
	fds *net.UnixConn // by which it passes descriptors
}

// newPod makes a pod that nobody knows yet, and the ServiceAccount of its name.
func (k *kernelNode) newPod(name string, ns *netnstest.NS) *podNode {
	n := k.uids.Add(1)
	p := &podNode{
		k:         k,
		ns:        ns,
		container: fmt.Sprintf("%064x", n),
		Pod: kubetest.Pod{
			Namespace:      "default",
			Name:           name,
			ServiceAccount: name,
			Node:           node,
			UID:            fmt.Sprintf("00000000-0000-4000-8000-%012d", n),
		},
	}
	p.cgroup = "/kubepods/burstable/pod" + p.UID + "/" + p.container
	if ns != k.node.NS {
		p.Addresses = []string{ns.Addr.String()}
	} else {
		p.HostNetwork = true
	}
	k.kube.SetServiceAccount("default", name, nil)
	return p
}

// tell has the API server know the pod.
func (p *podNode) tell() { p.k.kube.SetPod(p.Pod) }

// start starts the pod's process.
func (p *podNode) start() error {
	k := p.k
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		return err
	}
	p.fds = c.(*net.UnixConn)
	p.cmd = k.command("pod")
	p.cmd.Stderr = os.Stderr
	p.cmd.ExtraFiles = append(p.cmd.ExtraFiles, theirs)
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	p.in, p.out = in, bufio.NewReader(out)
	if p.cgroup == "" {
		err = p.ns.Do(p.cmd.Start)
	} else {
		err = k.cgroups.Start(p.ns, p.cgroup, p.cmd)
	}
	if err != nil {
		return err
	}
	k.t.Cleanup(func() { p.die() })
	return nil
}

// die kills it, and returns when it is reaped.
func (p *podNode) die() {
	p.k.kill(p.cmd)
	_ = p.fds.Close()
}

// said is what a pod was told.
type said struct {
	Status int
	Header http.Header
	Body   string
	Err    string
	Close  bool
}

// ask has the pod send a request on its connection, "kept", or on another one, as dial has it. It
// says what came.
func (p *podNode) ask(how, path string) (a said, err error) {
	if _, err = fmt.Fprintln(p.in, how, path); err != nil {
		return a, err
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(line, &a)
}

// mustAsk is ask on a fresh connection, of a daemon of the node where the service listens: the
// rules spare it.
func (p *podNode) mustAsk(t testing.TB, path string) said {
	t.Helper()
	how := "fresh"
	if p.ns == p.k.node.NS && strings.HasPrefix(p.cgroup, "/system.slice/") {
		how = "direct"
	}
	a, err := p.ask(how, path)
	if err != nil || a.Err != "" {
		t.Fatalf("%s asks %s: %v %s", p.Name, path, err, a.Err)
	}
	return a
}

// served is mustAsk of a client that asks again where the answer is 503, as the answer says: what
// is new on the node is known a moment later.
func (p *podNode) served(t testing.TB, path string) (a said) {
	t.Helper()
	p.k.eventually(t, p.Name+" gets another answer than 503", func() bool {
		a = p.mustAsk(t, path)
		return a.Status != http.StatusServiceUnavailable
	})
	return a
}

// pass has the pod hand its connection over.
func (p *podNode) pass() (net.Conn, error) {
	if _, err := fmt.Fprintln(p.in, "pass -"); err != nil {
		return nil, err
	}
	control := make([]byte, unix.CmsgSpace(4))
	if _, _, _, _, err := p.fds.ReadMsgUnix(make([]byte, 1), control); err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(err, errors.New("no descriptor came"))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "passed")
	defer f.Close()
	return net.FileConn(f)
}

// podProcess does what its standard input says, a line each.
func podProcess() error {
	var conn *net.TCPConn
	var r *bufio.Reader
	say := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		how, path, _ := strings.Cut(in.Text(), " ")
		if attacks[how] != nil {
			_ = say.Encode(attack(how, path))
			continue
		}
		if how == "pass" {
			f, err := conn.File()
			if err != nil {
				return err
			}
			if err := unix.Sendmsg(4, []byte{1}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
				return err
			}
			_ = f.Close()
			continue
		}
		if how != "kept" || conn == nil {
			c, err := dial(how)
			if err != nil {
				_ = say.Encode(saidOf(err))
				continue
			}
			if conn != nil {
				_ = conn.Close() // of connections a pod has limits.connectionsPerPod
			}
			conn, r = c.(*net.TCPConn), bufio.NewReader(c)
		}
		_ = say.Encode(exchangeOn(conn, r, path))
	}
	return nil
}

// dial connects to where pods ask ("fresh"), to the listen address ("direct"), or to
// "ADDRESS:PORT,SOURCE,PATIENCE", of which SOURCE may be empty.
func dial(how string) (net.Conn, error) {
	if to := map[string]string{"fresh": "169.254.169.254:80", "kept": "169.254.169.254:80",
		"direct": "169.254.169.252:988"}[how]; to != "" {
		how = fmt.Sprint(to, ",,", testTimeout)
	}
	f := strings.Split(how, ",")
	if len(f) != 3 {
		return nil, errors.New("dial how? " + how)
	}
	timeout, err := time.ParseDuration(f[2])
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: timeout}
	if f[1] != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(f[1])}
	}
	return d.Dial("tcp", f[0])
}

// saidOf is what a connection said that did not come about: reset, noroute, drop, or what else it
// was.
func saidOf(err error) (a said) {
	var timeout net.Error
	switch {
	case err == nil:
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		a.Err = "reset"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EACCES):
		a.Err = "noroute"
	case errors.As(err, &timeout) && timeout.Timeout():
		a.Err = "drop"
	default:
		a.Err = err.Error()
	}
	return a
}

// exchangeOn sends a request and reads what comes. A path that begins with "raw " is the whole
// request, with | for the ends of its lines.
func exchangeOn(c net.Conn, r *bufio.Reader, path string) said {
	_ = c.SetDeadline(time.Now().Add(testTimeout))
	text, raw := strings.CutPrefix(path, "raw ")
	if !raw {
		host := strings.TrimSuffix(c.RemoteAddr().String(), ":80") // as clients have it (H-16)
		text = "GET " + path + " HTTP/1.1|Host: " + host + "|Metadata-Flavor: Google||"
	}
	if _, err := io.WriteString(c, strings.ReplaceAll(text, "|", "\r\n")); err != nil {
		return said{Err: err.Error()}
	}
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return said{Err: err.Error()}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return said{Err: err.Error()}
	}
	return said{Status: res.StatusCode, Header: res.Header, Body: string(body), Close: res.Close}
}
