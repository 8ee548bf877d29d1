"""The table that compares runs."""

from edl_jax.analysis import comparison


def make_result(shift=0.0, first_layer=0):
  layers = [
    {"diversity": 0.25 + shift, "inter_fraction": 0.5, "max_violation": 1.0},
    {"diversity": 0.75, "inter_fraction": 0.5 - shift, "max_violation": 2.0},
  ]
  return {
    "experiment": {"model.num_dense_layers": first_layer},
    "tokens_per_second": 12345.6,
    "eval": {
      "lm_loss": 2.5 - shift,
      "bits_per_byte": 1.5,
      "domains": {
        "python": {"lm_loss": 2.0, "bits_per_byte": 1.0},
        "legal": {"lm_loss": 3.0 + shift, "bits_per_byte": 2.0},
      },
    },
    "routing": {
      "diversity": 0.5,
      "inter_fraction": 0.5,
      "max_violation": 1.5,
      "layers": layers,
    },
  }


def rows_of(table):
  """Parses a table into {(heading, row name): cells}."""
  rows, heading = {}, None
  for line in table.splitlines()[1:]:
    if line.startswith("  ") and heading:
      name, *cells = [part for part in line.split("  ") if part.strip()]
      rows[heading, name.strip()] = [cell.strip() for cell in cells]
    elif line and not line.startswith(("-", " ")):
      heading = line.split(" (")[0]
  return rows


def test_comparison_table_of_two_runs():
  long = "divergence_weight=0.003,num_active_experts=8,seed=1"
  table = comparison.comparison_table(
    [
      ("base", make_result()),
      (long, make_result(0.125)),
    ]
  )
  assert max(map(len, table.splitlines())) <= 100
  rows = rows_of(table)
  loss = "held-out LM loss"
  assert rows[loss, "overall"] == ["2.5000", "2.3750", "-0.1250"]
  assert rows[loss, "python"] == ["2.0000", "2.0000", "+0.0000"]
  assert rows[loss, "legal"] == ["3.0000", "3.1250", "+0.1250"]
  bits = "held-out bits per byte"
  assert rows[bits, "legal"] == ["2.0000", "2.0000", "+0.0000"]
  diversity = "routing diversity"
  assert rows[diversity, "mean"] == ["0.5000", "0.5000", "+0.0000"]
  assert rows[diversity, "layer 0"] == ["0.2500", "0.3750", "+0.1250"]
  inter = rows["D_inter / D_total", "layer 1"]
  assert inter == ["0.5000", "0.3750", "-0.1250"]
  assert rows["MaxVio", "mean"] == ["1.500", "1.500", "+0.000"]
  speed = rows["speed", "tokens per second"]
  assert speed == ["12,346", "12,346", "+0"]


def test_comparison_table_is_aligned():
  label = "weight=0.01,num_active_experts=8"
  expected = """\
                                      weight = 0.01,
                                num_active_experts =
                                                   8
----------------------------------------------------

held-out LM loss (nats per token)
  overall                                     2.5000
  python                                      2.0000
  legal                                       3.0000

held-out bits per byte
  overall                                     1.5000
"""
  table = comparison.comparison_table([(label, make_result())])
  assert table.startswith(expected)
  assert table.endswith("\n" + "  tokens per second".ljust(46) + "12,346")


def test_comparison_table_of_other_counts_and_domains():
  results = [(name, make_result(first_layer=1)) for name in "abc"]
  del results[1][1]["eval"]["domains"]["legal"]
  rows = rows_of(comparison.comparison_table(results))
  assert rows["held-out LM loss", "legal"] == ["3.0000", "-", "3.0000"]
  assert rows["routing diversity", "layer 2"] == ["0.7500"] * 3
  rows = rows_of(comparison.comparison_table(results[:2]))
  assert rows["held-out LM loss", "legal"] == ["3.0000", "-", "-"]


def test_comparison_table_of_specialization():
  results = []
  for name, weight in (("base", 0.0), ("special", "auto:1e-4")):
    result = make_result()
    result["experiment"]["losses.orthogonality_weight"] = weight
    for figures in (result["routing"], *result["routing"]["layers"]):
      for key in (
        "routing_variance",
        "expert_overlap",
        "output_similarity",
        "silhouette",
      ):
        figures[key] = 0.5 if weight else 0.25
    results.append((name, result))
  rows = rows_of(comparison.comparison_table(results))
  for heading in ("routing variance", "expert overlap", "silhouette"):
    for name in ("mean", "layer 0", "layer 1"):
      assert rows[heading, name] == ["0.2500", "0.5000", "+0.2500"]
  # Not where no run asks for it.
  assert "silhouette" not in comparison.comparison_table([results[0]] * 2)


def carved_result(loss, keeps=(2, 4)):
  return {
    "points": [
      {"domain": domain, "keep": keep, "loss": loss + number + 1 / keep}
      for number, domain in enumerate(("python", "legal"))
      for keep in keeps
    ]
  }


def test_comparison_table_of_carved_runs():
  results = [("base", make_result()), ("other", make_result(0.125))]
  for _, result in results:
    result["experiment"]["model.num_experts"] = 16
  carved = [carved_result(3.0), carved_result(2.5)]
  table = comparison.comparison_table(results, carved)
  assert rows_of(table) == {
    ("held-out LM loss", "overall"): ["2.5000", "2.3750", "-0.1250"],
    ("routing diversity", "mean over layers"): ["0.5000", "0.5000", "+0.0000"],
    **{
      (f"LM loss with {keep} of 16 experts in each layer", name): cells
      for keep, of_keep in (
        (4, (["3.7500", "3.2500"], ["3.2500", "2.7500"], ["4.2500", "3.7500"])),
        (2, (["4.0000", "3.5000"], ["3.5000", "3.0000"], ["4.5000", "4.0000"])),
      )
      for name, each in zip(("mean over domains", "python", "legal"), of_keep)
      for cells in [[*each, "-0.5000"]]
    },
  }


def test_comparison_table_of_a_run_that_was_not_carved():
  results = [("base", make_result()), ("other", make_result())]
  results[0][1]["experiment"]["model.num_experts"] = 16
  results[1][1]["experiment"]["model.num_experts"] = 8
  carved = [None, carved_result(2.5, keeps=(4,))]
  rows = rows_of(comparison.comparison_table(results, carved))
  heading = "LM loss with 4 experts in each layer"
  assert rows[heading, "python"] == ["-", "2.7500", "-"]


def test_a_domain_called_overall_has_a_row_of_its_own():
  result = {
    "experiment": {},
    "tokens_per_second": 1.0,
    "eval": {
      "lm_loss": 2.5,
      "bits_per_byte": 1.5,
      "domains": {"overall": {"lm_loss": 3.5, "bits_per_byte": 4.5}},
    },
    "routing": {
      "layers": [],
      **dict.fromkeys(("diversity", "inter_fraction", "max_violation"), 0.0),
    },
  }
  table = comparison.comparison_table([("run", result)])
  rows = [line.split() for line in table.splitlines()]
  assert ["overall", "2.5000"] in rows
  assert ["overall", "(domain)", "3.5000"] in rows
