#!/usr/bin/env bash
# Runs one lane of the checks and prints its seconds: whole, or in the short form that continuous integration runs (.ci/run).
# The whole form leaves its output's end with commit and date in docs/results/checks/LANE.txt.
# Usage: tools/check_all.sh [--short] LANE
#   test      the README's test command; the CUDA kernels must compile; whole: and every shape of plan_peak, 200 rounds of rank_failures
#   emulated  the cuda backend on the kernels' emulator: its kernels, steps and counts, ranks over TCP that fail; whole: every test and
#             count, 200 rounds of rank_links and of rank_failures over TCP, and all parts of gpu_check
#   mutants   the kernels broken in one place at a time, which the tests must notice: ten places of one source drawn by the commit; whole:
#             every place (tools/mutants.py)
#   coverage  every line of kernels/ and of the cuda backend's host code is run by the tests on the emulator (tools/coverage.sh)
#   cuda      nvcc for every target: the backend's module, and what it says without a driver, with an old one and with the link stub
#             (tests/no_gpu.sh); docs/kernels_table.md current and within its budgets; whole: and every program
#   archive   the archive for a node without build tools: packed, below 60 MB, unpacked in a bare Debian and run there up to the missing driver
#   asan      a build by clang without a warning, with AddressSanitizer and UBSan: all but the longest tests; whole: every test and kill -9
#   tsan      ThreadSanitizer over what has threads; whole: every test
#   kill      runs killed at every failpoint and 3 random moments; whole: 1,000 moments and every error
#   slurm     ranks, jobs and replicate below a Slurm of one host (tests/slurm.sh)
#   trackers  export_metrics.py to every tracker, read back by its own reader, in a Python environment made for it from PyPI
#   fuzz      the parsers of strangers' files under the lane asan's build for 60 s of CPU time; whole: 20 minutes each, but for those that
#             docs/results/checks/fuzz_targets.txt has a line of, so that it goes on where it was stopped
#   lint      tools/lint.sh, with clang-tidy over what the last commit changed, where a clone has the one before; whole: over all sources
#   docs      every `sh` block of the documents in the project's folder, but those of `sh norun REASON` and the README's first, which are
#             the other lanes'
# shellcheck disable=SC2317  # the lanes are called by name
set -euo pipefail
cd "$(dirname "$0")/.."

short=no
if [ "${1:-}" = --short ]; then
  short=yes
  shift
fi
lane=${1:-}
[ "$short" = yes ] || export KAVA_SCHEDULES=all  # of the emulator, for every form of every kernel
jobs=$(tools/jobs.sh)
clang=(clang-16 libomp-16-dev libclang-rt-16-dev)  # what the presets asan and tsan build by

build() {  # PRESET [TARGET...]
  local preset=$1
  shift
  cmake --preset "$preset" -Wno-dev
  if [ $# -gt 0 ]; then cmake --build --preset "$preset" -j "$jobs" --target "$@"; else cmake --build --preset "$preset" -j "$jobs"; fi
}

# The tests of a preset, a core's in several parts one after the other, since some take much longer than others: SPEC as Catch2 reads it,
# where [#test_x] is all of tests/*/test_x.cpp. Tells of tests that take 5 s.
tests() {  # PRESET [SPEC...]
  local preset=$1 run=() shards
  shift
  # So few that none of them is without a test.
  shards=$(($("build/$preset/bin/kava_tests" --filenames-as-tags --list-tests --verbosity quiet "$@" | wc -l) / 4))
  [ "$shards" -ge 1 ] || shards=1
  [ "$shards" -le $((6 * jobs)) ] || shards=$((6 * jobs))
  # ThreadSanitizer of Clang 16 knows fewer address layouts than newer kernels draw from.
  if [ "$preset" = tsan ] && setarch "$(uname -m)" -R true 2>/dev/null; then run=(setarch "$(uname -m)" -R); fi
  # Where a part's tests are all skipped, it ends with 4.
  # shellcheck disable=SC2016  # the arguments are the inner shell's
  seq 0 $((shards - 1)) | xargs -P "$jobs" -I PART bash -c '"$@" || [ $? = 4 ]' part \
    "${run[@]}" "build/$preset/bin/kava_tests" --filenames-as-tags --min-duration 5 --shard-count "$shards" --shard-index PART "$@"
}

# All but what takes longest, by the beginnings of the names: one specification, since several would each add theirs.
shorter='~"a plan (--plan)*"~"a step on the cuda backend*"~"a split pattern that explodes*"~"saving a checkpoint takes no more*"'
shorter+='~"a forward that does not fit*"~"attention kernels*"~"product kernels*"~"a sample'"'"'s tokens and latents*"'
shorter+='~"every line of the real data*"~"a stop signal writes*"~"two hundred KaVa steps*"~"every tensor of the step equals*"'
shorter+='~"every tensor of the other methods*"'
shorter+='~"attention over key lists*"~"a forward with its backward sends*"~"what a step keeps or computes again*"'
shorter+='~"what is kept and what is computed again*"~"the quickstart goes to any*"~"two hundred finished runs*"~"no program loses or half*"'
shorter+='~"kava_bench*"~"ten skipped steps in a row*"~"a run on cuda takes a step'"'"'s scalars*"~"a training step on cuda is read once*"'
shorter+='~"cuBLASLt makes*"~"20 steps on cuda*"~"dy W goes to cuBLASLt*"~"norm_rope normalises*"'
shorter+='~"attention of few rows*"~"attention of more rows*"~"masked products*"'
# What asks the programs for --device cuda; the kernels and the backend below them are tested in every build.
emulated='[#test_cuda_programs],[#test_cuda_ranks],"every tensor of the step on cuda*","bf16 gradients on cuda*"'
# What starts more than one thread: of the backend, of ranks, and around the tokenizer and checkpoints that data and files are read by.
threaded='[#test_threads],[#test_comm],[#test_comm_tcp],[#test_ops],[#test_rkv],[#test_arena]'
threaded+=',"training gives the same bytes*","a step gives the same bytes*"'
threaded+=',"what is computed for a sample*","several threads encode*","what a link leads to*","starts do not depend*"'
threaded+=',"any number of ranks trains*","what one rank is asked*","ranks that hold different*","a sample'"'"'s tokens and latents*"'

# Ranks of the emulated backend over TCP, between network namespaces where this machine lets a test make them. The harness is of any build.
failing_ranks() {  # PRESET ROUNDS
  build/"$1"/tests/rank_failures --transport tcp --rounds "$2" --bin build/emulated/bin
  build/"$1"/tests/rank_links --rounds "$2" --bin build/emulated/bin || [ $? = 4 ]
}

lane_test() {
  tools/setup.sh chromium python3  # the page of a run is opened in it
  KAVA_REQUIRE_CUDA=1 tools/test.sh
  if [ "$short" = no ]; then
    build/cpu/tests/plan_peak --large --bin build/cpu/bin
    build/cpu/tests/rank_failures --rounds 200 --bin build/cpu/bin
  fi
}

lane_emulated() {
  tools/setup.sh python3
  if [ "$short" = no ]; then
    build emulated
    tests emulated
    failing_ranks emulated 200
    tools/kernel_counts.py --check
    tools/gpu_check.sh --out build/checks/gpu_check --bin build/emulated/bin
    return
  fi
  # The preset emulated is the build cpu, which tools/test.sh has left, and one module more.
  build cpu
  cmake --preset cpu -Wno-dev -DKAVA_EMULATED=ON
  cmake --build --preset cpu --target kava_cuda
  mkdir -p build/emulated/bin
  cp build/cpu/bin/* build/emulated/bin
  rm build/cpu/bin/libkava_cuda.so
  cmake --preset cpu -Wno-dev -DKAVA_EMULATED=OFF
  tests emulated "$emulated"
  failing_ranks cpu 3
  tools/kernel_counts.py --check --shape llama1b --filter 'attention|rope|norm|swiglu|gelu'
}

lane_mutants() {
  tools/setup.sh python3
  build cpu kava_tests
  export KAVA_SCHEDULES=all
  if [ "$short" = yes ]; then tools/mutants.py --sample 10 --seed "$(git rev-parse HEAD)"; else tools/mutants.py --all; fi
}

lane_coverage() {
  tools/setup.sh python3
  tools/coverage.sh
}

lane_cuda() {
  tools/setup.sh python3-venv
  tools/kernel_table.sh --check
  local programs=cuda
  if [ "$short" = yes ]; then
    programs=cpu
    build cuda kava_cuda
    build cpu kava_inspect kava_train
  else
    build cuda
  fi
  tests/no_gpu.sh "build/$programs/bin" build/cuda/bin/libkava_cuda.so
}

# Runs a program below a root of its own, with a /proc, by which the loader finds what lies beside it.
bare() {  # ROOT PROGRAM...
  # shellcheck disable=SC2016  # the arguments are the inner shell's
  unshare --mount bash -c 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"' "$@"
}

lane_archive() {
  tools/setup.sh debootstrap
  build archive
  cpack --preset archive
  local packed root there mirror newest code=0
  packed=$(ls build/archive/kava-*-cuda.tar.xz)
  ls -l "$packed"
  [ "$(stat -c %s "$packed")" -lt 60000000 ]
  root=$(mktemp -d)
  mirror=$(apt-get indextargets --format "\$(SITE)" 'Created-By: Packages' | head -n 1)
  debootstrap --variant=minbase bookworm "$root" "$mirror"
  tar -xf "$packed" -C "$root"
  there=/$(basename "$packed" .tar.xz)
  # No symbol that is younger than GCC 11's library and glibc 2.34, as in distributions of 2022.
  newest=$(find "$root$there"/bin "$root$there"/lib -type f -exec objdump -T {} + 2>/dev/null | grep -oE '(GLIBCXX_3\.4|GLIBC_2)\.[0-9]+' | sort -uV || true)
  if grep -xE 'GLIBCXX_3\.4\.([3-9][0-9]|[1-9][0-9]{2})|GLIBC_2\.(3[5-9]|[4-9][0-9])' <<<"$newest"; then return 1; fi
  bare "$root" "$there/bin/kava_train" --version
  bare "$root" "$there/bin/kava_inspect" step "$there/tests/golden/cases/kava_defaults.toml" --device auto --out /step.safetensors
  bare "$root" "$there/tools/gpu_check.sh" --out /check || code=$?
  [ "$code" = 3 ]
  rm -rf "$root"
}

lane_asan() {
  tools/setup.sh "${clang[@]}"
  build asan
  # Open MPI leaves memory to the end of the process.
  if [ "$short" = yes ]; then
    tests asan "$shorter~[#test_ranks]"
    ASAN_OPTIONS=detect_leaks=0 tests asan '[#test_ranks]'
  else
    tests asan '~[#test_ranks]'
    ASAN_OPTIONS=detect_leaks=0 tests asan '[#test_ranks]'
    ASAN_OPTIONS=detect_leaks=0 build/asan/tests/kill_resume --rounds 10 --bin build/asan/bin
  fi
}

lane_tsan() {
  tools/setup.sh "${clang[@]}"
  # Processes that tests fork start threads.
  export TSAN_OPTIONS="die_after_fork=0 suppressions=$PWD/tests/tsan.supp"
  if [ "$short" = yes ]; then
    build tsan kava_tests
    tests tsan "$threaded"
  else
    build tsan
    tests tsan
  fi
}

lane_kill() {
  tools/setup.sh
  build cpu kava_train kava_data kava_eval kava_report kill_resume replicate replicate_kills
  if [ "$short" = yes ]; then
    build/cpu/tests/kill_resume --rounds 3 --bin build/cpu/bin
  else
    build/cpu/tests/kill_resume --rounds 1000 --every-error --bin build/cpu/bin
    build/cpu/tests/replicate_kills --kills 20 --bin build/cpu/bin
  fi
}

lane_slurm() {
  tools/setup.sh slurm-wlm
  build cpu kava_train kava_data kava_eval kava_report replicate
  tests/slurm.sh build/cpu/bin
}

lane_trackers() {
  tools/setup.sh python3-venv
  local python=build/checks/trackers/bin/python
  [ -x "$python" ] || python3 -m venv build/checks/trackers
  "$python" -m pip -q install tensorboard==2.21.0 wandb==0.31.0 trackio==0.43.0 mlflow==3.17.2
  "$python" tests/export_check.py tensorboard wandb trackio mlflow
}

fuzz_target() {  # NAME FILE: adds a line to the file
  local line
  line=$(build/asan/tests/fuzz --target "$1" --seconds 1200 --seed "$(date +%s)" | tee /dev/stderr | sed -n 1p)
  echo "$line, 1200 s of CPU time, commit $(git describe --always), $(date -u +%F)" >>"$2"
}

lane_fuzz() {
  tools/setup.sh "${clang[@]}"
  build asan fuzz
  if [ "$short" = yes ]; then
    build/asan/tests/fuzz --seconds 60
    return
  fi
  local done=docs/results/checks/fuzz_targets.txt
  touch "$done"
  export -f fuzz_target
  build/asan/tests/fuzz --list | { grep -vxFf <(sed 's/:.*//' "$done") || true; } |
    xargs -P "$jobs" -I TARGET bash -euo pipefail -c "fuzz_target TARGET $done"
  sort -o "$done" "$done"
  awk '{ sum += $2 } END { print NR " targets, " sum " executions, no crash" }' "$done"
}

lane_lint() {
  if [ "$short" = no ]; then
    tools/lint.sh --tidy
  elif git rev-parse -q --verify HEAD~1 >/dev/null; then
    tools/lint.sh --tidy HEAD~1
  else
    tools/lint.sh
  fi
}

lane_docs() {
  tools/setup.sh
  build cpu
  local file block n=0 blocks
  blocks=$(mktemp -d)
  while IFS= read -r file; do
    awk -v at="$blocks/$(tr / _ <<<"$file")" '/^```sh$/ { on = 1; ++n; next } /^```/ { on = 0 } on { print > (at "." n) }' "$file"
    if grep -n '^```sh norun *$' "$file"; then echo "$file: norun gives no reason" >&2; return 1; fi
  done < <(git ls-files '*.md')
  rm -f "$blocks/README.md.1"
  for block in "$blocks"/*; do
    [ -e "$block" ] || continue
    echo "docs: $(basename "$block")"
    bash -euo pipefail "$block"
    n=$((n + 1))
  done
  rm -rf "$blocks"
  echo "docs: $n blocks ran"
}

if ! declare -F "lane_$lane" >/dev/null; then
  sed -n '2,/^set/ { /^set/d; /shellcheck/d; s/^# \{0,1\}//; p }' "$0" >&2
  exit 2
fi

begin=$SECONDS
commit=$([ "$short" = yes ] || git describe --always --dirty)  # that is checked: by the end it may be another
code=0
log=build/checks/$lane.log
mkdir -p build/checks
# Not in a condition, which would switch off -e inside.
set +e
(set -e; "lane_$lane") 2>&1 | tee "$log"
code=${PIPESTATUS[0]}
set -e
result=$([ "$code" = 0 ] && echo passed || echo "FAILED with $code")
summary="check $lane$([ "$short" = no ] || echo ' (short)'): $result in $((SECONDS - begin)) s"
if [ "$short" = no ]; then
  mkdir -p docs/results/checks
  {
    echo "$summary"
    echo "commit $commit, $(date -u +%Y-%m-%dT%H:%MZ), $jobs cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
    echo
    tail -n 60 "$log" | sed "s|$PWD|.|g" | cut -c 1-200
  } >"docs/results/checks/$lane.txt"
fi
echo "$summary" | tee "build/checks/$lane.summary"
exit "$code"
