#!/bin/sh
# Checks and times edl_jax on one NVIDIA GPU, without the network:
#
#   sh benchmarks/gpu.sh WHEELS [arguments of benchmarks.gpu]
#
# WHEELS is a folder of wheels of requirements.txt and "jax[cuda13]"; its jax may
# be newer than the one that requirements.txt names. With - in its place the
# script uses the python3 on the PATH as it is. Without a GPU, the same on a CPU:
#
#   sh benchmarks/gpu.sh - --experiment=experiments/tiny.py \
#     --rows=4 --length=64 --rounds=2 --product=256
set -eu
cd "$(dirname "$0")/.."
wheels=${1:?name the folder of wheels, or - for python3 as it is}
shift
python=python3
if [ "$wheels" != - ]; then
  python3 -m venv .venv-gpu
  python=.venv-gpu/bin/python
  # Names without versions: the folder decides.
  sed -e 's/#.*//' -e 's/;.*//' -e 's/==.*//' -e '/^jaxlib/d' \
    -e 's/^jax$/jax[cuda13]/' requirements.txt | sort -u >.venv-gpu/names.txt
  "$python" -m pip install --quiet --no-index --find-links="$wheels" \
    -r .venv-gpu/names.txt
fi
"$python" -m benchmarks.gpu --json=gpu.json "$@"
