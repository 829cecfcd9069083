"""Images of many problems: decoded and cut into patches on all cores, before the GPU asks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from core.vision import ImageConfig, load_image, preprocess_image

Images = tuple[torch.Tensor | None, torch.Tensor | None]  # pixel_values (P, …), grid_thw (n, 3)


def load_images(paths: Sequence[str], config: ImageConfig | None) -> Images:
    """pixel_values and grid_thw of these images in order; (None, None) of none."""
    if not paths:
        return None, None
    if config is None:
        raise ValueError(f"{paths[0]}: an image, but this model has no image settings (text-only?)")
    patches, grids = zip(*(preprocess_image(load_image(p), config) for p in paths))
    return torch.cat(patches), torch.tensor([tuple(g) for g in grids])


class ImageLoader:
    """`load_images` of many problems at once.

        loader.announce(next_paths)     a thread starts on them, while this step trains
        loader(paths)                   what was announced, else loaded now

    paths: the image files of each problem. Decoding and resizing run outside Python's lock, so
    that threads use all cores. One announcement is kept: a step's images and the next one's.
    """

    def __init__(self, config: ImageConfig | None):
        self.config, self.announced, self.coming = config, None, None
        self.background = ThreadPoolExecutor(1)

    def announce(self, paths: list[list[str]]) -> None:
        if any(paths):
            self.announced, self.coming = paths, self.background.submit(self._load, paths)

    def __call__(self, paths: list[list[str]]) -> list[Images]:
        return self.coming.result() if paths == self.announced else self._load(paths)

    def _load(self, paths: list[list[str]]) -> list[Images]:
        if not any(paths):
            return [(None, None)] * len(paths)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda files: load_images(files, self.config), paths))
