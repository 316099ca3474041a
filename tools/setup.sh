#!/usr/bin/env bash
# Installs what kava is built with on Debian 12 and 13, by package name, and says what it does. Nothing is done for what is there already.
# Usage: tools/setup.sh [PACKAGE...]      (with these too)
set -euo pipefail

packages=(g++ make git cmake ninja-build pkg-config libdnnl-dev libtomlplusplus-dev nlohmann-json3-dev libcli11-dev libfmt-dev libpcre2-dev
          libutf8proc-dev libssl-dev libedit2 libopenmpi-dev openmpi-bin "$@")

say() { printf 'setup: %s\n' "$*"; }
installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'install ok installed'; }
catch2_version() { dpkg-query -W -f '${Version}' libcatch2-dev 2>/dev/null || true; }

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  say "this is no Debian system; install the equivalents of: ${packages[*]} and Catch2 >= 3.4, then build with cmake --preset cpu"
  exit 0
fi

missing=()
for p in "${packages[@]}"; do installed "$p" || missing+=("$p"); done
need_catch2=no
dpkg --compare-versions "$(catch2_version)" ge 3.4 2>/dev/null || need_catch2=yes
if [ ${#missing[@]} -eq 0 ] && [ "$need_catch2" = no ]; then
  say "everything is installed"
  exit 0
fi

root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { say "needs root (or sudo) to install: ${missing[*]} libcatch2-dev"; exit 3; }
  root=(sudo)
fi
# What apt says is told where it fails alone: a bare system's debconf complains of what is no fault.
apt() {
  local log
  log=$(mktemp)
  if "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >"$log" 2>&1; then
    rm -f "$log"
  else
    cat "$log" >&2
    rm -f "$log"
    say "apt-get $1 failed, see above"
    return 1
  fi
}

# Debian 12 has Catch2 v3 in bookworm-backports, a suite of the archive that the system already uses. 1 where that is another system.
add_backports() {
  local deb822=/etc/apt/sources.list.d/debian.sources list=/etc/apt/sources.list
  if [ -f "$deb822" ] && grep -q '^Suites:.*\bbookworm\b' "$deb822"; then
    say "adding the suite bookworm-backports to $deb822"
    "${root[@]}" sed -i '/^Suites:.*\bbookworm-updates\b/ { /bookworm-backports/! s/$/ bookworm-backports/ }' "$deb822"
    grep -q bookworm-backports "$deb822" || "${root[@]}" sed -i '0,/^Suites:.*\bbookworm\b/ s/^Suites:.*\bbookworm\b.*/& bookworm-backports/' "$deb822"
  elif [ -f "$list" ] && grep -qE '^deb .* bookworm main' "$list"; then
    say "adding the suite bookworm-backports to /etc/apt/sources.list.d/bookworm-backports.list"
    grep -E '^deb .* bookworm main' "$list" | head -n 1 | sed 's/ bookworm main/ bookworm-backports main/' |
      "${root[@]}" tee /etc/apt/sources.list.d/bookworm-backports.list >/dev/null
  else
    return 1
  fi
}
# To be read to their ends: apt-cache fails where a reader leaves early.
candidate() { LC_ALL=C apt-cache policy "$1" | awk '$1 == "Candidate:" { print $2 }'; }
of_backports() { apt-cache madison libcatch2-dev | awk '/bookworm-backports/'; }

say "updating the package lists"
apt update
if [ ${#missing[@]} -gt 0 ]; then
  say "installing ${missing[*]}"
  say "this may say nothing for a minute or two, which is normal"
  apt install -y --no-install-recommends "${missing[@]}"
fi
if [ "$need_catch2" = yes ]; then
  suite=''
  if dpkg --compare-versions "$(candidate libcatch2-dev)" lt 3.4; then
    if [ -z "$(of_backports)" ] && add_backports; then apt update; fi
    if [ -n "$(of_backports)" ]; then suite=bookworm-backports; else need_catch2=none; fi
  fi
  if [ "$need_catch2" = none ]; then
    say "this system has no Catch2 >= 3.4: the programs can be built (-DKAVA_TESTS=OFF), not the tests"
  else
    say "installing libcatch2-dev${suite:+ from $suite}"
    apt install -y --no-install-recommends "libcatch2-dev${suite:+/$suite}"
  fi
fi
say "done"
