"""Random choices that come out the same on every machine and Python version."""

import random
from collections.abc import MutableSequence, Sequence
from hashlib import blake2b

import numpy as np

VERSION = 1
"""Version of the generated catalogue, part of every seed. Version 1 is frozen: reported figures
rest on it, so whatever changes a title or a photo takes a new number."""


class Dice:
    """A stream of choices that depends on (version, seed, purpose, numbers) alone.

    Only `random.Random.random` is ever called: it is the one method whose sequence
    Python promises to keep.
    """

    __slots__ = ("unit",)

    def __init__(self, seed: int, purpose: str, *numbers: int):
        text = f"{VERSION}/{seed}/{purpose}/{numbers}"
        digest = blake2b(text.encode(), digest_size=16).digest()
        self.unit = random.Random(int.from_bytes(digest, "big")).random

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self.unit() * count)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def pick(self, options: Sequence):
        return options[int(self.unit() * len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        """A position, each drawn in proportion to its weight; weights sum to any total."""
        left = self.unit() * sum(weights)
        for position, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return position
        return len(weights) - 1

    def bell(self, spread: float) -> float:
        """About normal with mean 0 and the given standard deviation, within ±3 of it.

        A sum of three uniforms: additions round the same everywhere, log and cos do not.
        """
        return (self.unit() + self.unit() + self.unit() - 1.5) * 2 * spread

    def shuffle(self, items: MutableSequence) -> None:
        """Fisher and Yates, in place."""
        for last in range(len(items) - 1, 0, -1):
            other = int(self.unit() * (last + 1))
            items[last], items[other] = items[other], items[last]

    def grain(self, height: int, width: int) -> np.ndarray:
        """Evenly spread bytes, (height, width) uint8, from one draw of this stream."""
        words = -(-height * width // 8)
        raw = np.random.Philox(key=int(self.unit() * 2**53)).random_raw(words)
        return raw.astype("<u8").view(np.uint8)[: height * width].reshape(height, width)
