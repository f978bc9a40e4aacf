// Command ring has Google's client libraries, as their package managers have them, ask the real
// service: `make test-clients`. Each is a process in a pod: a network namespace behind the real
// rules, with a root of its own. DNS has the name, refuses, or says at once that there is no such
// name. What each can do is a table in docs/clients.md. A run fails where it sees anything else
// than the table says, and whenever a pod gets an identity that is not its own.
//
// UPDATE_GOLDEN=1 writes the table anew.
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
	flag.StringVar(&r.binary, "emulator", "", "the service's binary")
	flag.StringVar(&r.root, "root", "", "the pods' root")
	flag.StringVar(&r.drivers, "drivers", "", "the directory of the drivers")
	flag.StringVar(&r.npm, "npm", "", "the directory of node_modules")
	flag.StringVar(&r.page, "page", "", "docs/clients.md")
	flag.StringVar(&r.dir, "dir", "", "gets files that the ring makes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := r.run(ctx, chosen(flag.Args())); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "test-clients:", err)
		os.Exit(1)
	}
}
