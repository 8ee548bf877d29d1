# make demo        a small sweep on this machine's CPU: results in runs/demo
#                  (make demo TPU=1: on the chips of a TPU VM, with uv)
# make test        lint, types and the test suite (slow tests: make test-slow, or
#                  make test-all for both)
# make types       types alone
# make test-tpu    tests that need the TPU compiler, which it installs; no TPU
# make update-tpu  writes the collectives that these find to tests/aot/golden
# make test-wandb  tests of Weights & Biases, offline, installed by it
# make test-interop  tests against PyTorch, Transformers and lm-evaluation-harness,
#                    installed by it
# make test-beam   tests of preparation on Apache Beam, installed by it
# make campaign    kills, damages and fills up runs for two minutes
# make docs        builds the site from docs/ into site/
# make clean       removes .venv and what the tests left; runs/ stays

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo types test test-slow test-all campaign test-tpu update-tpu test-interop test-wandb test-beam docs clean

$(VENV)/demo: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "error: $(PYTHON) must be CPython 3.11 to 3.13; try make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/test: $(VENV)/demo requirements-test.txt requirements-data.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

# A TPU VM brings Python 3.10: uv finds or downloads 3.12.
$(VENV)/demo-tpu: requirements.txt
	@command -v uv > /dev/null \
	  || { echo "error: uv is missing; run: python3 -m pip install --user uv" >&2; exit 2; }
	uv venv --clear --python 3.12 $(VENV)
	uv pip install --quiet --python $(RUN) -r requirements.txt "jax[tpu]"
	@touch $@

demo: $(VENV)/demo$(if $(TPU),-tpu)
	$(RUN) -m edl_jax.sweep --experiment=experiments/demo.py \
	  --grid=losses.divergence_weight=0,0.01 --carve=4 --workdir=runs/demo

types: $(VENV)/test
	$(RUN) -m basedpyright --pythonpath $(RUN)

test: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --pythonpath $(RUN)
	$(RUN) -m pytest --quiet --numprocesses=2 --dist=loadfile -m "not slow"

test-slow: $(VENV)/test
	$(RUN) -m pytest --quiet -m slow

test-all: test
	$(MAKE) test-slow

# The kinds of faults that need no root and do not wait for minutes.
QUICK := kill,end_signal,second_run,poison,full_disk,shared_cache,damaged_cache
campaign: $(VENV)/test
	$(RUN) -m tests.campaign --minutes=2 \
	  --only=$(QUICK),damaged_checkpoints,damaged_for_evaluation

# Installed beside the environment: inside it, JAX would look for a TPU.
$(VENV)/tpu: $(VENV)/test requirements-tpu.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade \
	  --target=$@ -r requirements-tpu.txt
	@touch $@

# The compilers of newer jax, which need Python 3.12; left out without that.
$(VENV)/tpu-%/done:
	python3.12 -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  jax==$* $(LIBTPU_OF_$*) absl-py ml_collections "etils[epath]"
	@touch $@
LIBTPU_OF_0.11.1 := libtpu==0.0.46.3
LIBTPU_OF_0.12.0.1 := libtpu==0.0.50.1
TPU_NEXT := $(VENV)/tpu-0.11.1 $(VENV)/tpu-0.12.0.1

test-tpu: $(VENV)/tpu
	if python3.12 -c "" 2>/dev/null; then $(MAKE) $(TPU_NEXT:%=%/done); fi
	EDL_JAX_TPU_PYTHONS="$$(ls $(TPU_NEXT:%=%/bin/python) 2>/dev/null | xargs)" \
	  PYTHONPATH=$(VENV)/tpu $(RUN) -m pytest --quiet tests/aot tests/test_runtime.py

update-tpu: $(VENV)/tpu
	UPDATE_GOLDEN=1 PYTHONPATH=$(VENV)/tpu $(RUN) -m pytest --quiet tests/aot

# An environment of its own: its packages are large. The harness runs our model
# in it, beside Transformers, so it has JAX too.
INTEROP := requirements.txt requirements-interop.txt requirements-lm-eval.txt
$(VENV)/interop/done: $(INTEROP)
	$(PYTHON) -m venv $(VENV)/interop
	$(VENV)/interop/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(INTEROP:%=-r %)
	@touch $@

test-interop: $(VENV)/test $(VENV)/interop/done
	EDL_JAX_INTEROP_PYTHON=$(VENV)/interop/bin/python \
	  $(RUN) -m pytest --quiet tests/interop

# An environment of its own: the client brings a server process along.
$(VENV)/wandb/done: requirements.txt requirements-wandb.txt
	$(PYTHON) -m venv $(VENV)/wandb
	$(VENV)/wandb/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements.txt -r requirements-wandb.txt
	@touch $@

test-wandb: $(VENV)/test $(VENV)/wandb/done
	EDL_JAX_WANDB_PYTHON=$(VENV)/wandb/bin/python \
	  $(RUN) -m pytest --quiet tests/test_metric_writers.py

# An environment of its own: Beam wants an older pyarrow.
$(VENV)/beam/done: requirements-beam.txt
	$(PYTHON) -m venv $(VENV)/beam
	$(VENV)/beam/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-beam.txt
	@touch $@

test-beam: $(VENV)/beam/done
	$(VENV)/beam/bin/python -m pytest --quiet --noconftest \
	  tests/data/test_beam.py tests/data/test_buckets.py

# The pages of settings and losses import the code, and ruff wraps signatures.
$(VENV)/docs: $(VENV)/test requirements-docs.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis build *.egg-info
