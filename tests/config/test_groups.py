"""The groups of fields, and which fields may change on resume."""

from edl_jax import config, fields


def test_groups_hold_every_field_but_name_and_seed():
  outside = [key for key in config.FIELDS if "." not in key]
  assert outside == ["name", "seed"]
  assert {key.partition(".")[0] for key in config.FIELDS} == {
    *config.GROUPS,
    *outside,
  }


def test_only_these_fields_may_change_on_resume():
  resumable = {
    key
    for key, declared in config.FIELDS.items()
    if fields.rule_of(declared).resumable
  }
  assert resumable == {
    *("name", "optimizer.offload"),
    *(f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "tensor")),
    "mesh.sequence",
    *("model.remat", "model.scan_unroll", "model.logits_elements"),
    *("train.log_every", "train.eval_every", "train.eval_rows"),
    *("train.checkpoint_every", "train.keep_checkpoints"),
    *("train.task_every", "train.tasks", "train.task_files"),
    "train.task_documents",
    *("train.profile_steps", "metrics.writers", "metrics.project"),
  }
