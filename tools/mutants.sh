#!/usr/bin/env bash
# Breaks the CUDA kernels in one place at a time and sees whether the tests notice: every barrier deleted, every wait for copies one group
# short, every guard of a tail deleted, every bound one too far, every mask and every rescaling left out. A mutant is caught where a test
# fails, crashes or hangs. Those that change no result stand in tests/kernels/mutants.txt with the reason. Compiles beside a build that is
# there and links its tests anew.
# Usage: tools/mutants.sh [--all | --sample N] [--seed S] [--build DIR] [FILE...]
#        of kernels/ or of FILE...; 10 of them, of build/emulated, where nothing is said
# Prints a line for each mutant and `caught N/N`; ends with 1 where one survived for which no reason is given.
set -euo pipefail
cd "$(dirname "$0")/.."

sample=10 seed=1 build=build/emulated files=()
while [ $# -gt 0 ]; do
  case $1 in
    --all) sample=0; shift ;;
    --sample) sample=${2:?--sample names no number}; shift 2 ;;
    --seed) seed=${2:?--seed names no number}; shift 2 ;;
    --build) build=${2:?--build names no folder}; shift 2 ;;
    -*) sed -n '2,/^set/ { /^set/d; s/^# \{0,1\}//; p }' "$0" >&2; exit 2 ;;
    *) files+=("$1"); shift ;;
  esac
done
[ ${#files[@]} -gt 0 ] || files=(kernels/*.cu kernels/attention.h kernels/chunks.h kernels/tile.h)
[ -x "$build/bin/kava_tests" ] || { echo "mutants: build kava_tests in $build first" >&2; exit 2; }
tree=$PWD/$build/mutants

# NAME~PATTERN~REPLACEMENT, as sed takes them: each place of each line is a mutant.
rules=(
  'barrier~__syncthreads();~;'
  'wait~cp_async_wait<\([^>]*\)>~cp_async_wait<\1 + 1>'
  'guard~if (\(.*\)) \(return\|continue\|break\);~if (false) \2;'
  'bound~ < ~ <= '
  'bound~ >= ~ > '
  'mask~ &= ~ |= '
  'rescale~ \*= shrink~ *= 1'
  'rescale~ \* shrink~'
)

# What tests a file, as Catch2 reads it.
tests_of() {
  case $(basename "$1" | sed 's/\..*//') in
    gemm) echo '[#test_linear],"product kernels*","a large product*"' ;;
    attention*) echo '[#test_attention],"attention kernels*"' ;;
    tile) echo '[#test_linear],"product kernels*",[#test_attention],"attention kernels*"' ;;
    chunks) echo '[#test_rows],[#test_norm],[#test_activation],[#test_head],[#test_distill],[#test_rope],[#test_optim]' ;;
    *) echo "[#test_$(basename "$1" .cu)]" ;;
  esac
}

# The command of a build's target, without what ninja writes beside it.
command_of() { ninja -C "$build" -t commands "$1" | tail -n 1; }
compile() { # SOURCE OBJECT
  local command
  command=$(command_of "tests/simt/CMakeFiles/kava_simt.dir/__/__/kernels/$(basename "$1").o")
  command=${command/ -I/ -I$tree -I}
  command=${command%% -MD *}
  (cd "$build" && eval "$command -w -o $2 -c $1")
}
# The tests with objects that stand before the library's own.
link_tests() { # PROGRAM OBJECT...
  local command program=$1
  shift
  command=$(command_of bin/kava_tests)
  command=${command/ -o bin\/kava_tests/ -o $program}
  command=${command/ tests\/simt\/libkava_simt.a/ $* tests\/simt\/libkava_simt.a}
  command=${command%% && cd *}
  command=${command%% && :*}
  (cd "$build" && eval "$command")
}

# FILE:LINE RULE OCCURRENCE of every mutant; not of declarations, nor of loops over as many as the compiler knows.
never='^[0-9]+: *(//|#|template|static_assert|constexpr|inline |\* )|throw|operator|for \(.* < (k[A-Z][A-Za-z]*|[0-9]+)[^(.]*; (\+\+|[a-z]+ [+*]=)'
list() {
  local file i pattern line text n
  for file in "${files[@]}"; do
    for i in "${!rules[@]}"; do
      pattern=${rules[i]#*~} pattern=${pattern%~*}
      while IFS=: read -r line text; do
        for ((n = 1; n <= $(grep -o -- "$pattern" <<<"$text" | wc -l); ++n)); do echo "$file:$line $i $n"; done
      done < <(grep -n -- "$pattern" "$file" | grep -vE "$never" || true)
    done
  done
}
mapfile -t all < <(list)
if [ "$sample" -gt 0 ]; then
  mapfile -t all < <(printf '%s\n' "${all[@]}" | shuf -n "$sample" --random-source=<(yes "$seed") | sort -V)
fi

caught=0 proven=0 survived=0 invalid=0
for mutant in "${all[@]}"; do
  read -r place i n <<<"$mutant"
  file=${place%:*} line=${place##*:} name=${rules[i]%%~*} change=${rules[i]#*~}
  replacement=${change##*~} pattern=${change%~*}
  rm -rf "$tree" && mkdir -p "$tree" && cp -r kernels "$tree/"
  sed -i "${line}s@$pattern@$replacement@$n" "$tree/$file"
  was=$(sed -n "${line}{s/^ *//;p}" "$file")
  users=("$file")
  case $file in
    */tile.h) users=(kernels/gemm.cu kernels/attention_fwd.cu kernels/attention_bwd.cu) ;;
    *.h) mapfile -t users < <(grep -l "$file" kernels/*.cu) ;;
  esac
  objects=() ok=yes
  for user in "${users[@]}"; do
    compile "$tree/$user" "$tree/$(basename "$user").o" >"$tree/log" 2>&1 || { ok=no; break; }
    objects+=("$tree/$(basename "$user").o")
  done
  if [ $ok = no ]; then
    invalid=$((invalid + 1))
    echo "no program   $place $name $n: $was"
    continue
  fi
  link_tests "$tree/tests" "${objects[@]}" >"$tree/log" 2>&1 || { cat "$tree/log" >&2; exit 1; }
  if timeout 600 "$tree/tests" --filenames-as-tags "$(tests_of "$file")" -a >"$tree/log" 2>&1; then
    if grep -qF "$file: $name $n: $was -- " tests/kernels/mutants.txt; then
      proven=$((proven + 1))
      echo "harmless     $place $name $n: $was"
    else
      survived=$((survived + 1))
      echo "SURVIVED     $place $name $n: $was"
    fi
  else
    caught=$((caught + 1))
    echo "caught       $place $name $n: $was"
  fi
done
rm -rf "$tree"
echo "caught $caught/$((caught + survived)); harmless by reason $proven, no program $invalid, of ${#all[@]}"
[ $survived = 0 ]
