"""The command that verifies a run."""

import pathlib

from edl_jax.checkpoint.__main__ import main
from tests.checkpoint.small_run import write


def test_verify(tmp_path, capfd):
  assert main(["verify", str(tmp_path)]) == 2
  assert main(["verify"]) == 2
  capfd.readouterr()
  write(str(tmp_path))
  assert main(["verify", str(tmp_path)]) == 0
  out, error = capfd.readouterr()
  assert out.count(" are intact\n") == 2 and not error
  folder = pathlib.Path(tmp_path, "checkpoints", "3")
  (folder / "data" / "metadata").unlink()
  assert main(["verify", str(tmp_path)]) == 1
  out, error = capfd.readouterr()
  assert out.startswith("step 4: ") and error.startswith("error: step 3: ")
