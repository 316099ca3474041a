#!/bin/sh
# A training run on the N GPUs of this machine, started by torchrun: configs/launch/torchrun.sh N CONFIG.toml RUN [option...]
#
# To stop it with a checkpoint send SIGTERM or SIGINT to torchrun: it passes them on. SIGUSR1 ends torchrun alone. torchrun turns every
# code of a rank, 75 too, into 1: whether the run is finished, stopped or failed says the ranks' last line.
set -e
n=$1 config=$2 run=$3
shift 3
if [ -e "$run" ]; then set -- --resume "$@"; fi
exec torchrun --standalone --nproc-per-node "$n" --no-python kava_train "$config" --device cuda --out "$run" "$@"
