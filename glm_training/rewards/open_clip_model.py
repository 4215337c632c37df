"""open_clip's models from a local checkpoint, with their tokenizer: what HPSv2.1 and DFN CLIP share."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from glm_training.rewards.clip import CHUNK
from glm_training.rewards.types import RewardBackendError, load_all
from glm_training.utils.hub_files import Exactly, HubFiles, Wanted
from glm_training.utils.writable import expanded

Preprocess = Callable[[torch.Tensor, int], torch.Tensor]
"""[B, 3, H, W] in [0, 1] and the side -> [B, 3, side, side] normalised."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint and where the configuration speaks of it.

    metric: the name that its messages begin with. repository, file: where the hub has it. weights_key,
    architecture_key: the keys of the configuration for a local file and for open_clip's name of the model.
    """

    metric: str
    repository: str
    file: str
    weights_key: str
    architecture_key: str

    @property
    def download(self) -> str:
        """The command that fetches it."""
        return f"hf download {self.repository} {self.file}"


@contextmanager
def _root_logger_left_alone() -> Iterator[None]:
    """Inside, `logging.info` of open_clip does not give the root logger a handler, which would then repeat on stderr
    whatever any logger of the process has to say."""
    root, quiet = logging.getLogger(), logging.NullHandler()
    root.addHandler(quiet)
    try:
        yield
    finally:
        root.removeHandler(quiet)


class OpenClipModel:
    """A frozen fp32 model of open_clip with its tokenizer, loaded on demand."""

    def __init__(
        self, checkpoint: Checkpoint, weights: Path | str | None, architecture: str, device: torch.device
    ) -> None:
        """``weights``: the checkpoint's file; None looks in the local Hugging Face cache."""
        self._checkpoint = checkpoint
        self._weights = weights
        self._architecture = architecture
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None

    def wanted(self) -> list[Wanted]:
        """The checkpoint, where no file of one is given."""
        wanted = self._checkpoint
        return (
            [] if self._weights is not None else [HubFiles(wanted.metric, wanted.repository, Exactly((wanted.file,)))]
        )

    def load(self) -> None:
        """Load the model. Raises RewardBackendError naming the extra to install, or what to fetch and the key."""
        if self._model is None:
            with _root_logger_left_alone():
                open_clip, path = load_all((self._open_clip, self._path))
                model = self._read(open_clip, path)
                self._tokenizer = open_clip.get_tokenizer(self._architecture)
            self._model = model

    def image_embeddings(self, images: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] on any device -> [B, width] fp32 of unit length; differentiable in the images."""
        self.load()
        size = self._model.visual.image_size
        side = size if isinstance(size, int) else size[0]
        rows = [
            self._model.encode_image(preprocess(chunk.to(self._device).float(), side)).float()
            for chunk in images.split(CHUNK)
        ]
        return F.normalize(torch.cat(rows), dim=-1)

    def text_embeddings(self, prompts: Sequence[str]) -> torch.Tensor:
        """B prompts -> [B, width] fp32 of unit length, without gradient; what exceeds 77 tokens is cut."""
        self.load()
        unique = list(dict.fromkeys(prompts))  # the images of a group share their prompt
        with torch.no_grad():
            rows = [
                self._model.encode_text(self._tokenizer(unique[start : start + CHUNK]).to(self._device)).float()
                for start in range(0, len(unique), CHUNK)
            ]
            places = {text: row for row, text in enumerate(unique)}
            return F.normalize(torch.cat(rows), dim=-1)[[places[prompt] for prompt in prompts]]

    def _open_clip(self) -> Any:
        try:
            import open_clip
        except ModuleNotFoundError as error:
            raise RewardBackendError(
                f"{self._checkpoint.metric}: the Python package {error.name} is missing; run "
                "`pip install 'glm_training[hps]'`"
            ) from error
        if ":" not in self._architecture and open_clip.get_model_config(self._architecture) is None:
            raise RewardBackendError(
                f"{self._checkpoint.metric}: open_clip has no model {self._architecture!r}; correct "
                f"{self._checkpoint.architecture_key}"
            )
        return open_clip

    def _path(self) -> Path:
        wanted = self._checkpoint
        if self._weights is not None:
            path = expanded(self._weights)
            place = str(path)
        else:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(wanted.repository, wanted.file)
            path = Path(found) if isinstance(found, str) else Path()
            place = "the local Hugging Face cache"
        if not path.is_file():
            raise RewardBackendError(
                f"{wanted.metric}: {wanted.file} not found at {place}. Run `{wanted.download}`, or set "
                f"{wanted.weights_key} to where it lies"
            )
        return path

    def _read(self, open_clip: Any, path: Path) -> Any:
        wanted = self._checkpoint
        with torch.random.fork_rng(devices=[]):  # it draws weights, all of which are replaced below
            model = open_clip.create_model(self._architecture, pretrained=None, precision="fp32")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state.get("state_dict", state))
        except (AttributeError, EOFError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise RewardBackendError(
                f"{wanted.metric}: {path} does not fit open_clip's {self._architecture} ({str(error)[:300]}). Run "
                f"`{wanted.download}` anew and check {wanted.weights_key}"
            ) from error
        return model.float().requires_grad_(False).eval().to(self._device)
