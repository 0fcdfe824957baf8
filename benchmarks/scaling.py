"""What the full report of a table of runs costs: the analysis, plots, page and laws.json, in seconds of each.

    python benchmarks/scaling.py --part losses grid --replicates 1000

Parts, both of a known truth with noise:

    losses    250 runs over N and D, one in forty an outlier; to stay under 5 s
    grid      2,688 runs, a grid of learning rate and batch in each of 42 cells of N and D; to stay under 15 s

The imports are timed first and not counted, as a process pays them once. Beside the wall's seconds stand the
processor's, which other work on the machine lengthens less.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

WISHES = {"losses": 5.0, "grid": 15.0}


class Clock:
    """Seconds of named steps, by the wall's clock and the processor's."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.steps[name] = (time.perf_counter() - wall, time.process_time() - processor)

    def total(self) -> tuple[float, float]:
        return tuple(sum(each) for each in zip(*self.steps.values(), strict=True))


def losses():
    """250 runs: ten sizes with 25 lengths each."""
    import numpy as np
    import pandas as pd

    from scaling.table import RunTable, tidy

    random = np.random.default_rng(0)
    size, data = (each.ravel() for each in np.meshgrid(np.geomspace(5e7, 1e10, 10), np.geomspace(5e8, 3e11, 25)))
    noise = 0.003 * random.standard_normal(250) + np.where(random.random(250) < 0.025, 0.05, 0.0)
    loss = (1.8 + 480 * size**-0.35 + 2000 * data**-0.366) * np.exp(noise)
    frame = pd.DataFrame({"total": size, "tokens": data, "flops": 6 * size * data, "loss": loss})
    return RunTable(tidy(frame.assign(run=[f"run-{row}" for row in range(250)], status="finished")))


def grid():
    """42 cells of 64 runs around an optimum that follows Step Law."""
    import numpy as np
    import pandas as pd

    from scaling.table import RunTable, tidy

    random, parts = np.random.default_rng(0), []
    steps = np.geomspace(1 / 6, 6, 8)
    for size in np.geomspace(6e7, 1.07e9, 7):
        for data in np.geomspace(2e9, 1e11, 6):
            best = 1.79 * size**-0.713 * data**0.307, 0.58 * data**0.571
            off = np.exp(random.uniform(-0.2, 0.2, 2))
            rate, batch = (each.ravel() for each in np.meshgrid(best[0] * off[0] * steps, best[1] * off[1] * steps))
            away = np.log(rate / best[0]), np.log(batch / best[1])
            excess = 0.5 * (0.012 * away[0] ** 2 - 0.009 * away[0] * away[1] + 0.018 * away[1] ** 2)
            floor = 1.7 + 400 * size**-0.34 + 410 * data**-0.28
            loss = floor * np.exp(excess + 0.0015 * random.standard_normal(64))
            parts.append(pd.DataFrame({"non_embedding": size, "tokens": data, "lr": rate, "batch_tokens": batch,
                                       "flops": 6 * size * data, "loss": loss}))  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    return RunTable(tidy(frame.assign(run=[f"run-{row}" for row in range(len(frame))], status="finished")))


TABLES = {"losses": losses, "grid": grid}


def report(part: str, replicates: int) -> Clock:
    """Everything between a table that was read and the files that are written."""
    from scaling import laws_file
    from scaling.analysis import analyse
    from scaling.report import figures, html

    table, clock, began = TABLES[part](), Clock(), []

    def progress(step: str) -> None:
        finish()
        began.append((step, time.perf_counter(), time.process_time()))

    def finish() -> None:
        if began:
            step, wall, processor = began.pop()
            clock.steps[step] = (time.perf_counter() - wall, time.process_time() - processor)

    targets = [{"N": 3e9, "D": 6e10}, {"C": 3e21}]
    analysis = analyse(table, targets=targets, replicates=replicates, progress=progress)
    finish()
    with clock("plots"):
        plots = figures.draw(analysis)
    with clock("report.html"):
        page = html.page(analysis, plots)
    with clock("laws.json"), tempfile.TemporaryDirectory() as folder:
        laws_file.write(Path(folder) / "laws.json", analysis)
        (Path(folder) / "report.html").write_text(page, encoding="utf-8")
    return clock


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--replicates", type=int, default=1000, help="of the bootstrap (default 1000)")
    parser.add_argument("--json", metavar="FILE", help="write the seconds there too")
    arguments = parser.parse_args(argv)
    clock = Clock()
    with clock("imports"):
        import scaling.analysis
        import scaling.laws_file
        import scaling.report.figures
        import scaling.report.html  # noqa: F401
    print(f"imports{'':24} {clock.steps['imports'][0]:8.2f} s, {clock.steps['imports'][1]:.2f} s of the processor")
    found = {}
    for part in arguments.part:
        clock = report(part, arguments.replicates)
        print(f"\n{part}")
        for name, (wall, processor) in {**clock.steps, "all": clock.total()}.items():
            print(f"  {name:<28} {wall:8.2f} s, {processor:.2f} s of the processor")
        print(f"  wished: under {WISHES[part]:g} s")
        found[part] = {**clock.steps, "all": clock.total()}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
