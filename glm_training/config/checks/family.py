"""What a model family, a training method and their sections ask of each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glm_training.config.checks.opd import opd_issues
from glm_training.config.checks.vgt import vgt_issues
from glm_training.config.errors import Issue

if TYPE_CHECKING:
    from glm_training.config.schema import Config

SCORERS = ("clip_h", "hps_v2")
COMPONENTS = {
    "glm_image": ("ar", "dit", "both"),
    "sdxl": ("unet",),
    "vgt": ("autoencoder", "generator"),
}
"""What can be trained of each family."""


def family_issues(config: Config) -> list[Issue]:
    """Everything about `model.family` and `training.method` that does not go together."""
    issues = [*_component(config), *vgt_issues(config), *_cache(config)]
    if config.model.family == "vgt":
        return [*issues, *_held_out_scores(config)]
    if config.training.method != "finetune":
        issues += [*_mode(config), *_held_out_scores(config)]
    issues += opd_issues(config)
    if config.training.method == "dpo":
        issues += _dpo(config)
    if config.training.method == "dmdr":
        issues += [*_dmdr(config), *_dmdr_reward(config), *_dmdr_without_effect(config)]
    return issues


def _component(config: Config) -> Iterator[Issue]:
    model, method = config.model, config.training.method
    if model.component not in COMPONENTS[model.family]:
        *others, last = (f"`{name}`" for name in COMPONENTS[model.family])
        wanted = f"{', '.join(others)} or {last}" if others else last
        yield Issue(
            ("model.component", "model.family"),
            f"`{model.family}` has no part `{model.component}` to train.",
            f"Use {wanted}, or another `model.family`.",
        )
    if model.family == "sdxl" and method == "finetune":
        yield from _sdxl_finetuning(config)
    elif config.training.min_snr_gamma is not None:
        yield Issue(("training.min_snr_gamma", "model.family"), "for supervised training of SDXL only.", "Remove it.")
    rates = {
        "ar_learning_rate": config.training.ar_learning_rate,
        "dit_learning_rate": config.training.dit_learning_rate,
    }
    for key, rate in rates.items():
        if model.family != "glm_image" and rate is not None:
            yield Issue(
                (f"training.{key}", "model.family"),
                f"`{model.family}` has no such half.",
                "Set `training.learning_rate`.",
            )
    if model.family != "sdxl" and model.taesd is not None:
        yield Issue(("model.taesd", "model.family"), f"`{model.family}` has no such decoder.", "Remove it.")
    if method != "dpo" and config.data.pairs is not None:
        yield Issue(("data.pairs", "training.method"), "pairs are for `dpo`.", "Set `training.method: dpo`.")
    if method != "dpo" and config.evaluation.eval_pairs is not None:
        yield Issue(("evaluation.eval_pairs", "training.method"), "pairs are for `dpo`.", "Remove it.")


def _sdxl_finetuning(config: Config) -> Iterator[Issue]:
    if config.uses_reward():
        yield Issue(
            ("training.use_reward", "model.family"),
            "reward steps train GLM-Image only.",
            "Remove it: SDXL learns from target images. Rewards train it under `training.method: dmdr`.",
        )
    if config.training.mode == "i2i":
        yield Issue(("training.mode", "model.family"), "SDXL edits no images.", "Use `t2i`.")


def _cache(config: Config) -> Iterator[Issue]:
    """The cache of what encoders give, by its keys and by those that preference tuning had for it."""
    cache, dpo = config.cache, config.dpo
    if dpo.cache is not None and not cache.enabled and dpo.cache:
        yield Issue(("dpo.cache", "cache.enabled"), "the older name of `cache.enabled` says otherwise.", "Remove it.")
    if cache.dir is not None and dpo.cache_dir is not None and cache.dir != dpo.cache_dir:
        yield Issue(("dpo.cache_dir", "cache.dir"), "the older name of `cache.dir` says otherwise.", "Remove it.")
    for key, given in (("cache.dir", cache.dir), ("dpo.cache_dir", dpo.cache_dir)):
        if given is not None and not config.caches():
            yield Issue((key, "cache.enabled"), "nothing is cached.", "Remove it, or set `cache.enabled: true`.")


def names_images(dataset: Path) -> bool:
    """Whether the records of the dataset may name their images themselves: a folder's do, and those of a file that is
    JSON by its name or by its first character. What it is exactly, the scan of the data says."""
    if dataset.suffix.lower() in (".jsonl", ".ndjson", ".json") or dataset.is_dir():
        return True
    if not dataset.is_file():  # a pipe would wait for ever
        return False
    try:
        with dataset.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    except OSError:
        return False  # reading the data says why


def _mode(config: Config) -> Iterator[Issue]:
    if config.training.mode == "i2i" and config.training.method != "opd":
        yield Issue(
            ("training.mode", "training.method"), f"`{config.training.method}` trains text to image.", "Use `t2i`."
        )
    if config.reward.monitors.metrics and not (config.reward.enabled and config.evaluation.enabled):
        yield Issue(("reward.monitors.metrics", "reward.enabled"), "nothing is scored.", "Set `reward.enabled: true`.")


def _held_out_scores(config: Config) -> Iterator[Issue]:
    """Held-out prompts are drawn and scored without images to compare with, unless they have targets."""
    reason = config.target_reason() if config.reward.enabled and config.evaluation.enabled else None
    prompts = config.evaluation.eval_prompts_file
    if (
        reason is not None
        and config.evaluation.eval_target_images_dir is None
        and (prompts is None or not names_images(prompts))
    ):
        yield Issue(
            ("reward.weights", "evaluation.eval_target_images_dir"),
            f"held-out prompts have no target images, and {reason}.",
            "Choose other metrics, or give `evaluation.eval_prompts_file` and `evaluation.eval_target_images_dir`.",
        )


def _dpo(config: Config) -> Iterator[Issue]:
    dpo, data = config.dpo, config.data
    if data.pairs is None:
        yield Issue(
            ("data.pairs", "training.method"), "`dpo` learns from preference pairs.", "Set it to their folder or file."
        )
    unread = {
        "prompts_file": data.prompts_file,
        "metadata_file": data.metadata_file,
        "target_images_dir": data.target_images_dir,
    }
    for name, path in unread.items():
        if path is not None:
            yield Issue((f"data.{name}", "training.method"), "`dpo` reads `data.pairs` alone.", "Remove it.")
    if data.augmentation:
        yield Issue(("data.augmentation", "training.method"), "pairs are not flipped.", "Remove it.")
    for part in config.parts():
        lora = config.lora_for(part)
        if lora.enabled and lora.dropout > 0:
            yield Issue(
                ("lora.dropout", f"lora.{part}.dropout", "training.method"),
                f"{lora.dropout:g} would make {part} differ from its reference by chance.",
                "Set it to 0.",
            )
    yield from _dpo_without_effect(config)
    if dpo.crop == "random" and dpo.loss == "dpo" and "ar" in config.parts():
        yield Issue(
            ("dpo.crop", "model.component"),
            "the AR half's reference is computed once for each image, which random crops change.",
            "Use `dpo.crop: center`, or `model.component: dit`.",
        )


def _dpo_without_effect(config: Config) -> Iterator[Issue]:
    dpo = config.dpo
    if config.model.family != "sdxl":
        for key, given in (("min_snr_gamma", dpo.min_snr_gamma is not None), ("timesteps", dpo.timesteps == "turbo")):
            if given:
                yield Issue((f"dpo.{key}", "model.family"), "for SDXL's noise schedule only.", "Remove it.")
    if config.parts() == ("ar",) and dpo.prompt_dropout > 0:
        yield Issue(
            ("dpo.prompt_dropout", "model.component"), "the AR half is drawn from without guidance.", "Remove it."
        )


def _dmdr(config: Config) -> Iterator[Issue]:
    dmdr = config.dmdr
    if config.parts() not in (("dit",), ("unet",)):
        yield Issue(
            ("model.component", "training.method"), "`dmdr` distils a diffusion model.", "Use `model.component: dit`."
        )
    low, high = (*dmdr.renoise_range, 0.0, 0.0)[:2]
    if not 0 <= low < high <= 1:
        yield Issue(("dmdr.renoise_range",), f"[{low:g}, {high:g}] is no range within [0, 1].", "As in [0.02, 0.98].")
    if dmdr.one_step_timestep is not None and (dmdr.student_steps != 1 or config.model.family != "sdxl"):
        yield Issue(
            ("dmdr.one_step_timestep", "dmdr.student_steps"),
            "only an SDXL of one step is told another timestep.",
            "Remove it, or set `dmdr.student_steps: 1`.",
        )
    for part in config.parts():
        lora = config.lora_for(part)
        if lora.enabled and lora.dropout > 0:
            yield Issue(
                ("lora.dropout", f"lora.{part}.dropout"),
                "the generator is trained on what it makes without dropout.",
                "Use 0.",
            )
    asked = config.evaluation_sampling()
    if asked.num_inference_steps != dmdr.student_steps or asked.guidance_scale != 1.0:
        yield Issue(
            ("evaluation.num_inference_steps", "evaluation.guidance_scale", "dmdr.student_steps"),
            "the generator draws in `dmdr.student_steps` steps without guidance.",
            "Remove both keys of `evaluation`.",
        )


def _dmdr_without_effect(config: Config) -> Iterator[Issue]:
    dmdr, plain = config.dmdr, type(config.dmdr)()
    if dmdr.cold_start_steps is None and dmdr.reward != plain.reward:
        yield Issue(("dmdr.reward", "dmdr.cold_start_steps"), "rewards never count.", "Set `dmdr.cold_start_steps`.")
    if dmdr.real_scale != plain.real_scale and not dmdr.dynamic_guidance:
        yield Issue(("dmdr.real_scale", "dmdr.dynamic_guidance"), "the real score has no adapter then.", "Remove it.")
    if dmdr.dynamic_steps is not None and not (dmdr.dynamic_guidance or dmdr.dynamic_renoise):
        yield Issue(("dmdr.dynamic_steps", "dmdr.dynamic_guidance"), "nothing is dynamic.", "Remove it.")
    if dmdr.plans_per_prompt != plain.plans_per_prompt and config.model.family == "sdxl":
        yield Issue(("dmdr.plans_per_prompt", "model.family"), "SDXL has no plans.", "Remove it.")
    if dmdr.reward.srpo_strength != plain.reward.srpo_strength and dmdr.reward.method != "srpo":
        yield Issue(("dmdr.reward.srpo_strength", "dmdr.reward.method"), "for `srpo` only.", "Remove it.")


def _dmdr_reward(config: Config) -> Iterator[Issue]:
    dmdr = config.dmdr
    if dmdr.cold_start_steps is None:
        return
    if not dmdr.reward.weights:
        yield Issue(
            ("dmdr.reward.weights", "dmdr.cold_start_steps"),
            "no scorer at all.",
            "To distil without rewards remove `dmdr.cold_start_steps`.",
        )
    for name, weight in dmdr.reward.weights.items():
        if name not in SCORERS:
            yield Issue((f"dmdr.reward.weights.{name}",), f"`{name}` is no scorer.", f"Known: {', '.join(SCORERS)}.")
        if not 0 < weight <= 1_000_000:
            yield Issue((f"dmdr.reward.weights.{name}",), f"{weight:g} is no weight; it must be > 0 and <= 1000000.")
    if dmdr.reward.method == "srpo" and "hps_v2" not in dmdr.reward.weights:
        yield Issue(
            ("dmdr.reward.method", "dmdr.reward.weights"),
            "`srpo` concerns `hps_v2`, which has no weight.",
            "Give it one, or use `refl`.",
        )
    if config.model.family != "sdxl" and dmdr.reward.decoder == "taesd":
        yield Issue(
            ("dmdr.reward.decoder", "model.family"), "GLM-Image has no TAESD.", "Set `dmdr.reward.decoder: vae`."
        )
