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

// answerLimit bounds one answer of a client: Python's library retries for 20 s and more.
const answerLimit = 90 * time.Second

// The questions to a driver. Each is a line of its standard input; the answer is a line
// of JSON on standard output.
const (
	askVersion  = "version"  // of the library
	askDetect   = "detect"   // true: the library detects Google Cloud
	askToken    = "token"    // an access token by the library's usual credentials
	askScoped   = "scoped"   // an access token for tokenScope alone
	askID       = "id"       // an ID token for idAudience
	askEmail    = "email"    // of the account
	askProject  = "project"  // the project's ID
	askUniverse = "universe" // the universe's domain

	tokenScope = "https://www.googleapis.com/auth/devstorage.read_only"
	idAudience = "https://run.example.com"
)

// answer is the answer of a driver.
type answer struct {
	Value string `json:"value"`
	Error string `json:"error"`
	None  bool   `json:"none"` // the library has no such function
}

// client is a library with its driver.
type client struct {
	name  string   // in the table
	short string   // in CLIENTS
	argv  []string // of the driver, in the pods' root
	env   []string
	// race: its detection is a race between an HTTP request and a negative answer of DNS. Where
	// detection is expected, this number of processes must detect Google Cloud. 0: there is no race.
	race int
	// shortTimeout: it waits 0.1 s for a connection, so on a busy machine the run tries again.
	shortTimeout bool
	// finalDot: it looks the name up with the final dot, which /etc/hosts does not answer.
	finalDot bool
	// variable is the variable that it reads instead of GCE_METADATA_HOST.
	variable string
	// keepsNone: it caches no token, so there is none to refresh.
	keepsNone bool
	// note is the text in the table's last column.
	note string
}

// situation describes a pod's DNS and environment, and whether its requests are redirected.
type situation struct {
	title string // of the table's column
	dns   resolver
	race  bool     // between an HTTP request and a negative answer of DNS
	alias bool     // hostAliases has the name
	host  string   // value of GCE_METADATA_HOST
	env   []string // further variables
}

// process is a running driver.
type process struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan []byte
}

// enter starts a process in the root of a pod, with files of the pod in /etc.
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
	// The environment of a pod of Kubernetes.
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
	k.cmd.Stderr = r.log
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
				return answer{Error: "the driver ended: clients.log has its standard error"}
			case !strings.HasPrefix(string(line), "{"): // other output of a library
				continue
			}
			if err := json.Unmarshal(line, &a); err != nil {
				return answer{Error: "the answer is no JSON: " + err.Error()}
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
	_ = k.cmd.Wait() // the exit status does not matter
}
