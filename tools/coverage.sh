#!/usr/bin/env bash
# Which lines of the kernels and of the cuda backend's host code the tests run: builds them on the emulator with counters (preset coverage),
# runs the tests that use it, and sums each line's counts over all templates that it is in. Of the files that call CUDA, cuBLASLt and NCCL
# those are left out that no emulator can compile. A line that the compiler makes nothing of does not count.
# Usage: tools/coverage.sh [--again]
#        --again: from the counts that the last call left
# Prints `FILE ran/all` for each file, each line that did not run, and the share; ends with 1 where that is below 100.0 %.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/coverage
jobs=$(tools/jobs.sh)
case ${1:-} in
  '' | --again) ;;
  *) sed -n '2,/^set/ { /^set/d; s/^# \{0,1\}//; p }' "$0" >&2; exit 2 ;;
esac

if [ "${1:-}" != --again ]; then
  cmake --preset coverage -Wno-dev
  find "$build" -name '*.gcda' -delete
  cmake --build --preset coverage -j "$jobs"
  # Every test of an op or kernel, and of the rest those of the emulated backend; gpu_check takes long and runs nothing of its own.
  spec='[#test_cuda_step],[#test_graphs],[#test_device_link],[#test_cuda_files],[#test_cuda_programs]~"gpu_check*",[#test_cuda_ranks]'
  for test in tests/ops/test_*.cpp tests/kernels/test_*.cpp; do spec+=",[#$(basename "$test" .cpp)]"; done
  pids=() failed=0
  for ((i = 0; i < jobs; ++i)); do
    "$build/bin/kava_tests" --filenames-as-tags --shard-count "$jobs" --shard-index "$i" "$spec" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i" || failed=1; done
  [ "$failed" = 0 ] || { echo "coverage: a test failed" >&2; exit 1; }
fi

git ls-files kernels engine/device/cuda | python3 -c '
import collections, json, os, pathlib, subprocess, sys

build = sys.argv[1]
left_out = {"kernels/gpu_cuda.h", "engine/device/cuda/runtime_cuda.cpp", "engine/device/cuda/matmul_lt.cpp"}
files = [f for f in sys.stdin.read().split() if f.endswith((".cu", ".cpp", ".h")) and f not in left_out]
counts = {f: collections.Counter() for f in files}
for notes in sorted(pathlib.Path(build).rglob("*.gcno")):
    out = subprocess.run(["gcov", "--json-format", "--stdout", notes], check=True, capture_output=True, text=True).stdout
    for unit in map(json.loads, out.splitlines()):
        for source in unit["files"]:
            name = os.path.relpath(os.path.join(unit["current_working_directory"], source["file"]))
            for line in source["lines"] if name in counts else []:
                counts[name][line["line_number"]] += line["count"]
missing = []
ran = total = 0
for name in files:
    lines = counts[name]
    if not lines and not name.endswith(".h"): missing.append(f"{name}: is not compiled")
    not_run = sorted(n for n in lines if lines[n] == 0)
    if lines: print(f"{name} {len(lines) - len(not_run)}/{len(lines)}")
    text = pathlib.Path(name).read_text().splitlines()
    missing += [f"{name}:{n}: {text[n - 1].strip()}" for n in not_run]
    ran += len(lines) - len(not_run)
    total += len(lines)
print(*missing, sep="\n", end="\n" if missing else "")
print(f"coverage: {100 * ran / total if total else 0:.{1 if ran == total else 3}f} %, {ran} of {total} lines")
sys.exit(bool(missing) or not total)
' "$build"
