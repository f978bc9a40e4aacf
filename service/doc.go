// Package service is the emulator: what GKE's metadata server does for GKE's pods, done for the
// pods of any node.
//
// Two stories tell it all.
//
// # A request
//
// A pod's client library sends GET /computeMetadata/v1/instance/service-accounts/default/token to
// 169.254.169.254:80.
//
//  1. Package routing had rules put into the kernel that send it here: to 169.254.169.252:988, an
//     address of lo, or in mode loopback to the address itself; or, in mode ebpf, programs that had
//     the connect() go there in the first place. What a mode is, is written once (mode.go); what all
//     share is written once (router.go), as a list of objects (objects.go).
//  2. accept (server/connections.go): both ends of the socket are written down as the kernel sees
//     them, before and after DNAT. Before a byte is read, the kernel is asked whose socket the
//     other one is: its cgroup names a pod's UID and a container, or a unit of the node
//     ([attest.Evidence]). Nothing that the request says of its sender is believed, ever.
//  3. pace (server/pace.go): who asks more often than limits.requestsPerPod waits here for a turn.
//  4. Tree.Find (server/server.go): the path leads to a place in the tree, which is one literal
//     (server/tree.go). `/` may be answered without knowing who asks, and waits for nothing:
//     clients probe it and remember the answer for life.
//  5. headerRules (server/headers.go): a table of what is refused for its method or header alone:
//     proxies, foreign hosts, a missing flavor.
//  6. overLimit (server/connections.go): who has more connections than limits.connectionsPerPod is
//     refused. What another cloud's server is asked for goes there now (server/passthrough.go), if
//     a pod on the host network asks that the operator named.
//  7. who is it: package attest (attest.go; client.go looks for the socket, evidence.go has the
//     errors) looks the evidence up in what package kube watches: the live pod of this node with
//     that UID, or the identity that the operator gave the unit. What is not known yet is waited
//     for, 2 s at most. No evidence, or two kinds of it, is a refusal and not a guess; an address
//     counts for pods alone whom nothing else can name.
//  8. what may it see: package metadata (tree.go) evaluates the place for this caller. An account
//     that is not the caller's does not exist for it.
//  9. the token: the leaf (server/tree.go) makes a token.Request of the caller's ServiceAccount and
//     what its annotations say. The cache (token/cache.go) has it, or asks package token's Google
//     (token/google.go): a ServiceAccount token from Kubernetes (TokenRequest, bound to the pod), a
//     federated token for it from Google's STS, and the linked Google service account's token for
//     that from IAM. One mint is in flight for one request; it outlives the first asker; it is done
//     again before the token gets old.
//  10. the evidence again (server/server.go): had the process died meanwhile, or the pod, the answer
//     is thrown away.
//  11. write (server/server.go): one function turns an answer, or an error by way of one table
//     (server/refusal.go), into bytes. One audit line tells of each token that was issued
//     (server/audit.go). Each request is counted by its status and its duration, and a refusal by
//     its reason too (server/metrics.go).
//
// # A life on a node
//
//  1. ExecStartPre runs `routing install`: the rules stand before anything is served. Where there
//     is no configuration, or a broken one, pods are sent to the service by the rules of the last
//     valid one, or the default ones, and the guard keeps them from the cloud's own server.
//  2. serve takes the listener from systemd, or binds it. A configuration that is missing or broken
//     is a state and not an end: pods get 503 with the reason until the file is mended.
//  3. READY=1 when a real GET through our own listener was answered; where the closed guard stands
//     alone there is no address to ask at, and that is ready too. Neither the API server nor Google
//     is waited for: on a first boot kubelet has no credentials yet, and starts after us. They are
//     picked up when they appear.
//  4. The pods' ServiceAccounts are known as the pods are, and their tokens are fetched ahead
//     (active.go).
//  5. A second after tokens came at the latest, systemd holds them for the next process, in a
//     sealed memfd (fdstore.go): after a restart or a SIGKILL no token is minted again that is
//     still good.
//  6. SIGHUP reads the configuration anew. What it does not change goes on as it was: watch, cache,
//     connections (active.go); and so do all counters. A configuration that does not load changes
//     nothing.
//  7. SIGTERM: answers say Connection: close, long polls are released, mints come to their end, and
//     only then is the listener left, and whoever was accepted is answered (run.go). The rules stay
//     for the next one.
//  8. ExecStopPost runs `routing remove`, and stops the socket, when the unit is stopped for good,
//     unless routing.onStop is keep.
//
// Whether all of that works on a node is what `doctor` finds out: package doctor looks and tries,
// changing nothing that outlives it, and has the table of checks that judge what was seen. It is no
// part of the service, whose [status.Status] it asks for.
//
// The service runs without privileges; what needs root is done by other units, or by steps of this
// one: rules, a copy of kubelet's credential (credential.go), and sockets in the network namespaces
// of pods and of other containers, which a helper opens and hands over ([attest.Helper]): each can
// ask the kernel about its namespace, and nothing else.
//
// Beside it another unit runs `routing watch` (watch.go): the kernel tells it of every change to
// rules, policy rules, addresses, links and routes, and it puts back what others flushed. It keeps
// what was installed last and lets be what was removed; what it finds, and how often it had to
// repair, lies in a file that the service shows.
//
// # Who may import whom
//
//	cmd     → {service, doctor, status}
//	service → {server, status, dns, the six}
//	doctor  → {status, routing/probe, the six}
//	server  → the six
//	the six = {attest, kube, token, metadata, routing, config} → {workload, messageid}
//
// The six never import each other: each says in an interface of one to three methods what it needs,
// and this package hands it in. Kubernetes' libraries are known to kube alone, iptables, programs
// and processes to routing, netlink to routing and attest, systemd to this package, flags to cmd,
// and a ResponseWriter to server. imports_test.go holds all of this, with the reasons.
package service
