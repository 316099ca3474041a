#!/usr/bin/env bash
# Checks the sources by programs of Debian 12: layout, shell scripts, spelling and, with --tidy, what clang-tidy finds in all sources that the
# host compiler sees, or in those that differ from COMMIT.
# Usage: tools/lint.sh [--tidy [COMMIT]]
set -euo pipefail
cd "$(dirname "$0")/.."
tidy=()
[ "${1:-}" != --tidy ] || tidy=(clang-tidy-16)
tools/setup.sh clang-format-14 shellcheck codespell "${tidy[@]}"
failed=()
mapfile -t sources < <(git ls-files '*.cpp' '*.h' '*.cu')
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
mapfile -t texts < <(git ls-files '*.cpp' '*.h' '*.cu' '*.sh' '*.cmake' '*.md' .ci/run CMakeLists.txt)

clang-format-14 --dry-run -Werror "${sources[@]}" || failed+=(clang-format)
shellcheck "${scripts[@]}" || failed+=(shellcheck)
# Names of others' files, and words that mean something here.
codespell --ignore-words-list=ans,ot,te,fo,nd,indx,uint,als,ue,theses,bu,dout,ned,chekc,fromat,trian --skip=tests/golden "${texts[@]}" || failed+=(codespell)
# Catch2 takes a name that begins with a dash for an option, where ctest gives it the name.
! grep -n 'TEST_CASE("-' tests/*/*.cpp || failed+=("names of tests that begin with a dash")
# What calls vendors' libraries, most of which nothing runs without a GPU.
vendors=(kernels/gpu_cuda.h engine/device/cuda/{runtime_cuda,matmul_lt,comm_nccl}.cpp)
[ "$(cat "${vendors[@]}" | wc -l)" -le 600 ] || failed+=("more than 600 lines in ${vendors[*]}")
if printf '%s\n' "${sources[@]}" | grep -E '^(engine|models|tools|kernels|benchmarks)/' | grep -vxFf <(printf '%s\n' "${vendors[@]}") |
  xargs grep -nE '\b(cuda|cublas|nccl|cudnn|cu)[A-Z][A-Za-z]*\('; then failed+=("calls of vendors' libraries elsewhere"); fi
if [ "${1:-}" = --tidy ]; then
  # Source by source, where nothing is built.
  cmake --preset cpu -B build/tidy -Wno-dev -DCMAKE_UNITY_BUILD=OFF -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DKAVA_TESTS=OFF \
    -DKAVA_FAILPOINTS=ON >/dev/null
  cmake --build build/tidy --target kava_commit >/dev/null
  checks='-*,bugprone-use-after-move,bugprone-dangling-handle,bugprone-infinite-loop,bugprone-string-constructor,bugprone-unused-raii'
  checks+=',performance-move-const-arg,performance-for-range-copy,misc-unused-using-decls'
  which=(git ls-files)
  if [ $# -gt 1 ]; then
    git rev-parse -q --verify "$2^{commit}" >/dev/null || { echo "lint: $2 is no commit" >&2; exit 2; }
    which=(git diff --name-only --diff-filter=d "$2" --)
  fi
  "${which[@]}" 'engine/*.cpp' 'models/*.cpp' 'tools/*.cpp' 'benchmarks/*.cpp' | { grep -v -e /device/cuda/ -e /device/mpi/ || true; } |
    xargs -r -d '\n' -n 1 -P "$(nproc)" clang-tidy-16 --quiet -p build/tidy "--checks=$checks" --warnings-as-errors='*' \
      --extra-arg=-Wno-unknown-warning-option --extra-arg=-Wno-unknown-pragmas --extra-arg=-fno-openmp \
      --extra-arg=-Wno-unused-command-line-argument 2>/dev/null || failed+=(clang-tidy)
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "lint: FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "lint: nothing found"
