#!/usr/bin/env bash
# Reads off the machine code of every kernel what a GPU needs for it, and holds it to budgets: registers, shared and local memory, occupancy,
# and for kernels on tensor cores the instructions of the main loop for each HMMA. The main loop is the stretch from a label to the branch
# back to it with the most HMMA, the shortest of equals. Needs nvcc 13.0.88, and cuobjdump and nvdisasm 13.2.86: of the folder that
# KAVA_CUDA_TOOLS names, else on PATH, else (or where that is another version) it installs them from PyPI into build/cuda_tools; no GPU.
# Usage: tools/kernel_table.sh [--check]     writes docs/kernels_table.md; --check compares with it instead, and ends with 1 on a difference
#                                            or a kernel over its budget
set -euo pipefail
cd "$(dirname "$0")/.."

check=no
case ${1:-} in '') ;; --check) check=yes ;; *) echo "usage: tools/kernel_table.sh [--check]" >&2; exit 2 ;; esac
nvcc=$(command -v nvcc || echo "${CUDA_PATH:-/usr/local/cuda}/bin/nvcc")
[ -x "$nvcc" ] || { echo "kernel_table: nvcc 13 was not found" >&2; exit 3; }
PATH=${KAVA_CUDA_TOOLS:+$KAVA_CUDA_TOOLS:}$PATH
if ! command -v nvdisasm >/dev/null || ! cuobjdump --version 2>/dev/null | grep -q 'V13\.2\.86'; then
  if [ -z "$(find build/cuda_tools -name nvdisasm -type f 2>/dev/null)" ]; then
    python3 -m venv build/cuda_tools
    build/cuda_tools/bin/pip install --quiet nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
  fi
  PATH=$(dirname "$(find "$PWD/build/cuda_tools" -name nvdisasm -type f | head -n 1)"):$PATH
fi
for tool in cuobjdump nvdisasm c++filt; do
  command -v $tool >/dev/null || { echo "kernel_table: $tool was not found (KAVA_CUDA_TOOLS)" >&2; exit 3; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
release=$("$nvcc" --version | sed -n 's/.*release .*, V//p')
tools=$(cuobjdump --version | sed -n 's/.*release .*, V//p')
[ "$release $tools" = '13.0.88 13.2.86' ] || { echo "kernel_table: made for nvcc 13.0.88 and cuobjdump 13.2.86, here are $release and $tools" >&2; exit 3; }

# Names without what changes from run to run, and without parameters.
readable() { c++filt | sed -E 's/_GLOBAL__N__[0-9a-zA-Z_]*(::|<)/\1/g; s/\(anonymous namespace\):://g; s/kava:://g; s/^void //; s/\(GemmForm\)0/nt/g; s/\(GemmForm\)1/nn/g; s/\(GemmForm\)2/tn/g; s/\([a-zA-Z_]*\)([0-9])/\1/g; s/\(bool\)1/true/g; s/\(bool\)0/false/g; s/\(int\)//g; s/\(.*$//; s/^:*//'; }

usage_of() { # CUBIN: symbol registers shared local
  cuobjdump -res-usage "$1" | awk '/ Function / { name = $2; sub(/:$/, "", name) }
    /REG:/ { for (i = 1; i <= NF; ++i) { split($i, f, ":"); v[f[1]] = f[2] } print name, v["REG"], v["SHARED"], v["LOCAL"] + v["STACK"] }'
}

threads_of() { # CUBIN: symbol threads of a block
  cuobjdump -elf "$1" | awk '
    /^\.nv\.info\./ { name = substr($1, 10) }
    /EIATTR_MAX_THREADS/ { wanted = 1 }
    /Value:/ && wanted { print name, $2, $3, $4; wanted = 0 }' | while read -r symbol x y z; do echo "$symbol $((x * y * z))"; done
}
# A launch of norms may have fewer: as many warps as have room for their rows (of 2,048 columns).
launched() { case $1 in *_norm_bwd*'<float, float'*) echo 192 ;; *) echo "$2" ;; esac }

# Dynamic shared memory of a block; norms keep rows of 2,048 columns, other kernels a few words of each warp.
dynamic_bytes() { # KERNEL
  local size=${1#*<}
  size=${size#n[nt], } size=${size#tn, } size=${size%%[,>]*}
  case $1 in
    gemm_bf16*) echo $((384 * size)) ;;
    gemm_f32*) echo 8448 ;;
    attention_few_bf16*) echo $((544 * size + 4608)) ;;
    attention_fwd_bf16*) echo $((640 * size)) ;;
    attention_bwd_bf16*) echo $((size > 64 ? 94720 : 768 * size + 13056)) ;;
    rkv_select*) echo 24224 ;;  # of heads of 64 and 24 latents
    add_*_norm_fwd*'<bf16'*) echo 32768 ;;
    add_*_norm_fwd*) echo 65536 ;;
    rms_norm_bwd*'<bf16, bf16'*|layer_norm_bwd*'<bf16, bf16'*) echo 65536 ;;
    rms_norm_bwd*|layer_norm_bwd*) echo 98304 ;;
    *) echo 1024 ;;
  esac
}

# Share of an SM's warps that can be there at a time, in percent.
occupancy() { # SM REGISTERS THREADS SHARED
  awk -v sm="$1" -v registers="$2" -v threads="$3" -v bytes="$4" 'BEGIN {
    most = sm == 120 ? 1536 : 2048; blocks = sm == 120 ? 24 : 32; room = (sm == 80 ? 164 : sm == 120 ? 100 : 228) * 1024
    warps = int((threads + 31) / 32); of_warp = int((registers * 32 + 255) / 256) * 256
    n = int(65536 / of_warp / warps); if (n < blocks) blocks = n
    n = int(room / (bytes + 1024)); if (n < blocks) blocks = n
    n = int(most / (32 * warps)); if (n < blocks) blocks = n
    printf "%d", 100 * blocks * warps * 32 / most }'
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

# Instructions for each HMMA in the main loop, at most: of aligned products, unmasked and masked (on tiles of 128 and of 64), and of
# attention at head sizes from 64 on.
budget() { # FILE KERNEL
  case $1:$2 in
    gemm:*'true, 0>') echo 14 ;;
    gemm:*'128, true, '[12]'>') echo 9 ;;
    gemm:*'64, true, '[12]'>') echo 18 ;;
    attention_few:*) echo 0 ;;  # goes through its keys once: what is found is no loop
    attention_*:*'<64, true>'|attention_*:*'<128, true>') echo 13 ;;
    *) echo 0 ;;
  esac
}

# Those of the preset cuda's build.
CUDACXX=$nvcc cmake --preset cuda -DKAVA_TESTS=OFF -Wno-dev >/dev/null
cmake --build --preset cuda -j "$(tools/jobs.sh)" --target kava_kernels
for file in kernels/*.cu; do
  (cd "$work" && cuobjdump -xelf all "$OLDPWD/build/cuda/kernels/CMakeFiles/kava_kernels.dir/$(basename "$file").o" >/dev/null)
done

over=0
table() { # SM
  local sm=$1 file name made kernel bytes
  echo
  echo "## sm_$sm"
  echo
  echo '| file | kernel | registers | threads | shared bytes | occupancy | local bytes | loop instructions | HMMA | for each |'
  echo '|---|---|---|---|---|---|---|---|---|---|'
  for file in kernels/*.cu; do
    name=$(basename "$file" .cu)
    made=$(echo "$work/$name".*sm_"$sm".cubin)
    join <(usage_of "$made" | sort) <(threads_of "$made" | sort) >"$work/usage"
    loops_of "$made" | sort >"$work/loops"
    join -a 1 "$work/usage" "$work/loops" | while read -r symbol registers _ local_ threads instructions hmma; do
      kernel=$(printf '%s' "$symbol" | readable | tr '|' '/')
      # The static ones are none, and from 9.0 on 1,024 of the system.
      bytes=$(dynamic_bytes "$kernel") threads=$(launched "$kernel" "$threads")
      printf '| %s | %s | %s | %s | %s | %s %% | %s | %s | %s | %s |\n' "$name" "$kernel" "$registers" "$threads" "$bytes" \
        "$(occupancy "$sm" "$registers" "$threads" "$bytes")" "$local_" "${instructions:-}" "${hmma:-}" \
        "$([ -z "${hmma:-}" ] || awk "BEGIN { printf \"%.1f\", $instructions / $hmma }")"
    done | sort
  done
}

{
  echo '# Kernels as compiled'
  echo
  echo "Written by tools/kernel_table.sh from the machine code of nvcc $release, read by cuobjdump and nvdisasm $tools. Nothing here was timed."
  echo 'A loop is the main loop of a kernel on tensor cores, from its label to the branch back; "for each": its instructions for each HMMA.'
  echo 'Shared bytes are those of a launch, of norms at 2,048 columns. Occupancy is the share of an SM'"'"'s warps that registers, threads and'
  echo 'shared memory leave room for. Budgets: 0 local bytes; for sm_80 and sm_90, aligned, instructions for each HMMA: 14 of products without'
  echo 'a mask, 9 with one on tiles of 128, 18 on tiles of 64; 13 of attention at head sizes 64 and 128.'
  for sm in 80 90 100 120; do table $sm; done
  # The part that tools/kernel_counts.py writes.
  sed -n '/^# Kernels as counted/,$p' docs/kernels_table.md | sed '1s/^/\n/'
} >"$work/table.md"

# Local memory is an error everywhere; sm_80 and sm_90 are held to the budgets of loops, the others reported.
sm=''
while IFS='|' read -r first file kernel _ _ _ _ local_ _ _ each _; do
  case $first in '## sm_'*) sm=${first#\#\# sm_}; continue ;; esac
  case $file in ' '[a-z]*) ;; *) continue ;; esac
  file=${file// /} local_=${local_// /} each=${each// /} kernel=${kernel# } kernel=${kernel% }
  if [ "${local_:-0}" -gt 0 ] 2>/dev/null; then echo "kernel_table: sm_$sm: local memory: $file:$kernel: $local_ bytes" >&2; over=1; fi
  most=$(budget "$file" "$kernel")
  if [ "$sm" -le 90 ] && [ -n "$each" ] && [ "$most" != 0 ] && awk "BEGIN { exit !($each > $most) }"; then
    echo "kernel_table: sm_$sm: $file:$kernel: $each instructions for each HMMA, budget $most" >&2; over=1
  fi
done < <(grep -E '^## sm_|^\| [a-z_]+ \| [a-z_0-9]+(<.*>)? \| [0-9]' "$work/table.md")

if [ $check = no ]; then cp "$work/table.md" docs/kernels_table.md; echo 'wrote docs/kernels_table.md'
elif ! diff -u docs/kernels_table.md "$work/table.md"; then echo 'kernel_table: docs/kernels_table.md is not current' >&2; over=1; fi
exit $over
