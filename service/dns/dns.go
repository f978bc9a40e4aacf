// Package dns answers: what is the address of metadata.google.internal?
//
// On GKE the name resolves by itself. With `dns: answer` rules of package routing send here what
// pods of this node ask any name server for the name. The answer is the same for everybody and
// holds public constants alone, so nobody is attested.
package dns

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// Name is the name that is answered for. Names below which it stands, as those that a resolver
// makes of its search list (metadata.google.internal.default.svc.cluster.local), do not exist.
const Name = "metadata.google.internal."

var (
	address  = netip.MustParseAddr("169.254.169.254")
	address6 = netip.MustParseAddr("fd20:ce::254") // H-24, IPv6
)

const (
	// ttl is short: a resolver that keeps the answer forgets it soon after `dns: off`.
	ttl = 60
	// payload is what the answer says of the UDP payload that we take, as resolvers do since 2020.
	payload = 1232

	headerLength = 12
	typeEnd      = 4  // a question ends with type and class
	ipHeaders    = 28 // of IPv4 and UDP
)

// Outcome is what became of a query, as the metric tells it.
type Outcome string

const (
	Address   Outcome = "address"   // an address was answered
	Empty     Outcome = "empty"     // the name exists, and has no record of this type
	NXDomain  Outcome = "nxdomain"  // the name is one of a search list's
	Refused   Outcome = "refused"   // answered REFUSED: not the name, or no question about it
	Malformed Outcome = "malformed" // not answered: no query
	Limited   Outcome = "limited"   // not answered: the client asks too often
)

// Outcomes are all of them.
var Outcomes = []Outcome{Address, Empty, NXDomain, Refused, Malformed, Limited}

// Answer returns the answer to a query, nil if there is none. ipv6 says whether the metadata server
// is served by IPv6 too.
//
// What is no query is never answered: a response above all, so that two responders never answer
// each other. The answer's packet is at most 1.5 times as large as the query's, so nothing is won
// by a query in somebody else's name.
//
// There is no SOA in an empty answer. No stub resolver needs one: it is authoritative, and glibc
// and Go go on to the next server only where an empty answer is neither that nor of a recursive
// server.
func Answer(query []byte, ipv6 bool) (answer []byte, o Outcome) {
	if !oneQuestion(query) {
		return nil, Malformed
	}
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil, Malformed
	}
	q, err := p.Question()
	if err != nil {
		return nil, Malformed
	}
	edns, err := readEDNS(&p)
	if err != nil {
		return nil, Malformed
	}

	reply := dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired,
		RecursionAvailable: true, // as of the server that was asked
		CheckingDisabled:   h.CheckingDisabled}
	var records []dnsmessage.ResourceBody
	name := strings.ToLower(q.Name.String())
	ours := name == Name
	switch {
	case h.OpCode != 0 || q.Class != dnsmessage.ClassINET || !strings.HasPrefix(name, Name):
		reply.RCode, o = dnsmessage.RCodeRefused, Refused
	case edns.version > 0: // RFC 6891, section 6.1.3
		edns.rcode, o = badVersion, Refused
	case !ours:
		reply.Authoritative, reply.RCode, o = true, dnsmessage.RCodeNameError, NXDomain
	default:
		reply.Authoritative = true
		switch {
		case q.Type == dnsmessage.TypeA || q.Type == dnsmessage.TypeALL: // RFC 8482: any one will do
			records = append(records, &dnsmessage.AResource{A: address.As4()})
		case q.Type == dnsmessage.TypeAAAA && ipv6:
			records = append(records, &dnsmessage.AAAAResource{AAAA: address6.As16()})
		}
		o = Empty
		if len(records) > 0 {
			o = Address
		}
	}
	answer, err = build(reply, q, records, edns)
	if err != nil || 2*(len(answer)+ipHeaders) > 3*(len(query)+ipHeaders) {
		return nil, Malformed
	}
	return answer, o
}

// oneQuestion says whether the message is a query of one question, whose name is written out. A
// name with a pointer, which no resolver sends there, could be much longer in the answer.
func oneQuestion(b []byte) bool {
	if len(b) < headerLength || b[2]&0x80 != 0 { // QR
		return false
	}
	count := func(section int) uint16 { return binary.BigEndian.Uint16(b[4+2*section:]) }
	if count(0) != 1 || count(1) != 0 || count(2) != 0 {
		return false
	}
	at := headerLength
	for at < len(b) && b[at] != 0 {
		if b[at] > 63 {
			return false
		}
		at += 1 + int(b[at])
	}
	return at+1+typeEnd <= len(b)
}

// edns is what the OPT record of a query says (RFC 6891).
type edns struct {
	there   bool
	version uint8
	do      bool // DNSSEC OK, which an answer repeats
	rcode   dnsmessage.RCode
}

const badVersion dnsmessage.RCode = 16

// readEDNS reads the OPT record. All other records behind the question are passed over. Options are
// too: none of them has to be answered.
func readEDNS(p *dnsmessage.Parser) (e edns, err error) {
	if err := p.SkipAllQuestions(); err != nil {
		return e, err
	}
	if err := p.SkipAllAnswers(); err != nil {
		return e, err
	}
	if err := p.SkipAllAuthorities(); err != nil {
		return e, err
	}
	for {
		h, err := p.AdditionalHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return e, nil
		}
		if err != nil {
			return e, err
		}
		if h.Type == dnsmessage.TypeOPT {
			if e.there {
				return e, errors.New("more than one OPT record") // RFC 6891, section 6.1.1
			}
			e = edns{there: true, version: uint8(h.TTL >> 16), do: h.DNSSECAllowed()}
		}
		if err := p.SkipAdditional(); err != nil {
			return e, err
		}
	}
}

// build is the message. The question is as it was asked, in upper and lower case too.
func build(h dnsmessage.Header, q dnsmessage.Question, records []dnsmessage.ResourceBody, e edns) ([]byte, error) {
	m := dnsmessage.Message{Header: h, Questions: []dnsmessage.Question{q}}
	for _, body := range records {
		m.Answers = append(m.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: ttl}, Body: body})
	}
	if e.there {
		var opt dnsmessage.ResourceHeader
		if err := opt.SetEDNS0(payload, e.rcode, e.do); err != nil {
			return nil, err
		}
		m.Additionals = []dnsmessage.Resource{{Header: opt, Body: &dnsmessage.OPTResource{}}}
	}
	return m.Pack()
}
