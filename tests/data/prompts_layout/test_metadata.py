"""The JSON-lines layout: every fault of a line, and only local files below the root."""

import json
from pathlib import Path

import pytest

from glm_training.data import DataError, Example


@pytest.fixture
def metadata(files):
    """The four examples as ``metadata.jsonl``; a function that rewrites some of its lines."""
    path = files.root / "metadata.jsonl"
    files.prompts.unlink()

    def write(changes: dict[int, str | bytes | dict[str, object]] | None = None, sources: bool = False) -> Path:
        lines: list[bytes] = []
        for index in range(4):
            record: dict[str, object] = {"prompt": f"a thing {index}", "target": f"target_images/{index}.png"}
            if sources:
                record["source"] = f"source_images/{index}.png"
            line = (changes or {}).get(index, record)
            text = json.dumps(line) if isinstance(line, dict) else line
            lines.append(text if isinstance(text, bytes) else text.encode())
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def problems(files, mode="t2i", **changes) -> list[str]:
    with pytest.raises(DataError) as caught:
        scan(files, mode, **changes)
    return [str(problem) for problem in caught.value.problems]


def scan(files, mode="t2i", **changes):
    folders = {"prompts_file": files.root, "target_images_dir": None, "source_images_dir": None}
    return files.scan(mode, **(folders | changes))


def test_folder_and_file_give_the_same_examples(files, metadata) -> None:
    path = metadata(sources=True)
    examples = scan(files, "i2i").examples
    assert examples == scan(files, "i2i", prompts_file=path).examples
    assert examples[3] == Example(
        3, "a thing 3", (files.targets / "3.png").resolve(), (files.sources / "3.png").resolve()
    )


def test_file_name_is_target(files, metadata) -> None:
    metadata({1: {"prompt": "x", "file_name": "target_images/3.png"}})
    assert scan(files).examples[1].target == (files.targets / "3.png").resolve()


def test_image_folders_are_the_roots_when_given(files, metadata) -> None:
    metadata({index: {"prompt": "x", "target": f"{index}.png"} for index in range(4)})
    assert len(scan(files, target_images_dir=files.targets).examples) == 4
    assert "is not a folder" in problems(files, target_images_dir=files.targets / "0.png")[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x",', "not JSON"),
        ("", "the line is empty"),
        ("[1]", "not a JSON object but list"),
        ("[" * 100_000, "not readable as JSON"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8"),
        ({"target": "target_images/1.png"}, "'prompt' is missing"),
        ({"prompt": 3, "target": "target_images/1.png"}, "'prompt' is not a text"),
        ({"prompt": " ", "target": "target_images/1.png"}, "the prompt of index 1 is empty"),
        ('{"prompt": "\\ud800", "target": "target_images/1.png"}', "surrogate"),
        ('{"prompt": "x", "prompt": "y", "target": "target_images/1.png"}', "'prompt' is given twice"),
        ({"prompt": "x", "target": "target_images/1.png", "promt": "y"}, "Did you mean 'prompt'?"),
        ({"prompt": "x", "target": "target_images/1.png", "zzz": "y"}, "unknown key 'zzz'"),
        ({"prompt": "x", "target": "target_images/1.png", "file_name": "y.png"}, "both name the target"),
        ({"prompt": "x", "target": "target_images/1.png", "source": "y.png"}, "Train in mode i2i"),
        ({"prompt": "x"}, "index 1 has no target image"),
        ({"prompt": "x", "target": None}, "'target' is not a path"),
        ({"prompt": "x", "target": "target_images/none.png"}, "does not exist"),
        ({"prompt": "x", "target": "target_images\\1.png"}, "separate folders with /"),
        ({"prompt": "x", "target": "target_images"}, "not a regular file"),
        ({"prompt": "x", "target": "../outside.png"}, "leads out of"),
        ({"prompt": "x", "target": "way_out.png"}, "leads out of"),
        ({"prompt": "x", "target": "/etc/hostname"}, "absolute path"),
        ({"prompt": "x", "target": "a\0b"}, "cannot be followed"),
        ({"prompt": "x", "target": "https://example.org/a.png"}, "is a URL"),
        ({"prompt": "x", "target": "data:image/png;base64,AAAA"}, "is a URL"),
        ({"prompt": "x", "target": "prompts.md"}, "not an image"),
    ],
)
def test_a_bad_line_is_named(files, metadata, line, expected: str) -> None:
    metadata({1: line})
    outside = files.root.parent / "outside.png"
    outside.write_bytes((files.targets / "0.png").read_bytes())
    (files.root / "way_out.png").symlink_to(outside)
    (files.root / "prompts.md").write_text("text")
    found = problems(files)
    assert len(found) == 1, found
    assert expected in found[0] and "metadata.jsonl:2: " in found[0]
    assert [example.index for example in scan(files, max_bad_fraction=0.25).examples] == [0, 2, 3]


def test_i2i_needs_sources(files, metadata) -> None:
    metadata({2: {"prompt": "x", "target": "target_images/2.png"}}, sources=True)
    assert problems(files, "i2i") == [
        f'{files.root / "metadata.jsonl"}:3: index 2 has no source image. Add "source": "path/to/image.png".'
    ]


def test_targets_are_all_or_none(files, metadata) -> None:
    metadata({index: {"prompt": "x"} for index in range(4)})
    assert len(problems(files)) == 4
    assert all(example.target is None for example in scan(files, require_targets=False).examples)
    metadata({1: {"prompt": "x"}})
    assert "metadata.jsonl:2: index 1 has no target" in problems(files, require_targets=False)[0]


def test_a_file_used_twice_is_reported_at_both_lines(files, metadata) -> None:
    metadata({1: {"prompt": "x", "target": "target_images/0.png"}})
    (files.targets / "0.png").write_bytes(b"no")
    first, second = problems(files)
    assert "jsonl:1" in first and "jsonl:2" in second


def test_a_folder_without_metadata(files) -> None:
    assert "without metadata.jsonl" in problems(files)[0] and "prompts.txt" in problems(files)[0]
