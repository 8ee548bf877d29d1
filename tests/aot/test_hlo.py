"""Reading HLO text: what XLA writes for small programs, and by hand."""

import jax
import jax.numpy as jnp
import pytest

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
