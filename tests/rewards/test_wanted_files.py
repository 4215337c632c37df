"""What each metric says that it needs from elsewhere, which files of a repository that is, and how they come."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glm_training.rewards import RewardCalculator, RewardOptions
from glm_training.rewards.options import (
    AestheticOptions,
    ClipScoreOptions,
    HpsV2Options,
    LpipsOptions,
    TextAccuracyOptions,
)
from glm_training.utils.downloads import AddressFile, DownloadError
from glm_training.utils.hub_files import (
    Exactly,
    HubFiles,
    PipelineParts,
    fetch_missing,
    hub_id,
    model_folder,
    tokenizer_files,
    transformers_weights,
)
from tests.file_server import FileServer, serving

CLIP = "openai/clip-vit-large-patch14"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub._hub_dir", None, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def wanted(name: str, **options: object) -> list:
    return RewardCalculator({name: 1.0}, options=RewardOptions(**options)).wanted()


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_lpips_wants_the_alexnet_whose_hash_is_in_its_name(tmp_path: Path) -> None:
    (file,) = wanted("lpips")
    place = tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    url = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    assert file == AddressFile("lpips", url, place, "7be5be79")
    assert wanted("lpips", lpips=LpipsOptions("somewhere.pth")) == []


def test_aesthetic_wants_its_predictor_and_clip(tmp_path: Path) -> None:
    predictor, clip = wanted("aesthetic")
    assert predictor.path.name == "sac+logos+ava1-l14-linearMSE.pth" and len(predictor.sha256) == 64
    assert (clip.repository, clip.choose) == (CLIP, transformers_weights)
    (tmp_path / "clip").mkdir()
    given = AestheticOptions(clip_name=str(tmp_path / "clip"), mlp_weights=tmp_path / "mlp.pth")
    assert wanted("aesthetic", aesthetic=given) == []


def test_scorers_on_clip_want_model_and_tokenizer() -> None:
    assert [(file.repository, file.choose) for file in wanted("clip_score")] == [
        (CLIP, transformers_weights),
        (CLIP, tokenizer_files),
    ]
    assert [file.repository for file in wanted("pick_score")] == [
        "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ]
    assert wanted("clip_score", clip_score=ClipScoreOptions("./no/such/folder")) == []


def test_hps_wants_one_file() -> None:
    (file,) = wanted("hps_v2")
    assert (file.repository, file.choose) == ("xswu/HPSv2", Exactly(("HPS_v2.1_compressed.pt",)))
    assert wanted("hps_v2", hps_v2=HpsV2Options(weights="hps.pt")) == []


def test_text_accuracy_wants_the_languages_that_do_not_come_with_rapidocr(tmp_path: Path) -> None:
    options = TextAccuracyOptions(languages=("ch", "ru", "ko", "no-such"), model_files=(("ko", tmp_path / "ko.onnx"),))
    (file,) = wanted("text_accuracy", text_accuracy=options)
    assert file.path.name == "eslav_PP-OCRv5_rec_mobile.onnx" and len(file.sha256) == 64
    assert wanted("text_accuracy") == wanted("structure") == []


def test_a_class_of_ones_own_wants_nothing() -> None:
    class Own(RewardCalculator):
        def compute_reward(self, generated_image, target_image, prompt):  # type: ignore[no-untyped-def]
            return 0.0

    assert Own({"lpips": 1.0}).wanted() == []


@pytest.mark.parametrize(
    ("name", "found"), [("owner/name", True), ("./owner", False), ("a/b/c", False), ("~/x", False), ("tiny", False)]
)
def test_a_hub_id_is_told_from_a_path(name: str, found: bool) -> None:
    assert (hub_id(name) == name) == found


# -- which files of a repository ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"],
            ["config.json", "model.safetensors"],
        ),
        (["config.json", "pytorch_model.bin", "flax_model.msgpack"], ["config.json", "pytorch_model.bin"]),
        (["model.safetensors"], []),
        (["config.json"], []),
        (
            ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
            + ["model-00002-of-00002.safetensors"],
            ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
            + ["model-00002-of-00002.safetensors"],
        ),
        (["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"], []),
    ],
)
def test_weights_are_taken_once_and_whole(names: list[str], chosen: list[str]) -> None:
    assert transformers_weights(names) == chosen


def test_a_tokenizer_is_its_small_files() -> None:
    names = ["merges.txt", "vocab.json", "config.json", "model.safetensors.index.json", "sub/vocab.json", "model.bin"]
    assert tokenizer_files(names) == ["config.json", "merges.txt", "vocab.json"]
    assert tokenizer_files(["config.json"]) == []


SDXL = [
    "model_index.json", "README.md", "sd_xl_base_1.0.safetensors",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_flax_model.msgpack", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
]  # fmt: skip


@pytest.mark.parametrize(("half", "unet"), [(True, "diffusion_pytorch_model.fp16"), (False, "diffusion_pytorch_model")])
def test_a_pipeline_is_its_parts_in_one_variant(half: bool, unet: str) -> None:
    chosen = PipelineParts(("unet", "vae", "scheduler"), half)(SDXL)
    assert chosen == sorted(
        ["model_index.json", "unet/config.json", f"unet/{unet}.safetensors", "vae/config.json"]
        + ["vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
    )


@pytest.mark.parametrize("lacking", ["vae/diffusion_pytorch_model.safetensors", "model_index.json", "scheduler/"])
def test_a_pipeline_that_is_not_whole_is_none(lacking: str) -> None:
    names = [name for name in SDXL if not name.startswith(lacking)]
    assert PipelineParts(("unet", "vae", "scheduler"), False)(names) == []


def test_a_model_folder_has_all_its_shards() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "x.png"]
    assert model_folder(names) == names[:3] and model_folder(names[:2]) == []


# -- from a hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    folder = tmp_path / "served" / "hub" / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"a": 1}))
    torch.save(torch.arange(2_500_000), folder / "model.pt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(tmp_path / "served") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


FILES = HubFiles("hps_v2", "owner/name", Exactly(("config.json", "model.pt")))


def cached(tmp_path: Path) -> dict[str, bytes]:
    (snapshot,) = (tmp_path / "cache" / "models--owner--name" / "snapshots").iterdir()
    return {path.name: path.read_bytes() for path in snapshot.iterdir()}


def served(hub: FileServer) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (hub.root / "hub/owner/name").iterdir()}


def test_hub_files_come_into_the_cache_once(hub: FileServer, tmp_path: Path) -> None:
    told: list[str] = []
    assert not FILES.here() and FILES.remaining() == sum(map(len, served(hub).values()))
    assert fetch_missing([FILES, FILES], told.append) == []
    assert told == [f"fetching owner/name, 20 MB, for hps_v2, from {hub.address}"]
    assert cached(tmp_path) == served(hub) and FILES.here() and FILES.remaining() == 0
    assert len(hub.bodies("model.pt")) == 1
    assert fetch_missing([FILES], told.append) == [] and len(told) == 1


def test_a_broken_hub_download_is_taken_up_where_it_ended(hub: FileServer, tmp_path: Path) -> None:
    hub.breaks_after = 12_000_000
    FILES.fetch()
    assert cached(tmp_path) == served(hub)
    first, second = hub.bodies("model.pt")
    assert first is None and second is not None and int(second.removeprefix("bytes=").strip("-")) > 10_000_000


def test_a_damaged_hub_file_comes_anew(hub: FileServer, tmp_path: Path) -> None:
    hub.damages = True
    FILES.fetch()
    assert cached(tmp_path) == served(hub) and len(hub.bodies("model.pt")) == 2


def test_what_the_hub_does_not_have_is_a_line_each(hub: FileServer) -> None:
    absent = HubFiles("clip_score", "owner/absent", transformers_weights)
    lacking = HubFiles("aesthetic", "owner/name", transformers_weights)
    problems = fetch_missing([absent, lacking, FILES], lambda line: None)
    assert len(problems) == 2 and FILES.here()
    assert problems[0].startswith(f"clip_score: owner/absent cannot be had from {hub.address} (")
    assert problems[1] == "aesthetic: owner/name on the hub lacks files that are needed of it"


def test_a_hub_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="hps_v2: owner/name cannot be had from http://127.0.0.1:9 .*refused"):
        FILES.fetch()


def test_a_disk_that_fills_up_is_not_told_as_the_hub(hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(DownloadError, match="hps_v2: .*cache cannot be written .*No space left"):
        FILES.fetch()
