# Every target sets up what it needs in .venv; nothing but python3 and make is asked of the machine.
#   make demo    train a small language model with sparse and dense attention, and draw what it did
#   make test    unit, property and peer tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := torch,plot,cli,test
comma  := ,

# With an NVIDIA driver, the extra that fits it: 580 and newer serve CUDA 13, 525 and newer CUDA 12.
# nvidia-smi names the driver; inside some containers only /proc does. CUDA=none leaves it out.
DRIVER := $(shell { nvidia-smi --query-gpu=driver_version --format=csv,noheader; \
	  sed -n 's/^NVRM version:.* \([0-9][0-9]*\.[0-9.]*\) .*/\1/p' /proc/driver/nvidia/version; } \
	  2>/dev/null | sed -n 's/^ *\([0-9][0-9]*\)\..*/\1/p' | head -n 1)
CUDA   ?= $(shell d=$(or $(DRIVER),0); \
	  if [ $$d -ge 580 ]; then echo cuda13; elif [ $$d -ge 525 ]; then echo cuda12; else echo none; fi)
ALL_EXTRAS := $(EXTRAS)$(if $(filter-out none,$(CUDA)),$(comma)$(CUDA))

# torch's threads sleep while they wait: spinning costs more than tenfold where cores are shared.
export OMP_WAIT_POLICY ?= passive

READY  := $(VENV)/.ready-$(CUDA)
TOOLS  := $(VENV)/.tools
SITE   := $(VENV)/.docs

.PHONY: help demo test test-gpu gpu-check test-peers check format typecheck bench report wheel images docs venv clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile
	@echo "others: check format typecheck test-gpu test-peers gpu-check bench report wheel images docs clean"

venv: $(READY)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints/test.txt Makefile | $(BIN)/python
	@echo "installing scfa_core[$(ALL_EXTRAS)] into $(VENV) (once)"
	$(PIP) install --quiet --editable '.[$(ALL_EXTRAS)]' --constraint constraints/test.txt
	@touch $@

$(TOOLS): pyproject.toml | $(READY)
	$(PIP) install --quiet --editable '.[dev]' --constraint constraints/test.txt
	@touch $@

# The reference is made from the sources as text, so the site needs neither torch nor the package's tests.
$(SITE): pyproject.toml constraints/docs.txt | $(BIN)/python
	$(PIP) install --quiet --editable '.[docs]' --constraint constraints/docs.txt
	@touch $@

demo: $(READY)
	$(BIN)/python -m scfa_core demo $(ARGS)

# ARGS passes anything on: make demo ARGS='--text notes.txt'; K=expression picks tests
# Tests run in a process for each core; ARGS=-n0 runs all in one. The processes share what is costly
# to make (tests/unit/once.py), and one that has none left takes tests of another. NumPy's products,
# whose threads spin while they wait, are computed by one thread in each.
test: export OPENBLAS_NUM_THREADS ?= 1
test: $(READY)
	$(BIN)/pytest -m "not gpu" -n logical --maxprocesses 8 --dist worksteal \
	  $(if $(K),-k "$(K)") $(ARGS)

test-gpu: $(READY)
	SCFA_REQUIRE=gpu $(BIN)/pytest tests/gpu $(if $(K),-k "$(K)") $(ARGS)

test-peers: $(READY)
	SCFA_REQUIRE=peers $(BIN)/pytest -m peers $(if $(K),-k "$(K)") $(ARGS)

gpu-check: $(READY)
	$(BIN)/python tests/gpu/check.py $(ARGS)

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory typecheck

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A checker run in the checkout cannot see scfa_core.backends (it is a mapped folder), so it reads an installed copy.
typecheck: $(TOOLS)
	rm -rf build/lib build/typed
	$(PIP) install --quiet --no-deps --upgrade --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  --python-executable ../../$(BIN)/python -p scfa_core

bench: $(READY)
	$(BIN)/python -m bench $(if $(CASE),--case $(CASE)) $(ARGS)

# The README's table, every page of docs/perf made of tables and plots, and the plots, from bench/results/
report: $(READY)
	$(BIN)/python -m bench pages $(ARGS)

wheel: $(TOOLS)
	rm -rf build/lib dist
	$(BIN)/python -m build --outdir dist .

# Pictures of the README, of docs/ and of the gallery; the gallery's own code says what is drawn.
images: $(READY)
	$(BIN)/python docs/make_images.py
	$(BIN)/python docs/make_gallery.py

# build/site/index.html; a dead link, an unknown name or a page outside the navigation fails the build.
# The variable silences a notice of mkdocs-material about a coming mkdocs, not warnings of the build.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist demo-out $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
