"""Damages files, and reads what is left of checkpoints."""

import hashlib
import pathlib
import random
import shutil
from typing import Any

import jax
import numpy as np

import edl_jax
from edl_jax.checkpoint import checkpoint_steps
from edl_jax.checkpoint.items import read_item
from edl_jax.checkpoint.verify import verify_checkpoint
from edl_jax.config import UserError
from tests.campaign.bench import Bench, FaultError, Outcome

_WAYS = (
  *("flip", "flip", "flip", "cut", "empty", "remove", "zero", "grow", "swap"),
  "folder",
)


def damage(path: pathlib.Path, draw: random.Random) -> str:
  """Damages one file below `path`, or removes a folder; says how."""
  files = sorted(each for each in path.rglob("*") if each.is_file())
  full = [file for file in files if file.stat().st_size]
  folders = sorted(each for each in path.iterdir() if each.is_dir())
  how = draw.choice(_WAYS)
  if how == "folder" and folders:
    target = draw.choice(folders)
    shutil.rmtree(target)
    return f"removed {target.relative_to(path)}/"
  target = draw.choice(full)
  name = target.relative_to(path)
  if how in ("remove", "folder"):
    target.unlink()
    return f"removed {name}"
  content = bytearray(target.read_bytes())
  if how == "swap":
    other = draw.choice(full)
    target.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"swapped {name} and {other.relative_to(path)}"
  if how == "flip":
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
  elif how == "cut":
    del content[draw.randrange(len(content)) :]
  elif how == "zero":
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
  elif how == "grow":
    content += draw.randbytes(draw.randint(1, 100))
  else:
    content.clear()
  target.write_bytes(content)
  return f"{how} {name}"


def _hash(tree: Any) -> str:
  """Returns the SHA-256 of the bytes of all arrays, without the digests."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()


def read_all(workdir: pathlib.Path) -> dict[str, list[str]]:
  """Returns what verify and load say of each checkpoint of a run.

  Returns:
    By step, the hash of its parameters and the hash of its optimizer state. In
    place of a hash stands "error: " and the line of a UserError.
  """
  folder = workdir / "checkpoints"
  said = {}
  for step in checkpoint_steps(str(folder)):
    path = folder / str(step)
    try:
      loaded = _hash(edl_jax.load(str(path)).model)
    except UserError as error:
      loaded = f"error: {error}"
    try:
      verify_checkpoint(str(path))
      optimizer = _hash(read_item(str(path), "optimizer"))
    except UserError as error:
      optimizer = f"error: {error}"
    said[str(step)] = [loaded, optimizer]
  return said


def damaged_checkpoints(
  bench: Bench, draw: random.Random, name: str
) -> Outcome:
  """All checkpoints but one are damaged: load, verify and resume find it.

  In one of five faults the oldest is damaged too. What is read without an error
  must be the undisturbed run's to the bit.
  """
  workdir = bench.copy(bench.undisturbed, name)
  for left_over in ("result.json", "routing.json"):
    (workdir / left_over).unlink()
  steps = checkpoint_steps(str(workdir / "checkpoints"))
  every = draw.random() < 0.2
  damages = []
  for step in steps if every else steps[1:]:
    path = workdir / "checkpoints" / str(step)
    damages.append(f"{step}: {damage(path, draw)}")
  truth = bench.ask(lambda: read_all(bench.undisturbed))
  found = bench.ask(lambda: read_all(workdir))
  done = "; ".join(damages)
  for step, answers in found.items():
    for answer, right in zip(answers, truth[step], strict=True):
      if answer.startswith("error: "):
        if "\n" in answer:
          raise FaultError(f"{done}: an error of several lines: {answer}")
      elif answer != right:
        raise FaultError(f"{done}: step {step} is read with other values")
  bench.end(bench.start(workdir), *((0, 2) if every else (0,)))
  if (workdir / "result.json").exists():
    bench.compare(workdir)
  return Outcome(done, len(damages))


def damaged_for_evaluation(
  bench: Bench, draw: random.Random, name: str
) -> Outcome:
  """Evaluation of a damaged checkpoint: one line, or the same figures."""
  workdir = bench.copy(bench.undisturbed, name)
  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  what = damage(newest, draw)
  bench.end(bench.start(workdir, "--mode=eval"), 0, 2)
  bench.compare(workdir)
  return Outcome(what)


def damaged_cache(bench: Bench, draw: random.Random, name: str) -> Outcome:
  """The cached tokenizer or tokens are damaged: they are made again."""
  cache = bench.folder / f"{name}-cache"
  shutil.copytree(bench.cache, cache)
  what = damage(cache, draw)
  bench.compare(bench.finish(bench.folder / name, cache=cache))
  return Outcome(what)
