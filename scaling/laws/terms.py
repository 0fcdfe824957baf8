"""What most laws of loss are: a floor and powers that add up, here by the logarithms of their terms."""

from collections.abc import Mapping, Sequence

import numpy as np

from scaling.laws.law import Parameter

Term = tuple[np.ndarray, Mapping[str, np.ndarray | float]]
"""ln of a term, (S, n) or what broadcasts to it, and its derivative by the coordinates of the parameters named."""

SIZE_EXPONENT = Parameter("alpha", 0.01, 3.0, (0.05, 1.2), "exponent of size")
DATA_EXPONENT = Parameter("beta", 0.01, 3.0, (0.05, 1.2), "exponent of data")


def unpacked(coordinates: np.ndarray) -> np.ndarray:
    """Of each parameter its coordinate in every vector, (K, S, 1), to be computed with rows, (n,)."""
    return np.asarray(coordinates, dtype=float).T[..., None]


def log_loss(
    parameters: Sequence[Parameter], floor: np.ndarray, terms: Sequence[Term]
) -> tuple[np.ndarray, np.ndarray]:
    """ln of E and a sum of terms, (S, n), and its derivative by the coordinates, (S, n, K). `floor`, (S, 1), is E.

    Each term counts by its share of the loss, so that hopeless starting values neither overflow nor give NaN.
    """
    logs = np.stack(np.broadcast_arrays(*(log for log, _ in terms)))
    with np.errstate(divide="ignore"):
        top = np.maximum(logs.max(axis=0), np.log(floor))
    shares = np.exp(logs - top)
    total = shares.sum(axis=0) + floor * np.exp(-top)
    shares /= total
    loss = top + np.log(total)
    place = {each.name: index for index, each in enumerate(parameters)}
    jacobian = np.zeros((*loss.shape, len(parameters)))
    jacobian[..., place["E"]] = np.exp(-loss)
    for share, (_, derivatives) in zip(shares, terms, strict=True):
        for name, derivative in derivatives.items():
            jacobian[..., place[name]] += share * derivative
    return loss, jacobian
