"""Executes the notebook in a real kernel, on a run of the real command."""

import base64
import io
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from edl_jax import config, config_files
from edl_jax.analysis.task_comparison import paired_difference, read_tasks
from edl_jax.model.transformer import Model, parameter_counts
from edl_jax.tasks import __main__ as tasks
from tests.tasks.small_run import write_files, write_run

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "inspect_checkpoint.ipynb"
COMPARISON = ROOT / "notebooks" / "evaluate.ipynb"
OVERRIDES = {
  "train.num_steps": 2,
  "train.eval_rows": 1,
  "optimizer.warmup_steps": 1,
  "data.max_characters_per_domain": 20_000,
}


def read_notebook(path: pathlib.Path) -> nbformat.NotebookNode:
  return nbformat.read(path, as_version=nbformat.NO_CONVERT)


@pytest.fixture
def environment(monkeypatch, tmp_path):
  """Gives the kernel one device, as users have, and keeps files in tmp_path."""
  monkeypatch.delenv("XLA_FLAGS")
  monkeypatch.delenv("MPLBACKEND", raising=False)
  for name in (
    "EDL_JAX_CACHE",
    "IPYTHONDIR",
    "JUPYTER_RUNTIME_DIR",
    "MPLCONFIGDIR",
  ):
    monkeypatch.setenv(name, str(tmp_path / name))
  monkeypatch.setenv("EDL_JAX_RUN", str(tmp_path / "run"))


def execute(notebook: nbformat.NotebookNode) -> None:
  """Runs all cells in a kernel of this interpreter.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  # Without folders to search, "python3" is this interpreter's ipykernel,
  # whichever kernels are installed.
  manager = AsyncKernelManager(
    kernel_name="python3",
    kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
  )
  client = NotebookClient(
    notebook,
    km=manager,
    timeout=600,
    resources={"metadata": {"path": str(NOTEBOOK.parent)}},
  )
  client.execute(cleanup_kc=True)


def outputs(notebook: nbformat.NotebookNode, cell_id: str) -> list:
  (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
  return cell.outputs


def printed(notebook: nbformat.NotebookNode, cell_id: str) -> str:
  return "".join(
    output.text
    for output in outputs(notebook, cell_id)
    if output.output_type == "stream" and output.name == "stdout"
  )


def coloured_share(image: str) -> float:
  """Returns the share of a base64 PNG's pixels that are not grey."""
  pixels = plt.imread(io.BytesIO(base64.b64decode(image)), format="png")
  return float((np.ptp(pixels[..., :3], axis=-1) > 0.1).mean())


@pytest.mark.slow
def test_notebook_shows_a_run(environment, tmp_path):
  subprocess.run(
    [
      sys.executable,
      "-m",
      "edl_jax.main",
      "--experiment=experiments/tiny.py",
      f"--workdir={tmp_path / 'run'}",
      *(f"--experiment.{key}={value}" for key, value in OVERRIDES.items()),
    ],
    cwd=ROOT,
    check=True,
    capture_output=True,
    timeout=600,
  )
  notebook = read_notebook(NOTEBOOK)
  execute(notebook)

  loaded = printed(notebook, "load")
  assert "tiny, step 2" in loaded
  for domain in ("python_source", "legal", "arithmetic"):
    assert domain in loaded
    assert domain in printed(notebook, "batch")
  experiment = config_files.load(
    str(ROOT / "experiments" / "tiny.py"), OVERRIDES
  )
  counts = re.search(
    r"total ([\d,]+), active ([\d,]+)", printed(notebook, "parameters-table")
  )
  assert tuple(
    int(count.replace(",", "")) for count in counts.groups()
  ) == parameter_counts(experiment.model)
  prompt = "def __init__(self"
  continued = printed(notebook, "continue")
  assert continued.startswith(prompt) and len(continued.strip()) > len(prompt)
  for cell_id in ("domains", "tokens", "divergence"):
    images = [
      output.data["image/png"]
      for output in outputs(notebook, cell_id)
      if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1, cell_id
    # At least a fifth of each picture is a heat map; axes and titles are grey.
    assert coloured_share(images[0]) > 0.2, cell_id


@pytest.mark.slow
def test_notebook_compares_runs_on_tasks(environment, tmp_path, monkeypatch):
  for name, seed in (("baseline", 0), ("run", 1)):
    (tmp_path / name).mkdir()
    write_run(tmp_path / name, seed)
  (tmp_path / "files").mkdir()
  write_files(tmp_path / "files")
  for name in ("baseline", "run"):
    arguments = [
      f"--workdir={tmp_path / name}",
      f"--files={tmp_path / 'files'}",
    ]
    assert tasks.main(arguments) == 0
  monkeypatch.setenv("EDL_JAX_BASELINE", str(tmp_path / "baseline"))
  notebook = read_notebook(COMPARISON)
  execute(notebook)
  assert printed(notebook, "load") == (
    "baseline: step 1, 2 files\nrun: step 1, 2 files\n"
  )
  found = [read_tasks(str(tmp_path / name)) for name in ("baseline", "run")]
  baseline, run = found
  assert baseline and run
  difference = paired_difference([(baseline, run)], "sums", "bits_per_byte")
  assert difference
  (line,) = re.findall(r"sums +6 +(\S+) +(\S+)", printed(notebook, "tasks"))
  assert line == (
    f"{difference.mean:+.4f}",
    f"{difference.document_error:.4f}",
  )
  for cell_id in ("tasks", "domains"):
    images = [
      output.data["image/png"]
      for output in outputs(notebook, cell_id)
      if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1 and coloured_share(images[0]) > 0.002, cell_id
  pages = [
    "".join(output.data["text/html"])
    for output in outputs(notebook, "generate")
    if output.output_type == "display_data"
  ]
  assert len(pages) == 2
  for page, name in zip(pages, ("baseline", "run")):
    assert f"<h4>{name}</h4>" in page
    prompts = "def __init__(self" + "The largest planet is" + "2 + 2 ="
    spans = re.findall(r'<span style="(.*?)" title="(.*?)">(.*?)</span>', page)
    underlined = [text for style, _, text in spans if "underline" in style]
    assert "".join(underlined) == prompts
    # All but the last token of each text have experts.
    coloured = [title for style, title, _ in spans if "background" in style]
    assert len(spans) - len(coloured) == 3
    assert set(coloured) <= {f"expert {e}" for e in range(4)}


@pytest.mark.parametrize("path", [NOTEBOOK, COMPARISON], ids=lambda p: p.stem)
def test_notebook_is_committed_without_outputs(path):
  notebook = read_notebook(path)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  assert notebook.metadata.kernelspec.name == "python3"
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert cell.outputs == []
      assert cell.execution_count is None
  tagged = [
    c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())
  ]
  assert len(tagged) == 1
  assert "EDL_JAX_RUN" in tagged[0].source


def test_token_routing_is_what_the_routers_decide():
  sizes = config.ModelConfig(
    vocabulary_size=50,
    num_layers=3,
    num_dense_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    num_experts=5,
    num_active_experts=2,
    expert_width=8,
    dense_width=16,
  )
  model = jax.jit(Model, static_argnums=0)(sizes, jax.random.key(0))
  tokens_BT = jax.random.randint(jax.random.key(1), (2, 9), 0, 50)
  probs_LBTE, expert_LBTA = jax.jit(Model.token_routing)(model, tokens_BT)
  want_LBTE = jax.jit(layer_by_layer)(model, tokens_BT)
  np.testing.assert_allclose(probs_LBTE, want_LBTE, rtol=1e-4)
  np.testing.assert_array_equal(
    expert_LBTA, np.argsort(-want_LBTE, axis=-1)[..., :2]
  )


def layer_by_layer(model: Model, tokens_BT: jax.Array) -> jax.Array:
  """Returns router probabilities, (L, B, T, E), block by block without scan."""
  ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
  positions_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
  )
  x_BTM = model.embedding_VM[...][tokens_BT]
  probs = []
  for stacked, index in [
    (model.dense_blocks, 0),
    (model.blocks, 0),
    (model.blocks, 1),
  ]:
    block = jax.tree.map(lambda leaf, i=index: leaf[i], stacked)
    x_BTM += block.attention(block.attention_norm(x_BTM), ones_BT, positions_BT)
    h_BTM = block.feed_forward_norm(x_BTM)
    if stacked is model.dense_blocks:
      x_BTM += block.mlp(h_BTM)
    else:
      probs.append(jax.nn.softmax(h_BTM @ block.moe.router_ME[...]))
      x_BTM += block.moe(h_BTM, ones_BT.astype(jnp.float32))[0]
  return jnp.stack(probs)
