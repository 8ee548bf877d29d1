#!/usr/bin/env bash
# The two runs whose benchmark tasks docs/study/tasks.md shows. Started again, it
# resumes what was stopped.
#
#   python -m data.benchmarks --out=benchmarks_data
#   python -m data.corpora --out=corpora --scrub=benchmarks_data
#   docs/study/tasks.sh runs/web3
set -euo pipefail
out=${1:?usage: tasks.sh FOLDER}
python=${PYTHON:-python}
steps=${STEPS:-2000}
documents=${DOCUMENTS:-100}

# All files but those of multiple choice by letters, in which small models guess.
files=$(ls benchmarks_data | sed -n 's/^\(.*\.\(rc\|bpb\)\)\.jsonl.*/\1/p' |
  paste -sd,)
for variant in baseline fine; do
  "$python" -m edl_jax.main \
    --experiment="experiments/small_web3.py:$variant" \
    --workdir="$out/$variant" \
    --experiment.model.vocabulary_size=4096 \
    --experiment.optimizer.learning_rate=4e-3 \
    --experiment.optimizer.warmup_steps=10 \
    --experiment.train.batch_size=16 \
    --experiment.train.num_steps="$steps" \
    --experiment.train.eval_every="$steps" \
    --experiment.train.eval_rows=4 \
    --experiment.data.max_characters_per_domain=150000
  "$python" -m edl_jax.tasks --workdir="$out/$variant" \
    --documents="$documents" --tasks="$files"
done
"$python" -m docs.study.tasks --runs="$out/baseline,$out/fine"
