"""Slices of TPUs: names, shapes, links."""

import pytest

from edl_jax.aot import topologies
from edl_jax.config import UserError


def test_links_of_a_corner_chip():
  def links(name):
    chip, shape = topologies.parse(name)
    return topologies.Topology(name, chip, shape, []).links()

  assert links("v5p:4x4x8") == (2, 2, 2)
  assert links("v5p:2x2x1") == (1, 1, 0)
  assert links("v5e:8x16") == (1, 2)
  for kind, chip in topologies.CHIPS.items():
    for shape in chip.slices:
      assert topologies.parse(f"{kind}:{shape}")[0] is chip


@pytest.mark.parametrize(
  ("name", "named"),
  [
    ("v9:2x2", "v5e: 2x2, 2x4"),
    ("v5p", "write CHIP:SHAPE"),
    ("v5p:2x4", "v5p have 3 dimensions"),
    ("v5e:3x4", "first two of them even"),
    ("v6e:4x0", "such as 2x2"),
  ],
)
def test_wrong_names_are_refused(name, named):
  with pytest.raises(UserError, match=f"--topology={name}: .*{named}"):
    topologies.parse(name)


def test_clocks_fit_whole_matrix_units():
  """A unit multiplies and adds 128 x 128 numbers in a cycle.

  On tpu7x the units are those of one of a chip's two devices.
  """
  units = {
    kind: chip.flops / chip.clock / (2 * 128**2)
    for kind, chip in topologies.CHIPS.items()
  }
  assert units == pytest.approx(
    {"v4": 8, "v5e": 4, "v5p": 8, "v6e": 16, "tpu7x": 16}, rel=0.01
  )
