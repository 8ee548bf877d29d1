"""The command, for real, on trained runs."""

import json
import os

import pytest

import edl_jax
from edl_jax.analysis.carve.__main__ import main
from tests.analysis.carve.run_cases import train_run


@pytest.fixture(scope="module")
def two_runs(carve_workdir, carve_files, tmp_path_factory):
  folder = tmp_path_factory.mktemp("carve_other") / "run"
  weight = {"losses.divergence_weight": 0.1}
  return carve_workdir, train_run(folder, carve_files, **weight)


def flags(workdirs, *more):
  return [*(f"--workdir={workdir}" for workdir in workdirs), *more]


def test_two_runs_are_carved_side_by_side(two_runs, tmp_path, capsys):
  out = tmp_path / "out"
  code = main(
    flags(
      two_runs,
      *("--keep=2,4", "--domains=words/low,digits", f"--out={out}"),
      *("--calibration_tokens=64", "--draws=1", "--score=output_norm"),
    )
  )
  printed = capsys.readouterr().out
  assert code == 0
  assert "divergence_weight=0.1" in printed
  assert "paired by domain and seed" in printed
  results = json.loads((out / "carve.json").read_text())
  assert [result["workdir"] for result in results] == list(two_runs)
  for result in results:
    assert list(result["whole"]) == ["low", "digits"]
    assert len(result["points"]) == 4
    for domain, whole in result["whole"].items():
      assert f"{domain}: {whole['loss']:.3f} whole" in printed
  assert printed.endswith((out / "carve.md").read_text())


def test_export_writes_a_run_for_two_domains(two_runs, tmp_path, capsys):
  folder = tmp_path / "cut"
  code = main(
    flags(
      two_runs[:1],
      *(f"--export={folder}", "--domain=low,digits", "--keep=3", "--greedy"),
    )
  )
  printed = capsys.readouterr().out
  assert code == 0
  assert edl_jax.load(str(folder)).experiment.model.num_experts == 3
  record = json.loads((folder / "cut.json").read_text())
  assert record["domains"] == ["low", "digits"]
  assert record["greedy"] is True and record["score"] == "assignments"
  for domain, losses in record["losses"].items():
    assert f"{domain}: held-out loss {losses['whole']:.4f}" in printed
  # A second export does not overwrite the first.
  again = flags(two_runs[:1], f"--export={folder}", "--domain=low", "--keep=3")
  assert main(again) == 2
  assert "exists; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
  "more, message",
  [
    (["--keep=1"], "model.num_active_experts=2; keep at least as many"),
    (["--keep=9"], "has only model.num_experts=8"),
    (["--keep=few"], "--keep=few: must be a number of experts"),
    (["--domains=digit"], "did you mean digits?"),
    (["--domain=digits"], "--domain belongs to --export"),
    (["--export=new", "--keep=2"], "--domain is missing"),
    (["--export=new", "--domain=digits"], "--export needs one number"),
    (["--export=new", "--domain=digit", "--keep=2"], "did you mean digits?"),
    (["--export=new", "--domains=digits"], "--export measures no curves"),
    (["--workdir=none"], "--workdir=none has no checkpoint to carve"),
    (["--score=use"], "'use' is none of assignments"),
  ],
)
def test_mistakes_are_named_in_one_line(carve_workdir, more, message, capsys):
  assert main(flags([carve_workdir], *more)) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not os.path.exists("new")


def test_runs_of_other_domains_do_not_compare(carve_workdir, tmp_path, capsys):
  texts = tmp_path / "texts.jsonl"
  texts.write_text(
    "".join(
      json.dumps({"text": f"{domain} {n} " * 40, "domain": domain}) + "\n"
      for domain in ("x", "y")
      for n in range(8)
    )
  )
  other = train_run(tmp_path / "other", str(texts))
  assert main(flags([carve_workdir, other])) == 2
  error = capsys.readouterr().err
  assert "have different taxonomies" in error and error.count("\n") == 1
