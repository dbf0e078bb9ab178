# make demo    set up and run the main job on a real model
# make test    the tests                make heavy   the end-to-end tests on the real model
# make check   ruff and mypy            make bench   benchmarks against peers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := core formats converters validation
# torch's default Linux build brings gigabytes of GPU packages; elsewhere, to get the CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
       $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# One process a core; threads of their own would only get into each other's way.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile
# The editable install links single files (type checkers need that), so a new or renamed file
# means linking again: its stamp is named after the list of files.
LIST := $(shell find $(FOLDERS) -name '*.py' -o -name '*.json' | sort | cksum | tr ' ' -)
PACKAGES := $(VENV)/.packages
LINKED := $(VENV)/.linked-$(LIST)

.PHONY: demo test heavy check format bench screenshots clean setup

demo: setup
	@$(BIN)/python examples/demo.py

test: setup
	$(PYTEST) -m "not heavy"

heavy: setup
	@$(BIN)/python examples/base.py > /dev/null
	$(PYTEST) -m heavy --timeout 1800

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p loraduct

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@$(PIP) --no-build-isolation -e '.[bench]' --config-settings editable_mode=strict
	$(BIN)/python benchmarks/run.py

screenshots: setup
	$(BIN)/python scripts/screenshots.py

clean:
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

setup: $(LINKED)

$(PACKAGES): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)" >&2
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[torch,mlx,coreml,report,test,check]' --config-settings editable_mode=strict
	@rm -f $(VENV)/.linked-*; touch $@

$(LINKED): $(PACKAGES)
	@$(PIP) --no-build-isolation --no-deps -e . --config-settings editable_mode=strict
	@rm -f $(VENV)/.linked-*; touch $@
