#!/usr/bin/env bash
# The runs of the study, in the order in which they matter. Started again, it
# skips what is done and resumes what was stopped. Two runs share the machine,
# each on its own cores; JOBS=1 makes one at a time.
#
#   python -m data.corpora --mixture=web3 --out=corpora
#   docs/study/run.sh runs/study
set -euo pipefail
out=${1:?usage: run.sh FOLDER}
python=${PYTHON:-python}
jobs=${JOBS:-2}

sweep() {  # QUESTION VARIANT GRIDS...
  local question=$1 variant=$2
  shift 2
  "$python" -m edl_jax.sweep --experiment="experiments/study.py:$variant" \
    --workdir="$out/$question" --jobs="$jobs" "${@/#/--grid=}"
}

carve() {  # QUESTION KEEP: measures its runs with few experts in each layer.
  local folder=$out/$1 runs=() old=$out/$1/carve/carve.json
  for result in "$folder"/*/result.json; do
    runs+=("--workdir=${result%/result.json}")
  done
  # find says something too where there is no carve.json.
  if [[ $(find "$folder"/*/result.json -newer "$old" 2>&1) ]]; then
    "$python" -m edl_jax.analysis.carve "${runs[@]}" --keep="$2" --draws=0 \
      --out="$folder/carve"
  fi
}

# Text whose best loss is known.
files=
for shared in 0.0 0.25 0.5 0.75 1.0; do
  "$python" -m data.markov --out="markov/$shared" --shared="$shared"
  files="$files${files:+,}markov/$shared/text/*.jsonl.gz"
done
sweep truth truth seed=0,1,2 losses.divergence_weight=0,0.01 \
  data.files="$files"
sweep truth_pools truth_pools seed=0,1,2 data.files="$files"
sweep truth_router truth_router seed=0,1,2 data.files="$files"
carve truth 2,4,8
carve truth_pools 2,4,8

for seed in 0 1 2; do
  # Where the load is balanced, against the weight of the divergence loss.
  sweep balance fine losses.balance_scope=sequence,global \
    losses.divergence_weight=0,0.001,0.003,0.01 seed=$seed
  sweep balance_bias fine model.balancing=bias optimizer.bias_rate=0.01 \
    optimizer.bias_schedule=learning_rate \
    losses.divergence_weight=0,0.001,0.003,0.01 seed=$seed
  sweep micro_batches micro_batches losses.balance_scope=global \
    losses.divergence_weight=0,0.001,0.01 seed=$seed
  # What the labels say.
  sweep labels_coarse coarse losses.divergence_weight=0.01 seed=$seed
  sweep labels_hierarchical hierarchical losses.divergence_weight=0.01 \
    seed=$seed
  sweep labels_shuffled shuffled losses.divergence_weight=0.01 seed=$seed
  sweep labels_shuffled_coarse shuffled_coarse losses.divergence_weight=0.01 \
    seed=$seed
  sweep labels_pools pools losses.divergence_weight=0 seed=$seed
  sweep labels_router router losses.divergence_weight=0 seed=$seed
  # What the weight does over the run.
  sweep schedule_warmup fine losses.divergence_weight=0.01 \
    losses.divergence_schedule=warmup seed=$seed
  sweep schedule_decay fine losses.divergence_weight=0.01 \
    losses.divergence_schedule=decay seed=$seed
  # More and finer experts; other sizes.
  for variant in finer layers_{2,3,6,8}; do
    sweep "$variant" "$variant" losses.divergence_weight=0,0.01 seed=$seed
  done
  # The smallest size for longer, and the usual one for less long and longer.
  sweep layers_2_long layers_2 losses.divergence_weight=0,0.01 seed=$seed \
    train.num_steps=400 train.eval_every=400 train.checkpoint_every=400 \
    optimizer.warmup_steps=20
  sweep layers_4_short fine losses.divergence_weight=0,0.01 seed=$seed \
    train.num_steps=120 train.eval_every=120 train.checkpoint_every=120 \
    optimizer.warmup_steps=6
  sweep layers_4_long fine losses.divergence_weight=0,0.01 seed=$seed \
    train.num_steps=1200 train.eval_every=1200 train.checkpoint_every=1200 \
    optimizer.warmup_steps=60
done
for seed in 3 4; do
  sweep balance_seeds fine losses.balance_scope=sequence,global \
    losses.divergence_weight=0,0.001,0.01 seed=$seed
done
# What another rounding of sums does to a run: RERUN=1 on another machine makes
# some runs again. Sizes, micro-batches, finer experts and pools that are trained
# on are of these. On one machine they are the same runs.
if [[ ${RERUN:-} ]]; then
  for seed in 0 1 2; do
    sweep balance_rerun fine losses.balance_scope=sequence,global \
      losses.divergence_weight=0,0.01 seed=$seed
    sweep labels_pools_rerun pools losses.divergence_weight=0 seed=$seed
  done
  carve balance_rerun 4,8
else
  for name in balance labels_pools; do
    [[ -e $out/${name}_rerun ]] || ln -s "$name" "$out/${name}_rerun"
  done
fi
for question in balance balance_{seeds,bias} micro_batches schedule_{warmup,decay} \
  labels_{coarse,hierarchical,shuffled,shuffled_coarse,pools}; do
  carve "$question" 4,8
done
carve finer 16,32
# How far cut models are behind whole ones after training on: six minutes a run.
learned=()
for seed in 0 1 2; do
  for weight in 0 0.01; do
    learned+=("--run=balance_scope=global,divergence_weight=$weight,seed=$seed")
  done
done
"$python" -m docs.study.adapt --sweep="$out/balance" "${learned[@]}"
"$python" -m docs.study.adapt --sweep="$out/labels_pools_rerun"
# The largest size, for a GPU:
#   python -m edl_jax.sweep --experiment=experiments/study.py:large \
#     --workdir=runs/study/large --grid=losses.divergence_weight=0,0.01

# Post-training: a model that has seen no mathematics, taken out and in again,
# on worked problems.
base=$out/post_training_base
"$python" -m data.problems --out=problems
sweep post_training_base post_training_base seed=0
[[ -d $base/hub ]] || "$python" -m edl_jax.interop.export \
  --workdir="$base/seed=0" --out="$base/hub"
[[ -d $base/imported ]] || "$python" -m edl_jax.interop.import_weights \
  --source="$base/hub" --out="$base/imported"

post_train() {  # NAME VARIANT FLAGS...: three seeds from the imported weights.
  local name=$1 variant=$2
  shift 2
  "$python" -m edl_jax.sweep --jobs="$jobs" --grid=seed=0,1,2 \
    --experiment="experiments/aes_post_training.py:$variant,$base/imported" \
    --workdir="$out/post_training_$name" \
    --experiment.name="post_training_$name" \
    --experiment.data.files='problems/*.jsonl.gz' \
    --experiment.optimizer.learning_rate=3e-3 \
    --experiment.train.num_steps=40 --experiment.train.eval_every=40 \
    --experiment.train.checkpoint_every=40 \
    --experiment.train.batch_size=12 --experiment.train.sequence_length=512 "$@"
}

for variant in none orthogonality variance both edl; do
  post_train "$variant" "$variant"
done
post_train both_100 both \
  --experiment.losses.orthogonality_weight=auto:1e-2 \
  --experiment.losses.variance_weight=auto:1e-1
