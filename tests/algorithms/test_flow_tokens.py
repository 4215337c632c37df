"""Noise levels, path, guidance, sampling steps and channel norm of single tokens, against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glm_training.algorithms.flow_tokens import (
    channel_norm,
    guidance_weight,
    integrate,
    noised,
    sde_step,
    token_times,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_times_by_hand() -> None:
    # sigmoid(0) = 1/2: 1 - 0.7 / 1.2; sigmoid(ln 3) = 3/4: 1 - 1.05 / 1.3
    times = token_times(torch.tensor([0.0, math.log(3), -math.log(3)]))
    expected = torch.tensor([1 - 0.7 / 1.2, 1 - 1.05 / 1.3, 1 - 0.35 / 1.1])
    torch.testing.assert_close(times, expected)
    assert times[0].item() == pytest.approx(0.41667, abs=1e-5)
    torch.testing.assert_close(token_times(draw(0, 9), 1.0), 1 - torch.sigmoid(draw(0, 9)))
    ends = token_times(torch.tensor([-1e4, 1e4]))
    assert ends.tolist() == [1.0, 0.0]


def test_path_and_target_by_hand() -> None:
    clean, noise = torch.tensor([[[2.0, 4.0], [1.0, 1.0]]]), torch.tensor([[[0.0, 8.0], [3.0, -1.0]]])
    state, target = noised(clean, noise, torch.tensor([[0.25, 1.0]]))
    assert state.tolist() == [[[0.5, 7.0], [1.0, 1.0]]], "t = 1 is data"
    assert target.tolist() == [[[2.0, -4.0], [-2.0, 2.0]]]
    later, _ = noised(clean, noise, torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(later[0, 0], state[0, 0] + 0.25 * target[0, 0])
    assert later[0, 1].tolist() == noise[0, 1].tolist()
    assert noised(clean.half(), noise.bfloat16(), torch.ones(1, 2).half())[0].dtype == torch.float32


def test_guidance_fades_by_hand() -> None:
    assert [guidance_weight(4.5, group, 4) for group in range(4)] == [4.5, 3.625, 2.75, 1.875]
    assert guidance_weight(1.0, 2, 7) == 1 and guidance_weight(3.0, 0, 1) == 3
    assert guidance_weight(4.5, 255, 256) == pytest.approx(1 + 3.5 / 256)


def test_a_step_by_hand() -> None:
    # t = .5: score = (.5 * 3 - 2) / .5 = -1; drift = 3 - .5; noise sqrt(2 * .5 * .04) = .2
    after = sde_step(torch.tensor([2.0]), torch.tensor([3.0]), 0.5, 0.04, torch.tensor([-1.0]))
    assert after.item() == pytest.approx(2 + 2.5 * 0.04 - 0.2, rel=1e-6)
    # t = 0: the score of pure noise is -x, the drift v - x
    first = sde_step(torch.tensor([2.0]), torch.tensor([3.0]), 0.0, 0.08, torch.tensor([1.0]))
    assert first.item() == pytest.approx(2 + 0.08 + 0.4, rel=1e-6)


def test_integration_asks_for_every_time_and_ends_with_an_euler_step() -> None:
    asked: list[float] = []

    def constant(state: Tensor, time: float) -> Tensor:
        asked.append(time)
        return torch.full_like(state, 10.0)

    noise = draw(0, 4, 2, 3)
    drawn = integrate(constant, noise)
    assert asked == pytest.approx([0.0, 0.32, 0.64, 0.96])
    state = noise[0]
    for time, fresh in zip((0.0, 0.32, 0.64), noise[1:], strict=True):
        drift = 10 + time * 10 - state
        state = state + 0.32 * drift + math.sqrt(0.64 * (1 - time)) * fresh
    torch.testing.assert_close(drawn, state + 0.4)


def test_one_known_point_is_reached_exactly() -> None:
    """Of data in one point m the velocity is (m - x) / (1 - t); the last step leads there from anywhere."""
    point = draw(1, 5, 3)
    reached = integrate(lambda state, time: (point - state) / (1 - time), draw(2, 30, 5, 3))
    torch.testing.assert_close(reached, point, rtol=0, atol=1e-4)


def test_the_spread_of_gaussian_data_is_kept() -> None:
    """Data N(3, .5^2): the exact velocity is linear, and many samples have that mean and that spread."""
    spread = 0.5

    def velocity(state: Tensor, time: float) -> Tensor:
        # E[clean - noise | x_t], with Var x_t = (t s)^2 + (1 - t)^2
        slope = (time * spread**2 - (1 - time)) / ((time * spread) ** 2 + (1 - time) ** 2)
        return 3 + slope * (state - 3 * time)

    drawn = integrate(velocity, draw(3, 300, 5_000, 1))
    # 5 000 samples: standard errors .007 and .005, and the last step takes a little of the spread
    assert drawn.mean().item() == pytest.approx(3, abs=0.05)
    assert drawn.std().item() == pytest.approx(spread, rel=0.1)


def test_channel_norm_by_hand() -> None:
    latents = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 4, 1, 1).repeat(2, 1, 2, 3)
    latents[1] *= 100  # mean 3, deviations -2 -1 0 3, variance 3.5
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]).view(1, 4, 1, 1) / math.sqrt(3.5)
    torch.testing.assert_close(channel_norm(latents), expected.repeat(2, 1, 2, 3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(channel_norm(latents.movedim(1, -1), dim=-1), channel_norm(latents).movedim(1, -1))
    assert channel_norm(torch.full((1, 3, 1, 1), 7.0)).abs().max() == 0, "flat channels stay finite"
    assert channel_norm(latents.bfloat16()).dtype == torch.float32
    tiny = 1e-3 * torch.tensor([[1.0, -1.0]])  # variance 1e-6 beside eps 1e-6
    torch.testing.assert_close(channel_norm(tiny), torch.tensor([[1.0, -1.0]]) / math.sqrt(2))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: token_times(torch.zeros(2), 0.0), "shift must be"),
        (lambda: noised(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), "noise must have the shape"),
        (lambda: noised(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), r"times must be \[2\]"),
        (lambda: guidance_weight(3.0, 4, 4), r"group must lie in \[0, 4\)"),
        (lambda: integrate(lambda state, time: state, torch.zeros(1, 3)), "at least 2 steps"),
    ],
)
def test_refuses(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
