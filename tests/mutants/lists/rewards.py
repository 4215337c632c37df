"""What pictures are scored with."""

from tests.mutants.catalogue import of

CALCULATOR = "rewards/test_reward_calculator.py"
IMAGES = "rewards/test_image_metrics.py"
OWN = "rewards/test_own_rewards.py"
TEXT = "rewards/test_text_image_metrics.py"

MUTATIONS = [
    *of(
        "rewards/types.py",
        ("rewards/test_types.py", CALCULATOR),
        (
            "(scale * scores.nan_to_num()).sum(dim=0) / scale.sum(dim=0)",
            "(scale * scores.nan_to_num()).sum(dim=0)",
            "totals are not divided by the weights",
        ),
        ("[:, None] * ~scores.isnan()", "[:, None] * torch.ones_like(scores)", "what does not apply counts as zero"),
        ("total[dropped] = math.nan", "total[dropped] = 0.0", "skipped samples get zero"),
        ("(images.detach().float() * 255).round()", "(images.detach().float() * 255)", "pictures are cut to 8 bits"),
        ("[self.prompts[row] for row in rows]", "self.prompts[: len(rows)]", "selected rows have other prompts"),
        (
            "values.nanmean().item() for name",
            "values.nan_to_num().mean().item() for name",
            "means count what does not apply",
        ),
    ),
    *of(
        "rewards/reward_calculator.py",
        CALCULATOR,
        (
            "            values[sorted(failures)] = math.nan\n        total",
            "            pass\n        total",
            "failed samples keep other metrics' scores",
        ),
    ),
    *of(
        "rewards/types.py",
        CALCULATOR,
        ("values[rows[position]] = value", "values[position] = value", "scores of other samples"),
        ("if math.isfinite(value):", "if True:", "a score of NaN is a score"),
        ("if low < -1e-3 or high > 1 + 1e-3:", "if False:", "pictures in 0..255 are scored"),
        (
            "{rows[position]: reason for position, reason",
            "{position: reason for position, reason",
            "failures are told of other samples",
        ),
    ),
    *of(
        "rewards/reward_calculator.py",
        OWN,
        ("    check_overrides(found, RewardCalculator, spec)\n", "", "metrics score in the place of a misspelt hook"),
        ("        if self._whole_batch:", "        if False:", "a metric of whole batches is asked for samples"),
    ),
    *of(
        "rewards/custom.py",
        OWN,
        (
            "        if _gives_nothing(hook):",
            "        if False:",
            "a hook that returns nothing is found once it has drawn",
        ),
    ),
    *of(
        "rewards/foreign.py",
        "rewards/test_users_code.py",
        ("KeyboardInterrupt, Aborted,", "KeyboardInterrupt,", "a second stop signal is an error of the reward"),
    ),
    *of(
        "rewards/custom.py",
        CALCULATOR,
        (
            'if not failures or on_error == "skip":',
            'if not failures or on_error == "error":',
            "errors are skipped, skips are errors",
        ),
    ),
    *of(
        "rewards/structure.py",
        IMAGES,
        ("unbiased = WINDOW**2 / (WINDOW**2 - 1)", "unbiased = 1.0", "covariances are those of the population"),
        ("2 * covariance + c2", "2 * covariance + c1", "SSIM's second constant"),
        (
            '"source": has_source, "target": has_target, None: has_source or has_target}[self._reference]',
            '"source": has_target, "target": has_source, None: has_source or has_target}[self._reference]',
            "source and target swapped",
        ),
        (
            "references = batch.sources if use_source else batch.targets",
            "references = batch.targets if use_source else batch.sources",
            "compared with the other picture",
        ),
    ),
    *of(
        "rewards/objects.py",
        "rewards/test_objects.py",
        ("- NEARNESS * apart", "+ NEARNESS * apart", "the farther of two alike objects is meant"),
        ("0.5 * (one.shape == other.shape)", "0.5 * (one.shape != other.shape)", "objects pair with other shapes"),
        ("found_dx * np.sign(dx) > abs(found_dy)", "found_dx * np.sign(dx) < abs(found_dy)", "left is right"),
        ("if abs(dx) >= abs(dy):", "if abs(dx) < abs(dy):", "the axis along which objects stand less apart"),
        ("if _differ(wanted[i], wanted[j])]", "]", "objects that are alike stand in a relation"),
        ("1 - abs(len(found) - len(wanted))", "1 - max(0, len(wanted) - len(found))", "too many objects cost nothing"),
        (
            "known = [i for i, one in enumerate(wanted) if one.shape]",
            "known = list(range(len(wanted)))",
            "no shape is one",
        ),
        ("blob.x / width", "blob.x / height / 2", "places are not shares of the sides"),
        ("/ sum(weights.values())", "/ len(parts)", "the parts' weights do not sum to one"),
        ("key=lambda one: one.area", "key=lambda one: -one.area", "of a sign the smallest object counts"),
    ),
    *of(
        "rewards/types.py",
        "rewards/test_objects.py",
        (
            "right = ((scores >= 1 - 1e-6) | scores.isnan())",
            "right = scores >= 1 - 1e-6",
            "a metric must apply to be right",
        ),
        (").all(dim=0).float()", ").any(dim=0).float()", "one metric at 1 is enough"),
        ("if not set(counting) <= set(EXACT):", "if not set(counting) & set(EXACT):", "any total may be exactly right"),
    ),
    *of(
        "rewards/lpips_similarity.py",
        IMAGES,
        ("values.append(1 - self._model(", "values.append(self._model(", "unlike pictures score best"),
        (
            "(2 * images - 1 - self.shift) / self.scale",
            "(images - self.shift) / self.scale",
            "AlexNet sees pictures in [0, 1]",
        ),
        (
            "hidden.square().sum(dim=1, keepdim=True)",
            "hidden.square().sum(dim=2, keepdim=True)",
            "features normalised over rows",
        ),
        (
            ".mean(dim=(1, 2))\n        return distance",
            ".sum(dim=(1, 2))\n        return distance",
            "distances grow with the picture",
        ),
    ),
    *of(
        "rewards/aesthetic.py",
        IMAGES,
        (
            "self._predictor(image_embeddings(self._clip, batch.images)) / 10",
            "self._predictor(image_embeddings(self._clip, batch.images))",
            "aesthetic scores ten times too large",
        ),
        (
            "requires_grad_(False).eval().to(self._device)",
            "requires_grad_(False).train().to(self._device)",
            "the predictor drops out",
        ),
    ),
    *of(
        "rewards/text_accuracy.py",
        "rewards/test_text_accuracy.py",
        ("similarity - extra_text_penalty * extra", "similarity + extra_text_penalty * extra", "gibberish is rewarded"),
        ("similarity += match.similarity / len(wanted)", "similarity += match.similarity", "many words score more"),
        (
            "words[match.start : match.stop] = [None] * (match.stop - match.start)\n    extra",
            "pass\n    extra",
            "a word serves twice",
        ),
        (".casefold()", "", "case matters"),
        ("key=len, reverse=True)\n    words", "key=len)\n    words", "short words choose first"),
        (
            "scores.values[row] = score_lines(spans, lines,",
            "scores.values[row] = score_lines(spans, lines[:1],",
            "only the first line is read",
        ),
        ("scores.failures[row] = str(lines)", "pass", "a failed reading scores zero"),
    ),
    *of(
        "rewards/clip.py",
        (TEXT, IMAGES),
        ("return (images - mean) / std", "return images", "CLIP sees pictures that are not normalised"),
        ("[[places[prompt] for prompt in prompts]]", "[: len(prompts)]", "texts of other prompts"),
        ("return gradients[0]", "return gradients[0] * 0", "no gradient through the clamp"),
        ("max_length=limit", "max_length=limit * 2", "prompts are longer than the model"),
        (
            "F.normalize(torch.cat(rows), dim=-1)\n\n\ndef text",
            "torch.cat(rows)\n\n\ndef text",
            "embeddings have no unit length",
        ),
    ),
    *of(
        "rewards/clip_scores.py",
        TEXT,
        ("clip.logit_scale.exp().item() *", "clip.logit_scale.item() *", "PickScore with the logarithm of its scale"),
        ("PICK_SCALE = 26.0", "PICK_SCALE = 1.0", "PickScore as published counts 26 times"),
    ),
    *of(
        "rewards/differentiable.py",
        "rewards/test_differentiable.py",
        (
            "loss = loss + self._options.weights[name] * hinge",
            "loss = loss + hinge",
            "dmdr.reward.weights have no effect",
        ),
        ("reward_hinge(scores, self._options.threshold,", "reward_hinge(scores, 0.7,", "the threshold has no effect"),
        (
            "_after(options.negative_words, prompt)",
            "_after(options.positive_words, prompt)",
            "wanted and unwanted words are the same",
        ),
        ('if options.method == "refl":', 'if options.method == "srpo":', "refl and srpo swapped"),
        (
            'return f"{words} {prompt}" if words else prompt',
            'return f"{prompt} {words}" if words else prompt',
            "words stand behind the prompt",
        ),
    ),
]
