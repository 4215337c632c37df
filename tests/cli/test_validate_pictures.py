"""`glm-train validate` finds what is wrong with sets of pictures, and says how many there are where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.cli.validate import validate
from tests.data.captioned.building import captioned, tars, write_tar
from tests.trainers.test_supervised_pictures import pictures_config

CONFIG = Path(__file__).parents[2] / "configs" / "vgt_tiny_ae_stage1.yaml"


def validated(images: Path, held_out: Path, run: Path, *more: str) -> int:
    words = [f"data.images={images}", f"evaluation.eval_images={held_out}", f"output_dir={run}", *more]
    return validate([str(CONFIG)], words, None)


def test_pictures_are_counted_and_faults_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, held_out = tars(tmp_path / "set"), write_tar(tmp_path / "held_out.tar", captioned(range(3)))
    assert validated(images, held_out, tmp_path / "run") == 0
    assert "is fine: 12 training pictures, 3 held-out pictures" in capsys.readouterr().out
    (images / "003.tar").write_bytes(b"")
    assert validated(images, tmp_path / "none", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'none'}: there is no such file or folder" in error
    assert validated(images, held_out, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "1 of 13 samples cannot be used:" in error and f"{images / '003.tar'}: is empty" in error
    assert validated(images, held_out, tmp_path / "run", "data.max_bad_fraction=0.1") == 0
    out = capsys.readouterr().out
    assert "1 sample left out as broken, each named in skipped_samples.jsonl" in out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]


def test_faults_of_all_kinds_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the names of the files show, and those that only reading shows."""
    config = pictures_config(tmp_path, ["a dot", "two dots", "a bird", "a cat", "a dog"])
    captions = sorted(next(tmp_path.rglob("*.txt")).parent.glob("*.txt"))
    captions[0].unlink()
    captions[1].write_text("")
    captions[2].with_suffix(".png").write_bytes(b"no picture")
    assert validate([str(config)], [], None) == 2
    error = capsys.readouterr().err
    assert "3 of 5 samples cannot be used:" in error
    assert "has no caption" in error and "its caption is empty" in error and "is not an image" in error
    for caption in captions[3:]:
        caption.write_bytes(b"\xff")
    assert validate([str(config)], [], None) == 2
    error = capsys.readouterr().err
    assert "5 samples, and all cannot be used" in error and "has no caption" in error and error.count("UTF-8") == 4


@pytest.mark.parametrize(
    ("keys", "told"),
    [(["data.crop=random"], True), (["data.crop=random", "cache.enabled=false"], False), ([], False)],
)
def test_pictures_that_random_crops_keep_out_of_the_cache_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str], told: bool
) -> None:
    config = pictures_config(tmp_path, ["a dot", "two dots", "a bird", "a cat"])
    assert validate([str(config)], keys, None) == 0
    note = "note: data.crop is random: pictures are encoded at every step, and texts once"
    assert (note in capsys.readouterr().out) == told
