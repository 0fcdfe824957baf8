"""Which runs of a table may be fitted together, and what is said of the others."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pandas.api.types import is_numeric_dtype

from scaling.candidates import SIZES, is_amount
from scaling.columns import DIVERGED, DUPLICATE, FINISHED, NAMES, normalised
from scaling.readers import UNREAD, run_directory
from scaling.results import Verdict
from scaling.table import RunTable

POOLED = ("tokenizer", "data", "loss_kind")
"""Losses of runs that differ in one of these are not of the same quantity."""
LIKE_LOSSES = ("loss", "ppl", "perplexity", "nll", "entropy", "xent", "bits", "bpb")
"""What names of losses have in them."""
FEW = 8
"""Runs below which no law with an irreducible loss can be told from a line."""
DECAYS = ("cosine", "linear", "wsd", "trapez", "sqrt", "decay", "anneal", "poly", "exp")
UNDECAYED = 0.3
"""Last rate over peak above which a schedule that decays was cut."""
DISAGREE = 10.0
"""Factor between C and 6 N D beyond which one of the three is another thing, or in another unit."""
UNEXPLAINED = 0.05
"""Share by which losses of runs that are equal in all that is known differ where it is not by their seeds."""
NOT_OF_THE_RUN = ("run", "source", "labels", "loss", "loss_error", "seed", "status")
"""Columns in which runs of one setting differ."""
NUMBER_AT_END = r", [\d.e+-]+$"
"""By which labels of one kind differ."""
SHOWN = 6
"""Kinds of labels that are named."""


def select(
    table: RunTable, *, loss_kind: str | None = None, pool: Sequence[str] = (), needs_loss: bool = True
) -> tuple[np.ndarray, tuple[Verdict, ...]]:
    """The rows that may be fitted together, (rows,) of bool, and verdicts with counts on what was left out or is odd.

    Left out are runs that did not finish, duplicates, losses, tokens and parameters that are not finite and positive,
    and runs that differ from the largest group in tokenizer, data or loss kind; `pool` names those of the three that
    may differ. `loss_kind` takes the runs with this kind of loss alone. ValueError for a name or a kind that is not
    there, and, where `needs_loss`, for a table without losses.
    """
    for name in pool:
        if name not in POOLED:
            raise ValueError(f"pool: {name!r} is not what runs may differ in; accepted: {', '.join(POOLED)}")
    verdicts: list[Verdict] = []
    kept = np.ones(len(table), dtype=bool)

    def leave_out(which: np.ndarray, code: str, what: str) -> None:
        which = which & kept
        if which.any():
            kept[which] = False
            verdicts.append(Verdict("warning", code, f"{int(which.sum())} {what}"))

    if needs_loss and not table.has("loss"):
        raise ValueError(_no_loss(table))
    statuses = _texts(table, "status", FINISHED)
    column = table.mapping.get("status", run_directory.ORIGINS["status"])
    is_told = column != run_directory.ORIGINS["status"]
    said = f', by {column!r}; columns status="" takes them for finished' if is_told else ""
    for status in sorted(set(statuses) - {FINISHED}):
        why = "" if status == DIVERGED else said
        leave_out(statuses == status, str(status), f"of {len(table)} runs left out: {status}{why}")
    if table.has("loss"):
        loss = table.numbers("loss")
        leave_out(~np.isfinite(loss), "no-loss", "runs left out: no finite loss")
        leave_out(~(loss > 0), "non-positive", "runs left out: a loss of zero or below is no cross-entropy")
    for name in ("tokens", *SIZES):
        if table.has(name):
            values = table.numbers(name)
            odd = ~np.isnan(values) & ~is_amount(values)
            leave_out(odd, "no-amount", f"runs left out: {name} that are not finite and above zero")
    labels = _texts(table, "labels", "")
    leave_out(np.char.find(labels, DUPLICATE) >= 0, "duplicate", "runs left out: the same run is in the table already")
    if loss_kind is not None:
        kinds = _texts(table, "loss_kind", "")
        if loss_kind not in kinds:
            known = ", ".join(sorted(repr(str(each)) for each in set(kinds)))
            raise ValueError(f"loss_kind: no run has {loss_kind!r}; accepted: {known}")
        leave_out(kinds != loss_kind, "loss-kind", f"runs left out: their loss is not {loss_kind!r}")
    keys = [name for name in POOLED if name not in pool]
    _keep_largest_pool(table, keys, kept, leave_out)
    verdicts += _mixed(table, kept, pool)
    verdicts += [*_unexplained(table, kept), *_disagreeing(table, kept), *_cut(table, kept), *_labelled(labels, kept)]
    if kept.sum() < FEW:
        level = "failure" if kept.sum() < 3 else "warning"
        verdicts.append(Verdict(level, "few", f"{int(kept.sum())} runs are left of {len(table)}: too few for a law"))
    verdicts.append(Verdict("ok", "rows", f"{int(kept.sum())} of {len(table)} runs can be fitted together"))
    return kept, tuple(verdicts)


def _no_loss(table: RunTable) -> str:
    """The message for a table without a loss: where it was read from, and what may be the loss of it."""
    sources = [str(each) for each in dict.fromkeys(_texts(table, "source", "the table"))]
    of = ", ".join(sources[:3]) + (", ..." if len(sources) > 3 else "")
    foreign = [str(name) for name in table.frame if name not in NAMES and is_numeric_dtype(table.frame[name])]
    close = [name for name in foreign if any(each in normalised(name) for each in LIKE_LOSSES)]
    there = f"; it has: {', '.join((close or foreign)[:8])}" if foreign else ""
    unread = "".join(f". {note}" for note in table.notes if UNREAD in note)
    without = "laws of lr, batch_tokens, critical_batch and timescale can be asked for without"
    return f"{of}: no run has a loss; name its column with columns loss=NAME{there} ({without}){unread}"


def _texts(table: RunTable, name: str, empty: str) -> np.ndarray:
    """A column as texts, (rows,), `empty` where unknown."""
    if name not in table.frame:
        return np.full(len(table), empty, dtype=object).astype(str)
    return np.array(
        [empty if value is None or value != value else str(value) for value in table.frame[name]], dtype=str
    )


def _keep_largest_pool(table: RunTable, keys: list[str], kept: np.ndarray, leave_out) -> None:
    """Leave out all rows but the largest group that is equal in `keys`; of equally large ones the first."""
    columns = [_texts(table, name, "unknown") for name in keys]
    groups = list(zip(*columns, strict=True)) if columns else [()] * len(table)
    counts = Counter(group for group, is_kept in zip(groups, kept, strict=True) if is_kept)
    if len(counts) < 2:
        return
    largest, size = counts.most_common(1)[0]
    differing = [name for k, name in enumerate(keys) if len({group[k] for group in counts}) > 1]
    told = ", ".join(f"{name} {str(largest[keys.index(name)])!r}" for name in differing)
    others = np.array([group != largest for group in groups])
    leave_out(
        others, "pool",
        f"runs left out: {len(counts)} groups differ in {' and '.join(differing)}; the largest, {size} runs, is kept "
        f"({told}); pool={','.join(differing)} fits them together",
    )  # fmt: skip


def _mixed(table: RunTable, kept: np.ndarray, pool: Sequence[str]) -> list[Verdict]:
    found = []
    for name in pool:
        values = set(_texts(table, name, "unknown")[kept])
        if len(values) > 1:
            found.append(
                Verdict("warning", "mixed", f"runs of {len(values)} different {name} are pooled, as asked for")
            )
    return found


def _unexplained(table: RunTable, kept: np.ndarray) -> list[Verdict]:
    """A warning where many runs are equal in all that is known of them but the loss: they differ in another column."""
    if not table.has("loss"):
        return []
    frame = table.frame[kept]
    known = [name for name in NAMES if name in frame and name not in NOT_OF_THE_RUN and frame[name].notna().any()]
    groups = frame.groupby(known, dropna=False, sort=False) if known else None
    if groups is None or len(groups) == len(frame):
        return []
    spread = groups["loss"].transform("max") / groups["loss"].transform("min") - 1
    odd = frame[(spread > UNEXPLAINED).to_numpy()]
    if 2 * len(odd) <= len(frame) or not any(name in known for name in SIZES):
        return []
    parts = odd.groupby(known, dropna=False, sort=False)
    others = [str(name) for name in frame if name not in NAMES]
    apart = [name for name in others if (parts[name].nunique() == parts[name].size()).mean() > 0.5]
    named = f": {', '.join(repr(name) for name in apart[:4])} tell them apart" if apart else ""
    message = (
        f"{len(odd)} runs are equal in all that was read but their losses, by up to {spread.max():.0%}{named}; if it "
        "is of their data, or another setting, give columns data=NAME or the like"
    )
    return [Verdict("warning", "unexplained", message)]


def _disagreeing(table: RunTable, kept: np.ndarray) -> list[Verdict]:
    """A warning where C is far from 6 N D in most runs, with whatever N that is known. Runs with
    recurrences or ancestors are not looked at, whose parameters or FLOPs count more than once."""
    sizes = [name for name in SIZES if table.has(name)]
    if not (sizes and table.has("flops") and table.has("tokens")):
        return []
    plain = kept.copy()
    for name, least in (("recurrences", 1), ("parent_tokens", 0)):
        if table.has(name):
            plain &= ~(table.numbers(name) > least)
    with np.errstate(all="ignore"):
        ratios = [table.numbers("flops") / (6 * table.numbers(name) * table.numbers("tokens")) for name in sizes]
        off = plain & np.all([np.abs(np.log(each)) > np.log(DISAGREE) for each in ratios], axis=0)
    if off.sum() <= plain.sum() / 2:
        return []
    told = f"in {int(off.sum())} of {int(plain.sum())} runs, {np.median(ratios[0][off]):.3g} times in the median"
    message = f"flops is not 6 * {sizes[0]} * tokens to a factor of {DISAGREE:g} {told}: one of them is another thing"
    return [Verdict("warning", "compute", f"{message} or has another unit; see what they were read from")]


def _cut(table: RunTable, kept: np.ndarray) -> list[Verdict]:
    """A warning where runs of a schedule that decays ended at a high rate: their losses are not final ones."""
    if not (table.has("final_lr") and table.has("lr") and table.has("schedule")):
        return []
    schedules = [each.lower() for each in _texts(table, "schedule", "")]
    decays = np.array([any(word in each for word in DECAYS) for each in schedules])
    with np.errstate(all="ignore"):
        cut = kept & decays & (table.numbers("final_lr") / table.numbers("lr") > UNDECAYED)
    if not cut.any():
        return []
    text = f"{int(cut.sum())} runs ended above {UNDECAYED:.0%} of their peak rate: theirs are no losses after a decay"
    return [Verdict("warning", "mid-decay", text)]


def _labelled(labels: np.ndarray, kept: np.ndarray) -> list[Verdict]:
    """A note of what was noticed while reading runs that are kept, with counts."""
    counts = Counter(re.sub(NUMBER_AT_END, "", each) for text in labels[kept] if text for each in text.split("; "))
    if not counts:
        return []
    told = [f"{count} x {label}" for label, count in counts.most_common(SHOWN)]
    more = f", and {len(counts) - SHOWN} other labels" if len(counts) > SHOWN else ""
    labelled = sum(bool(text) for text in labels[kept])
    return [Verdict("ok", "labels", f"{labelled} of the runs that are kept have labels: {', '.join(told)}{more}")]
