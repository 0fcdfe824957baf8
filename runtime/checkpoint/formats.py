"""Which of the known formats a path holds, and reading it."""

import os
from pathlib import Path

from runtime.checkpoint import hugging_face, megatron
from runtime.checkpoint.interchange import Weights

MERISTEM, HUGGING_FACE, MEGATRON = FORMATS = ("meristem", "huggingface", "megatron")


def detect(source: str | os.PathLike[str]) -> str:
    """The format at a path or fsspec URL (URLs hold only our own). ValueError if it looks like none."""
    source = os.fspath(source)
    if "://" in source:
        return MERISTEM
    path = Path(source)
    if path.is_file():
        return MEGATRON
    if not path.is_dir():
        raise ValueError(f"{source} does not exist")
    if (path / megatron.DESCRIPTION).exists() or (path / megatron.TRACKER).exists():
        return MEGATRON
    if (path / "config.json").exists():
        return HUGGING_FACE
    return MERISTEM


def read(source: str | os.PathLike[str], which: str = "model") -> Weights:
    """Weights from any of the formats. ValueError if they cannot be read, or `which` ("ema") is not in them."""
    kind = detect(source)
    if kind == MERISTEM:
        from runtime.checkpoint import native

        return native.read(source, which)
    if which != "model":
        raise ValueError(f"{source} is a {kind} checkpoint, which has no {which} weights")
    return (hugging_face if kind == HUGGING_FACE else megatron).read(Path(source))
