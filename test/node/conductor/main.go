// Command conductor runs test-node inside the machine that test/node/run boots.
//
//	conductor image FILE      writes the image of the pods, from the program asker beside this one; runs anywhere
//	conductor world           runs the stand-in for Google, and receives the pods' reports
//	conductor join            lets kubelet join, and creates pods before kubelet starts
//	conductor run [PART...]   runs the parts, default all; exit status 0: every check passed
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Constants of the machine: see test/node/tree.
const (
	nodeAddress = "192.0.2.10"
	worldURL    = "http://" + nodeAddress + ":9999"
	googleAddr  = "127.0.0.1:8443"
	googleCA    = "/etc/node-google-ca.pem"
	serverURL   = "https://" + nodeAddress + ":6443"
	clusterDir  = "/var/lib/controlplane"
	worldDir    = "/var/lib/world"
	config      = "/etc/gke-metadata-emulator/config.yaml"
	cni         = "/etc/cni/net.d/10-pods.conflist"
	podImage    = "node.test/asker:1"
	provider    = "projects/123456789012/locations/global/workloadIdentityPools/my-pool/providers/my-cluster"
	audience    = "//iam.googleapis.com/" + provider
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch args := append(os.Args[1:], "", ""); args[0] {
	case "image":
		err = writeImage(args[1])
	case "world":
		err = world(ctx)
	case "join":
		err = join(ctx)
	case "run":
		err = run(ctx, os.Args[2:])
	default:
		err = errors.New("usage: conductor image FILE | world | join | run [PART...]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "conductor:", err)
		os.Exit(1)
	}
}
