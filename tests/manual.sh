#!/usr/bin/env bash
# manual.sh BIN: the pages of tools/manual.sh are whole and well-formed, and the completion knows what the programs take.
# shellcheck disable=SC2317  # a shell without completion
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$here/tools/manual.sh" "$1" "$out"
fail() { echo "manual: $*" >&2; exit 1; }
for page in "$out"/man1/kava_train.1 "$out"/man1/kava_eval.1 "$out"/man5/kava.toml.5; do [ -s "$page" ] || fail "$page is not there"; done
if grep -rqF -- "$(cd "$1" && pwd)/" "$out"; then fail "a page names the folder of this build"; fi
grep -q '^  kava_train runs/first' "$out/man1/kava_train.1" || fail "the example of kava_train is not there"
if command -v groff >/dev/null; then
  for page in "$out"/man?/*; do
    said=$(groff -man -Tutf8 -ww -P-c "$page" 2>&1 >"$out/shown")
    [ -z "$said" ] || fail "$said"
    grep -q NAME <(sed "s/.\x08//g" "$out/shown") || fail "$page is empty"
  done
fi
# shellcheck source=/dev/null
source "$out/bash-completion/kava"
complete_for() {
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
  compopt() { :; }
  _kava
  printf '%s\n' "${COMPREPLY[@]}"
}
complete_for kava_eval --max | grep -qx -- --max-new-tokens || fail "kava_eval --max is not completed"
complete_for kava_inspect doc | grep -qx doctor || fail "kava_inspect doc is not completed"
complete_for kava_inspect doctor --fo | grep -qx -- --folder || fail "kava_inspect doctor --fo is not completed"
complete_for kava_train a.toml --set train.lr | grep -qx train.lr= || fail "--set train.lr is not completed"
rm -f "$out/shown"
echo "manual: $(find "$out" -type f | wc -l) files, whole"
