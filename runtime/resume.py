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
}
"""Sections, or keys of them, that decide the trajectory. Mesh, micro-batch, recomputation, logging, checkpoint and
evaluation cadence are free; the data's sources have a rule of their own."""


def refuse_changes(stored: dict[str, Any], config: Config, checkpoint: str) -> None:
    """ValueError that names the first key in which a stored configuration and this one decide differently."""
    current = config.model_dump(mode="json", by_alias=True)
    for section, keys in FROZEN.items():
        before, now = stored.get(section, {}), current[section]
        for key in keys or sorted(now.keys() | before.keys()):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{section}.{key} = {now.get(key)!r}, but the run in {checkpoint} was trained with "
                    f"{before.get(key)!r}; put it back, or begin a new run from it by start.from"
                )
