"""Files in the authors' layout, made from random models, and models that stage 1 starts from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from glm_training.models.loading import ModelLoadError
from glm_training.models.vgt.autoencoder import Autoencoder, AutoencoderConfig, Teacher
from glm_training.models.vgt.published import autoencoder_from_parts, load_published, published_config
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder
from tests.models.vgt.test_tower import QWEN_VISION, TEXT, VISION, scattered

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Weights = dict[str, torch.Tensor]


def authors_layout(state: Weights) -> Weights:
    """By the names in the authors' source, one weight after the other."""
    tower, saved = "tower.encoder.", {}
    saved["encoder.embeddings.class_embedding"] = state[f"{tower}embeddings.cls_token"]
    saved["encoder.embeddings.position_embedding"] = state[f"{tower}embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        projection = state[f"{tower}embeddings.patch_embeddings.projection.{kind}"]
        saved[f"encoder.embeddings.patch_embedding.{kind}"] = projection
        for layer in range(2):
            ours, theirs = f"{tower}encoder.layer.{layer}.", f"encoder.encoder.layers.{layer}."
            split = [state[f"{ours}attention.{letter}_proj.{kind}"] for letter in "qkv"]
            saved[f"{theirs}attn.qkv.{kind}"] = torch.cat(split)
            saved[f"{theirs}attn.proj.{kind}"] = state[f"{ours}attention.projection_layer.{kind}"]
            saved[f"{theirs}norm1.{kind}"] = state[f"{ours}layernorm_before.{kind}"]
            saved[f"{theirs}norm2.{kind}"] = state[f"{ours}layernorm_after.{kind}"]
            saved[f"{theirs}mlp.fc1.{kind}"] = state[f"{ours}mlp.fc1.{kind}"]
            saved[f"{theirs}mlp.fc2.{kind}"] = state[f"{ours}mlp.fc2.{kind}"]
            saved[f"{theirs}ls1"], saved[f"{theirs}ls2"] = state[f"{ours}lambda_1"], state[f"{ours}lambda_2"]
        for place, name in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            saved[f"mlp1.{place}.{kind}"] = state[f"tower.projector.{name}.{kind}"]
    return saved | {name: value for name, value in state.items() if name.startswith(("down_", "decoder."))}


def with_teacher(saved: Weights) -> Weights:
    """A training run's file: a teacher whose weights are three times the student's."""
    encoder = {name: value for name, value in saved.items() if name.startswith("encoder.")}
    teacher = {name.replace("encoder.", "teacher.", 1): value for name, value in encoder.items()}
    teacher |= {f"teacher_{name}": value for name, value in saved.items() if name.startswith("mlp1.")}
    return saved | {name: 3 * value for name, value in teacher.items()}


def features_in_their_layout(saved: Weights, images: torch.Tensor) -> torch.Tensor:
    """InternViT with one head and fused queries, keys and values, pixel shuffle and mlp1, from the file's own names."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, saved[f"{name}.weight"], saved[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], saved[f"{name}.weight"], saved[f"{name}.bias"], eps)

    embed = "encoder.embeddings."
    pixels = (images - mean[:, None, None]) / std[:, None, None]
    kernel = [saved[f"{embed}patch_embedding.{kind}"] for kind in ("weight", "bias")]
    patches = F.conv2d(pixels, *kernel, stride=4).flatten(2).transpose(1, 2)
    first = saved[f"{embed}class_embedding"].expand(len(images), -1, -1)
    x = torch.cat([first, patches], dim=1) + saved[f"{embed}position_embedding"]
    for layer in range(2):
        block = f"encoder.encoder.layers.{layer}."
        query, key, value = linear(f"{block}attn.qkv", norm(f"{block}norm1", x)).chunk(3, dim=-1)
        attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1) @ value
        x = x + linear(f"{block}attn.proj", attention) * saved[f"{block}ls1"]
        hidden = F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x)))
        x = x + linear(f"{block}mlp.fc2", hidden) * saved[f"{block}ls2"]
    grid = x[:, 1:].unflatten(1, (8, 8))
    corners = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    shuffled = torch.cat(corners, dim=-1).flatten(1, 2)
    return linear("mlp1.3", F.gelu(linear("mlp1.1", norm("mlp1.0", shuffled, 1e-5))))


@torch.no_grad()
@pytest.mark.parametrize("outer", [None, "state_dict", "model"])
def test_a_file_in_the_authors_layout_gives_identical_outputs(tmp_path, outer) -> None:
    source = scattered(tiny_random_autoencoder(1))
    saved = with_teacher(authors_layout(source.state_dict()))
    torch.save(saved if outer is None else {outer: saved, "step": 7}, tmp_path / "vgt_ae.pth")
    target = tiny_random_autoencoder(2)
    load_published(target, tmp_path / "vgt_ae.pth")
    ours, theirs = target(IMAGES), source(IMAGES)
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.latents, theirs.latents)
    torch.testing.assert_close(ours.features, features_in_their_layout(saved, IMAGES), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_teacher_of_a_training_run_is_its_own(tmp_path) -> None:
    saved = with_teacher(authors_layout(scattered(tiny_random_autoencoder(1)).state_dict()))
    torch.save(saved, tmp_path / "pytorch_model.bin")
    target = tiny_random_autoencoder(2)
    teacher = Teacher(target.tower)
    load_published(target, tmp_path / "pytorch_model.bin", teacher=teacher)
    of_teacher = {
        name.replace("teacher.", "encoder.", 1).removeprefix("teacher_"): value
        for name, value in saved.items()
        if name.startswith("teacher")
    }
    expected = features_in_their_layout(of_teacher, IMAGES)
    torch.testing.assert_close(teacher.features(IMAGES), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(target.features(IMAGES), expected, atol=0.1)
    torch.save({name: value for name, value in saved.items() if "teacher" not in name}, tmp_path / "vgt_ae.pth")
    with pytest.raises(ValueError, match="holds no teacher"):
        load_published(target, tmp_path / "vgt_ae.pth", teacher=teacher)


def test_weights_that_do_not_fit_are_named_and_nothing_is_set(tmp_path) -> None:
    saved = authors_layout(tiny_random_autoencoder(1).state_dict())
    del saved["down_blocks.1.mlp.3.bias"], saved["encoder.encoder.layers.1.attn.qkv.weight"]
    saved |= {"encoder.head.weight": torch.zeros(2), "mlp1.2.weight": torch.zeros(2)}
    saved["down_mlp.3.bias"] = torch.zeros(64)
    torch.save(saved, tmp_path / "vgt_ae.pth")
    target = tiny_random_autoencoder(2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_published(target, tmp_path / "vgt_ae.pth")
    attention = "tower.encoder.encoder.layer.1.attention"
    for told in (
        "vgt_ae.pth do not fit the autoencoder: 2 unknown (encoder.head.weight, mlp1.2.weight)",
        f"4 missing (down_blocks.1.mlp.3.bias, {attention}.k_proj.weight, {attention}.q_proj.weight, ",
        "1 of another size (down_mlp.3.bias)",
    ):
        assert told in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@torch.no_grad()
def test_a_file_of_the_qwen_variant(tmp_path) -> None:
    source = scattered(tiny_random_autoencoder(1, tower="qwen2_5_vl"))
    torch.save({name.removeprefix("tower."): value for name, value in source.state_dict().items()}, tmp_path / "ae.bin")
    target = tiny_random_autoencoder(2, tower="qwen2_5_vl")
    load_published(target, tmp_path / "ae.bin")
    assert torch.equal(target(IMAGES).images, source(IMAGES).images)


def test_the_published_model_has_its_sizes() -> None:
    """32 x 32 patches of 14 px make 16 x 16 places; six levels double them to 512 px. Weights by hand on the way in."""
    with torch.device("meta"):
        autoencoder = Autoencoder(published_config())
        drawn = autoencoder.decoder(torch.empty(1, 32, 16, 16))
    assert autoencoder.stride == 28 and drawn.shape == (1, 3, 512, 512)
    block = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024 + 2 * 1024
    encoder = 24 * block + 14 * 14 * 3 * 1024 + 1024 + 1024 + 1025 * 1024
    assert sum(param.numel() for param in autoencoder.tower.encoder.parameters()) == encoder
    mlp1 = 2 * 4096 + 4096 * 896 + 896 + 896 * 896 + 896
    assert sum(param.numel() for param in autoencoder.tower.projector.parameters()) == mlp1
    down = 3 * (2 * 896 + 2 * (896 * 896 + 896)) + 2 * 896 + 896 * 32 + 32 + 32 * 32 + 32
    parts = (autoencoder.down_blocks, autoencoder.down_mlp)
    assert sum(param.numel() for part in parts for param in part.parameters()) == down


def saved_dc_ae(folder) -> AutoencoderDC:
    config: AutoencoderConfig = tiny_random_autoencoder().config
    sizes = {"encoder_block_out_channels": [8, 8, 16, 16], "encoder_layers_per_block": [1, 1, 1, 1]}
    sizes |= {"encoder_block_types": "ResBlock", "encoder_qkv_multiscales": [[], [], [], []]}
    stock = scattered(AutoencoderDC(latent_channels=4, **config.decoder, **sizes))
    stock.save_pretrained(folder)
    return stock


@torch.no_grad()
@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_stage_one_starts_from_both_models_folders(tmp_path, kind) -> None:
    stock = saved_dc_ae(tmp_path / "dc_ae")
    if kind == "internvl":
        text = {"model_type": "qwen2", **TEXT}
        config = InternVLConfig(vision_config=VISION, text_config=text, image_token_id=1)
        model, images = scattered(InternVLForConditionalGeneration(config)), IMAGES
    else:
        text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
        config = Qwen2_5_VLConfig(vision_config={**QWEN_VISION, "out_hidden_size": 24}, text_config=text)
        model = scattered(Qwen2_5_VLForConditionalGeneration(config))
        images = torch.rand(1, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "vl")
    made, again = (
        autoencoder_from_parts(tmp_path / "vl", tmp_path / "dc_ae", channel_norm=False, seed=3) for _ in range(2)
    )
    assert made.config.tower == kind and made.config.latent_channels == 4 and not made.config.channel_norm
    tower = model.model.vision_tower if kind == "internvl" else model.model.visual
    assert all(torch.equal(value, made.tower.encoder.state_dict()[name]) for name, value in tower.state_dict().items())
    if kind == "internvl":
        projected = model.model.multi_modal_projector.state_dict()
        assert all(torch.equal(value, made.tower.projector.state_dict()[name]) for name, value in projected.items())
    decoder = made.decoder.state_dict()
    assert all(torch.equal(value, decoder[name]) for name, value in stock.decoder.state_dict().items())
    assert torch.equal(made(images).images, again(images).images), "the new layers too"
    made.save_pretrained(tmp_path / "start")
    loaded = Autoencoder.from_pretrained(tmp_path / "start")
    assert loaded.config == made.config and torch.equal(loaded(images).images, made(images).images)


def test_weights_that_a_folder_lacks_are_named(tmp_path) -> None:
    """Both libraries would draw them at random."""
    saved_dc_ae(tmp_path / "dc_ae")
    config = InternVLConfig(vision_config=VISION, text_config={"model_type": "qwen2", **TEXT}, image_token_id=1)
    InternVLForConditionalGeneration(config).save_pretrained(tmp_path / "vl")
    for folder, weight in (("dc_ae", "decoder.conv_in.bias"), ("vl", "vision_tower.encoder.layer.1.lambda_2")):
        path = next((tmp_path / folder).glob("*.safetensors"))
        whole = path.read_bytes()
        rest = {name: value.clone() for name, value in load_file(path).items() if weight not in name}
        save_file(rest, path, {"format": "pt"})
        with pytest.raises(ModelLoadError, match=f"1 of its weights are missing, first .*{weight}"):
            autoencoder_from_parts(tmp_path / "vl", tmp_path / "dc_ae", channel_norm=False)
        path.write_bytes(whole)


def test_other_models_are_named(tmp_path) -> None:
    saved_dc_ae(tmp_path / "dc_ae")
    Qwen2ForCausalLM(Qwen2Config(**TEXT)).save_pretrained(tmp_path / "llm")
    with pytest.raises(ModelLoadError, match="must be one of internvl, qwen2_5_vl, and is a qwen2"):
        autoencoder_from_parts(tmp_path / "llm", tmp_path / "dc_ae", channel_norm=False)
    with pytest.raises(ModelLoadError, match="the vision-language model in .*nowhere"):
        autoencoder_from_parts(tmp_path / "nowhere", tmp_path / "dc_ae", channel_norm=False)
