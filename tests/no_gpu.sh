#!/usr/bin/env bash
# What the cuda backend's module does where there is no GPU to use: with no driver, with one that is too old, and with the toolkit's link
# stub in the driver's place. No file that is built names a library of CUDA, and the module holds code for every GPU that it is compiled for.
# Usage: tests/no_gpu.sh BIN MODULE     BIN: the programs' folder; MODULE: libkava_cuda.so
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C
toolkit=${CUDA_PATH:-/usr/local/cuda}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/stub" "$work/old"
cp "$1"/{kava_inspect,kava_train,libkava_engine.so} "$2" "$work/bin"
fail() { printf 'no_gpu: %s\n' "$*" >&2; exit 1; }

for file in "$work"/bin/*; do
  readelf -d "$file" >"$work/dynamic"
  ! grep NEEDED "$work/dynamic" | grep -Ei 'lib(cu|nv|nccl)' || fail "$file names a library of CUDA"
done
# Of the toolkit, or as tools/kernel_table.sh installs it.
cuobjdump=$(PATH=${KAVA_CUDA_TOOLS:+$KAVA_CUDA_TOOLS:}$PATH:$toolkit/bin command -v cuobjdump ||
  find build/cuda_tools -name cuobjdump -type f 2>/dev/null | head -n 1 || true)
[ -n "$cuobjdump" ] || fail 'cuobjdump was not found (tools/kernel_table.sh installs it)'
"$cuobjdump" --list-elf "$2" >"$work/elf"
"$cuobjdump" --list-ptx "$2" >"$work/ptx"
for capability in 80 90 100 120; do grep -q "\.sm_$capability\." "$work/elf" || fail "no code for sm_$capability"; done
grep -q '\.sm_90\.' "$work/ptx" || fail 'no PTX for other GPUs'

case_file=tests/golden/cases/kava_defaults.toml
step=("$work/bin/kava_inspect" step "$case_file" --set model.dtype=f32 --out "$work/step.safetensors")
refused() { # FOLDER OF libcuda.so.1 OR EMPTY, WORDS
  local code=0
  LD_LIBRARY_PATH=$1 "${step[@]}" --device cuda 2>"$work/err" || code=$?
  [ "$code" = 3 ] || fail "exit $code instead of 3: $(cat "$work/err")"
  [ "$(wc -l <"$work/err")" = 1 ] || fail "not one line: $(cat "$work/err")"
  grep -qF -e "$2" "$work/err" || fail "'$2' is not in: $(cat "$work/err")"
  LD_LIBRARY_PATH=$1 "${step[@]}" --device auto 2>"$work/err" || fail "--device auto ended with $?"
  [ "$(wc -l <"$work/err")" = 1 ] || fail "not one line: $(cat "$work/err")"
  grep -q "^device cpu: .*$2" "$work/err" || fail "'$2' is not in: $(cat "$work/err")"
  cat "$work/err"
}
cp "$toolkit/lib64/stubs/libcuda.so" "$work/stub/libcuda.so.1"
refused "$work/stub" 'link stub'
cat >"$work/old.c" <<'EOF'
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 12040, 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long flags, void* status);
int cuGetProcAddress(const char* name, void** function, int version, unsigned long flags) {
  *function = !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion : !strcmp(name, "cuInit") ? (void*)cuInit : 0;
  if (!strcmp(name, "cuGetProcAddress")) *function = version < 12000 ? (void*)cuGetProcAddress : (void*)cuGetProcAddress_v2;
  return *function ? 0 : 500;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long flags, void* status) {
  return cuGetProcAddress(name, function, version, flags);
}
EOF
gcc -shared -fPIC -o "$work/old/libcuda.so.1" "$work/old.c"
refused "$work/old" 'serves CUDA 12.4, and 13.0 is needed'
if ldconfig -p | grep -q 'libcuda\.so\.1'; then
  echo 'skipped: this machine has a driver'
else
  refused '' 'no NVIDIA driver is loaded'
fi
LD_LIBRARY_PATH=$work/stub "$work/bin/kava_train" "$case_file" --set model.dtype=bf16 --plan --device cuda --memory 80GB >"$work/plan" || fail "--plan ended with $?"
grep -q 'fits' "$work/plan" || fail "no plan: $(cat "$work/plan")"
echo 'no_gpu: all as it should be'
