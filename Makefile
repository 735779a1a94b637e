# Needs Python 3.11 or newer, git and make; everything else goes into .venv. Each recipe does its own set-up.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help book test lab bench refresh lock clean

help:  ## print these targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 16

book: $(STAMP)  ## run the chapters and build the pages, what changed of them: _build/html/index.html
	@$(BIN)/metabook book

test: $(STAMP)  ## unit, chapters, smoke, book and records checks; name some with TIERS="unit book"
	@$(BIN)/metabook check $(TIERS)

lab: $(STAMP)  ## open the chapters in JupyterLab
	@$(BIN)/python -m jupyterlab

bench: $(STAMP)  ## time one meta-gradient against other libraries: _build/bench.json
	@$(BIN)/metabook bench

refresh: $(STAMP)  ## run the chapters and put their outputs into notebooks/; name some with CHAPTERS="02 08"
	@$(BIN)/metabook refresh $(CHAPTERS)

lock: $(STAMP)  ## add to requirements.lock what pyproject.toml newly asks for (with UPGRADE=--upgrade: all anew)
	@$(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip compile --quiet --annotation-style=line $(UPGRADE) pyproject.toml -o requirements.lock

clean:  ## remove what was built; the environment (.venv) and downloaded data stay
	rm -rf _build .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so an interrupted set-up is done again, and it is older than a lock that changed.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python && $(BIN)/python -c "" 2>/dev/null || { \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
	      exec "$$python" -m venv --clear "$(VENV)"; \
	    fi; \
	  done; \
	  echo "metabook: no Python 3.11 or newer (with its venv module) was found; install one, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	@echo "Installing requirements.lock into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib >/dev/null 2>&1 || true  # on all cores; a few are templates
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
