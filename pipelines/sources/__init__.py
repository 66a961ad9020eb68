"""Where images come from: the table of what `open_store` opens.

To add a source, write a `Store` in a module of this folder and name it in SOURCES. The docstring of
`Store`, in pipelines/store.py, says what it must do.
"""

from pathlib import Path

from pipelines.files import readable
from pipelines.sources.beton import BetonStore
from pipelines.sources.folder import FolderStore
from pipelines.sources.shards import ShardedStore, is_pattern
from pipelines.sources.tar import TarStore
from pipelines.store import Store

# The first that accepts a path opens it.
SOURCES: tuple[type[Store], ...] = (BetonStore, FolderStore, TarStore, ShardedStore)


def accepted() -> str:
    """What `open_store` opens, for messages."""
    *first, last = (source.described_as for source in SOURCES)
    return f"{', '.join(first)} or {last}"


def source_of(path: Path) -> type[Store]:
    """The source that accepts `path`.

    Raises:
        ValueError: nothing is there, or what no source accepts.
    """
    if is_pattern(path):  # nothing is there that the others could look at
        return ShardedStore
    if not path.exists():
        raise ValueError(f"{readable(path)}: no such file or folder; expected {accepted()}")
    for source in SOURCES:
        if source.accepts(path):
            return source
    raise ValueError(
        f"{readable(path)}: expected {accepted()}; fap-convert makes a .beton of what else you hold"
    )
