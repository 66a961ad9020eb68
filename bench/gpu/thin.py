"""Makes shared objects compress well: zeroes their GPU code that is not for one GPU.

    python -m bench.gpu.thin FILE ... [--architecture 90]

Changes the files in place. A tool of build_dali.sh.

CHECKED ON A CPU ONLY: a thinned DALI imports and decodes on a CPU; whether its kernels load on an
H100 is not known.

Sizes and offsets stay, and zeros compress to nothing. Section .nv_fatbin holds containers, one
after another, each a header and entries of their own header and code: PTX, or machine code of one
architecture. The layout is not documented; these fields were found by looking:

    container: u4 magic, u2 version, u2 header size, u8 size of what follows
    entry:     u2 sort (1 PTX, 2 machine code), u2, u4 header size, u8 payload size,
               u4 architecture @28
"""

import argparse
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = b"\x50\xed\x55\xba"
CONTAINER = struct.Struct("<4sHHQ")
ENTRY = struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<I")
ARCHITECTURE_AT = 28  # bytes from the start of an entry
ALIGNMENT = 8  # bytes
MACHINE_CODE = 2


class Entry(NamedTuple):
    """A piece of GPU code in the file."""

    sort: int  # MACHINE_CODE or PTX
    architecture: int  # 90: sm_90
    start: int  # of the payload, in bytes from the start of the file
    size: int  # of the payload


def fatbin_section(path: Path) -> range:
    """Where .nv_fatbin lies in the file; empty if there is none."""
    command = ["readelf", "--section-headers", "--wide", str(path)]
    table = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for line in table.splitlines():
        # [Nr] name type address offset size ...
        columns = line.partition("]")[2].split()
        if columns and columns[0] == ".nv_fatbin":
            offset = int(columns[3], 16)
            size = int(columns[4], 16)
            return range(offset, offset + size)
    return range(0)


def entries(data: bytes | bytearray, section: range) -> Iterator[Entry]:
    """All entries of all containers of the section, in order."""
    at = section.start
    while at < section.stop:
        if data[at : at + len(MAGIC)] != MAGIC:  # padding between containers
            at += ALIGNMENT
            continue
        _, _, header, size = CONTAINER.unpack_from(data, at)
        entry = at + header
        end = entry + size
        while entry < end:
            sort, _, entry_header, payload = ENTRY.unpack_from(data, entry)
            (architecture,) = ARCHITECTURE.unpack_from(data, entry + ARCHITECTURE_AT)
            yield Entry(sort, architecture, entry + entry_header, payload)
            entry += entry_header + payload
        to_next = -end % ALIGNMENT  # containers begin at multiples of it
        at = end + to_next


def thin(data: bytearray, section: range, architecture: int) -> int:
    """Zero the payload of every entry but those for `architecture`, in place; returns their bytes.

    Raises:
        ValueError: there is no code for `architecture`; nothing is changed.
    """
    others = []
    found = list(entries(data, section))
    for entry in found:
        if entry.sort != MACHINE_CODE or entry.architecture != architecture:
            others.append(entry)
    if len(others) == len(found):
        raise ValueError(f"no code for sm_{architecture}")
    for entry in others:
        data[entry.start : entry.start + entry.size] = bytes(entry.size)
    return sum(entry.size for entry in others)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--architecture", type=int, default=90, help="default: 90, an H100's")
    arguments = parser.parse_args()
    for path in arguments.files:
        section = fatbin_section(path)
        if not section:
            continue
        data = bytearray(path.read_bytes())
        try:
            gone = thin(data, section, arguments.architecture)
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        path.write_bytes(data)
        print(f"{path}: {gone / 1e6:.1f} of {len(section) / 1e6:.1f} MB of GPU code zeroed")


if __name__ == "__main__":
    main()
