"""The runs of a ladder: their configurations, names, costs, and which are branches of which."""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.config import validated
from launch.growth_config import RunConfiguration
from launch.ladder import Around, GridConfig, Ladder, PowerLaw, SizeConfig, laid_over, tokens_of
from runtime.model.config import ModelConfig
from runtime.model.counts import Counts, count, flops_per_token
from runtime.parallel.mesh import plan_layout
from runtime.persistence import checkpoint_location
from runtime.units import parse_span, resolve_span

FARTHEST = 0.05
"""Share by which a run's tokens may differ from those asked for, to be whole batches of every size of its ladder."""
DIGITS = 4
"""Of a learning rate that a law or a factor gives."""
WIDEST = 4096
"""Heads up to which a size is sought for a number of parameters."""
NEAR = 0.25
"""Share by which a size may miss the parameters asked for."""
IDENTITY = ("model", "data", "batch", "optim", "growth")
"""Sections that make a run what it is, beside its seed, its schedule and what it is evaluated on."""
FREE = {"data": {"prefetch", "on_change"}, "batch": {"micro_sequences"}}
"""Keys of these that change nothing of a run."""


@dataclass(frozen=True)
class Run:
    """One run of a ladder."""

    name: str
    size: str
    counts: Counts
    config: RunConfiguration
    """Of a branch without `start`, which is known when its parent has come so far."""
    parent: str | None = None
    """The run that it is a branch of."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir) / self.name

    @property
    def begin(self) -> int:
        """Tokens at which it begins."""
        return self.config.schedule.branch.at or 0

    @property
    def end(self) -> int:
        return self.config.schedule.end

    @property
    def sequences(self) -> int:
        return self.config.batch.sequences

    @property
    def steps(self) -> int:
        return (self.end - self.begin) // (self.sequences * self.config.data.seq_len)

    @property
    def flops(self) -> int:
        """Of the run itself, without what it is a branch of."""
        return (self.end - self.begin) * flops_per_token(self.config.model, self.config.data.seq_len)

    @property
    def checkpoints(self) -> str:
        return checkpoint_location(self.config)


@dataclass(frozen=True)
class Point:
    """What is asked for: a cell of a grid."""

    size: str
    amount: str
    lr: float
    sequences: int
    seed: int

    @property
    def name(self) -> str:
        rate = f"{self.lr:g}".replace("+", "")
        return f"{self.size}-{self.amount}-lr{rate}-b{self.sequences}-s{self.seed}"


def plan(ladder: Ladder, base: Mapping[str, Any], where: str | Path, processes: int = 1) -> list[Run]:
    """Every run of a ladder, in the order of the file; a run before its branches. ValueError naming what cannot be."""
    models = {size.name: sized(size, base, where) for size in ladder.sizes}
    points: dict[Point, int] = {}
    """With their tokens."""
    longest: dict[str, int] = {}
    for grid in ladder.filled():
        for name in grid.sizes:
            amounts = [tokens_of(each, getattr(count(models[name]), ladder.per)) for each in grid.tokens]
            longest[name] = max(longest.get(name, 0), *amounts)
    for grid in ladder.filled():
        for name in grid.sizes:
            points |= _points(ladder, grid, name, count(models[name]), base, longest[name])
    runs = []
    for size in ladder.sizes:
        own = {point: tokens for point, tokens in points.items() if point.size == size.name}
        tokens = whole(own, _seq_len(base, where))
        for column in columns(ladder, own):
            runs += _column(ladder, base, where, models[size.name], column, tokens)
    for run in runs:
        plan_layout(run.config.parallel, processes, run.config.model, run.config.data.seq_len, run.sequences)
    return runs


def columns(ladder: Ladder, points: Mapping[Point, int]) -> Iterator[list[Point]]:
    """Points that differ in tokens alone, most tokens first; each by itself where runs are separate."""
    if ladder.schedule == "separate":
        yield from ([point] for point in points)
        return
    together: dict[tuple[float, int, int], list[Point]] = {}
    for point in points:
        together.setdefault((point.lr, point.sequences, point.seed), []).append(point)
    for column in together.values():
        yield sorted(column, key=lambda each: -points[each])


def _points(
    ladder: Ladder, grid: GridConfig, size: str, counts: Counts, base: Mapping[str, Any], longest: int
) -> dict[Point, int]:
    """The points of one grid and size, with the tokens asked for. Where runs of fewer tokens are branches they have the
    rate and the batch of the longest, and a law is asked for that one."""
    found = {}
    for amount in grid.tokens:
        tokens = tokens_of(amount, getattr(counts, ladder.per))
        at = longest if ladder.schedule == "branches" else tokens
        for lr in _rates(grid.lr, base, counts, at):
            for sequences in _batches(grid.batch, base, counts, at):
                for seed in grid.seeds:
                    found[Point(size, amount, lr, sequences, seed)] = tokens
    return found


def _rates(given: Sequence[float] | Around, base: Mapping[str, Any], counts: Counts, tokens: int) -> list[float]:
    if not isinstance(given, Around):
        return list(given)
    centre = given.around
    if centre == "base":
        centre = _of_base(base, "optim", "lr")
    elif isinstance(centre, PowerLaw):
        centre = centre(vars(counts), tokens)
    return [float(f"{factor * centre:.{DIGITS}g}") for factor in given.factors]


def _batches(given: Sequence[int] | Around, base: Mapping[str, Any], counts: Counts, tokens: int) -> list[int]:
    if not isinstance(given, Around):
        return list(given)
    centre = given.around
    if isinstance(centre, PowerLaw):
        sequences = centre(vars(counts), tokens) / _of_base(base, "data", "seq_len")
        return list(dict.fromkeys(2 ** max(0, round(math.log2(factor * sequences))) for factor in given.factors))
    centre = _of_base(base, "batch", "sequences") if centre == "base" else centre
    return list(dict.fromkeys(max(1, round(factor * centre)) for factor in given.factors))


def _of_base(base: Mapping[str, Any], section: str, key: str) -> float:
    value = base.get(section, {}).get(key) if isinstance(base.get(section), dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"base: {section}.{key} = {value!r} is no number that factors could be of")
    return value


def _seq_len(base: Mapping[str, Any], where: str | Path) -> int:
    try:
        return int(_of_base(base, "data", "seq_len"))
    except ValueError:
        raise ValueError(f"{where}: base: data.seq_len is required, as a number") from None


def whole(points: Mapping[Point, int], seq_len: int) -> dict[Point, int]:
    """The tokens of each point in whole batches, the same for all batches of a size, so that its cells are level.

    ValueError where that is farther than `FARTHEST` from what was asked for.
    """
    batches = sorted({point.sequences for point in points})
    unit = math.lcm(*batches) * seq_len
    found = {}
    for point, tokens in points.items():
        found[point] = max(1, round(tokens / unit)) * unit
        if abs(found[point] / tokens - 1) > FARTHEST:
            raise ValueError(
                f"{point.name}: {tokens:,} tokens in whole batches of {' and '.join(map(str, batches))} sequences of "
                f"{seq_len} are {found[point]:,}; choose more tokens, or batches with a smaller common multiple"
            )
    return found


def _column(
    ladder: Ladder,
    base: Mapping[str, Any],
    where: str | Path,
    model: ModelConfig,
    column: Sequence[Point],
    tokens: Mapping[Point, int],
) -> list[Run]:
    """The run of most tokens, whose stable part is the others', and its branches."""
    first, *others = column
    raw = _raw(ladder, base, model, first, tokens[first])
    if ladder.schedule == "separate":
        return [_run(first, model, validated(raw, (), f"{where}, {first.name}"))]
    batch = first.sequences * raw["data"]["seq_len"]
    decays = {point: _decay(raw["schedule"], tokens[point], batch, where) for point in column}
    raw["schedule"]["decay"] = decays[first]
    points = {point: tokens[point] - decays[point] for point in others}
    kept = raw.get("checkpoint", {}).get("at", [])
    raw = laid_over(raw, {"checkpoint": {"at": sorted({*kept, *points.values()})}} if points else {})
    trunk = _run(first, model, validated(deepcopy(raw), (), f"{where}, {first.name}"))
    runs = [trunk]
    for point, at in points.items():
        if at <= trunk.config.schedule.warmup:
            raise ValueError(
                f"{where}, {point.name}: its decay begins at {at:,} tokens, and the warm-up of {first.name} ends at "
                f"{trunk.config.schedule.warmup:,}; give schedule.warmup in tokens, or fewer of them"
            )
        config = _branch(raw, trunk, point, at, decays[point], f"{where}, {point.name}")
        runs.append(replace(_run(point, model, config), parent=trunk.name))
    return runs


def _run(point: Point, model: ModelConfig, config: RunConfiguration) -> Run:
    return Run(point.name, point.size, count(model), config)


def _raw(ladder: Ladder, base: Mapping[str, Any], model: ModelConfig, point: Point, tokens: int) -> dict[str, Any]:
    """The configuration of a run as it would stand in a file."""
    run = dict(base.get("run", {}))
    run.pop("until", None)
    run |= {"name": point.name, "dir": str(Path(run.get("dir", "runs")) / ladder.name), "seed": point.seed}
    own = {
        "model": model.model_dump(mode="json", exclude_none=True),
        "batch": {"sequences": point.sequences},
        "optim": {"lr": point.lr},
        "schedule": {"horizon": tokens},
    }
    return deepcopy(laid_over(dict(base), own) | {"run": run, "model": own["model"]})


def _decay(schedule: Mapping[str, Any], tokens: int, batch: int, where: str | Path) -> int:
    """Length of the tail of a run of so many tokens, in whole batches."""
    if schedule.get("kind", "wsd") != "wsd":
        raise ValueError(
            f'{where}: schedule.kind = "{schedule["kind"]}" has no stable part that runs could share; '
            'accepted are "wsd", and others with schedule = "separate"'
        )
    try:
        decay = resolve_span(parse_span(schedule.get("decay", "20%")), tokens)
    except ValueError as error:
        raise ValueError(f"{where}: schedule.decay: {error}") from None
    length = round(decay / batch) * batch
    if not 0 < length < tokens:
        raise ValueError(
            f"{where}: a decay of {decay:,} of {tokens:,} tokens comes to {length // batch} batches of {batch:,}; "
            "accepted is one and more, and less than all"
        )
    return length


def _branch(raw: Mapping[str, Any], trunk: Run, point: Point, at: int, decay: int, where: str) -> RunConfiguration:
    """Of a branch: its parent's configuration, with another end."""
    tail = trunk.config.schedule
    own = laid_over(
        dict(raw),
        {
            "run": {"name": point.name},
            "schedule": {"branch": {"at": at, "decay": decay, "tail": tail.tail, "final": tail.final}},
        },
    )
    own["checkpoint"] = {key: value for key, value in own.get("checkpoint", {}).items() if key != "at"}
    return validated(deepcopy(own), (), where)


def sized(size: SizeConfig, base: Mapping[str, Any], where: str | Path) -> ModelConfig:
    """The model of a size. ValueError for one that cannot be."""
    raw = {
        "run": {"name": size.name},
        "model": laid_over(base.get("model", {}), size.model),
        "data": base.get("data", {}),
        "batch": {"sequences": 1},
        "optim": {"lr": 1.0},
        "schedule": {"kind": "constant", "horizon": 1, "warmup": 0},
    }
    model = validated(deepcopy(raw), (), f"{where}, size {size.name}").model
    if size.model:
        return model
    kind, wanted = ("total", size.total) if size.total is not None else ("non_embedding", size.non_embedding)
    nearest = min(scaled(model, wanted), key=lambda each: abs(math.log(getattr(count(each), kind) / wanted)))
    found = getattr(count(nearest), kind)
    if abs(found / wanted - 1) > NEAR:
        raise ValueError(
            f"{where}: size {size.name}: no model of the base's proportions has {wanted:,} parameters ({kind}); the "
            f"nearest has {found:,}. Give model = {{...}}"
        )
    return nearest


def scaled(model: ModelConfig, wanted: int) -> Iterator[ModelConfig]:
    """Models of the proportions of one: as wide for their depth, with heads of its size, up to several times `wanted`.

    Depth and feed-forward follow the width in proportion; query heads stay a multiple of the key-value heads.
    """
    group = model.num_heads // model.num_kv_heads
    raw = model.model_dump(mode="json")
    for pairs in range(1, WIDEST):
        heads = pairs * group
        ratio = heads / model.num_heads
        depth = max(1, round(model.num_layers * ratio))
        wide = {
            "num_heads": heads,
            "num_kv_heads": pairs,
            "hidden_size": round(model.hidden_size * ratio),
            "intermediate_size": max(8, 8 * round(model.intermediate_size * ratio / 8)),
        }
        for layers in dict.fromkeys((depth, max(1, depth - 1), depth + 1)):
            yield ModelConfig.model_validate(raw | wide | {"num_layers": layers})
        if wide["hidden_size"] ** 2 * depth > 4 * wanted:
            return


def essence(config: RunConfiguration) -> dict[str, Any]:
    """What makes a run the one it is, by key. How it is got does not: a branch of a longer run is the same as one that
    was meant to end there."""
    dumped = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    found = {"run.seed": config.run.seed, "evaluation.max_sequences": config.evaluation.max_sequences}
    for section in IDENTITY:
        values = dumped.get(section, {})
        if not isinstance(values, dict):
            found[section] = values
            continue
        found |= {f"{section}.{key}": value for key, value in values.items() if key not in FREE.get(section, ())}
    schedule, branch = dumped["schedule"], config.schedule.branch
    named = {key: value for key, value in schedule.items() if key not in ("branch", "horizon")}
    if branch.at is not None:
        named |= {"decay": branch.decay, "tail": branch.tail, "final": branch.final}
    return found | {f"schedule.{key}": value for key, value in named.items()} | {"tokens": config.schedule.end}
