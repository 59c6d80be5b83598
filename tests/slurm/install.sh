#!/bin/bash
# What the tests of this folder need: a real Slurm, from Debian or Ubuntu, not started as a service. Needs root.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurm-wlm munge iproute2 gcc libc6-dev libslurm-dev openssh-server rsync
