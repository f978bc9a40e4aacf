package kube

import (
	"errors"
	"fmt"
	"time"
)

// awayAgain bounds what an API server that answers 429 to every other request makes us say.
const awayAgain = 30 * time.Second

// contact notes that the API server answered.
func (c *Cluster) contact() {
	c.mu.Lock()
	was, since := c.away && !c.awaySaid.Before(c.since), c.since
	c.away, c.since = false, time.Now()
	c.mu.Unlock()
	if was {
		c.log.WithField("since", since.UTC().Format(time.RFC3339)).Info("the Kubernetes API is back")
	}
}

// lost notes that it did not, and returns the error that says since when.
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
		c.log.WithError(err).Warn("the Kubernetes API is away")
	}
	return e
}

func (c *Cluster) setProblem(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trouble = err
	if err != nil {
		c.lastError, c.lastErrorAt = err.Error(), time.Now()
	}
}

var errNotListed = errors.New("the pods of this node have not been listed yet")

// problem returns why pods cannot be seen; never nil.
func (c *Cluster) problem() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.trouble != nil {
		return c.trouble
	}
	return &AwayError{Since: c.since, Err: errNotListed}
}

// lostTouch is the error of an index that is too old.
func (c *Cluster) lostTouch(since time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var away *AwayError
	if c.trouble == nil || errors.As(c.trouble, &away) {
		e := &AwayError{Since: since, Err: errors.New("the watch of this node's pods is broken")}
		if away != nil {
			e.Err = away.Err
		}
		return e
	}
	return c.trouble
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

// Grant is something that the cluster's administrator has to allow.
type Grant struct {
	Verb     string    `json:"verb"`
	Resource string    `json:"resource"`
	Message  string    `json:"message"`            // the API server's words
	Manifest string    `json:"manifest,omitempty"` // what to apply
	Since    time.Time `json:"since"`
	Last     time.Time `json:"last"`

	logged time.Time
}

// logAgain is how often one missing grant is worth a line.
const logAgain = 10 * time.Minute

// missing notes a refusal.
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
	m := g.Manifest
	c.mu.Unlock()
	if !say {
		return
	}
	if m != "" {
		m = fmt.Sprintf("; apply this:\n%s", m)
	}
	c.log.Error(f.Error() + m)
}

// granted forgets a refusal that no longer holds.
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

// grantKey keeps apart what is missing for pods and for processes of the node.
func grantKey(verb, resource string, unbound bool) string {
	if unbound {
		return "unbound " + verb + " " + resource
	}
	return verb + " " + resource
}
