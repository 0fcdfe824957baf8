"""A run's configuration: sections and validation.

Every section is a frozen pydantic model that refuses unknown keys. Token amounts are those of `runtime/units.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from runtime.batch_config import BatchConfig
from runtime.model.config import ModelConfig
from runtime.optim_config import OptimConfig
from runtime.schedule_config import ScheduleConfig
from runtime.units import NO_HORIZON, Positive, Section, Span, Tokens, parse_tokens, resolve_shares, unresolved
from schedulers.batch_size import BatchPlan

RISING = ("wsd_s", "sequence", "rewarm")
"""Kinds of schedules whose rate does not only fall after the warm-up."""


class RunConfig(Section):
    """Identity and limits of the run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    until: Annotated[Tokens, Field(gt=0)] | None = None
    """Stop with a checkpoint here, before the horizon; the schedule does not move."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock budget of one launch, after which it saves and ends."""
    deterministic: bool = False
    """Ask torch for repeatable kernels; slower on a GPU."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A step or an evaluation batch that makes no progress for this long is called hung."""


class SourceConfig(Section):
    """One tokenized corpus: the path of a Megatron `.bin`/`.idx` pair without its suffix."""

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0


class DataConfig(Section):
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    seq_len: Positive
    tokenizer: str | None = None
    """A `tokenizer.json`; by default the one beside the first source."""
    document_mask: bool = False
    """Attend within documents only, and do not train on the step from one document to the next."""
    on_change: Literal["refuse", "switch"] = "refuse"
    """When a run is resumed with other sources: refuse, or switch to them here and record the event."""
    prefetch: Annotated[int, Field(ge=0)] = 2
    """Batches prepared ahead in the background."""


class EvaluationSetConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    path: str


class EvaluationConfig(Section):
    sets: list[EvaluationSetConfig] = []
    every: Span = "10%"
    max_sequences: Positive | None = None
    micro_sequences: Positive | None = None
    """Sequences a device evaluates at once; by default batch.micro_sequences."""

    @field_validator("sets")
    @classmethod
    def _distinct(cls, sets: list[EvaluationSetConfig]) -> list[EvaluationSetConfig]:
        names = [each.name for each in sets]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation sets need distinct names, got {names}")
        if averaged := [name for name in names if name.endswith("-ema")]:
            raise ValueError(f"{averaged}: names that end in -ema are those of the averaged weights' rows")
        return sets


class ParallelConfig(Section):
    data_shard: Literal["auto"] | Positive = "auto"
    """FSDP degree; "auto" takes the processes the other degrees leave."""
    data_replicate: Positive = 1
    """HSDP: replicas of the sharded group."""
    tensor: Positive = 1
    """Tensor-parallel degree, with sequence and loss parallelism."""
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; "auto" is bf16 on a GPU and fp32 on a CPU. Parameters, reduction and optimizer are fp32."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Products of the blocks in float8, by torchao's recipe of this name; on a CPU they are emulated, which is slow."""
    reshard_after_forward: bool = True
    looped_blocks: Literal["together", "apart"] = "together"
    """Blocks that a depth plan uses several times: gathered together, once for all their uses, or each for each use,
    which needs the memory of one block alone."""


class CheckpointConfig(Section):
    every: Span = "10%"
    keep_last: Positive = 2
    keep_every: Span | None = None
    """Also keep, for good, the first checkpoint at or past each multiple of this many tokens."""
    at: list[Span] = []
    """Also save at the first step boundary at or past each of these tokens, and keep it for good."""
    dir: str | None = None
    """A folder or fsspec URL that holds checkpoints of many runs, each under its name; by default they lie in the run
    directory."""
    asynchronous: bool = True


class GuardConfig(Section):
    """Steps that never reach the weights. Non-finite ones are always skipped."""

    sigma: Annotated[float, Field(gt=0)] | None = None
    """Skip a step whose loss or gradient norm lies this many deviations above the window's mean."""
    window: Annotated[int, Field(ge=2)] = 128
    max_consecutive: Positive = 8
    on_spike: Literal["stop", "rollback"] = "stop"
    """After max_consecutive skips: stop with a checkpoint, or go back to the last one and step over the samples."""


class ObserveConfig(Section):
    log_every: Positive = 10
    """Steps between rows of metrics.jsonl."""
    tensorboard: bool = True
    wandb: str | None = None
    """Weights & Biases project; needs the `wandb` extra."""
    health_every: Span | None = None
    """Tokens between measurements of the model's health."""
    profile_steps: tuple[Positive, Positive] | None = None
    """First and last step to trace with torch's profiler."""
    memory_snapshot: bool = False
    """Record CUDA allocations over profile_steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)}: the first step is after the last")
        if self.memory_snapshot and not self.profile_steps:
            raise ValueError("memory_snapshot needs profile_steps, the steps to record")
        return self


class NoiseScaleConfig(Section):
    """The gradient noise scale and the norm test, measured where a step has at least two micro-batches on all ranks
    together. See docs/batch-size.md."""

    enabled: bool = True
    half_life: Annotated[Tokens, Field(gt=0)] | None = None
    """Tokens after which a step counts half in the averages; by default those of 100 batches as they are."""


class StartConfig(Section):
    """Begin from another run's checkpoint; ignored once this run has one of its own."""

    from_: str | None = Field(default=None, alias="from")
    carry: Literal["all", "weights"] = "all"


class Config(Section):
    """All of a run. Build it with `launch.config.compose`; shares of the horizon are already tokens there."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    observe: ObserveConfig = ObserveConfig()
    noise_scale: NoiseScaleConfig = NoiseScaleConfig()
    start: StartConfig = StartConfig()

    @model_validator(mode="before")
    @classmethod
    def _resolve_shares(cls, raw: Any) -> Any:
        """Turn every ``"10%"`` of a `Span` field, defaults too, into tokens."""
        if not isinstance(raw, dict) or not isinstance(raw.get("schedule"), dict):
            return raw
        try:
            horizon = parse_tokens(raw["schedule"].get("horizon"))
        except ValueError:
            return raw
        return resolve_shares(cls, raw, horizon)

    @model_validator(mode="after")
    def _check(self) -> Self:
        schedule = self.schedule
        if schedule.horizon is None:
            sections = ((name, getattr(self, name)) for name in Config.model_fields)
            for key, share in (found for name, section in sections for found in unresolved(section, f"{name}.")):
                raise ValueError(f"{key} = {share!r} is {NO_HORIZON}")
        schedule.build(self.optim.lr, self.batch.sequences, self.data.seq_len)
        self._check_batch()
        if None not in (self.run.until, schedule.end) and self.run.until > schedule.end:
            named = "schedule.horizon =" if schedule.branch.at is None else "the end of schedule.branch,"
            raise ValueError(f"run.until = {self.run.until:,} lies past {named} {schedule.end:,}")
        return self

    def _check_batch(self) -> None:
        """ValueError for a batch that cannot be, or that moves the learning rate twice."""
        kind, batch = self.schedule.kind, self.batch
        if batch.kind == "seesaw" and kind in RISING:
            raise ValueError(f'batch.kind = "seesaw" follows a rate that only falls, and schedule.kind is "{kind}"')
        coupled = batch.kind == "seesaw" or batch.coupling.lr != "none"
        shapes = [self.schedule, *self.schedule.parts]
        if coupled and any(each.kind == "power" and each.power.follows_batch for each in shapes):
            raise ValueError(
                "schedule.power.follows_batch lets the rate follow the batch, and so do batch.coupling.lr and "
                'batch.kind = "seesaw"; choose one of them'
            )
        self._check_measuring()
        if batch.kind == "branch_probe" and not self.evaluation.sets:
            raise ValueError('batch.kind = "branch_probe" compares held-out losses; give it evaluation.sets')
        try:
            assert self.batches.sizes
        except ValueError as error:
            raise ValueError(f"batch: {error}") from None

    @property
    def batches(self) -> BatchPlan:
        """The global batch over the run, as far as it is known before the run."""
        if self.batch.kind != "seesaw":
            return self.batch.plan()
        schedule = self.schedule.unbranched(self.optim.lr, self.batch.sequences, self.data.seq_len)
        plan = self.batch.staircase(schedule, self.schedule.warmup, self.schedule.horizon).plan
        # A branch anneals the rate instead.
        return plan if self.schedule.branch.at is None else plan.until(self.schedule.branch.at)

    @property
    def largest_batch(self) -> int:
        """Sequences that no global batch of the run exceeds."""
        return self.batch.control.largest if self.batch.is_measured else max(self.batches.sizes)

    @property
    def end(self) -> int | None:
        """Tokens at which the run ends; None for one that goes on until it is stopped."""
        return self.run.until or self.schedule.end

    def _check_measuring(self) -> None:
        """ValueError for a batch that is to follow a noise scale which would not be known."""
        if self.batch.kind not in ("noise_scale", "norm_test"):
            return
        if not self.noise_scale.enabled:
            raise ValueError(
                f'batch.kind = "{self.batch.kind}" follows what noise_scale.enabled = false leaves unknown'
            )
        half_life, largest = self.noise_scale.half_life, self.batch.control.largest * self.data.seq_len
        if half_life is not None and half_life < 3 * largest:
            raise ValueError(
                f"noise_scale.half_life = {half_life:,} has no interval for batches of batch.control.largest, "
                f"{largest:,} tokens; accepted: {3 * largest:,} and more"
            )
