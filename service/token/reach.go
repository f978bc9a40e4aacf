package token

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"time"
)

// Reached is what a request without any token came to at one of Google's services.
type Reached struct {
	URL    string
	Proxy  string // scheme, host and port of the proxy that the environment names for it; "" = none
	Status int    // any says that it is there
	Err    error
	Asked  time.Time
	Date   time.Time // what its clock said then; zero: it did not say
}

// Reach asks the two services for nothing, to see whether they are there: names, routes, proxies and certificates.
func (g *Google) Reach(ctx context.Context) (sts, iam Reached) {
	return g.reach(ctx, g.sts), g.reach(ctx, g.iam)
}

// Proxy is the scheme, host and port of the proxy by which STS is asked; "" = none.
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
	return (&url.URL{Scheme: p.Scheme, Host: p.Host}).String() // and not its user's name and password
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
			err = asked.Err // the URL is told already
		}
		r.Err = &cleaned{err, clean(err.Error())}
		return r
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, answerLimit))
	_ = res.Body.Close()
	r.Status = res.StatusCode
	r.Date, _ = http.ParseTime(res.Header.Get("Date"))
	return r
}
