"""The trigger word, and captions that are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.data.captioned.dataset import CaptionedImages, Shaping
from glm_training.data.captioned.decoding import Captioning
from glm_training.data.captioned.options import Reading, SetOptions
from glm_training.data.captioned.recognise import open_sets
from tests.data.captioned.building import captioned, dataset, picture, write_listing, write_tar


@pytest.mark.parametrize(
    ("word", "caption", "prompt"),
    [
        (None, "a cat", "a cat"),
        (None, None, ""),
        ("sks", "a cat", "sks, a cat"),
        ("sks", "a photo of sks.", "a photo of sks."),
        ("sks", "SKS asks", "sks, SKS asks"),
        ("sks", "", "sks"),
        ("sks", None, "sks"),
        ("sks dog", "the sks dog runs", "the sks dog runs"),
        ("sks dog", "the sks doggy", "sks dog, the sks doggy"),
        ("c++", "a c++ book", "a c++ book"),
        ("c++", "a ccc book", "c++, a ccc book"),
        ("小猫", "一只小猫坐着", "一只小猫坐着"),
        ("é", "café", "é, café"),
    ],
)
def test_what_becomes_of_a_caption(word: str | None, caption: str | None, prompt: str) -> None:
    assert Captioning(word).prompt(caption) == prompt


def test_a_share_of_what_is_drawn_has_no_caption(tmp_path: Path) -> None:
    """Of 2,000 draws 30 % are dropped, up to five standard deviations; which ones is decided by seed, epoch and
    index."""
    captioning = Captioning(dropout=0.3)
    drops = [captioning.is_dropped(7, epoch, index) for epoch in range(2) for index in range(1000)]
    assert abs(sum(drops) - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5
    assert drops[:1000] != drops[1000:] and drops[5] == Captioning(dropout=0.3).is_dropped(7, 0, 5)
    write_tar(tmp_path / "a.tar", captioned(range(20)))
    data = dataset(tmp_path / "a.tar", captioning=captioning, seed=7, num_workers=2)
    plain = dataset(tmp_path / "a.tar", seed=7)
    batch, whole = data.batch(range(20), epoch=1), plain.batch(range(20), epoch=1)
    assert batch.prompts == ["" if drops[1000 + row] else f"picture {row}" for row in range(20)]
    assert batch.targets is not None and whole.targets is not None and batch.targets.equal(whole.targets)
    assert data.read(3).caption == "picture 3"


def prompts(path: Path, word: str | None = "sks") -> list[str]:
    sets = open_sets([SetOptions(path)], Reading(True, optional=word is not None))
    data = CaptionedImages(sets, Shaping(32, 32), captioning=Captioning(word))
    assert not sets[0].faults
    return data.batch(range(len(data))).prompts


def test_pictures_without_a_caption_have_the_trigger_word(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.png").write_bytes(picture(1))
    (folder / "b.txt").write_text("a dog")
    (folder / "c.txt").write_text(" \n")
    assert prompts(folder) == ["sks", "sks, a dog", "sks"]
    tar = {"a.png": picture(1), "b.png": picture(2), "b.txt": b"a dog", "c.png": picture(3), "c.txt": b""}
    assert prompts(write_tar(tmp_path / "a.tar", tar)) == ["sks", "sks, a dog", "sks"]
    (folder / "table.csv").write_text("image,text\na.png,\nb.png,a dog\n")
    assert prompts(folder) == ["sks", "sks, a dog"]
    listing = write_listing(tmp_path / "list", 2)
    (tmp_path / "list/notes/0.json").write_text('{"caption": ""}')
    assert prompts(listing) == ["sks", "sks, picture 1"]
