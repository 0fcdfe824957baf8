"""From runs to laws: `fit.py RUNS ... [--law ...] [--target N=7B,D=1.4T] --out DIR`."""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.resilience.exits import BAD_INPUT, FINISHED, UNIDENTIFIED

if TYPE_CHECKING:
    from scaling.results import Analysis

LAWS, REPORT, PLOTS = "laws.json", "report.html", "plots"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fit",
        usage="fit RUNS ... [--law LAW ...] [--target N=7B,D=1.4T ...] --out DIR",
        description="Read runs, fit the laws of loss and of the best learning rate and batch, and say how far they can "
        "be trusted. Prints tables, and writes laws.json, report.html and plots/*.png.",
        epilog="Exit codes: 0 done, warnings are shown; 2 bad input, nothing is written; 3 no law could be fitted, or "
        "one that was asked for, or a target, cannot be told from these runs; what there is is written. See "
        "docs/scaling.md.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="run directories, folders of them, and tables: CSV, JSONL, Parquet")
    add("--out", required=True, metavar="DIR", help="new, empty, or earlier results of this command, then replaced")
    add("--law", nargs="+", default=[], metavar="LAW", help="names, or products such as 'lr = m * tokens^-a * N^-b'")
    add("--target", nargs="+", default=[], metavar="N=7B,D=1.4T", help="what to propose for: N and D, or C in FLOPs")
    add("--columns", nargs="+", default=[], metavar="loss='smooth loss'", help="the name of a column in the tables")
    add("--set", nargs="+", default=[], metavar="seq_len=2048", help="what all runs have equal and no table tells")
    add("--size", choices=("total", "non_embedding", "active"), help="what N means (default: what predicts better)")
    add("--loss-kind", metavar="KIND", help="the loss that is fitted, where runs have several")
    add("--pool", nargs="+", default=[], metavar="COLUMN", help="fit rows together though they differ in data or so")
    add("--replicates", type=int, default=1000, metavar="B", help="of the bootstrap (default 1000)")
    add("--seed", type=int, default=0, help="of the bootstrap and the starts (default 0)")
    add("--far", action="store_true", help="propose beyond 10 times the largest compute of the runs too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Fit, print, and write; returns the exit code."""
    arguments = parser().parse_args(argv)
    command = shlex.join(["fit", *(sys.argv[1:] if argv is None else argv)])
    try:
        out = checked(Path(arguments.out))
        analysis = analysed(arguments, command)
        write(analysis, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    show(analysis)
    print(f"\nwritten: {out / REPORT}, {out / LAWS}, {out / PLOTS}/")
    unanswered = untold(analysis, arguments.law)
    for each in unanswered:
        print(f"not told by these runs: {each}", file=sys.stderr)
    return UNIDENTIFIED if unanswered else FINISHED


def analysed(arguments: argparse.Namespace, command: str) -> "Analysis":
    """Read and fit. ValueError for bad input."""
    from scaling.analysis import analyse
    from scaling.readers import read

    if arguments.replicates < 0:
        raise ValueError(f"--replicates {arguments.replicates}: accepted is 0 or more")
    targets = [target(each) for each in arguments.target]
    columns = pairs("--columns", arguments.columns, may_be_empty=True)
    constants = {name: constant(value) for name, value in pairs("--set", arguments.set).items()}
    progress = Progress()
    progress("reading")
    table = read(arguments.runs, columns, constants)
    return analyse(
        table,
        laws=arguments.law,
        targets=targets,
        size=arguments.size,
        loss_kind=arguments.loss_kind,
        pool=arguments.pool,
        replicates=arguments.replicates,
        seed=arguments.seed,
        far=arguments.far,
        provenance={"command": command, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "runs": arguments.runs},
        progress=progress,
    )


class Progress:
    """Says on stderr what is being done, and after how many seconds it began."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, step: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {step}", file=sys.stderr, flush=True)


def pairs(option: str, given: Sequence[str], *, may_be_empty: bool = False) -> dict[str, str]:
    """NAME=VALUE of each. ValueError for anything else, and for a name given twice."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, value = (part.strip() for part in each.partition("="))
        if not (name and equals and (value or may_be_empty)):
            raise ValueError(f"{option} {each!r}: accepted is NAME=VALUE")
        if name in found:
            raise ValueError(f"{option}: {name} is given twice")
        found[name] = value
    return found


def constant(value: str) -> str | float:
    try:
        return amount(value)
    except ValueError:
        return value


def target(text: str) -> dict[str, float]:
    """Of "N=7B,D=1.4T" the numbers. ValueError for what is none."""
    found = pairs("--target", text.split(","))
    return {name: amount(value, f"--target {text!r}: {name} = ") for name, value in found.items()}


def amount(value: str, where: str = "") -> float:
    """A number such as 7e9, 7B or 1.4T. ValueError for anything else."""
    from runtime.units import parse_tokens

    try:
        return float(value)
    except ValueError:
        pass
    try:
        return float(parse_tokens(value))
    except ValueError:
        raise ValueError(f"{where}{value!r} is not a number; write 7e9, 7B or 1.4T") from None


def checked(out: Path) -> Path:
    """Where results may be written. ValueError for a folder that holds something else."""
    if not out.exists():
        return out
    if not out.is_dir():
        raise ValueError(f"--out {out}: it is a file; give a folder")
    held = {each.name for each in out.iterdir()}
    if held and (LAWS not in held or not held <= {LAWS, REPORT, PLOTS}):
        other = ", ".join(sorted(held - {LAWS, REPORT, PLOTS})[:3]) or "no laws.json"
        raise ValueError(f"--out {out}: the folder holds something else ({other}); give a new or empty one")
    return out


def write(analysis: "Analysis", out: Path) -> None:
    """All files, or none of them. ValueError where they cannot be written."""
    from scaling import laws_file
    from scaling.report import figures, html

    plots = figures.draw(analysis)
    try:
        with replaced(out) as folder:
            laws_file.write(folder / LAWS, analysis)
            (folder / REPORT).write_text(html.page(analysis, plots), encoding="utf-8")
            (folder / PLOTS).mkdir()
            for name, image in plots.items():
                (folder / PLOTS / f"{name}.png").write_bytes(image)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, if nothing fails until then."""
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        made.chmod(0o755)
        yield made
        if out.exists():
            old = made.with_name(f"{made.name}.old")
            out.rename(old)
            made.rename(out)
            shutil.rmtree(old)
        else:
            made.rename(out)
    finally:
        if made.exists():
            shutil.rmtree(made, ignore_errors=True)


def show(analysis: "Analysis") -> None:
    from rich.console import Console

    from scaling.report import terminal

    terminal.show(analysis, Console(highlight=False, width=None if sys.stdout.isatty() else 160))


def untold(analysis: "Analysis", asked: Sequence[str]) -> list[str]:
    """What was asked for and these runs do not tell: laws that have no fit or are not identified, targets without a
    proposal; and that no law at all has a fit."""
    from scaling.laws import find

    names = dict.fromkeys(find(each).name for each in asked)
    fitted = {fit.law for fit in analysis.fits}
    said = [each for each in analysis.gates if each.level != "ok"]
    found = [each.message for each in said if each.code == "no_fit"]
    found += [f"the law {name}" for name in names if name not in fitted and not any(name in each for each in found)]
    for fit in analysis.fits:
        if fit.law in names and not fit.identified:
            failures = "; ".join(each.message for each in fit.verdicts if each.level == "failure")
            found.append(f"the law {fit.law}: {failures}")
    if not analysis.fits and not found:
        found.append("any law, as none has a fit: " + "; ".join(each.message for each in said))
    return found + [f"the target {_told(each.target)}" for each in analysis.decisions if not each.proposal]


def _told(target: Any) -> str:
    from scaling.report.words import target as written

    return written(target)


if __name__ == "__main__":
    sys.exit(main())
