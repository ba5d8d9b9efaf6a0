"""Small files that are replaced in one step: a reader, or a crash at any moment, finds the old content or the new."""

import os
from pathlib import Path

TEMPORARY = ".tmp-"  # how names begin that a process gives to what is not finished


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Give a file this content, in UTF-8 where it is text. The content is on the disk before it gets the file's name.

    Raises:
        OSError: the file is as it was, and nothing is left beside it.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
