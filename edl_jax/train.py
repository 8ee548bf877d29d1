"""TrainState, train_step, and the loop."""

import contextlib
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from edl_jax import sharding, storage
from edl_jax.checkpoint import (
  Checkpointer,
  Provenance,
  describe_workdir,
  load,
)
from edl_jax.config import Experiment
from edl_jax.evaluate import Evaluation, evaluate, make_eval_step
from edl_jax.losses import routing, routing_metrics
from edl_jax.losses.objective import LOSS_TERMS
from edl_jax.metrics import MetricsWriter, read_metrics
from edl_jax.model.transformer import parameter_counts
from edl_jax.optim import make_optimizer
from edl_jax.progress import Progress
from edl_jax.runtime import compiler_options
from edl_jax.step import abstract_state, init_state, make_train_step
from edl_jax.text.batch import Batch
from edl_jax.text.input_pipeline import eval_batches, train_iterator
from edl_jax.text.mixture import Corpus, EpochCounter
from edl_jax.text.prepared import PreparedCorpus


class NonFiniteError(Exception):
  """A loss term or the gradient became infinite or NaN."""


class Preempted(Exception):
  """The process was asked to end; a checkpoint was written.

  Attributes:
    signal: the number of the signal that asked.
  """

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.signal = number


class _Pending(NamedTuple):
  """Figures of a dispatched step, not read yet."""

  step: int
  scalars: dict[str, jax.Array]
  # Means over layers, of steps that are logged.
  routing: dict[str, jax.Array] | None


@jax.jit
def _mean_routing(stats: routing.RoutingStats) -> dict[str, jax.Array]:
  """Returns the training metrics of routing, means over layers."""
  by_layer = routing_metrics.metrics_by_layer(
    stats, routing_metrics.TRAINING_METRICS
  )
  return {name: values_L.mean() for name, values_L in by_layer.items()}


class _Clock:
  """Throughput and input wait of the training steps alone.

  Compilation, evaluation and checkpoints are `excluded`.
  """

  def __init__(self, tokens_per_step: int):
    self._tokens_per_step = tokens_per_step

  def restart(self, step: int) -> None:
    """Starts measuring, after step number `step`."""
    self._step = step
    self._start = time.monotonic()
    self._waited = 0.0

  def exclude(self, started: float) -> None:
    """Leaves out the time since `started`."""
    self._start += time.monotonic() - started

  def wait(self, seconds: float) -> None:
    self._waited += seconds

  def read(self, step: int) -> dict[str, float]:
    """Returns the figures since the last reading."""
    seconds = max(time.monotonic() - self._start, 1e-9)
    rate = (step - self._step) * self._tokens_per_step / seconds
    figures = {
      "train/tokens_per_second": rate,
      "train/input_wait_fraction": min(self._waited / seconds, 1.0),
    }
    self.restart(step)
    return figures


class _Loop:
  """One run's loop: what happens between two steps."""

  def __init__(
    self,
    corpus: Corpus | PreparedCorpus,
    rows: grain.MapDataset[Batch],
    epochs: EpochCounter,
    provenance: Provenance,
    mesh: Mesh,
    workdir: str,
  ):
    experiment = provenance.experiment
    self._experiment, self._provenance = experiment, provenance
    self._mesh, self._workdir = mesh, workdir
    self._taxonomy = corpus.taxonomy
    self._is_first = jax.process_index() == 0
    process = (jax.process_index(), jax.process_count())
    optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
    num_domains = len(corpus.taxonomy.fine)
    self._train_step = make_train_step(
      experiment, optimizer, corpus.taxonomy, mesh
    )
    self._compiled_step: jax.stages.Compiled | None = None
    self._eval_step = make_eval_step(num_domains, provenance.tokenizer)
    self._eval_batches = eval_batches(
      corpus, provenance.tokenizer, experiment, *process
    )
    self._iterator = train_iterator(
      rows,
      experiment,
      num_domains,
      *process,
      unlabelled=corpus.taxonomy.unlabelled,
    )
    self._epochs = epochs
    self._checkpointer = Checkpointer(
      workdir, experiment.train.keep_checkpoints
    )
    self._clock = _Clock(
      experiment.train.batch_size * experiment.train.sequence_length
    )
    self._pending: _Pending | None = None
    self.evaluation: Evaluation | None = None

    self.first_step = self._checkpointer.latest_step() or 0
    if self.first_step:
      self.state, data_state = self._checkpointer.restore(
        self.first_step, abstract_state(experiment, optimizer, mesh)
      )
      self._iterator.set_state(data_state)
    else:
      self.state = init_state(experiment, optimizer, mesh)
      if initial := experiment.train.initial_checkpoint:
        self.state = self.state._replace(model=load(initial, mesh=mesh).model)
    self._last_good = self._last_shown = self.first_step
    self._clock.restart(self.first_step)
    if self._is_first:
      describe_workdir(workdir, provenance)
    self._writer = (
      MetricsWriter(workdir, first_step=self.first_step)
      if self._is_first
      else None
    )
    self.progress = Progress(
      experiment.train.num_steps,
      self.first_step,
      # Other processes stay silent.
      None if self._is_first else open(os.devnull, "w"),  # noqa: SIM115
    )

  def step(self, step: int) -> None:
    """Dispatches step number `step` (from 1), then reads the one before."""
    started = time.monotonic()
    batch = sharding.put_batch(next(self._iterator), self._mesh)
    self._clock.wait(time.monotonic() - started)
    if self._compiled_step is None:
      # Compiled ahead, so that the first step's time is like the others'.
      self._compiled_step = self._train_step.lower(self.state, batch).compile(
        compiler_options(self._mesh.devices.flat[0])
      )
      self._clock.restart(step - 1)
      self.progress.restart(step - 1)
    self.state, output = self._compiled_step(self.state, batch)
    # Dispatched now: behind the next step, it would be read a step too late.
    logged = _mean_routing(output.routing) if self._is_logged(step) else None
    self.read_pending()
    self._pending = _Pending(step, output.scalars, logged)

  def _is_logged(self, step: int) -> bool:
    settings = self._experiment.train
    return step % settings.log_every == 0 or step == settings.num_steps

  def read_pending(self) -> None:
    """Reads the last dispatched step's figures; stops if one is not finite."""
    if self._pending is None:
      return
    step, scalars, mean_routing = jax.device_get(self._pending)
    self._pending = None
    bad = [
      f"train/{name} is {value}"
      for name, value in scalars.items()
      if not np.isfinite(value)
    ]
    if bad:
      kept = (
        f"the checkpoint of step {self._last_good} is intact"
        if self._last_good
        else "there is no checkpoint yet"
      )
      raise NonFiniteError(
        f"step {step}: {', '.join(bad)}; {kept}; a lower"
        " optimizer.learning_rate or a longer optimizer.warmup_steps may help,"
        " in a new --workdir"
      )
    if mean_routing is None:
      return
    values = {f"train/{name}": float(x) for name, x in scalars.items()}
    values |= self._clock.read(step)
    values |= {f"routing/{name}": float(x) for name, x in mean_routing.items()}
    self.write(step, values)
    shown = (
      "train/lm_loss",
      *(f"train/{term.name}" for term in LOSS_TERMS if term.in_progress_line),
      "routing/diversity",
      "train/tokens_per_second",
    )
    self.progress.update(step, {name: values[name] for name in shown})
    rows = self._experiment.train.batch_size
    for line in self._epochs.repeats(self._last_shown * rows, step * rows):
      self.progress.print(f"step {step}: {line}")
    self._last_shown = step

  def _epochs_at(self, step: int) -> dict[str, float]:
    return self._epochs.at(step * self._experiment.train.batch_size)

  def write(self, step: int, values: dict[str, float]) -> None:
    if self._writer is not None:
      self._writer.write(step, values)

  def _sync(self) -> None:
    if self._writer is not None:
      self._writer.sync()

  def evaluate(self, step: int, *, record: bool = True) -> None:
    """Evaluates the current parameters."""
    self.read_pending()
    started = time.monotonic()
    self.evaluation = evaluate(
      self._eval_step,
      self.state.model,
      self._eval_batches,
      self._mesh,
      self._taxonomy,
      self._experiment,
    )
    if record:
      epochs = self._epochs_at(step).items()
      self.write(
        step,
        self.evaluation.metrics()
        | {f"data/epochs/{name}": value for name, value in epochs},
      )
      self._sync()
    self.progress.print(
      f"step {step}: held-out lm_loss"
      f" {self.evaluation.losses['lm_loss']:.4f} nats/token,"
      f" {self.evaluation.losses['bits_per_byte']:.4f} bits/byte,"
      f" routing diversity {self.evaluation.routing['diversity']:.4f}"
    )
    self._clock.exclude(started)

  def save(self, step: int) -> None:
    """Starts a checkpoint, once this step is known to be finite."""
    self.read_pending()
    started = time.monotonic()
    self._sync()
    self._checkpointer.save(
      step, self.state, self._iterator.get_state(), self._provenance
    )
    self._last_good = step
    self._clock.exclude(started)

  def finish(self) -> None:
    """Completes the last checkpoint, then writes the run's results."""
    self._checkpointer.wait()
    if not self._is_first:
      return
    assert self.evaluation is not None, "the last step is evaluated"
    total, active = parameter_counts(self._experiment.model)
    storage.write_json(
      os.path.join(self._workdir, "routing.json"), self.evaluation.report
    )
    result = {
      "experiment": self._provenance.to_dict()["experiment"],
      "step": self._experiment.train.num_steps,
      "content_hash": self._provenance.content_hash,
      "parameters": {"total": total, "active": active},
      # Over all processes that the run took.
      "tokens_per_second": statistics.median(
        line["train/tokens_per_second"]
        for line in read_metrics(self._workdir)
        if "train/tokens_per_second" in line
      ),
      # How often each source's training text was read.
      "epochs": self._epochs_at(self._experiment.train.num_steps),
      "eval": self.evaluation.losses,
      "routing": self.evaluation.routing,
    }
    self.progress.close()
    # Matplotlib takes half a second to import, for which no start should wait.
    from edl_jax.analysis.report import write_run_report

    write_run_report(self._workdir)
    # Last: its presence says that the run is complete.
    storage.write_json(os.path.join(self._workdir, "result.json"), result)

  def close(self) -> None:
    self.progress.close()
    self._iterator.close()
    self._checkpointer.close()
    if self._writer is not None:
      self._writer.close()


def train(
  corpus: Corpus | PreparedCorpus,
  rows: grain.MapDataset[Batch],
  epochs: EpochCounter,
  provenance: Provenance,
  mesh: Mesh,
  workdir: str,
) -> None:
  """Trains to `train.num_steps`, going on from the newest checkpoint.

  Everything that a step computes depends only on the experiment, the corpus
  and the step, so an interrupted run gives the same figures as one that was
  not.

  Args:
    corpus: with the text that the provenance describes.
    rows, epochs: its training rows, from `input_pipeline.train_dataset`.
    provenance: saved in every checkpoint.
    mesh: over all devices.
    workdir: the run's folder, checked by `checkpoint.check_workdir`.

  Raises:
    NonFiniteError: a loss term or the gradient is not finite.
    Preempted: SIGTERM or SIGINT arrived; the state was saved first.
  """
  settings = provenance.experiment.train
  with _noted_signals() as asked_to_end, jax.set_mesh(mesh):
    loop = _Loop(corpus, rows, epochs, provenance, mesh, workdir)
    try:
      if loop.first_step:
        loop.progress.print(
          f"going on from the checkpoint of step {loop.first_step}"
        )
      for step in range(loop.first_step + 1, settings.num_steps + 1):
        # A value that went to or came from a device unnoticed would stall the
        # step before or the next one.
        with jax.transfer_guard("disallow"):
          loop.step(step)
        last, number = step == settings.num_steps, asked_to_end(step)
        # Evaluated before it is saved: whoever goes on from a checkpoint finds
        # all figures up to its step.
        if last or step % settings.eval_every == 0:
          loop.evaluate(step)
        if last or number or step % settings.checkpoint_every == 0:
          loop.save(step)
        if number and not last:
          name = signal.Signals(number).name
          raise Preempted(
            f"ended by {name}; the checkpoint of step {step} is written and"
            " the same command goes on from it",
            number,
          )
      if loop.evaluation is None:
        # Killed between the last checkpoint and the report.
        loop.evaluate(settings.num_steps, record=False)
      loop.finish()
    finally:
      loop.close()


@contextlib.contextmanager
def _noted_signals() -> Iterator[Callable[[int], int | None]]:
  """Notes requests to end, to be asked for by each step in turn.

  Yields:
    A function of the step just taken, which returns the signal's number if it
    is the last one. SIGTERM and SIGINT count, and a second one of a kind ends
    the process at once. Of several processes SIGTERM to any one ends all: JAX
    notes it, and agrees on a step that none has passed.
  """
  if jax.process_count() > 1:

    def agreed(step: int) -> int | None:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else None

    yield agreed
    return
  noted: list[int] = []
  previous = {}

  def note(number: int, frame: FrameType | None) -> None:
    del frame
    noted.append(number)
    signal.signal(number, previous[number])

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.getsignal(number)
    signal.signal(number, note)
  try:
    yield lambda step: noted[0] if noted else None
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def state_bytes(experiment: Experiment) -> int:
  """Returns the bytes of one checkpoint: parameters and two moments."""
  total, _ = parameter_counts(experiment.model)
  return 3 * 4 * total


def describe(
  experiment: Experiment, corpus: Corpus | PreparedCorpus, mesh: Mesh
) -> list[str]:
  """Returns the lines that a run prints at its start."""
  total, active = parameter_counts(experiment.model)
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  train = experiment.train
  domains = []
  # What was prepared was cut, if at all, when it was prepared.
  cap = experiment.data.max_characters_per_domain
  cap = math.inf if experiment.data.prepared else cap
  for name, (documents, characters) in zip(
    corpus.taxonomy.sources, corpus.sizes()
  ):
    domains.append(
      f"  {name}: {documents:,} documents, {characters:,} characters"
      + (" (cut at data.max_characters_per_domain)" * (characters >= cap))
    )
  return [
    f"{experiment.name}: {total:,} parameters, {active:,} active per token",
    f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s): {axes}",
    f"{len(corpus.taxonomy.sources)} domains:",
    *domains,
    f"{train.num_steps:,} steps of {train.batch_size} rows of"
    f" {train.sequence_length} tokens:"
    f" {train.num_steps * train.batch_size * train.sequence_length:,} tokens",
  ]
