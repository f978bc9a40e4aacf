// Command controlplane is etcd and kube-apiserver in one process, for tests: the real ones, built
// from their modules.
//
// It ends with its standard input, so that it cannot outlive the test that started it. When it is
// ready it writes one line of JSON to standard output: see Ready.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"go.etcd.io/etcd/server/v3/embed"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
)

// Ready is what the test learns: where the server is, and where the files of the users are.
type Ready struct {
	URL string // also the issuer of tokens
	Dir string // NAME.kubeconfig and pki/NAME.crt, .key of each user; pki/ca.crt
}

type options struct {
	dir, address, services string
	port                   int
	users, serving, flags  []string
}

func main() {
	var o options
	pflag.StringVar(&o.dir, "dir", "", `where the state is kept; "" is a temporary directory that is removed at the end`)
	pflag.StringVar(&o.address, "address", "127.0.0.1", "address to listen on")
	pflag.IntVar(&o.port, "port", 0, "port to listen on; 0 is any free one")
	pflag.StringVar(&o.services, "service-cluster-ip-range", "10.96.0.0/16", "addresses of Services")
	pflag.StringArrayVar(&o.users, "user", nil, "NAME=USER[,GROUP...]: a client certificate and a kubeconfig to make")
	pflag.StringArrayVar(&o.serving, "serving", nil, "NAME=ADDRESS: a server certificate to make, for a kubelet")
	pflag.StringArrayVar(&o.flags, "apiserver-flag", nil, "a further flag of kube-apiserver")
	stdin := pflag.Bool("until-stdin-ends", true, "end with standard input")
	pflag.Parse()

	temporary := o.dir == ""
	if temporary {
		dir, err := os.MkdirTemp("", "controlplane-")
		if err != nil {
			fail(err)
		}
		o.dir = dir
	}
	ended := make(chan error, 3)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() { ended <- run(o) }()
	go func() { <-signals; ended <- nil }()
	if *stdin {
		go func() { _, _ = io.Copy(io.Discard, os.Stdin); ended <- nil }()
	}
	// Nothing is shut down in order: etcd's log is written, and a temporary state is of no use to
	// anybody.
	err := <-ended
	if temporary {
		err = errors.Join(err, os.RemoveAll(o.dir))
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "controlplane:", err)
	os.Exit(1)
}

// run returns only when something went wrong.
func run(o options) error {
	if o.port == 0 {
		var err error
		if o.port, err = freePort(o.address); err != nil {
			return err
		}
	}
	ready := Ready{URL: fmt.Sprintf("https://%s:%d", o.address, o.port), Dir: o.dir}
	if err := credentials(o, ready.URL); err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}
	etcd, err := startEtcd(filepath.Join(o.dir, "etcd"))
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	ended := make(chan error, 1)
	go func() {
		cmd := apiserver.NewAPIServerCommand()
		cmd.SetArgs(append(arguments(o, etcd, ready.URL), o.flags...))
		ended <- fmt.Errorf("kube-apiserver ended: %w", cmd.ExecuteContext(context.Background()))
	}()
	admin, err := adminClient(o.dir)
	if err != nil {
		return err
	}
	for tick := time.Tick(50 * time.Millisecond); ; {
		select {
		case err := <-ended:
			return err
		case <-tick:
		}
		if resp, err := admin.Get(ready.URL + "/readyz"); err == nil {
			_ = resp.Body.Close() // only the status counts
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		return err
	}
	return <-ended
}

// startEtcd returns the address of an etcd on loopback. Its state may be lost with the machine, so
// nothing is synced.
func startEtcd(dir string) (string, error) {
	c := embed.NewConfig()
	c.Dir, c.LogLevel, c.UnsafeNoFsync = dir, "error", true
	for _, u := range []struct{ listen, advertise *[]url.URL }{
		{&c.ListenClientUrls, &c.AdvertiseClientUrls}, {&c.ListenPeerUrls, &c.AdvertisePeerUrls},
	} {
		port, err := freePort("127.0.0.1")
		if err != nil {
			return "", err
		}
		*u.listen = []url.URL{{Scheme: "http", Host: fmt.Sprintf("127.0.0.1:%d", port)}}
		*u.advertise = *u.listen
	}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	e, err := embed.StartEtcd(c)
	if err != nil {
		return "", err
	}
	select {
	case <-e.Server.ReadyNotify():
		return c.ListenClientUrls[0].String(), nil
	case err := <-e.Err():
		return "", err
	}
}

// arguments are those that kubeadm gives too, as far as a node notices them.
func arguments(o options, etcd, issuer string) []string {
	pki := filepath.Join(o.dir, "pki")
	advertised := o.address
	if strings.HasPrefix(advertised, "127.") {
		advertised = "192.0.2.1" // a loopback address is refused as the endpoint of a Service
	}
	return []string{
		"--etcd-servers=" + etcd,
		"--bind-address=" + o.address,
		"--advertise-address=" + advertised,
		fmt.Sprintf("--secure-port=%d", o.port),
		"--tls-cert-file=" + pki + "/apiserver.crt", "--tls-private-key-file=" + pki + "/apiserver.key",
		"--client-ca-file=" + pki + "/ca.crt",
		"--kubelet-client-certificate=" + pki + "/kubelet-client.crt", "--kubelet-client-key=" + pki + "/kubelet-client.key",
		"--kubelet-certificate-authority=" + pki + "/ca.crt",
		"--kubelet-preferred-address-types=InternalIP",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=" + issuer,
		"--service-account-signing-key-file=" + pki + "/tokens.key", "--service-account-key-file=" + pki + "/tokens.key",
		"--service-cluster-ip-range=" + o.services,
		"--endpoint-reconciler-type=lease",
		"--allow-privileged=true",
		"--profiling=false",
	}
}

// freePort returns a port that nobody listens on. Another process may take it before it is used;
// the start fails then.
func freePort(address string) (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}
