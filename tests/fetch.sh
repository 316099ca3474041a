#!/usr/bin/env bash
# fetch.sh: tools/fetch.sh against a file server on this machine that has the hub's layout: whole files, one that is damaged on its way, one
# that is there already, a server that does not answer.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
for program in python3 sha256sum; do command -v "$program" >/dev/null || { echo "fetch: skipped: no $program"; exit 4; }; done
command -v curl >/dev/null || command -v wget >/dev/null || { echo "fetch: skipped: neither curl nor wget"; exit 4; }
work=$(mktemp -d)
server=''
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; rm -rf "$work"' EXIT
fail() { echo "fetch: $*" >&2; exit 1; }

mkdir -p "$work/hub/api/models/org/tiny/tree" "$work/hub/org/tiny/resolve/main" "$work/hub/api/datasets/org/rows/tree" \
  "$work/hub/datasets/org/rows/resolve/main/main"
model=$work/hub/org/tiny/resolve/main
cp "$here"/tests/golden/models/llama/config.json "$model"
seq 60000 >"$model/model.safetensors" && truncate -s 300000 "$model/model.safetensors"  # digits: an x changes any of it
echo '{}' >"$model/pytorch_model.bin"
printf 'a||<<1+1=2>> #### 2\n' >"$work/hub/datasets/org/rows/resolve/main/main/train.txt"
blob() { { printf 'blob %s\0' "$(stat -c %s "$1")"; cat "$1"; } | sha1sum | cut -d ' ' -f 1; }
entry() { printf '{"type":"file","oid":"%s","size":%s,%s"path":"%s"}' "$(blob "$1")" "$(stat -c %s "$1")" "${3:-}" "$2"; }
sha=$(sha256sum "$model/model.safetensors" | cut -d ' ' -f 1)
printf '[{"type":"directory","oid":"0","size":0,"path":"onnx"},%s,%s,%s]' "$(entry "$model/config.json" config.json)" \
  "$(entry "$model/model.safetensors" model.safetensors "\"lfs\":{\"oid\":\"$sha\",\"size\":300000,\"pointerSize\":134},")" \
  "$(entry "$model/pytorch_model.bin" pytorch_model.bin)" >"$work/hub/api/models/org/tiny/tree/main"
printf '[%s]' "$(entry "$work/hub/datasets/org/rows/resolve/main/main/train.txt" main/train.txt)" >"$work/hub/api/datasets/org/rows/tree/main"

python3 -u - "$work/hub" >"$work/port" 2>/dev/null <<'END' &
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
print(server.server_port, flush=True)
server.serve_forever()
END
server=$!
for _ in $(seq 100); do [ -s "$work/port" ] && break; sleep 0.1; done
url=http://127.0.0.1:$(cat "$work/port")
cd "$work"
fetch() { env -u HF_TOKEN HF_ENDPOINT="$url" "$here/tools/fetch.sh" "$@" >out 2>&1; }
code() { local got=0; fetch "${@:2}" || got=$?; [ "$got" = "$1" ] || { cat out >&2; fail "$* gave $got"; }; }

code 0 model org/tiny
cmp -s weights/tiny/model.safetensors "$model/model.safetensors" || fail "the weights differ"
cmp -s weights/tiny/config.json "$model/config.json" || fail "config.json differs"
[ ! -e weights/tiny/pytorch_model.bin ] || fail "a pickle was got"
code 0 model org/tiny
grep -q 'model.safetensors: there, 300000 bytes' out || fail "a whole file was got again"
code 0 --out d data org/rows
cmp -s d/main/train.txt hub/datasets/org/rows/resolve/main/main/train.txt || fail "the data differ"

# Damage of the same size, and a cut: neither stays.
cp "$model/model.safetensors" whole
for damage in 'printf x | dd of=model bs=1 seek=1000 conv=notrunc status=none' 'truncate -s 299999 model'; do
  cp whole model
  eval "$damage"
  cp model "$model/model.safetensors"
  rm -rf broken
  code 4 --out broken model org/tiny
  grep -q 'is not what the server lists' out || fail "damage was told otherwise: $(cat out)"
  for left in broken/model.safetensors broken/model.safetensors.part; do [ ! -e "$left" ] || fail "a damaged file stayed"; done
done
code 2 model
code 2 --from '' model org/tiny
code 6 model org/nothing
code 6 --from http://127.0.0.1:9 model org/tiny
code 4 model org/tiny nothing.json
echo "fetch: 2 repositories got, 2 damages and 5 faults told"
