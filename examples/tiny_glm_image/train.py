"""Trains the tiny GLM-Image that ships with the package: its own VAE, visual tokenizer, AR model and DiT.

    python examples/tiny_glm_image/train.py all --work runs/tiny --export glm_training/models/glm_image/tiny

Stages: `vae` and `vq` need nothing; `ar` needs `vq`; `dit` needs `vae` and `vq`; `ar_mistaken` and `dit_mistaken` go on
with those two under captions that are often wrong. Each reads and writes its own folder of a pipeline under --work and
goes on from what it finds there, so stages can run again or side by side. The export stores the weights as float16. The
glyph encoder learns with the DiT.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from train_vae import train_vae
from train_vq import train_vq
from world import UNSEEN_WORDS, WORDS, all_scenes

from glm_training.models.glm_image.tiny import TinyShape, build_tiny
from train_ar import train_ar
from train_dit import train_dit

STEPS = {"vae": 1400, "vq": 1000, "ar": 2500, "dit": 2800, "ar_mistaken": 200, "dit_mistaken": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STEPS, "all", "export"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--export", type=Path, help="folder for the finished float16 pipeline")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for stage in STEPS if args.stage == "all" else [args.stage]:
        if stage != "export":
            run_stage(stage, args)
    if args.export:
        export(args.work, args.export)


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Runs one stage on the weights in `args.work`; a part that has no folder there starts from random weights."""
    pipeline = load(args.work, args.seed)
    log = logging.getLogger(stage).info
    steps, mistakes = args.steps or STEPS[stage], stage.endswith("_mistaken")
    if stage == "vae":
        train_vae(pipeline.vae, steps=steps, batch_size=16, seed=args.seed, log=log)
        pipeline.vae.to(memory_format=torch.contiguous_format).save_pretrained(args.work / "vae")
    elif stage == "vq":
        train_vq(pipeline.vision_language_encoder, steps=steps, seed=args.seed, log=log)
        pipeline.vision_language_encoder.save_pretrained(args.work / "vision_language_encoder")
    elif stage.startswith("ar"):
        train_ar(pipeline, steps=steps, seed=args.seed, log=log, mistakes=mistakes)
        pipeline.vision_language_encoder.save_pretrained(args.work / "vision_language_encoder_ar")
    else:
        save = partial(save_dit, pipeline, args.work)
        train_dit(pipeline, steps=steps, seed=args.seed, log=log, checkpoint=save, mistakes=mistakes)
        save_dit(pipeline, args.work)


def save_dit(pipeline: GlmImagePipeline, work: Path) -> None:
    pipeline.transformer.save_pretrained(work / "transformer")
    pipeline.text_encoder.save_pretrained(work / "text_encoder")


def load(work: Path, seed: int) -> GlmImagePipeline:
    """The pipeline with whatever parts `work` already holds."""
    pipeline = build_tiny(TinyShape(), seed=seed, corpus=corpus())
    ar_folder = work / "vision_language_encoder_ar"
    folders = {
        "vae": work / "vae",
        "vision_language_encoder": ar_folder if ar_folder.is_dir() else work / "vision_language_encoder",
        "transformer": work / "transformer",
        "text_encoder": work / "text_encoder",
    }
    for name, folder in folders.items():
        if folder.is_dir():
            setattr(pipeline, name, type(getattr(pipeline, name)).from_pretrained(folder).eval())
            pipeline.register_modules(**{name: getattr(pipeline, name)})
    return pipeline


def export(work: Path, target: Path) -> None:
    """Writes the whole pipeline to `target`, weights in float16, the configs' compute type float32."""
    pipeline = load(work, 0)
    for name in ("vae", "vision_language_encoder", "transformer", "text_encoder"):
        getattr(pipeline, name).half()
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target)
    for path in target.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # a folder of this machine
        path.write_text(json.dumps(config, indent=2).replace('"dtype": "float16"', '"dtype": "float32"') + "\n")


def corpus() -> list[str]:
    """Texts the AR tokenizer learns its merges from."""
    scenes = [scene.prompt() for group in all_scenes(False).values() for scene in group]
    edits = ["make the circle red", "make the squares blue", "make the sign green", "make the triangle"]
    edits += [f'change the word to "{word}"' for word in (*WORDS, *UNSEEN_WORDS)]
    return scenes + edits * 20


if __name__ == "__main__":
    main()
