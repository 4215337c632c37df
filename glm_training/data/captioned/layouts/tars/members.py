"""The members of a tar by their headers alone: name, offset and size of each, and what is damaged.

ustar, GNU (long names, sizes beyond 8 GiB) and pax archives. Only the blocks between the data are read, with a few
bytes of the data beside them, which are in the same page of the disk.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO

BLOCK = 512
_TAIL, _HEAD = 64, 128
"""Bytes of data before and after a header that count in the digest: a member that was written over in place has other
ones."""

_CHUNK = 1 << 20
_ZEROS = bytes(BLOCK)
_FILE_TYPES = (b"0", b"\0", b"7")
_TYPES_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes: some writers give them a size all the same."""


class FileReader:
    """Reads a file at offsets, from any thread."""

    def __init__(self, file: FileIO | BufferedReader) -> None:
        self._file = file
        self._lock = None if hasattr(os, "pread") else threading.Lock()  # Windows has one place for all threads
        self.size = os.fstat(file.fileno()).st_size

    def at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer where the file ends."""
        if self._lock is None:
            data = os.pread(self._file.fileno(), size, offset)
            while len(data) < size and (more := os.pread(self._file.fileno(), size - len(data), offset + len(data))):
                data += more
            return data
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size) or b""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar, ``size`` bytes from ``offset``. ``cut``: the tar ends before it does. ``link``: it has
    no data of its own."""

    name: str
    offset: int
    size: int
    cut: bool = False
    link: bool = False


@dataclass(frozen=True)
class _Header:
    name: bytes
    size: int
    type: bytes


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with `head`, 512 bytes of it, is a tar: a header with its checksum, or an end mark."""
    return len(head) >= BLOCK and (head[:BLOCK] == _ZEROS or _header(head[:BLOCK]) is not None)


class TarWalk:
    """One pass over the headers; iterate once, then look at ``faults`` and ``digest``.

    ``faults``: (what, reason) of damages, which cost what lies in them and no more: reading goes on at the next header.
    ``digest``: SHA-256 (hex) over all headers and the ends of the data beside them.
    """

    def __init__(self, reader: FileReader, start: int = 0) -> None:
        self._reader = reader
        self._start = start
        self._sha = hashlib.sha256(str(reader.size).encode())
        self._name: bytes | None = None
        self._size: int | None = None
        self._sparse = False
        self._ended = False  # whether it is known why there is no end mark
        self.faults: list[tuple[str, str]] = []

    @property
    def digest(self) -> str:
        return self._sha.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        place, end = self._start, self._reader.size
        data_end = place
        while place < end:
            before = min(place - data_end + _TAIL, place)
            window = self._reader.at(place - before, before + BLOCK + _HEAD)
            self._sha.update(window)
            block = window[before : before + BLOCK]
            if block == _ZEROS:
                self._check_rest(place)
                return
            header = _header(block)
            if header is None:
                data_end = place = self._resynchronised(place)
                continue
            data = place + BLOCK
            size = header.size if self._size is None else self._size
            if header.type in _TYPES_WITHOUT_DATA and size and is_tar(self._reader.at(data, BLOCK)):
                size = 0
            data_end = data + size
            place = data + -(-size // BLOCK) * BLOCK
            yield from self._member(header, data, size)
        if end == 0:
            self.faults.append(("", "is empty"))
        elif not self._ended:
            self.faults.append(("", "has no end mark: it may have been cut short"))

    def _member(self, header: _Header, data: int, size: int) -> Iterator[Member]:
        """The member of a header, if it is one; what the header says of the next one is kept."""
        if header.type in (b"L", b"x", b"K", b"g"):
            body = self._reader.at(data, min(size, _CHUNK))
            if header.type == b"L":
                self._name = body.split(b"\0")[0]
            elif header.type == b"x":
                self._read_pax(body)
            return
        name = os.fsdecode(self._name or header.name)
        sparse, self._name, self._size, self._sparse = self._sparse, None, None, False
        if header.type == b"S" or sparse:
            self.faults.append((name, "is stored sparse, which is not read"))
        elif header.type in _FILE_TYPES and not name.endswith("/"):
            self._ended = data + size > self._reader.size
            yield Member(name, data, size, cut=self._ended)
        elif header.type in (b"1", b"2"):
            yield Member(name, data, 0, link=True)

    def _read_pax(self, body: bytes) -> None:
        """Records of `length key=value`, each with its line end."""
        place = 0
        while (space := body.find(b" ", place)) > 0 and body[place:space].isdigit():
            stop = place + int(body[place:space])
            if stop <= space:
                return
            key, _, value = body[space + 1 : stop - 1].partition(b"=")
            if key == b"path":
                self._name = value
            elif key == b"size" and value.isdigit():
                self._size = int(value)
            elif key.startswith(b"GNU.sparse"):
                self._sparse = True
            place = stop

    def _resynchronised(self, place: int) -> int:
        """The next header after a damage at `place`, or the end of the file."""
        self._name, self._size, self._sparse = None, None, False
        start = place
        place += BLOCK
        while chunk := self._reader.at(place, _CHUNK):
            for offset in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if chunk[offset + 257 : offset + 262] == b"ustar" and _header(chunk[offset : offset + BLOCK]):
                    self.faults.append(
                        (f"bytes {start} to {place + offset}", "a damaged header: what lies there is lost")
                    )
                    return place + offset
            place += _CHUNK
        self.faults.append((f"byte {start}", "a damaged header, and none after it: the rest is lost"))
        self._ended = True
        return self._reader.size

    def _check_rest(self, place: int) -> None:
        """After an end mark there are zeros."""
        if place == 0:
            self.faults.append(("", "is empty"))
        while chunk := self._reader.at(place, _CHUNK):
            if chunk.strip(b"\0"):
                reason = "has more after its end mark, which is not read"
                self.faults.append(("", f"{reason}: join tars with `tar --concatenate`, not `cat`"))
                return
            place += len(chunk)


def name_at(reader: FileReader, offset: int) -> str:
    """The name of the member whose data begin at `offset`: so that no memory is spent on names."""
    start = offset - BLOCK
    for blocks in range(1, 9):  # of a long name, which lies before its header under one of its own
        before = start - (blocks + 1) * BLOCK
        header = _header(reader.at(before, BLOCK)) if before >= 0 else None
        if header is not None and header.type in (b"L", b"x") and -(-header.size // BLOCK) == blocks:
            start = before
            break
    return next((member.name for member in TarWalk(reader, start)), f"byte {offset}")


def _header(block: bytes) -> _Header | None:
    """What a block says as a header; None where its checksum is another one, and of a block that is cut."""
    if len(block) < BLOCK:
        return None
    size = _number(block[124:136])
    checksum = _number(block[148:156])
    if size is None or checksum is None:
        return None
    total = 256 + sum(block[:148]) + sum(block[156:])  # the field itself counts as spaces
    if total != checksum:
        high = sum(byte > 127 for byte in block[:148]) + sum(byte > 127 for byte in block[156:])
        if total - 256 * high != checksum:  # old writers summed signed bytes
            return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _Header(name, size, block[156:157])


def _number(field: bytes) -> int | None:
    """Octal digits, or 256-ary where the first bit is set; None for anything else."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None
