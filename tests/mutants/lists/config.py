"""What a configuration comes to."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "config/schema.py",
        ("config/test_schema.py", "config/test_resolved.py"),
        (
            "first(own.learning_rate, part_rate, shared.learning_rate,",
            "first(own.learning_rate, shared.learning_rate, part_rate,",
            "the shared rate wins over that of a half",
        ),
        (
            "weight_decay=first(own.weight_decay, shared.weight_decay)",
            "weight_decay=shared.weight_decay",
            "a half has no decay of its own",
        ),
        ("min_lr_ratio=first(own.min_lr_ratio, 0.0)", "min_lr_ratio=0.0", "min_lr_ratio has no effect"),
        (
            "clip_high=first(own.clip_range_high, own.clip_range, grpo.clip_range_high, grpo.clip_range)",
            "clip_high=first(own.clip_range_high, grpo.clip_range_high, own.clip_range, grpo.clip_range)",
            "the shared upper clip wins over a half's own",
        ),
        (
            "clip_low=first(own.clip_range, grpo.clip_range)",
            "clip_low=grpo.clip_range",
            "a half has no lower clip of its own",
        ),
        (
            'self.reward.ar_reward_weight if part == "ar"',
            'self.reward.dit_reward_weight if part == "ar"',
            "reward weights of the other half",
        ),
        (
            '(self.reward.ar if part == "ar" else self.reward.dit).weights',
            '(self.reward.dit if part == "ar" else self.reward.ar).weights',
            "weights of the other half",
        ),
        ("alpha=first(own.alpha, shared.alpha)", "alpha=shared.alpha", "a half has no alpha of its own"),
        ('getattr(shared, f"{part}_targets")', "shared.ar_targets", "all halves have the AR half's targets"),
        (
            "temperature=first(rollout.temperature, model.ar.temperature)",
            "temperature=model.ar.temperature",
            "rollout.temperature has no effect",
        ),
        (
            "first(evaluation.guidance_scale, renders.guidance_scale)",
            "renders.guidance_scale",
            "evaluation.guidance_scale has no effect",
        ),
        (
            "guidance_scale=first(rollout.guidance_scale, model.dit.guidance_scale)",
            "guidance_scale=model.dit.guidance_scale",
            "rollout.guidance_scale has no effect",
        ),
        (
            "self.training.use_reward and self.reward.enabled",
            "self.training.use_reward or self.reward.enabled",
            "finetuning has rewards",
        ),
        (
            "self.training.reward_frequency > 1)",
            "self.training.reward_frequency > 2)",
            "every second step is a reward step without targets",
        ),
        (
            "return weights | self.reward.metric_weights()",
            "return self.reward.metric_weights()",
            "what counts for one half is not scored",
        ),
        ("self.checkpoint.save_dir or self.output_dir", "self.output_dir", "save_dir has no effect"),
        (
            'return ("ar", "dit") if component == "both"',
            'return ("dit", "ar") if component == "both"',
            "the DiT half comes first",
        ),
        (
            "self.data.target_images_dir or self.reward.target_images_dir",
            "self.reward.target_images_dir",
            "data.target_images_dir has no effect",
        ),
        (
            '("source" if self.training.mode == "i2i" else "target")',
            '("target" if self.training.mode == "i2i" else "source")',
            "structure compares with the other picture",
        ),
    ),
    *of(
        "config/sections/resolved.py",
        ("config/test_schema.py", "config/test_resolved.py"),
        ("plans = num_samples // renders", "plans = num_samples", "groups are too large"),
        (
            '{"ar": 1, "dit": num_samples, "both": 2}[component]',
            '{"ar": num_samples, "dit": 1, "both": 2}[component]',
            "plans and renders swapped",
        ),
        ("return group if group.size == num_samples else None", "return group", "groups that do not come out"),
    ),
    *of(
        "config/sections/defaults.py",
        ("config/test_schema.py", "config/test_loading.py", "config/test_resolved.py"),
        (
            'T2I_WEIGHTS = {"lpips": 0.4, "aesthetic": 0.3, "text_accuracy": 0.3}',
            'T2I_WEIGHTS = {"lpips": 0.3, "aesthetic": 0.4, "text_accuracy": 0.3}',
            "default weights of the metrics",
        ),
        ("I2I_EPOCHS, I2I_WARMUP = 10, 500", "I2I_EPOCHS, I2I_WARMUP = 500, 10", "epochs and warmup of i2i"),
        ('_fill(rollout, "sde_kernel", "ode")', "pass", "the AR half's renders are noisy"),
        ('_fill(rollout, "sde_window_strategy", "random")', "pass", "a window without a strategy is all steps"),
        (
            "max(merged.get(name, weight), weight)",
            "min(merged.get(name, weight), weight)",
            "the smaller weight of the halves",
        ),
        (
            '_fill(grpo, "num_samples", plans * renders)',
            '_fill(grpo, "num_samples", plans + renders)',
            "groups of plans plus renders",
        ),
    ),
    *of(
        "config/loading/load.py",
        ("config/test_loading.py", "config/test_layers_of_files.py"),
        ("for file in paths[1:]:", "for file in paths[2:]:", "the second file is not laid over"),
        ("if config is None or source.problems:", "if config is None:", "problems are passed over"),
        (
            'set_key(source, ("training", "mode"), mode,',
            'set_key(source, ("training", "mode"), "t2i",',
            "--mode has no effect",
        ),
    ),
]
