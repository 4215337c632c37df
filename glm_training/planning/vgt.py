"""What a run of VGT takes. Its networks are many and small beside what their passes hold, so those are traced with fake
tensors through the losses of the trainers themselves, not worked out by formulas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from glm_training.config import Config
from glm_training.methods.autoencoding import Autoencoding, AutoencodingWeights
from glm_training.methods.token_flow import TokenFlow
from glm_training.models.family import DECODED_AT_ONCE
from glm_training.models.library_versions import autocast_options
from glm_training.models.loading import ModelLoadError
from glm_training.models.perceptual import ConvNextLogits, LpipsVgg
from glm_training.models.vgt import generator as generators
from glm_training.models.vgt import loading
from glm_training.models.vgt.alignment import AlignmentTeacher
from glm_training.models.vgt.autoencoder import TEACHER_FILE, Autoencoder, AutoencoderConfig
from glm_training.models.vgt.discriminator import PatchDiscriminator
from glm_training.models.vgt.generator import Generator, GeneratorConfig, RepaConfig
from glm_training.models.vgt.published import LANGUAGE_MODELS, published_config
from glm_training.models.vgt.sequence import Prompts
from glm_training.models.vgt.tiny_generator import tiny_generator, tiny_random_generator, tiny_tokenizer
from glm_training.planning.counting import Items, Part, Phase, Shapes, sizes_of, step_bytes
from glm_training.planning.memory import Memory
from glm_training.planning.models import Networks
from glm_training.planning.passes import WIDE
from glm_training.planning.run import Run, read_run
from glm_training.planning.tracing import faking, most_held, with_tensors
from glm_training.utils.writable import expanded

SAVED = ("autoencoder", "teacher", "generator")
"""Parts that a saved VGT holds."""

IN_FP32 = ("lpips", "convnext")
"""Frozen networks that are in fp32 whatever `model.torch_dtype` says."""


@dataclass(frozen=True)
class VGTNetworks(Networks):
    """The networks of a run of VGT by part, on the meta device, its configuration, and what was traced already."""

    config: Config
    traced: dict[tuple[Any, ...], int] = field(default_factory=dict)


def read_vgt(config: Config) -> VGTNetworks:
    """The networks that a run of VGT has in memory. Never asks the hub. Raises ModelLoadError where something is
    neither here nor published."""
    vgt, name = config.vgt, config.model.name
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if config.model.component == "generator":
            own = _autoencoder_config(vgt.autoencoder or name, "vgt.autoencoder")
            parts["generator"] = _generator(config, own)
            parts["autoencoder"] = Autoencoder(own)
            if vgt.repa.model is not None:
                parts["REPA encoder"] = AlignmentTeacher(AutoModel.from_config(_repa_config(vgt.repa.model)))
        else:
            own = _autoencoder_config(name, "model.name")
            if vgt.channel_norm is not None:
                own = replace(own, channel_norm=vgt.channel_norm)
            parts["autoencoder"] = Autoencoder(replace(own, kl=own.kl or vgt.kl))
            if _has_teacher(name):
                parts["teacher"] = Autoencoder(own).tower
            if any(half.name == "discriminator" for half in read_run(config).halves):
                parts["discriminator"] = PatchDiscriminator(vgt.gan.channels, vgt.gan.stages)
            if vgt.lpips_weights is not None:
                parts["lpips"] = LpipsVgg(None)
            if vgt.convnext_weights is not None:
                parts["convnext"] = ConvNextLogits(None)
    for part, network in parts.items():
        if part not in ("discriminator", config.model.component):
            network.requires_grad_(False)
    return VGTNetworks(parts, "VGT's own configurations, or published ones", config)


def _autoencoder_config(name: str, key: str) -> AutoencoderConfig:
    found = loading.autoencoder_config(name)
    if found is not None:
        return found
    if expanded(name).suffix == ".pth":  # the authors' file, which is not here
        return published_config()
    made_of = LANGUAGE_MODELS.get(name.removesuffix("-hf"))
    if made_of is not None:  # the vision tower of one is that of the other
        return replace(published_config(channel_norm=False), hidden_size=made_of["hidden_size"])
    raise ModelLoadError(
        f"{key} {name} is not here, and the sizes that ship are those of {' and '.join(LANGUAGE_MODELS)}: plan with "
        f"one of them, with a file .pth as the authors', or with {key}=tiny"
    )


def _has_teacher(name: str) -> bool:
    path = expanded(name)
    folders = (path, path / loading.AUTOENCODER, path / "pipeline" / loading.AUTOENCODER)
    made = name in loading.IN_MEMORY or not loading.is_local(name)
    return made or any((folder / TEACHER_FILE).is_file() for folder in folders)


def _generator(config: Config, own: AutoencoderConfig) -> Generator:
    name, size = config.model.name, config.data.image_size
    options: dict[str, Any] = {
        "latent_channels": own.latent_channels, "latent_norm": own.channel_norm, "stride": own.stride,
        "grid": (size.height // own.stride, size.width // own.stride),
    }  # fmt: skip
    if config.vgt.repa.model is not None:
        options["repa"] = RepaConfig(features=_repa_config(config.vgt.repa.model).hidden_size)
    if name == "tiny":
        return tiny_generator(**options, corpus=loading.TINY_WORDS)
    if name == "tiny-random":
        return tiny_random_generator(**options, query_grid=max(8, *options["grid"]))
    for place in (expanded(name) / loading.GENERATOR, expanded(name) / "pipeline" / loading.GENERATOR):
        if place.is_dir():
            read = generators.read_config(place)
            return Generator(replace(read, grid=options["grid"], repa=options.get("repa", read.repa)), tiny_tokenizer())
    return Generator(GeneratorConfig(llm=_language_model(name), **options), tiny_tokenizer())


def _language_model(name: str) -> dict[str, Any]:
    try:
        folder = loading.local_folder(name, loading.Hub(None, local_files_only=True), "model.name", small=True)
    except ModelLoadError as error:
        if name.removesuffix("-hf") in LANGUAGE_MODELS:
            return LANGUAGE_MODELS[name.removesuffix("-hf")]
        known = " and ".join(LANGUAGE_MODELS)
        raise ModelLoadError(
            f"model.name {name} is not here, and the sizes that ship are those of {known}: plan with one of them, or "
            "with model.name=tiny"
        ) from error
    found: dict[str, Any] = AutoConfig.from_pretrained(folder).text_config.to_dict()
    return found


def _repa_config(name: str) -> Any:
    folder = loading.local_folder(name, loading.Hub(None, local_files_only=True), "vgt.repa.model", small=True)
    return AutoConfig.from_pretrained(folder)


# -- memory ------------------------------------------------------------------------------------------------------------


class VGTMemory(Memory):
    """The memory of a run of VGT."""

    def __init__(self, run: Run, networks: VGTNetworks) -> None:
        self.run = run
        self.config = networks.config
        self.networks, self.traced = networks.parts, networks.traced
        self.halves = {half.name: half for half in run.halves}
        self.parts = [self._part(name, network) for name, network in self.networks.items()]
        self.by_name = {part.name: part for part in self.parts}

    def _part(self, name: str, network: nn.Module) -> Part:
        own: Shapes = {key: tuple(p.shape) for key, p in network.named_parameters() if p.requires_grad}
        total = sum(param.numel() for param in network.parameters())
        units = [
            sum(param.numel() for param in module.parameters())
            for module in network.modules()
            if type(module).__name__ in getattr(network, "sharding_units", ())
        ]
        unit, rest = max(units, default=0), total - sum(units)
        return Part(name, total, own, total - sizes_of(own), 0, unit, rest, saved=name in SAVED)

    def frozen_sizes(self, part: Part) -> dict[float, int]:
        wide = part.name in (*IN_FP32, self.config.model.component)  # what is trained is read in fp32 whole
        return {WIDE if wide else self.run.dtype: part.frozen}

    def phases(self) -> list[Phase]:
        """In the order a run meets them."""
        name = self.config.model.component
        passes = self._generator_passes if name == "generator" else self._autoencoder_passes
        found = self._updates(name, self._once(passes, self.run.batch_size), {})
        if "discriminator" in self.halves:
            seen = {"pictures": 2.0 * self.run.accumulation * self._image_bytes(self.run.batch_size)}
            found += self._updates("discriminator", self._once(self._discriminator_passes, self.run.batch_size), seen)
        return [*found, self._evaluation()] if self.run.evaluated else found

    def _once(self, trace: Callable[[], int], rows: int) -> int:
        """What a trace of so many rows finds; it takes seconds, and runs that differ in other things share it."""
        run = self.run
        key = (trace.__name__, rows, run.prompt_tokens, run.checkpointing, run.low, run.dtype)
        if key not in self.traced:
            self.traced[key] = trace()
        return self.traced[key]

    def _updates(self, name: str, passed: float, held: Items) -> list[Phase]:
        half, part = self.halves[name], self.by_name[name]
        gradients = self.gradients([name])
        step = {"optimizer's temporaries": step_bytes(half.rule, part.trained) * self.here(part)}
        return [
            self._phase(f"{name}: forward and backward", gradients, held, {"activations": passed}),
            self._phase(f"{name}: optimizer step", gradients, held, step),
        ]

    def _image_bytes(self, rows: int) -> float:
        return 3.0 * WIDE * rows * self.run.height * self.run.width

    def _images(self, rows: int) -> Tensor:
        return torch.zeros(rows, 3, self.run.height, self.run.width)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, **autocast_options()) if self.run.low else nullcontext()

    def _made(self, name: str) -> Any:
        """A part with fake tensors, None where there is none."""
        if name not in self.networks:
            return None
        wide = self.by_name[name].trained or name in IN_FP32
        low = torch.float32 if wide or self.run.dtype == WIDE else torch.bfloat16
        made = with_tensors(self.networks[name], lambda param: low)
        made.train(bool(self.by_name[name].trained))
        if self.run.checkpointing and name == self.config.model.component:
            made.enable_gradient_checkpointing()  # type: ignore[operator]
        return made

    def _losses(self) -> Autoencoding:
        vgt = self.config.vgt
        weights = AutoencodingWeights(
            perceptual=vgt.perceptual_weight, distillation=vgt.distillation_weight, kl=vgt.kl_weight,
            adversarial=vgt.gan.weight, lecam=vgt.gan.lecam_weight,
        )  # fmt: skip
        return Autoencoding(weights, self._made("lpips"), self._made("convnext"))

    def _autoencoder_passes(self) -> int:
        """With the discriminator, from whose start on a step takes most."""
        vgt, rows = self.config.vgt, self.run.batch_size
        with faking():
            losses, model, teacher, opponent = (
                self._losses(),
                *map(self._made, ("autoencoder", "teacher", "discriminator")),
            )
            shape = (rows, model.config.latent_channels, *self._grid(model.stride))

            def compute() -> None:
                images = self._images(rows)
                noise = torch.zeros(shape) if vgt.latent_noise > 0 else None
                drawn = torch.zeros(shape) if model.config.kl else None
                with self._autocast():
                    features = None
                    if teacher is not None and vgt.distillation_weight > 0:
                        with torch.no_grad():
                            features = teacher(images)
                    output = model(images, noise, drawn)
                    term = losses.loss(output, images, teacher_features=features, discriminator=opponent)
                term.loss.backward()

            others = [network for network in (teacher, opponent, losses.lpips, losses.classes) if network is not None]
            return most_held(compute, model, *others)  # type: ignore[arg-type]

    def _discriminator_passes(self) -> int:
        with faking():
            opponent, losses = self._made("discriminator"), Autoencoding(AutoencodingWeights())
            images, drawn = self._images(self.run.batch_size), self._images(self.run.batch_size)

            def compute() -> None:
                with self._autocast():
                    term = losses.discriminator_loss(opponent, drawn, images, torch.zeros(2))
                term.loss.backward()

            return most_held(compute, opponent)

    def _generator_passes(self) -> int:
        run = self.run
        with faking():
            model, autoencoder, aligned = map(self._made, ("generator", "autoencoder", "REPA encoder"))
            flow = TokenFlow(self.config.vgt.timestep_shift, self.config.vgt.repa.weight)
            words = torch.zeros(run.batch_size, run.prompt_tokens, dtype=torch.long)
            prompts = Prompts(words, torch.ones_like(words, dtype=torch.bool), padded=True)

            def compute() -> None:
                images = self._images(run.batch_size)
                with torch.no_grad(), self._autocast():
                    latents = autoencoder.encode(images)
                    grid = (latents.shape[2], latents.shape[3])
                    features = None if aligned is None else aligned.features(images, grid)
                places = grid[0] * grid[1]
                order = torch.zeros(run.batch_size, places, dtype=torch.long)
                draws, noise = torch.zeros(run.batch_size, places), torch.zeros(latents.shape)
                with self._autocast():
                    loss = flow.loss(model, prompts, latents, order, draws=draws, noise=noise, teacher=features).loss
                loss.backward()

            return most_held(compute, model, autoencoder, *([] if aligned is None else [aligned]))

    def _reading_and_drawing(self) -> int:
        """Given pictures read and drawn again, or latents drawn."""
        rows, generates = self._decoded, self.config.model.component == "generator"
        with faking():
            model = self._made("autoencoder").eval()
            shape = (rows, model.config.latent_channels, *self._grid(model.stride))
            latents, images = torch.zeros(shape), torch.zeros(0) if generates else self._images(rows)
            with torch.no_grad():
                return most_held(lambda: model.decode(latents if generates else model.encode(images)), model)

    def _evaluation(self) -> Phase:
        """Pictures for scores and samples. A generator has a cache of keys and values, of prompts with and without
        guidance; what its head needs is small beside it."""
        run = self.run
        items: Items = {
            "activations": float(self._once(self._reading_and_drawing, self._decoded)),
            "pictures": self._image_bytes(run.evaluated),
        }
        if self.config.model.component == "generator":
            generator: Any = self.networks["generator"]
            settings, stride = generator.llm.config, generator.config.stride
            grid = self._grid(stride)
            head = settings.hidden_size // settings.num_attention_heads
            each = 2 * settings.num_hidden_layers * settings.num_key_value_heads * head * WIDE
            rows = run.evaluated * (2 if run.evaluation_guided else 1)
            items["KV cache"] = float(each * rows * (run.prompt_tokens + 2 * grid[0] * grid[1]))
        items["gathered weights"] = sum(map(self._whole, self.halves))
        return self._phase("evaluation", items, self._shown(), awake=True)

    @property
    def _decoded(self) -> int:
        """Pictures that go through the autoencoder together in evaluations."""
        return min(self.run.evaluated, self.run.vae_micro or self.run.micro or DECODED_AT_ONCE["vgt"])

    def _grid(self, stride: int) -> tuple[int, int]:
        """Places of a picture's latents."""
        return self.run.height // stride, self.run.width // stride
