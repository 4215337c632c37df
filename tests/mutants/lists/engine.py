"""What every run is made of."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "engine/parts.py",
        ("engine/test_parts.py", "engine/test_optimizers.py"),
        ("if weights[name].shape != parameter.shape:", "if False:", "one row goes to all of a matrix"),
        ("self.settings.max_grad_norm or math.inf, total)", "math.inf, total)", "gradients are never clipped"),
        ("        self.scaler.unscale_(self.optimizer)\n", "", "fp16 gradients are clipped while they are scaled"),
        ("(own + 1) / (settings.warmup_steps + 1)", "own / settings.warmup_steps", "warmup at 0"),
        ('if settings.scheduler == "constant":', 'if settings.scheduler != "constant":', "constant and decay swapped"),
        (
            'if settings.scheduler == "linear":\n        return 1 - progress',
            'if settings.scheduler == "linear":\n        return progress',
            "a linear schedule rises",
        ),
        ("math.cos(math.pi * progress)", "math.cos(math.pi * progress / 2)", "half a cosine"),
        (
            "(settings.min_lr_ratio + (1 - settings.min_lr_ratio) * factor)",
            "factor",
            "min_lr_ratio has no effect",
        ),
        ("self.optimizer.zero_grad(set_to_none=True)", "pass", "gradients of earlier steps stay"),
        ("self.scaler.scale(loss).backward()", "loss.backward()", "the loss is not scaled"),
        ("self.skipped + 1 if scale < before else 0", "self.skipped + 1", "skipped updates are not counted in a row"),
        ("if self.skipped >= MAX_SKIPPED:", "if self.skipped > MAX_SKIPPED:", "one skipped update too many"),
        ("if not math.isfinite(norm) and", "if math.isnan(norm) and", "an infinite gradient passes"),
        ("with torch.no_grad(), self.reference():", "with self.reference():", "the reference computes with gradient"),
        ("        with self.old.applied():\n            yield", "        yield", "the old policy never stands in"),
        (
            "        load_optimizer_state_tree(self.optimizer,",
            "        (lambda *_: None)(self.optimizer,",
            "optimizer state is not restored",
        ),
        ("parameter.copy_(shard_like(weights[name], parameter))", "parameter.add_(0)", "weights are not restored"),
        ('            self.skipped = scaling["skipped"]\n', "", "the count of skipped updates is not restored"),
        ("snapshot.load_state_dict(", "dict(", "slow copies are not restored"),
        (
            '("average", self.average), ("ema", ema)]',
            '("ema", ema)]',
            "the slow reference is not saved",
        ),
    ),
    *of(
        "engine/optimizers.py",
        ("engine/test_optimizers.py", "engine/test_parts.py"),
        ("momentum=settings.beta1", "momentum=0", "sgd has no momentum"),
        ('"betas": (settings.beta1, settings.beta2)', '"betas": (settings.beta2, settings.beta1)', "betas swapped"),
        ("return torch.optim.AdamW(groups", "return torch.optim.Adam(groups", "coupled decay in adamw"),
        ('"eps": settings.epsilon', '"eps": 1e-8', "adam's epsilon has no effect"),
        ('1 - group["lr"] * group[DECOUPLED]', "1 - group[DECOUPLED]", "sgd's decay without the rate"),
        ("parameter.ndim >= 2 and", "parameter.ndim >= 1 and", "norms decay"),
        ("register_step_pre_hook(_decay)", "register_step_post_hook(_decay)", "sgd decays after its step"),
    ),
    *of(
        "engine/figures.py",
        "engine/test_figures.py",
        ("(values * weights).sum() / weights.sum()", "values.mean()", "terms of few rows count as much as others"),
        ("values.max() if name.endswith(MAXIMUM)", "values.mean() if name.endswith(MAXIMUM)", "maxima are averaged"),
        ("max(values))", "min(values))", "the least maximum of the processes is kept"),
        ("value * (weight / total)", "value / len(values)", "processes count alike, however many rows they saw"),
        (
            "for figures, weight in everywhere if name in figures]",
            "for figures, weight in everywhere[:1] if name in figures]",
            "only the first process is told of",
        ),
    ),
    *of(
        "engine/parts.py",
        "engine/test_replicas.py",
        (
            "if not find_unused_parameters:",
            "if find_unused_parameters:",
            "gradients lie elsewhere after the first step",
        ),
        (
            "parameter.grad = None\n    return",
            "parameter.grad = torch.ones_like(parameter)\n    return",
            "gradients begin with something",
        ),
    ),
]
