"""Counts from HLO text, against closed forms and loops over elements."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from edl_jax.aot import hlo, hlo_costs
from edl_jax.aot.hlo import Array


def costs_of(function, *arguments):
  compiled = jax.jit(function).lower(*arguments).compile()
  return hlo_costs.costs(hlo.parse(compiled.as_text()), num_experts=1)


def test_products_count_once_for_each_turn_of_their_loops():
  def step(x, w):
    def outer(x, w):
      def inner(x, _):
        return jnp.tanh(x @ w), None

      return jax.lax.scan(inner, x, length=3)[0] @ w.T, None

    return jax.lax.scan(outer, x, w)[0] @ w[0]

  x, w = jnp.ones((16, 64)), jnp.ones((5, 64, 64))
  found = costs_of(step, x, w)
  product = 2 * 16 * 64 * 64
  assert found.flops == product * (5 * (3 + 1) + 1)
  assert found.unknown_loops == 0


def test_loops_of_unknown_length_are_told():
  def step(x, n):
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

  found = costs_of(step, jnp.ones((32, 32)), 7)
  assert (found.flops, found.unknown_loops) == (2 * 32**3, 1)


def test_collectives_count_by_kind_with_bytes():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
  spec = PartitionSpec(("a", "b"))

  def local(x):
    def body(x, _):
      whole = jax.lax.all_gather(x, "b", tiled=True)
      return jax.lax.psum_scatter(whole * 2, "b", tiled=True), None

    x, _ = jax.lax.scan(body, x, length=3)
    x = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
    x = jax.lax.all_to_all(x, "a", 0, 1, tiled=True)
    return x + jax.lax.psum(x.sum(), ("a", "b"))

  function = jax.shard_map(
    local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  found = costs_of(function, jnp.ones((64, 128), jnp.float32)).collectives
  shard = 8 * 128 * 4
  wire = {c.kind: (c.runs, c.group, c.wire_bytes) for c in found}
  assert wire == {
    "all-gather": (3, 4, 3 * 3 * shard),
    "reduce-scatter": (3, 4, 3 * 3 * shard),
    "collective-permute": (1, 2, shard),
    "all-to-all": (1, 2, shard / 2),
    "all-reduce": (1, 8, 2 * 7 / 8 * 4),
  }
  devices = {c.kind: c.devices for c in found}
  assert devices["all-gather"] == (0, 1, 2, 3)
  assert devices["all-to-all"] == (0, 4)


# --- What only the TPU compiler writes ---------------------------------------

_TPU = """\
HloModule step, is_scheduled=true, num_partitions=8

%start (p0: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p0), channel_id=1,\
 replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  ROOT %t = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) tuple(%p0, %all-gather.1)
}

%async_collective_fusion.7 (p1: bf16[4,8], q: bf16[16,32]) -> bf16[16,32] {
  %p1 = bf16[4,8]{1,0} parameter(0)
  %q = bf16[16,32]{1,0} parameter(1)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p1), channel_id=1,\
 replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  ROOT %convolution.3 = bf16[16,16]{1,0} convolution(%q, %q),\
 dim_labels=bf_oi->bf
}

%done (p2: bf16[4,8]) -> bf16[16,8] {
  %p2 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[16,8]{1,0} all-gather(%p2), channel_id=1,\
 replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%all-reduce-scatter.4 (p3: f32[32]) -> f32[16] {
  %p3 = f32[32]{0} parameter(0)
  %all-reduce.5 = f32[32]{0} all-reduce(%p3), channel_id=1,\
 replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.5),\
 dynamic_slice_sizes={16}
}

%body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %w = bf16[16,32]{1,0} constant({...})
  %async-collective-start.9 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%x),\
 kind=kCustom, calls=%start
  %y = bf16[16,16]{1,0} fusion(%x, %w), kind=kOutput,\
 calls=%async_collective_fusion.7
  %async-collective-done.9 = bf16[16,8]{1,0} fusion(%x), kind=kCustom,\
 calls=%done
  %z = bf16[16,16]{1,0} convolution(%w, %w), dim_labels=bf_oi->bf
  ROOT %r = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

%condition (c: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[] constant(24)
  %c = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%n, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[4,8]), g: f32[32]) -> f32[16] {
  %a = (s32[], bf16[4,8]{1,0}) parameter(0)
  %g = f32[32]{0} parameter(1)
  %while = (s32[], bf16[4,8]{1,0}) while(%a), condition=%condition, body=%body
  %gmm.12 = bf16[64,48]{1,0} custom-call(%k, %l, %m),\
 custom_call_target="tpu_custom_call"
  %k = s32[] constant(0)
  %l = bf16[64,32]{1,0} constant({...})
  %m = bf16[2,32,48]{2,1,0} constant({...})
  %strange.1 = bf16[64,48]{1,0} custom-call(%l),\
 custom_call_target="tpu_custom_call"
  ROOT %reduced = f32[16]{0} fusion(%g), kind=kCustom,\
 calls=%all-reduce-scatter.4
}
"""


def test_tpu_collectives_beside_products():
  found = hlo_costs.costs(hlo.parse(_TPU), num_experts=8)
  product = 2 * 16 * 16 * 32
  assert found.product_flops == 24 * 2 * product
  gather, scatter = found.collectives
  assert (gather.kind, gather.runs, gather.group) == ("all-gather", 24, 4)
  assert gather.wire_bytes == 24 * 3 * 4 * 8 * 2
  # The second product comes after the end.
  assert gather.is_async and gather.enclosed_flops == product
  assert (scatter.kind, scatter.devices) == ("reduce-scatter", (0, 4))
  assert scatter.wire_bytes == 32 * 4 / 2 and not scatter.is_async
  known, unknown = found.kernels
  # Two of eight experts have a fourth of the rows at uniform routing.
  assert known == ("gmm", 1, 2 * 16 * 32 * 48)
  assert unknown == ("strange", 1, None)
  assert found.flops == found.product_flops + known.flops


_SLICES = """\
HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[32,8], w: f32[16,16]) -> f32[32,8] {
  %a = f32[32,8]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %after-all = token[] after-all()
  %send = (f32[32,8]{1,0}, u32[], token[]) send(%a, %after-all),\
 is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_target="{TARGET}x{0:3}",\
_xla_megascale_transfer_type="TYPE"}, metadata={op_name="jit(step)/psum"}
  %recv = (f32[32,8]{1,0}, u32[], token[]) recv(%after-all),\
 is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_target="{TARGET}x{0:3}",\
_xla_megascale_transfer_type="TYPE"}
  %send-done = token[] send-done(%send), is_host_transfer=true
  %y = f32[16,16]{1,0} dot(%w, %w), lhs_contracting_dims={1},\
 rhs_contracting_dims={0}
  %recv-done = (f32[32,8]{1,0}, token[]) recv-done(%recv)
  %z = f32[16,16]{1,0} dot(%y, %y), lhs_contracting_dims={1},\
 rhs_contracting_dims={0}
  ROOT %r = f32[32,8]{1,0} get-tuple-element(%recv-done), index=0
}
"""


@pytest.mark.parametrize(
  ("transfer", "target", "kind", "places", "wire"),
  [
    ("ALL_REDUCE", "1,2", "all-reduce", (0, 4), 2 / 2),
    ("ALL_REDUCE", "1:4", "all-reduce", (0, 4, 8, 12), 2 * 3 / 4),
    ("REDUCE_SCATTER", "1,2", "reduce-scatter", (0, 4), 1 / 2),
    # A gather's value is that of all slices.
    ("ALL_GATHER", "1:2,3", "all-gather", (0, 4, 8), 2),
    ("ONE_TO_ONE", "1,2", "collective-permute", (0, 4), 1),
  ],
)
def test_transfers_between_slices(transfer, target, kind, places, wire):
  text = _SLICES.replace("TYPE", transfer).replace("TARGET", target)
  found = hlo_costs.costs(hlo.parse(text), 1)
  (sent,) = found.collectives
  assert (sent.kind, sent.devices, sent.source) == (
    kind,
    places,
    "jit(step)/psum",
  )
  assert sent.wire_bytes == pytest.approx(wire * 32 * 8 * 4)
  # The second product comes after the value.
  assert sent.is_async and sent.enclosed_flops == 2 * 16**3
  assert found.product_flops == 4 * 16**3


def test_transfers_beside_nothing_are_synchronous():
  text = _SLICES.replace("TYPE", "ALL_REDUCE").replace("TARGET", "1,2")
  lines = text.splitlines()
  moved = next(i for i, line in enumerate(lines) if "recv-done" in line)
  lines.insert(8, lines.pop(moved))
  (sent,) = hlo_costs.costs(hlo.parse("\n".join(lines)), 1).collectives
  assert not sent.is_async and not sent.enclosed_flops


@pytest.mark.parametrize(
  ("groups", "first"),
  [
    ("[2,4]<=[8]", (0, 1, 2, 3)),
    ("[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
    ("{{3,1},{0,2}}", (3, 1)),
    ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", (0, 1, 4, 5)),
    ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4)),
    ("mesh['x'=8] {'x':(2)2}", (0, 2)),
    ("{}", tuple(range(8))),
  ],
)
def test_groups_in_every_notation(groups, first):
  line = f"  ROOT %r = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, x=1"
  text = "\n".join(
    [
      "HloModule m, num_partitions=8",
      "ENTRY %e (p: f32[8]) -> f32[8] {",
      "  %p = f32[8]{0} parameter(0)",
      line,
      "}",
    ]
  )
  (found,) = hlo_costs.costs(hlo.parse(text), 1).collectives
  assert found.devices == first


@pytest.mark.parametrize(
  ("size", "kernel", "stride", "low", "high", "lhs_dilate", "rhs_dilate"),
  [
    (16, 16, 1, 15, 15, 1, 1),
    (4, 4, 3, 0, 0, 4, 1),
    (7, 3, 2, 1, 2, 1, 2),
    (5, 2, 2, 3, 0, 3, 1),
  ],
)
def test_convolutions_count_what_meets_an_element(
  size, kernel, stride, low, high, lhs_dilate, rhs_dilate
):
  padded = np.zeros((size - 1) * lhs_dilate + 1 + low + high)
  padded[low : len(padded) - high : lhs_dilate] = 1
  extent = (kernel - 1) * rhs_dilate + 1
  output = (len(padded) - extent) // stride + 1
  met = sum(
    padded[o * stride + k * rhs_dilate]
    for o, k in itertools.product(range(output), range(kernel))
  )
  text = f"""\
HloModule m
ENTRY %e (x: f32[6,{size},3], w: f32[{kernel},3,4]) -> f32[6,{output},4] {{
  %x = f32[6,{size},3]{{2,1,0}} parameter(0)
  %w = f32[{kernel},3,4]{{2,1,0}} parameter(1)
  ROOT %c = f32[6,{output},4]{{2,1,0}} convolution(%x, %w),\
 window={{size={kernel} stride={stride} pad={low}_{high}\
 lhs_dilate={lhs_dilate} rhs_dilate={rhs_dilate}}}, dim_labels=b0f_0io->b0f
}}
"""
  found = hlo_costs.costs(hlo.parse(text), 1)
  assert found.product_flops == 2 * 6 * 3 * 4 * met


@pytest.mark.parametrize("block", [(128, 128), (256, 128), (128, 256)])
@pytest.mark.parametrize(
  ("phase", "products", "parts"),
  [("fwd", 2, 0), ("dq", 3, 0), ("dkv", 4, 0), ("dkv", 5, 1)],
)
def test_splash_counts_blocks_that_reach_the_diagonal(
  block, phase, products, parts
):
  rows, heads, length, width = 2, 3, 1024, 64
  blocks = sum(
    q + block[0] > k
    for q in range(0, length, block[0])
    for k in range(0, length, block[1])
  )
  table = Array("s32", (1, length // block[0], length // block[1]))
  query = Array("bf16", (rows, heads, length, width))
  results = [Array("bf16", (4, *query.shape))] * parts + [query]
  found = hlo_costs.kernel_flops(
    f"splash_mha_{phase}_segmented_no_residuals",
    [table, query, query, query],
    results,
    num_experts=1,
  )
  pairs = blocks * math.prod(block)
  assert found == 2 * products * rows * heads * pairs * width


def test_splash_counts_an_even_share_of_a_spread_row():
  heads, length, width, block, shards = 3, 1024, 64, 128, 4
  query = Array("bf16", (heads, length // shards, width))
  key = Array("bf16", (heads, length, width))
  table = Array("s32", (1, length // shards // block, length // block))
  found = hlo_costs.kernel_flops(
    "splash_mha_fwd", [table, query, key, key], [query], num_experts=1
  )
  # Four devices compute 36 of the 8 x 8 blocks, in two products.
  assert found == 2 * 2 * heads * 36 / shards * block**2 * width


def test_grouped_products_have_the_flops_of_their_rows():
  x, w = Array("bf16", (64, 32)), Array("bf16", (8, 32, 48))
  dy, dw = Array("bf16", (64, 48)), Array("f32", (8, 32, 48))
  flops = functools.partial(hlo_costs.kernel_flops, num_experts=8)
  expected = 2 * 64 * 32 * 48
  assert flops("gmm", [x, w], [dy]) == expected
  transposed = Array("bf16", (8, 48, 32))
  assert flops("gmm", [x, transposed], [dy]) == expected
  assert flops("tgmm", [x, dy], [dw]) == expected
