"""From a configuration to the things a trainer composes: model, data, rewards. Each fails before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from glm_training.config import Config
from glm_training.config.sections.data import BUCKET_MULTIPLES
from glm_training.data import (
    Example,
    I2IDataset,
    ImageDataset,
    StatefulSampler,
    T2IDataset,
    TrainingData,
    scan_dataset,
)
from glm_training.data.captioned.dataset import CaptionedImages
from glm_training.data.dataset import sizes_of
from glm_training.data.pictures.buckets import Buckets
from glm_training.data.preference.dataset import PreferenceDataset
from glm_training.data.samplers.bucket_sampler import BucketSampler
from glm_training.data.samplers.mixed_sampler import MixedSampler
from glm_training.engine.errors import SettingsError
from glm_training.engine.families import AUTOCAST, prompt_reader
from glm_training.engine.parts import Part, Showing, WeightAverage
from glm_training.engine.reward_setup import differentiable_options, reward_options
from glm_training.engine.sharding import Shards
from glm_training.engine.validation import Subject
from glm_training.models.family import Family
from glm_training.models.library_versions import autocast_options
from glm_training.models.lora import adapters_disabled, has_lora, starts_as_base
from glm_training.models.run_folders import pipeline_in
from glm_training.models.sdxl.loading import taesd_in
from glm_training.models.weights import in_fp32
from glm_training.rewards import (
    DifferentiableScorers,
    RewardBackendError,
    RewardCalculator,
    RewardConfigError,
    build_calculator,
)
from glm_training.rewards.foreign import users_code
from glm_training.utils.distributed import World
from glm_training.utils.trackers import Service, SwanLab, Trackio, Wandb
from glm_training.utils.words import counted


def tracking_services(config: Config) -> list[Service]:
    """Those that the run reports to, besides TensorBoard."""
    logging = config.logging
    every: list[tuple[bool, Wandb | SwanLab | Trackio]] = [
        (logging.use_wandb, Wandb(logging.wandb_project, logging.wandb_entity, logging.wandb_mode)),
        (logging.use_swanlab, SwanLab(logging.swanlab_project, logging.swanlab_workspace, logging.swanlab_mode)),
        (logging.use_trackio, Trackio(logging.trackio_project, logging.trackio_space, logging.trackio_mode)),
    ]
    return [service for used, service in every if used and service.mode != "disabled"]


def build_parts(
    config: Config, family: Family, world: World, total_steps: int, shards: Shards | None = None
) -> dict[str, Part]:
    """The trained parts in fp32, in `shards` or whole, each with its optimizer and what snapshots a method needs."""
    parts: dict[str, Part] = {}
    if shards is not None:
        shards.shard_family(family, config.parts())
    family.to(world.device)
    for name in config.parts():
        in_fp32(family.trainable(name).values())
        part = Part(
            name,
            family.component(name),
            family.trainable(name),
            config.optimizer_for(name),
            world,
            total_steps=total_steps,
            find_unused_parameters=config.distributed.find_unused_parameters,
            loss_scaling=config.training.mixed_precision == "fp16",
            rate_scales=family.rate_scales(name),
        )
        part.ema = weight_average(config, part)
        if config.needs_reference(name):
            keep_reference(part, family.module(name), config.reward.grpo.reference)
        if config.uses_reward() and name == "dit" and config.reward.grpo.dit.method == "nft":
            part.old = part.snapshot()
        parts[name] = part
    return parts


def weight_average(config: Config, part: Part) -> WeightAverage | None:
    """The slow average of the weights that `training.ema` asks for."""
    ema = config.training.ema
    if ema.decay is None:
        return None
    wanted: dict[Showing, bool] = {"evaluation": ema.evaluate, "export": ema.export}
    shown = frozenset(showing for showing, asked in wanted.items() if asked)
    return WeightAverage(part.snapshot(torch.float32), ema.decay, ema.start_step, shown)


def keep_reference(part: Part, module: nn.Module, kind: str) -> None:
    """What the part is compared with: `start`, the model it starts as, or `ema`, its slow average. The start of fresh
    adapters is the model with them switched off: no copy."""
    if kind == "start" and has_lora(module) and starts_as_base(module):
        part.reference = partial(adapters_disabled, module)
        return
    snapshot = part.snapshot()
    part.reference = snapshot.applied
    if kind == "ema":
        part.average = snapshot
    else:
        part.start = snapshot


def autocast(config: Config, world: World) -> AbstractContextManager[Any]:
    """The context of every forward pass, in rollout and replay alike."""
    dtype = AUTOCAST.get(config.training.mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(world.device.type, dtype, **autocast_options())


def buckets(config: Config) -> Buckets | None:
    """How the sizes of pictures are chosen; None where all have one size."""
    data = config.data
    if not data.buckets.enabled:
        return None
    area = data.image_size.height * data.image_size.width
    return Buckets(area, BUCKET_MULTIPLES[config.model.family], data.buckets.smallest, data.buckets.upscale)


def build_dataset(config: Config) -> ImageDataset:
    """The training data, scanned whole; DataError lists every problem."""
    data = config.data
    reader = prompt_reader(config)
    report = scan_dataset(
        config.training.mode,
        config.dataset_file(),
        config.target_images_dir(),
        data.source_images_dir if config.training.mode == "i2i" else None,
        height=data.image_size.height,
        width=data.image_size.width,
        require_targets=config.uses_supervision() or (config.uses_reward() and config.target_reason() is not None),
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        reader=reader,
        buckets=buckets(config),
    )
    dataset = _dataset(config, report.examples, augmentation=data.augmentation)
    dataset.remarks = report.remarks if reader is not None else [unread(config)]
    return dataset


def unread(config: Config) -> str:
    """A remark where prompts were not read as the model reads them."""
    return f"how long the prompts are for {config.model.name} is told once its tokenizers are here"


def evaluated(config: Config, noun: str) -> str:
    """What a thing that an evaluation is on is called: "held-out prompt", or "training prompt" where no evaluation set
    was named and the first of the training data stand in; `noun` is prompt, target, pair or picture. An autoencoder is
    given pictures where others are given prompts."""
    evaluation = config.evaluation
    if noun == "prompt" and config.model.component == "autoencoder":
        noun = "picture"
    prompts = (evaluation.eval_prompts_file, evaluation.eval_images)
    sets = {"pair": (evaluation.eval_pairs,), "prompt": (*prompts, evaluation.eval_pairs)}
    held_out = any(sets.get(noun, prompts)) or (config.data.validation and noun != "pair")
    return f"{'held-out' if held_out else 'training'} {noun}"


def judged_subject(config: Config, held_out: ImageDataset, noun: str) -> Subject:
    """What figures of `held_out` are about, one of which is called `noun`, as in `evaluated`."""
    prompts = tuple(example.prompt for example in held_out.examples)
    return Subject(evaluated(config, noun), prompts, held_out.fingerprint())


def build_evaluation_dataset(config: Config, training: ImageDataset | CaptionedImages) -> ImageDataset:
    """The held-out prompts, or the first training prompts when there are none.

    To be scored they need targets where a metric compares with them, and for a reward of the user's own, which may,
    where the training data has them. DataError lists every problem.
    """
    evaluation, data = config.evaluation, config.data
    may_compare = config.target_reason() is not None or (
        config.has_own_reward() and isinstance(training, ImageDataset) and training.has_targets
    )
    if evaluation.eval_prompts_file is None:
        assert isinstance(training, ImageDataset)  # of captioned pictures the first are HeldOutImages
        return _dataset(config, training.examples[: evaluation.num_eval_samples], augmentation=False)
    report = scan_dataset(
        config.training.mode,
        evaluation.eval_prompts_file,
        evaluation.eval_target_images_dir,
        evaluation.eval_source_images_dir if config.training.mode == "i2i" else None,
        height=data.image_size.height,
        width=data.image_size.width,
        require_targets=evaluation.enabled and may_compare,
        num_workers=data.num_workers,
        reader=prompt_reader(config),
        buckets=buckets(config),
    )
    dataset = _dataset(config, report.examples[: evaluation.num_eval_samples], augmentation=False)
    dataset.remarks = report.remarks
    return dataset


def _dataset(config: Config, examples: Sequence[Example], *, augmentation: bool) -> ImageDataset:
    kind = I2IDataset if config.training.mode == "i2i" else T2IDataset
    return kind(
        examples,
        height=config.data.image_size.height,
        width=config.data.image_size.width,
        augmentation=augmentation,
        seed=config.seed,
        num_workers=config.data.num_workers,
        pin_memory=config.data.pin_memory,
    )


def build_sampler(config: Config, world: World, data: TrainingData) -> StatefulSampler:
    """Which items of `data` each step of the run takes."""
    shuffle, size = config.data.shuffle, config.training.batch_size
    place = {"seed": config.seed, "rank": world.rank, "world_size": world.world_size}
    if isinstance(data, CaptionedImages) and data.weights is not None:
        drawn: StatefulSampler = MixedSampler(data.set_lengths, data.weights, size, shuffle=shuffle, **place)
    else:
        drawn = StatefulSampler(len(data), size, shuffle=shuffle, **place)
    if not config.data.buckets.enabled:
        return drawn
    return BucketSampler(drawn, sizes_of(data))


def sizes_told(config: Config, data: TrainingData) -> list[str]:
    """What sizes pictures have in batches, and how full those are, in a line; nothing where all have one size."""
    if not config.data.buckets.enabled:
        return []
    counts = Counter(sizes_of(data)).most_common()
    at_once = config.training.batch_size
    batches = sum(-(-count // at_once) for _, count in counts)
    shown = ", ".join(f"{width} x {height} ({count})" for (height, width), count in counts[:4])
    more = f" and {counted(len(counts) - 4, 'other')}" if len(counts) > 4 else ""
    return [
        f"{counted(len(counts), 'size')}: {shown}{more}; {len(data) / batches:.1f} of {at_once} in a batch on average"
    ]


def cache_told(config: Config) -> list[str]:
    """What the cache of encodings leaves out, in a line; nothing where it has all, or there is none."""
    if not (config.crops_at_random() and config.caches()):
        return []
    key = "dpo.crop" if config.training.method == "dpo" else "data.crop"
    return [f"{key} is random: pictures are encoded at every step, and texts once"]


def count_steps(config: Config, sampler: StatefulSampler) -> int:
    """Training steps of the whole run."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    return -(-sampler.steps_for(training.num_epochs) // training.gradient_accumulation_steps)


def build_scorers(config: Config, world: World, total_steps: int) -> DifferentiableScorers | None:
    """The scorers of a distillation, loaded; None for any other run, and for one that ends before they count.

    Raises SettingsError where nothing would decode their images, RewardBackendError when a backend is missing.
    """
    cold_start = config.dmdr.cold_start_steps
    if config.training.method != "dmdr" or cold_start is None or cold_start >= total_steps:
        return None
    model = config.model
    if config.dmdr.reward.decoder == "taesd" and model.taesd is None and taesd_in(pipeline_in(model.name)) is None:
        raise SettingsError(
            f"dmdr.reward.decoder is taesd and {model.name} has none: set model.taesd to madebyollin/taesdxl or a "
            "folder, or dmdr.reward.decoder to vae"
        )
    scorers = DifferentiableScorers(differentiable_options(config), world.device)
    scorers.check()
    return scorers


def scores(config: Config) -> bool:
    """Whether the run scores pictures: in its reward steps, or in its evaluations alone."""
    return config.uses_reward() or (config.reward.enabled and config.evaluation.enabled)


def build_rewards(
    config: Config, world: World, datasets: Mapping[str, ImageDataset | CaptionedImages]
) -> tuple[RewardCalculator, list[str]]:
    """The calculator, its backends loaded, and every prompt of `datasets` (by what messages call them) known to be
    scorable; and what is worth telling the user about the metrics.

    Raises RewardConfigError when rewards and data do not fit, RewardBackendError when a backend is missing.
    """
    calculator = build_calculator(
        config.reward.calculator,
        config.scored_weights(),
        reward_options(config),
        world.device,
    )
    with users_code(f"{type(calculator).__name__}.check", RewardBackendError):
        calculator.check()
    problems: dict[str, None] = {}
    notes: dict[str, None] = {}
    own = [weights for part in config.parts() if (weights := config.reward_weights_for(part)) is not None]
    for name, dataset in datasets.items():
        learned = own if name == "training data" else []
        file = config.dataset_file() if name == "training data" else config.evaluation.eval_prompts_file
        name = name if file is None else f"{name} ({file})"
        prompts, places, has_targets, has_sources = _scorable(dataset)
        for weights in (None, *learned):
            with users_code(f"{type(calculator).__name__}.check_prompts", RewardConfigError):
                report = calculator.check_prompts(prompts, has_targets, has_sources, weights, places=places)
                problems |= dict.fromkeys(f"{name}: {line}" for line in report.problems)
                notes |= dict.fromkeys(f"{name}: {line}" for line in report.notes)
    if problems:
        raise RewardConfigError("the rewards do not fit the data:\n" + "\n".join(f"  {line}" for line in problems))
    return calculator, list(notes)


def _scorable(dataset: ImageDataset | CaptionedImages) -> tuple[list[str], list[str], bool, bool]:
    """Prompts, where each stands, and whether they have targets and sources."""
    if isinstance(dataset, CaptionedImages):
        found = dataset.prompts()
        return [prompt for _, prompt in found], [place for place, _ in found], True, dataset.sources
    examples = dataset.examples
    places = [f"line {example.index + 1}" for example in examples]
    return [example.prompt for example in examples], places, dataset.has_targets, dataset.has_sources


def build_default_rewards(
    config: Config, world: World, held_out: ImageDataset
) -> tuple[RewardCalculator | None, list[str]]:
    """A calculator of those default metrics that can score the held-out prompts here, for a run that names none; None
    where none can; and a line on what is missed, if anything is."""
    prompts = [example.prompt for example in held_out.examples]
    weights, missing, reach = {}, [], set[int]()
    for name, weight in config.default_weights().items():
        calculator = RewardCalculator({name: weight}, options=reward_options(config), device=world.device)
        try:
            calculator.check()
        except RewardBackendError:  # its reason is told to those who name it
            missing.append(name)
            continue
        count = calculator.check_prompts(prompts, held_out.has_targets, held_out.has_sources).applies[name]
        if count:
            weights[name] = weight
            reach.add(count)
    whole = len(prompts) in reach
    if missing:
        scored = "held-out pictures are scored" if whole else "no scores of held-out pictures"
        notes = [f"{scored} without {' and '.join(missing)}: not installed here, nor named in reward.metrics"]
    elif not whole and weights:
        notes = [f"no scores of held-out pictures: {' and '.join(weights)} would leave some prompts without one"]
    else:
        notes = []
    if not whole:
        return None, notes
    calculator = RewardCalculator(weights, options=reward_options(config), device=world.device)
    calculator.check()
    return calculator, notes


def datasets_to_score(
    config: Config, training: TrainingData, held_out: ImageDataset
) -> dict[str, ImageDataset | CaptionedImages]:
    """The data that the rewards meet, by the name that messages give it."""
    named: dict[str, ImageDataset | CaptionedImages] = {}
    if config.uses_reward() and isinstance(training, ImageDataset | CaptionedImages):
        named["training data"] = training
    if config.evaluation.enabled and (config.evaluation.eval_prompts_file is not None or not named):
        named[f"{evaluated(config, 'prompt').partition(' ')[0]} data"] = held_out
    return named


def data_told(config: Config, training: TrainingData, prompts: ImageDataset) -> list[str]:
    """How much there is to train on, and what evaluations and samples are on."""
    kinds = {PreferenceDataset: "pair", CaptionedImages: "picture"}
    told = [counted(len(training), f"training {kinds.get(type(training), 'prompt')}")]
    if isinstance(training, PreferenceDataset) and training.held_out is not None:
        told.append(counted(len(training.held_out), "held-out pair"))
    noun = evaluated(config, "prompt")
    own = counted(len(prompts), noun)
    if config.evaluation.enabled or config.logging.log_images:
        told.append(own if noun.startswith("held-out") else f"evaluated on {own}")
    return told
