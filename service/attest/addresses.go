package attest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// maxAddresses bounds what is kept of one namespace, which is its owner's to fill. Those beyond are
// not known: their clients are refused.
const maxAddresses = 256

var errTooMany = fmt.Errorf("the network namespace has more than %d addresses: clients with the others "+
	"are refused", maxAddresses)

// subscribeAddresses has the socket become readable when an address of its namespace comes or goes.
func (s *netlinkSocket) subscribeAddresses() error {
	for _, group := range []int{unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR} {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return fmt.Errorf("subscribe to addresses: %w", err)
		}
	}
	return nil
}

// errChanging says that the kernel reported a change while it answered: the answer may be older.
var errChanging = errors.New("the addresses of the network namespace changed while they were read")

// addresses asks for all addresses of the namespace that a client could have, and the interface of
// each. Changes that were reported before the question are dropped: they are in the answer.
// errTooMany says that there are more than are kept; the socket is of no use then. Of other errors,
// errChanging alone comes with an answer; the caller is to ask again.
func (s *netlinkSocket) addresses() (found map[netip.Addr]uint32, err error) {
	for range 3 {
		if err = s.askAddresses(); err == nil {
			found, err = s.answeredAddresses()
		}
		if err != errLost && err != errChanging {
			break
		}
	}
	return found, err
}

func (s *netlinkSocket) askAddresses() error {
	for range foreignMessages { // what lies there
		if b, err := s.receive(); err != nil && err != errLost {
			return err
		} else if b == nil && err == nil {
			break
		}
	}
	if err := s.send(s.request(unix.RTM_GETADDR, unix.NLM_F_DUMP, unix.SizeofIfAddrmsg)); err != nil {
		return fmt.Errorf("ask for addresses: %w", err)
	}
	return nil
}

func (s *netlinkSocket) answeredAddresses() (map[netip.Addr]uint32, error) {
	found, changing := map[netip.Addr]uint32{}, false
	for {
		b, err := s.receive()
		if err != nil {
			return nil, err
		}
		if b == nil {
			return nil, errLost
		}
		for m, rest, ok := nextMessage(b); ok; m, rest, ok = nextMessage(rest) {
			switch {
			case m.sequence != s.sequence:
				changing = true // nothing else reports this change: it is off the socket now
			case m.kind == unix.NLMSG_DONE:
				if changing {
					return found, errChanging
				}
				return found, nil
			case m.kind == unix.NLMSG_ERROR:
				return nil, fmt.Errorf("ask for addresses: %w", m.errno())
			case m.kind == unix.RTM_NEWADDR:
				a, device, ok := parseAddress(m.data)
				if ok && len(found) >= maxAddresses {
					return found, errTooMany
				}
				if ok {
					found[a] = device
				}
			}
		}
	}
}

// parseAddress reads a struct ifaddrmsg with its attributes. ok is false for what is the address of
// no client of ours: loopback's and a link's own are in every namespace.
func parseAddress(b []byte) (a netip.Addr, device uint32, ok bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return netip.Addr{}, 0, false
	}
	value := attribute(b[unix.SizeofIfAddrmsg:], unix.IFA_LOCAL) // the other is the peer's, on a point-to-point link
	if value == nil {
		value = attribute(b[unix.SizeofIfAddrmsg:], unix.IFA_ADDRESS)
	}
	a, ok = netip.AddrFromSlice(value)
	if !ok || a.IsLoopback() || a.Is6() && a.IsLinkLocalUnicast() {
		return netip.Addr{}, 0, false
	}
	return a.Unmap(), binary.NativeEndian.Uint32(b[4:]), true
}
