"""The timescale of AdamW's weight decay, as a share of the training: over which tokens the weights are an average.

tau = B / (lr wd D), with B and D in tokens (Wang & Aitchison, arXiv 2405.13698; Bergsma et al., Power Lines,
arXiv 2505.13738, eq. 2: the best one falls with tokens for each parameter, by an exponent of -0.527).
"""

from scaling.laws.powers import Power, PowerLaw

TIMESCALE = PowerLaw(
    "weight_decay_timescale",
    "timescale",
    "timescale = c * (D / N)^b",
    "Bergsma et al., Power Lines, arXiv 2505.13738, eq. 3",
    (Power("b", {"D": 1, "N": -1}),),
)


def timescale(batch_tokens: float, lr: float, weight_decay: float, tokens: float) -> float:
    """tau of a run, with its peak rate; a share of the training, without unit. Works on arrays."""
    return batch_tokens / (lr * weight_decay * tokens)


def weight_decay_of(timescale: float, batch_tokens: float, lr: float, tokens: float) -> float:
    """The weight decay that gives this timescale: what to change when lr, batch or tokens change. Works on arrays."""
    return batch_tokens / (lr * timescale * tokens)
