"""Loads a model from its checkpoint alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from edl_jax.checkpoint.folders import find_checkpoint, read_provenance
from edl_jax.checkpoint.items import (
  Verify,
  by_name,
  check_items,
  like,
  read_item,
)
from edl_jax.checkpoint.provenance import Provenance
from edl_jax.config import Experiment, UserError
from edl_jax.generation.generator import Generated, generate
from edl_jax.generation.settings import Settings
from edl_jax.model.cached import in_compute_dtype
from edl_jax.model.transformer import Model, abstract_model
from edl_jax.optim import merged, trained
from edl_jax.sharding import parameter_shardings
from edl_jax.text.mixture import Taxonomy
from edl_jax.text.tokenizer import Tokenizer


class _Fields(NamedTuple):
  model: Model
  tokenizer: Tokenizer
  taxonomy: Taxonomy
  experiment: Experiment
  step: int
  content_hash: str
  # As in `Provenance`.
  source: Mapping[str, Any] | None = None


class Loaded(_Fields):
  """What `load` returns: a trained model, and what it was trained on."""

  @functools.cached_property
  def _in_compute_dtype(self) -> Model:
    """The model with parameters as products read them, cast once."""
    return in_compute_dtype(self.model)

  def generate(
    self,
    prompts: Sequence[str],
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
  ) -> list[Generated]:
    """Continues prompts.

    With a `model.dtype` of bfloat16, the first call keeps a copy of the
    parameters in it.

    Args:
      prompts, on_text: see `edl_jax.generation.generator.generate`.
      **settings: fields of `edl_jax.generation.settings.Settings`.

    Raises:
      UserError: see there.
    """
    return generate(
      self._in_compute_dtype,
      self.tokenizer,
      self.taxonomy,
      prompts,
      Settings(**settings),
      self.experiment.train.sequence_length,
      on_text,
    )


def load(
  path: str,
  step: int | None = None,
  mesh: Mesh | None = None,
  verify: Verify = "full",
) -> Loaded:
  """Loads a model; needs nothing but its checkpoint.

  With `train.ema` it is the model of averaged parameters.

  Args:
    path: a run's workdir, its `checkpoints` folder, or the folder of one step,
      on this machine or in a bucket (gs://...).
    step: which checkpoint; by default the newest.
    mesh: where the parameters go; by default one device. It need not be the
      mesh that wrote them.
    verify: "full" compares every array with the digest that was saved with it,
      "sampled" a quarter of them, "off" none. Checkpoints from before there
      were digests load as they are.

  Raises:
    UserError: there is no such checkpoint, its bucket cannot be read, or `mesh`
      does not divide the model.
    DamagedError: a file is missing or damaged, or an array is not what was
      saved. It is a UserError.
  """
  checkpoint, step = find_checkpoint(path, step)
  saved = read_provenance(checkpoint)
  provenance = Provenance.from_dict(saved)
  experiment = provenance.experiment
  abstract = abstract_model(experiment.model)
  if mesh is None:
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one_device, abstract)
  else:
    shardings = parameter_shardings(abstract, mesh)
  abstract = jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=placed
    ),
    abstract,
    shardings,
  )
  if mesh is not None:
    _check_divides(abstract, mesh)
  items = {"parameters": abstract}
  if experiment.train.ema:
    items["ema"] = trained(experiment.optimizer, abstract)
  arrays = {
    item: read_item(checkpoint, item, by_name(target))
    for item, target in items.items()
  }
  check_items(checkpoint, arrays, saved.get("digests", {}), verify)
  models = [like(target, arrays[item]) for item, target in items.items()]
  return Loaded(
    # Averages of the parameters, where the run kept some.
    model=models[0] if len(models) == 1 else merged(models[1], models[0]),
    tokenizer=provenance.tokenizer,
    taxonomy=provenance.taxonomy,
    experiment=experiment,
    step=step,
    content_hash=provenance.content_hash,
    source=provenance.source,
  )


def _check_divides(abstract: Model, mesh: Mesh) -> None:
  """Raises UserError if a parameter cannot be spread over the mesh."""
  for leaf in jax.tree.leaves(abstract):
    try:
      leaf.sharding.shard_shape(leaf.shape)
    except ValueError as error:
      shown = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
      raise UserError(
        f"the mesh {shown} does not divide the model:"
        f" {' '.join(str(error).split())}"
      ) from error


def checkpoint_provenance(path: str, step: int | None = None) -> Provenance:
  """Returns what a checkpoint was made from, without its parameters.

  Args, errors: as `load`.
  """
  checkpoint, _ = find_checkpoint(path, step)
  return Provenance.from_dict(read_provenance(checkpoint))
