#!/usr/bin/env bash
# Trains with the stable recipe (orion_unet/recipes.py) on every visible GPU of the machine, or on the CPU. Any option of
# the trainer may follow and wins:
#
#   ./train_stable_learning.sh --pairs_dir my_cores --epochs 50
#   ./train_stable_learning.sh --config RUN/config.json --output_dir runs/again     all options of an earlier run
#   ./train_stable_learning.sh --demo          make a small generated data set and train on it
#   ./train_stable_learning.sh --help          every option, with the recipe's values as defaults
#
# Worth a try on real H&E, most for scarce markers (docs/transfer.md): a pretrained encoder
#   --encoder timm:tf_efficientnet_lite0 --encoder_weights efficientnet_lite0.safetensors --encoder_train frozen
#
# Several machines: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# NPROC_PER_NODE sets the number of ranks on this machine (default: one per GPU, one on a CPU).
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
# The empty word: a sourced file without arguments of its own would be given this one's.
. scripts/environment.sh ''
root=$PWD
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$called_from"

recipe=(--recipe stable --output_dir runs_sep6v1/orion_stable_learning)
options=()
gpus=auto
with_demo=no
own_folder=no
previous=''
for argument in "$@"; do
  case $argument in
    --demo) with_demo=yes; previous=''; continue ;;
    --output_dir | --output_dir=* | --resume | --resume=*) own_folder=yes ;;
    --gpus=*) gpus=${argument#--gpus=} ;;
    -h | --help) exec "$PYTHON" "$root/train_spatial_orion_unet.py" "$@" ;;
  esac
  if [ "$previous" = --gpus ]; then gpus=$argument; fi
  previous=$argument
  options+=("$argument")
done
if [ "$with_demo" = yes ]; then
  "$PYTHON" -m orion_unet make-demo demo_pairs
  recipe=(--recipe demo)
  # The demo may be tried again and again; a folder that was named is never replaced unasked.
  if [ "$own_folder" = no ]; then recipe+=(--overwrite); fi
fi

# Counting GPUs takes an import of torch: not needed where there is no device.
visible_gpus() {
  if [ -e /dev/nvidia0 ] || [ -e /dev/kfd ] || command -v nvidia-smi >/dev/null 2>&1; then
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
  else
    echo 0
  fi
}
ranks=${NPROC_PER_NODE:-}
if [ -z "$ranks" ]; then
  case $gpus in auto) ranks=$(visible_gpus) ;; *) ranks=$gpus ;; esac
  case $ranks in '' | *[!0-9]* | 0) ranks=1 ;; esac
fi

nodes=${NNODES:-1}
command=("$root/train_spatial_orion_unet.py" "${recipe[@]}" ${options[@]+"${options[@]}"})
# A number of ranks that was asked for is started as such, even one: the trainer alone would take every GPU.
if [ "$nodes" = 1 ] && [ "$ranks" = 1 ] && [ -z "${NPROC_PER_NODE:-}" ]; then
  exec "$PYTHON" "${command[@]}"
fi
where=(--standalone)
if [ "$nodes" != 1 ]; then
  : "${MASTER_ADDR:?set it to the address of the machine with NODE_RANK 0}"
  where=(--nnodes "$nodes" --node_rank "${NODE_RANK:?set it to 0 on the first machine, 1 on the next, and so on}"
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
# torchrun, with the exit code of the rank that failed first.
exec "$PYTHON" -m orion_unet.cli.launch \
  "${where[@]}" --nproc_per_node "$ranks" "${command[@]}"
