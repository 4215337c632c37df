"""Training on pictures in their own shapes: what a step weighs, what is drawn and judged, and where a run goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.config import Config, load_config
from glm_training.data.samplers.bucket_sampler import BucketSampler
from glm_training.engine.captioned_setup import build_captioned
from glm_training.engine.setup import build_sampler
from glm_training.methods.losses import MethodLoss
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.trainers.run import build_trainer, run_training
from glm_training.utils.distributed import World, init_world
from tests.data.captioned.building import noise
from tests.runs import weights_of, write_config
from tests.same import assert_identical

SHAPES = [(100, 100), (300, 100), (90, 64), (100, 300), (64, 80), (64, 64), (192, 64)]
"""(width, height) of seven pictures: four of 64 x 64 px in a batch, two of 32 x 96 and one of 96 x 32."""


def bucket_config(folder: Path, *overrides: str) -> Config:
    """`tests.runs`' run on a folder of pictures of three shapes, without an image size of its own."""
    path = write_config(folder)
    pictures = folder / "pictures"
    if not pictures.is_dir():
        pictures.mkdir()
        for number, shape in enumerate(SHAPES):
            (pictures / f"{number}.png").write_bytes(noise(number, shape))
            (pictures / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    del tree["reward"], tree["data"]["prompts_file"], tree["data"]["target_images_dir"]
    tree["data"] |= {"images": str(pictures), "validation": 0, "min_side": 0}
    tree["data"]["buckets"] = {"enabled": True, "smallest": 32}
    own = folder / "pictures.yaml"
    own.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(own, list(overrides))


def bucket_trainer(folder: Path, *overrides: str, world: World | None = None) -> BaseTrainer:
    return build_trainer(bucket_config(folder, *overrides), world or init_world(True, None))


def test_pictures_keep_their_shapes_and_each_comes_once_per_epoch(tmp_path: Path) -> None:
    """Batches of two: 2 of squares, 1 wide, 1 tall of one row; two epochs are eight steps."""
    trainer = bucket_trainer(tmp_path, "training.num_epochs=2", "training.max_steps=null")
    assert trainer.total_steps == 8
    assert trainer.notes[-1] == "3 sizes: 64 x 64 (4), 96 x 32 (2), 32 x 96 (1); 1.8 of 2 in a batch on average"
    shapes: Counter[tuple[int, ...]] = Counter()
    prompts: Counter[str] = Counter()
    positions: list[int] = []
    for _ in range(8):
        batch, places = trainer.next_batch()
        shapes[tuple(batch.targets.shape)] += 1
        prompts.update(batch.prompts)
        positions += places
    assert shapes == {(2, 3, 64, 64): 4, (2, 3, 32, 96): 2, (1, 3, 96, 32): 2}
    assert set(prompts.values()) == {2} and len(prompts) == 7
    assert positions == list(range(14))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_of_a_step_is_the_mean_over_its_rows(tmp_path: Path, monkeypatch, world_size: int) -> None:
    """The mean loss of each chunk is the mean of its rows' places: what the processes hand to `backward`, averaged as
    DDP averages, is the mean of the places of all rows of the step, short chunks and all."""
    keys = ["model.component=dit", f"training.gradient_accumulation_steps={4 // world_size}"]
    handed = [0.0] * 3
    rows: list[list[int]] = [[], [], []]
    for rank in range(world_size):
        trainer = bucket_trainer(tmp_path, *keys)
        trainer.world, sampler = World(rank, world_size), trainer.sampler
        sampler.rank, sampler.world_size = rank, world_size
        part = trainer.parts["dit"]
        weight = next(iter(part.parameters.values()))
        monkeypatch.setattr(trainer, "update", lambda part: {})
        monkeypatch.setattr("glm_training.trainers.supervised_trainer.mean_over_processes", lambda *_: {})
        for step in range(3):

            def loss(part, batch, step=step, weight=weight):
                positions = [position for (position,) in batch.names]
                rows[step].extend(positions)
                count = len(positions)
                return MethodLoss(0 * weight.sum() + sum(positions) / count, count, {})

            def backward(loss, step=step):
                handed[step] += loss.item()

            monkeypatch.setattr(trainer.supervision.terms, "loss", loss)
            monkeypatch.setattr(part, "backward", backward)
            trainer.training_step()
    for step in range(3):
        assert len(rows[step]) == 7, "an epoch is four batches"
        assert handed[step] / world_size == pytest.approx(sum(rows[step]) / 7)


def test_held_out_pictures_are_judged_and_drawn_at_their_own_sizes(tmp_path: Path) -> None:
    keys = [
        "evaluation.enabled=true",
        "evaluation.num_eval_samples=4",
        "logging.log_images=true",
        "training.max_steps=1",
    ]
    config = bucket_config(tmp_path, *keys, "logging.num_log_images=4", "logging.sample_interval=1")
    trainer = build_trainer(config, init_world(True, None))
    judged = trainer.judge()
    assert set(judged) == {"ar/loss", "dit/loss"}
    assert all(len(values) == 4 and not values.isnan().any() for values in judged.values())
    alone = trainer.supervision.terms.judge(trainer.parts, trainer.held_out.batch([1]), config.evaluation.seed)
    assert next(alone)["ar/loss"].item() == pytest.approx(judged["ar/loss"][1].item(), rel=1e-5)
    trainer.train()
    sizes = [Image.open(config.output_dir / f"samples/step-000001/{number}.png").size for number in range(4)]
    assert sizes == [(64, 64), (96, 32), (64, 64), (32, 96)]
    assert (config.output_dir / "samples/step-000001/grid.png").is_file()
    first = trainer.evaluations.before
    assert first is not None
    kept = load_checkpoint(config.checkpoint_dir() / "step-000001")["trainer"]["before"]  # type: ignore[index]
    trainer.evaluations.before = None
    trainer.evaluations.load(kept)
    assert trainer.evaluations.before is not None
    assert_identical(list(first.images), list(trainer.evaluations.before.images))


def test_a_run_goes_on_in_the_middle_of_an_epoch_bit_for_bit(tmp_path: Path) -> None:
    """Seven pictures in four batches: three steps, then three more, are six."""
    keys = ["evaluation.enabled=false", "training.max_steps=6", "logging.save_interval=3", "logging.eval_interval=6"]
    whole = bucket_config(tmp_path, *keys, f"output_dir={tmp_path}/whole")
    run_training(whole)
    point = tmp_path / "whole/checkpoints/step-000003"
    again = bucket_config(tmp_path, *keys, f"output_dir={tmp_path}/again", f"checkpoint.resume_from={point}")
    run_training(again)
    ends = []
    for config in (whole, again):
        point = f"checkpoint.resume_from={config.checkpoint_dir()}/step-000006"
        end = bucket_config(tmp_path, *keys, f"output_dir={tmp_path}/x", point)
        trainer = build_trainer(end, init_world(True, None))
        trainer.train()
        ends.append((weights_of(trainer), trainer.sampler.state_dict()))
    assert ends[0][1] == ends[1][1]
    assert_identical(ends[0][0], ends[1][0])


def test_weighted_sets_have_their_shares_of_each_block(tmp_path: Path) -> None:
    """Seven pictures and four others at 1 : 3: of 1,024 drawn rows 256 and 768, in batches of one size."""
    config = bucket_config(tmp_path)
    others = tmp_path / "others"
    others.mkdir()
    for number, shape in enumerate(SHAPES[:4]):
        (others / f"{number}.png").write_bytes(noise(number + 20, shape))
        (others / f"{number}.txt").write_text("another", encoding="utf-8")
    sets = [{"path": str(tmp_path / "pictures"), "weight": 1.0}, {"path": str(others), "weight": 3.0}]
    tree = config.model_dump(mode="json")
    tree["data"] |= {"images": sets}
    weighted = Config.model_validate(tree)
    data = build_captioned(weighted, captions=True)
    sampler = build_sampler(weighted, World(), data)
    assert isinstance(sampler, BucketSampler)
    drawn: list[int] = []
    while sampler.position < 1024:
        batch = sampler.next()
        assert len({data.size_of(index) for index in batch}) == 1
        drawn += batch
    assert len(drawn) == 1024 and sum(index < 7 for index in drawn) == 256
    assert set(Counter(index for index in drawn if index >= 7).values()) == {192}
