#!/usr/bin/env bash
# Second command, on the same machine at once after the first, with .gpu2 uploaded:
#   bash /tmp/kit/run2.sh [SECONDS]    the CIFAR-10 study, as many runs as fit; default 240
# Without the second upload it has fewer training images. FAP_DRY_RUN=1 only says what would be trained.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_offline.sh"
arguments=(--out "$OUT" --seconds $((${1:-240} - SECONDS)))
[ "${FAP_DRY_RUN:-0}" = 0 ] || arguments+=(--dry-run)
exec python3 -m bench.gpu.study "${arguments[@]}"
