package xtables

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// each reads the state of each chain, by its name. It takes the time of two commands for a chain,
// so that as many are read at once as there are processors. The legacy backend has one lock for
// all commands, and old versions of it poll that lock once a second. Of several errors it returns
// one.
func (x *Tables) each(chains []Chain, read func(Chain) (ChainState, error)) (map[string]ChainState, error) {
	states := make([]ChainState, len(chains))
	one := func(i int) (err error) { states[i], err = read(chains[i]); return err }
	var err error
	if x.legacy || !oneNamespace() {
		for i := 0; i < len(chains) && err == nil; i++ {
			err = one(i)
		}
	} else {
		var group errgroup.Group
		group.SetLimit(runtime.GOMAXPROCS(0))
		for i := range chains {
			group.Go(func() error { return one(i) })
		}
		err = group.Wait()
	}
	if err != nil {
		return nil, err
	}
	byName := map[string]ChainState{}
	for i, c := range chains {
		byName[c.Name] = states[i]
	}
	return byName, nil
}

// oneNamespace reports whether all threads of this process are in one network namespace, so that
// any of them can read what the calling one would. They are not where doctor connects from a
// namespace of its own, and in tests.
func oneNamespace() bool {
	links, _ := filepath.Glob("/proc/self/task/*/ns/net") // the pattern is a constant
	namespaces := map[string]bool{}
	for _, link := range links {
		namespace, err := os.Readlink(link)
		if errors.Is(err, fs.ErrNotExist) {
			continue // that thread has ended
		} else if err != nil {
			return false
		}
		namespaces[namespace] = true
	}
	return len(namespaces) == 1
}
