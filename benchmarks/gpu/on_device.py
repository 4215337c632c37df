"""A pytest plugin: tensors and generators that name no device are made on that of GLM_TEST_DEVICE.

GLM_TEST_DEVICE=cuda pytest -p benchmarks.gpu.on_device tests/algorithms
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ["GLM_TEST_DEVICE"]


class Generator(torch.Generator):
    """A generator of the device, where none is named."""

    def __new__(cls, device: str | torch.device = DEVICE) -> Generator:
        return super().__new__(cls, device=device)


def pytest_configure() -> None:
    torch.set_default_device(DEVICE)
    torch.Generator = Generator  # type: ignore[misc]
