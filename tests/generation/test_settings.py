"""Bad settings are refused in one line that names them."""

import pytest

from edl_jax.config import UserError
from edl_jax.generation.settings import Sampling, Settings


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("num_tokens", 0),
    ("num_samples", 0),
    ("seed", -1),
    ("stop", ("a", "")),
    ("stop", "text"),
  ],
)
def test_values_out_of_bounds(name, value):
  with pytest.raises(UserError, match=f"^{name}") as error:
    Settings(**{name: value})
  assert "\n" not in str(error.value)


def test_sampling_is_the_part_about_tokens():
  settings = Settings(temperature=0.5, top_k=3, top_p=0.9, seed=7)
  assert settings.sampling == Sampling(0.5, 3, 0.9)
