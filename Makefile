# Every target sets up what it needs in .venv, from nothing; a second call finds it ready.
#   PY=python3.12   the Python that .venv is made with (3.10 or newer; remove .venv to change it)
#   ARGS="..."      passed on: to `sedm study`, pytest, JupyterLab or the benchmark
#   NB="..."        the notebooks that `make notebooks` runs (default: all)
PY ?= python3
ARGS ?=
NB ?=

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
# What is installed is known by its requirements and by the folder it was installed from.
KEY := $(shell { pwd; cat settings.ini setup.py pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)
CORE := $(VENV)/.core-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
LAB := $(VENV)/.lab-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help study test lab bench worlds notebooks readme clean

help: ## Print this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

study: $(CORE) ## The main job: sampling drift, scaling and guidance on real images, as table and report (ARGS="--help" lists options)
	@$(VENV)/bin/sedm study $(ARGS)

# Every part runs even if an earlier one fails; the last line says which did.
test: $(DEV) ## Gates, every notebook, then pytest
	@failed=; \
	echo "== gates"; $(PYTHON) tools/gates.py || failed="$$failed gates"; \
	echo "== notebooks"; $(PYTHON) tools/nbtest.py || failed="$$failed notebooks"; \
	echo "== pytest"; $(PYTHON) -m pytest $(ARGS) || failed="$$failed pytest"; \
	if [ -n "$$failed" ]; then echo "make test: FAILED:$$failed" >&2; exit 1; fi

lab: $(LAB) ## Open the notebooks in JupyterLab
	@$(PYTHON) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) nbs

bench: $(CORE) ## Measure what sampler, traces, tests, targets and distances cost, as ratios within one run
	@$(PYTHON) bench/bench.py $(ARGS)

worlds: $(DEV) ## Train the shipped worlds again, from the data to the files in sedm_kit/data (long)
	@SEDM_FULL=1 OMP_NUM_THREADS=1 $(PYTHON) tools/nbrun.py nbs/worlds

notebooks: $(DEV) ## Run notebooks in place and keep their outputs (NB="nbs/00_noise.ipynb": only these)
	@$(PYTHON) tools/nbrun.py $(NB)

readme: ## Write README.md from nbs/index.ipynb
	@$(PY) tools/readme.py

clean: ## Remove what building and testing leave behind (.venv stays)
	rm -rf _proc _docs build dist .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) -type d -exec rm -rf {} +

# $(call install,extra): an editable install of sedm_kit[extra], in a .venv that is made when missing or unusable.
# Stamps of other requirements go away with the first install that follows a change; any extra includes the core.
define install
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "sedm_kit needs Python 3.10 or newer, but '$(PY)' is: $$($(PY) -V 2>&1). Name another one: make PY=python3.12 ..." >&2; exit 1; }; \
	  $(PY) -m venv $(VENV); }
	@echo "Installing sedm_kit$(1) into $(VENV): a minute or more the first time, silent unless something is wrong."
	@$(PIP) install -qq -c constraints.txt -e '.$(1)'
	@test -e $(CORE) || rm -f $(VENV)/.core-* $(VENV)/.dev-* $(VENV)/.lab-*
	@touch $(CORE) $@
endef

$(CORE):
	$(call install,)

$(DEV):
	$(call install,[dev])

$(LAB):
	$(call install,[lab])
