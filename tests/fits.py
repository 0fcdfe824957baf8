"""Fits made by hand, of laws whose truth is known."""

import numpy as np

from scaling.laws.law import Law, Parameter
from scaling.results import Estimate, Fit, Verdict


class Chinchilla(Law):
    """L = E + A N^-alpha + B D^-beta."""

    name = "by-hand-chinchilla"
    formula = "L = E + A N^-alpha + B D^-beta"
    source = "made by hand"
    inputs = ("N", "D")
    parameters = tuple(
        Parameter(name, low, high, (low, high), logarithmic=logarithmic)
        for name, low, high, logarithmic in (
            ("A", 1e-3, 1e6, True), ("B", 1e-3, 1e6, True), ("E", 1e-3, 10, True), ("alpha", 0, 2, False),
            ("beta", 0, 2, False),
        )
    )  # fmt: skip

    def evaluate(self, coordinates, x):
        a, b, e, alpha, beta = coordinates.T[:, :, None]
        n, d = np.log(x["N"]), np.log(x["D"])
        parts = np.stack([np.exp(e) + 0 * n, np.exp(a - alpha * n), np.exp(b - beta * d)])
        loss = parts.sum(0)
        slopes = np.stack([parts[1], parts[2], parts[0], -n * parts[1], -d * parts[2]], -1) / loss[..., None]
        return np.log(loss), slopes


class Power(Law):
    """A product of powers of some inputs."""

    source = "made by hand"

    def __init__(self, quantity, inputs):
        self.name, self.quantity, self.inputs = f"by-hand-{quantity}", quantity, inputs
        self.formula = f"{quantity} = c " + " ".join(f"{each}^{each.lower()}" for each in inputs)
        exponents = (Parameter(each.lower(), -2, 2, (-1, 1)) for each in inputs)
        self.parameters = (Parameter("c", 1e-12, 1e12, (1e-3, 1e3), logarithmic=True), *exponents)

    def evaluate(self, coordinates, x):
        slopes = np.stack([np.ones_like(x[self.inputs[0]]), *(np.log(x[each]) for each in self.inputs)], -1)
        return coordinates @ slopes.T, np.broadcast_to(slopes, (len(coordinates), *slopes.shape))


CHINCHILLA = Chinchilla()
RATE, BATCH = Power("lr", ("N", "D")), Power("batch_tokens", ("D",))
BY_HAND = {law.name: law for law in (CHINCHILLA, RATE, BATCH)}
"""To be put among `scaling.laws.LAWS` by a test."""

HOFFMANN = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
STEP_RATE, STEP_BATCH = {"c": 1.79, "n": -0.713, "d": 0.307}, {"c": 0.58, "d": 0.571}


def fit(
    law: Law, values: dict[str, float], *, spread: float = 1e-3, largest: float = 1e20, level: str = "ok", **changes
) -> Fit:
    """A fit whose draws lie around the values, each coordinate by `spread`, of rows of up to `largest` FLOPs."""
    point = law.coordinates(values)
    draws = point + spread * np.random.default_rng(0).standard_normal((64, len(point)))
    drawn = np.array([list(law.values(each).values()) for each in draws])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    estimates = {
        each.name: Estimate(values[each.name], *map(float, ends), error=float(error))
        for each, *ends, error in zip(law.parameters, low, high, drawn.std(axis=0), strict=True)
    }
    spans = {"N": (1e7, 1e9), "D": (1e9, 1e11), "C": (1e17, largest)}
    verdicts = (Verdict(level, "condition", "made by hand"),)
    known = {"noise": 2e-3, "rows": 40, "clusters": 12, "spans": spans, "verdicts": verdicts, "details": {"starts": 7}}
    return Fit(law.name, "non_embedding", point, draws, estimates, **known | changes)
