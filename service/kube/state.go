package kube

import (
	"errors"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/messageid"
)

// awayAgain is the shortest time between two log lines about an unavailable API server. A server
// that answers 429 to every other request would cause many.
const awayAgain = 30 * time.Second

// contact notes that the API server answered.
func (c *Cluster) contact() {
	c.mu.Lock()
	was, since := c.away && !c.awaySaid.Before(c.since), c.since
	c.away, c.since = false, time.Now()
	c.mu.Unlock()
	if was {
		c.log.WithField("since", since.UTC().Format(time.RFC3339)).Info("the Kubernetes API is available again")
	}
}

// lost notes that the API server did not answer, and returns the error that says since when.
func (c *Cluster) lost(err error) error {
	c.mu.Lock()
	now := time.Now()
	say := !c.away && now.Sub(c.awaySaid) > awayAgain
	if say {
		c.awaySaid = now
	}
	e := &AwayError{Since: c.since, Err: err}
	c.away, c.lastError, c.lastErrorAt = true, err.Error(), now
	c.mu.Unlock()
	if say {
		messageid.APIAway.In(c.log).WithError(err).Warn(Unavailable + ": cached tokens are served, new ones wait")
	}
	return e
}

func (c *Cluster) setProblem(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unseen = err
	if err != nil {
		c.lastError, c.lastErrorAt = err.Error(), time.Now()
	}
}

var errNotListed = errors.New("the pods of this node have not been listed yet")

// problem returns why pods cannot be listed. It never returns nil.
func (c *Cluster) problem() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unseen != nil {
		return c.unseen
	}
	return &AwayError{Since: c.since, Err: errNotListed}
}

// trouble returns why the pods of this node are not followed, in the words of At and Known. It
// returns nil while they are, and for the moment until an ended watch is opened again.
func (c *Cluster) trouble() error {
	if !c.pods.current.Load().synced {
		return c.problem()
	}
	c.mu.Lock()
	failed := c.unseen != nil
	c.mu.Unlock()
	if since, lost := c.pods.outOfTouch(); lost && failed {
		return c.lostTouch(since)
	}
	return nil
}

// lostTouch returns the error for an index that is too old.
func (c *Cluster) lostTouch(since time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var away *AwayError
	if c.unseen == nil || errors.As(c.unseen, &away) {
		e := &AwayError{Since: since, Err: errors.New("no watch of this node's pods is open")}
		if away != nil {
			e.Err = away.Err
		}
		return e
	}
	return c.unseen
}

func (c *Cluster) user() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.identity
}

func (c *Cluster) kubeconfigInUse() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.path
}

// Grant is a right that the cluster's administrator has to grant.
type Grant struct {
	Verb     string    `json:"verb"`
	Resource string    `json:"resource"`
	Message  string    `json:"message"`            // of the API server
	Manifest string    `json:"manifest,omitempty"` // what to apply
	Since    time.Time `json:"since"`
	Last     time.Time `json:"last"`

	logged time.Time
}

// logAgain is the shortest time between two log lines about one missing grant.
const logAgain = 10 * time.Minute

// missing records a refusal.
func (c *Cluster) missing(f *ForbiddenError) {
	now := time.Now()
	c.mu.Lock()
	key := grantKey(f.Verb, f.Resource, f.unbound)
	g := c.grants[key]
	if g == nil {
		g = &Grant{Verb: f.Verb, Resource: f.Resource, Since: now}
		c.grants[key] = g
	}
	g.Message, g.Manifest, g.Last = f.Message, f.Manifest(), now
	c.lastError, c.lastErrorAt = f.Error(), now
	say := now.Sub(g.logged) > logAgain
	if say {
		g.logged = now
	}
	c.mu.Unlock()
	if say {
		messageid.GrantMissing.In(c.log).Error(f.Error())
	}
}

// granted drops a recorded refusal after a request succeeded.
func (c *Cluster) granted(k call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.grants) == 0 {
		return
	}
	delete(c.grants, grantKey(k.verb, k.resource, k.unbound))
	if k.resource == tokens {
		delete(c.grants, grantKey(audienceVerb, c.audience, k.unbound))
	}
}

// grantKey separates grants for pods from grants for processes of the node.
func grantKey(verb, resource string, unbound bool) string {
	if unbound {
		return "unbound " + verb + " " + resource
	}
	return verb + " " + resource
}
