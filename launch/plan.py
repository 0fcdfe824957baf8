"""The next run by laws: `plan.py --laws DIR/laws.json --compute 1e21 [--config PRESET --out DIR]`."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.resilience.exits import BAD_INPUT, FINISHED, UNIDENTIFIED

if TYPE_CHECKING:
    from launch.planning import Machine, Target


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan",
        usage="plan --laws LAWS (--compute C | --params N --tokens D | ...) [--config PRESET] [section.key=value ...]",
        description="Say what laws propose for a run to come: parameters and tokens for a compute, learning rate and "
        "batch, each with its interval and its plateau; with a preset also the nearest shape of its family that the "
        "machine can hold, as a configuration that is ready to run.",
        epilog="Exit codes: 0 done, 2 bad input, 3 the laws do not tell it. See docs/scaling.md.",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the preset")
    parser.add_argument(
        "--laws", required=True, metavar="LAWS", help="laws.json, its folder, or a published law such as step-law"
    )
    target = parser.add_argument_group("target", "--compute alone, or two of the three")
    target.add_argument("--compute", metavar="FLOPS", help="of the whole run, such as 1e21")
    target.add_argument("--params", metavar="N", help="parameters as the laws count them, such as 7B")
    target.add_argument("--tokens", metavar="D", help="such as 1.4T")
    target.add_argument("--far", action="store_true", help="also more than 10 times beyond the compute of a law's data")
    more = parser.add_argument_group("the next runs of a grid")
    more.add_argument(
        "--next",
        type=int,
        metavar="K",
        help="instead, up to K runs that reduce the expected regret at the target most",
    )
    more.add_argument("--budget", metavar="FLOPS", help="that they may cost together")
    run = parser.add_argument_group("the run")
    run.add_argument("--config", metavar="PRESET", help="a TOML preset, whose family the shape is of")
    run.add_argument("--out", metavar="DIR", help="write the configuration there; needs --config")
    run.add_argument("--world-size", type=int, default=1, metavar="N", help="processes that share it (default 1)")
    run.add_argument("--device-memory", type=float, metavar="GIB", help="that a device has; needs --config")
    run.add_argument("--throughput", type=float, metavar="X", help="tokens a second of all devices, to tell the days")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the plan, and write it if asked to; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    from launch.planning import Unidentified

    try:
        text, paths = planned(arguments)
    except Unidentified as error:
        hint = ". --params N --tokens D --next K --budget FLOPS plans runs that tell more"
        hint = "" if arguments.next is not None else hint
        print(f"error: {error}{hint}", file=sys.stderr)
        return UNIDENTIFIED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(text)
    if paths:
        print()
    for path in paths:
        print(f"python launch/pretrain.py {path}")
    return FINISHED


def planned(arguments: argparse.Namespace) -> tuple[str, list[Path]]:
    """The plan, or the next runs, as text, and the files that were written. ValueError for bad input, `Unidentified`
    where the laws do not tell it."""
    from launch.auto import open_laws
    from launch.next_runs import design
    from launch.plan_report import next_table, table, write, write_next
    from launch.planning import make_plan, open_preset

    target, machine = checked(arguments)
    laws = open_laws(arguments.laws)
    preset = open_preset(arguments.config, arguments.overrides) if arguments.config else None
    folder = None if arguments.out is None else Path(arguments.out)
    if arguments.next is not None:
        budget = amount("budget", arguments.budget)
        runs = design(laws, target, preset, machine, arguments.next, budget, arguments.far)
        return next_table(runs, laws, budget), write_next(runs, laws, folder) if folder else []
    plan = make_plan(laws, target, preset, machine, arguments.far)
    return table(plan, laws, arguments.throughput), [write(plan, laws, folder)] if folder else []


def checked(arguments: argparse.Namespace) -> "tuple[Target, Machine]":
    """The target and the machine. ValueError for what does not go together."""
    from launch.planning import Machine, Target

    if arguments.config is None:
        for name in ("out", "device_memory"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --config PRESET, whose family the run is to be of")
        if arguments.overrides:
            raise ValueError(f"override {arguments.overrides[0]!r} is of a preset; give --config PRESET")
    for name in ("world_size", "device_memory", "throughput"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is not positive")
    if (arguments.next is None) != (arguments.budget is None):
        raise ValueError("--next K and --budget FLOPS belong together")
    if arguments.next is not None and arguments.throughput is not None:
        raise ValueError("--throughput is of one shape, and --next plans runs of several; leave it out")
    target = Target(*(amount(name, getattr(arguments, name)) for name in ("compute", "params", "tokens")))
    return target, Machine(arguments.world_size, arguments.device_memory)


def amount(name: str, text: str | None) -> float | None:
    """A number such as 7B or 1e21. ValueError naming the option."""
    from runtime.units import parse_tokens

    if text is None:
        return None
    try:
        return float(parse_tokens(text))
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--{name} {text!r} is not a number; accepted are such as 1e21, 7B or 1.4T") from None


if __name__ == "__main__":
    sys.exit(main())
