"""Names of the folders of a sweep's points."""

import pathlib

from edl_jax import sweep

TINY = str(pathlib.Path(__file__).parent.parent / "experiments" / "tiny.py")


def test_long_names_are_shortened_and_stay_apart():
  weights = [",".join(["0.25"] * 39), ",".join(["0.5"] + ["0.25"] * 38)]
  made = sweep.points(TINY, [f"data.weights={';'.join(weights)}"], {})
  names = [point.name for point in made]
  assert len(set(names)) == 2 and max(map(len, names)) <= 255
  assert all(name.startswith("weights=0.") for name in names)
  assert [len(point.experiment.data.weights) for point in made] == [39, 39]
  # A name that fits stays what it was.
  (point,) = sweep.points(TINY, ["seed=7"], {})
  assert point.name == "seed=7"
