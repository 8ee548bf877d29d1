from edl_jax.tables import aligned, markdown


def test_columns_are_padded_to_one_width():
  rows = [("name", "loss"), ("legal", "5.5"), ("c", "12.25")]
  assert aligned(rows) == ["name    loss", "legal    5.5", "c      12.25"]
  assert aligned(rows, left=(0, 1)) == [
    "name   loss",
    "legal  5.5",
    "c      12.25",
  ]


def test_columns_have_a_least_width():
  assert aligned([("a", "1"), ("bcd", "23")], min_widths=(2, 4)) == [
    "a       1",
    "bcd    23",
  ]


def test_markdown_is_aligned_in_its_source():
  assert markdown(("name", "n"), [("legal", "1")]) == (
    "| name  |   n |\n| ----- | --: |\n| legal |   1 |"
  )
