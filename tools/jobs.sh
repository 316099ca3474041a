#!/usr/bin/env bash
# Prints how many compilers to run at once: one for each core that may be used, and for each GiB of memory, of which one takes up to 0.9.
# Usage: tools/jobs.sh
set -euo pipefail
jobs=$(nproc)
at_most() { [ "$1" -ge "$jobs" ] || jobs=$1; }
# A container's limits; files that are not there, and "max", limit nothing.
number() { read -r first second 2>/dev/null <"/sys/fs/cgroup/$1" && [[ $first =~ ^[0-9]+$ ]]; }

at_most $(($(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo) >> 20))
for limit in memory.max memory/memory.limit_in_bytes; do
  if number "$limit"; then at_most $((first >> 30)); fi
done
if number cpu.max; then at_most $(((first + second - 1) / second)); fi
if number cpu/cpu.cfs_quota_us; then
  quota=$first
  if number cpu/cpu.cfs_period_us; then at_most $(((quota + first - 1) / first)); fi
fi
echo $((jobs > 0 ? jobs : 1))
