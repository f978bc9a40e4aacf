package metadata

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ErrBadQuery means that the request's parameters are at fault. See BadQuery.
var ErrBadQuery = errors.New("bad query")

// BadQuery returns an error that is ErrBadQuery and reads as the text alone, since clients get to see the text and some
// match it (I-02).
func BadQuery(format string, args ...any) error { return badQuery(fmt.Sprintf(format, args...)) }

type badQuery string

func (b badQuery) Error() string      { return string(b) }
func (badQuery) Is(target error) bool { return target == ErrBadQuery }

// ParseQuery reads the query of a request as leniently as can be (I-05): unlike url.ParseQuery it takes a semicolon for
// itself, and a percent sign that starts no escape too. It returns nil when there is nothing to read. The server's limit
// on the size of a request's head bounds it.
func ParseQuery(raw string) url.Values {
	var v url.Values
	for pair := range strings.SplitSeq(raw, "&") {
		if pair == "" {
			continue
		}
		if v == nil {
			v = url.Values{}
		}
		key, value, _ := strings.Cut(pair, "=")
		v.Add(unescape(key), unescape(value))
	}
	return v
}

func unescape(s string) string {
	if plain, err := url.QueryUnescape(s); err == nil {
		return plain
	}
	return s
}

// Wait is what a long poll asks for (H-12). The waiting is the server's: it asks for the Answer again whenever something
// changed, until Over or the timeout.
type Wait struct {
	ForChange bool
	LastETag  string
	Timeout   time.Duration // 0: as long as the server likes; at most 136 years, so that it cannot overflow
}

// ParseWait reads wait_for_change, last_etag and timeout_sec. Without the first the others mean nothing.
func ParseWait(v url.Values) (Wait, error) {
	if !isTrue(v, "wait_for_change") {
		return Wait{}, nil
	}
	w := Wait{ForChange: true, LastETag: v.Get("last_etag")}
	if s := v.Get("timeout_sec"); s != "" {
		seconds, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return Wait{}, BadQuery("timeout_sec=%.32q: want a whole number of seconds, 0 or more", s)
		}
		w.Timeout = time.Duration(seconds) * time.Second
	}
	return w, nil
}

// Over reports whether an answer with this ETag ends the wait: it is news to the client, or the client did not say what
// it knows.
func (w Wait) Over(etag string) bool {
	return !w.ForChange || w.LastETag == "" || w.LastETag != etag
}

// form is how a request wants its answer. Zero is the default: a value as text, a directory as a listing.
type form struct {
	recursive bool
	alt       string // altJSON, altText or ""
}

const altJSON, altText = "json", "text"

func parseForm(v url.Values) (form, error) {
	f := form{recursive: isTrue(v, "recursive")}
	switch alt := v.Get("alt"); {
	case alt == "":
	case strings.EqualFold(alt, altJSON):
		f.alt = altJSON
	case strings.EqualFold(alt, altText):
		f.alt = altText
	default:
		return f, BadQuery("alt=%.32q: want json or text", alt)
	}
	return f, nil
}

// json reports the form of values: JSON when asked for, and by default when recursive, also of a single leaf.
func (f form) json() bool { return f.alt == altJSON || f.recursive && f.alt == "" }

// isTrue takes true in any case (H-10). Everything else is false, as for GCE.
func isTrue(v url.Values, key string) bool { return strings.EqualFold(v.Get(key), "true") }
