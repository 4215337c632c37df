"""The network whose features rFID compares: Inception of 2015 as `torch-fidelity` has it, from a file of weights."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.models.weights import read_weights
from glm_training.rewards.types import to_uint8
from glm_training.utils.downloads import AddressFile, DownloadError
from glm_training.utils.hub_files import is_offline

DIMENSION = 2048
"""Numbers of a picture's features, those of the last pooling."""

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class Inception:
    """weights: `torch-fidelity`'s file; None takes the one in torch's cache, and fetches it there once where there is
    a network."""

    def __init__(self, weights: Path | None, device: torch.device | None = None) -> None:
        self._weights = weights
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network: Any = None

    def check(self) -> None:
        """Loads it. Raises EvaluationError naming what to install or where the file is to come from."""
        if self._network is not None:
            return
        if find_spec("torch_fidelity") is None:
            raise EvaluationError(
                'rFID needs the package torch-fidelity: pip install "glm_training[evaluation]", or pass --no-rfid'
            )
        path = self._weights or _cached()
        try:
            weights = read_weights(path)
            self._network = _network(weights).to(self._device)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"{path} is not torch-fidelity's Inception ({str(error).splitlines()[0]}). Download {URL} and name it "
                "as --inception"
            ) from error

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 2048] fp32 on the CPU, of pictures of 8 bits."""
        self.check()
        pixels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return self._network(pixels)[0].float().cpu()


def _network(weights: dict[str, Tensor]) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # It unpickles the file that it is given, whatever is in it: it gets one with tensors and nothing else.
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return FeatureExtractorInceptionV3("inception", [str(DIMENSION)], feature_extractor_weights_path=file)


def _cached() -> Path:
    """Where torch keeps the weights, fetched if they are not there. Raises EvaluationError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if path.is_file():
        return path
    where = (
        f"the weights of Inception are not at {path}. Download {URL} and save them there, or name them as --inception"
    )
    if is_offline():
        raise EvaluationError(where)
    try:
        AddressFile("rFID", URL, path, "6726825d").fetch()
    except DownloadError as error:
        raise EvaluationError(f"{where} ({error})") from error
    return path
