package routing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lockSeconds is how long one iptables command waits for the lock that all of them share on the legacy backend.
	lockSeconds = "5"
	// patience is how long exit status 4 (the lock, or a change that raced with ours) is tried again: it is nobody's fault
	// and passes; taking it for fatal broke others.
	patience = 15 * time.Second
)

// xtables runs one backend's commands for one family: restore to apply, -S to list our chains, and little else, since every command costs
// 2 ms, and 20 ms on a legacy backend with 10,000 rules. Whatever a look at the kernel can tell is told by glances.
type xtables struct {
	command string // such as iptables-nft
	legacy  bool
	six     bool
}

// openXtables finds the command, or returns an error that wraps exec.ErrNotFound.
func openXtables(command string, legacy, six bool) (*xtables, error) {
	if six {
		command = sixCommand(command)
	}
	for _, c := range []string{command, command + "-restore"} {
		if _, err := exec.LookPath(c); err != nil {
			return nil, err // says which
		}
	}
	return &xtables{command: command, legacy: legacy, six: six}, nil
}

// sixCommand is the command of the same backend for IPv6.
func sixCommand(command string) string {
	dir, name := filepath.Split(command)
	return dir + strings.Replace(name, "iptables", "ip6tables", 1)
}

// runningCommand is a command that was started. It was started by the calling thread, whose network namespace it is in.
type runningCommand struct {
	*exec.Cmd
	stdout, stderr bytes.Buffer
	err            error
}

func start(ctx context.Context, stdin, name string, args ...string) *runningCommand {
	c := &runningCommand{Cmd: exec.CommandContext(ctx, name, args...)}
	c.Stdout, c.Stderr = &c.stdout, &c.stderr
	if stdin != "" {
		c.Stdin = strings.NewReader(stdin)
	}
	c.err = c.Start()
	return c
}

// end waits for the end of the command.
func (c *runningCommand) end() (stdout string, err error) {
	if c.err == nil {
		c.err = c.Wait()
	}
	if c.err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), c.err, strings.Join(strings.Fields(c.stderr.String()), " "))
	}
	return c.stdout.String(), nil
}

// restore applies the text by one iptables-restore: --noflush leaves everybody else's rules alone.
func (x *xtables) restore(ctx context.Context, text string) error {
	if text == "" {
		return nil
	}
	return retry(ctx, func() error {
		_, err := start(ctx, text, x.command+"-restore", "--wait", lockSeconds, "--noflush").end()
		return err
	})
}

// startList begins to list a chain, or without one the table.
func (x *xtables) startList(ctx context.Context, table string, chain ...string) *runningCommand {
	return start(ctx, "", x.command, append([]string{"--wait", lockSeconds, "-t", table, "-S"}, chain...)...)
}

// list returns the rules of a chain, or without one of all of the table's, by chain and without "-A CHAIN ". One that is not there has none.
// started is a startList of it, or nil.
func (x *xtables) list(ctx context.Context, started *runningCommand, table string, chain ...string) (rules map[string][]string, err error) {
	var out string
	err = retry(ctx, func() error {
		if started == nil {
			started = x.startList(ctx, table, chain...)
		}
		out, err = started.end()
		started = nil
		return err
	})
	if exitStatus(err) == 1 && !errors.Is(err, errIncompatible) { // no such chain, or no such table in this kernel
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	rules = map[string][]string{}
	for line := range strings.Lines(out) {
		name, rule, _ := strings.Cut(strings.TrimPrefix(line, "-A "), " ")
		if strings.HasPrefix(line, "-A ") && !strings.HasPrefix(name, "KUBE-") { // which can be 10,000
			rules[name] = append(rules[name], normal(rule))
		}
	}
	return rules, nil
}

// normal undoes what versions of iptables print differently.
func normal(rule string) string { return strings.ReplaceAll(strings.TrimSpace(rule), `"`, "") }

// has asks the kernel for one rule whose text was not found in the list: another version may print it in other words.
func (x *xtables) has(ctx context.Context, table, chain, rule string) (yes bool, err error) {
	err = retry(ctx, func() error {
		_, err := start(ctx, "", x.command, append([]string{"--wait", lockSeconds, "-t", table, "-C", chain}, strings.Fields(rule)...)...).end()
		return err
	})
	switch exitStatus(err) {
	case 1, 2: // no, and: this iptables cannot even say it, such as an interface or cgroup that is not there
		return false, nil
	}
	return err == nil, err
}

// retry repeats f while it says exit status 4, and makes plain what the kernel's refusal means.
func retry(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("still busy after "+patience.String()))
	defer cancel()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := permission(f())
		if exitStatus(err) != 4 || errors.Is(err, ErrPermission) || errors.Is(err, errRefused) {
			return err
		}
		if over := pause(ctx, wait); over != nil {
			return fmt.Errorf("%w (%w)", err, over)
		}
	}
}

// errIncompatible is wrapped by errors of iptables-nft that cannot list a chain: it holds a rule
// that nft wrote. The rules of our own chains can still be listed, changed and deleted.
var errIncompatible = errors.New("the chain holds rules that iptables cannot list")

// errRefused is wrapped by errors that status 4 brings and that waiting does not cure.
var errRefused = errors.New("the kernel refuses the rule")

// exitStatus is that of the command behind err, -1 if there is none.
func exitStatus(err error) int {
	var run *exec.ExitError
	if errors.As(err, &run) {
		return run.ExitCode()
	}
	return -1
}

// permission is the one place that reads error texts: iptables tells a lock that is held, a rule that the kernel does not take and
// a missing privilege by the same exit status, and only its words differ.
func permission(err error) error {
	if err == nil || errors.Is(err, ErrPermission) {
		return err
	}
	text := err.Error()
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), strings.Contains(text, "Permission denied"), strings.Contains(text, "Operation not permitted"):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case strings.Contains(text, "Read-only file system"): // /run/xtables.lock, under ProtectSystem=strict
		return fmt.Errorf("%w: the file system is read-only here (a unit runs this by ExecStartPre=+): %w", errRefused, err)
	case exitStatus(err) == 1 && strings.Contains(text, "is incompatible, use 'nft' tool"):
		return fmt.Errorf("%w: %w", errIncompatible, err)
	case exitStatus(err) == 4 && (strings.Contains(text, "Invalid argument") || strings.Contains(text, "No such file")):
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}
