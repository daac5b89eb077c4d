# Everything is made inside .venv; nothing needs to be installed by hand except Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test lint types unit bench bench-quick docs format clean

demo: $(STAMP)
	$(BIN)/bitsmith demo -o demo-out

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# RIVALS=PYTHON of an environment with Brevitas (benchmarks/README.md) times it beside ours.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy --csv benchmarks/results/accuracy.csv
	$(BIN)/python -m benchmarks.algorithms --csv benchmarks/results/algorithms.csv
	$(BIN)/python -m benchmarks.equalization --csv benchmarks/results/equalization.csv
ifdef RIVALS
	$(BIN)/python -m benchmarks.speed --rivals $(RIVALS) --csv benchmarks/results/speed.csv
else
	$(BIN)/python -m benchmarks.speed
endif
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.tables

bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy --quick --nets resnet20 dscnn_kws
	$(BIN)/python -m benchmarks.algorithms --quick --nets resnet20 dscnn_kws \
		--rows "w4a8 nearest" "w4a8 gptq" "w4a8 qronos" w4a8-fast w4a8-best
	$(BIN)/python -m benchmarks.speed

# The site lands in site/ and opens from the disk; nothing is fetched from the network.
docs: $(STAMP)
	$(BIN)/python -m docs.build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out dist build site

# torch first and pinned: an open range would bring a CUDA build of several GB.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
