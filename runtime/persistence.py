"""Saving and loading a run: tensors by name, and the state that says what they are."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from runtime.checkpoint.store import CheckpointStore
from runtime.config import Config
from runtime.data.tokenizer import text_fingerprint
from runtime.model.parametrization import role
from runtime.optim.ema import EMA
from runtime.optim.optimizer import Optimizer
from runtime.optim.schedule_free import average_beta, to_average
from runtime.parallel.shards import local
from runtime.resilience.guard import StepGuard
from runtime.state import FORMAT, TrainState, gather_generators, model_tensors, restore_generators


class Persistence:
    """One run's store, with everything that goes into a checkpoint of it.

    `tokenizer` is the text of the run's tokenizer.json, carried along so that a checkpoint stands on its own.
    """

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        decoder: nn.Module,
        optimizer: Optimizer,
        ema: EMA | None,
        guard: StepGuard,
        tokenizer: str | None,
    ):
        self.store = store
        self._config = config
        self._decoder, self._optimizer, self._ema, self._guard = decoder, optimizer, ema, guard
        self._tokenizer = tokenizer

    def save(self, state: TrainState, *, elapsed: float, wait: bool, retain: bool) -> None:
        """Begin a checkpoint of this moment; training may go on at once unless `wait`. A collective.

        `elapsed` is this launch's seconds, to be added to the state's. `retain`: also remove checkpoints grown old.
        """
        name = checkpoint_name(state)
        tokenizer = self._tokenizer
        description = {
            "format": FORMAT,
            "model": self._config.model.model_dump(mode="json"),
            "roles": {key: str(role(key)) for key, _ in self._decoder.named_parameters()},
            "tokenizer": {"fingerprint": tokenizer and text_fingerprint(tokenizer), "json": tokenizer},
            "config": self._config.model_dump(mode="json", by_alias=True, exclude_none=True),
            "generators": gather_generators(),
            "train": replace(state, wall_time=state.wall_time + elapsed).to_json(),
        }
        asynchronous = self._config.checkpoint.asynchronous and not wait
        self.store.save(name, self.tensors(), description, asynchronous=asynchronous)
        if retain:
            section = self._config.checkpoint
            self.store.retain(section.keep_last, section.keep_every, section.at)

    def load(self, name: str) -> TrainState:
        """Restore everything from one of this run's own checkpoints; a collective."""
        description = self.store.read_state(name)
        self.store.load(name, self.tensors())
        restore_generators(description["generators"])
        return TrainState.from_json(description["train"])

    def branch(self, store: CheckpointStore, name: str, description: dict[str, Any]) -> None:
        """Take weights, moments and generators from another run's checkpoint, and its average of the weights if both
        runs keep one; the guard's window begins empty. A collective."""
        averaged = description["config"].get("optim", {}).get("ema_half_life") is not None
        tensors = self.tensors()
        wanted = ("model.", "optimizer.", "ema.") if averaged else ("model.", "optimizer.")
        store.load(name, {key: each for key, each in tensors.items() if key.startswith(wanted)}, partial_load=True)
        restore_generators(description["generators"])
        if self._ema is not None and not averaged:
            self._ema.restart(self._decoder)

    def take_weights(self, store: CheckpointStore, name: str, description: dict[str, Any]) -> None:
        """Take the weights alone, for a run that is otherwise new; a collective. Of a schedule-free run they are its
        averages."""
        store.load(name, model_tensors(self._decoder), partial_load=True)
        beta = average_beta(description["config"].get("optim", {}))
        if beta is not None:
            stored = store.open(name).tensors
            pairs = ((f"optimizer.{key}.z", each.detach()) for key, each in self._decoder.named_parameters())
            averaged = {key: each for key, each in pairs if key in stored}
            moved = {key: torch.empty_like(each) for key, each in averaged.items()}
            store.load(name, moved, partial_load=True)
            for key, each in averaged.items():
                to_average(local(each), local(moved[key]), beta)
        self._optimizer.restart()
        if self._ema is not None:
            self._ema.restart(self._decoder)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds by its name there, the tensors themselves."""
        tensors = model_tensors(self._decoder)
        tensors |= {f"optimizer.{name}": each for name, each in self._optimizer.tensors().items()}
        tensors |= {f"guard.{name}": each for name, each in self._guard.tensors().items()}
        if self._ema is not None:
            tensors |= {f"ema.{name}": each for name, each in self._ema.tensors().items()}
        return tensors


def checkpoint_location(config: Config) -> str:
    """Where a run keeps its checkpoints: in its own folder, or in one of its name under `checkpoint.dir`."""
    if config.checkpoint.dir is not None:
        return f"{config.checkpoint.dir.rstrip('/')}/{config.run.name}"
    return f"{config.run.dir}/{config.run.name}/checkpoints"


def checkpoint_name(state: TrainState) -> str:
    return f"tokens-{state.clock.tokens}-segment-{state.segment}"
