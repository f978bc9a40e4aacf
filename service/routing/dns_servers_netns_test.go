package routing

import (
	"net"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer is the name server of a pod: every name is at 192.0.2.1, but for those of the metadata
// server, which do not exist. With records it is the name server of a cluster that has the name.
type nameServer struct {
	mu      sync.Mutex
	records map[dnsmessage.Type]dnsmessage.ResourceBody // of the metadata server's name
	asked   map[string]int                              // by name, in lower case, and type
}

// recordTTL is of the records of a nameServer.
const recordTTL = 3600

func (s *nameServer) serve(c net.PacketConn) {
	b := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		name := strings.ToLower(q.Name.String())
		s.mu.Lock()
		s.asked[name+" "+q.Type.String()]++
		record, known := s.records[q.Type], len(s.records) > 0
		s.mu.Unlock()
		if known && strings.HasPrefix(name, dnsName+".") {
			asRecord(&m, name, record)
			if answer, err := m.Pack(); err == nil {
				_, _ = c.WriteTo(answer, from)
			}
			continue
		}
		m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
		switch {
		case strings.HasPrefix(name, dnsName+"."):
			m.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA:
			m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class},
				Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}}}}
		}
		if answer, err := m.Pack(); err == nil {
			_, _ = c.WriteTo(answer, from)
		}
	}
}

// asRecord makes the answer as CoreDNS does: authoritative and not recursive, with a record that
// lives for an hour, an OPT record where the query has one, and the zone's SOA record where the
// name does not exist.
func asRecord(m *dnsmessage.Message, name string, record dnsmessage.ResourceBody) {
	q := m.Questions[0]
	m.Response, m.Authoritative, m.AuthenticData = true, true, false
	header := func(name dnsmessage.Name) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: recordTTL}
	}
	switch zone := strings.TrimPrefix(name, dnsName+"."); {
	case zone != "":
		m.RCode = dnsmessage.RCodeNameError
		m.Authorities = []dnsmessage.Resource{{Header: header(dnsmessage.MustNewName(zone)), Body: &dnsmessage.SOAResource{
			NS: dnsmessage.MustNewName("ns." + zone), MBox: dnsmessage.MustNewName("hostmaster." + zone), MinTTL: 30}}}
	case record != nil:
		m.Answers = []dnsmessage.Resource{{Header: header(q.Name), Body: record}}
	}
}

// hold gives the server records of the metadata server's name.
func (s *nameServer) hold(records map[dnsmessage.Type]dnsmessage.ResourceBody) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = records
}

// forget starts the counts anew.
func (s *nameServer) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.asked)
}

// questions is for how many names that begin so, and types of them, the server was asked.
func (s *nameServer) questions(prefix string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for question := range s.asked {
		if strings.HasPrefix(question, prefix) {
			n++
		}
	}
	return n
}

// was is how often the server was asked for names that begin so.
func (s *nameServer) was(prefix string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, times := range s.asked {
		if strings.HasPrefix(name, prefix) {
			n += times
		}
	}
	return n
}
