#!/usr/bin/env bash
# First command on a GPU machine without a network, in the repository root, with .gpu uploaded:
#   bash .gpu/run1.sh [SECONDS]        SECONDS: until it must have ended, set-up included; default 540
# FAP_DRY_RUN=1 only says what would be measured.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_offline.sh"
arguments=(--out "$OUT" --seconds $((${1:-540} - SECONDS)))
[ "${FAP_DRY_RUN:-0}" = 0 ] || arguments+=(--dry-run)
exec python3 -m bench.gpu.suite "${arguments[@]}"
