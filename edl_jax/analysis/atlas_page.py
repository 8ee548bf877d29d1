"""Writes the atlas as one HTML file that needs nothing else.

`atlas.html` is the frame, `atlas.css` its style, and `atlas_tables.js` with
`atlas.js` the program that draws the tables; the page holds them with the
figures as JSON. Names of
domains and text of tokens come from users: they enter the page as JSON alone,
and the program puts them there as text, never as markup. The page's content
security policy allows its own style and program, by their hashes, and nothing
from elsewhere.
"""

import base64
import hashlib
import importlib.resources
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from edl_jax.analysis.atlas_data import (
  Context,
  Example,
  RunRouting,
  domain_maps,
  effective_share,
)

# The frame, the style, and both parts of the program in their order.
FILES = ("atlas.html", "atlas.css", "atlas_tables.js", "atlas.js")


def build_page(runs: Sequence[RunRouting]) -> bytes:
  """Returns the HTML file of one run, or of two side by side, in UTF-8.

  The runs must have the same domains.
  """
  # Texts are listed once, and tokens are places in that list.
  texts = dict.fromkeys(t for run in runs for t in run.token_texts.values())
  place_of = {text: place for place, text in enumerate(texts)}
  target_D2, content = None, []
  for run in runs:
    map_LD2, shares = domain_maps(run.divergence_LDD, target_D2)
    # The maps of the second run are turned to the first run's.
    target_D2 = map_LD2[0] if target_D2 is None else target_D2
    content.append(run_content(run, place_of) | _map_content(map_LD2, shares))
  files = importlib.resources.files("edl_jax.analysis")
  frame, style, tables, figures = (
    files.joinpath(name).read_text(encoding="utf-8") for name in FILES
  )
  program = tables + figures
  parts = {
    "style": style,
    "program": program,
    "policy": f"default-src 'none'; style-src {_source(style)}; "
    f"script-src {_source(program)}; base-uri 'none'; form-action 'none'",
    "data": script_json({"texts": list(texts), "runs": content}),
  }
  # In one pass, so that no text of a part can name another part.
  page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)
  return page.encode()


def script_json(value: Any) -> str:
  """Returns JSON that is safe inside a script element.

  Without "<" no text can close the element, nor open a comment in it.
  """
  text = json.dumps(value, separators=(",", ":"), allow_nan=False)
  return text.replace("<", "\\u003c")


def _source(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


def packed(values: np.ndarray, bits: int = 16) -> dict[str, Any]:
  """Packs figures of at least 0 as integers in base64, little-endian.

  A figure is its integer times `scale`. It is off by half of that at most; a
  figure above 0 stays above 0, and integers that fit stay exact.

  Args:
    values: the figures, of any shape.
    bits: of an integer, 8 or 16.
  """
  largest = float(values.max(initial=0))
  whole = np.issubdtype(values.dtype, np.integer) and largest < 2**bits
  scale = 1.0 if whole or largest == 0 else largest / (2**bits - 1)
  integers = np.rint(values / scale).astype(f"<u{bits // 8}")
  integers[(values > 0) & (integers == 0)] = 1
  return {
    "bits": bits,
    "shape": list(values.shape),
    "scale": scale,
    "data": base64.b64encode(integers.tobytes()).decode(),
  }


def run_content(run: RunRouting, place_of: dict[str, int]) -> dict[str, Any]:
  """Returns what the page's program reads of a run, as a JSON object.

  Args:
    run: the run.
    place_of: each token text's place in the page's list of them.
  """
  experiment, assignments_LDE = run.experiment, run.assignments_LDE
  load_LE = assignments_LDE.sum(1)
  # The domain that sends an expert the most; -1 for an expert without tokens.
  main_LE = np.where(load_LE > 0, assignments_LDE.argmax(1), -1)
  of_domain_LDE = _share(assignments_LDE, assignments_LDE.sum(2)[..., None])
  itself_LE1 = np.diagonal(run.together_LEE, axis1=1, axis2=2)[..., None]
  places = {token: place_of[text] for token, text in run.token_texts.items()}
  return {
    "name": run.name,
    "step": run.step,
    "facts": {
      "experiment": experiment.name,
      "seed": experiment.seed,
      "divergence weight": experiment.losses.divergence_weight,
      "balance weight": experiment.losses.balance_weight,
      "balance scope": experiment.losses.balance_scope,
      "held-out tokens": int(run.tokens_D.sum()),
    },
    "layers": run.layers,
    "domains": list(run.taxonomy.names),
    "active": experiment.model.num_active_experts,
    "tokens": run.tokens_D.tolist(),
    "load": load_LE.tolist(),
    "main": main_LE.tolist(),
    "share": packed(of_domain_LDE),
    "metrics": {
      name: [round(float(x), 4) for x in x_L]
      for name, x_L in run.metrics.items()
    },
    "effective": [round(effective_share(load_E), 4) for load_E in load_LE],
    "together": packed(_share(run.together_LEE, itself_LE1)),
    "next": packed(_share(run.next_LEE, itself_LE1[:-1])),
    "divergence": packed(run.divergence_LDD),
    "frequent": [_pairs(layer, places) for layer in run.frequent],
    "typical": [_pairs(layer, places) for layer in run.typical],
    "contexts": [
      [[_context(c, places) for c in expert] for expert in layer]
      for layer in run.contexts
    ],
    "examples": [_example(example, places) for example in run.examples],
  }


def _share(count: np.ndarray, total: np.ndarray) -> np.ndarray:
  return count / np.maximum(total, 1)


def _map_content(map_LD2: np.ndarray, shares: Sequence[float]) -> Any:
  return {
    "map": [
      [[round(float(x), 4) for x in point_2] for point_2 in map_D2]
      for map_D2 in map_LD2
    ],
    "mapShare": [round(share, 3) for share in shares],
  }


def _pairs(
  experts: Sequence[Sequence[tuple[int, int]]], places: dict[int, int]
) -> list[list[int]]:
  """Flattens each expert's (token, count) pairs: place, count, place, ..."""
  return [
    [x for token, count in expert for x in (places[token], count)]
    for expert in experts
  ]


def _context(context: Context, places: dict[int, int]) -> list[Any]:
  return [
    round(context.probability, 3),
    context.domain,
    context.position,
    [places[token] for token in context.tokens],
  ]


def _example(
  example: Example | None, places: dict[int, int]
) -> dict[str, Any] | None:
  if example is None:
    return None
  experts = example.expert_LTA
  return {
    "tokens": [places[token] for token in example.tokens_T.tolist()],
    "experts": packed(experts, 8 if experts.max() < 2**8 else 16),
    "probabilities": packed(example.probability_LTA, 8),
  }
