"""The faults: each takes a bench and its own random numbers.

A fault returns a few words about what it did. It raises `FaultError` if the
product gave a wrong figure, a traceback, or a wrong exit code.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from tests.campaign.bench import Bench, FaultError

Fault = Callable[[Bench, random.Random, str], str]

# Runs main with a batch, or the first parameters, that are not finite.
_POISON = """
import runpy, sys
import jax, jax.numpy as jnp
from edl_jax import sharding, step
what, at = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
if what == "data":
  inner, calls = sharding.put_batch, []
  def put_batch(batch, mesh):
    calls.append(1)
    bad = float("nan") if len(calls) == at else 1.0
    return inner(batch._replace(weights_BT=batch.weights_BT * bad), mesh)
  sharding.put_batch = put_batch
else:
  make = step.init_state
  def init_state(*arguments):
    state = make(*arguments)
    leaves, tree = jax.tree.flatten(state.model)
    number = at % len(leaves)
    first = (0,) * leaves[number].ndim
    leaves[number] = leaves[number].at[first].set(jnp.nan)
    return state._replace(model=jax.tree.unflatten(tree, leaves))
  step.init_state = init_state
runpy.run_module("edl_jax.main", run_name="__main__", alter_sys=True)
"""


def _struck(
  bench: Bench, draw: random.Random, name: str, number: int
) -> tuple[pathlib.Path, subprocess.Popen[str], float]:
  """Starts a run and sends a signal at a random moment of it."""
  workdir = bench.folder / name
  moment = draw.uniform(0.3, 1.1 * bench.seconds)
  process = bench.start(workdir)
  time.sleep(moment)
  process.send_signal(number)
  return workdir, process, moment


def kill(bench: Bench, draw: random.Random, name: str) -> str:
  """SIGKILL at a random moment, up to three times; then to the end."""
  moments = []
  for _ in range(draw.randint(1, 3)):
    workdir, process, moment = _struck(bench, draw, name, signal.SIGKILL)
    bench.end(process, -signal.SIGKILL, 0)
    moments.append(f"{moment:.1f} s")
  bench.finish(workdir)
  bench.compare(workdir)
  return f"after {', '.join(moments)}"


def end_signal(bench: Bench, draw: random.Random, name: str) -> str:
  """SIGTERM, SIGINT or SIGHUP at a random moment; then to the end."""
  number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
  workdir, process, moment = _struck(bench, draw, name, number)
  # Before training begins a signal ends the process as any other. While the
  # interpreter starts, it prints a traceback of SIGINT.
  process.wait(timeout=600)
  if workdir.exists() or number != signal.SIGINT:
    bench.end(process, 0, 128 + number, -number)
  bench.finish(workdir)
  bench.compare(workdir)
  return f"{number.name} after {moment:.1f} s"


def stopped(bench: Bench, draw: random.Random, name: str) -> str:
  """SIGSTOP for some seconds, in which a second run is refused."""
  workdir, process, moment = _struck(bench, draw, name, signal.SIGSTOP)
  owned = (workdir / ".lock").exists()
  if owned:
    line = bench.end(bench.start(workdir), 2)
    if f"in use by process {process.pid}" not in line:
      raise FaultError(f"the second run was refused for another reason: {line}")
  time.sleep(2)
  process.send_signal(signal.SIGCONT)
  bench.end(process, 0)
  bench.compare(workdir)
  return f"after {moment:.1f} s{', a second run refused' * owned}"


def second_run(bench: Bench, draw: random.Random, name: str) -> str:
  """Two runs in one folder at once: one is refused, the other unharmed."""
  workdir = bench.folder / name
  first = bench.start(workdir)
  time.sleep(draw.uniform(0, 0.5 * bench.seconds))
  second = bench.start(workdir)
  for process in (first, second):
    process.wait(timeout=600)
  codes = sorted(process.returncode for process in (first, second))
  for process in (first, second):
    line = bench.end(process, 0, 2)
    if process.returncode == 2 and "is in use by process" not in line:
      raise FaultError(f"refused for another reason: {line}")
  # If the first has ended when the second looks, the second finds its result.
  if codes not in ([0, 2], [0, 0]):
    raise FaultError(f"exit codes {codes}")
  bench.compare(workdir)
  return f"exit codes {codes}"


def full_disk(bench: Bench, draw: random.Random, name: str) -> str:
  """No file may grow beyond a random size, as on a full disk; then it may."""
  workdir = bench.folder / name
  limit = int(2 ** draw.uniform(6, 21))
  line = bench.end(bench.start(workdir, largest_file=limit), 0, 2)
  bench.finish(workdir)
  bench.compare(workdir)
  return f"at {limit:,} bytes: {'refused' if 'error' in line else 'unharmed'}"


def full_tmpfs(bench: Bench, draw: random.Random, name: str) -> str:
  """A small file system of its own, which fills up; then it is enlarged."""
  place = bench.folder / name
  place.mkdir()
  size = draw.randint(64, 1200)
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(place)]
  if subprocess.run(mount, capture_output=True).returncode:
    return "not done: mounting is not allowed here"
  try:
    line = bench.end(bench.start(place / "run"), 0, 2)
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    bench.finish(place / "run")
    bench.compare(place / "run")
  finally:
    subprocess.run(["umount", str(place)], check=True)
  return f"of {size} KiB: {line[:60]}"


def poison(bench: Bench, draw: random.Random, name: str) -> str:
  """NaN in a batch or a parameter: exit code 1, and nothing bad is kept."""
  what = draw.choice(["data", "parameters"])
  at = draw.randint(1, 20)
  workdir = bench.folder / name
  program = ("-c", _POISON, what, str(at))
  line = bench.end(bench.start(workdir, program=program), 1)
  if "nan" not in line.lower():
    raise FaultError(f"the line names no NaN: {line}")
  if (workdir / "result.json").exists():
    raise FaultError("there is a result")
  if what == "parameters":
    # A run that was never good starts anew elsewhere.
    if (workdir / "checkpoints").is_dir() and os.listdir(
      workdir / "checkpoints"
    ):
      raise FaultError("a checkpoint of NaN was kept")
  else:
    bench.finish(workdir)
    bench.compare(workdir)
  return f"{what} at {at}"


def _damage(path: pathlib.Path, draw: random.Random) -> str:
  """Damages one file below `path`, or removes a folder."""
  files = sorted(each for each in path.rglob("*") if each.is_file())
  folders = sorted(each for each in path.iterdir() if each.is_dir())
  how = draw.choice(
    ["flip", "flip", "cut", "empty", "remove", "zero", "folder"]
  )
  if how == "folder" and folders:
    target = draw.choice(folders)
    shutil.rmtree(target)
    return f"removed {target.relative_to(path)}/"
  target = draw.choice([file for file in files if file.stat().st_size])
  content = bytearray(target.read_bytes())
  if how == "flip":
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
  elif how == "cut":
    del content[draw.randrange(len(content)) :]
  elif how == "zero":
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
  elif how == "empty":
    content.clear()
  if how in ("remove", "folder"):
    target.unlink()
  else:
    target.write_bytes(content)
  return f"{how} {target.relative_to(path)}"


def damaged_checkpoint(bench: Bench, draw: random.Random, name: str) -> str:
  """The newest checkpoint is damaged: the run goes back, figures are equal."""
  workdir = bench.copy(bench.undisturbed, name)
  for left_over in ("result.json", "routing.json"):
    (workdir / left_over).unlink()
  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  what = _damage(newest, draw)
  both = draw.random() < 0.2
  if both:
    older = min((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    what += f"; {_damage(older, draw)}"
  bench.end(bench.start(workdir), *((0, 2) if both else (0,)))
  if (workdir / "result.json").exists():
    bench.compare(workdir)
  return what


def damaged_for_evaluation(bench: Bench, draw: random.Random, name: str) -> str:
  """Evaluation of a damaged checkpoint: one line, or the same figures."""
  workdir = bench.copy(bench.undisturbed, name)
  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  what = _damage(newest, draw)
  bench.end(bench.start(workdir, "--mode=eval"), 0, 2)
  bench.compare(workdir)
  return what


def damaged_cache(bench: Bench, draw: random.Random, name: str) -> str:
  """The cached tokenizer or tokens are damaged: they are made again."""
  cache = bench.folder / f"{name}-cache"
  shutil.copytree(bench.cache, cache)
  what = _damage(cache, draw)
  bench.compare(bench.finish(bench.folder / name, cache=cache))
  return what


def shared_cache(bench: Bench, draw: random.Random, name: str) -> str:
  """Two runs fill one empty cache at the same moment."""
  cache, pause = bench.folder / f"{name}-cache", draw.uniform(0, 1)
  workdirs = [bench.folder / f"{name}-{number}" for number in (1, 2)]
  processes = []
  for workdir in workdirs:
    processes.append(bench.start(workdir, cache=cache))
    time.sleep(pause)
  for process in processes:
    bench.end(process, 0)
  for workdir in workdirs:
    bench.compare(workdir)
  return f"{pause:.2f} s apart"


# Each fault, and how often it occurs in a round.
FAULTS: dict[str, tuple[Fault, int]] = {
  "kill": (kill, 10),
  "damaged_checkpoint": (damaged_checkpoint, 5),
  "end_signal": (end_signal, 2),
  "stopped": (stopped, 1),
  "second_run": (second_run, 1),
  "full_disk": (full_disk, 2),
  "full_tmpfs": (full_tmpfs, 1),
  "poison": (poison, 2),
  "damaged_for_evaluation": (damaged_for_evaluation, 1),
  "damaged_cache": (damaged_cache, 1),
  "shared_cache": (shared_cache, 1),
}
