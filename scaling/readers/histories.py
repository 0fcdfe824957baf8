"""From the logged steps of one run to its row: for event files, Weights & Biases exports and text logs alike."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from scaling.columns import DIVERGED, FINISHED, normalised
from scaling.curves import final_loss, last_writes
from scaling.readers.amounts import as_status
from scaling.readers.derived import resolve_batch
from scaling.readers.losses import BITS, HELD_OUT, PERPLEXITY, Loss, candidates
from scaling.readers.mapping import Mapped, guess

TOKENS = ("tokens", "tokensseen", "consumedtokens", "numtokens", "ntokens", "totaltokens", "numinputtokensseen",
          "throughputtotaltokens", "totaltokensseen", "traintokens")  # fmt: skip
SEQUENCES = ("consumedsamples", "sequences", "samples", "consumedtrainsamples")
STEP = ("step", "globalstep", "trainerglobalstep", "iteration", "iter", "trainstep")
RATE = ("lr", "learningrate", "trainlr", "trainlearningrate", "lrgroup0", "lradamw", "optimlr", "optimlearningrate")
BATCH = {"batch_tokens": ("batchtokens", "tokensperbatch"), "batch_sequences": ("globalbatchsize", "batchsize")}
FLOPS = ("flops", "totalflops", "trainflops", "throughputtotalflops")
NO_STATUS = (
    "event files and exports of logged steps do not tell how a run ended: those that did not diverge are taken for "
    "finished, also where they were killed or are running"
)
AT_END = 0.005
"""An evaluation within this share of a run's length before its end is one at its end."""


@dataclass(frozen=True)
class Series:
    """A quantity over steps, both (n,), in the order of writing."""

    steps: np.ndarray
    values: np.ndarray

    def cleaned(self) -> "Series":
        """Only the rows that count after resumes, in order of steps."""
        kept = last_writes(self.steps)
        return Series(self.steps[kept], self.values[kept])


@dataclass
class History:
    """What a logger has kept of one run."""

    run: str
    source: str
    series: dict[str, Series]
    settings: dict[str, Any] = field(default_factory=dict)
    """Constants of the run, by its own names."""
    axis: str = "steps"
    """What the steps of the series count: steps or tokens."""
    status: str | None = None
    """None where the logger does not know."""
    labels: list[str] = field(default_factory=list)


def row(history: History, columns: Mapping[str, str]) -> Mapped:
    """The row of a run, as a table of one. `columns` may name the series or the setting of any column of ours; one that
    this run has not stays unknown, with a label and a message in `missing`."""
    series = {name: each for name, each in history.series.items() if len(each.steps)}
    cleaned = {name: each.cleaned() for name, each in series.items()}
    settings = {name: value for name, value in history.settings.items() if value is not None}
    named = {ours: name for ours, name in columns.items() if name in series}
    missing = {ours: name for ours, name in columns.items()
               if name and name not in series and not _is_setting(name, settings)}  # fmt: skip
    others = {ours: "" if ours in missing else name for ours, name in columns.items() if ours not in named}
    labels = [*history.labels, *(f"no {name!r} for {ours}" for ours, name in missing.items())]
    found = guess(pd.DataFrame([settings or {"": None}]), others, history.source, with_loss=False)
    there = ", ".join([*series, *settings][:40])
    found.missing = {
        ours: f"{history.source}: no series or setting for columns {ours}={name}; it has: {there}"
        for ours, name in missing.items()
    }
    found.frame = found.frame.drop(columns=[""], errors="ignore")
    found.frame = found.frame[[name for name in found.frame if name in found.mapping]]
    resolve_batch(found, history.source)
    put = _putter(found, {ours for ours, name in columns.items() if ours != "loss"})
    _read_progress(history, cleaned, put)
    _read_rates(cleaned, put)
    if "loss" not in missing:
        _read_loss(history, cleaned, named.get("loss"), put, labels)
    put = _putter(found)
    for ours, name in named.items():
        if ours != "loss":
            put(ours, float(cleaned[name].values[-1]), name)
    end = max((float(each.steps[-1]) for each in cleaned.values()), default=float("nan"))
    if rewritten := max((len(series[name].steps) - len(cleaned[name].steps) for name in series), default=0):
        labels.append(f"{rewritten} steps written again after a resume")
    put("run", history.run, "")
    put("source", history.source, "")
    status = history.status or as_status(found.frame["status"].iloc[0] if "status" in found.frame else None)
    if status is None:
        found.notes.append(NO_STATUS)
    put("status", DIVERGED if _ends_in_no_number(cleaned) else status or FINISHED, "")
    if not np.isfinite(end):
        labels.append("empty")
    put("labels", "; ".join(dict.fromkeys(labels)) or None, "")
    return found


def _putter(found: Mapped, given: Collection[str] = ()):
    """What fills a column, unless it is one of those that were given."""

    def put(column: str, value: Any, name: str) -> None:
        if column in given:
            return
        found.frame[column] = [value]
        if name:
            found.mapping[column] = name

    return put


def _is_setting(name: str, settings: Mapping[str, Any]) -> bool:
    return name in settings or re.split(r"\s*[*/]\s*", name)[0] in settings


def _find(series: Mapping[str, Series], names: tuple[str, ...]) -> str | None:
    """The first series of these normalised names, whole or after the last slash."""
    whole = {normalised(name): name for name in reversed(series)}
    last = {normalised(name.rsplit("/", 1)[-1]): name for name in reversed(series)}
    return next((table[name] for table in (whole, last) for name in names if name in table), None)


def _read_progress(history: History, series: Mapping[str, Series], put) -> None:
    """Steps, tokens and FLOPs at the end."""
    if not series:
        return
    end = max(float(each.steps[-1]) for each in series.values())
    put(history.axis, end, f"axis of the series, as {history.axis}")
    step = _find(series, STEP)
    if step is not None and history.axis != "steps":
        put("steps", float(series[step].values[-1]), step)
    tokens = _find(series, TOKENS)
    if tokens is not None and history.axis != "tokens":
        put("tokens", float(series[tokens].values[-1]), tokens)
    flops = _find(series, FLOPS)
    if flops is not None:
        put("flops", float(series[flops].values[-1]), flops)
    sequences, length = _find(series, SEQUENCES), history.settings.get("seq_length")
    if tokens is None and history.axis != "tokens" and sequences is not None and length:
        put("tokens", float(series[sequences].values[-1]) * float(length), f"{sequences} * seq_length")


def _read_rates(series: Mapping[str, Series], put) -> None:
    """Peak and last learning rate, and the last batch."""
    rate = _find(series, RATE)
    if rate is not None:
        values = series[rate].values[np.isfinite(series[rate].values)]
        if values.size:
            put("lr", float(values.max()), f"largest {rate}")
            put("final_lr", float(values[-1]), f"last {rate}")
    for column, names in BATCH.items():
        name = _find(series, names)
        if name is not None:
            put(column, float(series[name].values[-1]), name)


def _read_loss(history: History, series: Mapping[str, Series], named: str | None, put, labels: list[str]) -> None:
    """The last held-out loss if there is one at the run's end, else a smooth of the end of the training loss."""
    found = [each for each in candidates(series) if each.tier not in (BITS, PERPLEXITY) or each.name == named]
    if named is not None:
        found = [each for each in found if each.name == named] or [Loss(named, HELD_OUT)]
    if not found:
        labels.append("no loss")
        return
    held_out = [each for each in found if each.tier == HELD_OUT]
    training = [each for each in found if each.tier != HELD_OUT]
    ends = [float(each.steps[-1]) for name, each in series.items() if np.isfinite(each.values).any()]
    length = max(ends, default=0.0)
    at_end = [each for each in held_out if series[each.name].steps[-1] >= length * (1 - AT_END)]
    if at_end:
        loss = at_end[0]
        if len(at_end) > 1:
            labels.append(f"held-out loss of {loss.name}, the first of {len(at_end)} sets")
        put("loss", float(series[loss.name].values[-1]), loss.name)
        put("loss_error", float("nan"), "")
        put("loss_kind", f"held-out ({loss.name})", "")
        return
    if not training:
        labels.append("no loss at its end")
        return
    if held_out:
        labels.append("no held-out loss at its end")
    loss = training[0]
    curve = series[loss.name]
    smooth = final_loss(curve.steps, np.log(curve.values) if loss.tier == PERPLEXITY else curve.values)
    if not np.isfinite(smooth.value):
        labels.append(f"no smooth of {smooth.rows} logged losses")
    put("loss", smooth.value, f"smooth of {f'ln({loss.name})' if loss.tier == PERPLEXITY else loss.name}")
    put("loss_error", smooth.error, "AR(1) of the smooth")
    put("loss_kind", f"training, smoothed ({loss.name})", "")


def _ends_in_no_number(series: Mapping[str, Series]) -> bool:
    """Whether a training loss does, which is a divergence whatever the logger says."""
    losses = (each.name for each in candidates(series) if each.tier != HELD_OUT)
    return any(not np.isfinite(series[name].values[-1]) for name in losses)
