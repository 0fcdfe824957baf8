"""What fitting a law costs: Chinchilla's approach 3 on 240 rows with 4,000 bootstrap replicates, and how peers do it.

    OMP_NUM_THREADS=1 python benchmarks/scaling_fitting.py
    OMP_NUM_THREADS=1 python benchmarks/scaling_fitting.py --grid 100 --table svg_extracted_data.csv --packages PYTHON

Contenders, on the same rows with Huber's loss of ln residuals at delta = 1e-3:

    ours      scaling.fitting.fit: 200 starts, the bootstrap, profile intervals and verdicts
    grid      SciPy's L-BFGS-B with numeric gradients from each point of Hoffmann et al.'s grid of 4,500; no bootstrap
    package   the grid of the PyPI package `chinchilla` (BFGS, its own worker processes), if it is installed, or with
              --packages in another interpreter that has it; no bootstrap

Each is timed by the processor's clock (of all its processes) and by the wall's. A grid of fewer points is taken evenly
from the full one and its time is scaled up, which the table says.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import logsumexp

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scaling.fitting import fit
from scaling.fitting.objective import huber
from scaling.laws import find

DELTA = 1e-3
EXPONENTS, LOGS, FLOORS = np.arange(0, 2.1, 0.5), np.arange(0, 26, 5.0), np.arange(-1, 1.1, 0.5)
GRID = np.array(list(itertools.product(LOGS, LOGS, FLOORS, EXPONENTS, EXPONENTS)))
"""a, b, e, alpha, beta of Hoffmann et al. 2022, appendix D.3: 4,500 points."""
PACKAGE = """
import json, os, resource, sys, time
import numpy as np, pandas as pd
from chinchilla import Chinchilla
from chinchilla._metrics import log_huber
folder, delta, grid = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
cc = Chinchilla(folder, param_grid=grid, loss_fn=lambda y, p: log_huber(y, p, delta), log_level=50)
cc.visualizer.optim = lambda *args, **kwargs: None
def used():
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in every)
before, begun = used(), time.perf_counter()
cc.fit()
values = {name: float(getattr(cc, name)) for name in ("E", "A", "B", "alpha", "beta")}
seconds = {"wall": time.perf_counter() - begun, "processor": used() - before}
print(json.dumps({"values": values, **seconds}))
"""


def synthetic(rows: int, seed: int = 0) -> pd.DataFrame:
    """Runs as those of Hoffmann et al.: N and D by chance, noise of 0.4 % and one outlier in twenty."""
    generator = np.random.default_rng(seed)
    size = np.exp(generator.uniform(np.log(5e7), np.log(1e10), rows))
    data = np.exp(generator.uniform(np.log(1e9), np.log(3e11), rows))
    errors = 0.004 * generator.standard_normal(rows) + 0.03 * (generator.random(rows) < 0.05)
    loss = (1.8172 + 482.01 * size**-0.3478 + 2085.43 * data**-0.3658) * np.exp(errors)
    return pd.DataFrame({"N": size, "D": data, "loss": loss})


def published(path: Path) -> pd.DataFrame:
    """The points that Besiroglu et al. 2024 extracted, without the five highest losses."""
    frame = pd.read_csv(path)
    frame = frame[frame["loss"] < frame["loss"].nlargest(5).min()]
    size = frame["Model Size"]
    return pd.DataFrame({"N": size, "D": frame["Training FLOP"] / (6 * size), "loss": frame["loss"]})


def objective(parameters: np.ndarray, log_size: np.ndarray, log_data: np.ndarray, log_loss: np.ndarray) -> float:
    """Huber's sum in the parameters a = ln A, b = ln B, e = ln E, alpha, beta, as peers write it."""
    a, b, e, alpha, beta = parameters
    terms = np.stack([a - alpha * log_size, b - beta * log_data, np.full_like(log_size, e)])
    return float(huber(log_loss - logsumexp(terms, axis=0), DELTA).sum())


def timed(work: Callable[[], dict[str, float]]) -> dict[str, Any]:
    wall, processor = time.perf_counter(), time.process_time()
    values = work()
    return {"values": values, "wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def ours(rows: pd.DataFrame, replicates: int) -> dict[str, Any]:
    x = {name: rows[name].to_numpy() for name in "ND"}

    def work() -> dict[str, float]:
        found = fit(find("chinchilla"), x, rows["loss"].to_numpy(), size="total", replicates=replicates)
        return {name: each.value for name, each in found.parameters.items()}

    return timed(work)


def grid(rows: pd.DataFrame, points: np.ndarray) -> dict[str, Any]:
    logs = tuple(np.log(rows[name].to_numpy()) for name in ("N", "D", "loss"))

    def work() -> dict[str, float]:
        with np.errstate(all="ignore"):
            tried = [minimize(objective, point, args=logs, method="L-BFGS-B") for point in points]
        a, b, e, alpha, beta = min(tried, key=lambda each: each.fun if np.isfinite(each.fun) else np.inf).x
        return {"E": np.exp(e), "A": np.exp(a), "B": np.exp(b), "alpha": alpha, "beta": beta}

    return timed(work)


def package(rows: pd.DataFrame, axes: dict[str, list[float]], python: str) -> dict[str, Any]:
    """The package in a process of its own, on the grid of these axes; `values`, `wall` and `processor`."""
    with tempfile.TemporaryDirectory() as folder:
        rows.assign(C=6 * rows["N"] * rows["D"])[["C", "N", "D", "loss"]].to_csv(Path(folder) / "df.csv", index=False)
        command = [python, "-c", PACKAGE, folder, str(DELTA), json.dumps(axes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the package failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(rows: pd.DataFrame, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Prints the table, and returns it with the machine it was taken on."""
    logs = tuple(np.log(rows[name].to_numpy()) for name in ("N", "D", "loss"))
    names = ("E", "A", "B", "alpha", "beta")
    print(f"{len(rows)} rows\n{'':28}{'wall':>9}{'processor':>11}{'ratio':>8}  {'objective':>12}  {', '.join(names)}")
    for name, each in found.items():
        e, a, b = (np.log(max(each["values"][key], 1e-300)) for key in ("E", "A", "B"))
        each["objective"] = objective(np.array([a, b, e, each["values"]["alpha"], each["values"]["beta"]]), *logs)
        each["ratio"] = each["processor"] / found["ours"]["processor"]
        numbers = ", ".join(f"{each['values'][key]:.5g}" for key in names)
        print(
            f"{name:28}{each['wall']:8.2f}s{each['processor']:10.2f}s{each['ratio']:8.1f}"
            f"  {each['objective']:12.6g}  {numbers}"
        )
    machine = {
        "processor": _processor(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load": os.getloadavg()[0], "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "scipy")},
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    return {"machine": machine, "rows": len(rows), "contenders": found}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    names = [each for each in file.read_text().splitlines() if each.startswith("model name")] if file.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def scaled(found: dict[str, Any], taken: int) -> dict[str, Any]:
    return {**found, **{clock: found[clock] * len(GRID) / taken for clock in ("wall", "processor")}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="the points of Besiroglu et al.; a synthetic table if not given")
    parser.add_argument("--rows", type=int, default=240, help="of the synthetic table")
    parser.add_argument("--replicates", type=int, default=4000, help="of our bootstrap")
    parser.add_argument("--grid", type=int, default=len(GRID), help="points of SciPy's grid; 0 for none")
    parser.add_argument("--packages", default=sys.executable, help="interpreter that has the package chinchilla")
    parser.add_argument("--package-grid", type=int, default=2, help="values an axis of the package's grid; 0 for none")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    rows = published(options.table) if options.table else synthetic(options.rows)
    found = {"ours": ours(rows, options.replicates)}
    if options.grid:
        taken = GRID[np.linspace(0, len(GRID) - 1, min(options.grid, len(GRID))).astype(int)]
        name = "grid" if len(taken) == len(GRID) else f"grid (from {len(taken)} points)"
        found[name] = scaled(grid(rows, taken), len(taken))
    has_package = options.packages != sys.executable or importlib.util.find_spec("chinchilla")
    if options.package_grid and has_package:
        ends = {"e": (-1, 1), "a": (0, 25), "b": (0, 25), "alpha": (0, 2), "beta": (0, 2)}
        axes = {key: np.linspace(*each, options.package_grid + 2)[1:-1].tolist() for key, each in ends.items()}
        taken = options.package_grid ** len(axes)
        found[f"package (from {taken} points)"] = scaled(package(rows, axes, options.packages), taken)
    result = report(rows, found)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
