"""Seeds that are functions of what they are for, so that a resumed run draws what an uninterrupted one would."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*parts: int | str) -> int:
    """A seed of 63 bits that is a hash of `parts`, such as (seed, 'ranks', step): neighbours share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_cpu(seed: int) -> None:
    """Seed what image transforms draw from: PyTorch's CPU generator, `random` and NumPy."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Give PyTorch's CPU generator, `random` and NumPy their states back at the end."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
