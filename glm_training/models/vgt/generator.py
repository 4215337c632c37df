"""VGT's generator: a language model that conditions a flow head, which draws the latents of an image one by one.

`Generator.forward` is the atomic unit: the velocity of every token under what was written before it. `sampling.sample`
draws through the same queries, positions and head.

Letters: B images, C latent channels, L = h * w places, T text tokens, H width of the language model, R width of the
teacher's features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2Model
from transformers.initialization import no_init_weights

from glm_training.models.library_versions import recompute_layers
from glm_training.models.loading import load_errors_explained, read_typed_config
from glm_training.models.vgt.flow_head import FlowHead
from glm_training.models.vgt.prompt_text import PromptText
from glm_training.models.vgt.sequence import (
    Prompts,
    interleaved,
    orders_of_rows,
    raster,
    sequence_positions,
    visible_keys,
    written,
)
from glm_training.models.weights import cast_weights, load_weights
from glm_training.utils.tensor_file import write_tensor_file

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "config.json", "model.safetensors", "tokenizer"
"""What a generator's folder holds."""

MODEL_TYPE = "vgt_generator"


@dataclass(frozen=True)
class RepaConfig:
    """Alignment of the head with a vision encoder (REPA, arXiv:2410.06940): width of the encoder's features (DINOv3
    ViT-B: 768), and of the hidden layers that predict them."""

    features: int = 768
    hidden: int = 2048


@dataclass(frozen=True)
class GeneratorConfig:
    """What a generator is made of.

    Attributes:
        llm: configuration of a Qwen2; its `tie_word_embeddings` says that the token embeddings stay as they are.
        latent_channels: C of the autoencoder.
        latent_norm: whether the autoencoder's latents are normed over the channels.
        grid: places (h, w) it is trained on.
        query_grid: side of the grids of queries and positions, of which smaller grids take the middle.
        head_width, head_depth: of the flow head.
        repa: the head that predicts a vision encoder's features, if any.
        order: in which order it was trained to write, "random" or "raster".
        stride: pixels along a side of what one place stands for in its autoencoder; None where nothing tells.

    Raises ValueError for values that go with no model.
    """

    llm: dict[str, Any]
    latent_channels: int
    latent_norm: bool
    grid: tuple[int, int]
    query_grid: int = 64
    head_width: int = 1536
    head_depth: int = 12
    repa: RepaConfig | None = None
    order: str = "random"
    stride: int | None = None

    def __post_init__(self) -> None:
        kind = self.llm.get("model_type", "qwen2")
        problems = [] if kind == "qwen2" else [f"llm must be a qwen2, got a {kind}"]
        if self.llm.get("use_sliding_window"):
            problems.append("llm must attend to everything written: use_sliding_window is not supported")
        for name in ("latent_channels", "query_grid", "head_width", "head_depth"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.order not in ("random", "raster"):
            problems.append(f"order must be random or raster, got {self.order!r}")
        if problems:
            raise ValueError("; ".join(problems))
        self.check_grid(self.grid)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError for a grid that the queries do not cover."""
        if not all(1 <= side <= self.query_grid for side in grid):
            raise ValueError(f"the latent grid {grid} must lie within {self.query_grid} x {self.query_grid}")

    def check_autoencoder(self, latent_channels: int, channel_norm: bool, stride: int) -> None:
        """Raises ValueError unless the latents of that autoencoder are those that the generator draws."""
        problems = []
        if latent_channels != self.latent_channels:
            problems.append(
                f"the autoencoder's latents have {latent_channels} channels and the generator draws "
                f"{self.latent_channels}"
            )
        if self.stride not in (None, stride):
            problems.append(
                f"each of the autoencoder's latents stands for {stride} px along a side, and the generator draws one "
                f"for {self.stride} px"
            )
        if channel_norm != self.latent_norm:
            has, draws = ("norms", "as they are") if channel_norm else ("does not norm", "normed")
            problems.append(
                f"the autoencoder {has} its latents over the channels and the generator draws them {draws} (stage 2 "
                "norms, stage 1 does not)"
            )
        if problems:
            raise ValueError(f"{'; '.join(problems)}: give the autoencoder that the generator was trained with")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` gives the config back."""
        return asdict(self) | {"grid": list(self.grid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "the generator's config") -> Self:
        """Raises ValueError that names every key that is missing or unknown, or what the class refuses; `where` it
        stands."""
        required = {field.name for field in fields(cls) if field.default is MISSING}
        problems = [f"{name} is missing" for name in sorted(required - values.keys())]
        problems += [
            f"{name} is no key of it" for name in sorted(values.keys() - {field.name for field in fields(cls)})
        ]
        if problems:
            raise ValueError(f"{where} cannot be used: {'; '.join(problems)}")
        repa = values.get("repa")
        try:
            read = {"grid": tuple(values["grid"]), "repa": None if repa is None else RepaConfig(**repa)}
            return cls(**(values | read))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where} cannot be used: {error}") from error


class Prediction(NamedTuple):
    """velocity [B, L, C] fp32 and, where the generator has a REPA head, its predicted features [B, L, R]; raster
    order."""

    velocity: Tensor
    features: Tensor | None


class Generator(nn.Module):
    """The language model, its queries and projectors, and the flow head, with the tokenizer.

    The language model has no output layer here. Published training freezes it, and with it the token embeddings where
    the two are tied: they are the one frozen part.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    sharding_units: ClassVar[tuple[str, ...]] = ("Qwen2DecoderLayer", "HeadBlock")

    def __init__(
        self,
        config: GeneratorConfig,
        tokenizer: PreTrainedTokenizerBase,
        llm: Qwen2Model | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """`llm`: a pretrained one, in place of random weights. Random weights depend on `seed` alone. Raises ValueError
        for a tokenizer without VGT's marks, or with more tokens than the language model has."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.prompt_text = PromptText(tokenizer)
        with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
            torch.default_generator.manual_seed(seed)
            self.llm = Qwen2Model(Qwen2Config.from_dict(config.llm)) if llm is None else llm
            self._add_parts(self.llm.config.hidden_size)
        if len(tokenizer) > self.llm.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the language model {self.llm.config.vocab_size}"
            )
        self.llm.set_attn_implementation("sdpa")  # its masks are boolean here
        for part in self.frozen():
            part.requires_grad_(False)

    def frozen(self) -> list[nn.Module]:
        """What is never trained: the token embeddings where they are tied to the output layer."""
        return [self.llm.embed_tokens] if self.llm.config.tie_word_embeddings else []

    def _add_parts(self, width: int) -> None:
        config = self.config
        grid = (1, width, config.query_grid, config.query_grid)
        self.queries = nn.Parameter(torch.empty(grid))
        self.place_embeddings = nn.Parameter(torch.empty(grid))
        self.latent_in = nn.Linear(config.latent_channels, width)
        self.condition_out = nn.Linear(width, width)
        self.head = FlowHead(config.latent_channels, width, config.head_width, config.head_depth)
        self.repa_head = _repa_head(config)
        nn.init.normal_(self.queries, std=width**-0.5)
        nn.init.trunc_normal_(self.place_embeddings, std=0.02)
        for projector in (self.latent_in, self.condition_out):
            nn.init.normal_(projector.weight, std=0.02)
            nn.init.zeros_(projector.bias)

    @property
    def device(self) -> torch.device:
        return self.queries.device

    def cast(self, dtype: torch.dtype) -> Self:
        """Its weights in `dtype`. Unlike `to`, which would round the rotary frequencies: at position 500 a frequency
        of 8 bits is a radian off."""
        return cast_weights(self, dtype)

    def align(self, features: int | None, *, seed: int = 0) -> None:
        """Has it predict a vision encoder's features of that width from here on, by a head that is new unless it has
        one for them; None for no head, which would stand beside a training without learning."""
        own = self.config.repa
        if features == (None if own is None else own.features):
            return
        self.config = replace(self.config, repa=None if features is None else RepaConfig(features))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.repa_head = _repa_head(self.config)
        if self.repa_head is not None:
            self.repa_head.to(self.device, self.queries.dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each layer of the language model in the backward pass. Acts in training mode (`train()`) only."""
        recompute_layers(self.llm)

    def encode_prompts(self, prompts: Sequence[str]) -> Prompts:
        """Left-padded, on the model's device; an empty prompt is the unconditional text. A prompt that is too long is
        cut at its end (`prompt_text.read` tells). Raises ValueError for no prompts."""
        return self.prompt_text.encode(prompts, self.device)

    def forward(self, prompts: Prompts, latents: Tensor, order: Tensor, noisy: Tensor, times: Tensor) -> Prediction:
        """The atomic unit of training.

        latents: clean [B, C, h, w]. order: the places in the order of writing, long [L], or of each row [B, L]. noisy:
        the tokens x_t [B, L, C] that the head is to see, times: their t [B, L], both in raster order as all that
        returns. Raises ValueError for shapes and for latents that are not the autoencoder's.
        """
        self._check(prompts, latents, noisy, times)
        velocity, features = self.head(noisy, times, self.conditions(prompts, latents, order))
        return Prediction(velocity, None if self.repa_head is None else self.repa_head(features))

    def conditions(self, prompts: Prompts, latents: Tensor, order: Tensor) -> Tensor:
        """What the language model says at each place's query [B, L, H], raster order, having read the text and the
        latents [B, C, h, w] written before."""
        rows, _, height, width = latents.shape
        places = height * width
        order = orders_of_rows(order.to(latents.device), rows, places)
        queries, embeddings = self.grids((height, width))
        pairs = interleaved(
            written(queries, order),
            self.embed_latents(written(latents.flatten(2).transpose(1, 2), order), written(embeddings, order)),
        )
        text = prompts.ids.shape[1]
        hidden = self.llm(
            inputs_embeds=torch.cat([self.embed_text(prompts), pairs], dim=1),
            # a prepared mask: the stock model would look at the positions' values, which waits for the device
            attention_mask={"full_attention": visible_keys(prompts, 0, text + 2 * places)},
            position_ids=sequence_positions(prompts.mask, 2 * places),
            use_cache=False,
        ).last_hidden_state
        return raster(self.condition_out(hidden[:, text::2]), order)

    def grids(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries, places added, and embeddings of the places, both [1, L, H] in raster order."""
        self.config.check_grid(grid)
        top, left = ((self.config.query_grid - side) // 2 for side in grid)
        middle = (..., slice(top, top + grid[0]), slice(left, left + grid[1]))
        places = self.place_embeddings[middle].flatten(2).transpose(1, 2)
        return self.queries[middle].flatten(2).transpose(1, 2) + places, places

    def embed_text(self, prompts: Prompts) -> Tensor:
        """[B, T, H]"""
        embedded: Tensor = self.llm.embed_tokens(prompts.ids)
        return embedded

    def embed_latents(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """Latents [B, k, C] as the language model reads them [B, k, H], at places with `embeddings` [B, k, H]."""
        return self.latent_in(tokens.to(self.latent_in.weight.dtype)).to(embeddings.dtype) + embeddings

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and tokenizer/."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, **self.config.to_dict(), "llm": self.llm.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensor_file(folder / WEIGHTS_FILE, self.state_dict(), {"format": "pt"})
        self.tokenizer.save_pretrained(str(folder / TOKENIZER_FOLDER))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """What `save_pretrained` wrote, in evaluation mode. Raises ModelLoadError for a folder that holds no generator
        or not all of it."""
        config = read_config(folder)
        path = Path(folder) / TOKENIZER_FOLDER
        with load_errors_explained(f"the VGT generator in {folder}"):
            if not path.is_dir():
                raise FileNotFoundError(f"it has no folder {TOKENIZER_FOLDER}")
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            with no_init_weights():
                generator = cls(config, tokenizer).cast(dtype)
            load_weights(generator, Path(folder) / WEIGHTS_FILE)
        return generator.eval()

    def _check(self, prompts: Prompts, latents: Tensor, noisy: Tensor, times: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[:2] != (len(prompts), channels):
            raise ValueError(
                f"latents must be [{len(prompts)}, {channels}, h, w], one per prompt and with the channels that the "
                f"generator was made for; got {list(latents.shape)}"
            )
        tokens = (len(latents), latents.shape[2] * latents.shape[3])
        if noisy.shape != (*tokens, channels) or times.shape != tokens:
            raise ValueError(
                f"noisy must be {[*tokens, channels]} and times {list(tokens)}, got {list(noisy.shape)} and "
                f"{list(times.shape)}"
            )


def _repa_head(config: GeneratorConfig) -> nn.Sequential | None:
    if config.repa is None:
        return None
    hidden = config.repa.hidden
    return nn.Sequential(
        nn.Linear(config.head_width, hidden), nn.SiLU(),
        nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, config.repa.features),
    )  # fmt: skip


def read_config(folder: str | Path) -> GeneratorConfig:
    """The config of a generator's folder. Raises ModelLoadError without one or for one that is wrong."""
    return read_typed_config(folder, CONFIG_FILE, MODEL_TYPE, "VGT generator", GeneratorConfig.from_dict)
