#!/usr/bin/env bash
# Checks the sources by programs of Debian 12: layout, shell scripts, spelling and, with --tidy, what clang-tidy finds in the build `clang`.
# Usage: tools/lint.sh [--tidy]
set -euo pipefail
cd "$(dirname "$0")/.."
tidy=()
[ "${1:-}" != --tidy ] || tidy=(clang-16 clang-tidy-16)
tools/setup.sh clang-format-14 shellcheck codespell "${tidy[@]}"
failed=()
mapfile -t sources < <(git ls-files '*.cpp' '*.h' '*.cu')
mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
mapfile -t texts < <(git ls-files '*.cpp' '*.h' '*.cu' '*.sh' '*.cmake' '*.md' .ci/run CMakeLists.txt)

clang-format-14 --dry-run -Werror "${sources[@]}" || failed+=(clang-format)
shellcheck "${scripts[@]}" || failed+=(shellcheck)
# Names of others' files, and words that mean something here.
codespell --ignore-words-list=ans,ot,te,fo,nd,indx,uint,als,ue,theses,bu,dout,ned,chekc,fromat,trian --skip=tests/golden "${texts[@]}" || failed+=(codespell)
if [ "${1:-}" = --tidy ]; then
  cmake --preset clang -Wno-dev >/dev/null
  cmake --build --preset clang --target kava_commit >/dev/null
  mapfile -t compiled < <(git ls-files 'engine/*.cpp' 'models/*.cpp' 'tools/*.cpp' | grep -v -e /device/cuda/ -e /device/mpi/)
  checks='-*,bugprone-use-after-move,bugprone-dangling-handle,bugprone-infinite-loop,bugprone-string-constructor,bugprone-unused-raii'
  checks+=',performance-move-const-arg,performance-for-range-copy,misc-unused-using-decls,clang-analyzer-core.uninitialized*'
  printf '%s\0' "${compiled[@]}" | xargs -0 -n 1 -P "$(nproc)" clang-tidy-16 --quiet -p build/clang "--checks=$checks" \
    --warnings-as-errors='*' --extra-arg=-Wno-unknown-warning-option 2>/dev/null || failed+=(clang-tidy)
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "lint: FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "lint: nothing found"
