"""Where VGT's models come from, and what is refused before their weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from glm_training.models.loading import ModelLoadError
from glm_training.models.vgt.autoencoder import Autoencoder
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.loading import (
    Hub,
    Models,
    PromptReader,
    Source,
    check_source,
    fetch_small_files,
    load_models,
)
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder
from glm_training.models.vgt.tiny_generator import TINY_WORDS, tiny_random_generator, tiny_tokenizer
from tests.models.vgt.test_published import TEXT, VISION, saved_dc_ae
from tests.same import assert_identical

AUTOENCODER, GENERATOR = Source("autoencoder"), Source("generator")


def loaded(name: object, source: Source | None = None, **options) -> VGT:
    return VGT.load(str(name), source=source, **options)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "vgt"
    VGT(Models(tiny_random_autoencoder(3), generator=tiny_random_generator(seed=4))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "vgt"
    VGT(Models(tiny_random_autoencoder(3))).save_pretrained(folder)
    return folder


def test_a_saved_folder_loads_again(whole, alone):
    both = loaded(whole)
    assert both.components == ("autoencoder", "generator") and both.own_size() == 32
    assert_identical(weights(both.autoencoder), weights(tiny_random_autoencoder(3)))
    assert_identical(weights(both.generator), weights(tiny_random_generator(seed=4)))
    assert json.loads((whole / "model_index.json").read_text())["_class_name"] == "VGT"
    assert loaded(alone).components == ("autoencoder",)
    assert loaded(alone / "autoencoder" / "..").components == ("autoencoder",)


def test_a_generator_goes_on_with_its_own_autoencoder(whole):
    family = loaded(whole, Source("generator", order="raster"))
    assert_identical(weights(family.autoencoder), weights(tiny_random_autoencoder(3)))
    assert family.generator.config.order == "raster"


def test_a_new_generator_fits_the_autoencoder_it_is_given(alone):
    family = loaded("tiny-random", Source("generator", autoencoder=str(alone)), seed=5)
    config = family.generator.config
    assert (config.latent_channels, config.latent_norm, config.grid) == (4, True, (4, 4))
    tiny = loaded("tiny", Source("generator", autoencoder=str(alone)))
    assert len(tiny.generator.tokenizer("a red circle left of").input_ids) <= 5, "words of its world are few tokens"


def test_weights_are_cast_and_trained_ones_are_not_lost(whole, alone):
    for name, source in ((whole, None), (alone, None), ("tiny-random", Source("generator", autoencoder=str(alone)))):
        half = loaded(name, source, dtype=torch.bfloat16).autoencoder
        assert half.down_mlp[1].weight.dtype == torch.bfloat16
        # else a picture would be another one in half precision
        assert torch.equal(half.tower.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    family = loaded(whole, dtype=torch.bfloat16)
    assert family.generator.queries.dtype == torch.bfloat16
    assert family.generator.llm.rotary_emb.inv_freq.dtype == torch.float32, "positions stay exact"


def test_what_is_trained_is_loaded_as_it_was_saved(whole, alone):
    """What the run before left is fp32, whatever the frozen half and the teacher are loaded in."""
    trained = loaded(alone, AUTOENCODER, dtype=torch.bfloat16)
    assert_identical(weights(trained.autoencoder), weights(tiny_random_autoencoder(3)))
    fresh = loaded("tiny-random", AUTOENCODER, dtype=torch.bfloat16, seed=3)
    assert_identical(weights(fresh.autoencoder), weights(tiny_random_autoencoder(3)))
    assert {param.dtype for param in fresh.teacher.parameters()} == {torch.bfloat16}
    family = loaded(whole, GENERATOR, dtype=torch.bfloat16)
    assert_identical(weights(family.generator), weights(tiny_random_generator(seed=4)))
    assert {param.dtype for param in family.autoencoder.parameters()} == {torch.bfloat16}


def test_a_vision_language_model_gives_both(tmp_path):
    """The folder of an InternVL and of a DC-AE: an autoencoder to train, and a language model for the generator."""
    saved_dc_ae(tmp_path / "dc_ae")
    tokenizer = tiny_tokenizer()
    text = {"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)}
    config = InternVLConfig(vision_config=VISION, text_config=text, image_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "vl")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())).save_pretrained(
        tmp_path / "vl"
    )
    source = Source("autoencoder", decoder=str(tmp_path / "dc_ae"))
    family = loaded(tmp_path / "vl", source)
    tower = {name: value for name, value in weights(model.model.vision_tower).items()}
    assert_identical({name: weights(family.autoencoder.tower.encoder)[name] for name in tower}, tower)
    assert_identical(weights(family.teacher.tower), weights(family.autoencoder.tower))
    family.save_pretrained(tmp_path / "ae")
    generator = loaded(tmp_path / "vl", Source("generator", autoencoder=str(tmp_path / "ae"))).generator
    llm = weights(model.model.language_model)
    assert_identical({name: weights(generator.llm)[name] for name in llm}, llm)
    assert PromptReader.load(str(tmp_path / "vl")) is not None


def test_a_teacher_goes_from_stage_to_stage(tmp_path):
    models = load_models("tiny-random", AUTOENCODER, dtype=torch.float32, hub=None, seed=1)
    with torch.no_grad():
        models.autoencoder.tower.encoder.embeddings.cls_token.add_(1)
    VGT(models).save_pretrained(tmp_path / "one")
    second = loaded(tmp_path / "one", Source("autoencoder", channel_norm=True))
    assert second.autoencoder.config.channel_norm
    assert_identical(weights(second.teacher), weights(models.teacher))
    assert not torch.equal(
        second.teacher.tower.encoder.embeddings.cls_token, second.autoencoder.tower.encoder.embeddings.cls_token
    )


# -- what is refused, before weights are read --------------------------------------------------------------------------


def refused(name: object, source: Source) -> str:
    with pytest.raises(ModelLoadError) as told:
        check_source(str(name), source)
    return str(told.value)


def test_an_autoencoder_of_another_latent_size_is_named(whole, tmp_path):
    config = json.loads((whole / "generator" / "config.json").read_text())
    other = tmp_path / "other"
    VGT.load(whole).save_pretrained(other)
    (other / "generator" / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    assert "the autoencoder's latents have 4 channels and the generator draws 8" in refused(other, GENERATOR)


def test_an_autoencoder_of_another_stride_is_named(whole, alone, tmp_path):
    """Its latents have the same channels, and stand for other places."""
    family = loaded("tiny-random", Source("generator", autoencoder=str(alone), size=(32, 32)))
    assert family.generator.config.stride == 8
    family.save_pretrained(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "autoencoder")
    shutil.copytree(alone / "autoencoder", tmp_path / "moved")
    check_source(str(tmp_path / "one"), Source("generator", autoencoder=str(tmp_path / "moved")))
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["tower_config"]["patch_size"] = [2, 2]
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    told = refused(tmp_path / "one", Source("generator", autoencoder=str(tmp_path / "moved")))
    assert (
        "each of the autoencoder's latents stands for 4 px along a side, and the generator draws one for 8 px" in told
    )


def test_a_generator_whose_autoencoder_is_gone_says_so(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "vgt")
    (tmp_path / "vgt" / "autoencoder").rename(tmp_path / "moved")
    told = refused(tmp_path / "vgt", GENERATOR)
    assert f"put that back as {tmp_path / 'vgt'}/autoencoder, or name it under vgt.autoencoder" in told
    check_source(str(tmp_path / "vgt"), Source("generator", autoencoder=str(tmp_path / "moved")))
    with pytest.raises(ModelLoadError, match="has a generator and not the autoencoder that it draws for") as drawing:
        VGT.load(tmp_path / "vgt")
    assert "vgt.autoencoder" not in str(drawing.value)


def test_pictures_of_more_latents_than_there_are_queries_are_refused(whole, alone, tmp_path):
    """8 x 8 of them in the folder, 64 x 64 in a new one; one in memory is made large enough."""
    assert "neither side may be above 64 px" in refused(whole, Source("generator", size=(32, 96)))
    check_source(str(whole), Source("generator", size=(64, 64)))
    (tmp_path / "vl").mkdir()
    source = Source("generator", autoencoder=str(alone), size=(544, 32))
    assert "neither side may be above 512 px" in refused(tmp_path / "vl", source)
    check_source("tiny-random", source)
    assert loaded("tiny-random", source).generator.grids((68, 4))[0].shape == (1, 272, 32)


def test_an_autoencoder_that_does_not_tell_its_norm_is_named(alone, tmp_path):
    folder = tmp_path / "ae"
    VGT.load(alone).save_pretrained(folder)
    path = folder / "autoencoder" / "config.json"
    config = json.loads(path.read_text())
    del config["channel_norm"]
    path.write_text(json.dumps(config))
    told = refused("tiny", Source("generator", autoencoder=str(folder)))
    assert '"channel_norm": true for weights of stage 2' in told and str(path) in told


def test_what_goes_to_the_wrong_key_is_named(whole, alone):
    assert "remove vgt.autoencoder" in refused(whole, Source("generator", autoencoder=str(alone)))
    assert "name it under vgt.autoencoder" in refused(alone, GENERATOR)
    assert "has a generator, whose latents" in refused(whole, AUTOENCODER)


def test_a_folder_without_its_teacher_cannot_be_distilled_from(alone):
    assert "vgt.distillation_weight" in refused(alone, Source("autoencoder", distils=True))
    check_source(str(alone), AUTOENCODER)


def test_prompts_are_read_by_the_generators_own_tokenizer(whole, alone):
    reader = PromptReader.load(str(whole))
    (short, long) = reader.read(["a dog", "word " * 400], 32, 32, "t2i")
    assert short.cut is None and "more than" in long.cut
    assert PromptReader.load(str(alone)) is None
    assert PromptReader.load("tiny").tokenizer("circle").input_ids == tiny_tokenizer(TINY_WORDS)("circle").input_ids


def test_the_folder_of_a_bare_autoencoder_is_taken_too(tmp_path):
    tiny_random_autoencoder(6).save_pretrained(tmp_path / "bare")
    family = loaded("tiny-random", Source("generator", autoencoder=str(tmp_path / "bare")))
    assert_identical(weights(family.autoencoder), weights(Autoencoder.from_pretrained(tmp_path / "bare")))


def test_a_generator_without_an_autoencoder_is_told_what_it_needs(tmp_path):
    (tmp_path / "vl").mkdir()
    for name in ("OpenGVLab/InternVL3-1B-hf", str(tmp_path / "vl")):
        assert "under vgt.autoencoder" in refused(name, GENERATOR)
    assert "vgt.autoencoder" in refused("tiny", Source("generator", autoencoder=str(tmp_path / "vl")))


@pytest.mark.parametrize("name", ["tiny", "tiny-random"])
def test_pictures_that_are_no_whole_number_of_latents_are_refused(name, alone, tmp_path):
    """8 px make a latent of the small models, 28 px of the published ones."""
    for source in (Source("autoencoder", size=(64, 36)), Source("generator", autoencoder=str(alone), size=(36, 64))):
        assert "multiples of 8 px" in refused(name, source)
        check_source(name, Source(**{**vars(source), "size": (64, 96)}))
    config = InternVLConfig(
        vision_config={**VISION, "patch_size": [14, 14]}, text_config={"model_type": "qwen2", **TEXT}
    )
    config.save_pretrained(tmp_path / "vl")
    assert "multiples of 28 px" in refused(tmp_path / "vl", Source("autoencoder", size=(512, 512)))
    check_source(str(tmp_path / "vl"), Source("autoencoder", size=(448, 448)))


def test_both_random_models_fit_each_other():
    family = loaded("tiny-random", seed=2)
    assert family.components == ("autoencoder", "generator")
    assert_identical(weights(family.autoencoder), weights(tiny_random_autoencoder(2)))


# -- typical wrong moves -----------------------------------------------------------------------------------------------


def run_of(folder: Path, family: VGT) -> Path:
    """A run's folder with one checkpoint, at step 300."""
    checkpoints = folder / "checkpoints"
    family.save_pretrained(checkpoints / "step-000300" / "pipeline")
    (checkpoints / "latest").write_text("step-000300\n")
    return folder


@pytest.mark.parametrize("source", [AUTOENCODER, Source("autoencoder", distils=True), GENERATOR])
def test_a_checkpoint_that_was_never_written_is_named(alone, tmp_path, source):
    """An earlier stage that has not been, and one that was shorter than the file of the next one says."""
    absent = f"{tmp_path}/none/checkpoints/step-000600"
    assert f"model.name {absent}: there is no such file or folder" in refused(absent, source)
    run = run_of(tmp_path / "run", VGT.load(alone))
    told = refused(run / "checkpoints" / "step-000600", source)
    assert told.endswith(f"the newest checkpoint beside it is {run}/checkpoints/step-000300")


def test_an_autoencoder_that_is_not_there_is_told_before_the_hub_is_asked():
    wanted = Source("generator", autoencoder="ckpts/vgt_ae.pth")
    with pytest.raises(ModelLoadError, match=r"vgt.autoencoder ckpts/vgt_ae.pth: there is no such file"):
        fetch_small_files("OpenGVLab/InternVL3-1B-hf", wanted, hub=Hub(None, True))


def test_the_pointer_of_a_run_is_no_checkpoint(alone, tmp_path):
    run = run_of(tmp_path / "run", VGT.load(alone))
    latest = f"{run}/checkpoints/latest"
    told = refused("tiny-random", Source("generator", autoencoder=latest))
    assert f"vgt.autoencoder {latest}" in told and told.count(f"{run}/checkpoints/step-000300") == 1


def test_a_file_that_is_not_the_published_one_is_named(tmp_path):
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}}, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    for key, source in (("other", "down_mlp.*, decoder.*, but visual.proj"), ("page", "is no file of weights")):
        path = str(tmp_path / f"{key}.pth")
        assert source in refused("tiny-random", Source("generator", autoencoder=path, size=(64, 64)))
        assert source in refused(path, AUTOENCODER)


def test_the_untrained_autoencoder_of_tiny_is_not_drawn_for():
    for name, source in (("tiny", GENERATOR), ("tiny-random", Source("generator", autoencoder="tiny"))):
        assert "vgt_tiny_ae_stage1.yaml" in refused(name, source)
    check_source("tiny", AUTOENCODER)
