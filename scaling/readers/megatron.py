"""Text logs as Megatron-LM and its descendants write them: a line a logged iteration, and a dump of the arguments."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from scaling.columns import DIVERGED, FINISHED
from scaling.readers.histories import History, Series

_ITERATION = re.compile(r"(?<!at )\biteration\s+(\d+)\s*/\s*(\d+)\s*\|(.*)")
_NUMBER = r"[-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|nan|inf)"
_FIELD = re.compile(rf"([A-Za-z][A-Za-z0-9_ ()/.\-]*?)\s*:\s*({_NUMBER})\s*(?=\||$)", re.I)
_ARGUMENT = re.compile(r"(?:^|\s)([a-z][a-z0-9_]*) \.{3,} (.*?)\s*$")
_WHERE = r"(?:iteration (\d+)|the end of training)(.*?)"
_VALIDATION = re.compile(rf"validation loss at {_WHERE}\|\s*lm loss value:\s*({_NUMBER})", re.I)
_PARAMETERS = re.compile(r"number of parameters on \(tensor, pipeline\) model parallel rank \((\d+), (\d+)\):\s*(\d+)")
_END = re.compile(r"\[after training is done\]|\[after training ends\]|training \.\.\. done", re.I)
FORGOTTEN = ("run", "name", "id", "experiment", "size", "budget", "dim", "width", "context", "batch", "loss", "status")
"""Arguments of these names are not what a table of runs calls so."""


def is_log(text: str) -> bool:
    return _ITERATION.search(text) is not None


def read(path: Path, text: str, *, is_fresh: bool = False) -> History:
    """The history of a log; `is_fresh`: it was written to a moment ago."""
    settings: dict[str, Any] = {}
    points: dict[str, list[tuple[float, float]]] = {}
    ranks: dict[tuple[str, str], int] = {}
    last = total = 0
    is_over = False
    for line in text.splitlines():
        if "iteration" in line and (match := _ITERATION.search(line)):
            last, total = int(match[1]), int(match[2])
            for name, value in _FIELD.findall(match[3]):
                points.setdefault(name.strip(), []).append((last, float(value)))
        elif " ..." in line and (match := _ARGUMENT.search(line)):
            settings[match[1]] = _value(match[2])
        elif match := _VALIDATION.search(line):
            at = int(match[1]) if match[1] else last
            where = " on test set" if "test" in match[2] else ""
            points.setdefault(f"validation lm loss{where}", []).append((at, float(match[3])))
        elif match := _PARAMETERS.search(line):
            ranks[match[1], match[2]] = int(match[3])
        is_over = is_over or _END.search(line) is not None
    series = {name: Series(*np.array(found, dtype=float).T) for name, found in points.items()}
    labels = _count_parameters(settings, ranks)
    status = _status(series, last, total, is_over, is_fresh)
    known = {name: each for name, each in settings.items() if name not in FORGOTTEN}
    return History(path.stem, str(path), series, known, status=status, labels=labels)


def _status(series: dict[str, Series], last: int, total: int, is_over: bool, is_fresh: bool) -> str:
    nans = series.get("number of nan iterations")
    if nans is not None and nans.values[-1] > 0:
        return DIVERGED
    if is_over or (total and last >= total):
        return FINISHED
    return "running" if is_fresh else "killed"


def _value(text: str) -> Any:
    """An argument as a number or a text; None for None."""
    if text in ("None", ""):
        return None
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def _count_parameters(arguments: dict[str, Any], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Add the counts of parameters to the arguments, as far as they tell; returns labels.

    The log's own number is exact where one rank holds the model. Otherwise the matrices are counted from the shape:
    attention 2 h d (n + g) and a feed-forward of 2 or, gated, 3 h f in each layer, embedding and head of h times the
    padded vocabulary.
    """

    def number(name: str) -> float:
        value = arguments.get(name)
        return float(value) if isinstance(value, float) else float("nan")

    hidden, layers, heads = number("hidden_size"), number("num_layers"), number("num_attention_heads")
    wide = number("ffn_hidden_size") if number("ffn_hidden_size") > 0 else 4 * hidden
    width = number("kv_channels") if number("kv_channels") > 0 else hidden / heads
    groups = number("num_query_groups") if arguments.get("group_query_attention") else heads
    inner = layers * (2 * hidden * width * (heads + groups) + (3 if arguments.get("swiglu") else 2) * hidden * wide)
    vocabulary = number("padded_vocab_size")
    ends = hidden * vocabulary * (2 if arguments.get("untie_embeddings_and_output_weights") else 1)
    whole = float(ranks["0", "0"]) if set(ranks) == {("0", "0")} and _is_one_rank(arguments) else float("nan")
    is_dense = not arguments.get("num_experts")
    labels = []
    if np.isfinite(whole):
        arguments["total_params"] = whole
        if is_dense and np.isfinite(ends):
            arguments["non_embedding_params"] = whole - ends
    elif is_dense and np.isfinite(inner):
        arguments["non_embedding_params"] = inner
        labels.append("parameters counted from the shape, matrices only")
        if np.isfinite(ends):
            arguments["total_params"] = inner + ends
    return labels


def _is_one_rank(arguments: dict[str, Any]) -> bool:
    degrees = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    return all(arguments.get(name) in (None, 1.0) for name in degrees)
