"""A growth as a table: what the model was, and what it becomes."""

import io
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from growth.evolution import shape
from launch.growth_config import RunConfiguration, policies, segments
from runtime.config import Config
from runtime.model.counts import flops_per_token
from runtime.observe.devices import Node
from runtime.observe.dry_run import report, supposed_device
from runtime.observe.memory import estimate
from runtime.parallel.mesh import plan_layout
from runtime.timetable import Timetable

_COUNTS = {
    "total": "parameters",
    "non_embedding": "  without embeddings",
    "active": "  active per token",
    "unrolled_depth": "unrolled depth",
}


def dry_run(config: RunConfiguration, world_size: int, plan: Timetable | None = None, node: Node | None = None) -> str:
    """The dry run of each segment on `world_size` processes, as text: the first in full, the others by what their
    growth changes. plan, node: as of `report`. ValueError for a layout that cannot be built."""
    configs = segments(config)
    if not config.growth:
        return report(configs[0], world_size, plan=plan, node=node)
    end = config.end
    ends = [entry.at if end is None else min(entry.at, end) for entry in config.growth] + [end]
    first = configs[0].model_copy(update={"run": config.run.model_copy(update={"until": max(1, ends[0])})})
    parts = [report(first, world_size, plan=plan, node=node)]
    for number, entry in enumerate(config.growth):
        before, after = configs[number], configs[number + 1]
        record = {
            "operators": [{"operator": each.operator, "options": each.options} for each in entry.steps],
            **policies(entry),
            "before": shape(before.model, before.data.seq_len),
            "after": shape(after.model, after.data.seq_len),
            "memory": (_memory(before, world_size), _memory(after, world_size)),
        }
        parts.append(f"At {entry.at:,} tokens, {summary(before, after, record)}")
    if end is None:
        return "\n\n".join(parts)
    flops = [
        flops_per_token(each.model, each.data.seq_len) * max(0, until - since)
        for each, since, until in zip(configs, [0, *ends], ends, strict=False)
    ]
    shares = ", ".join(f"{each:.4g}" for each in flops)
    parts.append(f"FLOPs of the whole run: {math.fsum(flops):.4g} (by segment: {shares})")
    return "\n\n".join(parts)


def _memory(config: Config, world_size: int) -> int:
    """Bytes of a device at its fullest moment in a step."""
    layout = plan_layout(config.parallel, world_size, config.model, config.data.seq_len, *config.batches.sizes)
    return estimate(config, layout, device_type=supposed_device(config, world_size)).total


def summary(before: Config | None, after: Config | None, record: dict[str, Any]) -> str:
    """The record of a growth, between the segments of these configurations if it is between two, as text of several
    lines."""
    old, new = record["before"], record["after"]
    table = Table(box=None, pad_edge=False, header_style="none")
    for header in ("", "before", "after", ""):
        table.add_column(header, justify="left" if not header else "right")
    for key, name in _COUNTS.items():
        counts = old["counts"][key], new["counts"][key]
        table.add_row(name, *(f"{each:,}" for each in counts), _ratio(*counts))
    flops = old["flops_per_token"], new["flops_per_token"]
    table.add_row("FLOPs per token", *(f"{each:.4g}" for each in flops), _ratio(*flops))
    if "bytes_before" in record:
        held = record["bytes_before"], record["bytes_after"]
        table.add_row("MiB of state a device", *(f"{each / 2**20:,.1f}" for each in held), _ratio(*held))
    if "checkpoint_bytes" in record:
        written = record["checkpoint_bytes"]
        table.add_row("MiB of a checkpoint", *(f"{each / 2**20:,.1f}" for each in written), _ratio(*written))
    if "memory" in record:
        held = record["memory"]
        table.add_row("MiB of a device, at its fullest", *(f"{each / 2**20:,.1f}" for each in held), _ratio(*held))
    for name, value in _settings(before, after).items() if before and after else ():
        table.add_row(name, *value, "")
    if "loss_before" in record:
        losses = (f"{record[key]:.4f}" for key in ("loss_before", "loss_after"))
        table.add_row("loss of a batch", *losses, _verdict(record))
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join([f"growth: {_steps(record)}", *(f"  {line}" for line in lines), f"  {_policies(record)}"])


def _steps(record: dict[str, Any]) -> str:
    steps = []
    for each in record["operators"]:
        options = ", ".join(f"{key} = {value}" for key, value in each["options"].items())
        steps.append(f"{each['operator']} ({options})" if options else each["operator"])
    return ", then ".join(steps)


def _policies(record: dict[str, Any]) -> str:
    schedule = " ".join(f"{key}={value}" if key != "kind" else value for key, value in record["schedule"].items())
    return f"moments: {record['moments']}; rates: {record['rates']}; schedule: {schedule}"


def _settings(before: Config, after: Config) -> dict[str, tuple[str, str]]:
    """The micro-batch, and whatever else of mesh, batch and data the growth changes."""

    def micro(config: Config) -> str:
        return str(config.batch.micro_sequences or "all")

    found = {"micro-batch, sequences": (micro(before), micro(after))}
    for section in ("parallel", "batch", "data", "optim"):
        old, new = (getattr(each, section).model_dump() for each in (before, after))
        changed = [key for key in new if old[key] != new[key] and key != "micro_sequences"]
        found |= {f"{section}.{key}": (str(old[key]), str(new[key])) for key in changed}
    return found


def _verdict(record: dict[str, Any]) -> str:
    if not record["preserves"]:
        return "not preserving"
    return f"preserved, logits within {record['logits']:.1g}"


def _ratio(old: float, new: float) -> str:
    return f"x {new / old:.3g}"
