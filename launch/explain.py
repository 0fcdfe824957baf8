"""Say what a configuration comes to: `explain.py CONFIG`, its schedule, or with --parametrization its multipliers."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from launch.growth_config import RunConfiguration
    from runtime.config import Config
    from runtime.model.config import ModelConfig


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="explain",
        description="Say what a configuration comes to: the course of its learning rate over the run, with growths, "
        "and what is unusual about it; or what each role of parameters is given. Nothing is trained, and nothing but "
        "the plot is written.",
        epilog="Exit codes: 0 done, 2 bad input. See docs/schedules.md and docs/parametrization.md.",
    )
    parser.add_argument("config", help="a TOML preset, such as configs/quickstart.toml, or a run's config.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.parametrization.kind=mup")
    parser.add_argument(
        "--parametrization",
        action="store_true",
        help="for each role of parameters: how many there are, their first values, and what multiplies the learning "
        "rate, the weight decay, epsilon and the forward",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw the course of the learning rate as a PNG")
    parser.add_argument("--tokens-per-second", type=float, metavar="X", help="also say after what time things happen")
    parser.add_argument("--processes", type=int, metavar="N", help="refuse what so many processes cannot share")
    parser.add_argument("--tokens", metavar="N", help="where to end a run that has no end, such as 10B")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print what is asked for; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    from launch.config import compose
    from launch.pretrain import say_law

    try:
        config = compose(arguments.config, arguments.overrides, arguments.processes)
        say_law(config)
        print(parametrization(config) if arguments.parametrization else schedule(config, arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def schedule(config: "RunConfiguration", arguments: argparse.Namespace) -> str:
    """The course of the run as text; drawn, if asked for. ValueError for bad input."""
    from launch.schedule_report import explain_schedule, plot
    from runtime.units import parse_tokens

    for option in ("tokens_per_second", "processes"):
        value = getattr(arguments, option)
        if value is not None and value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} {value:g} is not positive")
    try:
        end = config.end if arguments.tokens is None else parse_tokens(arguments.tokens)
    except ValueError as error:
        raise ValueError(f"--tokens: {error}") from None
    if not end:
        raise ValueError("this run goes on until it is stopped; say up to where it is to be explained: --tokens N")
    text = explain_schedule(config, end, arguments.tokens_per_second, arguments.processes)
    if arguments.plot is not None:
        try:
            plot(config, end, Path(arguments.plot))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot write {arguments.plot}: {error}") from None
        text += f"\n{arguments.plot}"
    return text


def parametrization(config: "Config") -> str:
    """The roles of a model's parameters with their multipliers, as a table, under what they multiply."""
    from runtime.model.parametrization import forward_scales

    model, optim = config.model, config.optim
    scales = forward_scales(model)
    lines = [
        f"{model.parametrization.kind} parametrisation; multipliers of optim.lr = {optim.lr:g}, "
        f"optim.weight_decay = {optim.weight_decay:g} and optim.eps = {optim.eps:g}",
        f"queries times keys are multiplied by {scales.attention:.6g}, "
        f"which is {scales.attention * model.head_dim**0.5:.6g} / sqrt(head_dim)",
        *_orthogonal(config),
        "",
    ]
    return "\n".join([*lines, *_aligned(role_rows(model))])


def _orthogonal(config: "Config") -> list[str]:
    """What else multiplies the updates of Muon's matrices."""
    from runtime.model.parametrization import width_ratio
    from runtime.optim.muon import ROLES

    if config.optim.name != "muon":
        return []
    ratios = (width_ratio(each, config.model) for each in ROLES)
    scales = ", ".join(f"{each} {0.2 * ratio**0.5:.4g}" for each, ratio in zip(ROLES, ratios, strict=True))
    return [f"Muon's orthogonal updates are multiplied by sqrt(max(out, in)) and, by role: {scales}"]


def role_rows(model: "ModelConfig") -> list[tuple[str, ...]]:
    """A header, and a row for each role: its modules, tensors, numbers, first values and multipliers."""
    import torch

    from runtime.model.decoder import Decoder
    from runtime.model.parametrization import CONSTANTS, Role, initial_std, is_trained, role, scales

    with torch.device("meta"):
        named = list(Decoder(model).named_parameters())
    rows = [("role", "modules", "tensors", "parameters", "first values", "lr", "weight decay", "eps", "forward")]
    for which in Role:
        mine = [(name, parameter) for name, parameter in named if role(name) is which]
        if not mine:
            continue
        std = initial_std(which, model)
        first = f"std {std:.4g}" if std is not None else f"{CONSTANTS[which]:g}" if which in CONSTANTS else "orthogonal"
        by = [f"{each:.4g}" for each in scales(which, model)] if is_trained(which, model) else ["-"] * 3
        modules = dict.fromkeys(_module(name) for name, _ in mine)
        count = sum(parameter.numel() for _, parameter in mine)
        rows.append((which, " ".join(modules), f"{len(mine)}", f"{count:,}", first, *by, _forward(which, model)))
    return rows


def _module(name: str) -> str:
    """What a parameter is called in a table: its module, or a part of it that has a role of its own."""
    *_, module, last = name.split(".")
    if module == "templates":
        return name.split(".")[-3]
    return module if last in ("weight", "bias", "coefficients") else f"{last}"


def _forward(which: str, model: "ModelConfig") -> str:
    from runtime.model.parametrization import Role, forward_scales

    scales = forward_scales(model)
    multiplied = {
        Role.EMBEDDING: scales.embedding,
        Role.FINAL_NORM: scales.output,
        Role.ATTENTION_OUT: scales.residual,
        Role.FEED_FORWARD_OUT: scales.residual,
    }
    return f"{multiplied.get(which, 1.0):.4g}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths, strict=False)]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main())
