"""Update rules, what is fetched, and the adapters that a run starts from."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "engine/optimizers.py",
        "engine/test_update_rules.py",
        ("use_bias_correction=True", "use_bias_correction=False", "Prodigy's first steps are small"),
        ('adjust_lr_fn="match_rms_adamw"', "adjust_lr_fn=None", "Muon's steps are not of AdamW's size"),
        ("parameter.device), 1 - 1 / beta1)", "parameter.device), 1 - beta1)", "another point is shown"),
        ("super().load_state_dict(state_dict)\n        self._share()", "super().load_state_dict(state_dict)", "stale"),
        ('parameter.ndim == 2 and words[-1] != "bias" and not outer', "parameter.ndim == 2", "Muon moves embeddings"),
        ('group["train_mode"] = True', 'group["train_mode"] = False', "schedule-free cannot step"),
        ("scale_parameter=False", "scale_parameter=True", "Adafactor scales its rate by the weights"),
    ),
    *of(
        "checkpoint/state_tree.py",
        "engine/test_update_rules.py",
        ("group.update(memory_of.get(names[0], {}))", "pass", "what was found for a group is forgotten"),
        ('"weight_sum", "lr_max"', '"weight_sum"', "the largest rate so far is forgotten"),
    ),
    *of(
        "engine/parts.py",
        ("engine/test_update_rules.py", "engine/test_optimizers.py"),
        ("if showing in self.ema.shown else", "if self.ema.shown else", "the average is shown everywhere"),
        ("settings.cycles * progress % 1", "progress", "no restarts"),
        ("(1 - progress) ** settings.power", "1 - progress", "the power has no effect"),
    ),
    *of(
        "engine/saving.py",
        "trainers/test_shown_weights.py",
        ('partial(as_shown, parts, "export")', 'partial(as_shown, parts, "evaluation")', "evaluate exports"),
    ),
    *of(
        "config/sections/defaults.py",
        "config/test_optimizer_checks.py",
        ('"prodigy": {"learning_rate": 1.0}', '"prodigy": {}', "Prodigy at AdamW's rate"),
        ('"adamw_schedule_free": {"scheduler": "constant"}', '"adamw_schedule_free": {}', "schedule-free on a cosine"),
    ),
    *of(
        "utils/downloads.py",
        "utils/test_downloads.py",
        (".startswith(self.sha256) and continued", ".startswith(self.sha256) and False", "another beginning is fatal"),
        ("if have and answer.status != 206:", "if False:", "a host without ranges is appended"),
        ("if not found.startswith(self.sha256):", "if False:", "any file takes the place"),
        ("if not self.here():\n                    self._fetch()", "self._fetch()", "each process fetches"),
    ),
    *of(
        "utils/hub_files.py",
        "rewards/test_wanted_files.py",
        ("return sha256_of(path) == sibling.lfs.sha256", "return True", "a damaged file of the hub stays"),
        ("for name in chosen if name not in cached]", "for name in chosen]", "what is here is counted again"),
        ("fp16 if fp16 and (self.half or not full) else full", "[*fp16, *full]", "both variants are fetched"),
    ),
    *of(
        "engine/fetching.py",
        "engine/test_fetching.py",
        ("if is_offline(config.model.local_files_only):", "if is_offline():", "local_files_only asks all the same"),
        ("if name in named | watched}", "if name in named}", "metrics that watch are not fetched"),
    ),
    *of(
        "engine/preparation.py",
        ("e2e/test_fetched_files.py", "engine/test_starting_adapters.py"),
        ("not (findings.errors and scorers_to_fetch(config))", "True", "files are fetched for a run that cannot start"),
        ("dataset.example_digests() | started", "dataset.example_digests()", "a resume from other adapters passes"),
    ),
    *of(
        "models/lora.py",
        "engine/test_starting_adapters.py",
        ("return not any(param.any()", "return True or not any(param.any()", "the reference forgets where it started"),
    ),
    *of(
        "models/adapters.py",
        "engine/test_starting_adapters.py",
        ("if not _as_told(value, ours)", "if False", "another rank or alpha passes"),
        ('alpha * math.sqrt(rank) if told.get("use_rslora") else alpha', "alpha", "rank-stabilised ones are weakened"),
        ("param.copy_(weights[name])", "pass", "adapters that are trained on begin anew"),
        ("each.scale(layer) * (b @ a)", "(b @ a)", "adapters are merged without their strength"),
        ("if a is None or b is None or a[0] != b[1] or a[0] == 0:", "if False:", "half an adapter passes"),
    ),
    *of(
        "models/adapter_settings.py",
        ("engine/test_starting_adapters.py", "engine/test_adapter_settings.py"),
        ("if settings else rank)", "if settings else 1)", "what is not told is not the rank"),
        ('settings.get("lora_alpha", DEFAULT_ALPHA) if', 'settings.get("lora_alpha", rank) if', "no default of PEFT's"),
        ("if told != rank:", "if False:", "an adapter of another rank than its settings say passes"),
        ('if kind != "LORA":', "if False:", "adapters of another kind pass"),
    ),
]
