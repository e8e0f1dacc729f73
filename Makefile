# Needs Go, git and make; everything else is built from Go modules.
BIN      := $(CURDIR)/.bin
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)
KUBE     := 1.37.2
TOOLFLAGS := -mod=readonly -trimpath
ETCDS    := 3.5 3.6 3.7 3.8
ETCDUTLS := 3.5 3.6 3.7
FUZZTIME ?= 1m
export ETCD_KMS_PROXY_BIN := $(BIN)
# The version is from git describe above. Go's own version stamp fails in a checkout that belongs to
# another user.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

# The container image. SOURCE_DATE_EPOCH is the time of the commit, so that the same commit gives the
# same image.
IMAGE    ?= etcd-kms-proxy:local
DOCKER   ?= docker
REVISION := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
EPOCH    := $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
IMAGEFLAGS ?=
COMPOSETESTFLAGS ?=

.PHONY: image image-offline clean-image-offline compose-test kubeadm-test plugins-test help build run test unit interop e2e soak reliability scoreboard scoreboard-kubernetes compatibility bench bench-kubernetes profile fuzz lint vuln docs tools tools-etcd tools-etcd-3.4 tools-kube clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F':.*## ' '/^[a-z][a-z0-9-]*:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## the proxy, to .bin/etcd-kms-proxy
	@mkdir -p $(BIN)
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o $(BIN)/etcd-kms-proxy ./cmd/etcd-kms-proxy

image: ## the container image, IMAGE (etcd-kms-proxy:local); ARCH=arm64 for another architecture; needs Docker
	DOCKER_BUILDKIT=1 SOURCE_DATE_EPOCH=$(EPOCH) $(DOCKER) build $(if $(ARCH),--platform linux/$(ARCH)) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --build-arg SOURCE_DATE_EPOCH=$(EPOCH) $(IMAGEFLAGS) -t $(IMAGE) .

image-offline: $(BIN)/etcd-3.7 $(BIN)/etcdctl-3.7 ## the same without a registry: with stand-ins for the base images, built here
	DOCKER=$(DOCKER) sh deploy/image/stand-ins.sh
	$(MAKE) image

clean-image-offline: ## remove the stand-ins of image-offline
	@for id in $$($(DOCKER) images -q --filter label=io.etcd-kms-proxy.stand-in); do $(DOCKER) rmi -f $$id; done

run: build $(BIN)/etcd-3.7 $(BIN)/etcdctl-3.7 ## a demo: a real etcd and the proxy on loopback, and a value as each of them shows it
	@sh deploy/demo.sh

test: unit interop build tools ## every test at its short size, with a real etcd and a real kube-apiserver
	cd test && go test -short -count=1 -timeout 40m ./...
	cd test/bench && go test -short -count=1 -timeout 10m ./...

unit: ## the tests of the packages, with the race detector if there is a C compiler
	go vet ./...
	@command -v $$(go env CC) >/dev/null || echo "without the race detector: it needs a C compiler"
	go test $$(if command -v $$(go env CC) >/dev/null; then echo -race; fi) -timeout 15m ./...
	PROXY_TEST_CALLS=handled go test -count=1 ./proxy
	go test -run Allocations ./proxy ./proxy/etcdwire ./proxy/http2conn

interop: ## our stored format against k8s.io/apiserver's
	cd test/interop && go test -timeout 15m ./...

e2e: build tools ## all versions of etcd, transports and API server setups, and whether docs/design/compatibility.md is true
	@rm -rf $(BIN)/compatibility && mkdir -p $(BIN)/compatibility
	cd test && COMPATIBILITY_RESULTS=$(BIN)/compatibility go test -count=1 -timeout 60m ./...
	cd test && go run ./compatibility -results $(BIN)/compatibility -check ../docs/design/compatibility.md

compatibility: ## generate the tables of docs/design/compatibility.md from the last make e2e
	cd test && go run ./compatibility -results $(BIN)/compatibility -write ../docs/design/compatibility.md

soak: build tools ## hours: load while the KMS fails, memory over an hour, 10,000 connections, a million values, 100 proxies, ten runs of a cluster with 20,000 Secrets, linearizability, random sequences
	COORDINATION_CALLS=all go test -count=1 ./lifecycle/coordination
	cd test && SOAK=10m go test -count=1 -timeout 30m -skip Growth ./soak
	cd test && SOAK=60m go test -count=1 -v -timeout 70m -run Growth ./soak
	cd test && SCALE_CONNECTIONS=10000 SCALE_TIME=10m SCALE_VALUES=1000000 SCALE_PROXIES=100 go test -count=1 -timeout 60m ./scale
	cd test && RESTART_RATE=5000 go test -count=1 -timeout 20m -run Restart ./upgrade
	cd test && SOAK=10m go test -count=1 -timeout 30m -run 'Calls$$' ./plugins
	cd test && LIMITS_ANSWER_MB=1000 go test -count=1 -timeout 20m -run LargeAnswers ./limits
	cd test && LINEAR_ROUNDS=60 go test -count=1 -timeout 60m ./linear
	cd test && DIFFERENTIAL_SEQUENCES=20000 go test -count=1 -timeout 5h -run 'RandomSequences|Model$$' ./differential
	cd test && LIFE_SECRETS=20000 LIFE_ROUNDS=10 go test -count=1 -timeout 4h -run 'Life$$' ./reencrypt

RELIABILITY ?= 3h

reliability: build tools-etcd ## faults of processes, networks, disks and clocks for RELIABILITY (3h), and the figures in docs/design/reliability.md; full disks need root
	cd test && RELIABILITY=$(RELIABILITY) RELIABILITY_RESULTS=$(BIN)/reliability.json RELIABILITY_PAGE=$(CURDIR)/docs/design/reliability.md go test -count=1 -v -timeout 24h -run Reliability ./reliability

scoreboard: build $(BIN)/etcd-3.7 $(BIN)/etcd-3.6 $(BIN)/etcdctl-3.7 $(BIN)/etcdutl-3.7 ## etcd's own client tests, with a proxy that encrypts every key in front of each member (50 to 70 minutes); SCOREBOARD_RUN, SCOREBOARD_SHARD=1/3
	cd test/scoreboard && go test -count=1 -v -timeout 170m .

scoreboard-kubernetes: build ## Kubernetes' storage tests, with a proxy that encrypts every key in front of each etcd; the same variables
	cd test/scoreboard && go test -count=1 -v -timeout 90m ./kubernetes

compose-test: image-offline build $(BIN)/docker-compose-v2 ## docker-compose.yml on a real engine, with failures; needs Docker
	cd test && COMPOSE_TEST=1 DOCKER=$(DOCKER) go test -count=1 -timeout 25m $(COMPOSETESTFLAGS) ./compose

kubeadm-test: build tools-kube $(BIN)/kubelet $(BIN)/kube-controller-manager $(BIN)/kube-scheduler $(BIN)/etcd-3.7 $(BIN)/etcdctl-3.7 ## whole kubeadm clusters, with kubelet and containerd, on this machine; needs root and Debian's containerd (a quarter of an hour, and more the first time)
	cd test && KUBEADM_INIT=1 go test -count=1 -v -timeout 60m -run 'Init|Cluster' ./kubeadm

plugins-test: build $(BIN)/etcd-3.7 ## public KMS v2 plugins behind the proxy, built from their own repositories; needs a C compiler, softhsm2 and opensc (five minutes)
	sh test/plugins/build.sh $(BIN)
	cd test && unshare --net --map-root-user sh -c 'ip link set lo up && go test -count=1 -v -timeout 20m -run TestPlugins ./plugins'

bench: build $(BIN)/etcd-3.7 ## CPU and throughput compared with etcd, its grpc-proxy and a TCP relay; encryption compared with kube-apiserver; reencrypt compared with a loop
	cd test/bench && go run . $(BENCHFLAGS)
	cd test/interop && go test -run '^$$' -bench . ./... $(if $(findstring json,$(BENCHFLAGS)),>&2)
	cd test && go test -run '^$$' -bench Reencrypt -benchtime 1x -timeout 30m ./reencrypt $(if $(findstring json,$(BENCHFLAGS)),>&2)

bench-kubernetes: build tools-kube ## a real kube-apiserver without encryption, with its own KMS v2, and through the proxy (ten minutes)
	cd test && BENCH_KUBERNETES=1 go test -count=1 -v -timeout 40m ./benchkubernetes

PROFILEROW  ?= ^get 256 B, 64 clients
PROFILEOF   ?= encrypting

profile: $(BIN)/etcd-3.7 ## CPU and allocation profiles of the proxy under one row of make bench, to .bin/profile; PROFILEROW, PROFILEOF
	@mkdir -p $(BIN)/profile
	CGO_ENABLED=0 go build -tags profile -trimpath -o $(BIN)/profile/etcd-kms-proxy ./cmd/etcd-kms-proxy
	@ln -sf $(BIN)/etcd-3.7 $(BIN)/profile/etcd-3.7
	cd test/bench && go run . -bin $(BIN)/profile -profile $(BIN)/profile -rows '$(PROFILEROW)' -subjects $(PROFILEOF) -duration 10s
	go tool pprof -top -nodecount 40 $(BIN)/profile/etcd-kms-proxy $(BIN)/profile/cpu.pprof
	go tool pprof -top -sample_index=alloc_objects -nodecount 20 $(BIN)/profile/etcd-kms-proxy $(BIN)/profile/allocs.pprof

fuzz: ## every fuzz target for FUZZTIME (default 1m)
	@set -e; for f in $$(grep -rl --include='*_test.go' '^func Fuzz' config crypto internal kmsclient lifecycle proxy test/interop); do \
	  for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$f); do \
	    echo "== $$(dirname $$f) $$t"; (cd $$(dirname $$f) && go test -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) .); done; done

lint: $(BIN)/golangci-lint ## golangci-lint over every module
	$(BIN)/golangci-lint run --allow-parallel-runners ./...
	cd test && $(BIN)/golangci-lint run --allow-parallel-runners --config ../.golangci.yml ./...
	cd test/interop && $(BIN)/golangci-lint run --allow-parallel-runners --config ../../.golangci.yml ./...
	cd test/bench && $(BIN)/golangci-lint run --allow-parallel-runners --config ../../.golangci.yml ./...
	cd test/scoreboard && $(BIN)/golangci-lint run --allow-parallel-runners --config ../../.golangci.yml ./...

VULNDB ?= https://vuln.go.dev
vuln: $(BIN)/govulncheck ## known vulnerabilities that the product can reach; VULNDB=file:///… for a copy of the database
	@$(BIN)/govulncheck -db $(VULNDB) ./... || { code=$$?; test $$code = 3 || \
	  echo "error: nothing was checked, for the reason above: the vulnerability database at $(VULNDB) must be reachable" >&2; exit $$code; }

docs: ## regenerate the pages of docs/reference that come from the code: configuration, commands, metrics
	go generate ./config
	go test ./internal/cli ./internal/server -run '^TestReference$$' -args -update-docs

tools: tools-etcd tools-kube $(BIN)/kine $(BIN)/h2spec $(BIN)/nfpm $(BIN)/cyclonedx-gomod $(if $(shell command -v npm 2>/dev/null),$(BIN)/node) ## the etcds, kube-apiserver and other programs that the tests start

tools-etcd: $(ETCDS:%=$(BIN)/etcd-%) $(ETCDS:%=$(BIN)/etcdctl-%) $(ETCDUTLS:%=$(BIN)/etcdutl-%)

tools-kube: $(BIN)/kube-apiserver $(BIN)/kubectl $(BIN)/kubeadm

$(BIN)/etcd-%: test/tools/etcd-%/go.sum
	@mkdir -p $(BIN); echo "building etcd $* from Go modules (about a minute the first time)"
	cd test/tools/etcd-$* && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w" -o $@ go.etcd.io/etcd/server/v3

# An etcd 3.4 is not built but extracted from a package of Debian 12, which is not installed. Tests
# skip it if it is missing.
tools-etcd-3.4: $(BIN)/etcd-3.4

$(BIN)/etcd-3.4:
	@mkdir -p $(BIN)/etcd-3.4.deb
	cd $(BIN)/etcd-3.4.deb && apt-get download -q etcd-server && dpkg-deb -x etcd-server_3.4.*.deb . && mv usr/bin/etcd $@
	@rm -r $(BIN)/etcd-3.4.deb

$(BIN)/etcdctl-%: test/tools/etcd-%/go.sum
	@mkdir -p $(BIN); echo "building etcdctl $* from Go modules"
	cd test/tools/etcd-$* && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w" -o $@ go.etcd.io/etcd/etcdctl/v3

$(BIN)/etcdutl-%: test/tools/etcd-%/go.sum
	@mkdir -p $(BIN); echo "building etcdutl $* from Go modules"
	cd test/tools/etcd-$* && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w" -o $@ go.etcd.io/etcd/etcdutl/v3

$(BIN)/kube%: test/tools/kube-apiserver/go.sum
	@mkdir -p $(BIN); echo "building kube$* $(KUBE) from Go modules (kube-apiserver: four to twenty minutes the first time)"
	cd test/tools/kube-apiserver && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=v$(KUBE)" -o $@ k8s.io/kubernetes/cmd/kube$*

$(BIN)/kine: test/tools/kine/go.sum
	@mkdir -p $(BIN); echo "building kine from Go modules (two to four minutes the first time)"
	cd test/tools/kine && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w" -o $@ github.com/k3s-io/kine

$(BIN)/h2spec: test/tools/h2spec/go.sum
	@mkdir -p $(BIN)
	cd test/tools/h2spec && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w" -o $@ github.com/summerwind/h2spec/cmd/h2spec

$(BIN)/node: test/tools/node/package-lock.json test/tools/node/package.json
	@mkdir -p $@
	cp test/tools/node/package.json test/tools/node/package-lock.json $@
	cd $@ && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

$(BIN)/docker-compose-v2: test/tools/compose/go.sum
	@mkdir -p $(BIN); echo "building Docker Compose v2 from Go modules"
	cd test/tools/compose && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w -X github.com/docker/compose/v2/internal.Version=$$(go list -m -f '{{.Version}}' github.com/docker/compose/v2)" -o $@ github.com/docker/compose/v2/cmd

$(BIN)/golangci-lint: test/tools/lint/go.sum
	@mkdir -p $(BIN)
	cd test/tools/lint && go build $(TOOLFLAGS) -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(BIN)/govulncheck: test/tools/vuln/go.sum
	@mkdir -p $(BIN)
	cd test/tools/vuln && CGO_ENABLED=0 go build $(TOOLFLAGS) -ldflags "-s -w" -o $@ golang.org/x/vuln/cmd/govulncheck

clean: ## remove what was built and the demo's data
	rm -rf $(BIN) $(CURDIR)/.run

# Packages and releases. The version is the newest one of CHANGELOG.md; the time stamps in all
# files are those of the commit, so the same commit gives the same bytes.
RELEASE := $(shell sed -n 's/^\#\# \([0-9][0-9.]*\).*/\1/p' CHANGELOG.md | head -n 1)
EPOCH   := $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
ARCHS   := amd64 arm64
DIST    := $(BIN)/dist

.PHONY: packages release
release: packages ## tarballs, deb and rpm packages, an SBOM and checksums, to .bin/dist
	cd $(DIST) && sha256sum *.tar.gz *.deb *.rpm *.cdx.json >SHA256SUMS

packages: $(BIN)/nfpm $(BIN)/cyclonedx-gomod ## what make release checksums
	@rm -rf $(DIST) && mkdir -p $(DIST)
	sh deploy/packages/build.sh $(RELEASE) $(EPOCH) $(BIN) $(DIST) $(ARCHS)

$(BIN)/nfpm: test/tools/nfpm/go.sum
	@mkdir -p $(BIN)
	cd test/tools/nfpm && CGO_ENABLED=0 go build $(TOOLFLAGS) -o $@ github.com/goreleaser/nfpm/v2/cmd/nfpm

$(BIN)/cyclonedx-gomod: test/tools/sbom/go.sum
	@mkdir -p $(BIN)
	cd test/tools/sbom && CGO_ENABLED=0 go build $(TOOLFLAGS) -o $@ github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
