"""Files that are either whole or absent: written under another name, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["remove", "write_atomically"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file or directory beside ``path``, flush it to the disk and rename it to ``path``.

    Args:
        path: The final name; a file there is replaced by a file, a directory by a directory.
        write: Is given the temporary path, which does not exist yet and has the suffix of ``path``.

    Raises:
        IsADirectoryError: If a file would replace a directory.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.json"
        >>> write_atomically(path, lambda temporary: temporary.write_text("[1]"))
        >>> path.read_text()
        '[1]'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    remove(temporary)
    try:
        write(temporary)
        readable = path.parent.stat().st_mode & 0o666  # some writers make files for their owner alone
        for item in (temporary, *(temporary.rglob("*") if temporary.is_dir() else ())):
            if item.is_file():
                item.chmod(readable)
            _flush(item)
        if path.is_dir():
            if not temporary.is_dir():
                raise IsADirectoryError(f"write_atomically: `path` must be a file to write, got the folder {path}.")
            remove(path)
        os.replace(temporary, path)
    except BaseException:  # a keyboard interrupt leaves no half-written file either
        remove(temporary)
        raise
    _flush(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole directory; what is not there is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
