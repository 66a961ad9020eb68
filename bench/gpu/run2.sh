#!/usr/bin/env bash
# Second command, on the same machine at once after the first, with .gpu2 uploaded:
#   bash /tmp/kit/run2.sh [SECONDS]    the CIFAR-10 study, as many runs as fit; default 240
# Without the second upload it has fewer training images. FAP_DRY_RUN=1 trains on a handful of noise images, on any machine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_offline.sh"
arguments=(--seconds $((${1:-240} - SECONDS)))
if [ "${FAP_DRY_RUN:-0}" = 0 ]; then arguments+=(--kit "$FAP_KIT/cifar10"); else arguments+=(--toy); fi
measure run2 python3 -m bench.gpu.study "${arguments[@]}"
