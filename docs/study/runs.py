"""Which rows of the results belong to a condition, and their figures."""

from collections.abc import Mapping, Sequence

from docs.study.collect import value_of
from docs.study.questions import Condition

# The rows of a condition by seed.
Runs = dict[int, dict[str, str]]


def runs_of(rows: Sequence[Mapping[str, str]], condition: Condition) -> Runs:
  """Returns the rows of a condition by seed.

  Raises:
    ValueError: two rows have the same seed.
  """
  found: Runs = {}
  for row in rows:
    if all(value_of(row, key) == x for key, x in condition.where.items()):
      seed = int(row["seed"])
      if seed in found:
        raise ValueError(f"{condition.label}: two runs of seed {seed}")
      found[seed] = dict(row)
  return found


def figures_of(runs: Runs, name: str) -> dict[int, float]:
  """Returns a figure of each run that has it, by seed.

  "distance" is that of the loss from the best of a predictor that knows the
  source; "distance@TOKENS" is what it was after so many tokens.
  "carved/half" and "carved/quarter" are rises with this share of the experts.
  """
  shares = {"carved/half": 2, "carved/quarter": 4}
  found = {}
  for seed, row in runs.items():
    best = 0.0
    column = name
    if name.startswith("distance"):
      best = float(row["best_loss/known"])
      column = name.replace("distance", "lm_loss")
    elif name in shares:
      column = f"carved/{int(row['model.num_experts']) // shares[name]}"
    if row.get(column):
      found[seed] = float(row[column]) - best
  return found


def pairs_of(first: Runs, second: Runs, name: str) -> dict[int, float]:
  """Returns second minus first of a figure, by seed.

  Runs of different text are no pair.
  """
  before, after = figures_of(first, name), figures_of(second, name)
  return {
    seed: after[seed] - before[seed]
    for seed in before
    if seed in after and first[seed].get("text") == second[seed].get("text")
  }
