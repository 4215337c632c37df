"""Images and prompts encoded once: the same training as without a cache, and what happens when the cache is hurt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from glm_training.data.examples import View
from glm_training.data.problems import DataError
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.encoding.cache import EncodedCache
from glm_training.engine.encoding.encoder import FrozenEncoder
from glm_training.engine.errors import TrainingError
from glm_training.models.sdxl.family import SDXL
from glm_training.preference.encoded_pairs import PairEncoder
from tests.preference_runs import stepped, trainer_of, write_pairs
from tests.runs import weights_of

FAMILIES = ["sdxl", "glm_image"]
UNCACHED = ["dpo.cache=false", "dpo.cache_dir=null"]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.safetensors"))


def largest_difference(left, right) -> float:
    a, b = weights_of(left), weights_of(right)
    return max((a[part][name] - b[part][name]).abs().max().item() for part in a for name in a[part])


@pytest.fixture
def no_encoding(monkeypatch):
    """From here on, an image or a prompt that is encoded is an error."""

    def start(encoder: PairEncoder) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("encoded")

        for name in ("picture", "text"):
            monkeypatch.setattr(type(encoder.encoding.encoder), name, refuse)

    return start


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_changes_nothing_and_is_filled_once(tmp_path, family, no_encoding) -> None:
    cached = stepped(tmp_path, family)
    plain = stepped(tmp_path, family, *UNCACHED)
    start = trainer_of(tmp_path, family)
    assert largest_difference(cached, start) > 1e-4, "nothing was learnt"
    assert largest_difference(cached, plain) == 0
    assert len(files(tmp_path)) == (12 if family == "sdxl" else 10), "8 images; 4 prompts, or CAFE and no quoted word"
    again = trainer_of(tmp_path, family)
    no_encoding(again.encoder)
    again.prepare()
    assert again.dataset.batch([0]).images is None, "pixels are not decoded any more"
    again.training_step()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_latents_depend_on_is_in_their_names(tmp_path, family) -> None:
    stepped(tmp_path, family, steps=0)
    before = len(files(tmp_path))
    others = ["data.image_size.height=96", "model.torch_dtype=bfloat16", "seed=4"]  # the seed draws other weights
    for number, other in enumerate(others):
        stepped(tmp_path, family, other, steps=0)
        assert len(files(tmp_path)) >= before + 8 * (number + 1), f"{other}: entries of another encoder were taken"
    count = len(files(tmp_path))
    image = tmp_path / "pairs/images/0_preferred.png"
    image.rename(tmp_path / "pairs/images/renamed.png")
    listing = tmp_path / "pairs/metadata.jsonl"
    listing.write_text(listing.read_text().replace("0_preferred", "renamed"))
    stepped(tmp_path, family, steps=0)
    assert len(files(tmp_path)) == count, "a renamed image is the same image"


def test_the_name_of_an_entry_has_how_it_is_shown_and_the_encoder_that_made_it(tmp_path) -> None:
    encoding = stepped(tmp_path, "sdxl", steps=0).encoder.encoding
    view = View("abc", (64, 64))

    def names() -> tuple[str, str]:
        return encoding.picture_key(view), encoding.text_key("a cat")

    plain = names()
    for other in (View(view.digest, view.size, flipped=True), View(view.digest, (64, 96)), View("other", view.size)):
        assert encoding.picture_key(other) != plain[0]
    for place, kind in enumerate(("image", "text")):
        was = encoding._facts[kind]
        encoding._facts[kind] = "another encoder"
        changed = names()
        assert changed[place] != plain[place] and changed[1 - place] == plain[1 - place]
        encoding._facts[kind] = was
    assert names() == plain


def without_a_merge(unet) -> None:
    backend = json.loads(unet.tokenizer_2.backend_tokenizer.to_str())
    backend["model"]["merges"].pop()
    unet.tokenizer_2._tokenizer = type(unet.tokenizer_2.backend_tokenizer).from_str(json.dumps(backend))


SETTINGS = {
    "an activation": ("sdxl", "text", lambda f: setattr(f.unet.text_encoder.config, "hidden_act", "quick_gelu")),
    "the second encoder's": ("sdxl", "text", lambda f: setattr(f.unet.text_encoder_2.config, "layer_norm_eps", 1e-3)),
    "a merge": ("sdxl", "text", lambda f: without_a_merge(f.unet)),
    "the VAE's": ("sdxl", "image", lambda f: f.unet.vae.register_to_config(norm_num_groups=1)),
    "the vision tower's": (
        "glm_image", "image", lambda f: setattr(f.ar.model.model.visual.config, "hidden_act", "relu")
    ),
    "the text encoder's": ("glm_image", "text", lambda f: setattr(f.dit.text_encoder.config, "num_heads", 7)),
    "the quantizer's": (
        "glm_image", "image", lambda f: setattr(f.ar.model.model.vqmodel.config, "num_embeddings", 7)
    ),
}  # fmt: skip


def prints(encoder: FrozenEncoder) -> list[str]:
    return [encoder.fingerprint("image"), encoder.fingerprint("text")]


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_encoders_compute_is_in_their_fingerprint_and_where_they_came_from_is_not(tmp_path, setting) -> None:
    family, kind, change = SETTINGS[setting]
    encoder, again = (trainer_of(tmp_path, family).encoder.encoding.encoder for _ in range(2))
    assert prints(encoder) == prints(again)
    model = again.unet if family == "sdxl" else again.family
    for module in again.sleepers(pictures=True):
        for part in module.modules():
            if hasattr(getattr(part, "config", None), "_name_or_path"):
                part.config._name_or_path = "/elsewhere"
    again.text(again.texts(["a cat"])[0])  # sets how its tokenizers pad
    assert prints(encoder) == prints(again), "a path, or what a call left behind"
    change(SimpleNamespace(unet=model) if family == "sdxl" else model)
    assert encoder.fingerprint(kind) != again.fingerprint(kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_that_is_gone_or_damaged_in_training_is_made_anew(tmp_path, family) -> None:
    whole = stepped(tmp_path, family)
    trainer = trainer_of(tmp_path, family)
    entries = files(tmp_path)
    entries[0].unlink()
    trainer.prepare()
    for path in files(tmp_path)[1:]:
        path.write_bytes(path.read_bytes()[:-4] + b"ruin")
    entries[1].unlink(missing_ok=True)
    trainer.training_step()
    trainer.step += 1
    trainer.training_step()
    assert largest_difference(trainer, whole) == 0
    assert trainer.encoder.encoding.cache.get(files(tmp_path)[0].stem) is not None


def overwrite(path: Path) -> None:
    Image.new("RGB", (72, 64), "red").save(path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [[], UNCACHED], ids=["cached", "uncached"])
def test_an_image_that_changes_after_the_scan_does_not_pass_for_the_old_one(tmp_path, workers, cache) -> None:
    trainer = trainer_of(tmp_path, "sdxl", f"data.num_workers={workers}", *cache)
    trainer.dataset.image_digests()
    image = tmp_path / "pairs/images/0_preferred.png"
    overwrite(image)
    with pytest.raises(
        DataError, match="0_preferred.png: changed since the start of the run. Put .* or start a new run"
    ):
        trainer.prepare()
        trainer.encoder.encode(trainer.dataset.batch([0]))
    image.unlink()
    with pytest.raises(DataError, match="0_preferred.png: does not exist"):
        trainer.prepare()
        trainer.encoder.encode(trainer.dataset.batch([0]))


def test_an_image_that_changes_in_training_is_not_encoded_under_the_old_name(tmp_path) -> None:
    trainer = stepped(tmp_path, "sdxl", f"evaluation.eval_pairs={write_pairs(tmp_path / 'held_out', bright=True)}")
    for folder, dataset in (("pairs", trainer.dataset), ("held_out", trainer.dataset.held_out)):
        image = tmp_path / folder / "images/0_rejected.png"
        overwrite(image)
        trainer.encoder.encoding.cache = EncodedCache(tmp_path / "another")
        with pytest.raises(DataError, match=f"{folder}/images/0_rejected.png: changed since the start of the run"):
            trainer.encoder.encode(dataset.batch([0]))


def test_random_crops_are_encoded_at_every_step_and_prompts_once(tmp_path) -> None:
    trainer = stepped(tmp_path, "sdxl", "dpo.crop=random", "data.num_workers=0")
    assert len(files(tmp_path)) == 4 and trainer.dataset.decodes
    assert any("dpo.crop is random: pictures are encoded at every step" in note for note in trainer.notes)
    moved = trainer.encoder.encoding.encoder.sleepers(pictures=trainer.encoder.encoding.keeps_pictures)
    assert moved == [trainer.family.unet.text_encoder, trainer.family.unet.text_encoder_2]
    plain = stepped(tmp_path, "sdxl", "dpo.crop=random", *UNCACHED)
    assert largest_difference(trainer, plain) == 0


def test_a_cache_larger_than_the_disk_is_told_before_anything_is_encoded(tmp_path, monkeypatch) -> None:
    trainer = trainer_of(tmp_path, "sdxl")
    encoder = trainer.encoder.encoding.encoder
    view, text = View("a", (64, 64)), "a cat"
    stepped(tmp_path, "sdxl", steps=0)
    sizes = [path.stat().st_size for path in files(tmp_path)]
    wanted = sum(8 * [encoder.picture_bytes(*view.size)] + 4 * [encoder.text_bytes(text)])
    assert sum(sizes) <= wanted <= sum(sizes) + 12 * 300, "entries have a head of a few hundred bytes"
    for path in files(tmp_path):
        path.unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=wanted - 1))
    with pytest.raises(TrainingError, match="8 images take about 0.00 GiB and .* left: .*cache.dir.*cache.enabled"):
        trainer.prepare()
    assert not files(tmp_path)


def test_rows_are_those_of_their_pairs(tmp_path) -> None:
    trainer = stepped(tmp_path, "sdxl", steps=0)
    encoded = trainer.encoder.encode(trainer.dataset.batch([2, 0]))
    fresh = trainer_of(tmp_path, "sdxl").dataset.batch([2, 0])
    assert [pair.index for pair in encoded.pairs] == [2, 0]
    unet = trainer.family.unet
    torch.testing.assert_close(encoded.clean, unet.encode_images(fresh.images.pixels), atol=1e-5, rtol=1e-5)
    text = unet.encode_prompts(fresh.prompts * 2)
    torch.testing.assert_close(encoded.condition.text.prompt_embeds, text.prompt_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoded.condition.text.pooled, text.pooled, atol=1e-5, rtol=1e-5)
    assert encoded.condition.time_ids.tolist() == [[64, 72, 0, 4, 64, 64]] * 4


def test_tokens_and_conditions_are_each_images_own(tmp_path) -> None:
    trainer = stepped(tmp_path, "glm_image", steps=0)
    encoded = trainer.encoder.encode(trainer.dataset.batch([2, 0]))
    fresh = trainer_of(tmp_path, "glm_image").dataset.batch([2, 0])
    family = trainer.family
    prompt = family.ar.encode_prompts(fresh.prompts * 2, 64, 64)
    tokens = family.ar.targets(fresh.images.pixels, prompt)
    assert torch.equal(encoded.tokens, tokens) and torch.equal(encoded.prompt.input_ids, prompt.input_ids)
    assert torch.equal(encoded.condition.prior_tokens, tokens[:, prompt.preview_length :])
    assert encoded.condition.glyph_mask[0].sum() > encoded.condition.glyph_mask[1].sum(), "CAFE is written"
    torch.testing.assert_close(encoded.clean, family.dit.encode_images(fresh.images.pixels), atol=1e-5, rtol=1e-5)


def test_dropped_prompts_are_what_guidance_leads_away_from(tmp_path) -> None:
    drop = torch.tensor([False, True])
    trainer = stepped(tmp_path, "sdxl", "dpo.prompt_dropout=0.5", steps=0)
    text = trainer.encoder.encode(trainer.dataset.batch([0, 1]), drop).condition.text
    kept = trainer.encoder.encode(trainer.dataset.batch([0, 1])).condition.text
    for ours, whole in ((text.prompt_embeds, kept.prompt_embeds), (text.pooled, kept.pooled)):
        assert torch.equal(ours[[0, 2]], whole[[0, 2]]) and ours[[1, 3]].count_nonzero() == 0
    unet = trainer.family.unet
    unet.force_zeros_for_empty_prompt = False
    trainer.encoder.fill([trainer.dataset], trainer.console, lambda: None)
    empty = trainer.encoder.encode(trainer.dataset.batch([0, 1]), drop).condition.text
    torch.testing.assert_close(empty.pooled[[1, 3]], unet.encode_prompts(["", ""]).pooled)
    glm = stepped(tmp_path, "glm_image", steps=0)
    condition = glm.encoder.encode(glm.dataset.batch([0, 1]), drop).condition
    assert condition.dropped.tolist() == [False, True, False, True]


def test_encoders_sleep_while_it_trains(tmp_path, monkeypatch) -> None:
    """Devices stand in for each other: this machine has a CPU alone."""
    moves: list[tuple[int, str]] = []
    trainer = trainer_of(tmp_path, "sdxl", "training.max_steps=3", "logging.log_images=true")
    asleep_now = lambda self: len(self.encoder.sleepers(pictures=self.keeps_pictures))  # noqa: E731
    monkeypatch.setattr(Encoding, "_move", lambda self, device: moves.append((asleep_now(self), str(device))))
    trainer.train()
    asleep = [number for number, _ in moves]
    assert asleep == [3] * 5, "asleep after encoding, awake for the samples before the first step and after the last"
    assert isinstance(trainer.family, SDXL) and trainer.encoder.encoding._asleep
    half = stepped(tmp_path, "glm_image", "model.component=dit", steps=0).encoder
    asleep = half.encoding.encoder.sleepers(pictures=True)
    assert asleep == [half.family.ar, half.family.dit.vae, half.family.dit.text_encoder]
    assert half.encoding.encoder.sleepers(pictures=False) == [half.family.dit.text_encoder]


def test_a_stop_while_encoding_keeps_what_was_encoded(tmp_path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    trainer = trainer_of(tmp_path, "sdxl")
    with pytest.raises(Stop):
        trainer.encoder.fill([trainer.dataset], trainer.console, stop)
    assert len(files(tmp_path)) == 1 and not trainer.encoder.encoding._asleep
    stepped(tmp_path, "sdxl", steps=0)
    assert len(files(tmp_path)) == 12


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_an_entry_is_the_same_bytes_whatever_was_encoded_beside_it(tmp_path, family) -> None:
    """As a run that was stopped while it encoded, or found an entry damaged, goes on with those of one that was not."""
    whole = stepped(tmp_path, family, steps=0)
    bytes_of = {path.name: path.read_bytes() for path in files(tmp_path)}
    for path in files(tmp_path)[::2]:
        path.unlink()
    stepped(tmp_path, family, steps=0)
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == bytes_of
    for path in files(tmp_path)[1::2]:
        path.write_bytes(b"damaged")
    whole.encoder.encoding.cache = EncodedCache(tmp_path / "cache")
    whole.encoder.encode(whole.dataset.batch([0, 1, 2, 3]))
    assert {path.name: path.read_bytes() for path in files(tmp_path)} == bytes_of


def test_a_cache_that_cannot_be_made_is_explained(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cache.dir"):
        trainer_of(tmp_path, "sdxl", f"dpo.cache_dir={tmp_path}/file/cache")
