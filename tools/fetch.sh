#!/usr/bin/env bash
# Gets models and data sets from a server of the Hugging Face hub's layout, each file checked against the size and checksum that the server
# lists for it. What is there already and whole is not got again.
# Usage: tools/fetch.sh [--from URL] [--out DIR] [--revision REV] model|data OWNER/NAME [FILE...]
#   --from URL      the server (default: the variable HF_ENDPOINT)
#   --out DIR       default: weights/NAME or data/NAME
#   --revision REV  a branch, tag or commit (default: main)
#   FILE...         these alone; else of a model its configuration, tokenizer and safetensors, of a data set its json, jsonl, txt and parquet
# HF_TOKEN is sent where it is set, for models behind a licence. Exit 2: usage; 4: a file is not what the server lists; 6: no answer.
set -euo pipefail

fail() { local code=$1; shift; printf 'error: %s\n' "$*" >&2; exit "$code"; }
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }

from=${HF_ENDPOINT:-} out='' revision=main words=()
while [ $# -gt 0 ]; do
  case $1 in
    --from | --out | --revision)
      [ $# -ge 2 ] || fail 2 "$1: no value; see tools/fetch.sh --help"
      case $1 in --from) from=$2 ;; --out) out=$2 ;; *) revision=$2 ;; esac
      shift 2
      ;;
    -h | --help) usage; exit 0 ;;
    -*) fail 2 "$1: unknown option; see tools/fetch.sh --help" ;;
    *) words+=("$1"); shift ;;
  esac
done
kind=${words[0]:-} name=${words[1]:-}
[[ ($kind == model || $kind == data) && $name =~ ^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?$ ]] ||
  fail 2 "give model or data, and OWNER/NAME; see tools/fetch.sh --help"
[[ $revision =~ ^[A-Za-z0-9._-]+$ ]] || fail 2 "--revision $revision: no name of a revision; give a branch, tag or commit"
[ -n "$from" ] || fail 2 "--from: no server given; name one, or set HF_ENDPOINT"
from=${from%/} wanted=("${words[@]:2}")

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ -z "${HF_TOKEN:-}" ] || printf 'Authorization: Bearer %s\n' "$HF_TOKEN" >"$scratch/token"  # no argument, which others of the machine see

get() {  # URL FILE
  if command -v curl >/dev/null; then
    curl -fsSL --retry 3 --retry-delay 2 ${HF_TOKEN:+-H "@$scratch/token"} -o "$2" -- "$1"
  elif [ -n "${HF_TOKEN:-}" ]; then
    fail 6 "HF_TOKEN is set, and there is no curl: wget would send it to every server that the first one names; apt-get install curl"
  elif command -v wget >/dev/null; then
    wget -q --tries=4 -O "$2" -- "$1"
  else
    fail 6 "neither curl nor wget is there; apt-get install curl"
  fi
}

case $kind in
  model) place=models path=$name out=${out:-weights/${name##*/}} take='^[^/]+\.json$|^(vocab|merges)\.txt$|^model[^/]*\.safetensors$' ;;
  data) place=datasets path=datasets/$name out=${out:-data/${name##*/}} take='\.(jsonl?|txt|parquet)$' ;;
esac
list="$from/api/$place/$name/tree/$revision?recursive=true"
get "$list" "$scratch/tree" || fail 6 "$list: no answer; check the server, the name and HF_TOKEN"

# PATH SIZE SUM of each file: SUM is the SHA-256 of a large one, else the name that git gives its bytes.
listed=$(tr -d '\n' <"$scratch/tree" | sed -E 's/"([a-z]+)" *: */"\1":/gi; s/"lfs":\{"oid":"(sha256:)?([0-9a-f]{64})"[^}]*\}/"sum":"\2"/g; s/\}/}\n/g' |
  awk '
    function value(key,  at) {
      at = "\"" key "\":\"?[^\",}]*"
      if (!match($0, at)) return ""
      at = substr($0, RSTART, RLENGTH)
      sub("^\"" key "\":\"?", "", at)
      return at
    }
    value("type") == "file" { sum = value("sum"); print value("path"), value("size"), sum == "" ? value("oid") : sum }')
[ -n "$listed" ] || fail 4 "$list: lists no file; check the name"

sum_of() {  # FILE SUM
  if [ ${#2} -eq 64 ]; then sha256sum "$1" | cut -d ' ' -f 1; else { printf 'blob %s\0' "$(stat -c %s "$1")"; cat "$1"; } | sha1sum | cut -d ' ' -f 1; fi
}
is_whole() {  # FILE SIZE SUM
  [ -f "$1" ] && [ "$(stat -c %s "$1")" = "$2" ] && [ "$(sum_of "$1" "$3")" = "$3" ]
}

got=0
while read -r file size sum; do
  if [ ${#wanted[@]} -gt 0 ]; then
    printf '%s\n' "${wanted[@]}" | grep -qxF -- "$file" || continue
  else
    [[ $file =~ $take ]] || continue
  fi
  [[ $file =~ ^[A-Za-z0-9._/-]+$ && /$file/ != */../* && $file != /* && $sum =~ ^([0-9a-f]{40}|[0-9a-f]{64})$ ]] ||
    fail 4 "$list: has the odd entry $file; get it by hand"
  got=$((got + 1))
  if is_whole "$out/$file" "$size" "$sum"; then
    printf '%s: there, %s bytes\n' "$out/$file" "$size"
    continue
  fi
  mkdir -p "$(dirname "$out/$file")"
  get "$from/$path/resolve/$revision/$file" "$out/$file.part" || { rm -f "$out/$file.part"; fail 6 "$from/$path/resolve/$revision/$file: no answer; run again"; }
  if ! is_whole "$out/$file.part" "$size" "$sum"; then
    rm -f "$out/$file.part"
    fail 4 "$file: is not what the server lists ($size bytes, $sum); run again, or name another server"
  fi
  mv "$out/$file.part" "$out/$file"
  printf '%s: %s bytes, checksum right\n' "$out/$file" "$size"
done <<<"$listed"
[[ $got -gt 0 && $got -ge ${#wanted[@]} ]] || fail 4 "$list: lists $got of the files asked for${wanted[*]:+ (${wanted[*]})}; check their names"
if [ "$kind" = model ]; then printf 'use it by --set model.path=%s, or as MODEL\n' "$out"; else printf 'see what it holds by kava_data stats %s/FILE\n' "$out"; fi
if compgen -G "$out/*.parquet" >/dev/null || compgen -G "$out/*/*.parquet" >/dev/null; then echo "tools/parquet_to_jsonl.py turns parquet into jsonl"; fi
