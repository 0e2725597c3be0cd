"""Mixup and cut-mix: two photos in one picture, each with its share of the loss.

The margin belongs to the angle between an item and one class, so a mixed photo goes to the head
twice: share x loss with its own class + (1 - share) x loss with its partner's (Zhang et al., mixup,
ICLR 2018; Yun et al., CutMix, ICCV 2019). Partners are neighbours in the global order and the share
is a function of (seed, step), so neither depends on the number of processes.
"""

from dataclasses import dataclass

import numpy as np
import torch

from dist_train.config import ImageTraining, TrainingOptions


@dataclass(frozen=True)
class Mix:
    """How the photos of one step are mixed: `share` of each stays its own."""

    share: float
    box: tuple[slice, slice] | None
    """Rows and columns that show the partner; None: all of it, in shares."""
    stride: int
    """Places between partners: those of one product are no partners in batches by product."""

    def photos(self, photos: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W), each with its partner's share in it."""
        others = self.partners(photos)
        if self.box is None:
            return self.share * photos + (1 - self.share) * others
        mixed = photos.clone()
        mixed[..., *self.box] = others[..., *self.box]
        return mixed

    def partners(self, values: torch.Tensor) -> torch.Tensor:
        """The values (b, ...) of each place's partner."""
        return values.unflatten(0, (-1, 2, self.stride)).flip(1).flatten(0, 2)


def mix_of_step(config: TrainingOptions, side: int, step: int) -> Mix | None:
    """The mix of `step` for photos of `side` pixels; None where none is asked for."""
    if not isinstance(config, ImageTraining) or not config.mixes:
        return None
    rng = np.random.default_rng([config.seed, step])
    cuts = config.cutmix > 0 and (config.mixup == 0 or rng.random() < 0.5)
    alpha = config.cutmix if cuts else config.mixup
    share, stride = float(rng.beta(alpha, alpha)), config.photos_per_product
    if not cuts:
        return Mix(share, None, stride)
    rows, columns = (_cut(rng, side, np.sqrt(1 - share)) for _ in range(2))
    hidden = (rows.stop - rows.start) * (columns.stop - columns.start) / side**2
    return Mix(1 - hidden, (rows, columns), stride)


def _cut(rng: np.random.Generator, side: int, length: float) -> slice:
    """A stretch of `length` (a share of the side) about any middle, as far as it is inside."""
    middle, half = rng.integers(side), round(side * length) // 2
    return slice(int(max(0, middle - half)), int(min(side, middle + half)))
