// Command demo shows the service at work. A node, pods and a pod that Kubernetes does not know are
// processes in cgroups and network namespaces. The real binary runs with its real rules. Stand-ins
// for the Kubernetes API, for Google and for a cloud's metadata server verify every signature and
// field. At the end demo removes everything, and checks that the node's rules are as before.
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
	emulator := flag.String("emulator", "bin/gke-metadata-emulator", "the binary to run")
	keep := flag.Bool("keep", false, "keep everything running until Ctrl-C, and print commands to try")
	world := flag.String("world", "", "make only pods and stand-ins, on a machine that was booted as the "+
		"node, and serve commands at control.sock in this directory")
	probe := flag.String("probe", "", "with --world: send requests from two pods all the time, and record the "+
		"outcomes of each second in this file")
	beside := flag.String("beside", "", "with --world: a link of the machine that is not changed")
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
		os.Exit(130) // interrupted, which explains any error
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
