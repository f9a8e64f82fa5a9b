# make book   set up, run the notebooks, build the book, print where to open it
# make test   the same set-up, then the tests
# make pdf    the derivations as a PDF, where LaTeX is installed
#
# Options: PROFILE=full (a file in studies/), JOBS=2 (runs at the same time), PYTHON=python3.12, PYTEST_ARGS=...

PROFILE ?= default
JOBS ?= 2
VENV ?= .venv
PYTEST_ARGS ?=
BIN := $(VENV)/bin

# The first Python on the path that is new enough and can make virtual environments.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Data sets (the default profile needs none) that lie beside the project are used from there; otherwise they are downloaded.
ifneq ($(wildcard ../shared/data),)
export EDITKIT_DATA ?= $(abspath ../shared/data)
endif

# Named after the content of the two files, so that the set-up is repeated when, and only when, they change.
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: book pdf test test-alone setup lint pins clean help
help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

book: $(INSTALLED)
	@status=0; $(BIN)/editkit run studies/$(PROFILE).yaml --jobs $(JOBS) || status=$$?; \
	test $$status -gt 1 || $(BIN)/editkit book studies/$(PROFILE).yaml || status=$$?; exit $$status

pdf: $(INSTALLED)
	@$(BIN)/editkit book studies/$(PROFILE).yaml --pdf

# One thread per process: the tests run in as many processes as there are cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# Each file of tests alone, last name first: none may lean on what another has left behind.
test-alone: $(INSTALLED)
	@failed=; for file in $$(ls -r tests/test_*.py); do \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $$file $(PYTEST_ARGS) || failed="$$failed $$file"; done; \
	test -z "$$failed" || { echo "failed alone:$$failed"; exit 1; }

setup: $(INSTALLED)
$(INSTALLED):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with the venv module is needed; none was found on the PATH." \
		"Install one (Debian: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,real]'
	@rm -f $(VENV)/.installed-* && touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .

# Write constraints.txt and environment.yml anew from what is installed in the environment.
pins: setup
	$(BIN)/python tools/pins.py

clean:
	rm -rf $(VENV) .editkit book/_build book/runs
