package routing

import (
	"fmt"
	"slices"
)

// Layers are where a fault can be: the words of the metric's label, so there are no more of them
// than these.
const (
	layerRule      = "ip-rule"
	layerAddress   = "ip-address"
	layerRoute     = "ip-route"
	layerIPTables  = "iptables"
	layerIP6Tables = "ip6tables"
	layerNFTables  = "nftables"
	layerEBPF      = "ebpf"
)

var everyLayer = []string{layerRule, layerAddress, layerRoute, layerIPTables, layerIP6Tables, layerNFTables, layerEBPF}

// sharedLayers are those that no mode has for itself alone.
var sharedLayers = []string{layerRule, layerAddress, layerRoute}

// fault is one thing that Check found missing, or too much.
type fault struct {
	layer, text string
	flushed     bool // without it no request arrives: that is not what a change of the Plan looks like
}

func (f *fault) Error() string { return ErrMissing.Error() + ": " + f.text }
func (f *fault) Unwrap() error { return ErrMissing }

// missing is a fault that Check reports.
func missing(layer, format string, args ...any) error {
	return &fault{layer: layer, text: fmt.Sprintf(format, args...)}
}

// flushed marks the faults so.
func flushed(errs []error) []error {
	for _, err := range errs {
		if f, ok := err.(*fault); ok {
			f.flushed = true
		}
	}
	return errs
}

// layers are those of the faults, each once.
func layers(errs []error) (found []string) {
	for _, err := range errs {
		if f, ok := err.(*fault); ok && !slices.Contains(found, f.layer) {
			found = append(found, f.layer)
		}
	}
	return found
}
