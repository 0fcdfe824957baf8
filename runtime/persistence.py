"""Saving and loading a run: tensors by name, and the state that says what they are."""

import hashlib
from dataclasses import replace

from torch import Tensor, nn

from runtime.checkpoint.store import CheckpointStore
from runtime.config import Config
from runtime.model.parametrization import role
from runtime.optim.adamw import AdamW
from runtime.optim.ema import EMA
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
        optimizer: AdamW,
        ema: EMA | None,
        guard: StepGuard,
        tokenizer: str | None,
    ):
        self.store = store
        self._config = config
        self._decoder, self._optimizer, self._ema, self._guard = decoder, optimizer, ema, guard
        self._tokenizer = tokenizer

    def save(self, state: TrainState, *, elapsed: float, wait: bool = False) -> None:
        """Begin a checkpoint of this moment; training may go on at once unless `wait`. A collective.

        `elapsed` is this launch's seconds, to be added to the state's.
        """
        name = checkpoint_name(state)
        description = {
            "format": FORMAT,
            "model": self._config.model.model_dump(mode="json"),
            "roles": {key: str(role(key)) for key, _ in self._decoder.named_parameters()},
            "tokenizer": {"fingerprint": text_fingerprint(self._tokenizer), "json": self._tokenizer},
            "config": self._config.model_dump(mode="json", by_alias=True, exclude_none=True),
            "generators": gather_generators(),
            "train": replace(state, wall_time=state.wall_time + elapsed).to_json(),
        }
        asynchronous = self._config.checkpoint.asynchronous and not wait
        self.store.save(name, self._tensors(), description, asynchronous=asynchronous)
        self.store.retain(self._config.checkpoint.keep_last, self._config.checkpoint.keep_every)

    def load(self, name: str) -> TrainState:
        """Restore everything from one of this run's own checkpoints; a collective."""
        description = self.store.read_state(name)
        state = TrainState.from_json(description["train"])
        self.store.load(name, self._tensors())
        restore_generators(description["generators"])
        return state

    def load_from(self, other: CheckpointStore, name: str, carry: str) -> None:
        """Take the tensors of another run's checkpoint: all of them, or the weights alone; a collective."""
        tensors = self._tensors() if carry == "all" else model_tensors(self._decoder)
        other.load(name, tensors)
        if carry == "weights" and self._ema is not None:
            self._ema.restart(self._decoder)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = model_tensors(self._decoder)
        tensors |= {f"optimizer.{name}": each for name, each in self._optimizer.tensors().items()}
        tensors |= {f"guard.{name}": each for name, each in self._guard.tensors().items()}
        if self._ema is not None:
            tensors |= {f"ema.{name}": each for name, each in self._ema.tensors().items()}
        return tensors


def checkpoint_name(state: TrainState) -> str:
    return f"tokens-{state.clock.tokens}-segment-{state.segment}"


def text_fingerprint(text: str | None) -> str | None:
    """Hash of a tokenizer's text, None for none."""
    return None if text is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
