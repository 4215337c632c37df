"""What the model families share, and SDXL."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "models/denoising.py",
        "models/test_denoising.py",
        (
            "return signal * noise.float() - spread * clean.float()",
            "return spread * noise.float() - signal * clean.float()",
            "v of the other angle",
        ),
        ("return noise.float() - clean.float()", "return clean.float() - noise.float()", "velocity reversed"),
        (
            "(noisy.float() - spread * prediction.float()) / signal",
            "(noisy.float() - signal * prediction.float()) / spread",
            "x0 of an epsilon prediction",
        ),
        (
            "return signal * noisy.float() - spread * prediction.float()",
            "return signal * noisy.float() + spread * prediction.float()",
            "x0 of a v prediction",
        ),
        ("(self.signal / self.spread).square()", "self.signal / self.spread", "snr is not squared"),
        ("        if not self.renoises:", "        if self.renoises:", "renoising and ODE swapped"),
        (
            "noise = (noisy.float() - signal * clean.float()) / spread",
            "noise = (noisy.float() - clean.float()) / spread",
            "the implied noise",
        ),
    ),
    *of(
        "models/lora.py",
        ("models/test_ar_rollout.py", "models/vgt/test_sampling.py"),
        ("    module.eval()\n    try:", "    try:", "dropout where there should be none"),
        ("            part.training = True", "            part.training = False", "the model stays in evaluation mode"),
    ),
    *of(
        "models/lora.py",
        ("models/test_lora.py", "trainers/test_dmdr_steps.py"),
        ("        up.zero_()\n", "        up.fill_(0.01)\n", "adapters change the model at once"),
        ("bound = down.shape[1] ** -0.5", "bound = down.shape[0] ** -0.5", "A of another size"),
        ('uniform(seed, f"lora/{name}"', 'uniform(seed, "lora"', "all layers of a shape start alike"),
        (
            "base.weight.data.copy_(base.weight.float() + delta)",
            "base.weight.data.copy_(base.weight.float())",
            "merging adds nothing",
        ),
        ("delta = layer.scaling[ADAPTER] * (", "delta = 1.0 * (", "merging ignores alpha / rank"),
        (
            "layer.scaling[ADAPTER] = strength * scale\n",
            "layer.scaling[ADAPTER] = scale\n",
            "scaling forgets alpha / rank",
        ),
        ("            layer.scaling[ADAPTER] = strength\n", "            pass\n", "scaled adapters stay scaled"),
        ("layer.enable_adapters(True)", "pass", "switched-off adapters stay off"),
        ("param.requires_grad_(requires_grad)", "pass", "switching adapters off changes what is trained"),
        ("param.data = param.data.float()", "pass", "adapters in half precision"),
        ("lora_alpha=alpha,", "lora_alpha=rank,", "alpha has no effect"),
    ),
    *of(
        "models/snapshot.py",
        "models/test_snapshot.py",
        (
            "value.lerp_(param.detach().to(value.dtype), 1 - decay)",
            "value.lerp_(param.detach().to(value.dtype), decay)",
            "the average takes the other share",
        ),
        (
            "            with torch.no_grad():\n                yield",
            "            yield",
            "swapped weights with gradient",
        ),
        ("_exchange(self._params[name], values)\n", "pass\n", "the weights stay swapped"),
        ("torch.clear_autocast_cache()", "pass", "autocast keeps the other weights"),
        ("param.dtype, copy=True)", "param.dtype)", "a snapshot follows the weights"),
        ("value.copy_(state[name])", "pass", "a loaded snapshot is what it was"),
    ),
    *of(
        "models/weights.py",
        "models/test_weights.py",
        ("tensor.copy_(saved[name])", "pass", "initial weights are not loaded"),
        (
            "copied = param.detach().to(dtype, copy=True) if",
            "copied = param.detach().to(dtype) if",
            "a frozen copy follows the weights",
        ),
        ("layer.get_base_layer())", "layer)", "a frozen copy keeps its adapters"),
    ),
    *of(
        "models/sdxl/unet.py",
        ("models/test_sdxl_unet.py", "parity/test_sdxl_stock_pipeline.py"),
        (
            "unconditional + guidance_scale * (conditional - unconditional)",
            "conditional + guidance_scale * (conditional - unconditional)",
            "guidance is one too strong",
        ),
        ("SDXLText.cat([negative, text])", "SDXLText.cat([text, negative])", "guidance leads away from the prompt"),
        ("return text.zeros()", "return text", "no negative prompt"),
        ("noise.float() * scheduler.init_noise_sigma", "noise.float()", "sampling from another noise level"),
        (
            "scaled = scheduler.scale_model_input(latents, timestep)",
            "scaled = latents",
            "the UNet's input is not scaled",
        ),
        ("list(generators[rows])", "list(generators[: len(noise[rows])])", "step noise by place in the micro-batch"),
        ("time_ids[rows], part_negative", "time_ids[: len(noise[rows])], part_negative", "sizes of other rows"),
        (
            "        for part in self.frozen():\n            part.eval()\n        return self",
            "        return self",
            "the encoders drop while training",
        ),
        (
            "if steps == 1 and self.one_step_timestep is not None:\n            scheduler",
            "if False:\n            scheduler",
            "one-step models are told the last timestep",
        ),
        (
            "decoder = self.taesd if taesd and self.taesd is not None else self.vae",
            "decoder = self.vae",
            "taesd is not used",
        ),
    ),
    *of(
        "models/sdxl/denoiser.py",
        (
            "models/test_denoising.py",
            "parity/test_sdxl_few_steps.py",
            "trainers/test_dpo_trainer.py::test_turbo_noises_at_four_levels_only",
        ),
        (
            "(self.schedule.length // steps) - 1)",
            "(self.schedule.length // steps))",
            "few-step levels are one too high",
        ),
        ("negative=condition.negative", "negative=None", "the empty prompt of a condition is ignored"),
        ("renoises = True", "renoises = False", "few-step sampling keeps its noise"),
        (
            "(u.float() * length).long()",
            "(u.float() * (length - 1)).round().long()",
            "the ends of the schedule are rare",
        ),
    ),
    *of(
        "models/sdxl/schedule.py",
        ("models/test_denoising.py", "models/test_sdxl_unet.py"),
        (
            "return alphas.sqrt(), (1 - alphas).sqrt()",
            "return (1 - alphas).sqrt(), alphas.sqrt()",
            "signal and spread swapped",
        ),
        ("return alphas.sqrt(), (1 - alphas).sqrt()", "return alphas, 1 - alphas", "variances taken for scales"),
    ),
    *of(
        "models/sdxl/latents.py",
        ("models/test_sdxl_family.py", "models/test_sdxl_unet.py", "parity/test_sdxl_stock_pipeline.py"),
        ("(torch.cat(parts) - mean) / std", "torch.cat(parts)", "latents are not scaled"),
        ("mean + posterior.std.float() * drawn", "mean + drawn", "the posterior's spread is one"),
        ("* 2 - 1).to(weight.dtype)", ").to(weight.dtype)", "images are encoded in [0, 1]"),
        ('1 / vae.config["scaling_factor"]', 'vae.config["scaling_factor"]', "the scaling factor upside down"),
        ("vae.dtype == torch.float16 and", "False and", "SDXL's VAE overflows in fp16"),
    ),
    *of(
        "models/sdxl/types.py",
        ("models/test_sdxl_unet.py", "preference/test_pair_families.py"),
        (
            "return torch.cat([pair.expand(batch, 2) for pair in pairs], dim=1)",
            "return torch.cat([pair.expand(batch, 2) for pair in pairs[::-1]], dim=1)",
            "micro-conditioning in another order",
        ),
        (
            "self.prompt_embeds.repeat_interleave(count, 0)",
            "self.prompt_embeds.repeat(count, 1, 1)",
            "embeddings of other prompts",
        ),
    ),
    *of(
        "models/sdxl/family.py",
        ("models/test_sdxl_family.py",),
        ("guidance_scale=sampling.guidance_scale", "guidance_scale=5.0", "evaluations ignore the guidance"),
    ),
]
