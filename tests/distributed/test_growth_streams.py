"""Streams given to a running run and to a checkpoint: a backbone that is frozen, and thawed later."""

import contextlib
import io

import pytest
import torch

from launch.grow import main as grow
from runtime.checkpoint.unsharded import UnshardedCheckpoint
from runtime.model.config import ModelConfig
from runtime.model.parametrization import is_trained, role
from tests.corpus import write_corpus
from tests.distributed.test_growth_live import BATCH, GROWS_AT, checkpoint, train, write_run

ADD = {
    "operator": "streams.add",
    "options": {"count": 2, "prefix_tokens": 5, "quiet": True, "backbone": "frozen"},
}
THAW = {"operator": "streams.backbone", "options": {"to": "trained"}, "at": 9 * BATCH}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """A run of one stream, then two with a frozen backbone, then two."""
    folder = tmp_path_factory.mktemp("streams")
    write_corpus(folder / "data" / "train")
    write_corpus(folder / "data" / "heldout", documents=20, seed=1)
    return train(write_run(folder, "chain", ADD, THAW, run={"until": 12 * BATCH}), request.param)


def weights(stored, section="model"):
    return {name.partition(".")[2]: stored[name] for name in stored if name.startswith(f"{section}.")}


def changed(before, after, section="model"):
    """Parameters that differ."""
    one, other = weights(before, section), weights(after, section)
    return {name for name in other if not torch.equal(one[name], other[name])}


def trained(stored):
    model = ModelConfig(**stored.state["model"])
    return {name for name in weights(stored) if is_trained(role(name), model)}


def test_a_frozen_backbone_stays_and_has_no_optimizer_state_until_it_is_thawed(run):
    added, frozen = checkpoint(run, GROWS_AT, 1), checkpoint(run, 9 * BATCH, 1)
    thawed, last = checkpoint(run, 9 * BATCH, 2), checkpoint(run, 12 * BATCH, 2)
    for stored, is_frozen in ((added, True), (frozen, True), (thawed, False), (last, False)):
        with_state = {name.removeprefix("optimizer.").rpartition(".")[0] for name in stored if "optimizer." in name}
        assert with_state == trained(stored)
        assert ("blocks.0.attention.q_proj.weight" in with_state) is not is_frozen
    assert changed(added, frozen) == trained(added) and trained(added) < set(weights(added))
    assert changed(frozen, thawed) == set()
    assert changed(thawed, last) == set(weights(last))
    assert bool((thawed["optimizer.norm.weight.exp_avg"] == 0).all()) and thawed["optimizer.norm.weight.step"] == 0
    assert thawed["optimizer.aggregation.aggregation_out.bias.step"] == 3
    assert changed(thawed, last, "ema") == set(weights(last))


def test_a_checkpoint_is_grown_as_the_run_was(run, tmp_path):
    """Between runs it writes what the run has after its growth, but for what is drawn, which has another label."""
    source = run / "checkpoints" / f"tokens-{GROWS_AT}-segment-0"
    options = [each for key, value in ADD["options"].items() for each in (f"--{key.replace('_', '-')}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        assert grow([str(source), str(tmp_path / "grown"), "--operator", "streams.add", *options]) == 0
        thaw = ["--operator", "streams.backbone", "--to", "trained"]
        assert grow([str(tmp_path / "grown"), str(tmp_path / "thawed"), *thaw]) == 0
        one = ["--operator", "streams.keep", "--count", "1"]
        assert grow([str(tmp_path / "grown"), str(tmp_path / "one"), *one]) == 0
    found = {}
    for name in ("grown", "thawed", "one"):
        (path,) = (tmp_path / name / "checkpoints").iterdir()
        found[name] = UnshardedCheckpoint(path)
    live = checkpoint(run, GROWS_AT, 1)
    assert set(found["grown"]) == {name for name in live if not name.startswith("guard.")}
    assert trained(found["grown"]) == trained(live) and trained(found["thawed"]) == set(weights(live))
    for name in found["grown"]:
        assert torch.equal(found["grown"][name], live[name]) or ("prefix" in name or "aggregation" in name), name
        assert torch.equal(found["thawed"][name], found["grown"][name])
    assert bool((found["thawed"]["optimizer.norm.weight.exp_avg_sq"] == 0).all())
    before = checkpoint(run, GROWS_AT, 0)
    assert changed(before, found["one"]) == set() and set(weights(before)) == set(weights(found["one"]))
    assert bool((found["one"]["optimizer.norm.weight.exp_avg_sq"] == 0).all())
