"""The command line of a growth: operators, each with its own options after it, and the policies."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from growth.operator import Operator, check_options, find
from growth.plan import Step
from launch.growth_config import GrowthConfig, ScheduleChange
from runtime.config import Config
from runtime.units import resolve_span


def split_steps(arguments: Sequence[str]) -> tuple[list[Step], list[str]]:
    """The operators with the options that follow them, and the arguments that are none of theirs.

    ``--operator depth.stack --factor 4``: an option belongs to the operator before it if that has one of the name;
    lists are written ``--layers 0,1,1``. ValueError for an unknown operator and for options that it does not accept.
    """
    steps: list[Step] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        known = find(steps[-1].operator).options.model_fields if steps else {}
        if key == "operator":
            steps.append(Step(value if equals else _value(flag, words), {}))
            find(steps[-1].operator)
        elif key in known:
            if not equals:
                is_switch = known[key].annotation is bool and not (words and words[0].lower() in ("true", "false"))
                value = "true" if is_switch else _value(flag, words)
            steps[-1].options[key] = _parsed(find(steps[-1].operator), key, value)
        else:
            rest.append(word)
    for name, options in steps:
        check_options(name, options)
    return steps, rest


def _value(flag: str, words: list[str]) -> str:
    if not words or words[0].startswith("--"):
        raise ValueError(f"{flag} needs a value")
    return words.pop(0)


def _parsed(operator: Operator, key: str, text: str) -> Any:
    """An option's value from its text, which may be a list with commas, of pairs with equals signs too. What cannot be
    parsed stays text, for `check_options` to refuse."""
    field = operator.options.model_fields[key]
    kind = TypeAdapter(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
    pairs = {key: value for key, _, value in (each.partition("=") for each in text.split(","))}
    for form in (text, text.split(","), pairs):
        try:
            return kind.validate_python(form)
        except ValidationError:
            continue
    return text


def describe_known(steps: Sequence[Step]) -> str:
    """The options that the operators have, for a message about one that they have not."""
    known = {name: [f"--{key.replace('_', '-')}" for key in find(name).options.model_fields] for name, _ in steps}
    return "; ".join(f"{name} has {', '.join(keys) or 'no options'}" for name, keys in known.items())


def growth_entry(
    steps: Sequence[Step],
    *,
    at: int,
    run: Config | None,
    moments: str | None = None,
    rates: str | None = None,
    schedule: str | None = None,
    verify: str = "none",
) -> GrowthConfig:
    """The `[[growth]]` entry that the command line stands for. ValueError naming the option that cannot be.

    run: of the checkpoint, None where it has none; moments: a policy, or ``PATTERN=POLICY,...``; schedule:
    ``KIND[,key=value...]``, shares of the run's end among the values; None for an entry's own default.
    """
    (first, options), *more = steps
    raw = {
        "at": at,
        "operator": first,
        "options": options,
        "then": [{"operator": name, "options": options} for name, options in more],
        "verify": verify,
    }
    if moments is not None:
        raw["moments"] = _pairs("moments", moments.split(",")) if "=" in moments else moments
    if rates is not None:
        raw["rates"] = rates
    if schedule is not None:
        kind, *pairs = schedule.split(",")
        raw["schedule"] = {"kind": kind, **_pairs("schedule", pairs)}
    try:
        entry = GrowthConfig.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        option, *key = map(str, found["loc"])
        message = found["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"--{option}: {'.'.join(key) + ': ' if key else ''}{message} (got {found['input']!r})"
        ) from None
    return entry.model_copy(update={"schedule": _resolved(entry.schedule, run)})


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if wrong := [
        text for text, (key, equals, value) in zip(texts, pairs, strict=True) if not (key and equals and value)
    ]:
        raise ValueError(f"--{option}: {wrong[0]!r} is not of the form key=value")
    return {key: value for key, _, value in pairs}


def _resolved(schedule: ScheduleChange, run: Config | None) -> ScheduleChange:
    """The schedule's change with its shares of the run's end in tokens. ValueError for one that the run cannot take."""
    end = None if run is None else run.schedule.end
    needed = {"rewarm": "tokens", "remap": "to"}.get(schedule.kind)
    value = getattr(schedule, needed) if needed else None
    if isinstance(value, str) and end is None:
        raise ValueError(
            f"--schedule: {needed} = {value!r} is a share of a horizon, but the checkpoint's run has none; give tokens"
        )
    if value is not None:
        schedule = schedule.model_copy(update={needed: resolve_span(value, end or 0)})
    if run is not None:
        try:
            schedule.refuse_in(run)
        except ValueError as error:
            raise ValueError(f"--schedule: {error}") from None
    return schedule
