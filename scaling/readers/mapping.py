"""Which column of a foreign table is which of ours: by its name and its values, shown to the user, overridable.

A unit is taken from a name ("params_M", "tokens (B)") or a value ("70M") only where the values agree with it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from scaling.columns import COLUMNS, NAMES, TEXTS, Column, normalised
from scaling.readers.amounts import UNITS, doubt, numbers, typical
from scaling.readers.losses import BITS, PERPLEXITY, candidate, candidates, preferred, words

LARGE = ("total", "non_embedding", "active", "tokens", "unique_tokens", "flops", "batch_tokens", "parent_tokens")
"""Columns that are counted in millions and more, so that their names may carry a unit."""
SIZES = ("total", "non_embedding", "active")
BY_NAME, BY_LAST_PART, BY_SYMBOL = 0, 1, 2
SOUNDS = {
    "total": frozenset(("param", "params", "parameter", "parameters")),
    "tokens": frozenset(("token", "tokens")),
    "flops": frozenset(("flop", "flops")),
    "lr": frozenset(("lr",)),
}
"""A word in a name that is no alias, but the only one of its kind in a table."""
NOT_AN_AMOUNT = frozenset((
    "per", "ratio", "batch", "unique", "log", "log2", "log10", "ln", "ms", "s", "sec", "second", "seconds", "speed",
    "throughput", "gpu", "device", "rank", "embedding", "embeddings", "emb", "vocab", "mult", "multiplier", "min",
    "final", "end", "decay", "warmup", "scale", "eval", "evaluated", "val", "test", "id", "type",
))  # fmt: skip
WHOLE = replace(COLUMNS[NAMES.index("total")], symbols=("N", "n"))
"""Beside a column of parameters without embeddings the symbol is all of them."""
MOSTLY = 0.5
"""Share of texts from which on a column is one of texts, and not a spoiled one of numbers."""
RATIOS = (
    "tokensperparam", "tokensperparameter", "tokensparam", "tokensparams", "tokensparamratio", "tokenparamratio",
    "tokentoparamratio", "tpp", "tokenmultiplier",
)  # fmt: skip
_UNIT = re.compile(
    r"^(.+?)[\s_\-./]*(?:\(|\[)?\s*(?:in[\s_]+)?(?<![A-Za-z])(k|mm?|bn?|g|t|thousand|million|billion|trillion)s?"
    r"(?:\s*(?:of\s+)?(?:params?|parameters|tokens?))?\s*[)\]]?$",
    re.I,
)
_POWER = re.compile(r"^(.+?)\s*[(\[]\s*[x\u00d7*]?\s*(?:1e|10\^|10\*\*)\+?(\d+)\s*[)\]]$", re.I)
_SI_FLOPS = re.compile(r"^(.*?)([gtpezy])(flops?)$", re.I)
_PF_DAYS = re.compile(r"^(.+?)[\s_\-(\[]*(pf[\s_-]*days?|petaflop[/\s_-]*s[/\s_-]*days?)\s*[)\]]?$", re.I)
TIMES = re.compile(r"^(.*\S)\s*([*/])\s*([0-9.eE+-]+)$")


@dataclass
class Mapped:
    """A table in our columns, its others after them."""

    frame: pd.DataFrame
    mapping: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    """Column to why a name that would fit it was not taken, although it holds numbers."""
    texts: dict[str, str] = field(default_factory=dict)
    """Column to what a name that would fit it holds in place of numbers."""
    missing: dict[str, str] = field(default_factory=dict)
    """Column to the message that the name which was given for it is not there."""


@dataclass(frozen=True)
class Candidate:
    name: str
    rank: tuple[int, int]
    unit: float = 1.0


def check_names(keys: Sequence[str], option: str) -> None:
    """ValueError for a key of `columns` or `constants` that is none of our columns."""
    for key in keys:
        if key not in NAMES:
            close = difflib.get_close_matches(key, NAMES, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{option}: {key!r} is not a column of a run table{hint} Accepted: {', '.join(NAMES)}")


def guess(frame: pd.DataFrame, columns: Mapping[str, str], where: str, *, with_loss: bool = True) -> Mapped:
    """A foreign table (rows, its columns) in our columns. `columns` names, for columns of ours, those of the table, as
    "name" or "name * factor"; an empty name leaves a column out. `where` is the file, for messages.

    ValueError for a name that the table lacks, values that are no numbers, and a loss that is not told from another.
    """
    found = Mapped(pd.DataFrame(index=frame.index))
    used: set[str] = set()
    for ours, expression in columns.items():
        if expression:
            used.add(_override(found, frame, ours, expression, where))
    if with_loss and "loss" not in columns:
        used |= _take_loss(found, frame, used, where)
    wanted = [each for each in COLUMNS if each.name not in columns and each.name not in ("loss", "source", "labels")]
    for by in (BY_NAME, BY_LAST_PART, BY_SYMBOL):
        if by == BY_SYMBOL and "non_embedding" in found.frame:
            wanted = [WHOLE if each.name == "total" else each for each in wanted]
        for column in wanted:
            if column.name not in found.frame:
                used |= _take(found, frame, column, by, used, where)
    groups: set[str] = set()
    while "run" not in columns and _spans_sizes(found.frame):
        groups.add(_refuse_group(found, where))
        used |= _take(found, frame, COLUMNS[NAMES.index("run")], BY_NAME, used, where)
    used -= groups
    for column in wanted:
        if column.name in SOUNDS and column.name not in found.frame and column.name not in found.refusals:
            used |= _take_by_sound(found, frame, column, used, where)
    for name in frame.columns:
        if name not in used:
            found.frame[f"{name} (as read)" if name in NAMES else name] = frame[name]
    return found


def _override(found: Mapped, frame: pd.DataFrame, ours: str, expression: str, where: str) -> str:
    name, factor = expression, 1.0
    if name not in frame and (match := TIMES.match(expression)):
        name, factor = match[1], float(match[3])
        factor = 1 / factor if match[2] == "/" else factor
    if name not in frame:
        near = difflib.get_close_matches(name, list(map(str, frame.columns)), 3)
        there = [*near, *(str(each) for each in frame.columns if each not in near)][:30]
        raise ValueError(f"{where}: column {name!r}, given for {ours}, is not there; it has: {', '.join(there)}")
    if ours in TEXTS:
        found.frame[ours] = frame[name]
    else:
        values = numbers(frame[name], units=ours in LARGE)
        if values is None:
            raise ValueError(f"{where}: column {name!r}, given for {ours}, holds no numbers: {doubt(frame[name])[0]}")
        found.frame[ours] = values * factor
        _tell_lost(found, frame[name], ours, where)
    found.mapping[ours] = expression
    if ours == "loss" and "loss_kind" not in found.frame:
        known = candidate(name)
        found.frame["loss_kind"] = known.kind if known else f"as given ({name})"
        if known and known.tier == PERPLEXITY:
            found.frame["loss"], found.mapping["loss"] = np.log(found.frame["loss"]), f"ln({expression})"
    return name


def _take_loss(found: Mapped, frame: pd.DataFrame, used: set[str], where: str) -> set[str]:
    """Add the loss and its kind; returns the name that was used."""
    names = [name for name in frame if name not in used and candidate(str(name)) is not None]
    texts = {name: doubt(frame[name])[0] for name in names if numbers(frame[name]) is None}
    counts = {name: np.isfinite(numbers(frame[name])).sum() for name in names if name not in texts}
    dense = [name for name, count in counts.items() if count and 2 * count >= max(counts.values())]
    told = [f"{name!r} is no column of numbers ({held})" for name, held in texts.items() if held]
    try:
        loss, others = preferred(dense)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; say which with columns loss=NAME") from None
    if loss is None:
        if told:
            found.refusals["loss"] = f"{'; '.join(told)}, and no other loss is there; give columns loss=NAME"
        return set()
    sparse = candidates(name for name, count in counts.items() if count and name not in dense)
    told += [
        f"{each.name!r} is known of {counts[each.name]} rows and {loss.name!r} of {counts[loss.name]}, which is taken; "
        f"columns loss={each.name} takes the other"
        for each in sparse
        if each.tier < loss.tier
    ]
    found.notes += [f"{where}: {each}" for each in told]
    _tell_lost(found, frame[loss.name], "loss", where)
    values = numbers(frame[loss.name])
    found.frame["loss"] = np.log(values) if loss.tier == PERPLEXITY else values
    found.mapping["loss"] = f"ln({loss.name})" if loss.tier == PERPLEXITY else loss.name
    if not any(normalised(str(name)) in ("losskind", "losstype") for name in frame):
        found.frame["loss_kind"] = loss.kind
    if loss.tier == BITS:
        found.notes.append(f"{where}: {loss.name!r} is in bits; laws are fitted to it as it is")
    if others:
        rest = ", ".join(repr(each.name) for each in others[:8])
        found.notes.append(f"{where}: the loss is {loss.name!r}; not taken: {rest}")
    return {loss.name}


def _take(found: Mapped, frame: pd.DataFrame, column: Column, by: int, used: set[str], where: str) -> set[str]:
    """Add one of our columns from the best of the names that fit it; returns the name that was used, if any."""
    for each in sorted(_candidates(frame, column, by, used), key=lambda each: each.rank):
        series = frame[each.name]
        if column.kind == "text":
            if series.notna().any():
                found.frame[column.name], found.mapping[column.name] = series, each.name
                return {each.name}
            continue
        values = numbers(series, units=column.name in LARGE)
        if values is None:
            _refuse_text(found, column, each.name, series)
            continue
        if not np.isfinite(values).any():
            continue
        if reason := _implausible(column, each, values):
            found.refusals.setdefault(column.name, reason)
            continue
        found.refusals.pop(column.name, None)
        _tell_lost(found, series, column.name, where)
        found.frame[column.name] = values * each.unit
        found.mapping[column.name] = each.name if each.unit == 1 else f"{each.name} * {each.unit:g}"
        return {each.name}
    return set()


def _spans_sizes(frame: pd.DataFrame) -> bool:
    """Whether most names of runs are those of runs of several sizes."""
    sizes = [name for name in SIZES if name in frame]
    return "run" in frame and any((frame.groupby("run")[name].nunique() > 1).mean() > 0.5 for name in sizes)


def _refuse_group(found: Mapped, where: str) -> str:
    """Take away the name of runs that is one of groups, with a note; returns the name of its column."""
    name = found.mapping.pop("run")
    found.frame.drop(columns="run", inplace=True)
    found.notes.append(
        f"{where}: {name!r} names runs of several sizes together, and is not taken for the name of a run; if it is of "
        f"their data, give columns data={name!r}"
    )
    return name


def _refuse_text(found: Mapped, column: Column, name: str, values: pd.Series) -> None:
    """Keep why a column of texts was not taken: one that holds numbers as well may have been meant."""
    held, share = doubt(values, units=column.name in LARGE)
    if held:
        reasons = found.refusals if share < MOSTLY else found.texts
        reasons.setdefault(column.name, f"{name!r} is not taken for {column.name}: it holds {held}")


def _tell_lost(found: Mapped, values: pd.Series, ours: str, where: str) -> None:
    """Note cells of a column that was taken in which there is no number."""
    if held := doubt(values, units=ours in LARGE)[0]:
        found.notes.append(f"{where}: {str(values.name)!r}, taken for {ours}, holds {held}, which are left empty")


def _take_by_sound(found: Mapped, frame: pd.DataFrame, column: Column, used: set[str], where: str) -> set[str]:
    """Add a column from the only name that has its word, with a note; returns the name that was used, if any."""
    if column.name in SIZES and any(name in found.frame for name in SIZES):
        return set()
    fitting = []
    for name in frame.columns:
        parts = frozenset(words(str(name)))
        if name not in used and SOUNDS[column.name] & parts and not NOT_AN_AMOUNT & parts:
            values = numbers(frame[name], units=True)
            if (
                values is not None
                and np.isfinite(typical(values))
                and not _implausible(column, Candidate(name, (0, 0)), values)
            ):
                fitting.append((name, values))
    if len(fitting) != 1:
        return set()
    name, values = fitting[0]
    found.frame[column.name], found.mapping[column.name] = values, name
    found.notes.append(f"{where}: {name!r} is taken for {column.name}: {column.meaning}")
    return {name}


def _candidates(frame: pd.DataFrame, column: Column, by: int, used: set[str]) -> list[Candidate]:
    aliases = {normalised(column.name): 0} | {name: k + 1 for k, name in enumerate(column.aliases)}
    symbols = {name: k for k, name in enumerate(column.symbols)}
    found = []
    for name in frame.columns:
        if name in used:
            continue
        for bare, unit in _readings(str(name), column):
            if by == BY_SYMBOL:
                rank = symbols.get(bare.strip(" $"))
            else:
                parts = re.split(r"[/.]", bare)
                rank = aliases.get(normalised(bare if by == BY_NAME else parts[-1]))
            if rank is not None:
                found.append(Candidate(name, (rank, unit != 1), unit))
                break
    return found


def _readings(name: str, column: Column) -> list[tuple[str, float]]:
    """A name as it is, and without the unit that its end may be."""
    readings = [(name, 1.0)]
    if column.name == "flops" and (match := _PF_DAYS.match(name)):
        readings.append((match[1], 8.64e19))
    if column.name == "flops" and (match := _SI_FLOPS.match(name)):
        unit = 1e3 ** (3 + "gtpezy".index(match[2].lower()))
        if unit >= 1e18 or {"total", "train", "training"} & {
            *words(match[1])
        }:  # below are those of a second, or a token
            readings.append((match[1] + match[3], unit))
    if column.name in LARGE and (match := _POWER.match(name)):
        readings.append((match[1], 10.0 ** int(match[2])))
    if column.name in LARGE and (match := _UNIT.match(name)):
        readings.append((match[1], UNITS[match[2].lower()]))
    return readings


def _implausible(column: Column, each: Candidate, values: np.ndarray) -> str:
    """Why values cannot be of this column; empty if they can."""
    middle = typical(values)
    if not np.isfinite(middle):
        return ""
    if each.unit != 1 and middle >= 1e6 and column.name != "flops":
        return (
            f"{each.name!r} lies about {middle:.3g}, so the end of its name is no unit: give "
            f'columns {column.name}="{each.name}"'
        )
    if not column.least <= middle * each.unit <= column.most:
        factor = " * 1e9" if column.name in LARGE else ""
        return (
            f"{each.name!r} lies about {middle:.3g}, which cannot be {column.name} ({column.meaning}): its unit or its "
            f'meaning is not told; give columns {column.name}="{each.name}{factor}", or "" to leave it out'
        )
    return ""
