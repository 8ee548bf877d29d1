"""The signature test: where and in what order sums form changes no number.

Loss, terms, sums, gradients and routing metrics are the same on any mesh, in
any micro-batches, for any order of rows, with any padding rows and in any
number of processes.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from edl_jax import sharding
from edl_jax.config import (
  DataConfig,
  Experiment,
  LossesConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from edl_jax.losses import routing_metrics
from edl_jax.losses.objective import LOSS_TERMS
from edl_jax.model.transformer import abstract_model
from edl_jax.optim import make_optimizer
from edl_jax.step import init_state, loss_and_gradient, make_train_step
from edl_jax.text.batch import Batch
from edl_jax.text.mixture import Taxonomy
from tests.xla import FAST_OPTIONS

ROOT = pathlib.Path(__file__).parent.parent

ROWS, LENGTH = 16, 16
# The last domain has no row: what is averaged over domains must not count it.
TAXONOMY = Taxonomy(
  fine=("a", "b", "c", "d", "e"), coarse=("x", "y", "z"), parent=(0, 1, 1, 2, 0)
)
ABSENT = 4
# Every size that the mesh spreads is a multiple of 8.
MODEL = ModelConfig(
  vocabulary_size=64,
  num_layers=3,
  width=16,
  num_heads=16,
  num_kv_heads=8,
  head_width=4,
  num_experts=8,
  num_active_experts=3,
  expert_width=8,
  num_shared_experts=1,
  num_dense_layers=1,
  dense_width=16,
  remat="full",
)
# Every term, so large that an error in its gradient shows beside the LM's.
LOSSES = LossesConfig(
  **{term.weight: 0.2 for term in LOSS_TERMS}
  | {
    "balance_weight": 0.3,
    "z_weight": 0.1,
    "orthogonality_weight": 0.05,
    "variance_weight": 3.0,
  },
  coarse_weight=0.3,
)


@functools.cache
def random_model(config=MODEL):
  """Random parameters of about the scale that training gives them."""
  random = np.random.default_rng(1)

  def draw(path, leaf):
    value = random.standard_normal(leaf.shape, np.float32)
    is_norm = sharding.last_name(path) == "scale"
    return 1 + 0.1 * value if is_norm else 0.3 * value

  return jax.tree_util.tree_map_with_path(draw, abstract_model(config))


def random_batch():
  """Packed rows, the last positions of some and all of three being padding."""
  random = np.random.default_rng(2)
  shape = (ROWS, LENGTH)
  starts_BT = random.random(shape) < 0.15
  starts_BT[:, 0] = True
  index_BT = np.broadcast_to(np.arange(LENGTH), shape)
  begin_BT = np.maximum.accumulate(np.where(starts_BT, index_BT, 0), 1)
  tokens_B = random.integers(LENGTH // 2, LENGTH + 1, ROWS)
  tokens_B[[3, 8, 9]] = 0
  counted_BT = index_BT < tokens_B[:, None]
  return Batch(
    tokens_BT=random.integers(0, 64, shape, np.int32) * counted_BT,
    targets_BT=random.integers(0, 64, shape, np.int32) * counted_BT,
    segments_BT=(starts_BT.cumsum(1) * counted_BT).astype(np.int32),
    positions_BT=((index_BT - begin_BT) * counted_BT).astype(np.int32),
    weights_BT=counted_BT.astype(np.float32),
    # Some rows have no domain.
    domain_B=random.integers(-1, ABSENT, ROWS, np.int32),
    # The loss counts some of the targets alone, as in supervised examples.
    loss_weights_BT=np.float32(counted_BT & (random.random(shape) < 0.6)),
  )


def take(batch, rows):
  return Batch(*(array[rows] for array in batch))


def emptied(batch, rows):
  """Returns `batch` with nothing but padding in `rows`."""
  batch = Batch(*(array.copy() for array in batch))
  batch.segments_BT[rows] = 0
  batch.weights_BT[rows] = 0
  batch.loss_weights_BT[rows] = 0
  batch.domain_B[rows] = ABSENT
  return batch


def shuffled(batch):
  order = np.random.default_rng(3).permutation(len(batch.domain_B))
  return take(batch, order)


# Compiled in a third of the time; the program is the same.
@functools.partial(
  jax.jit,
  static_argnums=2,
  compiler_options=FAST_OPTIONS,
)
def step(model, batch, experiment):
  sums, terms, gradient = loss_and_gradient(model, batch, experiment, TAXONOMY)
  return {
    "sums": sums,
    "terms": terms,
    "gradient": gradient,
    "metrics": routing_metrics.metrics_by_layer(sums.routing),
  }


def compute(
  batch,
  mesh_sizes=(1, 1, 1, 1),
  accumulation_steps=1,
  accumulation="exact",
  losses=LOSSES,
  moe=MoEConfig(),  # noqa: B008
  granularity="hierarchical",
  config=MODEL,
):
  """Returns every number of a step on the mesh of these sizes, by name.

  Args:
    batch: the rows of this process.
  """
  mesh = sharding.make_mesh(
    MeshConfig(*mesh_sizes), jax.devices()[: np.prod(mesh_sizes)]
  )
  experiment = Experiment(
    model=config,
    losses=losses,
    moe=moe,
    train=TrainConfig(
      batch_size=len(batch.domain_B) * jax.process_count(),
      sequence_length=LENGTH,
      accumulation_steps=accumulation_steps,
      accumulation=accumulation,
    ),
    data=DataConfig(granularity=granularity),
  )
  sharding.check_divisible(experiment, mesh)
  with jax.set_mesh(mesh):
    model = random_model(config)
    model = jax.device_put(model, sharding.parameter_shardings(model, mesh))
    made = step(model, sharding.put_batch(batch, mesh), experiment)
    made = multihost_utils.process_allgather(made, tiled=True)
  leaves, _ = jax.tree_util.tree_flatten_with_path(made)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def differences(got, want):
  """Returns the largest difference of every array, relative to its scale."""
  assert got.keys() == want.keys()
  found = {}
  for name, value in want.items():
    assert got[name].shape == value.shape, name
    # Layers have metrics of their own; of other arrays the largest element.
    scale = np.abs(value) if "metrics" in name else np.abs(value).max()
    difference = np.abs(got[name].astype(np.float64) - value)
    if name.endswith("metrics/dead_experts"):
      # No expert is dead here: compare the number itself.
      scale = 1
    assert np.all(scale > 0), name  # zeros would hide a mistake
    found[name] = (difference / scale).max()
  return found


def assert_same(got, want):
  found = differences(got, want)
  assert {name: x for name, x in found.items() if not x <= 1e-5} == {}


@pytest.fixture(scope="module")
def on_one_device():
  return compute(random_batch())


def test_all_terms_and_metrics_are_compared(on_one_device):
  names = {"loss", "lm_loss", *(term.name for term in LOSS_TERMS)}
  compared = {
    group: {
      name.removeprefix(f"{group}/")
      for name in on_one_device
      if name.startswith(f"{group}/")
    }
    for group in ("terms", "metrics")
  }
  assert compared["terms"] == names
  # Nine of routing, two of the experts' outputs.
  assert len(compared["metrics"]) == 11


def test_documents_cross_the_middle_of_rows_or_end_there():
  before_B, after_B = random_batch().segments_BT[:, LENGTH // 2 - 1 :][:, :2].T
  joined_B = (before_B == after_B)[after_B > 0]
  assert joined_B.any() and not joined_B.all()


def test_order_of_rows_does_not_matter(on_one_device):
  assert_same(compute(shuffled(random_batch())), on_one_device)


@pytest.mark.parametrize(
  ("mesh_sizes", "accumulation_steps"),
  [
    ((1, 2, 2, 2), 2),
    ((1, 2, 1, 2, 2), 1),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ((1, 1, 1, 1), 2),
        ((1, 1, 1, 1), 4),
        ((8, 1, 1, 1), 1),
        ((1, 8, 1, 1), 1),
        ((1, 1, 8, 1), 1),
        ((1, 1, 1, 8), 1),
        ((2, 2, 2, 1), 2),
        ((1, 1, 4, 2), 4),
        ((2, 1, 2, 1, 2), 2),
        ((1, 1, 1, 1, 8), 1),
      )
    ),
  ],
)
def test_same_numbers_on_any_mesh_in_micro_batches(
  on_one_device, mesh_sizes, accumulation_steps
):
  batch = shuffled(random_batch())
  assert_same(compute(batch, mesh_sizes, accumulation_steps), on_one_device)


TOKEN_PAIRS = {
  "losses": dataclasses.replace(
    LOSSES, divergence_pairs="tokens", num_token_pairs=50
  ),
  "granularity": "coarse",
}


@pytest.fixture(scope="module")
def token_pairs_on_one_device():
  return compute(random_batch(), **TOKEN_PAIRS)


@pytest.mark.parametrize(
  "mesh_sizes",
  [
    (1, 2, 1, 2, 2),
    *(
      pytest.param(sizes, marks=pytest.mark.slow)
      for sizes in ((8, 1, 1, 1), (1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 1, 1, 8))
    ),
  ],
)
def test_same_token_pairs_on_any_mesh(token_pairs_on_one_device, mesh_sizes):
  batch = shuffled(random_batch())
  assert_same(
    compute(batch, mesh_sizes, **TOKEN_PAIRS), token_pairs_on_one_device
  )


def test_padding_rows_change_no_token_pair(token_pairs_on_one_device):
  batch = random_batch()
  got = compute(take(batch, batch.weights_BT.any(1)), **TOKEN_PAIRS)
  assert_same(got, token_pairs_on_one_device)


# The ring returns no expert's outputs by themselves.
@pytest.mark.parametrize(
  "form", ["ring", pytest.param("capacity", marks=pytest.mark.slow)]
)
def test_same_numbers_wherever_experts_are(form):
  losses = dataclasses.replace(LOSSES, orthogonality_weight=0.0)
  want = compute(random_batch(), losses=losses)
  # Room for every token.
  moe = MoEConfig(form, capacity_factor=8.0)
  got = compute(random_batch(), (1, 2, 2, 1, 2), 2, losses=losses, moe=moe)
  assert_same(got, want)


def test_padding_rows_left_out(on_one_device):
  batch = random_batch()
  counted_B = batch.weights_BT.any(1)
  assert counted_B.sum() == ROWS - 3
  assert_same(compute(take(batch, counted_B)), on_one_device)


@pytest.mark.parametrize(
  ("mesh_sizes", "accumulation_steps"),
  [
    # The second micro-batch is nothing but padding.
    ((1, 1, 1, 1), 2),
    # Half of the devices have nothing but padding.
    ((8, 1, 1, 1), 1),
  ],
)
@pytest.mark.slow
def test_padding_rows_added(on_one_device, mesh_sizes, accumulation_steps):
  batch = random_batch()
  padding = emptied(batch, slice(None))
  both = Batch(*map(np.concatenate, zip(batch, padding, strict=True)))
  # Rows go to micro-batches in turn.
  order = np.arange(2 * ROWS).reshape(accumulation_steps, -1).T.ravel()
  got = compute(take(both, order), mesh_sizes, accumulation_steps)
  assert_same(got, on_one_device)


@pytest.mark.slow
def test_released_form_with_automatic_weights():
  losses = dataclasses.replace(
    LOSSES,
    specialization_form="released",
    orthogonality_weight="auto:0.1",
    variance_weight="auto:0.1",
  )
  want = compute(random_batch(), losses=losses)
  assert want["terms/orthogonality_weight"] > 0 < want["terms/variance_weight"]
  got = compute(shuffled(random_batch()), (1, 2, 2, 2), 2, losses=losses)
  assert_same(got, want)


@pytest.mark.parametrize(
  "mesh_sizes",
  [(1, 1, 1, 1), pytest.param((1, 2, 2, 2), marks=pytest.mark.slow)],
)
def test_per_micro_batch_is_the_mean_of_its_parts(on_one_device, mesh_sizes):
  batch = random_batch()
  got = compute(batch, mesh_sizes, 2, accumulation="per_micro_batch")
  # Rows go to micro-batches in turn; padding in place of the other's rows.
  parts = [compute(emptied(batch, slice(i, None, 2))) for i in range(2)]
  # Sums are those of all rows, and so are metrics.
  want = on_one_device | {
    name: (parts[0][name] + parts[1][name]) / 2
    for name in on_one_device
    if name.startswith(("terms", "gradient"))
  }
  assert_same(got, want)
  # A mean of divergences is not a divergence of means.
  found = differences(got, on_one_device)
  assert found["terms/divergence_loss"] > 0.01
  assert found["gradient/blocks/moe/router_ME/value"] > 0.1


def test_domains_that_the_rows_cannot_hold_are_not_compared():
  """No array is as large as all pairs of domains."""
  taxonomy = Taxonomy.from_names([f"x{d}/y{d}" for d in range(512)])
  experiment = Experiment(
    model=MODEL, losses=LOSSES, data=DataConfig(granularity="hierarchical")
  )
  program = jax.make_jaxpr(loss_and_gradient, static_argnums=(2, 3))(
    random_model(), random_batch(), experiment, taxonomy
  )
  shapes = re.findall(r"f32\[([\d,]+)\]", str(program))
  largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
  assert 512 * 8 <= largest < 512 * 512


# One of two processes, each with half of the devices and of the rows.
PROCESS = """
import sys
import jax
import numpy as np
process, address, path = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, process, initialization_timeout=60)
assert jax.local_device_count() == 4 and jax.device_count() == 8
sys.path.insert(0, "tests")
import test_invariance as test
from edl_jax import config
# The rows that the input pipeline would give it.
rows = test.take(test.random_batch(), slice(process, None, 2))
for sizes, named in (
  ((1, 1, 1, 8), "mesh.tensor=8"),
  ((1, 1, 1, 2, 4), "mesh.tensor=2 x mesh.sequence=4"),
):
  try:
    test.compute(rows, sizes)
  except config.UserError as error:
    assert str(error).startswith(f"{named} spreads the same rows"), error
  else:
    raise AssertionError("a row of two processes was accepted")
numbers = test.compute(rows, (2, 2, 2, 1), accumulation_steps=2)
of_pairs = test.compute(rows, (2, 2, 2, 1), **test.TOKEN_PAIRS)
numbers |= {f"token_pairs {name}": x for name, x in of_pairs.items()}
if process == 0:
  np.savez(path, **numbers)
"""


@pytest.mark.slow
def test_two_processes(on_one_device, token_pairs_on_one_device, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4")
  }
  path, log = tmp_path / "numbers.npz", tmp_path / "log"
  with open(log, "w") as output:
    processes = [
      subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(process), address, path],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=output,
      )
      for process in range(2)
    ]
    try:
      codes = [process.wait(timeout=180) for process in processes]
    finally:
      for process in processes:
        process.kill()
        process.wait()
  assert codes == [0, 0], log.read_text()
  with np.load(path) as numbers:
    pairs = {
      f"token_pairs {k}": v for k, v in token_pairs_on_one_device.items()
    }
    assert_same(dict(numbers), on_one_device | pairs)


@pytest.mark.slow
def test_moments_in_the_memory_of_the_host_change_nothing():
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  states = []
  for offload in (False, True):
    experiment = Experiment(
      model=MODEL,
      optimizer=OptimizerConfig(offload=offload),
      train=TrainConfig(batch_size=ROWS),
    )
    optimizer = make_optimizer(experiment.optimizer, 10)
    with jax.set_mesh(mesh):
      state = init_state(experiment, optimizer, mesh)
      step = make_train_step(experiment, optimizer, TAXONOMY, mesh)
      for _ in range(2):
        state, _ = step(state, sharding.put_batch(random_batch(), mesh))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer)}
    assert ("pinned_host" in kinds) == offload
    states.append(jax.device_get(state))
  jax.tree.map(np.testing.assert_array_equal, *states)
