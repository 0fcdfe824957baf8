"""A tiny tokenized corpus and a tiny run on it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from runtime.config import Config

VOCABULARY = 61


def write_corpus(path: Path, documents: int = 200, seed: int = 0, vocab_size: int = VOCABULARY) -> Path:
    """A Megatron pair of documents in which the next token mostly follows from the last, so that it can be learned."""
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    for _ in range(documents):
        length = int(generator.integers(20, 120))
        steps = generator.choice([1, 2, 5], size=length, p=[0.8, 0.15, 0.05])
        builder.add_item(torch.from_numpy(np.cumsum(steps) % (vocab_size - 1)))
        builder.end_document()
    builder.finalize(f"{path}.idx")
    return path


def tiny_run(folder: Path, **sections: dict[str, Any]) -> Config:
    """A configuration of a two-layer decoder on `write_corpus(folder / "data" / "train")` and "heldout", logging
    every step; `sections` are merged over it."""
    raw: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "vocab_size": VOCABULARY,
        },
        "data": {"seq_len": 32, "sources": [{"path": str(folder / "data" / "train")}]},
        "batch": {"sequences": 8},
        "optim": {"lr": 1e-2},
        "schedule": {"horizon": 8 * 32 * 12, "warmup": 8 * 32 * 2, "decay": "25%"},
        "evaluation": {"sets": [{"name": "heldout", "path": str(folder / "data" / "heldout")}], "every": "50%"},
        "checkpoint": {"every": 8 * 32 * 4},
        "observe": {"log_every": 1, "tensorboard": False},
    }
    for section, values in sections.items():
        raw[section] = raw.get(section, {}) | values
    return Config.model_validate(raw)
