package token

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

// LongestSnapshot bounds a snapshot, in bytes. It is enough for about 3,000 of Google's tokens.
const LongestSnapshot = 4 << 20

// snapshotForm begins a snapshot. For each token follow one byte of flags; then namespace, name,
// Google email, quota project, scopes, audience and token, each after its length in four bytes;
// then the times minted, expires and last asked for, each in nanoseconds since 1970 in eight bytes,
// 0 for never. Numbers are big endian.
//
// The other state of an entry is left out: refusals are short-lived, usage starts at zero, and the
// first complete list of pods says which ServiceAccounts are in use.
const snapshotForm = "gke-metadata-emulator tokens 1\n"

const (
	flagFederated = 1 << iota
	flagPrefetched
	flagPrincipalAsEmail
	allFlags = flagFederated | flagPrefetched | flagPrincipalAsEmail
)

var errMalformed = errors.New("not a token snapshot of this version")

// saved is a token in a snapshot.
type saved struct {
	request    Request
	token      Token
	asked      time.Time
	prefetched bool
}

// Snapshot returns the held tokens, for Restore in another process. It holds secrets. If there are
// too many tokens, prefetched ones are kept first, and then those that were asked for last.
func (c *Cache) Snapshot() []byte { return c.snapshot(time.Now()) }

func (c *Cache) snapshot(now time.Time) []byte {
	c.mu.Lock() // briefly, since requests for tokens wait for the lock
	all := make([]saved, 0, len(c.entries))
	for r, e := range c.entries {
		if now.Before(e.usableUntil) && e.superseded.IsZero() {
			all = append(all, saved{r, e.token, e.asked, e.prefetched})
		}
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b saved) int {
		return cmp.Or(cmp.Compare(b.flags()&flagPrefetched, a.flags()&flagPrefetched), b.asked.Compare(a.asked))
	})
	size := len(snapshotForm)
	for i, s := range all {
		if size += s.size(); size > LongestSnapshot {
			all = all[:i]
			break
		}
	}
	b := append(make([]byte, 0, min(size, LongestSnapshot)), snapshotForm...)
	for _, s := range all {
		b = s.append(b)
	}
	return b
}

// Restore adds the tokens of a Snapshot, as if this Cache had minted them, and returns their
// number. Tokens that are no longer usable are left out. It is called before the first request. A
// snapshot that is incomplete, or that Snapshot would not write, is an error, and none of its
// tokens is added.
func (c *Cache) Restore(snapshot []byte) (int, error) { return c.restore(snapshot, time.Now()) }

func (c *Cache) restore(snapshot []byte, now time.Time) (int, error) {
	all, err := decodeSnapshot(snapshot)
	if err != nil {
		return 0, err
	}
	all = slices.DeleteFunc(all, func(s saved) bool {
		return s.token.Minted.After(now) || // the clock was set back, so Expires means nothing
			!now.Before(usableUntil(s.request, s.token))
	})
	account := map[workload.ServiceAccount]saved{} // the newest token, whose annotations count
	for _, s := range all {
		if newest, ok := account[s.request.ServiceAccount]; !s.request.federated &&
			(!ok || s.token.Minted.After(newest.token.Minted)) {
			account[s.request.ServiceAccount] = s
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	taken := 0
	for _, s := range all {
		r := s.request
		if c.entries[r] != nil || !r.federated && r.Account != account[r.ServiceAccount].request.Account {
			continue
		}
		if s.asked.After(now) {
			s.asked = now
		}
		e := &entry{request: r, asked: s.asked, prefetched: s.prefetched}
		e.setToken(s.token, now)
		c.entries[r] = e
		taken++
	}
	return taken, nil
}

// Changes returns a channel that receives a value after each change of Snapshot's result. It has
// one receiver.
func (c *Cache) Changes() <-chan struct{} { return c.changes }

func (c *Cache) changed() {
	select {
	case c.changes <- struct{}{}:
	default: // the receiver has not taken the last change yet
	}
}

func (s saved) flags() (flags byte) {
	if s.request.federated {
		flags |= flagFederated
	}
	if s.prefetched {
		flags |= flagPrefetched
	}
	if s.request.Account.PrincipalAsEmail {
		flags |= flagPrincipalAsEmail
	}
	return flags
}

func (s saved) strings() [7]string {
	r := s.request
	return [...]string{r.ServiceAccount.Namespace, r.ServiceAccount.Name, r.Account.GoogleEmail, r.Account.QuotaProject,
		r.Scopes, r.Audience, s.token.Value}
}

func (s saved) size() int {
	n := 1 + 3*8
	for _, v := range s.strings() {
		n += 4 + len(v)
	}
	return n
}

func (s saved) append(b []byte) []byte {
	b = append(b, s.flags())
	for _, v := range s.strings() {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
	}
	for _, t := range []time.Time{s.token.Minted, s.token.Expires, s.asked} {
		var n int64
		if !t.IsZero() {
			n = t.UnixNano()
		}
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	}
	return b
}

// decodeSnapshot trusts nothing: it returns only tokens that a Cache could have minted.
func decodeSnapshot(b []byte) ([]saved, error) {
	if len(b) > LongestSnapshot {
		return nil, fmt.Errorf("%w: %d bytes, more than %d", errMalformed, len(b), LongestSnapshot)
	}
	form, b := cut(b, len(snapshotForm))
	if string(form) != snapshotForm {
		return nil, errMalformed
	}
	var all []saved
	seen := map[Request]bool{}
	for len(b) > 0 {
		var s saved
		if s, b = decodeSaved(b); b == nil || !s.valid() || seen[s.request] {
			return nil, fmt.Errorf("%w: token %d", errMalformed, len(all)+1)
		}
		seen[s.request] = true
		all = append(all, s)
	}
	return all, nil
}

// decodeSaved returns the first token and the rest of b. The rest is nil if b is too short.
func decodeSaved(b []byte) (saved, []byte) {
	flags, b := cut(b, 1)
	var v [7]string
	for i := range v {
		var n []byte
		if n, b = cut(b, 4); b == nil {
			return saved{}, nil
		}
		var text []byte
		if text, b = cut(b, int(binary.BigEndian.Uint32(n))); b == nil {
			return saved{}, nil
		}
		v[i] = string(text)
	}
	var at [3]time.Time
	for i := range at {
		var n []byte
		if n, b = cut(b, 8); b == nil {
			return saved{}, nil
		}
		if n := int64(binary.BigEndian.Uint64(n)); n != 0 {
			at[i] = time.Unix(0, n)
		}
	}
	if flags[0]&^allFlags != 0 {
		return saved{}, nil
	}
	return saved{
		request: Request{
			ServiceAccount: workload.ServiceAccount{Namespace: v[0], Name: v[1]},
			Account: workload.Account{GoogleEmail: v[2], PrincipalAsEmail: flags[0]&flagPrincipalAsEmail != 0,
				QuotaProject: v[3]},
			Scopes:    v[4],
			Audience:  v[5],
			federated: flags[0]&flagFederated != 0,
		},
		token:      Token{Value: v[6], Minted: at[0], Expires: at[1]},
		asked:      at[2],
		prefetched: flags[0]&flagPrefetched != 0,
	}, b
}

// cut returns the first n bytes and the rest. The rest is nil only if b is too short.
func cut(b []byte, n int) (head, tail []byte) {
	if n < 0 || n > len(b) {
		return nil, nil
	}
	return b[:n:n], b[n:]
}

// valid reports whether a pod could make the request, and the token could answer it.
func (s saved) valid() bool {
	r, made := s.request, Request{}
	switch {
	case r.federated:
		made = federatedToken(r.ServiceAccount, normalise([]string{r.Scopes}))
	case r.Audience != "":
		made = IDToken(r.ServiceAccount, r.Account, r.Audience)
	default:
		made = AccessToken(r.ServiceAccount, r.Account, []string{r.Scopes})
	}
	lives := lifetime(s.token)
	return r == made && r.ServiceAccount.Namespace != "" && r.ServiceAccount.Name != "" &&
		printable(s.token.Value) && !s.token.Minted.IsZero() && lives > 0 && lives <= maxLife
}
