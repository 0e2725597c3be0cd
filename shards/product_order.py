"""P x K batches: P products with K photos each, in an order that is as resumable as the plain one.

An epoch cuts the items of every class into groups of K (the last one filled up from the same
class) and takes every group once. How the groups are laid out is a function of (seed, epoch)
alone, so one integer says where a training stands, for any number of processes.
"""

from typing import Any

import numpy as np

from shards.order import by_epoch
from shards.permutation import keys_of_each, mix, permuted, round_keys


class ProductOrder:
    """The order of N items of C classes in batches of P products x K photos.

    In a batch no class comes twice as long as no class has more groups than an epoch has whole
    batches, and, for the batch that two epochs share, there are at least 2P classes. Beyond that
    a class is spread over the batches as evenly as can be.
    """

    def __init__(self, class_ids: np.ndarray, seed: int, products: int, photos: int) -> None:
        """Take the class of every item (N,); O(N log N) once, O(groups log groups) an epoch."""
        self.seed, self.products, self.photos = seed, products, photos
        self.members = np.argsort(class_ids, kind="stable")
        ordered = class_ids[self.members]
        self.first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.sizes = np.diff(np.r_[self.first, len(ordered)])
        self.groups = -(-self.sizes // photos)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def positions(self) -> int:
        """Positions an epoch: the sum over classes of their size rounded up to K."""
        return int(self.groups.sum()) * self.photos

    @property
    def mode(self) -> dict[str, Any]:
        """All that the order depends on beside the seed and the items themselves (JSON)."""
        shape = {"products": self.products, "photos": self.photos}
        return {"order": "products", "items": len(self.members)} | shape

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers (int64, 0 to N-1) at `positions` (int64, 0 and up, any shape)."""
        return by_epoch(positions, self.positions, self._of_epoch)

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # Two stay: a batch may lie on both sides of an epoch's end.
            self._epochs = {e: laid for e, laid in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._laid_out(epoch)
        group, photo = np.divmod(places, self.photos)
        classes, turns = (of_groups[group].astype(np.int64) for of_groups in self._epochs[epoch])
        size = self.sizes[classes]
        keys = keys_of_each(round_keys(self.seed, epoch, "photos"), classes)
        inside = permuted((turns * self.photos + photo) % size, size, keys)
        return self.members[self.first[classes] + inside]

    def _laid_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Class of each group of an epoch, and which of its class's groups it is; int32 both."""
        head, whole, _ = self._cut(epoch)
        tail = self._tail(epoch)
        left = self.groups - np.bincount(tail, minlength=len(self.groups))
        # The epoch before has filled the first places of the batch that our head completes.
        beside = self._tail(epoch - 1) if epoch and head else tail[:0]
        begin = self._drawn(left, head, whole, round_keys(self.seed, epoch, "head"), beside)
        left -= np.bincount(begin, minlength=len(left))
        keys = round_keys(self.seed, epoch, "batches")
        classes = np.concatenate([begin, _spread(left, whole, keys), tail]).astype(np.int32)
        return classes, _turns(classes, self.groups)

    def _cut(self, epoch: int) -> tuple[int, int, int]:
        """Groups that complete a batch of the epoch before, whole batches, groups at the end."""
        total, P = int(self.groups.sum()), self.products
        head = min(-epoch * total % P, total)
        return head, (total - head) // P, (total - head) % P

    def _tail(self, epoch: int) -> np.ndarray:
        # A function of this epoch alone: the next one asks for it too.
        _, whole, groups = self._cut(epoch)
        keys = round_keys(self.seed, epoch, "tail")
        return self._drawn(self.groups, groups, whole, keys, np.zeros(0, np.int64))

    def _drawn(
        self, left: np.ndarray, groups: int, whole: int, keys: np.ndarray, beside: np.ndarray
    ) -> np.ndarray:
        """Classes of some groups for a batch that the epoch has only a part of.

        First those with more groups than would fit into the whole batches, then others at
        random, those that are in the batch already (`beside`) last.
        """
        left = left.copy()
        drawn: list[np.ndarray] = [np.zeros(0, np.int64)]
        random = mix(np.arange(len(left), dtype=np.uint64) ^ keys[0]) >> np.uint64(3)
        there = np.zeros(len(left), np.uint64)
        there[beside] = 1
        while groups:
            able = np.flatnonzero(left)
            spare = (2 - np.clip(left[able] - whole, 0, 2)).astype(np.uint64)
            rank = spare << np.uint64(62) | there[able] << np.uint64(61) | random[able]
            chosen = able[_smallest(rank, groups)]
            left[chosen] -= 1
            there[chosen] = 1
            groups -= len(chosen)
            drawn.append(chosen)
        return np.concatenate(drawn)


def _spread(groups: np.ndarray, batches: int, keys: np.ndarray) -> np.ndarray:
    """Classes (batches x P,) of whole batches that take `groups` (C,) of each class.

    The classes in random order, each with all its groups, run through the batches row by row as
    in McNaughton's wrap-around rule (1959): a class with no more groups than there are batches
    meets none twice in a row. Each row takes the batches in an order of its own; where a class
    runs on into the next row, those that have fewest of it come first.
    """
    if not batches:
        return np.zeros(0, np.int64)
    order = np.argsort(mix(np.arange(len(groups), dtype=np.uint64) ^ keys[1]), kind="stable")
    rows = np.repeat(order, groups[order]).reshape(-1, batches)
    out = np.empty((batches, len(rows)), np.int32)
    numbers, held = np.arange(batches, dtype=np.uint64), np.zeros(batches, np.int64)
    for row, classes in enumerate(rows):
        of_row = keys[2] ^ mix(np.array([row], np.uint64))
        turn = np.argsort(mix(numbers ^ of_row), kind="stable")
        if row and classes[0] == rows[row - 1, -1]:
            turn = turn[np.argsort(held[turn], kind="stable")]
        if not (row and classes[0] == rows[row - 1, -1] == classes[-1]):
            held[:] = 0
        held[turn[classes == classes[-1]]] += 1
        out[turn, row] = classes
    return out.ravel()


def _turns(classes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How often each class came before (int32), where class c comes `groups[c]` times."""
    order = np.argsort(classes, kind="stable")
    turns = np.empty(len(classes), np.int32)
    first = np.cumsum(groups) - groups
    turns[order] = np.arange(len(classes)) - np.repeat(first, groups)
    return turns


def _smallest(values: np.ndarray, number: int) -> np.ndarray:
    """Where the `number` smallest of `values` are, ascending; all when there are fewer."""
    if number < len(values):
        among = np.argpartition(values, number - 1)[:number]
        return among[np.argsort(values[among])]
    return np.argsort(values)
