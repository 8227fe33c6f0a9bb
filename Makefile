PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test bench docs lint clean

# Installed once, and again when a dependency changes. pip and not uv: pip finds the small CPU build of torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: $(VENV)/.installed

demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/align run pipelines/demo.py --out runs/demo

test: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

# Beside TRL on this machine's CPU; `make bench ONLY=dpo_hh` runs one.
bench: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.run $(if $(ONLY),--only $(ONLY))

# The reference, made from the docstrings: open runs/docs/index.html.
docs: setup
	$(BIN)/pdoc --docformat google --output-directory runs/docs align

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
