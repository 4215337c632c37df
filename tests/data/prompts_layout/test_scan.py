"""A scan lists every fault of a dataset at once, with path, line and remedy, and lets nothing bad through."""

import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from glm_training.data import DataError, Example
from glm_training.data.pictures.buckets import Buckets
from tests.data.conftest import paint


def problems(files, mode="t2i", **changes) -> list[str]:
    with pytest.raises(DataError) as caught:
        files.scan(mode, **changes)
    return [str(problem) for problem in caught.value.problems]


def only(files, mode="t2i", **changes) -> str:
    found = problems(files, mode, **changes)
    assert len(found) == 1, found
    return found[0]


def test_line_i_goes_with_image_i(files) -> None:
    examples = files.load("i2i")
    assert [example.index for example in examples] == [0, 1, 2, 3]
    assert examples[2] == Example(
        2, "a thing 2", (files.targets / "2.png").resolve(), (files.sources / "2.png").resolve()
    )


def test_t2i_has_no_sources(files) -> None:
    assert all(example.source is None for example in files.load())


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".PNG", ".JPG"])
def test_every_suffix_of_the_layout(files, suffix: str) -> None:
    (files.targets / "1.png").rename(files.targets / f"1{suffix}")
    target = files.load()[1].target
    assert target is not None and target.name == f"1{suffix}"


def test_relative_paths(files, monkeypatch) -> None:
    monkeypatch.chdir(files.root)
    examples = files.load(prompts_file="prompts.txt", target_images_dir="target_images")
    assert examples[0].target == files.targets.resolve() / "0.png"


def test_other_files_beside_the_images_are_passed_over(files) -> None:
    for name in (".DS_Store", ".0.png", "readme.txt", "Thumbs.db"):
        (files.targets / name).write_text("x")
    (files.targets / "old").mkdir()
    assert len(files.load()) == 4


def test_byte_order_mark_crlf_and_blank_lines_at_the_end(files) -> None:
    files.prompts.write_bytes("\ufeffa café\r\n  two  \r\nthree\r\nfour\r\n\r\n  \r\n".encode())
    assert [example.prompt for example in files.load()] == ["a café", "two", "three", "four"]


def test_unicode_line_separators_do_not_shift_the_numbers(files) -> None:
    files.prompts.write_text("one\u2028still one\ntwo\x0cstill two\nthree\x85\nfour", encoding="utf-8")
    assert [example.prompt for example in files.load()][:2] == ["one\u2028still one", "two\x0cstill two"]


def test_missing_target(files) -> None:
    (files.targets / "2.png").unlink()
    message = only(files)
    assert message.startswith(f"{files.prompts}:3: index 2 has no target image")
    assert "target_images/2" in message and "Add the image" in message


def test_missing_source(files) -> None:
    (files.sources / "0.png").unlink()
    assert "prompts.txt:1: index 0 has no source image" in only(files, "i2i")
    assert len(files.load("t2i")) == 4


def test_two_files_for_one_index(files) -> None:
    Image.new("RGB", (8, 8)).save(files.targets / "1.jpg")
    message = only(files)
    assert "prompts.txt:2: index 1 has 2 target images" in message and "1.jpg, 1.png" in message


def test_orphan_image(files) -> None:
    (files.targets / "9.png").write_bytes((files.targets / "0.png").read_bytes())
    message = only(files)
    assert "9.png: target image has no prompt" in message and "ends at index 3" in message


@pytest.mark.parametrize(("count", "lines"), [(3, 3), (4, 1)])
def test_many_orphans_are_one_fault(files, count: int, lines: int) -> None:
    for index in range(8, 8 + count):
        (files.targets / f"{index}.png").write_bytes((files.targets / "0.png").read_bytes())
    with pytest.raises(DataError) as caught:
        files.load("t2i")
    assert len(caught.value.problems) == lines
    assert ("4 target images have no prompt (8.png to 11.png)" in str(caught.value)) == (count == 4)


@pytest.mark.parametrize("name", ["cat.png", "04.png", "-1.png", "4 .png", "٤.png"])
def test_image_whose_name_is_no_line_number(files, name: str) -> None:
    (files.targets / name).write_bytes((files.targets / "0.png").read_bytes())
    message = only(files)
    assert name in message and "not a line number" in message
    if name == "04.png":
        assert "Rename it to 4.png" in message


def test_image_of_another_kind(files) -> None:
    Image.new("RGB", (8, 8)).save(files.targets / "3.bmp")
    assert "unsupported kind .bmp" in only(files)


def test_damaged_images_are_named_with_their_line(files) -> None:
    path = files.targets / "1.png"
    path.write_bytes(path.read_bytes()[:-400])
    (files.sources / "3.png").write_text("not an image")
    first, second = problems(files, "i2i")
    assert f"prompts.txt:2: {path}: target image cannot be decoded" in first
    assert f"prompts.txt:4: {files.sources / '3.png'}: source image is not an image" in second


def test_a_decompression_bomb_is_listed(files, monkeypatch) -> None:
    monkeypatch.setattr("glm_training.data.pictures.images.MAX_PIXELS", 40 * 36 - 1)
    assert len(problems(files)) == 4


def test_empty_prompt_line(files) -> None:
    files.prompts.write_text("one\n \nthree\nfour\n")
    assert "prompts.txt:2: the prompt of index 1 is empty" in only(files)


def test_wrong_encoding_gives_offset_and_line(files) -> None:
    files.prompts.write_bytes(b"\xef\xbb\xbfone\ntwo caf\xe9\nthree\nfour\xff\n")
    first, second = problems(files)
    assert "prompts.txt:2: is not UTF-8" in first and "0xe9 at offset 14 " in first
    assert "Save the file as UTF-8" in first
    assert "prompts.txt:4: is not UTF-8" in second and "0xff at offset 26 " in second
    assert files.prompts.read_bytes()[14] == 0xE9 and files.prompts.read_bytes()[26] == 0xFF


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_recognised(files, encoding: str) -> None:
    files.prompts.write_text("one\ntwo\nthree\nfour\n", encoding=encoding)
    assert "UTF-16" in problems(files)[0] or "NUL byte" in problems(files)[0]


def test_no_prompts_and_no_file(files) -> None:
    files.prompts.write_text("\n\n")
    assert "holds no prompt" in only(files)
    files.prompts.rename(near := files.prompts.with_name(f"{files.prompts.stem}s.txt"))
    assert only(files).endswith(
        f"there is no such file. Correct the path; the current directory is {Path.cwd()}, and {near} is there."
    )
    near.unlink()
    assert only(files).endswith(f"the current directory is {Path.cwd()}.")


@pytest.mark.parametrize(("height", "width"), [(48, 64), (32, 100), (0, 64), (32, -32)])
def test_size_not_divisible_by_32(files, height: int, width: int) -> None:
    message = only(files, height=height, width=width)
    assert "not a positive multiple of 32" in message and "Set it to" in message


def test_folders_that_are_not_there(files) -> None:
    first, second = problems(files, "i2i", target_images_dir=files.root / "x", source_images_dir=files.prompts)
    assert "target_images_dir does not exist" in first and "source_images_dir is not a folder" in second


def test_targets_may_be_optional(files) -> None:
    assert all(example.target is None for example in files.load(target_images_dir=None, require_targets=False))
    assert "target_images_dir is not set" in only(files, target_images_dir=None)
    (files.targets / "2.png").unlink()
    assert "index 2 has no target image" in only(files, require_targets=False)


def test_mode_and_sources_must_agree(files) -> None:
    assert "source_images_dir is not set" in only(files, "i2i", source_images_dir=None)
    assert "mode t2i starts from no image" in only(files, "t2i", source_images_dir=files.sources)
    with pytest.raises(ValueError, match="mode"):
        files.scan("video")


def test_links_may_not_leave_the_folder(files, tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    (files.targets / "1.png").rename(outside)
    (files.targets / "1.png").symlink_to(outside)
    message = only(files)
    assert "prompts.txt:2" in message and "leads out of" in message and "secret.png" in message


def test_links_inside_the_folder_and_to_the_folder_are_followed(files, tmp_path: Path) -> None:
    (files.targets / "store").mkdir()
    (files.targets / "1.png").rename(files.targets / "store" / "x.png")
    (files.targets / "1.png").symlink_to("store/x.png")
    linked = tmp_path / "linked"
    linked.symlink_to(files.targets)
    assert files.load(target_images_dir=linked)[1].target == (files.targets / "store" / "x.png").resolve()


def test_links_to_nothing_in_circles_and_special_files(files) -> None:
    for index in range(3):
        (files.targets / f"{index}.png").unlink()
    (files.targets / "0.png").symlink_to("nowhere.png")
    (files.targets / "1.png").symlink_to("1.png")
    os.mkfifo(files.targets / "2.png")
    first, second, third = problems(files)
    assert "link to nothing" in first and "cannot be followed" in second and "not a regular file" in third


@pytest.mark.parametrize("url", ["https://example.org/p.txt", "file:///etc/passwd", "s3://bucket/p.txt"])
def test_urls_are_refused(files, url: str) -> None:
    for key in ("prompts_file", "target_images_dir"):
        for value in (url, Path(url)):
            message = problems(files, **{key: value})[0]
            assert "is a URL" in message and "Download the file" in message


def test_everything_is_listed_at_once(files) -> None:
    files.prompts.write_bytes(b"one\n\ntwo \xff\nfour\n")
    (files.targets / "0.png").unlink()
    (files.sources / "3.png").write_bytes(b"no")
    (files.sources / "7.png").write_bytes(b"no")
    found = problems(files, "i2i", height=31)
    assert len(found) == 6
    for text in ("is empty", "not UTF-8", "no target image", "source image is not an image", "no prompt", "is 31"):
        assert sum(text in problem for problem in found) == 1, text


def test_the_message_is_capped_and_the_list_is_not(files) -> None:
    files.prompts.write_text("\n".join(f"prompt {index}" for index in range(120)))
    with pytest.raises(DataError) as caught:
        files.scan()
    assert len(caught.value.problems) == 116
    lines = str(caught.value).splitlines()
    assert len(lines) == 52 and lines[0].endswith("116 problems in the data:") and lines[-1] == "  and 66 more"


@pytest.mark.parametrize("num_workers", [0, 3])
def test_threads_find_the_same(files, num_workers: int) -> None:
    for index in (0, 3):
        (files.targets / f"{index}.png").write_bytes(b"no")
    found = problems(files, num_workers=num_workers)
    assert ["prompts.txt:1" in found[0], "prompts.txt:4" in found[1], len(found)] == [True, True, 2]


def test_quarantine_leaves_out_bad_examples_and_touches_no_file(files, caplog) -> None:
    bad = files.targets / "1.png"
    bad.write_bytes(b"no")
    with caplog.at_level(logging.WARNING):
        report = files.scan(max_bad_fraction=0.25)
    assert [example.index for example in report.examples] == [0, 2, 3]
    assert report.total == 4 and [problem.index for problem in report.quarantined] == [1]
    assert "1 of 4 examples" in caplog.text and "1.png" in caplog.text
    assert bad.read_bytes() == b"no"


def test_quarantine_stops_above_its_threshold(files) -> None:
    for index in (0, 2):
        (files.targets / f"{index}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="2 of 4 examples at fault, max_bad_fraction 0.25"):
        files.scan(max_bad_fraction=0.25)
    assert len(files.scan(max_bad_fraction=0.5).examples) == 2


def test_quarantine_cures_no_fault_of_the_whole_and_needs_survivors(files) -> None:
    (files.targets / "9.png").write_bytes((files.targets / "0.png").read_bytes())
    assert "has no prompt" in only(files, max_bad_fraction=1.0)
    (files.targets / "9.png").unlink()
    for index in range(4):
        (files.targets / f"{index}.png").write_bytes(b"no")
    assert len(problems(files, max_bad_fraction=1.0)) == 4


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_quarantine_fraction_out_of_range(files, fraction: float) -> None:
    with pytest.raises(ValueError, match="max_bad_fraction"):
        files.scan(max_bad_fraction=fraction)


def test_examples_have_the_size_of_their_targets_within_their_sources(files) -> None:
    """Multiples of 32 within 64 x 64 px: what the target's shape asks for, and what the source leaves of it."""
    shapes = [((100, 100), (100, 100)), ((300, 100), (300, 100)), ((100, 100), (40, 100)), ((64, 70), (400, 400))]
    for index, (target, source) in enumerate(shapes):
        paint(files.targets / f"{index}.png", index, target)
        paint(files.sources / f"{index}.png", index + 9, source)
    buckets = Buckets(64 * 64, 32, smallest=32)
    assert [example.size for example in files.scan("i2i", buckets=buckets).examples] == [
        (64, 64), (32, 96), (32, 32), (64, 64)
    ]  # fmt: skip
    assert [example.size for example in files.scan("t2i", buckets=buckets).examples] == [
        (64, 64), (32, 96), (64, 64), (64, 64)
    ]  # fmt: skip
    assert [example.size for example in files.scan("i2i").examples] == [None] * 4
    sources = {"target_images_dir": None, "require_targets": False}
    assert [example.size for example in files.scan("i2i", **sources, buckets=buckets).examples] == [
        (64, 64), (32, 96), (96, 32), (64, 64)
    ]  # fmt: skip
    alone = files.scan("t2i", **sources, buckets=buckets).examples
    assert [example.size for example in alone] == [None] * 4


def test_an_image_without_a_bucket_is_a_fault_of_its_line(files) -> None:
    paint(files.sources / "2.png", 0, (100, 31))
    buckets = Buckets(64 * 64, 32, smallest=32)
    with pytest.raises(DataError) as caught:
        files.scan("i2i", buckets=buckets)
    (problem,) = caught.value.problems
    assert (problem.line, problem.index, problem.image) == (3, 2, files.sources / "2.png")
    assert problem.reason == "source image has 100 x 31 pixels, and the smallest bucket is 32 x 32"
    report = files.scan("i2i", buckets=buckets, max_bad_fraction=0.25)
    assert [example.index for example in report.examples] == [0, 1, 3]
    assert all(example.size == (32, 32) for example in report.examples)  # 40 x 36 px each
