"""One way to iterate over the files of a folder, a zip or a tar, without unpacking.

A tar may be gzipped.
"""

import gzip
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from mosaic_jax.data.formats.base import reading
from mosaic_jax.types import UserError

Member = tuple[str, Callable[[], bytes]]
"""Name with forward slashes, and a function that reads the file.

Call the function before taking the next member: a gzipped tar cannot be rewound cheaply.
"""


class Members:
    """Context manager that gives an iterator over all files.

    A folder's files are sorted by name, an archive's come in its own order.

    Raises:
      UserError: damaged, or a member whose name leads out of the archive.
    """

    def __init__(self, path: Path):
        self.path = path
        self.stack = ExitStack()

    def __enter__(self) -> Iterator[Member]:
        return self._safe()

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _safe(self) -> Iterator[Member]:
        """Yield all members; raise on a name that leads out of the archive."""
        with reading(self.path):
            for name, read in self._all():
                pure = PurePosixPath(name)
                if pure.is_absolute() or ".." in pure.parts or "\\" in name:
                    raise UserError(f"{self.path} has a member that leads out of it: {name!r}")
                yield name, partial(_checked, f"{self.path}/{name}", read)

    def _all(self) -> Iterator[Member]:
        """Yield all members of the folder, zip or tar."""
        if self.path.is_dir():
            for file in sorted(self.path.rglob("*")):
                if file.is_file():
                    yield file.relative_to(self.path).as_posix(), file.read_bytes
        elif self.path.suffix == ".zip":
            archive = self.stack.enter_context(zipfile.ZipFile(self.path))
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, partial(archive.read, entry)
        else:
            stream = self.stack.enter_context(_opened(self.path))
            tar = self.stack.enter_context(tarfile.open(fileobj=stream))  # noqa: SIM115
            for member in tar:
                if member.isfile():
                    yield member.name, partial(_extracted, tar, member)
            # Gzip's checksum stands at the end of the file and is checked only when read.
            while stream.read(1 << 20):
                pass


def _checked(name: str, read: Callable[[], bytes]) -> bytes:
    """Read a member; a fault names it."""
    with reading(name):
        return read()


def _opened(path: Path) -> BinaryIO:
    """Open a tar's bytes, unzipped if its name ends in ".gz"."""
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read one member of a tar; raise `EOFError` if it is shorter than announced."""
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise EOFError(f"{member.name} ends early")
    return content
