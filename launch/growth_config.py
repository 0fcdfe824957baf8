"""The `[[growth]]` entries of a configuration, and the segments they make of a run."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, create_model, model_validator

from growth.evolution import foresee
from growth.operator import check_options, find
from growth.plan import Step
from growth.policies import Moments
from runtime.config import BatchConfig, Config, ParallelConfig
from runtime.units import NO_HORIZON, Section, Span


def _change(section: type[Section], *keys: str) -> type[Section]:
    """A section of which any of the keys may be given, and those not given stay as they are."""
    chosen = {key: section.model_fields[key] for key in keys or section.model_fields}
    fields = {}
    for key, field in chosen.items():
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        fields[key] = (kind | None, None)
    return create_model(f"{section.__name__}Change", __base__=Section, **fields)


ParallelChange = _change(ParallelConfig)
BatchChange = _change(BatchConfig, "sequences", "micro_sequences")


class OptimChange(Section):
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak of the base learning rate from here on."""


class StepConfig(Section):
    operator: str
    """Name of an operator; `launch/grow.py --list` shows all."""
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_options(self.operator, self.options)
        return self

    @property
    def step(self) -> Step:
        return Step(self.operator, self.options)


class ScheduleChange(Section):
    """What becomes of the learning rate. The clock is never reset."""

    kind: Literal["continue", "rewarm", "remap"] = "continue"
    scope: Literal["all", "new"] = "all"
    """Whether the re-warm is of all parameters, or of the new entries alone."""
    start: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the learning rate at the growth."""
    peak: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the learning rate after the re-warm, for good."""
    tokens: Span = "2%"
    """Length of the re-warm."""
    to: Span | None = None
    """Tokens at which the schedule goes on after a remap, towards the same end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "remap") != (self.to is not None):
            raise ValueError('schedule.to and schedule.kind = "remap" belong together')
        return self

    def refuse_in(self, config: Config) -> None:
        """ValueError, by its key, for a change that the learning rate of such a run cannot take."""
        if config.batch.kind == "seesaw" and self.kind != "continue":
            raise ValueError(
                f'kind = "{self.kind}" lifts the learning rate, and batch.kind = "seesaw" follows one that only falls'
            )
        if self.to is None:
            return
        shapes, end = [config.schedule, *config.schedule.parts], config.schedule.end
        if any(each.kind == "power" and each.power.follows_batch for each in shapes):
            raise ValueError(
                'kind = "remap" reads the schedule at another pace, under which schedule.power.follows_batch would '
                "take another batch; set it to false"
            )
        if end is None:
            raise ValueError('kind = "remap" goes on towards schedule.horizon, which is not given')
        if self.to >= end:
            raise ValueError(f"to = {self.to:,} is not before the end of the schedule, {end:,}")


def _policy(value: Any) -> Moments | dict[str, Moments] | str:
    """A policy for the optimizer's state, or one for each pattern. ValueError for anything else."""
    if value == "auto":
        return value
    names = [str(each) for each in Moments]
    if isinstance(value, dict) and value and all(each in names for each in value.values()):
        return {str(pattern): Moments(each) for pattern, each in value.items()}
    if isinstance(value, str) and value in names:
        return Moments(value)
    raise ValueError(f'accepted are "auto", {", ".join(names)}, or a table from patterns of names to these')


class GrowthConfig(StepConfig):
    """One growth: when, what, and what becomes of the state that trains the model."""

    at: Span
    """Tokens of the growth: at the first step boundary at or past them."""
    then: list[StepConfig] = []
    """Further operators, composed into the same growth."""
    moments: Annotated[Any, BeforeValidator(_policy)] = "auto"
    """Policy for the optimizer's state, or one for each pattern of parameter names; "auto" is the operator's own."""
    rates: Literal["keep", "follow"] = "keep"
    """Whether learning rate, weight decay and epsilon of scaled parameters follow their scales."""
    schedule: ScheduleChange = ScheduleChange()
    verify: Literal["logits", "none"] = "logits"
    """Compare the logits before and after, and give the growth up where a preserving operator does not preserve."""
    parallel: ParallelChange = ParallelChange()
    """Keys of the section that change with the new segment; so for the next two."""
    batch: BatchChange = BatchChange()
    optim: OptimChange = OptimChange()

    @model_validator(mode="after")
    def _resolve_policy(self) -> Self:
        if self.moments == "auto":
            object.__setattr__(self, "moments", find(self.operator).moments)
        return self

    @property
    def steps(self) -> list[Step]:
        return [self.step, *(each.step for each in self.then)]

    def section_changes(self) -> dict[str, dict[str, Any]]:
        """Keys of other sections that the new segment changes."""
        sections = {"parallel": self.parallel, "batch": self.batch, "optim": self.optim}
        return {name: each.model_dump(exclude_none=True) for name, each in sections.items()}


class LawConfig(Section):
    """Where numbers that are "auto" come from."""

    source: str | None = None
    """A laws file as `launch/fit.py` writes it, or the name of a published law."""
    far: bool = False
    """Take the law's word more than ten times beyond the compute of its data, too."""


class RunConfiguration(Config):
    """All of a configuration file: the first segment, the growths that begin the others, and the law of "auto"."""

    growth: list[GrowthConfig] = []
    law: LawConfig = LawConfig()
    _law_record: dict[str, Any] | None = PrivateAttr(default=None)

    @property
    def law_record(self) -> dict[str, Any] | None:
        """What "auto" came to when this was composed, and by which law, as of `launch.auto.resolve`."""
        return self._law_record

    def remember_law(self, record: dict[str, Any] | None) -> None:
        self._law_record = record

    @model_validator(mode="after")
    def _check_growth(self) -> Self:
        for number, entry in enumerate(self.growth):
            spans = {"at": entry.at, "schedule.tokens": entry.schedule.tokens if entry.schedule.kind == "rewarm" else 0}
            for key, span in spans.items():
                if isinstance(span, str):
                    raise ValueError(f"growth.{number}.{key} = {span!r} is {NO_HORIZON}")
        times = [each.at for each in self.growth]
        if times != sorted(times):
            raise ValueError(f"growth.at: the entries are not in order of time: {times}")
        horizon = self.schedule.end
        if times and horizon is not None and times[-1] >= horizon:
            raise ValueError(f"growth.at = {times[-1]:,} is not before the end of the schedule, {horizon:,}")
        for number, entry in enumerate(self.growth):
            if self.batch.kind != "constant" and entry.batch.sequences is not None:
                raise ValueError(
                    f"growth.{number}.batch.sequences = {entry.batch.sequences}, but batch.kind = "
                    f'"{self.batch.kind}" decides the batch'
                )
            try:
                entry.schedule.refuse_in(self)
            except ValueError as error:
                raise ValueError(f"growth.{number}.schedule.{error}") from None
        return self


def policies(entry: GrowthConfig) -> dict[str, Any]:
    """What an entry decides of the state that trains the model, as a growth's record keeps it."""
    schedule = entry.schedule.model_dump(mode="json", exclude_none=True)
    given = {"continue": ("kind",), "remap": ("kind", "to")}.get(entry.schedule.kind, tuple(schedule))
    moments = entry.moments
    return {
        "moments": {key: str(each) for key, each in moments.items()} if isinstance(moments, dict) else str(moments),
        "rates": entry.rates,
        "schedule": {key: schedule[key] for key in given},
    }


def segments(config: RunConfiguration) -> list[Config]:
    """The configuration of each segment: shapes by the operators, and the sections that entries change.

    ValueError, naming the entry, for an operator that cannot be applied to the model before it.
    """
    found = [Config.model_construct(**{name: getattr(config, name) for name in Config.model_fields})]
    for number, entry in enumerate(config.growth):
        try:
            found.append(_next(found[-1], entry))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"growth.{number}: {key + ': ' if key else ''}{message}") from None
        except ValueError as error:
            raise ValueError(f"growth.{number}: {error}") from None
    return found


def _next(before: Config, entry: GrowthConfig) -> Config:
    model, seq_len = foresee(before.model, entry.steps, entry.moments, follow=entry.rates == "follow")
    raw = before.model_dump(by_alias=True)
    for section, change in entry.section_changes().items():
        raw[section] = {**raw[section], **change}
    raw["data"] = {**raw["data"], "seq_len": seq_len or before.data.seq_len}
    raw["model"] = model.model_dump()
    return Config.model_validate(raw)
