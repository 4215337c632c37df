"""What every model family offers its trainers: parts to train, ways to draw, and ways to be saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from glm_training.models.denoising import Denoiser
from glm_training.models.few_steps import FewSteps
from glm_training.models.lora import adapter_parameters, trainable_parameters


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; a family without an AR half has no use for the first three."""

    temperature: float
    top_p: float
    do_sample: bool
    num_inference_steps: int
    guidance_scale: float


class Family(ABC):
    """A whole model. Its `components` are what can be trained, each with the frozen parts around it.

    Nothing is trainable until `set_trainable`. `few_steps`: how a distilled model is drawn from; None for another.
    """

    components: ClassVar[tuple[str, ...]]
    few_steps: FewSteps | None = None

    # -- what a family says --------------------------------------------------------------------------------------------

    @abstractmethod
    def component(self, name: str) -> Any:
        """The component `name`: an nn.Module whose forward is the atomic unit of its training."""

    @abstractmethod
    def module(self, name: str) -> nn.Module:
        """The Hugging Face model of a component: what takes LoRA adapters and what is exported."""

    @abstractmethod
    def frozen(self) -> list[nn.Module]:
        """The parts that are never trained."""

    @abstractmethod
    def denoiser(self, height: int, width: int) -> Denoiser:
        """The noise levels of the half that diffuses, for images of so many pixels."""

    @abstractmethod
    def draw(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        seed: int,
        sampling: Sampling,
        samples: int = 1,
        sources: Tensor | None = None,
        prompt_ids: Sequence[int] | None = None,
        micro_batch_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """`samples` images per prompt ``[P * samples, 3, height, width]`` in [0, 1], prompt-major; see `generate`."""

    @abstractmethod
    def save_pretrained(self, path: str | Path, *, merge_lora: bool = False) -> None:
        """Write a pipeline folder that stock diffusers loads; adapters must be merged (`merge_lora`) or absent."""

    @abstractmethod
    def save_lora(self, component: str, folder: str | Path) -> None:
        """Write the adapter of a component alone, as the libraries of this family read it."""

    def draw_in_few_steps(self, few_steps: FewSteps) -> None:
        """From here on the model is a distilled one; pipeline folders that are written say so."""
        self.few_steps = few_steps

    # -- what they share -----------------------------------------------------------------------------------------------

    def set_trainable(self, **wanted: bool) -> None:
        """Switch gradients of each component by name, off where it is not named: of its adapters if it carries any,
        else of all but its frozen parts. ValueError for an unknown name."""
        for name in wanted:
            self._known(name)
        for name in self.components:
            module = self.module(name)
            self.component(name).requires_grad_(False)
            adapters = adapter_parameters(module)
            for param in adapters.values() if adapters else module.parameters():
                param.requires_grad_(wanted.get(name, False))
        for part in self.frozen():
            part.requires_grad_(False)

    def trainable(self, component: str) -> dict[str, nn.Parameter]:
        """The parameters of a component that receive a gradient, named as in `module(component)`."""
        return trainable_parameters(self.module(component))

    def lora_targets(self, component: str) -> tuple[str, ...]:
        """Layer names that `lora.add_lora` takes for this component by default."""
        return self.component(component).lora_targets

    def sharding_units(self, component: str) -> list[nn.Module]:
        """The repeated blocks of a component, in order: what FSDP shards one by one."""
        names = self.component(component).sharding_units
        return [child for child in self.module(component).modules() if type(child).__name__ in names]

    def pipeline_bytes(self) -> int:
        """About what `save_pretrained` writes: the weights of every part, in bytes."""
        params = {id(p): p for name in self.components for p in self.component(name).parameters()}
        return sum(param.numel() * param.element_size() for param in params.values())

    def to(self, device: torch.device | str) -> Self:
        for name in self.components:
            self.component(name).to(device)
        return self

    def train(self, mode: bool = True) -> Self:
        for name in self.components:
            self.component(name).train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def _known(self, name: str) -> None:
        if name not in self.components:
            raise ValueError(f"component must be one of {', '.join(self.components)}, got {name!r}")
