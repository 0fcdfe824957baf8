"""An analysis made by hand, so that the report is tested alone: two laws of a known truth, and hostile names."""

import numpy as np
import pandas as pd

from scaling.laws import find
from scaling.results import Analysis, Bowl, Decision, Estimate, Fit, HeldOut, Plateau, Verdict
from scaling.table import RunTable, tidy

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://evil.example/x onerror=alert(1)>',
    "[bold red]markup[/] $\\frac{1$",
    "reversed \u202e gnp, \x1b[31mred\x07",
    "<!-- & &lt; </td></table></section>",
)


TRUTHS = {
    "chinchilla": {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28},
    "step_law_lr": {"c": 1.8, "a": -0.7, "b": 0.3},
}


def fit(name: str, size: str, rows: int, verdicts: tuple[Verdict, ...] = (), spans=()) -> Fit:
    """Draws of the truth, 2 % wide in each coordinate."""
    law = find(name)
    center = law.coordinates(TRUTHS[name])
    draws = center + 0.02 * np.abs(center) * np.random.default_rng(0).standard_normal((200, len(center)))
    values = np.stack([p.value(draws[:, place]) for place, p in enumerate(law.parameters)], axis=1)
    low, high = np.quantile(values, (0.025, 0.975), axis=0)
    estimates = {
        p.name: Estimate(float(p.value(center[place])), low[place], high[place], values[:, place].std())
        for place, p in enumerate(law.parameters)
    }
    details = {"estimator": "Huber 0.001", "starts": 200, "share": 0.98, "profile": {"E": [1.6, 1.8]}}
    return Fit(name, size, center, draws, estimates, 0.002, rows, rows, dict(spans), verdicts, details=details)


def table(sizes: int = 4, tokens: int = 4, rates: int = 5, batches: int = 4, seed: int = 0) -> RunTable:
    """A grid of runs around a known optimum; the first names are hostile, one run diverged and one says nothing."""
    random, rows = np.random.default_rng(seed), []
    for size in np.geomspace(6e7, 1e9, sizes):
        for data in size * np.geomspace(10, 200, tokens):
            best = 1.8 * size**-0.7 * data**0.3, 0.58 * data**0.571
            floor = 1.7 + 400 * size**-0.34 + 410 * data**-0.28
            for rate in best[0] * np.geomspace(0.25, 4, rates) * 1.1:
                for batch in best[1] * np.geomspace(0.25, 4, batches):
                    away = np.log(rate / best[0]), np.log(batch / best[1])
                    excess = 0.5 * (0.010 * away[0] ** 2 - 0.006 * away[0] * away[1] + 0.012 * away[1] ** 2)
                    loss = floor * np.exp(excess + 0.001 * random.standard_normal())
                    rows.append((size, data, rate, batch, loss, 6 * size * data))
    frame = pd.DataFrame(rows, columns=["non_embedding", "tokens", "lr", "batch_tokens", "loss", "flops"])
    frame.insert(0, "run", [HOSTILE[row] if row < len(HOSTILE) else f"run-{row}" for row in range(len(frame))])
    frame.insert(1, "status", ["finished"] * (len(frame) - 2) + ["diverged", None])
    frame.loc[len(frame) - 2, "loss"] = np.inf
    frame.loc[len(frame) - 1, "loss"] = np.nan
    mapping = {"non_embedding": "N", "tokens": HOSTILE[0], "flops": "6 * non_embedding * tokens", "loss": "smooth loss"}
    return RunTable(tidy(frame), mapping, ("read by hand", HOSTILE[1]), "0" * 64)


def bowls(runs: RunTable) -> tuple[Bowl, ...]:
    """The optimum of each cell, the first beyond the edge of its grid and the second without a vertex."""
    found = []
    for (size, data), cell in runs.frame.groupby(["non_embedding", "tokens"]):
        rate, batch = 1.8 * size**-0.7 * data**0.3, 0.58 * data**0.571
        best = cell.loc[cell["loss"].idxmin(), ["lr", "batch_tokens", "loss"]].to_dict()
        lr, tokens = (Estimate(each, each / 1.2, each * 1.2) for each in (rate, batch))
        loss = 1.7 + 400 * size**-0.34 + 410 * data**-0.28
        made = Bowl(
            {"non_embedding": size, "tokens": data, "flops": 6 * size * data},
            len(cell),
            lr,
            tokens,
            loss,
            (0.01, -0.003, 0.012),
            0.02,
        )
        found.append(Bowl(**{**made.__dict__, "best": best}))
    edge, bare, best = found[0], found[1], found[0].best
    found[0] = Bowl(
        **{
            **edge.__dict__,
            "lr": Estimate(best["lr"], best["lr"], np.inf),
            "curvature": (),
            "censored": {"lr": "above"},
            "note": HOSTILE[0],
        }
    )
    found[1] = Bowl(**{**bare.__dict__, "lr": None, "batch_tokens": None, "curvature": (), "note": "no convex bowl"})
    return tuple(found)


def decision() -> Decision:
    size, data = 7e9, 1.4e12
    rate, batch, loss = 1.8 * size**-0.7 * data**0.3, 0.58 * data**0.571, 1.7 + 400 * size**-0.34 + 410 * data**-0.28
    proposal = {
        "N": Estimate(size, size, size), "D": Estimate(data, data, data), "lr": Estimate(rate, rate / 1.3, rate * 1.3),
        "batch_tokens": Estimate(batch, batch / 1.2, batch * 1.2), "loss": Estimate(loss, loss - 0.02, loss + 0.02),
    }  # fmt: skip
    plateau = {"lr": Plateau(rate / 1.5, rate * 1.6), "batch_tokens": Plateau(batch / 1.7, batch * 1.5)}
    verdicts = (Verdict("warning", "extrapolation", f"{HOSTILE[4]} is 46 times the largest compute of the runs"),)
    return Decision({"N": size, "D": data}, proposal, plateau, 4e-4, 46.0, verdicts)


def analysis(runs: RunTable | None = None) -> Analysis:
    """All sections filled."""
    runs = table() if runs is None else runs
    losses = runs.numbers("loss")
    used = np.isfinite(losses)
    best = runs.frame[used].groupby(["non_embedding", "tokens"])["loss"].idxmin()
    spans = {"N": (6e7, 1e9), "D": (6e8, 2e11), "C": (2e17, 1.2e21)}
    weak = (Verdict("warning", "condition", "condition number 2e6"), Verdict("ok", "starts", "98 % found it"))
    truth = 1.7 + 400 * runs.numbers("non_embedding")[:8] ** -0.34 + 410 * runs.numbers("tokens")[:8] ** -0.28
    held = tuple(
        HeldOut("chinchilla", "non_embedding", split, 12, 4, error, error / 3, -error / 2, 0.95, tuple(truth),
                tuple(truth * (1 + error)))
        for split, error in (("largest compute", 0.004), (HOSTILE[0], 0.002))
    )  # fmt: skip
    return Analysis(
        table=runs,
        used=used,
        gates=(
            Verdict("warning", "diverged", f"1 run diverged: {HOSTILE[0]}"),
            Verdict("ok", "pooled", "one data mix"),
        ),
        fits=(fit("chinchilla", "non_embedding", 16, weak, spans.items()), fit("step_law_lr", "non_embedding", 16)),
        held_out=held,
        bowls=bowls(runs.where(used)),
        decisions=(decision(),),
        frontier={"approach 2": {"N exponent": 0.49, "points": list(range(20))}},
        provenance={"command": f"fit {HOSTILE[1]}", "seed": 0, "versions": {"numpy": np.__version__}},
        fitted=tuple(int(each) for each in best),
    )
