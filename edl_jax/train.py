"""The training loop: steps, metrics, evaluations and checkpoints of a run."""

import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from edl_jax import peers, rematerialization, sharding, storage
from edl_jax.checkpoint import (
  Checkpointer,
  Provenance,
  Verify,
  describe_workdir,
  load,
  patient_loops,
)
from edl_jax.clock import Clock, goodput, read_records, write_record
from edl_jax.config import TrainConfig
from edl_jax.environment import environment
from edl_jax.evaluate import Evaluation, NonFiniteError, eval_step_for, evaluate
from edl_jax.losses import routing_metrics
from edl_jax.losses.objective import LOSS_TERMS
from edl_jax.metric_writers import RunDescription, writer_names
from edl_jax.metrics import MetricsWriter, read_metrics
from edl_jax.model.transformer import parameter_counts
from edl_jax.optim import make_optimizer
from edl_jax.preemption import Preempted, requests_to_end
from edl_jax.profiling import Profile
from edl_jax.progress import Progress
from edl_jax.runtime import compile_program
from edl_jax.step import (
  abstract_state,
  averaged,
  init_state,
  make_train_step,
  peak_rate,
  starting_from,
)
from edl_jax.tasks.evaluation import EncodedTasks
from edl_jax.tasks.training import TrainingTasks
from edl_jax.text.batch import Batch
from edl_jax.text.input_pipeline import eval_batches, train_iterator
from edl_jax.text.mixture import Corpus, EpochCounter
from edl_jax.text.prepared import PreparedCorpus


class _Pending(NamedTuple):
  """What a dispatched step will report; the loop has not read it yet."""

  step: int
  scalars: dict[str, jax.Array]
  # Training metrics of routing; None for steps that are not logged.
  routing: dict[str, jax.Array] | None
  # Tokens sent to each expert; None too.
  load_LE: jax.Array | None


_training_figures = jax.jit(
  routing_metrics.training_figures, static_argnames="first_layer"
)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  """Returns whether every element of every array is finite, bool ()."""
  parts = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
  return jnp.stack(parts).all()


class _Loop:
  """The state of a run, and what happens to it in and between steps."""

  def __init__(
    self,
    corpus: Corpus | PreparedCorpus,
    rows: grain.MapDataset[Batch],
    epochs: EpochCounter,
    provenance: Provenance,
    mesh: Mesh,
    workdir: str,
    verify: Verify,
    tasks: EncodedTasks | None,
  ):
    taxonomy = corpus.taxonomy
    started = time.monotonic()
    experiment, self._compiled_step = rematerialization.resolve(
      provenance.experiment, taxonomy, mesh, corpus.supervised
    )
    # Without "auto" the first step compiles.
    compiled = time.monotonic() - started if self._compiled_step else 0.0
    self._experiment, self._provenance = experiment, provenance
    self._mesh, self._workdir = mesh, workdir
    self._taxonomy = taxonomy
    self._is_first = jax.process_index() == 0
    process = (jax.process_index(), jax.process_count())
    optimizer = make_optimizer(experiment.optimizer, experiment.train.num_steps)
    num_domains = len(taxonomy.fine)
    self._train_step = make_train_step(experiment, optimizer, taxonomy, mesh)
    self._eval_step = eval_step_for(corpus, provenance)
    self._eval_batches = eval_batches(
      corpus, provenance.tokenizer, experiment, *process
    )
    self._iterator = train_iterator(
      rows,
      experiment,
      num_domains,
      *process,
      unlabelled=taxonomy.unlabelled,
    )
    self._epochs = epochs
    self._checkpointer = Checkpointer(
      workdir, experiment.train.keep_checkpoints
    )
    self._pending: _Pending | None = None
    self.evaluation: Evaluation | None = None
    self._tasks = tasks and TrainingTasks(tasks, experiment.train, mesh)
    restored = self._checkpointer.restore_newest(
      abstract_state(experiment, optimizer, mesh), verify
    )
    self.first_step = restored.step if restored else 0
    if restored:
      self.state = restored.state
      self._iterator.set_state(restored.data_state)
    else:
      self.state = init_state(experiment, optimizer, mesh)
      if initial := experiment.train.initial_checkpoint:
        loaded = load(initial, mesh=mesh, verify=verify)
        self.state = starting_from(self.state, loaded.model, experiment)
    self._last_saved = self._last_shown = self.first_step
    self._clock = Clock(
      experiment.train.batch_size * experiment.train.sequence_length,
      self.first_step,
      peak_rate(experiment, mesh),
      compiled,
    )
    # Names sort by start, and no two processes of a run start at once.
    self._process = f"{time.time_ns()}"
    if self._is_first:
      describe_workdir(workdir, provenance)
    self._environment = environment() | {"remat": experiment.model.remat}
    self._profile = Profile(experiment.train.profile_steps, workdir)
    self._writer = self._metrics_writer() if self._is_first else None
    self.progress = Progress(
      experiment.train.num_steps,
      self.first_step,
      # Other processes stay silent.
      None if self._is_first else open(os.devnull, "w"),  # noqa: SIM115
    )

  def _metrics_writer(self) -> MetricsWriter:
    metrics = self._experiment.metrics
    settings = self._provenance.to_dict()["experiment"]
    return MetricsWriter(
      self._workdir,
      first_step=self.first_step,
      writers=writer_names(metrics.writers),
      run=RunDescription(
        name=self._experiment.name,
        project=metrics.project,
        record=settings | {"environment": self._environment},
      ),
    )

  def step(self, step: int) -> None:
    """Dispatches step number `step` (from 1), then reads the one before."""
    started = time.monotonic()
    batch = sharding.put_batch(next(self._iterator), self._mesh)
    self._clock.add_wait(time.monotonic() - started)
    if self._compiled_step is None:
      started = time.monotonic()
      # Compile ahead of the step, so that the clock can exclude it.
      self._compiled_step = compile_program(
        self._train_step.lower(self.state, batch), self._mesh.local_devices[0]
      )
      self._clock.exclude(started, "compile")
    if step == self.first_step + 1:
      self._clock.restart(step - 1)
      self.progress.restart(step - 1)
    self._profile.before(step)
    self.state, output = self._compiled_step(self.state, batch)
    # Devices run programs in order: dispatched after the next step, the metrics
    # would be ready one step later.
    logged = load_LE = None
    if self._is_logged(step):
      first_layer = self._experiment.model.num_dense_layers
      logged = _training_figures(output.routing, first_layer=first_layer)
      load_LE = output.routing.assignments_LE
    self.read_pending()
    self._pending = _Pending(step, output.scalars, logged, load_LE)
    if told := self._profile.after(step, self.state):
      self.progress.print(told)
    self._clock.end_step()

  def _is_logged(self, step: int) -> bool:
    settings = self._experiment.train
    return step % settings.log_every == 0 or step == settings.num_steps

  def read_pending(self) -> None:
    """Reads and logs what the last dispatched step reports.

    Raises:
      NonFiniteError: a scalar is infinite or NaN.
    """
    if self._pending is None:
      return
    step, scalars, figures, load_LE = jax.device_get(self._pending)
    self._pending = None
    if scalars.get("skipped"):
      self.progress.print(
        f"step {step}: skipped, with a gradient norm of"
        f" {scalars['grad_norm']:.4g} where the median is"
        f" {scalars['grad_norm_median']:.4g}"
      )
    else:
      self._check_finite(step, scalars)
    if figures is not None:
      self._log(step, scalars, figures)
      self._log_load(step, load_LE)

  def _check_finite(self, step: int, scalars: Mapping[str, np.ndarray]) -> None:
    bad = [
      f"train/{name} is {value}"
      for name, value in scalars.items()
      if not np.isfinite(value)
    ]
    if bad:
      raise self._not_finite(step, ", ".join(bad))

  def _not_finite(self, step: int, what: str) -> NonFiniteError:
    kept = (
      f"the checkpoint of step {self._last_saved} is intact"
      if self._last_saved
      else "there is no checkpoint yet"
    )
    return NonFiniteError(
      f"step {step}: {what}; {kept}; a lower optimizer.learning_rate or a"
      " longer optimizer.warmup_steps may help, in a new --workdir"
    )

  def _log(
    self,
    step: int,
    scalars: Mapping[str, np.ndarray],
    figures: Mapping[str, np.ndarray],
  ) -> None:
    """Writes the metrics of a step and shows some in the progress line."""
    values = {f"train/{name}": float(x) for name, x in scalars.items()}
    values |= self._clock.read(step)
    values |= {f"routing/{name}": float(x) for name, x in figures.items()}
    self.write(step, values)
    self._record(step)
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

  def _log_load(self, step: int, load_LE: np.ndarray) -> None:
    """Adds a histogram of the experts' loads of each layer.

    A load is a multiple of the layer's mean.
    """
    if self._writer is None:
      return
    first = self._experiment.model.num_dense_layers
    histograms = {
      f"routing/load/layer_{layer}": load_E / max(load_E.mean(), 1)
      for layer, load_E in enumerate(load_LE, start=first)
    }
    self._writer.write_histograms(step, histograms)

  def _record(self, step: int) -> None:
    """Writes where this process's time went, on the first process."""
    if self._is_first:
      record = self._clock.record(step) | {"environment": self._environment}
      write_record(self._workdir, self._process, record)

  def _epochs_at(self, step: int) -> dict[str, float]:
    return self._epochs.at(step * self._experiment.train.batch_size)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes metrics, on the first process."""
    if self._writer is not None:
      self._writer.write(step, values)

  def _sync(self) -> None:
    if self._writer is not None:
      self._writer.sync()

  def evaluate(self, step: int, *, record: bool = True) -> None:
    """Evaluates the current parameters; `record` adds it to the metrics."""
    self.read_pending()
    started = time.monotonic()
    try:
      self.evaluation = evaluate(
        self._eval_step,
        averaged(self.state),
        self._eval_batches,
        self._mesh,
        self._taxonomy,
        self._experiment,
      )
    except NonFiniteError as error:
      raise self._not_finite(step, str(error)) from error
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
    self._clock.exclude(started, "evaluation")

  def evaluate_tasks(self, step: int, *, record: bool = True) -> None:
    """Evaluates the tasks, if it is time; `record` adds it to the metrics."""
    if self._tasks is None or not self._tasks.is_due(step):
      return
    self.read_pending()
    started = time.monotonic()
    figures = self._tasks.evaluate(
      averaged(self.state),
      # The last step has just been evaluated on held-out text.
      self.evaluation.report
      if self.evaluation and step == self._experiment.train.num_steps
      else None,
      lambda text: self.progress.print(f"step {step}: {text}"),
    )
    if record:
      self.write(step, figures)
      self._sync()
    self._clock.exclude(started, "evaluation")

  def save(self, step: int) -> None:
    """Starts to write a checkpoint, after a check that the step is finite."""
    self.read_pending()
    started = time.monotonic()
    if not _all_finite(self.state.model):
      raise self._not_finite(step, "a parameter is infinite or NaN")
    self._sync()
    self._checkpointer.save(
      step, self.state, self._iterator.get_state(), self._provenance
    )
    self._last_saved = step
    self._clock.exclude(started, "checkpoint")

  def finish(self) -> None:
    """Waits for the last checkpoint, then writes the run's results."""
    self._checkpointer.wait()
    if not self._is_first:
      return
    assert self.evaluation is not None, "the last step is evaluated"
    self._record(self._experiment.train.num_steps)
    total, active = parameter_counts(self._experiment.model)
    storage.write_json(
      os.path.join(self._workdir, "routing.json"), self.evaluation.report
    )
    if self._tasks:
      self._tasks.write(self._workdir, self._experiment.train.num_steps)
    result = {
      "experiment": self._provenance.to_dict()["experiment"],
      "step": self._experiment.train.num_steps,
      "content_hash": self._provenance.content_hash,
      "parameters": {"total": total, "active": active},
      # The metrics hold the steps of every process that took part in the run.
      "tokens_per_second": statistics.median(
        line["train/tokens_per_second"]
        for line in read_metrics(self._workdir)
        if "train/tokens_per_second" in line
      ),
      # Where the time of all processes of the run went.
      "time": goodput(list(read_records(self._workdir))),
      # How often the run read each source's training text.
      "epochs": self._epochs_at(self._experiment.train.num_steps),
      "eval": self.evaluation.losses,
      "routing": self.evaluation.routing,
    }
    self.progress.close()
    # This imports Matplotlib, which would delay the start by half a second.
    from edl_jax.analysis.report import write_run_report

    try:
      write_run_report(self._workdir)
    except Exception as error:  # Whatever Matplotlib may raise.
      reason = " ".join(str(error).split()) or type(error).__name__
      self.progress.print(f"the pictures cannot be drawn: {reason[:200]}")
    # Write this file last: its presence says that the run is complete.
    storage.write_json(os.path.join(self._workdir, "result.json"), result)

  def close(self) -> None:
    self.progress.close()
    self._iterator.close()
    self._checkpointer.close()
    self._profile.close()
    if self._writer is not None:
      self._writer.close()


def train(
  corpus: Corpus | PreparedCorpus,
  rows: grain.MapDataset[Batch],
  epochs: EpochCounter,
  provenance: Provenance,
  mesh: Mesh,
  workdir: str,
  verify: Verify = "full",
  tasks: EncodedTasks | None = None,
) -> None:
  """Trains until `train.num_steps`, from the newest checkpoint if there is one.

  A step depends on the experiment, the corpus and its number alone, so an
  interrupted run gives the same figures as an uninterrupted one.

  Args:
    corpus: the text that the provenance describes.
    rows, epochs: its training rows, from `input_pipeline.train_dataset`.
    provenance: what every checkpoint records of its origin.
    mesh: all devices.
    workdir: the run's folder, which `checkpoint.check_workdir` has checked.
    verify: how much of a checkpoint is compared with its digests.
    tasks: what to evaluate on every `train.task_every` steps, if anything.

  Raises:
    NonFiniteError: a loss term or the gradient is not finite.
    DoesNotFit: the devices' memory does not hold the step.
    DamagedError: no checkpoint of the run is intact.
    Preempted: SIGTERM, SIGINT or SIGHUP arrived, and the state was saved.
  """
  settings = provenance.experiment.train
  with requests_to_end() as asked_to_end, jax.set_mesh(mesh), patient_loops():
    loop = _Loop(corpus, rows, epochs, provenance, mesh, workdir, verify, tasks)
    try:
      # Before the loop is closed, which would wait for a process lost.
      with peers.needed():
        _go_on(loop, settings, asked_to_end)
    finally:
      loop.close()


def _go_on(
  loop: _Loop, settings: TrainConfig, asked_to_end: Callable[[int], int | None]
) -> None:
  """Trains from where the loop is to the end; see `train`."""
  if first := loop.first_step:
    loop.progress.print(f"going on from the checkpoint of step {first}")
  for step in range(loop.first_step + 1, settings.num_steps + 1):
    # An implicit transfer would make the host wait for the devices.
    with jax.transfer_guard("disallow"):
      loop.step(step)
    last, number = step == settings.num_steps, asked_to_end(step)
    # Evaluate before saving: a run that goes on from the checkpoint then
    # has all figures up to its step.
    if last or step % settings.eval_every == 0:
      loop.evaluate(step)
    loop.evaluate_tasks(step)
    if last or number or step % settings.checkpoint_every == 0:
      loop.save(step)
    if number and not last:
      name = signal.Signals(number).name
      raise Preempted(
        f"ended by {name}; the checkpoint of step {step} is written and"
        " the same command resumes from it",
        number,
      )
  if loop.evaluation is None:
    # An earlier process was killed between last checkpoint and report.
    loop.evaluate(settings.num_steps, record=False)
    loop.evaluate_tasks(settings.num_steps, record=False)
  loop.finish()
