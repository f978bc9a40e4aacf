package config

import (
	"bytes"
	"errors"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// readYAML reads the settings of a file, each with its line. The table of keys defines them.
func (l *loader) readYAML(data []byte) {
	doc, t, line := parseYAML(data)
	if t != nil {
		l.unread = true
		l.complain("", line, t)
		return
	}
	if doc == nil || isNull(doc) {
		return
	}
	if doc.Kind != yaml.MappingNode {
		l.unread = true
		l.complain("", doc.Line, bad("write key: value", "not a configuration: must be a map of settings, not %s",
			kindOf(doc)))
		return
	}
	l.readMapping(doc, "")
}

// parseYAML returns the one document of data, or nil if there is nothing but comments.
func parseYAML(data []byte) (doc *yaml.Node, t *trouble, line int) {
	defer func() {
		if r := recover(); r != nil { // the parser panics on some input
			t = bad("write plain key: value lines", "this YAML cannot be parsed")
		}
	}()
	d := yaml.NewDecoder(bytes.NewReader(data))
	var first, second yaml.Node
	if err := d.Decode(&first); errors.Is(err, io.EOF) {
		return nil, nil, 0
	} else if err != nil {
		return nil, badYAML(err), lineOf(err, data)
	}
	if err := d.Decode(&second); err == nil {
		return nil, bad("remove one: a configuration is one document", "a second document begins here"), second.Line
	} else if !errors.Is(err, io.EOF) {
		return nil, badYAML(err), lineOf(err, data)
	}
	return first.Content[0], nil, 0
}

// readMapping reads the settings below prefix ("" or "routing.").
func (l *loader) readMapping(n *yaml.Node, prefix string) {
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, v := n.Content[i], n.Content[i+1]
		if name.Kind != yaml.ScalarNode || !plainTag(name) {
			l.complain(strings.TrimSuffix(prefix, "."), name.Line, bad("write key: value",
				"must be the name of a setting, not %s", kindOf(name)))
			continue
		}
		path := prefix + name.Value
		k := slices.IndexFunc(keys, func(k Key) bool { return k.Path == path && !strings.Contains(name.Value, ".") })
		if before, twice := seen[name.Value]; twice && (k >= 0 || isGroup(path)) {
			l.complain(path, name.Line, bad("keep one of them", "is already set in line %d", before))
			continue
		}
		seen[name.Value] = name.Line

		switch {
		case strings.Contains(name.Value, ".") && prefix == "":
			l.complain(path, name.Line, noSuchKey("write the part before the dot, and the other indented below it"))
		case k >= 0:
			l.readValue(keys[k], v)
		case prefix != "" || !isGroup(path):
			l.complain(path, name.Line, noSuchKey(suggestKey(path)))
		case isNull(v):
		case v.Kind != yaml.MappingNode:
			l.complain(path, v.Line, bad("write "+path+": with its keys indented below it", "must be a group of keys, not %s",
				kindOf(v)))
		default:
			l.readMapping(v, path+".")
		}
	}
}

func (l *loader) readValue(k Key, n *yaml.Node) {
	v := value{line: n.Line}
	if isNull(n) {
		return
	}
	ok := true
	scalar := func(n *yaml.Node) string {
		if n.Kind != yaml.ScalarNode || !plainTag(n) {
			l.complain(k.Path, n.Line, bad("write the value itself", "must be one value, not %s", kindOf(n)))
			ok = false
		}
		if isNull(n) {
			return ""
		}
		return n.Value
	}
	switch k.Type() {
	case "list", "addresses":
		if n.Kind != yaml.SequenceNode {
			l.complain(k.Path, n.Line, bad("write "+k.Path[strings.LastIndexByte(k.Path, '.')+1:]+": [ONE, TWO]",
				"must be a list, not %s", kindOf(n)))
			return
		}
		for _, part := range n.Content {
			v.items = append(v.items, item{line: part.Line, text: scalar(part)})
		}
	case "identities":
		v.items = l.readIdentities(k, n)
	case "map":
		if n.Kind != yaml.MappingNode {
			l.complain(k.Path, n.Line, bad("write path: value lines, indented below it", "must be a map, not %s", kindOf(n)))
			return
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			v.items = append(v.items, item{line: n.Content[i].Line, name: scalar(n.Content[i]), text: scalar(n.Content[i+1])})
		}
	default:
		text := scalar(n)
		if want := map[string]string{"boolean": "!!bool", "number": "!!int"}[k.Type()]; ok && text != "" &&
			n.ShortTag() != want && want != "" {
			remedy := "write a number such as " + k.Default
			if want == "!!bool" {
				remedy = "write true or false"
			}
			if n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0 {
				remedy += ", without quotes"
			}
			l.complain(k.Path, n.Line, bad(remedy, "%s is not a %s", quote(text), k.Type()))
			return
		}
		if text != "" {
			v.items = []item{{line: n.Line, text: text}}
		}
	}
	if ok && len(v.items) > 0 { // nothing given means the default
		l.given[k.Path] = v
	}
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// plainTag refuses YAML tags that make a text something else: binary, merge keys, tags of other
// programs.
func plainTag(n *yaml.Node) bool {
	switch n.ShortTag() {
	case "!!str", "!!int", "!!float", "!!bool", "!!null", "!!timestamp":
		return true
	}
	return false
}

func isGroup(path string) bool {
	return slices.ContainsFunc(keys, func(k Key) bool { return strings.HasPrefix(k.Path, path+".") })
}

func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a map"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	if !plainTag(n) {
		return "something tagged " + quote(n.ShortTag())
	}
	return "the text " + quote(n.Value)
}

// suggestKey returns the remedy for a key that does not exist. It recognises a missing group, a
// flag's name and a mistyped name.
func suggestKey(path string) string {
	var paths []string
	for _, k := range keys {
		if last := k.Path[strings.LastIndexByte(k.Path, '.')+1:]; k.Flag() == path || strings.EqualFold(last, path) {
			return "write " + k.Path + ""
		}
		paths = append(paths, k.Path)
		if group, _, found := strings.Cut(k.Path, "."); found && !slices.Contains(paths, group) {
			paths = append(paths, group)
		}
	}
	if near := nearest(path, paths); near != "" {
		return "write " + near + ""
	}
	return "remove it; `gke-metadata-emulator config show` prints every key"
}

// yamlLine finds the line of a syntax error, which the parser gives only in its text. Some of its
// errors count from 0.
var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func lineOf(err error, data []byte) int {
	n := 0
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		n, _ = strconv.Atoi(m[1]) // "" is 0: no line
	}
	lines := bytes.SplitAfter(data, []byte("\n"))
	if n < len(lines) && yaml.Unmarshal(bytes.Join(lines[:n], nil), new(yaml.Node)) == nil {
		n++ // the lines before n are valid
	}
	return n
}

func badYAML(err error) *trouble {
	return bad("mend the indentation, or quote a text that begins with one of [ { * & ! % @ or holds a colon and a space",
		"this is not YAML: %s", yamlLine.ReplaceAllString(err.Error(), ""))
}
