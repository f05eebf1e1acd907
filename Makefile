# Give PYTHON= (the Python to build with) and VENV= (where the environment lives) to any target.
PYTHON ?= python3
VENV   ?= .venv
NB     ?=
SEEDS  ?=
DATA   ?=
PROFILE ?=
# Notebooks that `make reproduce` runs side by side; empty = two where all of them train on one thread.
JOBS   ?=
# More arguments for pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" (smaller, no CUDA).
PIP_ARGS ?=
# Clients of `make clients`, e.g. N=4; cases of `make fuzz`.
N ?=
# Of `make gpu`: minutes after which it stops by itself, and DRY=1 for a miniature.
MINUTES ?=
DRY ?=
# Of `make badges`: owner/name on GitHub (empty = that of git's remote origin, or none), and its branch.
REPO ?=
BRANCH ?=
# More arguments for pytest, e.g. ARGS="-x tests/test_record.py".
ARGS ?=

SHELL := /bin/sh
PY = "$(VENV)/bin/python"
# The part of pyproject.toml that decides what is installed; a change of it means a new installation.
KEY = $$(sed -n '/^requires-python/,/^\[project.urls/p' pyproject.toml | cksum | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: help env reproduce test fuzz torture clients bench gpu lint data badges clean clean-runs doctor key

help:  ## this text
	@echo "fedal: federated active learning for object detection. Needs Python >= 3.10 and make; all else is fetched."
	@echo
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /@/' | awk -F@ '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo
	@echo "  PROFILE=smoke|quick|paper  NB=11_fedavg (or 11, or a list 10,11)  SEEDS=0,1,2  DATA=bccd (or a folder)  JOBS=1"
	@echo "  PYTHON=python3.12  VENV=/where/the/environment/lives  FEDAL_DATA=/where/the/data/lives"
	@echo "  Without PROFILE: smoke on a machine without a GPU, quick with one."

reproduce: env  ## run every notebook, rebuild every table and figure (PROFILE= NB= SEEDS= DATA= JOBS=)
	@$(PY) -m fedal_utils reproduce --nb "$(NB)" --profile "$(PROFILE)" --seeds "$(SEEDS)" --data "$(DATA)" \
	    $(if $(JOBS),--jobs $(JOBS))

test: env  ## run the tests on all cores (ARGS= for pytest)
	@$(PY) -m pytest -n auto $(ARGS)

fuzz: env  ## read N mutated data sets (N=20000): each is read, or refused by an error that names its file
	@FEDAL_FUZZ="$(or $(N),20000)" $(PY) -m pytest -q tests/data/test_fuzz.py tests/flower/test_fuzz.py $(ARGS)

clients: env  ## the experiment with N real client processes on this machine (N= PROFILE= DATA= ARGS=)
	@$(PY) -m fedal_utils clients --clients "$(or $(N),0)" --profile "$(PROFILE)" --data "$(DATA)" $(ARGS)

torture: env  ## kill a run at every instant and resume it, byte for byte (minutes)
	@FEDAL_KILL_EVERY=1 $(PY) -m pytest tests/record/test_run.py -k instant $(ARGS)

gpu: env  ## on a GPU: its tests, the benchmark, the pending runs, one archive (MINUTES= DRY=1)
	@$(PY) tests/bench/gpu.py --minutes "$(or $(MINUTES),600)" $(if $(DRY),--dry) $(ARGS)

bench: env  ## measure against the libraries, into results/tables/bench.csv
	@$(PY) tests/bench/bench.py $(ARGS)

lint: env  ## check the style of code and notebooks
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

data: env  ## download the small real data sets (BCCD, HIT-UAV) into $FEDAL_DATA or data/
	@$(PY) -m fedal_utils data bccd hit-uav

badges: env  ## say where the repository lies; badges and Colab's install cells follow (REPO=owner/name BRANCH=)
	@$(PY) -m fedal_utils badges --repo "$(REPO)" --branch "$(BRANCH)"

doctor: env  ## what this machine has: versions, GPU, memory, data, profile
	@$(PY) -m fedal_utils doctor

env:  ## build the environment in VENV (at once if it is there already)
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    if [ ! -x $(PY) ]; then \
	        echo "error: fedal needs Python 3.10 or newer; PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1 || true)." >&2; \
	        echo "       Install one, or name it: make PYTHON=python3.12 ..." >&2; exit 1; \
	    fi; \
	fi; \
	key="$(KEY)"; here="$$(pwd -P)"; stamp="$(VENV)/.fedal-stamp"; \
	if [ -x $(PY) ] && [ -f "$$stamp" ] && [ "$$(sed -n 1p "$$stamp")" = "$$key" ]; then \
	    [ "$$(sed -n 2p "$$stamp")" = "$$here" ] && exit 0; \
	    echo "The environment in $(VENV) is up to date; pointing it at this checkout."; \
	    if $(PY) -m pip install -q --disable-pip-version-check --no-deps $(PIP_ARGS) -e .; then \
	        printf '%s\n%s\n' "$$key" "$$here" > "$$stamp"; \
	    else \
	        echo "warning: that failed; make's own targets work all the same." >&2; \
	    fi; \
	    exit 0; \
	fi; \
	if [ ! -x $(PY) ]; then \
	    echo "Building the environment in $(VENV) (several minutes, about 6 GB with CUDA)."; \
	    "$(PYTHON)" -m venv "$(VENV)" || { rm -f "$(VENV)/bin/python"; \
	        "$(PYTHON)" -m virtualenv -q "$(VENV)" 2>/dev/null || { \
	        echo "error: $(PYTHON) cannot make a virtual environment (on Debian or Ubuntu: apt install python3-venv)." >&2; \
	        exit 1; }; }; \
	else \
	    echo "Bringing the environment in $(VENV) up to date."; \
	fi; \
	$(PY) -m pip install -q --disable-pip-version-check --progress-bar off $(PIP_ARGS) -e '.[backbones,dev,flower]' || { \
	    echo "error: pip could not install the packages (see above). Is the network there?" >&2; exit 1; }; \
	printf '%s\n%s\n' "$$key" "$$here" > "$$stamp"

key:
	@echo "$(KEY)"

clean:  ## remove caches and unpublished notebook copies; data, runs and published results stay
	rm -rf .pytest_cache .hypothesis .ruff_cache build dist fedal.egg-info results/notebooks/_work
	find fedal_utils tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

clean-runs: clean  ## also remove results/runs: every run starts from the beginning
	rm -rf results/runs
