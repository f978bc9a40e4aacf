package service

import (
	"context"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
)

// serviceUser is who serves, when systemd's units are used.
const serviceUser = "gke-metadata-emulator"

// namespaceSocket is where HandOverNamespaces listens. The directory is root's and for the
// service's group.
func namespaceSocket(runDir string) string { return filepath.Join(runDir, "attest", "attest.sock") }

// HandOverNamespaces hands sockets in the network namespaces of this node's pods to the serving
// process, until ctx is done.
func HandOverNamespaces(ctx context.Context, o Options) error {
	if o.Stderr == nil {
		o.Stderr = os.Stderr
	}
	log := logrus.New()
	configureLog(log, config.Default().Log, o.Stderr)
	socket := namespaceSocket(o.RunDir)
	if err := os.MkdirAll(filepath.Dir(socket), 0o750); err != nil {
		return err
	}
	l, err := listenUnix(ctx, "unixpacket", socket, "gke-metadata-emulator-attest.service")
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	ready := false
	return attest.RunHelper(ctx, attest.HelperOptions{
		Listener: l.UnixListener,
		User:     userID(log),
		Log:      log,
		Alive:    alive(log),
		Report: func(text string) {
			state := "STATUS=" + text
			if !ready {
				ready = true
				state = daemon.SdNotifyReady + "\n" + state
			}
			notify(log, state)
		},
	})
}

const rootOnly = "attest: the service's user is unknown: only a service that runs as root gets network namespaces"

// userID is the service's user. Where the packages did not make it, root serves.
func userID(log logrus.FieldLogger) int {
	u, err := user.Lookup(serviceUser)
	if err != nil {
		log.WithError(err).Warn(rootOnly)
		return 0
	}
	id, err := strconv.Atoi(u.Uid)
	if err != nil {
		log.WithError(err).Warn(rootOnly)
		return 0
	}
	return id
}
