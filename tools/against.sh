#!/usr/bin/env bash
# Times the programs of this tree against those of another, older one, in alternation, and prints the ratio of the shortest times: the start
# of a run and its first step, an evaluation, and the quickstart. Both trees are built (preset cpu). Needs python3.
# Usage: tools/against.sh OLD_TREE --model DIR --train FILE --test FILE [--rounds N] [--threads N] [--limit N] [--dtype bf16|f32]
#                         [--only start|eval|quickstart]
#   --model   a model's folder, as SmolLM2-135M's; --train and --test: data files for configs/smollm2_135m_aug.toml and for kava_eval
#   --limit   the first N questions of --test (default: all)
#   --only    one of the three comparisons; quickstart alone needs no model and no data
# The run that is evaluated is trained for two steps by the old tree. Ends with 1 where f32 answers differ.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."
usage() { printf 'against: %s\n' "$1" >&2; sed -n '4,5p' "$0" | sed 's/^# //' >&2; exit 2; }

case ${1:--} in -*) usage 'no OLD_TREE' ;; esac
old=$1 rounds=3 threads=$(nproc) model='' train='' test='' limit='' dtype=f32 only='start eval quickstart'
shift
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage "$1 has no value"
  case $1 in
    --model) model=$2 ;; --train) train=$2 ;; --test) test=$2 ;; --rounds) rounds=$2 ;; --threads) threads=$2 ;;
    --limit) limit=$2 ;; --dtype) dtype=$2 ;; --only) only=$2 ;;
    *) usage "unknown option $1" ;;
  esac
  shift 2
done
case $only in
  quickstart) ;;
  start | eval | 'start eval quickstart')
    [ -d "$model" ] || usage '--model names no folder'
    [ -f "$train" ] || usage '--train names no file'
    [ -f "$test" ] || usage '--test names no file'
    model=$(realpath "$model") train=$(realpath "$train") test=$(realpath "$test") ;;
  *) usage "--only $only is no comparison" ;;
esac
for tree in "$old" .; do [ -x "$tree/build/cpu/bin/kava_train" ] || usage "no programs in $tree/build/cpu/bin"; done
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

# The configuration with paths of here; log_every shows each step.
run_of() { # TREE FOLDER STEPS
  "$1/build/cpu/bin/kava_train" "$1/configs/smollm2_135m_aug.toml" --out "$2" --threads "$threads" --set model.path="$model" \
    --set data.train="[\"$train\"]" --set train.max_steps="$3" --set train.log_every=1 --set model.dtype="$dtype"
}
# Seconds from exec to the line of each step, one a line.
step_times() { # TREE
  rm -rf "$work/run"
  local begin=$EPOCHREALTIME line
  run_of "$1" "$work/run" 4 2>&1 | while IFS= read -r line; do
    case $line in 'step '[0-9]*/*) awk -v a="$begin" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f\n", b - a }' ;; esac
  done
}
ratio() { # NAME OLD_FILE NEW_FILE UNIT: the least of each file
  awk -v name="$1" -v unit="$4" 'FNR == 1 { ++file } { if (!(file in least) || $1 < least[file]) least[file] = $1 }
    END { printf "%-34s old %10.3f %s   new %10.3f %s   ratio %.3f\n", name, least[1], unit, least[2], unit, least[2] / least[1] }' "$2" "$3"
}

compare_start() {
  local round side tree
  for ((round = 0; round < rounds; ++round)); do
    for side in old new; do
      tree=$old; [ "$side" = old ] || tree=.
      step_times "$tree" >"$work/steps"
      sed -n 1p "$work/steps" >>"$work/first.$side"
      # The shortest of the later steps stands for a later one.
      awk 'NR > 1 { d = $1 - last; if (!least || d < least) least = d } { last = $1 } END { print least }' "$work/steps" >>"$work/later.$side"
    done
  done
  ratio 'exec to the end of the first step' "$work/first.old" "$work/first.new" s
  ratio 'a later step' "$work/later.old" "$work/later.new" s
}

compare_eval() {
  local round side tree options=(--threads "$threads" --dtype "$dtype")
  [ -z "$limit" ] || options+=(--limit "$limit")
  run_of "$old" "$work/evaluated" 2 >/dev/null
  for ((round = 0; round < rounds; ++round)); do
    for side in old new; do
      tree=$old; [ "$side" = old ] || tree=.
      rm -rf "$work/$side.json" "$work/evaluated/eval"
      local begin=$EPOCHREALTIME
      "$tree/build/cpu/bin/kava_eval" "$work/evaluated" --data "$test" --out "$work/$side.json" "${options[@]}" >/dev/null
      awk -v a="$begin" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f\n", b - a }' >>"$work/eval.$side"
    done
  done
  ratio "kava_eval, $dtype" "$work/eval.old" "$work/eval.new" s
  python3 - "$work/old.json" "$work/new.json" "$dtype" <<'END'
import json, sys
old, new = ([r["output"] for r in json.load(open(f))["results"][0]["records"]] for f in sys.argv[1:3])
differ = sum(a != b for a, b in zip(old, new)) + abs(len(old) - len(new))
print(f"answers that differ: {differ} of {len(old)}")
sys.exit(differ > 0 and sys.argv[3] == "f32")
END
}

compare_quickstart() {
  local side tree
  for side in old new; do
    tree=$old; [ "$side" = old ] || tree=.
    (cd "$tree" && rm -rf runs/against && tools/quickstart.sh --out runs/against) >"$work/quickstart.$side.log" 2>&1
    grep -E '%|done in' "$work/quickstart.$side.log" | grep -v step | sed "s/^/  $side: /"
    sed -n 's/.*done in \([0-9]*\) s after the build.*/\1/p' "$work/quickstart.$side.log" >"$work/quickstart.$side"
    rm -rf "$tree/runs/against"
  done
  ratio 'tools/quickstart.sh after the build' "$work/quickstart.old" "$work/quickstart.new" s
}

code=0
for comparison in $only; do
  case $comparison in
    start) compare_start ;;
    eval) compare_eval || code=1 ;;
    quickstart) compare_quickstart ;;
  esac
done
exit $code
