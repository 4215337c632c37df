"""Stand-ins for DFN CLIP-H and HPSv2.1: tiny open_clip models of random weights, to try `training.method: dmdr` with.

    python examples/random_scorers.py runs/random_scorers

They see every line of the code that the real ones see and know nothing of pictures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

try:
    import open_clip
except ModuleNotFoundError:
    sys.exit('this needs the package open_clip, as dmdr does: pip install "glm_training[hps]"')

TOWER = {"layers": 2, "width": 32}
SHAPE = {
    "embed_dim": 16,
    "vision_cfg": {**TOWER, "image_size": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {**TOWER, "context_length": 77, "vocab_size": 49408, "heads": 2},
}


def write_scorers(folder: Path) -> None:
    """Writes `folder`/clip_h and `folder`/hps_v2, in the form that open_clip calls `local-dir:`."""
    for seed, name in enumerate(("clip_h", "hps_v2")):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = open_clip.CLIP(**SHAPE)
        with torch.no_grad():  # random weights hardly tell two texts or images apart
            model.token_embedding.weight.mul_(20)
            model.visual.conv1.weight.mul_(20)
        (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": SHAPE, "preprocess_cfg": {}}), "utf-8")
        torch.save(model.state_dict(), place / "open_clip_pytorch_model.bin")


if __name__ == "__main__":
    write_scorers(Path(sys.argv[1]))
