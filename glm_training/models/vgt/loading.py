"""Where VGT's models come from: made of published networks, from a checkpoint of ours, or built in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from glm_training.models.loading import (
    ModelLoadError,
    hub_options,
    hub_remedy,
    load_errors_explained,
    looks_like_path,
)
from glm_training.models.prompt_reading import PromptReading
from glm_training.models.run_folders import INDEX, newest_checkpoint, pipeline_in
from glm_training.models.vgt import autoencoder as autoencoders
from glm_training.models.vgt import generator as generators
from glm_training.models.vgt.autoencoder import TEACHER_FILE, Autoencoder, Teacher
from glm_training.models.vgt.generator import TOKENIZER_FOLDER, Generator, GeneratorConfig, RepaConfig
from glm_training.models.vgt.prompt_text import PromptText
from glm_training.models.vgt.published import autoencoder_from_parts, check_published, load_published, published_config
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder, tiny_trainable_config
from glm_training.models.vgt.tiny_generator import TINY_WORDS, tiny_generator, tiny_random_generator, tiny_tokenizer
from glm_training.models.weights import load_weights
from glm_training.utils.writable import expanded

AUTOENCODER, GENERATOR = "autoencoder", "generator"
"""Folders of a VGT folder."""

CLASS_NAME = "VGT"
"""What the model_index.json of a VGT folder says it is."""

IN_MEMORY = ("tiny", "tiny-random")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Source:
    """What is to be made of `model.name`; the rest is that of the section `vgt`.

    component: what is to be trained, "" for all that is there; on images of `size` (height, width) px. channel_norm,
    order: None for what the checkpoint has. repa: folder or hub id of the vision encoder that a generator is aligned
    with. distils: whether an autoencoder needs its teacher.
    """

    component: str = ""
    size: tuple[int, int] | None = None
    autoencoder: str | None = None
    decoder: str = ""
    channel_norm: bool | None = None
    kl: bool = False
    repa: str | None = None
    order: str | None = None
    distils: bool = False

    def dtype(self, part: str, others: torch.dtype) -> torch.dtype:
        """In which the weights of `part` are loaded: fp32 if it is to be trained. Rounded, it would not go on from
        where the run before it ended."""
        return torch.float32 if part == self.component else others


@dataclass(frozen=True)
class Models:
    """`teacher`: what the autoencoder is kept close to, None where nothing tells."""

    autoencoder: Autoencoder
    teacher: Teacher | None = None
    generator: Generator | None = None


@dataclass(frozen=True)
class Hub:
    """How hub ids are asked for."""

    revision: str | None = None
    local_files_only: bool = False


def load_models(name: str, source: Source, *, dtype: torch.dtype, hub: Hub, seed: int) -> Models:
    """The models of `name`: "tiny" or "tiny-random", a folder that was saved here, the authors' file of weights (an
    autoencoder), or a vision-language model to make them of. Weights in `dtype`, those of what is to be trained in
    fp32. Raises ModelLoadError."""
    check_source(name, source)
    if source.component != GENERATOR and (source.component or not _has(name, GENERATOR)):
        if name == "tiny-random" and not source.component:
            autoencoder, generator = tiny_random_autoencoder(seed), tiny_random_generator(seed=seed)
            return Models(autoencoder.cast(dtype), generator=generator.cast(dtype))
        return Models(*_autoencoder(name, source, dtype=dtype, hub=hub, seed=seed))
    autoencoder, _ = _autoencoder(source.autoencoder or name, Source(), dtype=dtype, hub=hub, seed=seed)
    if _has(name, GENERATOR):
        generator = Generator.from_pretrained(expanded(name) / GENERATOR, dtype=source.dtype(GENERATOR, dtype))
        if source.component:
            grid, stride = _grid(source, autoencoder.config), autoencoder.config.stride
            order = source.order or generator.config.order
            generator.config = replace(generator.config, grid=grid, stride=stride, order=order)
            generator.align(None if source.repa is None else repa_width(source.repa, hub), seed=seed)
    else:
        generator = _new_generator(name, source, autoencoder, hub=hub, seed=seed).cast(source.dtype(GENERATOR, dtype))
    return Models(autoencoder, generator=generator)


def check_source(name: str, source: Source) -> None:
    """Everything that can be known before weights are read. Raises ModelLoadError."""
    check_places(name, source)
    if _has(name, GENERATOR) and not _has(name, AUTOENCODER) and source.autoencoder is None:
        raise ModelLoadError(
            f"{name} has a generator and not the autoencoder that it draws for: put that back as {name}/{AUTOENCODER}"
            + (", or name it under vgt.autoencoder" if source.component else "")
        )
    if source.component == GENERATOR:
        where = source.autoencoder or name
        if source.autoencoder is not None and _has(name, AUTOENCODER):
            raise ModelLoadError(
                f"vgt.autoencoder is {where}, and {name} has an autoencoder, which its generator was trained with: "
                "remove vgt.autoencoder"
            )
        if _has(name, AUTOENCODER) and not _has(name, GENERATOR):
            raise ModelLoadError(
                f"{name} has an autoencoder and no generator: name it under vgt.autoencoder, and under model.name the "
                "vision-language model that a generator is made of"
            )
        own = autoencoder_config(where)
        if own is None:
            raise ModelLoadError(
                f"a generator needs the autoencoder whose latents it is to draw, and {where} is none: name a "
                "checkpoint of its training, or the published file, under vgt.autoencoder"
            )
        if _has(name, GENERATOR):
            config = generators.read_config(expanded(name) / GENERATOR)
            with load_errors_explained(f"the generator in {name}"):
                config.check_autoencoder(own.latent_channels, own.channel_norm, own.stride)
    elif source.component == AUTOENCODER and _has(name, GENERATOR):
        raise ModelLoadError(
            f"{name} has a generator, whose latents another autoencoder would not read: name a checkpoint of the "
            "autoencoder's own training"
        )
    else:
        own = autoencoder_config(name) if is_local(name) else None
        if own is not None and source.distils and name not in IN_MEMORY:
            _require_teacher(expanded(name))
    stride = _tower_stride(name) if own is None else own.stride
    if source.size is not None and stride is not None and any(side % stride for side in source.size):
        raise ModelLoadError(
            f"data.image_size {source.size[0]} x {source.size[1]}: the autoencoder makes one latent of {stride} x "
            f"{stride} px, so both sides must be multiples of {stride} px"
            + (f" (and of 32 px as every size: of {lcm(stride, 32)} px)" if stride % 32 and 32 % stride else "")
        )
    if source.size is not None and stride is not None and source.component == GENERATOR:
        _require_places(name, source.size, stride)


def check_places(name: str, source: Source) -> None:
    """Whether the models that are named are there, all that can be known without any. Raises ModelLoadError."""
    named = {"model.name": name} | ({} if source.autoencoder is None else {"vgt.autoencoder": source.autoencoder})
    for key, each in named.items():
        if each in IN_MEMORY or not is_local(each):
            continue
        path = expanded(pipeline_in(each, key))
        if not path.exists():  # a run that was shorter than the file says, or has not been
            beside = newest_checkpoint(path.parent)
            instead = (
                ". Correct it, or train or download first what is to be there (docs/vgt.md)"
                if beside is None
                else f": the newest checkpoint beside it is {beside}"
            )
            raise ModelLoadError(f"{key} {each}: there is no such file or folder{instead}")
        if path.is_file():
            with load_errors_explained(f"the published VGT autoencoder in {path} ({key})"):
                check_published(path)
    if source.component == GENERATOR and (source.autoencoder or name) == "tiny":
        raise ModelLoadError(
            "the autoencoder of `tiny` is untrained, so its latents are not worth learning: train one "
            "(configs/vgt_tiny_ae_stage1.yaml, then stage2), and name its checkpoint under vgt.autoencoder"
        )


def _require_places(name: str, size: tuple[int, int], stride: int) -> None:
    """That the queries cover the latents of images of `size`. Those in memory are made large enough."""
    if name in IN_MEMORY:
        return
    own = generators.read_config(expanded(name) / GENERATOR) if _has(name, GENERATOR) else GeneratorConfig
    if max(size) > own.query_grid * stride:
        raise ModelLoadError(
            f"data.image_size {size[0]} x {size[1]}: the generator writes {own.query_grid} x {own.query_grid} latents "
            f"of {stride} x {stride} px at most, so neither side may be above {own.query_grid * stride} px"
        )


def _require_teacher(path: Path) -> None:
    """Of the authors' file it is seen when it is read."""
    if path.is_dir() and not any((folder / TEACHER_FILE).is_file() for folder in (path / AUTOENCODER, path)):
        raise ModelLoadError(
            f"{path} has no {TEACHER_FILE}, the vision-language model that its autoencoder started from, so there is "
            "nothing to distil from: set vgt.distillation_weight to 0, or name a checkpoint of its training"
        )


def _tower_stride(name: str) -> int | None:
    """Pixels that one latent will stand for in an autoencoder made of the vision-language model `name`; None where its
    configuration is not here."""
    try:
        vision = AutoConfig.from_pretrained(local_folder(name, Hub(None, True), "model.name", small=True)).vision_config
    except (ModelLoadError, OSError, ValueError, AttributeError):
        return None  # loading says what is wrong
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return patch * getattr(vision, "spatial_merge_size", 2)


def autoencoder_config(name: str) -> autoencoders.AutoencoderConfig | None:
    """The config of the autoencoder that `name` means, read without its weights; None for one that is to be made of a
    vision-language model. Raises ModelLoadError."""
    if name == "tiny":
        return tiny_trainable_config(False)
    if name == "tiny-random":
        return tiny_random_autoencoder().config
    path = expanded(pipeline_in(name, "vgt.autoencoder"))
    if path.is_file():
        return published_config()
    for folder in (path / AUTOENCODER, path):
        if folder.is_dir() and (folder != path or _is_autoencoder(folder)):
            return autoencoders.read_config(folder)
    return None


def is_local(name: str) -> bool:
    """Whether `name` is on this machine, or can only be meant to be."""
    return name in IN_MEMORY or expanded(name).exists() or looks_like_path(name)


def _is_autoencoder(folder: Path) -> bool:
    return "vgt_autoencoder" in _text(folder / autoencoders.CONFIG_FILE)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _has(name: str, part: str) -> bool:
    return name not in IN_MEMORY and (expanded(name) / INDEX).is_file() and (expanded(name) / part).is_dir()


def _autoencoder(
    name: str, source: Source, *, dtype: torch.dtype, hub: Hub, seed: int
) -> tuple[Autoencoder, Teacher | None]:
    own = source.dtype(AUTOENCODER, dtype)
    if name in IN_MEMORY:
        normed = bool(source.channel_norm)
        if name == "tiny":
            autoencoder = Autoencoder(tiny_trainable_config(normed), seed=seed)
        else:
            autoencoder = tiny_random_autoencoder(seed, channel_norm=normed, kl=source.kl)
        return autoencoder.cast(own).eval(), Teacher(autoencoder.tower, dtype)
    path = expanded(pipeline_in(name, "vgt.autoencoder"))
    if path.is_file():
        return _published(path, source, own)
    if autoencoder_config(name) is not None:
        return _saved(path / AUTOENCODER if (path / AUTOENCODER).is_dir() else path, source, dtype)
    made = autoencoder_from_parts(
        local_folder(name, hub, "model.name"),
        local_folder(source.decoder, Hub(None, hub.local_files_only), "vgt.decoder"),
        channel_norm=bool(source.channel_norm),
        kl=source.kl,
        seed=seed,
    )
    return made.cast(own).eval(), Teacher(made.tower, dtype)


def _saved(folder: Path, source: Source, dtype: torch.dtype) -> tuple[Autoencoder, Teacher | None]:
    """The autoencoder of a folder, with the norm that the new stage wants, and the teacher beside it, if there is."""
    config = autoencoders.read_config(folder)
    if source.channel_norm is not None:
        config = replace(config, channel_norm=source.channel_norm)
    with load_errors_explained(f"the VGT autoencoder in {folder}"):
        with no_init_weights():
            autoencoder = Autoencoder(config).cast(source.dtype(AUTOENCODER, dtype)).eval()
        load_weights(autoencoder, folder / autoencoders.WEIGHTS_FILE)
    teacher = Teacher.from_pretrained(folder, dtype) if (folder / TEACHER_FILE).is_file() else None
    return autoencoder, teacher


def _published(path: Path, source: Source, dtype: torch.dtype) -> tuple[Autoencoder, Teacher | None]:
    """The authors' weights; their files for inference hold no teacher."""
    normed = True if source.channel_norm is None else source.channel_norm
    with load_errors_explained(f"the published VGT autoencoder in {path}"):
        with no_init_weights():
            autoencoder = Autoencoder(published_config(channel_norm=normed))
        load_published(autoencoder, path)
    return autoencoder.cast(dtype).eval(), None


def _new_generator(name: str, source: Source, autoencoder: Autoencoder, *, hub: Hub, seed: int) -> Generator:
    own = autoencoder.config
    grid = _grid(source, own)
    options: dict[str, Any] = {"latent_channels": own.latent_channels, "latent_norm": own.channel_norm}
    options |= {"grid": grid, "order": source.order or "random", "stride": own.stride}
    if source.repa is not None:
        options["repa"] = RepaConfig(features=repa_width(source.repa, hub))
    if name == "tiny-random":
        return tiny_random_generator(seed=seed, **options, query_grid=max(8, *grid))
    if name == "tiny":
        return tiny_generator(**options, seed=seed, corpus=TINY_WORDS)
    folder = local_folder(name, hub, "model.name")
    with load_errors_explained(f"the language model of {name}"):
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "internvl":
            raise ValueError(f"it must be an internvl, and is a {kind}")
        whole, told = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
        lost = sorted(key for key in told["missing_keys"] if "language_model." in key)
        if lost:
            raise ValueError(f"{len(lost)} of its weights are missing, first {lost[0]}")
        llm = whole.model.language_model
        config = GeneratorConfig(llm=llm.config.to_dict(), **options)
        return Generator(config, AutoTokenizer.from_pretrained(folder), llm, seed=seed).eval()


def _grid(source: Source, own: autoencoders.AutoencoderConfig) -> tuple[int, int]:
    """Places of the latents of the images that are trained on."""
    height, width = source.size or (own.image_size, own.image_size)
    return height // own.stride, width // own.stride


def repa_width(name: str, hub: Hub) -> int:
    """Width of the features of REPA's vision encoder. Raises ModelLoadError."""
    folder = local_folder(name, Hub(None, hub.local_files_only), "vgt.repa.model", small=True)
    with load_errors_explained(f"the vision encoder {name} (vgt.repa.model)"):
        return int(AutoConfig.from_pretrained(folder).hidden_size)


def local_folder(name: str, hub: Hub, key: str, *, small: bool = False) -> str:
    """The folder `name`, or the one that holds the hub id `name` here once it is downloaded; `small`: its JSON and
    text alone. Raises ModelLoadError."""
    folder = expanded(name)
    if folder.is_dir():
        return str(folder)
    if looks_like_path(name):
        raise ModelLoadError(f"{key} {name}: there is no such folder")
    options = hub_options(name, "config.json", key=key, revision=hub.revision, local_files_only=hub.local_files_only)
    patterns = [*_SMALL_FILES, *(() if small else ("*.safetensors",))]
    with load_errors_explained(f"{name} from the Hugging Face hub or its local cache", hub_remedy(name, key)):
        return snapshot_download(name, allow_patterns=patterns, **options)


@dataclass(frozen=True)
class PromptReader:
    """VGT's template around a prompt, for the generator's tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> PromptReader | None:
        """Of a model in memory, a folder, or a hub id in the local cache; None where no tokenizer is here, as for an
        autoencoder. Raises ModelLoadError for files that cannot be read."""
        if name in IN_MEMORY:
            return PromptReader(tiny_tokenizer(TINY_WORDS if name == "tiny" else ()))
        folder = expanded(name)
        if not folder.is_dir():
            if looks_like_path(name):
                return None
            try:
                folder = Path(local_folder(name, Hub(revision, local_files_only=True), "model.name", small=True))
            except ModelLoadError:
                return None
        own = folder / GENERATOR / TOKENIZER_FOLDER
        place = own if own.is_dir() else folder
        if not (place / "tokenizer_config.json").is_file():
            return None
        with load_errors_explained(f"the tokenizer in {place}"):
            return PromptReader(AutoTokenizer.from_pretrained(str(place), trust_remote_code=False))

    def read(self, prompts: Sequence[str], height: int, width: int, mode: str) -> list[PromptReading]:
        """One reading per prompt, the same for images of any size."""
        return PromptText(self.tokenizer).read(prompts)


def fetch_small_files(name: str, source: Source, *, hub: Hub) -> None:
    """Brings what can be checked before training of hub ids into the local cache. Raises ModelLoadError."""
    check_places(name, source)  # told even where the hub cannot be asked, and no more can be checked
    wanted = {name: ("model.name", hub)}
    if source.component == AUTOENCODER and not is_local(name):
        wanted[source.decoder] = ("vgt.decoder", Hub(None, hub.local_files_only))
    if source.repa is not None:
        wanted[source.repa] = ("vgt.repa.model", Hub(None, hub.local_files_only))
    for each, (key, how) in wanted.items():
        if not is_local(each):
            local_folder(each, how, key, small=True)
