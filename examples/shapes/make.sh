#!/usr/bin/env bash
# Everything of the shapes world from nothing: pre-training, three tasks, the bundled weights. It may be stopped at any
# time and started again. About three hours on two cores. An argument: the folder for data and runs (default: shapes).
set -euo pipefail
here=$(dirname "$0")
folder=${1:-shapes}
# Weights that unpack.py put there are kept.
[ -f "$folder/sd/sd.safetensors" ] || python "$here/pretrain.py" --data "$folder/data" --output "$folder/sd"
python "$here/finetune.py" --data "$folder/data" --weights "$folder/sd" --output "$folder/runs"
python "$here/pack.py" --data "$folder/data" --weights "$folder/sd" --runs "$folder/runs"
