"""Measures what a domain needs of a model, and cuts the rest out.

  python -m edl_jax.analysis.carve --workdir=RUN --domains=legal,math --keep=2,4

prints the held-out loss of each domain with the experts of each layer that it
uses most, beside the loss with the experts most used over all domains, and with
random ones. Several runs, as --workdir=A --workdir=B, are compared. Tables,
a plot and JSON are written to --out.

  python -m edl_jax.analysis.carve --workdir=RUN --domain=legal --keep=4 \\
    --export=DIR

writes the model with these experts alone as a run folder.
"""

import os
import sys
import time

import jax
from absl import logging

from edl_jax import runtime, storage
from edl_jax.analysis.carve import curve, export, report, runs, selection
from edl_jax.analysis.carve.cost import cost
from edl_jax.analysis.carve.keep import parse_keep
from edl_jax.command import Command
from edl_jax.config import UserError

COMMAND = Command(__doc__)
_WORKDIR = COMMAND.flag(
  "workdir",
  [],
  "Folder of a run with a checkpoint; may be repeated.",
  required=True,
)
_DOMAINS = COMMAND.flag(
  "domains", (), "Domains to carve for; all if empty.", kind=tuple
)
_KEEP = COMMAND.flag(
  "keep",
  (),
  "Experts to keep in each layer. By default 1/8, 1/4, 3/8, 1/2 and 3/4.",
  kind=tuple,
)
_SCORE = COMMAND.flag(
  "score",
  "assignments",
  "What makes an expert worth keeping: the tokens that it gets, its mean router"
  " probability, or its outputs' norms times their routing weights.",
  choices=selection.SCORES,
)
_GREEDY = COMMAND.flag(
  "greedy", False, "Score each layer with the layers below it already cut."
)
_CALIBRATION_TOKENS = COMMAND.flag(
  "calibration_tokens",
  10_000,
  "Training tokens of each domain that experts are chosen on.",
  minimum=1,
)
_CALIBRATION_CURVE = COMMAND.flag(
  "calibration_curve",
  False,
  "Also choose experts on 1,000 to 100,000 tokens, at about a quarter kept.",
)
_DRAWS = COMMAND.flag(
  "draws", 3, "Random choices of experts to compare with.", minimum=0
)
_OUT = COMMAND.flag(
  "out",
  "",
  "Folder of tables, plot and JSON; by default carve in the first --workdir.",
)
_EXPORT = COMMAND.flag(
  "export", "", "Folder of the cut model, which must not exist."
)
_DOMAIN = COMMAND.flag(
  "domain", (), "Domains that the exported model serves.", kind=tuple
)


def _settings(found: list[runs.Run]) -> curve.Settings:
  """Returns the settings of the flags.

  Raises:
    UserError: a domain or a number of experts does not suit the runs.
  """
  exports = bool(_EXPORT.value)
  names, flag = (_DOMAIN, "domain") if exports else (_DOMAINS, "domains")
  curve_sizes = curve.CALIBRATION_SIZES if _CALIBRATION_CURVE.value else ()
  return curve.Settings(
    domains=runs.domain_indices(found[0], names.value, flag),
    keep=parse_keep(
      _KEEP.value, {run.workdir: run.experiment.model for run in found}, "keep"
    ),
    score=_SCORE.value,
    greedy=_GREEDY.value,
    calibration_tokens=_CALIBRATION_TOKENS.value,
    draws=_DRAWS.value,
    calibration_sizes=curve_sizes,
  )


def _check_flags() -> None:
  """Raises UserError if flags of the two uses are mixed."""
  if not _EXPORT.value:
    if _DOMAIN.value:
      raise UserError("--domain belongs to --export; name --domains to measure")
    return
  if _DOMAINS.value or _CALIBRATION_CURVE.value:
    raise UserError(
      "--export measures no curves: leave out --domains and"
      " --calibration_curve, and name --domain"
    )
  if len(_WORKDIR.value) > 1:
    raise UserError("--export cuts one run: give one --workdir")
  if not _DOMAIN.value:
    raise UserError("--domain is missing: name what --export is to serve")
  if len(_KEEP.value) != 1:
    raise UserError("--keep: --export needs one number of experts, as --keep=4")
  export.check_export(_EXPORT.value)


def _measure(found: list[runs.Run], settings: curve.Settings) -> None:
  results = []
  rows = [
    runs.choose_rows(
      run, runs.read_corpus(run), settings.domains, settings.most_tokens
    )
    for run in found
  ]
  for run, own in zip(found, rows):
    started = time.monotonic()
    print(f"{run.workdir}, step {run.step}", flush=True)
    mesh = runs.choose_mesh(run.experiment)
    results.append(
      curve.carve_run(
        run, own, settings, mesh, lambda line: print(line, flush=True)
      )
    )
    print(f"  took {time.monotonic() - started:.0f} s", flush=True)
  folder = _OUT.value or os.path.join(found[0].workdir, "carve")
  try:
    text = report.write(results, folder)
  except OSError as error:
    raise UserError(
      f"cannot write to {folder}: {error.strerror or error}; choose another"
      " --out"
    ) from error
  path = os.path.join(folder, "carve.md")
  print(f"\nwritten: {path}, with carve.json and carve.png beside it\n\n{text}")


def _export(run: runs.Run, settings: curve.Settings) -> None:
  (keep,), folder = settings.keep, _EXPORT.value
  rows = runs.choose_rows(
    run, runs.read_corpus(run), settings.domains, settings.most_tokens
  )
  mesh = runs.choose_mesh(run.experiment)
  with jax.set_mesh(mesh):
    kept_LE, losses = curve.choose_together(run, rows, settings, mesh)
    record = {
      "domains": list(losses),
      "score": settings.score,
      "greedy": settings.greedy,
      "calibration_tokens": settings.calibration_tokens,
      "losses": losses,
    }
    export.export(run, kept_LE, folder, record, mesh)
  size = cost(run.experiment.model, keep)
  print(
    f"written: {storage.absolute(folder)}, {size['parameters']:,} parameters,"
    f" {size['share']:.0%} of {run.workdir} at step {run.step}"
  )
  for domain, each in losses.items():
    print(
      f"  {domain}: held-out loss {each['whole']:.4f} with all experts,"
      f" {each['cut']:.4f} with {keep}"
    )
  print(f"use it with --experiment.model.num_experts={keep}")


@COMMAND.main
def main() -> None:
  """Measures carve curves, or exports a cut model."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  _check_flags()
  found = runs.find_runs(_WORKDIR.value)
  settings = _settings(found)
  runtime.configure()
  if _EXPORT.value:
    _export(found[0], settings)
  else:
    _measure(found, settings)


if __name__ == "__main__":
  sys.exit(main())
