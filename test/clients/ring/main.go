// Command ring runs Google's client libraries, from their package managers, against the real
// service (`make test-clients`). Each is a process in a pod: a network namespace behind the real
// rules, with a root of its own. DNS has the name, refuses, or answers NXDOMAIN at once. The
// results are the tables in docs/clients.md. A run fails if a result differs from the tables, and
// if a pod gets an identity that is not its own.
//
// UPDATE_GOLDEN=1 updates the tables.
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
	r := &ring{}
	flag.StringVar(&r.binary, "emulator", "", "`path` of the service's binary")
	flag.StringVar(&r.root, "root", "", "`directory` that is the pods' root")
	flag.StringVar(&r.drivers, "drivers", "", "`directory` of the drivers")
	flag.StringVar(&r.npm, "npm", "", "`directory` of node_modules")
	flag.StringVar(&r.page, "page", "", "`path` of docs/clients.md")
	flag.StringVar(&r.dir, "dir", "", "`directory` for files of the run")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := r.run(ctx, chosen(flag.Args())); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "test-clients:", err)
		os.Exit(1)
	}
}
