"""What a user may set about generation; needs no JAX."""

import dataclasses
import math

from edl_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw a token: from logits / temperature, among the likeliest.

  `top_k` keeps the k likeliest tokens (0: all). Of these, renormalised,
  `top_p` keeps the fewest of the likeliest whose probabilities sum to p or more
  (Holtzman et al., arXiv:1904.09751). Of equally likely tokens, those with
  lower ids come first. A temperature of 0 takes the likeliest token.

  Raises:
    UserError: a value is out of bounds.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise UserError(
        f"temperature={self.temperature} must be a finite number, 0 or more"
      )
    if self.top_k < 0:
      raise UserError(f"top_k={self.top_k} must be at least 0")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Settings(Sampling):
  """How prompts are continued.

  Raises:
    UserError: a value is out of bounds.
  """

  # Most new tokens.
  num_tokens: int = 64
  # Of the random draws.
  seed: int = 0
  # Continuations of each prompt.
  num_samples: int = 1
  # Texts that end a continuation, which does not contain them.
  stop: tuple[str, ...] = ()
  # Fine domain of the prompts. Only `model.router=domain` reads it; without it,
  # that router chooses among all experts.
  domain: str | None = None
  # Most tokens that the model reads of a prompt, the document's start included;
  # of a longer prompt, the last ones. 0: all.
  prompt_tokens: int = 0
  # Whether to return the active experts of each token.
  experts: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name in ("num_tokens", "num_samples"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be at least 1")
    if self.prompt_tokens < 0:
      raise UserError(f"prompt_tokens={self.prompt_tokens} must be at least 0")
    if isinstance(self.stop, str) or not all(self.stop):
      raise UserError("stop must be a list of texts, none of them empty")
    if not 0 <= self.seed < 2**32:
      raise UserError(f"seed={self.seed} must be from 0 to 2**32 - 1")

  @property
  def sampling(self) -> Sampling:
    """The part that decides about single tokens."""
    return Sampling(self.temperature, self.top_k, self.top_p)
