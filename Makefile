# The two commands of the README: `make demo` and `make test`. Each sets up what it needs and is quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
LOCKS  := deploy/locks
# Files of tests that run at once; each needs about 1.5 GB of memory, and trains its small networks on one thread.
AT_ONCE ?= 2

.PHONY: demo test check lint lock bench screens pictures explore scan sbom release-notes clean

demo: $(VENV)/.clinic
	$(BIN)/busgen-cds demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/lint-imports && $(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m tests.bench $(ARGS)

# The pictures of the documentation, and those that the workstation's test compares with: look at each before committing.
screens: $(VENV)/.test
	$(BIN)/python -m tests.screens $(ARGS)

pictures: $(VENV)/.test
	BUSGEN_ACCEPT_PICTURES=1 $(BIN)/python -m pytest tests/system/test_workstation.py $(ARGS)

# The whole API by its own description; a slice of it is among the tests.
explore: $(VENV)/.test
	$(BIN)/python -m tests.web.explore $(ARGS)

# Secrets in what would be published, and known weaknesses of what is locked: the second needs the network, and says
# so by exit code 3 where there is none.
scan: $(VENV)/.test
	$(BIN)/python deploy/scan_secrets.py
	$(BIN)/python deploy/scan_dependencies.py $(ARGS)

sbom: $(VENV)/.clinic
	@$(BIN)/busgen-cds sbom $(ARGS)

release-notes: $(VENV)/.test
	$(BIN)/python deploy/release_notes.py $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.clinic: $(LOCKS)/clinic.txt pyproject.toml | $(BIN)/python
	$(PIP) install --no-deps --require-hashes -r $(LOCKS)/clinic.txt
	$(PIP) install --no-deps -e .
	touch $@

# torch comes first and alone: its CPU and GPU builds share one version, and nothing else may replace it.
$(VENV)/.test: $(VENV)/.clinic $(LOCKS)/test.txt
	$(PIP) install torch==2.13.0
	$(PIP) install --no-deps --require-hashes -r $(LOCKS)/test.txt
	touch $@

# The locks are made together so that a package has one version in all.
lock: | $(BIN)/python
	$(PIP) install pip-tools torch==2.13.0
	$(BIN)/pip-compile -q --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-allow-unsafe --no-header \
	  --extra train --extra test --unsafe-package torch --unsafe-package pip --unsafe-package setuptools -o $(LOCKS)/test.txt pyproject.toml
	$(BIN)/pip-compile -q --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-allow-unsafe --no-header \
	  -c $(LOCKS)/test.txt -o $(LOCKS)/clinic.txt pyproject.toml
	$(BIN)/pip-compile -q --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-allow-unsafe --no-header \
	  --extra train --unsafe-package torch --unsafe-package pip --unsafe-package setuptools -c $(LOCKS)/test.txt -o $(LOCKS)/train.txt pyproject.toml

clean:
	rm -rf $(VENV) demo-site .pytest_cache .mypy_cache .ruff_cache
