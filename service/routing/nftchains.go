package routing

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

// nftChainsFor is the Plan as chains of one family, in the order in which they are put up; none:
// there is to be no table.
//
// The table is of family ip, and of family ip6 where something there is guarded or redirected
// (H-24). In mode nftables with listen 169.254.169.252:988, the uplink eth0 and docker0 excluded,
// nft list table prints
//
//	table ip gke-metadata-emulator {
//		chain raw {
//			type filter hook prerouting priority raw - 10; policy accept;
//			iifname != "lo" ip daddr 169.254.169.252 tcp dport 988 drop
//			iifname "docker0" return
//			ip daddr 169.254.169.254 tcp dport 80 ct zone set 0
//			ip saddr 169.254.169.252 tcp sport 988 ct zone set 0
//		}
//		chain raw-output {
//			type filter hook output priority raw - 10; policy accept;
//			ip daddr 169.254.169.254 tcp dport 80 ct zone set 0
//			ip saddr 169.254.169.252 tcp sport 988 ct zone set 0
//		}
//		chain forward {
//			type filter hook forward priority filter - 10; policy accept;
//			iifname "docker0" return
//			ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
//			…
//		}
//		chain input {
//			type filter hook input priority filter - 10; policy accept;
//			ip daddr 169.254.169.252 tcp dport 988 ct status snat reject with tcp reset
//			ip daddr 169.254.169.252 tcp dport 988 ct original ip daddr 169.254.169.254 accept
//			iifname != "lo" ip daddr 169.254.169.252 tcp dport 988 drop
//		}
//		chain local {
//			type filter hook output priority filter - 10; policy accept;
//			ip saddr 169.254.169.252 tcp sport 988 tcp flags & rst == 0 ct status snat drop
//		}
//		chain output {
//			type nat hook output priority -110; policy accept;
//			socket cgroupv2 level 1 "system.slice" return
//			ip daddr 169.254.169.254 tcp dport 80 counter … dnat to 169.254.169.252:988
//		}
//		chain prerouting {
//			type nat hook prerouting priority dstnat - 10; policy accept;
//			iifname { lo, docker0, eth0 } return                               (a rule each)
//			ip daddr 169.254.169.254 tcp dport 80 counter … dnat to 169.254.169.252:988
//		}
//	}
//
// An accept is final for its own chain only: what a later chain of somebody else's refuses stays
// refused. So there is no accept for what is forwarded to an emulator elsewhere, nor for
// what the node itself sends to the listener, which mode iptables has.
func nftChainsFor(p Plan, s nodeFacts, family netobj.Family) (chains []nft.Chain, err error) {
	forward := nft.Chain{Name: "forward", Kind: "filter", Hook: "forward", Priority: nft.PriorityFilter}
	for _, name := range p.ExcludeInterfaces {
		forward.Rules = append(forward.Rules, nft.NewRule(nft.ByInterface(name), nft.Return()))
	}
	guarded := false
	w := p.target(s, family)
	for _, a := range resetServers(p, s) {
		if family.Has(a.Addr()) {
			guarded = true
			forward.Rules = append(forward.Rules, nft.NewRule(nft.ToServer(a), nft.Reset()))
		}
	}
	if family == netobj.IPv6 && !w.listen.IsValid() && (p.dnats() || p.Listen.Addr().Is4()) {
		if guarded {
			chains = append(chains, forward)
		}
		return chains, nil
	}
	if !p.dnats() {
		// Modes without DNAT have only what keeps other hosts out. No clash of ports: all clients
		// send to one address and port, so two of one source are one connection.
		return append(keepOut(p, s, family), forward), nil
	}
	raw := nft.Chain{Name: "raw", Kind: "filter", Hook: "prerouting", Priority: nft.PriorityRaw}
	input := nft.Chain{Name: "input", Kind: "filter", Hook: "input", Priority: nft.PriorityFilter}
	local := nft.Chain{Name: "local", Kind: "filter", Hook: "output", Priority: nft.PriorityFilter}
	// two checks, each of which is enough. A-18 (port clash): see chainsFor.
	raw.Rules = []nft.Rule{nft.NewRule(nft.NotLoopback(), nft.ToServer(w.listen), nft.Drop())}
	if p.answersDNS(s) {
		raw.Rules = append(raw.Rules, nft.NewRule(nft.NotLoopback(), nft.ToUDP(w.listen), nft.Drop()))
	}
	local.Rules = []nft.Rule{nft.NewRule(nft.FromServer(w.listen), nft.NotReset(), nft.SourceTranslated(), nft.Drop())}
	for _, name := range p.ExcludeInterfaces {
		raw.Rules = append(raw.Rules, nft.NewRule(nft.ByInterface(name), nft.Return()))
	}
	raw.Rules = append(raw.Rules, nft.NewRule(nft.ToServer(w.server), nft.Tracked()),
		nft.NewRule(nft.FromServer(w.listen), nft.Tracked()))
	rawOut := nft.Chain{Name: "raw-output", Kind: "filter", Hook: "output", Priority: nft.PriorityRaw}
	if s.hostPods {
		rawOut.Rules = []nft.Rule{nft.NewRule(nft.ToServer(w.server), nft.Tracked())}
	}
	rawOut.Rules = append(rawOut.Rules, nft.NewRule(nft.FromServer(w.listen), nft.Tracked()))
	input.Rules = []nft.Rule{
		nft.NewRule(nft.ToServer(w.listen), nft.SourceTranslated(), nft.Reset()),
		nft.NewRule(nft.ToServer(w.listen), nft.OriginallyTo(w.server.Addr()), nft.Accept()),
		nft.NewRule(nft.NotLoopback(), nft.ToServer(w.listen), nft.Drop()),
	}
	chains = []nft.Chain{raw, rawOut, forward, input, local}
	if s.hostPods {
		output := nft.Chain{Name: "output", Kind: "nat", Hook: "output", Priority: nft.PriorityDestNAT}
		for _, slice := range s.slices {
			of, err := nft.OfCgroup(p.CgroupRoot, slice)
			if err != nil {
				return nil, err
			}
			output.Rules = append(output.Rules, nft.NewRule(of, nft.Return()))
		}
		output.Rules = append(output.Rules, nft.NewRule(nft.ToServer(w.server), nft.DNAT(w.listen)))
		chains = append(chains, output)
	}
	prerouting := nft.Chain{Name: "prerouting", Kind: "nat", Hook: "prerouting", Priority: nft.PriorityDestNAT}
	for _, name := range spared(p, s) {
		prerouting.Rules = append(prerouting.Rules, nft.NewRule(nft.ByInterface(name), nft.Return()))
	}
	prerouting.Rules = append(prerouting.Rules, nft.NewRule(nft.ToServer(w.server), nft.DNAT(w.listen)))
	chains = append(chains, prerouting)
	for i, c := range chains {
		more, err := dnsParts(p, s, w, c.Name)
		if err != nil {
			return nil, err
		}
		chains[i].Rules = append(c.Rules, more...)
	}
	return chains, nil
}

// keepOut keeps other hosts out where pods may send to the listen address themselves: two, of which
// each holds alone. What listens on 127.0.0.0/8 nobody reaches anyway.
func keepOut(p Plan, s nodeFacts, family netobj.Family) []nft.Chain {
	raw := nft.Chain{Name: "raw", Kind: "filter", Hook: "prerouting", Priority: nft.PriorityRaw}
	input := nft.Chain{Name: "input", Kind: "filter", Hook: "input", Priority: nft.PriorityFilter}
	to := nft.ToServer(p.Listen)
	if p.Listen.Addr().IsUnspecified() {
		to = nft.ToPort(p.Listen.Port())
	} else if !family.Has(p.Listen.Addr()) {
		return nil
	}
	if p.Listen.Addr().IsLoopback() {
		return nil
	}
	for _, name := range s.uplinks {
		raw.Rules = append(raw.Rules, nft.NewRule(nft.ByInterface(name), to, nft.Drop()))
		input.Rules = append(input.Rules, nft.NewRule(nft.ByInterface(name), to, nft.Drop()))
	}
	return []nft.Chain{raw, input}
}

// environmentText tells what pods need where nothing is routed.
func environmentText(p Plan) string {
	host, who := "$(NODE_IP)", "pods need"
	field := "\n#   - name: NODE_IP\n#     valueFrom: {fieldRef: {fieldPath: status.hostIP}}"
	switch a := p.Listen.Addr(); {
	case a.IsLoopback():
		host, field, who = a.String(), "", "pods on the host network, who alone reach it, need"
	case a.IsLinkLocalUnicast():
		host, field = a.String(), ""
	case a.Is6() && !a.IsUnspecified():
		host = "[$(NODE_IP)]"
	}
	value := net.JoinHostPort(host, strconv.Itoa(int(p.Listen.Port())))
	text := fmt.Sprintf("\n# what %s in their environment\n#   env:%s\n", who, field)
	// Most clients read the first; Python needs the second besides; gcloud and gsutil read the third.
	for _, name := range []string{"GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"} {
		text += fmt.Sprintf("#   - name: %s\n#     value: %s\n", name, value)
	}
	return text
}

// resetServers are the servers to which nothing is forwarded: those of the guard, and the metadata
// server's other ports (H-25, H-26). DNS on 53 passes.
func resetServers(p Plan, s nodeFacts) []netip.AddrPort {
	addresses := []netip.Addr{metadataServer.Addr()}
	if s.listen6.IsValid() {
		addresses = append(addresses, metadataServer6.Addr())
	}
	servers := slices.Clone(p.Guard)
	for _, a := range addresses {
		for _, port := range []uint16{80, 443, 8080} {
			servers = append(servers, netip.AddrPortFrom(a, port))
		}
	}
	slices.SortFunc(servers, netip.AddrPort.Compare)
	return slices.Compact(servers)
}
