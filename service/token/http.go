package token

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	attemptTimeout = 10 * time.Second
	attempts       = 3
	firstBackoff   = 200 * time.Millisecond
	maxWait        = 5 * time.Second // for Retry-After; a longer one ends the attempts, and the cache asks later
	answerLimit    = 1 << 20         // bytes of an answer (G-04, bounded answers)
	refusalLimit   = 64 << 10        // bytes of an answer that is not 200; Google's have a few hundred
)

// newClient returns the one client for both of Google's services, whose connections 100 concurrent
// mints share. The CA certificates of caFile are trusted beside the system's roots.
func newClient(caFile string) (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("google.caFile: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("google.caFile: %s holds no certificate: write PEM (-----BEGIN CERTIFICATE-----)", caFile)
		}
		config.RootCAs = pool
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			TLSClientConfig:     config,
			TLSHandshakeTimeout: 5 * time.Second,
			ForceAttemptHTTP2:   true,
			// detects a connection that a NAT dropped
			HTTP2:                 &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
			MaxIdleConns:          100,
			MaxIdleConnsPerHost:   100,
			IdleConnTimeout:       90 * time.Second,
			ResponseHeaderTimeout: attemptTimeout,

			MaxResponseHeaderBytes: refusalLimit,
		},
		CheckRedirect: notFollowed,
	}, nil
}

// notFollowed stops at a redirect: a token goes to the configured host only.
func notFollowed(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// answer is a response with its body read.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// post sends the body until another attempt would not change the answer. Network errors, 429 and
// 5xx are tried again, with exponential backoff and jitter. The result is the last attempt's.
func post(ctx context.Context, client *http.Client, url string, header http.Header, body []byte) (answer, error) {
	backoff := firstBackoff
	for try := 1; ; try++ {
		a, err := postOnce(ctx, client, url, header, body)
		if err == nil && !retryable(a.status) || try == attempts || ctx.Err() != nil {
			return a, err
		}
		wait := backoff/2 + rand.N(backoff)
		if err == nil {
			if asked := retryAfter(a.header); asked > maxWait {
				return a, nil
			} else if asked > wait {
				wait = asked
			}
		}
		backoff *= 4
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return a, err
		}
	}
}

func postOnce(ctx context.Context, client *http.Client, url string, header http.Header, body []byte) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header = header.Clone()
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK { // a truncated body is not Google's form
		read, err := io.ReadAll(io.LimitReader(resp.Body, refusalLimit))
		if err != nil {
			return answer{}, fmt.Errorf("reading the answer of %s: %w", req.URL.Host, err)
		}
		return answer{resp.StatusCode, resp.Header, read}, nil
	}
	read, err := io.ReadAll(io.LimitReader(resp.Body, answerLimit+1))
	if err != nil {
		return answer{}, fmt.Errorf("reading the answer of %s: %w", req.URL.Host, err)
	}
	if len(read) > answerLimit {
		return answer{}, fmt.Errorf("the answer of %s: %w", req.URL.Host, errTooLong)
	}
	return answer{resp.StatusCode, resp.Header, read}, nil
}

var errTooLong = errors.New("longer than 1 MiB")

func retryable(status int) bool {
	return status == http.StatusTooManyRequests || status >= 500
}

// retryAfter reads the header in seconds. Google does not use the form of a date.
func retryAfter(h http.Header) time.Duration {
	s, err := strconv.Atoi(strings.TrimSpace(h.Get("Retry-After")))
	if err != nil || s <= 0 {
		return 0
	}
	return time.Duration(min(s, 3600)) * time.Second
}

// until returns the time from the answer to t, by the clock of the server: this node's may be
// wrong.
func (a answer) until(t time.Time) time.Duration {
	now, err := http.ParseTime(a.header.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return t.Sub(now)
}
