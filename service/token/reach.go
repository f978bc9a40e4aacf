package token

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"time"
)

// Reached is the outcome of a request without any token to one of Google's services.
type Reached struct {
	URL    string
	Proxy  string // scheme, host and port of the environment's proxy for URL; "" = none
	Status int    // any status means that the service is reachable
	Err    error
	Asked  time.Time
	Date   time.Time // the service's clock at that time; zero: no Date header
}

// Reach sends an empty request to each service, to check DNS, routes, proxies and certificates.
func (g *Google) Reach(ctx context.Context) (sts, iam Reached) {
	return g.reach(ctx, g.sts), g.reach(ctx, g.iam)
}

// Proxy returns the scheme, host and port of the proxy for STS; "" = none.
func (g *Google) Proxy() string {
	req, err := http.NewRequest(http.MethodPost, g.sts, nil)
	if err != nil {
		return ""
	}
	return g.proxy(req)
}

func (g *Google) proxy(r *http.Request) string {
	t, ok := g.client.Transport.(*http.Transport)
	if !ok || t.Proxy == nil {
		return ""
	}
	p, err := t.Proxy(r)
	if err != nil || p == nil {
		return ""
	}
	return (&url.URL{Scheme: p.Scheme, Host: p.Host}).String() // without the user name and password
}

func (g *Google) reach(ctx context.Context, at string) Reached {
	r := Reached{URL: at, Asked: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		r.Err = err
		return r
	}
	r.Proxy = g.proxy(req)
	res, err := g.client.Do(req)
	if err != nil {
		var asked *url.Error
		if errors.As(err, &asked) {
			err = asked.Err // Reached holds the URL
		}
		r.Err = &sanitizedError{err, sanitize(err.Error())}
		return r
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, answerLimit))
	_ = res.Body.Close()
	r.Status = res.StatusCode
	r.Date, _ = http.ParseTime(res.Header.Get("Date"))
	return r
}
