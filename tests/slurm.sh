#!/usr/bin/env bash
# A Slurm of one host, made in a temporary folder by Debian's slurm-wlm, and what the documents promise below it: ranks by srun give one
# rank's bytes, a job that is cut short is queued again and ends with the same bytes, and an array job of replicate gives the tables that
# one process gives. Needs root. The last line is a summary; exit 0, 1, or 4 (skipped) where Slurm or root is missing.
# Usage: tests/slurm.sh [BIN]          (build/cpu/bin)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
bin=$(realpath "${1:-build/cpu/bin}")
for tool in slurmctld slurmd srun sbatch scontrol; do
  command -v "$tool" >/dev/null || { echo "skipped: no $tool here (Debian: slurm-wlm)"; exit 4; }
done
[ "$(id -u)" = 0 ] || { echo "skipped: slurmd needs root"; exit 4; }

work=$(mktemp -d)
daemons=()
finish() {
  scancel --user=root --signal=KILL 2>/dev/null || true
  for _ in $(seq 20); do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 0.5; done
  [ ${#daemons[@]} -eq 0 ] || kill "${daemons[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
host=$(hostname -s)
port=$((20000 + 2 * ($$ % 5000)))
mkdir -p "$work/state" "$work/spool"
cat >"$work/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
SlurmdParameters=config_overrides
ReturnToService=2
RequeueExit=75
KillWait=30
MinJobAge=3000
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=1000
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$work/slurm.conf
slurmctld -D -f "$work/slurm.conf" >"$work/ctld.out" 2>&1 &
daemons+=($!)
slurmd -D -f "$work/slurm.conf" -N "$host" >"$work/slurmd.out" 2>&1 &
daemons+=($!)
for _ in $(seq 60); do
  sinfo -h -o %T 2>/dev/null | grep -q idle && break
  sleep 0.5
done
sinfo -h -o %T 2>/dev/null | grep -q idle || { tail -n 20 "$work"/*.log "$work"/*.out >&2; echo "slurm: no idle node"; exit 1; }

failures=0
fault() { echo "slurm: $*" >&2; failures=$((failures + 1)); }
# What a run trained.
sums() { (cd "$1/adapter" && sha256sum ./*.safetensors) }
# Waits until no job is queued or running.
idle() {
  for _ in $(seq 600); do
    [ -z "$(squeue -h -o %i)" ] && return
    sleep 0.5
  done
  fault "jobs do not end"
  squeue >&2
}

"$bin/kava_data" synth --out "$work/data" --rows 400 --seed 42 >/dev/null
cat >"$work/c.toml" <<CONF
include = "$root/configs/quickstart.toml"
[model]
path = "$work/data/model"
init = "random"
[data]
train = ["$work/data/train.txt"]
valid = ""
[train]
max_steps = 30
batch = 16
micro_batch = 4
checkpoint_every = 10
log_every = 1
CONF

"$bin/kava_train" "$work/c.toml" --out "$work/one" --threads 1 --device cpu >"$work/one.log" 2>&1
srun -K1 --mpi=pmix -n 2 "$bin/kava_train" "$work/c.toml" --out "$work/two" --threads 1 --device cpu >"$work/two.log" 2>&1 || fault "srun ended with $?: $(tail -n 1 "$work/two.log")"
[ "$(sums "$work/one")" = "$(sums "$work/two")" ] || fault "two ranks below srun trained other bytes than one"
echo "slurm: two ranks by srun equal one"

# Without srun, below sbatch with two tasks: one rank, and the line that says so.
sbatch --wait -n 2 -o "$work/alone.log" --wrap "'$bin/kava_train' '$work/c.toml' --out '$work/alone' --threads 1 --device cpu" >/dev/null || fault "sbatch without srun failed: $(tail -n 1 "$work/alone.log")"
grep -q "start it by srun" "$work/alone.log" || fault "no line says how to start ranks below sbatch"
[ "$(sums "$work/one")" = "$(sums "$work/alone")" ] || fault "one rank below sbatch trained other bytes"
echo "slurm: one rank below sbatch, with the line on srun"

# A job whose step is told to stop writes a checkpoint, ends with 75, is queued again and goes on.
sed "s|--device cuda --threads \"\$SLURM_CPUS_PER_TASK\"|--device cpu --threads 1 --set train.max_steps=200|; /gpus-per-node/d; s|--ntasks-per-node=8|--ntasks-per-node=2|; s|--nodes=2|--nodes=1|; s|srun -K1|srun -K1 --mpi=pmix|; s|cpus-per-task=8|cpus-per-task=1|" configs/launch/slurm.sbatch >"$work/job.sbatch"
"$bin/kava_train" "$work/c.toml" --out "$work/long" --threads 1 --device cpu --set train.max_steps=200 >"$work/long.log" 2>&1
job=$(PATH=$bin:$PATH sbatch --parsable -o "$work/job.log" "$work/job.sbatch" "$work/c.toml" "$work/requeued")
for _ in $(seq 240); do
  [ -e "$work/requeued/checkpoints/step_10" ] && break
  sleep 0.25
done
scancel --signal=USR1 --full "$job"
idle
restarts=$(scontrol show job "$job" | grep -o 'Restarts=[0-9]*')
[ "$restarts" = Restarts=1 ] || fault "the job was not queued again once: $restarts; $(tail -n 2 "$work/job.log")"
[ "$(sums "$work/long")" = "$(sums "$work/requeued")" ] || fault "the job that was queued again trained other bytes"
echo "slurm: a job told to stop was queued again and ends with the same bytes"

"$bin/replicate" configs/tables/tiny_smoke.toml --out "$work/here" --device cpu >"$work/here.log" 2>&1 || fault "replicate ended with $?"
array="$work/an array, 50%a"  # what sbatch could take apart, or for a pattern
"$bin/replicate" configs/tables/tiny_smoke.toml --out "$array" --device cpu --keep all --slurm >"$work/array.log" 2>&1 || fault "replicate --slurm ended with $?: $(tail -n 1 "$work/array.log")"
job=$(sed -n 's/.*batch job //p' "$work/array.log")
for _ in $(seq 240); do
  [ -e "$array/runs/full_cot/42/checkpoints/step_10" ] && break
  sleep 0.1
done
scancel --signal=USR1 --batch "${job}_0"  # as before its time is over
idle
restarts=$(scontrol show job "${job}_0" | grep -o 'Restarts=[0-9]*')
[ "$restarts" = Restarts=1 ] || fault "task 0 was not queued again once: $restarts"
grep -q '"attempts": 2' "$array/state/full_cot.42.train.json" || fault "task 0 was not told to stop in its training"
for table in table.json table.md table.tex table.csv; do
  cmp -s "$work/here/$table" "$array/$table" || fault "$table of the array job differs, or is not there: $(tail -n 2 "$array"/slurm_*.log 2>/dev/null | tr '\n' ' ')"
done
for task in 0 1; do
  [ -s "$(find "$array" -maxdepth 1 -name "slurm_*_$task.log")" ] || fault "task $task has no log in the folder"
done
[ "$(find "$array/runs/kava/42/checkpoints" -mindepth 1 -maxdepth 1 -name 'step_*' | wc -l)" -gt 1 ] || fault "the tasks were not told to keep all checkpoints"
echo "slurm: an array job of replicate, one of its tasks queued again, gives the same tables"

echo "slurm: $(slurmctld -V), $failures faults"
[ "$failures" = 0 ]
