package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// answerLimit bounds one answer of a client: Python's library tries for 20 s and more.
const answerLimit = 90 * time.Second

// The questions that a driver is asked. Each is a line of its standard input. Its answer is a line
// of JSON on standard output.
const (
	askVersion  = "version"  // of the library
	askDetect   = "detect"   // true: the library finds Google Cloud by itself
	askToken    = "token"    // an access token by the library's usual credentials
	askScoped   = "scoped"   // one for tokenScope alone
	askID       = "id"       // an ID token for idAudience
	askEmail    = "email"    // of the account
	askProject  = "project"  // the project's ID
	askUniverse = "universe" // the universe's domain

	tokenScope = "https://www.googleapis.com/auth/devstorage.read_only"
	idAudience = "https://run.example.com"
)

// answer is a driver's.
type answer struct {
	Value string `json:"value"`
	Error string `json:"error"`
	None  bool   `json:"none"` // the library has no such thing
}

// client is a library with its driver.
type client struct {
	name  string   // in the table
	short string   // in CLIENTS, with what it is of
	argv  []string // of the driver, in the pods' root
	env   []string
	// race says that its detection is a race of an HTTP request with an answer of DNS that says no.
	// Where the answer is yes, that many processes must detect Google Cloud; 0: there is no race.
	race int
	// hasty says that it waits 0.1 s for a connection, so on a busy machine it may try again.
	hasty bool
	// finalDot says that it asks DNS with the final dot, which /etc/hosts does not answer.
	finalDot bool
	// variable is what it reads in the place of GCE_METADATA_HOST.
	variable string
	// keepsNone says that it keeps no token, so that there is none to refresh.
	keepsNone bool
	// note is the table's last column.
	note string
}

// situation is what a pod has of DNS and environment, and whether its requests are redirected.
type situation struct {
	title string // of the table's column
	dns   resolver
	race  bool     // of an HTTP request with an answer of DNS that says no
	alias bool     // hostAliases has the name
	host  string   // what GCE_METADATA_HOST is
	env   []string // further variables
}

// process is a running driver.
type process struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan []byte
}

// enter gives a process the root of a pod: what it sees of /etc is the pod's own.
const enter = `
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount --bind "$drivers" "$root/mnt"
mount --bind "$npm" "$root/opt"
mount --bind "$etc/resolv.conf" "$root/etc/resolv.conf"
mount --bind "$etc/hosts" "$root/etc/hosts"
mount --bind "$authorities" "$root/etc/ssl/certs/ca-certificates.crt"
exec chroot "$root" env -i "$@"
`

// start starts the client's driver in the pod.
func (r *ring) start(ctx context.Context, c client, p *pod, s situation) (*process, error) {
	etc, err := os.MkdirTemp(r.dir, "etc")
	if err != nil {
		return nil, err
	}
	hosts := fmt.Sprintf("127.0.0.1 localhost\n%s pod\n%s %s\n", p.Addr, apiAddr, strings.Join(apiNames, " "))
	if s.alias { // as kubelet writes it
		hosts += "# Entries added by HostAliases.\n169.254.169.254\tmetadata.google.internal\n"
	}
	resolv := "search default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n" +
		"nameserver " + r.world.dns[s.dns].String() + "\n"
	if err := errors.Join(os.WriteFile(filepath.Join(etc, "hosts"), []byte(hosts), 0o644),
		os.WriteFile(filepath.Join(etc, "resolv.conf"), []byte(resolv), 0o644)); err != nil {
		return nil, err
	}
	// As a pod of Kubernetes has them.
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", "LANG=C.UTF-8",
		"KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_SERVICE_PORT=443", "RING_STORAGE=" + r.world.storage}
	env = append(append(env, c.env...), s.env...)
	if s.host != "" {
		env = append(env, "GCE_METADATA_HOST="+s.host)
	}
	args := append([]string{"--mount", "--propagation=private", "sh", "-ec", enter, "enter"}, append(env, c.argv...)...)
	k := &process{cmd: p.Command(ctx, "unshare", args...), lines: make(chan []byte)}
	k.cmd.Env = append(os.Environ(), "root="+r.root, "drivers="+r.drivers, "npm="+r.npm, "etc="+etc,
		"authorities="+filepath.Join(r.dir, "authorities.pem"))
	k.cmd.Stderr = r.said
	if k.in, err = k.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := k.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(k.lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			k.lines <- append([]byte(nil), in.Bytes()...)
		}
	}()
	return k, nil
}

// ask sends a question and waits for its answer.
func (k *process) ask(question string) answer {
	if err := k.send(question); err != nil {
		return answer{Error: err.Error()}
	}
	return k.receive()
}

func (k *process) send(question string) error {
	_, err := fmt.Fprintln(k.in, question)
	return err
}

func (k *process) receive() answer {
	late := time.After(answerLimit)
	for {
		select {
		case line, open := <-k.lines:
			var a answer
			switch {
			case !open:
				return answer{Error: "the driver ended"}
			case !strings.HasPrefix(string(line), "{"): // what a library says besides
				continue
			}
			if err := json.Unmarshal(line, &a); err != nil {
				return answer{Error: "an answer that is no JSON: " + err.Error()}
			}
			return a
		case <-late:
			return answer{Error: fmt.Sprintf("no answer within %s", answerLimit)}
		}
	}
}

// end ends the driver.
func (k *process) end() {
	_ = k.in.Close()
	kill := time.AfterFunc(5*time.Second, func() { _ = k.cmd.Process.Kill() })
	defer kill.Stop()
	for range k.lines { // until it closes its output
	}
	_ = k.cmd.Wait() // how a driver ends says nothing: its answers count
}
