"""Event loops that end their tasks before they close.

Orbax reads and writes the arrays of a checkpoint as tasks of an event loop, and
closes the loop when the first of them fails. The others go on in TensorStore.
Python then prints a traceback of each: when it ends and finds no loop, or when
its task is freed.
"""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _PatientLoop(asyncio.SelectorEventLoop):
  def close(self) -> None:
    """Waits for the tasks that are left, whatever they raise; then closes."""
    left = set() if self.is_closed() else asyncio.all_tasks(self)
    if left:
      self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    super().close()


class _Patient(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _PatientLoop()


@contextlib.contextmanager
def patient_loops() -> Iterator[None]:
  """Makes all event loops that are opened meanwhile, in any thread, patient."""
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_Patient())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(before)


def in_patient_loop(work: Callable[[], T]) -> T:
  """Returns what `work` returns; event loops that it opens are patient."""
  with patient_loops():
    try:
      asyncio.get_running_loop()
    except RuntimeError:
      return work()
    # Orbax would choose another loop beside that of a notebook. A thread of its
    # own has none.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      return thread.submit(work).result()
