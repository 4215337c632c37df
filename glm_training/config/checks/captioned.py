"""What sets of captioned pictures ask of the other keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue

if TYPE_CHECKING:
    from glm_training.config.schema import Config
    from glm_training.config.sections.data import ImageSetConfig


def captioned_issues(config: Config) -> Iterator[Issue]:
    """Everything about `data.images` and `evaluation.eval_images` that does not go together or would do nothing."""
    data, evaluation = config.data, config.evaluation
    if data.images is None:
        yield from _without_images(config)
        return
    yield from _training(config)
    others = {
        "prompts_file": data.prompts_file,
        "metadata_file": data.metadata_file,
        "pairs": data.pairs,
        "source_images_dir": data.source_images_dir,
        "target_images_dir": data.target_images_dir,
    }
    for name, path in others.items():
        if path is not None:
            yield Issue((f"data.{name}", "data.images"), "`data.images` is given as well.", "Give one of the two.")
    for name, held_out in (
        ("eval_prompts_file", evaluation.eval_prompts_file),
        ("eval_target_images_dir", evaluation.eval_target_images_dir),
        ("eval_pairs", evaluation.eval_pairs),
    ):
        if held_out is not None and evaluation.eval_images is not None:
            yield Issue(
                (f"evaluation.{name}", "evaluation.eval_images"),
                "`eval_images` is given as well.",
                "Give one of the two.",
            )
        if held_out is not None and data.validation and name != "eval_pairs":
            yield _split_and_given(f"evaluation.{name}")
    if evaluation.eval_images is not None and data.validation:
        yield _split_and_given("evaluation.eval_images")
    yield from _captions(config)
    yield from _mixture(data.images)


def _captions(config: Config) -> Iterator[Issue]:
    data = config.data
    if config.model.component == "autoencoder":
        for name in ("trigger_word", "caption_dropout"):
            if getattr(data, name):
                yield Issue((f"data.{name}", "model.component"), "an autoencoder reads no captions.", "Remove it.")
    elif config.model.family == "vgt" and data.caption_dropout:
        yield Issue(("data.caption_dropout", "model.family"), "VGT has a key of its own.", "Use `vgt.caption_dropout`.")
    elif config.uses_reward() and data.caption_dropout:
        yield Issue(
            ("data.caption_dropout", "training.use_reward"), "rewards score what a caption asks for.", "Remove it."
        )
    word = data.trigger_word
    if word is not None and " ".join(word.split()) != word:
        yield Issue(("data.trigger_word",), "is one line, without white space around it.", "Take that out.")


def _split_and_given(key: str) -> Issue:
    return Issue(
        ("data.validation", key), f"`{key}` names what is held out.", "Set `data.validation` to 0, or remove the other."
    )


def _training(config: Config) -> Iterator[Issue]:
    """Trainings that do not read sets of pictures."""
    if config.training.method != "finetune":
        yield Issue(
            ("data.images", "training.method"),
            f"`{config.training.method}` does not read sets of pictures.",
            "Set `training.method: finetune`, or give "
            + ("`data.pairs`." if config.training.method == "dpo" else "`data.prompts_file`."),
        )


def _mixture(sets: Sequence[ImageSetConfig]) -> Iterator[Issue]:
    """Weights are for all sets or for none, and say how often each comes."""
    weights = [one.weight for one in sets]
    if any(weights) and not all(weights):
        silent = weights.index(None)
        yield Issue(
            ("data.images",),
            f"{sum(weight is not None for weight in weights)} of {len(weights)} sets have a weight, and "
            f"{sets[silent].path} has none.",
            "Give all of them one, or none.",
        )
    if any(weights) and any(one.repeats > 1 for one in sets):
        yield Issue(
            ("data.images",),
            "with weights, how often a set comes is its weight alone, and `repeats` does nothing.",
            "Give weights or repeats.",
        )


def _without_images(config: Config) -> Iterator[Issue]:
    data, plain = config.data, type(config.data)()
    for name in ("crop", "min_side", "max_aspect", "index_dir", "trigger_word", "caption_dropout"):
        if getattr(data, name) != getattr(plain, name):
            yield Issue((f"data.{name}", "data.images"), "for `data.images` only.", "Remove it.")
    if data.validation:
        yield Issue(("data.validation", "data.images"), "for `data.images` only.", "Remove it.")
    if config.evaluation.eval_images is not None:
        yield Issue(("evaluation.eval_images", "data.images"), "for `data.images` only.", "Remove it.")
