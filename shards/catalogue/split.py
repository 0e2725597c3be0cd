"""Which products train, choose the threshold and score: a function of the label group alone."""

from hashlib import blake2b

SPLITS = ("train", "val", "test", "unlabelled")
TRAIN_SHARE, VAL_SHARE = 0.6, 0.2


def split_of(label_group: str) -> str:
    """The split of a product: adding postings never moves it. Without a label, unlabelled."""
    if not label_group:
        return "unlabelled"
    share = int.from_bytes(blake2b(label_group.encode(), digest_size=8).digest(), "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "val" if share < TRAIN_SHARE + VAL_SHARE else "test"
