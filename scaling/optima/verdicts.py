"""Whether a law of optima is identified: judgements with the numbers they rest on.

A failure means that the coordinates should not be used. A warning means that they may, within the range of the cells.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from scaling.laws.powers import PowerLaw
from scaling.optima.regression import condition
from scaling.optima.vertices import Optima, Solution
from scaling.results import Estimate, Verdict

NARROW, FLAT = 8.0, 1.5
"""Factors between the smallest and largest input, below which an exponent is soft, and below which there is none."""
FEW = 10
CENSORED = 0.25, 0.6
CONDITION = 10.0, 100.0
WIDE = 0.5, 3.0
"""Widths of an exponent's 95 % interval."""


def judged(
    law: PowerLaw,
    found: Optima,
    solution: Solution,
    parameters: Mapping[str, Estimate],
    x: Mapping[str, np.ndarray],
    cells: int,
) -> tuple[Verdict, ...]:
    """The verdicts of one fit: cells, spans, condition, censored cells, width of intervals, curvature."""
    return (
        *_cells(law, cells),
        *_spans(law, x),
        *_condition(law, solution.design),
        *_censored(found),
        *_widths(law, parameters),
        *_curvature(law, found, x),
    )


def _cells(law: PowerLaw, cells: int) -> Sequence[Verdict]:
    fitted = len(law.parameters)
    if cells <= fitted:
        return [Verdict("failure", "few_cells", f"{cells} cells cannot tell {fitted} coordinates and their error")]
    if cells < FEW:
        return [
            Verdict("warning", "few_cells", f"{cells} cells for {fitted} coordinates: intervals rest on few of them")
        ]
    return []


def _spans(law: PowerLaw, x: Mapping[str, np.ndarray]) -> Sequence[Verdict]:
    fitted = {symbol for each in law.powers if isinstance(each.exponent, str) for symbol in each.weights}
    said = []
    for symbol in law.inputs:
        factor = float(x[symbol].max() / x[symbol].min())
        if symbol not in fitted or factor >= NARROW:
            continue
        level = "failure" if factor < FLAT else "warning"
        said.append(
            Verdict(
                level, "span", f"{symbol} spans a factor of {factor:.2g}; its exponent needs {NARROW:g} to be told well"
            )
        )
    return said


def _condition(law: PowerLaw, design: np.ndarray) -> Sequence[Verdict]:
    number = condition(design)
    if number > CONDITION[0]:
        level = "failure" if number > CONDITION[1] else "warning"
        message = f"the inputs of {law.name} move together over the cells (condition {number:.3g}): exponents trade off"
        return [Verdict(level, "condition", message)]
    return []


def _censored(found: Optima) -> Sequence[Verdict]:
    share = found.censored.mean() if len(found.low) else 1.0
    if share == 0:
        return []
    level = "failure" if share > CENSORED[1] else "warning" if share > CENSORED[0] else "ok"
    message = f"{found.censored.sum()} of {len(found.low)} optima are at or beyond the edge of their grid"
    return [Verdict(level, "edge", message + ("; extend those grids" if level != "ok" else ""))]


def _widths(law: PowerLaw, parameters: Mapping[str, Estimate]) -> Sequence[Verdict]:
    said = []
    for each in law.parameters:
        estimate = parameters[each.name]
        width = estimate.high - estimate.low
        if each.logarithmic or not width > WIDE[0]:
            continue
        level = "failure" if width > WIDE[1] else "warning"
        said.append(
            Verdict(
                level, "wide", f"{each.name} lies anywhere in {estimate.low:.2f} to {estimate.high:.2f} (95 % interval)"
            )
        )
    return said


def _curvature(law: PowerLaw, found: Optima, x: Mapping[str, np.ndarray]) -> Sequence[Verdict]:
    """Whether the square of an input's logarithm would improve the law: then it bends beyond the cells."""
    if law.bends:
        return []
    said = []
    for symbol in law.inputs:
        t, freedom = bend(law, found, x, symbol)
        if abs(t) > student.ppf(1 - 0.005 / len(law.inputs), max(freedom, 1)):
            message = f"the law bends in {symbol} (t = {t:.1f} of its squared logarithm): do not extrapolate it far"
            said.append(Verdict("warning", "curvature", message))
    return said


def bend(law: PowerLaw, found: Optima, x: Mapping[str, np.ndarray], symbol: str) -> tuple[float, int]:
    """t value of the squared logarithm of an input beside the law's own terms over the known optima, and its degrees
    of freedom; 0 where it cannot be told."""
    known = found.known
    design, offset = law.design({name: values[known] for name, values in x.items()})
    logarithm = np.log(x[symbol][known])
    if not known.any():
        return 0.0, 0
    full = np.column_stack([design, (logarithm - logarithm.mean()) ** 2])
    freedom = len(full) - full.shape[1]
    if freedom < 2 or np.linalg.matrix_rank(full - np.r_[0, full.mean(axis=0)[1:]]) < full.shape[1]:
        return 0.0, freedom
    y = found.low[known] - offset
    q, r = np.linalg.qr(full)
    residuals = y - q @ (q.T @ y)
    last = (q[:, -1] @ y) / r[-1, -1]
    return float(last / (np.sqrt(residuals @ residuals / freedom) / abs(r[-1, -1]))), freedom


def compared(
    law: PowerLaw, parameters: Mapping[str, Estimate], others: Mapping[str, Sequence[float]], code: str
) -> tuple[Verdict, ...]:
    """A warning for each exponent that another window or method puts outside the interval; `others` by its label."""
    said = []
    for index, each in enumerate(law.parameters):
        if each.logarithmic:
            continue
        estimate = parameters[each.name]
        outside = {label: c[index] for label, c in others.items() if not estimate.low <= c[index] <= estimate.high}
        if outside:
            told = ", ".join(f"{value:.3f} by {label}" for label, value in outside.items())
            message = f"{each.name} is {estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f}) but {told}"
            said.append(Verdict("warning", code, message))
    return tuple(said)
