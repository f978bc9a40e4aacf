package attest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// clientRole does what it is told, a line each, and answers with a line: ok and the result, or why
// not.
func clientRole() error {
	p := &player{conns: map[string]*net.TCPConn{}}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		answer, err := p.play(strings.Fields(in.Text()))
		if err != nil {
			fmt.Println("failed:", strings.ReplaceAll(err.Error(), "\n", "; "))
		} else {
			fmt.Println("ok", answer)
		}
	}
	return nil
}

type player struct {
	conns     map[string]*net.TCPConn // by their own end
	listeners []net.Listener
	raw       []int
}

func (p *player) play(args []string) (string, error) {
	if len(args) == 0 {
		return "", errors.New("nothing to do")
	}
	for len(args) < 4 {
		args = append(args, "")
	}
	switch args[0] {
	case "dial": // network address [own end]
		return p.dial(args[1], args[2], args[3])
	case "spoof": // own end, address [device]: from an address that need not be ours
		return p.spoof(args[1], args[2], args[3], true)
	case "try": // own end, address: sends a SYN and does not wait
		return p.spoof(args[1], args[2], args[3], false)
	// protocol and port id of a netlink socket, cgroup id, both ends: sends it an answer of our own to
	// many questions to come
	case "forge":
		return p.forge(args[1:])
	case "bound": // device address: a socket that is bound to an interface
		return p.socket(unix.AF_INET, unix.IPPROTO_TCP, args[2], args[1])
	case "mapped": // address: a socket of AF_INET6 that speaks IPv4
		return p.socket(unix.AF_INET6, unix.IPPROTO_TCP, args[1], "")
	case "thread": // cgroup address: a thread of this process goes there, and makes the socket
		return p.thread(args[1], args[2])
	case "mptcp": // address
		return p.socket(unix.AF_INET, unix.IPPROTO_MPTCP, args[1], "")
	case "bench": // address, how many connections: the median of every second one's time, and of the others'
		return bench(args[1], args[2])
	case "listen": // address
		l, err := net.Listen("tcp4", args[1])
		if err != nil {
			return "", err
		}
		p.listeners = append(p.listeners, l)
		return l.Addr().String(), nil
	case "greet": // address: listens, and greets the first that comes
		l, err := net.Listen("tcp4", args[1])
		if err != nil {
			return "", err
		}
		p.listeners = append(p.listeners, l)
		fmt.Println("ok") // it listens
		c, err := l.Accept()
		if err != nil {
			return "", err
		}
		p.conns[c.LocalAddr().String()] = c.(*net.TCPConn)
		_, err = c.Write([]byte("220 ready\n"))
		return "", err
	case "deaf": // listens no more
		for _, l := range p.listeners {
			if err := l.Close(); err != nil {
				return "", err
			}
		}
		return "", nil
	case "half": // own end: shuts down our direction
		return "", p.conns[args[1]].CloseWrite()
	case "close": // own end
		return "", p.conns[args[1]].Close()
	case "wait": // own end: until the other closes
		_, err := p.conns[args[1]].Read(make([]byte, 1))
		if !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("not closed: %w", err)
		}
		return "", p.conns[args[1]].Close()
	case "reset": // own end
		return "", errors.Join(p.conns[args[1]].SetLinger(0), p.conns[args[1]].Close())
	case "move": // cgroup: this process goes there
		return "", os.WriteFile(args[1]+"/cgroup.procs", []byte("0"), 0)
	case "pass": // own end, path: the socket goes to whoever listens at the Unix socket there
		return "", p.pass(args[1], args[2])
	case "take": // path: a socket comes
		return p.take(args[1])
	case "send": // own end, text
		_, err := p.conns[args[1]].Write([]byte(args[2]))
		return "", err
	case "say": // text: on the socket that was made last by spoof
		_, err := unix.Write(p.raw[len(p.raw)-1], []byte(args[1]))
		return "", err
	// path: this process goes into the network namespace, as a runtime's does before it becomes the
	// container's
	case "enter":
		nsenter, err := exec.LookPath("nsenter")
		if err != nil {
			return "", err
		}
		program, err := os.Executable()
		if err != nil {
			return "", err
		}
		return "", syscall.Exec(
			nsenter,
			[]string{"nsenter", "--net=" + args[1], "--", "sh", "-c", `echo ok; exec "$0"`, program},
			os.Environ(),
		)
	case "pid":
		return strconv.Itoa(os.Getpid()), nil
	case "exit":
		os.Exit(0)
	}
	return "", fmt.Errorf("what is %s?", args[0])
}

func (p *player) dial(network, address, own string) (string, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	if own != "" {
		a, err := net.ResolveTCPAddr("tcp", own)
		if err != nil {
			return "", err
		}
		d.LocalAddr = a
	}
	c, err := d.DialContext(context.Background(), network, address)
	if err != nil {
		return "", err
	}
	return p.keep(c)
}

func (p *player) keep(c net.Conn) (string, error) {
	own := c.LocalAddr().String()
	p.conns[own] = c.(*net.TCPConn)
	return own, nil
}

func (p *player) socket(family, protocol int, address, device string) (string, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return "", err
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return "", err
	}
	if device != "" {
		if err := unix.BindToDevice(fd, device); err != nil {
			return "", err
		}
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	if family == unix.AF_INET6 {
		sa = &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	}
	if err := unix.Connect(fd, sa); err != nil {
		return "", err
	}
	p.raw = append(p.raw, fd)
	sa, err = unix.Getsockname(fd)
	if err != nil {
		return "", err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String(), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)).String(), nil
	}
	return "", fmt.Errorf("%T", sa)
}

func (p *player) thread(cgroup, address string) (own string, err error) {
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		if err = os.WriteFile(cgroup+"/cgroup.threads", []byte("0"), 0); err == nil {
			own, err = p.socket(unix.AF_INET, unix.IPPROTO_TCP, address, "")
		}
		close(done)
		select {} // the thread lives as long as the process: its cgroup is empty without it
	}()
	<-done
	return own, err
}

func (p *player) pass(own, path string) error {
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer c.Close()
	f, err := p.conns[own].File()
	if err != nil {
		return err
	}
	defer f.Close()
	if _, _, err = c.(*net.UnixConn).WriteMsgUnix([]byte{1}, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return err
	}
	return p.conns[own].Close()
}

func (p *player) take(path string) (string, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", err
	}
	fmt.Println("ok") // it listens
	defer l.Close()
	c, err := l.Accept()
	if err != nil {
		return "", err
	}
	defer c.Close()
	control := make([]byte, unix.CmsgSpace(4))
	if _, _, _, _, err := c.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), control); err != nil {
		return "", err
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return "", errors.Join(err, errors.New("no descriptor came"))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return "", err
	}
	conn, err := net.FileConn(os.NewFile(uintptr(fds[0]), "passed"))
	if err != nil {
		return "", err
	}
	return p.keep(conn)
}

func (p *player) spoof(own, address, device string, wait bool) (string, error) {
	from, to := netip.MustParseAddrPort(own), netip.MustParseAddrPort(address)
	kind := unix.SOCK_STREAM | unix.SOCK_CLOEXEC
	if !wait {
		kind |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(unix.AF_INET, kind, 0)
	if err != nil {
		return "", err
	}
	p.raw = append(p.raw, fd)
	if device != "" {
		if err := unix.BindToDevice(fd, device); err != nil {
			return "", err
		}
	}
	for _, option := range [][2]int{{unix.SOL_IP, unix.IP_FREEBIND}, {unix.SOL_SOCKET, unix.SO_REUSEADDR}} {
		if err := unix.SetsockoptInt(fd, option[0], option[1], 1); err != nil {
			return "", err
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: from.Addr().As4(), Port: int(from.Port())}); err != nil {
		return "", err
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if err == unix.EINPROGRESS {
		err = nil
	}
	return own, err
}

func (p *player) forge(args []string) (string, error) {
	if len(args) != 5 {
		return "", errors.New("want protocol, port id, cgroup id and both ends")
	}
	protocol, err0 := strconv.Atoi(args[0])
	portID, err1 := strconv.ParseUint(args[1], 10, 32)
	cgroup, err2 := strconv.ParseUint(args[2], 10, 64)
	local, err3 := netip.ParseAddrPort(args[3])
	remote, err4 := netip.ParseAddrPort(args[4])
	fd, err := openNetlink(protocol)
	if err = errors.Join(err, err0, err1, err2, err3, err4); err != nil {
		return "", err
	}
	defer unix.Close(fd)
	arrived := 0
	for sequence := range uint32(32) {
		if unix.Sendto(
			fd,
			forgedAnswer(sequence, 1, cgroup, local, remote),
			0,
			&unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: uint32(portID)},
		) == nil {
			arrived++
		}
	}
	return strconv.Itoa(arrived), nil
}

// bench opens one connection after the other, sends a byte and waits for one, and returns
// nanoseconds.
func bench(address, times string) (string, error) {
	n, err := strconv.Atoi(times)
	if err != nil {
		return "", err
	}
	var took [2][]time.Duration
	for i := range n {
		start := time.Now()
		c, err := net.Dial("tcp4", address)
		if err != nil {
			return "", err
		}
		b := []byte{byte(i % 2)}
		if _, err = c.Write(b); err == nil {
			_, err = c.Read(b)
		}
		took[i%2] = append(took[i%2], time.Since(start))
		if err := errors.Join(err, c.(*net.TCPConn).SetLinger(0), c.Close()); err != nil { // no port stays in TIME_WAIT
			return "", err
		}
	}
	for _, t := range took {
		slices.Sort(t)
	}
	return fmt.Sprintf("%d %d", took[0][n/4].Nanoseconds(), took[1][n/4].Nanoseconds()), nil
}
