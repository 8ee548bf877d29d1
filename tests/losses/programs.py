"""Sizes of the arrays of a program."""

import math

import jax


def largest_array(jaxpr) -> int:
  """Elements of the largest array in a program and its parts."""
  sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
  for equation in jaxpr.eqns:
    for part in jax.tree.leaves(list(equation.params.values())):
      part = getattr(part, "jaxpr", part)
      if hasattr(part, "eqns"):
        sizes.append(largest_array(part))
  return max(sizes, default=0)
