"""The lines of docs/export.md that load adapters of GLM-Image run, and the adapters have their strength."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from glm_training.export.lora import write_adapters
from glm_training.models.glm_image.family import GLMImage
from tests.export.test_lora_files import same, trained

DOCUMENT = Path(__file__).parents[2] / "docs/export.md"


def test_the_lines(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 6 and "glm_training" not in code
    family, adapters, wanted = GLMImage.load("tiny-random"), [], {}
    family.save_pretrained(tmp_path / "base")
    for part in family.components:
        adapter, wanted[part] = trained(family.module(part), part, list(family.lora_targets(part)))
        adapters.append(adapter)
    write_adapters(tmp_path / "out", adapters, None, None, layers_per_block=None)
    code = code.replace("torch.bfloat16", "torch.float32").replace("exports/t2i", str(tmp_path / "out"))
    code = code.replace("zai-org/GLM-Image", str(tmp_path / "base"))
    found: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torch_dtype")
        exec(code, found)
    loaded = GLMImage.from_pipeline(found["pipe"])  # type: ignore[arg-type]
    for part in family.components:
        layers = {name: module for name, module in loaded.module(part).named_modules() if hasattr(module, "lora_A")}
        deltas = {name: module.get_delta_weight(module.active_adapters[0]) for name, module in layers.items()}
        assert all(not module.disable_adapters for module in layers.values())
        with torch.no_grad():
            same(deltas, wanted[part])
