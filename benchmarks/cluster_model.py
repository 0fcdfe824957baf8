"""Steps of large models on many machines, on paper: time, waiting for communication and memory of FSDP, HSDP and TP.

    python benchmarks/cluster_model.py --device h100 --models 1B 8B 70B --devices 8 64 512
    python benchmarks/cluster_model.py --json cluster.json --plot cluster.png

Each line is the fastest recomputation and micro-batch of a mesh that fits the memory, for one global batch. Counts and
bytes of the collectives are those that real steps issue (tests/distributed/test_communication.py); the rates are the
vendor's figures times two assumed shares; no time here has been measured on a GPU. See docs/performance.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the project's root is where its packages are found
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from runtime.config import Config, ParallelConfig
    from runtime.observe.devices import Node
    from runtime.observe.step_time import Shares
    from runtime.parallel.mesh import Layout

_LLAMA = {"vocab_size": 128256, "num_kv_heads": 8}
MODELS = {
    "1B": _LLAMA | {"num_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_heads": 32},
    "8B": _LLAMA | {"num_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_heads": 32},
    "70B": _LLAMA | {"num_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_heads": 64},
}
"""Shapes of Llama 3.2 1B and Llama 3 8B and 70B (Grattafiori et al. 2024, arXiv 2407.21783, table 3), heads untied."""
MESHES = {"FSDP": (1, False), "HSDP": (1, True), "FSDP x TP 8": (8, False)}
"""Tensor-parallel degree, and whether each machine holds a replica."""


@dataclass(frozen=True)
class Row:
    """The fastest way to run a mesh; numbers of a device where nothing else is said."""

    model: str
    devices: int
    mesh: str
    recompute: str = ""
    micro: int = 0
    """Sequences of a micro-batch."""
    missing: str = ""
    """Why there are no numbers."""
    seconds: float | None = None
    waiting: float | None = None
    """Share of the step that communication is waited for."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    gigabytes: float | None = None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", metavar="NAME", help="a100, h100, h200 or b200")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--devices", nargs="+", type=_positive, default=[8, 64, 256, 1024], metavar="N")
    parser.add_argument("--sequences", type=_positive, default=1024, help="of the global batch (default 1024)")
    parser.add_argument("--seq-len", type=_positive, default=8192)
    parser.add_argument("--compute-share", type=float, metavar="X", help="of the peak that is reached (default 0.6)")
    parser.add_argument("--bandwidth-share", type=float, metavar="X", help="of a link that is reached (default 0.8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw tokens/s of a device there")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: accepted are whole numbers from 1 on")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from runtime.observe.devices import NODES, node_of
    from runtime.observe.step_time import Shares

    node = node_of(options.device)
    if node is None:
        print(f"error: --device {options.device} is not known; accepted: {', '.join(sorted(NODES))}", file=sys.stderr)
        return 2
    given = {"compute": options.compute_share, "bandwidth": options.bandwidth_share}
    shares = Shares(**{key: value for key, value in given.items() if value is not None})
    found = list(rows(options.models, options.devices, options.sequences, options.seq_len, node, shares))
    print(f"{node.name}: {node.source}")
    print(f"{options.sequences} sequences of {options.seq_len}, bf16; reached: {shares}\n")
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)
    return 0


def rows(
    models: list[str], devices: list[int], sequences: int, seq_len: int, node: "Node", shares: "Shares"
) -> Iterator[Row]:
    for name in models:
        config = configuration(MODELS[name], sequences, seq_len)
        for number in devices:
            for mesh in MESHES:
                yield fastest(config, name, number, mesh, node, shares)


def configuration(shape: dict[str, int], sequences: int, seq_len: int) -> "Config":
    from runtime.config import Config

    return Config.model_validate(
        {
            "run": {"name": "paper"},
            "model": shape,
            "data": {"sources": [{"path": "none"}], "seq_len": seq_len},
            "batch": {"sequences": sequences},
            "optim": {"lr": 1e-3},
            "schedule": {"horizon": "1T"},
            "parallel": {"precision": "bf16"},
        }
    )


def fastest(config: "Config", name: str, devices: int, mesh: str, node: "Node", shares: "Shares") -> Row:
    """The row of a mesh on so many devices; without numbers where there is no such mesh, or none that fits."""
    from runtime.observe.proposal import USABLE, needed, predict, ways
    from runtime.parallel.communication import Network

    try:
        parallel, layout = laid_out(config, devices, mesh, node)
    except ValueError as error:
        return Row(name, devices, mesh, missing=f"no such mesh: {error}")
    network = Network.of(config.model)
    found = [
        (predict(config, network, each, node, shares), held, each)
        for each in ways(config, parallel, layout)
        if (held := needed(config, network, each)) <= USABLE * node.memory
    ]
    if not found:
        return Row(name, devices, mesh, missing="does not fit")
    time, held, best = min(found, key=lambda each: each[0].seconds)
    return Row(
        name,
        devices,
        mesh,
        best.parallel.recompute,
        best.batch.sequences,
        seconds=time.seconds,
        waiting=time.share,
        tokens_per_second=time.tokens_per_second / devices,
        mfu=time.mfu,
        gigabytes=held / 1e9,
    )


def laid_out(config: "Config", devices: int, mesh: str, node: "Node") -> "tuple[ParallelConfig, Layout]":
    """A mesh of this kind. ValueError where there is none on so many devices, or for so many sequences."""
    from runtime.parallel.mesh import plan_layout

    tensor, replicates = MESHES[mesh]
    machines, rest = divmod(devices, node.devices)
    if replicates and (machines < 2 or rest):
        raise ValueError(f"a replica on each machine needs two or more whole machines of {node.devices} devices")
    degrees = {"tensor": tensor, "data_replicate": machines if replicates else 1, "data_shard": "auto"}
    parallel = config.parallel.model_copy(update=degrees)
    return parallel, plan_layout(parallel, devices, config.model, config.data.seq_len, *config.batches.sizes)


def table(found: list[Row]) -> str:
    head = "model  devices  mesh         recompute  micro  s/step  waiting  tokens/s a device    MFU   GB"
    lines = [head]
    for row in found:
        start = f"{row.model:<5}  {row.devices:7,}  {row.mesh:<11}  "
        if row.seconds is None:
            lines.append(f"{start}{row.missing}")
            continue
        lines.append(
            f"{start}{row.recompute:<9}  {row.micro:5}  {row.seconds:6.2f}  {row.waiting:7.1%}  "
            f"{row.tokens_per_second:17,.0f}  {row.mfu:5.1%}  {row.gigabytes:3.0f}"
        )
    return "\n".join(lines)


def plot(found: list[Row], path: Path) -> None:
    """Tokens/s of a device against the number of devices, a panel a model and a line a mesh."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in found))
    figure, axes = pyplot.subplots(1, len(models), figsize=(4 * len(models), 3.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for mesh in MESHES:
            line = [row for row in found if (row.model, row.mesh) == (model, mesh) and row.seconds is not None]
            axis.plot([row.devices for row in line], [row.tokens_per_second for row in line], marker="o", label=mesh)
        axis.set(title=model, xscale="log", xlabel="devices", ylabel="predicted tokens/s a device")
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
