"""A trace of some steps of a run, for XProf.

Importing this module imports no JAX: checks of an experiment read it.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from edl_jax import storage


def parse_steps(text: str) -> tuple[int, int] | None:
  """Returns the first and the last step of "FIRST:LAST", None for "".

  Raises:
    ValueError: the text has another form, or the steps do not rise from 1.
  """
  if not text:
    return None
  first, last = map(int, text.split(":"))
  if not 1 <= first <= last:
    raise ValueError(text)
  return first, last


class Profile:
  """Traces steps of a run."""

  def __init__(self, steps: str, workdir: str):
    """Traces nothing yet.

    Args:
      steps: see `parse_steps`.
      workdir: the trace goes to its folder "profile".
    """
    self._steps = parse_steps(steps)
    self._folder = os.path.join(workdir, "profile")
    self._local: str | None = None

  def before(self, step: int) -> None:
    """Starts the trace, if `step` is its first."""
    if self._steps is None or step != self._steps[0]:
      return
    import jax

    # JAX writes to a local folder.
    self._local = self._folder
    if storage.in_bucket(self._folder):
      self._local = tempfile.mkdtemp()
    jax.profiler.start_trace(self._local)

  def after(self, step: int, state: Any) -> str | None:
    """Ends the trace, if `step` is its last.

    Args:
      step: the step that was dispatched.
      state: what it returns; the trace ends when it is there.

    Returns:
      A line that says where the trace is, once it is complete.
    """
    if self._local is None or self._steps is None or step != self._steps[1]:
      return None
    import jax

    jax.block_until_ready(state)
    self.close()
    first, last = self._steps
    return (
      f"the trace of steps {first} to {last} is in {self._folder}; to open it:"
      f" python -m pip install xprof && xprof --logdir={self._folder}"
    )

  def close(self) -> None:
    """Ends the trace, if one is under way."""
    if self._local is None:
      return
    import jax

    local, self._local = self._local, None
    jax.profiler.stop_trace()
    if local == self._folder:
      return
    for file in Path(local).rglob("*"):
      if file.is_file():
        name = file.relative_to(local).as_posix()
        storage.write_bytes(f"{self._folder}/{name}", file.read_bytes())
