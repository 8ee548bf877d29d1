"""Loading, validating and comparing experiments; touches no device."""

import json
import pathlib

import pytest

from edl_jax import config, config_files, validation
from edl_jax.config import Experiment, UserError

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


def error(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_flatten_and_unflatten_are_inverse():
  experiment = config_files.load(
    TINY, {"data.domains": "('a/b', 'c')", "seed": 3}
  )
  flat = config.flatten(experiment)
  assert flat["model.num_experts"] == 4
  assert flat["data.domains"] == ("a/b", "c")
  assert flat["seed"] == 3
  assert config.unflatten(flat) == experiment
  assert hash(config.unflatten(flat)) == hash(experiment)
  # As JSON gives it, and as an older version wrote it.
  assert config.unflatten(flat | {"data.domains": ["a/b", "c"]}) == experiment
  assert config.unflatten({"train.num_steps": 7}) == config.unflatten(
    config.flatten(Experiment()) | {"train.num_steps": 7}
  )
  assert "experiment.model.layers" in error(
    config.unflatten, {"model.layers": 1}
  )


def test_defaults_and_tiny_are_valid():
  validation.validate(Experiment())
  assert config_files.load(TINY).name == "tiny"


def test_overrides_take_the_type_of_their_field():
  experiment = config_files.load(
    TINY, {"losses.divergence_weight": "1e-2", "data.weights": "0.5,2"}
  )
  assert experiment.losses.divergence_weight == 0.01
  assert experiment.data.weights == (0.5, 2.0)
  assert config_files.load(TINY).losses.divergence_weight == 0.01
  assert config_files.load(TINY).data.weights == ()


def test_nested_values_survive_flags_and_json():
  text = "((0.5, 1.0, 2.0), (0.75, 0.0, 1.0))"
  experiment = config_files.load(TINY, {"data.weight_phases": text})
  assert experiment.data.weight_phases == ((0.5, 1.0, 2.0), (0.75, 0.0, 1.0))
  flat = config.flatten(experiment)
  saved = json.loads(json.dumps(flat))
  assert config.unflatten(saved) == experiment
  assert config.differing_keys(saved, flat) == []


@pytest.mark.parametrize(
  ("wrong", "nearest"),
  [
    ("model.num_expert", "model.num_experts"),
    ("modle.num_experts", "model.num_experts"),
    ("losses.divergence_wieght", "losses.divergence_weight"),
    ("num_experts", "model.num_experts"),
    ("train.learning_rate", "optimizer.learning_rate"),
    ("sed", "seed"),
  ],
)
def test_unknown_key_names_the_nearest(wrong, nearest):
  for message in (
    error(config_files.load, TINY, {wrong: 1}),
    error(config_files.check_override_keys, [f"--experiment.{wrong}=1"]),
    error(config_files.check_override_keys, [f"--experiment.{wrong}", "1"]),
  ):
    assert message == (
      f"unknown key experiment.{wrong}; did you mean {nearest}?"
    )


def test_key_that_resembles_none_lists_all():
  message = error(config_files.load, TINY, {"qqqqqqqq": 1})
  assert "experiment.qqqqqqqq" in message and "mesh.tensor" in message


def test_group_cannot_be_set():
  assert "group" in error(config_files.load, TINY, {"model": 1})


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model.num_layers", "two"),
    ("model.num_layers", "1.5"),
    ("losses.divergence_weight", "much"),
    ("data.weights", "a,b"),
    ("data.domains", "1,2"),
  ],
)
def test_wrong_type_names_key_and_value(key, value):
  message = error(config_files.load, TINY, {key: value})
  assert key in message
  assert value.split(",")[0] in message


INVALID = [
  # Overrides, and what the message must name.
  ({"model.num_heads": 3, "model.num_kv_heads": 2}, ("3", "2")),
  ({"model.head_width": 15}, ("15",)),
  ({"model.num_active_experts": 5}, ("5", "model.num_experts=4")),
  ({"model.num_dense_layers": 2}, ("2", "model.num_layers=2")),
  ({"train.accumulation_steps": 3}, ("3", "train.batch_size=8")),
  ({"train.eval_rows": 0}, ("0",)),
  ({"optimizer.warmup_steps": 21}, ("21", "train.num_steps=20")),
  ({"mesh.fsdp": 0}, ("0",)),
  ({"mesh.fsdp": -2}, ("-2",)),
  ({"mesh.tensor": -1}, ("mesh.data",)),
  ({"data.held_out_fraction": 0.0}, ("0.0",)),
  ({"data.held_out_fraction": 1.0}, ("1.0",)),
  ({"data.domains": "('a/b/c',)"}, ("a/b/c",)),
  ({"data.domains": "('/a',)"}, ("/a",)),
  ({"data.domains": "('a/',)"}, ("a/",)),
  ({"data.domains": "('a/x', 'b/x')"}, ("'x'",)),
  ({"data.weights": "(1.0, -1.0)"}, ("-1.0",)),
  ({"data.weights": "(0.0, 0.0)"}, ("0.0, 0.0",)),
  ({"data.weights": "(1.0,)", "data.domains": "('a', 'b')"}, ("1", "2")),
  (
    {"data.taxonomy": "t.yaml", "data.domains": "('a', 'b')"},
    ("t.yaml", "data.domains"),
  ),
  ({"data.mixing": "rows"}, ("rows", "tokens")),
  ({"data.temperature": 0.0}, ("0.0", "above 0")),
  ({"data.temperature": 2.0}, ("2.0", "data.mixing")),
  ({"data.weight_phases": "((0.5, 1.0), 3.0)"}, ("tuples of float",)),
  ({"data.weight_phases": "((0.5, 1e999),)"}, ("weight_phases", "finite")),
  ({"data.weight_phases": "((0.0, 1.0),)"}, ("phase 1", "begins at 0.0")),
  (
    {"data.weight_phases": "((0.5, 1.0), (0.5, 2.0))"},
    ("phase 2", "0.5 and 1"),
  ),
  ({"data.weight_phases": "((0.5, 1.0, -2.0),)"}, ("-2.0", "at least 0")),
  ({"data.weight_phases": "((0.5,),)"}, ("phase 1", "zero")),
  (
    {"data.weight_phases": "((0.5, 1.0),)", "data.domains": "('a', 'b')"},
    ("phase 1", "1 entries for 2"),
  ),
  ({"model.vocabulary_size": 256}, ("256", "byte")),
  ({"data.tokenizer": "bpe", "model.vocabulary_size": 299}, ("299", "bpe")),
  ({"model.dtype": "float16"}, ("float16", "bfloat16")),
  ({"model.remat": "some"}, ("some", "full")),
  ({"moe.dispatch": "drop"}, ("drop", "gather")),
  ({"optimizer.schedule": "linear"}, ("linear", "wsd")),
  ({"data.granularity": "all"}, ("all", "coarse")),
  ({"data.tokenizer": "word"}, ("word", "byte")),
  ({"model.num_layers": 0}, ("0",)),
  ({"model.width": -8}, ("-8",)),
  ({"train.num_steps": 0}, ("0",)),
  ({"train.sequence_length": 0}, ("0",)),
  ({"train.keep_checkpoints": 0}, ("0",)),
  ({"optimizer.learning_rate": 0.0}, ("0.0",)),
  ({"losses.divergence_weight": -0.1}, ("-0.1",)),
  ({"losses.z_weight": "nan"}, ("nan",)),
  ({"losses.divergence": "kl"}, ("kl", "jensen_shannon", "wasserstein")),
  ({"losses.balance_scope": "layer"}, ("layer", "sequence")),
  ({"losses.specialization_form": "draft"}, ("draft", "released")),
  ({"losses.coarse_weight": 1.5}, ("1.5",)),
  ({"train.accumulation": "sum"}, ("sum", "per_micro_batch")),
  *(
    ({"losses.orthogonality_weight": wrong}, (wrong, "auto:1e-4"))
    for wrong in ("-1", "nan", "inf", "much", "auto", "auto:", "auto:0")
  ),
  (
    {
      "losses.variance_weight": "auto:1e-3",
      "train.accumulation": "per_micro_batch",
    },
    ("auto:1e-3", "train.accumulation=exact"),
  ),
  (
    {"losses.orthogonality_weight": 0.1, "model.num_active_experts": 1},
    ("0.1", "model.num_active_experts=1"),
  ),
  ({"losses.divergence_pairs": "experts"}, ("experts", "tokens")),
  ({"losses.num_token_pairs": 0}, ("0",)),
  *(
    ({"losses.divergence_pairs": "tokens"} | others, named)
    for others, named in (
      ({"train.accumulation_steps": 2}, ("steps=2", "per_micro_batch")),
      ({"losses.divergence": "hellinger"}, ("jensen_shannon", "hellinger")),
      ({"data.granularity": "hierarchical"}, ("fine or coarse",)),
    )
  ),
  ({"optimizer.clip_norm": "inf"}, ("inf",)),
  ({"optimizer.beta2": 1.5}, ("1.5",)),
]


@pytest.mark.parametrize(
  ("overrides", "named"), INVALID, ids=[str(case[0]) for case in INVALID]
)
def test_impossible_value_names_path_and_values(overrides, named):
  message = error(config_files.load, TINY, overrides)
  assert next(iter(overrides)) in message
  for text in named:
    assert text in message


def test_weights_are_numbers_or_targets():
  for given, want in (("0.5", 0.5), (2, 2), ("auto:1e-4", "auto:1e-4")):
    experiment = config_files.load(TINY, {"losses.variance_weight": given})
    assert experiment.losses.variance_weight == want
    assert config.unflatten(config.flatten(experiment)) == experiment


def test_token_pairs_are_accepted_where_they_have_a_meaning():
  for others in (
    {"data.granularity": "coarse"},
    {"train.accumulation": "per_micro_batch", "train.accumulation_steps": 2},
  ):
    overrides = {"losses.divergence_pairs": "tokens"} | others
    assert config_files.load(TINY, overrides).losses.num_token_pairs == 4096


def test_experiment_files(tmp_path):
  missing = str(tmp_path / "none.py")
  (tmp_path / "other.py").write_text(
    "from edl_jax.config import Experiment\n"
    "def get_config(variant=''):\n"
    "  return Experiment(name=f'other {variant}')\n"
  )
  (tmp_path / "dict.py").write_text("def get_config(): return {'seed': 1}\n")
  message = error(config_files.load, missing)
  assert missing in message and "other.py" in message
  assert "--experiment" in error(config_files.load, "")
  assert "dict" in error(config_files.load, str(tmp_path / "dict.py"))
  other = str(tmp_path / "other.py")
  assert config_files.load(other).name == "other "
  assert config_files.load(f"{other}:big").name == "other big"


@pytest.mark.parametrize(
  ("field", "named"),
  [
    ("model=config.ModelConfig(num_layers='2')", "model.num_layers"),
    ("model=config.ModelConfig(num_layers=2.5)", "model.num_layers"),
    ("data=config.DataConfig(weights=0.5)", "data.weights"),
    ("model=config.ModelConfig(num_layer=2)", "num_layer"),
  ],
)
def test_wrong_field_in_a_file_is_named(tmp_path, field, named):
  path = tmp_path / "wrong.py"
  path.write_text(
    "from edl_jax import config\n"
    "def get_config(variant=''):\n"
    f"  return config.Experiment({field})\n"
  )
  message = error(config_files.load, str(path))
  assert named in message
  assert "Traceback" not in message


def test_differing_keys_ignores_what_may_change():
  saved = config.flatten(config_files.load(TINY))
  current = config.flatten(
    config_files.load(
      TINY,
      {
        "seed": 1,
        "losses.divergence_weight": 0.5,
        "train.log_every": 1,
        "mesh.fsdp": 2,
        "name": "new",
      },
    )
  )
  assert config.differing_keys(saved, saved) == []
  # JSON knows no tuples.
  assert config.differing_keys(saved | {"data.weights": []}, saved) == []
  assert config.differing_keys(saved, current) == [
    "seed: 0 -> 1",
    "losses.divergence_weight: 0.01 -> 0.5",
  ]
  assert config.differing_keys(saved | {"model.gone": 2}, saved) == [
    "model.gone: 2 -> None"
  ]
