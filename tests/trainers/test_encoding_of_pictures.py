"""Own pictures (`data.images`) with what frozen encoders give from the cache: the same bits as without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from glm_training.config import Config, load_config
from glm_training.data import DataError
from glm_training.engine.encoding import batches
from glm_training.engine.encoding.encoder import GLMEncoder
from glm_training.engine.errors import TrainingError
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world
from tests.data.captioned.building import noise
from tests.runs import PROMPTS, weights_of, write_data
from tests.same import assert_identical
from tests.trainers.test_bucket_training import bucket_config
from tests.trainers.test_supervised_pictures import pictures_config


def plain(folder: Path) -> Path:
    return pictures_config(folder, PROMPTS, augmentation=True, caption_dropout=0.4, trigger_word="sks")


def shapes(folder: Path) -> Path:
    bucket_config(folder)
    return folder / "pictures.yaml"


def broken(folder: Path) -> Path:
    """Every fourth picture cannot be decoded: another stands in for it, drawn by its place."""
    path = pictures_config(folder, [*PROMPTS, "a bird"], max_bad_fraction=0.5)
    (folder / "pictures/1.png").write_bytes(noise(1, (64, 64))[:-400])
    return path


def edits(folder: Path) -> Path:
    path = pictures_config(folder, [])
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["data"] |= {"images": str(folder / "data"), "augmentation": True}
    tree["data"].pop("source_images_dir", None)
    tree["training"]["mode"] = "i2i"
    write_data(folder / "data")
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


DATA = {"mirrored, dropped captions": plain, "shapes": shapes, "broken ones": broken, "edits": edits}


def config_of(folder: Path, data: str, *overrides: str) -> Config:
    path = folder / "pictures.yaml"
    if not path.is_file():
        DATA[data](folder)
    return load_config(path, [f"cache.dir={folder}/cache", "training.max_steps=4", *overrides])


def stepped(config: Config, steps: int = 4) -> BaseTrainer:
    trainer = build_trainer(config, init_world(True, None))
    trainer.prepare()
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return trainer


@pytest.mark.parametrize("data", DATA)
def test_a_cache_changes_no_bit_and_is_filled_once(tmp_path: Path, data: str, monkeypatch) -> None:
    first = stepped(config_of(tmp_path, data))
    off = ["cache.enabled=false", "cache.dir=null", f"output_dir={tmp_path}/off"]
    without = stepped(config_of(tmp_path, data, *off))
    assert without.dataset.decodes and not first.dataset.decodes
    assert_identical(weights_of(first), weights_of(without))
    assert_identical(first.judge(), without.judge())
    for name in ("picture", "text"):
        monkeypatch.setattr(GLMEncoder, name, lambda *_: pytest.fail("encoded again"))
    second = stepped(config_of(tmp_path, data, f"output_dir={tmp_path}/second"))
    assert_identical(weights_of(first), weights_of(second))
    batch, _ = second.next_batch()
    assert batch.targets is None and batch.target_views is not None


def test_what_is_encoded_already_is_not_decoded_again(tmp_path: Path, monkeypatch) -> None:
    first = stepped(config_of(tmp_path, "mirrored, dropped captions"), steps=0)
    count = len(list((tmp_path / "cache").rglob("*.safetensors")))
    # "CAFE" and no quoted word; two of four prompts neither quote nor say a side, so they are mirrored too
    assert count == 2 + 4 + 2
    again = build_trainer(config_of(tmp_path, "mirrored, dropped captions"), init_world(True, None))
    monkeypatch.setattr(type(again.dataset._decoder), "decoded", lambda *_: pytest.fail("decoded again"))
    again.dataset.survey(first.encoding.is_encoded)
    assert set(again.dataset.contents.views()) == set(first.dataset.contents.views())


def test_random_crops_are_encoded_at_every_step_and_texts_once(tmp_path: Path) -> None:
    config = config_of(tmp_path, "mirrored, dropped captions", "data.crop=random")
    trainer = stepped(config, steps=1)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 and trainer.dataset.decodes
    assert any(
        note == "data.crop is random: pictures are encoded at every step, and texts once" for note in trainer.notes
    )
    assert trainer.encoding.encoder.sleepers(pictures=trainer.encoding.keeps_pictures) == [
        trainer.family.dit.text_encoder
    ]


def test_a_picture_that_changes_in_training_does_not_pass_for_the_old_one(tmp_path: Path) -> None:
    trainer = stepped(config_of(tmp_path, "mirrored, dropped captions"), steps=0)
    contents = trainer.dataset.contents
    view = contents.views()[0]
    rows = contents.load(view)
    assert torch.equal(rows.pixels, contents.load(view).pixels) and rows.original_sizes.tolist() == [[64, 64]]
    (tmp_path / "pictures/0.png").write_bytes(noise(77, (64, 64)))
    with pytest.raises(DataError, match="0.png: changed since the start of the run"):
        contents.load(view)


def test_a_cache_larger_than_the_disk_is_told_after_a_look_at_some_pictures(tmp_path: Path, monkeypatch) -> None:
    path = pictures_config(tmp_path, [*PROMPTS, "a bird", "a fish"])
    trainer = build_trainer(load_config(path, ["training.max_steps=3"]), init_world(True, None))
    monkeypatch.setattr(batches, "SAMPLED", 1)
    wanted = 6 * trainer.encoding.encoder.picture_bytes(64, 64)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=wanted - 1))
    with pytest.raises(TrainingError, match="of about 6 images take about .* left: .*cache.dir.*cache.enabled: false"):
        trainer.prepare()
    assert len(trainer.dataset.contents.prompts()) == 1, "one was read"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2 * wanted))
    trainer.prepare()
    assert len(trainer.dataset.contents.prompts()) == 6


def test_a_stop_is_heeded_while_pictures_are_read(tmp_path: Path, monkeypatch) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    trainer = build_trainer(config_of(tmp_path, "mirrored, dropped captions"), init_world(True, None))
    monkeypatch.setattr(batches, "SAMPLED", 3)
    monkeypatch.setattr(trainer.signals, "check", stop)
    with pytest.raises(Stop):
        trainer.prepare()
    assert len(trainer.dataset.contents.prompts()) == 2 and not trainer.encoding._asleep
