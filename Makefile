# `make demo` and `make test` are all that a newcomer needs. Both work in VENV, which they make.
VENV ?= .venv
# Where the demo writes.
OUT ?= runs/demo

ROOMS := datasets policies sim rl_finetune real_robot configs cli
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# --no-deps, because they ask for a keyboard driver that needs a compiler and an OpenCV that needs a screen; what they
# really need is in the extra "headless".
DEMO_SIMULATORS := robosuite
TEST_SIMULATORS := robosuite gym-pusht robomimic

.PHONY: demo test dev install clean

demo: $(VENV)/demo.stamp install
	$(BIN)/flowsteer demo out=$(OUT)

test: $(VENV)/test.stamp install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(foreach room,$(ROOMS),-p flowsteer.$(room))
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses=4 --dist=loadfile $(PYTEST)

# An editable install, for work on the code; `make test` and `make demo` install a plain copy again.
dev: $(VENV)/test.stamp
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) install --quiet -c constraints.txt pre-commit
	$(BIN)/pre-commit install

# The package itself, each time: a plain copy of this folder. `build` goes first, since it keeps deleted modules.
install:
	rm -rf build
	$(PIP) install --quiet --no-deps --no-build-isolation --force-reinstall .
	rm -rf build

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP) install -c constraints.txt setuptools '.[headless]'
	$(PIP) install -c constraints.txt --no-deps $(DEMO_SIMULATORS)
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP) install -c constraints.txt setuptools '.[headless,robotics,lerobot,minari,submitit,onnx,ray,warp,dev]'
	$(PIP) install -c constraints.txt --no-deps $(TEST_SIMULATORS)
	touch $@ $(VENV)/demo.stamp

$(VENV)/bin/pip:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$python"; \
	        "$$python" -I -m venv $(VENV) && exit 0; \
	        rm -rf $(VENV); \
	        echo "$$python cannot make an environment: on Debian and Ubuntu, apt install python3-venv" >&2; \
	        exit 1; \
	    fi; \
	done; \
	echo "flowsteer needs Python 3.11 or later: install it, or name it with make PYTHON=/path/to/python" >&2; \
	exit 1

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
