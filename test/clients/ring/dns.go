package main

import (
	"fmt"
	"net"

	"golang.org/x/net/dns/dnsmessage"
)

// metadataName is the name that clients look up, in DNS notation.
const metadataName = "metadata.google.internal."

// resolver is the answer of the pods' DNS for metadataName. All other names do not exist. Answers
// are immediate.
type resolver string

const (
	hasRecord resolver = "record"
	refuses   resolver = "refused"
	noName    resolver = "nxdomain"
)

// serveDNS answers until the connection is closed.
func (r resolver) serveDNS(c net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		if answer, err := r.answer(buf[:n]); err == nil {
			_, _ = c.WriteTo(answer, from) // an error: the client has left
		}
	}
}

func (r resolver) answer(query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, fmt.Errorf("the query has no question: %w", err)
	}
	head := dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
	found := r == hasRecord && q.Name.String() == metadataName
	switch {
	case r == refuses:
		head.RCode = dnsmessage.RCodeRefused
	case !found:
		head.RCode = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, head)
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if found && q.Type == dnsmessage.TypeA {
		if err := b.StartAnswers(); err != nil {
			return nil, err
		}
		if err := b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60},
			dnsmessage.AResource{A: [4]byte{169, 254, 169, 254}}); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}
