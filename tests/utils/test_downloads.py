"""Files by address: whole or absent, with the right checksum, going on where a connection broke."""

from __future__ import annotations

import errno
import hashlib
import http.client
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm_training.utils import downloads
from glm_training.utils.downloads import MIRROR, AddressFile, DownloadError, in_bytes
from tests.file_server import FileServer, serving

CONTENT = bytes(range(256)) * 40_000  # some 10 MB: several reads
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    host = tmp_path / "served" / "example.org"
    host.mkdir(parents=True)
    (host / "weights.pth").write_bytes(CONTENT)
    with serving(tmp_path / "served") as server:
        yield server


def wanted(server: FileServer, tmp_path: Path, sha256: str = SHA256, name: str = "weights.pth") -> AddressFile:
    return AddressFile("lpips", f"{server.address}/example.org/{name}", tmp_path / "cache" / name, sha256)


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("length", [8, 64])
def test_a_file_comes_whole_and_once(server: FileServer, tmp_path: Path, length: int) -> None:
    """The first eight digits are what torch hub has in its names."""
    file = wanted(server, tmp_path, SHA256[:length])
    assert not file.here() and file.remaining() == len(CONTENT)
    file.fetch()
    file.fetch()
    assert file.path.read_bytes() == CONTENT and file.remaining() == 0
    assert server.bodies("weights.pth") == [None] and left(tmp_path) == ["weights.pth"]


def test_of_several_that_want_a_file_one_fetches_it(server: FileServer, tmp_path: Path) -> None:
    file = wanted(server, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: file.fetch(), range(4)))
    assert file.path.read_bytes() == CONTENT and server.bodies("weights.pth") == [None]


def test_a_lock_that_another_process_waits_for_may_stay(server: FileServer, tmp_path: Path, monkeypatch) -> None:
    """Windows does not remove a file that is open."""

    def refused(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "is used by another process", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    file = wanted(server, tmp_path)
    file.fetch()
    assert file.path.read_bytes() == CONTENT


def test_another_file_never_takes_the_place(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"lpips: .* is not weights.pth: its SHA-256 is {SHA256[:16]}.*, not 1234"):
        wanted(server, tmp_path, "1234abcd").fetch()
    assert left(tmp_path) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_ended(server: FileServer, tmp_path: Path, ranges: bool) -> None:
    server.breaks_after, server.ranges = 3_000_000, ranges
    wanted(server, tmp_path).fetch()
    assert (tmp_path / "cache" / "weights.pth").read_bytes() == CONTENT
    assert server.bodies("weights.pth") == [None, "bytes=3000000-"]


def test_what_an_earlier_process_left_is_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".weights.pth.part").write_bytes(CONTENT[:5_000_000])
    wanted(server, tmp_path).fetch()
    assert (tmp_path / "cache" / "weights.pth").read_bytes() == CONTENT
    assert server.bodies("weights.pth") == ["bytes=5000000-"] and left(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize("before", [b"another version" * 1000, CONTENT + b"more", CONTENT[::-1]])
def test_the_beginning_of_another_file_is_thrown_away(server: FileServer, tmp_path: Path, before: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".weights.pth.part").write_bytes(before)
    wanted(server, tmp_path).fetch()
    assert (tmp_path / "cache" / "weights.pth").read_bytes() == CONTENT


def test_a_whole_download_that_was_not_put_in_place_is(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".weights.pth.part").write_bytes(CONTENT)
    wanted(server, tmp_path).fetch()
    assert (tmp_path / "cache" / "weights.pth").read_bytes() == CONTENT


def test_a_host_that_has_no_such_file_is_told_at_once(server: FileServer, tmp_path: Path) -> None:
    file = wanted(server, tmp_path, name="other.pth")
    for ask in (file.remaining, file.fetch):
        with pytest.raises(DownloadError, match=r"lpips: http://.*/other.pth cannot be had \(HTTP 404 Not Found\)"):
            ask()
    assert len(server.bodies("other.pth")) == 1 and left(tmp_path) == []


def test_a_host_that_does_not_tell_sizes_gives_files_all_the_same(server: FileServer, tmp_path: Path) -> None:
    server.tells_sizes = False
    file = wanted(server, tmp_path)
    assert file.remaining() is None
    file.fetch()
    assert file.path.read_bytes() == CONTENT


def test_a_host_that_is_not_there_is_given_up_and_what_came_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".weights.pth.part").write_bytes(CONTENT[:100])
    gone = SimpleNamespace(address="http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot be had .*; what came so far is kept"):
        wanted(gone, tmp_path).fetch()
    assert (tmp_path / "cache" / ".weights.pth.part").read_bytes() == CONTENT[:100]


class Failing:
    """In place of an answer's `read`: a connection that fails with `error` after `reads` of it, `times` times."""

    def __init__(self, error: OSError, reads: int, times: int) -> None:
        self.error, self.reads, self.left = error, reads, times
        self.count = 0
        self.whole = http.client.HTTPResponse.read

    def __call__(self, answer: http.client.HTTPResponse, size: int | None = None) -> bytes:
        self.count += 1
        if self.left and self.count > self.reads:
            self.left -= 1
            self.count = 0
            raise self.error
        return self.whole(answer, size)


OF_NETWORKS = [ssl.SSLError(1, "bad record mac"), OSError(errno.ENETUNREACH, "Network is unreachable")]


@pytest.mark.parametrize("error", OF_NETWORKS, ids=["TLS", "network"])
def test_whatever_breaks_a_connection_is_taken_up_where_it_ended(
    server: FileServer, tmp_path: Path, monkeypatch, error: OSError
) -> None:
    failing = Failing(error, reads=3, times=1)
    monkeypatch.setattr(http.client.HTTPResponse, "read", lambda *given: failing(*given))
    wanted(server, tmp_path).fetch()
    assert (tmp_path / "cache" / "weights.pth").read_bytes() == CONTENT
    assert server.bodies("weights.pth") == [None, f"bytes={3 << 20}-"]


@pytest.mark.parametrize("error", OF_NETWORKS, ids=["TLS", "network"])
def test_a_connection_that_is_lost_is_not_told_as_a_disk(
    server: FileServer, tmp_path: Path, monkeypatch, error: OSError
) -> None:
    failing = Failing(error, reads=0, times=10)
    monkeypatch.setattr(http.client.HTTPResponse, "read", lambda *given: failing(*given))
    with pytest.raises(
        DownloadError, match=rf"weights.pth cannot be had \(.*{error.strerror}\); what came so far is kept"
    ):
        wanted(server, tmp_path).fetch()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk without room is /dev/full, which Linux alone has")
def test_a_disk_that_fills_up_is_told_as_one(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".weights.pth.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="cache/weights.pth cannot be written .*No space left"):
        wanted(server, tmp_path).fetch()


def test_a_mirror_is_asked_in_the_hosts_place(server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(MIRROR, f"{server.address}/")
    file = AddressFile("lpips", "https://example.org/weights.pth", tmp_path / "cache" / "weights.pth", SHA256)
    assert file.source == f"{server.address}/example.org/weights.pth"
    file.fetch()
    assert file.path.read_bytes() == CONTENT


def test_a_full_disk_is_told_before_anything_comes(server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(DownloadError, match="weights.pth has 10.2 MB to come, and .*/cache has 1 MB free"):
        wanted(server, tmp_path).fetch()


def test_a_place_that_cannot_be_written_is_named(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="lpips: .*/cache/weights.pth cannot be written"):
        wanted(server, tmp_path).fetch()


@pytest.mark.parametrize(("size", "text"), [(12, "12 bytes"), (3_714_759, "3.71 MB"), (1_710_540_580, "1.71 GB")])
def test_sizes_are_told_in_their_unit(size: int, text: str) -> None:
    assert in_bytes(size) == text
