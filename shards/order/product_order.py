"""P x K batches: P products with K photos each, in an order as resumable as the plain one.

An epoch cuts the items of every class into groups of K (the last one filled up from the same
class) and uses every group once. The layout of the groups is a function of (seed, epoch) alone,
so one integer is the position of a training, for any number of processes.
"""

import numpy as np

from shards.order.global_order import Mode, Order
from shards.order.permutation import keys_of_each, mix, permuted, round_keys


class ProductOrder(Order):
    """The order of N items of C classes in batches of P products x K photos.

    No class occurs twice in a batch if no class has more groups than an epoch has complete
    batches and, for the batch that two epochs share, there are at least 2P classes. Otherwise a
    class is spread over the batches as evenly as possible.
    """

    name = "products"

    def __init__(self, class_ids: np.ndarray, seed: int, products: int, photos: int) -> None:
        """`class_ids` (N,): of every item; P `products`, K `photos`. O(N log N) once an epoch."""
        super().__init__(len(class_ids), seed)
        self.products, self.photos = products, photos
        self.members = np.argsort(class_ids, kind="stable")
        ordered = class_ids[self.members]
        self.first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.sizes = np.diff(np.r_[self.first, len(ordered)])
        self.groups = -(-self.sizes // photos)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def positions(self) -> int:
        """Positions of an epoch: the sum over classes of their size rounded up to K."""
        return int(self.groups.sum()) * self.photos

    @property
    def mode(self) -> Mode:
        return super().mode | {"products": self.products, "photos": self.photos}

    def numbers(self, places: np.ndarray, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # Two are kept: a batch may lie on both sides of an epoch's end.
            self._epochs = {e: laid for e, laid in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._layout(epoch)
        group, photo = np.divmod(places, self.photos)
        classes, turns = (of_groups[group].astype(np.int64) for of_groups in self._epochs[epoch])
        size = self.sizes[classes]
        keys = keys_of_each(round_keys(self.seed, epoch, "photos"), classes)
        inside = permuted((turns * self.photos + photo) % size, size, keys)
        return self.members[self.first[classes] + inside]

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Class of each group of an epoch, and the group's number in its class; int32 both."""
        head, batches, _ = self._cut(epoch)
        tail = self._tail(epoch)
        left = self.groups - np.bincount(tail, minlength=len(self.groups))
        # The epoch before has filled the first places of the batch that our head completes.
        shared = self._tail(epoch - 1) if epoch and head else tail[:0]
        begin = self._drawn(left, head, batches, round_keys(self.seed, epoch, "head"), shared)
        left -= np.bincount(begin, minlength=len(left))
        spread = _spread(left, batches, round_keys(self.seed, epoch, "batches"))
        classes = np.concatenate([begin, spread, tail]).astype(np.int32)
        # The n-th occurrence of a class is its group n.
        order = np.argsort(classes, kind="stable")
        turns = np.empty(len(classes), np.int32)
        first = np.cumsum(self.groups) - self.groups
        turns[order] = np.arange(len(classes)) - np.repeat(first, self.groups)
        return classes, turns

    def _cut(self, epoch: int) -> tuple[int, int, int]:
        """Groups that complete the batch of the epoch before, complete batches, groups left."""
        total, P = int(self.groups.sum()), self.products
        head = min(-epoch * total % P, total)
        return head, (total - head) // P, (total - head) % P

    def _tail(self, epoch: int) -> np.ndarray:
        # A function of this epoch alone, since the next epoch computes it too.
        _, batches, groups = self._cut(epoch)
        keys = round_keys(self.seed, epoch, "tail")
        return self._drawn(self.groups, groups, batches, keys, np.zeros(0, np.int64))

    def _drawn(
        self, left: np.ndarray, groups: int, batches: int, keys: np.ndarray, shared: np.ndarray
    ) -> np.ndarray:
        """Classes (groups,) for a batch that the epoch fills only partly.

        `left` (C,) are the groups to draw from, by class. First come classes with more groups than
        there are complete `batches`, then others at random; classes that are already in the batch
        (`shared`) come last.
        """
        left = left.copy()
        drawn: list[np.ndarray] = [np.zeros(0, np.int64)]
        random = mix(np.arange(len(left), dtype=np.uint64) ^ keys[0]) >> np.uint64(3)
        present = np.zeros(len(left), np.uint64)
        present[shared] = 1
        while groups:
            able = np.flatnonzero(left)
            spare = (2 - np.clip(left[able] - batches, 0, 2)).astype(np.uint64)
            rank = spare << np.uint64(62) | present[able] << np.uint64(61) | random[able]
            if groups < len(able):
                smallest = np.argpartition(rank, groups - 1)[:groups]
                able, rank = able[smallest], rank[smallest]
            chosen = able[np.argsort(rank)]
            left[chosen] -= 1
            present[chosen] = 1
            groups -= len(chosen)
            drawn.append(chosen)
        return np.concatenate(drawn)


def _spread(groups: np.ndarray, batches: int, keys: np.ndarray) -> np.ndarray:
    """Classes (batches x P,) of complete batches that use `groups` (C,) of each class.

    The classes in random order, each with all its groups, fill the batches row by row as in
    McNaughton's wrap-around rule (1959): a class with no more groups than there are batches comes
    to none twice in a row. Each row visits the batches in another order; where a class continues
    in the next row, the batches that have fewest of it come first.
    """
    if not batches:
        return np.zeros(0, np.int64)
    order = np.argsort(mix(np.arange(len(groups), dtype=np.uint64) ^ keys[1]), kind="stable")
    rows = np.repeat(order, groups[order]).reshape(-1, batches)
    out = np.empty((batches, len(rows)), np.int32)
    numbers, held = np.arange(batches, dtype=np.uint64), np.zeros(batches, np.int64)
    for row, classes in enumerate(rows):
        row_key = keys[2] ^ mix(np.array([row], np.uint64))
        visit = np.argsort(mix(numbers ^ row_key), kind="stable")
        if row and classes[0] == rows[row - 1, -1]:
            visit = visit[np.argsort(held[visit], kind="stable")]
        if not (row and classes[0] == rows[row - 1, -1] == classes[-1]):
            held[:] = 0
        held[visit[classes == classes[-1]]] += 1
        out[visit, row] = classes
    return out.ravel()
