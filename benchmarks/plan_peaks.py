"""Peaks of memory measured against those that `glm-train plan` works out.

    python -m benchmarks.plan_peaks > benchmarks/results/plan_peaks.json
    python -m benchmarks.plan_peaks dit          only the cases whose name has the word

Each case builds a network of GLM-Image or SDXL, takes an optimizer step of two micro-batches twice, and sums the bytes
of all tensor storages that are alive after each operation. Large ones run with fake tensors, which have sizes and no
data: the published sizes need no memory then. The cases named real compute on the CPU, in fp32.

Fake tensors are of the CPU, as no GPU is needed; where a GPU would do otherwise it is followed: autocast computes norms
in fp32, and the optimizer goes over all tensors at once (foreach). Workspaces of its kernels are not seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from glm_training.config.sections.optimization import AR_TARGETS, DIT_TARGETS, UNET_TARGETS
from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.dit_types import DiTCondition
from glm_training.models.glm_image.positions import generation_grids
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.models.loading import published_configuration
from glm_training.models.lora import ADAPTER
from glm_training.models.quantization import quantise_layers, quantised_layers
from glm_training.planning import counting, passes
from glm_training.planning.models import build_network
from glm_training.planning.passes import WIDE, Precision
from glm_training.planning.run import QUANTIZED_BYTES
from glm_training.planning.tracing import Alive, faking, norms_as_on_a_gpu

GIB = 1 << 30

PROMPT, GLYPHS = 100, 12
"""Tokens of a prompt, and of its quoted words, in these cases."""


@dataclass(frozen=True)
class Case:
    """A network at some size, and how it is trained. `change`: of its published configuration. `bits`: what the frozen
    layers of its blocks lie in."""

    name: str
    network: str
    rows: int
    side: int
    whole: bool
    checkpointing: bool
    change: dict[str, Any]
    amp: bool = True
    guided: bool = False
    real: bool = False
    bits: Literal["int8", "nf4"] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of what is frozen, and of all where nothing is."""
        return torch.bfloat16 if self.amp else torch.float32

    @property
    def precision(self) -> Precision:
        """As `passes` takes it."""
        return Precision(2, True, self.whole) if self.amp else Precision(4, False, self.whole)


def ar_of(layers: int, **text: Any) -> dict[str, Any]:
    """The change to a language model of so many layers."""
    return {"text_config": {"num_hidden_layers": layers, **text}, "vision_config": {"depth": 1}}


SMALL_AR = ar_of(
    6,
    hidden_size=768,
    intermediate_size=2560,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=24000,
    pad_token_id=0,
)
SMALL_DIT = {"num_layers": 6, "num_attention_heads": 6}
SMALL_UNET = {
    "block_out_channels": [64, 128, 256],
    "attention_head_dim": [1, 2, 4],
    "transformer_layers_per_block": [1, 2, 4],
}

CASES = [
    Case("dit lora 1024", "dit", 2, 1024, False, True, {}),
    Case("dit lora guided 1024", "dit", 2, 1024, False, True, {}, guided=True),
    Case("dit lora kept 512", "dit", 2, 512, False, False, {}),
    Case("dit full 1024", "dit", 1, 1024, True, True, {}),
    Case("ar lora 1024", "ar", 4, 1024, False, True, {}),
    Case("ar lora kept 512", "ar", 2, 512, False, False, {}),
    Case("ar full 1024", "ar", 2, 1024, True, True, {}),
    Case("unet lora 1024", "unet", 4, 1024, False, True, {}),
    Case("unet lora kept 1024", "unet", 1, 1024, False, False, {}),
    Case("unet full 1024", "unet", 2, 1024, True, True, {}),
    Case("small dit lora", "dit", 4, 512, False, True, SMALL_DIT),
    Case("small dit full kept", "dit", 4, 512, True, False, SMALL_DIT),
    Case("small ar lora", "ar", 8, 512, False, True, SMALL_AR),
    Case("small ar full kept", "ar", 4, 512, True, False, SMALL_AR),
    Case("small unet full kept", "unet", 4, 512, True, False, SMALL_UNET),
    Case("real dit lora", "dit", 2, 256, False, True, SMALL_DIT, amp=False, real=True),
    Case("real dit full kept", "dit", 2, 256, True, False, SMALL_DIT, amp=False, real=True),
    Case("real ar lora", "ar", 2, 256, False, True, SMALL_AR, amp=False, real=True),
    Case("real ar full", "ar", 2, 256, True, True, SMALL_AR, amp=False, real=True),
    Case("real dit lora int8", "dit", 2, 256, False, True, SMALL_DIT, amp=False, real=True, bits="int8"),
    Case("real dit lora nf4", "dit", 2, 256, False, True, SMALL_DIT, amp=False, real=True, bits="nf4"),
    Case("real unet lora kept", "unet", 2, 256, False, False, SMALL_UNET, amp=False, real=True),
]


# -- measuring ---------------------------------------------------------------------------------------------------------


BLOCKS = {
    "ar": ARComponent.sharding_units,
    "dit": DiTComponent.sharding_units,
    "unet": ("BasicTransformerBlock", "ResnetBlock2D"),
}
"""What `model.quantization` reaches, and shards are made of."""


def blocks_of(case: Case, network: nn.Module) -> list[nn.Module]:
    """The blocks of a case's network."""
    return [module for module in network.modules() if type(module).__name__ in BLOCKS[case.network]]


PART = {"ar": "vision_language_encoder", "dit": "transformer", "unet": "unet"}
TARGETS = {"ar": AR_TARGETS, "dit": DIT_TARGETS, "unet": UNET_TARGETS}
RANK = 32


def network_of(case: Case) -> nn.Module:
    """The network of a case, on the meta device, without adapters."""
    family = "sdxl" if case.network == "unet" else "glm_image"
    settings = published_configuration(family, PART[case.network])
    for key, value in case.change.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    return build_network(family, PART[case.network], settings)


def filled(network: nn.Module, case: Case) -> None:
    """Gives a network on the meta device tensors: trained ones in fp32, the others in the case's dtype."""
    for name, module in network.named_modules():
        for key, param in list(module._parameters.items()):
            if param is None:
                continue
            words = f"{name}.{key}".split(".")
            adapter = "lora_A" in words or "lora_B" in words
            trained = not {"visual", "vqmodel"} & set(words) if case.whole else adapter
            dtype = torch.float32 if trained else case.dtype
            values = torch.zeros(param.shape, dtype=dtype)
            module._parameters[key] = nn.Parameter(values, requires_grad=trained)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)


class WholePrompt(ARPrompt):
    """Prompts without padding, which need not be looked at to know it: fake tensors have no data."""

    def trimmed(self) -> tuple[ARPrompt, bool]:
        return self, False


class UnmaskedDiT(DiTComponent):
    """The component for rows whose glyphs all count, likewise."""

    def _key_mask(self, *_: Any) -> None:
        return None


def forward_of(case: Case, network: Any, pipeline: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The component around a network, and a forward pass of it to a loss. `pipeline`: a tiny one, for the parts around
    it."""
    rows, side, low = case.rows, case.side, torch.float32 if case.whole else case.dtype
    if case.network == "unet":
        latents, text = torch.zeros(rows, 4, side // 8, side // 8, dtype=low), torch.zeros(rows, 77, 2048, dtype=low)
        added = {"text_embeds": torch.zeros(rows, 1280, dtype=low), "time_ids": torch.zeros(rows, 6)}
        times = torch.zeros(rows)
        if case.checkpointing:
            network.enable_gradient_checkpointing()
        return (
            network,
            lambda: (
                network(latents, times, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]
                .float()
                .square()
                .mean()
            ),
        )
    if case.network == "dit":
        component = UnmaskedDiT(network, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)
        grid = (side // 32, side // 32)
        glyph = torch.zeros(rows, GLYPHS, 1472, dtype=case.dtype)
        condition = DiTCondition(
            torch.zeros(rows, grid[0] * grid[1], dtype=torch.long), grid, glyph,
            torch.ones(rows, GLYPHS, dtype=torch.bool), side, side,
        )  # fmt: skip
        empty = torch.zeros(1, 1472, dtype=case.dtype)
        component.glyphs.made = lambda spans: empty
        noisy, times = torch.zeros(rows, 16, side // 8, side // 8), torch.zeros(rows, dtype=torch.long)
        if case.checkpointing:
            component.enable_gradient_checkpointing()
        scale = 1.5 if case.guided else 1.0
        return component, lambda: component(noisy, times, condition, guidance_scale=scale).square().mean()
    writer = ARComponent(network, None)  # type: ignore[arg-type]
    grids = generation_grids(side, side, "t2i")
    written = sum(height * width for height, width in grids)
    prompt = WholePrompt(
        torch.zeros(rows, PROMPT, dtype=torch.long), torch.ones(rows, PROMPT, dtype=torch.long),
        torch.zeros(3, rows, PROMPT, dtype=torch.long), torch.zeros(3, rows, written, dtype=torch.long),
        grids, grids[0][0] * grids[0][1],
    )  # fmt: skip
    tokens = torch.zeros(rows, written, dtype=torch.long)
    support = torch.full((rows, written, 2048), 255, dtype=torch.uint8)
    if case.checkpointing:
        writer.enable_gradient_checkpointing()
    return writer, lambda: writer(prompt, tokens, temperature=0.9, support=support).mean()


def scales(network: nn.Module) -> Iterator[Tensor]:
    """What layers of 4 bits keep beside their weights and buffers."""
    for layer in quantised_layers(network).values():
        state: Any = getattr(layer.weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def adapted(case: Case, network: nn.Module) -> None:
    """Puts adapters on a frozen network."""
    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS[case.network]), bias="none")
    inject_adapter_in_model(adapters, network.requires_grad_(False), ADAPTER)


def measure(case: Case) -> dict[str, int]:
    """Peak bytes of forward and backward passes with gradients there, and of the optimizer's step."""
    network, pipeline = network_of(case), build_tiny()
    if not case.whole and case.bits is None:
        adapted(case, network)
    autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if case.amp else nullcontext
    with norms_as_on_a_gpu() if case.real else faking():
        filled(network, case)
        if case.bits is not None:
            quantise_layers(network, blocks_of(case, network), case.bits, case.dtype, torch.device("cpu"))
            adapted(case, network)
        network.train()
        _, forward = forward_of(case, network, pipeline)
        trained = [param for param in network.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=True)
        alive, peaks = Alive(), {}
        for tensor in (*network.parameters(), *network.buffers(), *scales(network)):
            alive.add(tensor)
        with alive:
            for _ in range(2):
                for _ in range(2):
                    alive.reset()
                    with autocast():
                        loss = forward()
                    loss.backward()
                    del loss
                peaks["passes"] = alive.peak
                alive.reset()
                optimizer.step()
                peaks["step"] = alive.peak
                optimizer.zero_grad()
    return peaks


# -- working out -------------------------------------------------------------------------------------------------------


def worked_out(case: Case) -> dict[str, float]:
    """The same peaks by the formulas of `glm_training.planning`."""
    network = network_of(case)
    frozen = {"visual", "vqmodel"}
    own = {name: tuple(param.shape) for name, param in network.named_parameters()}
    trained = counting.adapters(network, TARGETS[case.network], RANK)
    if case.whole:
        trained = {name: shape for name, shape in own.items() if frozen.isdisjoint(name.split("."))}
    total, count = counting.sizes_of(own), counting.sizes_of(trained)
    size = case.dtype.itemsize
    weights = (total - count if case.whole else total) * size + WIDE * count
    if case.bits is not None:
        linear = [child for block in blocks_of(case, network) for child in block.modules()]
        wrapped = sum(child.weight.numel() for child in linear if isinstance(child, nn.Linear))
        weights -= wrapped * (size - QUANTIZED_BYTES[case.bits])
    lasting = weights + counting.moment_bytes("adamw", trained) + WIDE * count
    return {
        "passes": lasting + _pass(case, network).peak,
        "step": lasting + counting.step_bytes("adamw", trained),
    }


def _pass(case: Case, network: nn.Module) -> passes.Pass:
    at, checkpointing = case.precision, case.checkpointing
    if case.network == "unet":
        places = (case.side // 8) ** 2
        return passes.unet_pass(counting.unet_sizes(network), case.rows, places, at, checkpointing=checkpointing)
    if case.network == "dit":
        tokens = (case.side // 16) ** 2 + GLYPHS
        found = passes.dit_pass(counting.dit_sizes(network), case.rows, tokens, at, checkpointing=checkpointing)
        return passes.guided(found) if case.guided else found
    written = sum(rows * columns for rows, columns in generation_grids(case.side, case.side, "t2i"))
    tokens = PROMPT + written - 1
    return passes.ar_pass(counting.ar_sizes(network), case.rows, tokens, written, at, checkpointing=checkpointing)


def main(words: Sequence[str]) -> None:
    """Prints what was measured of the cases, in GiB, as JSON; on standard error how far off the formulas are."""
    found = []
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        peaks, expected = measure(case), worked_out(case)
        off = {name: expected[name] / peaks[name] - 1 for name in peaks}
        told = ", ".join(f"{name} {peaks[name] / GIB:.3f} GiB, {off[name]:+.1%}" for name in peaks)
        print(f"{case.name}: {told}", file=sys.stderr, flush=True)
        found.append({**asdict(case), "measured": {name: round(peak / GIB, 3) for name, peak in peaks.items()}})
    print(json.dumps({"torch": torch.__version__, "cases": found}, indent=1))


def read_cases(text: str) -> list[tuple[Case, dict[str, float]]]:
    """The cases that `main` printed, with the bytes that were measured of each."""
    known = {case.name: case for case in CASES}
    recorded = json.loads(text)["cases"]
    measured = [{name: gib * GIB for name, gib in each["measured"].items()} for each in recorded]
    return [(known[each["name"]], peaks) for each, peaks in zip(recorded, measured, strict=True)]


if __name__ == "__main__":
    main(sys.argv[1:])
