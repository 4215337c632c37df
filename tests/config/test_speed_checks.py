"""Keys that change only how fast a run computes, where they could not work or would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from glm_training.config.checks.speed import speed_issues
from tests.config.building import build


@pytest.mark.parametrize(
    ("keys", "sections"),
    [
        (("training.compile", "model.family"), {"training": {"compile": True}, "model": {"family": "vgt"}}),
        (
            ("training.compile", "model.quantization"),
            {"training": {"compile": True}, "model": {"quantization": "nf4"}},
        ),
        (("rollout.cuda_graph", "model.family"), {"rollout": {"cuda_graph": False}, "model": {"family": "sdxl"}}),
        (("rollout.cuda_graph", "model.device_map"), {"rollout": {"cuda_graph": True}, "model": {"device_map": "cpu"}}),
        (("distributed.gather", "model.family"), {"distributed": {"gather": "half"}, "model": {"family": "sdxl"}}),
        (
            ("distributed.gather", "training.method"),
            {"distributed": {"gather": "half"}, "training": {"method": "dmdr"}},
        ),
        (
            ("distributed.gather", "rollout.cuda_graph"),
            {"distributed": {"gather": "block"}, "rollout": {"cuda_graph": True}},
        ),
    ],
)
def test_what_cannot_work_is_refused(keys: tuple[str, ...], sections: dict[str, Any]) -> None:
    assert [issue.paths for issue in speed_issues(build(**sections))] == [keys]


def test_what_works_is_not() -> None:
    for sections in (
        {},
        {"training": {"compile": True}, "rollout": {"cuda_graph": True}, "model": {"device_map": "cuda"}},
        {"training": {"compile": True}, "model": {"family": "sdxl"}},
        {"model": {"family": "vgt"}},
        {"rollout": {"cuda_graph": "auto"}, "model": {"device_map": "cpu"}},
        {"rollout": {"cuda_graph": "auto"}, "distributed": {"gather": "block"}},
        {"rollout": {"cuda_graph": True}, "distributed": {"gather": "half"}},
    ):
        assert not list(speed_issues(build(**sections)))
