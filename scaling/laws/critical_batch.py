"""The critical batch, where twice the steps' worth of tokens buys no fewer steps, as a law of tokens or of the loss."""

import numpy as np

from scaling.laws.law import Inputs, Law, Parameter
from scaling.laws.powers import Power, PowerLaw

CRITICAL_BATCH_DATA = PowerLaw(
    "critical_batch_data",
    "critical_batch",
    "critical_batch = c * D^b",
    "Zhang et al., arXiv 2410.21676; Bergsma et al., Power Lines, arXiv 2505.13738: it follows D, not N",
    (Power("b", {"D": 1}),),
)


class CriticalBatchOfLoss(Law):
    """Tokens of the critical batch at a loss in nats a token. Kaplan et al. give B_star = 2e8 and alpha = 0.21."""

    name = "critical_batch_loss"
    quantity = "critical_batch"
    formula = "critical_batch = B_star * loss^(-1 / alpha)"
    source = "Kaplan et al., arXiv 2001.08361, eq. 5.3"
    inputs = ("loss",)
    parameters = (
        Parameter("B_star", 1.0, 1e30, (1e6, 1e10), "tokens, at a loss of 1", True),
        Parameter("alpha", 0.01, 10.0, (0.05, 1.0), "the loss falls by 1 / e as the batch grows by e^(1 / alpha)"),
    )

    def evaluate(self, coordinates: np.ndarray, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
        loss = np.log(x["loss"])[None]
        scale, alpha = coordinates[:, :1], coordinates[:, 1:2]
        return scale - loss / alpha, np.stack([np.ones_like(loss / alpha), loss / alpha**2], axis=-1)
