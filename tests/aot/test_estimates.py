"""The compiler's estimates, added up by place; HLO text written by hand."""

import jax
import jax.numpy as jnp
import pytest

from edl_jax.aot import estimates, hlo, hlo_costs, report, topologies

CHIP = topologies.CHIPS["v5p"]._replace(flops=1e6, clock=1e3, hbm_bandwidth=1e4)


def cycles(count):
  return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def place(operation, frame):
  return f'metadata={{op_name="{operation}" stack_frame_id={frame}}}'


# A layer's input is sliced out of a stack of 8, inside a fusion in a fusion,
# and multiplied. The result is written into a stack, in place.
_STEP = f"""\
HloModule step, is_scheduled=true, num_partitions=4

FileNames
1 "/home/me/edl_jax/model/layer.py"
2 "/usr/lib/python/jax/nn.py"

FunctionNames
1 "layer"
2 "/home/me/edl_jax/not_a_file.py"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=12 end_line=13 column=2}}
2 {{file_name_id=2 function_name_id=2 line=900 end_line=900 column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=2 parent_frame_id=3}}

%inner (p.0: f32[8,16,16], p.1: s32[]) -> f32[16,16] {{
  %p.0 = f32[8,16,16]{{2,1,0:T(8,128)}} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %slice = f32[1,16,16]{{2,1,0}} dynamic-slice(%p.0, %p.1, %p.1, %p.1)
}}

%product (q.0: f32[8,16,16], q.1: s32[], q.2: f32[16,16]) -> f32[8,16,16] {{
  %q.0 = f32[8,16,16]{{2,1,0:T(8,128)}} parameter(0)
  %q.1 = s32[] parameter(1)
  %q.2 = f32[16,16]{{1,0:T(8,128)S(1)}} parameter(2)
  %q.3 = f32[8,16,16]{{2,1,0:T(8,128)}} parameter(3)
  %fusion.1 = f32[1,16,16]{{2,1,0}} fusion(%q.0, %q.1), kind=kLoop, calls=%inner
  %bitcast = f32[16,16]{{1,0}} bitcast(%fusion.1)
  %dot = f32[16,16]{{1,0}} dot(%bitcast, %q.2), lhs_contracting_dims={{1}},\
 rhs_contracting_dims={{0}}, {place("jit(train_step)/jvp()/while/x/dot", 2)}
  %bitcast.2 = f32[1,16,16]{{2,1,0}} bitcast(%dot)
  ROOT %update = f32[8,16,16]{{2,1,0}} dynamic-update-slice(%q.3, %bitcast.2,\
 %q.1, %q.1, %q.1)
}}

%beside (r.0: f32[16,16]) -> f32[16,16] {{
  %r.0 = f32[16,16]{{1,0}} parameter(0)
  ROOT %copy.9 = f32[16,16]{{1,0}} copy(%r.0), {cycles(10**6)}
}}

%body (s: (s32[], f32[8,16,16], f32[8,16,16])) -> (s32[], f32[8,16,16]) {{
  %s = (s32[], f32[8,16,16]{{2,1,0}}, f32[8,16,16]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stack = f32[8,16,16]{{2,1,0}} get-tuple-element(%s), index=1
  %out = f32[8,16,16]{{2,1,0}} get-tuple-element(%s), index=2
  %w = f32[16,16]{{1,0:T(8,128)S(1)}} constant({{...}})
  %start = ((f32[16,16]), f32[16,16], u32[]) call-start(%w), to_apply=%beside
  %done = f32[16,16]{{1,0}} call-done(%start)
  %fusion.2 = f32[8,16,16]{{2,1,0}} fusion(%stack, %i, %w, %out), kind=kOutput,\
 calls=%product, {cycles(500)}
  %gmm.7 = f32[16,16]{{1,0}} custom-call(%w),\
 custom_call_target="tpu_custom_call"
  %gather.3 = f32[64,16]{{1,0}} all-gather(%w), channel_id=1,\
 replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, {cycles(7)}
  %sort.4 = f32[16,16]{{1,0}} sort(%done), dimensions={{0}}, to_apply=%less,\
 {place("jit(train_step)/router/router/sort", 3)}
  ROOT %t = (s32[], f32[8,16,16], f32[8,16,16]) tuple(%i, %stack, %fusion.2)
}}

ENTRY %main (a: f32[8,16,16]) -> f32[8,16,16] {{
  %a = f32[8,16,16]{{2,1,0}} parameter(0)
  %zero = s32[] constant(0)
  %copy.5 = f32[8,16,16]{{2,1,0}} copy(%a), {cycles(300)}
  %scatter.6 = f32[8,16,16]{{2,1,0}} fusion(%copy.5, %zero), kind=kCustom,\
 calls=%inner, {cycles(2**63 - 1)}
  %init = (s32[], f32[8,16,16], f32[8,16,16]) tuple(%zero, %copy.5, %a)
  %loop = (s32[], f32[8,16,16], f32[8,16,16]) while(%init), condition=%cond,\
 body=%body, backend_config={{"known_trip_count":{{"n":"8"}}}}
  ROOT %r = f32[8,16,16]{{2,1,0}} get-tuple-element(%loop), index=2
}}
"""
MATRIX = 4 * 16 * 16


@pytest.fixture(scope="module")
def found():
  return estimates.estimate(hlo.parse(_STEP), CHIP)


def test_places_add_up_what_runs_outside_of_kernels(found):
  places = {place.operation: place for place in found.places}
  assert set(places) == {
    "x/dot",
    "router/sort",
    "unnamed copy",
    "unnamed fusion",
  }
  product = places["x/dot"]
  # The innermost line in the package; the product's is in a library.
  assert product.line == "model/layer.py:12"
  assert places["router/sort"].line == ""
  # Reads one slice and its index, and writes one slice; the weights are in
  # another memory.
  assert product.bytes == 8 * (2 * MATRIX + 4)
  assert product.runs == 8
  assert product.estimate == pytest.approx(8 * 0.5)
  assert product.roofline == pytest.approx(product.bytes / 1e4)
  assert places["unnamed copy"].roofline == pytest.approx(2 * 8 * MATRIX / 1e4)
  assert found.estimate == pytest.approx(8 * 0.5 + 0.3)


def test_flops_bind_the_roofline_where_they_take_longer():
  slow = CHIP._replace(flops=1e3)
  places = estimates.estimate(hlo.parse(_STEP), slow).places
  (product,) = (place for place in places if place.operation == "x/dot")
  assert product.roofline == pytest.approx(8 * 2 * 16**3 / 1e3)


def test_instructions_without_an_estimate_are_counted_and_named(found):
  kinds = {kind.name: kind for kind in found.unpriced}
  assert set(kinds) == {"sort", "scatter"}
  assert kinds["sort"].runs == 8 and not kinds["sort"].is_sentinel
  assert kinds["sort"].roofline == pytest.approx(8 * 2 * MATRIX / 1e4)
  assert kinds["scatter"].is_sentinel
  text = "\n".join(
    report._describe_unpriced([kind._asdict() for kind in found.unpriced])
  )
  assert "no estimate for 8 instructions, by roofline: 8 sort" in text
  assert "a sentinel for 1 instructions, by roofline: 1 scatter" in text


def test_range_of_the_step_adds_kernels_and_synchronous_collectives(found):
  costs = hlo_costs.Costs(
    0.0,
    [hlo_costs.Kernel("gmm", 8, 2e6), hlo_costs.Kernel("x", 1, None)],
    [],
    0,
  )
  figures = estimates.figures(found, costs, 0.25, 0.0, CHIP, 1e6)
  step = figures["step"]
  assert step["low"] == pytest.approx(found.roofline + 2 + 0.25)
  assert step["high"] == pytest.approx(
    found.estimate + found.unpriced_roofline + 2 + 0.25
  )
  assert figures["mfu"]["low"] == pytest.approx(1 / step["high"])
  assert figures["mfu"]["high"] == pytest.approx(1 / step["low"])
  bound = estimates.figures(found, costs, 0.25, 99.0, CHIP, 1e6)
  assert bound["step"] == {"low": 99.0, "high": 99.0}


def test_a_program_without_estimates_has_rooflines():
  """What XLA writes for CPUs: no estimates, and whole arrays."""

  def step(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

  text = (
    jax.jit(step).lower(jnp.ones((64, 64)), jnp.ones((5, 64, 64))).compile()
  )
  found = estimates.estimate(hlo.parse(text.as_text()), CHIP)
  assert found.estimate == 0
  assert found.unpriced_roofline == pytest.approx(found.roofline)
  # Five products, at least, and no more than ten times their bytes.
  assert 5 * 2 * 64**3 / 1e6 <= found.roofline < 10 * 5 * 4 * 3 * 64**2 / 1e4
