"""The harness's command line with our model; test_harness.py runs it whole."""

import importlib.util

import pytest

from edl_jax.interop import lm_eval


def test_help_says_how_to_name_a_run(capsys):
  assert lm_eval.main(["--help"]) == 0
  assert "checkpoint=FOLDER" in capsys.readouterr().out


@pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is not None,
  reason="lm-evaluation-harness is installed",
)
def test_a_missing_harness_is_one_line(capsys):
  assert lm_eval.main(["--model=edl_jax", "--tasks=arc_easy"]) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err == (
    "error: lm-evaluation-harness is not installed: pip install -r"
    " requirements-lm-eval.txt\n"
  )
