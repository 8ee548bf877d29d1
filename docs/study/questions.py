"""The questions of the study: which runs each compares, and with what.

A run belongs to a condition if its settings in docs/study/results, and its
text, agree with the condition's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Condition(NamedTuple):
  """Runs that differ in the seed alone."""

  label: str
  # What its runs have, as text: keys of `collect.SETTINGS`; "text", of which
  # text they are; "sweep", the file that they are in, without its ending.
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
  # Whether a second table has training losses by quarters of the run.
  by_quarter: bool = False
  # Whether docs.study.noise measures its differences, for a table of their own.
  noise: bool = False
  # Whether losses are fitted against compute, by docs/study/scaling.py: in a
  # table and in place of the figure.
  by_compute: bool = False
  # Whether the figure has the paired differences.
  draws_differences: bool = False


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
_LOSS = ("LM loss", "lm_loss", ".4f")
# What `data.corpora` made at three times: the first 12 characters of the text's
# content hash. Rows of the first were made before results had one.
_FIRST = {"text": "first"}
_SECOND = {"text": "d9159acdd440"}
_THIRD = {"text": "04b9ce886bf0"}
_LEARNED = {
  "losses.balance_scope": "global",
  "train.accumulation": "exact",
  "data.granularity": "fine",
  "model.router": "learned",
  "model.balancing": "loss",
  "model.pool_min": "0",
  "losses.divergence_schedule": "constant",
}
_NO_LOSS = _LEARNED | {_WEIGHT: "0.0"}
_DIVERGENCE = _LEARNED | {_WEIGHT: "0.01"}
_SCOPES = {
  "the global batch": {},
  "the global batch, by a bias": {"model.balancing": "bias"},
  "each sequence": {"losses.balance_scope": "sequence"},
}
_WEIGHTS = ("0.0", "0.001", "0.003", "0.01")
_SHARES = ("0.0", "0.25", "0.5", "0.75", "1.0")
# Seeds 3 and 4 are in balance_seeds.
_BALANCE_FILES = ("balance", "balance_seeds", "balance_bias")
# Runs with every kind of label, and without.
_LABEL_FILES = (
  "balance",
  "labels_coarse",
  "labels_hierarchical",
  "labels_shuffled",
  "labels_shuffled_coarse",
  "labels_pools",
  "labels_router",
)


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


def _by_weight(
  label: str,
  where: Mapping[str, str],
  base: str = "",
  weights: Sequence[str] = _WEIGHTS,
) -> list[Condition]:
  """Compares weights of divergence with none, and none with a base."""
  none = f"{label}, beta 0"
  conditions = [Condition(none, _NO_LOSS | where, base)]
  for weight in weights[1:]:
    own = _LEARNED | where | {_WEIGHT: weight}
    conditions.append(Condition(f"{label}, beta {weight}", own, none))
  return conditions


def _balance(text: Mapping[str, str]) -> list[Condition]:
  """Compares weights under each balance, and the balances without a weight."""
  first, *others = _SCOPES
  conditions = _by_weight(first, _SCOPES[first] | text)
  for scope in others:
    conditions += _by_weight(scope, _SCOPES[scope] | text, f"{first}, beta 0")
  return conditions


def _sources(label: str, where: Mapping[str, str]) -> list[Condition]:
  """Compares divergence over the sources with none, on the third text."""
  return [
    Condition(f"{label}: none", _NO_LOSS | where | _THIRD),
    Condition(
      f"{label}: 39 sources", _DIVERGENCE | where | _THIRD, f"{label}: none"
    ),
  ]


_KINDS = {
  "39 sources": {},
  "4 coarse domains": {"data.granularity": "coarse"},
  "both levels": {"data.granularity": "hierarchical"},
  "39 random ones": {"data.granularity": "shuffled"},
  "4 random ones": {"data.granularity": "shuffled_coarse"},
}
_LABELS = [
  Condition("none", _NO_LOSS | _THIRD),
  *(
    Condition(label, _DIVERGENCE | where | _THIRD, "none")
    for label, where in _KINDS.items()
  ),
  Condition(
    "none, pools of 2 to 16",
    _NO_LOSS | {"model.pool_min": "2"} | _THIRD,
    "none",
  ),
]
# Conditions whose cut models are trained on.
_ADAPTED = ("none", "39 sources", "none, pools of 2 to 16")
_SCHEDULE = [
  Condition("no divergence", _NO_LOSS | _THIRD),
  *(
    Condition(
      label,
      _DIVERGENCE | {"losses.divergence_schedule": value} | _THIRD,
      "no divergence",
    )
    for label, value in (
      ("0.01 at every step", "constant"),
      ("rising over the first fifth", "warmup"),
      ("falling to 0 over the last fifth", "decay"),
    )
  ),
]
_RANDOM = [
  condition
  for text, labels, where in (
    ("second text", ("39 sources", "39 random ones"), _SECOND),
    ("third text", ("39 sources", "39 random ones"), _THIRD),
    ("third text", ("4 coarse domains", "4 random ones"), _THIRD),
  )
  for condition in (
    Condition(f"{text}: {labels[0]}", _DIVERGENCE | _KINDS[labels[0]] | where),
    Condition(
      f"{text}: {labels[1]}",
      _DIVERGENCE | _KINDS[labels[1]] | where,
      f"{text}: {labels[0]}",
    ),
  )
]
_AGAIN = [
  Condition("first text, first machine", _DIVERGENCE | _FIRST),
  Condition("second text, second machine", _DIVERGENCE | _SECOND),
  Condition("third text, second machine", _DIVERGENCE | _THIRD),
]
# The same runs on two machines.
_RERUN = [
  condition
  for scope in ("the global batch", "each sequence")
  for machine, sweep, base in (
    ("second machine", "balance", ""),
    ("third machine", "balance_rerun", f"{scope}, second machine, beta 0"),
  )
  for condition in _by_weight(
    f"{scope}, {machine}",
    _THIRD | _SCOPES[scope] | {"sweep": sweep},
    base,
    ("0.0", "0.01"),
  )
]
_MICRO_BATCHES = [
  *_by_weight("the global batch", _THIRD),
  *_by_weight(
    "micro-batches",
    _THIRD | {"train.accumulation": "per_micro_batch"},
    "the global batch, beta 0",
  ),
]
_GRANULARITY = [
  *_by_weight("2 of 16 experts", _THIRD | {"name": "study_fine"}),
  *_by_weight(
    "8 of 64 experts",
    _THIRD | {"name": "study_finer"},
    "2 of 16 experts, beta 0",
  ),
]
_SCALE = [
  condition
  for size, name in (
    ("0.34M", "layers_2"),
    ("0.64M", "layers_3"),
    ("1.12M", "fine"),
    ("2.80M", "layers_6"),
    ("5.80M", "layers_8"),
  )
  for condition in _sources(f"{size} active", {"name": f"study_{name}"})
]
_LENGTH = [
  condition
  for label, name, steps in (
    ("0.34M active, 0.7M tokens", "layers_2", "120"),
    ("0.34M active, 2.5M tokens", "layers_2", "400"),
    ("1.12M active, 0.7M tokens", "fine", "120"),
    ("1.12M active, 2.5M tokens", "fine", "400"),
    ("1.12M active, 7.4M tokens", "fine", "1200"),
  )
  for condition in _sources(
    label, {"name": f"study_{name}", "train.num_steps": steps}
  )
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
    _BALANCE_FILES,
    _balance(_THIRD),
    (_LOSS, *_ROUTING),
    by_quarter=True,
    noise=True,
  ),
  Question(
    "balance_first", _BALANCE_FILES, _balance(_FIRST), (_LOSS, *_ROUTING)
  ),
  Question(
    "labels",
    _LABEL_FILES,
    [
      *_LABELS,
      Condition(
        "none, fixed experts",
        _NO_LOSS | {"model.router": "domain"} | _THIRD,
        "none",
      ),
    ],
    (_LOSS, *_ROUTING),
    noise=True,
  ),
  Question(
    "schedule",
    ("balance", "schedule_warmup", "schedule_decay"),
    _SCHEDULE,
    (_LOSS, *_ROUTING, *_CARVED),
  ),
  Question("random", _LABEL_FILES, _RANDOM, (_LOSS, *_ROUTING)),
  Question("again", ("balance",), _AGAIN, (_LOSS, *_ROUTING)),
  Question("rerun", ("balance", "balance_rerun"), _RERUN, (_LOSS, *_ROUTING)),
  Question(
    "micro_batches",
    ("balance_rerun", "micro_batches"),
    _MICRO_BATCHES,
    (_LOSS, *_ROUTING, *_CARVED),
    by_quarter=True,
  ),
  Question("carve", _BALANCE_FILES, _balance(_THIRD), (*_CARVED, _LOSS)),
  Question("carve_first", _BALANCE_FILES, _balance(_FIRST), (*_CARVED, _LOSS)),
  Question("carve_labels", _LABEL_FILES, _LABELS, (*_CARVED, _LOSS)),
  Question(
    "adapt",
    ("balance", "labels_pools_rerun"),
    [each for each in _LABELS if each.label in _ADAPTED],
    (
      ("rise after 20 steps", "adapted/after", "+.3f"),
      ("before", "adapted/before", "+.3f"),
      ("whole model, after", "adapted/whole", ".4f"),
    ),
  ),
  Question(
    "granularity",
    ("balance_rerun", "finer"),
    _GRANULARITY,
    (
      _LOSS,
      *_ROUTING,
      ("rise with a quarter of the experts", "carved/quarter", "+.3f"),
      ("with half", "carved/half", "+.3f"),
    ),
  ),
  Question(
    "scale",
    ("balance_rerun", *(f"layers_{number}" for number in (2, 3, 6, 8))),
    _SCALE,
    (_LOSS, *_ROUTING),
    by_compute=True,
  ),
  Question(
    "length",
    (
      "balance_rerun",
      *("layers_2", "layers_2_long", "layers_4_short", "layers_4_long"),
    ),
    _LENGTH,
    (_LOSS, *_ROUTING),
    by_quarter=True,
    draws_differences=True,
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
      _LOSS,
      ("output similarity", "output_similarity", ".4f"),
      ("routing variance", "routing_variance", ".4f"),
      ("expert overlap", "expert_overlap", ".3f"),
      ("silhouette", "silhouette", ".3f"),
      *_ROUTING,
    ),
  ),
)
