"""Every experiment file and variant loads and is what its docstring says."""

import pathlib
import re

import pytest

from edl_jax import config_files
from edl_jax.config import ModelConfig, UserError
from edl_jax.model.transformer import parameter_counts

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
EDL = FOLDER / "edl.py"

VARIANTS = {
  "aes_post_training": [
    *("", ":both", ":orthogonality", ":variance", ":none", ":edl"),
  ],
  "bench": [""],
  "demo": [
    *("", ":fine", ":coarse", ":hierarchical", ":shuffled", ":shuffled_coarse"),
  ],
  "edl": ["", ":15b", *(f":{size},coarse" for size in ("3b", "4b", "8b"))],
  "small": ["", ":tpu"],
  "small_web3": ["", ":fine", ":coarse", ":shuffled", ":baseline"],
  "study": [
    *("", ":fine", ":coarse", ":hierarchical", ":shuffled", ":shuffled_coarse"),
    *(":pools", ":router", ":micro_batches", ":finer", ":large"),
    *(":layers_2", ":layers_3", ":layers_6", ":layers_8"),
    *(":truth", ":truth_pools", ":truth_router"),
    ":post_training_base",
  ],
  "tiny": [""],
}


def test_every_file_is_listed():
  assert {path.stem for path in FOLDER.glob("*.py")} == set(VARIANTS)


@pytest.mark.parametrize(
  "path", [f"{file}.py{v}" for file in VARIANTS for v in VARIANTS[file]]
)
def test_variant_loads(path):
  experiment = config_files.load(str(FOLDER / path))
  assert experiment.name.startswith(path.partition(".")[0])


@pytest.mark.parametrize(
  ("path", "reason"),
  [
    ("tiny.py:fine", "variant 'fine': leave it out"),
    ("bench.py:x", "variant 'x': leave it out"),
    ("small.py:gpu", "variant 'gpu': must be one of cpu, tpu"),
    (
      "demo.py:all",
      "variant 'all': must be one of fine, coarse, hierarchical, shuffled,"
      " shuffled_coarse",
    ),
    ("edl.py:16b", "variant '16b': must be one of 3b, 4b, 8b, 15b"),
    (
      "edl.py:15b,none",
      "variant 'none': must be one of fine, coarse, baseline",
    ),
    ("edl.py:coarse", "variant 'coarse': must be one of 3b, 4b, 8b, 15b"),
  ],
)
def test_unknown_variant_names_those_that_exist(path, reason):
  with pytest.raises(UserError) as caught:
    config_files.load(str(FOLDER / path))
  assert str(caught.value) == f"--experiment={FOLDER / path}: {reason}"


def test_variants_of_aes_differ_in_the_losses_alone():
  def load(variant):
    return config_files.load(f"{FOLDER}/aes_post_training.py:{variant}")

  weights = {
    "both": ("auto:1e-4", "auto:1e-3", 0.0),
    "orthogonality": ("auto:1e-4", 0.0, 0.0),
    "variance": (0.0, "auto:1e-3", 0.0),
    "none": (0.0, 0.0, 0.0),
    "edl": (0.0, 0.0, 0.01),
  }
  for variant, (orthogonality, variance, divergence) in weights.items():
    experiment = load(variant)
    wanted = load("none")
    wanted.name = f"aes_post_training_{variant}"
    wanted.losses.orthogonality_weight = orthogonality
    wanted.losses.variance_weight = variance
    wanted.losses.divergence_weight = divergence
    assert experiment == wanted
    assert experiment.losses.balance_weight == 1e-3
    assert experiment.losses.balance_scope == "sequence"


def test_aes_starts_from_imported_weights(tmp_path):
  (tmp_path / "experiment.py").write_text(
    "from edl_jax.config import Experiment, ModelConfig, TrainConfig\n\n\n"
    "def get_config(variant=''):\n"
    "  return Experiment(\n"
    "    model=ModelConfig(num_experts=24),\n"
    "    train=TrainConfig(initial_checkpoint='here'),\n"
    "  )\n"
  )
  path = f"{FOLDER}/aes_post_training.py"
  experiment = config_files.load(f"{path}:variance,{tmp_path}")
  assert experiment.model == ModelConfig(num_experts=24)
  assert experiment.train.initial_checkpoint == "here"
  assert experiment.losses == config_files.load(f"{path}:variance").losses
  with pytest.raises(
    UserError, match=r"variant ',/none': no /none/exp.*import"
  ):
    config_files.load(f"{path}:both,/none")


@pytest.mark.parametrize(
  ("size", "total", "active"),
  [
    ("3b", 3e9, 0.3e9),
    ("4b", 4e9, 0.4e9),
    ("8b", 8e9, 0.8e9),
    ("15b", 15e9, 1.5e9),
  ],
)
def test_edl_has_the_size_of_its_name(size, total, active):
  experiment = config_files.load(f"{EDL}:{size}")
  counts = parameter_counts(experiment.model)
  assert counts == pytest.approx((total, active), rel=0.03)
  train = experiment.train
  tokens = train.num_steps * train.batch_size * train.sequence_length
  assert tokens == pytest.approx(100e9, rel=1e-3)
  # The table of the docstring, to its last digit.
  rows = re.findall(rf"^  {size} +([\d.]+)B +([\d.]+)B ", EDL.read_text(), re.M)
  assert rows
  for row in rows:
    for stated, count, digit in zip(row, counts, (1e7, 1e6)):
      assert abs(float(stated) * 1e9 - count) <= digit / 2


@pytest.mark.parametrize("size", ["3b", "4b", "8b", "15b"])
def test_variants_of_edl_differ_in_the_loss_alone(size):
  fine, coarse, baseline = (
    config_files.load(f"{EDL}:{size},{labels}")
    for labels in ("fine", "coarse", "baseline")
  )
  assert config_files.load(f"{EDL}:{size}") == fine
  assert (fine.losses.divergence_weight, fine.data.granularity) == (
    0.01,
    "fine",
  )
  assert coarse.data.granularity == "coarse"
  assert baseline.losses.divergence_weight == 0
  for variant in (coarse, baseline):
    variant.name = fine.name
    variant.data.granularity = "fine"
    variant.losses.divergence_weight = 0.01
    assert variant == fine
