# make demo          set up .venv and run the main job on the small model that ships
# make quick         set up .venv and run the tests that take a minute together
# make test          set up .venv and run all tests
# make test-interop  the tests against auto-gptq, optimum and peft, in an environment of their own
# make test-gptqmodel  those against GPTQModel, whose transformers is too new for auto-gptq, likewise
# make check         lint and types
# make fix           format, and fix lint automatically
# make clean         remove everything that the targets above make

PYTHON ?= python3
BIN := .venv/bin
INTEROP := .venv-interop/bin
GPTQMODEL := .venv-gptqmodel/bin
# two processes, a file of tests in one of them: its fixtures load a model once; in the order of tests/conftest.py
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo quick test check fix test-interop test-gptqmodel clean

demo: .venv/demo
	$(BIN)/qvl-edge demo

quick: .venv/ready
	$(BIN)/python -m pytest $(TWO) -m "not slow"

test: .venv/ready
	$(BIN)/python -m pytest $(TWO)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-interop: .venv-interop/ready
	$(INTEROP)/python -m pytest -m interop tests/interop

test-gptqmodel: .venv-gptqmodel/ready
	CUDA_VISIBLE_DEVICES= $(GPTQMODEL)/python -m pytest -m interop tests/interop/test_gptqmodel.py

clean:
	rm -rf .venv .venv-interop .venv-gptqmodel demo-output build dist *.egg-info

# PyPI's torch brings CUDA along on Linux. A machine without a GPU takes less from PyTorch's own index of CPU builds:
# make demo TORCH_INDEX_URL=… (pytorch.org, Get Started). torch goes first and alone: its newest version must not be taken,
# not even to build.
.venv/demo: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, {v} was found; make PYTHON=python3.12 …")'
	@echo "installing torch$(if $(TORCH_INDEX_URL), from $(TORCH_INDEX_URL),: PyPI's has CUDA with it; TORCH_INDEX_URL=… takes another index)"
	$(PYTHON) -m venv .venv || (echo "python3 needs its venv module: apt-get install python3-venv" && false)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,quantize,export]'
	touch $@

.venv/ready: .venv/demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,quantize,export,dev]'
	touch $@

.venv-interop/ready: setup.py constraints-interop.txt
	$(PYTHON) -m venv .venv-interop
	$(INTEROP)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints-interop.txt)" setuptools wheel
	$(INTEROP)/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints-interop.txt \
		-e '.[cpu,export,interop]' pytest
	touch $@

.venv-gptqmodel/ready: setup.py
	$(PYTHON) -m venv .venv-gptqmodel
	$(GPTQMODEL)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(GPTQMODEL)/pip install --quiet --disable-pip-version-check gptqmodel==7.6.0 -e '.[cpu]' pytest
	touch $@
