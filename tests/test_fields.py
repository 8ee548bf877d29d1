"""Rules of fields, and the bounds, help and use of every field of the config.

Bounds and choices are compared with values written down here by hand, and with
the tables of the code that gives the names their meaning.
"""

import ast
import dataclasses
import math
import pathlib
import re

import pytest

from edl_jax import config, fields
from edl_jax.config import FIELDS
from edl_jax.fields import Rule, Weight, field

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass
class Example:
  count: int = field(1, at_least=1, also=-1, help="A count.")
  share: float = field(0.5, above=0, at_most=1, help="A share.")
  weights: tuple[float, ...] = field((), at_least=0, help="Weights.")
  phases: tuple[tuple[float, ...], ...] = field((), below=2, help="Phases.")
  kind: str = field("a", choices=("a", "b"), help="A kind.")
  on: bool = field(False, help="A switch.")
  auto: Weight = field(0.0, at_least=0, help="A weight.")


DECLARED = {declared.name: declared for declared in dataclasses.fields(Example)}


@pytest.mark.parametrize(
  ("name", "value", "wanted"),
  [
    ("count", 1, None),
    ("count", -1, None),
    ("count", 0, "at least 1, or -1"),
    ("count", -2, "at least 1, or -1"),
    ("count", 1.5, "of type int"),
    ("count", True, "of type int"),
    ("share", 1, None),
    ("share", 5e-324, None),
    ("share", 0.0, "above 0 and at most 1"),
    ("share", 1.0000001, "above 0 and at most 1"),
    ("share", math.nan, "finite"),
    ("share", math.inf, "finite"),
    ("share", "half", "of type float"),
    ("weights", (), None),
    ("weights", (0.0, 3), None),
    ("weights", (1.0, -1e-9), "at least 0 throughout"),
    ("weights", [1.0], "of type tuple of float"),
    ("phases", ((1.9, -5.0), ()), None),
    ("phases", ((1.0, 2.0),), "below 2 throughout"),
    ("phases", (1.0,), "of type tuple of tuples of float"),
    ("phases", ((math.inf,),), "finite"),
    ("kind", "b", None),
    ("kind", "c", "one of a, b"),
    ("kind", 1, "of type str"),
    ("on", True, None),
    ("on", 1, "of type bool"),
    ("auto", 2, None),
    ("auto", "auto:1e-4", None),
  ],
)
def test_requirement_says_what_is_allowed(name, value, wanted):
  assert fields.requirement(value, DECLARED[name]) == wanted


@pytest.mark.parametrize(
  "value", [-1.0, math.nan, math.inf, "much", "auto", "auto:", "auto:0", True]
)
def test_weight_is_a_number_or_a_target(value):
  assert fields.requirement(value, DECLARED["auto"]) == (
    "a number at least 0, or auto:TARGET such as auto:1e-4"
  )


def test_auto_target():
  assert fields.auto_target("auto:1e-4") == 1e-4
  assert fields.auto_target(0.5) is None


def test_nearest_prefers_the_last_name():
  known = ["mesh.expert", "data.files", "model.expert_width", "seed"]
  assert fields.nearest("data.expert", known) == "did you mean mesh.expert?"
  assert fields.nearest("sed", known) == "did you mean seed?"
  assert fields.nearest("qqq", known) == f"known: {', '.join(known)}"


@pytest.mark.parametrize("key", FIELDS)
def test_help_is_a_sentence(key):
  text = fields.rule_of(FIELDS[key]).help
  assert re.fullmatch(r"[A-Za-z0-9].*[^.\s]\.", text) and len(text.split()) > 1
  assert "  " not in text and "|" not in text


@pytest.mark.parametrize(
  ("key", "allowed", "refused"),
  [
    ("seed", (0, 2**32 - 1), (-1, 2**32)),
    ("model.width", (1, 10**6), (0, -8)),
    ("model.num_shared_experts", (0, 3), (-1,)),
    ("model.rope_theta", (1e-9,), (0.0, -1.0)),
    ("moe.capacity_factor", (0.1, 8.0), (0.0,)),
    ("losses.divergence_weight", (0.0, 10.0), (-1e-9,)),
    ("losses.coarse_weight", (0.0, 1.0), (-0.1, 1.1)),
    ("losses.divergence_epsilon", (1e-30,), (0.0,)),
    ("losses.variance_weight", (0.0, "auto:1e-3"), (-1.0, "auto:-1")),
    ("optimizer.learning_rate", (1e-9,), (0.0,)),
    ("optimizer.warmup_steps", (0,), (-1,)),
    ("optimizer.beta1", (0.0, 0.999), (1.0, -0.1)),
    ("optimizer.beta2", (0.0, 0.999), (1, 1.5)),
    ("optimizer.final_fraction", (0.0, 1), (1.01,)),
    ("train.eval_rows", (-1, 1), (0, -2)),
    ("train.keep_checkpoints", (1,), (0,)),
    ("mesh.data", (-1, 1, 64), (0, -2)),
    ("mesh.sequence", (-1, 1), (0,)),
    ("data.temperature", (0.5, 100.0), (0.0,)),
    ("data.weights", ((0.0, 1.0), ()), ((-1.0, 2.0),)),
    ("data.held_out_fraction", (0.001, 0.999), (0.0, 1.0)),
  ],
)
def test_bounds_by_hand(key, allowed, refused):
  for value in allowed:
    assert fields.requirement(value, FIELDS[key]) is None, value
  for value in refused:
    assert fields.requirement(value, FIELDS[key]), value


def edges(rule: Rule, number: type) -> tuple[list[float], list[float]]:
  """Returns the numbers next to the bounds: those inside, those outside."""

  def following(value: float, toward: float) -> float:
    if number is int:
      return int(value + math.copysign(1, toward))
    return math.nextafter(value, toward)

  inside, outside = [], []
  for bound, closed, inward in (
    (rule.above, False, math.inf),
    (rule.at_least, True, math.inf),
    (rule.below, False, -math.inf),
    (rule.at_most, True, -math.inf),
  ):
    if bound is not None:
      inside.append(bound if closed else following(bound, inward))
      outside.append(following(bound, -inward) if closed else bound)
  return inside, outside


@pytest.mark.parametrize(
  "key",
  [
    key
    for key, declared in FIELDS.items()
    if edges(fields.rule_of(declared), float) != ([], [])
  ],
)
def test_bounds_hold_to_the_next_number(key):
  declared = FIELDS[key]
  inside, outside = edges(fields.rule_of(declared), declared.type)
  shape = fields.type_name(declared.type).count("tuple")
  for numbers, fine in ((inside, True), (outside, False)):
    for number in numbers:
      value = number
      for _ in range(shape):
        value = (value,)
      assert (fields.requirement(value, declared) is None) == fine, value


def test_numbers_have_bounds():
  unbounded = {
    key
    for key, declared in FIELDS.items()
    if re.search("int|float|number", fields.type_name(declared.type))
    and not fields.rule_of(declared).allowed
  }
  assert unbounded == set()


def test_choices_equal_the_tables_that_they_name():
  from edl_jax import rematerialization, step
  from edl_jax.losses import divergence
  from edl_jax.model import transformer

  assert config.choices("losses.divergence") == divergence.DIVERGENCES
  assert config.choices("model.remat") == (
    *("none", *transformer._REMAT_POLICIES, step.AUTO),
  )
  assert {*rematerialization.ORDER, step.AUTO} == {
    *config.choices("model.remat")
  }


@pytest.mark.parametrize(
  ("key", "file"),
  [
    ("moe.dispatch", "edl_jax/model/expert_parallel.py"),
    ("losses.balance_scope", "edl_jax/losses/objective.py"),
    ("losses.specialization_form", "edl_jax/losses/objective.py"),
    ("losses.specialization_form", "edl_jax/losses/routing.py"),
  ],
)
def test_code_distinguishes_every_choice(key, file):
  assert set(config.choices(key)) <= strings((ROOT / file).read_text())


# --- Every field is read ----------------------------------------------------

# The names under which code holds the fields of each group. An attribute of any
# other object, such as `mesh.shape` or `batch.data`, does not count.
HOLDERS = {
  "": {"experiment"},
  "model": {"model", "config"},
  "moe": {"moe", "config"},
  "losses": {"losses", "config", "settings"},
  "optimizer": {"optimizer", "config"},
  "train": {"train", "config", "settings"},
  "mesh": {"mesh", "config"},
  "data": {"data", "config"},
  "metrics": {"metrics", "config"},
}

# Files that read fields by name, from a table of strings.
TABLES = {
  "mesh": "edl_jax/sharding.py",
  "losses": "edl_jax/losses/objective.py",
}

# They define the configuration rather than use it.
DEFINING = {
  *("config/flat.py", "config/groups.py", "config/model.py"),
  *("fields.py", "validation.py", "describe.py"),
}


def sources() -> dict[str, str]:
  """Returns the code that uses the configuration, by path."""
  return {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("edl_jax", "data")
    for path in (ROOT / folder).rglob("*.py")
    if str(path.relative_to(ROOT / folder)) not in DEFINING
  }


def attributes(source: str) -> set[tuple[str, str]]:
  """Returns (holder, name) of every attribute that a file reads."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      holder = node.value
      name = getattr(holder, "attr", getattr(holder, "id", ""))
      found.add((name.lstrip("_"), node.attr))
  return found


def strings(source: str) -> set[str]:
  """Returns the string constants of a file."""
  return {
    node.value
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  }


def dead_fields(code: dict[str, str]) -> set[str]:
  """Returns the fields that no file of `code` reads."""
  read = set().union(*map(attributes, code.values()))
  dead = set()
  for key in FIELDS:
    group, _, name = key.rpartition(".")
    in_table = name in strings(code.get(TABLES.get(group, ""), ""))
    if not in_table and not any((h, name) in read for h in HOLDERS[group]):
      dead.add(key)
  return dead


def test_every_field_is_read():
  assert dead_fields(sources()) == set()


def test_a_field_that_nothing_reads_is_found():
  code = sources()
  assert dead_fields({}) == set(FIELDS)
  # Only the optimizer reads these.
  del code["edl_jax/optim.py"]
  dead = dead_fields(code)
  assert {"optimizer.beta1", "optimizer.clip_norm"} <= dead
  assert not {key for key in dead if not key.startswith("optimizer.")}
