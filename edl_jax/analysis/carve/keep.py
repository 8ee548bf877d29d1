"""How many experts may be kept, checked before anything is loaded.

This module imports no JAX, so that a sweep can check before its first run.
"""

from collections.abc import Mapping, Sequence

from edl_jax.config import ModelConfig, UserError


def check_router(model: ModelConfig, what: str) -> None:
  """Checks that the model has experts to choose from.

  Args:
    model: the model to carve.
    what: the run, as messages name it.

  Raises:
    UserError: the model fixes the experts of each domain.
  """
  if model.router == "domain":
    raise UserError(
      f"{what} has model.router=domain, which fixes the experts of each"
      " domain: there is nothing to choose"
    )


def parse_keep(
  texts: Sequence[str], models: Mapping[str, ModelConfig], flag: str
) -> list[int]:
  """Returns the numbers of experts to keep, rising.

  Without texts, 1/8, 1/4, 3/8, 1/2 and 3/4 of the smallest number of experts.

  Args:
    texts: the numbers.
    models: every model to carve, by the name of its run.
    flag: the flag that holds the texts, for messages.

  Raises:
    UserError: a text is no number, or a model has fewer experts or more active
      ones.
  """
  if not texts:
    experts = min(model.num_experts for model in models.values())
    active = max(model.num_active_experts for model in models.values())
    shares = {experts * eighths // 8 for eighths in (1, 2, 3, 4, 6)}
    return sorted({max(active, share) for share in shares})
  for text in texts:
    if not text.isdecimal():
      raise UserError(f"--{flag}={text}: must be a number of experts")
    for name, model in models.items():
      if int(text) < model.num_active_experts:
        raise UserError(
          f"--{flag}={text}: {name} has"
          f" model.num_active_experts={model.num_active_experts}; keep at least"
          " as many"
        )
      if int(text) > model.num_experts:
        raise UserError(
          f"--{flag}={text}: {name} has only"
          f" model.num_experts={model.num_experts}"
        )
  return sorted(set(map(int, texts)))
