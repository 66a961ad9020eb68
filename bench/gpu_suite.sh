#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: tests, cost parity, steps, loaders; a short table last.
# Usage: bench/gpu_suite.sh [--out DIR]      Without a GPU it says so and runs nothing that needs one.
set -u
cd "$(dirname "$0")/.." || exit 1
out=bench/results
[ "${1:-}" = --out ] && out=${2:?--out needs a folder}
mkdir -p "$out"
py=python3
[ -x .venv/bin/python ] && py=.venv/bin/python
summary=() failed=0

part() { # name, seconds, command: its output goes to a log; a failure or a time-out stops nothing
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 15 "$out/$name.log"
    case $code in 0) state=done ;; 124) state="timed out; what it had measured is in $out" failed=1 ;; *) state="failed ($code)" failed=1 ;; esac
    summary+=("$(printf '%-22s %4d s  %s' "$name" $((SECONDS - began)) "$state")")
}

for package in ffcv nvidia.dali; do
    $py -c "import $package" 2>/dev/null || summary+=("$package is missing: its loader is not measured")
done
if $py -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    part gpu_tests 80 $py -m pytest -m "gpu and not soak" -rs -p no:cacheprovider
    part cost_parity 200 $py -m bench.cost_parity --amp fp16 bf16 --rows 256 64 --rounds 6 --out "$out"
    part step 170 $py -m bench.step --rounds 5 --out "$out"
    images=${IMAGES:-data/bench_jpegs} # the first time these are made from two packages' photos, which needs a network
    [ -d "$images" ] || part photos 30 $py -m bench.jpegs "$images"
    [ -d "$images" ] || summary+=("no photos in $images: the loaders are not measured")
    [ ! -d "$images" ] || part loaders 50 $py -m bench.loaders --images "$images" --beton "$images.beton" --rounds 1 \
        --seconds 3 --only ffcv dali "dali, GPU, hw 0.65" "stock DALI, GPU" --out "$out"
else
    summary+=("no GPU: GPU tests, cost parity, steps and loaders on a GPU are not measured")
fi
for table in cost_parity_cuda step_cuda; do
    [ -f "$out/$table.md" ] && grep '^|' "$out/$table.md"
done
printf '%s\n' "== summary" "${summary[@]}" | tee "$out/summary.txt"
exit $failed
