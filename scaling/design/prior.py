"""What is believed of bowls before any run: wide, with exponents from other grids than those that the tests use.

The optimum of a cell and the curvatures of its bowl deviate from the shared laws as a Gaussian process over ln N and
ln D: cells that are alike deviate alike. So a law's own bend is learned where runs are, a target far from all runs
stays uncertain however many there are, and many runs of one corner do not pass for knowledge of the law.
"""

import numpy as np

from scaling.design.bowl import LOCAL, SHARED

PRIOR = {
    "c": (np.nan, np.log(10)),  # around the rates that were tried
    "a": (-0.35, 0.5),  # Porian et al. 2024: lr* ~ N^-.36 on the compute-optimal line; Bjorck et al. 2024: -.23
    "b": (0.0, 0.5),  # Bjorck et al. at fixed B: -.32; DeepSeek LLM: C^-.125; Step Law has +.31
    "c_B": (np.nan, np.log(10)),  # around the batches that were tried
    "a_B": (0.0, 0.3),  # Bergsma et al. 2025 (Power Lines): B* follows D and not N
    "b_B": (
        0.6,
        0.3,
    ),  # as there; DeepSeek LLM: C^.327, so D^.65 on the compute-optimal line; Porian et al.: N^.70 there
    "ln_h_p": (np.log(0.02), np.log(3)),  # 2x in lr costs half a percent, within a factor of 3; Step Law: .02
    "ln_h_q": (np.log(0.01), np.log(3)),  # 2x in the batch costs half of that; Step Law: .009
    "r": (0.5, 0.5),  # the square-root rule of Adam (Malladi et al. 2022)
    "k_p": (1.0, 0.5),  # noise of the weights costs in proportion to the rate: exp(u)
    "k_q": (0.0, 0.5),
}
"""Mean and standard deviation of the shared parameters."""
SPREADS = {"level": (1.0, None), "lr": (0.1, 4.0), "B": (0.1, 4.0), "ln_h_p": (0.3, 4.0), "ln_h_q": (0.3, 4.0)}
"""Of a cell's deviations: expected standard deviation, and how many cells that expectation counts for (None: fixed)."""
NOISE = (2e-3, 4.0)
"""Of ln loss near the optimum: expected standard deviation, and how many runs that expectation counts for."""
ALIKE = 0.8
"""Share of a deviation's variance that cells have in common with those near them."""
REACH = np.log(8)
"""Over which deviations are alike, in ln N and in ln D."""


def alike(N: np.ndarray, D: np.ndarray, other_N: np.ndarray, other_D: np.ndarray) -> np.ndarray:
    """Correlation of what deviations have in common between cells, (m, k): ALIKE for the same N and D."""
    squares = np.log(N[:, None] / other_N) ** 2 + np.log(D[:, None] / other_D) ** 2
    return ALIKE * np.exp(-squares / (2 * REACH**2))


def correlation(N: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Of the deviations of cells, (m, m)."""
    return alike(N, D, N, D) + (1 - ALIKE) * np.eye(len(N))


def local_blocks(correlated: np.ndarray, level: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    """Between local parameters of cells, (5 m, 5 k), of a matrix for the deviations and one for the levels, (m, k)."""
    is_level = np.array([name == "level" for name in LOCAL])
    return np.kron(correlated, np.diag(np.where(is_level, 0.0, spreads))) + np.kron(
        level, np.diag(np.where(is_level, spreads, 0.0))
    )


def prior_precision(N: np.ndarray, D: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    """Of all parameters of a belief with these cells, (P, P)."""
    shared = np.array([PRIOR[name][1] for name in SHARED]) ** -2.0
    result = np.zeros((len(SHARED) + len(LOCAL) * len(N),) * 2)
    result[: len(SHARED), : len(SHARED)] = np.diag(shared)
    inverse = np.linalg.inv(correlation(N, D))
    result[len(SHARED) :, len(SHARED) :] = local_blocks(inverse, np.eye(len(N)), spreads**-2.0)
    return result
