"""Derived randomness: a seed is a function of what it is for, never of what ran before."""

import hashlib


def derive_seed(run_seed: int, purpose: str, *parts: int) -> int:
    """A 63-bit seed = hash(run seed, purpose, parts).

    A request's seed is ``derive_seed(run.seed, "sampling", position, sample)``, so a resumed run,
    a restarted actor or another number of replicas draws the same completions.
    """
    text = "/".join([str(run_seed), purpose, *map(str, parts)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
