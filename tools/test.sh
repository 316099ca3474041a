#!/usr/bin/env bash
# Sets up, builds and runs the tests; with nvcc 13 the CUDA kernels are compiled too.
# Usage: tools/test.sh            (KAVA_REQUIRE_CUDA=1: fail where nvcc 13 is missing)
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
jobs=$(tools/jobs.sh)
cmake --preset cpu
cmake --build --preset cpu -j "$jobs"
code=0
ctest --preset cpu -j "$jobs" || code=$?
# Why tests were skipped, which ctest does not say: Catch2's reasons, and the programs' lines.
awk '/^SKIPPED:$|: SKIPPED:$/ { on = 1; next }
     on && /^  / { sub("^ +", ""); ++count[$0]; on = 0 }
     /^([a-z_]+: )?skipped: / { ++count[$0] }
     END { for (reason in count) printf "test: %d skipped: %s\n", count[reason], reason }' build/cpu/Testing/Temporary/LastTest.log | sort
[ "$code" = 0 ] || exit "$code"

nvcc=$(command -v nvcc || true)
[ -n "$nvcc" ] || { [ -x /usr/local/cuda/bin/nvcc ] && nvcc=/usr/local/cuda/bin/nvcc; }
if [ -n "$nvcc" ] && "$nvcc" --version | grep -q 'release 13\.'; then
  echo "test: compiling the CUDA kernels with $nvcc"
  CUDACXX=$nvcc cmake --preset cuda -DKAVA_TESTS=OFF
  cmake --build --preset cuda -j "$jobs" --target kava_kernels
  echo "test: the CUDA kernels compile"
elif [ "${KAVA_REQUIRE_CUDA:-0}" = 1 ]; then
  echo "test: nvcc 13 was not found, and KAVA_REQUIRE_CUDA is set" >&2
  exit 1
else
  echo "test: nvcc 13 was not found: compiling the CUDA kernels was skipped"
fi
