"""What a run would be, without running it."""

import io
import math
import os
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from runtime.config import Config
from runtime.model.counts import count, flops_per_token
from runtime.observe.devices import NODES, Node
from runtime.observe.memory import MemoryEstimate, estimate, micro_batches
from runtime.observe.proposal import USABLE, configured, predict, propose
from runtime.observe.step_time import StepTime
from runtime.parallel.communication import Network
from runtime.parallel.mesh import Layout, plan_layout
from runtime.parallel.parallelize import compute_dtype
from runtime.timetable import Timetable, build_timetable

_MEANING = {
    "parameters": "fp32 shards",
    "gradients": "fp32 shards, and those on their way there",
    "ema": "average of the weights, fp32",
    "gathered": "whole parameters of the units in use",
    "activations": "kept for the backward, or in use",
    "logits": "the loss's chunk, and its gradients",
}


_STATE = {
    "adamw": "moments, fp32",
    "muon": "momentum of hidden matrices, moments of the rest, fp32",
    "schedule_free": "z and squares, fp32",
}


def report(
    config: Config,
    world_size: int,
    *,
    device_type: str | None = None,
    plan: Timetable | None = None,
    node: Node | None = None,
) -> str:
    """Sizes, memory, layout, speed and schedule of `config` on `world_size` processes, as text.

    The decoder is built under its whole parallel plan on a fake process group, and one step is traced
    for its memory; no data is read and nothing is written. device_type: "cpu" or "cuda"; by default GPUs
    are supposed where there is one here, where bf16 is asked for, and for more processes than this
    machine has cores. plan: by default the configured one. node: the machines of GPUs that the run is for, without
    which there is no step time and no search for a faster mesh. ValueError for a layout that cannot be built.
    """
    layout = plan_layout(config.parallel, world_size, config.model, config.data.seq_len, *config.batches.sizes)
    device_type = "cuda" if node is not None else device_type or supposed_device(config, world_size)
    memory = estimate(config, layout, device_type=device_type)
    sections = [
        _section("Model", _model(config)),
        _section("Layout", _layout(config, layout, device_type)),
        _section("Run", _run(config)),
        _section("Memory of a device at its fullest", _memory(config, memory, layout)),
        _section("Step time, predicted by a model", _speed(config, memory, layout, node)),
        _section("Schedule", _schedule(config, plan)),
    ]
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(Text(f"{config.run.name}: dry run of {_processes(world_size)}, nothing is written\n"), *sections)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def supposed_device(config: Config, world_size: int) -> str:
    """The kind of device a run is taken to be for: "cpu" or "cuda"."""
    wanted = config.parallel.precision == "bf16" or world_size > (os.cpu_count() or 1)
    return "cuda" if torch.cuda.is_available() or wanted else "cpu"


def _model(config: Config) -> Table:
    counts, flops = count(config.model), flops_per_token(config.model, config.data.seq_len)
    return _pairs(
        ("parameters", f"{counts.total:,}", ""),
        ("  without embeddings", f"{counts.non_embedding:,}", ""),
        ("  active per token", f"{counts.active:,}", ""),
        ("unrolled depth", f"{counts.unrolled_depth:,}", "blocks a token passes through"),
        ("FLOPs per token", f"{flops:.4g}", f"forward and backward, sequences of {config.data.seq_len:,}"),
    )


def _layout(config: Config, layout: Layout, device_type: str) -> Table:
    parallel = config.parallel
    number, sequences = micro_batches(config, layout)
    device = {"cpu": "on a CPU", "cuda": "on a GPU"}[device_type]
    return _pairs(
        ("data shards (FSDP)", f"{layout.data_shard}", ""),
        ("data replicas (HSDP)", f"{layout.data_replicate}", ""),
        ("tensor parallel", f"{layout.tensor}", ""),
        (
            "micro-batches",
            f"{number}",
            f"of {sequences} sequences, {sequences * config.data.seq_len:,} tokens",
        ),
        ("recomputation", parallel.recompute, "compiled blocks" if parallel.compile else "eager"),
        ("precision", str(compute_dtype(parallel.precision, torch.device(device_type))).removeprefix("torch."), device),
        *(
            [("float8", parallel.float8, "memory and times below are those without")]
            if parallel.float8 != "none"
            else []
        ),
    )


def _run(config: Config) -> Table:
    seq_len, batches = config.data.seq_len, config.batches
    end, until, begin = config.schedule.end, config.end, config.schedule.branch.at or 0
    flops = flops_per_token(config.model, seq_len)
    smallest, largest = min(batches.sizes), max(batches.sizes)
    sizes = f"{smallest:,} sequences" if smallest == largest else f"{smallest:,} to {largest:,} sequences"
    rows = [
        ("batch", f"{largest * seq_len:,} tokens", f"{sizes} of {seq_len:,}"),
        ("FLOPs per step", f"{flops * largest * seq_len:.4g}", "" if smallest == largest else "of the largest batch"),
    ]
    if until is None:
        rows.append(("tokens", "no end", "goes on until it is stopped"))
    else:
        *_, last = batches.stretches(until, seq_len, begin)
        steps = last.step + last.steps
        tokens = last.tokens + last.steps * last.sequences * seq_len - begin
        stop = f"stops at run.until, of a horizon of {end:,}" if end is not None and until < end else ""
        rows += [
            ("tokens", f"{tokens:,}", f"a branch, after {begin:,}" if begin else stop),
            ("steps", f"{steps:,}", ""),
            ("FLOPs", f"{flops * tokens:.4g}", "of the branch" if begin else "of the whole run"),
        ]
    length = None if until is None else until - begin
    rows += [
        ("checkpoints", *_cadence(config.checkpoint.every, length)),
        ("evaluations", *_evaluations(config, length)),
    ]
    return _pairs(*rows)


def _cadence(every: int, length: int | None) -> tuple[str, str]:
    """How often, and how many multiples of `every` there are in a run of that length, its end included."""
    if not every:
        return "1", "at the end"
    return "" if length is None else f"{math.ceil(length / every):,}", f"every {every:,} tokens"


def _evaluations(config: Config, length: int | None) -> tuple[str, str]:
    names = [each.name for each in config.evaluation.sets]
    if not names:
        return "0", "no evaluation sets"
    number, often = _cadence(config.evaluation.every, length)
    return number, f"{often}: {', '.join(names)}"


def _memory(config: Config, memory: MemoryEstimate, layout: Layout) -> Table:
    unit, size = ("GiB", 2**30) if memory.total >= 2**30 else ("MiB", 2**20)
    table = _table("", unit, "")
    for kind, held in memory.by_kind.items():
        if held or kind != "ema":
            meaning = _STATE[config.optim.name] if kind == "optimizer" else _MEANING[kind]
            table.add_row(kind, f"{held / size:,.2f}", meaning)
    everywhere = f"{memory.total * layout.world_size / size:,.2f} {unit} over all devices"
    table.add_row("total", f"{memory.total / size:,.2f}", everywhere)
    if config.parallel.compile:
        table.add_row("", "", "compiled blocks need a few per cent more or less")
    return table


def _speed(config: Config, memory: MemoryEstimate, layout: Layout, node: Node | None) -> Table:
    """The configured mesh's predicted step, and the keys of a faster mesh, if one is predicted."""
    if node is None:
        *names, last = sorted(NODES)
        return _pairs(("no device is known", "", f"--device {', '.join(names)} or {last} names one"))
    if compute_dtype(config.parallel.precision, torch.device("cuda")) != torch.bfloat16:
        return _pairs(("unknown", "", f'parallel.precision = "{config.parallel.precision}" has no known peak'))
    network, present = Network.of(config.model), configured(config, layout)
    found = propose(config, network, present, memory.total, node)
    fits = memory.total <= USABLE * node.memory
    links = f"{node.link / 1e9:.0f} GB/s inside, {node.network / 1e9:.0f} a device outside"
    rows = [
        ("machine", node.name, f"{node.devices} devices, {links}"),
        *_times(predict(config, network, present, node), memory.total, node),
    ]
    wanted = "a faster mesh" if fits else "a mesh that fits"
    if found is None:
        return _pairs(*rows, (wanted, "none", "of powers of two, with any recomputation and micro-batch"))
    first, *others = found.candidate.keys(present)
    rows += [("", "", ""), (wanted, "", first), *(("", "", key) for key in others)]
    return _pairs(*rows, *_times(found.time, found.memory, node))


def _times(time: StepTime, memory: int, node: Node) -> list[tuple[str, str, str]]:
    used, there = f"{memory / 1e9:.1f} GB", f"of {node.memory / 1e9:.0f}"
    return [
        ("seconds per step", f"{time.seconds:.3g}", f"{time.share:.1%} of them waiting for communication"),
        ("tokens per second", f"{time.tokens_per_second:,.0f}", f"of all devices; MFU {time.mfu:.1%}"),
        ("memory", used, there if memory <= USABLE * node.memory else f"{there}: too much"),
    ]


def _schedule(config: Config, plan: Timetable | None) -> Table:
    found = plan or build_timetable(config)
    table = _table("", "tokens", "step", "learning rate")
    for tokens, label, _ in found.schedule.landmarks():
        table.add_row(
            label, f"{tokens:,}", f"{found.batches.step_at(tokens, found.seq_len):,}", f"{found.rate(tokens):.4g}"
        )
    return table


def _processes(world_size: int) -> str:
    return "1 process" if world_size == 1 else f"{world_size:,} processes"


def _pairs(*rows: tuple[str, str, str]) -> Table:
    table = _table("", "", "")
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    table.add_column(first, min_width=22)
    for place, column in enumerate(columns):
        last_words = column == "" and place == len(columns) - 1
        table.add_column(column, justify="left" if last_words else "right", min_width=0 if last_words else 14)
    return table


def _section(title: str, table: Table) -> Any:
    return Group(Text(title, style="bold"), table, Text(""))
