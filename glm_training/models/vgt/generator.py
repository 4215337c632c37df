"""VGT's generator: a language model that conditions a flow head, which draws the latents of an image one by one.

`Generator.forward` is the atomic unit: the velocity of every token under what was written before it. `sampling.sample`
draws through the same queries, positions and head.

Letters: B images, C latent channels, L = h * w places, T text tokens, H width of the language model, R width of the
teacher's features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from glm_training.models.loading import ModelLoadError, load_errors_explained
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
from glm_training.utils.tensor_file import write_tensor_file

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
"""What a generator's folder holds."""

_LM_HEAD, _EMBEDDINGS = "llm.lm_head.weight", "llm.model.embed_tokens.weight"


@dataclass(frozen=True)
class RepaConfig:
    """Alignment of the head with a vision encoder (REPA, arXiv:2410.06940): width of the encoder's features (DINOv3
    ViT-B: 768), and of the hidden layers that predict them."""

    features: int = 768
    hidden: int = 2048


@dataclass(frozen=True)
class GeneratorConfig:
    """llm: configuration of a Qwen2. latent_channels, latent_norm: of the autoencoder, whether its latents are normed
    over the channels. grid: places (h, w) it is trained on. query_grid: side of the grids of queries and positions, of
    which smaller grids take the middle. head_width, head_depth: of the flow head.

    Raises ValueError for values that go with no model.
    """

    llm: dict[str, Any]
    latent_channels: int = 32
    latent_norm: bool = True
    grid: tuple[int, int] = (16, 16)
    query_grid: int = 64
    head_width: int = 1536
    head_depth: int = 12
    repa: RepaConfig | None = None

    def __post_init__(self) -> None:
        kind = self.llm.get("model_type", "qwen2")
        if kind != "qwen2":
            raise ValueError(f"llm must be a qwen2, got a {kind}")
        if self.llm.get("use_sliding_window"):
            raise ValueError("llm must attend to everything written: use_sliding_window is not supported")
        for name in ("latent_channels", "head_width", "head_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.check_grid(self.grid)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError for a grid that the queries do not cover."""
        if not all(1 <= side <= self.query_grid for side in grid):
            raise ValueError(f"the latent grid {grid} must lie within {self.query_grid} x {self.query_grid}")

    def check_autoencoder(self, latent_channels: int, channel_norm: bool) -> None:
        """Raises ValueError unless the latents of that autoencoder are those that the generator draws."""
        if latent_channels != self.latent_channels:
            raise ValueError(
                f"the autoencoder's latents have {latent_channels} channels and the generator draws "
                f"{self.latent_channels}: give the autoencoder that the generator was trained with"
            )
        if channel_norm != self.latent_norm:
            has, draws = ("norms", "as they are") if channel_norm else ("does not norm", "normed")
            raise ValueError(
                f"the autoencoder {has} its latents over the channels and the generator draws them {draws}: give the "
                "autoencoder that the generator was trained with (stage 2 norms, stage 1 does not)"
            )

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, as JSON has it."""
        return asdict(self) | {"grid": list(self.grid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GeneratorConfig:
        """Raises ValueError for keys that are unknown or missing and for what the class refuses."""
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown or "llm" not in values:
            raise ValueError(f"unknown keys {', '.join(unknown)}" if unknown else "llm is missing")
        given = dict(values)
        if "grid" in given:
            given["grid"] = tuple(given["grid"])
        if given.get("repa") is not None:
            given["repa"] = RepaConfig(**given["repa"])
        return cls(**given)


class Prediction(NamedTuple):
    """velocity [B, L, C] fp32 and, where the generator has a REPA head, its predicted features [B, L, R]; raster
    order."""

    velocity: Tensor
    features: Tensor | None


class Generator(nn.Module):
    """The language model, its queries and projectors, and the flow head, with the tokenizer.

    The language model's output layer is not used and frozen, and with it the token embeddings where the two are tied.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    sharding_units: ClassVar[tuple[str, ...]] = ("Qwen2DecoderLayer", "HeadBlock")

    def __init__(
        self,
        config: GeneratorConfig,
        tokenizer: PreTrainedTokenizerBase,
        llm: Qwen2ForCausalLM | None = None,
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
            self.llm = Qwen2ForCausalLM(Qwen2Config.from_dict(config.llm)) if llm is None else llm
            self._add_parts(self.llm.config.hidden_size)
        if len(tokenizer) > self.llm.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the language model {self.llm.config.vocab_size}"
            )
        self.llm.set_attn_implementation("sdpa")  # its masks are boolean here
        self.llm.tie_weights()  # undone by `no_init_weights`
        self.llm.lm_head.requires_grad_(False)

    def _add_parts(self, width: int) -> None:
        config = self.config
        grid = (1, width, config.query_grid, config.query_grid)
        self.queries = nn.Parameter(torch.empty(grid))
        self.place_embeddings = nn.Parameter(torch.empty(grid))
        self.latent_in = nn.Linear(config.latent_channels, width)
        self.condition_out = nn.Linear(width, width)
        self.head = FlowHead(config.latent_channels, width, config.head_width, config.head_depth)
        self.repa_head: nn.Sequential | None = None
        if config.repa is not None:
            hidden = config.repa.hidden
            self.repa_head = nn.Sequential(
                nn.Linear(config.head_width, hidden), nn.SiLU(),
                nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, config.repa.features),
            )  # fmt: skip
        nn.init.normal_(self.queries, std=width**-0.5)
        nn.init.trunc_normal_(self.place_embeddings, std=0.02)
        for projector in (self.latent_in, self.condition_out):
            nn.init.normal_(projector.weight, std=0.02)
            nn.init.zeros_(projector.bias)

    @property
    def device(self) -> torch.device:
        return self.queries.device

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each layer of the language model in the backward pass. Acts in training mode (`train()`) only."""
        self.llm.activation_checkpointing_enable({"use_reentrant": False})

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
        hidden = self.llm.model(
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
        embedded: Tensor = self.llm.get_input_embeddings()(prompts.ids)
        return embedded

    def embed_latents(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """Latents [B, k, C] as the language model reads them [B, k, H], at places with `embeddings` [B, k, H]."""
        return self.latent_in(tokens.to(self.latent_in.weight.dtype)).to(embeddings.dtype) + embeddings

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and tokenizer/."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.to_dict() | {"llm": self.llm.config.to_dict()}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = self.state_dict()
        if self._tied:
            del weights[_LM_HEAD]
        write_tensor_file(folder / WEIGHTS, weights, {"format": "pt"})
        self.tokenizer.save_pretrained(str(folder / TOKENIZER))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """What `save_pretrained` wrote, in evaluation mode. Raises ModelLoadError for a folder that holds no generator
        or not all of it."""
        folder = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).exists()]
        if missing:
            raise ModelLoadError(f"{folder} is not the folder of a VGT generator: it lacks {', '.join(missing)}")
        with load_errors_explained(f"the VGT generator in {folder}"):
            config = GeneratorConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            tokenizer = AutoTokenizer.from_pretrained(str(folder / TOKENIZER), trust_remote_code=False)
            with no_init_weights():
                generator = cls(config, tokenizer)
            generator.to(dtype)._take(load_file(folder / WEIGHTS))
        return generator.eval()

    @property
    def _tied(self) -> bool:
        return self.llm.lm_head.weight is self.llm.get_input_embeddings().weight

    def _take(self, weights: dict[str, Tensor]) -> None:
        """Sets all weights. Raises ValueError where they do not fit."""
        if self._tied and _EMBEDDINGS in weights:
            weights[_LM_HEAD] = weights[_EMBEDDINGS]
        wanted = self.state_dict()
        unfit = sorted(weights.keys() ^ wanted.keys())
        unfit += sorted(name for name in weights.keys() & wanted.keys() if weights[name].shape != wanted[name].shape)
        if unfit:
            raise ValueError(f"{len(unfit)} of its {len(wanted)} weights do not fit {CONFIG}, first {unfit[0]}")
        self.load_state_dict(weights)

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
