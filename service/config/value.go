package config

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// item is a setting's text, one text of a list, or one entry of a map.
type item struct {
	line       int
	name, text string
}

// split reads a setting in the form of a flag: commas between the items of a list, path=value in a
// map.
func (k Key) split(s string) []item {
	switch k.Type() {
	case "list", "addresses":
		var items []item
		for part := range strings.SplitSeq(s, ",") {
			items = append(items, item{text: strings.TrimSpace(part)})
		}
		return items
	case "identities":
		return splitIdentities(s)
	case "map":
		var items []item
		for part := range strings.SplitSeq(s, ",") {
			name, text, _ := strings.Cut(part, "=")
			items = append(items, item{name: strings.TrimSpace(name), text: text})
		}
		return items
	}
	return []item{{text: s}}
}

// set converts text to the setting's type and stores it in r. It reports the faults of every item.
func (k Key) set(r *raw, items []item, complain func(line int, t *trouble)) {
	normal := func(it item) (string, bool) {
		s, t := it.text, (*trouble)(nil)
		switch {
		case k.Values != nil && !slices.Contains(k.Values, s):
			t = bad(k.correction(s), "%s is not one of %s", quote(s), strings.Join(k.Values, ", "))
		case k.check != nil:
			s, t = k.check(s)
		}
		if t != nil {
			complain(it.line, t)
		}
		return s, t == nil
	}

	switch field := k.field(r).(type) {
	case *string:
		if s, ok := normal(items[0]); ok {
			*field = s
		}
	case *bool:
		b, err := strconv.ParseBool(items[0].text)
		if err != nil || len(items[0].text) < len("true") { // ParseBool takes 1 and t as well
			complain(items[0].line, bad("write true or false", "%s is neither true nor false", quote(items[0].text)))
			return
		}
		*field = b
	case *int:
		const most = 1_000_000 // more than a node can hold
		n, err := strconv.Atoi(items[0].text)
		if err != nil || n < 1 || n > most {
			complain(items[0].line, bad("write a number such as "+k.Default, "%s is not a whole number from 1 to %d",
				quote(items[0].text), most))
			return
		}
		*field = n
	case *time.Duration:
		if s, ok := normal(items[0]); ok {
			*field, _ = time.ParseDuration(s) // the check has parsed it
		}
	case *netip.AddrPort:
		a, t := addrPort(items[0].text)
		if t != nil {
			complain(items[0].line, t)
			return
		}
		*field = a
	case *[]string:
		for _, it := range items {
			if s, ok := normal(it); ok && !slices.Contains(*field, s) {
				*field = append(*field, s)
			}
		}
	case *[]netip.AddrPort:
		for _, it := range items {
			a, t := addrPort(it.text)
			switch {
			case t != nil:
				complain(it.line, t)
			case a.Port() == 0 || a.Addr().IsUnspecified():
				complain(it.line, bad("write the address and the port of one server, such as 169.254.169.254:80",
					"%s names no single server", quote(it.text)))
			case !slices.Contains(*field, a):
				*field = append(*field, a)
			}
		}
	case *map[string]string:
		m := make(map[string]string, len(items))
		for _, it := range items {
			name, t := k.check(it.name)
			if _, twice := m[name]; t == nil && twice {
				t = bad("keep one of them", "%s is given twice", quote(name))
			}
			if t != nil {
				complain(it.line, t)
				continue
			}
			m[name] = it.text
		}
		*field = m
	case *[]HostIdentity:
		*field = setIdentities(items, complain)
	}
}

// clear removes a default, so that given items replace it instead of being added to it.
func (k Key) clear(r *raw) {
	switch field := k.field(r).(type) {
	case *[]string:
		*field = nil
	case *[]netip.AddrPort:
		*field = nil
	}
}

// correction returns the remedy for a value that is not one of Values.
func (k Key) correction(s string) string {
	if near := nearest(s, k.Values); near != "" {
		return "write " + near + ""
	}
	return "write one of them, or remove the key for " + k.Default
}

// nearest returns the word that was probably intended, or "".
func nearest(s string, words []string) string {
	best, least := "", 1+max(1, min(3, len(s)/3))
	for _, w := range words {
		if d := distance(strings.ToLower(s), strings.ToLower(w)); d < least {
			best, least = w, d
		}
	}
	for _, w := range words {
		if best == "" && len(s) >= 3 && strings.HasPrefix(w, s) {
			best = w // such as warn for warning
		}
	}
	return best
}

// distance returns the Levenshtein distance between two words: insertions, deletions and
// substitutions.
func distance(a, b string) int {
	const longest = 64 // longer than any key: not worth comparing
	if len(a) > longest || len(b) > longest {
		return longest
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substituted := diagonal
			if a[i] != b[j] {
				substituted++
			}
			diagonal = row[j+1]
			row[j+1] = min(row[j]+1, row[j+1]+1, substituted)
		}
	}
	return row[len(b)]
}
