"""A keyed permutation of 0 to n-1 that is computed for any place alone, without a table.

A balanced Feistel network over the next power of four, applied until the value lies inside
(cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
"""

from hashlib import blake2b

import numpy as np

ROUNDS = 6


def round_keys(*names: object) -> np.ndarray:
    """Keys (ROUNDS, 1), uint64, from any names such as seed and epoch."""
    text = ":".join(str(name) for name in names)
    digest = blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")[:, None]


def keys_of_each(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Different keys (ROUNDS, n), uint64, for each of `numbers` (n,), from `keys` (ROUNDS, 1)."""
    return mix(keys ^ mix(numbers.astype(np.uint64)))


def permuted(places: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """The values (n,), int64, of `places` (n,) under `keys` (ROUNDS, 1 or n).

    Places and values are below their `sizes`; with equal size and keys the values differ.
    """
    walked = places.astype(np.uint64)
    sizes = np.broadcast_to(np.asarray(sizes, np.uint64), walked.shape)
    # frexp's exponent is the number of bits of an integer, exactly up to 2**53.
    _, bits = np.frexp(np.maximum(sizes, np.uint64(2)) - np.uint64(1))
    half_bits = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    keys = np.broadcast_to(keys, (ROUNDS, *walked.shape))
    outside = np.arange(len(walked))
    while len(outside):
        half = half_bits[outside]
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = walked[outside] >> half, walked[outside] & mask
        for key in keys[:, outside]:
            left, right = right, left ^ (mix(right ^ key) & mask)
        walked[outside] = (left << half) | right
        outside = outside[walked[outside] >= sizes[outside]]
    return walked.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014), a bijection of uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
