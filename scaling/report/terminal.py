"""An analysis on the terminal: the answer first, then what it rests on. Foreign texts are never read as markup."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from scaling.report import answer, tables
from scaling.report.tables import Cell, Table
from scaling.results import Analysis

STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red", None: ""}
MOST_BOWLS, MOST_HELD_OUT, MOST_WARNINGS = 20, 24, 40


def show(analysis: Analysis, console: Console) -> None:
    """Print all of it but the run table."""
    for title, shown in sections(analysis):
        console.print(Text(title, style="bold"))
        for each in shown:
            console.print(each)
        console.print()


def sections(analysis: Analysis) -> Iterable[tuple[str, list[Grid | Text]]]:
    """Those that have something to say, in the order of reading."""
    yield "Columns, as guessed or given", noted(tables.mapping(analysis))
    yield "Runs", [grid(tables.summary(analysis), header=False)]
    if analysis.gates:
        yield "Quality of the table", noted(tables.verdicts("", analysis.gates))
    if analysis.fits:
        yield "Fits", noted(tables.fits(analysis.fits))
    if analysis.held_out:
        yield "Hold-out", noted(tables.held_out(tables.counting(analysis.held_out)[:MOST_HELD_OUT]))
    for fit in answer.chosen(analysis):
        found = tables.parameters(fit)
        yield found.title, noted(found)
    if analysis.bowls:
        found = tables.bowls(analysis.bowls)
        more = len(found.rows) - MOST_BOWLS
        rest = [Text(f"and {more} cells more, in the report", style="dim")] if more > 0 else []
        yield "Best settings of each cell", [grid(found, most=MOST_BOWLS), *rest]
    if analysis.decisions:
        yield "Proposals", noted(tables.decisions(analysis.decisions))
    if any(each.plateau for each in analysis.decisions):
        yield "Plateau", noted(tables.plateaus(analysis.decisions))
    found = answer.warnings(analysis, is_short=True)
    if found:
        yield "Warnings", [_warning(each) for each in found[:MOST_WARNINGS]]
    if len(found) > MOST_WARNINGS:
        yield f"and {len(found) - MOST_WARNINGS} more, in the report", []


def noted(found: Table) -> list[Grid | Text]:
    """A table and its note below."""
    return [grid(found), *([Text(found.note, style="dim")] if found.note else [])]


def grid(found: Table, header: bool = True, most: int | None = None) -> Grid:
    """A table as rich draws it; numbers stand at the right."""
    drawn = Grid(box=None, pad_edge=False, header_style="dim", show_header=header, padding=(0, 2, 0, 0))
    first = found.rows[0] if found.rows else ()
    for place, name in enumerate(found.columns):
        is_number = place < len(first) and isinstance(first[place].key, float)
        drawn.add_column(Text(name), justify="right" if is_number else "left", overflow="fold")
    for row in found.rows[:most]:
        drawn.add_row(*map(_text, row))
    return drawn


def _text(cell: Cell) -> Text:
    return Text(cell.text, style=STYLES[cell.level])


def _warning(found: answer.Warning) -> Text:
    level = found.verdict.level
    return Text.assemble((f"{level:<8}", STYLES[level]), f"{found.about}: {tables.plain(found.verdict.message)}")
