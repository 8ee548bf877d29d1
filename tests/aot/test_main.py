"""The command: refusals, and programs of the TPU's compiler."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from edl_jax.aot import __main__ as aot
from edl_jax.aot import topologies

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = str(ROOT / "experiments" / "tiny.py")

# Two layers of shapes that TPUs take as they are.
SMALL = {
  "model.num_layers": 2,
  "model.width": 256,
  "model.num_heads": 4,
  "model.num_kv_heads": 2,
  "model.head_width": 128,
  "model.num_experts": 8,
  "model.expert_width": 256,
  "model.vocabulary_size": 2048,
  "model.dtype": "bfloat16",
  "model.remat": "full",
  "train.batch_size": 8,
  "train.sequence_length": 256,
  "mesh.data": 1,
  "mesh.fsdp": 2,
  "mesh.expert": -1,
}

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is not installed; make test-tpu installs it",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """The command sets variables, which other tests should not see."""
  monkeypatch.setattr(os, "environ", dict(os.environ))


def refused(capsys, *arguments):
  assert aot.main(arguments) == 2
  captured = capsys.readouterr()
  (line,) = captured.err.splitlines()
  assert line.startswith("error: ") and not captured.out
  return line


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ([], "--experiment is missing"),
    (["--experiment=none.py"], "none.py: no such file"),
    ([f"--experiment={TINY}"], "--topology is missing"),
    ([f"--experiment={TINY}", "--topology=v9:2x2"], "v5e: 2x2, 2x4"),
    ([f"--experiment={TINY}", "--topology=v5p"], "v5p: 2x2x1"),
    ([f"--experiment={TINY}", "--topology=v5p:2x4"], "3 dimensions"),
    ([f"--experiment={TINY}", "--topology=v5e:3x4"], "first two of them even"),
    (
      [f"--experiment={TINY}", "--compare=losses.divergenceweight=0"],
      "did you mean losses.divergence_weight?",
    ),
    ([f"--experiment={TINY}", "--compare=seed"], "needs a value"),
    ([f"--experiment={TINY}", "--compare=seed=-1"], "seed=-1"),
    ([f"--experiment={TINY}", "--num_domains=0"], "num_domains"),
    ([f"--experiment={TINY}", "--num_slices=0"], "num_slices"),
    ([f"--experiment={TINY}", "--toplogy=v5e:2x4"], "toplogy"),
    ([f"--experiment={TINY}", "v5e:2x4"], "unexpected argument 'v5e:2x4'"),
  ],
)
def test_wrong_command_line_is_one_line(capsys, arguments, named):
  assert named in refused(capsys, *arguments)


def test_missing_compiler_names_the_command_that_installs_it(
  capsys, monkeypatch
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  line = refused(capsys, f"--experiment={TINY}", "--topology=v5p:2x2x1")
  assert "python -m pip install libtpu==" in line
  pinned = [
    requirement
    for line in (ROOT / "requirements-tpu.txt").read_text().splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
    if requirement.marker is None or requirement.marker.evaluate()
  ]
  assert [f"{each.name}{each.specifier}" for each in pinned] == [
    topologies.LIBTPU
  ]


def compile_small(topology, path, *arguments, **overrides):
  """Runs the command in a process of its own; JAX here is the CPU's."""
  keys = SMALL | overrides
  return subprocess.run(
    [
      *(sys.executable, "-m", "edl_jax.aot", f"--experiment={TINY}"),
      *(f"--experiment.{key}={value}" for key, value in keys.items()),
      *(f"--topology={topology}", f"--json={path}", *arguments),
    ],
    cwd=ROOT,
    # Flags of the CPU's compiler are not for the TPU's.
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    capture_output=True,
    text=True,
  )


@needs_compiler
@pytest.mark.slow
def test_auto_takes_the_least_recomputation_that_fits(tmp_path):
  path = tmp_path / "report.json"
  ended = compile_small(
    "v5e:2x2",
    path,
    **{"model.remat": "auto", "train.batch_size": 8192},
  )
  assert ended.returncode == 0, ended.stderr
  # A chip of v5e has 16 GiB.
  overflow, fits, *_ = ended.stdout.splitlines()
  assert overflow.startswith("model.remat=none needs 17.")
  assert fits == "model.remat=experts fits"
  (run,) = json.loads(path.read_text())["runs"]
  assert run["experiment"]["model.remat"] == "experts"
  assert run["memory"]["peak"] < 16 * 2**30


def check_golden(run, name):
  """Compares collectives with those in a file, or writes it."""
  kinds = dict(run["collectives"]["by_kind"])
  for kind, figures in run["collectives"]["between_slices"]["by_kind"].items():
    kinds[f"{kind} between slices"] = figures
  facts = {
    kind: {key: figures[key] for key in ("count", "bytes")}
    for kind, figures in sorted(kinds.items())
  }
  golden = GOLDEN / f"aot_{name.replace(':', '_')}.json"
  if "UPDATE_GOLDEN" in os.environ:
    golden.write_text(json.dumps(facts, indent=2) + "\n")
  assert facts == json.loads(golden.read_text())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  "topology", ["v4:2x2x1", "v5p:2x2x1", "v5e:2x4", "tpu7x:2x2x1"]
)
def test_collectives_of_small_slices(topology, tmp_path):
  path = tmp_path / "report.json"
  ended = compile_small(topology, path, "--compare=losses.divergence_weight=0")
  assert ended.returncode == 0, ended.stderr
  run, without = json.loads(path.read_text())["runs"]
  check_golden(run, topology)
  flops = run["hlo_flops"]
  # Rows are one block of attention, of which half is computed in vain.
  assert 1 < flops["total"] / run["model_flops"]["total"] < 1.5
  assert not flops["unknown_loops"]
  # The compiler prices products, and its estimates are above the rooflines.
  estimate = run["estimate"]
  products = [
    x for x in estimate["places"] if x["operation"].endswith("dot_general")
  ]
  assert products and all(x["estimate"] >= x["roofline"] for x in products)
  assert any(x["line"].startswith("model/") for x in products)
  assert 0 < estimate["mfu"]["low"] < estimate["mfu"]["high"] < 1
  assert run["step_bound"]["seconds"] <= estimate["step"]["low"]
  assert "the dearest places outside kernels" in ended.stdout
  memory = run["memory"]
  assert memory["arguments"] < memory["peak"] < memory["capacity"]
  # The divergence loss adds to sums that are sent anyway.
  for kind, figures in run["collectives"]["by_kind"].items():
    assert figures["count"] == without["collectives"]["by_kind"][kind]["count"]
  assert flops["total"] == pytest.approx(
    without["hlo_flops"]["total"], rel=1e-4
  )


@needs_compiler
@pytest.mark.slow
def test_between_slices_only_a_shard_of_each_gradient_travels(tmp_path):
  path = tmp_path / "report.json"
  ended = compile_small("v5p:2x2x1", path, "--num_slices=2", **{"mesh.data": 2})
  assert ended.returncode == 0, ended.stderr
  (run,) = json.loads(path.read_text())["runs"]
  check_golden(run, "2_slices_v5p_2x2x1")
  between = run["collectives"]["between_slices"]
  # The gradient is in float32, and four chips of a slice share it out.
  shard = run["parameters"]["total"] * 4 / 4
  assert list(between["by_kind"]) == ["all-reduce"]
  assert shard <= between["sent_bytes"] < 1.02 * shard
  assert between["seconds"] == between["sent_bytes"] * 8 / 50e9
  assert between["seconds"] == run["step_bound"]["network"]
  assert "on 2 slices of v5p:2x2x1: 8 chips" in ended.stdout
  assert "at the 6.25 GB/s of a chip on the data-centre net" in ended.stdout


@needs_compiler
def test_slices_of_an_unknown_network_are_refused(tmp_path):
  ended = compile_small("v4:2x2x1", tmp_path / "none", "--num_slices=2")
  assert ended.returncode == 2 and not ended.stdout
  (line,) = ended.stderr.splitlines()
  assert "--num_slices=2: nobody publishes" in line and "v4:2x2x1" in line


@needs_compiler
def test_slices_that_mesh_data_does_not_divide_are_refused(tmp_path):
  ended = compile_small("v5p:2x2x1", tmp_path / "none", "--num_slices=2")
  assert ended.returncode == 2 and not ended.stdout
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: mesh.data=1, mesh.fsdp=2")
  assert "2 slices need mesh.data to be a multiple of 2" in line


@needs_compiler
@pytest.mark.slow
def test_what_does_not_fit_ends_with_code_3(tmp_path):
  path = tmp_path / "report.json"
  ended = compile_small(
    "v5e:2x4", path, **{"model.num_experts": 4096, "model.expert_width": 8192}
  )
  assert ended.returncode == 3, ended.stderr
  assert "does not fit v5e:2x4" in ended.stdout
  assert "GiB too little" in ended.stdout
  assert not path.exists()
