"""Continue prompts with a trained model.

  python -m edl_jax.generate --workdir=runs/demo --prompt="def __init__(self"

prints one continuation while it grows, and several when all have ended:

  ... --prompt=One --prompt=Two --num_samples=2 --temperature=0.8 --top_p=0.95

--prompts=FILE reads one prompt from each line, and --prompts=- from the
standard input.
"""

import sys
import warnings
from typing import TYPE_CHECKING

from edl_jax import tables
from edl_jax.command import Command
from edl_jax.config import MeshConfig, UserError
from edl_jax.generation.settings import Settings

if TYPE_CHECKING:
  from edl_jax.checkpoint import Loaded
  from edl_jax.generation.generator import Generated

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir", "", "Folder of the run, or of one of its steps.", required=True
)
_PROMPT = COMMAND.flag(
  "prompt", [], "Text to continue; may be repeated.", literal=True
)
_PROMPTS = COMMAND.flag("prompts", "", "File with a prompt in each line, or -.")
_NUM_TOKENS = COMMAND.flag("num_tokens", 64, "Most new tokens of a text.")
_TEMPERATURE = COMMAND.flag(
  "temperature",
  0.0,
  "Divides the logits before a draw; 0 takes the likeliest token.",
)
_TOP_K = COMMAND.flag("top_k", 0, "Draw from the k likeliest tokens; 0: all.")
_TOP_P = COMMAND.flag(
  "top_p", 1.0, "Draw from the likeliest tokens that sum to this probability."
)
_SEED = COMMAND.flag("seed", 0, "Seed of the draws.")
_NUM_SAMPLES = COMMAND.flag("num_samples", 1, "Continuations of each prompt.")
_STOP = COMMAND.flag(
  "stop", [], "Text that ends a continuation; repeatable.", literal=True
)
_DOMAIN = COMMAND.flag(
  "domain", "", "Domain of the prompts, for model.router=domain alone."
)
_PROMPT_TOKENS = COMMAND.flag(
  "prompt_tokens",
  0,
  "Most tokens that the model reads of a prompt, the last ones; 0: all.",
)
_EXPERTS = COMMAND.flag(
  "experts", False, "Print the active experts of each token by layer."
)
COMMAND.mesh(otherwise="one device")


def _settings() -> Settings:
  return Settings(
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    num_tokens=_NUM_TOKENS.value,
    seed=_SEED.value,
    num_samples=_NUM_SAMPLES.value,
    stop=tuple(_STOP.value),
    domain=_DOMAIN.value or None,
    prompt_tokens=_PROMPT_TOKENS.value,
    experts=_EXPERTS.value,
  )


def _prompts() -> list[str]:
  prompts, path = list(_PROMPT.value), _PROMPTS.value
  try:
    if path == "-":
      prompts += sys.stdin.read().splitlines()
    elif path:
      with open(path, encoding="utf-8") as file:
        prompts += file.read().splitlines()
  except (OSError, UnicodeError) as error:
    raise UserError(f"--prompts={path} cannot be read: {error}") from error
  if not prompts:
    raise UserError("there is no prompt: give --prompt=TEXT or --prompts=FILE")
  return prompts


def _load(config: MeshConfig | None) -> "Loaded":
  from edl_jax import checkpoint, sharding

  if config is None:
    return checkpoint.load(_WORKDIR.value)
  checkpoint.checkpoint_provenance(_WORKDIR.value)
  return checkpoint.load(_WORKDIR.value, mesh=sharding.make_mesh(config))


def _print_experts(run: "Loaded", result: "Generated") -> None:
  """Prints a row for each token that the model read."""
  experts_LTA = result.experts_LTA
  assert experts_LTA is not None
  first = run.experiment.model.num_dense_layers
  rows = [("token", *(f"layer {first + i}" for i in range(len(experts_LTA))))]
  for t in range(experts_LTA.shape[1]):
    active = (" ".join(map(str, row_A)) for row_A in experts_LTA[:, t])
    rows.append((run.tokenizer.token_text(result.tokens[t]), *active))
  print("\n".join(tables.aligned(rows)))


@COMMAND.main
def main() -> None:
  """Continues the prompts; refuses bad settings before it loads the model."""
  settings, prompts, mesh = _settings(), _prompts(), COMMAND.mesh_config
  # Imports JAX, which --help and errors in flags do without.
  from edl_jax import runtime

  runtime.configure()
  run = _load(mesh)
  single = len(prompts) * settings.num_samples == 1
  unshown = iter(prompts)

  def show(index: int, piece: str) -> None:
    del index
    print(f"{next(unshown, '')}{piece}", end="", flush=True)

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    results = run.generate(prompts, show if single else None, **vars(settings))
  for index, result in enumerate(results):
    if single:
      print(next(unshown, ""))
    else:
      prompt, sample = divmod(index, settings.num_samples)
      print(f"--- prompt {prompt + 1}, sample {sample + 1}: {result.finish}")
      print(f"{result.prompt}{result.text}")
    if settings.experts:
      _print_experts(run, result)
  for warning in caught:
    if issubclass(warning.category, UserWarning):
      print(f"warning: {warning.message}", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())
