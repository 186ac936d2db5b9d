# Needs python3 (3.10 to 3.13) with its venv module, and make. Everything else is installed into .venv as wheels.

PYTHON   ?= python3
VENV     ?= .venv
OUT      ?= out
# The release that the tests run with. Named in the same pip command as the rest, so that no other build is pulled in first.
# The default index may answer with a CUDA build of several gigabytes; for a CPU-only one name PyTorch's own CPU index
# (its installation page has the address): make demo TORCH=torch==2.13.0+cpu PIP_ARGS="--extra-index-url ADDRESS"
# On a Jetson name the wheel of your JetPack, and let the environment see TensorRT:
#   make demo TORCH=/path/to/torch.whl VENV_ARGS=--system-site-packages
TORCH    ?= torch==2.13.0
PIP_ARGS ?=
VENV_ARGS ?=
# What the demo model is asked: an answer, a story, a piece of code.
QUESTION ?= Give me three tips for learning a language.
STORY    ?= Tell me a short story about a lighthouse keeper.
CODE     ?= Write a Python function that reverses a string.
PYTEST_ARGS ?=
# What `make profile` measures and how. On a board: BUNDLE=qwen.bundle PROFILE_ARGS="--protocol remoe"
BUNDLE   ?= $(OUT)/demo.bundle
WORKLOADS ?= sharegpt gsm8k humaneval
PROFILE_ARGS ?= --slots-per-layer 8
PROFILE  ?= $(OUT)/profile
# What `make engines` adds to the command: ENGINES_ARGS=--check needs no GPU.
ENGINES_ARGS ?=
# What `make interop` adds to the command: INTEROP_ARGS="--only llama.cpp"
INTEROP_ARGS ?=
# A Jetson: the release of its Linux (36 is JetPack 6 with CUDA 12.6, 39 is JetPack 7 with CUDA 13), where torch for it comes
# from, and which cuda-python its driver takes.
L4T := $(shell sed -n 's/^\# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release 2>/dev/null)
BOARD_INDEX ?= $(if $(filter 36,$(L4T)),--index-url https://pypi.jetson-ai-lab.io/jp6/cu126)
BOARD_TORCH ?= torch>=2.6
BOARD_CUDA  ?= $(if $(filter 36,$(L4T)),cuda-python>=12.6.1$(comma)<13,cuda-python>=13$(comma)<14)
comma := ,

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-large demo-model demo-native test test-fast lint engines gpu interop setup-board bench profile report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## create .venv with the edge command

# Stamps are younger than pyproject.toml once installed, so that a second call does nothing.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "make: needs Python 3.10 to 3.13 with its venv module, found $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "      Debian, Ubuntu: apt-get install python3-venv; or name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@# 22.0.2 (Ubuntu 22.04) breaks off with an AssertionError when a package that it considered is not needed in the end.
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "pip>=22.0.3,<24; python_version < '3.11'"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)" -e ".[onnxruntime,demo]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@# torch is there already and satisfies the package, whichever build it is.
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[test]"
	@touch $@

demo: $(VENV)/.installed ## export a small trained mixture of experts and let it speak through the streamed cache
	$(BIN)/python -m demo.build --out $(OUT)/demo-checkpoint
	@# A whole bundle of an earlier call is kept; export itself resumes an interrupted one.
	test -f $(OUT)/demo.bundle/manifest.json || $(BIN)/edge export $(OUT)/demo-checkpoint $(OUT)/demo.bundle
	@# Half of the 32 experts per layer have a slot, so that experts really come from the disk while it speaks.
	@set -e; for prompt in "$(QUESTION)" "$(STORY)" "$(CODE)"; do printf '\n> %s\n' "$$prompt"; \
	  $(BIN)/edge generate $(OUT)/demo.bundle --chat --prompt "$$prompt" --max-new-tokens 80 --slots-per-layer 16 \
	  --repetition-penalty 1.1; done

demo-large: $(VENV)/.installed ## the same with 1.27 GB of larger experts, whose routing means nothing: for input and output only
	$(BIN)/python -m demo.build --model large-8 --out $(OUT)/demo-large-checkpoint
	test -f $(OUT)/demo-large.bundle/manifest.json || \
	  $(BIN)/edge export $(OUT)/demo-large-checkpoint $(OUT)/demo-large.bundle
	$(BIN)/edge generate $(OUT)/demo-large.bundle --chat --prompt "$(STORY)" --max-new-tokens 80 --slots-per-layer 16

demo-model: $(VENV)/.installed-test ## train the demo model anew, from the dense one (about 100 minutes on two cores)
	$(BIN)/python -m demo.distill.train --out $(OUT)/demo-model

demo-native: $(VENV)/.installed ## train the committed small twin anew, from nothing (20 minutes on one thread)
	$(BIN)/python -m demo.native.train --out $(OUT)/native

test: $(VENV)/.installed-test ## all tests (a GPU is used where there is one)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test ## the tests that take under ten seconds each
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-test ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

engines: $(VENV)/.installed ## build the TensorRT engines of BUNDLE= for this machine's GPU (ENGINES_ARGS=--check: no GPU)
	$(BIN)/edge engines $(BUNDLE) $(ENGINES_ARGS)

gpu: $(VENV)/.installed ## everything that only a GPU can show, with BUNDLE=, into one JSON file
	$(BIN)/python -m bench.gpu $(BUNDLE) --out $(OUT)/gpu.json

interop: $(VENV)/.installed-test ## tuned routers in vLLM, llama.cpp, transformers and lm-eval (installs 4 GB into out/interop)
	$(BIN)/python -m interop --out $(OUT)/interop --torch "$(TORCH)" --pip-args="$(PIP_ARGS)" $(INTEROP_ARGS)

setup-board: ## on a Jetson: system packages (asks for sudo), .venv that sees TensorRT, torch and cuda-python for its JetPack
	@test -n "$(L4T)" || { echo "make: setup-board is for a Jetson, and there is no /etc/nv_tegra_release here: make venv" >&2; exit 1; }
	sudo apt-get install -y python3-venv python3-dev build-essential python3-libnvinfer
	$(PYTHON) -m venv --system-site-packages $(VENV)
	@# torch first and alone: beside the other packages' index the newest release would win, which may be for another CUDA.
	$(BIN)/python -m pip install --quiet $(BOARD_INDEX) "$(BOARD_TORCH)"
	$(MAKE) venv VENV_ARGS=--system-site-packages TORCH=torch
	$(BIN)/python -m pip install --quiet "$(BOARD_CUDA)" -e ".[board]"
	$(BIN)/edge doctor

bench: $(VENV)/.installed ## read rate, decode speed and their ceilings on this machine
	$(BIN)/python -m bench --out $(OUT)/bench

profile: $(VENV)/.installed ## measure the demo model (or BUNDLE=) over three workloads, with telemetry; then `make report`
	test -f $(BUNDLE)/manifest.json || $(MAKE) demo
	@# A folder per call: a run never writes over another one.
	set -e; folder=$(PROFILE)/$$(date +%Y%m%d-%H%M%S); for workload in $(WORKLOADS); do \
	  $(BIN)/edge profile $(BUNDLE) --workload $$workload --out $$folder/$$workload $(PROFILE_ARGS); done
	$(MAKE) report

report: $(VENV)/.installed ## the newest runs of `make profile` as HTML pages (needs matplotlib, which it installs)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[bench]"
	@ls -d $(PROFILE)/*/ >/dev/null 2>&1 || { echo "make: no runs in $(PROFILE): run make profile" >&2; exit 1; }
	@set -e; for run in $$(ls -dt $(PROFILE)/*/ | head -1)*/; do $(BIN)/edge report $$run; done

clean: ## remove what was built; the environment stays (rm -r .venv removes it)
	rm -rf $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
