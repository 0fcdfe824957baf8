"""Train a model, resume a run, or anneal a checkpoint: `torchrun launch/pretrain.py CONFIG [section.key=value ...]`."""

import argparse
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.resilience.exits import BAD_INPUT, DIVERGED, FINISHED, INTERRUPTED, REFUSED, UNSAVED

if TYPE_CHECKING:
    from launch.growth_config import RunConfiguration
    from runtime.observe.devices import Node
    from runtime.timetable import Timetable


def parser() -> argparse.ArgumentParser:
    from schedulers.tails import NAMES

    parser = argparse.ArgumentParser(
        prog="pretrain",
        usage="pretrain CONFIG [section.key=value ...] [--dry-run [--world-size N] [--device NAME]]\n"
        "       pretrain --branch CHECKPOINT --decay K [--tail SHAPE] [--final F] [--name NAME] [section.key=value]",
        description="Train a model. The same command on an existing run resumes it.",
        epilog="Exit codes: 0 finished, 2 bad input, 74 not saved, 75 interrupted and saved, 76 hung, 77 diverged, "
        "78 growth refused. "
        "Keys are described in docs/configuration.md.",
    )
    parser.add_argument(
        "config", nargs="?", help="a TOML preset, such as configs/quickstart.toml, or a run's config.toml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. optim.lr=1e-3 batch.sequences=64"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, memory, speed and schedule; build nothing, write nothing"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="number of processes a dry run supposes (default 1)"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="GPU of a dry run, such as h100: predict step time, look for a faster mesh (default: the one here)",
    )
    branch = parser.add_argument_group(
        "branches",
        "A branch is a new run that begins from a stable checkpoint with all its state and anneals the learning rate; "
        "its configuration is the parent's, as the checkpoint holds it (growths that lie ahead are not the branch's), "
        "and the parent stays as it is. The same command resumes it.",
    )
    branch.add_argument("--branch", metavar="CHECKPOINT", help="a checkpoint, a run (its newest), or a URL of either")
    branch.add_argument(
        "--decay",
        metavar="K",
        help="length of the tail: tokens such as 20M, or a share of all that the branch has seen at its end, such as "
        "10%%, which after 90M tokens is 10M",
    )
    branch.add_argument("--tail", metavar="SHAPE", help=f"{', '.join(NAMES)} (default 1-sqrt)")
    branch.add_argument(
        "--final", type=float, metavar="F", help="last learning rate as a share of the one at the branch (default 0)"
    )
    branch.add_argument("--name", help="of the branch (default: parent, branch point, decay and tail)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one launch; returns the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    with ending_on_signals():  # composing a configuration imports torch, which takes seconds
        return launch(arguments)


def launch(arguments: argparse.Namespace) -> int:
    """A dry run, or a launch of a run; returns the exit code."""
    from launch.config import compose

    try:
        if arguments.world_size is not None and not arguments.dry_run:
            raise ValueError("--world-size belongs to --dry-run; a real run takes its processes from torchrun")
        if arguments.device is not None and not arguments.dry_run:
            raise ValueError("--device belongs to --dry-run; a real run takes the devices that are here")
        if arguments.world_size is not None and arguments.world_size < 1:
            raise ValueError(f"--world-size {arguments.world_size} is not 1 or more")
        if arguments.branch is not None:
            config, plan = branch(arguments)
        elif arguments.config is None:
            raise ValueError("give a configuration, such as configs/quickstart.toml, or --branch CHECKPOINT")
        else:
            refuse_branching(arguments)
            config, plan = compose(arguments.config, arguments.overrides, arguments.world_size), None
            say_law(config)
        if arguments.dry_run:
            from launch.growth_report import dry_run

            print(dry_run(config, arguments.world_size or 1, plan, machine(arguments.device)))
            return 0
    except ValueError as error:
        return _refuse(str(error))
    return train(config, resume_command(arguments, config))


def machine(name: str | None) -> "Node | None":
    """The machine of the named device, by default of the one here; None where neither is known. ValueError for a name
    that is not."""
    import torch

    from runtime.observe.devices import NODES, node_of

    if name is None:
        return node_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    node = node_of(name)
    if node is None:
        raise ValueError(
            f"--device {name} is not known, and its speed is not guessed; accepted: {', '.join(sorted(NODES))}"
        )
    return node


def branch(arguments: argparse.Namespace) -> "tuple[RunConfiguration, Timetable]":
    """The configuration of the branch that is asked for, and its timetable. ValueError for bad input."""
    from launch.branching import Anneal, branched, open_parent, summary
    from runtime.timetable import build_timetable

    overrides = [each for each in (arguments.config, *arguments.overrides) if each is not None]
    if named := [each for each in overrides if "=" not in each]:
        raise ValueError(f"--branch takes its configuration from the checkpoint; leave out {named[0]}")
    if arguments.decay is None:
        raise ValueError("--branch needs the length of its tail: --decay 10%, or --decay 20M")
    chosen = Anneal(arguments.decay, arguments.tail or "1-sqrt", arguments.final or 0.0)
    parent = open_parent(arguments.branch)
    config = branched(parent, chosen, arguments.name, overrides)
    if os.environ.get("RANK", "0") == "0":
        print(summary(config, parent), flush=True)
    return config, build_timetable(config, parent.events)


def say_law(config: "RunConfiguration") -> None:
    """What "auto" came to, once for all processes."""
    if config.law_record is not None and os.environ.get("RANK", "0") == "0":
        from launch.auto import told

        print("\n".join(told(config.law_record)), flush=True)


def refuse_branching(arguments: argparse.Namespace) -> None:
    """ValueError for options of a branch where there is none."""
    given = [key for key in ("decay", "tail", "final", "name") if getattr(arguments, key) is not None]
    if given:
        raise ValueError(f"--{given[0]} belongs to --branch CHECKPOINT")


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end this process at once, with the code of an interruption, wherever training does not
    watch for them itself: while torch is imported, while processes wait for each other to join, in the closing lines.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signals = (signal.SIGTERM, signal.SIGINT)

    def listen() -> None:
        if receiver.recv(1):
            os._exit(INTERRUPTED)

    # A handler of Python's own would not run while the main thread waits in a rendezvous.
    threading.Thread(target=listen, name="early signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handlers = [signal.signal(each, lambda *_: None) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, handlers, strict=True):
            signal.signal(each, handler)
        signal.set_wakeup_fd(wakeup)
        sender.close()


def train(config: "RunConfiguration", command: list[str]) -> int:
    """Train on this process group until the end of the run, a signal or a fault; returns the exit code."""
    from launch.chain import run
    from launch.config import dump
    from runtime.startup import BadInput, LocalBadInput, process_group
    from runtime.trainer import Outcome

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        with process_group(config.run.timeout_seconds):
            outcome = run(config, dump(config))
    except LocalBadInput as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(BAD_INPUT)
    except BadInput as error:
        return _refuse(str(error))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the peers are in a collective, which an orderly exit would wait for
    if os.environ.get("RANK", "0") == "0":
        from launch.closing import close

        close(config, command, str(outcome))
    codes = {
        Outcome.INTERRUPTED: INTERRUPTED,
        Outcome.DIVERGED: DIVERGED,
        Outcome.UNSAVED: UNSAVED,
        Outcome.REFUSED: REFUSED,
    }
    return codes.get(outcome, FINISHED)


def resume_command(arguments: argparse.Namespace, config: "RunConfiguration") -> list[str]:
    """The command that goes on with this run; on several machines, the part of it that they share."""
    local, world = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", local] if local else ["python"]
    if local != world:
        launcher = ["torchrun", "...", "--nproc-per-node", local]
    if arguments.branch is not None:  # the parent may have newer checkpoints by then
        return [*launcher, "launch/pretrain.py", f"{config.run.dir}/{config.run.name}/config.toml"]
    return [*launcher, "launch/pretrain.py", arguments.config, *arguments.overrides]


def _refuse(message: str) -> int:
    """Say what is wrong with the input, once for all processes; returns its exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
