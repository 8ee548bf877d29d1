"""Reading HLO text: what XLA writes for small programs, and by hand."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edl_jax.aot import hlo
from edl_jax.aot.hlo import Array


def compiled(function, *arguments):
  return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize(
  ("dtype", "shape", "size"),
  [("f32", (2, 3), 24), ("bf16", (8,), 16), ("pred", (5,), 5), ("s4", (6,), 3)],
)
def test_bytes_of_a_value(dtype, shape, size):
  assert Array(dtype, shape).bytes == size


def test_instructions_have_types_operands_and_attributes():
  text = """\
HloModule m, num_partitions=4
ENTRY %e (p: (f32[2,3], s32[])) -> bf16[2,3] {
  %p = (f32[2,3]{1,0}, s32[]) parameter(0)
  %x.1 = f32[2,3]{1,0} get-tuple-element(%p), index=0
  ROOT %r = bf16[2,3]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, calls=%f.2
}
"""
  module = hlo.parse(text)
  assert module.num_devices == 4
  parameter, element, root = module.computations[module.entry].values()
  assert parameter.arrays == (Array("f32", (2, 3)), Array("s32", ()))
  assert (element.opcode, element.operands) == ("get-tuple-element", ("p",))
  assert root.arrays == (Array("bf16", (2, 3)),)
  assert root.called("calls") == ["f.2"] and root.called("body") == []


def test_executions_multiply_the_turns_of_nested_loops():
  def step(x):
    def outer(x, _):
      inner = jax.lax.fori_loop(0, 3, lambda _, x: jnp.cos(x @ x), x)
      return jnp.sin(inner @ x), None

    return jax.lax.scan(outer, x, length=5)[0]

  module = compiled(step, jnp.ones((16, 16)))
  times = hlo.executions(module)
  found = sorted(
    times[name]
    for name, computation in module.computations.items()
    for instruction in computation.values()
    if instruction.opcode == "dot"
  )
  assert found == [5, 15]


def test_executions_take_a_number_for_loops_that_compute_theirs():
  def step(count, x):
    return jax.lax.fori_loop(0, count, lambda _, x: jnp.cos(x @ x), x)

  module = compiled(step, 3, jnp.ones((16, 16)))
  (body,) = (
    name
    for name, computation in module.computations.items()
    for instruction in computation.values()
    if instruction.opcode == "dot"
  )
  assert hlo.executions(module)[body] == 1
  assert hlo.executions(module, unknown_trips=7)[body] == 7


def test_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no HLO"):
    hlo.parse("HloModule empty")


def test_frames_that_call_each_other_end():
  text = """\
HloModule m

FileNames
1 "/a/edl_jax/model/moe.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12}

StackFrames
1 {file_location_id=1 parent_frame_id=2}
2 {file_location_id=1 parent_frame_id=1}

ENTRY %e (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0), metadata={stack_frame_id=1}
}
"""
  module = hlo.parse(text)
  (root,) = module.computations["e"].values()
  assert module.source_line(root, "edl_jax/") == "model/moe.py:12"
  assert module.source_line(root, "elsewhere/") == ""


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("calls=%f", "calls=%g"),  # A computation that there is not.
    ("calls=%f", "calls=%e"),  # One that calls itself.
    ("parameter(0)", "parameter(0"),
    ("fusion(%p)", "fusion"),
    ("s32[2] fusion", "s32[2]"),
  ],
)
def test_text_of_another_form_is_refused_in_one_line(old, new):
  text = """\
HloModule m
%f (q: s32[2]) -> s32[2] {
  ROOT %q = s32[2] parameter(0)
}
ENTRY %e (p: s32[2]) -> s32[2] {
  %p = s32[2] parameter(0)
  ROOT %r = s32[2] fusion(%p), kind=kLoop, calls=%f
}
"""
  assert hlo.executions(hlo.parse(text)) == {"e": 1, "f": 1}
  with pytest.raises(hlo.HLOError) as caught:
    hlo.executions(hlo.parse(text.replace(old, new)))
  assert "\n" not in str(caught.value)


def _real_text():
  """Returns a program with loops, a conditional and fusions."""

  def step(x, count):
    def outer(x, _):
      inner = jax.lax.fori_loop(0, count, lambda _, x: jnp.cos(x @ x), x)
      return jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.tanh, inner @ x), None

    return jax.lax.scan(outer, x, length=5)[0]

  lowered = jax.jit(step).lower(jnp.ones((16, 16)), 3)
  return lowered.compile().as_text()


_REAL = _real_text()
# An edit: a share of the text, what happens there, and with which piece.
_EDITS = st.lists(
  st.tuples(
    st.floats(0, 1),
    st.sampled_from(["cut", "insert", "replace", "drop line", "copy line"]),
    st.sampled_from([*"(){}[]%=,1x \n", "%x.1", "while", "body=", "f32[2]"])
    | st.text(max_size=3),
  ),
  min_size=1,
  max_size=6,
)


def _edited(text, edits):
  for share, how, piece in edits:
    at = int(share * len(text))
    if how in ("cut", "insert", "replace"):
      kept = at + len(piece) * (how != "insert")
      text = text[:at] + piece * (how != "cut") + text[kept:]
    else:
      lines = text.splitlines(keepends=True)
      number = int(share * (len(lines) - 1))
      lines[number : number + 1] = lines[number : number + 1] * (
        2 * (how == "copy line")
      )
      text = "".join(lines)
  return text


@settings(deadline=None, database=None, max_examples=400)
@given(_EDITS)
def test_edited_programs_are_read_or_refused(edits):
  try:
    module = hlo.parse(_edited(_REAL, edits))
    hlo.executions(module)
  except hlo.HLOError as error:
    assert "\n" not in str(error)
    return
  for computation in module.computations.values():
    for instruction in computation.values():
      assert not module.source_line(instruction, "tests/").startswith("/")
