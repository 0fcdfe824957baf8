"""A branch's schedule: its parent's up to the branch point to the float, then the tail; and where none may begin."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.branching import Anneal
from launch.config import compose, dump
from runtime.state import TrainState
from runtime.timetable import branch_event, build_timetable
from schedulers import tails
from schedulers.learning_rate import Annealed, wsd
from schedulers.phases import decay_began, is_warming
from tests.corpus import tiny_run

PEAK, HORIZON, SEQUENCES, SEQ_LEN = 1e-2, 102_400, 8, 32
BATCH = SEQUENCES * SEQ_LEN
AT = 160 * BATCH
PARTS = [{"tokens": "25%", "warmup": "2%"}, {"warmup": "10%", "peak": 0.5, "decay": "10%"}]
KINDS = {
    "wsd": {},
    "constant": {"kind": "constant"},
    "cosine": {"kind": "cosine", "final": 0.1},
    "linear": {"kind": "linear_to_zero"},
    "inverse sqrt": {"kind": "inverse_sqrt"},
    "WSD-S": {"kind": "wsd_s", "periods": {"ends": ["25%", "100%"]}},
    "power": {"kind": "power", "power": {"b": -0.4}},
    "infinite": {"kind": "infinite", "tail": "exponential", "final": 0.2},
    "a sequence": {"kind": "sequence", "parts": PARTS},
    "power without an end": {"kind": "power", "horizon": None, "warmup": 512},
    "a sequence without an end": {
        "kind": "sequence",
        "horizon": None,
        "warmup": 512,
        "parts": [{"tokens": 25_600}, {"kind": "power", "jumps": True}],
    },
}


def growth(place, /, **schedule):
    return {"event": "growth", "tokens": place, "schedule": schedule}


REWARM = growth(60 * BATCH, kind="rewarm", scope="all", start=0.2, peak=1.3, tokens=10 * BATCH)
REMAP = growth(80 * BATCH, kind="remap", to=50 * BATCH)
PASTS = {"no growth": [], "a re-warm": [REWARM], "a re-warm and a remap": [REWARM, REMAP]}


def config(folder, schedule, **branch):
    made = tiny_run(folder, evaluation={"every": 1_000}, checkpoint={"every": 1_000})
    raw = made.model_dump(by_alias=True) | {"schedule": {"horizon": HORIZON, **schedule, "branch": branch}}
    return type(made).model_validate(raw)


@pytest.mark.parametrize("past", PASTS.values(), ids=PASTS)
@pytest.mark.parametrize("schedule", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tail", tails.NAMES)
def test_a_branch_of_any_kind_leaves_its_parent_at_the_same_rate_and_falls(tmp_path, schedule, past, tail):
    if "horizon" in schedule:
        past = [each for each in past if each["schedule"]["kind"] != "remap"]
    final, decay = (0.1 if tail in tails.TO_A_SHARE else 0.0), 40 * BATCH
    parent = build_timetable(config(tmp_path, schedule), past).schedule
    branch = build_timetable(config(tmp_path, schedule, at=AT, decay=decay, tail=tail, final=final), past).schedule
    assert not is_warming(parent, AT) and decay_began(parent, AT) is None
    assert all(branch(step * BATCH, BATCH) == parent(step * BATCH, BATCH) for step in range(161))
    rates = [branch(AT + step * BATCH, BATCH) for step in range(41)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 41
    assert rates[-1] == pytest.approx(final * parent(AT, BATCH), abs=1e-18)
    places = [tokens for tokens, _, _ in branch.landmarks()]
    assert places == sorted(places) and branch.landmarks()[-1][:2] == (AT + decay, "end")


@settings(deadline=None, max_examples=30)
@given(
    schedule=st.sampled_from([each for each in KINDS.values() if "horizon" not in each]),
    left=st.sampled_from([None, AT]),
    places=st.lists(st.integers(1, 190), max_size=4),
    remaps=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_loading_a_state_again_changes_no_rate(schedule, left, places, remaps):
    """Up to JSON and back, as often as one likes: the events alone make the trace."""
    changes = [{"kind": "remap", "to": 30 * BATCH}, REWARM["schedule"]]
    events = [growth(place * BATCH, **changes[not remap]) for place, remap in zip(sorted(places), remaps, strict=False)]
    if left is not None:
        events.insert(sum(each["tokens"] < AT for each in events), branch_event(AT))
    made = config(Path("absent"), schedule, **({} if left is None else {"at": AT, "decay": 40 * BATCH}))
    state = TrainState(events=events)
    once = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    twice = TrainState.from_json(json.loads(json.dumps(once.to_json())))
    assert once == twice == state
    traces = [[build_timetable(made, each.events).at(step * BATCH) for step in range(200)] for each in (state, twice)]
    assert traces[0] == traces[1]


@pytest.mark.parametrize("at", [AT, AT + 20 * BATCH], ids=["at the branch point", "in the tail"])
def test_growths_of_the_branch_itself_change_the_tail(tmp_path, at):
    made = config(tmp_path, {}, at=AT, decay=40 * BATCH)
    past = [REWARM, branch_event(AT)]
    rewarm = growth(at, kind="rewarm", scope="all", start=0.0, peak=2.0, tokens=4 * BATCH)
    remap = growth(at, kind="remap", to=AT + 30 * BATCH)
    without, rewarmed, remapped = (build_timetable(made, [*past, *own]).schedule for own in ([], [rewarm], [remap]))
    steps = range(0, AT + 40 * BATCH, BATCH)
    factors = [1.0 if n < at else 2.0 * min(1.0, (n + BATCH - at) / (4 * BATCH)) for n in steps]
    expected = [without(n, BATCH) * factor for n, factor in zip(steps, factors, strict=True)]
    assert [rewarmed(n, BATCH) for n in steps] == pytest.approx(expected, rel=1e-12)
    assert remapped(at, BATCH) == without(AT + 30 * BATCH, BATCH) < without(at, BATCH)
    assert remapped(AT + 40 * BATCH, BATCH) == 0


@pytest.mark.parametrize("at", [AT - 20 * BATCH, AT])
def test_growths_of_the_parent_are_of_what_a_branch_anneals(tmp_path, at):
    past = [growth(at, kind="remap", to=AT - 40 * BATCH)]
    parent = build_timetable(config(tmp_path, {"kind": "inverse_sqrt"}), past).schedule
    made = config(tmp_path, {"kind": "inverse_sqrt"}, at=AT, decay=40 * BATCH, tail="linear")
    branch = build_timetable(made, [*past, branch_event(AT)]).schedule
    found = [branch(AT + step * BATCH, BATCH) for step in (-1, 0, 10, 20)]
    assert found == pytest.approx(
        [parent(AT - BATCH, BATCH), *(parent(AT, BATCH) * share for share in (1, 0.75, 0.5))], rel=1e-12
    )


def test_a_remap_needs_the_end_towards_which_it_goes(tmp_path):
    remap = [growth(60 * BATCH, kind="remap", to=50 * BATCH)]
    for schedule, message in (
        ({"kind": "constant", "horizon": None, "warmup": 512}, "schedule.horizon, which is not given"),
        ({"horizon": 55 * BATCH}, "the growth at 15,360 tokens: a remap with at = 15,360 is impossible"),
    ):
        with pytest.raises(ValueError, match=message):
            build_timetable(config(tmp_path, schedule), remap)


def test_a_branch_survives_its_file_and_ends_where_its_tail_does(tmp_path):
    for number, schedule in enumerate(KINDS.values()):
        made = config(tmp_path, schedule, at=AT, decay=40 * BATCH, tail="square", final=0.05)
        assert made.end == made.schedule.end == 200 * BATCH
        path = tmp_path / f"{number}.toml"
        path.write_text(dump(made))
        assert compose(path).model_dump(exclude={"growth", "law"}) == made.model_dump()


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        ({"at": AT}, "belong together"),
        ({"decay": 10}, "belong together"),
        ({"at": 0, "decay": 10}, "greater than 0"),
        ({"at": AT, "decay": 0}, "greater than 0"),
        ({"at": AT, "decay": 10, "tail": "exponential"}, "never reaches zero; give final above 0"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(tmp_path, branch, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, {"kind": "constant"}, **branch)


@pytest.mark.parametrize(
    ("schedule", "events", "tokens", "began"),
    [
        ({}, [], 81_920, None),
        ({}, [], 81_921, 81_920),
        ({"decay": 0}, [], HORIZON, None),
        ({"kind": "cosine"}, [], 102_000, None),
        ({"kind": "linear_to_zero"}, [], 102_000, None),
        ({"kind": "wsd_s", "periods": {"ends": ["50%", "100%"]}}, [], 46_080, None),
        ({"kind": "wsd_s", "periods": {"ends": ["50%", "100%"]}}, [], 51_199, 46_080),
        ({"kind": "wsd_s", "periods": {"ends": ["50%", "100%"]}}, [], 51_200, None),
        ({"kind": "wsd_s", "periods": {"ends": ["50%", "100%"]}}, [], 102_400, 97_280),
        ({"kind": "sequence", "parts": PARTS}, [], 92_160, None),
        ({"kind": "sequence", "parts": PARTS}, [], 97_000, 92_160),
        ({}, [REWARM], 90_000, 81_920),
        # From 51,200 on as from 76,800, at half the pace: the tail begins after 10,240 instead of 5,120 tokens.
        ({}, [growth(51_200, kind="remap", to=76_800), REWARM], 61_440, None),
        ({}, [growth(51_200, kind="remap", to=76_800), REWARM], 61_442, 61_440),
        ({}, [growth(51_200, kind="remap", to=92_160)], 51_200, 51_200),
    ],
)
def test_where_a_decay_has_begun(tmp_path, schedule, events, tokens, began):
    assert decay_began(build_timetable(config(tmp_path, schedule), events).schedule, tokens) == began


def test_what_is_being_warmed_up(tmp_path):
    parts = [PARTS[0], PARTS[1] | {"peak": 2.0}]
    rate = build_timetable(config(tmp_path, {"kind": "sequence", "parts": parts}), []).schedule
    warming = [step for step in range(400) if is_warming(rate, step * BATCH)]
    assert warming == [*range(8), *range(100, 140)]
    rewarmed = build_timetable(config(tmp_path, {}), [REWARM]).schedule
    assert [step for step in range(8, 320) if is_warming(rewarmed, step * BATCH)] == list(range(60, 70))


@pytest.mark.parametrize(
    ("decay", "at", "length", "label"),
    [
        ("10%", 90_000_000, 10_000_000, "decay-10pct-1-sqrt"),
        ("50%", 7, 7, "decay-50pct-1-sqrt"),
        ("2.5%", 39_000, 1_000, "decay-2.5pct-1-sqrt"),
        ("0.001%", 10, 1, "decay-0.001pct-1-sqrt"),
        ("20M", 1, 20_000_000, "decay-20000000-1-sqrt"),
    ],
)
def test_the_length_of_a_decay(decay, at, length, label):
    chosen = Anneal(decay)
    assert (chosen.length(at), chosen.label()) == (length, label)


@pytest.mark.parametrize("decay", ["0%", "100%", "120%", "0", "-1", "many", "", "1.5", "10 %%"])
def test_a_length_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="--decay"):
        Anneal(decay)


@settings(deadline=None)
@given(share=st.integers(1, 90), at=st.integers(10_000, 10**12))
def test_a_share_is_that_of_a_run_which_was_to_end_there(share, at):
    """A branch of 10 % is the WSD run whose decay is 10 % of its horizon."""
    length = Anneal(f"{share}%").length(at)
    assert abs(length - Fraction(share, 100) * (at + length)) <= 1
    whole = wsd(1.0, 100, at + length, length)
    branch = Annealed(wsd(1.0, 100, 3 * at, at), at + length, length)
    assert all(branch(tokens, 64) == whole(tokens, 64) for tokens in (0, at, at + length // 3, at + length))
