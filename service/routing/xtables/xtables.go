// Package xtables answers: what stands of our chains of iptables, in one backend and one family,
// and does it differ from the chains that are wanted?
package xtables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/fault"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/netobj"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/routing/nft"
)

const (
	// lockSeconds is how long one iptables command waits for the lock that all of them share on the
	// legacy backend.
	lockSeconds = 5
	// lockTimeout is how long exit status 4 (the lock, or a change that raced with ours) is tried
	// again: it is nobody's fault and passes; taking it for fatal broke others.
	lockTimeout = 15 * time.Second
)

// Tables are the tables of one family in one backend. go-iptables lists them and changes single
// rules. Several changes at once are applied by iptables-restore, which that library has not.
type Tables struct {
	*iptables.IPTables
	command string // such as iptables-nft
	legacy  bool
	Family  netobj.Family
	Servers []netip.AddrPort // who redirects one of these by a rule of its own is found
}

// Open finds the command, or returns an error that wraps exec.ErrNotFound.
func Open(command string, legacy bool, family netobj.Family, servers ...netip.AddrPort) (*Tables, error) {
	protocol := iptables.ProtocolIPv4
	if family == netobj.IPv6 {
		command, protocol = IP6Tables(command), iptables.ProtocolIPv6
	}
	if _, err := exec.LookPath(command + "-restore"); err != nil {
		return nil, err // says which
	}
	t, err := iptables.New(iptables.Path(command), iptables.IPFamily(protocol), iptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	return &Tables{IPTables: t, command: command, legacy: legacy, Family: family, Servers: servers}, nil
}

// IP6Tables is the command of the same backend for IPv6.
func IP6Tables(command string) string {
	dir, name := filepath.Split(command)
	return dir + strings.Replace(name, "iptables", "ip6tables", 1)
}

// Restore applies the text by one iptables-restore: --noflush leaves everybody else's rules alone.
func (x *Tables) Restore(ctx context.Context, text string) error {
	if text == "" {
		return nil
	}
	return retry(ctx, func() error {
		c := exec.CommandContext(ctx, x.command+"-restore", "--wait", fmt.Sprint(lockSeconds), "--noflush")
		c.Stdin = strings.NewReader(text)
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, out)
		}
		return nil
	})
}

// Has says whether there is such a table.
func (x *Tables) Has(table string) (bool, error) {
	text, err := x.tableFingerprint(table)
	return text != "", err
}

// hasChain says whether there is such a chain.
func (x *Tables) hasChain(ctx context.Context, table, chain string) (yes bool, err error) {
	if !x.legacy { // iptables-nft says of a chain that is not there what it says of one that it cannot list
		return nft.ChainExists(x.Family, table, chain)
	}
	if yes, err = x.Has(table); err == nil && yes {
		err = retry(ctx, func() (err error) { yes, err = x.ChainExists(table, chain); return err })
	}
	return yes, err
}

// ListRules returns the rules of a chain, without "-A CHAIN ", and whether there is such a chain.
func (x *Tables) ListRules(ctx context.Context, table, chain string) (rules []string, exists bool, err error) {
	if x.legacy {
		exists, err = x.Has(table) // iptables-legacy makes the table that it is to list
	} else {
		exists, err = x.hasChain(ctx, table, chain)
	}
	if err != nil || !exists {
		return nil, false, err
	}
	var lines []string
	err = retry(ctx, func() (err error) { lines, err = x.List(table, chain); return err })
	if failed := new(iptables.Error); errors.As(err, &failed) && failed.IsNotExist() {
		return nil, false, nil
	}
	for _, line := range lines {
		if rule, ok := strings.CutPrefix(line, "-A "+chain+" "); ok {
			// Some versions put comments and paths in quotation marks.
			rules = append(rules, quoted.ReplaceAllString(strings.TrimSpace(rule), "$1"))
		}
	}
	return rules, true, err
}

// quoted is a word in quotation marks that needs none.
var quoted = regexp.MustCompile(`"([^" ]*)"`)

// words splits a rule as a shell does. Only a program of xt_bpf has blanks between its marks.
func words(rule string) (all []string) {
	for i, part := range strings.Split(rule, `"`) {
		if i%2 == 1 {
			all = append(all, part)
		} else {
			all = append(all, strings.Fields(part)...)
		}
	}
	return all
}

// hasRule asks the kernel for one rule whose text was not found in the list: another version may
// print it in other words.
func (x *Tables) hasRule(ctx context.Context, table, chain, rule string) (yes bool, err error) {
	err = retry(ctx, func() (err error) { yes, err = x.Exists(table, chain, words(rule)...); return err })
	if exitStatus(err) == 2 { // it cannot even be said, such as an interface or a cgroup that is not there
		return false, nil
	}
	return yes, err
}

// retry repeats f while it says exit status 4, and makes plain what the kernel's refusal means.
func retry(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, lockTimeout, errors.New("still busy after "+lockTimeout.String()))
	defer cancel()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		if ctx.Err() != nil { // a command of go-iptables is not ended by it, so none is begun
			return context.Cause(ctx)
		}
		err := classify(oneLine(f()))
		if exitStatus(err) != 4 || errors.Is(err, fault.ErrPermission) || errors.Is(err, errRefused) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}

// ErrIncompatible is wrapped by errors of iptables-nft that cannot list a chain: it holds a rule
// that nft wrote. The rules of our own chains can still be changed and deleted.
var ErrIncompatible = errors.New("the chain holds rules that iptables cannot list")

// errRefused is wrapped by errors that status 4 brings and that waiting does not cure.
var errRefused = errors.New("the kernel refuses the rule")

// lineError is an error whose text is one line, as commands do not end theirs.
type lineError struct{ error }

func (e lineError) Error() string { return strings.Join(strings.Fields(e.error.Error()), " ") }
func (e lineError) Unwrap() error { return e.error }

func oneLine(err error) error {
	if err == nil {
		return nil
	}
	return lineError{err}
}

// exitStatus is that of the command behind err, -1 if there is none.
func exitStatus(err error) int {
	var failed *iptables.Error
	var run *exec.ExitError
	switch {
	case errors.As(err, &failed):
		return failed.ExitStatus()
	case errors.As(err, &run):
		return run.ExitCode()
	}
	return -1
}

// classify is the one place that reads error texts: iptables tells a lock that is held, a rule that
// the kernel does not take and a missing privilege by the same exit status, and only its words
// differ.
func classify(err error) error {
	if err == nil || errors.Is(err, fault.ErrPermission) {
		return err
	}
	text := err.Error()
	says := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
	}
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fault.Permission(err)
	case says("Permission denied", "Operation not permitted"):
		return fmt.Errorf("%w: %w", fault.ErrPermission, err)
	case says("Read-only file system"): // /run/xtables.lock, under ProtectSystem=strict
		return fmt.Errorf("%w: the file system is read-only here (a unit runs this by ExecStartPre=+): %w", errRefused, err)
	case exitStatus(err) == 1 && says("is incompatible, use 'nft' tool"):
		return fmt.Errorf("%w: %w", ErrIncompatible, err)
	case exitStatus(err) == 4 && says("Invalid argument", "No such file"):
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}

// IsLegacy says which backend a command is of. Its name tells, or that of the program behind its
// links; else it is asked.
func IsLegacy(command string) bool {
	for _, name := range []string{filepath.Base(command), program(command)} {
		switch {
		case strings.HasSuffix(name, "-legacy"), name == "xtables-legacy-multi":
			return true
		case strings.HasSuffix(name, "-nft"), name == "xtables-nft-multi":
			return false
		}
	}
	out, err := exec.Command(command, "--version").Output()
	return err == nil && !strings.Contains(string(out), "nf_tables")
}

// program is the name of the file behind a command's links, "" if it cannot be found.
func program(command string) string {
	path, err := exec.LookPath(command)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return ""
	}
	return filepath.Base(path)
}
