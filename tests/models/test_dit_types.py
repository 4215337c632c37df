"""Trajectories and schedules of plain numbers: which step, which row, and what a replay is scored with."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from glm_training.models.glm_image.dit_types import FlowSchedule
from glm_training.models.glm_image.latents import upsample_tokens
from glm_training.models.glm_image.sampling import step_hooks
from glm_training.models.glm_image.schedule import schedule_tensor, shift_parameter, shift_sigmas
from tests.methods.toys import SCHEDULE, trajectory_of


def named(*columns: int) -> torch.Tensor:
    """[2, len(columns), 1, 1, 2]: 10 for each row, and the column's number."""
    numbers = torch.tensor([[10.0 * row + column for column in columns] for row in (1, 2)])
    return numbers.view(2, -1, 1, 1, 1).expand(-1, -1, 1, 1, 2)


def trajectory(**changed):
    """Two rows with SDE steps 0 and 2 of three; their means are told apart from the latents by 100."""
    options = {"sde_indices": (0, 2), "log_probs": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "stored": named(0, 1, 2, 3)}
    options |= {"stored_steps": (0, 1, 2, 3), "means": named(100, 102)} | changed
    return trajectory_of(named(3)[:, 0], **options)


def firsts(latents: torch.Tensor) -> list[float]:
    assert latents.shape[1:] == (1, 1, 2)
    return latents[:, 0, 0, 0].tolist()


def test_latents_are_those_before_a_step_and_means_those_of_its_own_draw():
    whole = trajectory()
    assert [firsts(whole.at(step)) for step in range(4)] == [[10, 20], [11, 21], [12, 22], [13, 23]]
    assert firsts(whole.mean_at(0)) == [110, 120] and firsts(whole.mean_at(2)) == [112, 122]
    assert firsts(whole.latents[:, 1]) == [11, 21]
    with pytest.raises(ValueError, match="the mean of step 1 was not kept"):
        whole.mean_at(1)
    with pytest.raises(ValueError, match="the mean of step 0 was not kept"):
        trajectory(means=None).mean_at(0)
    some = trajectory(stored=named(0, 1, 2), stored_steps=(0, 1, 2))
    assert firsts(some.at(2)) == [12, 22] and firsts(some.at(3)) == [13, 23]
    with pytest.raises(ValueError, match="use at"):
        _ = some.latents
    late = trajectory(sde_indices=(2,), stored=named(2, 3), stored_steps=(2, 3))
    assert firsts(late.at(2)) == [12, 22]
    with pytest.raises(ValueError, match="latents before step 1 were not kept"):
        late.at(1)


@pytest.mark.parametrize("rows", [torch.tensor([1, 0]), torch.tensor([False, True])])
def test_rows_keep_their_latents_means_and_log_probs(rows):
    part, order = trajectory().select(rows).to("cpu"), [1, 0] if rows.dtype == torch.long else [1]
    assert firsts(part.final) == [[13, 23][row] for row in order]
    assert firsts(part.at(1)) == [[11, 21][row] for row in order]
    assert firsts(part.mean_at(2)) == [[112, 122][row] for row in order]
    assert part.log_probs.tolist() == [[[1, 2], [3, 4]][row] for row in order]
    assert part.condition.batch_size == len(order) and part.sde_indices == (0, 2)


def test_a_step_is_scored_between_its_own_levels_with_the_eta_that_drew():
    """Step 1 goes from .8 to .5: the std of the flow kernel is eta sqrt(.8 / (1 - .8)) sqrt(.3). Step 0 begins at 1,
    where the first level below stands in below the line: eta sqrt(1 / (1 - .8)) sqrt(.2)."""
    whole = trajectory(sde_indices=(0, 1), eta=0.25)
    velocity = torch.zeros(2, 1, 1, 2)
    assert whole.score(1, velocity).std.flatten().tolist() == pytest.approx([0.25 * 2 * 0.3**0.5] * 2)
    assert whole.score(0, velocity).std.flatten().tolist() == pytest.approx([0.25] * 2)
    scored = whole.score(1, velocity)
    assert firsts(scored.next_latents) == [12, 22]
    variance = (0.25 * 2) ** 2 * 0.3
    distance = (scored.next_latents - scored.mean).square().mean(dim=(1, 2, 3))
    expected = -distance / (2 * variance) - 0.5 * torch.log(torch.tensor(2 * torch.pi * variance))
    torch.testing.assert_close(scored.log_prob, expected)
    with pytest.raises(ValueError, match="step 2 drew no noise"):
        whole.score(2, velocity)


def test_the_first_level_below_one_stands_in_for_it():
    assert SCHEDULE.steps == 3 and SCHEDULE.sigma_max == pytest.approx(0.8)
    assert FlowSchedule(torch.tensor([500.0, 250.0]), torch.tensor([0.7, 0.4, 0.0])).sigma_max == pytest.approx(0.7)


def test_shifts_by_hand():
    """mu = sqrt(64 / 256) * .75 + .25 = .625 makes mu / (mu + 2) of 1/3; a shift of 3 makes 3 u / (1 + 2 u) of u."""
    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    assert shift_parameter(dynamic, 64) == pytest.approx(0.625)
    u = torch.tensor([1 / 3, 1.0], dtype=torch.float64)
    assert shift_sigmas(dynamic, u, 64).tolist() == pytest.approx([0.625 / 2.625, 1.0])
    assert shift_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), u, 64).tolist() == pytest.approx([0.6, 1.0])
    assert shift_sigmas(dynamic, u, 64).dtype == torch.float32
    times = schedule_tensor(torch.tensor(999.0), 3, torch.device("cpu"))
    assert times.tolist() == [999, 999, 999] and times.dtype == torch.float32


def test_a_token_covers_four_patches():
    assert upsample_tokens(torch.tensor([[1, 2, 3, 4, 5, 6]]), (2, 3)).view(4, 6).tolist() == [
        [1, 1, 2, 2, 3, 3],
        [1, 1, 2, 2, 3, 3],
        [4, 4, 5, 5, 6, 6],
        [4, 4, 5, 5, 6, 6],
    ]


def test_a_hook_comes_every_sixteen_tokens_and_at_every_step():
    calls = []
    at_token, at_step = step_hooks(lambda: calls.append("hook"))
    seen = []
    for token in range(1, 50):
        at_token(token)
        seen += [token] if calls else []
        calls.clear()
    assert seen == [1, 17, 33, 49]
    for step in range(3):
        at_step(step)
    assert calls == ["hook"] * 3 and step_hooks(None) == (None, None)
