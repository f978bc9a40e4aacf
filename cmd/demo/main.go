// Command demo shows the emulator at work: a node, pods and a stranger that are processes in cgroups and network namespaces, the real
// binary with its real rules, and stand-ins for the Kubernetes API, for Google and for a cloud's own metadata server that
// verify every signature and field. Everything is gone afterwards, and it says whether the node's rules are as before.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if isPod() {
		return
	}
	emulator := flag.String("emulator", "bin/gke-metadata-emulator", "the binary to show")
	keep := flag.Bool("keep", false, "leave everything standing until Ctrl-C, and say how to ask by hand")
	world := flag.String("world", "", "make only what surrounds the emulator, around a machine that was booted to be the node, and take orders at this directory's control.sock")
	probe := flag.String("probe", "", "with --world: load from two pods from the beginning to the end, written down second by second in this file")
	beside := flag.String("beside", "", "with --world: a link that the machine has already, and keeps")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: unknown argument %q\n", flag.Arg(0))
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	task := func() error { return run(ctx, os.Stdout, *emulator, *keep) }
	if *world != "" {
		task = func() error { return surround(ctx, *world, *beside, *probe) }
	}
	err := task()
	if ctx.Err() != nil && !*keep && *world == "" {
		os.Exit(130) // interrupted: whatever failed then failed for that
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
