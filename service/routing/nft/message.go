// Package nft answers: what stands of our table of nf_tables, and does it differ from the chains
// that are wanted? It also puts questions to nf_tables for those who look at the tables of others.
//
// A rule is made of parts. Each part has the words of nft(8) and the kernel's expressions.
package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
)

const Subsystem = unix.NFNL_SUBSYS_NFTABLES << 8

// tableHandle is NFTA_TABLE_HANDLE of linux/netfilter/nf_tables.h.
const tableHandle = 4

// Generation counts nf_tables' transactions in this network namespace.
func Generation() (uint32, error) {
	replies, err := Ask(unix.NFT_MSG_GETGEN, 0, unix.NFT_MSG_NEWGEN, unix.AF_UNSPEC)
	if err == nil && len(replies) != 1 {
		err = errors.New("nf_tables tells no generation")
	}
	if err != nil {
		return 0, err
	}
	id := Attribute(replies[0], unix.NFTA_GEN_ID)
	if len(id) != 4 {
		return 0, errors.New("nf_tables tells no generation")
	}
	return binary.BigEndian.Uint32(id), nil
}

func ChainExists(family netobj.Family, table, name string) (bool, error) {
	_, err := Ask(unix.NFT_MSG_GETCHAIN, 0, unix.NFT_MSG_NEWCHAIN, uint8(family),
		NameAttr(unix.NFTA_CHAIN_TABLE, table), NameAttr(unix.NFTA_CHAIN_NAME, name))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, fault.Permission(err)
}

// Rules dumps the rules of one chain; a chain or table that is not there has none.
func Rules(family netobj.Family, table, name string) (rules [][]byte, err error) {
	all, err := Ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, uint8(family),
		NameAttr(unix.NFTA_RULE_TABLE, table), NameAttr(unix.NFTA_RULE_CHAIN, name))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fault.Permission(err)
	}
	for _, r := range all {
		if string(Attribute(r, unix.NFTA_RULE_CHAIN)) == name+"\x00" { // old kernels tell all rules of the table
			rules = append(rules, r)
		}
	}
	return rules, nil
}

// Ask sends one question to nf_tables and returns the answers of the wanted type.
func Ask(question, flags, answer int, family uint8, attrs ...*nl.RtAttr) ([][]byte, error) {
	return netobj.Dump(func() ([][]byte, error) {
		s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
		if err != nil {
			return nil, err
		}
		defer CloseLater(s.Close)
		if err := s.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
			return nil, err
		}
		req := nl.NewNetlinkRequest(Subsystem|question, flags)
		req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}
		req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
		for _, a := range attrs {
			req.AddData(a)
		}
		return req.Execute(unix.NETLINK_NETFILTER, uint16(Subsystem|answer))
	})
}

// TableHandle is a table's handle, "" if there is no such table.
func TableHandle(family netobj.Family, name string) (string, error) {
	tables, err := Ask(unix.NFT_MSG_GETTABLE, 0, unix.NFT_MSG_NEWTABLE, uint8(family),
		NameAttr(unix.NFTA_TABLE_NAME, name))
	if errors.Is(err, unix.ENOENT) || err == nil && len(tables) == 0 {
		return "", nil
	}
	if err != nil {
		return "", fault.Permission(err)
	}
	return fmt.Sprintf("%x", Attribute(tables[0], tableHandle)), nil
}

// NameAttr is an attribute that names a table or a chain.
func NameAttr(kind int, name string) *nl.RtAttr { return nl.NewRtAttr(kind, nl.ZeroTerminated(name)) }

// Transactions opens a connection to nf_tables for one transaction or several. Its end is
// CloseTransactions.
func Transactions() (*nftables.Conn, error) { return nftables.New(nftables.AsLasting()) }

func CloseTransactions(c *nftables.Conn) { CloseLater(func() { _ = c.CloseLasting() }) }

// CloseLater closes a socket of netfilter's behind the caller's back, in its turn. Until nf_tables
// has let go of what transactions deleted, which takes 10 ms and more, the kernel holds whoever
// closes one, and with it the next transaction.
func CloseLater(closing func()) { closer() <- closing }

var closer = sync.OnceValue(func() chan<- func() {
	queue := make(chan func(), 128)
	go func() {
		for closing := range queue {
			closing()
		}
	}()
	return queue
})

// Attribute finds one attribute of a netfilter message, nil if it is not there.
func Attribute(message []byte, kind uint16) []byte {
	if len(message) < nl.SizeofNfgenmsg {
		return nil
	}
	return Within(message[nl.SizeofNfgenmsg:], kind)
}

// attr is one netlink attribute.
type attr struct {
	Kind  uint16
	Value []byte
}

// Attributes splits nested attributes, up to one that is cut short.
func Attributes(b []byte) (all []attr) {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			break
		}
		all = append(all, attr{binary.NativeEndian.Uint16(b[2:]) & nl.NLA_TYPE_MASK, b[unix.SizeofNlAttr:size]})
		b = b[min((size+3)&^3, len(b)):]
	}
	return all
}

// Within finds one of nested attributes, nil if it is not there.
func Within(b []byte, kind uint16) []byte {
	for _, a := range Attributes(b) {
		if a.Kind == kind {
			return a.Value
		}
	}
	return nil
}

// FamilyWord is the word for the family that a message is about.
func FamilyWord(message []byte) string {
	return map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet",
		unix.NFPROTO_ARP:    "arp",
		unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev"}[message[0]]
}

func Uint32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}
