"""From a TOML preset and dotted overrides to one validated configuration."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from launch.growth_config import RunConfiguration, segments
from runtime.config import Config


def compose(path: str | Path, overrides: list[str] = (), processes: int | None = None) -> RunConfiguration:
    """Read a preset, apply ``section.key=value`` overrides, resolve "auto" and shares of the horizon.

    `processes` that are to share a batch which is "auto"; by default as many as torchrun has started.
    Raises ValueError with one line for each mistake, naming the key, the value and what is accepted.
    """
    return validated(read(path), overrides, path, processes)


def read(path: str | Path) -> dict[str, Any]:
    """The raw sections of a file. ValueError if it cannot be read, or is not TOML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {_reason(error)}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, or what Python refuses to parse
        raise ValueError(f"{path} is not TOML: {error}") from None


def validated(
    raw: dict[str, Any], overrides: Sequence[str], where: str | Path, processes: int | None = None
) -> RunConfiguration:
    """The configuration that raw sections mean, with overrides over them; `where` they are from, for messages.

    ValueError as of `compose`. `raw` is changed.
    """
    for override in overrides:
        _apply(raw, override)
    record = _resolve_auto(raw, processes or int(os.environ.get("WORLD_SIZE", 1)))
    try:
        config = RunConfiguration.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(each) for each in error.errors(include_url=False)]
        raise ValueError(f"{where}: " + "\n  ".join(lines)) from None
    try:
        segments(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    config.remember_law(record)
    return config


def dump(config: Config) -> str:
    """The configuration as TOML that `compose` reads back to the same value."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in place; the value is TOML where it parses and text where it does not."""
    name, equals, value = override.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key or not (sections or key == "growth"):
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    target: Any = raw
    for part in sections:
        target = _member(target, part, override)
    if isinstance(target, list):
        target[_index(target, key, override)] = _value(value)
    elif isinstance(target, dict):
        target[key] = _value(value)
    else:
        raise ValueError(f"override {override!r}: {'.'.join(sections)} is a value, not a section")


def _member(target: Any, part: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, override)]
    if not isinstance(target, dict):
        raise ValueError(f"override {override!r}: {part!r} is not inside a section")
    return target.setdefault(part, {})


def _index(target: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ValueError(f"override {override!r}: {part!r} is not one of the entries 0 to {len(target) - 1}")
    return int(part)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _resolve_auto(raw: dict[str, Any], processes: int) -> dict[str, Any] | None:
    """model.vocab_size = "auto" becomes the size of the tokenizer's vocabulary; what else is "auto" what a law says of
    it, whose record is returned."""
    model = raw.get("model")
    if isinstance(model, dict) and model.get("vocab_size") == "auto":
        model["vocab_size"] = _tokenizer_size(tokenizer_path(raw.get("data", {})))
    if not any(isinstance(raw.get(name), dict) and "auto" in raw[name].values() for name in ("optim", "batch")):
        return None
    from launch.auto import resolve

    return resolve(raw, processes)


def tokenizer_path(data: dict[str, Any]) -> Path | None:
    """The `tokenizer.json` a raw data section names, or the one beside its first source; None if neither."""
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("tokenizer"), str):
        return Path(data["tokenizer"])
    sources = data.get("sources")
    if (
        isinstance(sources, list)
        and sources
        and isinstance(sources[0], dict)
        and isinstance(sources[0].get("path"), str)
    ):
        beside = Path(sources[0]["path"]).parent / "tokenizer.json"
        return beside if beside.exists() else None
    return None


def _tokenizer_size(path: Path | None) -> int:
    if path is None:
        raise ValueError(
            'model.vocab_size = "auto" needs a tokenizer: there is no tokenizer.json beside the first of data.sources, '
            "and data.tokenizer names none"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        ids = list(description["model"]["vocab"].values()) + [
            each["id"] for each in description.get("added_tokens", [])
        ]
        return max(ids) + 1
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the tokenizer {path}: {_reason(error)}") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is not a tokenizer.json with a vocabulary") from None


def _explain(error: dict[str, Any]) -> str:
    """One line of a pydantic error: the dotted key, what is wrong, and the value."""
    key = ".".join(str(part) for part in error["loc"] if not re.search(r"[\[(]|^constrained-", str(part)))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggestion(error['loc'])}"
    if error["type"] == "missing":
        return f"{key} is required"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return message
    value = error["input"]
    given = "" if isinstance(value, dict) else f" (got {value!r})"
    return f"{key}: {message}{given}"


def _suggestion(location: tuple[Any, ...]) -> str:
    """The nearest known key to an unknown one, else the keys that are known there."""
    section: Any = RunConfiguration
    for part in location[:-1]:
        if isinstance(part, str) and part in getattr(section, "model_fields", {}):
            section = _section_type(section.model_fields[part].annotation)
    known = [field.alias or name for name, field in section.model_fields.items()]
    nearest = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; known here: {', '.join(known)}"


def _section_type(annotation: Any) -> Any:
    """The section inside an annotation such as `list[SourceConfig]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = map(_section_type, get_args(annotation))
    return next((part for part in parts if part is not RunConfiguration), RunConfiguration)
