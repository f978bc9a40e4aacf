# The targets for work on this repository: `make help` lists them. `make demo` shows the service at work; `make check` and `make test` test it.
# Targets that need Debian or Ubuntu packages install the missing ones (deps), and name them. On other distributions they name what is missing.
GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# Tests are built by the user who runs make, and run by root. What the tests themselves build goes into a build cache of root's own.
AS_ROOT := $(if $(SUDO),-exec "sudo -E env PATH=$(PATH) GOCACHE=/var/tmp/gke-metadata-emulator-test-cache")
# Most tests wait for the kernel, a process or a deadline, so more of them run at a time than there are processors.
SIDE_BY_SIDE := -p 3 -parallel 4
# By default each process with the race detector waits a second before it exits. Tests start hundreds of them.
RACE := GORACE=atexit_sleep_ms=0
UNITS   := $(notdir $(wildcard systemd/*.service systemd/*.path))
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(shell git rev-parse HEAD 2>/dev/null)

# Roots of Debian with systemd, for tests that need a chroot or boot a machine. A root is made once for all clones, and again
# when its recipe changes.
ROOTFS  ?= $(shell packaging/bed/rootfs --name)
RECIPES_ROOTFS ?= $(shell packaging/bed/rootfs --name recipes)
VM_ROOTFS ?= $(shell packaging/bed/rootfs --name vm)
# promtool tests the alerting rules.
PROMTOOL ?= $(shell .ci/promtool --name)

.PHONY: all help build install packages release repo deps demo check golden test test-kube test-node test-clients test-booted test-vm test-vagrant lint bench chaos sizing fuzz clean deps-demo deps-repo deps-vm deps-vagrant

all: build

help: ## prints this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done

build: bin/gke-metadata-emulator ## builds the binary, bin/gke-metadata-emulator

.PHONY: bin/gke-metadata-emulator bin/demo bin/bed bin/deb
bin/gke-metadata-emulator:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/gke-metadata-emulator

bin/demo:
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./cmd/demo

bin/bed: # two releases of the deb, for upgrades and downgrades
	@rm -rf $@
	packaging/bed/older $@/tree
	FORMATS=deb VERSION=v0.9.0 $@/tree/packaging/build $@/old $(shell $(GO) env GOARCH)
	FORMATS=deb VERSION=v1.0.0 packaging/build $@/new $(shell $(GO) env GOARCH)
	for v in old new; do mv $@/$$v/*.deb $@/$$v.deb || exit; done
	rm -rf $@/tree $@/old $@/new

bin/deb: # the deb alone
	@rm -rf $@
	FORMATS=deb VERSION=v1.0.0 packaging/build $@ $(shell $(GO) env GOARCH)

install: build ## installs the files of the packages below DESTDIR; enables and starts nothing
	install -D -m 755 bin/gke-metadata-emulator $(DESTDIR)/usr/bin/gke-metadata-emulator
	for unit in gke-metadata-emulator.socket $(UNITS); do install -D -m 644 systemd/$$unit $(DESTDIR)/usr/lib/systemd/system/$$unit || exit; done
	install -D -m 755 systemd/generator $(DESTDIR)/usr/lib/systemd/system-generators/gke-metadata-emulator
	install -D -m 644 systemd/sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/gke-metadata-emulator.conf
	install -D -m 644 systemd/tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/gke-metadata-emulator.conf
	install -D -m 644 systemd/modules-load.conf $(DESTDIR)/usr/lib/modules-load.d/gke-metadata-emulator.conf
	install -D -m 644 systemd/catalog $(DESTDIR)/usr/lib/systemd/catalog/gke-metadata-emulator.catalog
	install -D -m 644 systemd/preset $(DESTDIR)/usr/lib/systemd/system-preset/90-gke-metadata-emulator.preset
	install -d -m 755 $(DESTDIR)/etc/gke-metadata-emulator

packages: ## builds deb and rpm for this machine's architecture, into bin/packages
	@rm -rf bin/packages
	packaging/build bin/packages $(shell $(GO) env GOARCH)

release: ## builds packages and a tarball for each architecture, SBOMs and SHA256SUMS, into bin/release; GPG_KEY=… signs
	@rm -rf bin/release
	FORMATS="deb rpm apk archlinux tar" GPG_KEY="$(GPG_KEY)" packaging/build bin/release amd64 arm64

repo: deps-repo release ## makes an apt and a dnf repository of the release, in bin/repo, for any web server; GPG_KEY=… signs
	@rm -rf bin/repo
	GPG_KEY="$(GPG_KEY)" packaging/repo bin/release bin/repo

deps: ## installs the Debian or Ubuntu packages that test and lint need
	@.ci/deps all

deps-demo deps-repo deps-vm deps-vagrant: deps-%:
	@.ci/deps $*

demo: deps-demo build bin/demo ## runs the real service on a node in namespaces, with pods that are processes; DEMO="--keep" keeps it running
	$(SUDO) bin/demo --emulator bin/gke-metadata-emulator $(DEMO)

$(ROOTFS):
	$(SUDO) packaging/bed/rootfs $@

$(PROMTOOL):
	.ci/promtool

# Roots with the tools of image builders, and with a kernel. Their packages are not installed on the machine that runs the tests.
$(RECIPES_ROOTFS):
	$(SUDO) packaging/bed/rootfs $@ recipes

$(VM_ROOTFS):
	$(SUDO) packaging/bed/rootfs $@ vm

check: ## runs all that needs neither root nor network: gofmt, vet, staticcheck, documents, unit and script tests
	@.ci/check

golden: ## updates generated files: documents, manual pages, reference configuration, golden files of scripts
	@.ci/golden

test: deps $(ROOTFS) $(RECIPES_ROOTFS) $(PROMTOOL) ## runs all Go tests with the race detector: units, scripts, fuzz corpus, routing modes in network namespaces, packages
	GME_TEST_ROOTFS="$(ROOTFS)" GME_TEST_RECIPES="$(RECIPES_ROOTFS)" GME_TEST_PROMTOOL="$(PROMTOOL)" $(RACE) \
		$(GO) run ./.ci/progress $(GO) test -json -race -count=1 -timeout 20m $(SIDE_BY_SIDE) $(AS_ROOT) ./...

test-kube: ## tests the stand-in for the API server and each rule of the shipped RBAC against a real etcd and kube-apiserver
	@GO="$(GO)" CI="$(CI)" test/kube/run

test-node: deps bin/deb ## tests the deb on a booted Kubernetes node with kubelet, containerd and kube-proxy; NODE_PARTS="first kinds" runs some parts
	@$(SUDO) env PATH="$(PATH)" GO="$(GO)" NODE_PARTS="$(NODE_PARTS)" NODE_IPTABLES="$(NODE_IPTABLES)" CI="$(CI)" test/node/run

test-clients: deps build ## tests client libraries in pods, and compares the tables in docs/clients.md; CLIENTS="python go-auth" runs some of them
	@$(SUDO) env PATH="$(PATH)" GO="$(GO)" CLIENTS="$(CLIENTS)" UPDATE_GOLDEN="$(UPDATE_GOLDEN)" CI="$(CI)" test/clients/run

test-booted: deps bin/demo bin/bed $(ROOTFS) ## tests the deb under load in booted containers with systemd, on both iptables backends; BED_PARTS="install stop" runs some parts
	$(SUDO) env BED_ROOTFS="$(ROOTFS)" BED_IPTABLES="$(BED_IPTABLES)" BED_PARTS="$(BED_PARTS)" CI="$(CI)" packaging/bed/run

test-vm: deps-vm bin/demo bin/bed $(VM_ROOTFS) ## tests the deb in virtual machines: the parts of test-booted, and OOM kills, limits and reboots
	$(SUDO) env BED_ROOTFS="$(VM_ROOTFS)" BED_RUNNER=packaging/bed/vm BED_IPTABLES="$(or $(BED_IPTABLES),nft)" BED_PARTS="$(BED_PARTS)" CI="$(CI)" packaging/bed/run

test-vagrant: deps-vagrant bin/demo bin/bed $(VM_ROOTFS) ## tests the deb in a Vagrant box with libvirt; BOX=generic/ubuntu2204 takes a public box with apt
	$(SUDO) env BED_ROOTFS="$(VM_ROOTFS)" BED_RUNNER=vagrant/vagrant BOX="$(BOX)" BED_IPTABLES="$(or $(BED_IPTABLES),nft)" BED_PARTS="$(or $(BED_PARTS),configured limits reboot)" CI="$(CI)" packaging/bed/run

lint: deps ## runs gofmt, go vet, staticcheck, govulncheck and shellcheck, and checks go.mod, terms and columns
	@.ci/lint

bench: ## runs the benchmarks of every package; one compares cached tokens with a bare net/http server
	$(GO) test -run '^$$' -bench . -benchmem -timeout 30m ./service/... 

chaos: ## prints, for each load of a pod, its effect on other pods: latency, memory, stop, recovery
	GME_CHAOS=1 $(GO) test -count=1 -timeout 30m -v $(AS_ROOT) -run '^TestChaos$$' ./service

sizing: ## prints the table of docs/sizing.md: memory and CPU with 10, 110 and 500 pods, and 10,000 connections
	GME_SIZING=1 $(GO) test -timeout 20m $(AS_ROOT) -run '^$$' -bench '^BenchmarkSizing$$' -benchtime 1x ./service

fuzz: ## runs each fuzz target for FUZZTIME (30s)
	@.ci/fuzz $(or $(FUZZTIME),30s)

clean: ## removes bin
	rm -rf bin
