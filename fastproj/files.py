"""Files that appear whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastproj.influence.durable import write_durably


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write bytes, or text in UTF-8, so that ``path`` holds all of it or is untouched; readable by everyone.

    Makes the folders above it. Raises OSError where that or the writing fails.
    """
    write_durably(path, content.encode() if isinstance(content, str) else content)


def require_writable(path: Path) -> None:
    """Make the folders above ``path`` and try to write beside it, as ``write_atomically`` will.

    Raises OSError where that cannot be, IsADirectoryError for a path that is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
