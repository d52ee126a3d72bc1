#!/bin/sh
# What the tests of the JavaScript examples need: npm's packages, and Debian's Node and Chromium where they are missing.
# What cannot be had here is said, and the tests that need it are skipped.
set -u
cd "$(dirname "$0")/../../examples/javascript" || exit 1

install() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@") \
            >/dev/null 2>&1 || echo "web-tools: apt-get cannot install $*"
    else
        echo "web-tools: no rights to install $*"
    fi
}

command -v npm >/dev/null || install nodejs npm
{ command -v chromium && command -v chromedriver; } >/dev/null || install chromium chromium-driver
if ! command -v npm >/dev/null; then
    echo "web-tools: no npm, so the tests of the JavaScript examples are skipped"
elif [ ! node_modules/.package-lock.json -nt package-lock.json ]; then
    # No package may run anything while it is installed; onnxruntime-node would download.
    npm ci --ignore-scripts --no-audit --no-fund --loglevel=error || echo "web-tools: npm cannot install the packages"
fi
