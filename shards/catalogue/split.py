"""Which products train, choose the threshold and score: by their label group, or as a name says."""

from hashlib import blake2b

SPLITS = ("train", "val", "test", "unlabelled")
SPLIT_NAMES = dict(zip(SPLITS, SPLITS, strict=True)) | {
    "training": "train",
    **dict.fromkeys(("valid", "validation", "dev"), "val"),
    "testing": "test",
}
"""The words, in small letters, that name a split."""
TRAIN_SHARE, VAL_SHARE = 0.6, 0.2


def split_of(label_group: str) -> str:
    """The split of a product: adding postings never moves it. Without a label, unlabelled."""
    if not label_group:
        return "unlabelled"
    share = int.from_bytes(blake2b(label_group.encode(), digest_size=8).digest(), "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "val" if share < TRAIN_SHARE + VAL_SHARE else "test"
