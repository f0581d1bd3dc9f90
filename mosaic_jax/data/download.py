"""Download of the original files of a published set, checked against published checksums."""

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pooch

from mosaic_jax.types import UserError

TIMEOUT = 5
"""Seconds to wait for a host's answer."""

Download = tuple[str, str]
"""Address and MD5 checksum of a file."""


def fetch(folder: Path, downloads: Sequence[Download]) -> None:
    """Download files into a folder; existing files are checked and kept.

    No partial file is left behind.

    Raises:
      UserError: no network, no such file, or another checksum; says which.
    """
    for address, md5 in downloads:
        name = address.rpartition("/")[2]
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        try:
            # Without this trial connection an unreachable host costs minutes.
            if not (folder / name).exists():
                socket.create_connection((parts.hostname or "", port), TIMEOUT).close()
            pooch.retrieve(
                address,
                known_hash=f"md5:{md5}",
                fname=name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=TIMEOUT),
            )
        # Pooch raises a ValueError for a wrong checksum.
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name} could not be fetched from {parts.hostname}: {error}"
            ) from error
