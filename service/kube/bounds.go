package kube

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Bounds of answers of the API server, or of a server in its place. Client-go has none.
const (
	maxRefusal = 64 << 10 // bytes of an answer that is not 2xx; a Status has a few hundred
	maxAnswer  = 64 << 20 // bytes of a 2xx answer that is not a watch: 500 pods have 25 MB
	maxMessage = 512      // bytes of a message
)

// bounding limits the bodies of answers.
type bounding struct{ http.RoundTripper }

func (b bounding) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := b.RoundTripper.RoundTrip(r)
	if err != nil {
		return res, err
	}
	switch ok := res.StatusCode >= 200 && res.StatusCode < 300; {
	case !ok:
		res.Body = body{io.LimitReader(res.Body, maxRefusal), res.Body}
	case !r.URL.Query().Has("watch"):
		res.Body = body{&atMost{res.Body, maxAnswer}, res.Body}
	}
	return res, nil
}

// WrappedRoundTripper lets client-go find the transport whose idle connections it closes.
func (b bounding) WrappedRoundTripper() http.RoundTripper { return b.RoundTripper }

type body struct {
	io.Reader
	io.Closer
}

var errTooLong = fmt.Errorf("the API server's answer is longer than %d MiB", maxAnswer>>20)

// atMost reads up to left bytes, and fails if there are more.
type atMost struct {
	io.Reader
	left int64
}

func (a *atMost) Read(p []byte) (int, error) {
	n, err := a.Reader.Read(p)
	if a.left -= int64(n); a.left < 0 {
		return 0, errTooLong
	}
	return n, err
}

// brief returns err with the API server's message on one line of bounded length. errors.Is and
// errors.As see the original.
func brief(err error) error {
	var status *apierrors.StatusError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &status) && error(status) == err:
		s := &apierrors.StatusError{ErrStatus: *status.ErrStatus.DeepCopy()}
		s.ErrStatus.Message = sanitize(s.ErrStatus.Message)
		return s
	}
	return &briefError{err, sanitize(err.Error())}
}

type briefError struct {
	err  error
	text string
}

func (b *briefError) Error() string { return b.text }
func (b *briefError) Unwrap() error { return b.err }

// sanitize returns s on one line, without control characters and of bounded length.
func sanitize(s string) string {
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\r' || r == '\t':
			return ' '
		case r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return -1
		}
		return r
	}, s))
}
