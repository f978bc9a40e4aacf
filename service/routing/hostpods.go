package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
)

// Pods on the host network are the cloud's own as often as not: its network plugin, its disk
// drivers, its controllers. They need the cloud's metadata server, so `auto` redirects them only
// where there is none.

// CloudServer is what is known of a metadata server of the cloud, asked from the host. What was
// found holds until the node boots again: under standing rules, after a restart, it would be
// another question.
type CloudServer struct {
	Found string    `json:"found,omitempty"` // one of the words below
	Since time.Time `json:"since,omitzero"`
}

const (
	cloudUnknown = ""        // the host has no route there yet
	cloudSilent  = "silent"  // nobody has answered so far: the network may be about to come up
	cloudNone    = "none"    // nobody answered for long, or somebody refused
	cloudAnswers = "answers" // whatever it says
)

const (
	// answerWait is how long a connection may take. Its first packet is sent again after a second.
	answerWait = 2 * time.Second
	// silence is how long nobody must answer to be nobody. Until then the server is asked again, and
	// pods on the host network are redirected: where nobody answers, they lose nothing by it.
	silence = 5 * time.Minute
)

// known says whether it need not be asked any more.
func (c CloudServer) known() bool { return c.Found == cloudNone || c.Found == cloudAnswers }

// with is what is known after one more answer.
func (c CloudServer) with(found string, now time.Time) CloudServer {
	switch {
	case c.known() || found == cloudUnknown:
		return c
	case found != cloudSilent || c.Found != cloudSilent:
		return CloudServer{Found: found, Since: now}
	case now.Sub(c.Since) >= silence:
		return CloudServer{Found: cloudNone, Since: now}
	}
	return c
}

// hostPods is whether pods on the host network are redirected, and why, for people.
func hostPods(p Plan, c CloudServer, slices []string) (yes bool, why string) {
	at := metadataServer.Addr().String()
	switch {
	case !p.redirects():
		why = "mode " + p.Mode + " redirects nobody"
	case p.InterceptHostPods == "on":
		yes, why = true, "routing.interceptHostPods is on"
	case p.InterceptHostPods != "auto":
		why = "routing.interceptHostPods is off"
	case c.Found == cloudNone:
		yes, why = true, "no metadata server of a cloud answers at "+at
	case c.Found == cloudSilent:
		yes, why = true, "no metadata server of a cloud has answered at "+at+" so far; it is asked again"
	case c.Found == cloudAnswers:
		why = "the cloud's metadata server answers at " + at + ", and they may need it"
	default:
		why = "there is no route to " + at + " yet, so whether a metadata server of the cloud answers there is not known"
	}
	if yes && len(slices) == 0 {
		yes, why = false, "none of the host's own cgroups was found, which needs cgroup v2"
	}
	if yes {
		return true, "redirected: " + why
	}
	return false, "left alone: " + why
}

// question is a connection to the metadata server that was begun.
type question int

// askCloud begins to ask from the calling thread's network namespace, for answer to wait. Our
// process is in a slice of the host's, which the rules spare. noQuestion stands for one that cannot
// be asked yet.
func askCloud() question {
	routes, err := netlink.RouteGet(metadataServer.Addr().AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
		return noQuestion
	}
	if lo, err := netlink.LinkByName("lo"); err != nil || routes[0].LinkIndex == lo.Attrs().Index {
		return noQuestion // the route is ours
	}
	return begin(metadataServer)
}

const noQuestion question = -1

func begin(to netip.AddrPort) question {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return noQuestion
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil &&
		!errors.Is(err, unix.EINPROGRESS) {
		_ = unix.Close(fd) // EPERM: a sandbox; ENETUNREACH: the network went away
		return noQuestion
	}
	return question(fd)
}

// answer waits for the answer for some seconds, on any thread.
func (q question) answer() (found string) {
	if q == noQuestion {
		return cloudUnknown
	}
	fd := int(q)
	defer unix.Close(fd)
	if !ready(fd, unix.POLLOUT, answerWait) {
		return cloudSilent
	}
	refused, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch errno := syscall.Errno(refused); {
	case err != nil:
		return cloudUnknown
	case errno == unix.ECONNREFUSED:
		return cloudNone
	case errno == unix.EHOSTUNREACH || errno == unix.ETIMEDOUT:
		return cloudSilent
	case errno != 0:
		return cloudUnknown
	}
	if _, err := unix.Write(fd, fmt.Appendf(nil, "GET / HTTP/1.0\r\nHost: %s\r\n\r\n",
		metadataServer.Addr())); err != nil {
		return cloudNone
	}
	head := make([]byte, 64)
	if !ready(fd, unix.POLLIN, time.Second) {
		return cloudSilent
	}
	n, err := unix.Read(fd, head)
	if err != nil || !strings.HasPrefix(string(head[:n]), "HTTP/") {
		return cloudNone
	}
	return cloudAnswers
}

// inOneOf says whether this process is in one of the cgroups, which lie below the root of the
// cgroup v2 hierarchy.
func inOneOf(root string, cgroups []string) bool {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(own)) {
		if path, unified := strings.CutPrefix(strings.TrimSpace(line), "0::"); unified {
			path = filepath.Join(cgroup2(), path) + "/"
			return slices.ContainsFunc(cgroups, func(c string) bool {
				return strings.HasPrefix(path, filepath.Join(root, c)+"/")
			})
		}
	}
	return false
}

// ready waits for the event or an error on the socket.
func ready(fd int, event int16, wait time.Duration) bool {
	for until := time.Now().Add(wait); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: event}}, int(max(time.Until(until), 0).Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return n > 0 && err == nil
		}
	}
}

// realServer returns an error if a metadata server of the cloud answers this host. If somebody
// flushes the policy rules pods talk to it again, which mode loopback has no second guard for; and
// with a link the node's own daemons would lose it.
func (r *router) realServer() error {
	if r.ask() != cloudAnswers {
		return nil
	}
	return fmt.Errorf(
		"%s %w: a metadata server answers this host there, and in mode %s policy rules alone keep pods from it; "+
			"use another mode, or set routing.force to true",
		metadataServer,
		fault.ErrForeign,
		r.plan.Mode,
	)
}
