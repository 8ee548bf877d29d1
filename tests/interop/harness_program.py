"""The harness itself on a run and on its exported weights.

  python harness_program.py RUN EXPORTED TASKS OUT

runs in an environment that has the harness, JAX, torch and Transformers. OUT
gets a folder for each model: `ours`, the command `edl_jax.interop.lm_eval`, and
`theirs`, the harness's own model of Transformers. Each holds the answers to the
requests of all tasks in the folder TASKS.
"""

import glob
import os
import sys

# Before the libraries are imported: they may not ask the network for anything.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval.__main__ import cli_evaluate

from edl_jax.interop import lm_eval


def main(run, exported, tasks, out):
  names = [os.path.basename(path)[:-5] for path in glob.glob(f"{tasks}/*.yaml")]
  common = [
    *("--include_path", tasks, "--tasks", ",".join(sorted(names))),
    *("--log_samples", "--seed", "0"),
  ]
  code = lm_eval.main(
    [
      *("--model=edl_jax", f"--model_args=checkpoint={run},batch_tokens=512"),
      *(*common, "--output_path", f"{out}/ours"),
    ]
  )
  assert code == 0
  sys.argv = [
    *("lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
    *("--model_args", f"pretrained={exported},dtype=float32"),
    *(*common, "--output_path", f"{out}/theirs"),
  ]
  cli_evaluate()


if __name__ == "__main__":
  main(*sys.argv[1:])
