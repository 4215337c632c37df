"""Which denoising steps of a training step are SDE steps: windows by hand."""

import math

import pytest
import torch

from glm_training.algorithms.flow_sde import sde_window


def starts(steps: int, *args, **kwargs) -> list[int]:
    windows = [sde_window(step, *args, **kwargs) for step in range(steps)]
    assert all(window == tuple(range(window[0], window[0] + len(window))) for window in windows)
    return [window[0] for window in windows]


def test_all_is_every_step_but_the_last_of_cps() -> None:
    assert sde_window(3, 4) == (0, 1, 2, 3)
    assert sde_window(3, 4, size=2, strategy="all") == (0, 1, 2, 3)
    assert sde_window(3, 4, kernel="cps") == (0, 1, 2)
    assert sde_window(3, 10, step_range=(2, 5)) == (2, 3, 4)
    assert sde_window(3, 10, step_range=(2, 5), kernel="cps") == (2, 3, 4)


def test_progressive_slides_ends_at_the_last_step_and_starts_over() -> None:
    assert starts(9, 5, size=3, strategy="progressive", interval=2) == [0, 0, 1, 1, 2, 2, 0, 0, 1]
    assert starts(5, 8, size=3, strategy="progressive", interval=1, stride=2) == [0, 2, 4, 5, 0]
    assert starts(4, 8, size=3, strategy="progressive", interval=1, step_range=(2, 6)) == [2, 3, 2, 3]
    assert starts(3, 5, size=5, strategy="progressive", interval=1) == [0, 0, 0]
    assert starts(60, 31, size=2, strategy="progressive", interval=2) == [step // 2 for step in range(60)]


def test_decay_leaves_later_windows_sooner() -> None:
    options = {"size": 2, "strategy": "decay", "interval": 8, "decay_rate": math.log(2), "decay_threshold": 1}
    found = starts(60, 8, **options)
    dwells = [found[:25].count(start) for start in range(7)]
    assert dwells == [8, 8, 4, 2, 1, 1, 1] and found[:25] == sorted(found[:25])
    assert found[25] == 0, "a round lasts the sum of the dwells, then starts over"


def test_decay_with_rate_zero_is_progressive() -> None:
    progressive = starts(40, 6, size=2, interval=3, strategy="progressive")
    assert starts(40, 6, size=2, interval=3, strategy="decay", decay_rate=0.0) == progressive


def test_random_covers_every_start_evenly_and_nothing_else() -> None:
    uniforms = torch.linspace(0, 1, 1201)[:-1].tolist()
    options = {"size": 3, "strategy": "random", "step_range": (1, 7)}
    found = [sde_window(0, 10, uniform=uniform, **options) for uniform in uniforms]
    counts = [found.count((start, start + 1, start + 2)) for start in range(1, 5)]
    assert sum(counts) == 1200 and max(abs(count - 300) for count in counts) <= 1
    assert sde_window(0, 10, uniform=1 - 2**-53, **options) == (4, 5, 6)


@pytest.mark.parametrize("strategy", ["all", "progressive", "decay", "random"])
@pytest.mark.parametrize("total", [2, 5, 8])
def test_cps_never_gets_the_last_step(strategy, total: int) -> None:
    for size in range(1, total):
        for step in range(80):
            uniform = (step * 0.618) % 1
            window = sde_window(step, total, size=size, strategy=strategy, kernel="cps", interval=2, uniform=uniform)
            assert 0 <= window[0] and window[-1] < total - 1
            assert len(window) == (total - 1 if strategy == "all" else size)


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((-1, 4), {}, "step must be >= 0"),
        ((0, 0), {}, "total_steps"),
        ((0, 4), {"step_range": (2, 5)}, "step_range must satisfy"),
        ((0, 4), {"step_range": (3, 4), "kernel": "cps"}, "step_range leaves no step"),
        ((0, 1), {"kernel": "cps"}, "leaves no step"),
        ((0, 4), {"kernel": "ode"}, "kernel must be one of flow, dance, cps"),
        ((0, 4), {"strategy": "first"}, "strategy must be one of"),
        ((0, 4), {"strategy": "progressive"}, r"size must lie in \[1, 4\]"),
        ((0, 4), {"strategy": "progressive", "size": 4, "kernel": "cps"}, r"size must lie in \[1, 3\]"),
        ((0, 4), {"strategy": "random", "size": 2}, "uniform"),
        ((0, 4), {"strategy": "random", "size": 2, "uniform": 1.0}, "uniform"),
        ((0, 4), {"strategy": "progressive", "size": 2, "interval": 0}, "interval"),
    ],
)
def test_window_refuses(args: tuple, kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sde_window(*args, **kwargs)
