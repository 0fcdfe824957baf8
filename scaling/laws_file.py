"""laws.json: an analysis as a file, for the planner, for "auto" values in configurations, and for any other reader.

One JSON object: `format`, `version`, and the fields of `scaling.results.Analysis` by their names. Numbers are written
so that they are read back exactly. JSON has no NaN and no infinities: an unknown number is null, and an infinite one is
the text "inf" or "-inf". In what has no schema (`details`, `frontier`, `provenance`), null is read back as None. Arrays
are lists, row by row. Of the table, the columns that are known or that a fit has as an input are kept.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, create_model

from scaling.columns import NAMES
from scaling.laws import find
from scaling.results import Analysis, Fit
from scaling.table import RunTable, column_of, tidy

FORMAT, VERSION = "meristem-laws", 1
"""The version changes where a reader of the one before would misread the file; a new optional field does not count."""
INFINITIES = {"inf": math.inf, "-inf": -math.inf}
MOST_ERRORS = 3


@dataclass(frozen=True)
class LawsFile(Analysis):
    """An analysis, and the file that it was read from."""

    path: str = ""
    sha256: str = ""


def write(path: str | Path, analysis: Analysis) -> None:
    """Write laws.json, whole or not at all. ValueError where the file cannot be written, or could not be read again,
    with the field that is wrong."""
    known = {name: _plain(getattr(analysis, name)) for name in _names(Analysis) if name != "table"}
    contents = {"format": FORMAT, "version": VERSION, **known, "table": _plain_table(analysis)}
    text = _layout(contents)
    _read(text, f"{path} is not written, for it could not be read")
    _write_whole(Path(path), text)


def read(path: str | Path) -> LawsFile:
    """The analysis that `write` wrote. ValueError that names the file and what is wrong with it."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the laws file {path}: {error.strerror}") from None
    return LawsFile(**_read(text, str(path)), path=str(path), sha256=hashlib.sha256(text).hexdigest())


def _read(text: str | bytes, where: str) -> dict[str, Any]:
    """The fields of an analysis. ValueError for a text that does not tell them, which begins with `where`."""
    try:
        found = _schema().model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{where}: {_wrong(error)}") from None
    known = {name: getattr(found, name) for name in _names(Analysis)}
    rows = len(known["table"])
    if len(known["used"]) != rows:
        raise ValueError(f"{where}: used has {len(known['used'])} entries for {rows} rows of the table")
    if beyond := [row for row in known["fitted"] if not 0 <= row < rows]:
        raise ValueError(f"{where}: fitted names row {beyond[0]}, and the table has {rows} rows")
    return known


# Writing.


def _plain(value: Any) -> Any:
    """What JSON can say of a value."""
    if is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def _plain_table(analysis: Analysis) -> dict[str, Any]:
    table, inputs = analysis.table, (column_of(s, fit.size) for fit in analysis.fits for s in find(fit.law).inputs)
    kept = [table.frame[name] for name in dict.fromkeys((*NAMES, *inputs)) if name in table.frame]
    return {
        "columns": {each.name: _plain(each.astype(object).where(each.notna(), None).tolist()) for each in kept},
        "mapping": _plain(table.mapping),
        "notes": list(table.notes),
        "fingerprint": table.fingerprint,
    }


def _layout(contents: Mapping[str, Any]) -> str:
    """One line for each plain field, and for each entry of a list of objects: a bootstrap would fill thousands."""
    lines = []
    for key, value in contents.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = ",\n  ".join(_json(each) for each in value)
            lines.append(f"{_json(key)}: [\n  {entries}\n ]")
        else:
            lines.append(f"{_json(key)}: {_json(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _write_whole(path: Path, text: str) -> None:
    """Replace a file: a reader, or a kill, sees the old one or the new one, whole."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


# Reading: the schema follows from the dataclasses, so that a field added to them is written, read and checked.


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str) and value in INFINITIES:
        return INFINITIES[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError('accepted is a number, null for unknown, "inf" or "-inf"')
    if not abs(value) <= sys.float_info.max:
        raise ValueError('this is not JSON: an unknown number is null, an infinite one "inf" or "-inf"')
    return float(value)


def _array(value: Any) -> np.ndarray:
    """Numbers in lists, or in lists of lists of one length."""
    if not isinstance(value, list):
        raise ValueError("accepted is a list of numbers, or of lists of numbers")
    if value and all(isinstance(each, list) for each in value):
        if len({len(each) for each in value}) != 1:
            raise ValueError("the rows differ in length")
        return np.array([[_number(each) for each in row] for row in value])
    return np.array([_number(each) for each in value])


def _mask(value: Any) -> np.ndarray:
    if not isinstance(value, list) or not all(isinstance(each, bool) for each in value):
        raise ValueError("accepted is a list of true and false")
    return np.array(value, dtype=bool)


def _free(value: Any) -> Any:
    """JSON without a schema."""
    if isinstance(value, dict):
        return {key: _free(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_free(each) for each in value]
    if isinstance(value, str):
        return INFINITIES.get(value, value)
    return value if value is None or isinstance(value, bool | int) else _number(value)


def _fit(fit: Fit) -> Fit:
    """The fit, if its numbers belong to its law."""
    count = len(find(fit.law).parameters)
    draws = fit.draws if fit.draws.size else np.empty((0, count))
    if fit.coordinates.shape != (count,) or draws.shape[1:] != (count,):
        raise ValueError(f"law {fit.law!r} has {count} parameters, and coordinates or draws have another number")
    if not (np.isfinite(fit.coordinates).all() and np.isfinite(draws).all()):
        raise ValueError("coordinates and draws are to be finite")
    return Fit(**{name: draws if name == "draws" else getattr(fit, name) for name in _names(Fit)})


def _table(found: Any) -> RunTable:
    lengths = {len(column) for column in found.columns.values()}
    if len(lengths) > 1:
        raise ValueError("the columns differ in length")
    return RunTable(tidy(pd.DataFrame(found.columns)), dict(found.mapping), tuple(found.notes), found.fingerprint)


def _schema_of(annotation: Any) -> Any:
    """The annotation of a dataclass's field, with its numbers, arrays and dataclasses as they are in the file."""
    if annotation is float:
        return Annotated[Any, PlainValidator(_number)]
    if annotation is np.ndarray:
        return Annotated[Any, PlainValidator(_array)]
    if annotation is Any:
        return Annotated[Any, PlainValidator(_free)]
    if is_dataclass(annotation):
        return _model(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (None, Literal):
        return annotation
    inner = tuple(each if each is Ellipsis else _schema_of(each) for each in arguments)
    return Union[inner] if origin in (Union, UnionType) else (dict if origin is Mapping else origin)[inner]  # noqa: UP007


@cache
def _model(kind: type) -> Any:
    """A schema for a dataclass, of which it makes one."""
    if kind is RunTable:
        columns = dict[str, list[Annotated[Any, PlainValidator(_free)]]]
        schema = _closed("RunTable", columns=columns, mapping=dict[str, str], notes=list[str], fingerprint=str)
        return Annotated[schema, AfterValidator(_table)]
    hints = get_type_hints(kind)
    defaults = {each.name: _default(each) for each in fields(kind)}
    schema = _closed(kind.__name__, **{name: (_schema_of(hints[name]), defaults[name]) for name in defaults})
    made = Annotated[schema, AfterValidator(lambda found: kind(**{name: getattr(found, name) for name in defaults}))]
    return Annotated[made, AfterValidator(_fit)] if kind is Fit else made


@cache
def _schema() -> type[BaseModel]:
    """Of the whole file."""
    hints = get_type_hints(Analysis)
    known = {each.name: (_schema_of(hints[each.name]), _default(each)) for each in fields(Analysis)}
    known["used"] = (Annotated[Any, PlainValidator(_mask)], ...)
    return _closed("LawsFile", format=Literal[FORMAT], version=Literal[VERSION], **known)


def _closed(name: str, **known: Any) -> type[BaseModel]:
    return create_model(name, __config__=ConfigDict(strict=True, extra="forbid"), **known)


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def _names(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


def _wrong(error: ValidationError) -> str:
    """The first mistakes, and for a file of something else just that."""
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return f"not JSON: {found[0]['msg'].removeprefix('Invalid JSON: ')}"
    if found[0]["loc"] in ((), ("format",)):
        return f'not a laws file, which has "format": "{FORMAT}"'
    if found[0]["loc"] == ("version",):
        return f"version {found[0]['input']!r} of the format is not known here; accepted: {VERSION}"
    lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}" for each in found]
    more = f"; and {len(lines) - MOST_ERRORS} more" if len(lines) > MOST_ERRORS else ""
    return "; ".join(lines[:MOST_ERRORS]) + more
