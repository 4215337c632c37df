"""What other trainers call the keys of a configuration: for suggestions where one of their names is met."""

from __future__ import annotations

_TRAINING = {
    "learning_rate": "lr base_lr base_learning_rate unet_lr",
    "batch_size": "batch bs batchsize train_batch_size per_device_train_batch_size micro_batch_size batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum accumulation_steps accumulate_grad_batches",
    "max_steps": "steps train_steps max_train_steps num_steps total_steps training_steps iterations iters",
    "num_epochs": "epochs epoch max_epochs num_train_epochs max_train_epochs",
    "lr_scheduler": "scheduler schedule lr_schedule lr_scheduler_type",
    "warmup_steps": "warmup lr_warmup_steps num_warmup_steps lr_warmup",
    "lr_cycles": "lr_num_cycles lr_scheduler_num_cycles",
    "lr_power": "lr_scheduler_power",
    "optimizer": "optim optimizer_type",
    "optimizer: adamw_8bit": "use_8bit_adam",
    "weight_decay": "adam_weight_decay wd",
    "adam_epsilon": "eps adam_eps",
    "max_grad_norm": "grad_clip max_norm clip_grad_norm gradient_clip_val gradient_clipping",
    "mixed_precision": "precision bf16 fp16 amp",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing",
    "ema.decay": "use_ema ema_decay",
    "min_snr_gamma": "snr_gamma",
}
_DATA = {
    "images": "train_data_dir train_data instance_data_dir instance_data_root instance_images data_dir data_path "
    "data_root dataset datasets dataset_name dataset_path dataset_dir folder_path folder image_dir images_dir "
    "image_folder image_path path",
    "images: [{path: FOLDER, repeats: 10}]": "num_repeats repeats repeat",
    "images: [{path: FOLDER, cap_source: COLUMN}]": "caption_column text_column caption_key",
    "trigger_word": "instance_prompt class_tokens trigger token placeholder_token",
    "caption_dropout": "caption_dropout_rate caption_dropout_probability cfg_dropout",
    "augmentation": "flip_aug random_flip horizontal_flip flip",
    "crop": "random_crop center_crop",
    "image_size: {height: 1024, width: 1024}": "resolution size img_size image_resolution target_size",
    "buckets.enabled": "enable_bucket bucket aspect_ratio_buckets",
    "buckets.upscale": "bucket_no_upscale",
    "num_workers": "dataloader_num_workers max_data_loader_n_workers workers",
    "pairs_split": "dataset_split_name",
    "prompts_file": "data_path_train prompts prompt_file",
}
_OTHERS = {
    "lora.rank": "rank r dim lora_rank lora_r lora_dim network_dim linear",
    "lora.alpha": "alpha lora_alpha network_alpha linear_alpha",
    "lora.dropout": "lora_dropout network_dropout",
    "lora.enabled": "use_lora use_peft network network_module",
    "model.name": "pretrained_model_name_or_path pretrained_model model_name model_name_or_path model_path "
    "name_or_path base_model",
    "model.torch_dtype": "dtype weight_dtype",
    "model.quantization: nf4": "load_in_4bit use_4bit quantize bnb_4bit_quant_type",
    "model.quantization: int8": "load_in_8bit use_8bit",
    "logging.save_interval": "save_every save_steps save_freq save_every_n_steps checkpointing_steps",
    "logging.sample_interval": "sample_every sample_every_n_steps generate_samples",
    "logging.eval_interval": "validation_steps eval_steps eval_every validate_every",
    "logging.log_interval": "log_every logging_steps log_steps",
    "logging.use_wandb": "report_to wandb log_with",
    "checkpoint.save_total_limit": "checkpoints_total_limit max_step_saves_to_keep keep_last",
    "checkpoint.resume_from": "resume_from_checkpoint resume_ckpt resume_path",
    "evaluation.eval_prompts_file": "validation_prompt validation_prompts sample_prompts",
    "output_dir": "output output_path save_path logging_dir run_name output_name",
    "reward.grpo.num_samples": "num_generations group_size",
    "reward.grpo.kl_coef": "kl_beta kl_weight",
    "dpo.beta": "beta_dpo",
    "dpo.prompt_dropout": "proportion_empty_prompts",
}

OTHER_NAMES = {
    name: key
    for prefix, table in (("training.", _TRAINING), ("data.", _DATA), ("", _OTHERS))
    for key, names in ((f"{prefix}{own}", names) for own, names in table.items())
    for name in names.split()
}
"""The key, some with what to write there, by the name that others have for it."""

IN_PLACE_OF_SECTIONS: dict[str, dict[type, str]] = {
    "data": {str: "{{images: {}}}"},
    "model": {str: "{{name: {}}}"},
    "lora": {int: "{{enabled: true, rank: {}}}", str: "{{enabled: true, start_from: {}}}"},
    "reward": {str: "{{metrics: [{}]}}"},
    "evaluation": {str: "{{eval_images: {}}}"},
    "cache": {str: "{{dir: {}}}"},
    "data.image_size": {int: "{{height: {0}, width: {0}}}"},
}
"""What a text or a number is meant as that stands in place of a section."""


def own_name(name: str) -> str | None:
    """The key that others call `name`."""
    return OTHER_NAMES.get(name.lower().lstrip("-").replace("-", "_"))
