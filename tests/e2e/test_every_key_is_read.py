"""No key of the configuration is accepted and ignored: a few short runs read all of them."""

from __future__ import annotations

from glm_training.engine.captioned_setup import build_captioned, build_held_out_images
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world
from tests import dmdr_runs, preference_runs, vgt_runs
from tests.config_reads import ReadTracker
from tests.data.captioned.building import captioned_config
from tests.runs import config_of
from tests.trainers import test_sdxl_finetuning

RUNS = {
    "both halves, flow GRPO, adapters": [
        "lora.enabled=true",
        "lora.rank=2",
        "checkpoint.save_lora=true",
        "checkpoint.save_lora_only=true",
        "logging.log_images=true",
        "evaluation.enabled=true",
        "rollout.sde_window_size=1",
        "reward.grpo.reference=ema",
        "reward.grpo.ar.objective=cispo",
        "training.max_grad_norm=1",
    ],
    "DiT, NFT, AdamW": [
        "model.component=dit",
        "reward.grpo.dit.method=nft",
        "training.optimizer=adamw",
        "training.lr_scheduler=cosine",
    ],
    "AWM": ["model.component=dit", "reward.grpo.dit.method=awm", "training.max_steps=1"],
    "DGPO": ["model.component=dit", "reward.grpo.dit.method=dgpo", "training.max_steps=1"],
    "supervised": ["training.use_reward=false"],
}
HELD_OUT = {
    "evaluation.eval_prompts_file": "prompts.txt",
    "evaluation.eval_target_images_dir": "target_images",
    "evaluation.eval_source_images_dir": "source_images",
}


def test_every_key_is_read(tmp_path):
    tracker = ReadTracker()
    for name, overrides in RUNS.items():
        config = config_of(tmp_path, f"output_dir={tmp_path}/{name.split()[0]}", *overrides)
        with tracker:
            build_trainer(config, init_world(config.distributed.enabled is not False, None)).train()
    files = [f"{key}={tmp_path}/data/{name}" for key, name in HELD_OUT.items()]
    config = config_of(tmp_path, f"output_dir={tmp_path}/edits", "evaluation.enabled=true", *files, mode="i2i")
    with tracker:
        build_trainer(config, init_world(True, None))
    documented = [
        "reward.metrics=[structure]",
        "reward.weights={structure: 1.0}",
        "data.target_images_dir=null",
        f"reward.target_images_dir={tmp_path}/data/target_images",
        "training.max_steps=null",
        "training.num_epochs=1",
    ]
    config = config_of(tmp_path, f"output_dir={tmp_path}/documented", *documented)
    with tracker:
        build_trainer(config, init_world(True, None))
    scorers = dmdr_runs.random_scorers(tmp_path / "scorers")
    config = dmdr_runs.config_of(tmp_path, *scorers, "dmdr.reward.method=srpo", f"output_dir={tmp_path}/dmdr")
    with tracker:
        build_trainer(config, init_world(True, None)).train()
    config = dmdr_runs.config_of(tmp_path, f"output_dir={tmp_path}/plans", family="glm_image")
    with tracker:
        build_trainer(config, init_world(True, None)).train()
    for family, part in (("sdxl", "unet"), ("glm_image", "both")):
        pairs = [f"evaluation.eval_pairs={tmp_path}/pairs", f"output_dir={tmp_path}/pairs of {part}"]
        config = preference_runs.config_of(tmp_path, family, *pairs)
        with tracker:
            build_trainer(config, init_world(True, None)).train()
    config = test_sdxl_finetuning.config_of(tmp_path / "plain", "training.max_steps=1")
    with tracker:
        build_trainer(config, init_world(True, None)).train()
    gan = ["vgt.gan.start_step=1", "vgt.gan.channels=32", "vgt.gan.stages=1", "training.ema.decay=0.9"]
    for component, own in (("autoencoder", gan), ("generator", [])):
        config = vgt_runs.config_of(tmp_path, *own, "training.max_steps=2", component=component)
        with tracker:
            build_trainer(config, init_world(True, None)).train()
    own_shapes = {"buckets": {"enabled": True, "smallest": 32}}
    pictures = captioned_config(tmp_path / "pictures", data=own_shapes, output_dir=str(tmp_path / "captioned"))
    with tracker:
        build_held_out_images(pictures, build_captioned(pictures, captions=True), captions=True)
    with tracker:  # what run_training looks at before there is a trainer
        assert config.distributed.backend is None and config.resume.accept == [] and config.model.device_map is None
    assert tracker.unread() == []
