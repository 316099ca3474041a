#!/usr/bin/env bash
# Reads off the machine code of every kernel what a GPU needs for it, and holds it to budgets: registers, shared and local memory, and for
# kernels on tensor cores the instructions of the main loop for each HMMA. The main loop is the stretch from a label to the branch back to it
# with the most HMMA, the shortest of equals. Needs nvcc 13, and cuobjdump and nvdisasm 13.2.86 (PyPI: nvidia-cuda-cuobjdump,
# nvidia-cuda-nvdisasm; KAVA_CUDA_TOOLS names their folder, else PATH); no GPU.
# Usage: tools/kernel_table.sh [--check]     writes docs/kernels_table.md; --check compares with it instead, and ends with 1 on a difference
#                                            or a kernel over its budget
set -euo pipefail
cd "$(dirname "$0")/.."

check=no
case ${1:-} in '') ;; --check) check=yes ;; *) echo "usage: tools/kernel_table.sh [--check]" >&2; exit 2 ;; esac
nvcc=$(command -v nvcc || echo "${CUDA_PATH:-/usr/local/cuda}/bin/nvcc")
[ -x "$nvcc" ] || { echo "kernel_table: nvcc 13 was not found" >&2; exit 3; }
PATH=${KAVA_CUDA_TOOLS:+$KAVA_CUDA_TOOLS:}$PATH
for tool in cuobjdump nvdisasm c++filt; do
  command -v $tool >/dev/null || { echo "kernel_table: $tool was not found (KAVA_CUDA_TOOLS)" >&2; exit 3; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
release=$("$nvcc" --version | sed -n 's/.*release .*, V//p')
tools=$(cuobjdump --version | sed -n 's/.*release .*, V//p')

# Names without what changes from run to run, and without parameters.
readable() { c++filt | sed -E 's/_GLOBAL__N__[0-9a-zA-Z_]*(::|<)/\1/g; s/\(anonymous namespace\):://g; s/kava:://g; s/^void //; s/\(GemmForm\)0/nt/g; s/\(GemmForm\)1/nn/g; s/\(GemmForm\)2/tn/g; s/\([a-zA-Z_]*\)([0-9])/\1/g; s/\(bool\)1/true/g; s/\(bool\)0/false/g; s/\(int\)//g; s/\(.*$//; s/^:*//'; }

usage_of() { # CUBIN: symbol registers shared local
  cuobjdump -res-usage "$1" | awk '/ Function / { name = $2; sub(/:$/, "", name) }
    /REG:/ { for (i = 1; i <= NF; ++i) { split($i, f, ":"); v[f[1]] = f[2] } print name, v["REG"], v["SHARED"], v["LOCAL"] + v["STACK"] }'
}

loops_of() { # CUBIN: symbol instructions HMMA
  nvdisasm -c "$1" | awk '
    function flush() {
      best = 0
      for (b = 1; b <= branches; ++b) {
        if (!(target[b] in place) || place[target[b]] > at[b]) continue
        n = at[b] - place[target[b]]
        h = hmma[at[b]] - hmma[place[target[b]]]
        if (h > best || (h == best && h > 0 && n < length_)) { best = h; length_ = n }
      }
      if (name != "" && best > 0) print name, length_, best
      count = branches = 0; delete place; delete hmma; delete target; delete at; hmma[0] = 0
    }
    /^\.text\./ || /\.section[ \t]+\.text\./ { if (match($0, /\.text\.[A-Za-z0-9_$.]+/)) { found = substr($0, RSTART + 6, RLENGTH - 6); if (found != name) { flush(); name = found } } }
    /^\.L_x_[0-9]+:/ { label = $1; sub(/:.*/, "", label); place[label] = count }
    /^[ \t]+\/\*[0-9a-f]+\*\// {
      ++count; hmma[count] = hmma[count - 1] + ($0 ~ /HMMA/)
      if ($0 ~ /[ \t]BRA/ && match($0, /\.L_x_[0-9]+/)) { ++branches; target[branches] = substr($0, RSTART, RLENGTH); at[branches] = count }
    }
    END { flush() }'
}

# Instructions for each HMMA in the main loop, at most: of products and of attention at head sizes from 64 on, aligned and unmasked.
budget() { # FILE KERNEL
  case $1:$2 in
    gemm:*'true, 0>') echo 14 ;;
    attention_*:*'<64, true>'|attention_*:*'<128, true>') echo 13 ;;
    *) echo 0 ;;
  esac
}

# One is kept in build/cubins until a source is newer.
cubin() { # FILE SM
  made=build/cubins/$(basename "$1" .cu).$2.cubin
  mkdir -p build/cubins
  if [ -s "$made" ] && [ -z "$(find kernels -name '*.h' -newer "$made" -o -path "$1" -newer "$made")" ]; then return; fi
  "$nvcc" -std=c++20 -O3 -I. --expt-relaxed-constexpr -gencode "arch=compute_$2,code=sm_$2" -cubin -o "$made" "$1"
}

over=0
table() { # SM
  local sm=$1 file name
  echo
  echo "## sm_$sm"
  echo
  echo '| file | kernel | registers | shared bytes | local bytes | loop instructions | HMMA | for each |'
  echo '|---|---|---|---|---|---|---|---|'
  for file in kernels/*.cu; do
    name=$(basename "$file" .cu)
    cubin "$file" "$sm"
    usage_of "$made" | sort >"$work/usage"
    loops_of "$made" | sort >"$work/loops"
    join -a 1 "$work/usage" "$work/loops" | while read -r symbol registers shared local_ instructions hmma; do
      printf '| %s | %s | %s | %s | %s | %s | %s | %s |\n' "$name" "$(printf '%s' "$symbol" | readable | tr '|' '/')" "$registers" "$shared" "$local_" \
        "${instructions:-}" "${hmma:-}" "$([ -z "${hmma:-}" ] || awk "BEGIN { printf \"%.1f\", $instructions / $hmma }")"
    done | sort
  done
}

{
  echo '# Kernels as compiled'
  echo
  echo "Written by tools/kernel_table.sh from the machine code of nvcc $release, read by cuobjdump and nvdisasm $tools. Nothing here was timed."
  echo 'A loop is the main loop of a kernel on tensor cores, from its label to the branch back; "for each": its instructions for each HMMA.'
  echo 'Shared bytes are the static ones.'
  for sm in 80 90 100 120; do table $sm; done
} >"$work/table.md"

# sm_80 and sm_90 are held to budgets, the others reported.
while IFS='|' read -r _ file kernel _ _ local_ _ _ each _; do
  file=${file// /} local_=${local_// /} each=${each// /} kernel=${kernel# } kernel=${kernel% }
  if [ "${local_:-0}" -gt 0 ] 2>/dev/null; then echo "kernel_table: local memory: $file:$kernel: $local_ bytes" >&2; over=1; fi
  most=$(budget "$file" "$kernel")
  if [ -n "$each" ] && [ "$most" != 0 ] && awk "BEGIN { exit !($each > $most) }"; then
    echo "kernel_table: $file:$kernel: $each instructions for each HMMA, budget $most" >&2; over=1
  fi
done < <(sed -n '/^## sm_80/,/^## sm_100/p' "$work/table.md" | grep -E '^\| [a-z_]+ \|' | grep -v '^| file')

if [ $check = no ]; then cp "$work/table.md" docs/kernels_table.md; echo 'wrote docs/kernels_table.md'
elif ! diff -u docs/kernels_table.md "$work/table.md"; then echo 'kernel_table: docs/kernels_table.md is not current' >&2; over=1; fi
exit $over
