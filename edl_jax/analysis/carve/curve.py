"""Carve curves: held-out loss of each domain against the experts kept."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from edl_jax import config
from edl_jax.analysis.carve import selection
from edl_jax.analysis.carve.cost import cost
from edl_jax.analysis.carve.runs import Rows, Run, load_model, to_batches
from edl_jax.model.transformer import Model
from edl_jax.text.batch import Batch

# Calibration tokens of the curve that shows how few are enough.
CALIBRATION_SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)

LossStep = Callable[[Model, Batch, np.ndarray], tuple[jax.Array, jax.Array]]


class Settings(NamedTuple):
  """What to measure."""

  # Labels of the domains to carve for.
  domains: Sequence[int]
  # Experts to keep in each layer, rising.
  keep: Sequence[int]
  # One of `selection.SCORES`.
  score: str
  greedy: bool
  # Training tokens of each domain to choose experts on.
  calibration_tokens: int
  # Random choices of experts, as a control.
  draws: int
  # Further numbers of calibration tokens; may be empty.
  calibration_sizes: Sequence[int] = ()

  @property
  def most_tokens(self) -> int:
    """The calibration tokens to read of each domain."""
    return max(self.calibration_tokens, *self.calibration_sizes, 0)


# Runs of one shape share the compiled program.
@functools.cache
def make_loss_step() -> LossStep:
  """Returns the jitted function (model, batch, kept_LE) -> (nats, tokens)."""

  @jax.jit
  def loss_step(
    model: Model, batch: Batch, kept_LE: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    sums, _ = model.batch_sums(batch, 1, kept_LE=kept_LE)
    return sums.nats, sums.tokens

  return loss_step


class HeldOut:
  """The loss of a masked model on sets of held-out rows."""

  def __init__(
    self,
    loss_step: LossStep,
    model: Model,
    batches: Mapping[Any, Sequence[Batch]],
  ):
    """Takes the model and its text.

    Args:
      loss_step: from `make_loss_step`.
      model: laid out on the mesh in use.
      batches: held-out rows by the name of each set.
    """
    self._loss_step, self._model, self._batches = loss_step, model, batches
    self._known: dict[tuple[Any, bytes], float] = {}

  def loss(self, name: Any, kept_LE: np.ndarray) -> float:
    """Returns the LM loss of a set of rows in nats per token."""
    key = (name, kept_LE.tobytes())
    if key not in self._known:
      sums = [
        self._loss_step(self._model, batch, kept_LE)
        for batch in self._batches[name]
      ]
      # One array of (nats, tokens) by batch, whose sums keep their digits.
      nats, tokens = np.array(jax.device_get(sums), np.float64).sum(0)
      self._known[key] = float(nats / tokens)
    return self._known[key]


def other_rows(rows: Sequence[Sequence[Batch]], domain: int) -> list[Batch]:
  """Returns rows of all domains but one, in turn.

  They are as many as the domain with the most rows has, if there are so many.
  """
  turns = itertools.zip_longest(
    *(own for label, own in enumerate(rows) if label != domain)
  )
  others = [row for turn in turns for row in turn if row is not None]
  return others[: max(map(len, rows))]


def carve_run(
  run: Run,
  rows: Rows,
  settings: Settings,
  mesh: Mesh,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Measures the carve curves of one run.

  Args:
    run: with a checkpoint.
    rows: its text, see `runs.choose_rows`.
    settings: what to measure.
    mesh: where to compute.
    say: is given a line of progress for each domain.

  Returns:
    A JSON object; losses are in nats per token:
      "workdir", "step", "experiment" (flat): the run;
      "score", "greedy", "draws": how experts were chosen;
      "most_used": [{"keep", "experts" of each layer}], over all domains;
      "costs": [{"keep", ...}], see `cost`, the whole model last;
      "whole": by domain, "loss", "others_loss" on other domains' rows (None
        without other domains), "tokens" held out, and "calibration_tokens";
      "points": [{"domain", "keep", "experts" of each layer, "loss",
        "others_loss", "most_used_loss", "random_losses" by draw}];
      "calibration": [{"domain", "keep", "tokens", "loss"}].
  """
  with jax.set_mesh(mesh):
    return _Carver(run, rows, settings, mesh).measure(say)


class _Carver:
  """One run's model and text on the devices."""

  def __init__(self, run: Run, rows: Rows, settings: Settings, mesh: Mesh):
    self._run, self._rows, self._settings = run, rows, settings
    self._mesh = mesh
    self._model = load_model(run, mesh)
    self._fine = run.provenance.taxonomy.fine
    model = run.experiment.model
    self._shape = (
      model.num_layers - model.num_dense_layers,
      model.num_experts,
    )
    self._score_step = selection.make_score_step(settings.score)
    self._selector = self._make_selector(settings.calibration_tokens)
    self._by_size = {
      tokens: self._make_selector(tokens)
      for tokens in settings.calibration_sizes
    }
    self._batches = self._held_out_batches()
    self._held_out = HeldOut(make_loss_step(), self._model, self._batches)

  def _held_out_batches(self) -> dict[Any, list[Batch]]:
    """Returns batches by label; and of other domains, by ("others", label)."""
    rows = self._rows.held_out
    sets: dict[Any, list[Batch]] = {}
    for domain in self._settings.domains:
      sets[domain] = rows[domain]
      if others := other_rows(rows, domain):
        sets["others", domain] = others
    longest = max(map(len, sets.values()))
    return {
      name: to_batches(own, longest, self._run.experiment, self._mesh)
      for name, own in sets.items()
    }

  def _make_selector(self, tokens: int) -> selection.Selector:
    """Returns a selector that reads so many calibration tokens a domain."""
    length = self._run.experiment.train.sequence_length
    rows = [own[: -(-tokens // length)] for own in self._rows.calibration]
    # One size of batch, so that all selectors share a compiled program.
    longest = max(map(len, self._rows.calibration))
    return selection.Selector(
      self._score_step,
      self._model,
      {
        domain: to_batches(own, longest, self._run.experiment, self._mesh)
        for domain, own in enumerate(rows)
        if own
      },
      greedy=self._settings.greedy,
    )

  def _with_text(self) -> list[int]:
    return [d for d, own in enumerate(self._rows.calibration) if own]

  def _others_loss(self, domain: int, kept_LE: np.ndarray) -> float | None:
    name = ("others", domain)
    if name not in self._batches:
      return None
    return self._held_out.loss(name, kept_LE)

  def _losses(self, choices: Sequence[tuple[Any, np.ndarray]]) -> list[float]:
    """Returns the losses of sets of rows, each with its kept experts.

    A CPU computes two at a time, since parts of each use one core alone. Where
    devices exchange data, all of them must run programs in one order.
    """

    def loss(choice: tuple[Any, np.ndarray]) -> float:
      # The mesh in use is one of each thread.
      with jax.set_mesh(self._mesh):
        return self._held_out.loss(*choice)

    with ThreadPoolExecutor(2 if self._mesh.size == 1 else 1) as threads:
      return list(threads.map(loss, choices))

  def measure(self, say: Callable[[str], None]) -> dict[str, Any]:
    settings, model = self._settings, self._run.experiment.model
    most_used = {
      keep: self._selector.select(self._with_text(), keep)
      for keep in settings.keep
    }
    whole, points, calibration = {}, [], []
    for domain in settings.domains:
      name = self._fine[domain]
      whole[name] = self._whole(domain)
      own = [self._point(domain, keep, most_used[keep]) for keep in most_used]
      points += own
      calibration += self._calibrate(domain)
      rises = ", ".join(
        f"{point['keep']}: {point['loss'] - whole[name]['loss']:+.3f}"
        for point in own
      )
      say(f"  {name}: {whole[name]['loss']:.3f} whole; {rises}")
    return {
      "workdir": self._run.workdir,
      "step": self._run.step,
      "experiment": config.flatten(self._run.experiment),
      "score": settings.score,
      "greedy": settings.greedy,
      "draws": settings.draws,
      "most_used": [
        {"keep": keep, "experts": selection.expert_numbers(kept_LE)}
        for keep, kept_LE in most_used.items()
      ],
      "costs": [
        {"keep": keep, **cost(model, keep)}
        for keep in dict.fromkeys([*settings.keep, model.num_experts])
      ],
      "whole": whole,
      "points": points,
      "calibration": calibration,
    }

  def choose_together(
    self, keep: int
  ) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    kept_LE = self._selector.select(self._settings.domains, keep)
    losses = {
      self._fine[domain]: {
        "whole": self._held_out.loss(domain, np.ones(self._shape, bool)),
        "cut": self._held_out.loss(domain, kept_LE),
      }
      for domain in self._settings.domains
    }
    return kept_LE, losses

  def _whole(self, domain: int) -> dict[str, Any]:
    everything_LE = np.ones(self._shape, bool)

    def tokens(rows: Sequence[Batch]) -> int:
      return int(sum(row.weights_BT.sum() for row in rows))

    length = self._run.experiment.train.sequence_length
    used = -(-self._settings.calibration_tokens // length)
    return {
      "loss": self._held_out.loss(domain, everything_LE),
      "others_loss": self._others_loss(domain, everything_LE),
      "tokens": tokens(self._rows.held_out[domain]),
      "calibration_tokens": tokens(self._rows.calibration[domain][:used]),
    }

  def _point(
    self, domain: int, keep: int, most_used_LE: np.ndarray
  ) -> dict[str, Any]:
    kept_LE = self._selector.select([domain], keep)
    others = [("others", domain)] if ("others", domain) in self._batches else []
    own, most_used, *rest = self._losses(
      [
        (domain, kept_LE),
        (domain, most_used_LE),
        *((name, kept_LE) for name in others),
        *(
          (domain, selection.random_experts(self._shape, keep, draw))
          for draw in range(self._settings.draws)
        ),
      ]
    )
    return {
      "domain": self._fine[domain],
      "keep": keep,
      "experts": selection.expert_numbers(kept_LE),
      "loss": own,
      "others_loss": rest.pop(0) if others else None,
      "most_used_loss": most_used,
      "random_losses": rest,
    }

  def _calibrate(self, domain: int) -> list[dict[str, Any]]:
    """Measures the loss by calibration tokens, at a quarter of the experts."""
    keep = min(self._settings.keep, key=lambda k: abs(k - self._shape[1] / 4))
    length = self._run.experiment.train.sequence_length
    available = len(self._rows.calibration[domain]) * length
    return [
      {
        "domain": self._fine[domain],
        "keep": keep,
        "tokens": tokens,
        "loss": self._held_out.loss(domain, selector.select([domain], keep)),
      }
      for tokens, selector in self._by_size.items()
      if tokens <= available
    ]


def choose_together(
  run: Run, rows: Rows, settings: Settings, mesh: Mesh
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
  """Chooses the experts that all of `settings.domains` together need.

  Args:
    run, rows, mesh: as in `carve_run`; the mesh is in use.
    settings: with one number of experts in `keep`.

  Returns:
    kept_LE, and by domain the held-out loss of the "whole" model and of the
    "cut" one, in nats per token.
  """
  (keep,) = settings.keep
  carver = _Carver(run, rows, settings, mesh)
  return carver.choose_together(keep)
