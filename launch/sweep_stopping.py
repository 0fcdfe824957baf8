"""Which runs are hopeless, from their logged training losses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from launch.sweep_store import Ending
from runtime.observe.jsonl import Row

ROWS = 8
"""Logged steps that a judgement rests on, all of them."""
WARMED = 2
"""Warm-ups after which a loss says something of a learning rate."""


@dataclass(frozen=True)
class Rules:
    """When a run is hopeless. Each is asked of all of the last `ROWS` rows, so that one step decides nothing."""

    warmup: int
    """Tokens."""
    after: int
    """Tokens before which `unigram` and `margin` say nothing."""
    initial: float | None = None
    """Loss of the first step of all."""
    unigram: float | None = None
    """Loss of a model that sees no context."""
    margin: float | None = None
    """Nats above the lowest of the others at the same tokens."""


def judge(rows: Sequence[Row], rules: Rules, others: Iterable[Sequence[Row]] = ()) -> Ending | None:
    """The end of a hopeless run with its evidence; None for one that may yet do well.

    `rows`: the run's, oldest first, with `tokens` and `loss`. `others`: those of runs that it is compared with.
    """
    last = [row for row in rows if "loss" in row][-ROWS:]
    if len(last) < ROWS or last[0]["tokens"] < WARMED * rules.warmup:
        return None
    tokens, lowest = last[-1]["tokens"], min(row["loss"] for row in last)
    if rules.initial is not None and lowest > rules.initial:
        return _ending("initial", tokens, lowest, rules.initial, "that of its first step")
    if last[0]["tokens"] < rules.after:
        return None
    if rules.unigram is not None and lowest > rules.unigram:
        return _ending("unigram", tokens, lowest, rules.unigram, "that of a model that sees no context")
    if rules.margin is None:
        return None
    known = [loss for each in others if (loss := level(each, tokens)) is not None]
    if known and lowest > min(known) + rules.margin:
        what = f"the lowest of its size at the same tokens by more than {rules.margin:g}"
        return _ending("margin", tokens, lowest, min(known), what)
    return None


def level(rows: Sequence[Row], tokens: int) -> float | None:
    """The median loss of the last `ROWS` rows up to some tokens; None of a run that has not come so far."""
    losses = [row["loss"] for row in rows if row["tokens"] <= tokens and "loss" in row][-ROWS:]
    return median(losses) if len(losses) == ROWS and rows[-1]["tokens"] >= tokens else None


def _ending(rule: str, tokens: int, lowest: float, reference: float, what: str) -> Ending:
    judged = f"at {tokens:,} tokens the lowest of the last {ROWS} logged losses, {lowest:.4f}"
    evidence = {"rule": rule, "tokens": tokens, "loss": lowest, "reference": reference, "rows": ROWS}
    return Ending("stopped early", f"{judged}, is above {what}, {reference:.4f}", evidence)
