"""Supervised training of GLM-Image on `data.images`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from glm_training.config import load_config
from glm_training.data import DataError
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world
from tests.data.captioned.building import noise
from tests.runs import PROMPTS, trainer_of, weights_of, write_config
from tests.same import assert_identical

PLAIN = ["training.use_reward=false", "reward.enabled=false"]


def pictures_config(folder: Path, captions: list[str], **data: object) -> Path:
    """`tests.runs`' run on a folder of its target images, with a caption beside each."""
    path = write_config(folder)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, caption in enumerate(captions):
        image = folder / f"data/target_images/{number}.png"
        (pictures / image.name).write_bytes(image.read_bytes() if image.exists() else noise(number, (64, 64)))
        (pictures / f"{number}.txt").write_text(caption, encoding="utf-8")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    del tree["reward"], tree["data"]["prompts_file"], tree["data"]["target_images_dir"]
    tree["data"] |= {"images": str(pictures), "validation": 0, **data}
    own = folder / "pictures.yaml"
    own.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return own


def pictures_trainer(folder: Path, captions: list[str], **data: object) -> BaseTrainer:
    return build_trainer(load_config(pictures_config(folder, captions, **data)), init_world(True, None))


def test_the_same_pictures_in_either_layout_train_the_same_weights(tmp_path: Path) -> None:
    numbered = trainer_of(tmp_path, *PLAIN)
    folder = pictures_trainer(tmp_path, PROMPTS)
    for trainer in (numbered, folder):
        for _ in range(2):
            trainer.training_step()
    assert_identical(weights_of(numbered), weights_of(folder))
    assert_identical(numbered.judge(), folder.judge())
    assert folder.judged() is not None and set(folder.judge()) == {"ar/loss", "dit/loss"}


def test_edits_in_either_layout_train_the_same_weights(tmp_path: Path) -> None:
    numbered = trainer_of(tmp_path, *PLAIN, mode="i2i")
    tree = yaml.safe_load((tmp_path / "i2i.yaml").read_text(encoding="utf-8"))
    del (
        tree["reward"],
        tree["data"]["prompts_file"],
        tree["data"]["target_images_dir"],
        tree["data"]["source_images_dir"],
    )
    tree["data"] |= {"images": str(tmp_path / "data"), "validation": 0}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    own = build_trainer(load_config(tmp_path / "own.yaml"), init_world(True, None))
    for trainer in (numbered, own):
        trainer.training_step()
    assert_identical(weights_of(numbered), weights_of(own))
    assert_identical(numbered.judge(), own.judge())
    assert own.held_out.has_sources and own.held_out.has_targets
    assert_identical(own.held_out.batch([1]).sources, numbered.held_out.batch([1]).sources)


def test_rewards_on_pictures_in_either_layout_give_the_same_weights(tmp_path: Path) -> None:
    given = {"metrics": {"structure": 1.0}, "options": {"structure": {"reference": "target"}}}
    path = pictures_config(tmp_path, PROMPTS)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["reward"], tree["training"]["use_reward"] = given, True
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    numbered, own = trainer_of(tmp_path), build_trainer(load_config(path), init_world(True, None))
    for trainer in (numbered, own):
        trainer.training_step()
    assert_identical(weights_of(numbered), weights_of(own))


def test_what_is_held_out_is_judged_and_never_trained_on(tmp_path: Path) -> None:
    captions = [f"picture {number}" for number in range(12)]
    path = pictures_config(tmp_path, captions, validation=0.3)
    trainer = build_trainer(load_config(path, ["evaluation.num_eval_samples=12"]), init_world(True, None))
    held_out = [example.prompt for example in trainer.held_out.examples]
    drawn = {prompt for _ in range(12) for prompt in trainer.next_batch()[0].prompts}
    assert held_out and sorted(drawn | set(held_out)) == sorted(captions) and drawn.isdisjoint(held_out)
    judged = trainer.judged()
    assert judged is not None and judged.name == "held-out target" and list(judged.prompts) == held_out
    assert len(trainer.judge()["ar/loss"]) == len(held_out)
    told = f"{len(held_out)} of 12 pictures held out (data.validation 0.3), of which "
    assert any(note.startswith(told) for note in trainer.notes)


def test_empty_captions_are_trained_on(tmp_path: Path) -> None:
    trainer = pictures_trainer(tmp_path, PROMPTS, caption_dropout=1.0, trigger_word="sks")
    assert trainer.dataset.batch([0, 1]).prompts == ["", ""]
    assert [example.prompt for example in trainer.held_out.examples] == [f"sks, {prompt}" for prompt in PROMPTS[:2]]
    figures = trainer.training_step()
    assert 0 < figures["ar/loss"] < 20 and 0 < figures["dit/loss"] < 20


def test_a_caption_that_the_model_cannot_take_is_a_fault_of_its_picture(tmp_path: Path) -> None:
    captions = [*PROMPTS, "a <|image|> of nothing"]
    with pytest.raises(DataError) as caught:
        pictures_trainer(tmp_path, captions)
    (problem,) = caught.value.problems
    assert problem.path == tmp_path / "pictures/4.png"
    assert problem.reason == "the prompt contains the reserved token <|image|>"


def test_captions_that_are_not_read_whole_are_told(tmp_path: Path) -> None:
    long = 'a sign that says "' + "x" * 2100 + '"'
    trainer = pictures_trainer(tmp_path, [*PROMPTS, long])
    (note,) = [note for note in trainer.notes if "does not read all" in note]
    assert note.startswith(f"the model does not read all of 1 of 5 prompts in {tmp_path / 'pictures'}: row 4: a quoted")
