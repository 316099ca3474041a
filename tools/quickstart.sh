#!/usr/bin/env bash
# Sets up, builds (but in an unpacked archive), and runs the embedded default on the CPU: a tiny base learns written chains of thought from
# scratch, a KaVa student learns to think the same in 14 latents, and both stand beside a model that answers at once. Run again, it goes on
# where it was stopped.
# Usage: tools/quickstart.sh [--seed N] [--equal-compute] [--out DIR]
#   --equal-compute   also train the answer-at-once model for as much compute as the KaVa student got (some three minutes more)
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

seed=42 equal=no out=runs/quickstart
while [ $# -gt 0 ]; do
  case $1 in
    --seed) [ $# -ge 2 ] || { echo "error: --seed: no value; give a whole number" >&2; exit 2; }; seed=$2; shift 2 ;;
    --out) [ $# -ge 2 ] || { echo "error: --out: no value; give a folder" >&2; exit 2; }; out=$2; case $out in /*) ;; *) out=$here/$out ;; esac; shift 2 ;;
    --equal-compute) equal=yes; shift ;;
    -h | --help) sed -n '2,6p' "$0" | sed 's/^# //'; exit 0 ;;
    *) echo "error: $1: unknown option; see tools/quickstart.sh --help" >&2; exit 2 ;;
  esac
done

bin=$PWD/bin
if [ ! -x "$bin/kava_train" ]; then
  tools/setup.sh
  echo "building the programs: minutes, once"
  cmake --preset cpu -DKAVA_TESTS=OFF >/dev/null
  cmake --build --preset cpu -j "$(tools/jobs.sh)"
  bin=build/cpu/bin
fi
started=$(date +%s)
say() { printf '\n== %s\n' "$*"; }

say "1. data: word problems on a dial of ten, made from seed $seed"
"$bin"/kava_data synth --out "$out/data" --seed "$seed"
"$bin"/kava_data check "$out/data/test.txt" --against "$out/data/train.txt" --modulo 10

# train NAME CONFIG [kava_train's options]
train() {
  local name=$1 config=$2
  shift 2
  local resume=()
  [ -e "$out/$name/config.toml" ] && resume=(--resume)
  "$bin"/kava_train "configs/$config" --out "$out/$name" --set seed="$seed" --set data.valid="$out/data/valid.txt" "${resume[@]}" "$@"
}
say "2. the base: written chains of thought, from scratch"
train base quickstart_base.toml --set model.path="$out/data/model" --set data.train="[\"$out/data/base.txt\"]"
student=(--set model.path="$out/base/adapter" --set data.train="[\"$out/data/train.txt\"]")
say "3. the KaVa student: 14 latents in 4 passes instead of a written chain"
train kava quickstart.toml "${student[@]}"
say "4. for comparison: as many updates without any thinking"
train no_cot quickstart_no_cot.toml "${student[@]}"
if [ "$equal" = yes ]; then
  say "5. for comparison: as much compute without any thinking"
  train no_cot_equal_compute quickstart_no_cot.toml "${student[@]}" --set train.max_steps=4872 --set train.valid_every=1218 \
    --set train.checkpoint_every=1218
fi

say "2,000 held-out questions that share no trace with training"
row() {
  local name=$1 label=$2
  "$bin"/kava_eval "$out/$name" --data "$out/data/test.txt" --out "$out/$name.json" --force |
    awk -v label="$label" '$1 == "test.txt" { printf "%-30s %8s %% %9s %10s %12s\n", label, $3, $8, $(NF - 1), $NF }'
}
printf '%-30s %10s %9s %10s %12s\n' '' 'accuracy' 'passes' 'ms alone' 'ms batched'
row base 'full chain of thought'
row no_cot 'no chain, equal updates'
[ "$equal" = yes ] && row no_cot_equal_compute 'no chain, equal compute'
row kava 'KaVa, 14 latents'
cat <<'END'
passes: runs through the model for one answer. ms: for one question, decoded
alone, and in batches of 128. Alone, fewer passes are less time. In batches a
CPU's time goes by rows: the 4 passes over 14 latents are more rows than the
chain that they stand for, so that 7 passes may cost as much as 27.
END

say "one question, answered with its latents decoded"
question=$(head -n 1 "$out/data/test.txt")
gold=${question##*#### }
printf '%s\n' "${question%%||*}"
printf 'the written chain would be: %s\n' "${question#*||}"
said=$("$bin"/kava_generate "$out/kava" "${question%%||*}" --latents && echo .)
said=${said%$'\n.'}  # an answer may be empty
[ "${said##*$'\n'}" = "$gold" ] && verdict=right || verdict="wrong: it is $gold"
printf '%s\nanswer: %s (%s)\n' "${said%$'\n'*}" "${said##*$'\n'}" "$verdict"
cat <<'END'
The model knows this task alone: a start from 0 to 9 and three steps, each
"N more than" or "N fewer than" (N from 1 to 9), "3 times" or "7 times",
modulo 10, in these words. Of anything else its answers mean nothing.
END

say "done in $(($(date +%s) - started)) s after the build"
printf 'runs: %s/{base,kava,no_cot}   results: %s/*.json   losses: %s/kava/metrics.jsonl\n' "$out" "$out" "$out"
another=$(sed -n 2p "$out/data/test.txt")
printf 'next:\n'
printf '  %q/kava_generate %q "%s" --latents\n' "$bin" "$out/kava" "${another%%||*}"
printf '  %q/kava_eval compare %q %q\n' "$bin" "$out/kava.json" "$out/no_cot.json"
printf '  %q/kava_report %q %q --out %q\n' "$bin" "$out/base" "$out/kava" "$out/report.html"
