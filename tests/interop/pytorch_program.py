"""Value and gradient of examples/pytorch.py; runs where torch is.

  python pytorch_program.py EXAMPLE.py CASES.npz OUT.npz

CASES has probs, weights, domain, p_DE and count_D of each case, under
"CASE/probs" and so on, and num_domains. OUT gets the p_DE, count_D, loss and
gradient of each, from one process, and under "ranks/" those of two that share
the sequences out; and of the p_DE given, without eps, the `given_loss` and
`given_gradient`.
"""

import importlib.util
import pathlib
import sys
import tempfile

import numpy as np
import torch
import torch.distributed as dist


def run_cases(example_file, cases, rank=0, ranks=1):
  """Returns the results of a rank; the gradient is that by its own rows."""
  spec = importlib.util.spec_from_file_location("example", example_file)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  results = {}
  for name in sorted({key.split("/")[0] for key in cases if "/" in key}):
    probs, weights, domain = (
      torch.tensor(cases[f"{name}/{part}"][rank::ranks])
      for part in ("probs", "weights", "domain")
    )
    probs.requires_grad_()
    p_DE, count_D = example.domain_routing(
      probs, weights, domain, int(cases["num_domains"])
    )
    loss = example.expert_divergence_loss(p_DE, count_D)
    loss.backward()
    given_DE = torch.tensor(cases[f"{name}/p_DE"], requires_grad=True)
    given_loss = example.expert_divergence_loss(
      given_DE, torch.tensor(cases[f"{name}/count_D"]), eps=0
    )
    given_loss.backward()
    for key, value in {
      "p_DE": p_DE,
      "count_D": count_D,
      "loss": loss,
      "gradient": probs.grad,
      "given_loss": given_loss,
      "given_gradient": given_DE.grad,
    }.items():
      results[f"{name}/{key}"] = value.detach().numpy()
  return results


def rank_main(rank, ranks, example_file, cases_file, folder):
  dist.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
  )
  with np.load(cases_file) as cases:
    results = run_cases(example_file, dict(cases), rank, ranks)
  np.savez(f"{folder}/{rank}.npz", **results)
  dist.destroy_process_group()


def main(example_file, cases_file, out):
  with np.load(cases_file) as cases:
    results = run_cases(example_file, dict(cases))
  with tempfile.TemporaryDirectory() as folder:
    torch.multiprocessing.spawn(
      rank_main, (2, example_file, cases_file, folder), nprocs=2
    )
    for path in sorted(pathlib.Path(folder).glob("*.npz")):
      with np.load(path) as found:
        for key, value in found.items():
          results[f"ranks/{path.stem}/{key}"] = value
  np.savez(out, **results)


if __name__ == "__main__":
  main(*sys.argv[1:])
