"""What tells a mixture of data from another."""

import hashlib

from scaling.readers.rows import Row


def mixture(data: Row) -> str | None:
    """A fingerprint of the data's contents and proportions. Seed and sequence length, which the order's own has too,
    are left out: runs that differ in them alone are of one mixture."""
    sources = data.get("sources") or []
    if not sources or not all("fingerprint" in each for each in sources):
        return data.get("fingerprint")
    whole = sum(each.get("weight", 1.0) for each in sources)
    parts = sorted(f"{each['fingerprint']} {each.get('weight', 1.0) / whole:.12g}" for each in sources)
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
