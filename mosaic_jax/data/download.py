"""Fetches the original files of a published set, each checked against its published checksum."""

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pooch

from mosaic_jax.types import UserError

PATIENCE = 5
"""Seconds to wait for an answer."""

Download = tuple[str, str]
"""Address and MD5 of a file."""


def fetch(folder: Path, downloads: Sequence[Download]) -> None:
    """Put the files into a folder; those that are there already are checked and kept.

    Raises:
      UserError: no network, no such file, or another checksum; says which. Nothing half is left.
    """
    for address, md5 in downloads:
        name = address.rpartition("/")[2]
        parts = urlsplit(address)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        try:
            if not (folder / name).exists():  # else a host that is away costs minutes
                socket.create_connection((parts.hostname or "", port), PATIENCE).close()
            pooch.retrieve(
                address,
                known_hash=f"md5:{md5}",
                fname=name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=PATIENCE),
            )
        except (OSError, ValueError) as error:  # ValueError: the checksum
            raise UserError(
                f"{name} could not be fetched from {parts.hostname}: {error}"
            ) from error
