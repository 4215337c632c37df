"""Which files a configuration needs from elsewhere, and when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.config import Config
from glm_training.engine.families import model_files
from glm_training.engine.fetching import fetch_datasets, scorer_files, scorers_to_fetch
from glm_training.utils.hub_files import PipelineParts, model_folder
from tests import dmdr_runs
from tests.config.building import build
from tests.runs import config_of

CLIP, HPS = "openai/clip-vit-large-patch14", "xswu/HPSv2"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub._hub_dir", None, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def names(config: Config) -> list[str]:
    return [each.name for each in scorer_files(config)]


def test_metrics_that_train_and_that_watch_are_fetched_once(tmp_path: Path) -> None:
    keys = ["reward.metrics={aesthetic: 1.0, structure: 1.0}", "evaluation.enabled=true"]
    keys += ["reward.monitors.metrics=[hps_v2, clip_score]"]
    found = names(config_of(tmp_path, *keys))
    assert sorted(found) == sorted(["sac+logos+ava1-l14-linearMSE.pth", CLIP, HPS, CLIP, CLIP])


def test_the_metrics_of_one_half_count_too(tmp_path: Path) -> None:
    assert names(config_of(tmp_path, "reward.ar.weights={clip_score: 1.0}")) == [CLIP, CLIP]


@pytest.mark.parametrize(
    "keys",
    [
        ["training.use_reward=false", "reward.metrics=null", "evaluation.enabled=true"],  # nobody named one
        ["training.use_reward=false", "reward.metrics={aesthetic: 1.0}", "evaluation.enabled=false"],  # nothing scores
        ["reward.calculator=tests/rewards/own.py:Own", "reward.metrics=null"],
    ],
)
def test_what_nothing_scores_by_is_not_fetched(tmp_path: Path, keys: list[str]) -> None:
    assert names(config_of(tmp_path, *keys)) == []


def test_the_scorers_of_a_distillation_are_fetched_where_they_count(tmp_path: Path) -> None:
    assert names(dmdr_runs.config_of(tmp_path)) == []
    assert names(dmdr_runs.config_of(tmp_path, "dmdr.cold_start_steps=2")) == ["apple/DFN5B-CLIP-ViT-H-14", HPS]


def test_nothing_is_asked_for_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented = "reward.metrics={lpips: 1.0}"
    assert scorers_to_fetch(config_of(tmp_path, documented)) == []  # the suite runs with HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert len(scorers_to_fetch(config_of(tmp_path, documented))) == 1
    assert scorers_to_fetch(config_of(tmp_path, documented, "model.local_files_only=true")) == []


def test_the_model_is_its_pipelines_parts_with_what_is_given_beside_it() -> None:
    (glm,) = model_files(build(model={"revision": "v2"}))
    assert (glm.repository, glm.needed_by, glm.revision) == ("zai-org/GLM-Image", "model.name", "v2")
    assert isinstance(glm.choose, PipelineParts) and "vision_language_encoder" in glm.choose.parts
    model = {"family": "sdxl", "taesd": "madebyollin/taesdxl", "torch_dtype": "float16"}
    sdxl, taesd = model_files(build(model=model, training={"method": "dpo"}, data={"pairs": "p"}))
    assert sdxl.repository == "stabilityai/stable-diffusion-xl-base-1.0" and sdxl.choose.half
    assert (taesd.repository, taesd.needed_by, taesd.revision) == ("madebyollin/taesdxl", "model.taesd", None)
    vgt = {"model": {"family": "vgt"}, "vgt": {"repa": {"model": "owner/encoder"}}, "data": {"images": "t"}}
    language_model = ("OpenGVLab/InternVL3-1B-hf", model_folder)
    generator = [(each.repository, each.choose) for each in model_files(build(**vgt))]
    assert generator == [language_model, ("owner/encoder", model_folder)]
    vgt = {"model": {"family": "vgt", "component": "autoencoder"}, "vgt": {"decoder": "owner/decoder"}}
    autoencoder = [(each.repository, each.choose) for each in model_files(build(**vgt, data={"images": "t"}))]
    assert autoencoder == [language_model, ("owner/decoder", model_folder)]


@pytest.mark.parametrize("name", ["tiny", "tiny-random"])
def test_a_model_of_the_package_needs_nothing(name: str) -> None:
    assert model_files(build(model={"name": name})) == []


def test_datasets_by_id_are_fetched_and_those_that_cannot_be_had_told(tmp_path: Path, monkeypatch) -> None:
    """Asked of the library that the run asks; the hub itself is not there."""
    datasets = pytest.importorskip("datasets", reason="the extra datasets")
    asked: list[tuple[str, str]] = []

    def load(name: str, *, split: str, **_: object) -> object:
        asked.append((name, split))
        if name == "owner/gone":
            raise datasets.exceptions.DatasetNotFoundError("not on the Hub")
        return datasets.Dataset.from_dict({"image": ["a.png"], "text": ["a dot"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    here = tmp_path / "owner/here"
    here.mkdir(parents=True)
    sets = [{"path": "owner/some", "split": "test"}, {"path": "owner/gone"}, {"path": str(here)}]
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "runs")
    told: list[str] = []
    problems = fetch_datasets(build(data={"images": sets}), told.append)
    assert asked == [("owner/some", "test"), ("owner/gone", "train")]
    assert told == [f"fetching the dataset owner/{name}" for name in ("some", "gone")]
    assert len(problems) == 1 and "owner/gone: there is no such file or folder, nor could it be had" in problems[0]
