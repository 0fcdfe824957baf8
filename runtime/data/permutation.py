"""A keyed permutation of 0 .. n-1 in constant memory."""

from hashlib import blake2b
from math import isqrt

import numpy as np

_ROUNDS = 8


class Permutation:
    """A bijection of 0 .. n-1 that looks random and is fixed by `key`.

    An alternating Feistel network over Z_a x Z_b with a*b just above n (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002: the generalized Feistel cipher, with cycle walking for what falls outside).
    """

    def __init__(self, n: int, key: bytes):
        assert 0 < n < 2**62
        self.n = n
        self._a = isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = np.frombuffer(blake2b(key, digest_size=8 * _ROUNDS).digest(), "<u8")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """The images of `indices`, each in 0 .. n-1: int64 of the same shape."""
        images = self._encrypt(np.asarray(indices).astype(np.uint64))
        while (outside := images >= self.n).any():
            images[outside] = self._encrypt(images[outside])
        return images.astype(np.int64)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = x // b, x % b
        for even, odd in self._keys.reshape(-1, 2):
            left = (left + _mix(right ^ even) % a) % a
            right = (right + _mix(left ^ odd) % b) % b
        return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), wrapping modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
