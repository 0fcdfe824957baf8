"""Small token files for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data.index import write_index


def write_tokens(
    prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2", metadata: dict[str, Any] | None = None
) -> str:
    """Write a pair with these documents and return its path without the suffix."""
    kind = np.dtype(dtype)
    tokens = np.concatenate([np.asarray(each, np.int64) for each in documents]) if documents else np.array([], int)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(tokens.astype(kind).tobytes())
    write_index(f"{prefix}.idx", kind, np.array([len(each) for each in documents], np.int64))
    if metadata is not None:
        Path(f"{prefix}.json").write_text(json.dumps(metadata))
    return str(prefix)


def random_documents(seed: int, count: int, longest: int = 30, vocab_size: int = 500) -> list[list[int]]:
    """Documents of 0 to `longest` tokens."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest + 1, count)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]
