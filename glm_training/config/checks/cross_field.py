"""Keys that are valid one by one and do not go together. Every check looks at a whole, typed configuration."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from glm_training.config.checks.buckets import bucket_issues
from glm_training.config.checks.captioned import captioned_issues
from glm_training.config.checks.family import COMPONENTS, family_issues, names_images
from glm_training.config.checks.method import method_issues
from glm_training.config.checks.monitors import monitor_issues
from glm_training.config.checks.optimizers import optimizer_issues
from glm_training.config.checks.quantization import quantization_issues
from glm_training.config.checks.speed import speed_issues
from glm_training.config.docs.describe import walk
from glm_training.config.errors import Issue
from glm_training.config.sections.resolved import split_group
from glm_training.config.sections.reward import CLASS_PATTERN
from glm_training.config.sections.reward_options import METRICS, REMOTE_PREFIX
from glm_training.utils.words import counted

if TYPE_CHECKING:
    from glm_training.config.schema import Config


MAX_WEIGHT = 1_000_000
"""Of a metric: a sum of weighted scores stays finite."""


def cross_field_issues(config: Config) -> list[Issue]:
    """Everything in `config` that cannot be meant."""
    issues = [
        *_metrics(config),
        *_remote(config),
        *_text_accuracy(config),
        *_images(config),
        *captioned_issues(config),
        *bucket_issues(config),
        *_evaluation(config),
        *_lora(config),
        *_accept(config),
        *optimizer_issues(config),
        *quantization_issues(config),
        *speed_issues(config),
        *_trackers(config),
        *_offload(config),
        *family_issues(config),
    ]
    issues += [*_token_weights(config), *monitor_issues(config, _is_metric)]
    if config.uses_reward() and config.model.component in COMPONENTS["glm_image"]:  # else that is what is wrong
        issues += [*_group(config), *_exploration(config), *_dropout(config)]
        issues += method_issues(config)
    return issues


def nearest(name: str, known: Iterable[str]) -> str | None:
    """`Did you mean ...?` with the most similar name, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean `{matches[0]}`?" if matches else None


def _metrics(config: Config) -> Iterator[Issue]:
    metrics, weights = config.reward.metrics, config.reward.weights
    if isinstance(metrics, list):
        yield from _pairing(metrics, weights or {})
    elif metrics is not None and weights not in (None, metrics):
        yield Issue(
            ("reward.weights", "reward.metrics"),
            "`reward.metrics` gives the metrics other weights.",
            "Give the weights in one of the two places.",
        )
    key, given = ("reward.metrics", metrics) if isinstance(metrics, dict) else ("reward.weights", weights or {})
    named = metrics is not None or weights is not None
    if not given and not metrics and (named or config.uses_reward()):
        yield Issue((key,), "no metric at all.", "To train without rewards set `training.use_reward: false`.")
    yield from _weights(key, given)
    for part in ("ar", "dit"):
        own = (config.reward.ar if part == "ar" else config.reward.dit).weights
        if own is not None and not own:
            yield Issue((f"reward.{part}.weights",), "no metric at all.", "Null takes the weights of both halves.")
        yield from _weights(f"reward.{part}.weights", own or {})
        if own and config.reward.calculator is not None:
            yield Issue(
                (f"reward.{part}.weights", "reward.calculator"),
                "a calculator of your own has one score, which both halves share.",
                "Remove one of the two, or name the class as a metric among others.",
            )


def _weights(key: str, given: dict[str, float]) -> Iterator[Issue]:
    for name, weight in given.items():
        if not 0 < weight <= MAX_WEIGHT:
            limits = f"it must be > 0 and <= {MAX_WEIGHT}"
            yield Issue((f"{key}.{name}",), f"{weight:g} is no weight; {limits}.", "Or remove the metric.")
        if not _is_metric(name):
            own = "one of your own is written `module:Class` or `path/to/file.py:Class`"
            remote = f"a remote one `{REMOTE_PREFIX}name`"
            if name.startswith("remote:"):
                hint = f"Did you mean `{name.replace(':', '/', 1)}`?"
            else:
                hint = nearest(name, METRICS) or f"Known are {', '.join(METRICS)}; {own}, {remote}."
            yield Issue((f"{key}.{name}",), f"`{name}` is no metric.", hint)


def _is_metric(name: str) -> bool:
    """Whether `name` has the form of a metric; `_remote` sees to it that a remote one is configured."""
    if name.startswith("remote:"):  # reads as a class of a module called remote
        return False
    return name in METRICS or name.startswith(REMOTE_PREFIX) or re.match(CLASS_PATTERN, name) is not None


def _remote(config: Config) -> Iterator[Issue]:
    """Every remote metric that is asked for is one of those in `reward.options.remote`."""
    reward = config.reward
    known = [f"{REMOTE_PREFIX}{name}" for name in reward.options.remote]
    places: tuple[tuple[str, Collection[str] | None], ...] = (
        ("reward.metrics", reward.metrics),
        ("reward.weights", reward.weights),
        ("reward.ar.weights", reward.ar.weights),
        ("reward.dit.weights", reward.dit.weights),
    )
    for key, names in places:
        for name in names or ():
            if name.startswith(REMOTE_PREFIX) and name not in known:
                hint = (
                    nearest(name, known) or f"Give its address: `reward.options.remote.{name.partition('/')[2]}.url`."
                )
                path = key if isinstance(names, list) else f"{key}.{name}"
                yield Issue((path,), f"`reward.options.remote` has no `{name.partition('/')[2]}`.", hint)
    for name in reward.options.remote:
        if re.fullmatch(r"[\w-]+", name) is None:
            yield Issue((f"reward.options.remote.{name}",), "a name has letters, digits, `_` and `-` only.")


def _text_accuracy(config: Config) -> Iterator[Issue]:
    """A recogniser's file is given for a language that is asked for, and for the engine that takes one."""
    options, key = config.reward.options.text_accuracy, "reward.options.text_accuracy"
    for language in options.model_files:
        path = f"{key}.model_files.{language}"
        if options.engine != "rapidocr":
            yield Issue((path, f"{key}.engine"), f"{options.engine} takes no files.", "Remove it.")
        elif language not in options.languages:
            hint = nearest(language, options.languages) or f"Add it to `{key}.languages`."
            yield Issue((path, f"{key}.languages"), f"the language `{language}` is not read.", hint)


def _pairing(metrics: list[str], weights: dict[str, float]) -> Iterator[Issue]:
    """A list of metrics has one weight for each, and no weight stands alone."""
    for name in dict.fromkeys(metrics):
        if metrics.count(name) > 1:
            yield Issue(("reward.metrics",), f"the metric `{name}` is listed twice.")
        if not _is_metric(name):
            if name not in weights:
                yield Issue(("reward.metrics",), f"`{name}` is no metric.", nearest(name, METRICS))
        elif name not in weights:
            yield Issue(
                ("reward.metrics", f"reward.weights.{name}"),
                f"the metric `{name}` has no weight.",
                f"Add it as `reward.weights.{name}`.",
            )
    for name in weights:
        if name not in metrics:
            hint = nearest(name, metrics) or "Add it to `reward.metrics`, or remove the weight."
            yield Issue((f"reward.weights.{name}", "reward.metrics"), "a weight without its metric.", hint)


def _images(config: Config) -> Iterator[Issue]:
    data, targets = config.data, (config.data.target_images_dir, config.reward.target_images_dir)
    if None not in targets and targets[0] != targets[1]:
        yield Issue(
            ("data.target_images_dir", "reward.target_images_dir"),
            f"differs from `reward.target_images_dir` ({targets[1]}).",
            "Give one of the two, or the same folder in both.",
        )
    if data.metadata_file is not None and data.prompts_file is not None:
        yield Issue(
            ("data.metadata_file", "data.prompts_file"), "`data.prompts_file` is given as well.", "Give one of the two."
        )
    if config.training.mode == "t2i" and data.source_images_dir is not None:
        yield Issue(
            ("data.source_images_dir", "training.mode"),
            "text to image starts from no image.",
            "Remove it, or set `training.mode: i2i`.",
        )
    reason = config.target_reason() if config.uses_reward() else None
    if reason is None and config.uses_supervision():
        reason = "supervised steps learn from target images"
    if reason is None or data.images is not None:
        return
    if config.target_images_dir() is None and not names_images(config.dataset_file()):
        yield Issue(
            ("data.target_images_dir", "reward.target_images_dir"),
            f"needed: {reason}.",
            f"Set it, as in `data/{config.training.mode}/target_images`. To finetune on captioned pictures "
            "give their folder as `data.images` alone.",
            rests_on=("reward.metrics", "reward.weights"),
        )


def _evaluation(config: Config) -> Iterator[Issue]:
    evaluation, prompts = config.evaluation, config.evaluation.eval_prompts_file
    folders = {
        "eval_target_images_dir": evaluation.eval_target_images_dir,
        "eval_source_images_dir": evaluation.eval_source_images_dir,
    }
    if prompts is None:
        for name, folder in folders.items():
            if folder is not None and evaluation.enabled:
                yield Issue(
                    (f"evaluation.{name}", "evaluation.eval_prompts_file"),
                    "images without their prompts.",
                    "Set `evaluation.eval_prompts_file`.",
                )
        return
    if names_images(prompts):
        return
    needs = {"eval_target_images_dir": _held_out_targets(config)}
    if config.training.mode == "i2i":
        needs["eval_source_images_dir"] = "edits start from source images"
    for name, reason in needs.items():
        if reason is not None and folders[name] is None:
            yield Issue(
                (f"evaluation.{name}", "evaluation.eval_prompts_file"),
                f"needed with `evaluation.eval_prompts_file`: {reason}.",
                "Set it to the folder of their images.",
            )


def _trackers(config: Config) -> Iterator[Issue]:
    logging = config.logging
    if logging.use_trackio and logging.trackio_mode == "online" and logging.trackio_space is None:
        yield Issue(
            ("logging.trackio_space", "logging.trackio_mode"),
            "`online` needs a Hugging Face Space.",
            "Set it to a name like `user/space`, or `logging.trackio_mode: offline`.",
        )


def _held_out_targets(config: Config) -> str | None:
    """Why held-out prompts in a text file need a folder of targets; None if they do not."""
    if not config.evaluation.enabled:
        return None
    reason = config.target_reason()
    if reason is None and config.has_own_reward() and config.target_images_dir() is not None:
        return "a reward of your own may compare with target images, which the training data has"
    return reason


def _group(config: Config) -> Iterator[Issue]:
    rollout, samples, component = config.rollout, config.reward.grpo.num_samples, config.model.component
    keys = ("reward.grpo.num_samples", "rollout.plans_per_prompt", "rollout.renders_per_plan", "model.component")
    plans, renders = rollout.plans_per_prompt, rollout.renders_per_plan
    group = split_group(component, samples, plans, renders)
    if group is None:
        if plans is None and renders is None:
            message = f"num_samples {samples} does not split into plans x 2 renders, as `model.component: both` needs."
        else:
            given = f"plans_per_prompt {plans or 'null'}, renders_per_plan {renders or 'null'}"
            message = f"num_samples {samples} does not split as `rollout` says ({given})."
        yield Issue(keys, message, "num_samples = plans_per_prompt x renders_per_plan must hold.")
        return
    what = f"{counted(samples, 'sample')} are {counted(group.plans, 'plan')} x {counted(group.renders, 'render')}:"
    if "ar" in config.parts() and group.plans < 2:
        yield Issue(
            (keys[0], keys[1], keys[3]),
            f"{what} one plan per prompt has no other to be compared with, so the AR half cannot learn.",
            f"Use at least {2 * group.renders} samples, or `rollout.plans_per_prompt` of 2 or more.",
        )
    across = config.reward.grpo.dit.compared_with == "prompt" and samples > 1
    if "dit" in config.parts() and group.renders < 2 and not across:
        yield Issue(
            (keys[0], keys[2], keys[3], "reward.grpo.dit.compared_with"),
            f"{what} one render per plan has no other to be compared with, so the DiT half cannot learn.",
            f"Use at least {2 * group.plans} samples, or `rollout.renders_per_plan` of 2 or more; where plans have no "
            "say in what the DiT half is rewarded for, `reward.grpo.dit.compared_with: prompt`.",
        )


def _exploration(config: Config) -> Iterator[Issue]:
    if "ar" in config.parts() and not config.model.ar.do_sample:
        yield Issue(
            ("model.ar.do_sample", "model.component"),
            "without sampling all plans of a prompt are the same, and the AR half cannot learn from rewards.",
            "Set it to true, or `model.component: dit`.",
        )


def _dropout(config: Config) -> Iterator[Issue]:
    """A replay would draw another dropout mask than the rollout: ratios would be noise."""
    for part in config.parts():
        lora = config.lora_for(part)
        if lora.enabled and lora.dropout > 0:
            yield Issue(
                ("lora.dropout", f"lora.{part}.dropout"),
                f"{lora.dropout:g} makes the replayed log-probs of the {part} half differ from the rollout's.",
                "Set it to 0 for reward training.",
            )


def _offload(config: Config) -> Iterator[Issue]:
    if config.training.offload_between_phases and not (config.uses_reward() and config.model.family == "glm_image"):
        yield Issue(
            ("training.offload_between_phases", "training.use_reward"),
            "only reward steps have phases: of other steps each uses all that is trained.",
            "Remove it.",
        )


def _token_weights(config: Config) -> Iterator[Issue]:
    training, ar = config.training, config.reward.grpo.ar
    pairs = {
        ("training.preview_loss_weight", "training.large_loss_weight"): training.preview_loss_weight
        + training.large_loss_weight,
        ("reward.grpo.ar.preview_weight", "reward.grpo.ar.large_weight"): ar.preview_weight + ar.large_weight,
    }
    for keys, total in pairs.items():
        if total == 0:
            yield Issue(keys, "no token counts when both weights are 0.", "Make one of them greater than 0.")


def _lora(config: Config) -> Iterator[Issue]:
    if config.lora.start_from is not None and not any(config.lora_for(part).enabled for part in config.parts()):
        yield Issue(
            ("lora.start_from", "lora.enabled"),
            "no adapters are trained.",
            "Set `lora.enabled: true`; `model.adapters` merges them into the model.",
        )
    if any(config.lora_for(part).enabled for part in config.parts()):
        return
    checkpoint = config.checkpoint
    only = checkpoint.save_lora_only and config.model.quantization == "none"  # else that asks for it, and for adapters
    for name, asked in (("save_lora", checkpoint.save_lora), ("save_lora_only", only)):
        if asked:
            yield Issue(
                (f"checkpoint.{name}", "lora.enabled", "model.component"),
                "there are no adapters to save.",
                "Set `lora.enabled: true`.",
            )


def _accept(config: Config) -> Iterator[Issue]:
    leaves = [key.path for key in walk(type(config))]
    sections = {leaf.rsplit(".", depth)[0] for leaf in leaves for depth in range(1, leaf.count(".") + 1)}
    for key in config.resume.accept:
        if key not in sections and key not in leaves:
            yield Issue(("resume.accept",), f"`{key}` is no key.", nearest(key, [*leaves, *sections]))
