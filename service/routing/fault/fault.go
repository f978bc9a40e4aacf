// Package fault answers: what is wrong with the rules, and why can they not be changed?
//
// Its errors are what Check reports, and the sentinels that errors of all routing packages wrap.
package fault

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

var (
	// ErrMissing is wrapped by what Check returns when something that the Plan wants is not in the
	// kernel, or not as it should be. An error of Check that does not wrap it says that the kernel
	// could not be read.
	ErrMissing = errors.New("missing")
	// ErrForeign is wrapped when the address, the port, the chains or the redirection belong to
	// somebody else, as on GKE itself.
	ErrForeign = errors.New("belongs to somebody else")
	// ErrPermission is wrapped when the kernel does not let this process change the rules.
	ErrPermission = errors.New("needs root with CAP_NET_ADMIN " +
		"(on AKS with eBPF host routing a security module denies it even then: use another routing mode)")
)

// Permission says what the kernel's refusal means.
func Permission(err error) error {
	if (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)) && !errors.Is(err, ErrPermission) {
		return fmt.Errorf("%w: %w", ErrPermission, err)
	}
	return err
}

// Layers are where a fault can be: the words of the metric's label, so there are no more of them
// than these.
const (
	Rule      = "ip-rule"
	Address   = "ip-address"
	Route     = "ip-route"
	IPTables  = "iptables"
	IP6Tables = "ip6tables"
	NFTables  = "nftables"
	EBPF      = "ebpf"
)

// All are the layers.
var All = []string{Rule, Address, Route, IPTables, IP6Tables, NFTables, EBPF}

// Shared are those that no mode has for itself alone.
var Shared = []string{Rule, Address, Route}

// Fault is one thing that Check found missing, or too much.
type Fault struct {
	Layer, Text string
	Flushed     bool // without it no request arrives: that is not what a change of the Plan looks like
}

func (f *Fault) Error() string { return ErrMissing.Error() + ": " + f.Text }
func (f *Fault) Unwrap() error { return ErrMissing }

// Missing is a fault that Check reports.
func Missing(layer, format string, args ...any) error {
	return &Fault{Layer: layer, Text: fmt.Sprintf(format, args...)}
}

// Flushed marks the faults so.
func Flushed(errs []error) []error {
	for _, err := range errs {
		if f, ok := err.(*Fault); ok {
			f.Flushed = true
		}
	}
	return errs
}

// Layers are those of the faults, each once.
func Layers(errs []error) (found []string) {
	for _, err := range errs {
		if f, ok := err.(*Fault); ok && !slices.Contains(found, f.Layer) {
			found = append(found, f.Layer)
		}
	}
	return found
}
