package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Fault is one error of the configuration: where, what, and what to do.
type Fault struct {
	File    string // "" for a flag
	Line    int    // 0 when no line is at fault, such as for a missing key
	Key     string // dotted, as in the file; "" for the file as a whole
	Problem string
	Remedy  string // never a text of the configuration: pods may read it
	Unknown bool   // the key does not exist in this version
	Public  bool   // Problem has no text of the configuration, so pods may read it too
}

// String returns one line: `config.yaml:12: routing.mode: "iptabels" is not one of iptables,
// nftables, loopback, none: …`.
func (f Fault) String() string { return f.text(f.Key, f.Problem) }

// brief is String without texts of the configuration, which may be a secret in the wrong place.
func (f Fault) brief() string {
	key, problem := f.Key, ""
	if f.Unknown {
		key = ""
	}
	if f.Public {
		problem = f.Problem
	}
	return f.text(key, problem)
}

func (f Fault) text(key, problem string) string {
	place := f.File
	switch {
	case f.File == "":
		place = "--" + FlagName(f.Key)
	case f.Line > 0:
		place += ":" + strconv.Itoa(f.Line)
	}
	if f.File == "" {
		key = ""
	}
	parts := slices.DeleteFunc([]string{place, key, problem, f.Remedy}, func(s string) bool { return s == "" })
	return strings.Join(parts, ": ")
}

// Error holds all faults of a configuration, by file and line, and those of flags last.
type Error struct{ Faults []Fault }

// Error returns a line for each fault.
func (e *Error) Error() string {
	lines := make([]string, len(e.Faults))
	for i, f := range e.Faults {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

// NotConfigured says that no configuration is in force, and why. It is the one text for this state:
// of status, doctor, /readyz, the log, and answers to pods.
func NotConfigured(reason error) string { return "not configured: " + Brief(reason) }

// Outdated says that the configuration on disk does not load while an earlier one is in force.
func Outdated(reason error) string {
	return "the configuration on disk does not load: the previous one stays in force, and a restart would refuse pods: " +
		Brief(reason)
}

// Brief puts the faults on one line, and says how many there are if there are several. It has no
// text of the configuration, since pods and every user of the node read it.
func Brief(err error) string {
	e := (*Error)(nil)
	if !errors.As(err, &e) {
		return strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	lines := make([]string, len(e.Faults))
	for i, f := range e.Faults {
		lines[i] = f.brief()
	}
	text := strings.Join(lines, "; ")
	if len(lines) > 1 {
		text = fmt.Sprintf("%d faults: %s", len(lines), text)
	}
	return text + ": see `gke-metadata-emulator config check`"
}

func sortFaults(faults []Fault, file string) {
	rank := func(f Fault) int {
		switch f.File {
		case file:
			return 0
		case "":
			return 2
		}
		return 1 // files that the configuration names
	}
	slices.SortStableFunc(faults, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
}

// trouble is a fault without its place.
type trouble struct {
	problem, remedy string
	unknown, public bool
}

// bad returns a trouble. The remedy must have no text of the configuration, and nor may the format:
// such a text is an argument.
func bad(remedy, format string, args ...any) *trouble {
	return &trouble{problem: fmt.Sprintf(format, args...), remedy: remedy, public: len(args) == 0}
}

func noSuchKey(remedy string) *trouble {
	return &trouble{problem: "there is no such key", remedy: remedy, unknown: true, public: true}
}

// quote returns a value on one line and of bounded length, since it may be a file's content in the
// place of its name.
func quote(s string) string {
	const most = 80
	if r := []rune(s); len(r) > most {
		s = string(r[:most]) + "…"
	}
	return strconv.Quote(s)
}
