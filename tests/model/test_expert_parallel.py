"""Every way of dispatch against a loop over tokens and active experts."""

import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from edl_jax.config import MeshConfig, MoEConfig
from edl_jax.model import experts, grouped_matmul
from edl_jax.model.expert_parallel import mixed_outputs
from edl_jax.sharding import ROW_AXES, make_mesh

WIDTH, HIDDEN, TOKENS = 6, 4, 40
DISPATCHES = ("gather", "ragged_all_to_all", "ring", "capacity")


def naive(x, expert, gate, gate_up, down, dy, kept):
  """Values and gradients in float64, one token and one expert at a time."""
  x, gate, gate_up, down, dy = (
    np.asarray(a, np.float64) for a in (x, gate, gate_up, down, dy)
  )
  y, dx, dgate, dgate_up, ddown = map(
    np.zeros_like, (x, x, gate, gate_up, down)
  )
  for p, a in zip(*np.nonzero(kept)):
    e = expert[p, a]
    opened, up = x[p] @ gate_up[e, :, 0], x[p] @ gate_up[e, :, 1]
    sigmoid = 1 / (1 + np.exp(-opened))
    hidden = opened * sigmoid * up
    output = hidden @ down[e]
    y[p] += gate[p, a] * output
    dgate[p, a] = output @ dy[p]
    ddown[e] += np.outer(hidden, gate[p, a] * dy[p])
    dhidden = down[e] @ (gate[p, a] * dy[p])
    dopened = dhidden * up * sigmoid * (1 + opened * (1 - sigmoid))
    dup = dhidden * opened * sigmoid
    dx[p] += gate_up[e, :, 0] @ dopened + gate_up[e, :, 1] @ dup
    dgate_up[e] += np.stack([np.outer(x[p], dopened), np.outer(x[p], dup)], 1)
  return y, dx, dgate, dgate_up, ddown


def arrays(num_experts, num_active):
  random = np.random.default_rng(num_experts)
  shapes = (
    (TOKENS, WIDTH),
    (TOKENS, num_active),
    (num_experts, WIDTH, 2, HIDDEN),
    (num_experts, HIDDEN, WIDTH),
    (TOKENS, WIDTH),
  )
  return [random.standard_normal(shape, np.float32) for shape in shapes]


def routing(num_experts, num_active, used=None):
  """Distinct active experts for every token, out of those `used`."""
  random = np.random.default_rng(0)
  used = range(num_experts) if used is None else used
  chosen = [random.permutation(used)[:num_active] for _ in range(TOKENS)]
  return np.array(chosen, np.int32)


def differentiated(dispatch, factor=math.inf, **axes):
  """Value and gradients, on the devices of a mesh; outside one if no axes."""
  # Places for all tokens, unless a test wants less.
  factor = min(factor, 1e6)

  def local(x, expert, gate, gate_up, down):
    if axes and dispatch == "gather":
      gate_up, down = (
        jax.lax.all_gather(w, "expert", tiled=True) for w in (gate_up, down)
      )
    y = mixed_outputs(
      x, expert, gate, gate_up, down, MoEConfig(dispatch, factor)
    )
    return jax.lax.psum(y, "tensor") if axes else y

  rows = PartitionSpec(ROW_AXES)
  weights = (
    PartitionSpec("expert", None, None, "tensor"),
    PartitionSpec("expert", "tensor"),
  )

  def run(x, expert, gate, gate_up, down, dy):
    function = local
    if axes:
      function = jax.shard_map(
        local,
        in_specs=(rows, rows, rows, *weights),
        out_specs=rows,
        check_vma=False,
      )
    y, pull_back = jax.vjp(
      lambda x, *rest: function(x, expert, *rest), x, gate, gate_up, down
    )
    return y, *pull_back(dy)

  if not axes:
    return jax.jit(run)
  sizes = dict.fromkeys(("data", "fsdp", "expert", "tensor"), 1) | axes
  mesh = make_mesh(
    MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())]
  )

  def in_mesh(*arguments):
    with jax.set_mesh(mesh):
      return jax.jit(run)(*arguments)

  return in_mesh


def check(function, expert, num_experts, kept=None):
  x, gate, gate_up, down, dy = arrays(num_experts, expert.shape[1])
  kept = np.ones(expert.shape, bool) if kept is None else kept
  got = function(x, expert, gate, gate_up, down, dy)
  want = naive(x, expert, gate, gate_up, down, dy, kept)
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def emulated_ragged_all_to_all(
  operand,
  output,
  input_offsets,
  send_sizes,
  output_offsets,
  recv_sizes,
  *,
  axis_name,
):
  """What CPUs have not, by its documentation.

  NaN where nothing is received, and all over where receivers expect other
  sizes than are sent.
  """
  me = jax.lax.axis_index(axis_name)
  operands, froms, sizes, starts = (
    jax.lax.all_gather(a, axis_name)
    for a in (operand, input_offsets, send_sizes, output_offsets)
  )
  row = jnp.arange(len(output))
  result = jnp.full_like(output, jnp.nan)
  for sender in range(len(operands)):
    since = row - starts[sender, me]
    sent = operands[sender].at[froms[sender, me] + since].get(mode="clip")
    inside = (since >= 0) & (since < sizes[sender, me])
    result = jnp.where(inside[:, None], sent, result)
  return jnp.where((recv_sizes == sizes[:, me]).all(), result, jnp.nan)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
  """The exchange that CPUs lack; NaN where the product promises nothing."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
  cpu = grouped_matmul.BACKENDS["cpu"]

  def rows_product(x_RM, w_EMF, group_sizes_E, transposed):
    y_RF = cpu.rows_product(x_RM, w_EMF, group_sizes_E, transposed)
    inside_R = jnp.arange(len(y_RF)) < group_sizes_E.sum()
    return jnp.where(inside_R[:, None], y_RF, jnp.nan)

  monkeypatch.setitem(
    grouped_matmul.BACKENDS, "cpu", cpu._replace(rows_product=rows_product)
  )


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(
  "axes",
  [
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"expert": 4, "data": 2},
    {"expert": 8},
  ],
)
def test_values_and_gradients_on_meshes(dispatch, axes):
  function = differentiated(dispatch, **axes)
  check(function, routing(8, 2), 8)
  # Idle experts, among them all of a device; all tokens at one device's
  # experts, or at as few as can be.
  check(function, routing(8, 2, used=[0, 3, 6]), 8)
  check(function, routing(8, 2, used=[6, 7]), 8)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_all_experts_active(dispatch):
  check(differentiated(dispatch, expert=4, fsdp=2), routing(4, 4), 4)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("num_experts", [1, 5])
def test_outside_a_mesh(dispatch, num_experts):
  active = min(num_experts, 2)
  check(differentiated(dispatch), routing(num_experts, active), num_experts)


@pytest.mark.parametrize("dispatch", ["ragged_all_to_all", "ring", "capacity"])
def test_no_collectives_on_an_expert_axis_of_one(dispatch):
  function = differentiated(dispatch, fsdp=2, expert=1)
  check(function, routing(5, 2), 5)
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=1), jax.devices()[:2])
  x, gate, gate_up, down, _ = arrays(5, 2)
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(lambda *a: mixed_outputs(*a, MoEConfig(dispatch)))(
      x, routing(5, 2), gate, gate_up, down
    )
  assert not {"ppermute", "all_gather", "all_to_all"} & set(str(jaxpr).split())


@pytest.mark.parametrize("axes", [{}, {"expert": 4, "data": 2}])
def test_capacity_drops_later_tokens(axes):
  num_experts, active, factor = 8, 2, 0.75
  expert = routing(num_experts, active, used=range(1, 8))
  shards = math.prod(axes.values())
  places = math.ceil(factor * TOKENS / shards * active / num_experts)
  kept = np.zeros(expert.shape, bool)
  for tokens in np.split(np.arange(TOKENS), shards):
    taken = np.zeros(num_experts, int)
    for p in tokens:
      for a in range(active):
        kept[p, a] = taken[expert[p, a]] < places
        taken[expert[p, a]] += 1
  assert 0.1 < 1 - kept.mean() < 0.5
  check(differentiated("capacity", factor, **axes), expert, num_experts, kept)


@pytest.mark.parametrize("dispatch", ["ragged_all_to_all", "ring"])
def test_every_row_is_computed_once(dispatch, monkeypatch):
  rows = []
  original = experts.grouped_matmul

  def counting(x_RM, w_EMF, group_sizes_E):
    jax.debug.callback(lambda n: rows.append(int(n)), group_sizes_E.sum())
    return original(x_RM, w_EMF, group_sizes_E)

  monkeypatch.setattr(experts, "grouped_matmul", counting)
  x, gate, gate_up, down, _ = arrays(8, 2)
  rows_spec, expert_spec = PartitionSpec(ROW_AXES), PartitionSpec("expert")
  mesh = make_mesh(
    MeshConfig(data=2, fsdp=1, expert=4, tensor=1), jax.devices()
  )
  with jax.set_mesh(mesh):
    jax.jit(
      jax.shard_map(
        lambda *a: mixed_outputs(*a, MoEConfig(dispatch)),
        in_specs=(rows_spec,) * 3 + (expert_spec,) * 2,
        out_specs=rows_spec,
        check_vma=False,
      )
    )(x, routing(8, 2), gate, gate_up, down).block_until_ready()
  jax.effects_barrier()
  # Two products.
  assert sum(rows) == 2 * TOKENS * 2


_COMPILE_FOR_TPU = """
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from edl_jax.config import MoEConfig
from edl_jax.model.expert_parallel import mixed_outputs

devices = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices
mesh = Mesh(devices, "expert", axis_types=(AxisType.Auto,))
split = PartitionSpec("expert")

def total(dispatch):
  function = jax.shard_map(
    lambda *arguments: mixed_outputs(*arguments, MoEConfig(dispatch)),
    in_specs=split, out_specs=split, check_vma=False,
  )
  return lambda *arguments: function(*arguments).astype(jnp.float32).sum()

arguments = [
  jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, split))
  for shape, dtype in (
    ((4096, 256), jnp.bfloat16),
    ((4096, 2), jnp.int32),
    ((4096, 2), jnp.float32),
    ((8, 256, 2, 128), jnp.bfloat16),
    ((8, 128, 256), jnp.bfloat16),
  )
]
for dispatch, collective in (
  ("ragged_all_to_all", "ragged-all-to-all"),
  ("ring", "collective-permute"),
  ("capacity", "all-to-all"),
):
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.value_and_grad(total(dispatch), (0, 2, 3, 4)))
    text = gradient.lower(*arguments).compile().as_text()
  assert collective in text, dispatch
"""


@pytest.mark.slow
def test_compiles_for_tpu():
  pytest.importorskip("libtpu", reason="needs the compiler of TPUs: libtpu")
  # A process of its own compiles, since JAX is set up for CPUs here.
  settings = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  done = subprocess.run(
    [sys.executable, "-c", _COMPILE_FOR_TPU],
    env=os.environ | settings,
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
