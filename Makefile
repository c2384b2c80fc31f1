# make demo: set up and run the whole story.  make test: install what the tests need and run them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install clean

demo: $(BIN)/prefopt
	$(BIN)/prefopt quickstart

# Two workers of one thread each: on two cores, threads of both would wait for one another.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by itself, so that a CPU build already at hand serves.
$(BIN)/prefopt: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.dev: $(BIN)/prefopt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(BIN)/prefopt

clean:
	rm -rf .venv runs
