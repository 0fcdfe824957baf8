"""One launch of a run: what stays open from its first segment to its last."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.checkpoint.store import CheckpointStore
from runtime.config import Config
from runtime.host_memory import keep_freed_memory
from runtime.inputs import Inputs, open_inputs
from runtime.lock import RunLock
from runtime.observe.metrics import finish_wandb
from runtime.observe.run_directory import RunDirectory
from runtime.origin import Origin, find_origin, is_resume
from runtime.parallel.mesh import Layout, Mesh, build, plan_layout
from runtime.persistence import checkpoint_location
from runtime.resilience.signals import Interruption
from runtime.resilience.watchdog import Watchdog
from runtime.startup import BadInput, agree


@dataclass
class Session:
    """What the segments of one launch share. `started` is the monotonic time at which the launch began."""

    configs: Sequence[Config]
    """Of all the run's segments; the sections that belong to the run are the same in each."""
    inputs: Sequence[Inputs]
    text: str
    """The configuration as the run directory keeps it."""
    started: float
    interruption: Interruption
    watchdog: Watchdog
    directory: RunDirectory
    lock: RunLock
    store: CheckpointStore
    origin: Origin | None
    """The checkpoint this launch begins from."""
    noticed: list[dict[str, Any]]
    """What the store has found before there was anyone to report it."""
    law: dict[str, Any] | None = None
    """The law behind numbers of the configuration, if it was asked in this launch."""
    _meshes: dict[Layout, Mesh] = field(default_factory=dict)

    def mesh(self, segment: int) -> Mesh:
        """The mesh of a segment, the same one for equal layouts; a collective."""
        layout = self.inputs[segment].layout
        if layout not in self._meshes:
            self._meshes[layout] = build(layout, "cuda" if torch.cuda.is_available() else "cpu")
        return self._meshes[layout]

    @property
    def segment(self) -> int:
        """The segment this launch begins in. BadInput where the configuration has no such segment."""
        if not is_resume(self.origin):
            return 0
        segment = self.origin.description["train"]["segment"]
        if segment >= len(self.configs):
            raise BadInput(
                f"checkpoint {self.origin.name} has grown {segment} times, but the configuration has "
                f"{len(self.configs) - 1} [[growth]] entries; put them back"
            )
        return segment


@contextmanager
def open_session(configs: Sequence[Config], text: str, law: dict[str, Any] | None = None) -> Iterator[Session]:
    """Open what a launch needs before it builds a model; a collective.

    BadInput, on every rank and before anything is written, for what the user can put right, in any of the segments.
    """
    started = time.monotonic()
    config = configs[0]
    if not torch.cuda.is_available():
        keep_freed_memory()
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        watchdog = stack.enter_context(Watchdog(config.run.timeout_seconds))
        inputs = agree(lambda: open_all_inputs(configs, dist.get_world_size()))
        if config.run.deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(config.run.deterministic)  # brings torch's compiler
        directory = RunDirectory(Path(config.run.dir) / config.run.name)
        lock = stack.enter_context(closing(RunLock(directory.path)))
        agree(lambda: lock.acquire(create=False))
        watchdog.beat(0, "looking for checkpoints")
        with bad_input(), watchdog.suspended():
            location = checkpoint_location(config)
            noticed: list[dict[str, Any]] = []
            store = CheckpointStore(location, on_event=noticed.append)
            stack.callback(store.close)
            origin = find_origin(config, directory, location, store, stack)
        stack.callback(finish_wandb)
        yield Session(
            configs, inputs, text, started, interruption, watchdog, directory, lock, store, origin, noticed, law
        )


def open_all_inputs(configs: Sequence[Config], world_size: int) -> list[Inputs]:
    """Each segment's inputs; files that segments share are opened once. ValueError as of `open_inputs`."""
    found: list[Inputs] = []
    for number, config in enumerate(configs):
        before = configs[number - 1] if number else None
        try:
            found.append(_inputs_after(before, found[-1] if found else None, config, world_size))
        except ValueError as error:
            raise ValueError(f"growth.{number - 1}: {error}" if number else str(error)) from None
    return found


def _inputs_after(before: Config | None, inputs: Inputs | None, config: Config, world_size: int) -> Inputs:
    """A segment's inputs, given those of the one before."""
    if before is None or (before.data, before.model.vocab_size) != (config.data, config.model.vocab_size):
        return open_inputs(config, world_size)
    layout = plan_layout(config.parallel, world_size, config.model, config.data.seq_len, *config.batches.sizes)
    return replace(inputs, layout=layout)


@contextmanager
def bad_input() -> Iterator[None]:
    """What a collective on checkpoints refuses, it refuses on every rank."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error
