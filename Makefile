# The front door. `make help` lists the targets; each sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0  # the CPU build; without the pin pip would fetch gigabytes of CUDA packages
TRANSPORT ?= zmq
NIXL   ?= nixl==1.5.1 nixl-cu12==1.5.1  # runs on a CPU, too; without its dependencies, which are a CUDA torch
MOONCAKE ?= mooncake-transfer-engine-non-cuda==0.3.13.post1  # without its dependencies: they are its store's
MOONCAKE_APT := libibverbs1 libnuma1 libcurl4
SOURCES := pd_fsm transports examples benchmarks tests specs

.DEFAULT_GOAL := help
.PHONY: help setup setup-transports setup-spec demo test lint types unit conformance scenarios race peers-race coverage verify verify-long chaos check spec mutate mutate-functions docs docs-check bench build clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{ printf "  %-12s %s\n", $$1, $$2 }'

setup: $(VENV)/.ready  ## virtual environment with everything for demo and tests (1 to 3 min)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install -qq --editable '.[dev]'
	touch $@

setup-transports: $(VENV)/.transports  ## the transfer libraries that run on this machine, for their tests

$(VENV)/.transports: $(VENV)/.ready
	@for lib in libibverbs.so.1 libnuma.so.1 libcurl.so.4; do ldconfig -p | grep -q "$$lib " || missing=1; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq $(MOONCAKE_APT); \
	  else echo "Mooncake needs system libraries: apt install $(MOONCAKE_APT) (as root), then make setup-transports"; exit 1; fi; fi
	$(BIN)/pip install --quiet --no-deps $(NIXL)
	$(BIN)/pip install --quiet --no-deps $(MOONCAKE)
	touch $@

setup-spec: $(VENV)/.spec  ## the model checker and a C compiler, for the specification

$(VENV)/.spec: $(VENV)/.ready
	@command -v rumur >/dev/null && command -v cc >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq rumur gcc libc6-dev; \
	  else echo "the specification needs rumur and a C compiler: apt install rumur gcc libc6-dev (as root), then make setup-spec"; exit 1; fi; }
	touch $@

demo: setup  ## real engine processes hand their KV cache over; checks the answers (under 2 min)
	$(BIN)/pd-fsm demo --transport $(TRANSPORT) $(ARGS)

test: lint types docs-check unit  ## all that a change must pass: lint, types, generated docs, tests (3 to 6 min)

lint: setup  ## ruff: format and rules
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

# mypy sees the package as it is installed: the top-level folders inside it.
types: setup  ## mypy --strict on the package
	rm -rf .types && mkdir -p .types && cp -R pd_fsm .types/pd_fsm
	cp -R transports .types/pd_fsm/transports && cp -R examples .types/pd_fsm/examples && cp -R benchmarks .types/pd_fsm/benchmarks
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache pd_fsm ../specs/check.py

unit: setup setup-transports setup-spec  ## the tests alone; ARGS are passed to pytest
	$(BIN)/python -m pytest $(ARGS)

conformance: setup  ## the conformance kit on TRANSPORT=zmq, a name or module:factory; ARGS are passed to pytest (1 min)
	$(BIN)/python -m pytest --pyargs pd_fsm.testing.conformance --pd-fsm-transport=$(TRANSPORT) $(ARGS)

scenarios: setup  ## replay every recorded race on the core, and on the real runtime where it concerns that (2 min)
	$(BIN)/python -m pd_fsm.testing.records tests/scenarios

race: setup  ## simulate 500 fleets under faults; ARGS="--sim --seed 4711 --minimise" repeats one (1 min)
	$(BIN)/pd-fsm race $(or $(ARGS),--sim --seeds 500 --jobs 2)

check: setup  ## explore every interleaving of small worlds of real cores; ARGS="smallest losses=1" for one of your own (2 min)
	$(BIN)/pd-fsm check $(ARGS)

spec: setup-spec  ## model-check the specification, and the code against it (3 min)
	$(BIN)/python specs/check.py $(ARGS)

mutate: setup  ## change the declared machines in every way, and see who notices (3 min)
	$(BIN)/python -m pd_fsm.testing.mutate tests/scenarios $(ARGS)

mutate-functions: setup  ## change the code of the wire and the timers; ARGS="--all" for the whole core (4 min)
	$(BIN)/python -m pd_fsm.testing.mutate_functions tests $(ARGS)

peers-race: setup  ## search released session layers of others for races, in environments of their own (10 min, 6 GB in out/peers)
	$(BIN)/python -m pd_fsm.testing.peer_layers.report $(ARGS)

coverage: setup  ## which rows of the machines scenarios, explorer and simulator take, painted on the diagrams (1 min)
	$(BIN)/python -m pd_fsm.testing.coverage tests/scenarios --jobs 2 $(ARGS)

verify: setup setup-spec  ## the whole ladder of checks, in one table (under 10 min)
	$(BIN)/python -m pd_fsm.testing.verify $(ARGS)

verify-long: setup setup-spec  ## the same, each step larger by FACTOR (hours)
	$(BIN)/python -m pd_fsm.testing.verify --long $(or $(FACTOR),20) $(ARGS)

chaos: setup  ## kill, stop, cut and restart real processes, then look for lost rooms and pages (3 min)
	$(BIN)/python -m pd_fsm.testing.chaos $(ARGS)

docs: setup  ## generate docs/states.md, the diagrams and docs/records.md
	$(BIN)/python -m pd_fsm.machines.diagram --write
	$(BIN)/python -m pd_fsm.testing.records tests/scenarios --docs docs/records.md

docs-check: setup  ## fail when a generated file is stale
	$(BIN)/python -m pd_fsm.machines.diagram --check
	$(BIN)/python -m pd_fsm.testing.records tests/scenarios --docs docs/records.md --check

bench: setup  ## measure beside what a user would use instead; ARGS="core poll --quick"
	$(BIN)/pd-fsm bench $(ARGS)

build: setup  ## wheel and source distribution, in dist/
	$(BIN)/python -m build

clean:  ## remove what was generated, the virtual environment too
	rm -rf $(VENV) .types build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
