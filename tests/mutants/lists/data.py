"""Prompts, pictures and pairs."""

from tests.mutants.catalogue import of

MUTATIONS = [
    *of(
        "data/captioned/contents.py",
        "trainers/test_encoding_of_pictures.py",
        ("*view.size, mirrored=view.flipped)", "*view.size)", "mirrored pictures are encoded as they lie"),
        ("sample.source if is_source else sample.image", "sample.image", "what is edited is what is drawn"),
        ("hexdigest() != view.digest", 'hexdigest() == ""', "a changed picture is encoded under its old name"),
        (
            "if self._flip and may_flip(content.prompt)",
            "if self._flip",
            "pictures that are never mirrored are encoded so",
        ),
    ),
    *of(
        "data/pictures/buckets.py",
        "data/pictures/test_buckets.py",
        ("if height <= highest and width <= widest and height", "if height", "pictures are enlarged"),
        (
            "max(smallest, _up(side * w, h, step))",
            "max(smallest, _up(side * w, h, step) + step)",
            "wide ones are too wide",
        ),
        ("else max(best, found)", "else min(best, found)", "the smallest bucket of all"),
        ("zip(shape, *others, strict=True)", "zip(shape, strict=True)", "what goes with a picture is enlarged"),
    ),
    *of(
        "data/samplers/bucket_sampler.py",
        "data/samplers/test_bucket_sampler.py",
        (
            "torch.argsort(self._buckets[indices], stable=True)",
            "torch.arange(len(indices))",
            "batches of several sizes",
        ),
        ('"bucket batches", number)', '"bucket batches", 0)', "every epoch has its sizes in one order"),
        (
            "self._batches(draws * self.world_size)",
            "self._batches(draws)",
            "a step has one process' rows",
        ),
        ("return -(-batches // self.world_size)", "return batches // self.world_size", "the last batch is not drawn"),
        ("[self.rank])", "[0])", "all processes draw the same batch"),
    ),
    *of(
        "data/pictures/picture_size.py",
        "data/pictures/test_picture_size.py",
        ("(image.width, image.height) if turned", "(image.height, image.width) if turned", "orientation is not heeded"),
        ("if pixels and header[4:] in _TEXTS:", "if False:", "what follows a PNG's pixels is not heeded"),
        ("(bits >> 14 & 0x3FFF) + 1", "(bits >> 14 & 0x3FFF)", "a lossless WebP is a row short"),
    ),
    *of(
        "data/samplers/sampler.py",
        "data/samplers/test_sampler.py",
        (
            "self.position += self.global_batch_size",
            "self.position += self.batch_size",
            "processes draw the same samples again",
        ),
        (
            "start = self.position + self.rank * self.batch_size",
            "start = self.position",
            "all processes draw the same samples",
        ),
        (
            'shuffled(self.num_items, self.seed, "sampler", epoch)',
            'shuffled(self.num_items, self.seed, "sampler", 0)',
            "every epoch has one order",
        ),
        (
            "return ceil(epochs * self.num_items / self.global_batch_size)",
            "return epochs * self.num_items // self.global_batch_size",
            "the last samples of a run are not drawn",
        ),
        ("        self.position += count\n", "", "samples that were taken come again"),
        ("if not self.shuffle:", "if self.shuffle:", "shuffle reversed"),
        ("        self.position = position\n", "        self.position = 0\n", "a resumed run begins anew"),
    ),
    *of(
        "data/dataset.py",
        "data/test_dataset.py",
        (
            "self._stack(sources, flips)",
            "self._stack(sources, [False] * len(examples))",
            "the source of a flipped target is not flipped",
        ),
        (
            "self._augmentation and may_flip(example.prompt) and",
            "self._augmentation and",
            "pictures of quoted words are flipped",
        ),
        (
            "is_flipped(self._seed, epoch, example.index)",
            "is_flipped(self._seed, 0, example.index)",
            "the same flips in every epoch",
        ),
        ("image.pixels.flip(-1)", "image.pixels.flip(-2)", "pictures stand on their head"),
        (
            "_QUOTED.search(prompt) is None and _SIDED.search(prompt) is None",
            "_QUOTED.search(prompt) is None or _SIDED.search(prompt) is None",
            "left and right are flipped",
        ),
        (
            'derive_seed(seed, "horizontal flip", epoch, index)',
            'derive_seed(0, "horizontal flip", epoch, index)',
            "flips do not know the seed",
        ),
    ),
    *of(
        "data/pictures/images.py",
        "data/pictures/test_images.py",
        ("images.to(torch.float32) / 255", "images.to(torch.float32) / 256", "white is not 1"),
        ("return ImageOps.exif_transpose(image)", "return image", "photographs lie on their side"),
        ("ImageOps.fit(image, (width, height)", "ImageOps.fit(image, (height, width)", "height and width swapped"),
        ("if image.width * image.height > MAX_PIXELS:", "if image.width > MAX_PIXELS:", "decompression bombs pass"),
        (".permute(2, 0, 1)", ".permute(2, 1, 0)", "pictures are transposed"),
        ("centering=(left, top)", "centering=(0.0, 0.0)", "pictures are cut at one side"),
    ),
    *of(
        "data/fingerprint.py",
        ("data/test_dataset.py", "engine/test_resuming.py"),
        ("elif before[name] != after[name]:", "elif False:", "changed pictures are no drift"),
        (
            "for path in (example.target, example.source):",
            "for path in (example.target,):",
            "changed sources are no drift",
        ),
        ("parts = [example.prompt]", "parts = []", "changed prompts are no drift"),
        ("before.keys() | after.keys()", "before.keys() & after.keys()", "added and removed items are no drift"),
    ),
    *of(
        "data/preference/dataset.py",
        ("data/test_preference.py", "preference/test_pair_families.py", "preference/test_pair_encoding.py"),
        (
            "[pair.preferred for pair in pairs] + [pair.rejected for pair in pairs]\n        positions",
            "[pair.rejected for pair in pairs] + [pair.preferred for pair in pairs]\n        positions",
            "preferred and rejected swapped",
        ),
        (
            "scale = max(height / decoded.height, width / decoded.width)",
            "scale = min(height / decoded.height, width / decoded.width)",
            "pictures do not cover their size",
        ),
        ("hashlib.sha256(data).hexdigest() != digest", "False", "a picture that changed is taken"),
        ("(decoded.height, decoded.width))", "(decoded.width, decoded.height))", "original sizes are swapped"),
        (
            "position: tuple[float, float] = (0.5, 0.5)) -> CroppedImage",
            "position: tuple[float, float] = (0.0, 0.0)) -> CroppedImage",
            "crops are not in the middle",
        ),
        ("image.original_size, (top, left))", "image.original_size, (left, top))", "crops are told the wrong way"),
        (
            "for part in (pair.prompt, images[pair.preferred], images[pair.rejected]):",
            "for part in (images[pair.preferred], images[pair.rejected]):",
            "a pair's digest does not know its prompt",
        ),
    ),
]
