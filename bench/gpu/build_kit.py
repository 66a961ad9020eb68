"""What does a GPU machine without a network lack? Two folders of it, which fit an upload each.

    python -m bench.gpu.build_kit      # make kit

Writes `.gpu/`, which travels first, and `.gpu2/`; README.md beside this file has the commands.
Needs a network, g++, readelf, npm, and the Debian packages of setup.sh. Both folders appear when
both are complete; a failure leaves what was there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from bench import jpegs
from bench.common import ROOT
from bench.gpu import sheets
from fap.versions import versions
from pipelines.sources import cifar10

FIRST = ".gpu"
SECOND = ".gpu2"
MIB = float(1 << 20)  # bytes
LIMIT_MIB = 60.0  # an upload holds 64 MiB, the working tree included
HERE = Path(__file__).resolve().parent
SCRIPTS = ("run1.sh", "run2.sh", "setup_offline.sh")

# The GPU machine's Python. FFCV's library does not depend on it, these wheels do.
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# What it lacks: COCO's scorer; the decoder of JPEGs; pydantic and all that it needs, for it may ask
# for newer ones than torch does.
PACKAGES = (
    "faster-coco-eval",
    "simplejpeg",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing_extensions",
)

PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")

NEWEST_GLIBC = (2, 35)  # the GPU machine's may be older than ours
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|stdc\+\+|gcc_s|z)\.so\.\d+|ld-linux.*")
# in the order in which they need each other
OPENCV_ARCHIVES = ("libopencv_imgproc.a", "libopencv_core.a")
BUNDLED = ("libturbojpeg.so.0", "libtbb.so.12")
# OpenCV's core refers to one function of OpenGL, which nothing here calls.
OPENGL_STUB = """
void (*glXGetProcAddressARB(const unsigned char *name))(void) { (void)name; return 0; }
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; one that fails ends the build with its message."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"kit: there is no {command[0]} here; setup.sh names the packages")
    if done.returncode:
        shown = " ".join(str(word) for word in command)
        sys.exit(f"kit: '{shown}' failed:\n{done.stderr or done.stdout}")
    return done.stdout


def pinned(package: str, text: str) -> str:
    """`package==version` as constraints.txt has it; case and - or _ make no difference."""

    def plain(name: str) -> str:
        return re.sub("[-_.]+", "-", name).lower()

    for line in text.splitlines():
        name, found, version = line.partition("==")
        if found and plain(name) == plain(package):
            return f"{package}=={version.strip()}"
    raise ValueError(f"constraints.txt has no version of {package}")


def constraint(package: str) -> str:
    return pinned(package, (ROOT / "constraints.txt").read_text())


def download(folder: Path, *words: str) -> None:
    run(*PIP_DOWNLOAD, "--dest", folder, *words)


def add_wheels(folder: Path) -> None:
    """Wheels for the GPU machine's Python, unpacked there without pip."""
    target = ["--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    wanted = [constraint(package) for package in PACKAGES]
    download(folder, "--only-binary=:all:", *target, *wanted)
    for wheel in folder.glob("*.whl"):
        check_unpackable(wheel)


def check_unpackable(wheel: Path) -> None:
    """Ends the build if a wheel has files for places other than site-packages that are no notes."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".data/" in name and not name.endswith((".txt", "/")):
                sys.exit(f"kit: {wheel.name} has {name}, for a place other than site-packages")


def system_library(name: str, package: str) -> Path:
    found = Path(run("g++", f"-print-file-name={name}").strip())
    if not found.is_absolute():
        sys.exit(f"kit: {name} is missing: apt-get install {package}")
    return found.resolve()


def add_ffcv(site: Path, work: Path) -> None:
    """FFCV's Python files and its native library, which needs no package of the system.

    OpenCV is linked in; TurboJPEG and TBB lie beside the library, which looks for them there first.
    """
    archives = [system_library(name, "libopencv-dev") for name in OPENCV_ARCHIVES]
    bundled = [system_library(name, "libopencv-dev libturbojpeg0-dev") for name in BUNDLED]
    source = ffcv_source(work)
    package = site / "ffcv"
    shutil.copytree(source / "ffcv", package)
    for library, name in zip(bundled, BUNDLED, strict=True):
        shutil.copy(library, package / name)
    target = package / "_libffcv.abi3.so"
    compile_ffcv(source, archives, work, target)
    for library in (target, *(package / name for name in BUNDLED)):
        check_portable(library)


def ffcv_source(work: Path) -> Path:
    """FFCV's source package, unpacked."""
    version = constraint("ffcv")
    build_tools = str(ROOT / "build-constraints.txt")
    download(work, "--no-binary=ffcv", "--build-constraint", build_tools, version)
    source = work / version.replace("==", "-")
    with tarfile.open(f"{source}.tar.gz") as archive:
        archive.extractall(work, filter="data")
    return source


def compile_ffcv(source: Path, archives: list[Path], work: Path, target: Path) -> None:
    """The native library of the source package, with OpenCV's archives linked in."""
    stub = work / "opengl_stub.c"
    stub.write_text(OPENGL_STUB)
    include = sysconfig.get_path("include")  # FFCV has one empty PyInit function: any version's do
    opencv = run("pkg-config", "--cflags", "opencv4").split()
    libraries = [f"-l:{name}" for name in (*BUNDLED, "libz.so.1")]
    run(
        *("g++", "-O3", "-fPIC", "-shared", "-ffunction-sections"),
        *(f"-I{include}", *opencv),
        source / "libffcv" / "libffcv.cpp",
        *("-x", "c", stub, "-x", "none"),
        *("-o", target),
        *("-static-libstdc++", "-static-libgcc"),
        *("-Wl,--gc-sections", "-Wl,--exclude-libs,ALL"),
        "-Wl,-rpath,$ORIGIN",  # the bundled libraries lie beside this one
        *archives,
        *libraries,
    )
    run("strip", "--strip-unneeded", target)


def check_portable(library: Path) -> None:
    """Ends the build if a library needs one that a bare machine lacks, or a newer glibc."""
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "--dynamic", library)))
    foreign = []
    for name in sorted(needed - set(BUNDLED)):
        if not SYSTEM_LIBRARIES.fullmatch(name):
            foreign.append(name)
    if foreign:
        sys.exit(f"kit: {library.name} needs {', '.join(foreign)}, which a bare machine lacks")
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", run("readelf", "--version-info", library))
    newest = max((int(major), int(minor)) for major, minor in versions)
    if newest > NEWEST_GLIBC:
        sys.exit(f"kit: {library.name} needs glibc {newest}, newer than {NEWEST_GLIBC}")


def add_photos(folder: Path) -> None:
    """The wheels of bench.jpegs with nothing but their photos; the JPEGs are made there."""
    for source in jpegs.wheels():
        target = folder / source.name
        with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as small:
            for name in jpegs.members(whole):
                small.writestr(name, whole.read(name))


def add_cifar10(first: Path, second: Path) -> None:
    """The test set and part of the training set go into the first upload, the rest into the second.

    So the first upload alone is enough for a study of fewer images. Both get about one size.
    """
    sheets.write(first, "test", *cifar10.load("test", ROOT / "data" / "cifar10"))
    train = sheets.write(second, "train", *cifar10.load("train", ROOT / "data" / "cifar10"))
    half = (size_of(first.parent) + size_of(second.parent)) / 2
    for sheet in train:
        if size_of(first.parent) + sheet.stat().st_size / 2 > half:
            break  # the larger of the two would not get smaller
        for file in (sheet, sheets.labels_of(sheet)):
            file.rename(first / file.name)


def files_in(folder: Path) -> list[Path]:
    """Of the folder and all below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    """Bytes of all files in the folder."""
    return sum(path.stat().st_size for path in files_in(folder))


def write_sums(folder: Path, name: str) -> None:
    """SHA-256 of every file, in sha256sum's format: a damaged upload is noticed on arrival."""
    lines = []
    for path in files_in(folder):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder)}\n")
    (folder / name).write_text("".join(lines))


def tree_size() -> int:
    """Bytes of the working tree that travel along: all files that git does not ignore."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    files = [ROOT / name for name in listed.split("\0")]
    return sum(file.stat().st_size for file in files if file.is_file())


def check_sizes(uploads: Iterable[Path], tree: int) -> None:
    """Print what the uploads hold and their sizes; end the build if one is too large."""
    too_large = []
    for upload in uploads:
        for part in sorted(upload.iterdir()):
            size = part.stat().st_size
            if part.is_dir():
                size = size_of(part)
            print(f"  {upload.name}/{part.name:18} {size / MIB:6.2f} MiB")
        total_mib = (size_of(upload) + tree) / MIB
        print(f"{upload.name}: {total_mib:.1f} MiB with the working tree's {tree / MIB:.1f}")
        if total_mib >= LIMIT_MIB:
            too_large.append(upload.name)
    if too_large:
        sys.exit(f"kit: {', '.join(too_large)} would not fit: the limit is {LIMIT_MIB:.0f} MiB")


def build(first: Path, second: Path, work: Path) -> None:
    """Fill both uploads; `work` is for what does not travel."""
    for folder in ("wheels", "site", "photos", "cifar10"):
        (first / folder).mkdir(parents=True)
    (second / "cifar10").mkdir(parents=True)
    print("kit: wheels", flush=True)
    add_wheels(first / "wheels")
    print("kit: FFCV, compiled", flush=True)
    add_ffcv(first / "site", work)
    print("kit: photos", flush=True)
    add_photos(first / "photos")
    for script in SCRIPTS:
        shutil.copy(HERE / script, first)
    print("kit: CIFAR-10, about a minute (139 MB the first time)", flush=True)
    add_cifar10(first / "cifar10", second / "cifar10")
    # There the tree has no git to say which commit a result belongs to.
    (first / "commit").write_text(f"{versions()['commit'] or ''}\n")
    write_sums(first, "first.sha256")
    write_sums(second, "second.sha256")


def main() -> None:
    os.chdir(ROOT)
    stage = ROOT / "build" / "kit"
    shutil.rmtree(stage, ignore_errors=True)
    first = stage / FIRST
    second = stage / SECOND
    built = (first, second)
    (stage / "work").mkdir(parents=True)
    try:
        build(first, second, stage / "work")
        check_sizes(built, tree_size())
        for upload in built:
            shutil.rmtree(ROOT / upload.name, ignore_errors=True)
        for upload in built:
            upload.rename(ROOT / upload.name)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"kit: {error}")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    print(f"kit: {FIRST}/ and {SECOND}/ are ready; bench/gpu/README.md has the commands")


if __name__ == "__main__":
    main()
