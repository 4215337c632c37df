"""VGT's family and trainers, the slow average, and rates of a part's own."""

from tests.mutants.catalogue import of

AUTOENCODER = ("trainers/test_vgt_autoencoder.py",)
GENERATOR = ("trainers/test_vgt_generator.py",)
PROCESSES = ("parity/test_vgt_processes.py",)
LOADING = ("models/vgt/test_loading.py",)
FAMILY = ("models/vgt/test_family.py",)

MUTATIONS = [
    *of(
        "engine/parts.py",
        ("engine/test_parts.py",),
        ("self.decay if training_step >= self.start else 0.0", "self.decay", "the average sets out at once"),
        (
            "if training_step >= self.start else",
            "if training_step > self.start else",
            "the average sets out a step late",
        ),
        ("rate * group[RATE_SCALE]", "rate", "all parameters at one rate"),
        ("training_step - self.first_step", "training_step", "a late part is past its warmup"),
        ("self.total_steps - self.first_step - 1", "self.total_steps - 1", "a late part never ends its schedule"),
        ("stack.enter_context(part.as_shown(showing))", "pass", "the weights are shown, not the average"),
    ),
    *of(
        "engine/saving.py",
        AUTOENCODER,
        ("    with shown():\n        fill(folder)", "    fill(folder)", "pipelines hold the weights, not the average"),
    ),
    *of(
        "engine/setup.py",
        AUTOENCODER,
        ("rate_scales=family.rate_scales(name),", "", "the encoder learns at the full rate"),
    ),
    *of(
        "trainers/vgt_autoencoder_trainer.py",
        (*AUTOENCODER, *PROCESSES),
        ("start is None or self.step < start", "start is None", "the discriminator starts at once"),
        ("self.step < start", "self.step <= start", "the discriminator starts a step late"),
        ("term.loss / chunks", "term.loss", "chunks add up"),
        ("term.loss / len(seen)", "term.loss", "the discriminator's chunks add up"),
        ("config.vgt.latent_noise * uniform(", "config.vgt.latent_noise + 0 * uniform(", "one strength for all images"),
        ("if len(seen) > 1 else None", "if len(seen) > 99 else None", "LeCam's penalty of a chunk"),
        ("gather_tensor(self.world, means[None]).mean(dim=0)", "means", "logits of one process"),
        ('told["real_logits"], told["fake_logits"]', 'told["fake_logits"], told["real_logits"]', "averages swapped"),
        ("if vgt.distillation_weight > 0 else None", "if vgt.distillation_weight < 0 else None", "no teacher"),
        ("psnr, flat = -10 * error.log10()", "psnr, flat = 10 * error.log10()", "the sign of PSNR"),
        ("first_step=gan.start_step", "first_step=0", "the discriminator's schedule is the autoencoder's"),
        ("kl=vgt.kl_weight", "kl=1e-6", "one weight of the KL, whatever is asked"),
        ("perceptual=vgt.perceptual_weight", "perceptual=1.1", "one weight of perception, whatever is asked"),
        ("warmup_steps=gan.warmup_steps,", "", "the discriminator's warmup is the autoencoder's"),
        ("policy(images, *self._noise(images, positions))", "policy(images)", "latents without noise"),
        (
            "{} if self.discriminator is None else {AVERAGES: {\"averages\": self.averages}}",
            "{AVERAGES: {\"averages\": torch.zeros(2)}}",
            "LeCam's averages are lost in a resume",
        ),
    ),
    *of(
        "trainers/vgt_generator_trainer.py",
        (*GENERATOR, *PROCESSES),
        ("draws >= self.config.vgt.caption_dropout", "draws < self.config.vgt.caption_dropout", "most are dropped"),
        ("dropped = self._dropped(encoded, positions)", "dropped = encoded", "no caption is dropped"),
        ('random_orders(seed, "vgt/order", names, places)', 'random_orders(seed, "vgt/order", names[:1], places)[0]',
         "all images of a batch in one order"),
        ('normal(seed, "vgt/levels", names, (places,), device)', 'normal(seed, "vgt/noise", names, (places,), device)',
         "levels are the noise"),
        ("config.vgt.timestep_shift, repa.weight", "1.0, repa.weight", "no shift of the levels"),
        ("self.family.autoencoder.eval().encode(images)", "self.family.autoencoder.eval().encode(images.flip(-1))",
         "mirrored pictures"),
        ("term.loss / chunks", "term.loss", "chunks add up"),
    ),
    *of(
        "models/vgt/family.py",
        (*LOADING, *FAMILY, *GENERATOR, *AUTOENCODER),
        ("rows = [row // samples for row", "rows = [row % len(prompts) for row", "samples of the wrong prompts"),
        ("teacher=self.teacher)", "teacher=None)", "the teacher is not saved"),
        (".clamp(0, 1))", ")", "pictures leave [0, 1]"),
        ('parameter_groups()["encoder"]', 'parameter_groups()["rest"]', "the rest learns slowly"),
        ("[] if self.generator is None else self.generator.frozen()", "[]", "tied embeddings are trained"),
        ("sampling.parallel,", "1,", "one latent at a time, whatever is asked"),
    ),
    *of(
        "models/vgt/loading.py",
        LOADING,
        ("channel_norm=source.channel_norm)", "channel_norm=config.channel_norm)", "stage 2 without the norm"),
        ("config.check_autoencoder(own.latent_channels, own.channel_norm, own.stride)", "pass",
         "any autoencoder will do"),
        ("Teacher.from_pretrained(folder, dtype) if (folder / TEACHER_FILE).is_file() else None", "None",
         "the teacher is forgotten"),
        ("if own is not None and source.distils and name not in IN_MEMORY:", "if False:", "no teacher is asked for"),
        ("any(side % stride for side in source.size)", "False", "pictures of any size"),
        ('"latent_norm": own.channel_norm}', '"latent_norm": False}', "a generator without the norm"),
    ),
    *of(
        "config/checks/vgt.py",
        ("config/test_vgt_checks.py",),
        ("if getattr(config.vgt, name) != getattr(plain, name):", "if False:", "keys without effect"),
        ("if config.lora.enabled:", "if False:", "adapters that nobody adds"),
        ('if training.method != "finetune" or training.use_reward:', "if False:", "rewards of VGT"),
    ),
    *of(
        "models/run_folders.py",
        ("models/test_run_folders.py",),
        ("if folder != expanded(name):", "if False:", "training from a pointer that moves"),
    ),
]  # fmt: skip
