"""GLMImage as a whole: where it comes from, what trains, and pictures that depend on their names alone."""

import pytest
import torch
from transformers import GlmImageForConditionalGeneration

from glm_training.models.family import Sampling
from glm_training.models.glm_image import loading
from glm_training.models.glm_image.family import GLMImage, ModelLoadError

SIZE = {"height": 64, "width": 96, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def family() -> GLMImage:
    return GLMImage.load("tiny-random")


# -- generation --------------------------------------------------------------------------------------------------------


def test_generate_is_prompt_major_and_independent_of_neighbours(family):
    prompts = ["a red circle", 'a sign "HI"']
    images = family.generate(prompts, **SIZE, seed=3, plans=2, renders=2)
    assert images.shape == (8, 3, 64, 96) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert len({image.sum().item() for image in images}) == 8
    alone = family.generate(prompts[1:], **SIZE, seed=3, plans=1, renders=2, prompt_ids=[1], micro_batch_size=1)
    torch.testing.assert_close(alone, images[4:6], atol=1e-5, rtol=0)
    again = family.generate(prompts, **SIZE, seed=3, plans=2, renders=2)
    assert torch.equal(images, again)
    assert not torch.equal(images, family.generate(prompts, **SIZE, seed=4, plans=2, renders=2))
    same_prompt = family.generate(["x", "x"], **SIZE, seed=3)
    assert (same_prompt[0] - same_prompt[1]).abs().max() > 1e-3


def test_render_noise_can_be_shared_between_plans(family, monkeypatch):
    seen = []
    sample = family.dit.sample

    def spy(noise, *args, **kwargs):
        seen.append(noise.reshape(2, 2, -1))
        return sample(noise, *args, **kwargs)

    monkeypatch.setattr(family.dit, "sample", spy)
    family.generate(["x"], **SIZE, seed=0, plans=2, renders=2, share_render_noise=True)
    family.generate(["x"], **SIZE, seed=0, plans=2, renders=2)
    shared, separate = seen
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0, 0], shared[0, 1])
    assert not torch.equal(separate[0], separate[1])


def test_generate_from_sources(family):
    sources = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    both = family.generate(["a", "b"], **SIZE, sources=sources, seed=0, plans=2)
    assert both.shape == (4, 3, 64, 96)
    alone = family.generate(["b"], **SIZE, sources=sources[1:], seed=0, plans=2, prompt_ids=[1])
    torch.testing.assert_close(alone, both[2:], atol=1e-5, rtol=0)
    swapped = family.generate(["a", "b"], **SIZE, sources=sources.flip(0), seed=0, plans=2)
    assert (swapped - both).abs().max() > 1e-4


def test_generate_leaves_the_global_generator_alone(family):
    state = torch.get_rng_state()
    family.generate(["x"], **SIZE, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_drawing_hands_on_all_that_it_is_asked(family, monkeypatch):
    given = []
    monkeypatch.setattr(family, "generate", lambda *arguments, **named: given.append((arguments, named)))
    sampling, sources, steps = Sampling(0.3, 0.4, False, 7, 2.5), torch.zeros(2, 3, 64, 64), []
    named = {"height": 64, "width": 96, "seed": 5, "prompt_ids": [8, 9], "micro_batch_size": 3, "vae_batch_size": 2}
    named["sources"] = sources
    family.draw(["a", "b"], sampling=sampling, samples=4, renders=3, on_step=steps.append, **named)
    ((prompts,), told) = given[0]
    assert prompts == ["a", "b"] and told.pop("on_step") == steps.append
    assert told.pop("sources") is named.pop("sources")
    assert told == named | {
        "plans": 4, "renders": 3, "temperature": 0.3, "top_p": 0.4, "do_sample": False, "num_inference_steps": 7,
        "guidance_scale": 2.5,
    }  # fmt: skip
    family.draw(["a"], height=64, width=64, seed=0, sampling=sampling)
    assert given[1][1]["plans"] == given[1][1]["renders"] == 1
    assert given[1][1]["sources"] is given[1][1]["prompt_ids"] is None


def test_generate_names_mistakes(family):
    with pytest.raises(ValueError, match="at least 1 plan"):
        family.generate(["x"], **SIZE, seed=0, plans=0)
    with pytest.raises(ValueError, match="one prompt_id per prompt"):
        family.generate(["x"], **SIZE, seed=0, prompt_ids=[0, 1])
    with pytest.raises(ValueError, match="32"):
        family.generate(["x"], height=60, width=64, seed=0)


# -- what trains -------------------------------------------------------------------------------------------------------


def test_set_trainable_spares_the_frozen_parts(family):
    family.set_trainable(ar=True, dit=True)
    ar, dit = family.trainable("ar"), family.trainable("dit")
    assert "lm_head.weight" in ar and "model.language_model.layers.0.self_attn.q_proj.weight" in ar
    assert not any("visual" in name or "vqmodel" in name for name in ar)
    assert len(dit) == sum(1 for _ in family.dit.transformer.parameters())
    frozen = (family.dit.vae, family.dit.text_encoder, family.ar.model.model.visual, family.ar.model.model.vqmodel)
    assert not any(param.requires_grad for part in frozen for param in part.parameters())
    family.set_trainable(ar=False, dit=True)
    assert not family.trainable("ar") and family.trainable("dit")
    family.set_trainable(ar=False, dit=False)
    assert not family.trainable("dit")
    with pytest.raises(ValueError, match="one of ar, dit"):
        family.module("vae")


def test_sharding_units(family):
    assert [type(unit).__name__ for unit in family.sharding_units("dit")] == ["GlmImageTransformerBlock"] * 2
    names = [type(unit).__name__ for unit in family.sharding_units("ar")]
    assert names == ["GlmImageTextDecoderLayer"] * 2  # the vision tower is never trained


# -- loading -----------------------------------------------------------------------------------------------------------


def test_tiny_random_depends_on_its_seed():
    weights = [GLMImage.load("tiny-random", seed=seed).dit.transformer.proj_out.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert GLMImage.load("tiny-random", dtype=torch.bfloat16).dit.vae.dtype == torch.bfloat16


def test_local_folder_round_trip(family, tmp_path):
    family.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.bin"))
    loaded = GLMImage.load(tmp_path / "model")
    images = [model.generate(["x"], **SIZE, seed=0) for model in (family, loaded)]
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)  # loaded weights lie differently in memory
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="cannot load the folder"):
        GLMImage.load(tmp_path / "model")
    (tmp_path / "model" / "vae").rename(tmp_path / "vae")
    with pytest.raises(ModelLoadError, match="lacks the folders vae"):
        GLMImage.load(tmp_path / "model")


def test_missing_models_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ModelLoadError, match="neither a folder here nor a hub id"):
        GLMImage.load("./no/such/folder")
    with pytest.raises(ModelLoadError, match="model_index.json"):
        GLMImage.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelLoadError, match="declares a FluxPipeline"):
        GLMImage.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        GLMImage.load(tmp_path)
    monkeypatch.setattr(loading, "TINY_FOLDER", tmp_path / "absent")
    with pytest.raises(ModelLoadError, match="tiny-random"):
        GLMImage.load("tiny")
    with pytest.raises(ModelLoadError, match="(?s)hf download some-owner/some-model.*model.local_files_only"):
        GLMImage.load("some-owner/some-model", local_files_only=True)


def test_hub_options_reach_the_loader(monkeypatch, tmp_path):
    seen, asked = {}, {}
    (tmp_path / "model_index.json").write_text('{"_class_name": "GlmImagePipeline"}')

    def give_index(name, file, **options):
        asked.update(options, name=name)
        return str(tmp_path / file)

    def refuse(name, **options):
        seen.update(options, name=name)
        raise OSError("no network")

    monkeypatch.setattr(loading.GlmImagePipeline, "from_pretrained", refuse)
    monkeypatch.setattr("glm_training.models.loading.HfApi.model_info", lambda *name, **options: None)
    monkeypatch.setattr("glm_training.models.loading.hf_hub_download", give_index)
    with pytest.raises(ModelLoadError, match="no network"):
        GLMImage.load("zai-org/GLM-Image", revision="abc", dtype=torch.bfloat16)
    assert seen == {
        "name": "zai-org/GLM-Image",
        "revision": "abc",
        "dtype": torch.bfloat16,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": False,
    }
    assert asked == {"name": "zai-org/GLM-Image", "revision": "abc", "local_files_only": False}


# -- stock sampling ----------------------------------------------------------------------------------------------------


def test_an_exported_model_draws_from_the_codebook_alone_and_from_all_of_it(tmp_path):
    """The stock `generate` of an export whose ids past the codebook are the likeliest by far, as nothing in training
    holds them down; of the codes, made alike, it keeps every one and not its own default of 50."""
    exported = GLMImage.load("tiny-random")
    codes = exported.ar.num_codes
    with torch.no_grad():
        head = exported.ar.model.lm_head
        head.weight.zero_()
        head.weight[codes::2], head.weight[codes + 1 :: 2] = 1.0, -1.0  # one or the other is above 0
    exported.save_pretrained(tmp_path / "pipeline")
    stock = GlmImageForConditionalGeneration.from_pretrained(tmp_path / "pipeline" / "vision_language_encoder")
    assert stock.generation_config.top_k == 0
    processor = exported.ar.processor
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]] * 4,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "target_h": 64, "target_w": 64},
    )
    drawn = stock.generate(
        **inputs, max_new_tokens=6, do_sample=True, top_p=1.0, output_scores=True, return_dict_in_generate=True
    )
    assert drawn.sequences.shape[1] == inputs["input_ids"].shape[1] + 6, "no end token cuts it short"
    for scores in drawn.scores:
        assert scores[:, :codes].isfinite().all() and scores[:, codes:].isneginf().all()
    assert int(drawn.sequences[:, -6:].max()) < codes


@pytest.mark.parametrize(("given", "decoded"), [({}, 8), ({"micro_batch_size": 3}, 3), ({"vae_batch_size": 1}, 1)])
def test_pictures_are_decoded_in_batches_of_their_own(family, monkeypatch, given, decoded):
    sizes = []
    decode = family.dit.decode_latents
    monkeypatch.setattr(
        family.dit, "decode_latents", lambda latents, **named: sizes.append(named) or decode(latents, **named)
    )
    family.generate(["x"], **SIZE, seed=0, **given)
    assert sizes == [{"micro_batch_size": decoded}]
