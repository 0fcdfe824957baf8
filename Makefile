# One virtual environment, made on first use; remove .venv to start over.
PYTHON ?= python3
VENV ?= .venv
# On a machine without a GPU, a wheel of the CPU build saves gigabytes: make TORCH=path/to/torch.whl ...
TORCH ?= torch>=2.11,<=2.13.0
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Test files run at a time; many of them start processes of their own.
JOBS ?= 2

.PHONY: help install quickstart ladder-quickstart test test-slow lint clean

help:
	@echo "make quickstart   install, prepare a corpus, train a small model on two processes"
	@echo "make ladder-quickstart   a ladder of small models, its laws and a plan: 20 minutes on two cores"
	@echo "make test         the tests a contributor waits for"
	@echo "make test-slow    the long ones too"
	@echo "make lint         ruff and the import contracts"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed

data/quickstart/preparation.json: | $(VENV)/.installed
	$(BIN)/python launch/prepare.py "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')" \
	  --glob '**/*.py' --exclude '**/site-packages/**' --train-tokenizer --vocab-size 4096 --holdout 2% --out data/quickstart

quickstart: data/quickstart/preparation.json
	$(BIN)/torchrun --nproc-per-node 2 launch/pretrain.py configs/quickstart.toml

ladder-quickstart: data/quickstart/preparation.json
	$(BIN)/python launch/sweep.py configs/ladder-quickstart.toml --jobs 2

# A file's tests share what it has built, so files are what workers take; those that start processes come first.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "slow or not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) data/quickstart runs/quickstart
