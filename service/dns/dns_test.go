package dns

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/dns/dnsmessage"
)

// query is a resolver's query, with the OPT record that glibc's trust-ad, dig and Go send if edns.
func query(t testing.TB, name string, of dnsmessage.Type, edns bool, change ...func(*dnsmessage.Message)) []byte {
	t.Helper()
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 4711, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: of, Class: dnsmessage.ClassINET}}}
	if edns {
		var h dnsmessage.ResourceHeader
		if err := h.SetEDNS0(1232, 0, true); err != nil {
			t.Fatal(err)
		}
		m.Additionals = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
	}
	for _, f := range change {
		f(&m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse(t testing.TB, b []byte) (m dnsmessage.Message) {
	t.Helper()
	if err := m.Unpack(b); err != nil {
		t.Fatalf("%x is no message: %v", b, err)
	}
	return m
}

// Each type and name that a resolver asks for gets what GKE's DNS says, and nothing grows by more
// than half.
func TestAnswer(t *testing.T) {
	class := func(c dnsmessage.Class) func(*dnsmessage.Message) {
		return func(m *dnsmessage.Message) { m.Questions[0].Class = c }
	}
	opcode := func(c dnsmessage.OpCode) func(*dnsmessage.Message) {
		return func(m *dnsmessage.Message) { m.OpCode = c }
	}
	const searched = "metadata.google.internal.default.svc.cluster.local."
	for _, c := range []struct {
		about   string
		name    string
		of      dnsmessage.Type
		ipv6    bool
		change  func(*dnsmessage.Message)
		rcode   dnsmessage.RCode
		answer  string
		outcome Outcome
	}{
		{"an address", Name, dnsmessage.TypeA, false, nil, 0, "169.254.169.254", Address},
		{"an address where IPv6 is served", Name, dnsmessage.TypeA, true, nil, 0, "169.254.169.254", Address},
		{"IPv6", Name, dnsmessage.TypeAAAA, true, nil, 0, "fd20:ce::254", Address},
		{"IPv6 that is not served", Name, dnsmessage.TypeAAAA, false, nil, 0, "", Empty},
		{"any", Name, dnsmessage.TypeALL, true, nil, 0, "169.254.169.254", Address},
		{"a type without a record", Name, dnsmessage.TypeTXT, true, nil, 0, "", Empty},
		{"HTTPS, which browsers and c-ares ask for", Name, 65, true, nil, 0, "", Empty},
		{"mixed case", "mEtAdAtA.GOOGLE.InTeRnAl.", dnsmessage.TypeA, false, nil, 0, "169.254.169.254", Address},
		{"a search list's", searched, dnsmessage.TypeA, true, nil, dnsmessage.RCodeNameError, "", NXDomain},
		{"a search list's, IPv6", strings.ToUpper(searched), dnsmessage.TypeAAAA, true, nil,
			dnsmessage.RCodeNameError, "", NXDomain},
		{"another name", "example.com.", dnsmessage.TypeA, true, nil, dnsmessage.RCodeRefused, "", Refused},
		{"a name below it", "x.metadata.google.internal.", dnsmessage.TypeA, true, nil, dnsmessage.RCodeRefused, "", Refused},
		{"its beginning", "metadata.google.", dnsmessage.TypeA, true, nil, dnsmessage.RCodeRefused, "", Refused},
		{"a longer last label", "metadata.google.internals.", dnsmessage.TypeA, true, nil, dnsmessage.RCodeRefused, "",
			Refused},
		{"the root", ".", dnsmessage.TypeNS, true, nil, dnsmessage.RCodeRefused, "", Refused},
		{"class CHAOS", Name, dnsmessage.TypeA, true, class(dnsmessage.ClassCHAOS), dnsmessage.RCodeRefused, "", Refused},
		{"class ANY", Name, dnsmessage.TypeA, true, class(dnsmessage.ClassANY), dnsmessage.RCodeRefused, "", Refused},
		{"NOTIFY", Name, dnsmessage.TypeA, true, opcode(4), dnsmessage.RCodeRefused, "", Refused},
		{"UPDATE", Name, dnsmessage.TypeA, true, opcode(5), dnsmessage.RCodeRefused, "", Refused},
	} {
		for _, edns := range []bool{false, true} {
			change := c.change
			if change == nil {
				change = func(*dnsmessage.Message) {}
			}
			q := query(t, c.name, c.of, edns, change)
			b, outcome := Answer(q, c.ipv6)
			if outcome != c.outcome {
				t.Errorf("%s: outcome %s, want %s", c.about, outcome, c.outcome)
			}
			if b == nil {
				t.Errorf("%s: no answer", c.about)
				continue
			}
			m := parse(t, b)
			if m.ID != 4711 || !m.Response || !m.RecursionDesired || !m.RecursionAvailable || m.Truncated ||
				m.RCode != c.rcode || m.Authoritative != (c.rcode != dnsmessage.RCodeRefused) {
				t.Errorf("%s: header %+v", c.about, m.Header)
			}
			if len(m.Questions) != 1 || m.Questions[0] != parse(t, q).Questions[0] {
				t.Errorf("%s: the question is not as it was asked: %v", c.about, m.Questions)
			}
			got := ""
			for _, r := range m.Answers {
				switch body := r.Body.(type) {
				case *dnsmessage.AResource:
					got += netip.AddrFrom4(body.A).String()
				case *dnsmessage.AAAAResource:
					got += netip.AddrFrom16(body.AAAA).String()
				}
				if r.Header.TTL == 0 || r.Header.TTL > 300 || r.Header.Name != m.Questions[0].Name {
					t.Errorf("%s: record %+v", c.about, r.Header)
				}
			}
			if got != c.answer {
				t.Errorf("%s: answer %q, want %q", c.about, got, c.answer)
			}
			if edns != (len(m.Additionals) == 1) || len(m.Additionals) > 1 {
				t.Errorf("%s: EDNS %t, additional records %v", c.about, edns, m.Additionals)
			}
			if edns && (!m.Additionals[0].Header.DNSSECAllowed() || m.Additionals[0].Header.Class != payload) {
				t.Errorf("%s: OPT %+v", c.about, m.Additionals[0].Header)
			}
			if factor := float64(len(b)+ipHeaders) / float64(len(q)+ipHeaders); factor > 1.5 {
				t.Errorf("%s: the answer's packet is %.2f times the query's", c.about, factor)
			}
		}
	}
}

// A version of EDNS that is not known is said so, with nothing else.
func TestEDNSVersion(t *testing.T) {
	b, outcome := Answer(query(t, Name, dnsmessage.TypeA, true, func(m *dnsmessage.Message) {
		m.Additionals[0].Header.TTL |= 1 << 16
	}), false)
	if outcome != Refused || b == nil {
		t.Fatalf("outcome %s, answer %x", outcome, b)
	}
	m := parse(t, b)
	if len(m.Answers) != 0 || len(m.Additionals) != 1 || m.Additionals[0].Header.ExtendedRCode(m.RCode) != badVersion {
		t.Errorf("answer %+v", m)
	}
}

// hostile are packets that are no query: they get no answer.
func hostile(t testing.TB) map[string][]byte {
	good := query(t, Name, dnsmessage.TypeA, false)
	change := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(good)) }
	counts := func(section int, n uint16) []byte {
		return change(func(b []byte) []byte { binary.BigEndian.PutUint16(b[4+2*section:], n); return b })
	}
	answered, _ := Answer(good, false)
	return map[string][]byte{
		"nothing":                    {},
		"less than a header":         good[:11],
		"a header":                   good[:12],
		"a header without questions": counts(0, 0)[:12],
		"no question":                counts(0, 0),
		"two questions":              counts(0, 2),
		"65535 questions":            counts(0, 65535),
		"an answer":                  counts(1, 1),
		"65535 answers":              counts(1, 65535),
		"an authority":               counts(2, 1),
		"additional that is missing": counts(3, 1),
		"65535 additional":           counts(3, 65535),
		"our own answer":             answered,
		"a response":                 change(func(b []byte) []byte { b[2] |= 0x80; return b }),
		"cut in the name":            good[:20],
		"cut before the type":        good[:len(good)-4],
		"cut in the class":           good[:len(good)-1],
		"a name that points to itself": change(func(b []byte) []byte {
			return append(append(b[:12], 0xc0, 12), 0, 1, 0, 1)
		}),
		"a pointer behind the name": change(func(b []byte) []byte { // 10 times the name, from 45 octets
			return append(append(b[:37], 0xc0, 12), 0, 1, 0, 1)
		}),
		"a reserved label": change(func(b []byte) []byte { b[12] = 0x88; return b }),
		"a label of dots":  change(func(b []byte) []byte { copy(b[12:], "\x18metadata.google.internal"); return b }),
		"two OPT records": query(t, Name, dnsmessage.TypeA, true, func(m *dnsmessage.Message) {
			m.Additionals = append(m.Additionals, m.Additionals[0])
		}),
	}
}

func TestHostile(t *testing.T) {
	for about, b := range hostile(t) {
		if answer, outcome := Answer(b, true); answer != nil || outcome != Malformed {
			t.Errorf("%s: outcome %s, answer %x", about, outcome, answer)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	for _, b := range hostile(f) {
		f.Add(b)
	}
	for _, name := range []string{Name, "metadata.google.internal.svc.cluster.local.", "example.com."} {
		for _, of := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeTXT} {
			f.Add(query(f, name, of, true))
			f.Add(query(f, name, of, false))
		}
	}
	f.Fuzz(func(t *testing.T, q []byte) {
		before := bytes.Clone(q)
		b, outcome := Answer(q, true)
		if !bytes.Equal(q, before) {
			t.Fatal("the query was changed")
		}
		if (b == nil) != (outcome == Malformed) {
			t.Fatalf("outcome %s, answer %x", outcome, b)
		}
		if b == nil {
			return
		}
		if q[2]&0x80 != 0 {
			t.Fatal("a response was answered")
		}
		if 2*(len(b)+ipHeaders) > 3*(len(q)+ipHeaders) {
			t.Fatalf("%d octets answer %d", len(b), len(q))
		}
		if again, _ := Answer(b, true); again != nil {
			t.Fatal("our answer was answered")
		}
		m := parse(t, b)
		ours := strings.EqualFold(m.Questions[0].Name.String(), Name)
		if !m.Response || !bytes.Equal(b[:2], q[:2]) || len(m.Answers) > 1 || len(m.Answers) == 1 && !ours {
			t.Fatalf("answer %+v", m)
		}
		at := headerLength // the question's octets, its upper and lower case too
		for q[at] != 0 {
			at += 1 + int(q[at])
		}
		if !bytes.Equal(q[headerLength:at+5], b[headerLength:at+5]) {
			t.Fatalf("the question %x was answered with %x", q, b)
		}
	})
}

func newServer(ipv6 bool) (*Server, *prometheus.Registry) {
	r := prometheus.NewRegistry()
	return New(Options{IPv6: func() bool { return ipv6 }, Log: logrus.New(), Registerer: r}), r
}

// counted is what the metric says.
func counted(t *testing.T, r *prometheus.Registry, of Outcome) (n float64) {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range families[0].GetMetric() {
		if m.GetLabel()[0].GetValue() == string(of) {
			return m.GetCounter().GetValue()
		}
	}
	t.Fatalf("no counter of %s", of)
	return 0
}

// A client that asks without end is not answered any more, while another one is.
func TestRateLimit(t *testing.T) {
	s, r := newServer(false)
	q := query(t, Name, dnsmessage.TypeA, false)
	flood, other := netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("10.0.0.6")
	if s.limits[0] == s.limits[1] {
		t.Fatal("clients share a bucket")
	}
	answered := 0
	for range 100 * burst { // far faster than perSecond
		if s.answer(q, flood) != nil {
			answered++
		}
	}
	if limited := counted(t, r, Limited); answered < burst || limited == 0 || answered+int(limited) != 100*burst {
		t.Errorf("%d were answered, and %.0f were not", answered, limited)
	}
	for s.answer(q, other) == nil { // one in 1024 of the seeds has both in one bucket
		s.seed = maphash.MakeSeed()
	}
	if s.answer(q, flood) != nil && answered > 100*burst/2 {
		t.Error("the client that floods is answered")
	}
}

// The sockets of a node: what is asked is answered, what is no query is not, and Serve ends when
// the socket is closed.
func TestServe(t *testing.T) {
	s, r := newServer(true)
	at, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); s.Serve(at) }()
	c, err := net.Dial("udp", at.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := 0
	for _, b := range hostile(t) {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		n++
	}
	if _, err := c.Write(query(t, Name, dnsmessage.TypeAAAA, true)); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1500)
	size, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	if m := parse(t, b[:size]); len(m.Answers) != 1 { // the first answer that comes is that to the last packet
		t.Errorf("answer %+v", m)
	}
	if got := counted(t, r, Malformed); int(got) != n {
		t.Errorf("%.0f malformed queries, want %d", got, n)
	}
	if err := at.Close(); err != nil {
		t.Fatal(err)
	}
	<-ended
}
