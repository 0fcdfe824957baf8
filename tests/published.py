"""Published tables, which lie beside the project and are never a part of it."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MERISTEM_DATA") or Path(__file__).parents[2] / "shared" / "data")


def published(name: str) -> Path:
    """The path of a published table, such as "steplaw/dense_lr_bs_loss.csv"; the test is skipped where it is absent."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"the published table {name} is not here")
    return path
