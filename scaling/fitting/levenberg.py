"""Levenberg-Marquardt with reweighting, for many parameter vectors at once.

Starts of a fit, replicates of a bootstrap and points of a profile are problems of one shape, so that one pass of NumPy
evaluates the law and its Jacobian for all of them. Of Huber's loss with threshold t, the Gauss-Newton matrix counts the
rows with |r| <= t alone (fast near the optimum, bold far from it), that of iterative reweighting counts the others by
t / |r| (slow, and never uphill for a linear law). The damping goes from the one to the other, and from there to
Marquardt's, with the problems' mean of J'J for the metric. All of these change with the coordinates as the problem
does: a fit takes the same steps whatever the units of its inputs are and wherever they are centred.
"""

from dataclasses import dataclass

import numpy as np

from scaling.fitting.objective import Objective, huber, spread
from scaling.laws.law import Inputs, Law

CHUNK = 250_000
"""Numbers of the Jacobian of the problems that are worked on at once: they stay in the cache."""
EASING = 8.0
"""A small threshold is reached by way of larger ones: the second is this many times smaller, the third this squared."""
ROUGH = 1e-4
"""Tolerance of the fits on the way to the objective's own threshold."""
MARQUARDT = 1e-3
"""Times the damping beyond 1 is the share of the metric that is added."""
BENDS = 3
"""Gauss-Newton steps back to the line that a step followed, before a shorter one is tried."""
BENT = 0.3
"""Distance from that line, as a share of the predicted reduction, below which it is not the law's bending that made the
step go uphill."""
RIDGE = 1e-11
"""Of the diagonal, for problems whose parameters are not identified."""


@dataclass(frozen=True)
class Solutions:
    """Of S problems."""

    coordinates: np.ndarray
    """(S, K)."""
    residuals: np.ndarray
    """(S, n): ln of the measured less ln of the predicted quantity."""
    objective: np.ndarray
    """(S,); infinite where the law cannot be evaluated."""
    converged: np.ndarray
    """(S,) of bool."""


def minimise(
    law: Law,
    x: Inputs,
    targets: np.ndarray,
    starts: np.ndarray,
    objective: Objective,
    *,
    weights: np.ndarray | None = None,
    free: np.ndarray | None = None,
    tolerance: float = 1e-13,
    iterations: int = 300,
) -> Solutions:
    """The minimum of the objective that each start (S, K) leads to, within the law's bounds.

    targets: ln of the measured quantity, (n,) or (S, n). weights: of the rows, (S, n), 1 if not given. free: of bool,
    (K,) or (S, K); the other coordinates stay as they start. A problem has converged when the next step would reduce
    its objective by less than `tolerance` of it.
    """
    count, rows = len(starts), np.shape(targets)[-1]
    targets = np.broadcast_to(targets, (count, rows))
    weights = np.broadcast_to(1.0 if weights is None else weights, (count, rows))
    free = np.broadcast_to(True if free is None else free, starts.shape)
    size = max(1, CHUNK // (rows * starts.shape[1]))
    coordinates, converged = np.array(starts, dtype=float), np.zeros(count, bool)
    with np.errstate(all="ignore"):
        for begin in range(0, count, size):
            part = slice(begin, begin + size)
            work = _Work(law, x, objective, targets[part], weights[part], coordinates[part], free[part])
            work.run(tolerance, iterations, coordinates[part], converged[part])
        residuals = targets - law.log_value(coordinates, x)
        value = objective.value(residuals, weights)
    return Solutions(coordinates, residuals, np.where(np.isfinite(value), value, np.inf), converged)


class _Work:
    """The problems in work. `number` is where each is reported; the finished ones are dropped from all arrays."""

    ARRAYS = (
        "number", "targets", "weights", "coordinates", "residuals", "slopes", "threshold", "loss", "damping", "growth",
        "easing", "is_last", "free", "low", "high",
    )  # fmt: skip

    def __init__(self, law, x, objective, targets, weights, starts, free):
        low, high = law.bounds()
        self.law, self.x, self.objective, self.free = law, x, objective, free
        self.low, self.high = np.where(free, low, -np.inf), np.where(free, high, np.inf)
        self.number, self.targets, self.weights = np.arange(len(starts)), targets, weights
        self.coordinates = np.clip(starts, self.low, self.high)
        values, slopes = law.evaluate(self.coordinates, x)
        self.residuals, self.slopes = targets - values, slopes.swapaxes(1, 2)
        usable = self.slopes[np.isfinite(self.slopes).all(axis=(1, 2))]
        self.metric = (usable @ usable.swapaxes(1, 2)).mean(axis=0) / usable.shape[2]
        goal = objective.threshold(self.residuals, weights)
        self.threshold = np.maximum(goal, spread(self.residuals, weights))
        self.easing, self.is_last = np.full(len(starts), EASING), goal >= self.threshold
        self.loss = self.losses(self.residuals)
        self.damping, self.growth = np.ones(len(starts)), np.full(len(starts), 4.0)

    def run(self, tolerance, iterations, coordinates, converged):
        """Works until all have converged; writes into the last two arguments, (S, K) and (S,)."""
        self.keep(np.isfinite(self.loss))
        for _ in range(iterations):
            if not len(self.number):
                break
            predicted = self.advance()
            coordinates[self.number] = self.coordinates
            enough = np.where(self.is_last, tolerance, max(tolerance, ROUGH)) * self.loss + 1e-30
            settled = (self.damping <= 1) & (predicted <= enough) | (self.damping > 1e12)
            if settled.any():
                settled[settled] = ~self.ease(settled)
                converged[self.number[settled]] = True
            if settled.mean() > 0.2:
                self.keep(~settled)

    def losses(self, residuals):
        return (self.weights * huber(residuals, self.threshold[:, None])).sum(axis=-1)

    def keep(self, kept):
        for name in self.ARRAYS:
            setattr(self, name, getattr(self, name)[kept])

    def advance(self) -> np.ndarray:
        """One step of each, taken where it goes downhill; the reduction that was predicted, (S,).

        Where it does not, the law may have bent away from the line that was followed: along the valley of parameters
        that compensate each other it does so soon. Then predictions are brought back to the line's, and tried again.
        """
        curvature, matrix, downhill, held = self.model()
        step = self.inside(matrix, downhill, held)
        predicted = (downhill * step).sum(axis=-1) - (step[:, None] @ matrix @ step[..., None])[:, 0, 0] / 2
        line = self.residuals - (step[:, None] @ self.slopes)[:, 0]
        better = np.zeros(len(step), bool)
        which, trial = np.arange(len(step)), self.coordinates + step
        for _ in range(1 + BENDS):
            good, residuals, slopes = self.attempt(which, trial)
            better[which[good]] = True
            away = residuals - line[which]
            bent = ~good & ((curvature[which] * away**2).sum(axis=-1) > BENT * predicted[which])
            which, trial = which[bent], trial[bent]
            if not len(which):
                break
            trial += self.back(which, trial, curvature[which], away[bent], slopes[bent])
        self.damping = np.where(better, np.maximum(self.damping / 8, 1e-5), self.damping * self.growth)
        self.growth = np.where(better, 4.0, 2 * self.growth)
        return predicted

    def attempt(self, which, trial) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves these problems where that is downhill; which did, and the residuals and slopes at all trials."""
        values, slopes = self.law.evaluate(trial, self.x)
        residuals, slopes = self.targets[which] - values, slopes.swapaxes(1, 2)
        losses = (self.weights[which] * huber(residuals, self.threshold[which, None])).sum(axis=-1)
        good = losses < self.loss[which]
        taken = which[good]
        self.coordinates[taken], self.residuals[taken] = trial[good], residuals[good]
        self.slopes[taken], self.loss[taken] = slopes[good], losses[good]
        return good, residuals, slopes

    def back(self, which, trial, curvature, away, slopes) -> np.ndarray:
        """The step (S, K) from the trials that takes `away`, (S, n), off the residuals in least squares."""
        low, high = self.low[which], self.high[which]
        matrix = (slopes * curvature[:, None]) @ slopes.swapaxes(1, 2)
        pull = (slopes @ (curvature * away)[..., None])[..., 0]
        held = ~self.free[which] | (trial <= low) | (trial >= high)
        return np.clip(trial + _solve(matrix, pull, held, np.zeros_like(pull)), low, high) - trial

    def model(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the objective: the rows' weights in its second derivative (S, n), that (S, K, K), the downhill gradient
        (S, K), and which coordinates are held, as not free or at a bound that the gradient points beyond (S, K)."""
        absolute, threshold = np.abs(self.residuals), self.threshold[:, None]
        ratio = np.minimum(threshold / np.maximum(absolute, 1e-300), 1)
        downhill = (self.slopes @ (self.weights * ratio * self.residuals)[..., None])[..., 0]
        curvature = self.weights * np.where(ratio < 1, np.minimum(self.damping, 1)[:, None] * ratio, 1)
        matrix = (self.slopes * curvature[:, None]) @ self.slopes.swapaxes(1, 2)
        marquardt = MARQUARDT * np.maximum(self.damping - 1, 0) * curvature.sum(axis=-1)
        matrix += marquardt[:, None, None] * self.metric
        held = (self.coordinates <= self.low) & (downhill < 0) | (self.coordinates >= self.high) & (downhill > 0)
        return curvature, matrix, downhill, held | ~self.free

    def inside(self, matrix, downhill, held) -> np.ndarray:
        """The minimum (S, K) of the quadratic within the bounds: what would leave them stops there, and the others are
        solved for again, since they were to compensate for all of its step."""
        low, high = self.low - self.coordinates, self.high - self.coordinates
        step = _solve(matrix, downhill, held, np.zeros_like(downhill))
        for _ in range(step.shape[1]):
            beyond = (step < low) | (step > high)
            again = np.flatnonzero(beyond.any(axis=-1))
            if not len(again):
                break
            held = held | beyond
            step[again] = _solve(matrix[again], downhill[again], held[again], np.clip(step, low, high)[again])
        return np.clip(step, low, high)

    def ease(self, settled) -> np.ndarray:
        """Lowers the threshold of the settled problems towards the objective's; which of them had not reached it."""
        goal = self.objective.threshold(self.residuals[settled], self.weights[settled])
        threshold = self.threshold[settled]
        lower = np.maximum(goal, threshold / self.easing[settled])
        eased = ~self.is_last[settled] | (lower < threshold * (1 - 1e-6))
        self.is_last[settled] = lower == goal
        self.easing[settled] *= EASING
        self.threshold[settled] = np.where(eased, lower, threshold)
        self.damping[settled] = np.where(eased, 0.1, self.damping[settled])
        self.loss = self.losses(self.residuals)
        return eased


def _solve(matrix: np.ndarray, downhill: np.ndarray, held: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The minimum of s'Hs / 2 - g's where the held coordinates of s are those of `step`: all (S, K), H (S, K, K)."""
    fixed = np.where(held, step, 0)
    pull = np.where(held, 0, downhill - (matrix @ fixed[..., None])[..., 0])
    matrix = matrix * (~held[:, None] & ~held[..., None])
    diagonal = np.einsum("skk->sk", matrix)
    diagonal *= 1 + RIDGE
    diagonal += np.where(diagonal > 0, 0, 1)
    return fixed + np.linalg.solve(matrix, pull[..., None])[..., 0]
