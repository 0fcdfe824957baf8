"""Draw every kind of schedule: `python docs/schedules.py` writes docs/schedules.png."""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path[0] = str(Path(__file__).resolve().parents[1])

HORIZON, SEQUENCES = 100_000, 64
PERIODS = {"ends": [25_000, 50_000, 100_000], "decay": 0.2}
PARTS = [
    {"tokens": 55_000, "warmup": 4_000, "decay": 10_000, "final": 0.1},
    {"kind": "rewarm", "warmup": 3_000, "peak": 0.6, "final": 0.1},
]
TAILS = {
    name: {"decay": 30_000, "tail": name, "final": 0.05 if name in ("exponential", "inverse-proportional") else 0.0}
    for name in ("linear", "1-sqrt", "cosine", "mirror-cosine", "square", "exponential", "inverse-proportional")
}
ANNEAL = {"decay": 10_000, "tail": "exponential", "final": 0.18}
PANELS: dict[str, dict[str, dict[str, Any]]] = {
    "constant, cosine, linear_to_zero": {
        "constant": {"kind": "constant"},
        "cosine, final 0.1": {"kind": "cosine", "final": 0.1},
        "linear_to_zero": {"kind": "linear_to_zero"},
    },
    "wsd: tails over 30 %": TAILS,
    "wsd_s: periods at 25, 50, 100 %": {
        label: {"kind": "wsd_s", "tail": "inverse-proportional", "final": 0.1, "periods": {**PERIODS, "peaks": peaks}}
        for label, peaks in (("final 0.1", [1, 1, 1]), ("peaks 1, 0.7, 0.5", [1, 0.7, 0.5]))
    },
    "power: cap 1": {
        f"{times * SEQUENCES} sequences": {"kind": "power", "power": {"a": 0.6 * times}} for times in (1, 2, 4)
    },
    "infinite, inverse_sqrt": {
        "infinite, cosine": {"kind": "infinite", "infinite": {"cooldown": 30_000}, **ANNEAL},
        "infinite, inverse-sqrt": {"kind": "infinite", "infinite": {"cooldown": 30_000, "shape": "inverse-sqrt"}},
        "inverse_sqrt": {"kind": "inverse_sqrt"},
    },
    "sequence: wsd, then rewarm": {"": {"kind": "sequence", "parts": PARTS}},
}
"""The schedules of each panel, by their labels; power is as linear in a as it is in the batch."""


def draw(path: Path) -> None:
    """The learning rate over the horizon, as a share of its peak."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from runtime.schedule_config import ScheduleConfig

    figure = Figure(figsize=(11, 6.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    tokens = range(0, HORIZON + 1, 100)
    for axes, (title, schedules) in zip(figure.subplots(2, 3, sharey=True).flat, PANELS.items(), strict=True):
        for label, section in schedules.items():
            given = {"horizon": HORIZON, "warmup": 4_000, "decay": 0, **section}
            rate = ScheduleConfig.model_validate(given).build(1.0, SEQUENCES, seq_len=1)
            axes.plot([each / HORIZON for each in tokens], [rate(each, 0) for each in tokens], label=label)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        if len(schedules) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("share of the horizon")
    figure.supylabel("learning rate / peak")
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
