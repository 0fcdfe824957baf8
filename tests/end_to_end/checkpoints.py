"""A run's folder with one checkpoint, as training leaves it, for the tests of what reads checkpoints."""

from pathlib import Path

import torch

from runtime.checkpoint.interchange import Weights, parameter_shapes
from runtime.checkpoint.store import CheckpointStore
from runtime.data.tokenizer import train
from runtime.model.config import ModelConfig
from runtime.state import FORMAT, TrainState

NAME = "tokens-1024-segment-0"
CORPUS = ["def add(a, b):\n    return a + b\n", "naïve café, 5 € — 日本語 🙂🙂 Ελλάδα\n"] * 20


def small_tokenizer() -> str:
    return train(CORPUS, 300).to_str()


def small_weights(seed: int = 0, tokenizer: str | None = None, **options) -> Weights:
    """A random decoder with sharp, varied predictions."""
    sizes = {"num_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 4, "num_kv_heads": 2}
    config = ModelConfig(**sizes | {"vocab_size": 300} | options)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config):
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if len(shape) == 1 else 2 * noise / shape[1] ** 0.5
    return Weights(config, tensors, tokenizer, end_of_text=None, seq_len=64)


def write_run(folder: Path, weights: Weights, ema: Weights | None = None) -> Path:
    """The folder of a run whose newest checkpoint holds the weights, an optimizer's state and maybe an average."""
    tensors = {f"model.{name}": each for name, each in weights.tensors.items()}
    tensors |= {f"optimizer.{name}.exp_avg": torch.zeros_like(each) for name, each in weights.tensors.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": each for name, each in ema.tensors.items()}
    state = {
        "format": FORMAT,
        "model": weights.config.model_dump(mode="json"),
        "tokenizer": {"fingerprint": "0", "json": weights.tokenizer},
        "config": {"data": {"seq_len": weights.seq_len}},
        "train": TrainState().to_json(),
    }
    store = CheckpointStore(str(folder / "checkpoints"))
    store.save(NAME, tensors, state, asynchronous=False)
    assert store.close()
    return folder
