"""Trains the tiny GLM-Image that ships with the package: its own VAE, visual tokenizer, AR model and DiT.

    python examples/tiny_glm_image/train.py all --work runs/tiny --export glm_training/models/glm_image/tiny

Stages: `vae` and `vq` need nothing; `ar` needs `vq`; `dit` needs `vae` and `vq`. Each reads and writes its own folder
of a pipeline under --work and goes on from what it finds there, so stages can run again or side by side. The export
stores the weights as float16. The glyph encoder keeps its random weights: byte embeddings mixed by two layers are all
the DiT needs to tell letters apart.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from train_vae import train_vae
from train_vq import train_vq
from world import UNSEEN_WORDS, WORDS, all_scenes

from glm_training.models.glm_image.tiny import TinyShape, build_tiny
from train_ar import train_ar
from train_dit import train_dit

STAGES = ("vae", "vq", "ar", "dit")
STEPS = {"vae": 1400, "vq": 1000, "ar": 1750, "dit": 2400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all", "export"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--export", type=Path, help="folder for the finished float16 pipeline")
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage != "export":
            run_stage(stage, args)
    if args.export:
        export(args.work, args.export)


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Runs one stage on the weights in `args.work`; a part that has no folder there starts from random weights."""
    pipeline = load(args.work, args.seed)
    log = logging.getLogger(stage).info
    steps = args.steps or STEPS[stage]
    if stage == "vae":
        train_vae(pipeline.vae, steps=steps, batch_size=16, seed=args.seed, log=log)
        pipeline.vae.to(memory_format=torch.contiguous_format).save_pretrained(args.work / "vae")
    elif stage == "vq":
        train_vq(pipeline.vision_language_encoder, steps=steps, seed=args.seed, log=log)
        pipeline.vision_language_encoder.save_pretrained(args.work / "vision_language_encoder")
    elif stage == "ar":
        train_ar(pipeline, steps=steps, seed=args.seed, log=log)
        pipeline.vision_language_encoder.save_pretrained(args.work / "vision_language_encoder_ar")
    else:
        train_dit(pipeline, steps=steps, seed=args.seed, log=log, checkpoint=lambda: save_dit(pipeline, args.work))
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
    """Writes the whole pipeline to `target`, weights in float16 and configs saying float32 is the compute type."""
    pipeline = load(work, 0)
    for name in ("vae", "vision_language_encoder", "transformer", "text_encoder"):
        getattr(pipeline, name).half()
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target)
    for config in target.glob("*/config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def corpus() -> list[str]:
    """Texts the AR tokenizer learns its merges from."""
    scenes = [scene.prompt() for group in all_scenes(False).values() for scene in group]
    edits = ["make the circle red", "make the squares blue", "make the sign green", "make the triangle"]
    edits += [f'change the word to "{word}"' for word in (*WORDS, *UNSEEN_WORDS)]
    return scenes + edits * 20


if __name__ == "__main__":
    main()
