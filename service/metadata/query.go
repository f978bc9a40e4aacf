package metadata

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ErrBadQuery: the request's parameters are wrong. See BadQuery.
var ErrBadQuery = errors.New("bad query")

// BadQuery returns an ErrBadQuery whose text is only the given one. Clients see the text, and some
// match it (I-02, errors of identity).
func BadQuery(format string, args ...any) error { return badQuery(fmt.Sprintf(format, args...)) }

type badQuery string

func (b badQuery) Error() string      { return string(b) }
func (badQuery) Is(target error) bool { return target == ErrBadQuery }

// ParseQuery parses a query leniently (I-05, lenient queries). Unlike url.ParseQuery it accepts a
// semicolon, and a percent sign that starts no escape. It returns nil when there is nothing to
// read. The server's limit for a request's head bounds the result.
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

// Wait holds the parameters of a long poll (H-12, long polls). The server waits: it evaluates the
// Answer again after each change, until Over or the timeout.
type Wait struct {
	ForChange bool
	LastETag  string
	Timeout   time.Duration // 0: the server's limit; at most 136 years, so that it cannot overflow
}

// ParseWait reads wait_for_change, last_etag and timeout_sec. The others have no meaning without
// the first.
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

// Over reports whether an answer with this ETag ends the wait: it differs from LastETag, or there
// is no LastETag.
func (w Wait) Over(etag string) bool {
	return !w.ForChange || w.LastETag == "" || w.LastETag != etag
}

// form is the requested form of an answer. The zero value is the default: a value as text, a
// directory as a listing.
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

// json reports whether values are JSON: on request, and by default with recursive=, also for a
// single leaf.
func (f form) json() bool { return f.alt == altJSON || f.recursive && f.alt == "" }

// isTrue accepts true in any case (H-10, recursive answers). Everything else is false, as on GCE.
func isTrue(v url.Values, key string) bool { return strings.EqualFold(v.Get(key), "true") }
