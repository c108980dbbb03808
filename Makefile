PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
DEEPSPEED := .venv-deepspeed
PEERS := .venv-peers
CLIENTS := .venv-clients
UV := uv==0.13.9
SEED ?= 0
RUN ?= runs/demo

# Waiting threads sleep instead of spinning: small models then train many times faster on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-clean test test-fast test-documents test-long test-deepspeed test-peers test-clients test-versions test-vllm test-wheel wheel lint bench

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## Create .venv with the pinned packages

# uv installs four times as fast as pip. Where it does not reach the package registry that pip is set to, pip is used.
$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(UV)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.txt || \
		$(BIN)/pip install --quiet --no-compile --requirement requirements.txt
	# Now and on all cores: where Python writes no bytecode, each process of the tests would compile all that it imports.
	# Some packages contain templates that cannot be compiled.
	$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: setup  ## Train and evaluate a small SQ-LLaVA, in about ten minutes on two CPU cores
	$(BIN)/python -m demo.run --seed $(SEED) --output-dir $(RUN)

demo-clean:  ## Delete the output of the demo
	rm -rf $(RUN)

test: setup  ## Run the tests, in about ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not walk and not long"

test-fast: setup  ## Run the tests that are not marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not walk and not long"

test-documents: setup  ## Run what the documents show, and the quick demo (DOCUMENTS=README: only that document)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m walk -k "$(DOCUMENTS)"

test-long: setup  ## Run the tests that take longest: kills at random moments, a mesh, several machines, the notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m long

wheel: setup  ## Build a wheel in dist/
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

test-wheel: setup  ## Install a wheel in a new environment, and run the README's commands with it
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.wheel_checks

test-versions: setup  ## Test a wheel with the oldest, the pinned and the newest packages (15 GB)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.package_versions

test-vllm: $(RUN)/model/config.json setup $(VLLM)/.installed  ## Compare vLLM with transformers on the demo's model and on 13 small ones
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.vllm_reference --model $(RUN)/model --output-dir $(RUN)/vllm
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -P tests/vllm_checks.py --dir $(RUN)/vllm

test-clients: $(RUN)/model/config.json setup $(CLIENTS)/.installed  ## Ask the demo's model with openai, langchain-openai and litellm
	$(CLIENTS)/bin/python tests/client_checks.py --model $(RUN)/model --image $(RUN)/images/test/images/0.png

$(RUN)/model/config.json:
	@echo "$(RUN)/model does not exist. Run 'make demo' first."; exit 1

test-deepspeed: $(DEEPSPEED)/.installed  ## Train with DeepSpeed (ZeRO-2 and ZeRO-3) in two processes on a CPU
	OMP_NUM_THREADS=1 $(DEEPSPEED)/bin/python -m pytest tests/deepspeed_checks.py

test-peers: $(PEERS)/.installed  ## Compare metrics with the code of the projects that they are named after
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m tests.peers_checks

# A virtual environment that sees the packages of .venv, by a .pth file.
define venv-on-top
	$(PYTHON) -m venv --without-pip $(1)
	PURELIB='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(abspath $(BIN))/python -c "$$PURELIB" > "$$($(1)/bin/python -c "$$PURELIB")/packages.pth"
endef

$(PEERS)/.installed: requirements-peers.txt $(VENV)/.installed
	$(call venv-on-top,$(PEERS))
	$(BIN)/pip --python $(PEERS)/bin/python install --quiet --no-deps --requirement requirements-peers.txt
	touch $@

# DeepSpeed compiles nothing.
$(DEEPSPEED)/.installed: requirements-deepspeed.txt $(VENV)/.installed
	$(call venv-on-top,$(DEEPSPEED))
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip --python $(DEEPSPEED)/bin/python install --quiet --no-deps \
		--no-build-isolation --requirement requirements-deepspeed.txt
	touch $@

$(VLLM)/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --no-deps --requirement requirements-vllm.txt
	touch $@

$(CLIENTS)/.installed: requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement requirements-clients.txt
	touch $@

lint: setup  ## Check style, formatting and imports between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The benchmarks that need no GPU and take minutes.
BENCHMARKS := train_step lm_head batching memory ask generate prototype_extractor scaling image_pipeline \
	doctor convert startup

bench: setup  ## Run the benchmarks that need no GPU, in under a quarter of an hour on two cores
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done
	$(BIN)/python -m benchmarks.readme
