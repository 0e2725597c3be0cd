"""Position to item by arithmetic: a keyed permutation an epoch, one integer of state.

Position p counts every item ever taken. Epoch e = p div N, place i = p mod N, and the item is
permutation(seed, e)(i): each item exactly once an epoch, the tail of an epoch carried into the
next batch, and any rank can compute any batch of any step without the steps before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.permutation import keys_of_each, permuted, round_keys


@dataclass(frozen=True)
class Order:
    """The order of N items under a seed: any item may follow any other."""

    items: int
    seed: int

    @property
    def positions(self) -> int:
        """Positions an epoch."""
        return self.items

    @property
    def mode(self) -> dict[str, Any]:
        """All that the order depends on beside the seed and the items themselves (JSON)."""
        return {"order": "global", "items": self.items}

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers (int64, 0 to N-1) at `positions` (int64, 0 and up, any shape)."""
        return by_epoch(positions, self.positions, self._of_epoch)

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        return permuted(places, self.items, round_keys(self.seed, epoch))


@dataclass(frozen=True)
class WindowOrder(Order):
    """For storage where far seeks hurt: shuffled within windows of some small regions.

    Chunks of C consecutive items are permuted, laid into windows of about K chunks (three
    quarters to one and a half of it) and the items of a window permuted, so that reads stay
    inside one window's regions of C items. Where the first chunk begins differs by epoch.
    """

    # Larger chunks crowd a batch: of 2,000 shards 64 x 512 reads 0.80 of as many as chance would.
    chunk: int = 16
    chunks: int = 2048

    @property
    def mode(self) -> dict[str, Any]:
        """As in Order, with the sizes of chunk and window."""
        sizes = {"chunk": self.chunk, "chunks": self.chunks}
        return {"order": "window", "items": self.items} | sizes

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        place = self._within_windows(places, epoch)
        chunk, offset = np.divmod(place, self.chunk)
        keys = round_keys(self.seed, epoch, "chunks")
        # The short chunk stays last: every other place is then chunk x C + offset.
        whole = self.items // self.chunk
        full = chunk < whole
        chunk[full] = permuted(chunk[full], whole, keys)
        return (chunk * self.chunk + offset + int(keys[0, 0]) % self.items) % self.items

    def _within_windows(self, places: np.ndarray, epoch: int) -> np.ndarray:
        chunks = -(-self.items // self.chunk)
        windows = max(1, (2 * chunks + self.chunks) // (2 * self.chunks))
        # Window w holds the chunks from w x chunks / windows (rounded down) to the next one's.
        window = ((places // self.chunk + 1) * windows - 1) // chunks
        first = window * chunks // windows * self.chunk
        last = np.minimum((window + 1) * chunks // windows * self.chunk, self.items)
        keys = keys_of_each(round_keys(self.seed, epoch, "windows"), window)
        return first + permuted(places - first, last - first, keys)


@dataclass(frozen=True)
class StoredOrder(Order):
    """No shuffling: the items as they lie."""

    seed: int = 0

    @property
    def mode(self) -> dict[str, Any]:
        """As in Order."""
        return {"order": "none", "items": self.items}

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        return places


def by_epoch(
    positions: np.ndarray, length: int, item_at: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Items (int64) at `positions` of any shape; `item_at` knows the places of one epoch."""
    positions = np.asarray(positions, np.int64)
    epochs, places = np.divmod(positions.ravel(), length)
    out = np.empty_like(places)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        out[mine] = item_at(places[mine], int(epoch))
    return out.reshape(positions.shape)
