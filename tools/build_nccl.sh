#!/usr/bin/env bash
# Builds NCCL from its source for the GPU architectures that are given, stripped, so that it can travel in an archive beside the programs:
# with the two collectives that kava calls, sums of f32 and broadcasts, in every algorithm and protocol (a quarter of the kernels).
# From 2.30 on two ranks may share a GPU (NCCL_MULTI_RANK_GPU_ENABLE=1): what a machine with one GPU needs to try data parallel. Needs nvcc.
# Usage: tools/build_nccl.sh SOURCE --out DIR [--arch 90] [--jobs N]
#   SOURCE   a checkout of NCCL's repository, a bare one (its newest tag v2.*), or an archive of it (.tar.gz, .tar.xz, .zip)
# Leaves DIR/libnccl.so.2, which the cuda backend finds where DIR is on LD_LIBRARY_PATH.
set -euo pipefail

fail() { printf 'build_nccl: %s\n' "$1" >&2; exit "${2:-2}"; }
source='' out='' arch=90 jobs=$("$(dirname "$0")"/jobs.sh)
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:-}; shift 2 || fail '--out names no folder' ;;
    --arch) arch=${2:-}; shift 2 || fail '--arch names none' ;;
    --jobs) jobs=${2:-}; shift 2 || fail '--jobs names no number' ;;
    -*) fail "unknown option $1" ;;
    *) [ -z "$source" ] || fail 'more than one source is given'; source=$1; shift ;;
  esac
done
[ -n "$source" ] || fail 'name the source: a checkout of NCCL or an archive of it'
[ -e "$source" ] || fail "$source is not there"
[ -n "$out" ] || fail '--out DIR is missing'
[[ $arch =~ ^[0-9]+$ ]] || fail "--arch $arch is no compute capability; give one as 90"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs $jobs is no number"
nvcc=$(command -v nvcc || echo "${CUDA_PATH:-/usr/local/cuda}/bin/nvcc")
[ -x "$nvcc" ] || fail 'nvcc was not found (PATH, CUDA_PATH)' 3
cuda=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/nccl"
if [ -f "$source" ]; then
  case $source in
    *.zip) unzip -q "$source" -d "$work/nccl" ;;
    *) tar -xf "$source" -C "$work/nccl" ;;
  esac
elif git -C "$source" rev-parse --is-bare-repository 2>/dev/null | grep -q true; then
  tag=$(git -C "$source" tag -l 'v2.*' --sort=-v:refname | head -n 1)
  git -C "$source" archive "${tag:-HEAD}" | tar -x -C "$work/nccl"
elif [ -d "$source/makefiles" ]; then
  cp -r "$source/." "$work/nccl"
fi
# An archive holds a folder.
makefile=$(find "$work/nccl" -maxdepth 2 -name makefiles -type d | head -n 1)
[ -n "$makefile" ] || fail "$source holds no source of NCCL (there is no folder makefiles)" 4
tree=$(dirname "$makefile")
version=$(sed -n 's/^NCCL_\(MAJOR\|MINOR\|PATCH\) *:= *//p' "$makefile/version.mk" | paste -sd .)
# NCCL's makefiles put the toolkit's headers before their own, and some toolkits hold those of another NCCL.
mkdir "$work/include"
find "$cuda/include/" -mindepth 1 -maxdepth 1 ! -name 'nccl*' -exec ln -s -t "$work/include" {} +
echo "build_nccl: NCCL $version for compute capability $arch, $jobs jobs"
make -C "$tree" -j "$jobs" src.build CUDA_HOME="$cuda" CUDA_INC="$work/include" ONLY_FUNCS='Broadcast * *|AllReduce Sum f32 * *' \
  NVCC_GENCODE="-gencode=arch=compute_$arch,code=sm_$arch" >"$work/log" 2>&1 ||
  { tail -n 20 "$work/log" >&2; fail 'the build failed' 1; }
mkdir -p "$out"
strip --strip-unneeded -o "$out/libnccl.so.2.part" "$(readlink -f "$tree/build/lib/libnccl.so.2")"
mv "$out/libnccl.so.2.part" "$out/libnccl.so.2"
cp "$tree/LICENSE.txt" "$out/NCCL_LICENSE.txt"
echo "build_nccl: $out/libnccl.so.2, $(du -h "$out/libnccl.so.2" | cut -f1)"
