"""The batch that follows what is measured: when a controller is asked, what it decides, and the event that keeps it."""

import copy
import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from runtime.batch_config import BatchConfig
from runtime.evaluation import evaluate
from runtime.persistence import checkpoint_name
from runtime.state import TrainState
from runtime.timetable import build_timetable
from schedulers.control import Bounds, Target, critical_multiple, evidence, next_size, noise_multiple, norm_test_target

if TYPE_CHECKING:
    from runtime.trainer import Trainer


class Probe(Protocol):
    """Trains a branch and takes it back."""

    def __call__(self, sequences: int, tokens: int) -> tuple[float, int]:
        """Held-out loss after so many tokens with batches of so many sequences, and the FLOPs that it took."""
        ...


Decision = tuple[int, dict[str, Any]]
"""The batch from here on, and what it was decided on."""


def decide(config: BatchConfig, state: TrainState, sequences: int, seq_len: int, probe: Probe) -> Decision:
    """What the configured controller makes of a state with batches of so many sequences.

    `probe` may be a collective; the rest is arithmetic on what is equal on every rank.
    """
    control = config.control
    bounds = Bounds(config.sequences, control.largest, control.most, control.shrinks)
    if config.kind == "branch_probe":
        return _by_branches(config, sequences, seq_len, probe)
    target = _target(config)
    size = next_size(target, state.noise, sequences, bounds)
    return size, evidence(target, state.noise, sequences)


def _target(config: BatchConfig) -> Target:
    if config.kind == "noise_scale":
        return noise_multiple(config.noise_scale.multiple)
    return norm_test_target(config.norm_test.eta, debiased=config.norm_test.debiased)


def _by_branches(config: BatchConfig, sequences: int, seq_len: int, probe: Probe) -> Decision:
    """Branches up to the largest multiple that is allowed, over the same tokens, which are whole batches of each; where
    none is allowed, nothing is tried."""
    own, control = config.branch_probe, config.control
    multiples = [each for each in sorted(own.multiples) if each <= control.most and each * sequences <= control.largest]
    if not multiples:
        return sequences, {}
    common = math.lcm(*multiples) * sequences * seq_len
    length = -(-own.tokens // common) * common
    found = {each: probe(each * sequences, length) for each in [1, *multiples]}
    best = critical_multiple({each: loss for each, (loss, _) in found.items()}, own.tolerance)
    told = {
        "losses": {str(each): loss if math.isfinite(loss) else None for each, (loss, _) in found.items()},
        "probing_flops": sum(flops for _, flops in found.values()),
    }
    return best * sequences, told


def branch(trainer: "Trainer", sequences: int, tokens: int) -> tuple[float, int]:
    """A `Probe`: train on from here with another batch, evaluate the held-out sets, and come back; a collective.

    The trainer is as before, its weights and all from a checkpoint of this moment. The loss is NaN where that cannot be
    written, where the ranks agreed to stop on the way, and where the branch diverged.
    """
    saved = trainer.persistence.store.newest() if trainer.save(wait=True) else None
    if saved is None or not saved.startswith(checkpoint_name(trainer.state)):
        return math.nan, 0
    here, timetable, reporter = trainer.state, trainer.timetable, trainer.reporter
    tried = {"event": "batch_change", "tokens": here.clock.tokens, "sequences": sequences}
    reporter.console.say(f"trying batches of {sequences:,} sequences for {tokens:,} tokens")
    with reporter.throughput.paused():
        trainer.state, trainer.trying = copy.deepcopy(here), []
        trainer.timetable = build_timetable(trainer.config, [*here.events, tried])
        while trainer.state.clock.tokens < here.clock.tokens + tokens and trainer.step():
            pass
        loss, flops = _held_out(trainer), trainer.state.flops - here.flops
        if has_diverged([bool(skip) for skip in trainer.trying], trainer.config.guard.max_consecutive):
            loss = math.nan
        trainer.state, trainer.timetable, trainer.trying = here, timetable, None
        with trainer.watchdog.suspended():
            trainer.persistence.load(saved)
        reporter.restore(here.clock.tokens)
    return loss, flops


def has_diverged(skipped: Sequence[bool], most: int) -> bool:
    """Whether so many of a branch's steps in a row, or all of them, never reached the weights: its loss then tells of
    weights that did not go along."""
    longest = max((len(list(run)) for skip, run in groupby(skipped) if skip), default=0)
    return longest >= min(most, len(skipped))


def _held_out(trainer: "Trainer") -> float:
    """Mean loss of the sets, nats per token."""
    losses = []
    for held_out in trainer.held_out.values():
        micro = trainer.config.evaluation.micro_sequences or trainer.micro_sequences
        with trainer.optimizer.evaluated():
            row = evaluate(trainer.decoder, held_out, trainer.mesh, micro, trainer.proceed)
        losses.append(row["loss"] if row else math.nan)
    return sum(losses) / len(losses)
