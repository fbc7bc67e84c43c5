# weir: `make help` lists what can be made.

SHELL := /bin/bash
GO ?= go
# Weir is built with this Go wherever it is built, which the go command gets if
# it is another: `make vulncheck` finds nothing in its standard library.
export GOTOOLCHAIN := go1.27.3
# All is compiled in one way, so that vet, the tests, weir and the tools that the
# tests build have one cache.
export GOFLAGS := $(strip $(filter-out -trimpath,$(GOFLAGS)) -trimpath)
export CGO_ENABLED := 0
BENCH ?= .
ORACLE_SEED ?= 1
TWINS_FOR ?= 30m
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
# A version as charts and images have it. What has no tag is older than all that have.
RELEASE = $(if $(filter v%,$(VERSION)),$(VERSION:v%=%),0.0.0-$(VERSION))
DIST ?= dist
ROOTS ?= /etc/ssl/certs/ca-certificates.crt
BUILD = $(GO) build -ldflags "-s -w -X main.version=$(VERSION)"
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
AS_ROOT = $(SUDO) env PATH="$$PATH" GOTOOLCHAIN=$(GOTOOLCHAIN) GOFLAGS="$(GOFLAGS)" CGO_ENABLED=$(CGO_ENABLED)
APT = $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get

# Debian packages: what running needs, what the tests drive, what generates and checks.
RUN_PACKAGES = ca-certificates
TEST_PACKAGES = docker.io containerd runc skopeo podman buildah iproute2 iptables openssl systemd gcc libc6-dev chromium curl \
	rootlesskit slirp4netns uidmap zlib1g-dev
KUBERNETES_PACKAGES = etcd-server containernetworking-plugins busybox-static prometheus ipset
KERNELS_PACKAGES = cpio kmod
DEV_PACKAGES = clang-19 llvm-19 libbpf-dev linux-libc-dev bpftool
BENCH_PACKAGES = nginx-light wrk docker-registry
CYCLONEDX = github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0
HELM ?= $(GO) run helm.sh/helm/v4/cmd/helm@v4.3.1
COSIGN ?= $(GO) run github.com/sigstore/cosign/v3/cmd/cosign@v3.1.3
ACTIONLINT = github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0
VULNDB = v0.0.0-20261105234957-e22db6528018
GOLANGCI_LINT = github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: help build dist publish sign run test package-tests system-tests test-kubernetes test-kernels test-arm64 manifest bench bench-parts soak chaos twins oracle race scale lint vulncheck generate check-generated fuzz demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build bin/weir, a static binary
	$(BUILD) -o bin/weir ./agent/weir

dist: ## build what a release has: binaries for amd64 and arm64, what they are made of (CycloneDX), the image, the chart that has it from REGISTRY, sums
	rm -rf $(DIST) && mkdir $(DIST)
	for arch in amd64 arm64; do \
		GOARCH=$$arch $(BUILD) -o $(DIST)/weir-linux-$$arch ./agent/weir && \
		$(GO) run $(CYCLONEDX) bin -json -noserial -version $(VERSION) -output $(DIST)/weir-linux-$$arch.cdx.json $(DIST)/weir-linux-$$arch && \
		sed -i '/^    "timestamp": /d' $(DIST)/weir-linux-$$arch.cdx.json || exit 1; \
	done
	$(GO) run ./deploy/image -out $(DIST)/image -roots $(ROOTS) $(DIST)/weir-linux-amd64 $(DIST)/weir-linux-arm64
	tar -C $(DIST)/image --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf $(DIST)/weir-image.oci.tar . && rm -r $(DIST)/image
	cp -r deploy/chart $(DIST)/weir
	sed -i 's|^  repository: ""$$|  repository: "$(REGISTRY:%=%/weir)"|' $(DIST)/weir/values.yaml
	$(HELM) package $(DIST)/weir --version $(RELEASE) --app-version $(RELEASE) --destination $(DIST) && rm -r $(DIST)/weir
	cd $(DIST) && sha256sum weir-* > SHA256SUMS

publish: ## push what dist has made to REGISTRY: the image as weir, the chart as charts/weir (as who is logged in there)
	@test -n '$(REGISTRY)' || { echo "say where, as it was said to make dist: REGISTRY=registry.example.com"; exit 1; }
	@$(call need,skopeo)
	skopeo copy --all --digestfile $(DIST)/image.digest oci-archive:$(DIST)/weir-image.oci.tar docker://$(REGISTRY)/weir:$(RELEASE)
	set -o pipefail; $(HELM) push $(DIST)/weir-$(RELEASE).tgz oci://$(REGISTRY)/charts 2>&1 | tee $(DIST)/push.log
	sed -n 's/^Digest: //p' $(DIST)/push.log > $(DIST)/chart.digest && rm $(DIST)/push.log && test -s $(DIST)/chart.digest

sign: ## sign what publish has pushed, and the sums, as who runs this is known to sigstore (keyless; SIGN_FLAGS for another way)
	$(COSIGN) sign --yes --recursive $(SIGN_FLAGS) $(REGISTRY)/weir@$$(cat $(DIST)/image.digest)
	$(COSIGN) sign --yes $(SIGN_FLAGS) $(REGISTRY)/charts/weir@$$(cat $(DIST)/chart.digest)
	for arch in amd64 arm64; do \
		$(COSIGN) attest --yes $(SIGN_FLAGS) --type cyclonedx --predicate $(DIST)/weir-linux-$$arch.cdx.json $(REGISTRY)/weir@$$(cat $(DIST)/image.digest) || exit 1; done
	$(COSIGN) sign-blob --yes $(SIGN_FLAGS) --bundle $(DIST)/SHA256SUMS.sigstore.json $(DIST)/SHA256SUMS

run: build ## install what is missing, and run the agent on this machine
	@$(call need,$(RUN_PACKAGES))
	-bin/weir doctor
	$(SUDO) bin/weir agent

test: ## run all tests (as root; installs what they need)
	@$(call need,$(TEST_PACKAGES) $(DEV_PACKAGES))
	$(MAKE) check-generated
	test -z "$$(gofmt -l $$(git ls-files '*.go'))"
	$(GO) vet ./...
	$(GO) vet -tags scale ./p2p
	$(MAKE) package-tests
	$(MAKE) system-tests

package-tests: # with the race detector; vet has run. A swarm's peers have a second to answer: 16 of them in one process have the cores for themselves
	$(AS_ROOT) CGO_ENABLED=1 $(GO) test -race -vet=off -timeout 10m -skip '^TestSwarm$$' ./agent/... ./bpf/... ./p2p/... ./proxy/...
	$(AS_ROOT) CGO_ENABLED=1 $(GO) test -race -vet=off -timeout 10m -run '^TestSwarm$$' ./agent

system-tests: # they build the tools that they drive, once
	$(AS_ROOT) $(GO) test -vet=off -p 1 -timeout 40m ./test/e2e ./test/lab ./test/twins

test-kubernetes: ## test the chart in a real Kubernetes, which is built first (6 minutes, once)
	@$(call need,$(TEST_PACKAGES) $(KUBERNETES_PACKAGES))
	$(AS_ROOT) $(GO) test -timeout 40m ./test/kubernetes

test-kernels: ## run weir on other kernels, from Linux 5.10 on, in machines whose processor is emulated, and beside Debian 13's runtimes (SKIP for some)
	@$(call need,$(TEST_PACKAGES) $(KERNELS_PACKAGES) qemu-system-x86)
	$(AS_ROOT) $(GO) test -count=1 -v -timeout 60m -skip '^TestARM64$$$(SKIP:%=|%)' ./test/kernels

test-arm64: ## run weir on an emulated arm64
	@$(call need,$(TEST_PACKAGES) $(KERNELS_PACKAGES) qemu-system-arm)
	$(AS_ROOT) $(GO) test -count=1 -v -timeout 90m -run '^TestARM64$$' ./test/kernels

manifest: ## make deploy/weir.yaml from deploy/chart
	$(AS_ROOT) $(GO) test -count=1 -run '^TestManifest$$' ./test/kubernetes -update

bench: ## measure weir beside nginx and others, and write test/bench/RESULTS.md (20 minutes, alone on the machine; BENCH=Blobs for a part)
	@$(call need,$(TEST_PACKAGES) $(BENCH_PACKAGES))
	$(AS_ROOT) $(GO) test -run '^$$' -bench '$(BENCH)' -benchtime 1x -timeout 60m ./test/bench -results .

bench-parts: ## measure single functions, bursts of nodes, and a job's pod
	@$(call need,$(TEST_PACKAGES))
	$(AS_ROOT) $(GO) test -run '^$$' -bench . -benchtime 2s ./bpf/... ./proxy/... ./p2p/...
	$(AS_ROOT) $(GO) test -run '^$$' -bench . -benchtime 1x ./agent
	$(AS_ROOT) $(GO) test -run '^$$' -bench . -benchtime 3x -timeout 30m ./test/e2e

soak: ## the long tests: 100 pulls for each fault among peers, 1,000 starts, 500 containers; and an hour that ends in test/SOAK.md
	@$(call need,$(TEST_PACKAGES))
	$(AS_ROOT) WEIR_FAULT_PULLS=100 WEIR_STARTS=1000 WEIR_CONTAINERS=500 \
		$(GO) test -count=1 -v -timeout 90m -run '^Test(Fault|Starts|ContainersLeave)' ./test/e2e
	$(AS_ROOT) $(GO) test -count=1 -v -timeout 90m -run '^TestSoak$$' ./test/e2e -soak.for 60m -soak.out ..

chaos: ## break whatever can break while runtimes pull, a thousand times, and write test/CHAOS.md (20 minutes)
	@$(call need,$(TEST_PACKAGES))
	$(AS_ROOT) $(GO) test -count=1 -v -timeout 60m -run '^TestChaos$$' ./test/e2e -chaos.all -chaos.pulls 5 -chaos.stop 30s -chaos.out ../CHAOS.md

twins: ## play the same stories on a node with weir and on one without, all and for TWINS_FOR random ones, and write test/TWINS.md (75 minutes; alone on the machine)
	@$(call need,$(TEST_PACKAGES))
	$(AS_ROOT) $(GO) test -count=1 -v -timeout 120m -run '^TestTwins$$' ./test/twins -twins.for $(TWINS_FOR) $(if $(TWINS_SEED),-twins.seed $(TWINS_SEED)) -twins.out ../TWINS.md

oracle: ## play a million steps of random stories against what registries would answer (10 minutes; ORACLE_SEED=2 for others)
	$(GO) test -count=1 -v -timeout 60m -run '^TestOracle' ./proxy/registry -oracle.steps 1000000 -oracle.seed $(ORACLE_SEED)

race: ## run the whole-system tests with the race detector in weir (45 minutes)
	@$(call need,$(TEST_PACKAGES))
	$(AS_ROOT) WEIR_RACE=1 $(GO) test -count=1 -timeout 120m ./test/e2e

scale: ## simulate swarms of 10 to 1,000 nodes, and write test/SCALE.md (35 minutes, 18 GiB)
	GOMEMLIMIT=18GiB $(GO) test -tags scale -count=1 -v -timeout 60m -run '^TestScale$$' ./p2p -scale.nodes 10,100,250,1000 -scale.out ../test/SCALE.md

fuzz: ## fuzz each parser of outside bytes for a minute, or FUZZTIME
	@for p in $$($(GO) list ./...); do for f in $$($(GO) test -list '^Fuzz' $$p | grep ^Fuzz); do \
		$(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $${FUZZTIME:-60s} $$p || exit 1; done; done

lint: ## run the linters
	$(GO) run $(GOLANGCI_LINT) run ./...
	$(GO) run $(ACTIONLINT)

vulncheck: ## look for known vulnerabilities in what weir calls (VULNDB=latest for those of today)
	.ci/vulncheck $(GOVULNCHECK) $(VULNDB)

generate: ## compile the eBPF programs anew
	@$(call need,$(DEV_PACKAGES))
	$(GO) generate ./bpf

check-generated: generate # the committed programs are those of the source
	@git diff --exit-code --stat -- bpf || { echo "the committed eBPF output is not what 'make generate' makes"; exit 1; }

demo: build ## show the main job without internet: cold and warm pulls, and where the bytes came from
	@$(call need,$(TEST_PACKAGES))
	@echo "building the demo and what it pulls with; that takes some minutes the first time"
	@$(AS_ROOT) $(GO) test -count=1 -run '^TestDemo$$' -v ./test/e2e

clean: ## remove what was built
	rm -rf bin dist

# need installs the Debian packages that are missing.
define need
missing=$$(for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
if [ -n "$$missing" ]; then echo "installing" $$missing; $(APT) update -qq && $(APT) install -y -qq --no-install-recommends $$missing >/dev/null; fi
endef
