"""The headers of tars as Python's own writer makes them, and damages made byte by byte."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from glm_training.data.captioned.layouts.tars.members import BLOCK, FileReader, Member, TarWalk, is_tar, name_at
from tests.data.captioned.building import write_tar

FILES = {"a.txt": b"x" * 700, "b.bin": b"", "c.jpg": bytes(range(256)) * 4}
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def walked(path: Path) -> tuple[list[Member], TarWalk]:
    with path.open("rb") as file:
        walk = TarWalk(FileReader(file))
        return list(walk), walk


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_members_lie_where_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    longer = {"d" * 60 + "/" + "e" * 70 + ".png": b"in a prefix"} if form == tarfile.USTAR_FORMAT else {}
    if form != tarfile.USTAR_FORMAT:
        longer = {"f" * 300 + ".png": b"long", "h" * 1100 + ".png": b"longer", "ж.png": "не ascii".encode()}
    path = write_tar(tmp_path / "a.tar", FILES | longer, form)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar.getmembers()]
    members, walk = walked(path)
    assert [(member.name, member.offset, member.size) for member in members] == expected
    assert walk.faults == [] and not any(member.cut or member.link for member in members)
    with path.open("rb") as file:
        reader = FileReader(file)
        assert [name_at(reader, member.offset) for member in members] == [name for name, *_ in expected]
        assert [reader.at(member.offset, member.size) for member in members] == list((FILES | longer).values())


def test_folders_links_and_sparse_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d/", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE), ("s.png", tarfile.GNUTYPE_SPARSE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("z.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    members, walk = walked(path)
    assert [(member.name, member.link) for member in members] == [("l.png", True), ("z.png", False)]
    assert walk.faults == [("s.png", "is stored sparse, which is not read")]


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_what_has_a_size_and_no_data_hides_no_members(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for place, size in enumerate((1500, 10**6)):
            info = tarfile.TarInfo(f"before{place}")
            info.type, info.linkname, info.size = kind, "x", size
            tar.addfile(info)
            info = tarfile.TarInfo(f"{place}.png")
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    members, walk = walked(path)
    assert [member.name for member in members if not member.link] == ["0.png", "1.png"] and walk.faults == []


def test_a_link_with_data_as_pax_allows_is_passed_over_with_them(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("l.png", tarfile.LNKTYPE), ("z.png", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    members, walk = walked(path)
    assert [(member.name, member.link) for member in members] == [("l.png", True), ("z.png", False)]
    assert walk.faults == []


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sizes_beyond_octal_digits(tmp_path: Path, form: int) -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 * 2**30
    path = tmp_path / "a.tar"
    header = info.tobuf(form)
    path.write_bytes(header)
    ((member,), walk) = walked(path)
    assert (member.name, member.size, member.cut) == ("big.bin", 9 * 2**30, True)
    with path.open("wb") as file:  # a hole: the disk holds nothing of it
        file.write(header)
        file.seek(len(header) + info.size)
        file.write(tarfile.TarInfo("after.bin").tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    members, walk = walked(path)
    assert [member.name for member in members] == ["big.bin", "after.bin"] and walk.faults == []


def test_a_damaged_header_costs_its_member_alone(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    data = bytearray(path.read_bytes())
    place = data.index(b"b.bin")
    data[place : place + 5] = b"\xff" * 5
    path.write_bytes(bytes(data))
    members, walk = walked(path)
    assert [member.name for member in members] == ["a.txt", "c.jpg"]
    assert walk.faults == [(f"bytes {place} to {place + BLOCK}", "a damaged header: what lies there is lost")]
    data[data.index(b"c.jpg")] = 0xFF
    path.write_bytes(bytes(data))
    members, walk = walked(path)
    assert [member.name for member in members] == ["a.txt"]
    assert walk.faults == [(f"byte {place}", "a damaged header, and none after it: the rest is lost")]


def test_ends(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    whole = path.read_bytes()
    last = whole.index(b"c.jpg")
    cases = {
        "in the data": (whole[: last + BLOCK + 100], ["a.txt", "b.bin", "c.jpg"], True, []),
        "before the end mark": (whole[: last + BLOCK + 1024], ["a.txt", "b.bin", "c.jpg"], False, ["has no end mark"]),
        "in a header": (whole[: last + 100], ["a.txt", "b.bin"], False, ["a damaged header, and none after it"]),
        "empty": (b"", [], False, ["is empty"]),
        "nothing but an end mark": (bytes(10240), [], False, ["is empty"]),
        "another tar behind it": (whole + whole, ["a.txt", "b.bin", "c.jpg"], False, ["has more after its end mark"]),
    }
    for name, (data, names, cut, faults) in cases.items():
        path.write_bytes(data)
        members, walk = walked(path)
        assert [member.name for member in members] == names, name
        assert [member.cut for member in members[-1:]] == ([cut] if names else []), name
        assert len(walk.faults) == len(faults), (name, walk.faults)
        assert all(reason.startswith(start) for (_, reason), start in zip(walk.faults, faults, strict=True)), name


def test_the_digest_notices_headers_and_data_written_over_in_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    whole = path.read_bytes()
    before = walked(path)[1].digest
    assert before == walked(path)[1].digest
    text, jpg = whole.index(b"a.txt") + BLOCK, whole.index(b"c.jpg") + BLOCK
    for place in (text, text + 699, jpg + 1023, jpg + 64, whole.index(b"b.bin")):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        assert walked(path)[1].digest != before, place


def test_what_is_a_tar() -> None:
    assert is_tar(tarfile.TarInfo("a").tobuf()) and is_tar(bytes(BLOCK))
    assert not is_tar(b"") and not is_tar(b"{}" * 256) and not is_tar(bytes(BLOCK - 1))
    old = bytearray(tarfile.TarInfo("a").tobuf())  # V7: no magic
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    assert is_tar(bytes(old))


def test_reading_where_the_system_has_one_place_for_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.pread", raising=False)
    path = write_tar(tmp_path / "a.tar", FILES)
    members, walk = walked(path)
    assert [member.name for member in members] == list(FILES) and walk.faults == []
