"""Random weights in the shapes of the published ones, for the metrics that need files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from glm_training.rewards import AestheticOptions
from glm_training.rewards.aesthetic import AestheticPredictor


def write_alexnet(path: Path) -> Path:
    """An AlexNet state dict with random convolutions (the classifier, which LPIPS does not use, is left out)."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in alexnet().state_dict().items() if name.startswith("features.")}
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * (2 / shape[1:].numel() if len(shape) > 1 else 0) ** 0.5
        for name, shape in shapes.items()
    }
    torch.save(state, path)
    return path


def write_aesthetic(folder: Path) -> AestheticOptions:
    """A tiny random CLIP and a random predictor of the published shape."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=768,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder / "clip")
        predictor = AestheticPredictor(768)
    with torch.no_grad():
        for name, value in predictor.named_parameters():  # random weights hardly tell two embeddings apart
            value.mul_(4 if name.endswith("weight") else 0)
    torch.save(predictor.state_dict(), folder / "predictor.pth")
    return AestheticOptions(clip_name=str(folder / "clip"), mlp_weights=folder / "predictor.pth")


def write_clip(folder: Path, width: int = 16) -> Path:
    """A tiny random CLIP for 32 px with a tokenizer of single letters: each prompt has an embedding of its own."""
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: row for row, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**tower, **ends, "vocab_size": len(words), "max_position_embeddings": 77},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=width,
        logit_scale_init_value=3.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip = CLIPModel(config)
    with torch.no_grad():
        for name, value in clip.named_parameters():  # random weights hardly tell two texts or images apart
            if "embedding" in name:
                value.mul_(20)
    clip.save_pretrained(folder)
    return folder


def write_open_clip(folder: Path, name: str, seed: int, quick_gelu: bool = False) -> Path:
    """A tiny random model of open_clip's real class for 32 px, known to open_clip as `name`; the file of its weights,
    wrapped as HPSv2 publishes it."""
    import open_clip  # an extra, which the other writers do without

    tower = {"layers": 2, "width": 32}
    shape = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {**tower, "image_size": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    (folder / f"{name}.json").write_text(json.dumps(shape), encoding="utf-8")
    open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
    with torch.no_grad():  # random weights hardly tell two texts or images apart
        model.token_embedding.weight.mul_(20)
        model.visual.conv1.weight.mul_(20)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / f"{name}.pt")
    return folder / f"{name}.pt"
