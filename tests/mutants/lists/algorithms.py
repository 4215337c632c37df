"""Pure tensor maths."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "algorithms/advantages.py",
        ("algorithms/test_advantages.py", "algorithms/test_credit_tree.py"),
        (
            "(count - 1).clamp(min=1)).sqrt() + eps)",
            "count.clamp(min=1)).sqrt() + eps)",
            "standard deviations divide by n",
        ),
        ("return torch.where(spreads, centred, 0.0)", "return centred", "flat groups get rounding for advantages"),
        ('if scale == "group":', 'if scale == "batch":', "group and batch scale swapped"),
        ("return total / (total.std() + eps)", "return total", "GDPO is not normalised over the batch"),
        ("rewards.sum(dim=2) / counts.clamp(min=1)", "rewards.mean(dim=2)", "unscored renders count as zero"),
        (
            "((between - within) / renders).clamp(min=0)",
            "(between / renders).clamp(min=0)",
            "the plan's share has the renders' noise",
        ),
        ("weight.abs().sum() / present * (weight * filled)", "(weight * filled)", "missing metrics count as zero"),
    ),
    *of(
        "algorithms/policy_loss.py",
        ("algorithms/test_policy_loss.py", "algorithms/test_token_mean.py"),
        ("terms = terms + kl_coef * kl", "terms = terms - kl_coef * kl", "the KL pushes away"),
        (
            "_k3(actions.reference_log_probs - actions.log_probs)",
            "_k3(actions.log_probs - actions.reference_log_probs)",
            "the KL of the other direction",
        ),
        (
            'carried = log_ratio if level == "token"',
            'carried = log_ratio if level == "sequence"',
            "token and sequence ratios swapped",
        ),
    ),
    *of(
        "algorithms/flow_matching.py",
        "algorithms/test_flow_matching.py",
        (
            "return (1 - levels) * clean + levels * noise",
            "return levels * clean + (1 - levels) * noise",
            "image and noise swapped",
        ),
        ("    return noise - clean\n", "    return clean - noise\n", "velocity reversed"),
        ("scale * u / (scale * u + (1 - u))", "u / (scale * u + (1 - u))", "shift without its numerator"),
        ("mean + std * torch.special.ndtri(inner)", "mean + torch.special.ndtri(inner)", "std has no effect"),
    ),
    *of(
        "algorithms/flow_sde.py",
        ("algorithms/test_flow_sde.py", "algorithms/test_trust_region.py", "parity/test_flow_sde_marginals.py"),
        ("latents * (1 + correction * dt)", "latents * (1 - correction * dt)", "the score has the wrong sign"),
        ("eta * (now / (1 - inputs.below_one)).sqrt()", "eta * now.sqrt()", "the flow kernel's strength"),
        (
            "return SDETransition(mean, level * (-dt).sqrt())",
            "return SDETransition(mean, level)",
            "std without sqrt(-dt)",
        ),
        (
            "after * math.cos(angle) * noise, after * math.sin(angle)",
            "after * math.sin(angle) * noise, after * math.cos(angle)",
            "cps has sine and cosine swapped",
        ),
        (
            "mean_per_sample(((mean - other_mean) / spread).square()) / 2",
            "mean_per_sample(((mean - other_mean) / spread).square())",
            "the KL is twice as large",
        ),
        ("return stds / stds[stds > 0].mean()", "return stds", "noise weights are not of mean 1"),
        ("stds[stds > 0].mean()", "stds.mean()", "a step without noise counts in the mean of the weights"),
        ("/ 2 - std.flatten().log() - _HALF_LOG_2PI", "/ 2 - _HALF_LOG_2PI", "log-probs without their normaliser"),
        (
            "old_log_probs.detach().float() + kl) * std",
            "old_log_probs.detach().float() - kl) * std",
            "guard leans below 0",
        ),
        ("(divergence > threshold))", "(divergence < threshold))", "Flow-DPPO drops what stayed"),
        ("((advantages < 0) & (ratio < 1))", "((advantages < 0) & (ratio > 1))", "Flow-DPPO drops what comes back"),
        (
            "first + int(uniform * (last - first - size + 1))",
            "first + int(uniform * (last - first - size))",
            "the last window is never drawn",
        ),
        ("max(0, start - decay_threshold)", "max(0, start)", "the window decays from the start"),
        ("step % leaves_at[-1]", "min(step, leaves_at[-1] - 1)", "the window does not start over"),
        (
            "torch.where(now < _PURE_NOISE, now,",
            "torch.where(now > _PURE_NOISE, now,",
            "sigma_max stands in for every level",
        ),
    ),
    *of(
        "algorithms/nft.py",
        ("algorithms/test_nft.py",),
        ("min(0.001 * step, 0.5)", "min(0.001 * step, 0.9)", "the ramp goes too far"),
        ("max(step - 75, 0)", "max(step, 0)", "the late ramp begins at once"),
        (
            "share * positive + (1 - share) * negative",
            "share * negative + (1 - share) * positive",
            "good and bad swapped",
        ),
        ("advantage_max / beta *", "beta * advantage_max *", "beta upside down"),
        ('fixed["old_velocity"] - offset', 'fixed["old_velocity"] + offset', "both branches are the positive one"),
        ("with torch.no_grad():\n        size", "if True:\n        size", "the normaliser has a gradient"),
    ),
    *of(
        "algorithms/awm.py",
        "algorithms/test_awm.py",
        (
            "return -mean_per_sample(error.square())",
            "return mean_per_sample(error.square())",
            "the density of the worst",
        ),
        ("2 * huber * square", "huber * square", "huber at half its weight"),
    ),
    *of(
        "algorithms/preference.py",
        "algorithms/test_preference.py",
        ("-F.logsigmoid(margin)", "F.logsigmoid(margin)", "preferences are unlearned"),
        ("(self.margins > 0)", "(self.margins >= 0)", "a draw counts as right"),
        ("snr.clamp(max=gamma) / (snr + 1)", "snr.clamp(max=gamma) / snr", "min-SNR of v like that of epsilon"),
    ),
    *of(
        "algorithms/distillation.py",
        "algorithms/test_distillation.py",
        ("(to_real - to_fake) / norm", "(to_fake - to_real) / norm", "the generator is led away"),
        ("to_real.abs()", "to_fake.abs()", "normalised by the fake score"),
        ("return 1 + 3 * share, 1 + share / 2", "return 1 + share / 2, 1 + 3 * share", "DynaRS leans to clean images"),
        ("(strength + 1) * positive - negative", "strength * positive - negative", "SRPO is one too weak"),
        ("torch.relu(threshold - score.float())", "torch.relu(score.float() - threshold)", "good images are punished"),
    ),
]
