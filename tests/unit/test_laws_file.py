"""laws.json gives back what was written, and refuses what is not one."""

import json
import math
import re
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.laws_file import FORMAT, read, write
from scaling.results import Analysis, Bowl, Decision, Estimate, HeldOut, Plateau, Verdict
from scaling.table import RunTable, tidy
from tests.fits import STEP_RATE, batch_fit, fit, loss_fit, rate_fit

SPELLED = "lr = c * N^a * D^b"
INFINITE = Estimate(0.1, -math.inf, math.inf)


def analysis(**changes) -> Analysis:
    frame = pd.DataFrame({"run": ["inf", None, "<b>"], "total": [1e8, None, 0.1 + 0.2], "loss": [3.1, math.inf, 2.9]})
    known = {
        "table": RunTable(tidy(frame), {"total": "params"}, ("a note",), "abc"),
        "used": np.array([True, False, True]),
        "gates": (Verdict("warning", "status", "1 run diverged"),),
        "fits": (loss_fit(), rate_fit(fixed={"b": 0.307}), batch_fit(), fit(SPELLED, STEP_RATE)),
        "held_out": (HeldOut("chinchilla", "total", "largest compute", 30, 10, 0.01, 0.001, -0.002, math.nan),),
        "bowls": (
            Bowl({"N": 1e8, "D": 1e9}, 9, INFINITE, None, 2.5, censored={"lr": "below"}, best={"lr": 1e-3}),
            Bowl({"N": 2e8}, 0, None, None, math.nan, curvature=(0.1, 0.2, 0.3)),
        ),
        "decisions": (
            Decision(
                {"C": 1e21}, {"lr": INFINITE}, {"lr": Plateau(1e-4, 1e-3)}, math.nan, 12.5, (Verdict("ok", "a", ""),)
            ),
        ),
        "frontier": {"a": 0.49, "points": [[1.0, None], ["inf", "text"]]},
        "provenance": {"command": "fit", "seed": 3, "nothing": None},
    }  # fmt: skip
    return Analysis(**known | changes)


def same(ours, theirs) -> bool:
    """Equal to the last bit, NaN being NaN."""
    if is_dataclass(ours):
        return all(same(getattr(ours, each.name), getattr(theirs, each.name)) for each in fields(ours))
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=ours.dtype != bool)
    if isinstance(ours, pd.DataFrame):
        return ours.equals(theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs or (isinstance(ours, float) and math.isnan(ours) and math.isnan(theirs))


def test_what_is_read_is_what_was_written(tmp_path):
    written = replace(analysis(), frontier={"a": 0.49, "points": [[1.0, None], [math.inf, "text"]]})
    write(tmp_path / "new" / "laws.json", written)
    found = read(tmp_path / "new" / "laws.json")
    assert same(written, found)
    assert found.best("lr").law == "step_law_lr" and found.path.endswith("laws.json") and len(found.sha256) == 64


@given(st.lists(st.floats(width=64), min_size=1))
@settings(max_examples=50, deadline=None)
def test_every_float_survives(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("laws") / "laws.json"
    written = analysis(fits=(), decisions=tuple(Decision({}, {}, {}, each, each) for each in numbers))
    write(path, written)
    assert same(written.decisions, read(path).decisions)


def test_the_file_is_strict_json(tmp_path):
    write(tmp_path / "laws.json", analysis())
    contents = json.loads((tmp_path / "laws.json").read_text(), parse_constant=pytest.fail)
    assert contents["decisions"][0]["regret"] is None
    assert contents["decisions"][0]["proposal"]["lr"]["high"] == "inf"
    assert contents["table"]["columns"]["total"][1] is None


def test_an_analysis_of_nothing_is_one(tmp_path):
    nothing = Analysis(RunTable(pd.DataFrame()), np.empty(0, dtype=bool), (), ())
    write(tmp_path / "laws.json", nothing)
    assert same(replace(nothing, provenance={}), read(tmp_path / "laws.json"))


def test_a_fit_without_draws_keeps_their_shape(tmp_path):
    write(tmp_path / "laws.json", analysis(fits=(replace(rate_fit(), draws=np.empty((0, 3))),)))
    assert read(tmp_path / "laws.json").fits[0].draws.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"fits": (replace(rate_fit(), coordinates=np.zeros(2)),)}, "fits.0: law 'step_law_lr' has 3 parameters"),
        ({"fits": (replace(rate_fit(), coordinates=np.array([1.0, np.nan, 0.0])),)}, "fits.0: coordinates and draws"),
        ({"fits": (loss_fit(), replace(rate_fit(), rows="many"))}, "fits.1.rows"),
        ({"gates": (Verdict("fine", "rows", ""),)}, "gates.0.level"),
        ({"used": np.array([True, False])}, "used has 2 entries for 3 rows"),
        ({"fitted": (1, 3)}, "fitted names row 3"),
        ({"bowls": (Bowl({"N": 1e8}, 2, None, None, 3.0, censored={"lr": "beside"}),)}, "bowls.0.censored.lr"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, changes, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        write(tmp_path / "laws.json", analysis(**changes))
    assert not list(tmp_path.iterdir())


def test_only_columns_that_laws_know_are_kept(tmp_path):
    wide = pd.DataFrame({"loss": [1.0], **{f"column {number}": [1.0] for number in range(1000)}})
    write(tmp_path / "laws.json", analysis(table=RunTable(wide), used=np.array([True])))
    assert list(read(tmp_path / "laws.json").table.frame) == ["loss"]


def damaged(change) -> str:
    """The text of a good file after a change of its contents."""

    def text(good: str) -> str:
        contents = json.loads(good)
        change(contents)
        return json.dumps(contents)

    return text


DAMAGES = {
    "cut": (lambda good: good[:-100], "not JSON"),
    "empty": (lambda good: "", "not JSON"),
    "NaN": (lambda good: good.replace('"regret": null', '"regret": NaN'), "an unknown number is null"),
    "overflow": (lambda good: good.replace('"regret": null', '"regret": 1e999'), "an unknown number is null"),
    "huge": (lambda good: good.replace('"regret": null', f'"regret": {10**400}'), "regret"),
    "list": (lambda good: "[1]", "not a laws file"),
    "foreign": (lambda good: '{"run": "tiny"}', "not a laws file"),
    "binary": (lambda good: "\x00\x01", "not JSON"),
    "deep": (lambda good: "[" * 100000, "not JSON"),
    "version": (damaged(lambda c: c.update(version=2)), "version 2 of the format is not known here; accepted: 1"),
    "unknown law": (damaged(lambda c: c["fits"][0].update(law="mine")), "fits.0: law 'mine' is not known"),
    "unknown key": (damaged(lambda c: c["fits"][0].update(colour=1)), "fits.0.colour: Extra inputs"),
    "missing": (damaged(lambda c: c["fits"][1].pop("draws")), "fits.1.draws: Field required"),
    "text": (damaged(lambda c: c["bowls"][0].update(loss="2.5")), "bowls.0.loss: accepted is a number"),
    "bool": (damaged(lambda c: c["bowls"][0].update(loss=True)), "bowls.0.loss: accepted is a number"),
    "fraction": (damaged(lambda c: c["bowls"][0].update(runs=1.5)), "bowls.0.runs"),
    "ragged": (damaged(lambda c: c["fits"][0]["draws"][3].pop()), "fits.0.draws: the rows differ in length"),
    "shape": (damaged(lambda c: c["fits"][0]["coordinates"].pop()), "has 5 parameters"),
    "infinite": (damaged(lambda c: c["fits"][0]["coordinates"].__setitem__(0, "inf")), "are to be finite"),
    "rows": (damaged(lambda c: c["used"].pop()), "used has 2 entries for 3 rows"),
    "columns": (damaged(lambda c: c["table"]["columns"]["run"].pop()), "the columns differ in length"),
    "side": (damaged(lambda c: c["bowls"][0].update(censored={"lr": "left"})), "bowls.0.censored.lr"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_named_with_what_is_wrong(tmp_path, damage):
    path = tmp_path / "laws.json"
    write(path, analysis())
    change, said = DAMAGES[damage]
    text = change(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"laws.json: .*{said}"):
        read(path)


def test_many_mistakes_are_counted(tmp_path):
    (tmp_path / "laws.json").write_text(json.dumps({"format": FORMAT, "version": 1, "gates": [{}, {}, {}]}))
    with pytest.raises(ValueError, match="and 9 more"):
        read(tmp_path / "laws.json")


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the laws file .*no\.json: No such file"):
        read(tmp_path / "no.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "laws.json"
    write(path, analysis())
    old = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*laws\.json: No space left"):
        write(path, analysis(fits=()))
    assert path.read_text() == old and list(tmp_path.iterdir()) == [path]


def test_a_thousand_draws_are_one_line(tmp_path):
    write(tmp_path / "laws.json", analysis())
    assert len((tmp_path / "laws.json").read_text().splitlines()) < 40
