#!/usr/bin/env bash
# Writes the manual from what the programs and docs/configuration.md say of themselves: a page for each program and for the configuration,
# and the completion of their options, commands and keys for bash.
# Usage: tools/manual.sh BIN OUT      (OUT/man1/*.1, OUT/man5/kava.toml.5, OUT/bash-completion/kava)
# shellcheck disable=SC2016  # the completion is written, not run
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "${1:?usage: tools/manual.sh BIN OUT}" && pwd) out=${2:?usage: tools/manual.sh BIN OUT}
mkdir -p "$out/man1" "$out/man5" "$out/bash-completion"

# Examples in --help name a program as it was called, here by its name alone.
help_of() { PATH=$bin:$PATH COLUMNS=100 "$@" --help; }
# Text as groff shows it letter by letter.
plain() { sed -e 's/\\/\\e/g' -e 's/-/\\-/g' -e "s/^\\([.']\\)/\\\\\\&\\1/"; }
commands_of() { awk '/^Subcommands:/ { on = 1; next } on && /^  [a-z]/ { print $1; next } /^$/ { on = 0 }' <<<"$1"; }
options_of() { grep -oE '^  (-[a-z],)?--[a-z-]+' <<<"$1" | grep -oE -- '--[a-z-]+' | sort -u | paste -sd ' '; }
page() {  # NAME SECTION SUMMARY, the body from standard input
  printf '.TH %s %s "" "kava" "kava"\n.SH NAME\n%s \\- %s\n' "$1" "$2" "$1" "$(plain <<<"$3")"
  cat
}
verbatim() { printf '.SH %s\n.nf\n' "$1"; plain; printf '.fi\n'; }

keys=$(sed -n 's/^| `\([a-z_]*\(\.[a-z_]*\)*\)` | .*/\1/p' "$here/docs/configuration.md" | paste -sd ' ')
{
  echo '# Completion of options, commands and keys of --set for bash.'
  echo "_kava_keys='$keys'"
  printf '_kava() {\n  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words\n'
  printf '  if [ "$before" = --set ]; then\n    compopt -o nospace\n'
  printf '    mapfile -t COMPREPLY < <(compgen -S = -W "$_kava_keys" -- "$word")\n    return\n  fi\n'
  printf '  case "${COMP_WORDS[0]##*/} ${COMP_WORDS[1]}" in\n'
} >"$out/bash-completion/kava"

names=()
for program in "$bin"/kava_[a-z]* "$bin"/replicate; do
  [ -x "$program" ] || continue
  name=$(basename "$program")
  [ "$name" != kava_tests ] || continue
  names+=("$name")
  help=$(help_of "$name")
  mapfile -t commands < <(commands_of "$help")
  {
    page "$name" 1 "$(head -n 1 <<<"$help")" </dev/null
    tail -n +2 <<<"$help" | verbatim SYNOPSIS
    for command in "${commands[@]}"; do
      text=$(help_of "$name" "$command")
      verbatim "\"$name $command\"" <<<"$text"
      printf "    '%s %s') words='%s' ;;\n" "$name" "$command" "$(options_of "$text")" >>"$out/bash-completion/kava"
    done
    printf '.SH "SEE ALSO"\nkava.toml(5)\n'
  } >"$out/man1/$name.1"
  printf "    '%s '*) words='%s' ;;\n" "$name" "$(options_of "$help") ${commands[*]}" >>"$out/bash-completion/kava"
done
{
  printf "    *) words= ;;\n  esac\n"
  printf '  mapfile -t COMPREPLY < <(compgen -W "$words" -f -- "$word")\n}\n'
  printf 'complete -F _kava %s\n' "${names[*]}"
} >>"$out/bash-completion/kava"

verbatim DESCRIPTION <"$here/docs/configuration.md" | page kava.toml 5 "configuration of a run" >"$out/man5/kava.toml.5"
