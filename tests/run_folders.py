"""Run directories as training leaves them, for the tests of what reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, SEQUENCES = 128, 8
BATCH = SEQ_LEN * SEQUENCES


def run_json(name: str = "a", **changes: Any) -> dict[str, Any]:
    contents = {
        "id": f"id of {name}", "name": name, "seed": 0,
        "data": {
            "fingerprint": "order", "seq_len": SEQ_LEN,
            "sources": [{"path": "data/train", "fingerprint": "text", "tokens": 10**9, "weight": 1.0}],
            "evaluation_sets": [{"name": "heldout", "path": "data/heldout"}, {"name": "code", "path": "data/code"}],
        },
        "tokenizer": {"fingerprint": "bpe", "vocab_size": 512},
        "optimizer": {"name": "adamw", "lr": 0.004, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {"kind": "wsd", "peak_lr": 0.004, "final_lr": 0.0, "horizon_tokens": 2000 * BATCH,
                     "warmup_tokens": 100 * BATCH, "decay_tokens": 400 * BATCH},
        "segments": [segment()],
    }  # fmt: skip
    return contents | changes


def segment(index: int = 0, start: int = 0, non_embedding: int = 50_464, **model: Any) -> dict[str, Any]:
    return {
        "index": index, "start_tokens": start, "flops_per_token": 595_968, "seq_len": SEQ_LEN,
        "batch_sequences": SEQUENCES, "batch_tokens": BATCH, "precision": "fp32",
        "counts": {"total": non_embedding + 32_768, "non_embedding": non_embedding, "active": non_embedding + 32_768,
                   "unrolled_depth": 4},
        "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 88, "num_heads": 1, "num_kv_heads": 1,
                  "head_dim": 32, "tying": {"plan": "none", "loops": 1}, "streams": {"count": 1}} | model,
    }  # fmt: skip


def metrics(first: int, last: int, *, loss=None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of steps `first` to `last`, whose loss falls to 2.5 at step 2000 and has noise of 0.05."""
    noise = 0.05 * np.random.default_rng(seed).normal(size=last + 1)
    rows = []
    for step in range(first, last + 1):
        tokens = step * BATCH
        value = 2.5 + 4 * (step**-0.5 - 2000**-0.5) + noise[step] if loss is None else loss
        row = {"step": step, "tokens": tokens, "segment": 0, "loss": float(value), "lr": 0.004 if step < 1600 else 1e-4,
               "batch_tokens": BATCH, "flops": tokens * 595_968, "time": 1.75e9 + step}  # fmt: skip
        rows.append(row)
    return rows


def evaluation(tokens: int, loss: float, name: str = "heldout", segment: int = 0) -> dict[str, Any]:
    return {"tokens": tokens, "segment": segment, "set": name, "loss": loss, "perplexity": float(np.exp(loss))}


def event(kind: str, tokens: int = 0, **details: Any) -> dict[str, Any]:
    return {"event": kind, "tokens": tokens, "step": tokens // BATCH, "segment": 0, **details, "time": 1.75e9}


FINISHED = [event("run_start"), event("run_end", 2000 * BATCH, outcome="finished")]


def write(folder: Path, rows=None, *, identity=None, evaluations=(), events=FINISHED, tail: str = "") -> Path:
    """A run directory whose metrics end in `tail`."""
    folder.mkdir(parents=True)
    if identity is not False:
        (folder / "run.json").write_text(json.dumps(identity or run_json(folder.name)))
    rows = metrics(1, 2000) if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    for name, lines in (("evaluations", evaluations), ("events", events)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder
