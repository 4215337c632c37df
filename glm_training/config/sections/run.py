"""The run around the training: distributed, checkpoint, logging, evaluation, resume."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glm_training.config.sections.base import FilePath, PlaceName, Section


class DistributedConfig(Section):
    """Several processes, started by torchrun."""

    enabled: bool | None = Field(
        default=None,
        description="Null and true = as many processes as torchrun started; false = more than one is an error.",
    )
    backend: Literal["nccl", "gloo"] | None = Field(default=None, description="Null = nccl on GPUs, gloo on the CPU.")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="Several processes: `ddp` = each holds all; `fsdp` = what is trained, gradients and moments lie in "
        "shards (FSDP2); `auto` = `ddp` where that takes at most half of a device.",
    )
    shard_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="`fsdp`: processes that share one set of shards, those of a node for instance; each such group is "
        "a replica. Null = all of them.",
    )
    gather: Literal["auto", "half", "block"] = Field(
        default="auto",
        description="`fsdp`: what a half of GLM-Image gathers to draw: `half` = all of it, once; `block` = one block "
        "at a time, at each token or step, in less memory; `auto` = `half` where a quarter of the device stays free.",
    )
    offload: bool = Field(default=False, description="`fsdp`: shards and moments wait on the CPU, which is slower.")
    find_unused_parameters: bool = Field(default=False, description="Let DDP look for parameters without gradient.")


class CacheConfig(Section):
    """What frozen encoders give of pictures and texts, in supervised, reward and preference training."""

    enabled: bool = Field(
        default=True,
        description="Encode pictures and texts once, before training, and keep that on disk while the encoders sleep; "
        "false = at every step, to the same numbers.",
    )
    dir: FilePath | None = Field(default=None, description="Where; runs may share it. Null = `cache` in `output_dir`.")


class CheckpointConfig(Section):
    """What is kept of the training."""

    save_dir: FilePath | None = Field(default=None, description="Checkpoints; null = `checkpoints` in `output_dir`.")
    resume_from: PlaceName | None = Field(
        default=None,
        min_length=1,
        description="`latest` (the newest whole checkpoint of the run), `auto` (that, or start anew without one) or "
        "a checkpoint's folder (a run's: its newest); null = start anew.",
    )
    save_total_limit: int | None = Field(
        default=3, ge=1, le=1_000_000_000, description="Newest checkpoints kept; null = all."
    )
    keep_best: bool = Field(
        default=True,
        description="With `evaluation.enabled`: an evaluation that is the best so far is saved, and that checkpoint is "
        "kept besides the newest and named in `checkpoints/best`. What decides: the held-out `total` of a run with "
        "rewards; otherwise the held-out loss (lower is better; of several halves their sum), or the PSNR of an "
        "autoencoder.",
    )
    save_optimizer: bool = Field(default=True, description="Save what exact resuming needs; false = weights only.")
    save_lora: bool = Field(
        default=False, description="With LoRA: also export the adapters as PEFT folders at each save."
    )
    lora_dir: FilePath | None = Field(default=None, description="Where those go; null = `lora` in `output_dir`.")
    save_lora_only: bool = Field(
        default=False,
        description="With LoRA: checkpoints hold the adapters, not the frozen weights.",
        json_schema_extra={"default_text": "false (`model.quantization`: true)"},
    )


class LoggingConfig(Section):
    """What a run tells, and how often. All intervals count training steps."""

    log_dir: FilePath | None = Field(
        default=None, description="TensorBoard files; null = `tensorboard` in `output_dir`."
    )
    log_interval: int = Field(
        default=10,
        ge=1,
        le=1_000_000_000,
        description="Steps between printed lines and tracked metrics, which are means over them.",
    )
    save_interval: int = Field(default=500, ge=1, le=1_000_000_000, description="Steps between checkpoints.")
    eval_interval: int = Field(default=100, ge=1, le=1_000_000_000, description="Steps between evaluations.")
    sample_interval: int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="Steps between sample images; null = `eval_interval`."
    )
    use_tensorboard: bool = Field(default=True, description="Write TensorBoard files.")
    use_wandb: bool = Field(default=False, description="Report to Weights & Biases; the key comes from WANDB_API_KEY.")
    wandb_project: str = Field(default="glm-image-training", min_length=1, description="Project there.")
    wandb_entity: str | None = Field(default=None, min_length=1, description="User or team there; null = your default.")
    wandb_mode: Literal["online", "offline", "disabled"] = Field(
        default="online", description="`offline` = sync it later."
    )
    use_swanlab: bool = Field(default=False, description="Report to SwanLab; the key comes from SWANLAB_API_KEY.")
    swanlab_project: str = Field(
        default="glm-image-training",
        pattern=r"^[0-9A-Za-z_+.-]{1,100}$",
        description="Project there.",
        json_schema_extra={"allowed": "1 to 100 letters, digits and `_ - + .`"},
    )
    swanlab_workspace: str | None = Field(
        default=None,
        pattern=r"^[0-9A-Za-z_-]{1,25}$",
        description="User or team there; null = your default.",
        json_schema_extra={"allowed": "1 to 25 letters, digits and `_ -`, or null"},
    )
    swanlab_mode: Literal["online", "offline", "disabled"] = Field(
        default="online", description="`offline` = sync it later."
    )
    use_trackio: bool = Field(
        default=False, description="Report to trackio; `trackio show` finds it, and TRACKIO_DIR moves it."
    )
    trackio_project: str = Field(default="glm-image-training", min_length=1, description="Project there.")
    trackio_space: str | None = Field(
        default=None, min_length=1, description="Hugging Face Space that shows it, made if need be; for `online`."
    )
    trackio_mode: Literal["online", "offline", "disabled"] = Field(
        default="offline",
        description="`offline` = on this machine; `online` = in `trackio_space`, whose key comes from HF_TOKEN.",
    )
    log_images: bool = Field(default=True, description="Draw sample images, for the `samples` folder and the trackers.")
    num_log_images: int = Field(
        default=4, ge=1, le=65536, description="Images per drawing: the first prompts, with fixed seeds."
    )

    rollout_interval: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Reward training: steps between those whose samples are kept in `rollouts` to be looked at, beside "
        "the first and the last; null = `eval_interval`.",
    )
    rollout_prompts: int = Field(
        default=4,
        ge=1,
        le=65536,
        description="Prompts of such a step whose samples are kept, of the first process; pictures of at most 256 px.",
    )
    rollout_mib: int = Field(
        default=64,
        ge=0,
        le=1_000_000,
        description="MiB of disk that all of them may take, with those that a resumed run has discarded: beyond it "
        "these go first, then steps that have near neighbours; 0 = none are kept.",
    )

    def sample_every(self) -> int | None:
        """Training steps between sample images; None when none are drawn."""
        if not self.log_images:
            return None
        return self.eval_interval if self.sample_interval is None else self.sample_interval

    def rollout_every(self) -> int | None:
        """Training steps between those whose samples are kept; None when none are."""
        if not self.log_images or self.rollout_mib == 0:
            return None
        return self.eval_interval if self.rollout_interval is None else self.rollout_interval


class EvaluationConfig(Section):
    """What a run is judged by: held-out prompts or pairs, or the first of the training data; told by their name."""

    enabled: bool = Field(default=True, description="Evaluate every `logging.eval_interval` steps and at the end.")
    eval_prompts_file: FilePath | None = Field(
        default=None, description="Held-out prompts; null = those of `eval_pairs`, or the first training prompts."
    )
    eval_target_images_dir: FilePath | None = Field(default=None, description="Their targets.")
    eval_source_images_dir: FilePath | None = Field(default=None, description="Their sources (i2i).")
    eval_pairs: FilePath | None = Field(
        default=None, description="DPO: held-out pairs to judge at each evaluation; null = the first training pairs."
    )
    eval_images: FilePath | None = Field(
        default=None, description="`data.images`: held-out pictures, cut at the centre; null = the first of those."
    )
    num_eval_samples: int = Field(
        default=10,
        ge=1,
        le=1_000_000_000,
        description="Prompts evaluated, from the first one on; without `eval_pairs`, pairs too.",
    )
    samples_per_prompt: int = Field(default=1, ge=1, le=65536, description="Images per prompt.")
    num_inference_steps: int | None = Field(
        default=None, ge=1, le=1000, description="Denoising steps; null = `model.dit.num_inference_steps`."
    )
    guidance_scale: float | None = Field(
        default=None, ge=1, le=1000, description="Guidance; 1 = off; null = `model.dit.guidance_scale`."
    )
    seed: int = Field(
        default=1234, ge=0, le=2**63 - 1, description="Seed of its samples, the same at every evaluation."
    )


class ResumeConfig(Section):
    """Resuming under a changed configuration."""

    accept: list[str] = Field(default=[], description="Keys, or sections, that may differ from the resumed run's.")
