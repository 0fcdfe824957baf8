"""What may change when a run is resumed, and what may not."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from runtime.batch_config import BatchConfig
from runtime.config import Config

FROZEN = {
    "run": ("seed",),
    "model": None,
    "data": ("seq_len", "document_mask"),
    "batch": tuple(set(BatchConfig.model_fields) - {"micro_sequences"}),
    "optim": None,
    "schedule": None,
    "guard": ("window",),
}
"""Sections, or keys of them, that decide the trajectory. Mesh, micro-batch, recomputation, logging, checkpoint and
evaluation cadence are free; the data's sources have a rule of their own."""


def refuse_changes(stored: dict[str, Any], config: Config, checkpoint: str) -> None:
    """ValueError that names every key in which a stored configuration and this one decide differently."""
    changed = _changed(stored, config, FROZEN | _measured(config.batch))
    if changed:
        raise ValueError(
            f"{', '.join(sorted(changed))}: the run's {checkpoint} was trained otherwise; put it back, or begin a new "
            "run from it, with another run.name and start.from"
        )


def has_schedule(stored: dict[str, Any], config: Config) -> bool:
    """Whether a configuration has the schedule of a stored one, a branch's tail included."""
    return not _changed(stored, config, {"schedule": None})


def _changed(stored: dict[str, Any], config: Config, sections: Mapping[str, Sequence[str] | None]) -> list[str]:
    """The keys of these sections, all or those named, that differ, with both values."""
    current = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [
        f"{section}.{key} = {current[section].get(key)!r} (was {before!r})"
        for section, keys in sections.items()
        for key in keys or current[section].keys() | stored.get(section, {}).keys()
        if (before := _stored(stored.get(section, {}), section, key)) != current[section].get(key)
    ]


def _measured(batch: BatchConfig) -> dict[str, Sequence[str] | None]:
    """What decides the batch where it is measured."""
    if batch.kind == "branch_probe":
        return {"evaluation": ("sets", "max_sequences")}
    return {"noise_scale": None} if batch.is_measured else {}


def refuse_other_optimizer(stored: dict[str, Any], config: Config, checkpoint: str) -> None:
    """ValueError where a run would begin with the state of an optimizer that is not its own."""
    theirs = stored.get("optim", {}).get("name", config.optim.name)
    if theirs != config.optim.name:
        raise ValueError(
            f'start.carry = "all" takes the optimizer\'s state, and {checkpoint} has that of optim.name = "{theirs}", '
            f'not of "{config.optim.name}"; accepted: that name, or start.carry = "weights"'
        )


def _stored(values: dict[str, Any], section: str, key: str) -> Any:
    """A key's value in a checkpoint, by default where it does not name it, because it was None or is younger than the
    checkpoint."""
    field = Config.model_fields[section].annotation.model_fields.get(key)
    default = None if field is None or field.is_required() else field.default
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json", exclude_none=True) | values.get(key, {})
    return values.get(key, default)
