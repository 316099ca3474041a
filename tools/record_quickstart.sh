#!/usr/bin/env bash
# Runs tools/quickstart.sh on a terminal of 100 columns, from data to table without a break, and writes what the terminal showed in the end
# into docs/results/quickstart/README.md. There must be no runs/quickstart: a run that goes on is no recording.
# Usage: tools/record_quickstart.sh [--seed N] [--equal-compute]
#        tools/record_quickstart.sh --render FILE      prints what a recording of script(1) leaves on the screen
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

# A terminal's lines: CR, LF, cursor up (ESC [ n A), erase to the line's end (ESC [ K) and to the screen's (ESC [ J).
render() {
  LC_ALL=C awk '
    function put(text,    l) {
      l = line[row]
      while (length(l) < col) l = l " "
      line[row] = substr(l, 1, col) text substr(l, col + length(text) + 1)
      col += length(text)
    }
    BEGIN { row = last = col = 0 }
    NR == 1 && /^Script started/ { next }
    /^Script done/ { next }
    {
      rest = $0
      while (match(rest, /[\r\033]/)) {
        if (RSTART > 1) put(substr(rest, 1, RSTART - 1))
        if (substr(rest, RSTART, 1) == "\r") { col = 0; rest = substr(rest, RSTART + 1); continue }
        rest = substr(rest, RSTART + 1)
        if (!match(rest, /^\[[0-9;?]*[A-Za-z]/)) continue
        code = substr(rest, RLENGTH, 1)
        n = substr(rest, 2, RLENGTH - 2)
        rest = substr(rest, RLENGTH + 1)
        if (code == "A") { row -= n == "" ? 1 : n; if (row < 0) row = 0 }
        if (code == "K" || code == "J") line[row] = substr(line[row], 1, col)
        if (code == "J") { for (i = row + 1; i <= last; ++i) line[i] = ""; last = row }
      }
      if (rest != "") put(rest)
      ++row
      if (row > last) last = row
    }
    END {
      while (last > 0 && line[last - 1] ~ /^ *$/) --last
      for (i = 0; i < last; ++i) { sub(/ +$/, "", line[i]); print line[i] }
    }' "$1"
}

if [ "${1:-}" = --render ]; then
  [ $# = 2 ] || { echo "error: --render: give one file" >&2; exit 2; }
  cd "$here"
  render "$2"
  exit 0
fi
for option in "$@"; do
  case $option in
    -h | --help) sed -n '2,5s/^# \{0,1\}//p' tools/record_quickstart.sh; exit 0 ;;
    --seed | --equal-compute | [0-9]*) ;;
    *) echo "error: $option: unknown option; see tools/record_quickstart.sh --help" >&2; exit 2 ;;
  esac
done
command -v script >/dev/null || { echo "error: script(1) is missing; apt-get install bsdutils" >&2; exit 3; }
[ ! -e runs/quickstart ] || { echo "error: runs/quickstart is there already; move it away" >&2; exit 2; }

command="tools/quickstart.sh${*:+ $*}"
record=$(mktemp)
trap 'rm -f "$record"' EXIT
load=$(cut -d ' ' -f 1 /proc/loadavg)
commit=$(git describe --always --dirty)
env -u COLUMNS TERM=xterm script -qec "stty cols 100; $command" "$record"
# shellcheck disable=SC2016  # backquotes of Markdown
{
  printf '# A quickstart, as it was printed\n\n'
  printf '`%s` in one run, on %s cores of %s (load %s before it began), commit %s, %s: what a\n' "$command" "$(nproc)" \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$load" "$commit" "$(date -u +%Y-%m-%d)"
  printf 'terminal of 100 columns shows at the end, where lines that moved stand as they were last. Made by `tools/record_quickstart.sh`.\n\n'
  printf '```\n'
  render "$record" | sed "s|$PWD/||g"  # wherever the clone lies
  printf '```\n'
} >docs/results/quickstart/README.md.part
mv docs/results/quickstart/README.md.part docs/results/quickstart/README.md
echo "written docs/results/quickstart/README.md"
