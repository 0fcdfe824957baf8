"""The largest stable learning rate: where half of the runs diverge, as a law of size, tokens and batch.

A logistic regression of whether a run diverged on ln lr and the law's logarithms. A diverged run has no loss that a
bowl could use, but it bounds the rates from above.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from scaling.laws.powers import STABLE_LR, PowerLaw
from scaling.optima.cells import Cell, cells, inputs
from scaling.optima.regression import cluster_weights, condition
from scaling.results import Estimate, Fit, Verdict
from scaling.table import RunTable

PENALTY = 0.05
"""Of squared standardised coefficients: where stable and diverged rates do not overlap, likelihood has no limit."""
STEPS = 50


def fit_stability(
    table: RunTable, size: str, *, law: PowerLaw = STABLE_LR, replicates: int = 200, seed: int = 0
) -> Fit | None:
    """The law of max_lr, its draws by a bootstrap of cells; None where no run diverged or none did not.

    `details["sharpness"]` is k of the share that diverges at a rate, 1 / (1 + (max_lr / lr)^k). ValueError as of
    `cells`.
    """
    grid = [each for each in cells(table, size) if np.isfinite(each.lr).all()]
    diverged, lr, settings, cluster = _rows(grid)
    if diverged.all() or not diverged.any():
        return None
    x = inputs(law, settings, size)
    design, offset = law.design(x)
    z = np.column_stack([np.log(lr) - offset, design])
    point = _logistic(z, diverged, np.ones((1, len(lr))))[0]
    draws = _logistic(z, diverged, cluster_weights(cluster, replicates, seed))
    coordinates, drawn = (-each[..., 1:] / np.maximum(each[..., :1], 1e-6) for each in (point, draws))
    parameters = {}
    for i, each in enumerate(law.parameters):
        values = each.value(drawn[:, i])
        low, high = np.quantile(values, [0.025, 0.975])
        parameters[each.name] = Estimate(
            float(each.value(coordinates[i])), float(low), float(high), float(values.std())
        )
    flops = [each["flops"] for each in settings]
    return Fit(
        law.name,
        size,
        coordinates,
        drawn,
        parameters,
        float(np.pi / np.sqrt(3) / max(point[0], 1e-6)),
        len(lr),
        len(set(cluster)),
        {"C": (min(flops), max(flops))} | {name: (float(each.min()), float(each.max())) for name, each in x.items()},
        _verdicts(point[0], diverged, cluster, len(law.parameters), condition(design[diverged])),
        details={"estimator": "logistic", "sharpness": float(point[0]), "diverged": int(diverged.sum()), "seed": seed},
    )


def _rows(grid: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray, list[dict[str, float]], np.ndarray]:
    """Of each run: whether it diverged, its rate, its settings with the batch, and the number of its cell."""
    diverged, lr, settings, cluster = [], [], [], []
    for number, cell in enumerate(grid):
        for lost, rates, batches in ((False, cell.lr, cell.batch), (True, *cell.diverged.T)):
            diverged += [lost] * len(rates)
            lr += list(rates)
            cluster += [number] * len(rates)
            settings += [dict(cell.values) | ({"batch_tokens": each} if each > 0 else {}) for each in batches]
    return np.array(diverged, dtype=bool), np.array(lr), settings, np.array(cluster)


def _logistic(z: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (S, K) of a penalised logistic regression on z (n, K) under weights (S, n), by Newton's method."""
    spread = z.std(axis=0)
    constant = spread < 1e-9
    scale, centre = np.where(constant, 1.0, spread), np.where(constant, 0.0, z.mean(axis=0))
    if not constant.any():
        centre = np.zeros_like(centre)  # nothing would take up the shift
    standard = (z - centre) / scale
    penalty = np.where(constant, 1e-6, PENALTY)
    weights = weights / weights.mean(axis=1, keepdims=True)
    found = np.zeros((len(weights), z.shape[1]))
    for _ in range(STEPS):
        share = expit(found @ standard.T)
        gradient = (weights * (outcome - share)) @ standard - penalty * found
        heft = weights * np.maximum(share * (1 - share), 1e-9)
        pairs = (standard[:, :, None] * standard[:, None, :]).reshape(len(standard), -1)
        normal = (heft @ pairs).reshape(len(weights), z.shape[1], z.shape[1]) + np.diag(penalty)
        step = np.linalg.solve(normal, gradient[..., None])[..., 0]
        found = found + step / np.maximum(1, np.abs(step).max(axis=1, keepdims=True) / 2)
        if np.abs(step).max() < 1e-8:
            break
    coefficients = found / scale
    shift = (coefficients * centre).sum(axis=1)
    if constant.any():
        coefficients[:, np.argmax(constant)] -= shift / z[0, np.argmax(constant)]
    return coefficients


def _verdicts(
    sharpness: float, diverged: np.ndarray, cluster: np.ndarray, fitted: int, number: float
) -> tuple[Verdict, ...]:
    said = []
    if sharpness <= 0:
        said.append(Verdict("failure", "stability", "runs at higher rates did not diverge more often"))
    lost, hit = int(diverged.sum()), len(set(cluster[diverged]))
    if lost <= fitted or hit < 2:
        message = f"{lost} diverged runs in {hit} cells cannot tell {fitted} coordinates of max_lr"
        said.append(Verdict("warning", "few_cells", message))
    elif not number < 100:
        said.append(Verdict("warning", "condition", "the diverged runs do not vary in every input of max_lr"))
    return tuple(said)
