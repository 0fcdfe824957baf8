"""Names of checkpoints, their order, and which of them stay."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(r"tokens-(\d+)-segment-(\d+)(?:-revision-(\d+))?")


class Position(NamedTuple):
    """Where in a run a checkpoint stands; positions compare by age. A later save of the same point is a revision."""

    tokens: int
    segment: int
    revision: int = 0

    def __str__(self) -> str:
        suffix = f"-revision-{self.revision}" if self.revision else ""
        return f"tokens-{self.tokens}-segment-{self.segment}{suffix}"


def parse(name: str) -> Position | None:
    """The position that a folder's name tells, or None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    position = Position(int(match[1]), int(match[2]), int(match[3] or 0))
    return position if str(position) == name else None


def by_age(names: Iterable[str]) -> list[str]:
    """The names of checkpoints among `names`, oldest first."""
    return [str(position) for position in sorted(filter(None, map(parse, names)))]


def kept(names: Iterable[str], keep_last: int, keep_every: int | None, keep_at: Iterable[int] = ()) -> set[str]:
    """The names that stay: the last `keep_last` points of the run, and for each multiple of `keep_every` tokens
    (zero is none) and each of `keep_at` the first point at or past it. Of a point saved more than once only the last
    revision counts.
    """
    latest = {(position.tokens, position.segment): position for position in map(parse, by_age(names)) if position}
    positions = list(latest.values())
    milestones: dict[int, Position] = {}
    for position in positions if keep_every else []:
        milestones.setdefault(position.tokens // keep_every, position)
    milestones.pop(0, None)
    named = [next((each for each in positions if each.tokens >= tokens), None) for tokens in keep_at]
    return {str(each) for each in [*positions[-keep_last:], *milestones.values(), *filter(None, named)]}
