# `make` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(BIN)/wancli ## Create .venv with the wancli command in it

demo: install ## Render configs/demo.yaml and say where the videos are
	@scripts/demo

test: $(VENV)/dev ## Run the tests, all except the rigs
	$(BIN)/pytest -n 2 --dist worksteal --durations 15 --ignore tests/crash --ignore tests/fuzz

crash: $(VENV)/dev ## Run the rigs: failing disks, kills, power cuts, damage, fuzz, soak
	$(BIN)/pytest -n 2 --dist worksteal tests/crash tests/fuzz

crash-long: $(VENV)/dev ## The rigs with the counts of a release: 2,000 triple faults, 100 kills, 20x the fuzz
	WANCLI_CRASH_LONG=1 WANCLI_FUZZ=20 WANCLI_SOAK=200 $(BIN)/pytest -n 2 --dist worksteal tests/crash tests/fuzz

crash-mounts: $(VENV)/dev ## 30 power cuts on a mounted ext4; root only
	$(BIN)/python tests/crash/mounted.py

soak: $(VENV)/dev ## 200 renders in one process; the memory must stay
	WANCLI_SOAK=200 $(BIN)/pytest tests/crash/test_soak.py

lint: $(VENV)/dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

browser: $(VENV)/dev ## Test pages in Chromium, and fail where there is none
	@command -v chromium chromedriver >/dev/null || apt-get install -y chromium chromium-driver
	WANCLI_BROWSER=required $(BIN)/pytest tests/browser

bench: $(VENV)/dev ## Measure against diffusers, side by side in one process
	$(BIN)/python -m scripts.bench

gpu: $(VENV)/dev ## Test and measure on a GPU, where there is one
	$(BIN)/python -m scripts.gpu

bench-large: $(VENV)/dev ## Measure 14B in 6 GiB and how soon 1.3B runs; half an hour, 40 GB in DIR
	$(BIN)/python -m scripts.bench.first_block --dir $(DIR)
	$(BIN)/python -m scripts.bench.streaming --dir $(DIR)/two-blocks
	$(BIN)/python -m scripts.bench.large --dir $(DIR) --encoder
	$(BIN)/python -m scripts.bench.large --dir $(DIR)

wheel: install ## Build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove what the targets above made
	rm -rf $(VENV) build dist out *.egg-info

$(BIN)/wancli: pyproject.toml constraints.txt
	scripts/install $(VENV) $(PYTHON) .
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt
	scripts/install $(VENV) $(PYTHON) '.[dev]'
	@touch $@

.PHONY: help install demo test crash crash-long crash-mounts soak lint browser bench bench-large gpu wheel clean
.DEFAULT_GOAL := help
