"""The loss of one cell around its optimum: a convex bowl in ln lr and ln B, steeper towards high rates.

With u = ln lr - ln lr*, v = ln B - ln B*, across the valley p = u - r v and along it q = v:

    ln loss = level + h_p L(p, k_p) + h_q L(q, k_q),    L(z, k) = (exp(k z) - k z - 1) / k^2

L is the linear-exponential loss (Varian 1975; Zellner 1986, JASA 81, eq. 2.1), z^2 / 2 as k goes to 0 and convex for
every k. Its use here is that the decision under it is closed: for z normal with variance s^2 the best shift is
-k s^2 / 2 and the expected excess there is h s^2 / 2, whatever k is. To second order the bowl is the general quadratic
with curvature h_p, -r h_p, h_p r^2 + h_q of (lr lr, lr B, B B).
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import lambertw

SHARED = ("c", "a", "b", "c_B", "a_B", "b_B", "ln_h_p", "ln_h_q", "r", "k_p", "k_q")
"""ln lr* = c + a n + b d and ln B* = c_B + a_B n + b_B d, with n and d ln N and ln D from the centre of the table."""
LOCAL = ("level", "lr", "B", "ln_h_p", "ln_h_q")
"""Of one cell: ln loss at the optimum, and deviations of the optimum and of the curvatures from the shared ones."""
LARGEST = 30.0
"""Of an exponent; no run that ended has a loss anywhere near."""


@dataclass(frozen=True)
class Points:
    """Where the bowls are evaluated, each (n,): the features of the cell, and the settings."""

    n: np.ndarray
    d: np.ndarray
    log_lr: np.ndarray
    log_batch: np.ndarray


def linex(z: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """L(z, k), its derivative by z and that by k."""
    t = np.minimum(k * z, LARGEST)
    small = np.abs(t) < 1e-2
    s = np.where(small, 1.0, t)
    slope = np.where(small, 1 + t / 2 + t**2 / 6 + t**3 / 24, np.expm1(s) / s)
    value = np.where(small, 1 / 2 + t / 6 + t**2 / 24 + t**3 / 120, (np.expm1(s) - s) / s**2)
    by_t = np.where(small, 1 / 6 + t / 12 + t**2 / 40, (slope - 2 * value) / s)
    return z**2 * value, z * slope, z**3 * by_t


def reach(value: np.ndarray | float, k: float, side: int) -> np.ndarray:
    """The z on this side of 0 (-1 or 1) where L(z, k) has a value."""
    value = np.asarray(value, dtype=float)
    is_square = k**2 * value < 1e-6
    raised = 1 + np.where(is_square, 1.0, k**2 * value)
    branch = -1 if side * k > 0 else 0
    curved = (-raised - lambertw(-np.exp(-raised), branch).real) / (k or 1.0)
    return np.where(is_square, side * np.sqrt(2 * value), curved)


def optimum(shared: np.ndarray, local: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln lr* and ln B* of cells; `shared` (11,), `local` (m, 5), `n` and `d` (m,)."""
    features = np.stack([np.ones_like(n), n, d], axis=-1)
    return features @ shared[0:3] + local[:, 1], features @ shared[3:6] + local[:, 2]


def evaluate(shared: np.ndarray, local: np.ndarray, at: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The excess of ln loss over the level, and the derivatives of ln loss by the shared and the local parameters.

    `shared` (11,), `local` (n, 5) of each point's cell; returns (n,), (n, 11) and (n, 5).
    """
    log_lr, log_batch = optimum(shared, local, at.n, at.d)
    r, k_p, k_q = shared[8:]
    q = at.log_batch - log_batch
    p = at.log_lr - log_lr - r * q
    h_p, h_q = np.exp(shared[6] + local[:, 3]), np.exp(shared[7] + local[:, 4])
    (across, across_z, across_k), (along, along_z, along_k) = linex(p, k_p), linex(q, k_q)
    by_lr = h_p * across_z
    by_batch = h_q * along_z - r * by_lr
    rate, batch, ones = -by_lr, -by_batch, np.ones_like(q)
    columns = [rate, rate * at.n, rate * at.d, batch, batch * at.n, batch * at.d]
    columns += [h_p * across, h_q * along, -q * by_lr, h_p * across_k, h_q * along_k]
    return (
        h_p * across + h_q * along,
        np.stack(columns, axis=-1),
        np.stack([ones, rate, batch, h_p * across, h_q * along], axis=-1),
    )
