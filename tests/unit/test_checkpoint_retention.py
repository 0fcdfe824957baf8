"""Which checkpoints stay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint.retention import Position, by_age, kept, parse


def names(*tokens: int) -> list[str]:
    return [f"tokens-{each}-segment-0" for each in tokens]


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("tokens-0-segment-0", Position(0, 0)),
        ("tokens-1500000000000-segment-12", Position(1_500_000_000_000, 12)),
        ("tokens-5-segment-1-revision-2", Position(5, 1, 2)),
        ("tokens-5-segment-1-revision-0", None),
        ("tokens-05-segment-1", None),
        ("tokens--5-segment-1", None),
        ("tokens-5", None),
        ("tokens-5-segment-1.tmp", None),
        ("tokens-5-segment-1\n", None),
        ("tensorboard", None),
        ("", None),
    ],
)
def test_a_name_tells_its_position_or_is_not_one(name: str, position: Position | None):
    assert parse(name) == position
    assert position is None or str(position) == name


def test_age_is_numeric_by_tokens_then_segment_then_revision():
    ordered = [*names(9, 10), "tokens-10-segment-0-revision-1", "tokens-10-segment-1", *names(100)]
    assert by_age([*reversed(ordered), "lost+found"]) == ordered


@pytest.mark.parametrize(
    ("tokens", "keep_last", "keep_every", "stay"),
    [
        ([], 2, None, []),
        ([1], 2, None, [1]),
        ([1, 2, 3], 2, None, [2, 3]),
        ([10, 20, 30, 40, 50], 1, 20, [20, 40, 50]),
        ([15, 30, 45, 60, 75], 1, 20, [30, 45, 60, 75]),
        ([50, 60, 70], 1, 20, [50, 60, 70]),
        ([50, 55, 60], 1, 20, [50, 60]),
        ([0, 5, 10], 1, 20, [10]),
        ([0, 20, 30], 1, 20, [20, 30]),
    ],
)
def test_the_last_and_the_first_past_each_multiple_stay(tokens, keep_last, keep_every, stay):
    assert by_age(kept(names(*tokens), keep_last, keep_every)) == names(*stay)


@pytest.mark.parametrize(
    ("tokens", "keep_at", "stay"),
    [
        ([10, 20, 30, 40], [20], [20, 40]),
        ([10, 20, 30, 40], [15, 20], [20, 40]),
        ([10, 20, 30, 40], [5, 25], [10, 30, 40]),
        ([10, 20, 30, 40], [50], [40]),
        ([], [5], []),
    ],
)
def test_the_first_past_each_named_point_stays(tokens, keep_at, stay):
    assert by_age(kept(names(*tokens), 1, None, keep_at)) == names(*stay)


def test_of_a_point_saved_again_only_the_last_revision_stays():
    again = ["tokens-20-segment-0-revision-1", "tokens-20-segment-0-revision-2"]
    assert kept([*names(10, 20), *again, *names(30)], 2, None) == {again[1], *names(30)}


@settings(deadline=None)
@given(st.sets(st.integers(1, 2000), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 500))
def test_removing_at_every_save_keeps_what_removing_once_would(tokens: set[int], keep_last: int, keep_every: int):
    """What stays depends on the checkpoints that were made, not on when retention ran."""
    made, alive = [], set()
    for each in sorted(tokens):
        made += names(each)
        alive = kept(alive | set(names(each)), keep_last, keep_every)
    assert alive == kept(made, keep_last, keep_every)
    firsts = {min(t for t in tokens if t >= m) for m in range(keep_every, max(tokens) + 1, keep_every)}
    assert alive == set(names(*firsts, *sorted(tokens)[-keep_last:]))
