#!/usr/bin/env bash
# The first minutes on a GPU: is everything right, how fast is it, and how fast is PyTorch on the same work. Runs from an unpacked archive or
# from a built tree; needs no network, no compiler and no data. Each part takes at most 8 minutes:
#   1  doctor, the tests of the cuda backend on this device, every op's among them, compute-sanitizer memcheck of steps and ops
#   2  kava_bench at the shapes of Llama-3.2-1B, the plan, a minute of training at these shapes with random weights, and two ranks whose
#      gradients NCCL sums: on two devices, or on one by NCCL 2.30 or newer (tools/build_nccl.sh); then, as far as the time allows, the whole
#      step and the main ops of kava_bench at the shapes of Qwen2.5-0.5B and Llama-3.2-3B
#   3  the same work in PyTorch, padded and packed (interpreter in KAVA_PYTHON, else python3), beside part 2's figures where DIR has them;
#      compute-sanitizer racecheck
# Writes DIR/gpu_check.json, anew after each part and with the parts of earlier calls by the same build, a log of every check, and
# DIR/clocks.csv, a line a second. Ends with 0 where all is right, 1 where a check failed, 2 for wrong options, 3 without a device. What the
# machine lacks (PyTorch, compute-sanitizer, cuDNN, memory for a whole batch) is skipped and said.
# Usage: tools/gpu_check.sh [--part 1|2|3|all] --out DIR [--bin DIR]
set -uo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
part=all out='' bin=''
usage() { printf 'gpu_check: %s\nusage: gpu_check.sh [--part 1|2|3|all] --out DIR [--bin DIR]\n' "$1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --part) part=${2:-}; shift 2 || usage '--part names no part' ;;
    --out) out=${2:-}; shift 2 || usage '--out names no folder' ;;
    --bin) bin=${2:-}; shift 2 || usage '--bin names no folder' ;;
    *) usage "unknown option $1" ;;
  esac
done
case $part in 1|2|3) parts=$part ;; all) parts='1 2 3' ;; *) usage "--part $part is no part" ;; esac
[ -n "$out" ] || usage '--out DIR is missing'
if [ -z "$bin" ]; then
  for bin in "$root/bin" "$root/build/cuda/bin"; do [ -x "$bin/kava_train" ] && break; done
fi
[ -x "$bin/kava_train" ] || { echo "gpu_check: no programs in $bin" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

case_file=$root/tests/golden/cases/kava_defaults.toml
part_seconds=${GPU_CHECK_SECONDS:-480}  # of a part; less only to try this script
deadline=$part_seconds                  # of the first part, to which what comes before it belongs
# N seconds, or those that are left but for 15, in which what does not end is killed.
within() { local left=$((deadline - SECONDS - 15)); [ "$left" -ge "$1" ] && echo "$1" || echo $((left > 0 ? left : 1)); }
device_of=() watcher=''
if command -v nvidia-smi >/dev/null; then
  # Of the device that is used, where it is named as nvidia-smi knows it.
  used=${CUDA_VISIBLE_DEVICES:-0}
  device_of=(-i "${used%%,*}")
  nvidia-smi "${device_of[@]}" -L >/dev/null 2>&1 || device_of=()
  # Which also keeps the driver's state between the programs, where no daemon does: without one, it may start for a minute.
  nvidia-smi "${device_of[@]}" --format=csv -l 1 >"$out/clocks.csv" 2>&1 \
    --query-gpu=timestamp,index,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active &
  watcher=$!
fi
trap '[ -z "$watcher" ] || kill "$watcher" 2>/dev/null' EXIT
version=$(timeout -k 10 "$(within 120)" "$bin/kava_train" --version) ||
  { echo "gpu_check: $bin/kava_train --version ended with $? (124: not within two minutes)" >&2; exit 1; }
export KAVA_CACHE=$out/cache  # cuBLASLt's algorithms: of no other build, and beside the results
probe() {
  timeout -k 10 "$(within 60)" "$bin/kava_inspect" step "$case_file" --set model.dtype=f32 --device cuda --out "$out/probe.safetensors" \
    >"$out/probe.log" 2>&1
}
probe
probed=$?
# Of an older driver on a data centre's device: the toolkit's compatibility package, where the machine has one.
if [ "$probed" = 3 ] && grep -q 'the driver serves CUDA' "$out/probe.log"; then
  for compat in /usr/local/cuda-13*/compat /usr/local/cuda/compat; do
    [ -e "$compat/libcuda.so.1" ] || continue
    export LD_LIBRARY_PATH=$compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    probe
    probed=$?
    version=$("$bin/kava_train" --version)
    break
  done
fi
if [ "$probed" = 3 ]; then echo "gpu_check: no device: $(sed -n 's/^error: //p' "$out/probe.log" | tail -n 1)" >&2; exit 3; fi

device=$(printf '%s\n' "$version" | sed -n 's/^  cuda\( (emulated)\)\?: //p' | head -n 1)
emulated=false
printf '%s\n' "$version" | grep -q '^  cuda (emulated): ' && emulated=true

export KAVA_TEST_DEVICE=cuda  # tests of ops: on the device, and an error where it does not open

# ---- results
checks='' failed=0 running=''
text() { local s=${1//\\/\\\\}; s=${s//\"/\\\"}; printf '"%s"' "$(printf '%s' "$s" | tr -d '\000-\037')"; }
record() { # NAME ok|failed|skipped SECONDS DETAIL
  checks+="${checks:+,
    }{\"part\": $now, \"name\": $(text "$1"), \"result\": \"$2\", \"seconds\": $3, \"detail\": $(text "$4")}"
  printf '%-8s %s%s\n' "$2" "$1" "${4:+: $4}"
  [ "$2" != failed ] || failed=1
}
last_line() { grep . "$1" 2>/dev/null | tail -n 1; }
no_rival() { last_line "$1" | grep -q '^error: rivals: '; }
no_room() { last_line "$1" | grep -Eq '^error: (device )?memory: '; }
# The first fault that a log tells of: a failed test, but for the one that the end of the time stopped, or what compute-sanitizer found.
first_fault() {
  awk '/^=========.*(Invalid |Uninitialized |Race reported|Barrier error|SUMMARY: [1-9])/ { print; exit }
       /^========= Program hit .*(launch failure|illegal|misaligned)/ { print; exit }
       / FAILED:/ { if (failed != "") { print failed; failed = ""; exit } failed = $0; next }
       failed != "" && /SIGTERM/ { failed = "" }
       failed != "" && (/^-----/ || /^=====/) { print failed; failed = ""; exit }
       END { if (failed != "") print failed }' "$1"
}
# A check: NAME "CODES THAT ARE RIGHT" COMMAND...; its log is DIR/NAME.log, its detail the log's last line that is not empty. What the time
# cuts short counts as skipped, unless its log tells of a fault: with 124 among the codes always, else where less than two minutes were
# left. With `memory` among them 3 for want of memory is skipped too. most: seconds that it may take, where that is less than is left.
check() {
  local name=$1 right=$2 begin=$SECONDS left code fault=''
  shift 2
  left=$(within "${most:-$part_seconds}")
  [ "$left" -ge 120 ] || right+=' 124'
  if [ "$left" -le 1 ]; then record "$name" skipped 0 'the minutes of this part are over'; return; fi
  timeout -k 15 "$left" "$@" >"$out/$name.log" 2>&1 &
  running=$!
  wait "$running"
  code=$?
  running=''
  if [ "$code" = 137 ] && [ $((SECONDS - begin)) -ge "$left" ]; then code=124; fi  # killed as it did not end
  [ "$code" != 124 ] || fault=$(first_fault "$out/$name.log")
  if [ -n "$fault" ]; then record "$name" failed $((SECONDS - begin)) "cut short: $fault"; return; fi
  case " $right " in
    *" 124 "*) [ "$code" != 124 ] || { record "$name" skipped $((SECONDS - begin)) "cut short after $left s"; return; } ;;
  esac
  case " $right " in
    *" memory "*)
      if [ "$code" = 3 ] && no_room "$out/$name.log"; then
        record "$name" skipped $((SECONDS - begin)) "$(last_line "$out/$name.log")"
        return
      fi ;;
  esac
  if [ "$code" = 3 ] && no_rival "$out/$name.log"; then code=rivals; fi
  case " $right " in
    *" $code "*) record "$name" ok $((SECONDS - begin)) "$(last_line "$out/$name.log")" ;;
    *) record "$name" failed $((SECONDS - begin)) "exit $code: $(last_line "$out/$name.log")" ;;
  esac
}
sanitizer() { # NAME TOOL steps|ops
  local dtype
  if $emulated; then record "$1" skipped 0 'the device is emulated'; return; fi
  [ -n "$compute_sanitizer" ] || return
  # The calls of the runtime are checked by the programs: the driver's probes for functions that it lacks are no faults. Races are searched
  # for in the own kernels alone: those of cuBLASLt synchronise by means of which racecheck knows too little. So are accesses of steps, whose
  # arena is pieces of mapped memory: memcheck takes bulk copies across two of them for faults (PyTorch, issue 196209).
  local command=("$compute_sanitizer" --tool "$2" --error-exitcode 9)
  [ "$2" != memcheck ] || command+=(--report-api-errors no)
  [ "$2 $3" = 'memcheck ops' ] || command+=(--kernel-name kns=kava)
  case $3 in
    steps)
      for dtype in f32 bf16; do
        check "$1_$dtype" '0 124' "${command[@]}" "$bin/kava_inspect" step "$case_file" --set "model.dtype=$dtype" --device cuda \
          --out "$out/step.safetensors"
      done ;;
    ops) [ ! -x "$bin/kava_tests" ] || check "$1_ops" '0 124' "${command[@]}" "$bin/kava_tests" '[ops]' ;;
  esac
}

# ---- a model of random weights at the shapes of Llama-3.2-1B, and rows of ids with the lengths of GSM8k-AUG
make_work() {
  local layers=16 hidden=2048 mlp=8192 heads=32 kv=8 vocab=128256 rows=1024
  batch=128 steps=100000 hours=0.0167
  if $emulated; then layers=2 hidden=64 mlp=160 heads=4 kv=2 vocab=300 rows=16 batch=4 steps=3 hours=0; fi
  mkdir -p "$out/model"
  cat >"$out/model/config.json" <<EOF
{"model_type": "llama", "hidden_size": $hidden, "intermediate_size": $mlp, "num_hidden_layers": $layers, "num_attention_heads": $heads,
 "num_key_value_heads": $kv, "head_dim": $((hidden / heads)), "vocab_size": $vocab, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
 "tie_word_embeddings": true, "hidden_act": "silu", "max_position_embeddings": 131072, "eos_token_id": 2}
EOF
  local state=12345 i lengths=''
  words() { local all; read -ra all <<<"$1"; echo "${#all[@]}"; }
  draw() { state=$(((state * 1103515245 + 12345) & 0x7fffffff)); drawn=$((state >> 8)); }
  ids() { local n=$1 j; list=''; for ((j = 0; j < n; ++j)); do draw; list+="${list:+, }$((3 + drawn % (vocab - 3)))"; done; }
  for ((i = 0; i < rows; ++i)); do
    draw; ids $((30 + drawn % 32)); local question=$list
    draw; local written=$((drawn % 10)) trace=''
    case $written in 0) ;; 1|2|3|4|5) ids 8; trace=$list ;; 6|7) ids 16; trace=$list ;; *) ids 24; trace=$list ;; esac
    draw; ids $((5 + drawn % 2))
    printf '{"question": [%s], "trace": [%s], "answer": [%s, 2], "prompt": 4}\n' "$question" "$trace" "$list"
    lengths+="${lengths:+, }[$(words "$question"), $(words "$trace"), $(($(words "$list") + 1))]"
  done >"$out/rows.jsonl"
  echo "[$lengths]" >"$out/lengths.json"  # the same for PyTorch
  cat >"$out/train.toml" <<EOF
[model]
path = "model"
init = "random"
[data]
train = ["rows.jsonl"]
[train]
batch = $batch
max_steps = $steps
max_hours = $hours
checkpoint_every = 100000
EOF
}
# All values of a key in the lines of a JSON file, the last one, and the one in their middle.
all_of() { grep -o "\"$2\": *[0-9.eE+-]*" "$1" 2>/dev/null | sed 's/.*: *//'; }
last_of() { all_of "$1" "$2" | tail -n 1; }
middle_of() { all_of "$1" "$2" | sort -g | awk '{ at[NR] = $1 } END { if (NR) print at[int((NR + 1) / 2)] }'; }

results=''
result() { results+="${results:+, }\"$1\": ${2:-null}"; }

# What the machine lacks, before the minutes are spent.
python=${KAVA_PYTHON:-python3}
compute_sanitizer=$(PATH=$PATH:${CUDA_PATH:-${CUDA_HOME:-/usr/local/cuda}}/bin command -v compute-sanitizer)
lacks() {
  local why
  $emulated && return
  why=$(grep -h 'own kernels make all' "$out/probe.log" | tail -n 1)
  [ -z "$why" ] || record cublaslt skipped 0 "$why: shares are of the own kernels' rate"
  [ -n "$compute_sanitizer" ] || record compute-sanitizer skipped 0 'it is neither on PATH nor in a toolkit'
  case " $parts " in
    *" 3 "*)
      has_torch || record pytorch skipped 0 "$python has no torch for CUDA, transformers of 4.56 or newer, or peft: $(last_line "$out/python.log")" ;;
  esac
}
has_torch() {
  timeout -k 10 "$(within 120)" "$python" >"$out/python.log" 2>&1 -c '
import peft, torch, transformers.masking_utils
assert tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (4, 56), transformers.__version__
torch.zeros(1, device="cuda")'
}

part_1() {
  check doctor 0 "$bin/kava_inspect" doctor --device cuda --folder "$out"
  # One device: every process would start all of a node's.
  local -x CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
  most=60 sanitizer memcheck memcheck steps
  if [ -x "$bin/kava_tests" ]; then
    most=150 check ops '0 124' "$bin/kava_tests" '[device][ops]'
    # First what trains, resumes and decodes; each golden case starts the device anew.
    check programs '0 124' "$bin/kava_tests" --filenames-as-tags '[device]~[ops]~[#test_golden]'
  else
    record ops skipped 0 'this build has no tests'
  fi
  most=150 sanitizer memcheck memcheck ops
  [ ! -x "$bin/kava_tests" ] || check golden '0 124' "$bin/kava_tests" --durations yes --filenames-as-tags '[device][#test_golden]'
}

# A whole file as the value of a key.
result_file() { [ ! -s "$2" ] || result "$1" "$(cat "$2")"; }
# A / B with four places, empty where one of them is not there.
ratio() { [ -z "$1" ] || [ -z "$2" ] || awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.4f", a / b }'; }

# kava_bench NAME "CODES THAT ARE RIGHT" OPTIONS...: its JSON is DIR/NAME.json, with what was measured before a fault. Where only a rival is
# not there it ends with 3 and says so in its last line.
bench() {
  local name=$1 right=$2
  shift 2
  check "$name" "$right rivals memory" "$bin/kava_bench" --device cuda --json "$out/$name.json" "$@"
  result_file "$name" "$out/$name.json"
  ! no_rival "$out/$name.log" || record "${name}_rivals" skipped 0 "$(last_line "$out/$name.log")"
}

part_2() {
  make_work
  local key shape peak planned fitting all=() some=(--filter '^(step|attention|linear_group|head)')
  $emulated && all=(--filter rope) some=(--filter '^step')
  rm -rf "$out"/bench*.json "$out"/bench*.log "$out/plan.json" "$out/run"
  most=300 bench bench '0 124' "${all[@]}"
  # Where the whole batch does not fit, as many samples a forward as do.
  timeout -k 10 "$(within 60)" "$bin/kava_train" "$out/train.toml" --plan --device cuda --json "$out/plan.json" >"$out/fitting.log" 2>&1
  fitting=$(last_of "$out/plan.json" largest_micro_batch)
  if [ "${fitting:-0}" -gt 0 ] && [ "$fitting" -lt "$batch" ]; then sed -i "s/^batch = .*/&\nmicro_batch = $fitting/" "$out/train.toml"; fi
  check plan 0 "$bin/kava_train" "$out/train.toml" --plan --device cuda --json "$out/plan.json"
  check train '0 75' "$bin/kava_train" "$out/train.toml" --device cuda --out "$out/run"
  # What multiplied for the rate that shares are of.
  result matrix_rate_by "$(grep -o '"by": *"[^"]*"' "$out/bench.json" 2>/dev/null | head -n 1 | sed 's/.*: *//')"
  for key in samples_per_s mfu; do result "$key" "$(middle_of "$out/run/metrics.jsonl" "$key")"; done
  result micro_batch "$fitting"
  result memory_bytes "$(last_of "$out/run/metrics.jsonl" memory_bytes)"
  # Of the device alone; the plan's own words for that stand first.
  planned=$(sed -n '/"device": {/,/}/s/.*"total": *\([0-9]*\).*/\1/p' "$out/plan.json" 2>/dev/null | head -n 1)
  peak=$(last_of "$out/run/metrics.jsonl" device_bytes)
  result plan_bytes "$planned"
  result peak_bytes "$peak"
  result peak_to_plan "$(ratio "$peak" "$planned")"
  rm -rf "$out/run/checkpoints"
  two_ranks
  for shape in qwen05b llama3b; do
    bench "bench_$shape" '0 124' "${some[@]}" --shape "$($emulated && echo tiny || echo "$shape")"
  done
}

# Two ranks of the same run. Where NCCL does not sum their gradients this is skipped, with the reason that rank 0 gives.
two_ranks() {
  local port=$((20000 + $$ % 20000)) why
  cat >"$out/ranks.sh" <<EOF
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=\${NCCL_MAX_CTAS:-8}
$($emulated && echo 'export KAVA_EMULATED_DEVICES=2')
rank() {
  "$bin/kava_train" "$out/train.toml" --set train.max_steps=4 --set train.max_hours=0 --set train.micro_batch=1 --set train.batch=2 --device cuda --comm-timeout 120 \\
    --world-size 2 --rank "\$1" --rendezvous 127.0.0.1:$port --out "$out/ranks"
}
rm -rf "$out/ranks"
rank 1 &
rank 0
code=\$?
wait \$! && exit \$code
EOF
  if [[ ${CUDA_VISIBLE_DEVICES:-} != *,* ]] &&
    [ "$(nvidia-smi "${device_of[@]}" --query-gpu=compute_mode --format=csv,noheader 2>/dev/null)" = Exclusive_Process ]; then
    record ranks skipped 0 'the one device lets one process in (compute mode Exclusive_Process)'
    return
  fi
  check ranks 0 bash "$out/ranks.sh"
  rm -rf "$out/ranks"
  why=$(sed -n 's/^gradients *summed through the host: //p' "$out/ranks.log" 2>/dev/null | head -n 1)
  if [ -n "$why" ]; then record nccl skipped 0 "$why"; return; fi
  why=$(sed -n 's/^gradients *summed by //p' "$out/ranks.log" 2>/dev/null | head -n 1)
  [ -z "$why" ] || record nccl ok 0 "$why"
}

part_3() {
  local form rate bytes reserved options=(--device cuda --shape llama1b --batch 128 --steps 20)
  [ ! -s "$out/lengths.json" ] || options+=(--lengths "$out/lengths.json")
  if $emulated; then record pytorch skipped 0 'the device is emulated'
  elif has_torch; then
    for form in padded packed; do
      [ $form = padded ] || options+=(--packed)
      most=170 check "pytorch_$form" '0 124' "$python" "$root/benchmarks/torch_reference.py" "${options[@]}"
      rate=$(grep -o '[0-9.]* samples/s' "$out/pytorch_$form.log" 2>/dev/null | tail -n 1 | sed 's/ .*//')
      bytes=$(grep -o '[0-9]* bytes at most' "$out/pytorch_$form.log" 2>/dev/null | tail -n 1 | sed 's/ .*//')
      result "pytorch_${form}_samples_per_s" "$rate"
      result "pytorch_${form}_bytes" "$bytes"
      reserved=$(grep -o '[0-9]* bytes reserved' "$out/pytorch_$form.log" 2>/dev/null | tail -n 1 | sed 's/ .*//')
      result "pytorch_${form}_reserved_bytes" "$reserved"
      result "pytorch_${form}_batch" "$(sed -n 's/^\(padded\|packed\), .* \([0-9]*\) samples, .*/\2/p' "$out/pytorch_$form.log" 2>/dev/null | tail -n 1)"
      result "speed_to_pytorch_$form" "$(ratio "$(middle_of "$out/run/metrics.jsonl" samples_per_s)" "$rate")"
      result "memory_to_pytorch_$form" "$(ratio "$(last_of "$out/run/metrics.jsonl" device_bytes)" "$reserved")"
    done
  fi
  sanitizer racecheck racecheck steps
  sanitizer racecheck racecheck ops
}

clock_lines() { if [ -n "$watcher" ]; then wc -l <"$out/clocks.csv"; else echo 0; fi; }
# The least, the middle and the highest of the multiprocessors' clocks in this part, and why they were held down (0x1: idle).
clocks_since() {
  [ -n "$watcher" ] || return 0
  result "part_${now}_clocks" "$(tail -n +$(($1 + 1)) "$out/clocks.csv" | awk -F', *' '$3 + 0 > 0 { print $3 + 0, $NF }' | sort -n | awk '
    { at[NR] = $1; if ($2 !~ /^0x0*$/ && !seen[$2]++) why = why (why == "" ? "" : ", ") "\"" $2 "\"" }
    END { if (NR) printf "{\"sm_mhz\": [%d, %d, %d], \"reasons\": [%s]}", at[1], at[int((NR + 1) / 2)], at[NR], why }')"
}
# What parts of this build have found so far, of this call and of earlier ones: DIR/part_N holds a build, results and checks.
build="$(printf '%s\n' "$version" | head -n 1) on $device"
write_json() {
  local n all_results='' all_checks='' of
  printf '%s\n%s\n%s\n' "$build" "${results//$'\n'/ }" "${checks//$'\n'/ }" >"$out/part_$now"
  for n in 1 2 3; do
    [ -s "$out/part_$n" ] || continue
    mapfile -t of <"$out/part_$n"
    [ "${of[0]}" = "$build" ] || continue
    all_results+="${all_results:+${of[1]:+, }}${of[1]}"
    all_checks+="${all_checks:+${of[2]:+,
    }}${of[2]}"
  done
  cat >"$out/gpu_check.json" <<EOF
{
  "date": "$(date -u +%Y-%m-%dT%H:%M:%SZ)",
  "version": $(text "${build% on *}"),
  "commit": $(text "$(printf '%s' "$build" | sed -n 's/.*(commit \([^)]*\)).*/\1/p')"),
  "device": $(text "$device"),
  "emulated": $emulated,
  "clocks": $(text "${clocks:-}"),
  "results": {$all_results},
  "checks": [
    $all_checks
  ]
}
EOF
}

clocks=''
if [ -n "$watcher" ]; then
  clocks=$(nvidia-smi "${device_of[@]}" --format=csv,noheader \
    --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu 2>/dev/null | head -n 1)
fi
trap '[ -z "$running" ] || kill "$running" 2>/dev/null; record interrupted failed 0 "by a signal"; write_json; exit 130' INT TERM
for now in $parts; do
  results='' checks='' first_line=$(clock_lines)
  echo "part $now"
  [ "$now" != "${parts%% *}" ] || lacks
  [ "$probed" = 0 ] || record first_step failed 0 "exit $probed: $(last_line "$out/probe.log")"
  case $now in 1) part_1 ;; 2) part_2 ;; 3) part_3 ;; esac
  clocks_since "$first_line"
  write_json
  deadline=$((SECONDS + part_seconds))
done
echo "gpu_check: $([ $failed = 0 ] && echo 'all that ran is right' || echo 'something failed'): $out/gpu_check.json"
exit $failed
