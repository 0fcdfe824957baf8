"""What tests of plans share: a small preset, laws by hand on disk, runs of a grid, and the command."""

import itertools
import math

import numpy as np
import pandas as pd

from launch import plan
from launch.auto import open_laws
from launch.planning import Machine, make_plan
from scaling.laws_file import write
from scaling.results import Analysis, Bowl, Estimate
from scaling.table import RunTable, tidy
from tests.fits import fit, loss_fit

ONE = Machine()
SMALL = """
[run]
name = "small"
[model]
num_layers = 4
hidden_size = 64
intermediate_size = 192
num_heads = 4
num_kv_heads = 2
vocab_size = 256
[data]
seq_len = 64
sources = [{ path = "nowhere" }]
[batch]
sequences = "auto"
[optim]
lr = "auto"
[schedule]
horizon = "1M"
"""


def bowls(curvature=(0.009, -0.004, 0.02)):
    one = Estimate(1.0, 1.0, 1.0)
    return tuple(Bowl({"non_embedding": n, "tokens": 1e10}, 20, one, one, 2.5, curvature) for n in (1e8, 3e8))


def write_laws(folder, *fits, table=None, **more):
    rows = RunTable(pd.DataFrame()) if table is None else table
    path = folder / "laws.json"
    write(path, Analysis(rows, np.ones(len(rows), dtype=bool), (), fits, **more))
    return str(path)


def small_fits(largest=1e13):
    """Laws whose optimum lies at a few hundred thousand parameters."""
    spans = {"N": (1e4, 1e6), "D": (1e5, 1e7), "C": (1e10, largest)}
    return (
        loss_fit(spans=spans),
        fit("step_law_lr", {"c": 1e-2, "a": -0.2, "b": 0.1}, spans=spans),
        fit("step_law_batch", {"c": 10.0, "b": 0.4}, spans=spans),
    )


def run(capsys, *arguments):
    code = plan.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def make_plan_of(path, target, preset, machine=ONE):
    return make_plan(open_laws(path), target, preset, machine)


def grid() -> RunTable:
    """Cells of a known bowl, whose optimum in the largest lies at the lower edge of the rates."""
    rows = []
    for n, d in itertools.product((5e4, 1e5, 2e5), (1e6, 4e6)):
        lr, batch = 10 * n**-0.5 * d**0.1, 4.0 * d**0.5
        for i, j in itertools.product(range(-2, 3), range(-2, 3)):
            x, y = i * math.log(2), j * math.log(2)
            loss = (1.69 + 400 / n**0.34 + 400 / d**0.28) * math.exp(0.01 * x * x - 0.006 * x * y + 0.015 * y * y)
            rows.append((n, d, lr * 2**i, batch * 2**j, loss * (1 + 2e-4 * math.sin(7 * i + 3 * j))))
    frame = pd.DataFrame(rows, columns=["non_embedding", "tokens", "lr", "batch_tokens", "loss"])
    return RunTable(tidy(frame.assign(status="finished")))
