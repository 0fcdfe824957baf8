"""One surface over all cells: ln loss = level of the cell + a quadratic around a vertex that follows power laws.

The two laws are fitted to the losses themselves by Gauss-Newton, with the levels and curvatures, in which the surface
is linear, projected out of each cell (variable projection; Kaufman 1975). Cells whose optimum is behind an edge count
by their slope. Each cell has its own curvature, and cubic terms where it has runs enough, or with `shared` all have
one: bowls are steeper towards high rates, so that the exponents of a shared one move with the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.laws.powers import PowerLaw
from scaling.optima.bowls import WINDOW
from scaling.optima.cells import Cell, inputs
from scaling.optima.polynomial import fitted_bowl, monomials, terms
from scaling.optima.regression import cluster_weights, widened
from scaling.optima.vertices import Solution

STEPS, TOLERANCE = 60, 1e-7
BOWL, SKEWED = monomials(2, 2)[3:], monomials(2, 3)[3:]


@dataclass(frozen=True)
class Patch:
    """The runs of one cell within the window, and its rows of the laws' designs."""

    z: np.ndarray
    """ln lr and ln batch, (n, 2)."""
    y: np.ndarray
    """ln loss, (n,)."""
    rows: np.ndarray
    """(2, K): z at the vertex is rows @ coordinates + offset."""
    offset: np.ndarray
    vertex: np.ndarray
    """Its own, (2,)."""
    powers: np.ndarray
    """Of the monomials that its bowl has around the vertex, (terms, 2): no slope."""


@dataclass(frozen=True)
class Surface:
    lr: Solution
    batch_tokens: Solution
    curvature: np.ndarray
    """(cells, 3): d2/dlnlr2, d2/dlnlr dlnB, d2/dlnB2."""
    noise: float
    """Standard deviation of the residuals of ln loss."""
    cells: int


def by_surface(
    cells: Sequence[Cell],
    lr: PowerLaw,
    batch: PowerLaw,
    size: str,
    replicates: int,
    seed: int,
    window: float = WINDOW,
    skew: bool = True,
    shared: bool = False,
) -> Surface:
    """Both laws at once, their draws by a bootstrap of cells, linear around the solution.

    ValueError if fewer cells have a convex bowl over both settings than the laws have coordinates.
    """
    patches = _patches(cells, lr, batch, size, window, skew and not shared)
    split, count = len(lr.parameters), len(lr.parameters) + len(batch.parameters)
    if len(patches) < count:
        raise ValueError(f"a surface with {count} coordinates: {len(patches)} cells have a convex bowl in (lr, batch)")
    solution = _start(patches)
    blocks, best = _linearised(patches, solution, shared), np.inf
    step = np.zeros(count)
    for _ in range(STEPS):
        cost = sum(each[2] for each in blocks)
        if cost > best:
            step = step / 2
            solution = solution - step  # half the way back
        else:
            best = cost
            step = _step(np.ones((1, len(blocks))), blocks, count)[0]
            solution = solution + step
        if np.abs(step).max() < TOLERANCE:
            break
        blocks = _linearised(patches, solution, shared)
    draws = solution + _step(cluster_weights(np.arange(len(blocks)), replicates, seed), blocks, count)
    draws = widened(draws, solution, len(blocks))
    design = np.stack([each.rows for each in patches])
    deviations = np.array([each.vertex - each.rows @ solution - each.offset for each in patches])
    scatter = deviations.std(axis=0)
    runs = sum(len(each.y) for each in patches)
    return Surface(
        Solution(solution[:split], draws[:, :split], deviations[:, 0], float(scatter[0]), design[:, 0, :split]),
        Solution(solution[split:], draws[:, split:], deviations[:, 1], float(scatter[1]), design[:, 1, split:]),
        np.array([each[3] for each in blocks]),
        float(np.sqrt(sum(each[2] for each in blocks) / max(runs - count - len(patches), 1))),
        len(patches),
    )


def _patches(cells: Sequence[Cell], lr: PowerLaw, batch: PowerLaw, size: str, window: float, skew: bool) -> list[Patch]:
    """Cells with a convex bowl over both settings; its vertex may lie beyond the grid."""
    patches = []
    for cell in cells:
        if not len(cell) or not np.isfinite(cell.lr).all() or not np.isfinite(cell.batch).all():
            continue
        z, y = np.log(np.column_stack([cell.lr, cell.batch])), np.log(cell.loss)
        own = fitted_bowl(z, y, window, skew)
        if own is None or not own.convex:
            continue
        (first, first_offset), (second, second_offset) = (
            law.design(inputs(law, [cell.values], size)) for law in (lr, batch)
        )
        rows = np.zeros((2, first.shape[1] + second.shape[1]))
        rows[0, : first.shape[1]], rows[1, first.shape[1] :] = first[0], second[0]
        offset = np.array([first_offset[0], second_offset[0]])
        patches.append(Patch(z[own.used], y[own.used], rows, offset, own.vertex, SKEWED if own.cubic else BOWL))
    return patches


def _start(patches: Sequence[Patch]) -> np.ndarray:
    """Laws through the cells' own vertices."""
    rows = np.concatenate([each.rows for each in patches])
    vertices = np.concatenate([each.vertex - each.offset for each in patches])
    return np.linalg.lstsq(rows, vertices, rcond=None)[0]


Block = tuple[np.ndarray, np.ndarray, float, np.ndarray]
"""Of a cell: J'J (K, K) and J'r (K,) with its own coordinates projected out, r'r, and its curvature (3,)."""


def _linearised(patches: Sequence[Patch], solution: np.ndarray, shared: bool) -> list[Block]:
    """The surface around a solution, cell by cell."""
    around = [each.z - each.rows @ solution - each.offset for each in patches]
    bases = [terms(u, each.powers) for each, u in zip(patches, around, strict=True)]
    if shared:
        flat = np.concatenate([basis - basis.mean(axis=0) for basis in bases])
        common = np.linalg.lstsq(flat, np.concatenate([each.y - each.y.mean() for each in patches]), rcond=None)[0]
    blocks = []
    for each, u, basis in zip(patches, around, bases, strict=True):
        whole = np.column_stack([np.ones(len(basis)), basis])
        h = common if shared else np.linalg.lstsq(whole, each.y, rcond=None)[0][1:]
        # A curvature that all share is nearly the same whichever cells are drawn: it is kept, and levels projected out.
        q = np.linalg.qr(whole[:, :1] if shared else whole)[0]
        slopes = np.column_stack([terms(u, each.powers, (axis,)) @ h for axis in range(2)])
        residual, jacobian = each.y - basis @ h, -slopes @ each.rows
        residual, jacobian = residual - q @ (q.T @ residual), jacobian - q @ (q.T @ jacobian)
        curvature = np.array([2 * h[0], h[1], 2 * h[2]])
        blocks.append((jacobian.T @ jacobian, jacobian.T @ residual, float(residual @ residual), curvature))
    return blocks


def _step(weights: np.ndarray, blocks: Sequence[Block], count: int) -> np.ndarray:
    """Gauss-Newton steps (S, K) with cells weighted by (S, cells); directions without slope are left alone."""
    normal = np.einsum("sc,cij->sij", weights, np.array([each[0] for each in blocks]))
    right = np.einsum("sc,ci->si", weights, np.array([each[1] for each in blocks]))
    scale = np.sqrt(np.maximum(np.einsum("sii->si", normal), 1e-300))
    scaled = normal / scale[:, :, None] / scale[:, None, :]
    return np.einsum("sij,sj->si", np.linalg.pinv(scaled, rcond=1e-13, hermitian=True), right / scale) / scale
