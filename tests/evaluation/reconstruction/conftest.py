"""Weights for the network of rFID."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_training.evaluation.reconstruction.inception import DIMENSION


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A file of random weights, in the layout of the published one."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(published, "load_state_dict_from_url", lambda *given, **named: {})
        patch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = published.FeatureExtractorInceptionV3("random", [str(DIMENSION)])
        for layer in network.modules():  # the default dies out over so many layers
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path
