"""What every model family offers its trainers: parts to train, ways to draw, and ways to be saved."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from glm_training.models.denoising import Denoiser
from glm_training.models.lora import adapter_parameters, has_lora, merged, trainable_parameters
from glm_training.models.prompt_reading import PromptReading
from glm_training.utils.tensor_file import share_files


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; a family without an AR half has no use for the first three. `parallel`: latents that VGT's
    generator writes at once."""

    temperature: float
    top_p: float
    do_sample: bool
    num_inference_steps: int
    guidance_scale: float
    parallel: int = 1


DECODED_AT_ONCE = {"glm_image": 8, "sdxl": 4, "vgt": 8}
"""By `model.family`: pictures that go through the autoencoder together where nothing says how many. At its end it has
many channels for each pixel, and more of them together are no faster."""

FEW_STEPS_FILE = "few_steps.json"
"""In a pipeline folder: how a distilled model is to be drawn from. Stock diffusers passes it over."""


@dataclass(frozen=True)
class FewSteps:
    """A model drawn from in `steps` steps without guidance.

    `one_step_timestep`: what the network of a one-step SDXL is told of pure noise; None for the last timestep.
    """

    steps: int
    one_step_timestep: int | None = None

    def write(self, folder: str | Path) -> None:
        """Into a pipeline folder."""
        (Path(folder) / FEW_STEPS_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


def read_few_steps(folder: str | Path) -> FewSteps | None:
    """What `FewSteps.write` left in `folder`; None for a model that is not distilled. Raises ValueError for a file that
    cannot be read."""
    path = Path(folder) / FEW_STEPS_FILE
    if not path.is_file():
        return None
    try:
        return FewSteps(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how to draw: {error}") from error


class Family(ABC):
    """A whole model. Its `components` are what can be trained, each with the frozen parts around it.

    Nothing is trainable until `set_trainable`. `few_steps`: how a distilled model is drawn from; None for another.
    """

    components: tuple[str, ...]
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
    def read_prompts(
        self, prompts: Sequence[str], height: int, width: int, mode: Literal["t2i", "i2i"]
    ) -> list[PromptReading]:
        """How much of each prompt the model reads, for images of `height` x `width` px."""

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
        vae_batch_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """`samples` images per prompt ``[P * samples, 3, height, width]`` in [0, 1], prompt-major; see `generate`.
        `vae_batch_size` of them go through the autoencoder at once (None: `micro_batch_size`, or `DECODED_AT_ONCE`)."""

    @abstractmethod
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] through the autoencoder and back, in [0, 1] on the model's device."""

    @abstractmethod
    def own_size(self) -> int:
        """Pixels along a side of what the model was trained to draw."""

    @abstractmethod
    def to_pipeline(self) -> Any:
        """A stock pipeline over these very modules, adapters included."""

    @abstractmethod
    def save_lora(self, component: str, folder: str | Path) -> None:
        """Write the adapter of a component alone, as the libraries of this family read it."""

    @abstractmethod
    def load_lora(self, component: str, folder: str | Path) -> None:
        """Add the adapter that `save_lora` wrote. FileNotFoundError where there is none, ValueError where it does not
        fit."""

    def save_beside(self, folder: Path) -> None:  # noqa: B027  (most have nothing to add)
        """Writes into a pipeline folder what the stock pipeline does not know of."""

    def draw_in_few_steps(self, few_steps: FewSteps) -> None:
        """From here on the model is a distilled one; pipeline folders that are written say so."""
        self.few_steps = few_steps

    # -- what they share -----------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, *, merge_lora: bool = False) -> None:
        """Write a pipeline folder that the stock pipeline's `from_pretrained` loads (safetensors).

        With adapters, ``merge_lora=True`` writes weights with them added and leaves the model in memory as it is;
        without it ValueError is raised, since a stock pipeline would lose them.
        """
        adapted = [self.module(name) for name in self.components if has_lora(self.module(name))]
        if adapted and not merge_lora:
            raise ValueError(
                "the model carries LoRA adapters, which a pipeline folder cannot hold: pass merge_lora=True, or write "
                "them alone with save_lora"
            )
        with ExitStack() as stack:
            for module in adapted:
                stack.enter_context(merged(module))
            self.to_pipeline().save_pretrained(str(path), safe_serialization=True)
        if self.few_steps is not None:
            self.few_steps.write(path)
        self.save_beside(Path(path))
        share_files(Path(path))

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

    def rate_scales(self, component: str) -> dict[str, float]:
        """Parameters of a component whose learning rate is a share of the others', by name as in `trainable`."""
        return {}

    def sharding_units(self, component: str) -> list[nn.Module]:
        """The repeated blocks of a component that are trained, in order: what FSDP shards one by one."""
        return units_in(self.component(component), self.module(component))

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


def units_in(component: Any, module: nn.Module) -> list[nn.Module]:
    """The blocks of `module` that have the names of the component's `sharding_units`, in order."""
    return [child for child in module.modules() if type(child).__name__ in component.sharding_units]
