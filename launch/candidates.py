"""A growth in one line of text: "depth.stack factor=2 then noise alpha=0.2 moments=keep schedule.kind=rewarm"."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from growth.plan import Step
from launch.growth_config import GrowthConfig
from runtime.units import resolve_shares

SETTINGS = tuple(key for key in GrowthConfig.model_fields if key not in ("at", "operator", "options", "then"))
"""Keys of a `[[growth]]` entry that a candidate may set; every other key is an option of the operator before it."""

_WORD = re.compile(r"""(?:[^\s\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""")


@dataclass(frozen=True)
class Candidate:
    """One way to grow: its text, and the `[[growth]]` entry that it stands for, without a time."""

    text: str
    entry: dict[str, Any]

    @property
    def config(self) -> GrowthConfig:
        """The entry, validated, at token 0."""
        return GrowthConfig.model_validate({"at": 0, **self.entry})

    def entry_at(self, tokens: int, end: int | None) -> dict[str, Any]:
        """The entry of a growth after `tokens`, its shares in tokens where the run has an end."""
        entry = {"at": tokens, **self.entry}
        return entry if end is None else resolve_shares(GrowthConfig, entry, end)

    @property
    def operators(self) -> tuple[str, ...]:
        return tuple(step.operator for step in self.config.steps)


def parse_candidate(text: str) -> Candidate:
    """A candidate from an operator's name and ``key=value`` words, further operators each after the word ``then``.

    Values are TOML where they parse, and text where they do not. ValueError that names the candidate and what is wrong
    with it.
    """
    if _WORD.sub("", text).strip():
        raise ValueError(f"candidate {text!r}: a bracket or a quote is not closed")
    steps: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    begins = True
    for word in _WORD.findall(text):
        if begins:
            steps.append({"operator": word, "options": {}})
        elif word != "then":
            _assign(word, steps[-1]["options"], settings, text)
        begins = word == "then" and not begins
    if begins:
        raise ValueError(f"candidate {text!r}: an operator's name is missing at its end")
    entry = steps[0] | ({"then": steps[1:]} if steps[1:] else {}) | settings
    candidate = Candidate(" ".join(text.split()), entry)
    try:
        assert candidate.config
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"candidate {text!r}: {key + ': ' if key else ''}{message}") from None
    return candidate


def of_steps(steps: Sequence[Step]) -> Candidate:
    """The candidate of these operators with their options."""
    texts = [" ".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in steps]
    (first, *then) = [{"operator": name, "options": options} for name, options in steps]
    return Candidate(" then ".join(texts), first | ({"then": then} if then else {}))


def _assign(word: str, options: dict[str, Any], settings: dict[str, Any], text: str) -> None:
    """Put ``key=value`` where it belongs; the keys of a setting's own section follow it after a dot."""
    name, equals, value = word.partition("=")
    *sections, key = name.split(".")
    is_setting = (*sections, key)[0] in SETTINGS
    if not equals or not all((*sections, key)) or (sections and not is_setting):
        raise ValueError(
            f"candidate {text!r}: {word!r} is not an option key=value, nor a setting among {', '.join(SETTINGS)}"
        )
    target = settings if is_setting else options
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ValueError(f"candidate {text!r}: {word!r} sets a key of {section}, which has a value of its own")
    if key in target:
        raise ValueError(f"candidate {text!r}: {name} is given twice")
    target[key] = _value(value)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
