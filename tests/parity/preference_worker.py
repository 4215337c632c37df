"""Two of these are the run of test_preference_equivalences: two steps of every case, weights to a file."""

import sys
from pathlib import Path

import torch

from glm_training.utils.distributed import init_world, shutdown
from tests.preference_runs import stepped
from tests.runs import weights_of

CASES: dict[str, tuple[str, list[str]]] = {
    "unet-lora": ("sdxl", ["dpo.prompt_dropout=0.3"]),
    "unet-full": ("sdxl", ["lora.enabled=false", "checkpoint.save_lora_only=false", "training.learning_rate=2e-4"]),
    "both-full": ("glm_image", ["dpo.prompt_dropout=0.3"]),
    "both-sft": ("glm_image", ["dpo.loss=sft", "training.learning_rate=1e-3"]),
}
"""Name -> family and overrides; one pair per process and step."""


if __name__ == "__main__":
    folder, world = Path(sys.argv[1]), init_world(True, "gloo")
    for case, (family, overrides) in CASES.items():
        caches = [f"dpo.cache_dir={folder}/cache-{case}", f"evaluation.eval_pairs={folder}/pairs"]
        trainer = stepped(folder, family, "training.batch_size=1", *overrides, *caches, *sys.argv[2:], world=world)
        found = {"weights": weights_of(trainer), "held_out": trainer.validate()}
        torch.save(found, folder / f"{case}-{world.rank}.pt")
    shutdown(world)
