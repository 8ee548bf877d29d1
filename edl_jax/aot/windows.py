"""The windows of convolutions, as which TPUs write matrix products."""

import math

import numpy as np

# How many elements, and how far apart they are.
Line = tuple[int, int]


def meetings(outputs: Line, kernels: Line, inputs: Line, pad: int) -> int:
  """Returns in how many pairs a kernel's element meets an input's element.

  Output o and kernel element k meet what lies at the sum of their places, less
  `pad`. A window may be as wide as a vocabulary: outputs are counted in closed
  form.
  """
  at_K = np.arange(kernels[0]) * kernels[1] - pad
  (number, stride), (size, spacing) = outputs, inputs
  low_K = np.maximum(0, -(at_K // stride))
  high_K = np.minimum(number - 1, ((size - 1) * spacing - at_K) // stride)
  # Outputs that lie where an input may be are `period` apart.
  common = math.gcd(stride, spacing)
  period = spacing // common
  first_K = -(at_K // common) * pow(stride // common, -1, period) % period
  count_K = (high_K - first_K) // period - (low_K - 1 - first_K) // period
  return int(np.maximum(count_K, 0)[at_K % common == 0].sum())
