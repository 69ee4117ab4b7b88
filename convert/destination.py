"""A directory that appears whole or not at all.

It grows under another name beside its own and is renamed when everything in it is on the disk. A
lock, which ends with the process however that ends, keeps a second converter away; what a killed
one left is removed by the next.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastgen_jax.errors import CheckpointError


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty directory to fill; it gets its name, or replaces the old one, at the end.

    Raises:
        CheckpointError: there is one already, or another converter makes it.
    """
    path = path.expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.parent / f".{path.name}.{end}" for end in ("partial", "old"))
    with _lock(path):
        if old.exists() and not path.exists():  # killed between two renames
            old.rename(path)
        check_replaceable(path, overwrite=overwrite)
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _flush(partial)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            _flush_entry(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError unless the path is free, or may and can safely be overwritten."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(f"{str(path)!r} exists; give --overwrite to replace it")
    is_model = path.is_dir() and not path.is_symlink()
    is_model = is_model and ((path / "config.json").exists() or not any(path.iterdir()))
    if not is_model:
        raise CheckpointError(f"{str(path)!r} is no model's directory; give another destination")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    file = path.parent / f".{path.name}.lock"
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another conversion is writing {str(path)!r}; wait for it to end"
            ) from None
        yield


def _flush(directory: Path) -> None:
    """Writes all files and names below a directory to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _flush_entry(Path(folder) / name)
        _flush_entry(Path(folder))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
