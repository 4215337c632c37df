"""Sets of pictures from a configuration: what is trained on, evaluated on, drawn, and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_training.data import DataError, StatefulSampler, describe_drift
from glm_training.data.samplers.mixed_sampler import MixedSampler
from glm_training.engine import setup
from glm_training.engine.captioned_setup import build_captioned, build_held_out_images
from glm_training.engine.places import place_problems
from glm_training.utils.distributed import World
from tests.data.captioned.building import captioned, captioned_config, colour, picture, tars, write_tar


def test_the_training_data_of_a_configuration(tmp_path: Path) -> None:
    config = captioned_config(tmp_path / "set", output_dir=str(tmp_path / "run"))
    data = build_captioned(config, captions=True)
    batch = data.batch([11, 0])
    assert batch.prompts == ["picture 11", "picture 0"] and batch.targets is not None
    assert batch.targets.shape == (2, 3, 32, 32)
    assert len(list((tmp_path / "run" / "cache").iterdir())) == 3
    assert build_captioned(config, captions=False).batch([3]).prompts == [""]
    assert setup.data_told(config, data, build_held_out_images(config, data, captions=True)) == [
        "12 training pictures", "evaluated on 10 training prompts"
    ]  # fmt: skip


def test_rewards_meet_every_prompt_by_its_place(tmp_path: Path) -> None:
    training = {"use_reward": True}
    config = captioned_config(tmp_path / "set", output_dir=str(tmp_path / "run"), training=training)
    data = build_captioned(config, captions=True)
    named = setup.datasets_to_score(config, data, build_held_out_images(config, data, captions=True))
    assert named == {"training data": data}
    told = [(f"{number:04d}", f"picture {number}") for number in range(12)]
    assert data.prompts() == told and data.prompts(most=3) == told[::4]


def test_the_index_may_lie_elsewhere(tmp_path: Path) -> None:
    place = str(tmp_path / "indexes")
    config = captioned_config(tmp_path / "set", data={"index_dir": place}, output_dir=str(tmp_path / "run"))
    build_captioned(config, captions=True)
    assert len(list((tmp_path / "indexes").iterdir())) == 3 and not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    config = captioned_config(tmp_path / "set", data={"index_dir": str(tmp_path / "file")})
    assert [line for line in place_problems(config) if line.startswith("data.index_dir: ")]


def test_sets_are_mixed_by_weight_or_put_one_after_the_other(tmp_path: Path) -> None:
    tars(tmp_path / "a")
    write_tar(tmp_path / "b.tar", captioned(range(100, 103)))
    paths = [str(tmp_path / "a"), str(tmp_path / "b.tar")]
    training = {"batch_size": 2}
    weighted = captioned_config(
        tmp_path / "a",
        data={"images": [{"path": path, "weight": weight} for path, weight in zip(paths, (1.0, 3.0), strict=True)]},
        training=training,
    )
    world = World(rank=1, world_size=2)
    data = build_captioned(weighted, captions=True)
    sampler = setup.build_sampler(weighted, world, data)
    assert isinstance(sampler, MixedSampler)
    assert (sampler.lengths, sampler.shares, sampler.batch_size) == ((12, 3), (0.25, 0.75), 2)
    assert (sampler.rank, sampler.world_size, sampler.seed) == (1, 2, weighted.seed)
    repeated = captioned_config(
        tmp_path / "a", data={"images": [{"path": paths[0]}, {"path": paths[1], "repeats": 4}]}, training=training
    )
    data = build_captioned(repeated, captions=True)
    assert type(setup.build_sampler(repeated, world, data)) is StatefulSampler
    assert len(data) == 12 + 4 * 3
    assert data.batch([12, 15, 23]).prompts == ["picture 100", "picture 100", "picture 102"]


def test_held_out_pictures_are_the_first_cut_at_the_centre(tmp_path: Path) -> None:
    write_tar(tmp_path / "eval.tar", captioned(range(200, 215)))
    sections = {"data": {"crop": "random", "augmentation": True}, "output_dir": str(tmp_path / "run")}
    evaluation = {"eval_images": str(tmp_path / "eval.tar"), "num_eval_samples": 4}
    config = captioned_config(tmp_path / "set", evaluation=evaluation, **sections)
    training = build_captioned(config, captions=True)
    held_out = build_held_out_images(config, training, captions=True)
    assert [(example.index, example.prompt) for example in held_out.examples] == [
        (place, f"picture {200 + place}") for place in range(4)
    ]
    assert (len(held_out), held_out.has_targets, held_out.has_sources) == (4, True, False)
    batch = held_out.batch([3, 1])
    assert batch.indices == [3, 1] and batch.prompts == ["picture 203", "picture 201"]
    assert batch.targets is not None
    assert batch.targets[:, :, 5, 5].mul(255).tolist() == [list(colour(203)), list(colour(201))]
    assert torch.equal(batch.targets, held_out.batch([3, 1], epoch=5).targets)  # type: ignore[arg-type]
    assert setup.evaluated(config, "prompt") == "held-out prompt"
    own = captioned_config(tmp_path / "set", evaluation={"num_eval_samples": 4}, **sections)
    of_training = build_held_out_images(own, training, captions=True)
    assert [example.prompt for example in of_training.examples] == [f"picture {place}" for place in range(4)]
    assert setup.evaluated(own, "prompt") == "training prompt"
    assert held_out.fingerprint() != of_training.fingerprint()
    silent = build_held_out_images(config, training, captions=False)
    assert [example.prompt for example in silent.examples] == [""] * 4


def test_digests_of_held_out_pictures_are_of_their_content(tmp_path: Path) -> None:
    evaluation = {"eval_images": str(tmp_path / "eval.tar"), "num_eval_samples": 3}
    config = captioned_config(tmp_path / "set", evaluation=evaluation, output_dir=str(tmp_path / "run"))
    write_tar(tmp_path / "eval.tar", captioned(range(3)))
    training = build_captioned(config, captions=True)
    digests = []
    for members in (captioned(range(3)), captioned(range(3)) | {"0001.txt": b"another"}):
        write_tar(tmp_path / "eval.tar", members)
        digests.append(build_held_out_images(config, training, captions=True).example_digests())
    assert describe_drift(*digests) == ["index 1: prompt or image changed"]


def test_held_out_pictures_must_be_whole_and_may_be_small(tmp_path: Path) -> None:
    evaluation = {"eval_images": str(tmp_path / "eval.tar")}
    config = captioned_config(tmp_path / "set", evaluation=evaluation, output_dir=str(tmp_path / "run"))
    write_tar(tmp_path / "eval.tar", captioned(range(3)) | {"0001.png": b"\x89PNG broken"})
    training = build_captioned(config, captions=True)
    with pytest.raises(DataError, match=r"eval\.tar: 0001: .* data\.max_bad_fraction"):
        build_held_out_images(config, training, captions=True)
    write_tar(tmp_path / "eval.tar", {"0.png": picture(7, (10, 9)), "0.txt": b"small"})
    assert build_held_out_images(config, training, captions=True).batch([0]).prompts == ["small"]


def test_the_first_training_pictures_that_are_trained_on(tmp_path: Path) -> None:
    members = captioned(range(6)) | {"0000.png": b"broken", "0002.png": picture(2, (40, 40))}
    write_tar(tmp_path / "set" / "a.tar", members)
    config = captioned_config(
        tmp_path / "set",
        data={"max_bad_fraction": 0.2, "min_side": 80},
        evaluation={"num_eval_samples": 3},
        output_dir=str(tmp_path),
    )
    held_out = build_held_out_images(config, build_captioned(config, captions=True), captions=True)
    assert [example.prompt for example in held_out.examples] == ["picture 1", "picture 3", "picture 4"]
    assert held_out.batch([1]).prompts == ["picture 3"]


def test_what_is_wrong_with_both_sets_is_told_together(tmp_path: Path) -> None:
    evaluation = {"eval_images": str(tmp_path / "none")}
    config = captioned_config(
        tmp_path / "set", evaluation=evaluation, data={"images": [{"path": str(tmp_path / "no")}]}
    )
    with pytest.raises(DataError) as caught:
        build_captioned(config, captions=True)
    assert [problem.path for problem in caught.value.problems] == [tmp_path / "no", tmp_path / "none"]
