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

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"
)

const (
	// lockSeconds is how long one iptables command waits for the lock that all of them share on the legacy backend.
	lockSeconds = 5
	// patience is how long exit status 4 (the lock, or a change that raced with ours) is tried again: it is nobody's fault
	// and passes; taking it for fatal broke others.
	patience = 15 * time.Second
)

// xtables runs one backend's commands for one family: restore to apply, go-iptables to list, test and delete.
type xtables struct {
	*goiptables.IPTables
	command string // such as iptables-nft
	six     bool
}

// openXtables finds the command, or returns an error that wraps exec.ErrNotFound.
func openXtables(command string, six bool) (*xtables, error) {
	proto := goiptables.ProtocolIPv4
	if six {
		dir, name := filepath.Split(command)
		command, proto = dir+strings.Replace(name, "iptables", "ip6tables", 1), goiptables.ProtocolIPv6
	}
	ipt, err := goiptables.New(goiptables.Path(command), goiptables.IPFamily(proto), goiptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	return &xtables{IPTables: ipt, command: command, six: six}, nil
}

// restore applies the text by one iptables-restore: --noflush leaves everybody else's rules alone.
func (x *xtables) restore(ctx context.Context, text string) error {
	dir, name := filepath.Split(x.command)
	command := dir + name + "-restore"
	return x.retry(ctx, func() error {
		cmd := exec.CommandContext(ctx, command, "--wait", fmt.Sprint(lockSeconds), "--noflush")
		cmd.Stdin = strings.NewReader(text)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s --noflush: %w: %s", command, err, strings.Join(strings.Fields(stderr.String()), " "))
		}
		return nil
	})
}

// list returns the rules of a chain without "-A CHAIN ", and whether the chain exists.
func (x *xtables) list(ctx context.Context, table, chain string) (rules []string, exists bool, err error) {
	var lines []string
	err = x.retry(ctx, func() error {
		lines, err = x.List(table, chain)
		return err
	})
	if exitStatus(err) == 1 { // no such chain, or no such table in this kernel
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	for _, line := range lines {
		if rule, ok := strings.CutPrefix(line, "-A "+chain+" "); ok {
			rules = append(rules, normal(rule))
		}
	}
	return rules, true, nil
}

// normal undoes what versions of iptables print differently.
func normal(rule string) string { return strings.ReplaceAll(strings.TrimSpace(rule), `"`, "") }

// has asks the kernel for one rule whose text was not found in the list: another version may print it in other words.
func (x *xtables) has(ctx context.Context, table, chain, rule string) (yes bool, err error) {
	err = x.retry(ctx, func() error {
		yes, err = x.Exists(table, chain, strings.Fields(rule)...)
		return err
	})
	if exitStatus(err) == 2 { // this iptables cannot even say it: an interface or cgroup that is not there
		return false, nil
	}
	return yes, err
}

// retry repeats f while it says exit status 4, and makes plain what the kernel's refusal means.
func (x *xtables) retry(ctx context.Context, f func() error) error {
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

// errRefused is wrapped by errors that status 4 brings and that waiting does not cure.
var errRefused = errors.New("the kernel refuses the rule")

// exitStatus is that of the iptables command behind err, -1 if there is none.
func exitStatus(err error) int {
	var lib *goiptables.Error
	if errors.As(err, &lib) {
		return lib.ExitStatus()
	}
	var run *exec.ExitError
	if errors.As(err, &run) {
		return run.ExitCode()
	}
	return -1
}

// permission is the one place that reads error texts: iptables tells a lock that is held, a rule that the kernel does not take and
// a missing privilege by the same exit status, and only its words differ.
func permission(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), strings.Contains(text, "Permission denied"), strings.Contains(text, "Operation not permitted"):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case strings.Contains(text, "Read-only file system"): // /run/xtables.lock, under ProtectSystem=strict
		return fmt.Errorf("%w: the file system is read-only here (a unit runs this by ExecStartPre=+): %w", errRefused, err)
	case exitStatus(err) == 4 && (strings.Contains(text, "Invalid argument") || strings.Contains(text, "No such file")):
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}
