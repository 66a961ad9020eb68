#!/usr/bin/env bash
# Proves the kit of `make kit` in a bare environment:   bench/gpu/prove_kit.sh PYTHON
# PYTHON is the interpreter of an environment like the GPU machine's: Python 3.12, torch and the packages of pyproject.toml,
# but no pydantic, faster-coco-eval, simplejpeg, FFCV or DALI. NORMAL (default .venv/bin/python) is the one to compare with, if it is there.
# The checks run in a copy of the working tree, without a network, and the system's OpenCV, TurboJPEG and TBB cannot be
# loaded. Needs Linux namespaces: root, or a kernel that gives them to users.
set -euo pipefail
python=${1:?usage: prove_kit.sh PYTHON}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
normal=${NORMAL:-$root/.venv/bin/python}
die() { echo "prove_kit: $*" >&2; exit 1; }
say() { printf '\n== %s\n' "$*"; }
fails() { # WHAT COMMAND...: fine if the command fails
    local what=$1
    shift
    if "$@" >"$work/expected.log" 2>&1; then die "$what works without the kit: the proof would prove nothing"; fi
    echo "without the kit, as it should be, $what fails: $(tail -n 1 "$work/expected.log" | cut -c1-150)"
}

if [ -z "${FAP_PROOF:-}" ]; then # outside: make the copy, then go on in namespaces of our own
    for upload in .gpu .gpu2; do [ -d "$root/$upload" ] || die "no $upload here: make kit"; done
    [ "$(cd "$(dirname "$python")" && pwd)/python3" -ef "$python" ] || die "there is no python3 beside $python that is the same"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/tree" "$work/proof" "$work/out"
    # what travels: tracked files and new ones that git does not ignore
    (cd "$root" && git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t "$work/tree" --)
    if [ -x "$normal" ]; then
        say "the normal environment: $normal"
        (cd "$work/tree" && "$normal" -m bench.gpu.proof make "$work/proof")
        # this library must not load once the system's are hidden, or nothing is hidden
        "$normal" -c 'import importlib.util; print(importlib.util.find_spec("ffcv").submodule_search_locations[0])' >"$work/ffcv"
    fi
    user=()
    [ "$(id -u)" -eq 0 ] || user=(--map-root-user)
    status=0
    env FAP_PROOF="$work" PATH="$(cd "$(dirname "$python")" && pwd):$PATH" \
        unshare --mount --net "${user[@]}" bash "${BASH_SOURCE[0]}" "$python" || status=$?
    exit "$status"
fi

work=$FAP_PROOF
cd "$work/tree"
export OUT=$work/out FAP_KIT=$work/kit
unset PYTHONPATH LD_LIBRARY_PATH PIP_CONFIG_FILE VIRTUAL_ENV
ip link set lo up 2>/dev/null || true # a machine without a network has its own address

say "hidden"
load() { python3 -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1"; }
for library in libturbojpeg.so.0 libtbb.so.12; do
    if load "$library" 2>/dev/null; then echo "before: the system's $library loads"; else echo "before: this system has no $library"; fi
done
hidden=0
for library in $(ldconfig -p | sed -nE 's/.*(libopencv_|libturbojpeg|libtbb).* => //p' | xargs -r -n1 realpath | sort -u); do
    mount --bind /dev/null "$library" # an empty file is no library: dlopen fails as if it were not there
    hidden=$((hidden + 1))
done
echo "$hidden libraries of OpenCV, TurboJPEG and TBB"
for library in libturbojpeg.so.0 libopencv_core.so.406 libtbb.so.12; do fails "loading $library" load "$library"; done
if [ -s "$work/ffcv" ]; then
    for library in "$(cat "$work/ffcv")"/_libffcv*.so; do fails "the normal environment's FFCV" load "$library"; done
fi
# the last two are ours, and cannot be imported for want of the others
for module in pydantic faster_coco_eval simplejpeg ffcv nvidia.dali fap.config pipelines.loaders.ffcv; do fails "import $module" python3 -c "import $module"; done

say "first upload: set-up, imports"
cp -r "$root/.gpu" .gpu
(
    set -euo pipefail
    source .gpu/setup_offline.sh
    python3 -m bench.gpu.imports >"$work/imports.log" || die "$(cat "$work/imports.log")"
    source .gpu/setup_offline.sh # again: nothing may change
    python3 -c 'import bench.convert' || die "FFCV's own Python files do not import"
    say "conversion and loader"
    python3 -m bench.gpu.proof check "$work/proof"
    say "photos into JPEGs, sheets into a .beton"
    python3 -m bench.jpegs "$work/jpegs" --count 40 2>/dev/null
    find "$work/jpegs" -name '*.JPEG' | wc -l
    python3 - "$work" <<'P'
import os, sys
from pathlib import Path
from bench.gpu import sheets
work = Path(sys.argv[1])
for split in ("train", "test"):
    print(split, sheets.beton(Path(os.environ["FAP_KIT"]) / "cifar10", split, work / f"first_{split}.beton"), "images")
P
)

say "run1.sh, dry"
export FAP_DRY_RUN=1
bash .gpu/run1.sh || true # 1 when a cell was not measured, as DALI's are not: judged below
failed=0
PYTHONPATH=$PWD:$FAP_KIT/site python3 -m bench.gpu.proof suite "$OUT/run1.tgz" || failed=1

say "second upload: it comes alone"
rm -rf .gpu
cp -r "$root/.gpu2" .gpu2
(
    set -euo pipefail
    source "$FAP_KIT/setup_offline.sh"
    python3 - "$work" <<'P'
import os, sys
from pathlib import Path
from bench.gpu import sheets
images, labels = sheets.read(Path(os.environ["FAP_KIT"]) / "cifar10", "train")
assert images.shape == (50_000, 32, 32, 3) and labels.shape == (50_000,), images.shape
print("train", len(images), "images, means", images.mean((0, 1, 2)).round(3), "labels", [int((labels == k).sum()) for k in range(10)])
P
)

say "run2.sh, dry"
bash "$FAP_KIT/run2.sh"
echo "comes back: $(ls "$OUT")"
[ "$failed" -eq 0 ] || die "some parts of the suite failed; they are named above"
say "the kit is proved with $(python3 --version)"
