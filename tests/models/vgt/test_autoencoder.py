"""The autoencoder around its tower: latents, noise, decoder, teacher, parameter groups, and its folder."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC

from glm_training.models.loading import ModelLoadError
from glm_training.models.vgt.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Teacher,
    read_config,
)
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder, tiny_trainable_config


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = drawn(2, 3, 32, 32).sigmoid()


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    left, same, other = (tiny_random_autoencoder(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(left[name], same[name]) for name in left)
    assert not torch.equal(left["down_mlp.1.weight"], other["down_mlp.1.weight"])


def test_new_layers_start_at_a_truncated_normal() -> None:
    """Cut at +-2, far beyond its deviation of 0.02."""
    autoencoder = tiny_random_autoencoder()
    weights = torch.cat([block.mlp[1].weight.flatten() for block in autoencoder.down_blocks])
    assert weights.std().item() == pytest.approx(0.02, rel=5 / (2 * weights.numel()) ** 0.5)
    assert all(not layer.bias.any() for layer in (autoencoder.down_blocks[0].mlp[3], autoencoder.down_mlp[1]))


@torch.no_grad()
def test_latents_by_hand() -> None:
    """Residual blocks, then LayerNorm, Linear, GELU, Linear; places in rows; the norm where the config has it."""
    plain, normed = (tiny_random_autoencoder(3, channel_norm=norm) for norm in (False, True))
    features = plain.features(IMAGES)
    hidden = features
    for block in plain.down_blocks:
        inner = F.layer_norm(hidden, (24,), block.mlp[0].weight, block.mlp[0].bias, eps=1e-6)
        hidden = hidden + block.mlp[3](F.gelu(block.mlp[1](inner)))
    norm, first, _, last = plain.down_mlp
    flat = last(F.gelu(first(F.layer_norm(hidden, (24,), norm.weight, norm.bias, eps=1e-5))))
    expected = torch.stack([flat[:, place] for place in range(16)], dim=2).reshape(2, 4, 4, 4)
    torch.testing.assert_close(plain.encode(IMAGES), expected)
    centred = expected - expected.mean(1, keepdim=True)
    scaled = centred / (expected.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normed.encode(IMAGES), scaled)
    assert torch.equal(plain(IMAGES).features, features)
    wide = torch.cat([IMAGES, IMAGES.flip(3)[..., :16]], dim=3)
    places = plain.encode(wide)
    assert places.shape == (2, 4, 4, 6)
    flat = plain.down_mlp(plain.down_blocks[1](plain.down_blocks[0](plain.features(wide))))
    torch.testing.assert_close(places[:, :, 2, 5], flat[:, 2 * 6 + 5])


def test_noise_only_where_it_is_given() -> None:
    autoencoder = tiny_random_autoencoder().train()
    noise = 0.1 * drawn(2, 4, 4, 4)
    clean, again, noisy = autoencoder(IMAGES), autoencoder(IMAGES), autoencoder(IMAGES, noise)
    assert torch.equal(clean.images, again.images)
    assert torch.equal(clean.latents, autoencoder.encode(IMAGES)) and torch.equal(noisy.latents, clean.latents)
    assert torch.equal(clean.images, autoencoder.decode(clean.latents))
    assert torch.equal(noisy.images, autoencoder.decode(clean.latents + noise))
    assert not torch.equal(noisy.images, clean.images)


@torch.no_grad()
def test_decoder_is_a_dc_aes_and_its_pictures_are_resized_to_the_stride() -> None:
    """Two doublings of 4 x 4 latents give 16 x 16 px, from which 32 x 32 are interpolated; [-1, 1] becomes [0, 1]."""
    made = tiny_random_autoencoder().config
    options = {**made.decoder, "decoder_block_out_channels": [8, 16, 16]}
    options |= {"decoder_layers_per_block": [1, 1, 1], "decoder_qkv_multiscales": [[], [], [5]]}
    options |= {"decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"]}
    autoencoder = Autoencoder(AutoencoderConfig.from_dict({**made.to_dict(), "decoder": options})).eval()
    encoder = {key.replace("decoder", "encoder"): value for key, value in options.items() if "decoder_bl" in key}
    encoder |= {"encoder_layers_per_block": [1, 1, 1], "encoder_qkv_multiscales": [[], [], [5]]}
    stock = AutoencoderDC(latent_channels=4, **options, **encoder).eval()
    stock.decoder.load_state_dict(autoencoder.decoder.state_dict())
    latents = drawn(2, 4, 4, 6, seed=2)
    wide = stock.decode(latents).sample
    assert wide.shape == (2, 3, 16, 24)
    expected = F.interpolate(wide, size=(32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(autoencoder.decode(latents), expected / 2 + 0.5)


def test_images_are_not_clamped() -> None:
    autoencoder = tiny_random_autoencoder()
    with torch.no_grad():
        autoencoder.decoder.conv_out.bias.fill_(7.0)
        assert autoencoder.decode(torch.zeros(1, 4, 4, 4)).max() > 3.5


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("how", ["autocast", "weights"])
@torch.no_grad()
def test_latents_and_images_are_fp32_in_half_precision(how, norm) -> None:
    """And close to those of fp32: bf16 rounds each layer to 2 ** -9 of its values."""
    autoencoder = tiny_random_autoencoder(channel_norm=norm)
    exact = autoencoder(IMAGES)
    if how == "weights":
        autoencoder.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = autoencoder(IMAGES, torch.zeros(2, 4, 4, 4))
    assert output.features.dtype == torch.bfloat16
    assert output.latents.dtype == output.images.dtype == torch.float32
    if norm:
        torch.testing.assert_close(output.latents.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    assert (output.latents - exact.latents).abs().mean() < 20 * 2**-9 * exact.latents.abs().mean()


def test_a_kl_autoencoder_draws_around_its_means() -> None:
    autoencoder = tiny_random_autoencoder(kl=True)
    with torch.no_grad():
        autoencoder.down_mlp[3].bias[4:] = torch.tensor([0.0, 2.0, -50.0, 50.0])
        autoencoder.down_mlp[3].weight[4:] = 0
        epsilon = drawn(2, 4, 4, 4, seed=4)
        means, sampled = autoencoder(IMAGES), autoencoder(IMAGES, posterior_noise=epsilon)
        assert torch.equal(means.latents, autoencoder.encode(IMAGES)) and means.latents.shape == (2, 4, 4, 4)
        torch.testing.assert_close(means.latents.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    log_variances = torch.tensor([0.0, 2.0, -30.0, 20.0])[:, None, None].expand(2, 4, 4, 4)
    assert torch.equal(sampled.posterior.log_variance, log_variances)
    torch.testing.assert_close(sampled.latents, means.latents + (log_variances / 2).exp() * epsilon)
    assert torch.equal(sampled.images, autoencoder.decode(sampled.latents))
    with pytest.raises(ValueError, match="no posterior"):
        tiny_random_autoencoder()(IMAGES, posterior_noise=epsilon)


def test_teacher_stays_bit_for_bit() -> None:
    student = tiny_random_autoencoder().train()
    teacher = Teacher(student.tower).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    features = teacher.features(IMAGES)
    torch.testing.assert_close(features, student.features(IMAGES).detach(), atol=0, rtol=0)
    assert not features.requires_grad and not any(module.training for module in teacher.modules())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        output = student(IMAGES)
        loss = (output.images - IMAGES).square().mean() + (
            output.features - teacher.features(IMAGES) - 1
        ).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (student.features(IMAGES) - features).abs().max() > 1e-3
    assert torch.equal(teacher.features(IMAGES), features)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(param.requires_grad for param in teacher.parameters())
    assert Teacher(student.tower, torch.bfloat16).features(IMAGES).dtype == torch.bfloat16


@pytest.mark.parametrize("tower", ["internvl", "qwen2_5_vl"])
def test_groups_hold_every_parameter_once(tower) -> None:
    """The projector learns at the full rate; Qwen's merger is a part of its encoder."""
    autoencoder = tiny_random_autoencoder(tower=tower)
    groups = autoencoder.parameter_groups()
    assert list(groups) == ["encoder", "rest"]
    encoder = {id(param) for param in autoencoder.tower.encoder.parameters()}
    assert {id(param) for param in groups["encoder"].values()} == encoder
    rest = {id(param) for param in groups["rest"].values()}
    assert encoder | rest == {id(param) for param in autoencoder.parameters()} and not encoder & rest
    assert ("tower.projector.linear_1.weight" in groups["rest"]) == (tower == "internvl")
    named = dict(autoencoder.named_parameters())
    assert all(named[name] is param for group in groups.values() for name, param in group.items())


def test_every_parameter_learns() -> None:
    """From pixels to pixels, with nothing left aside."""
    autoencoder = tiny_random_autoencoder().train()
    autoencoder(IMAGES).images.square().mean().backward()
    still = [name for name, param in autoencoder.named_parameters() if param.grad is None or not param.grad.any()]
    assert still == []


def test_recomputed_layers_keep_less_and_learn_the_same() -> None:
    autoencoder = tiny_random_autoencoder().train()
    kept: dict[str, int] = {}
    gradients = {}
    for name in ("kept", "recomputed"):
        if name == "recomputed":
            autoencoder.enable_gradient_checkpointing()
            autoencoder.enable_gradient_checkpointing()  # once is enough
        autoencoder.zero_grad()
        sizes: list[int] = []
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: (to.append(x.numel()), x)[1], lambda x: x)
        with keep:
            loss = autoencoder(IMAGES).images.square().mean()
        kept[name] = sum(sizes)
        loss.backward()
        gradients[name] = {key: param.grad.clone() for key, param in autoencoder.named_parameters()}
    assert kept["recomputed"] < kept["kept"] / 2
    teacher = Teacher(autoencoder.tower)
    assert torch.equal(teacher.features(IMAGES), autoencoder.features(IMAGES))
    for key, gradient in gradients["kept"].items():
        torch.testing.assert_close(gradients["recomputed"][key], gradient)


@pytest.mark.parametrize("tower", ["internvl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_saved_folder_loads_again(tmp_path, tower) -> None:
    made = tiny_random_autoencoder(5, tower=tower, channel_norm=tower == "internvl")
    teacher = Teacher(tiny_random_autoencoder(6, tower=tower).tower)
    made.save_pretrained(tmp_path / "new" / "folder", teacher=teacher)
    loaded = Autoencoder.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == made.config and not loaded.training
    assert torch.equal(loaded(IMAGES).images, made(IMAGES).images)
    again = Teacher.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(again.features(IMAGES), teacher.features(IMAGES))
    assert not torch.equal(again.features(IMAGES), made.features(IMAGES))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json", "model.safetensors", "teacher.safetensors",
    ]  # fmt: skip


def test_a_folder_that_does_not_say_whether_it_norms_is_refused(tmp_path) -> None:
    tiny_random_autoencoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["channel_norm"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError) as caught:
        Autoencoder.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert 'add "channel_norm": true for weights of stage 2' in str(caught.value)


def test_all_that_is_wrong_with_a_config_is_told_at_once(tmp_path) -> None:
    values = tiny_random_autoencoder().config.to_dict()
    del values["hidden_size"], values["decoder"]["decoder_act_fns"]
    values |= {"tower": "clip", "latent_channels": "32", "kl": 1, "widht": 3, "image_size": 0}
    values["decoder"]["scaling_factor"] = 0.4
    with pytest.raises(ValueError) as caught:
        AutoencoderConfig.from_dict(values)
    for problem in (
        "hidden_size is missing",
        "widht is no key of it",
        "latent_channels must be of type int, got '32'",
        "kl must be of type bool, got 1",
        "image_size is too small: 0",
        "tower must be one of internvl, qwen2_5_vl, got 'clip'",
        "decoder.decoder_act_fns is missing",
        "decoder.scaling_factor is no key",
    ):
        assert problem in str(caught.value)


def test_folders_of_something_else_are_named(tmp_path) -> None:
    with pytest.raises(ModelLoadError, match=r"it has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json is no JSON"):
        read_config(tmp_path)
    for text in ("[]", '{"model_type": "internvl"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match="not of a VGT autoencoder"):
            read_config(tmp_path)
    tiny_random_autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="make the teacher from that model"):
        Teacher.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no file of weights"):
        Autoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"image_size": 36}, "image_size 36 is no multiple of the 8 px"),
        ({"latent_channels": 5}, "must end in a multiple of latent_channels 5"),
        ({"decoder": {"decoder_block_out_channels": [8, 12, 16, 20]}}, "must be a multiple of the next one"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changed, complaint) -> None:
    values = tiny_random_autoencoder().config.to_dict()
    values = {**values, **changed, "decoder": {**values["decoder"], **changed.get("decoder", {})}}
    with pytest.raises(ValueError, match=complaint):
        Autoencoder(AutoencoderConfig.from_dict(values))


@pytest.mark.parametrize("norm", [False, True])
def test_the_trainable_one_is_small_and_draws_whole_pictures(norm) -> None:
    autoencoder = Autoencoder(tiny_trainable_config(channel_norm=norm))
    assert 2e5 < sum(param.numel() for param in autoencoder.parameters()) < 2e6
    with torch.no_grad():
        output = autoencoder(drawn(1, 3, 64, 64).sigmoid())
        assert output.latents.shape == (1, 16, 8, 8) and output.images.shape == (1, 3, 64, 64)
        assert autoencoder.decoder(output.latents).shape == (1, 3, 64, 64), "nothing is interpolated"
    assert (output.latents.mean(1).abs() < 1e-3 * output.latents.std()).all() == norm
