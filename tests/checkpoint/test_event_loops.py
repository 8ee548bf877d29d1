"""Tasks that a closed event loop would leave behind, with TensorStore's own."""

import asyncio
import threading
import time

import pytest
import tensorstore

from edl_jax.checkpoint import DamagedError, items
from edl_jax.checkpoint.event_loops import patient_loops


def failing_read(ended):
  """Returns a function that fails while TensorStore still reads, as Orbax."""

  def read():
    promise, late = tensorstore.Promise.new()

    async def wait():
      try:
        await late
      finally:
        ended.append(True)

    async def fail():
      task = asyncio.ensure_future(wait())
      await asyncio.sleep(0)  # The task begins to wait.
      threading.Timer(0.1, promise.set_exception, [OSError("late")]).start()
      assert not task.done()
      raise ValueError("early")

    loop = asyncio.new_event_loop()
    try:
      loop.run_until_complete(fail())
    finally:
      loop.close()

  return read


@pytest.mark.parametrize("in_a_notebook", [False, True])
def test_a_failed_read_is_one_error(in_a_notebook, capfd):
  ended = []

  def read():
    items.reading("run/checkpoints/5", failing_read(ended))

  async def in_a_loop():
    read()

  policy = asyncio.get_event_loop_policy()
  with pytest.raises(DamagedError, match=r"step 5: .* cannot be read .early"):
    if in_a_notebook:
      asyncio.run(in_a_loop())
    else:
      read()
  assert ended and asyncio.get_event_loop_policy() is policy
  time.sleep(0.3)  # For what would be printed late.
  assert capfd.readouterr().err == ""


def test_loops_of_other_threads_are_patient(capfd):
  """Orbax writes checkpoints in threads."""
  ended, raised = [], []

  def work():
    try:
      failing_read(ended)()
    except ValueError as error:
      raised.append(str(error))

  with patient_loops():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
  assert ended and raised == ["early"]
  time.sleep(0.3)
  assert capfd.readouterr().err == ""
