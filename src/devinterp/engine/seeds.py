"""Randomness is data: every stream is seeded by a hash of what it is for."""

import hashlib

import numpy as np
import torch


def stream_seed(*what: int | str | None) -> int:
    """64 bits from a hash of the parts. Streams of different parts are unrelated, however close the numbers are.

    Torch's CPU generator takes 32 of them: two CPU streams coincide with probability 2^-32.
    """
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def noise_generator(device: torch.device, *what: int | str | None) -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(*what) % 2**63)


def order_generator(*what: int | str | None) -> np.random.Generator:
    return np.random.default_rng(stream_seed(*what))
