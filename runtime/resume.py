"""What may change when a run is resumed, and what may not."""

from typing import Any

from runtime.config import Config

FROZEN = {
    "run": ("seed",),
    "model": None,
    "data": ("seq_len", "document_mask"),
    "batch": ("sequences",),
    "optim": None,
    "schedule": None,
    "guard": ("window",),
}
"""Sections, or keys of them, that decide the trajectory. Mesh, micro-batch, recomputation, logging, checkpoint and
evaluation cadence are free; the data's sources have a rule of their own."""


def refuse_changes(stored: dict[str, Any], config: Config, checkpoint: str) -> None:
    """ValueError that names every key in which a stored configuration and this one decide differently."""
    current = config.model_dump(mode="json", by_alias=True)
    changed = [
        f"{section}.{key} = {current[section].get(key)!r} (was {stored.get(section, {}).get(key)!r})"
        for section, keys in FROZEN.items()
        for key in keys or current[section].keys() | stored.get(section, {}).keys()
        if stored.get(section, {}).get(key) != current[section].get(key)
    ]
    if changed:
        raise ValueError(
            f"{', '.join(sorted(changed))}: the run's {checkpoint} was trained otherwise; put it back, or begin a new "
            "run from it, with another run.name and start.from"
        )
