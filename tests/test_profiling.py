"""A trace holds the steps that it is for."""

import gzip
import json

import jax
import jax.numpy as jnp

from edl_jax.profiling import Profile


def test_trace_of_some_steps(tmp_path):
  profile = Profile("2:3", str(tmp_path))
  told = []
  for step in range(1, 6):
    profile.before(step)
    with jax.profiler.TraceAnnotation(f"number_{step}"):
      state = jnp.sin(jnp.ones(8)) + step
    told.append(profile.after(step, state))
  assert [text is not None for text in told] == [
    False,
    False,
    True,
    *[False] * 2,
  ]
  folder = tmp_path / "profile"
  assert told[2].endswith(f"xprof --logdir={folder}")
  assert "steps 2 to 3" in told[2]
  (file,) = folder.rglob("*.trace.json.gz")
  names = {
    event.get("name")
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  }
  assert {f"number_{step}" for step in range(1, 6)} & names == {
    "number_2",
    "number_3",
  }


def test_no_trace_unless_asked_for_and_one_cut_short(tmp_path):
  profile = Profile("", str(tmp_path))
  profile.before(1)
  assert profile.after(1, jnp.ones(1)) is None
  profile.close()
  assert not list(tmp_path.iterdir())
  profile = Profile("1:9", str(tmp_path))
  profile.before(1)
  assert profile.after(1, jnp.ones(1)) is None
  # The run ends before step 9.
  profile.close()
  profile.close()
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
