#!/usr/bin/env bash
# First command on a GPU machine without a network, in the repository root, with .gpu uploaded:
#   bash .gpu/run1.sh [SECONDS]        SECONDS: until it must have ended, set-up included; default 540
# FAP_DRY_RUN=1 tries every part at toy size, on a CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_offline.sh"
arguments=(--seconds $((${1:-540} - SECONDS)))
# the study is the second command's: it needs the second upload
if [ "${FAP_DRY_RUN:-0}" = 0 ]; then arguments+=(--skip study); else arguments+=(--dry-run); fi
measure run1 python3 -m bench.gpu.suite "${arguments[@]}"
