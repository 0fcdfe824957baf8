"""What choosing runs by expected regret is worth: a replay on the Step Law grid, whose losses are all known.

    python benchmarks/scaling_design.py ../shared/data/scalebench/lr_bsz_train.parquet --seeds 20

The table has columns lr, bsz (sequences of 2048 tokens), data_size (tokens), non_embedding_param_size and lm_loss. A
run costs 6 N D FLOPs, and the grid's compute is the sum over all of its runs. Cells (equal N and D) are ordered by the
cost of one run. Two protocols, each with the same cells judged for every method:

    larger    The pool is the cheapest whole cells that together cost at most 10 % of the grid's compute. Judged on all
              other cells, each of whose runs costs more than any of the pool. Spending the whole 10 % takes the whole
              pool, and every method is then the same; they differ at smaller spending.
    scattered Half of those larger cells, drawn by the seed and always with the largest compute of all, are judged; the
              pool is all other cells. Methods spend up to 10 % of the grid's compute, which no longer buys the pool.

Every method starts from the same 12 runs of the cheapest cell, drawn by the seed, whose cost counts. Then spending
doubles in rounds; in each the method chooses runs until none that is left in the pool fits, knowing only losses of
runs that it chose before the round. All methods decide by the same belief (`scaling.design`), so that only the choice
of runs differs; beside it stands, as "laws", what fit and plan propose from the same runs (`scaling.decisions`), where
their cells tell a law of both lr and batch. Regret is the loss at the proposed lr and batch over the lowest of the
cell, less 1: at the nearest run in (ln lr, ln B), and by linear interpolation between runs (at the nearest where the
proposal is outside of them). Mean over the judged cells; then mean over seeds with a 95 % bootstrap interval.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.interpolate import LinearNDInterpolator

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scaling import decisions
from scaling.columns import DIVERGED, FINISHED, RUNNING
from scaling.design.belief import learn
from scaling.design.choice import Value, choose, design, entropy_value, regret_value
from scaling.design.posterior import Belief
from scaling.design.runs import Runs, cells_of, read
from scaling.optimum_laws import find_optima
from scaling.results import Decision
from scaling.table import RunTable, tidy

SIZE = "non_embedding"
SHARE = 0.10
FIRST = 12
REPLICATES = 100
"""Of the laws' bootstrap: it tells whether they are identified, and not what they propose."""
SPENDING = tuple(SHARE / 2**k for k in range(9, -1, -1))
"""Shares of the grid's compute after each round."""
PROTOCOLS = ("larger", "scattered")

Chooser = Callable[[Belief, Runs, float, np.random.Generator], np.ndarray]
"""From what is believed, the runs that are left, the FLOPs to spend, and a generator; to indices of those runs."""


def grid(path: Path) -> Runs:
    """The runs of the published table."""
    table = pd.read_parquet(path)
    frame = pd.DataFrame(
        {
            SIZE: table["non_embedding_param_size"],
            "tokens": table["data_size"],
            "lr": table["lr"],
            "batch_tokens": table["bsz"] * 2048,
            "loss": table["lm_loss"],
        }
    )
    return read(frame, SIZE)


@dataclass(frozen=True)
class Surface:
    """The measured losses of one cell, from which the regret of a proposal is read."""

    N: float
    D: float
    at: np.ndarray
    """ln lr and ln B, (runs, 2)."""
    loss: np.ndarray
    between: LinearNDInterpolator

    def regret(self, lr: float, batch_tokens: float) -> tuple[float, float]:
        """Excess loss as a share, at the nearest run and by linear interpolation."""
        asked = np.log([lr, batch_tokens])
        nearest = self.loss[np.sum((self.at - asked) ** 2, axis=1).argmin()]
        between = float(self.between(asked[None])[0])
        return nearest / self.loss.min() - 1, (between if np.isfinite(between) else nearest) / self.loss.min() - 1


@dataclass(frozen=True)
class Split:
    pool: Runs
    judged: tuple[Surface, ...]
    compute: float
    """FLOPs of the whole grid."""


def split(runs: Runs, protocol: str, seed: int) -> Split:
    """The pool and the judged cells of a protocol."""
    N, D, cell = cells_of(runs.N, runs.D)
    price = np.array([runs.flops[cell == each].mean() for each in range(len(N))])
    order = np.argsort(price, kind="stable")
    total = np.cumsum(np.bincount(cell, runs.flops)[order])
    judged = order[total > SHARE * total[-1]]
    if protocol == "scattered":
        chosen = np.random.default_rng([seed, 1]).permutation(judged[:-1])[: len(judged) // 2 - 1]
        judged = np.sort(np.r_[chosen, judged[-1]])
    surfaces = []
    for each in judged:
        own = runs.where(cell == each)
        at = np.log(np.stack([own.lr, own.batch_tokens], axis=-1))
        surfaces.append(Surface(float(N[each]), float(D[each]), at, own.loss, LinearNDInterpolator(at, own.loss)))
    return Split(runs.where(~np.isin(cell, judged)), tuple(surfaces), float(total[-1]))


def by_design(value: Value, judged: Sequence[Surface]) -> Chooser:
    """Greedy by a value for the cost, for a decision at the judged cells (of which only N and D are known)."""
    N, D = np.array([each.N for each in judged]), np.array([each.D for each in judged])

    def chooser(belief: Belief, left: Runs, flops: float, generator: np.random.Generator) -> np.ndarray:
        _, _, cell = cells_of(left.N, left.D)
        state = design(belief, left, N, D)
        picked = choose(state, left, cell, count=len(left), budget_flops=flops, value=value)
        return np.array([each[0] for each in picked], dtype=int)

    return chooser


def in_order(key: Callable[[Runs, np.random.Generator], np.ndarray]) -> Chooser:
    """One after another by a key, passing over those that no longer fit."""

    def chooser(belief: Belief, left: Runs, flops: float, generator: np.random.Generator) -> np.ndarray:
        picked = []
        for run in np.argsort(key(left, generator), kind="stable"):
            if left.flops[run] <= flops:
                picked.append(run)
                flops -= left.flops[run]
        return np.array(picked, dtype=int)

    return chooser


def methods(judged: Sequence[Surface]) -> dict[str, Chooser]:
    return {
        "regret": by_design(regret_value, judged),
        "random": in_order(lambda left, generator: generator.random(len(left))),
        "cheapest first": in_order(lambda left, generator: left.flops * (1 + 1e-6 * generator.random(len(left)))),
        "D-optimal": by_design(entropy_value, judged),
    }


def replay(runs: Runs, protocol: str, method: str, seed: int, spending: Sequence[float] = SPENDING) -> pd.DataFrame:
    """One row a round: share spent, runs, and mean and largest regret of the judged cells."""
    setting = split(runs, protocol, seed)
    chooser = methods(setting.judged)[method]
    generator = np.random.default_rng([seed, 2])
    pool = setting.pool
    cheapest = np.flatnonzero(pool.flops == pool.flops.min())
    taken = np.zeros(len(pool), dtype=bool)
    taken[np.random.default_rng([seed, 0]).choice(cheapest, FIRST, replace=False)] = True
    belief = learn(pool.where(taken), SIZE)
    rows = []
    for share in spending:
        budget = share * setting.compute - pool.flops[taken].sum()
        left = np.flatnonzero(~taken)
        if len(left) and budget >= pool.flops[left].min():
            fits_all = pool.flops[left].sum() <= budget
            taken[left if fits_all else left[chooser(belief, pool.where(left), budget, generator)]] = True
            belief = learn(pool.where(taken), SIZE, start=belief)
        rows.append({"share": share, "spent": pool.flops[taken].sum() / setting.compute, "runs": int(taken.sum())})
        rows[-1] |= judge(belief, pool.where(taken), setting.judged)
    return pd.DataFrame(rows).assign(protocol=protocol, method=method, seed=seed)


def judge(belief: Belief, runs: Runs, judged: Sequence[Surface]) -> dict[str, float]:
    """Regret of the belief's decisions, and what it expected; and of what fit and plan propose from these runs."""
    believed = [belief.decide(each.N, each.D) for each in judged]
    regrets = np.array([_regret(each, at) for each, at in zip(believed, judged, strict=True)])
    by_laws = np.array([_regret(each, at) for each, at in zip(by_law(runs, judged), judged, strict=True)])
    nearest, linear = regrets.mean(axis=0)
    return {
        "nearest": float(nearest),
        "linear": float(linear),
        "worst": float(regrets[:, 1].max()),
        "expected": float(np.mean([each.regret for each in believed])),
        "laws": float(by_laws[:, 1].mean()),
    }


def by_law(runs: Runs, judged: Sequence[Surface]) -> list[Decision]:
    """What fit and plan decide at the judged cells: by the laws through the bowls of these runs' cells."""
    status = np.select([runs.diverged, runs.pending], [DIVERGED, RUNNING], FINISHED)
    columns = {"tokens": runs.D, "lr": runs.lr, "batch_tokens": runs.batch_tokens, "flops": runs.flops}
    frame = pd.DataFrame({SIZE: runs.N, **columns, "loss": runs.loss, "status": status})
    found = find_optima(RunTable(tidy(frame)), SIZE, (), REPLICATES, 0, checks=False)
    return [decisions.decide({"N": each.N, "D": each.D}, found.fits, found.bowls, far=True) for each in judged]


def _regret(decision: Decision, at: Surface) -> tuple[float, float]:
    """As of `Surface.regret`; NaN where the rate or the batch is not told."""
    if not {"lr", "batch_tokens"} <= set(decision.proposal):
        return float("nan"), float("nan")
    return at.regret(*(decision.proposal[name].value for name in ("lr", "batch_tokens")))


def summary(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Mean over seeds in percent with its 95 % bootstrap interval: rounds down, methods across."""
    generator = np.random.default_rng(0)

    def text(values: pd.Series) -> str:
        draws = generator.choice(values.to_numpy(), (2000, len(values))).mean(axis=1)
        if not np.isfinite(values).all():
            told = int(np.isfinite(values).sum())
            return f"{100 * values.mean():.3f} in {told} of {len(values)}" if told else "not told"
        low, high = np.quantile(draws, [0.025, 0.975])
        return f"{100 * values.mean():.3f} ({100 * low:.3f}, {100 * high:.3f})"

    return rows.groupby(["share", "method"], sort=False)[measure].agg(text).unstack(sort=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--protocol", choices=PROTOCOLS, action="append", help="default: both")
    parser.add_argument("--csv", type=Path, help="every row, for further analysis")
    options = parser.parse_args()
    runs = grid(options.table)
    parts = []
    for protocol in options.protocol or PROTOCOLS:
        one = split(runs, protocol, 0)
        pool = one.pool.flops.sum() / one.compute
        print(
            f"{protocol}: {len(one.pool)} runs in the pool, {pool:.1%} of the compute; {len(one.judged)} cells judged"
        )
        play = partial(replay, runs, protocol)
        rows = pd.concat([play(name, seed) for name in methods(()) for seed in range(options.seeds)], ignore_index=True)
        parts.append(rows)
        for measure in ("linear", "laws", "nearest", "worst"):
            print(f"\n{measure}, % of the loss, by share of the grid's compute\n")
            print(summary(rows, measure).to_string(), flush=True)
        counts = rows.groupby(["share", "method"], sort=False)["runs"].mean().unstack(sort=False)
        print(f"\nruns, mean over seeds\n\n{counts.to_string()}\n")
    if options.csv:
        pd.concat(parts).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
