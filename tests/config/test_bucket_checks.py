"""When pictures keep their shapes, and what that asks of the other keys."""

from __future__ import annotations

import pytest

from glm_training.config import Config
from glm_training.config.checks.buckets import bucket_issues


def config(**sections: object) -> Config:
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("sections", "enabled"),
    [
        ({"data": {"images": "x"}}, True),
        ({"data": {"images": "x", "buckets": {"enabled": None}}}, True),
        ({"data": {"images": "x", "buckets": None}}, True),
        ({"data": {"images": "x", "buckets": {"enabled": False}}}, False),
        ({"data": {"images": "x", "image_size": {"height": 512, "width": 512}}}, False),
        ({"data": {"images": "x", "image_size": {"height": 512}, "buckets": {"enabled": True}}}, True),
        ({"data": {"images": "x"}, "model": {"family": "sdxl"}}, True),
        ({"data": {"images": "x"}, "model": {"family": "vgt"}}, False),
        ({"data": {}}, False),
        ({"data": {"prompts_file": "x", "target_images_dir": "y"}}, False),
        ({"data": {"pairs": "x"}, "training": {"method": "dpo"}}, False),
    ],
)
def test_own_pictures_keep_their_shapes_unless_they_are_given_a_size(sections, enabled) -> None:
    found = config(**sections)
    assert found.data.buckets.enabled is enabled
    # as config.yaml of the run has it, with an image size: read again it is the same
    again = Config.model_validate(found.model_dump(mode="json"))
    assert again.data.buckets == found.data.buckets


SUPERVISED = {"training": {"use_reward": False}}
ON = {"enabled": True}


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"data": {"buckets": {"upscale": True}}}, "data.buckets.upscale"),
        ({"data": {"buckets": {"smallest": 128}}}, "data.buckets.smallest"),
        ({"model": {"family": "vgt"}, "data": {"images": "x", "buckets": ON}}, "data.buckets.enabled"),
        ({"training": {"method": "dmdr"}, "data": {"buckets": ON}}, "data.buckets.enabled"),
        (
            {"model": {"family": "sdxl"}, "training": {"method": "dpo"}, "data": {"buckets": {**ON, "smallest": 96}}},
            "data.buckets.smallest",
        ),
        (
            {**SUPERVISED, "data": {"image_size": {"height": 32, "width": 64}, "buckets": ON}},
            "data.buckets.smallest",
        ),
        ({"data": {"buckets": ON}, "reward": {"grpo": {"max_resamples": 2}}}, "reward.grpo.max_resamples"),
    ],
)
def test_what_does_not_go_with_buckets(sections, path) -> None:
    (issue,) = bucket_issues(config(**sections))
    assert issue.paths[0] == path


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"images": "x"}},
        {"data": {"buckets": ON}},
        {"data": {"buckets": {**ON, "upscale": True, "smallest": 96}}},
        {"data": {"buckets": ON}, **SUPERVISED, "reward": {"grpo": {"max_resamples": 2}}},
        {"model": {"family": "sdxl"}, "training": {"method": "dpo"}, "data": {"pairs": "x", "buckets": ON}},
    ],
)
def test_what_does(sections) -> None:
    assert list(bucket_issues(config(**sections))) == []


def test_the_smallest_bucket_of_sdxl_that_is_told_fits() -> None:
    tree = {"model": {"family": "sdxl"}, "training": {"method": "dpo"}, "data": {"buckets": {**ON, "smallest": 96}}}
    (issue,) = bucket_issues(config(**tree))
    assert issue.suggestion == "Set it to 128."
