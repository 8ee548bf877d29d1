"""What all benchmarks share: timing in turns, tables, and JSON files.

Machines are often shared and noisy. Contestants therefore take turns within one
process, A B C C B A, and are compared by the median of the ratios within a
round, which a slow minute does not change.
"""

import datetime
import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from edl_jax import storage, tables

_PACKAGES = ("jax", "jaxlib", "flax", "optax")


def machine() -> dict[str, Any]:
  """Returns processor, cores, system, Python and package versions."""
  model = platform.processor()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      names = [line for line in file if line.startswith("model name")]
    model = names[0].split(":", 1)[1].strip() if names else model
  return {
    "processor": model,
    "cores": os.cpu_count(),
    "system": platform.system(),
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def seconds(function: Callable[[], Any]) -> float:
  """Returns the seconds until the arrays that a call returns are ready."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start


def peak_memory() -> int:
  """Returns the peak resident memory of this process in bytes."""
  if os.path.exists("/proc/self/status"):
    # getrusage would count the parent too, from before this program began.
    with open("/proc/self/status", encoding="utf-8") as file:
      (kibibytes,) = [line.split()[1] for line in file if "VmHWM" in line]
    return 1024 * int(kibibytes)
  size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return size if sys.platform == "darwin" else 1024 * size


def take_turns(
  contestants: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
  """Calls every contestant once a round; returns their results by round."""
  taken: dict[str, list[float]] = {name: [] for name in contestants}
  for done in range(rounds):
    # Odd rounds run backwards, so that none always follows the same other.
    names = list(contestants)[:: -1 if done % 2 else 1]
    for name in names:
      taken[name].append(contestants[name]())
  return taken


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
  """Returns the median over rounds of the ratio within a round."""
  return statistics.median(a / b for a, b in zip(values, base, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table with the keys of the first row as its heading."""
  columns = list(rows[0])
  cells = [columns, *([_shown(row[key]) for key in columns] for row in rows)]
  return "\n".join(tables.aligned(cells))


def _shown(value: Any) -> str:
  return f"{value:,.4g}" if isinstance(value, float) else f"{value}"


def report(rows: Sequence[Mapping[str, Any]], path: str, **more: Any) -> None:
  """Prints the table; with a `path`, writes it as JSON too.

  The file also records command, date, machine, versions, and `more`.
  """
  print(table(rows))
  if not path:
    return
  result = {
    "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": machine(),
    **more,
    "rows": list(rows),
  }
  storage.write_json(path, result, indent=2)
  print(f"written to {path}")


def _module() -> str:
  return sys.modules["__main__"].__spec__.name
