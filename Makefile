# make demo   train a 50,000-layer network on real images and show what vanishes (some minutes)
# make test   lint, then every test                     make bench   the microbenchmarks, quick sizes
# make gpu    build, test, sanitize and benchmark on this machine's NVIDIA card, with the torch that is installed;
#             PART=smoke or another part alone: python bench/gpu.py --help
# make test-release   the Triton kernels with the oldest and the installed Triton: every launch compiled (hours)
# make sanitize   the CPU kernels under the address, undefined-behaviour and thread sanitizers (some minutes)
.PHONY: demo test test-release lint bench gpu sanitize clean
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo
PART   ?= all
# Processes that share the tests, a file each: half of them leave all cores but one idle.
WORKERS ?= 2
BIN    := $(VENV)/bin
# Beside the environment, which keeps the Triton that its torch brought.
OLDEST_TRITON ?= 3.6.0
OLD    := $(abspath $(VENV))-triton-$(OLDEST_TRITON)

SOURCES := $(shell find csrc -type f) lcw_ops/__init__.py setup.py pyproject.toml

demo: $(VENV)/built
	$(BIN)/lcw-ops profile --depth 50000 --width 64 --batch 64 --steps 30 --out $(OUT)
	@echo "Open $(OUT)/report.png"

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The tests compile and interpret with the Triton that they import. That of 3.6 cannot be interpreted beside numpy 2.4.
TEST_TRITON = LCW_OPS_EVERY_LAUNCH=1 $(BIN)/python -m pytest -n $(WORKERS) tests/test_triton_*.py

test-release: $(VENV)/built $(OLD)/installed
	PYTHONPATH=$(OLD) $(BIN)/python -c "import triton; assert triton.__version__ == '$(OLDEST_TRITON)', triton.__file__"
	PYTHONPATH=$(OLD) $(TEST_TRITON)
	$(TEST_TRITON)

$(OLD)/installed: $(VENV)/installed
	rm -rf $(OLD)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD) triton==$(OLDEST_TRITON) "numpy<2.4"
	@touch $@

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/built
	$(BIN)/lcw-ops bench --quick

gpu:
	$(PYTHON) bench/gpu.py $(PART)

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize/harness.py

# Two marks: the dependencies change rarely, the build whenever a source does.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -c "import lcw_ops; print(lcw_ops.info())"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton-* build dist *.egg-info lcw_ops/*.so
