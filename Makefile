# Targets that build, prove and measure. `make` alone lists them. Everything is installed into .venv on first use.

SHELL := /bin/bash
VENV ?= .venv
MODEL ?= minilm
OUT ?= artifacts
ROUNDS ?= 5
DATA ?=
TARGET ?=
HOST ?=
BUNDLE_OPTIONS ?=
DEPLOY_OPTIONS ?=
GPU_BENCH_OPTIONS ?=
# The first of these that is there and is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
DEMO_TEXT := A small model that answers like the large one is worth more than a large one that waits.

.PHONY: help setup demo build bundle deploy test test-oldest test-browser test-aarch64 gpu-check check bench bench-language bench-peers gpu-bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo "  variables: MODEL=$(MODEL) OUT=$(OUT) VENV=$(VENV) DATA=folder with benchmark data"

# One stamp for each set of packages; it is made again when pyproject.toml or the pins change.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "onnxpress needs Python 3.11 or newer: install it, or name it with PYTHON=…"; exit 2; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --upgrade pip && touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@echo "== installing onnxpress[build,cpu,demo] into $(VENV) (a few minutes the first time; torch is large)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[build,cpu,demo,secure]' && touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "== installing the tools for tests and checks into $(VENV)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[build,cpu,demo,secure,dev]' && touch $@

setup: $(VENV)/.dev ## make .venv with everything

demo: $(VENV)/.demo ## all-MiniLM-L6-v2 from PyTorch to a proven int8 artifact that answers
	@echo "== build: export, verify, press, prove"
	@$(BIN)/onnxpress build models/minilm/recipe.toml --out $(OUT)/minilm
	@echo "== verify: digests and golden outputs"
	@$(BIN)/onnxpress verify $(OUT)/minilm
	@echo "== answer"
	@$(BIN)/onnxpress run $(OUT)/minilm --text "$(DEMO_TEXT)"
	@echo "== done: $(OUT)/minilm, with its proof in $(OUT)/minilm/report.html"

build: $(VENV)/.demo ## build models/MODEL/recipe.toml into OUT/MODEL
	@test -f models/$(MODEL)/recipe.toml || { echo "models/$(MODEL)/recipe.toml does not exist; there are: $$(ls models)"; exit 2; }
	@$(BIN)/onnxpress build models/$(MODEL)/recipe.toml --out $(OUT)/$(MODEL)

bundle: $(VENV)/.demo ## MODEL built for a device and packed into one file (TARGET=raspberry-pi-5, linux-x86_64, browser, …; BUNDLE_OPTIONS="--sign key.pem")
	@test -n "$(TARGET)" || { echo "TARGET is needed: make bundle MODEL=$(MODEL) TARGET=raspberry-pi-5"; exit 2; }
	@build=$$($(BIN)/python -c 'import sys; from onnxpress.devices import device; print(device(sys.argv[1]).builds[0])' "$(TARGET)" \
		2>/dev/null) || { $(BIN)/onnxpress bundle none --target "$(TARGET)"; exit 2; }; \
	test "$(OUT)/$(MODEL)-$$build/manifest.json" -nt models/$(MODEL)/recipe.toml || \
		$(BIN)/onnxpress build models/$(MODEL)/recipe.toml --target $$build --out "$(OUT)/$(MODEL)-$$build" && \
	$(BIN)/onnxpress bundle "$(OUT)/$(MODEL)-$$build" --target "$(TARGET)" $(BUNDLE_OPTIONS)

deploy: ## bundle, then bring it to HOST=user@device over ssh, test it there, switch to it (DEPLOY_OPTIONS="--python venv/bin/python")
	@test -n "$(HOST)" || { echo "HOST is needed: make deploy HOST=pi@raspberrypi.local MODEL=$(MODEL) TARGET=raspberry-pi-5"; exit 2; }
	@case "$(TARGET)" in windows-*|android-*|browser) echo "A bundle for $(TARGET) is a zip, which is not deployed over ssh: make bundle, and copy it there."; exit 2;; esac
	@$(MAKE) --no-print-directory bundle
	@$(BIN)/onnxpress deploy "$(OUT)/$(MODEL)-$(TARGET).tar" "$(HOST)" $(DEPLOY_OPTIONS)

# One thread of OpenMP a process: threads of several processes that wait for each other by spinning take many times as long.
PYTEST = OMP_NUM_THREADS=1 $(1)/python -m pytest -n auto --dist loadfile

test: $(VENV)/.dev ## all tests, the files side by side on all cores
	@echo "== pytest"
	@$(call PYTEST,$(BIN))

test-oldest: ## all tests with the oldest supported versions, in an environment of their own
	@test -n "$(PYTHON)" || { echo "onnxpress needs Python 3.11 or newer"; exit 2; }
	@echo "== making .venv-oldest"
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[build,cpu,demo,secure,dev]'
	@$(call PYTEST,.venv-oldest/bin) -m "not venv and not newest"

test-browser: $(VENV)/.dev ## the page of a browser bundle, in headless Chromium (Debian: apt-get install chromium npm)
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null && command -v npm >/dev/null || \
		{ echo "Chromium and npm are needed; on Debian: apt-get install chromium npm"; exit 2; }
	@$(BIN)/python -m pytest tests/pipeline/test_browser_bundle.py -m browser

test-aarch64: $(VENV)/.dev ## bundles on an emulated arm64 processor: the tests, and MODEL for linux-aarch64 (Debian; downloads 120 MB)
	@PYTHON="$(BIN)/python" bash tests/devices/setup.sh aarch64
	@$(BIN)/python -m pytest tests/devices/test_aarch64.py
	@$(MAKE) --no-print-directory bundle MODEL=$(MODEL) TARGET=linux-aarch64
	@rm -rf .devices/bundle && mkdir .devices/bundle && tar xf $(OUT)/$(MODEL)-linux-aarch64.tar -C .devices/bundle
	@.devices/aarch64/python .devices/bundle/$(MODEL)-linux-aarch64/run.py --self-test
	@set -o pipefail; .devices/aarch64/python .devices/bundle/$(MODEL)-linux-aarch64/run.py "$(DEMO_TEXT)" | cut -c 1-120

# onnxruntime and onnxruntime-gpu overwrite each other, so the GPU wheel has an environment of its own.
.venv-gpu/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "onnxpress needs Python 3.11 or newer: install it, or name it with PYTHON=…"; exit 2; }
	@echo "== installing onnxpress[build,gpu,tensorrt-check,dev] into .venv-gpu (0.5 GB and torch the first time)"
	@test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	@PYTHONWARNINGS=ignore .venv-gpu/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[build,gpu,tensorrt-check,dev]' && touch $@

gpu-check: .venv-gpu/.installed ## all about CUDA and TensorRT that needs no card: options, errors, NVIDIA's parser and builder; then tests/gpu
	@echo "== options, profiles and errors, with the wheel onnxruntime-gpu"
	@.venv-gpu/bin/python -m pytest -q -rs tests/runtime/test_providers.py tests/runtime/test_fresh_venv.py -k "not cpu_extra and not cpu_wheel"
	@echo "== graphs for cuda, on the CPU provider of the wheel onnxruntime-gpu"
	@.venv-gpu/bin/python -m pytest -q -rs tests/optimizers/test_cuda_passes.py -m "not newest"
	@echo "== graphs for cuda and tensorrt through NVIDIA's parser and builder (TensorRT-RTX)"
	@.venv-gpu/bin/python -m pytest -q -rs tests/optimizers/test_tensorrt_rtx.py
	@if [ -d tests/gpu ]; then echo "== what needs a card (skipped without one)"; .venv-gpu/bin/python -m pytest -q -rs tests/gpu; fi
	@echo "== this machine"
	@.venv-gpu/bin/onnxpress doctor
	@echo "== checked: options of CUDA and TensorRT, profiles from signatures, errors for missing libraries and drivers, graphs that NVIDIA's"
	@echo "   parser takes and its builder builds. Needs a card: sessions, answers, memory limits, CUDA graphs, engines, context models,"
	@echo "   TensorRT for RTX as a provider."

check: $(VENV)/.dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench-peers: $(VENV)/.dev ## environments for the tools that benchmarks compare with
	@PYTHON="$(PYTHON)" bash benchmarks/peers/setup.sh

bench: bench-peers ## MiniLM side by side with other tools (DATA=folder with stsb/ adds quality and mixed lengths)
	@bash benchmarks/run.sh "$(BIN)/python" "$(OUT)" "$(ROUNDS)" "$(DATA)"

bench-language: bench-peers ## language models side by side (DATA=folder with lm_wikitext2/, lm_tinyshakespeare/, model_stories260K/)
	@bash benchmarks/language.sh "$(BIN)/python" "$(OUT)" "$(ROUNDS)" "$(DATA)"

gpu-bench: ## encoders and decoders beside torch on an NVIDIA card (PYTHON=… has torch and onnxruntime-gpu; GPU_BENCH_OPTIONS="--budget 240")
	@for python in "$(BIN)/python" .venv-gpu/bin/python "$(PYTHON)"; do \
		"$$python" -c 'import importlib.metadata; importlib.metadata.version("onnxruntime-gpu")' 2>/dev/null && break; done; test -n "$$python" || { echo "Python is needed: name it with PYTHON=…"; exit 2; }; \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$$python" benchmarks/gpu/bench.py $(GPU_BENCH_OPTIONS)

clean: ## remove environments, artifacts and caches
	rm -rf .venv .venv-oldest .venv-gpu .venv-peers .bench-cache .devices artifacts build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
