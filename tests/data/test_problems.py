"""The command that writes worked problems as supervised examples."""

from data import problems
from edl_jax.config import DataConfig
from edl_jax.text.arithmetic import KINDS
from edl_jax.text.documents import SupervisedExample
from edl_jax.text.sources import read_documents


def test_examples_are_read_with_a_domain_for_each_kind(tmp_path):
  out = tmp_path / "problems"
  assert not problems.main([f"--out={out}", "--problems=12"])
  taxonomy, documents, _ = read_documents(DataConfig(files=f"{out}/*.jsonl.gz"))
  assert sorted(taxonomy.fine) == sorted(KINDS)
  assert len(documents) == 12 * len(KINDS)
  # The question is not learned, and examples of one question stay together.
  for document in documents:
    assert isinstance(document, SupervisedExample)
    (cut,) = document.cuts
    assert document.origin == document.text[:cut]
    assert document.origin.count("\n") == 1 and document.origin[-1] == "\n"


def test_a_question_is_written_once(tmp_path):
  assert not problems.main([f"--out={tmp_path}", "--problems=400"])
  _, documents, _ = read_documents(
    DataConfig(files=f"{tmp_path}/quadratic_equations.jsonl.gz")
  )
  origins = [document.origin for document in documents]
  assert len(set(origins)) == len(origins) < 400


def test_bad_usage_is_one_line(tmp_path, capsys):
  (tmp_path / "file").touch()
  for flags, word in (
    ([f"--out={tmp_path / 'file'}"], "file"),
    ([f"--out={tmp_path}", "--problems=0"], "problems"),
  ):
    assert problems.main(flags) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
