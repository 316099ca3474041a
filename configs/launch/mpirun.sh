#!/bin/sh
# A training run on N CPU ranks of this machine: configs/launch/mpirun.sh N CONFIG.toml RUN [option...]
#
# To stop it with a checkpoint send SIGUSR1 to mpirun, which passes it on and ends with the ranks' 75. SIGTERM leaves them one second.
# Without --bind-to none each of one or two ranks is bound to one core, whatever --threads says.
set -e
n=$1 config=$2 run=$3
shift 3
threads=$(($(nproc) / n))
[ "$threads" -ge 1 ] || threads=1
if [ -e "$run" ]; then set -- --resume "$@"; fi
exec mpirun --oversubscribe --bind-to none -n "$n" kava_train "$config" --device cpu --threads "$threads" --out "$run" "$@"
