"""A seeded generator of worked arithmetic and algebra, step by step.

It gives the embedded mixture a mathematical domain whose answers are right by
construction.
"""

import itertools
import math
import random
from collections.abc import Iterator

_PLACES = (
  "ones",
  "tens",
  "hundreds",
  "thousands",
  "ten thousands",
  "hundred thousands",
  "millions",
  "ten millions",
)
_PROBLEMS_PER_DOCUMENT = (3, 8)


def worked_problems(seed: int = 0) -> Iterator[str]:
  """Yields documents without end; the n-th depends on `seed` and n alone.

  A document is a numbered list of problems of one kind, about 500 to 2500
  characters long.
  """
  for number in itertools.count():
    rng = random.Random(f"{seed}/{number}")
    title, make = _KINDS[rng.choice(KINDS)]
    problems = [
      f"{index}. {make(rng)}\n"
      for index in range(1, rng.randint(*_PROBLEMS_PER_DOCUMENT) + 1)
    ]
    yield "\n".join([f"{title}\n", *problems])


def worked_examples(kind: str, seed: int = 0) -> Iterator[tuple[str, str]]:
  """Yields problems of one of `KINDS` without end: question, worked answer.

  The question ends with a line end. The n-th problem depends on the arguments
  and n alone; some questions occur again.
  """
  _, make = _KINDS[kind]
  for number in itertools.count():
    rng = random.Random(f"{kind}/{seed}/{number}")
    question, answer = make(rng).split("\n", 1)
    yield f"{question}\n", answer


def _polynomial(*terms: tuple[int, str]) -> str:
  """Returns the sum of coefficient times symbol as text, without zero terms."""
  text = ""
  for coefficient, symbol in terms:
    if not coefficient:
      continue
    size = abs(coefficient)
    term = symbol if symbol and size == 1 else f"{size}{symbol}"
    if text:
      text += f" {'-' if coefficient < 0 else '+'} {term}"
    else:
      text = f"-{term}" if coefficient < 0 else term
  return text or "0"


def _factor(number: int) -> str:
  """Returns a number as a factor: a negative one in parentheses."""
  return f"({number})" if number < 0 else str(number)


def _addition(rng: random.Random) -> str:
  digits = rng.randint(3, 7)
  a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
  lines, carry = [f"Add {a} and {b}, column by column."], 0
  for place in range(digits):
    x, y = a // 10**place % 10, b // 10**place % 10
    total = x + y + carry
    carried = f" + {carry}" if carry else ""
    carry = total // 10
    then = f", carry {carry}" if carry else ""
    lines.append(
      f"{_PLACES[place]}: {x} + {y}{carried} = {total},"
      f" write {total % 10}{then}"
    )
  if carry:
    lines.append(f"{_PLACES[digits]}: write {carry}")
  return "\n".join([*lines, f"{a} + {b} = {a + b}"])


def _multiplication(rng: random.Random) -> str:
  a, b = rng.randrange(12, 10_000), rng.randrange(12, 1000)
  lines, partial = [f"Multiply {a} by {b}."], []
  for place, digit in enumerate(map(int, reversed(str(b)))):
    if digit:
      partial.append(a * digit * 10**place)
      lines.append(
        f"{a} * {digit * 10**place} = {a} * {digit} * {10**place}"
        f" = {partial[-1]}"
      )
  total = partial[0]
  for term in partial[1:]:
    lines.append(f"{total} + {term} = {total + term}")
    total += term
  return "\n".join([*lines, f"{a} * {b} = {a * b}"])


def _fractions(rng: random.Random) -> str:
  b, d = rng.sample(range(2, 40), 2)
  a, c = rng.randrange(1, b), rng.randrange(1, d)
  sign = rng.choice((1, -1))
  operation = "+" if sign > 0 else "-"
  common = math.lcm(b, d)
  x, y = a * common // b, c * common // d
  total = x + sign * y
  lines = [
    f"Compute {a}/{b} {operation} {c}/{d}.",
    f"The least common multiple of {b} and {d} is {common}.",
    f"{a}/{b} = {x}/{common} and {c}/{d} = {y}/{common}.",
    f"{x}/{common} {operation} {y}/{common} = {total}/{common}",
  ]
  shared = math.gcd(total, common)
  p, q = total // shared, common // shared
  result = f"{p}/{q}" if q > 1 else str(p)
  if shared > 1:
    lines.append(f"Divide both by {shared}: {total}/{common} = {result}")
  return "\n".join([*lines, f"{a}/{b} {operation} {c}/{d} = {result}"])


def _linear_equation(rng: random.Random) -> str:
  x = rng.randint(-30, 30)
  a, c = rng.sample([n for n in range(-12, 13) if n], 2)
  b = rng.randint(-50, 50)
  d = a * x + b - c * x
  left, right = _polynomial((a, "x"), (b, "")), _polynomial((c, "x"), (d, ""))
  lines = [
    f"Solve {left} = {right} for x.",
    "Bring x to the left and numbers to the right:"
    f" {_polynomial((a, 'x'), (-c, 'x'))} = {_polynomial((d, ''), (-b, ''))}",
    f"{_polynomial((a - c, 'x'))} = {d - b}",
  ]
  if a - c != 1:
    lines.append(f"Divide by {a - c}: x = {x}")
  for side, slope, shift in ((left, a, b), (right, c, d)):
    at_x = f"{slope} * {_factor(x)}"
    moved = f" {'-' if shift < 0 else '+'} {abs(shift)}" if shift else ""
    lines.append(f"Check: {side} is {at_x}{moved} = {slope * x + shift}.")
  return "\n".join(lines)


def _quadratic(rng: random.Random) -> str:
  p, q = sorted((rng.randint(-20, 20), rng.randint(-20, 20)))
  polynomial = _polynomial((1, "x^2"), (-p - q, "x"), (p * q, ""))
  factors = "".join(f"({_polynomial((1, 'x'), (-r, ''))})" for r in (p, q))
  roots = f"x = {p} or x = {q}" if p != q else f"x = {p}, twice"
  return "\n".join(
    [
      f"Solve {polynomial} = 0 by factoring.",
      f"Two numbers with the sum {p + q} and the product {p * q}: {p} and {q}.",
      f"{polynomial} = {factors}",
      f"A product is zero where a factor is: {roots}.",
    ]
  )


def _greatest_common_divisor(rng: random.Random) -> str:
  factor = rng.randint(1, 60)
  a, b = (factor * rng.randint(2, 400) for _ in range(2))
  a, b = max(a, b), min(a, b)
  lines = [f"Find the greatest common divisor of {a} and {b}."]
  x, y = a, b
  while y:
    lines.append(f"{x} = {x // y} * {y} + {x % y}")
    x, y = y, x % y
  return "\n".join([*lines, f"gcd({a}, {b}) = {x}"])


def _percentage(rng: random.Random) -> str:
  price, percent = 20 * rng.randint(1, 500), 5 * rng.randint(1, 19)
  part = price * percent // 100
  word, sign = rng.choice((("rises", 1), ("falls", -1)))
  operation = "+" if sign > 0 else "-"
  return "\n".join(
    [
      f"A price of {price} {word} by {percent} percent. What is it then?",
      f"1 percent of {price} is {price / 100:g}.",
      f"{percent} percent of {price} is {percent} * {price / 100:g} = {part}.",
      f"{price} {operation} {part} = {price + sign * part}",
    ]
  )


# Title and maker of a problem, by kind.
_KINDS = {
  "addition": ("Addition with carries", _addition),
  "multiplication": ("Long multiplication", _multiplication),
  "fractions": ("Adding and subtracting fractions", _fractions),
  "linear_equations": ("Linear equations", _linear_equation),
  "quadratic_equations": ("Quadratic equations", _quadratic),
  "greatest_common_divisors": (
    "Greatest common divisors by Euclid's algorithm",
    _greatest_common_divisor,
  ),
  "percentages": ("Percentages", _percentage),
}
KINDS = tuple(_KINDS)
