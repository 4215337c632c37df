"""`data.images` and what does not go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.config import Config, ConfigError, load_config, resolved_yaml
from glm_training.config.checks.captioned import captioned_issues

VGT = {"family": "vgt", "component": "autoencoder", "name": "tiny"}


def loaded(tmp_path: Path, text: str) -> Config:
    """The configuration of a file."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def issues(data: dict[str, object], evaluation: dict[str, object] | None = None) -> list[str]:
    config = Config.model_validate({"model": VGT, "data": data, "evaluation": evaluation or {}})
    return [f"{issue.paths[0]}: {issue.message}" for issue in captioned_issues(config)]


@pytest.mark.parametrize("images", ["a/b.tar", ["a/b.tar"], {"path": "a/b.tar"}, [{"path": "a/b.tar"}]])
def test_ways_to_write_a_set(images: object) -> None:
    config = Config.model_validate({"data": {"images": images}})
    assert config.data.images is not None
    (one,) = config.data.images
    assert (one.path, one.weight, one.repeats, one.cap_source, one.root) == (Path("a/b.tar"), None, 1, None, None)
    assert config.data.prompts_file is None and config.dataset_file() == Path("a/b.tar")


def test_several_sets_and_their_resolved_yaml(tmp_path: Path) -> None:
    sets = [{"path": "a", "weight": 2.0, "cap_source": "re_caption"}, {"path": "~/b", "weight": 1.0, "root": "/data"}]
    data, held_out = {"images": sets, "crop": "random"}, {"eval_images": "held"}
    config = Config.model_validate({"model": VGT, "data": data, "evaluation": held_out})
    assert config.data.images is not None
    assert [one.path for one in config.data.images] == [Path("a"), Path.home() / "b"]
    assert loaded(tmp_path, resolved_yaml(config)).data == config.data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "data.images: .* is not allowed"),
        ("7", "data.images: 7 is not allowed; allowed: path, list of paths"),
        ("[a, 7]", "Entry 2 is neither a path nor a mapping with the keys path, weight"),
        ("[{path: a, wieght: 1.0}]", "Entry 1 has the unknown key `wieght`: did you mean `weight`?"),
        ("[{weight: 1.0}]", "Entry 1, `path`: Field required"),
        ("[a, {path: b, repeats: 0}]", "Entry 2, `repeats`: Input should be greater than or equal to 1"),
        ("[{path: a, weight: .inf}]", "Entry 1, `weight`: "),
    ],
)
def test_entries_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        loaded(tmp_path, f"data:\n  images: {text}\n")


def test_own_pictures_are_finetuned_on_unless_something_else_is_asked_for(tmp_path: Path) -> None:
    config = loaded(tmp_path, "data: {images: a}")
    assert (config.training.use_reward, config.uses_reward(), config.uses_supervision()) == (False, False, True)
    for text, told in (
        ("training: {method: dmdr}", "data.images: `dmdr` does not read sets of pictures."),
        ("training: {method: dpo}", "data.images: `dpo` does not read sets of pictures."),
    ):
        with pytest.raises(ConfigError) as caught:
            loaded(tmp_path, f"data: {{images: a}}\n{text}\n")
        assert told in str(caught.value)


def test_some_pictures_are_held_out_unless_others_are_named() -> None:
    def share(model: dict[str, str] | None = None, **evaluation: str) -> float | None:
        sections = {"model": model or {}, "data": {"images": "a"}, "evaluation": evaluation}
        return Config.model_validate(sections).data.validation

    assert (share(), share(eval_images="b"), share(eval_prompts_file="b"), share(VGT)) == (0.05, 0, 0, 0)
    assert Config.model_validate({}).data.validation == 0
    assert issues({"images": "a", "validation": 0.1}) == []
    assert issues({"validation": 0.1}) == ["data.validation: for `data.images` only."]
    for key in ("eval_images", "eval_prompts_file"):
        told = [f"data.validation: `evaluation.{key}` names what is held out."]
        assert issues({"images": "a", "validation": 0.1}, {key: "b"}) == told


@pytest.mark.parametrize("key", ["prompts_file", "metadata_file", "pairs", "source_images_dir", "target_images_dir"])
def test_other_data_beside_it(key: str) -> None:
    assert issues({"images": "a", key: "b"}) == [f"data.{key}: `data.images` is given as well."]
    assert issues({"images": "a"}) == []


@pytest.mark.parametrize("key", ["eval_prompts_file", "eval_target_images_dir", "eval_pairs"])
def test_other_held_out_data(key: str) -> None:
    assert issues({"images": "a"}, {"eval_images": "b", key: "c"}) == [
        f"evaluation.{key}: `eval_images` is given as well."
    ]


def test_weights_are_for_all_or_for_none() -> None:
    sets = [{"path": "a", "weight": 1.0}, {"path": "b"}]
    assert issues({"images": sets}) == ["data.images: 1 of 2 sets have a weight, and b has none."]
    sets = [{"path": "a", "weight": 1.0, "repeats": 2}, {"path": "b", "weight": 1.0}]
    assert issues({"images": sets}) == [
        "data.images: with weights, how often a set comes is its weight alone, and `repeats` does nothing."
    ]


def test_keys_that_do_nothing_without_it() -> None:
    data = {"crop": "random", "min_side": 10, "max_aspect": 3.0, "index_dir": "x"}
    data |= {"trigger_word": "sks", "caption_dropout": 0.1}
    assert issues(data, {"eval_images": "b"}) == [
        *(f"data.{key}: for `data.images` only." for key in data), "evaluation.eval_images: for `data.images` only."
    ]  # fmt: skip


def test_captions_that_nobody_reads() -> None:
    assert issues({"images": "a", "trigger_word": "sks", "caption_dropout": 0.5}) == [
        "data.trigger_word: an autoencoder reads no captions.",
        "data.caption_dropout: an autoencoder reads no captions.",
    ]
    for model, told in (
        ({**VGT, "component": "generator"}, ["data.caption_dropout: VGT has a key of its own."]),
        ({}, []),
    ):
        config = Config.model_validate({"model": model, "data": {"images": "a", "caption_dropout": 0.5}})
        assert [f"{issue.paths[0]}: {issue.message}" for issue in captioned_issues(config)] == told
    rewarded = {"data": {"images": "a", "caption_dropout": 0.5}, "training": {"use_reward": True}}
    told = [issue.message for issue in captioned_issues(Config.model_validate(rewarded))]
    assert told == ["rewards score what a caption asks for."]
    config = Config.model_validate({"data": {"images": "a", "trigger_word": "sks "}})
    assert [issue.message for issue in captioned_issues(config)] == ["is one line, without white space around it."]


@pytest.mark.parametrize(("size", "least"), [(64, 63), (96, 80), (32, 31)])
def test_pictures_of_the_size_that_is_asked_for_are_large_enough(size: int, least: int) -> None:
    data = {"images": "a", "image_size": {"height": size, "width": 128}}
    assert Config.model_validate({"model": VGT, "data": data}).data.min_side == least
    assert Config.model_validate({"model": VGT, "data": data | {"min_side": 7}}).data.min_side == 7
    assert Config.model_validate({"data": {"image_size": {"height": size, "width": size}}}).data.min_side == 80
