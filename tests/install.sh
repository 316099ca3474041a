#!/usr/bin/env bash
# install.sh BUILD: what `cmake --install` leaves runs wherever it is moved to, needs no library of the machine but those of C and C++, and
# holds what its README links to and its scripts use.
set -euo pipefail
build=$(cd "${1:?usage: install.sh BUILD}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "install: $*" >&2; exit 1; }
cmake --install "$build" --prefix "$work/here" >"$work/log"
mv "$work/here" "$work/there"
there=$work/there
cd "$work"

for file in "$there"/bin/* "$there"/lib/libkava_[ce]*.so; do
  strange=$(env -u LD_LIBRARY_PATH ldd "$file" |
    grep -vE "$there/((bin|lib)/\.\./)?lib/|^\s*(linux-vdso|/lib64/ld-linux|lib(c|m|gcc_s|stdc\+\+)\.so)" || true)
  [ -z "$strange" ] || fail "$file needs $strange"
done
for file in "$there"/bin/kava_[a-z]* "$there"/bin/replicate; do
  name=$(basename "$file")
  [ "$name" != kava_tests ] || continue
  "$file" --version | grep -q "^$name " || fail "$name --version does not run"
  [ -s "$there/share/man/man1/$name.1" ] || fail "$name has no page"
  grep -q "^complete.* $name\b" "$there/share/bash-completion/completions/kava" || fail "$name is not completed"
done
[ -s "$there/share/man/man5/kava.toml.5" ] || fail "kava.toml has no page"
"$there/bin/kava_inspect" step "$there/tests/golden/cases/kava_defaults.toml" --device cpu --threads 1 --out step.safetensors >/dev/null ||
  fail "a step does not run"

while read -r link; do
  [ -e "$there/$link" ] || fail "README.md links to $link, which is not there"
done < <(grep -oE '\]\([^):]+' "$there/README.md" | sed -e 's/^](//' -e 's/#.*//' -e '/^https$/d')
while read -r used; do
  [ -e "$there/$used" ] || fail "gpu_check.sh uses $used, which is not there"
done < <(sed -n 's/.*[$]root.\([a-z0-9_./]*\).*/\1/p' "$there/tools/gpu_check.sh" | grep -v ^build/)
# The quickstart takes the programs that lie beside it.
printf '#!/bin/sh\necho "data: $*"\nexit 9\n' >"$there/bin/kava_data"
code=0
"$there/tools/quickstart.sh" --out "$work/quickstart" >out || code=$?
if [ $code != 9 ] || ! grep -q "^data: synth --out $work/quickstart/data" out; then fail "the quickstart ended with $code: $(cat out)"; fi
echo "install: $(find "$there" -type f | wc -l) files, runs where it was moved to"
