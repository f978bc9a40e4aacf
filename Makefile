# Everything that a clone needs is here: `make demo` shows the product at work, `make test` says whether it works.
# Targets that need Debian or Ubuntu packages install the missing ones (deps), and say which; elsewhere they say what is lacking.
GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# Tests are built by whoever types make and run by root; what they build themselves goes into a cache of root's own.
AS_ROOT := $(if $(SUDO),-exec "sudo -E env PATH=$(PATH) GOCACHE=/var/tmp/gke-metadata-emulator-test-cache")
LDFLAGS := -s -w -X main.version=$(VERSION)

.PHONY: all build packages release deps demo test lint bench fuzz clean

all: build

build: bin/gke-metadata-emulator ## the binary

.PHONY: bin/gke-metadata-emulator bin/demo
bin/gke-metadata-emulator:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/gke-metadata-emulator

bin/demo:
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./cmd/demo

packages: ## deb and rpm for this machine's architecture, into bin/packages
	@rm -rf bin/packages
	packaging/build bin/packages $(shell $(GO) env GOARCH)

release: ## every package for every architecture, SBOMs and SHA256SUMS, into bin/release; the same bytes for the same commit
	@rm -rf bin/release
	FORMATS="deb rpm apk archlinux" packaging/build bin/release amd64 arm64

deps: ## what demo, test and lint need of the machine
	@.ci/deps

demo: deps build bin/demo ## two pods, a node, real rules, real exchanges; DEMO="--keep" leaves it standing
	$(SUDO) bin/demo --emulator bin/gke-metadata-emulator $(DEMO)

bin/rootfs.tar.zst:
	$(SUDO) .ci/rootfs $@

test: deps bin/rootfs.tar.zst ## unit, script, fuzz corpus, namespaces on both iptables backends, packages; with the race detector
	GME_TEST_ROOTFS="$(CURDIR)/bin/rootfs.tar.zst" $(GO) test -race -timeout 20m $(AS_ROOT) ./...

lint: deps ## gofmt, go vet, staticcheck, govulncheck, shellcheck, go.mod
	@.ci/lint

bench: ## cached tokens against a bare net/http server, and the benchmarks of every package
	$(GO) test -run '^$$' -bench . -benchmem -timeout 30m ./service/... 

fuzz: ## each fuzz target for FUZZTIME
	@.ci/fuzz $(or $(FUZZTIME),30s)

clean:
	rm -rf bin
