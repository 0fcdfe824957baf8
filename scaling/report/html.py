"""report.html: one file that opens offline. It loads nothing and runs nothing but its own few lines, which the page's
policy admits by their hash; all text from runs is escaped."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from scaling.report import answer, tables
from scaling.report.figures import PLOTS
from scaling.report.tables import Cell, Table
from scaling.report.words import plain
from scaling.results import Analysis, Fit

SECTIONS = {
    "answer": "The answer",
    "proposals": "Proposals",
    "plateau": "Plateau",
    "fits": "Fits",
    "residuals": "Residuals",
    "hold-out": "Hold-out",
    "bowls": "Bowls",
    "gates": "Quality gates",
    "warnings": "Warnings",
    "runs": "Run table",
    "provenance": "Provenance",
}


def page(analysis: Analysis, plots: Mapping[str, bytes], title: str = "Scaling report") -> str:
    """The whole report; `plots` are PNG files by the names of `scaling.report.figures.PLOTS`."""
    style, script = _own("report.css"), _own("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "answer": _answer(analysis),
        "proposals": _proposals(analysis),
        "plateau": _plateau(analysis, plots),
        "fits": _fits(analysis, plots),
        "residuals": _plot("residuals", plots) or _nothing("No loss law was fitted."),
        "hold-out": _held_out(analysis, plots),
        "bowls": _bowls(analysis, plots),
        "gates": _table(tables.verdicts("", analysis.gates)) if analysis.gates else _nothing("Nothing to report."),
        "warnings": _warnings(analysis),
        "runs": _runs(analysis),
        "provenance": _table(tables.details("", analysis.provenance)),
    }
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in SECTIONS.items())
    body = "".join(f'<section id="{key}"><h2>{escape(SECTIONS[key])}</h2>{parts[key]}</section>' for key in SECTIONS)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" '
        f'content="no-referrer"><title>{_safe(title)}</title><style>{style}</style></head><body>'
        f"<header><h1>{_safe(title)}</h1><nav>{links}</nav></header><main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def _own(name: str) -> str:
    return files("scaling.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _safe(text: object) -> str:
    return escape(plain(text))


def _answer(analysis: Analysis) -> str:
    """The chosen laws and the proposals in words, and the warnings that concern them."""
    parts = []
    for fit in answer.chosen(analysis):
        mark = "" if fit.identified else ' class="failure"'
        parts.append(
            f"<dt>{_safe(fit.quantity)}: {_safe(fit.law)}</dt><dd><code>{escape(answer.law(fit))}</code>"
            f"<br><small{mark}>{escape(answer.standing(fit))}</small></dd>"
        )
    laws = f"<dl>{''.join(parts)}</dl>" if parts else _nothing("No law could be fitted to these runs.")
    proposals = "".join(f"<p class=proposal>{escape(answer.proposal(each))}</p>" for each in analysis.decisions)
    found = answer.warnings(analysis, is_short=True)
    said = f"<ul class=verdicts>{''.join(map(_warning, found))}</ul>" if found else "<p class=ok>No warnings.</p>"
    return f"{laws}{proposals}<h3>To be wary of</h3>{said}"


def _warning(found: answer.Warning) -> str:
    level = found.verdict.level
    return f"<li class={level}><b>{level}</b> {_safe(found.about)}: {_safe(found.verdict.message)}</li>"


def _proposals(analysis: Analysis) -> str:
    if not analysis.decisions:
        return _nothing("No target was asked for.")
    return _table(tables.decisions(analysis.decisions))


def _plateau(analysis: Analysis, plots: Mapping[str, bytes]) -> str:
    if not any(each.plateau for each in analysis.decisions):
        return _nothing("No proposal has a learning rate or a batch.")
    return _table(tables.plateaus(analysis.decisions)) + _plot("plateau", plots)


def _fits(analysis: Analysis, plots: Mapping[str, bytes]) -> str:
    if not analysis.fits:
        return _nothing("No law could be fitted to these runs.")
    chosen = answer.chosen(analysis)
    others = [fit for fit in analysis.fits if not any(fit is each for each in chosen)]
    tell = (_table(tables.parameters(each), is_titled=True) for each in chosen)
    rest = "".join(_table(tables.parameters(each), is_titled=True) + _details(each.details) for each in others)
    parts = [
        _table(tables.fits(analysis.fits)),
        _plot("losses", plots),
        _plot("optima", plots),
        *tell,
        _plot("bootstrap", plots),
        _folded("How they were fitted, and all that was judged", "".join(map(_fitting, chosen))),
        _folded(f"The other {len(others)}", rest) if others else "",
        _folded("Compute-optimal frontier (approaches 1 and 2)", _details(analysis.frontier))
        if analysis.frontier
        else "",
    ]
    return "".join(parts)


def _fitting(fit: Fit) -> str:
    return _table(tables.verdicts(fit.law, fit.verdicts), is_titled=True) + _details(fit.details)


def _held_out(analysis: Analysis, plots: Mapping[str, bytes]) -> str:
    if not analysis.held_out:
        return _nothing("Too few runs to hold any out.")
    counting = tables.counting(analysis.held_out)
    rest = [each for each in analysis.held_out if each not in counting]
    more = _folded("The other hold-outs", _table(tables.held_out(rest))) if rest else ""
    return _table(tables.held_out(counting)) + _plot("held_out", plots) + more


def _bowls(analysis: Analysis, plots: Mapping[str, bytes]) -> str:
    if not analysis.bowls:
        return _nothing("Learning rate and batch do not vary within cells of equal N and D.")
    return _plot("bowls", plots) + _folded("All cells", _table(tables.bowls(analysis.bowls)))


def _warnings(analysis: Analysis) -> str:
    found = answer.warnings(analysis)
    return f"<ul class=verdicts>{''.join(map(_warning, found))}</ul>" if found else _nothing("None.")


def _runs(analysis: Analysis) -> str:
    parts = [
        _table(tables.summary(analysis)),
        _folded("Where each column was read from", _table(tables.mapping(analysis))),
        _folded(f"All {len(analysis.table)} runs; a column's head sorts it", _table(tables.runs(analysis))),
    ]
    return "".join(parts)


def _details(found: Mapping, title: str = "") -> str:
    return _table(tables.details(title, found), is_titled=bool(title)) if found else ""


def _nothing(text: str) -> str:
    return f"<p class=quiet>{escape(text)}</p>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _plot(name: str, plots: Mapping[str, bytes]) -> str:
    """A plot with its caption; nothing where it was not drawn."""
    if name not in plots:
        return ""
    told, data = PLOTS[name], base64.b64encode(plots[name]).decode()
    return (
        f"<figure><figcaption><b>{escape(told.title)}.</b> {escape(told.caption)}</figcaption>"
        f'<img alt="{escape(told.title)}" src="data:image/png;base64,{data}"></figure>'
    )


def _table(found: Table, is_titled: bool = False) -> str:
    title = f"<h3>{_safe(found.title)}</h3>" if is_titled else ""
    note = f"<p class=quiet>{escape(found.note)}</p>" if found.note else ""
    heads = "".join(f"<th>{_safe(each)}</th>" for each in found.columns)
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in found.rows)
    return f"{title}{note}<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cells(row: Sequence[Cell]) -> str:
    return "".join(_cell(each) for each in row)


def _cell(cell: Cell) -> str:
    kind = " ".join(_classes(cell))
    key = f' data-key="{float(cell.key)!r}"' if isinstance(cell.key, float) else ""
    return f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}{key}>{escape(cell.text)}</td>"


def _classes(cell: Cell) -> Iterable[str]:
    if isinstance(cell.key, float):
        yield "number"
    if cell.level is not None:
        yield cell.level
