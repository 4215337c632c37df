"""Files from elsewhere, fetched whole or not at all: by address, with the beginning of their SHA-256.

A download that broke off lies beside its place as `.NAME.part` and goes on where it ended. What does not have the
SHA-256 is removed, and never takes the file's place.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

MIRROR = "GLM_TRAINING_MIRROR"
"""Environment variable: an address below which files of other hosts lie, each as HOST/PATH. The hub has HF_ENDPOINT."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""

ASK_TIMEOUT = 10.0
"""Seconds in which a host must say how large a file is: on a machine without a network a run ends soon."""

ATTEMPTS = 5
"""Connections in a row that bring nothing before a download is given up."""

_CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """A file could not be fetched; the message says which, from where and why."""


@dataclass(frozen=True)
class AddressFile:
    """A file at `url` that belongs at `path`. sha256: its SHA-256 in hex, or the beginning of it, as torch hub's names
    have it. needed_by: what asks for it, for messages."""

    needed_by: str
    url: str
    path: Path
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def source(self) -> str:
        """The address that is asked, of the mirror where there is one."""
        mirror = os.environ.get(MIRROR)
        parts = urllib.parse.urlsplit(self.url)
        return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}" if mirror else self.url

    def here(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def remaining(self) -> int | None:
        """Bytes that are to come, as the host says; None where it does not. Raises DownloadError."""
        if self.here():
            return 0
        try:
            asked = urllib.request.Request(self.source, method="HEAD", headers=_AGENT)
            with urllib.request.urlopen(asked, timeout=ASK_TIMEOUT) as answer:
                length = answer.headers.get("Content-Length")
        except _FAULTS as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (403, 405, 501):  # does not tell, may give
                return None
            raise DownloadError(f"{self.needed_by}: {self.source} cannot be had ({_reason(error)})") from error
        return int(length) if length is not None and length.isdecimal() else None

    def fetch(self) -> None:
        """Brings it to its place, by one process of several. Raises DownloadError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.name}.lock")
            with FileLock(lock):
                if not self.here():
                    self._fetch()
            with suppress(OSError):  # Windows keeps what another process waits for
                lock.unlink()  # whoever waits for it, or makes it anew, finds the file in its place
        except OSError as error:
            raise DownloadError(f"{self.needed_by}: {self.path} cannot be written ({_reason(error)})") from error

    def _fetch(self) -> None:
        part = self.path.with_name(f".{self.name}.part")
        continued = part.is_file() and part.stat().st_size > 0
        self._transfer(part)
        if not sha256_of(part).startswith(self.sha256) and continued:  # of another version of the file, perhaps
            part.unlink()
            self._transfer(part)
        found = sha256_of(part)
        if not found.startswith(self.sha256):
            part.unlink()
            raise DownloadError(
                f"{self.needed_by}: what {self.source} gave is not {self.name}: its SHA-256 is {found[:16]}.., not "
                f"{self.sha256[:16]}.."
            )
        os.replace(part, self.path)

    def _transfer(self, part: Path) -> None:
        """Appends to `part` until it is whole, connecting anew where a connection breaks."""
        idle = 0
        while True:
            before = part.stat().st_size if part.is_file() else 0
            try:
                if self._receive(part, before):
                    return
                reason = "the connection ended early"
            except _FAULTS as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
                    raise DownloadError(f"{self.needed_by}: {self.source} cannot be had ({_reason(error)})") from error
                reason = _reason(error)
            idle = 0 if part.is_file() and part.stat().st_size > before else idle + 1
            if idle == ATTEMPTS:
                raise DownloadError(
                    f"{self.needed_by}: {self.source} cannot be had ({reason}); what came so far is kept, and the next "
                    "try goes on from there"
                )

    def _receive(self, part: Path, have: int) -> bool:
        """One connection; whether `part` is whole after it."""
        headers = _AGENT | ({"Range": f"bytes={have}-"} if have else {})
        try:
            answer: Any = urllib.request.urlopen(urllib.request.Request(self.source, headers=headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is nothing after what is here: the whole, or too much
                total = error.headers.get("Content-Range", "").rpartition("/")[2]
                if total == str(have):
                    return True
                part.unlink()
                return False
            raise
        with answer:
            if have and answer.status != 206:  # the host begins at the start
                have = 0
            length = answer.headers.get("Content-Length")
            total_bytes = have + int(length) if length is not None else None
            if total_bytes is not None:
                require_room(part.parent, total_bytes - have, f"{self.needed_by}: {self.name}")
            with part.open("ab" if have else "wb") as file, _bar(self.name, total_bytes, have) as bar:
                while chunk := _chunk(answer):
                    file.write(chunk)
                    bar.update(len(chunk))
        return total_bytes is None or part.stat().st_size == total_bytes


def _chunk(answer: Any) -> bytes:
    """What comes next. Raises ConnectionError: of TLS and of lost networks there are other errors, which would look
    like those of a disk."""
    try:
        return bytes(answer.read(_CHUNK))
    except OSError as error:
        raise ConnectionError(_reason(error)) from error


def sha256_of(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_bytes(size: int) -> str:
    """`size` bytes in the unit that suits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


_AGENT = {"User-Agent": "glm_training"}
_FAULTS = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


def _bar(name: str, total: int | None, done: int) -> Any:
    """The hub's own bar, which stands on standard error and heeds HF_HUB_DISABLE_PROGRESS_BARS."""
    from huggingface_hub.utils import tqdm

    return tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True)


def require_room(folder: Path, wanted: int, what: str) -> None:
    """Raises DownloadError unless `folder` has room for the `wanted` bytes that are to come of `what`."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise DownloadError(f"{what} has {in_bytes(wanted)} to come, and {folder} has {in_bytes(free)} free")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    reason = getattr(error, "reason", error)
    return str(reason) or type(error).__name__
