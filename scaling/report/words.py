"""How numbers, intervals and foreign texts are written, the same on the terminal, in plots and on the page."""

import math
import unicodedata
from collections.abc import Callable

from scaling.results import Estimate

LABELS = {
    "total": "N (total)",
    "non_embedding": "N (non-embedding)",
    "active": "N (active)",
    "tokens": "tokens",
    "lr": "learning rate",
    "batch_tokens": "batch (tokens)",
    "timescale": "timescale of weight decay",
    "weight_decay": "weight decay",
    "flops": "FLOPs",
    "N": "parameters",
    "D": "tokens",
    "C": "FLOPs",
}
_COUNTS = {
    "N", "D", "U", "D1", "total", "non_embedding", "active", "once", "recurrent", "tokens", "unique_tokens",
    "parent_tokens", "warmup_tokens", "batch_tokens",
}  # fmt: skip
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_CONTROL = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


def plain(text: object) -> str:
    """A text without characters that steer a terminal, reorder a line or end it; each becomes U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(each) in _CONTROL else each for each in str(text))


def label(name: str) -> str:
    return plain(LABELS.get(name, name))


def number(value: float, digits: int = 4) -> str:
    """To so many significant digits; an em dash where it is not known."""
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}g}".replace("e+", "e").replace("e0", "e").replace("e-0", "e-")


def count(value: float, digits: int = 3) -> str:
    """Parameters or tokens with their unit: 1.07B, 100B, 2.5T."""
    if not math.isfinite(value) or abs(value) >= 1e16:
        return number(value)
    rounded = float(f"{value:.{digits}g}")
    for size, unit in _UNITS:
        if abs(rounded) >= size:
            return f"{rounded / size:.{digits}g}{unit}".replace("e+03", "000")
    return number(value, digits)


def percent(share: float, digits: int = 2) -> str:
    if not math.isfinite(share):
        return number(share)
    value = 100 * share
    return (f"{value:.0f}" if 10 ** (digits - 1) <= abs(value) < 1e5 else number(value, digits)) + " %"


def written(name: str) -> Callable[[float], str]:
    """How values of a column, or of a formula's symbol, are written."""
    if name in _COUNTS:
        return count
    return (lambda value: number(value, 3)) if name in ("lr", "flops", "C") else number


def interval(estimate: Estimate, write: Callable[[float], str] = number) -> str:
    """Its value, and its 95 % interval where there is one."""
    if (math.isnan(estimate.low) and math.isnan(estimate.high)) or estimate.low == estimate.value == estimate.high:
        return write(estimate.value)
    return f"{write(estimate.value)} [{write(estimate.low)}, {write(estimate.high)}]"


def target(asked: dict) -> str:
    """What was asked for, such as N = 7B, D = 1.4T."""
    return ", ".join(f"{plain(name)} = {written(name)(value)}" for name, value in asked.items())
