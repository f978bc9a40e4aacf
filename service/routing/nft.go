package routing

import (
	"bytes"
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

const subsysNFT = unix.NFNL_SUBSYS_NFTABLES << 8

// nftaTableHandle is NFTA_TABLE_HANDLE of linux/netfilter/nf_tables.h.
const nftaTableHandle = 4

// generation counts nf_tables' transactions in this network namespace.
func generation() (uint32, error) {
	replies, err := askNFT(unix.NFT_MSG_GETGEN, 0, unix.NFT_MSG_NEWGEN, unix.AF_UNSPEC)
	if err == nil && len(replies) != 1 {
		err = errors.New("nf_tables tells no generation")
	}
	if err != nil {
		return 0, err
	}
	id := attribute(replies[0], unix.NFTA_GEN_ID)
	if len(id) != 4 {
		return 0, errors.New("nf_tables tells no generation")
	}
	return binary.BigEndian.Uint32(id), nil
}

func nftChainExists(family netobj.Family, table, name string) (bool, error) {
	_, err := askNFT(unix.NFT_MSG_GETCHAIN, 0, unix.NFT_MSG_NEWCHAIN, uint8(family),
		nftName(unix.NFTA_CHAIN_TABLE, table), nftName(unix.NFTA_CHAIN_NAME, name))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, fault.Permission(err)
}

// nftRules dumps the rules of one chain; a chain or table that is not there has none.
func nftRules(family netobj.Family, table, name string) (rules [][]byte, err error) {
	all, err := askNFT(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.NFT_MSG_NEWRULE, uint8(family),
		nftName(unix.NFTA_RULE_TABLE, table), nftName(unix.NFTA_RULE_CHAIN, name))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fault.Permission(err)
	}
	for _, r := range all {
		if string(attribute(r, unix.NFTA_RULE_CHAIN)) == name+"\x00" { // old kernels tell all rules of the table
			rules = append(rules, r)
		}
	}
	return rules, nil
}

// askNFT sends one question to nf_tables and returns the answers of the wanted type.
func askNFT(question, flags, answer int, family uint8, attrs ...*nl.RtAttr) ([][]byte, error) {
	return netobj.Dump(func() ([][]byte, error) {
		s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
		if err != nil {
			return nil, err
		}
		defer closeLater(s.Close)
		if err := s.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
			return nil, err
		}
		req := nl.NewNetlinkRequest(subsysNFT|question, flags)
		req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}
		req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
		for _, a := range attrs {
			req.AddData(a)
		}
		return req.Execute(unix.NETLINK_NETFILTER, uint16(subsysNFT|answer))
	})
}

// nftTableHandle is a table's handle, "" if there is no such table.
func nftTableHandle(family netobj.Family, name string) (string, error) {
	tables, err := askNFT(unix.NFT_MSG_GETTABLE, 0, unix.NFT_MSG_NEWTABLE, uint8(family),
		nftName(unix.NFTA_TABLE_NAME, name))
	if errors.Is(err, unix.ENOENT) || err == nil && len(tables) == 0 {
		return "", nil
	}
	if err != nil {
		return "", fault.Permission(err)
	}
	return fmt.Sprintf("%x", attribute(tables[0], nftaTableHandle)), nil
}

// xtRule is what a rule that iptables-nft made, or nft in a chain of iptables', says of our chains.
type xtRule struct {
	to        string // the chain that it jumps or goes to
	ours      bool   // our comment is on it
	redirects bool   // it changes where packets go
	server    bool   // it names an address of the metadata server
	handle    uint64
}

// parseNFTRule reads what of a rule concerns our chains. Chains that iptables cannot list are read
// so.
func parseNFTRule(message []byte) (r xtRule) {
	if h := attribute(message, unix.NFTA_RULE_HANDLE); len(h) == 8 {
		r.handle = binary.BigEndian.Uint64(h)
	}
	for _, e := range attributes(attribute(message, unix.NFTA_RULE_EXPRESSIONS)) {
		data := within(e.value, unix.NFTA_EXPR_DATA)
		switch unix.ByteSliceToString(within(e.value, unix.NFTA_EXPR_NAME)) {
		case "immediate":
			verdict := within(within(data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
			r.to = unix.ByteSliceToString(within(verdict, unix.NFTA_VERDICT_CHAIN))
		case "match":
			r.ours = r.ours || unix.ByteSliceToString(within(data, unix.NFTA_MATCH_NAME)) == "comment" &&
				unix.ByteSliceToString(within(data, unix.NFTA_MATCH_INFO)) == comment
		case "target":
			switch unix.ByteSliceToString(within(data, unix.NFTA_TARGET_NAME)) {
			case "DNAT", "REDIRECT", "NETMAP":
				r.redirects = true
			}
		case "nat", "redir":
			r.redirects = true
		case "cmp":
			value := within(within(data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE)
			r.server = r.server || bytes.Equal(value, metadataServer.Addr().AsSlice()) ||
				bytes.Equal(value, metadataServer6.Addr().AsSlice())
		}
	}
	return r
}

// nftName is an attribute that names a table or a chain.
func nftName(kind int, name string) *nl.RtAttr { return nl.NewRtAttr(kind, nl.ZeroTerminated(name)) }

// transactions opens a connection to nf_tables for one transaction or several. Its end is
// closeTransactions.
func transactions() (*nftables.Conn, error) { return nftables.New(nftables.AsLasting()) }

func closeTransactions(c *nftables.Conn) { closeLater(func() { _ = c.CloseLasting() }) }

// closeLater closes a socket of netfilter's behind the caller's back, in its turn. Until nf_tables
// has let go of what transactions deleted, which takes 10 ms and more, the kernel holds whoever
// closes one, and with it the next transaction.
func closeLater(closing func()) { closer() <- closing }

var closer = sync.OnceValue(func() chan<- func() {
	queue := make(chan func(), 128)
	go func() {
		for closing := range queue {
			closing()
		}
	}()
	return queue
})

// attribute finds one attribute of a netfilter message, nil if it is not there.
func attribute(message []byte, kind uint16) []byte {
	if len(message) < nl.SizeofNfgenmsg {
		return nil
	}
	return within(message[nl.SizeofNfgenmsg:], kind)
}

// nftAttribute is one netlink attribute.
type nftAttribute struct {
	kind  uint16
	value []byte
}

// attributes splits nested attributes, up to one that is cut short.
func attributes(b []byte) (all []nftAttribute) {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			break
		}
		all = append(all, nftAttribute{binary.NativeEndian.Uint16(b[2:]) & nl.NLA_TYPE_MASK, b[unix.SizeofNlAttr:size]})
		b = b[min((size+3)&^3, len(b)):]
	}
	return all
}

// within finds one of nested attributes, nil if it is not there.
func within(b []byte, kind uint16) []byte {
	for _, a := range attributes(b) {
		if a.kind == kind {
			return a.value
		}
	}
	return nil
}
