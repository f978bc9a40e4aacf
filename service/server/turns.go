package server

import (
	"context"
	"sync"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/attest"
)

// turns bounds what is done at once for all parties together, and for each of them: a party that
// takes all of its turns leaves the rest to others, and waits for its own.
type turns struct {
	all    chan struct{}
	forOne int

	mu      sync.Mutex
	parties map[attest.Party]*share
}

// share is the turns of one party.
type share struct {
	turns chan struct{}
	users int // who hold a turn, or wait for one
}

func newTurns(all, forOne int) turns {
	return turns{all: make(chan struct{}, all), forOne: forOne, parties: map[attest.Party]*share{}}
}

// wait returns when it is the party's turn, and false when ctx ended before that.
func (t *turns) wait(ctx context.Context, by attest.Party) (done func(), ok bool) {
	t.mu.Lock()
	own := t.parties[by]
	if own == nil {
		own = &share{turns: make(chan struct{}, t.forOne)}
		t.parties[by] = own
	}
	own.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if own.users--; own.users == 0 {
			delete(t.parties, by)
		}
	}
	select {
	case own.turns <- struct{}{}:
	case <-ctx.Done():
		leave()
		return nil, false
	}
	select {
	case t.all <- struct{}{}:
	case <-ctx.Done():
		<-own.turns
		leave()
		return nil, false
	}
	return func() { <-t.all; <-own.turns; leave() }, true
}
