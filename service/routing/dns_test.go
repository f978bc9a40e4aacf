package routing

import (
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/net/dns/dnsmessage"
)

// program is the one of asksDNS, as a virtual machine has it.
func program(t testing.TB, ipv6 bool) *bpf.VM {
	t.Helper()
	var all []bpf.Instruction
	_, text, _ := strings.Cut(dnsProgram(ipv6), ",")
	for _, line := range strings.Split(text, ",") {
		var i bpf.RawInstruction
		f := strings.Fields(line)
		if len(f) != 4 {
			t.Fatalf("%q", line)
		}
		i.Op, i.Jt, i.Jf = uint16(number(t, f[0])), uint8(number(t, f[1])), uint8(number(t, f[2]))
		i.K = uint32(number(t, f[3]))
		all = append(all, i.Disassemble())
	}
	vm, err := bpf.NewVM(all)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func number(t testing.TB, s string) (n uint64) {
	t.Helper()
	for _, c := range s {
		if c < '0' || c > '9' {
			t.Fatalf("%q is no number", s)
		}
		n = 10*n + uint64(c-'0')
	}
	return n
}

// TestDNSProgram: the program of xt_bpf takes queries for the name, in whatever case, behind IP
// headers of each length, and nothing else.
func TestDNSProgram(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	query := func(name string, change func(*dnsmessage.Message)) []byte {
		m := dnsmessage.Message{Header: dnsmessage.Header{ID: uint16(random.Uint32()), RecursionDesired: true},
			Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA,
				Class: dnsmessage.ClassINET}}}
		if change != nil {
			change(&m)
		}
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	type packet struct {
		about   string
		payload []byte
		want    bool
	}
	packets := []packet{
		{"the name", query(dnsName+".", nil), true},
		{"a search list's", query(dnsName+".default.svc.cluster.local.", nil), true},
		{"EDNS and checking disabled", query(dnsName+".", func(m *dnsmessage.Message) {
			m.CheckingDisabled, m.AuthenticData = true, true
			m.Additionals = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("."),
				Type: dnsmessage.TypeOPT, Class: 1232}, Body: &dnsmessage.OPTResource{}}}
		}), true},
		{"another", query("example.com.", nil), false},
		{"its beginning", query("metadata.google.", nil), false},
		{"a longer last label", query("metadata.google.internals.", nil), false},
		{"a name below it", query("a.metadata.google.internal.", nil), false},
		{"a response", query(dnsName+".", func(m *dnsmessage.Message) { m.Response = true }), false},
		{"NOTIFY", query(dnsName+".", func(m *dnsmessage.Message) { m.OpCode = 4 }), false},
		{"two questions", query(dnsName+".", func(m *dnsmessage.Message) {
			m.Questions = append(m.Questions, m.Questions[0])
		}), false},
		{"cut", query(dnsName+".", nil)[:36], false},
		{"nothing", nil, false},
	}
	name := []byte(dnsName + ".")
	for range 200 { // 0x20
		mixed := []byte(strings.ToLower(string(name)))
		for i := range mixed {
			if mixed[i] != '.' && random.IntN(2) == 0 {
				mixed[i] -= 0x20
			}
		}
		packets = append(packets, packet{string(mixed), query(string(mixed), nil), true})
	}
	good := query(dnsName+".", nil)
	for at := 12; at < 12+len(dnsLabels); at++ { // each octet counts, and each of its bits but the one of case
		for bit := range 8 {
			changed := append([]byte(nil), good...)
			changed[at] ^= 1 << bit
			letter := good[at] >= 'a' && good[at] <= 'z'
			packets = append(packets, packet{"a changed bit", changed, letter && bit == 5})
		}
	}
	for _, ipv6 := range []bool{false, true} {
		vm := program(t, ipv6)
		for _, p := range packets {
			udp := binary.BigEndian.AppendUint16([]byte{0x99, 0x99, 0, 53}, uint16(8+len(p.payload)))
			udp = append(append(udp, 0, 0), p.payload...)
			headers := [][]byte{append([]byte{0x60, 0, 0, 0, 0, 0, 17, 64}, make([]byte, 32)...)}
			if !ipv6 {
				headers = nil
				for length := 5; length <= 15; length++ { // options
					headers = append(headers, append([]byte{0x40 | byte(length)}, make([]byte, 4*length-1)...))
				}
			}
			for _, h := range headers {
				n, err := vm.Run(append(h, udp...))
				if err != nil || (n > 0) != p.want {
					t.Errorf("IPv6 %t, header of %d octets, %s: %d (%v), want %t: %x", ipv6, len(h), p.about, n, err, p.want,
						p.payload)
				}
			}
		}
		if n, _ := vm.Run(append(append([]byte{0x60, 0, 0, 0, 0, 0, 44, 64}, make([]byte, 40)...), good...)); ipv6 && n > 0 {
			t.Error("behind an extension header the program takes what it cannot know")
		}
	}
}
