"""The loop: one segment of a run, from where its state stands to its end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from torch import Tensor

from runtime.batch_control import branch, decide
from runtime.checkpoint.retention import parse
from runtime.clock import is_due
from runtime.config import Config
from runtime.data.evaluation_set import EvaluationSet
from runtime.data.loader import Batch, Loader
from runtime.evaluation import evaluate
from runtime.model.counts import flops_per_token
from runtime.model.tying import sample_loops
from runtime.observe.health import UpdateRatio, distance_from_start, measure
from runtime.optim.regions import Regions
from runtime.parallel.pieces import Pieces
from runtime.parts import Parts
from runtime.persistence import checkpoint_name
from runtime.reporting import Reporter, Spike
from runtime.resilience.signals import Interruption
from runtime.resilience.watchdog import Watchdog
from runtime.startup import LocalBadInput
from runtime.state import TrainState
from runtime.step import train_step
from runtime.timetable import Timetable, build_timetable

MOST_ROLLBACKS = 3
"""Rollbacks to one checkpoint; a run that needs more does not suffer from its samples."""


class Outcome(StrEnum):
    """Why a segment ended. Each but `UNSAVED` leaves a checkpoint of that moment."""

    FINISHED = "finished"
    GROWS = "grows"
    INTERRUPTED = "interrupted"
    OUT_OF_TIME = "out_of_time"
    DIVERGED = "diverged"
    UNSAVED = "unsaved"
    REFUSED = "refused"


@dataclass
class Trainer:
    """Everything one segment needs, already built, loaded and in its place."""

    config: Config
    parts: Parts
    timetable: Timetable
    regions: Regions
    loader: Loader
    held_out: dict[str, EvaluationSet]
    reporter: Reporter
    interruption: Interruption
    watchdog: Watchdog
    state: TrainState
    resumed: bool
    """Whether the state comes from this run's own checkpoint."""
    grows_at: int | None = None
    """Tokens at which the segment ends, because the model is to grow; None for the last segment."""

    def __post_init__(self) -> None:
        parts = self.parts
        self.mesh, self.decoder, self.optimizer, self.ema = parts.mesh, parts.decoder, parts.optimizer, parts.ema
        self.guard, self.persistence = parts.guard, parts.persistence
        self.parameters = list(self.decoder.parameters())
        batch = self.config.batch
        # A batch that grows takes more micro-batches, not larger ones.
        self.micro_sequences = batch.micro_sequences or batch.sequences // self.mesh.layout.data
        self.pieces = Pieces(self.decoder, self.mesh) if self.config.noise_scale.enabled else None
        self._first_step = self.state.clock.step
        self._halted: Outcome | None = None
        self.trying: list[Tensor] | None = None  # whether each step of a branch that is being tried was skipped
        self._saved = checkpoint_name(self.state) if self.resumed else None
        self.persistence.store.on_event = lambda event: self.reporter.checkpoint(self.state, event)

    def run(self) -> Outcome:
        """Train to the end of the segment, a signal, the end of the time budget, or divergence."""
        outcome = None
        if self.state.lineage and not self.resumed:
            self.save()  # from here on the run no longer needs the checkpoint it began from
        if (self.state.clock.step or self.state.segment) and not self.evaluate_if_due():
            outcome = self.halted()
        while outcome is None and not self.at_end() and not self.is_grown_up():
            self.control_batch()
            if not self.step():
                outcome = self.halted()
                break
            outcome = self.report_if_due() or self.halted()
            if outcome is None and (self.at_end() or self.checkpoint_is_due()):
                self.save()
            if outcome is None and not self.evaluate_if_due():
                outcome = self.halted()
        if outcome is None and self.is_grown_up() and not self.at_end():
            return self.end_segment()
        return self.end_with(outcome or Outcome.FINISHED)

    def end_segment(self) -> Outcome:
        """Leave a checkpoint of the moment before a growth, which may still be being written."""
        self.reporter.read(self.state)
        self.save()
        self.reporter.event("segment_end", self.state)
        return Outcome.GROWS

    def end_with(self, outcome: Outcome) -> Outcome:
        """Leave a checkpoint of this moment, and say how the launch ended."""
        self.reporter.read(self.state)
        # Retention reads a checkpoint back, which a launch that was told to stop has no time for.
        retain = outcome is Outcome.FINISHED
        if not (self.save(wait=True, retain=retain) or self.save(wait=True, retain=retain)):
            self.reporter.console.say(f"the last checkpoint, {checkpoint_name(self.state)}, could not be written")
            outcome = Outcome.UNSAVED
        if outcome is Outcome.INTERRUPTED:
            self.reporter.event("signal", self.state)
        self.reporter.event("run_end", self.state, outcome=str(outcome))
        return outcome

    def step(self) -> bool:
        """One batch of the global order, at the learning rate of its place on the clock; False, and nothing has
        happened, if the ranks agreed to stop in the midst of it. Nothing is reported of what is only tried."""
        config, state = self.config, self.state
        settings, seq_len = self.timetable.at(state.clock.tokens), config.data.seq_len
        sequences = settings.sequences
        self.report_batch(sequences)
        self.watchdog.beat(state.clock.step + 1, "data")
        if self.trying is None:
            self.reporter.profiler.before(state.clock.step + 1)
        first_sample = state.next_position(sequences)
        micro_batches = self.fetch(first_sample)
        self.watchdog.beat(state.clock.step + 1, "forward and backward")
        loops = self.sampled_loops()
        self.optimizer.set_learning_rate(settings.lr)
        self.optimizer.couple(settings.beta2, settings.weight_decay)
        health = self.begin_health(micro_batches[0]) if self.health_is_due() and self.trying is None else None

        result = train_step(
            self.decoder,
            self.parameters,
            micro_batches,
            judge=self.guard.judge,
            update=lambda skip: self.regions.step(self.optimizer, state.clock.tokens, sequences * seq_len, skip),
            grad_clip=config.optim.grad_clip,
            data_group=self.mesh.data_group,
            proceed=lambda: self.halted() is None,
            loops=loops,
            pieces=self.pieces,
        )
        if result is None:
            return False
        if self.ema is not None:
            self.ema.update(sequences * seq_len, result.skip)
        flops = flops_per_token(config.model, seq_len, loops) * sequences * seq_len
        state.advance(first_sample, sequences, seq_len, flops)
        if self.trying is not None:
            self.trying.append(result.skip)
            return True
        self.reporter.step(state, first_sample, settings, flops, result, loops)
        self.reporter.end_profile(state.clock.step)
        if health is not None:
            self.end_health(*health)
        return True

    def report_batch(self, sequences: int) -> None:
        """An event where the coming batch has another size than the one before it, as was planned."""
        state, before = self.state, self.state.batch_tokens // self.config.data.seq_len
        planned = not self.config.batch.is_measured and state.clock.tokens > state.segment_start
        if planned and before != sequences:
            self.reporter.event("batch_change", state, sequences=sequences, before=before)

    def control_is_due(self) -> bool:
        """Whether the batch's controller is to be asked at this boundary, which is the same one after a resume."""
        control, state = self.config.batch.control, self.state
        return control is not None and state.clock.tokens > state.segment_start and self.is_due(control.every)

    def control_batch(self) -> None:
        """Ask the batch's controller where it is due, and keep what it changes as an event; a collective."""
        state, before = self.state, self.sequences
        decided = {each["tokens"] for each in state.events if each["event"] in ("batch_change", "batch_kept")}
        if not self.control_is_due() or state.clock.tokens in decided:
            return
        seq_len = self.config.data.seq_len
        sequences, told = decide(self.config.batch, state, before, seq_len, partial(branch, self))
        if not told:  # nothing is measured yet, or larger
            return
        state.flops += told.get("probing_flops", 0)
        self._saved = None  # a checkpoint of this moment does not know of it
        name = "batch_change" if sequences != before else "batch_kept"
        event = self.reporter.event(name, state, sequences=sequences, before=before, **told)
        if sequences != before or "probing_flops" in told:
            state.events.append(event)
        if sequences != before:
            self.timetable = build_timetable(self.config, state.events)
            self.reporter.console.say(f"batches of {sequences:,} sequences from here on, {before:,} before")

    def sampled_loops(self) -> int | None:
        """Loops of the coming step of a looped decoder that draws them, equal on every rank; else None."""
        tying = self.config.model.tying
        if tying.sampling == "fixed":
            return None
        return sample_loops(tying, self.config.run.seed, self.state.clock.tokens)

    @property
    def sequences(self) -> int:
        """Of the coming batch."""
        return self.timetable.batches(self.state.clock.tokens)

    def fetch(self, first_sample: int, micro_sequences: int | None = None) -> Sequence[Batch]:
        try:
            return self.loader.batch(first_sample, self.sequences, micro_sequences or self.micro_sequences)
        except ValueError as error:
            raise LocalBadInput(f"rank {self.mesh.data_rank} of the data: {error}") from error

    def at_end(self) -> bool:
        return self.config.end is not None and self.state.clock.tokens >= self.config.end

    def is_grown_up(self) -> bool:
        """Whether the segment has reached its growth."""
        return self.grows_at is not None and self.state.clock.tokens >= self.grows_at

    def is_due(self, every: int | None) -> bool:
        after = self.state.clock.tokens
        return is_due(every, after - self.state.batch_tokens, after)

    def checkpoint_is_due(self) -> bool:
        """By the cadence, or by one of the points that are named."""
        after, checkpoint = self.state.clock.tokens, self.config.checkpoint
        before = after - self.state.batch_tokens
        return self.is_due(checkpoint.every) or any(before < each <= after for each in checkpoint.at)

    def report_if_due(self) -> Outcome | None:
        """Read the device at the logging cadence, and act on too many skipped steps in a row."""
        step = self.state.clock.step
        log = step % self.config.observe.log_every == 0 or step == 1 or self.at_end() or self.is_grown_up()
        # A checkpoint holds the count of skipped steps, and a controller asks for the noise: they are read before.
        if not (log or self.checkpoint_is_due() or self.control_is_due()):
            return None
        self.persistence.store.poll()
        spike = self.reporter.read(self.state, log=log)
        if spike is None:
            return None
        if self.config.guard.on_spike == "rollback" and self.roll_back(spike):
            return None
        self.reporter.console.say(
            f"stopping: {spike.steps} steps in a row were skipped, up to step {self.state.clock.step} "
            f"(samples {spike.first_sample} to {spike.end_sample - 1}); the weights are those from before them"
        )
        return Outcome.DIVERGED

    def roll_back(self, spike: Spike) -> bool:
        """Return to the last durable checkpoint and step over the samples of the spike; False if that cannot help."""
        with self.reporter.throughput.paused(), self.watchdog.suspended():
            return self.return_to_checkpoint(spike)

    def return_to_checkpoint(self, spike: Spike) -> bool:
        name = self.persistence.store.newest()
        before = [each for each in self.state.events if each["event"] == "rollback" and each["to"] == name]
        if name is None or len(before) >= MOST_ROLLBACKS or parse(name).segment != self.state.segment:
            return False
        left = self.state
        self.state = replace(
            self.persistence.load(name),
            avoided=[*left.avoided, [spike.first_sample, spike.end_sample]],
            skipped=left.skipped,
            wall_time=left.wall_time,
            mixture=left.mixture,
            events=left.events,
        )
        # What a controller decided in the time that is given up is asked for again.
        now = self.state.clock.tokens
        events = [each for each in left.events if not each["event"].startswith("batch_") or each["tokens"] <= now]
        self.state.events, self.timetable = events, build_timetable(self.config, events)
        samples = [spike.first_sample, spike.end_sample]
        event = self.reporter.event("rollback", self.state, to=name, left_at=left.clock.tokens, samples=samples)
        self.state.events.append(event)
        self.reporter.restore(self.state.clock.tokens)
        self._first_step = self.state.clock.step
        self._saved = checkpoint_name(self.state)
        return True

    def halted(self) -> Outcome | None:
        """What all ranks have agreed to stop for, if anything; once and for all."""
        if self._halted is None:
            agreed = self.interruption.poll(out_of_time=self.out_of_time())
            if agreed.interrupted:
                self._halted = Outcome.INTERRUPTED
            elif agreed.out_of_time:
                self._halted = Outcome.OUT_OF_TIME
        return self._halted

    def out_of_time(self) -> bool:
        """Whether the budget is spent; never before a first step, or launches after launches would go nowhere."""
        budget, moved = self.config.run.max_minutes, self.state.clock.step > self._first_step
        return budget is not None and moved and self.trying is None and self.reporter.elapsed() >= budget * 60

    def save(self, *, wait: bool = False, retain: bool = True) -> bool:
        """A checkpoint of this boundary, unless there is one; with `wait`, whether it is there for good."""
        name = checkpoint_name(self.state)
        self.watchdog.beat(self.state.clock.step, "checkpoint")
        with self.reporter.throughput.paused(), self.watchdog.suspended():
            if name != self._saved:
                self.persistence.save(self.state, elapsed=self.reporter.elapsed(), wait=wait, retain=retain)
                self._saved = name
            if wait and not self.persistence.store.wait():
                self._saved = None
        return self._saved is not None

    def evaluate_if_due(self) -> bool:
        """Evaluate the held-out sets where the cadence or the end asks for it; False if interrupted."""
        begins = self.state.segment > 0 and self.state.clock.tokens == self.state.segment_start
        due = begins or self.at_end() or self.is_grown_up() or self.is_due(self.config.evaluation.every)
        if not self.held_out or not due:
            return True
        with self.reporter.throughput.paused():
            with self.optimizer.evaluated():
                if not self.evaluate_weights(""):
                    return False
            if self.ema is not None:
                with self.ema.swapped(self.decoder):
                    return self.evaluate_weights("-ema")
        return True

    def evaluate_weights(self, suffix: str) -> bool:
        micro = self.config.evaluation.micro_sequences or self.micro_sequences
        for name, held_out in self.held_out.items():
            if self.reporter.is_evaluated(self.state, name + suffix):
                continue
            numbers = evaluate(self.decoder, held_out, self.mesh, micro, self.proceed)
            if numbers is None:
                return False
            self.reporter.evaluation(self.state, name + suffix, numbers)
        return True

    def proceed(self) -> bool:
        self.watchdog.beat(self.state.clock.step, "evaluation")
        return self.halted() is None

    def health_is_due(self) -> bool:
        """Whether the coming step reaches a multiple of the health cadence."""
        tokens = self.state.clock.tokens
        batch_tokens = self.sequences * self.config.data.seq_len
        return is_due(self.config.observe.health_every, tokens, tokens + batch_tokens)

    def begin_health(self, batch: Batch) -> tuple[dict[str, list[float]], UpdateRatio]:
        """What is measured before a step, and a copy of the weights to compare with after it."""
        with self.reporter.throughput.paused():
            batch = batch.to(self.mesh.device)
            found = measure(self.decoder, batch.tokens, batch.document_ids)
            return found, UpdateRatio(self.decoder.named_parameters())

    def end_health(self, found: dict[str, list[float]], ratio: UpdateRatio) -> None:
        with self.reporter.throughput.paused():
            row = {**found, "update_ratio": ratio.measure()}
            if not self.state.lineage:  # else the weights began as those of another model or run, not of the seed
                row["distance"] = distance_from_start(self.decoder, self.config.run.seed)
            self.reporter.health(self.state, row)
