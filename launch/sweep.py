"""Run a ladder of sizes, tokens, learning rates and batches: `python launch/sweep.py LADDER.toml`."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.resilience.exits import BAD_INPUT, FINISHED, UNIDENTIFIED

if TYPE_CHECKING:
    from launch.ladder import Ladder
    from launch.ladder_runs import Run

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sweep",
        description="Run a ladder: all its sizes, tokens, learning rates, batches and seeds, runs of fewer tokens as "
        "branches of longer ones. The same command goes on where it was interrupted; a finished run is never run "
        "again. At the end fits laws to the runs and plans the next, if the file says so.",
        epilog="Exit codes: 0 done, 1 a run failed, 2 bad input, 75 interrupted and saved; after that the codes of "
        "fit and plan. See docs/sweeps.md.",
    )
    parser.add_argument("ladder", metavar="LADDER", help="a ladder file, such as configs/ladder-quickstart.toml")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default 1; under Slurm no limit)")
    parser.add_argument("--processes", type=int, metavar="N", help="train each on N processes of this machine")
    parser.add_argument("--list", action="store_true", help="say how each run stands; run nothing")
    parser.add_argument("--dry-run", action="store_true", help="say what each run is and costs; run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed or was stopped early")
    parser.add_argument(
        "--slurm", metavar="KEY=VALUE,...",
        help="submit to Slurm instead, such as partition=gpu,time=120,gpus_per_node=8 (time in minutes)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a ladder; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return sweep(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def sweep(arguments: argparse.Namespace) -> int:
    """What `main` does. ValueError for bad input."""
    from launch.sweep_queue import Queue

    for key, value in (("jobs", arguments.jobs), ("processes", arguments.processes)):
        if value is not None and value < 1:
            raise ValueError(f"--{key} {value}: accepted is 1 and more")
    if "RANK" in os.environ:
        raise ValueError("sweep.py starts the processes of its runs itself: run it by python, with --processes N")
    ladder, runs = open_ladder(arguments.ladder, arguments.processes or 1)
    if arguments.dry_run or arguments.list:
        print(costs(runs) if arguments.dry_run else standing(runs))
        return FINISHED
    if arguments.retry_failed:
        forget(runs)
    if arguments.slurm is not None:
        from launch.sweep_slurm import parse_options, submit

        if submit(arguments.ladder, runs, parse_options(arguments.slurm), arguments.jobs, arguments.processes):
            return FINISHED
    elif code := Queue(runs, ladder.stop, arguments.jobs or 1, arguments.processes).run():
        return code
    print(f"\n{summary(runs)}", flush=True)
    return afterwards(ladder, runs)


def open_ladder(path: str, processes: int = 1) -> "tuple[Ladder, list[Run]]":
    """A ladder file and its runs. ValueError for bad input, and where runs that exist contradict it."""
    from launch.ladder import read_ladder
    from launch.ladder_runs import plan
    from launch.sweep_store import refuse_contradictions

    ladder, base = read_ladder(path)
    runs = plan(ladder, base, path, processes)
    refuse_contradictions(runs)
    return ladder, runs


def forget(runs: "Sequence[Run]") -> None:
    """Have those run again that failed or were stopped early, from the last checkpoint of each."""
    from launch.sweep_store import ending, own

    for run in runs:
        found = ending(run)
        if found is not None and found.state != "diverged":
            own(run, ".json").unlink()


def costs(runs: "Sequence[Run]") -> str:
    """What each run is, and what all of them cost beside training each from the beginning."""
    rows = [("run", "parameters", "tokens", "learning rate", "batch", "steps", "FLOPs", "")]
    for run in runs:
        where = f"from {run.begin:,}" if run.parent else ""
        cells = (f"{run.counts.total:,}", f"{run.end:,}", f"{run.config.optim.lr:g}", f"{run.sequences}")
        rows.append((run.name, *cells, f"{run.steps:,}", f"{run.flops:.3g}", where))
    total = sum(run.flops for run in runs)
    scratch = sum(run.flops * run.end // (run.end - run.begin) for run in runs)
    sizes = {run.size: run.counts for run in runs}
    lines = [f"size {name}: {each.total:,} parameters, {each.non_embedding:,} of them without embeddings"
             for name, each in sizes.items()]  # fmt: skip
    return "\n".join(
        [*lines, "", aligned(rows), f"{len(runs)} runs, {total:.4g} FLOPs; each from the beginning, {scratch:.4g}"]
    )


def standing(runs: "Sequence[Run]") -> str:
    """How each run stands, with its last held-out loss."""
    from launch.closing import last_evaluations
    from launch.sweep_store import ending, others, spent, state

    by_name, rows = {run.name: run for run in runs}, [("run", "state", "done", "loss", "")]
    for run in runs:
        found, told = state(run, by_name.get(run.parent)), ending(run)
        done = 1.0 if found == "finished" else spent(run)[0] / run.flops
        loss = next((f"{row['loss']:.4f}" for row in last_evaluations(run.folder)), "") if found != "wanted" else ""
        rows.append((run.name, found, f"{100 * done:.0f} %", loss, told.reason if told else ""))
    lines = [aligned(rows), summary(runs)]
    if beside := others(runs):
        lines.append(
            f"beside them, in the same folder, {len(beside)} runs that are not of this ladder: {beside[0]}, ..."
        )
    return "\n".join(lines)


def summary(runs: "Sequence[Run]") -> str:
    """How many runs stand how."""
    from launch.sweep_store import spent, state

    by_name = {run.name: run for run in runs}
    states = [state(run, by_name.get(run.parent)) for run in runs]
    counted = ", ".join(f"{states.count(each)} {each}" for each in dict.fromkeys(states))
    return f"{len(runs)} runs: {counted}; {sum(spent(run)[0] for run in runs):.4g} FLOPs spent"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table whose first row is its head; all but the first and the last column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


def afterwards(ladder: "Ladder", runs: "Sequence[Run]") -> int:
    """Fit and plan as the ladder says; the first exit code that is not 0. Where some law is not identified, what is
    known of the others is planned with all the same."""
    then, folder = ladder.then, runs[0].folder.parent
    out = Path(then.out or f"{folder}-analysis")
    commands = []
    if then.fit is not None:
        commands.append(["fit", str(folder), *then.fit, "--out", str(out)])
    if then.plan is not None:
        commands.append(["plan", "--laws", str(out / "laws.json"), *then.plan])
    codes = []
    for verb, *arguments in commands:
        print(f"\n$ {shlex.join(['python', f'launch/{verb}.py', *arguments])}", flush=True)
        code = subprocess.run([sys.executable, str(HERE / f"{verb}.py"), *arguments], check=False).returncode
        codes.append(code)
        if code:
            print(f"{verb}.py ended with code {code}", file=sys.stderr)
        if code not in (FINISHED, UNIDENTIFIED):
            break
    return next(filter(None, codes), FINISHED)


if __name__ == "__main__":
    sys.exit(main())
