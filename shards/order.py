"""Position to item by arithmetic: a keyed permutation an epoch, one integer of state.

Position p counts every item ever taken. Epoch e = p div N, place i = p mod N, and the item is
permutation(seed, e)(i): each item exactly once an epoch, the tail of an epoch carried into the
next batch, and any rank can compute any batch of any step without the steps before it.
The permutation is a balanced Feistel network with cycle walking (Black and Rogaway, 2002).
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """The order of N items under a seed; `shuffle=False` keeps them as they lie."""

    items: int
    seed: int
    shuffle: bool = True

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers (int64, 0 to N-1) at `positions` (int64, 0 and up, any shape)."""
        positions = np.asarray(positions, np.int64)
        epochs, places = positions // self.items, positions % self.items
        if not self.shuffle:
            return places
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            out[mine] = self._permute(places[mine].astype(np.uint64), int(epoch))
        return out

    def _permute(self, places: np.ndarray, epoch: int) -> np.ndarray:
        half = max(1, (max(self.items - 1, 1).bit_length() + 1) // 2)
        keys = _round_keys(self.seed, epoch)
        walked = _feistel(places, half, keys)
        while (outside := walked >= self.items).any():
            walked[outside] = _feistel(walked[outside], half, keys)
        return walked.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: every input bit reaches every output bit.
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
