"""How long it takes to read many run directories.

    python benchmarks/scaling_reading.py --runs 1000 --rows 10000

The folders are made in a temporary directory and removed: complete runs with a metrics row a step, an evaluation and
events. With --resumed, each was killed and resumed once, so that a tenth of its rows was written again. With
--held-out 0 none was evaluated, so that each final loss is a smooth.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scaling.readers import read

BATCH, SEQ_LEN = 256, 1024
WISH = "below 60 s for 1,000 runs of 10,000 rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--held-out", type=int, default=1, choices=(0, 1))
    parser.add_argument("--resumed", action="store_true")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="scaling-reading-"))
    try:
        size = make(root, arguments.runs, arguments.rows, bool(arguments.held_out), arguments.resumed)
        started, cpu = time.perf_counter(), time.process_time()
        table = read([root])
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    finally:
        shutil.rmtree(root)
    losses = table.numbers("loss")
    print(f"{len(table)} runs of {arguments.rows:,} rows, {size / 2**30:.2f} GiB: {wall:.2f} s, {cpu:.2f} s of CPU")
    print(f"losses {losses.min():.4f} to {losses.max():.4f}, {table.frame['loss_kind'].iloc[0]}; wished for: {WISH}")


def make(root: Path, runs: int, rows: int, is_held_out: bool, is_resumed: bool) -> int:
    """Write the run directories; returns the bytes of their metrics."""
    generator = np.random.default_rng(0)
    steps = np.arange(1, rows + 1)
    if is_resumed:
        again = int(0.5 * rows)
        steps = np.concatenate([steps[: again + rows // 10], steps[again:]])
    curve = 2.5 + 8 * (steps + 10.0) ** -0.35
    size = 0
    for run in range(runs):
        folder = root / f"ladder-{run % 10}" / f"run-{run:04d}"
        folder.mkdir(parents=True)
        loss = curve + run / runs + 0.05 * generator.normal(size=len(steps))
        text = "".join(line(int(step), float(value)) for step, value in zip(steps, loss, strict=True))
        size += (folder / "metrics.jsonl").write_text(text)
        (folder / "run.json").write_text(json.dumps(identity(run, rows), indent=2))
        kinds = ["run_start", *(["resume"] if is_resumed else []), "run_end"]
        events = [
            {"event": kind, "tokens": rows * BATCH * SEQ_LEN * (kind == "run_end"), "outcome": "finished"}
            for kind in kinds
        ]
        (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
        if is_held_out:
            row = {"tokens": rows * BATCH * SEQ_LEN, "segment": 0, "set": "heldout", "loss": 2.9 + run / runs}
            (folder / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    return size


def line(step: int, loss: float) -> str:
    tokens = step * BATCH * SEQ_LEN
    return (
        f'{{"step": {step}, "tokens": {tokens}, "sequences": {step * BATCH}, "segment": 0, "loss": {loss!r}, '
        f'"grad_norm": 0.8816766686058044, "lr": 0.00062436443416569, "weight_decay": 0.1, "batch_tokens": '
        f'{BATCH * SEQ_LEN}, "flops": {tokens * 595968}, "tokens_per_second": 14989.146756248912, "skipped": 0, '
        f'"wall_time": {step * 0.31901844200001506!r}, "time": {1.75e9 + step}}}\n'
    )


def identity(run: int, rows: int) -> dict:
    return {
        "id": f"{run:032x}", "name": f"run-{run:04d}", "seed": 0,
        "data": {"seq_len": SEQ_LEN, "sources": [{"path": "x", "fingerprint": "a", "tokens": 10**12, "weight": 1.0}]},
        "tokenizer": {"fingerprint": "b", "vocab_size": 512},
        "optimizer": {"name": "adamw", "lr": 0.004, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {"kind": "wsd", "peak_lr": 0.004, "final_lr": 0.0, "horizon_tokens": rows * BATCH * SEQ_LEN},
        "segments": [{
            "index": 0, "start_tokens": 0, "flops_per_token": 595968, "seq_len": SEQ_LEN, "batch_sequences": BATCH,
            "batch_tokens": BATCH * SEQ_LEN, "precision": "bf16",
            "counts": {"total": 83232, "non_embedding": 50464, "active": 83232, "unrolled_depth": 4},
            "model": {"num_layers": 4, "hidden_size": 32},
        }],
    }  # fmt: skip


if __name__ == "__main__":
    main()
