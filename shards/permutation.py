"""A keyed permutation of 0 to n-1 that is computed for any place alone, without a table.

A balanced Feistel network over the next power of four, walked until the value lies inside
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
    """Keys (ROUNDS, n), uint64: other ones for each of `numbers` (n,), from `keys` (ROUNDS, 1)."""
    return mix(keys ^ mix(numbers.astype(np.uint64)))


def permuted(places: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray) -> np.ndarray:
    """Where `places` (n,), each below its own of `sizes`, go under `keys` (ROUNDS, 1 or n): int64.

    Places with equal size and keys go to different values, all below that size.
    """
    walked = places.astype(np.uint64)
    sizes = np.broadcast_to(np.asarray(sizes, np.uint64), walked.shape)
    half = _half_bits(sizes)
    keys = np.broadcast_to(keys, (ROUNDS, *walked.shape))
    outside = np.arange(len(walked))
    while len(outside):
        walked[outside] = _feistel(walked[outside], half[outside], keys[:, outside])
        outside = outside[walked[outside] >= sizes[outside]]
    return walked.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014), a bijection of uint64.

    Every input bit reaches every output bit.
    """
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _half_bits(sizes: np.ndarray) -> np.ndarray:
    # frexp's exponent is the number of bits of a whole number, exactly up to 2**53.
    _, bits = np.frexp(np.maximum(sizes, np.uint64(2)) - np.uint64(1))
    return np.maximum((bits + 1) // 2, 1).astype(np.uint64)


def _feistel(values: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half) | right
