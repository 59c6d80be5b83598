#!/bin/bash
# What tests/commands/view/test_in_chromium.py needs: a browser, from Debian. Needs root.
set -euo pipefail
command -v chromium > /dev/null && exit
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
