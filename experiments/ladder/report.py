"""The report: the rungs, the law that they give, what it proposes for the held-out cell, and what that costs there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.arms import Results
from experiments.ladder.figures import draw_held_out, draw_rungs
from experiments.ladder.law import OURS
from experiments.ladder.measure import measure
from experiments.reporting import Numbers, interval, page, publish, table
from scaling.laws import find

FOLDER = Path(__file__).parent


def report(size: str, results: Results) -> None:
    """Write the report of one size and say where it is; nothing while no arm has finished."""
    numbers = measure(size, results)
    if numbers is None:
        return

    def text(pictures: list[str]) -> str:
        shown = {name: ["", f"![]({name}.png)"] if f"{name}.png" in pictures else [] for name in ("rungs", "held-out")}
        sections = (
            [*_contenders(numbers), *shown["held-out"]],
            _proposal(numbers),
            _law(numbers["law"]),
            [*_rungs(numbers["rungs"]), *shown["rungs"]],
        )
        return page("A ladder, its law, and the regret of its word", "ladder", numbers, *sections)

    publish(
        FOLDER / "results" / size, numbers, text, {"rungs": draw_rungs(numbers), "held-out": draw_held_out(numbers)}
    )


def _contenders(numbers: Numbers) -> list[str]:
    """The held-out cell: every setting with its regret."""
    rows = [each for each in numbers.get("contenders", ()) if each["losses"]]
    if not rows:
        return []
    cell = numbers["held out"]
    notes = {each["label"]: each["note"] for each in numbers["proposals"]}
    header = ("settings of", "rate", "batch", "steps", "final held-out loss, by seed", "mean",
              "regret in nats, 95 % interval", "of the loss", "by the bowl", "")  # fmt: skip
    lines = [
        f"## The held-out cell: {_cell(cell)}",
        "",
        f"{cell['times the largest']:.2f} times the compute of the largest rung. Regret is the loss above that of the "
        "swept optimum, both of three seeds; by the bowl, what the quadratic through the sweep has the settings above "
        "its minimum, in % of the loss. Batches are in sequences.",
        "",
        *table(header, (_contender(each, notes.get(each["label"], "")) for each in rows)),
        "",
        _swept(cell),
    ]
    silent = [each for each in numbers["proposals"] if not each["point"]]
    missing = [f"- {each['label']} proposes nothing: {each['note']}" for each in silent]
    return [*lines, *(["", *missing] if missing else [])]


def _contender(row: Mapping[str, Any], note: str) -> list[str]:
    losses = ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in row["losses"].values())
    return [
        row["label"], f"{row['lr']:g}", str(row["batch"]), f"{row['steps']:,}", losses,
        "" if row["mean"] is None else f"{row['mean']:.4f}",
        interval(row["regret"]) if "regret" in row else "",
        f"{row['share']:+.2%}" if "share" in row else "",
        "" if row["by the bowl"] is None else f"{row['by the bowl']:.2%}",
        note,
    ]  # fmt: skip


def _swept(cell: Mapping[str, Any]) -> str:
    """Where the sweep of the held-out cell stands, and the minimum that its bowl has."""
    if not cell["best"]:
        return "The sweep has not ended."
    where = "worse runs on all four sides" if cell["interior"] else "at an edge: no worse runs on some side"
    lr, batch = cell["best"]
    said = f"The sweep of {len(cell['losses'])} runs is lowest at {lr:g} and {batch}, {cell['loss']:.4f}, with {where}."
    own = cell["bowl"]
    if own and len(own["curvature"]) == 3:
        return said + (
            f" The bowl through its runs within {own['window']:.0%} has its minimum, {own['loss']:.4f}, at a rate of "
            f"{_estimate(own['lr'])} and a batch of {_estimate(own['batch_tokens'], 1 / cell['seq_len'])} sequences."
        )
    return said + " They tell no convex bowl with its minimum inside."


def _proposal(numbers: Numbers) -> list[str]:
    """What our law says of the held-out cell, and whether the loss it predicts came true."""
    ours = next((each for each in numbers.get("proposals", ()) if each["label"] == OURS), None)
    if ours is None or "told" not in ours:
        return []
    rows = []
    for name, title in (("lr", "learning rate"), ("batch_tokens", "batch, tokens"), ("loss", "loss")):
        if name in ours["told"]:
            flat = ours["plateau"].get(name)
            plateau = f"{flat[0]:.3g} to {flat[1]:.3g}" if flat else "not told"
            rows.append((title, *_parts(ours["told"][name]), "" if name == "loss" else plateau))
    lr, batch = ours["point"]
    lines = ["## What our law proposes there", "", *table(("", "value", "95 % interval", "plateau of 0.1 %"), rows), ""]
    expected = ours["expected regret"]
    lines.append(
        f"Trained at {lr:g} and {batch} sequences. The regret it expects is "
        + ("not told, as no rung has a convex bowl." if expected is None else f"{expected:.2%} of the loss.")
    )
    if told := numbers["prediction"]:
        inside = "inside" if told["inside"] else "outside of"
        lines += [
            "",
            f"The loss measured there is {told['measured']:.4f}, {inside} its interval; the prediction is off by "
            f"{told['error']:+.2%}.",
        ]
    return [*lines, *_said(ours["verdicts"])]


def _law(law: Numbers) -> list[str]:
    """The fits with their exponents, and what is said against them."""
    lines = ["## The law of the rungs", ""]
    if "problem" in law:
        return [*lines, f"There is none: {law['problem']}."]
    lines.append(f"{law['rows']} runs. The first of a quantity is the one that is used.")
    for each in law["fits"]:
        judged = "identified" if each["identified"] else "**not identified**"
        rows = [(name, *_parts(value)) for name, value in each["parameters"].items()]
        lines += [
            "",
            f"**{each['quantity']}**: {find(each['law']).formula} ({each['law']}), N is {each['size']}; {each['rows']} "
            f"{'runs' if each['quantity'] == 'loss' else 'cells'}; {judged}.",
            "",
            *table(("", "value", "95 % interval"), rows),
            *_said(each["verdicts"]),
        ]
    return [*lines, *_said(law["gates"])]


def _rungs(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for cell in (each for each in cells if each["losses"]):
        best = "still swept"
        if cell["best"]:
            edge = "" if cell["interior"] else " (edge)"
            best = f"{cell['best'][0]:g}, {cell['best'][1]}{edge}: {cell['loss']:.4f}"
        own, lr, batch = cell["bowl"], "", ""
        if own:
            lr, batch = _estimate(own["lr"]), _estimate(own["batch_tokens"], 1 / cell["seq_len"])
        rows.append((_cell(cell), str(len(cell["losses"])), best, lr, batch, own["note"] if own else ""))
    if not rows:
        return []
    header = ("cell", "runs", "best rate, batch and loss", "optimum: rate", "batch", "")
    return ["## The rungs", "", "Batches are in sequences.", "", *table(header, rows)]


def _cell(cell: Mapping[str, Any]) -> str:
    return (
        f"hidden {cell['width']}, {cell['layers']} layers, N {cell['non_embedding']:,}, D {cell['tokens']:,}, "
        f"{cell['flops']:.3g} FLOPs"
    )


def _parts(told: Mapping[str, float | None]) -> tuple[str, str]:
    high = "inf" if told["high"] is None else f"{told['high']:.4g}"
    return f"{told['value']:.4g}", f"{told['low']:.4g} to {high}"


def _estimate(told: Mapping[str, float | None] | None, unit: float = 1.0) -> str:
    if told is None:
        return ""
    high = "inf" if told["high"] is None else f"{told['high'] * unit:.3g}"
    return f"{told['value'] * unit:.3g} [{told['low'] * unit:.3g}, {high}]"


def _said(verdicts: Sequence[Mapping[str, str]]) -> list[str]:
    return ["", *(f"- {each['level']}: {each['message']}" for each in verdicts)] if verdicts else []
