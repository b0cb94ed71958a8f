#!/usr/bin/env bash
# Installs the browser that the tests of the web page drive (Debian and Ubuntu; about 290 MB), when it is missing.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then
    echo "browser: $(command -v "$name")"
    exit 0
  fi
done
if ! command -v apt-get >/dev/null; then
  echo "browser: expected chromium or apt-get, found neither; install Chromium with this system's packages" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  as_root=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
echo "browser: $(command -v chromium)"
