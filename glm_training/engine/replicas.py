"""Whole copies of what is trained, one on each process (DDP)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from glm_training.models.library_versions import without_buffers_sent


def replicated(component: nn.Module, *, find_unused_parameters: bool) -> DistributedDataParallel:
    """`component` in DDP, whose gradients are laid out at the first step as at all later ones.

    DDP groups gradients into buckets in the order in which those of its first backward pass came, from the second pass
    on. Among three processes or more the order of the terms of a sum depends on where in a bucket it lies: after a
    resume a step would be other than without a stop. So a pass of zero gradients comes first.
    """
    # buffers are frozen and were compared at the start: sending them at each forward would be waiting in vain
    policy = DistributedDataParallel(component, find_unused_parameters=find_unused_parameters, **without_buffers_sent())
    if not find_unused_parameters:  # else buckets stay as they are
        trained = [parameter for parameter in component.parameters() if parameter.requires_grad]
        component.forward = lambda: torch.stack([0 * each.sum().float() for each in trained]).sum()  # type: ignore[method-assign]
        with torch.enable_grad():
            policy().backward()
        del component.forward
        for parameter in trained:
            parameter.grad = None
    return policy
