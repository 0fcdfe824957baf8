"""Published laws by name: constants, units, what N and C mean in them, source, and the range they were fitted in.

Each is a `Fit` like our own, so that "auto" values, plans and reports treat all laws alike. Its intervals are the
published ones, infinite where none was published; it has draws where the spread of the law itself is known. Tokens are
the unit of D and of batches, nats a token that of losses unless a note says otherwise. A law whose constant is told in
two ways (Bjorck et al., arXiv 2409.19913) is not here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from scaling.laws import find
from scaling.laws.farseer import PUBLISHED as FARSEER
from scaling.laws.farseer import from_published
from scaling.results import Estimate, Fit, Verdict

DRAWS = 1000
SEED = 0


@dataclass(frozen=True)
class Spread:
    """Standard errors of a product of powers, independent where it is written about the centre of its data."""

    centre: Mapping[str, float]
    """Input of each exponent there."""
    level: float
    """Of ln of the quantity at the centre."""
    exponents: Mapping[str, float]
    inputs: Mapping[str, str]
    """The input of each exponent."""
    source: str


@dataclass(frozen=True)
class Published:
    """One quantity of one publication."""

    law: str
    values: Mapping[str, float]
    source: str
    spans: Mapping[str, tuple[float, float]]
    """Of inputs and of C, as far as the publication tells them."""
    size: str = "non_embedding"
    errors: Mapping[str, float] = field(default_factory=dict)
    """Standard errors, where they were published."""
    spread: Spread | None = None
    compute: str = "6 N D"
    """What C means."""
    note: str = ""
    rows: int = 0


STEP_LAW_SOURCE = "Li et al. 2025, Step Law, arXiv 2503.04715, eq. 1"
STEP_LAW_SPANS = {"N": (6.0e7, 1.07e9), "D": (2e9, 1e11), "C": (7.2e17, 3.7e20)}
STEP_LAW_NOTE = "AdamW, cosine to 1e-5, sequences of 2,048; smoothed training loss"
SCALEBENCH = (
    "bootstrap of whole cells by the paper's procedure, on ScaleBench's copy of its runs (PlanarG/active-sl, CC-BY-4.0)"
)
DEEPSEEK_SOURCE = "DeepSeek-AI 2024, DeepSeek LLM, arXiv 2401.02954, eq. 1; range from memory"
DEEPSEEK_COMPUTE = "M D, with M the FLOPs of a token without embedding and head: 72 l d^2 + 12 l d seq_len"
KAPLAN_SOURCE = "Kaplan et al. 2020, arXiv 2001.08361"
KAPLAN_SPANS = {"N": (768.0, 1.5e9), "D": (2.2e7, 2.3e10)}
PORIAN_SOURCE = "Porian et al. 2024, arXiv 2406.19146, as the Step Law paper tabulates it"
PORIAN_SPANS = {"N": (5e6, 9.0e8), "C": (1.25e16, 2e19)}
PORIAN_NOTE = "at compute-optimal tokens, beta2 tuned; whether N has the head is not told there"
HOFFMANN_SPANS = {"N": (5.7e7, 1.6e10), "D": (2.5e8, 3.2e11), "C": (1.4e18, 1.3e22)}

PUBLISHED: Mapping[str, Mapping[str, Published]] = {
    "step-law": {
        "lr": Published(
            "step_law_lr",
            {"c": 1.79, "a": -0.713, "b": 0.307},
            STEP_LAW_SOURCE,
            STEP_LAW_SPANS,
            errors={"a": 0.030, "b": 0.019},
            spread=Spread(
                {"N": 3.56e8, "D": 1.68e10}, 0.026, {"a": 0.042, "b": 0.024}, {"a": "N", "b": "D"}, SCALEBENCH
            ),
            note=STEP_LAW_NOTE,
            rows=2702,
        ),
        "batch_tokens": Published(
            "step_law_batch",
            {"c": 0.58, "b": 0.571},
            STEP_LAW_SOURCE,
            STEP_LAW_SPANS,
            errors={"b": 0.019},
            spread=Spread({"D": 1.68e10}, 0.032, {"b": 0.028}, {"b": "D"}, SCALEBENCH),
            note=STEP_LAW_NOTE,
            rows=2702,
        ),
    },
    "deepseek": {
        "lr": Published(
            "deepseek_lr",
            {"c": 0.3118, "a": -0.1250},
            DEEPSEEK_SOURCE,
            {"C": (1e17, 2e19)},
            compute=DEEPSEEK_COMPUTE,
            note="AdamW, steps down at 80 and 90 % of the tokens; at compute-optimal allocation",
        ),
        "batch_tokens": Published(
            "deepseek_batch",
            {"c": 0.2920, "a": 0.3271},
            DEEPSEEK_SOURCE,
            {"C": (1e17, 2e19)},
            compute=DEEPSEEK_COMPUTE,
            note="at compute-optimal allocation",
        ),
    },
    "kaplan": {
        "lr": Published(
            "kaplan_lr",
            {"c": 3.239e-3, "d": 1.395e-4},
            f"{KAPLAN_SOURCE}, appendix D.6",
            {"N": KAPLAN_SPANS["N"]},
            note="Adam; for models up to about 1e10 parameters, where it reaches zero",
        ),
        "loss": Published(
            "kaplan",
            {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
            f"{KAPLAN_SOURCE}, eq. 1.5 with table 2; constants from memory",
            KAPLAN_SPANS,
        ),
        "critical_batch": Published(
            "critical_batch_loss", {"B_star": 2e8, "alpha": 0.21}, f"{KAPLAN_SOURCE}, eq. 5.3", {}
        ),
    },
    "chinchilla": {
        "loss": Published(
            "chinchilla",
            {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
            "Hoffmann et al. 2022, arXiv 2203.15556, eq. 10",
            HOFFMANN_SPANS,
            size="total",
            note="constants as rounded there; Besiroglu et al. (chinchilla-epoch) find others on the same runs",
        )
    },
    "chinchilla-epoch": {
        "loss": Published(
            "chinchilla",
            {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            "Besiroglu et al. 2024, arXiv 2404.10102, eq. 4",
            HOFFMANN_SPANS,
            size="total",
            errors={"E": 0.0257, "A": 124.5, "B": 1293.3, "alpha": 0.0154, "beta": 0.0206},
            rows=240,
        )
    },
    "porian": {
        "lr": Published("lr = c * N^a", {"c": 3.7, "a": -0.36}, PORIAN_SOURCE, PORIAN_SPANS, note=PORIAN_NOTE),
        "batch_tokens": Published(
            "batch_tokens = c * N^a", {"c": 0.7576, "a": 0.703}, PORIAN_SOURCE, PORIAN_SPANS, note=PORIAN_NOTE
        ),
    },
    "farseer": {
        "loss": Published(
            "farseer",
            from_published(FARSEER),
            "Li et al. 2025, Farseer, arXiv 2506.10972, eq. 5",
            {"N": (1.0e8, 6.4e9), "D": (1e9, 5.1e11), "C": (1.2e18, 3.5e21)},
            note="in bits for each character, not nats for each token",
            rows=404,
        )
    },
    "power-lines": {
        "timescale": Published(
            "weight_decay_timescale",
            {"c": 1.084, "b": -0.527},
            "Bergsma et al. 2025, Power Lines, arXiv 2505.13738, eq. 3; the constant from what cites it",
            {"N": (1.11e8, 3.3e9)},
            size="total",
            note="B / (lr wd D) of AdamW under muP, with the rate falling to zero",
        )
    },
}  # fmt: skip


def quantities(name: str) -> tuple[str, ...]:
    """What a publication tells. ValueError naming those there are."""
    if name not in PUBLISHED:
        raise ValueError(f"no published law is called {name!r}; accepted: {', '.join(PUBLISHED)}")
    return tuple(PUBLISHED[name])


def published(name: str, quantity: str) -> Fit:
    """A published law as a fit. ValueError naming what there is.

    `details` has its name ("published"), "source", "formula", "compute" (what C means in it), "note" and "spread".
    """
    if quantity not in quantities(name):
        having = [each for each, known in PUBLISHED.items() if quantity in known]
        raise ValueError(
            f"{name!r} has no law of {quantity}, but of {', '.join(PUBLISHED[name])}; {quantity} is of: "
            f"{', '.join(having) or 'none'}"
        )
    known = PUBLISHED[name][quantity]
    law = find(known.law)
    error = known.errors.get
    estimates = {
        each: Estimate(value, value - 1.96 * error(each, math.inf), value + 1.96 * error(each, math.inf),
                       error(each, math.nan))
        for each, value in known.values.items()
    }  # fmt: skip
    point = law.coordinates(known.values)
    return Fit(
        known.law,
        known.size,
        point,
        np.empty((0, len(point))) if known.spread is None else _draws(point, known),
        estimates,
        noise=math.nan,
        rows=known.rows,
        clusters=0,
        spans=dict(known.spans),
        verdicts=(Verdict("ok", "published", f"{name}: {known.source}, not fitted here"),),
        details={
            "published": name,
            "source": known.source,
            "formula": law.formula,
            "compute": known.compute,
            "note": known.note,
            "spread": known.spread.source if known.spread else "not published",
        },
    )


def _draws(point: np.ndarray, known: Published) -> np.ndarray:
    """Coordinates (ln of the constant, then exponents) as they scatter about the centre, (DRAWS, K)."""
    spread, names = known.spread, [each.name for each in find(known.law).parameters]
    noise = np.random.default_rng(SEED).standard_normal((DRAWS, len(names)))
    draws = point + noise * [spread.level, *(spread.exponents[each] for each in names[1:])]
    at = np.log([spread.centre[spread.inputs[each]] for each in names[1:]])
    draws[:, 0] -= (draws[:, 1:] - point[1:]) @ at
    return draws
