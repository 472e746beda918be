# make demo   train a 50,000-layer network on real images and show what vanishes (takes minutes)
# make test   lint, then every quick test: about 10 minutes on 2 cores
# make test-slow     sanitizers, the CUDA emulator, the deepest nets, other libraries' models: at most 30 minutes
# make test-release  everything else: other versions of torch and Triton, wheels, reproductions (hours; resumes where it
#                    was interrupted; PARTS="wheels triton-3.6.0" runs these alone)
# make docs   the documentation as a site, in build/docs; needs Python >= 3.11
# make bench  the microbenchmarks, quick sizes
# make gpu    build, test, sanitize and benchmark on this machine's NVIDIA card, with the torch that is installed;
#             PART=first for half an hour, PART=smoke or another part alone: python -m bench.gpu --help
# make reproduce   the papers' statements, each with a verdict (over an hour, not timed as a whole yet; goes on where it
#                  was stopped; QUICK=--quick takes small sizes and shows that all of it runs)
# make sanitize   the CPU kernels under the address, undefined-behaviour and thread sanitizers (takes minutes)
.PHONY: demo test test-slow test-release lint docs bench gpu reproduce sanitize clean
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo
PART   ?= all
# Parts of make test-release; empty means all of them.
PARTS  ?=
# Processes that share the tests, one file each. Half of the tests keep one core busy.
WORKERS ?= 2
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -type f) lcw_ops/__init__.py setup.py pyproject.toml

demo: $(VENV)/built
	$(BIN)/lcw-ops profile --depth 50000 --width 64 --batch 64 --steps 30 --out $(OUT)
	@echo "Open $(OUT)/report.png"

test: lint
	$(BIN)/python tests/run.py fast -n $(WORKERS)

test-slow: $(VENV)/built
	$(BIN)/python tests/run.py slow -n $(WORKERS)

test-release: $(VENV)/built
	$(BIN)/python tests/release.py $(addprefix --part ,$(PARTS))

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

docs: $(VENV)/documentation
	$(BIN)/python docs/build.py

bench: $(VENV)/built
	$(BIN)/lcw-ops bench --quick

gpu:
	$(PYTHON) -m bench.gpu $(PART)

reproduce: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mlxtend==0.25.0
	$(BIN)/python -m lcw_ops.bench.reproduce $(QUICK)

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize/harness.py

# Two stamp files: the dependencies change rarely, the build whenever a source does.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "import lcw_ops; print(lcw_ops.info())"
	@touch $@

# The package is installed already; this adds its extra, in the versions of pyproject.toml.
$(VENV)/documentation: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'lcw-ops[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lcw_ops/*.so
