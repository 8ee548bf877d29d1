"""The JSON files of checkpoints, whole and damaged."""

import json

import pytest

from edl_jax.checkpoint import DamagedError, folders, saved_provenance
from edl_jax.config import UserError
from tests.checkpoint.small_run import PROVENANCE


def plain():
  """The provenance with lists in place of tuples, as JSON gives it back."""
  return json.loads(json.dumps(PROVENANCE.to_dict()))


def write_provenance(root, step, content):
  path = root / "checkpoints" / str(step) / "provenance" / "metadata"
  path.parent.mkdir(parents=True)
  path.write_text(content)
  return path


def test_any_flipped_bit_of_the_provenance_is_found(tmp_path):
  content = plain() | {"digests": {"data": "1"}, "tokenizer": "{}"}
  path = write_provenance(tmp_path, 4, json.dumps(folders.sealed(content)))
  step = str(tmp_path / "checkpoints" / "4")
  assert folders.read_provenance(step) == content
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), 3):
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    # A blank between two values may become another kind of blank.
    try:
      assert folders.read_provenance(step) == content
    except DamagedError as error:
      assert str(error).startswith("step 4: ")


def test_without_digests_it_is_read_as_it_is(tmp_path):
  content = plain()
  write_provenance(tmp_path, 4, json.dumps(content))
  read = folders.read_provenance(str(tmp_path / "checkpoints" / "4"))
  assert read == content


def test_the_newest_intact_provenance_speaks_for_the_run(tmp_path):
  assert saved_provenance(str(tmp_path)) is None
  write_provenance(tmp_path, 5, "")
  with pytest.raises(DamagedError, match=r"step 5: .*metadata is damaged"):
    saved_provenance(str(tmp_path))
  write_provenance(tmp_path, 4, json.dumps(PROVENANCE.to_dict()))
  assert saved_provenance(str(tmp_path)) == plain()


@pytest.mark.parametrize(
  "content", [{}, {"experiment": 1}, {"name": "of another program"}]
)
def test_a_description_of_something_else_is_no_run(tmp_path, content):
  (tmp_path / "run.json").write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"run\.json does not describe a run"):
    saved_provenance(str(tmp_path))
