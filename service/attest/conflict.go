package attest

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
)

// Conflict is an address for which connections were refused, since two network namespaces had a
// socket that could be the client's.
type Conflict struct {
	Address  netip.Addr `json:"address"`
	Between  [2]string  `json:"between"` // the namespaces, as pod UIDs or cgroups
	Refused  int        `json:"refused"` // connections
	LastSeen time.Time  `json:"lastSeen"`
}

// Conflicts are forgotten after conflictAge, and of more than maxConflicts addresses the oldest.
const (
	conflictAge  = time.Hour
	maxConflicts = 32
)

// conflict notes who has the two sockets, for the operator, and returns an error that does not say
// it, for the client.
func (k *Kernel) conflict(c Conn, a, b *namespace) error {
	between := [2]string{a.owner(), b.owner()}
	if client := c.Client.Addr(); k.noteConflict(client, between) {
		k.options.Log.WithFields(logrus.Fields{"address": client.String(), "first": between[0], "second": between[1]}).
			Warn("attest: connections from an address are refused: two network namespaces have sockets with it: " +
				"remove the address from the one that does not own it")
	}
	return fmt.Errorf("%w: from %s", ErrSockets, c.Client)
}

// noteConflict reports whether it is the first one of the address.
func (k *Kernel) noteConflict(client netip.Addr, between [2]string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	seen, known := k.conflicts[client]
	if !known && len(k.conflicts) >= maxConflicts {
		var oldest Conflict
		for _, c := range k.conflicts {
			if oldest.LastSeen.IsZero() || c.LastSeen.Before(oldest.LastSeen) {
				oldest = c
			}
		}
		delete(k.conflicts, oldest.Address)
	}
	k.conflicts[client] = Conflict{Address: client, Between: between, Refused: seen.Refused + 1, LastSeen: time.Now()}
	return !known
}

// recentConflicts is called with mu held.
func (k *Kernel) recentConflicts() (all []Conflict) {
	for _, c := range k.conflicts {
		if time.Since(c.LastSeen) < conflictAge {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b Conflict) int { return a.Address.Compare(b.Address) })
	return all
}

// owner names the namespace for an operator: the pod's UID where there is one pod.
func (n *namespace) owner() string {
	return cmp.Or(n.pod, n.String())
}
