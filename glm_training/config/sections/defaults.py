"""Defaults that depend on other keys, filled in before validation so that the resolved file shows them.

The input may be anything a YAML file can hold: what has the wrong type is left for validation to report.
"""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from pydantic import BaseModel

from glm_training.config.sections.data import BUCKET_MULTIPLES
from glm_training.utils.writable import expanded

Tree = dict[str, Any]

I2I_EPOCHS, I2I_WARMUP = 10, 500
T2I_WEIGHTS = {"lpips": 0.4, "aesthetic": 0.3, "text_accuracy": 0.3}
I2I_WEIGHTS = {"lpips": 0.35, "aesthetic": 0.25, "text_accuracy": 0.25, "structure": 0.15}
SDXL_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
VGT_NAME = "OpenGVLab/InternVL3-1B-hf"
DIT_KL = {"flow_grpo": 0.004, "nft": 1e-4, "awm": 3e-3, "dgpo": 0.02}
"""The published coefficients, each in the unit that its method's KL has here (docs/recipes.md)."""
VELOCITY_KL = 1e-4
"""Of `flow_grpo` with `kl_form: velocity`: DiffusionNFT's, which weighs the same squared difference."""
DEFAULT_SIZE = 1024
VGT_SIZE = 448
SMALLEST_SIDE = 80
OWN_SIZES = {
    "glm_image": {"tiny": 128, "tiny-random": 128, "full-width": 1024},
    "sdxl": {"tiny-random": 64},
    "vgt": {"tiny": 64, "tiny-random": 32},
}
VALIDATION = 0.05
GROUP_DEFAULT = {"ar": (4, 1), "dit": (1, 4), "both": (2, 2)}


def with_dependent_defaults(raw: Any, schema: type[BaseModel]) -> Any:
    """A copy of `raw` with the absent keys whose default depends on the mode, the component or a neighbour."""
    if not isinstance(raw, dict):
        return raw
    tree: Tree = deepcopy(raw)
    _open_sections(tree, schema)
    i2i = _get(tree["training"], "mode") == "i2i"
    _fill_method(tree)
    if i2i:
        _fill(tree["training"], "num_epochs", I2I_EPOCHS)
        _fill(tree["training"], "warmup_steps", I2I_WARMUP)
    reward = tree["reward"]
    if isinstance(reward, dict) and reward.get("metrics") is None and reward.get("weights") is None:
        own = _part_weights(reward)
        if own or _has_reward_steps(tree):  # else nobody named a metric: held-out scores are those that can be had
            reward["weights"] = own or default_weights("i2i" if i2i else "t2i")
    _fill_buckets(tree)
    _fill_size(tree)
    _fill_kl(reward)
    _fill_optimizer(tree)
    _fill_quantization(tree)
    if _get(tree["training"], "method") != "dpo" and _get(tree["model"], "family") != "vgt":
        _fill_data(tree["data"], "i2i" if i2i else "t2i")
    _fill_rollout(tree)
    _fill_validation(tree)
    return tree


def default_weights(mode: str) -> dict[str, float]:
    """The metrics of a run that names none."""
    return dict(I2I_WEIGHTS if mode == "i2i" else T2I_WEIGHTS)


def _has_reward_steps(tree: Tree) -> bool:
    training = tree["training"]
    return _get(training, "method") in (None, "finetune") and _get(training, "use_reward") is not False


def own_size(family: str, name: str) -> int | None:
    """Pixels along a side of what a model was made to draw; None where its folder does not say, and for hub ids."""
    if name in OWN_SIZES.get(family, {}):
        return OWN_SIZES[family][name]
    folder = expanded(name)
    try:
        if family == "vgt":
            for place in (folder / "autoencoder", folder / "pipeline" / "autoencoder", folder):
                if (place / "config.json").is_file():  # of the last one, it may be a vision-language model's
                    text = (place / "config.json").read_text(encoding="utf-8")
                    return _usable(json.loads(text).get("image_size", VGT_SIZE))
            return VGT_SIZE
        folder = folder if (folder / "model_index.json").is_file() else folder / "pipeline"
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        if family == "sdxl":
            latents = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
            size = latents * 2 ** (len(vae["block_out_channels"]) - 1)
        else:
            size = min(vae["sample_size"], DEFAULT_SIZE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # loading says what is wrong with the files
    return _usable(size)


def _fill_buckets(tree: Tree) -> None:
    """Own pictures keep their shapes, unless the file gives them one size."""
    buckets, family = _get(tree["data"], "buckets"), _get(tree["model"], "family") or "glm_image"
    if isinstance(buckets, dict) and buckets.get("enabled") is None:
        own = _get(tree["data"], "images") is not None and not _get(tree["data"], "image_size")
        buckets["enabled"] = own and family in BUCKET_MULTIPLES


def _usable(size: Any) -> int | None:
    return size if isinstance(size, int) and size >= 32 and size % 32 == 0 else None


def _fill_size(tree: Tree) -> None:
    """Images have the size that the model was made for, unless the file says otherwise."""
    model, size = tree["model"], _get(tree["data"], "image_size")
    family, name = _get(model, "family") or "glm_image", _get(model, "name")
    if family == "vgt" and (drawn := _get(tree["vgt"], "autoencoder")) is not None:
        name = drawn  # a generator draws what it reads
    own = own_size(family, name) if isinstance(family, str) and isinstance(name, str) and "\0" not in name else None
    if own is not None:
        for side in ("height", "width"):
            _fill(size, side, own)
    sides = [side for key in ("height", "width") if isinstance(side := _get(size, key), int)]
    if _get(tree["data"], "images") is not None and sides and min(sides) <= SMALLEST_SIDE:
        # pictures of the very size that is asked for are not too small
        _fill(tree["data"], "min_side", min(sides) - 1)


def _open_sections(tree: Tree, schema: type[BaseModel]) -> None:
    """An absent section, or one whose lines are all commented out, is an empty one."""
    for name, field in schema.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            if tree.get(name) is None:
                tree[name] = {}
            if isinstance(tree[name], dict):
                _open_sections(tree[name], section)


def _fill(section: Any, key: str, value: Any) -> None:
    if isinstance(section, dict) and key not in section:
        section[key] = value


def _part_weights(reward: Tree) -> Tree:
    """The metrics of the halves together, each at the larger of its weights."""
    merged: Tree = {}
    for part in ("ar", "dit"):
        weights = _get(reward.get(part), "weights")
        for name, weight in weights.items() if isinstance(weights, dict) else ():
            numbers = isinstance(weight, int | float) and isinstance(merged.get(name, weight), int | float)
            merged[name] = max(merged.get(name, weight), weight) if numbers else weight
    return merged


def _fill_method(tree: Tree) -> None:
    """SDXL has its UNet to train, VGT its generator. Preferences, distillation and VGT score nothing unless a reward is
    asked for; distillation to few steps draws in evaluations as it trains the generator to draw."""
    model, method = tree["model"], _get(tree["training"], "method")
    family = _get(model, "family")
    sdxl = family == "sdxl"
    if sdxl:
        _fill(model, "component", "unet")
        _fill(model, "name", SDXL_NAME)
    if family == "vgt":
        _fill(model, "component", "generator")
        _fill(model, "name", VGT_NAME)
        _fill(tree["training"], "use_reward", False)
    elif method in (None, "finetune") and (sdxl or _get(tree["data"], "images") is not None):
        _fill(tree["training"], "use_reward", False)  # own pictures are what is learnt, unless a reward is asked for
    if method in ("dpo", "dmdr", "opd") or family == "vgt":
        _fill(tree["reward"], "enabled", False)
    if method == "opd" and _get(_get(tree["reward"], "grpo"), "num_samples") is None:
        for key in ("plans_per_prompt", "renders_per_plan"):  # nothing is compared with its siblings
            _fill(tree["rollout"], key, 1)
    if method == "dmdr":
        if not sdxl:
            _fill(model, "component", "dit")
            _fill(tree["dmdr"], "real_guidance_scale", 1.5)
        evaluation = tree["evaluation"]
        for key, value in (("num_inference_steps", _get(tree["dmdr"], "student_steps") or 4), ("guidance_scale", 1.0)):
            _fill(evaluation, key, value)


def _fill_kl(reward: Any) -> None:
    """The KLs of the two halves have different units, so one default cannot serve both; one that is given does."""
    grpo = _get(reward, "grpo")
    dit = _get(grpo, "dit")
    method = _get(dit, "method") or "flow_grpo"
    if isinstance(grpo, dict) and "kl_coef" not in grpo and isinstance(method, str) and method in DIT_KL:
        velocity = method == "flow_grpo" and _get(dit, "kl_form") == "velocity"
        _fill(dit, "kl_coef", VELOCITY_KL if velocity else DIT_KL[method])


OWN_OPTIMIZER_DEFAULTS: dict[str, Tree] = {
    "prodigy": {"learning_rate": 1.0},
    "lion": {"beta2": 0.99},
    "adamw_schedule_free": {"scheduler": "constant"},
}
"""What an update rule asks for where nothing is said, under the keys of `optimizer.<part>`."""

_SHARED_KEYS = {"learning_rate": "learning_rate", "beta2": "adam_beta2", "scheduler": "lr_scheduler"}


def _fill_optimizer(tree: Tree) -> None:
    """Prodigy finds the size of its steps, Lion remembers for longer, and schedule-free averages in a schedule's place:
    what is AdamW's default is none for them."""
    training, own = tree["training"], tree["optimizer"]
    for key, value in _own_defaults(_get(training, "optimizer")).items():
        _fill(training, _SHARED_KEYS[key], value)
    for part in own if isinstance(own, dict) else ():
        rate = f"{part}_learning_rate"
        for key, value in _own_defaults(_get(own[part], "name")).items():
            if key != "learning_rate" or _get(training, rate) is None:
                _fill(own[part], key, value)


def _own_defaults(name: Any) -> Tree:
    return OWN_OPTIMIZER_DEFAULTS.get(name, {}) if isinstance(name, str) else {}


def _fill_quantization(tree: Tree) -> None:
    """Base weights in few bits make no pipeline."""
    if _get(tree["model"], "quantization") in ("int8", "nf4"):
        _fill(tree["checkpoint"], "save_lora_only", True)


def _fill_data(data: Any, mode: str) -> None:
    if not isinstance(data, dict) or any(data.get(key) is not None for key in ("metadata_file", "images")):
        return
    for key, default in (("prompts_file", "prompts.txt"), ("source_images_dir", "source_images")):
        if data.get(key) is None and (key == "prompts_file" or mode == "i2i"):
            data[key] = f"data/{mode}/{default}"


def _fill_validation(tree: Tree) -> None:
    """Own pictures are judged by some that are held out. VGT's corpora are too large to be read for that unasked."""
    data, evaluation = tree["data"], tree["evaluation"]
    if not isinstance(data, dict) or data.get("validation") is not None:
        return
    finetunes = _get(tree["training"], "use_reward") is False and _get(tree["model"], "family") != "vgt"
    named = [_get(evaluation, key) for key in ("eval_images", "eval_prompts_file")]
    splits = data.get("images") is not None and finetunes and not any(named)
    data["validation"] = VALIDATION if splits else 0.0


def _fill_rollout(tree: Tree) -> None:
    rollout, grpo, model = tree["rollout"], _get(tree["reward"], "grpo"), tree["model"]
    if not isinstance(rollout, dict):
        return
    component = _get(model, "component") or "both"
    if component == "ar" or _get(_get(grpo, "dit"), "method") in ("nft", "awm", "dgpo"):
        _fill(rollout, "sde_kernel", "ode")
    if rollout.get("sde_window_size") is not None:
        _fill(rollout, "sde_window_strategy", "random")
    plans, renders = rollout.get("plans_per_prompt"), rollout.get("renders_per_plan")
    if component not in tuple(GROUP_DEFAULT) or plans is renders is None:
        return
    default_plans, default_renders = GROUP_DEFAULT[component]
    plans, renders = default_plans if plans is None else plans, default_renders if renders is None else renders
    if isinstance(plans, int) and isinstance(renders, int):
        _fill(grpo, "num_samples", plans * renders)


def _get(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else None
