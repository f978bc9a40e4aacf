package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// command is what --help says about one command. The manual is made of the program's own words and of no second tree of
// commands, and nothing of what makes it is in the program.
type command struct {
	path     []string // after the program's name
	text     string
	flags    []flag
	commands []command
}

type flag struct{ long, short, value, usage string }

func (c command) name() string { return strings.Join(append([]string{program}, c.path...), " ") }

func (c command) last() string { return c.path[len(c.path)-1] }

// short is the first sentence or line.
func (c command) short() string {
	line, _, _ := strings.Cut(c.text, "\n")
	line, _, _ = strings.Cut(line, ". ")
	return strings.TrimRight(line, ".:;")
}

var (
	commandLine = regexp.MustCompile(`^  ([a-z-]+) {2,}(\S.*)$`)
	flagLine    = regexp.MustCompile(`^ +(?:-([a-z]), )?--([a-z0-9-]+)(?:\[=\S+\])?(?: (\S+))? {2,}(\S.*)$`)
)

// ask reads --help of a command and of all below it.
func ask(binary string, path ...string) (command, error) {
	c := command{path: path}
	var errs bytes.Buffer
	cmd := exec.Command(binary, append(slices.Clone(path), "--help")...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return c, fmt.Errorf("%s: %w: %s", c.name(), err, &errs)
	}
	text, rest, found := strings.Cut(string(out), "\nUsage:\n")
	if !found {
		return c, fmt.Errorf("%s --help has no Usage", c.name())
	}
	c.text = strings.TrimSpace(text)
	section := ""
	for line := range strings.Lines(rest) {
		line = strings.TrimRight(line, "\n")
		if line == "" || !strings.HasPrefix(line, " ") {
			section = line
			continue
		}
		switch section {
		case "Available Commands:":
			m := commandLine.FindStringSubmatch(line)
			if m == nil {
				return c, fmt.Errorf("%s --help: what command is %q?", c.name(), line)
			}
			if m[1] == "help" {
				continue
			}
			sub, err := ask(binary, append(slices.Clone(path), m[1])...)
			if err != nil {
				return c, err
			}
			c.commands = append(c.commands, sub)
		case "Flags:", "Global Flags:":
			m := flagLine.FindStringSubmatch(line)
			if m == nil {
				return c, fmt.Errorf("%s --help: what flag is %q?", c.name(), line)
			}
			if m[2] != "help" {
				c.flags = append(c.flags, flag{long: m[2], short: m[1], value: m[3], usage: m[4]})
			}
		}
	}
	return c, nil
}

// common takes out what each of the commands has, so that it is told once.
func common(commands []command) (shared []flag, own [][]flag) {
	for _, f := range commands[0].flags {
		if !slices.ContainsFunc(commands, func(c command) bool { return !slices.Contains(c.flags, f) }) {
			shared = append(shared, f)
		}
	}
	for _, c := range commands {
		own = append(own, slices.DeleteFunc(slices.Clone(c.flags), func(f flag) bool { return slices.Contains(shared, f) }))
	}
	return shared, own
}
