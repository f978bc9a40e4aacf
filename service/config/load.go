package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxBytes bounds every file that is read. A configuration has a few kilobytes.
const maxBytes = 1 << 20

// Load reads a configuration file, with flags (dotted key → text, as on the command line) in place
// of the file's values. The error is always an *Error and holds every fault. A file that does not
// exist is a fault, unless the flags are enough. An empty value means the default. A relative path
// starts at the file's directory, and in a flag at the working directory.
//
// With an error the Config has Routing and nothing else: what resolved of it although other keys
// are at fault, see resolved. A file that is no YAML resolves nothing, and its flags do.
func Load(file string, flags map[string]string) (Config, error) {
	l := &loader{read: readFile, file: file}
	return l.load(flags)
}

type loader struct {
	read func(name string) ([]byte, error)
	file string

	raw
	given      map[string]value
	faults     []Fault
	broken     map[string]bool // keys with a fault; checks that depend on them are left out
	noFile     bool            // the file does not exist
	unread     bool            // the file could not be read or parsed
	incomplete bool            // a required setting is missing
}

// value is a setting that the file or a flag gives.
type value struct {
	flag  bool
	line  int
	items []item
}

func (l *loader) load(flags map[string]string) (Config, error) {
	l.given, l.broken = map[string]value{}, map[string]bool{}
	if l.file != "" {
		data, err := l.read(l.file)
		switch {
		case err == nil:
			l.readYAML(data)
		case errors.Is(err, fs.ErrNotExist):
			l.noFile, l.unread = true, true
		default:
			l.unread = true
			l.complain("", 0, bad("make it a file that this user can read", "%s", reason(err)))
		}
	}
	l.readFlags(flags)

	l.raw = defaults()
	for _, k := range keys {
		if v, ok := l.given[k.Path]; ok {
			k.clear(&l.raw)
			k.set(&l.raw, v.items, func(line int, t *trouble) { l.complain(k.Path, line, t) })
		}
	}
	resolved := l.resolved() // before checks of one key against another
	l.resolve()

	if l.noFile && l.incomplete {
		l.faults = append(l.faults, Fault{File: l.file, Problem: "there is no such file", Public: true,
			Remedy: "create it with at least workloadIdentityProvider and projectID, or give them as flags"})
	}
	if len(l.faults) > 0 {
		sortFaults(l.faults, l.file)
		return Config{Routing: resolved}, &Error{l.faults}
	}
	return l.Config, nil
}

// resolved is the Routing of the keys that are valid by themselves, with defaults for the others.
// Of routing.guard the valid addresses count although others are not: each closes something.
func (l *loader) resolved() Routing {
	r := l.Routing
	if l.broken["routing.mode"] { // given twice
		r.Mode = Default().Routing.Mode
	}
	if l.broken["routing.uplinks"] {
		r.Uplinks = nil
	}
	if l.broken["routing.excludeInterfaces"] {
		r.ExcludeInterfaces = nil
	}
	return r
}

func (l *loader) readFlags(flags map[string]string) {
	for _, path := range slices.Sorted(maps.Keys(flags)) {
		k := slices.IndexFunc(keys, func(k Key) bool { return k.Path == path })
		if k < 0 {
			l.faults = append(l.faults, Fault{Key: path, Problem: "there is no such key", Remedy: suggestKey(path)})
			continue
		}
		delete(l.given, path)
		if text := flags[path]; text != "" {
			l.given[path] = value{flag: true, items: keys[k].split(text)}
		}
	}
}

// complain records a fault of a key at the place that gave it. Without a line it takes the key's.
func (l *loader) complain(key string, line int, t *trouble) {
	f := Fault{File: l.file, Line: line, Key: key, Problem: t.problem, Remedy: t.remedy, Unknown: t.unknown,
		Public: t.public}
	if v, ok := l.given[key]; ok && v.flag {
		f.File, f.Line = "", 0
	} else if ok && line == 0 {
		f.Line = v.line
	}
	l.broken[key] = true
	l.faults = append(l.faults, f)
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBytes+1))
	if err == nil && len(data) > maxBytes {
		err = fmt.Errorf("more than %d bytes", maxBytes)
	}
	return data, err
}

// reason leaves out the operation and the path, since the fault names the file.
func reason(err error) string {
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

// absolute makes the path in a setting absolute.
func (l *loader) absolute(key string, name *string) {
	if *name == "" || filepath.IsAbs(*name) {
		return
	}
	original := *name
	if v := l.given[key]; !v.flag {
		*name = filepath.Join(filepath.Dir(l.file), *name)
	}
	abs, err := filepath.Abs(*name)
	if err != nil {
		l.complain(key, 0, bad("write an absolute path", "%s", err))
		return
	}
	switch {
	case strings.HasPrefix(original, "~"):
		l.warning("%s: %s is not expanded to a home directory, the path means %s: write an absolute path", key,
			quote(original), quote(abs))
	case !l.given[key].flag:
		l.warning("%s: %s is relative to the directory of the configuration file, the path means %s: write an absolute path",
			key, quote(original), quote(abs))
	}
	*name = abs
}

// warning records a setting that is valid but rarely intended.
func (l *loader) warning(format string, args ...any) {
	l.Warnings = append(l.Warnings, fmt.Sprintf(format, args...))
}
