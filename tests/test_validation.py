"""Checks of single fields and between fields, as users meet them."""

import pathlib

import pytest

from edl_jax import config_files, validation
from edl_jax.config import Experiment, ModelConfig, UserError

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


def error(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  message = str(caught.value)
  assert "\n" not in message
  return message


INVALID = [
  # Overrides, and what the message must name.
  ({"model.num_heads": 3, "model.num_kv_heads": 2}, ("3", "2")),
  ({"model.balancing": "biases"}, ("biases", "loss, bias, both")),
  ({"model.router_scores": "tanh"}, ("tanh", "softmax, sigmoid")),
  ({"model.gates": "scaled"}, ("scaled", "renormalized, raw")),
  ({"model.gate_scale": 0.0}, ("0.0", "above 0")),
  ({"model.router_softcap": -1.0}, ("-1.0", "at least 0")),
  ({"optimizer.bias_rate": 0.0}, ("0.0", "above 0")),
  ({"optimizer.bias_schedule": "wsd"}, ("wsd", "constant, learning_rate")),
  ({"losses.output_z_weight": -1.0}, ("-1.0", "at least 0")),
  ({"optimizer.algorithm": "lion"}, ("lion", "adamw, muon")),
  ({"optimizer.muon_momentum": 1.0}, ("1.0", "below 1")),
  ({"train.skip_spikes": 0.5}, ("0.5", "at least 1, or 0")),
  ({"train.skip_at_most": 0}, ("0", "at least 1")),
  ({"train.ema": 1.0}, ("1.0", "below 1")),
  ({"train.profile_steps": "5"}, ("'5'", "FIRST:LAST")),
  ({"train.profile_steps": "0:5"}, ("'0:5'", "from 1")),
  ({"train.profile_steps": "7:5"}, ("'7:5'", "rise")),
  ({"train.profile_steps": "5:21"}, ("5:21", "train.num_steps=20")),
  ({"metrics.writers": "wandb,wandb"}, ("twice",)),
  ({"metrics.writers": "tensorbord"}, ("did you mean tensorboard?",)),
  ({"model.head_width": 15}, ("15",)),
  ({"model.num_active_experts": 5}, ("5", "model.num_experts=4")),
  ({"model.num_dense_layers": 2}, ("2", "model.num_layers=2")),
  (
    {"model.shared_expert_gate": True},
    ("model.shared_expert_gate=True", "model.num_shared_experts"),
  ),
  ({"model.rope_factor": 4.0}, ("4.0", "model.rope_scaling=linear")),
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
  ({"data.domains": "('a/x', 'x')"}, ("'x'",)),
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
  ({"data.chat_template": "x.jinja"}, ("x.jinja", "data.files")),
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
  ({"optimizer.schedule": "step"}, ("step", "cosine, wsd, linear")),
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
  ({"model.router": "hash"}, ("hash", "learned", "domain")),
  ({"model.pool_min": 2}, ("model.pool_max=0", "both")),
  ({"model.pool_max": 2}, ("model.pool_min=0", "both")),
  *(
    ({"model.pool_min": least, "model.pool_max": most}, named)
    for least, most, named in (
      (1, 3, ("model.pool_max=3", "model.num_active_experts=2")),
      (2, 5, ("model.pool_max=5", "model.num_experts=4")),
      (4, 3, ("model.pool_max=3", "rise")),
    )
  ),
  *(
    ({"model.router": "domain"} | others, named)
    for others, named in (
      ({"model.pool_min": 2, "model.pool_max": 3}, ("pool_min=2", "learned")),
      ({"losses.divergence_weight": 0.1}, ("divergence_weight=0.1",)),
      ({"train.task_every": 5}, ("train.task_every=5", "no domain")),
      *(
        (
          {"losses.divergence_weight": 0, "data.granularity": labels},
          (f"than {labels}", "random labels"),
        )
        for labels in ("shuffled", "shuffled_coarse")
      ),
    )
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


def test_defaults_and_tiny_are_valid():
  assert validation.validate(Experiment()) == Experiment()
  assert config_files.load(TINY).name == "tiny"


def test_imported_weights_bring_a_tokenizer_of_any_size():
  experiment = Experiment()
  experiment.model.vocabulary_size = 257
  experiment.train.initial_checkpoint = "runs/imported"
  validation.validate(experiment)


def test_token_pairs_are_accepted_where_they_have_a_meaning():
  for others in (
    {"data.granularity": "coarse"},
    {"train.accumulation": "per_micro_batch", "train.accumulation_steps": 2},
  ):
    overrides = {"losses.divergence_pairs": "tokens"} | others
    assert config_files.load(TINY, overrides).losses.num_token_pairs == 4096


def test_pools_and_reference_router_are_accepted_where_they_have_a_meaning():
  for overrides in (
    {
      **{"model.pool_min": 2, "model.pool_max": 4},
      **{"losses.divergence_weight": 0.1, "data.granularity": "shuffled"},
    },
    {"model.pool_min": 3, "model.pool_max": 3},
    {"model.router": "domain", "losses.divergence_weight": 0.0},
  ):
    config_files.load(TINY, overrides)


def test_message_has_path_value_and_what_is_allowed():
  experiment = Experiment(model=ModelConfig(width=0))
  assert error(validation.validate, experiment) == (
    "model.width=0: must be at least 1"
  )


def test_group_must_have_its_type():
  message = error(validation.validate, Experiment(model=5))
  assert message == "model=5: must be of type ModelConfig"
