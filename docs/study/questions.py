"""The questions of the study: which runs each compares, and with what.

A run belongs to a condition if its settings in docs/study/results agree with
the condition's; "file" is the name of the file that it is in.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Condition(NamedTuple):
  """Runs that differ in the seed alone."""

  label: str
  # Settings that its runs have, as text by key of `collect.SETTINGS`; "file".
  where: Mapping[str, str]
  # The label of the condition that it is compared with; "" for none.
  base: str = ""


class Question(NamedTuple):
  """A table and a figure."""

  name: str
  # Files in results, without their ending.
  files: Sequence[str]
  conditions: Sequence[Condition]
  # Columns: heading, figure, format. The figure and the paired differences are
  # of the first.
  columns: Sequence[tuple[str, str, str]]
  # Whether a second figure has the first column by tokens trained on.
  by_tokens: bool = False


_WEIGHT = "losses.divergence_weight"
_ROUTING = (
  ("diversity", "diversity", ".3f"),
  ("D_inter / D_total", "inter_fraction", ".3f"),
  ("MaxVio", "max_violation", ".2f"),
)
_CARVED = (
  ("rise with 4 experts", "carved/4", "+.3f"),
  ("with 8", "carved/8", "+.3f"),
)
_SCOPES = {
  "the global batch": {
    "losses.balance_scope": "global",
    "train.accumulation": "exact",
  },
  "the global batch's micro-batches": {
    "losses.balance_scope": "global",
    "train.accumulation": "per_micro_batch",
  },
  "the global batch, by a bias": {
    "losses.balance_scope": "global",
    "train.accumulation": "exact",
    "model.balancing": "bias",
  },
  "each sequence": {
    "losses.balance_scope": "sequence",
    "train.accumulation": "exact",
  },
  "each sequence, losses by micro-batch": {
    "losses.balance_scope": "sequence",
    "train.accumulation": "per_micro_batch",
  },
}
_WEIGHTS = ("0.0", "0.001", "0.003", "0.01")
_LEARNED = {
  "losses.balance_scope": "global",
  "train.accumulation": "exact",
  "data.granularity": "fine",
  "model.router": "learned",
  "model.balancing": "loss",
  "model.pool_min": "0",
}
_NO_LOSS = _LEARNED | {_WEIGHT: "0.0"}
_DIVERGENCE = _LEARNED | {_WEIGHT: "0.01"}
_SHARES = ("0.0", "0.25", "0.5", "0.75", "1.0")


def _truth(share: str) -> list[Condition]:
  files = {"data.files": f"markov/{share}/text/*.jsonl.gz"}
  base = f"{share} shared: no divergence"
  return [
    Condition(base, _NO_LOSS | files),
    Condition(f"{share} shared: divergence", _DIVERGENCE | files, base),
    Condition(
      f"{share} shared: pools", _NO_LOSS | files | {"model.pool_min": "2"}, base
    ),
    Condition(
      f"{share} shared: fixed experts",
      _NO_LOSS | files | {"model.router": "domain"},
      base,
    ),
  ]


_BALANCE = [
  Condition(
    f"{scope}, beta {float(weight):g}",
    _LEARNED | where | {_WEIGHT: weight},
    f"{scope}, beta 0" if weight != "0.0" else "",
  )
  for scope, where in _SCOPES.items()
  for weight in _WEIGHTS
]
# Runs with every kind of label, and without, of one text.
_LABEL_FILES = (
  "labels_none",
  "labels_fine",
  "labels_coarse",
  "labels_hierarchical",
  "labels_shuffled",
  "labels_shuffled_coarse",
  "labels_pools",
  "labels_router",
)
_LABELS = [
  Condition("none", _NO_LOSS),
  Condition("39 sources", _DIVERGENCE, "none"),
  *(
    Condition(label, _DIVERGENCE | {"data.granularity": value}, "none")
    for label, value in (
      ("4 coarse domains", "coarse"),
      ("both levels", "hierarchical"),
      ("39 random ones", "shuffled"),
      ("4 random ones", "shuffled_coarse"),
    )
  ),
  Condition(
    "none, pools of 2 to 16", _NO_LOSS | {"model.pool_min": "2"}, "none"
  ),
]
_TEXTS = [
  Condition("first text: none", _NO_LOSS | {"file": "balance"}),
  Condition(
    "first text: 39 sources",
    _DIVERGENCE | {"file": "balance"},
    "first text: none",
  ),
  Condition("third text: none", _NO_LOSS | {"file": "labels_none"}),
  Condition(
    "third text: 39 sources",
    _DIVERGENCE | {"file": "labels_fine"},
    "third text: none",
  ),
]
_SCHEDULE = [
  Condition("no divergence", _NO_LOSS),
  *(
    Condition(label, _DIVERGENCE | {"file": name}, "no divergence")
    for label, name in (
      ("0.01 at every step", "labels_fine"),
      ("rising over the first fifth", "schedule_warmup"),
      ("falling to 0 over the last fifth", "schedule_decay"),
    )
  ),
]
_SCHEDULE_FILES = (
  *("labels_none", "labels_fine", "schedule_warmup", "schedule_decay"),
)
_SHUFFLED = _DIVERGENCE | {"data.granularity": "shuffled"}
_RANDOM = [
  Condition("second text: 39 sources", _DIVERGENCE | {"file": "other_text"}),
  Condition(
    "second text: 39 random ones",
    _SHUFFLED | {"file": "other_text_random"},
    "second text: 39 sources",
  ),
  Condition("third text: 39 sources", _DIVERGENCE | {"file": "labels_fine"}),
  Condition(
    "third text: 39 random ones",
    _SHUFFLED | {"file": "labels_shuffled"},
    "third text: 39 sources",
  ),
]
_AGAIN = [
  Condition("first text, first machine", _DIVERGENCE | {"file": "balance"}),
  Condition(
    "second text, second machine", _DIVERGENCE | {"file": "other_text"}
  ),
  Condition(
    "third text, second machine", _DIVERGENCE | {"file": "labels_fine"}
  ),
]
_POST_TRAINING = [
  Condition("neither", {"name": "post_training_none"}),
  *(
    Condition(label, {"name": f"post_training_{name}"}, "neither")
    for label, name in (
      ("L_o", "orthogonality"),
      ("L_v", "variance"),
      ("L_o and L_v", "both"),
      ("L_o and L_v, times 100", "both_100"),
      ("divergence, 0.01", "edl"),
    )
  ),
]

QUESTIONS = (
  Question(
    "balance",
    ("balance", "balance_bias", "micro_batches"),
    _BALANCE,
    (("LM loss", "lm_loss", ".4f"), *_ROUTING),
  ),
  Question(
    "labels",
    _LABEL_FILES,
    [
      *_LABELS,
      Condition(
        "none, fixed experts", _NO_LOSS | {"model.router": "domain"}, "none"
      ),
    ],
    (("LM loss", "lm_loss", ".4f"), *_ROUTING),
  ),
  Question(
    "schedule",
    _SCHEDULE_FILES,
    _SCHEDULE,
    (("LM loss", "lm_loss", ".4f"), *_ROUTING, *_CARVED),
  ),
  Question(
    "texts",
    ("balance", "labels_none", "labels_fine"),
    _TEXTS,
    (("LM loss", "lm_loss", ".4f"), *_ROUTING),
  ),
  Question(
    "random",
    ("other_text", "other_text_random", "labels_fine", "labels_shuffled"),
    _RANDOM,
    (("LM loss", "lm_loss", ".4f"), *_ROUTING),
  ),
  Question(
    "again",
    ("balance", "other_text", "labels_fine"),
    _AGAIN,
    (("LM loss", "lm_loss", ".4f"), *_ROUTING),
  ),
  Question(
    "carve",
    ("balance", "balance_bias", "micro_batches"),
    _BALANCE,
    (*_CARVED, ("LM loss", "lm_loss", ".4f")),
  ),
  Question(
    "carve_labels",
    _LABEL_FILES,
    _LABELS,
    (*_CARVED, ("LM loss", "lm_loss", ".4f")),
  ),
  Question(
    "truth",
    ("truth", "truth_pools", "truth_router"),
    [condition for share in _SHARES for condition in _truth(share)],
    (
      ("nats above the best", "distance", ".4f"),
      *_ROUTING,
    ),
    by_tokens=True,
  ),
  Question(
    "truth_carve",
    ("truth", "truth_pools"),
    [
      condition
      for share in _SHARES
      for condition in _truth(share)
      if condition.where["model.router"] == "learned"
    ],
    (*_CARVED, ("with 2", "carved/2", "+.3f")),
  ),
  Question(
    "post_training",
    [condition.where["name"] for condition in _POST_TRAINING],
    _POST_TRAINING,
    (
      ("LM loss", "lm_loss", ".4f"),
      ("output similarity", "output_similarity", ".4f"),
      ("routing variance", "routing_variance", ".4f"),
      ("expert overlap", "expert_overlap", ".3f"),
      ("silhouette", "silhouette", ".3f"),
      *_ROUTING,
    ),
  ),
)
