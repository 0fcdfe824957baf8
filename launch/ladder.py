"""A ladder file: which sizes, tokens, learning rates, batches and seeds are trained. See docs/sweeps.md."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from runtime.units import Positive, Section, parse_tokens

Above = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*$")]
Count = Literal["total", "non_embedding", "active"]
_MULTIPLE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*x")


def parse_amount(value: Any) -> str:
    """An amount of tokens as it names runs: "300K", or "20x" for tokens per parameter. ValueError for another."""
    text = str(value).replace("_", "").replace(" ", "")
    if isinstance(value, str) and (match := _MULTIPLE.fullmatch(text)) and float(match[1]) > 0:
        return text
    try:
        tokens = parse_tokens(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "20x" for tokens per parameter') from None
    if not tokens:
        raise ValueError("a run of 0 tokens is none")
    return text


def tokens_of(amount: str, parameters: int) -> int:
    """The tokens that an amount means for a model of so many parameters."""
    match = _MULTIPLE.fullmatch(amount)
    return round(float(match[1]) * parameters) if match else parse_tokens(amount)


Amount = Annotated[str, BeforeValidator(parse_amount)]


class PowerLaw(Section):
    """coefficient x N^a x D^b. Of the batch it gives tokens, which become the nearest power of two in sequences."""

    coefficient: Above
    N: float = 0.0
    D: float = 0.0
    count: Count = "non_embedding"
    """What N means."""

    def __call__(self, counts: dict[str, int], tokens: int) -> float:
        return self.coefficient * counts[self.count] ** self.N * tokens**self.D


class Around(Section):
    """Factors of a value: the base's own, a number, or a law of size and tokens."""

    factors: Annotated[list[Above], Field(min_length=1)]
    around: Annotated[
        Annotated[Literal["base"], Tag("<name>")]
        | Annotated[Above, Tag("<number>")]
        | Annotated[PowerLaw, Tag("<law>")],
        Discriminator(lambda value: {str: "<name>", dict: "<law>", PowerLaw: "<law>"}.get(type(value), "<number>")),
    ] = "base"


def _form(value: Any) -> str:
    return "<around>" if isinstance(value, dict | Around) else "<list>"


Rates = Annotated[
    Annotated[list[Above], Field(min_length=1), Tag("<list>")] | Annotated[Around, Tag("<around>")],
    Discriminator(_form),
]
Batches = Annotated[
    Annotated[list[Positive], Field(min_length=1), Tag("<list>")] | Annotated[Around, Tag("<around>")],
    Discriminator(_form),
]
Amounts = Annotated[list[Amount], Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]


class SizeConfig(Section):
    """One model: keys of [model] that differ from the base, or the parameters it is to have."""

    name: Name
    model: dict[str, Any] = {}
    total: Annotated[int, BeforeValidator(parse_tokens)] | None = None
    """Parameters, for which the base is made wider and deeper alike."""
    non_embedding: Annotated[int, BeforeValidator(parse_tokens)] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum([bool(self.model), self.total is not None, self.non_embedding is not None]) != 1:
            raise ValueError(f"size {self.name}: give one of model = {{...}}, total and non_embedding")
        return self


class GridConfig(Section):
    """All combinations of what it names; what it does not name is the ladder's own."""

    sizes: Annotated[list[Name], Field(min_length=1)] | None = None
    tokens: Amounts | None = None
    lr: Rates | None = None
    batch: Batches | None = None
    """Sequences."""
    seeds: Seeds | None = None


class StopConfig(Section):
    """When a run is hopeless. Always so where its loss is above that of its first step after twice its warm-up."""

    after: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of a run's tokens before which the next two say nothing."""
    unigram: bool = True
    """Stop a run whose loss is above that of a model which sees no context, where the held-out set tells it."""
    margin: Above | None = None
    """Stop a run whose loss lies so many nats above the lowest of its size and seed at the same tokens."""


class ThenConfig(Section):
    """What is run on the ladder's runs when all have ended: arguments of launch/fit.py, and of launch/plan.py."""

    fit: list[str] | None = None
    plan: list[str] | None = None
    out: str | None = None
    """Folder of the analysis; without it `<run.dir>/<name>-analysis`."""

    @model_validator(mode="after")
    def _fit_first(self) -> Self:
        if self.plan is not None and self.fit is None:
            raise ValueError("plan reads the laws that fit writes: give fit too, if only fit = []")
        for key, taken in (("fit", "--out"), ("plan", "--laws")):
            if taken in (getattr(self, key) or ()):
                raise ValueError(f"{key}: {taken} is given by the sweep; the folder is then.out")
        return self


class Ladder(Section):
    """All of a ladder file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base: str | dict[str, Any]
    """A preset, from the folder of the ladder file; or its sections."""
    overrides: dict[str, dict[str, Any]] = {}
    """Sections over those of the base."""
    schedule: Literal["branches", "separate"] = "branches"
    """Whether the runs of fewer tokens are branches of the one of most, or all begin anew."""
    per: Count = "non_embedding"
    """Parameters that "20x" counts."""
    sizes: Annotated[list[SizeConfig], Field(min_length=1)]
    tokens: Amounts | None = None
    lr: Rates | None = None
    batch: Batches | None = None
    seeds: Seeds = [0]
    grids: list[GridConfig] = []
    """Without any, the ladder itself is one."""
    stop: StopConfig = StopConfig()
    then: ThenConfig = ThenConfig()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [each.name for each in self.sizes]
        if len(set(names)) != len(names):
            raise ValueError(f"sizes need distinct names, got {', '.join(names)}")
        for number, grid in enumerate(self.filled()):
            where = f"grids.{number}." if self.grids else ""
            for key in ("tokens", "lr", "batch"):
                if getattr(grid, key) is None:
                    raise ValueError(f"{where}{key} is required")
            if unknown := [each for each in grid.sizes if each not in names]:
                raise ValueError(f"{where}sizes: {unknown[0]!r} is none of {', '.join(names)}")
        return self

    def filled(self) -> list[GridConfig]:
        """The grids, with what they leave to the ladder."""
        own = {key: getattr(self, key) for key in ("tokens", "lr", "batch", "seeds")}
        own["sizes"] = [each.name for each in self.sizes]
        given = [{key: value for key, value in grid if value is not None} for grid in self.grids or [GridConfig()]]
        return [GridConfig.model_construct(**(own | each)) for each in given]


def read_ladder(path: str | Path) -> tuple[Ladder, dict[str, Any]]:
    """A ladder, and the raw sections of its base with the overrides over them.

    ValueError with one line for each mistake, naming the key, the value and what is accepted.
    """
    raw = _read(Path(path), "ladder")
    try:
        ladder = Ladder.model_validate(raw)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(each) for each in error.errors(include_url=False))
        raise ValueError(f"{path}: " + "\n  ".join(lines)) from None
    base = ladder.base if isinstance(ladder.base, dict) else _read(Path(path).parent / ladder.base, "base")
    if "growth" in base:
        raise ValueError(f"{path}: base: growth changes the size of a run, and a ladder's are the sizes it names")
    return ladder, laid_over(base, ladder.overrides)


def laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `changes` laid over it, tables key by key."""
    both = dict(base)
    for key, value in changes.items():
        inner = both.get(key, {})
        both[key] = laid_over(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return both


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"cannot read the {what} {path}: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def _explain(error: dict[str, Any]) -> str:
    """One line of a pydantic error, without the tags of unions in its key."""
    key = ".".join(str(each) for each in error["loc"] if not str(each).startswith("<"))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}"
    if error["type"] == "missing":
        return f"{key} is required"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{key}: {message}{given}" if key else message
