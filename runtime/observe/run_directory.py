"""The folder of a run: its configuration, its identity and its logs."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from runtime.observe.jsonl import JsonLines


class RunDirectory:
    """``runs/<name>``, written by rank 0 alone. Nothing appears on disk before the first write."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.evaluations = JsonLines(self.path / "evaluations.jsonl")
        self.events = JsonLines(self.path / "events.jsonl")
        self.health = JsonLines(self.path / "health.jsonl")

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def write_config(self, text: str) -> None:
        """Keep the resolved configuration as config.toml."""
        write_atomically(self.path / "config.toml", text)

    def read_identity(self) -> dict[str, Any]:
        """The contents of run.json, empty for a new run. ValueError if it is not a JSON object."""
        path = self.path / "run.json"
        if not path.exists():
            return {}
        try:
            identity = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(identity, dict):
            raise ValueError(f"{path} does not hold a JSON object")
        return identity

    def write_identity(self, identity: dict[str, Any]) -> None:
        write_atomically(self.path / "run.json", json.dumps(identity, indent=2) + "\n")

    def close(self) -> None:
        for lines in (self.metrics, self.evaluations, self.events, self.health):
            lines.close()


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a kill, sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
