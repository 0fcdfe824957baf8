"""The compute-optimal frontier: N* and D* as powers of C, by three approaches (Hoffmann et al. 2022, arXiv 2203.15556).

1 takes the lowest losses there are at each compute, 2 the vertex of a parabola through runs of equal compute, 3 the
exponents of a fitted law. They rest on different assumptions; where they disagree by more than their intervals, one
of these does not hold. Compute C is in FLOPs, sizes in parameters, data in tokens, loss in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scaling.cells import SAME, grouped, levels
from scaling.results import Estimate, Fit, Verdict

SAME_COMPUTE = 0.1
"""Width in ln C of a group of runs of equal compute."""
LEAST_SIZES = 5
"""Sizes that a parabola in ln N is drawn through: two more than it has coefficients."""
CURVE_POINTS = 1500
"""Values of C at which curves are compared (Hoffmann et al., approach 1)."""


@dataclass(frozen=True)
class Frontier:
    """N* = exp(`size[1]`) C^`size[0]`, and D* likewise."""

    approach: str
    size: tuple[Estimate, Estimate]
    """Exponent and ln of the factor of N* in C."""
    data: tuple[Estimate, Estimate]
    points: tuple[Mapping[str, float], ...]
    """C, N, D and loss of the optima it rests on; of approach 2 also `runs`, and `used`: 0 where it has no vertex."""
    verdicts: tuple[Verdict, ...] = ()

    def optimum(self, compute: float) -> tuple[float, float]:
        """N* and D* at a compute."""
        sizes, data = ((each[1].value + each[0].value * np.log(compute)) for each in (self.size, self.data))
        return float(np.exp(sizes)), float(np.exp(data))

    def as_json(self) -> dict:
        """Plain numbers, for laws.json and the report."""
        ends = {
            name: {"exponent": vars(pair[0]), "log_factor": vars(pair[1])}
            for name, pair in (("N", self.size), ("D", self.data))
        }
        verdicts = [vars(each) for each in self.verdicts]
        return ends | {"points": [dict(each) for each in self.points], "verdicts": verdicts}


def isoflop(
    compute: np.ndarray,
    size: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    *,
    width: float = SAME_COMPUTE,
    replicates: int = 1000,
    seed: int = 0,
) -> Frontier | None:
    """Approach 2. Of each size in a group of equal compute the best run counts. Inputs (n,).

    Intervals are of the bootstrap within groups. Groups whose parabola opens downwards, or has its vertex beyond their
    sizes, are left out with a warning. None where fewer than two groups have a vertex.
    """
    group = budgets(compute, size, width=width)
    generator = np.random.default_rng(seed)
    points, vertices = [], []
    for number in range(group.max() + 1):
        rows = _best_of_each(levels(size), np.flatnonzero(group == number), loss)
        ln_c, ln_n, ln_d = np.log(compute[rows]), np.log(size[rows]), np.log(tokens[rows])
        # The first replicate is the data themselves.
        weights = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), replicates).astype(float)
        weights = np.vstack([np.ones(len(rows)), weights])
        vertex, lowest = parabola(ln_n, np.log(loss[rows]), weights)
        line = np.polynomial.Polynomial.fit(ln_n, ln_d, 1)
        vertices.append((np.full(len(vertex), ln_c.mean()), vertex, line(vertex)))
        used = np.isfinite(vertex[0])
        points.append(
            {"C": np.exp(ln_c.mean()), "N": np.exp(vertex[0]), "D": np.exp(line(vertex[0])), "loss": np.exp(lowest[0])}
            | {"runs": float(len(rows)), "used": float(used)}
        )
    used = [index for index, point in enumerate(points) if point["used"]]
    if len(used) < 2:
        return None
    ln_c, ln_n, ln_d = np.stack([vertices[index] for index in used]).transpose(1, 2, 0)
    verdicts = []
    if left_out := [f"{point['C']:.3g}" for point in points if not point["used"]]:
        message = f"runs at {', '.join(left_out)} FLOPs show no lowest loss between their sizes; they are left out"
        verdicts.append(Verdict("warning", "no_vertex", message))
    points = sorted(points, key=lambda point: point["C"])
    return Frontier("isoflop", powers(ln_c, ln_n), powers(ln_c, ln_d), tuple(points), tuple(verdicts))


def envelope(
    compute: np.ndarray,
    size: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    curve: np.ndarray | None = None,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Frontier | None:
    """Approach 1: the lowest loss at each compute, of loss curves, or of the ends of runs where `curve` is None.

    Inputs (n,); `curve` numbers the curve that a point is of. Curves are compared at 1,500 values of C between their
    points; of ends, those count that no run of as little compute betters. Intervals are of the bootstrap by curve or
    run. None where fewer than three points, or one size alone, is lowest.
    """
    order = np.lexsort((loss, np.round(np.log(compute), 6)))  # of equal compute the lowest loss first
    ln_c, ln_n, ln_d, ln_l = (np.log(each[order]) for each in (compute, size, tokens, loss))
    if curve is not None:
        ln_c, ln_n, ln_d, ln_l = _lowest_curves(ln_c, ln_n, ln_d, ln_l, curve[order])
    else:
        ln_n, ln_d, ln_l = (each[None] for each in (ln_n, ln_d, ln_l))

    def lowest(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which curves, and at which places, are lowest among those drawn."""
        if curve is not None:
            masked = np.where(drawn[:, None], ln_l, np.inf)
            place = np.flatnonzero(np.isfinite(masked.min(axis=0)))
            return masked[:, place].argmin(axis=0), place
        ends = np.where(drawn, ln_l[0], np.inf)
        before = np.concatenate([[np.inf], np.minimum.accumulate(ends)[:-1]])
        place = np.flatnonzero(ends < before)
        return np.zeros(len(place), dtype=int), place

    drawable = len(ln_l) if curve is not None else len(ln_c)
    which, place = lowest(np.ones(drawable, dtype=bool))
    if len(place) < 3 or np.ptp(ln_n[which, place]) < SAME:
        return None
    generator = np.random.default_rng(seed)
    slopes = [_lines(ln_c[place], ln_n[which, place], ln_d[which, place])]
    for _ in range(replicates):
        drawn = np.bincount(generator.integers(0, drawable, drawable), minlength=drawable) > 0
        some, there = lowest(drawn)
        if len(there) >= 3:
            slopes.append(_lines(ln_c[there], ln_n[some, there], ln_d[some, there]))
    size_line, data_line = (tuple(map(_estimate, line)) for line in np.array(slopes).transpose(1, 2, 0))
    kept = np.unique(np.linspace(0, len(place) - 1, 60).astype(int))
    columns = (ln_c[place], ln_n[which, place], ln_d[which, place], ln_l[which, place])
    points = [dict(zip("CNDL", np.exp(row).tolist(), strict=True)) for row in np.stack(columns, axis=-1)[kept]]
    return Frontier("envelope", size_line, data_line, tuple(point | {"loss": point.pop("L")} for point in points))


def of_law(fit: Fit) -> Frontier | None:
    """Approach 3: N* ~ C^(beta / (alpha + beta)) of a fitted Chinchilla law with C = 6 N D; None for another law."""
    if fit.law not in ("chinchilla", "chinchilla_tied"):
        return None
    from scaling.laws import find

    place = {each.name: index for index, each in enumerate(find(fit.law).parameters)}
    vectors = np.vstack([fit.coordinates, fit.draws])
    exponents = [place["alpha"], place.get("beta", place["alpha"])]
    vectors = vectors[(vectors[:, exponents] > 0).all(axis=1)]  # with one at its bound 0 there is no optimum
    if not (fit.coordinates[exponents] > 0).all():
        return None
    a, b = vectors[:, place["A"]], vectors[:, place["B"]]
    alpha, beta = vectors[:, exponents].T
    # Where alpha A N^-alpha = beta B D^-beta: a = beta/(alpha + beta), G = (alpha A / (beta B))^(1/(alpha + beta)).
    factor = (np.log(alpha) + a - np.log(beta) - b) / (alpha + beta)
    share = beta / (alpha + beta)
    size = (_estimate(share), _estimate(factor - share * np.log(6)))
    data = (_estimate(1 - share), _estimate(-factor - (1 - share) * np.log(6)))
    return Frontier("law", size, data, ())


def budgets(
    compute: np.ndarray, size: np.ndarray, *, width: float = SAME_COMPUTE, least: int = LEAST_SIZES
) -> np.ndarray:
    """Groups of runs of equal compute, (n,) of int; -1 for a run that is in none.

    A group lies within `width` in ln C and has at least `least` sizes, and more than runs at random compute would have.
    The window with most sizes is taken first, so a planned budget is found amid runs of whatever compute.
    """
    if not len(compute):
        return np.empty(0, dtype=int)
    runs = int(grouped([levels(compute), levels(size)]).max()) + 1
    span = np.ptp(np.log(compute))
    chance = runs * width / span if span > 2 * width else 0.0
    least = max(least, int(chance + 2 * np.sqrt(chance)) + 1)
    order = np.argsort(compute, kind="stable")
    ln_c, level = np.log(compute[order]), levels(size)[order]
    found, free, number = np.full(len(order), -1), np.ones(len(order), dtype=bool), 0
    starts = np.flatnonzero(np.diff(ln_c, prepend=-np.inf) > 1e-9)
    ends = np.searchsorted(ln_c, ln_c[starts] + width, side="right")
    counts = np.array([len(np.unique(level[start:end])) for start, end in zip(starts, ends, strict=True)])
    while counts.size and counts.max() >= least:
        narrow = np.flatnonzero(counts == counts.max())
        best = min(narrow, key=lambda index: ln_c[ends[index] - 1] - ln_c[starts[index]])
        window = slice(starts[best], ends[best])
        found[window][free[window]] = number
        free[window], number = False, number + 1
        for index in np.flatnonzero((starts < window.stop) & (ends > window.start)):
            rows = slice(starts[index], ends[index])
            counts[index] = len(np.unique(level[rows][free[rows]]))
    group = np.empty(len(order), dtype=int)
    group[order] = found
    return group


def parabola(u: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertex and lowest value of weighted parabolas through (u, y), (n,), for each row of weights (B, n); (B,) each.

    NaN where the parabola opens downwards or its vertex is not between the values of u.
    """
    centre = u.mean()
    basis = np.stack([np.ones_like(u), u - centre, (u - centre) ** 2], axis=-1)
    normal = np.einsum("bn,ni,nj->bij", weights, basis, basis)
    normal += 1e-12 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)  # draws of too few sizes
    c0, c1, c2 = np.linalg.solve(normal, np.einsum("bn,ni,n->bi", weights, basis, y)[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex, lowest = centre - c1 / (2 * c2), c0 - c1**2 / (4 * c2)
    inside = (c2 > 0) & (vertex >= u.min()) & (vertex <= u.max())
    return np.where(inside, vertex, np.nan), np.where(inside, lowest, np.nan)


def powers(ln_x: np.ndarray, ln_y: np.ndarray) -> tuple[Estimate, Estimate]:
    """Exponent and ln of the factor of least squares in logarithms, (B, points) with NaN left out; the first row is the
    estimate and the others give its interval."""
    there = np.isfinite(ln_y)
    count = np.maximum(there.sum(axis=1), 1)
    x, y = np.where(there, ln_x, 0.0), np.where(there, ln_y, 0.0)
    mean_x, mean_y = x.sum(axis=1) / count, y.sum(axis=1) / count
    dx = np.where(there, x - mean_x[:, None], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (dx * y).sum(axis=1) / (dx**2).sum(axis=1)
    return _estimate(slope), _estimate(mean_y - slope * mean_x)


def _lines(ln_c: np.ndarray, ln_n: np.ndarray, ln_d: np.ndarray) -> tuple[tuple[float, float], ...]:
    centred = ln_c - ln_c.mean()
    slopes = [float(centred @ each / (centred @ centred)) for each in (ln_n, ln_d)]
    means = (ln_n.mean(), ln_d.mean())
    return tuple((slope, float(mean - slope * ln_c.mean())) for slope, mean in zip(slopes, means, strict=True))


def _estimate(values: np.ndarray) -> Estimate:
    """The first value, with the interval of the others."""
    draws = values[1:][np.isfinite(values[1:])]
    if len(draws) < 20:
        return Estimate(float(values[0]), -np.inf, np.inf)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high), float(draws.std(ddof=1)))


def _best_of_each(level: np.ndarray, rows: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Of these rows the one of lowest loss at each level."""
    order = rows[np.argsort(loss[rows], kind="stable")]
    return order[np.unique(level[order], return_index=True)[1]]


def _lowest_curves(ln_c, ln_n, ln_d, ln_l, curve):
    """Curves at common values of ln C: (G,), and N, D and loss as (curves, G), NaN outside of a curve."""
    grid = np.linspace(ln_c.min(), ln_c.max(), CURVE_POINTS)
    numbers = np.unique(curve)
    at = [
        [np.interp(grid, ln_c[own], each[own], left=np.nan, right=np.nan) for each in (ln_n, ln_d, ln_l)]
        for own in (curve == number for number in numbers)
    ]
    sizes, data, losses = np.array(at).transpose(1, 0, 2)
    return grid, sizes, data, np.where(np.isfinite(losses), losses, np.inf)
