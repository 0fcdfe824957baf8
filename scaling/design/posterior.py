"""A belief about optima: a normal posterior over bowls whose vertices follow power laws, and what it decides."""

from dataclasses import dataclass, replace

import numpy as np

from scaling.design.bowl import LOCAL, SHARED, Points, evaluate, optimum, reach
from scaling.design.prior import alike, correlation, local_blocks
from scaling.design.runs import Runs, cells_of, position
from scaling.results import Decision, Estimate, Plateau, Verdict

FAR = 0.004
"""Excess of ln loss at which the misfit of the bowl is taken to equal the noise: twice the expected noise, fixed on
the 24 cheapest cells of the Step Law grid. Residuals there double at 0.015, but runs of a cell share the misfit."""
MARGIN = np.log(1.5)
"""Of ln lr, that is kept below the rates at which runs diverged."""
PLATEAU = 1e-3
WARN, REFUSE = 3.0, 10.0
"""Compute of a target over the largest measured: from where a decision is doubtful, and from where it is not one."""
NORMAL = 1.959963984540054


@dataclass(frozen=True)
class Belief:
    """A normal posterior over the shared parameters and those of each cell, in this order."""

    size: str
    centre: tuple[float, float]
    """ln N and ln D that n and d count from."""
    N: np.ndarray
    D: np.ndarray
    """Of the cells, (m,) each."""
    mean: np.ndarray
    """(11 + 5 m,)."""
    covariance: np.ndarray
    noise: float
    spreads: np.ndarray
    """(5,), of the local parameters."""
    runs: Runs
    """What it rests on."""

    @property
    def shared(self) -> np.ndarray:
        return self.mean[: len(SHARED)]

    @property
    def local(self) -> np.ndarray:
        """(m, 5)."""
        return self.mean[len(SHARED) :].reshape(-1, len(LOCAL))

    def cell(self, N: np.ndarray, D: np.ndarray) -> np.ndarray:
        """The index of the cell of each (N, D), -1 for one that is not measured, (n,)."""
        return position(N, D, zip(self.N, self.D, strict=True))

    def points(self, runs: Runs) -> Points:
        n, d = self.features(runs.N, runs.D)
        return Points(n, d, np.log(runs.lr), np.log(runs.batch_tokens))

    def features(self, N: np.ndarray, D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.log(N) - self.centre[0], np.log(D) - self.centre[1]

    def including(self, N: np.ndarray, D: np.ndarray) -> "Belief":
        """With cells that nothing was measured of, where they are new: they deviate as those near them do."""
        new_N, new_D, _ = cells_of(*(each[self.cell(N, D) < 0] for each in (N, D)))
        if not len(new_N):
            return self
        common = alike(new_N, new_D, self.N, self.D)
        gain = np.linalg.solve(correlation(self.N, self.D), common.T).T
        own = correlation(new_N, new_D) - gain @ common.T
        ones = np.ones(len(LOCAL))
        onto = np.zeros((len(LOCAL) * len(new_N), len(self.mean)))
        onto[:, len(SHARED) :] = local_blocks(gain, np.zeros_like(gain), ones)
        across = onto @ self.covariance
        added = across @ onto.T + local_blocks(own, np.eye(len(new_N)), self.spreads**2)
        return replace(
            self,
            N=np.r_[self.N, new_N],
            D=np.r_[self.D, new_D],
            mean=np.r_[self.mean, onto @ self.mean],
            covariance=np.block([[self.covariance, across.T], [across, added]]),
        )

    def sensitivities(self, runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Derivatives of ln loss by the parameters that a run depends on, (n, 16), which these are, (n, 16), and the
        standard deviation of a measurement, (n,).

        Every cell of the runs must be one of the belief's.
        """
        cell = self.cell(runs.N, runs.D)
        excess, by_shared, by_local = evaluate(self.shared, self.local[cell], self.points(runs))
        noise = self.noise * np.sqrt(1 + (excess / FAR) ** 2)
        return np.concatenate([by_shared, by_local], axis=1), columns(cell), noise

    def optimum(self, N: np.ndarray, D: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ln lr* and ln B* of cells, (n, 2), their derivatives by all parameters, (n, 2, P), and h_p and h_q, (n, 2).

        Every cell must be one of the belief's; see `including`.
        """
        cell = self.cell(N, D)
        n, d = self.features(N, D)
        vertex = np.stack(optimum(self.shared, self.local[cell], n, d), axis=-1)
        by = np.zeros((len(N), 2, len(self.mean)))
        by[:, 0, 0:3] = by[:, 1, 3:6] = np.stack([np.ones_like(n), n, d], axis=-1)
        at = len(SHARED) + len(LOCAL) * cell
        by[np.arange(len(N)), 0, at + 1] = by[np.arange(len(N)), 1, at + 2] = 1.0
        return vertex, by, np.exp(self.shared[6:8] + self.local[cell, 3:5])

    def stable(self) -> float:
        """The largest ln lr, across the valley from the optimum, that keeps MARGIN from those that diverged.

        The frontier is where the fewest runs are on its wrong side; infinite where no run diverged, or where those that
        did lie among more that did not.
        """
        if not self.runs.diverged.any():
            return np.inf
        places = self.place(self.runs)[:, 0]
        diverged, finished = places[self.runs.diverged], places[self.runs.measured]
        wrong = [(finished >= at).sum() + (diverged < at).sum() for at in diverged]
        return float(diverged[np.argmin(wrong)] - MARGIN) if min(wrong) < len(diverged) else np.inf

    def place(self, runs: Runs) -> np.ndarray:
        """Where runs lie from the optimum of their cell: across the valley and along it, (n, 2)."""
        vertex, _, _ = self.including(runs.N, runs.D).optimum(runs.N, runs.D)
        along = np.log(runs.batch_tokens) - vertex[:, 1]
        return np.stack([np.log(runs.lr) - vertex[:, 0] - self.shared[8] * along, along], axis=-1)

    def edges(self) -> dict[tuple[float, float], tuple[str, ...]]:
        """Measured cells whose optimum lies outside of the rates or batches tried there: (N, D) to "lr below" etc."""
        vertex, _, _ = self.optimum(self.N, self.D)
        tried = self.runs.where(self.runs.measured)
        cell = self.cell(tried.N, tried.D)
        result = {}
        for index in np.unique(cell):
            beyond = []
            for name, at in (("lr", vertex[index, 0]), ("batch_tokens", vertex[index, 1])):
                values = np.log(getattr(tried, name)[cell == index])
                beyond += [f"{name} below"] if at < values.min() else []
                beyond += [f"{name} above"] if at > values.max() else []
            if beyond:
                result[float(self.N[index]), float(self.D[index])] = tuple(beyond)
        return result

    def decide(self, N: float, D: float) -> Decision:
        """lr and batch at a target, which lower the expected loss most, with the intervals of the optimum (95 %).

        The bowl is steeper on one side, so the decision lies on the other side of the optimum's mean, though not by
        more than a standard deviation: the tail of the bowl is not known so well. ValueError for a target that is not
        positive.
        """
        if not (np.isfinite(N) and np.isfinite(D) and N > 0 and D > 0):
            raise ValueError(f"target N = {N}, D = {D}: both must be positive numbers")
        where = np.array([float(N)]), np.array([float(D)])
        known = self.including(*where)
        (vertex,), (by,), ((h_p, h_q),) = known.optimum(*where)
        r, k_p, k_q = known.shared[8:]
        by_place = np.stack([by[0] - r * by[1], by[1]])
        var_p, var_q = np.sum(by_place @ known.covariance * by_place, axis=1)
        limit = self.stable()
        p, q = (-np.clip(k * var / 2, -np.sqrt(var), np.sqrt(var)) for k, var in ((k_p, var_p), (k_q, var_q)))
        p = min(p, limit)
        sd = np.sqrt(np.sum(by @ known.covariance * by, axis=1))
        values = np.exp([vertex[0] + p + r * q, vertex[1] + q])
        estimates = [
            Estimate(float(value), *(float(np.exp(at + side * NORMAL * s)) for side in (-1, 1)), float(value * s))
            for value, at, s in zip(values, vertex, sd, strict=True)
        ]
        measured = self.runs.where(self.runs.measured)
        extrapolation = float(N * D / (measured.N * measured.D).max())
        return Decision(
            target={"N": float(N), "D": float(D)},
            proposal=dict(zip(("lr", "batch_tokens"), estimates, strict=True)),
            plateau=_plateau(vertex, h_p, h_q, r, k_p, k_q),
            regret=float(h_p * var_p + h_q * var_q) / 2,
            extrapolation=extrapolation,
            verdicts=self._verdicts(where, extrapolation, p == limit),
        )

    def _verdicts(
        self, where: tuple[np.ndarray, np.ndarray], extrapolation: float, capped: bool
    ) -> tuple[Verdict, ...]:
        found = []
        if extrapolation > WARN:
            level = "failure" if extrapolation > REFUSE else "warning"
            found.append(Verdict(level, "extrapolation", f"{extrapolation:.1f} times the largest measured N D"))
        (cell,) = self.cell(*where)
        beyond = self.edges().get((float(self.N[cell]), float(self.D[cell])), ()) if cell >= 0 else ()
        if beyond:
            found.append(
                Verdict("warning", "edge", f"the optimum lies beyond what was tried here: {', '.join(beyond)}")
            )
        if capped:
            found.append(Verdict("warning", "frontier", "lr is kept below the rates at which runs diverged"))
        return tuple(found)


def columns(cell: np.ndarray) -> np.ndarray:
    """Indices of the shared parameters and of a cell's own among all, (n, 16), of cells by index, (n,)."""
    own = len(SHARED) + len(LOCAL) * cell[:, None] + np.arange(len(LOCAL))
    return np.concatenate([np.broadcast_to(np.arange(len(SHARED)), (len(cell), len(SHARED))), own], axis=1)


def _plateau(vertex: np.ndarray, h_p: float, h_q: float, r: float, k_p: float, k_q: float) -> dict[str, Plateau]:
    """Ranges of lr and B that cost less than PLATEAU with the other at its best; on the border p takes a share."""
    share = np.linspace(0, 1, 101)
    rates = [
        reach(share * PLATEAU / h_p, k_p, side) + r * reach((1 - share) * PLATEAU / h_q, k_q, other)
        for side in (-1, 1)
        for other in (-1, 1)
    ]
    batches = [reach(PLATEAU / h_q, k_q, side) for side in (-1, 1)]
    return {
        name: Plateau(float(np.exp(at + np.min(of))), float(np.exp(at + np.max(of))), PLATEAU)
        for name, at, of in (("lr", vertex[0], rates), ("batch_tokens", vertex[1], batches))
    }
