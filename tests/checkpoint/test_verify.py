"""Verification of all checkpoints of a run."""

import json

import pytest

from edl_jax.checkpoint.verify import verify_run
from edl_jax.config import UserError
from tests.checkpoint.small_run import write


def test_intact_damaged_and_older_checkpoints(tmp_path):
  with pytest.raises(UserError, match="no checkpoint in"):
    list(verify_run(str(tmp_path)))
  write(str(tmp_path))
  lines = list(verify_run(str(tmp_path)))
  assert [str(line)[:7] for line in lines] == ["step 3:", "step 4:"]
  assert all(str(line).endswith("are intact") for line in lines)
  # As before there were digests.
  for step in ("3", "4"):
    path = tmp_path / "checkpoints" / step / "provenance" / "metadata"
    content = json.loads(path.read_text())
    if step == "3":
      del content["digests"], content["seal"]
    content["content_hash"] = "other"
    path.write_text(json.dumps(content))
  older, damaged = verify_run(str(tmp_path / "checkpoints"))
  assert "before checkpoints had digests" in str(older)
  assert isinstance(damaged, UserError) and "step 4: " in str(damaged)
