# `make demo` and `make test` do all their own set-up on a fresh Debian or
# Ubuntu machine, and reuse it on the next call. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wheels, checkpoints and keys of the test images, kept across clones.
export GLM_CACHE ?= $(HOME)/.cache/glm-fleet
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.done: requirements.txt requirements-test.txt requirements-uv.txt
	@echo "==> Python environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than 3.11: set PYTHON=python3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || molecule/shared/docker-engine up # brings python3-venv
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet -r requirements-uv.txt
	@tools/uv pip install --quiet --require-hashes -r requirements-test.txt
	@tools/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: venv
venv: $(VENV)/.done ## Make the Python environment, with the Ansible collections

.PHONY: engine
engine: ## Provide a Docker engine where there is none
	@molecule/shared/docker-engine up

.PHONY: set-up
set-up: # Both at once: one downloads while the other unpacks.
	@$(MAKE) --no-print-directory -j2 venv engine

# The engine of the demo: vllm or sglang.
ENGINE ?= vllm
DEMO_IMAGES_vllm := engine
DEMO_IMAGES_sglang := engine sglang

.PHONY: demo
demo: set-up ## Turn a bare node in a container into a verified endpoint (ENGINE=sglang: with SGLang)
	@test -n "$(DEMO_IMAGES_$(ENGINE))" || { echo "make: there is no ENGINE=$(ENGINE): vllm or sglang" >&2; exit 2; }
	@echo "==> Test images"
	@molecule/shared/build-images node-debian13:driver-570 mirror model $(DEMO_IMAGES_$(ENGINE))
	@echo "==> The bare node and its mirror"
	@ansible-playbook molecule/shared/create.yml -i inventory/demo -e testbed_engine=$(ENGINE)
	@echo "==> site.yml over the node"
	@ansible-playbook site.yml -i inventory/demo -e glm_engine=$(ENGINE)

.PHONY: demo-down
demo-down: venv ## Remove the demo's containers, network and volumes
	@ansible-playbook molecule/shared/destroy.yml -i inventory/demo
	@echo "The test images and the Docker engine stay for the next run; 'make clean' removes them too."

.PHONY: lint
lint: venv ## ansible-lint (production), yamllint, ruff, mypy
	@yamllint --strict .
	@ansible-lint --profile production
	@ruff check .
	@ruff format --check .
	@mypy

.PHONY: programs
programs:
	@tests/programs

.PHONY: unit
unit: venv programs ## Unit tests
	@pytest tests/unit

.PHONY: sanity
sanity: venv ## ansible-test sanity over the collection as it is built
	@tests/run sanity

.PHONY: test
test: set-up programs ## Everything that proves the project on one machine
	@tests/run

.PHONY: upstream
upstream: venv ## Look into the newest vLLM and SGLang for all that is believed of them, and write docs/upstream.md
	@tests/upstream/newest.py

.PHONY: refusals
refusals: venv engine ## Bad input and faults on one node: each refused in one line, or undone
	@tests/run refusals

.PHONY: fleet
fleet: venv engine ## Rollouts over two gateways and three nodes in use: nothing may be dropped
	@tests/run fleet

.PHONY: fleet-real
fleet-real: venv engine ## The same with real vLLM on each node, where the light engine proves too little
	@tests/run fleet-real

.PHONY: driver
driver: venv engine ## Install, adopt and replace the driver on nodes of five kinds; bad input and faults
	@tests/run driver driver-refusals driver-packages

.PHONY: node-life
node-life: venv engine ## A node on its own: boots, updates, disks, networks and downloads, without a run beside it
	@tests/run node-life
	@molecule/faults/table.py node-life

.PHONY: weights
weights: venv engine ## Four nodes that bring the weights together: one joins, one lies, one is lost, the controller dies
	@tests/run weights
	@molecule/faults/table.py weights

.PHONY: airgap
airgap: venv engine programs ## A bare node without a way out: from a bundle to serving, and bundles that are not right
	@tests/run airgap
	@molecule/faults/table.py airgap

.PHONY: monitoring
monitoring: venv engine ## Prometheus and Alertmanager over a fleet in use: its faults raise alerts, a healthy rollout none
	@tests/run monitoring

.PHONY: edge
edge: venv engine ## Attack the edge while well-behaved clients go on: none of them may lose a request
	@tests/run edge

.PHONY: faults
faults: venv engine ## Inject every fault of the list under load, and write docs/faults.md
	@tests/run faults
	@molecule/faults/table.py

.PHONY: bench-fleet
bench-fleet: venv engine ## What 4, 16 and 48 light nodes cost: wall time, CPU, memory, round trips
	@tests/bench_fleet.py $(NODES)

.cache/bench-placement/.done: tests/bench_placement.txt
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet -r $<
	@touch $@

.PHONY: bench-placement
bench-placement: venv .cache/bench-placement/.done ## Replay coding sessions through a gateway, and write docs/placement.md
	@tests/bench_placement.py --python $(CURDIR)/.cache/bench-placement/bin/python

.PHONY: bench-edge
bench-edge: venv programs ## What the edge adds to requests and tokens, and 2,000 streams at once
	@tests/bench_edge.py --write

.PHONY: bench-weights
bench-weights: venv programs ## A checkpoint to eight nodes that share it, against one alone; writes docs/weights-bench.md
	@tests/bench_weights.py --write

# The execution environment: its name, an image to build on instead of the definition's, and who builds and runs it.
EE_IMAGE ?= glm-fleet-ee
EE_BASE ?=
EE_ENGINE ?= $(shell command -v podman >/dev/null && echo podman || echo docker)

.cache/ee/.done: ee/tools.txt
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet -r $<
	@touch $@

.PHONY: ee
ee: venv .cache/ee/.done ## Build the execution environment for AWX and ansible-navigator (EE_IMAGE=NAME, EE_ENGINE=podman)
	@ansible-galaxy collection build --force --output-path .cache/ee/collection . >/dev/null
	@mv .cache/ee/collection/glm-fleet-*.tar.gz .cache/ee/glm-fleet.tar.gz
	@.cache/ee/bin/ansible-builder build --file ee/execution-environment.yml --context .cache/ee/context \
	  --container-runtime $(EE_ENGINE) --tag $(EE_IMAGE) $(if $(EE_BASE),--build-arg EE_BASE_IMAGE=$(EE_BASE))

.PHONY: ee-test
ee-test: venv engine ## Build it on the testbed's Debian, and run it as AWX does over the demo's node, which is made anew
	@molecule/shared/build-images base
	@$(MAKE) --no-print-directory ee EE_BASE=glm-fleet/base EE_ENGINE=docker EE_IMAGE=glm-fleet-ee:test
	@tests/run ee

.PHONY: figures
figures: venv engine ## Measure the demo, and write what was measured here into README.md and docs/
	@tools/figures.py

.PHONY: clean
clean: venv ## Remove everything that make has made: nodes, images, engine, environment
	@ansible-playbook molecule/shared/destroy.yml -i inventory/demo -e testbed_purge=true
	@molecule/shared/docker-engine down
	@rm -rf $(VENV) .cache
