"""GRPO-Guard's normalised ratio and Flow-DPPO's trust region, against closed forms."""

import pytest
import torch

from glm_training.algorithms.flow_sde import divergence_mask, guard_log_ratio


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_guard_log_ratio_is_the_mean_of_noise_times_shift_at_every_std() -> None:
    old_mean, shift, noise = draw(0, 3, 2, 4), 0.05 * draw(1, 3, 2, 4), draw(2, 3, 2, 4)
    expected = (noise * shift).flatten(1).mean(1)
    for std in (0.05, 0.5, torch.tensor([0.1, 0.4, 2.0])):
        wide = std if isinstance(std, float) else std.view(3, 1, 1)
        taken = old_mean + wide * noise

        def log_prob(mean: torch.Tensor, wide=wide, taken=taken) -> torch.Tensor:
            return torch.distributions.Normal(mean, wide).log_prob(taken).flatten(1).mean(1)

        mean = old_mean + shift
        guarded = guard_log_ratio(log_prob(mean), log_prob(old_mean), mean, old_mean, std)
        torch.testing.assert_close(guarded, expected, atol=1e-5, rtol=1e-4)


def test_divergence_mask_drops_only_what_runs_away() -> None:
    ratio = torch.tensor([1.2, 1.2, 0.8, 0.8, 1.2, 1.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    divergence = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.05, 0.2])
    keep = divergence_mask(ratio, advantages, divergence, 0.1)
    assert keep.tolist() == [False, True, False, True, True, True]


def test_guard_and_mask_refuse() -> None:
    mean = draw(0, 2, 3)
    with pytest.raises(ValueError, match="log_probs"):
        guard_log_ratio(draw(0, 3), draw(1, 3), mean, mean, 0.1)
    with pytest.raises(ValueError, match="std"):
        guard_log_ratio(draw(0, 2), draw(1, 2), mean, mean, 0.0)
    with pytest.raises(ValueError, match="divergence"):
        divergence_mask(draw(0, 2), draw(0, 2), draw(0, 3), 0.1)
    with pytest.raises(ValueError, match="threshold"):
        divergence_mask(draw(0, 2), draw(0, 2), draw(0, 2), 0.0)
