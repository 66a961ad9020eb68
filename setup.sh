#!/usr/bin/env bash
# Makes .venv with everything that `make demo` and `make test` need. Running it again costs nothing
# until a pin changes. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '\n[setup] %s\n' "$*"; }
die() { printf '\n[setup] ERROR: %s\n' "$*" >&2; exit 1; }

# The stamp is written last. It names what .venv was made from, and where: one that was moved is
# made anew.
stamp=.venv/.fap-setup
key=$(cat setup.sh constraints.txt build-constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key $PWD" ]; then exit 0; fi

# --- Python ---------------------------------------------------------------------------------------
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
py=
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    if new_enough "$candidate"; then py=$candidate; break; fi
    [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python >= 3.11"
done
[ -n "$py" ] || die "no Python >= 3.11 found. Debian 12, Ubuntu 24.04 or newer: \
apt-get install python3 python3-venv python3-dev. Elsewhere: PYTHON=/path/to/python make setup"
version=$("$py" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
say "Python $version: $(command -v "$py")"

# --- Debian packages ------------------------------------------------------------------------------
# FFCV's decoder is compiled here: it needs a compiler and the headers of what it links.
need=()
if [ ! -x .venv/bin/pip ]; then
    "$py" -c 'import ensurepip, venv' 2>/dev/null || need+=("python$version-venv")
fi
"$py" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
    || need+=("python$version-dev")
command -v g++ >/dev/null || need+=(g++)
command -v pkg-config >/dev/null || need+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || need+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || need+=(libturbojpeg0-dev)
if [ ${#need[@]} -gt 0 ]; then
    say "these system packages are missing (FFCV's decoder is compiled against them): ${need[*]}"
    wanted="apt-get update && apt-get install --no-install-recommends ${need[*]}"
    command -v apt-get >/dev/null \
        || die "no apt-get here: install what corresponds to ${need[*]} and run this again"
    root=()
    if [ "$(id -u)" -ne 0 ]; then
        # Without a terminal nobody could type a password.
        if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
            root=(sudo)
        else
            die "not root and no sudo. Ask someone who is to run:  $wanted   \
and then run this again"
        fi
    fi
    say "installing them (about 700 MB on a bare system)"
    # A fresh machine often updates itself in the background: wait for its lock, up to five minutes.
    lock=(-o DPkg::Lock::Timeout=300)
    "${root[@]}" apt-get update -q "${lock[@]}" || die "'apt-get update' failed; its message is above"
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y "${lock[@]}" --no-install-recommends "${need[@]}" \
        || die "'apt-get install ${need[*]}' failed; its message is above"
fi

# --- Python packages ------------------------------------------------------------------------------
pip_install() {
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt "$@" \
        || die "'pip install $*' failed; its message is above (no network? disk full? 'df -h .')"
}
# A virtual environment that was moved or copied still points to where it was made.
made_for=$(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null) || true
if [ -e .venv ] && [ "$made_for" != "$PWD/.venv" ]; then
    say "removing a .venv that does not work here"
    rm -rf .venv
fi
if [ ! -x .venv/bin/pip ]; then
    say "creating .venv"
    "$py" -m venv --clear .venv || die "'$py -m venv .venv' failed; its message is above"
fi
say "1/3 pip"
pip_install --quiet --upgrade 'pip>=25.3' setuptools
say "2/3 PyTorch, DALI and the rest (a download of about 3.5 GB the first time, 6 GB on disk)"
# scikit-image is what imagecorruptions-imaug needs beyond our own dependencies.
pip_install --progress-bar on -e '.[dev,dali,all]' scikit-image | grep -v 'already satisfied'
say "3/3 FFCV (compiled here) and imagecorruptions-imaug"
# --no-deps: both ask for opencv-python, which needs libGL; opencv-python-headless is already there.
pip_install --no-deps --build-constraint build-constraints.txt ffcv imagecorruptions-imaug
broken="the installed packages do not import; the message is above. \
'rm -rf .venv && make setup' starts afresh"
.venv/bin/python - <<'PY' || die "$broken"
import cv2, ffcv.libffcv, imagecorruptions, numba, torch, torchvision, nvidia.dali as dali
torches = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
decoders = f"numba {numba.__version__}, OpenCV {cv2.__version__}, DALI {dali.__version__}"
print(f"{torches}, {decoders}, GPU: {torch.cuda.is_available()}")
PY
printf '%s' "$key $PWD" > "$stamp"
say "done"
