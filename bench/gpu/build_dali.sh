#!/usr/bin/env bash
# CHECKED ON A CPU ONLY: whether the thinned kernels load on an H100 is not known.
# DALI small enough for an upload of its own, .gpu3/: code for sm_90 and CPython 3.12 only, without decoders that JPEGs
# do not need. Takes ten minutes of xz on two cores. No part of `make kit`; run1.sh does not use it. On the GPU machine:
#   mkdir -p /tmp/dali && tar xJf .gpu3/dali.tar.xz -C /tmp/dali
#   for wheel in .gpu3/wheels/*.whl; do python3 -m zipfile -e "$wheel" /tmp/dali; done
#   export PYTHONPATH=$PWD:/tmp/dali:$PYTHONPATH
# Usage: bench/gpu/build_dali.sh [--no-xz]      --no-xz: stop after thinning and show the size
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
py=${PY:-.venv/bin/python}
packages=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ -d "$packages/nvidia/dali" ] || { echo "build_dali: no DALI in $packages" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
out=$work/gpu3
mkdir -p "$tree/nvidia/cu13/lib" "$out/wheels"

echo "== copy, without what JPEGs on one Python do not need"
cp -r "$packages/nvidia/dali" "$packages/nvidia/nvimgcodec" "$tree/nvidia/"
cp "$packages/nvidia/cu13/lib/libnvjpeg.so.13" "$tree/nvidia/cu13/lib/"
# the machine's own nvidia packages stay importable beside this one
echo '__path__ = __import__("pkgutil").extend_path(__path__, __name__)' >"$tree/nvidia/__init__.py"
chmod -R u+w "$tree"
rm -rf "$tree"/nvidia/dali/include "$tree"/nvidia/nvimgcodec/{include,tools}
rm -f "$tree"/nvidia/nvimgcodec/extensions/lib{opencv,tiff,nvtiff,nvjpeg2k,nvpnm,nvbmp}_ext*
find "$tree" -name __pycache__ -type d -prune -exec rm -rf {} +
find "$tree" -name '*.cpython-3*.so' ! -name '*cpython-312-*' -delete

echo "== thin"
mapfile -d '' libraries < <(find "$tree" -type f \( -name '*.so' -o -name '*.so.*' \) -print0)
"$py" -m bench.gpu.thin "${libraries[@]}"
for library in "${libraries[@]}"; do strip --strip-unneeded "$library"; done
du -sm "$tree"
if [ "${1:-}" = --no-xz ]; then exit 0; fi

echo "== wheels and archive"
"$py" - >"$work/wanted" <<'P'
from bench.gpu.build_kit import constraint
for package in ("astunparse", "gast", "six", "optree", "nvtx", "makefun", "libcst"):
    print(constraint(package))
P
"$py" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --dest "$out/wheels" --requirement "$work/wanted"
tar c -C "$tree" nvidia | xz -9 -T0 >"$out/dali.tar.xz"
du -sm "$out"
rm -rf .gpu3
mv "$out" .gpu3
