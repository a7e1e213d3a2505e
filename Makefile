# Every tool is pinned, and comes from the Go module mirror, so only Go needs to be installed.
# Downloads stay in .build.

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help

BUF_VERSION             := v1.75.0
PROTOC_GEN_GO_VERSION   := v1.36.12
CONNECT_VERSION         := v2.0.2
PROTOVALIDATE_VERSION   := v1.2.2
GOLANGCI_LINT_VERSION   := v2.15.0
GOVULNCHECK_VERSION     := v1.9.0
GO_LICENSES_VERSION     := v2.0.1
CYCLONEDX_GOMOD_VERSION := v1.10.0
OTELCOL_VERSION         := v0.165.0
PROMETHEUS_VERSION      := v0.313.5

BUILD := $(CURDIR)/.build
BIN   := $(BUILD)/bin

FUZZTIME ?= 10s
CASES    ?= 3000

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/cedarpost
	CGO_ENABLED=0 go build -trimpath -o bin/cedarpost ./cmd/cedarpost

.PHONY: postgres
postgres:
	@scripts/install-postgres.sh

.PHONY: pgbouncer
pgbouncer:
	@scripts/install-pgbouncer.sh

.PHONY: ssh-agent
ssh-agent:
	@scripts/install-ssh-agent.sh

.PHONY: h2load
h2load:
	@scripts/install-h2load.sh

.PHONY: node
node:
	@scripts/install-node.sh

.PHONY: demo
demo: postgres build ## Start a server, tell the story of the example shop with it, and stop it
	@scripts/demo.sh bin/cedarpost

.PHONY: drill-restore
drill-restore: postgres build ## Restore a dump into a second database, and check that tokens of lost revisions are refused
	@scripts/drill-restore.sh bin/cedarpost

.PHONY: dev
dev: postgres build ## Run a server with a private Postgres and the example bundle, until Ctrl-C
	@exec bin/cedarpost dev

# The packages whose tests take longest start first. Many tests wait most of the time, so one
# package more than there are processors runs at once, and four tests of each. go vet is part
# of make lint, and no test needs debug information (-ldflags=-w), whose linking takes time. With
# GOGC=400 compilers take a fifth less time.
TEST_PACKAGES ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
TEST = go test -toolexec 'env GOGC=400' -vet off -ldflags=-w -p $(TEST_PACKAGES) -parallel 4 -timeout 60m

# These packages start no goroutines and share nothing between any. The race detector would find
# nothing in them, and takes two thirds of the time of their tests. The packages that call them from
# several goroutines are tested with it. TestRaceDetector looks at the packages.
WITHOUT_RACE := . ./auditlog ./bundle ./internal/entityuid ./internal/keyfile ./internal/secret ./internal/serverurl \
	./logformat ./policies/... ./server/engine ./server/entityfile ./server/offline

.PHONY: test
test: postgres pgbouncer ssh-agent node ## Run all tests, with a real Postgres and the race detector
	$(TEST) $(WITHOUT_RACE)
	rest=$$(go list ./... | grep -vxF "$$(go list $(WITHOUT_RACE))"); \
	$(TEST) -race ./server ./cmd/cedarpost ./sdk/go/cedarpost ./store ./server/decisionlog $$rest

# The tests of attacks are part of make test. Here they run one after the other, and print what an
# attack cost and what an honest caller saw meanwhile.
.PHONY: attack
attack: postgres ## Attack a server over loopback, and print what an honest caller sees meanwhile
	go test -count 1 -p 1 -timeout 30m -v -run '^TestAttack|^TestCertificatesAreReplacedUnderLoad$$' ./server/... ./store/... ./bundle ./sdk/go/... ./cmd/cedarpost

# The matrix is also a part of make test.
.PHONY: access-matrix
access-matrix: postgres ## Call each RPC as each role, and print who may do what
	@CEDARPOST_ACCESS_MATRIX=1 go test -count 1 -timeout 10m -v -run '^TestAccessMatrix$$' ./server | grep -v '^=== \|level='

.PHONY: telemetry
telemetry: postgres $(BUILD)/otelcol-$(OTELCOL_VERSION).stamp ## Send telemetry to a real OpenTelemetry collector, and print a trace of one decision
	CEDARPOST_OTELCOL=$(BUILD)/otelcol/otelcol go test -count 1 -timeout 10m -v -run '^TestRealCollector$$' ./server

# Tests that take minutes are named TestSoak..., and run only if CEDARPOST_SOAK is set.
.PHONY: soak
soak: postgres ## Run the tests that take minutes
	CEDARPOST_SOAK=1 go test -race -count 1 -timeout 60m -run Soak ./...

# Not part of make test: a shallow clone has no previous release. TestRollingReplacement, which is, does the
# same with servers of this tree only.
.PHONY: upgrade
upgrade: postgres ## Replace servers of the previous release by those of this tree under load, with migrations, and back
	@scripts/upgrade.sh

.PHONY: fuzz-short
fuzz-short: ## Run each fuzz target for 10 s (FUZZTIME=1m for more)
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

.PHONY: bench
bench: postgres ## Run the benchmarks
	go test -run '^$$' -bench . -benchmem -timeout 30m ./...

.PHONY: bench-gate
bench-gate: postgres ## Fail if a call on the path of a decision allocates a tenth more than bench/gate.txt says
	@scripts/bench-gate.sh

.PHONY: check
check: test lint check-generated bench-gate ## Run all that a change has to pass

ROWS ?= 1000000

.PHONY: transcript
transcript: postgres ## Run the commands of docs/lifecycle-transcript.md, and write that page
	go test -count 1 -run TestLifecycleTranscript ./cmd/cedarpost -update-transcript

.PHONY: bench-queries
bench-queries: postgres ## Fill a decision log with ROWS decisions, and print how long each query takes
	CEDARPOST_QUERY_ROWS=$(ROWS) go test -count 1 -timeout 4h -run TestQueriesAtScale -v ./store

.PHONY: prove
prove: ## Build Cedar's analysis, which takes some minutes, and test check --prove with it
	env $$(scripts/install-cedar-analysis.sh) CEDARPOST_TEST_PROVE=1 go test -count 1 -run TestCheckProveByTools -v ./cmd/cedarpost

.PHONY: conformance
conformance: postgres node ## Run the reference corpus, a sample of it over the network, and CASES random sets of policies and data against the reference implementation
	CEDARPOST_SOAK=1 CEDARPOST_DIFF_CASES=$(CASES) go test -count 1 -timeout 4h -run 'Conformance|Differential' -v ./server/engine ./server

.PHONY: bench-engine
bench-engine: ## Run the benchmarks of the engine
	go test -run '^$$' -bench . -benchmem -timeout 30m ./server/engine

.PHONY: bench-log
bench-log: postgres ## Measure the cost of recording
	CEDARPOST_BENCH=1 go test -run '^TestBenchLog$$' -count 1 -timeout 30m -v ./server

.PHONY: bench-data
bench-data: postgres ## Measure decisions, writes and imports with a million entities stored
	CEDARPOST_BENCH=1 go test -v -count 1 -timeout 30m -run TestData ./bench

.PHONY: bench-sdk
bench-sdk: postgres ## Measure the Go client: hits, hit rate, time until a revoked right is gone
	CEDARPOST_BENCH=1 go test -v -count 1 -timeout 30m -run TestSDK ./bench

DECISIONS ?= 1000000

.PHONY: bench-impact
bench-impact: postgres ## Measure the impact of a change on DECISIONS recorded decisions, and what callers notice of it
	CEDARPOST_BENCH=1 DECISIONS=$(DECISIONS) go test -v -count 1 -timeout 1h -run TestImpact ./bench

POLICIES ?= 100000

.PHONY: bench-policies
bench-policies: postgres ## Measure listing, checking and publishing in a bundle with POLICIES policies
	CEDARPOST_BENCH=1 POLICIES=$(POLICIES) go test -v -count 1 -timeout 1h -run TestPolicies ./bench

# bench/peers has the versions of the other servers, and builds them. PEERS is for its flags.
.PHONY: bench-peers
bench-peers: postgres h2load build ## Measure Cedarpost beside OPA, Cerbos and OpenFGA (PEERS='-seconds 10' and other flags; -h lists them)
	@mkdir -p $(BIN); go build -trimpath -o $(BIN)/bench-peers ./bench/peers; exec $(BIN)/bench-peers $(PEERS)

GOLANGCI_LINT := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)

.PHONY: lint
lint: ## Run golangci-lint
	$(GOLANGCI_LINT) run

PROMTOOL_STAMP   := $(BUILD)/promtool-$(PROMETHEUS_VERSION).stamp
PROMETHEUS_STAMP := $(BUILD)/prometheus-$(PROMETHEUS_VERSION).stamp

# Not part of make test, because promtool takes minutes to build. The tests of deploy look at the names in
# the rules and in the dashboard.
.PHONY: alerts
alerts: $(PROMTOOL_STAMP) ## Check the alert rules and the queries of the dashboard, and run the unit tests of the rules
	$(BIN)/promtool check rules --lint=all --lint-fatal deploy/prometheus/cedarpost.rules.yaml
	$(BIN)/promtool test rules deploy/prometheus/cedarpost.rules.test.yaml
	CEDARPOST_PROMTOOL=$(BIN)/promtool go test -count 1 -run '^TestQueriesOfDashboard$$' -v ./deploy

.PHONY: drill-alerts
drill-alerts: postgres $(PROMETHEUS_STAMP) ## Make the fault of each alert for real, see it fire and end, and write docs/alerts-transcript.md
	CEDARPOST_DRILL_ALERTS=1 CEDARPOST_PROMETHEUS=$(BIN)/prometheus go test -count 1 -timeout 60m -run '^TestDrillAlerts$$' -v ./deploy

# Not part of the checks of a change: its result depends on a database that changes every day, and that
# is not reachable from everywhere. scripts/audit.sh has the exit codes.
.PHONY: audit
audit: $(BUILD)/govulncheck-$(GOVULNCHECK_VERSION).stamp $(BUILD)/go-licenses-$(GO_LICENSES_VERSION).stamp ## Look for known vulnerabilities, insecure code and licences that are not allowed
	scripts/audit.sh $(BIN) "$(GOLANGCI_LINT)"

VERSION           ?= devel
RELEASE_PLATFORMS ?= linux/amd64 linux/arm64

.PHONY: release
release: $(BUILD)/cyclonedx-gomod-$(CYCLONEDX_GOMOD_VERSION).stamp ## Build the files of a release into dist: binaries, SBOMs and checksums (VERSION=v1.2.3)
	scripts/release.sh $(BIN) $(VERSION) dist $(RELEASE_PLATFORMS)

.PHONY: check-reproducible
check-reproducible: $(BUILD)/cyclonedx-gomod-$(CYCLONEDX_GOMOD_VERSION).stamp ## Build a release twice in different folders, and fail if a byte differs
	scripts/check-reproducible.sh $(BIN) $(VERSION) $(RELEASE_PLATFORMS)

.PHONY: clean
clean: ## Remove build results; the data of make dev stay
	rm -rf bin dist
	chmod -R u+w $(BUILD) 2>/dev/null || true
	rm -rf $(BUILD)

# Generated code. The name of a stamp has the version of its tool, so a change of a version above
# installs the tool again.

BUF_STAMP           := $(BUILD)/buf-$(BUF_VERSION).stamp
PROTOC_GEN_GO_STAMP := $(BUILD)/protoc-gen-go-$(PROTOC_GEN_GO_VERSION).stamp
CONNECT_STAMP       := $(BUILD)/protoc-gen-connect-go-$(CONNECT_VERSION).stamp
PROTOVALIDATE_STAMP := $(BUILD)/protovalidate-$(PROTOVALIDATE_VERSION).stamp
GENERATORS          := $(BUF_STAMP) $(PROTOC_GEN_GO_STAMP) $(CONNECT_STAMP) $(PROTOVALIDATE_STAMP)

# install PACKAGE, VERSION installs a tool, unless this version is there, and makes the stamp.
define install
@mkdir -p $(BIN); rm -f $(BUILD)/$(notdir $(1))-v*.stamp
@go version -m $(BIN)/$(notdir $(1)) 2>/dev/null | grep -q "^	mod	.*	$(2)	" || { \
	echo "install $(1)@$(2)"; GOBIN=$(BIN) go install -trimpath $(1)@$(2); }
@touch $@
endef

$(BUF_STAMP):
	$(call install,github.com/bufbuild/buf/cmd/buf,$(BUF_VERSION))

$(PROTOC_GEN_GO_STAMP):
	$(call install,google.golang.org/protobuf/cmd/protoc-gen-go,$(PROTOC_GEN_GO_VERSION))

$(CONNECT_STAMP):
	$(call install,connectrpc.com/connect/v2/cmd/protoc-gen-connect-go,$(CONNECT_VERSION))

$(BUILD)/govulncheck-$(GOVULNCHECK_VERSION).stamp:
	$(call install,golang.org/x/vuln/cmd/govulncheck,$(GOVULNCHECK_VERSION))

$(BUILD)/cyclonedx-gomod-$(CYCLONEDX_GOMOD_VERSION).stamp:
	$(call install,github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod,$(CYCLONEDX_GOMOD_VERSION))

$(BUILD)/otelcol-$(OTELCOL_VERSION).stamp: scripts/otelcol.yaml
	@mkdir -p $(BIN); rm -f $(BUILD)/otelcol-v*.stamp; \
	echo "build an OpenTelemetry collector $(OTELCOL_VERSION)"; \
	GOBIN=$(BIN) go install go.opentelemetry.io/collector/cmd/builder@$(OTELCOL_VERSION); \
	$(BIN)/builder --config scripts/otelcol.yaml >$(BUILD)/otelcol.log 2>&1 || { tail $(BUILD)/otelcol.log >&2; exit 1; }
	@touch $@

# Built from its module: go install would also ask the repository whether the module is deprecated.
$(BUILD)/go-licenses-$(GO_LICENSES_VERSION).stamp:
	@mkdir -p $(BIN); rm -f $(BUILD)/go-licenses-v*.stamp; \
	dir=$$(go mod download -json github.com/google/go-licenses/v2@$(GO_LICENSES_VERSION) | sed -n 's/^.*"Dir": "\(.*\)".*$$/\1/p'); \
	echo "build go-licenses $(GO_LICENSES_VERSION)"; cd "$$dir"; go build -trimpath -o $(BIN)/go-licenses .; \
	touch $@

# Built from their module, because it replaces another one, which go install refuses. The module has a file of a
# workspace without the workspace, so GOWORK=off.
define prometheus
@mkdir -p $(BIN); rm -f $(BUILD)/$(1)-v*.stamp; \
	dir=$$(go mod download -json github.com/prometheus/prometheus@$(PROMETHEUS_VERSION) | sed -n 's/^.*"Dir": "\(.*\)".*$$/\1/p'); \
	echo "build $(1) $(PROMETHEUS_VERSION)"; cd "$$dir"; GOWORK=off go build -trimpath -tags remove_all_sd -o $(BIN)/$(1) ./cmd/$(1); \
	touch $@
endef

$(PROMTOOL_STAMP):
	$(call prometheus,promtool)

$(PROMETHEUS_STAMP):
	$(call prometheus,prometheus)

# The definitions of the validation rules come from the module that publishes them.
$(PROTOVALIDATE_STAMP):
	@mkdir -p $(BUILD); \
	dir=$$(go mod download -json github.com/bufbuild/protovalidate@$(PROTOVALIDATE_VERSION) | sed -n 's/^.*"Dir": "\(.*\)".*$$/\1/p'); \
	rm -rf $(BUILD)/protovalidate $(BUILD)/protovalidate-v*.stamp; \
	cp -r "$$dir/proto/protovalidate" $(BUILD)/protovalidate; \
	chmod -R u+w $(BUILD)/protovalidate; \
	touch $@

# The messages of the health service are those of grpc-go: see the go_package of their file.
NOT_OURS := proto/grpc/health/v1/health.pb.go

.PHONY: generate
generate: $(GENERATORS) ## Generate the code
	$(BIN)/buf lint
	$(BIN)/buf generate
	rm -f $(NOT_OURS)
	go generate ./...

.PHONY: check-generated
check-generated: $(GENERATORS) ## Fail if the committed code differs from the generated code
	@copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	cp -r proto buf.yaml buf.gen.yaml "$$copy/"; \
	mkdir "$$copy/.build"; cp -r $(BUILD)/protovalidate "$$copy/.build/"; ln -s $(BIN) "$$copy/.build/bin"; \
	find "$$copy/proto" -name '*.go' -exec grep -l '^// Code generated' {} + | xargs rm -f; \
	(cd "$$copy" && $(BIN)/buf lint && $(BIN)/buf generate && rm -f $(NOT_OURS)); \
	diff -r proto "$$copy/proto" || { echo "generated code is stale: run make generate" >&2; exit 1; }
