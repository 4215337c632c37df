"""How often the host has to wait for the device: once per call for the value checks, never without them.

A host wait is a scalar read back (`aten._local_scalar_dense`), counted on the CPU; fake CUDA tensors prove that nothing
else needs a value or mixes devices.
"""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glm_training.algorithms.dgpo import group_preference_loss
from glm_training.algorithms.distillation import distribution_matching_loss, reward_hinge, srpo_text_feature
from glm_training.algorithms.flow_matching import (
    flow_matching_loss,
    interpolate,
    sample_timestep_density,
    shift_sigma,
    velocity_target,
)
from glm_training.algorithms.flow_sde import gaussian_kl, sde_step, sde_transition
from glm_training.algorithms.nft import nft_loss
from glm_training.algorithms.policy_loss import policy_loss
from glm_training.algorithms.preference import diffusion_dpo_loss, min_snr_weights, sequence_dpo_loss


class HostReads(TorchDispatchMode):
    """Counts reads of a device value by the host while active."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


Call = Callable[[torch.Tensor, torch.Tensor, bool], object]
CALLS: dict[str, Call] = {
    "policy_loss": lambda x, row, check: policy_loss(
        x,
        x,
        row,
        x > 9,
        reference_log_probs=x,
        weights=x.abs(),
        kl_coef=0.1,
        aggregation="token_mean",
        global_token_count=3.0,
        check_finite=check,
    ),
    "policy_loss sequence": lambda x, row, check: policy_loss(
        x, x, row, level="sequence", objective="cispo", clip=(0.0, 2.0), check_finite=check
    ),
    "interpolate": lambda x, row, check: interpolate(x, x, row, check_finite=check),
    "velocity_target": lambda x, row, check: velocity_target(x, x, check_finite=check),
    "shift_sigma": lambda x, row, check: shift_sigma(row, row, check_finite=check),
    "timestep density": lambda x, row, check: sample_timestep_density(row, "logit_normal", check_finite=check),
    "flow_matching_loss": lambda x, row, check: flow_matching_loss(x, x, x, weights=row, check_finite=check),
    "sde_step ode": lambda x, row, check: sde_step(x, x, 0.6, 0.5, check_finite=check),
    "sde_step flow": lambda x, row, check: sde_step(
        x, x, row, 0.1, kernel="flow", sigma_max=0.9, noise=x, check_finite=check
    ),
    "sde_step dance": lambda x, row, check: sde_step(
        x, x, row, row / 2, kernel="dance", next_latents=x, check_finite=check
    ),
    "sde_step cps": lambda x, row, check: sde_step(x, x, 0.6, row, kernel="cps", noise=x, check_finite=check),
    "sde_transition": lambda x, row, check: sde_transition(x, x, row, 0.1, kernel="flow", check_finite=check),
    "gaussian_kl": lambda x, row, check: gaussian_kl(x, x, row, check_finite=check),
    "nft_loss": lambda x, row, check: nft_loss(
        x, x, x, x, row, row, beta=1.0, advantage_max=5.0, reference_velocity=x, check_finite=check
    ),
    "group_preference_loss": lambda x, row, check: group_preference_loss(
        row, row, row, row.long(), beta=1.0, old_errors=row, clip=(0.1, 0.1), check_finite=check
    ),
    "diffusion_dpo_loss": lambda x, row, check: diffusion_dpo_loss(
        row, row, row, row, beta=1.0, weights=row, check_finite=check
    ),
    "sequence_dpo_loss": lambda x, row, check: sequence_dpo_loss(row, row, row, row, beta=1.0, check_finite=check),
    "min_snr_weights": lambda x, row, check: min_snr_weights(row, gamma=5.0, prediction="epsilon", check_finite=check),
    "distribution_matching_loss": lambda x, row, check: distribution_matching_loss(x, x, x, check_finite=check),
    "reward_hinge": lambda x, row, check: reward_hinge(row, check_finite=check),
    "srpo_text_feature": lambda x, row, check: srpo_text_feature(x, x, 1.0, check_finite=check),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_read_with_checks_and_none_without(name: str) -> None:
    x, row = torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0.3, 0.4, 0.5])
    for check in (True, False):
        with HostReads() as reads:
            CALLS[name](x, row, check)
        assert reads.count == int(check)


@pytest.mark.parametrize("name", CALLS)
def test_runs_on_another_device_without_knowing_a_value(name: str) -> None:
    with FakeTensorMode():
        x, row = torch.empty(3, 4, device="cuda"), torch.empty(3, device="cuda")
        CALLS[name](x, row, False)
        with pytest.raises(DataDependentOutputException):
            CALLS[name](x, row, True)
