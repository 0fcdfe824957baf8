"""What a path means to somebody who wants to open a checkpoint."""

from pathlib import Path

import pytest
import torch

from runtime.checkpoint.store import CheckpointStore
from runtime.checkpoint.unsharded import UnshardedCheckpoint, open_unsharded, split

OLD, NEW = "tokens-9-segment-0", "tokens-10-segment-0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for value, name in enumerate((OLD, NEW)):
        tensors = {"model.a": torch.full((2,), float(value)), "model.b": torch.zeros(3), "ema.a": torch.ones(2)}
        store.save(name, tensors, {"value": value}, asynchronous=False)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("", None, 1),
        ("/", None, 1),
        ("/checkpoints", None, 1),
        (f"/checkpoints/{OLD}", OLD, 0),
        (f"/checkpoints/{NEW}/", NEW, 1),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_a_run_its_checkpoints_or_one_of_them(run: Path, scheme: str, path: str, name: str | None, value: int):
    location, found = split(f"{scheme}{run}{path}")
    assert location == f"{scheme}{run}/checkpoints" and found == name
    tensors, state = open_unsharded(f"{scheme}{run}{path}")
    assert state == {"value": value} and tensors["model.a"].eq(value).all()


def test_a_relative_path(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run / "checkpoints")
    assert split(OLD) == (".", OLD)
    assert split(".") == (".", None)
    monkeypatch.chdir(run.parent)
    assert open_unsharded("run")[1] == {"value": 1}


def test_a_copied_and_renamed_checkpoint(run: Path):
    (run / "checkpoints" / OLD).rename(run.parent / "best")
    assert open_unsharded(run.parent / "best")[1] == {"value": 0}


def test_a_prefix_selects_tensors_under_their_full_names(run: Path):
    assert set(open_unsharded(run, prefix="model.")[0]) == {"model.a", "model.b"}
    assert set(open_unsharded(run, prefix="ema.")[0]) == {"ema.a"}
    assert set(UnshardedCheckpoint(run)) == {"model.a", "model.b", "ema.a"}


@pytest.mark.parametrize("path", ["nowhere", "run/nowhere", "empty", "file", "run/checkpoints/tokens-7-segment-0"])
@pytest.mark.parametrize("scheme", ["", "local://", "memory://"])
def test_a_path_without_a_checkpoint_is_refused_by_name(run: Path, scheme: str, path: str):
    (run.parent / "empty").mkdir()
    (run.parent / "file").write_text("")
    with pytest.raises(ValueError, match=path):
        open_unsharded(f"{scheme}{run.parent}/{path}")


def test_an_interrupted_save_is_not_opened(run: Path):
    (run / "checkpoints" / NEW / "manifest.json").unlink()
    assert open_unsharded(run)[1] == {"value": 0}
    with pytest.raises(ValueError, match=NEW):
        open_unsharded(run / "checkpoints" / NEW)
