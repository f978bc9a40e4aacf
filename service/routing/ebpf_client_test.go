package routing

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// connectAs connects as the word before the blank of arg says to the address behind it, and prints
// who answers and whom the kernel names as the peer. It makes the system calls itself: what a
// library would do instead is not the matter.
func connectAs(arg string) error {
	how, at, _ := strings.Cut(arg, " ")
	to, err := netip.ParseAddrPort(at)
	if err != nil {
		return err
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	domain, kind, protocol := unix.AF_INET, unix.SOCK_STREAM, 0
	switch how {
	case "tcp", "fastopen":
	case "mapped": // as Java does
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	case "mptcp":
		protocol = unix.IPPROTO_MPTCP
	case "udp":
		kind = unix.SOCK_DGRAM
	default:
		return errors.New("connect how? " + how)
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(2 * time.Second))
	if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait)); err != nil {
		return err
	}
	if how == "fastopen" {
		err = unix.Sendto(fd, []byte("who?"), unix.MSG_FASTOPEN, sa)
	} else if err = unix.Connect(fd, sa); err == nil && kind == unix.SOCK_STREAM {
		_, err = unix.Write(fd, []byte("who?"))
	}
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		return fmt.Errorf("getpeername: %w", err)
	}
	var who string
	if kind == unix.SOCK_STREAM {
		buf := make([]byte, 64)
		n, err := unix.Read(fd, buf)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		who = string(buf[:n]) + " "
	}
	switch p := peer.(type) {
	case *unix.SockaddrInet4:
		who += netip.AddrPortFrom(netip.AddrFrom4(p.Addr), uint16(p.Port)).String()
	case *unix.SockaddrInet6:
		who += netip.AddrPortFrom(netip.AddrFrom16(p.Addr), uint16(p.Port)).String()
	}
	_, err = fmt.Fprint(os.Stdout, who)
	return err
}

// loadUntilEOF asks again and again until standard input ends, and returns the requests that no
// emulator answered.
func loadUntilEOF(at string) error {
	over := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(over)
	}()
	var asked int
	var lost []error
	for {
		select {
		case <-over:
			fmt.Printf("%d of %d requests lost\n", len(lost), asked)
			return errors.Join(lost...)
		default:
		}
		asked++
		c, err := net.DialTimeout("tcp", at, long)
		if err == nil {
			var who string
			if who, err = talk(c, long); err == nil && who != emulator {
				err = errors.New(who + " answered")
			}
			hangUp(c)
		}
		if err != nil {
			lost = append(lost, err)
		}
	}
}

// repeat makes a number of connections, one after the other, and prints how many nanoseconds each
// took until the answer was read.
func repeat(arg string) error {
	times, at, _ := strings.Cut(arg, " ")
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	start := time.Now()
	for range n {
		c, err := net.DialTimeout("tcp", at, long)
		if err != nil {
			return err
		}
		who, err := talk(c, long)
		if err != nil || who != emulator {
			return fmt.Errorf("%q answered: %w", who, err)
		}
		hangUp(c)
	}
	fmt.Print(time.Since(start).Nanoseconds() / int64(n))
	return nil
}

// hangUp ends a connection so that nothing of it is left. Thousands that wait for their time to be
// over would use up the ports of one destination; and when the destination changes, a client takes
// ports again by which conntrack still knows the same emulator.
func hangUp(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = c.Close()
}
