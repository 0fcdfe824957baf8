"""Numbers that a configuration leaves to a law: learning rate, batch and weight decay that are "auto"."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from runtime.config import Config
from runtime.model.counts import count, flops_per_token
from scaling.cells import AXES
from scaling.decisions import NOTHING, is_too_far, settle
from scaling.laws import find
from scaling.laws_file import read
from scaling.proposal import inputs_of, law_for, reach
from scaling.published import PUBLISHED, published
from scaling.results import Bowl, Fit

AUTO = "auto"
QUANTITIES = {"batch.sequences": "batch_tokens", "optim.lr": "lr", "optim.weight_decay": "timescale"}
"""The quantity behind each key; in the order of resolution, as a law of the rate may be one of the batch too, and the
decay of a timescale follows both."""
COLUMNS = {
    "batch.sequences": ("batch_sequences", "batch_tokens"),
    "optim.lr": ("lr",),
    "optim.weight_decay": ("weight_decay",),
}
"""What is known of a run only once the key has its number."""
TAKE_IT = "; law.far = true takes it nevertheless"
DIGITS = 3
"""Of a learning rate and a weight decay."""
GRAIN = 16
"""A batch is rounded to a multiple of a power of two that is at most one part in so many of it: many meshes can carry
it then, and it moves by 3 % at most, far within the plateau."""


class Laws(Protocol):
    """Where laws come from: a laws file, or a publication."""

    name: str
    fits: Sequence[Fit]
    """Of each quantity the chosen one first."""
    bowls: Sequence[Bowl]


class PublishedLaws:
    """The laws of one publication."""

    def __init__(self, name: str):
        self.name, self.bowls = name, ()
        self.fits = tuple(published(name, quantity) for quantity in PUBLISHED[name])


class FileLaws:
    """The laws of a file, or of the laws.json in a folder. ValueError if it is not one."""

    def __init__(self, path: str):
        found = read(Path(path) / "laws.json" if Path(path).is_dir() else path)
        self.name, self.fits, self.bowls, self.analysis = found.path, found.fits, found.bowls, found


def open_laws(source: str) -> Laws:
    """The laws of a published name, or of a file. ValueError for neither."""
    if source in PUBLISHED:
        return PublishedLaws(source)
    if not Path(source).exists():
        raise ValueError(f"{source!r} is neither a laws file nor a published law; accepted: {', '.join(PUBLISHED)}")
    return FileLaws(source)


def resolve(raw: dict[str, Any], processes: int) -> dict[str, Any] | None:
    """Put numbers in the place of "auto" in raw sections, for so many processes; the record of where they are from.

    The numbers of a run that exists are those of its own config.toml, whatever the law says by now. None where nothing
    is "auto". ValueError for a law that is missing, not identified, or too far from its data.
    """
    asked = [key for key in QUANTITIES if _get(raw, key) == AUTO]
    if not asked:
        return None
    own = Path(str(_get(raw, "run.dir") or "runs")) / str(_get(raw, "run.name")) / "config.toml"
    if own.exists():
        recorded = _recorded(own, asked)
        for key in asked:
            _set(raw, key, recorded[key])
        return {"recorded": str(own), "values": {key: {"value": recorded[key]} for key in asked}}
    for key in asked:
        _set(raw, key, 1)
    try:
        config = _config(raw)
    except ValidationError:  # which is told in full where the whole file is validated
        return None
    if raw.get("growth"):
        raise ValueError(f'{asked[0]} = "auto": a law is of one shape, and this run grows; give a number')
    source, far = _get(raw, "law.source"), _get(raw, "law.far") is True
    if not isinstance(source, str):
        raise ValueError(
            f'{asked[0]} = "auto" needs law.source: a laws file, or one of {", ".join(_telling(QUANTITIES[asked[0]]))}'
        )
    laws = open_laws(source)
    values = {}
    for number, key in enumerate(asked):
        open_ = {name for each in asked[number:] for name in COLUMNS[each]}
        known = {name: each for name, each in columns_of(config).items() if name not in open_}
        values[key] = _value(key, laws, config, known, processes, far)
        _set(raw, key, values[key]["value"])
        config = _config(raw)
    return {"source": laws.name, "values": values}


def columns_of(config: Config) -> dict[str, float]:
    """What is known of a run before it runs, by the names of `scaling.columns`; tokens and FLOPs are of the horizon."""
    counts, each = count(config.model), flops_per_token(config.model, config.data.seq_len)
    headless = each - 6 * config.model.hidden_size * config.model.vocab_size
    known: dict[str, float | None] = {
        "total": counts.total,
        "non_embedding": counts.non_embedding,
        "active": counts.active,
        "hidden_size": config.model.hidden_size,
        "num_layers": counts.unrolled_depth,
        "streams": config.model.streams.count,
        "seq_len": config.data.seq_len,
        "batch_sequences": config.batch.sequences,
        "batch_tokens": config.batch.sequences * config.data.seq_len,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "beta1": config.optim.adam_betas[0],
        "beta2": config.optim.adam_betas[1],
        "warmup_tokens": config.schedule.warmup,
        "flops_per_token": each,
    }
    if horizon := config.schedule.horizon:
        known |= {"tokens": horizon, "flops": each * horizon, "flops_without_head": headless * horizon}
    return {name: float(value) for name, value in known.items() if value is not None}


def round_rate(rate: float) -> float:
    """To a few significant digits."""
    return float(f"{rate:.{DIGITS}g}")


def round_batch(tokens: float, config: Config, processes: int) -> int:
    """Sequences of about so many tokens that the processes can share, in whole micro-batches where they are small."""
    wanted = tokens / config.data.seq_len
    parallel = config.parallel
    shards = max(1, processes // (parallel.data_replicate * parallel.tensor))
    ranks = parallel.data_replicate * (shards if parallel.data_shard == AUTO else parallel.data_shard)
    unit = ranks * (config.batch.micro_sequences or 1)
    if unit > wanted:
        unit = ranks
    while unit * 2 <= wanted / GRAIN:
        unit *= 2
    return max(1, round(wanted / unit)) * unit


def describe(fit: Fit) -> dict[str, Any]:
    """A law for a record: formula, constants, what N means, and where it is from."""
    law = find(fit.law)
    return {
        "law": fit.law,
        "formula": law.formula,
        "constants": {name: each.value for name, each in fit.parameters.items()} | dict(fit.fixed),
        "size": fit.size,
        "publication": fit.details.get("source", law.source),
        **({"note": fit.details["note"]} if fit.details.get("note") else {}),
    }


def told(record: Mapping[str, Any]) -> list[str]:
    """A record of `resolve` as lines."""
    if "recorded" in record:
        return [f"{key} = {each['value']:g}, as in {record['recorded']}" for key, each in record["values"].items()]
    lines = []
    for key, each in record["values"].items():
        constants = ", ".join(f"{name} = {value:.4g}" for name, value in each["constants"].items())
        unit = " tokens" if key == "batch.sequences" else ""
        interval = "no interval is known"
        if each["interval"]:
            interval = "95 % interval {:.4g} to {:.4g}".format(*each["interval"]) + unit
        lines.append(f"{key} = {each['value']:g} by {record['source']}: {each['exact']:.4g}{unit}, {interval}")
        if key == "optim.weight_decay":
            lines.append("  weight decay = batch / (learning rate * timescale * tokens)")
        lines.append(f"  {each['formula']} with {constants}; {each['publication']}")
    warnings = dict.fromkeys(warning for each in record["values"].values() for warning in each["warnings"])
    return lines + [f"warning: {each}" for each in warnings]


def unlike(fit: Fit, config: Config) -> list[str]:
    """In what a run is not as those were that a published law is of."""
    if not fit.details.get("published"):
        return []
    found, kind = [], config.model.parametrization.kind
    measured = "mup" if fit.quantity == "timescale" else "standard"
    if (config.optim.name, kind) != ("adamw", measured):
        found.append(
            f"the law was measured with Adam under {measured} parametrisation, and this is "
            f"{config.optim.name} under {kind}"
        )
    if config.model.experts.count:
        found.append(f"the law was measured on dense models, and this one has {config.model.experts.count} experts")
    return found


def _value(
    key: str, laws: Laws, config: Config, known: Mapping[str, float], processes: int, far: bool
) -> dict[str, Any]:
    """The record of one key. ValueError for a law that cannot tell it."""
    quantity = QUANTITIES[key]
    fit, missing = law_for(laws.fits, quantity)
    if fit is None and missing[0].code == "law":
        raise ValueError(f'{key} = "auto": {missing[0].message}')
    if fit is None:
        raise ValueError(
            f'{key} = "auto": {laws.name} has no law of {quantity}; these have: {", ".join(_telling(quantity))}'
        )
    hint = "; give schedule.horizon" if "tokens" not in known else ""
    try:
        found = settle(
            NOTHING, laws.fits, laws.bowls, known, far=far, quantities=AXES if quantity == "lr" else [quantity]
        )
    except ValueError as error:
        raise ValueError(f"{key}: {error}{hint}") from None
    warnings = [each.message for each in found.verdicts if each.level != "ok"]
    if is_too_far(found):
        raise ValueError(f"{key}: {warnings[0]}{TAKE_IT}")
    wanted = "weight_decay" if quantity == "timescale" else quantity
    if wanted not in found.proposal:
        reason = warnings[0] if warnings else "it needs the tokens of the run"
        judged = [] if far else reach([fit], known.get("flops", math.nan))
        raise ValueError(f"{key}: {reason}{TAKE_IT if any(each.level == 'failure' for each in judged) else hint}")
    estimate = found.proposal[wanted]
    if key == "batch.sequences":
        value: float = round_batch(estimate.value, config, processes)
        if not 2 / 3 < value * config.data.seq_len / estimate.value < 3 / 2:
            warnings.append(f"the mesh carries {value:,} sequences, and the law says {estimate.value:,.0f} tokens")
    else:
        value = round_rate(estimate.value)
    if key == "optim.weight_decay" and config.batch.kind != "constant" and config.batch.coupling.weight_decay == "none":
        warnings.append(
            "the batch changes in this run, and the decay is that of the first one; batch.coupling.weight_decay = "
            '"timescale" lets it follow'
        )
    warnings += unlike(fit, config)
    warnings += [f"law of {quantity} ({fit.law}): {each.message}" for each in fit.verdicts if each.level != "ok"]
    return {
        "value": value,
        "exact": estimate.value,
        "interval": [estimate.low, estimate.high] if math.isfinite(estimate.high) else None,
        **describe(fit),
        "inputs": {symbol: float(each[0]) for symbol, each in inputs_of(fit, known).items()},
        "warnings": warnings,
    }


def _config(raw: Mapping[str, Any]) -> Config:
    return Config.model_validate({name: each for name, each in raw.items() if name in Config.model_fields})


def _telling(quantity: str) -> list[str]:
    return [name for name, known in PUBLISHED.items() if quantity in known]


def _recorded(path: Path, keys: Sequence[str]) -> dict[str, float]:
    """The numbers in a run's config.toml. ValueError where it cannot be read."""
    try:
        there = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}, which has what the run took for {', '.join(keys)}, cannot be read: {error}"
        ) from None
    found = {key: _get(there, key) for key in keys}
    if missing := [key for key, value in found.items() if not isinstance(value, int | float)]:
        raise ValueError(f"{path} has no number for {missing[0]}")
    return found


def _get(raw: Any, key: str) -> Any:
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    section, name = key.split(".")
    raw[section] = {**raw[section], name: value}
