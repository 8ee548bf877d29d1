"""Evaluation, a notebook's calls and pools, as the TPU's compiler sees them."""

import json
import os
import subprocess
import sys

import pytest

from tests.aot.test_main import (
  ROOT,
  SMALL,
  TINY,
  compile_small,
  needs_compiler,
)


@needs_compiler
@pytest.mark.slow
def test_evaluation_steps_and_a_notebooks_calls():
  settings = [f"{key}={value}" for key, value in SMALL.items()]
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "tests.aot.evaluation_steps"),
      *(TINY, "v5p:2x2x1", *settings),
    ],
    cwd=ROOT,
    # Flags of the CPU's compiler are not for the TPU's.
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr
  found = json.loads(ended.stdout)
  whole, carved = found["whole"], found["carved"]
  assert carved["flops"] == whole["flops"] > 1e9
  # The mask is elementwise work.
  more = carved["flops_of_bodies"] - whole["flops_of_bodies"]
  assert 0 < more < 0.01 * whole["flops_of_bodies"]
  assert carved["peak"] < 1.01 * whole["peak"]
  # TPUs refuse kernels that a mesh has to divide; here each chip has its own.
  for call in ("logits", "token_routing"):
    assert any("splash" in kernel for kernel in found[call])
    assert any("gmm" in kernel for kernel in found[call])


@needs_compiler
@pytest.mark.slow
def test_pools_compile(tmp_path):
  path = tmp_path / "report.json"
  pools = {"model.pool_min": 2, "model.pool_max": 8}
  ended = compile_small("v5p:2x2x1", path, **pools)
  assert ended.returncode == 0, ended.stderr
  (run,) = json.loads(path.read_text())["runs"]
  # As without pools, whose sums and masks are elementwise work.
  assert 1 < run["hlo_flops"]["total"] / run["model_flops"]["total"] < 1.5
