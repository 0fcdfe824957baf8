"""Our own run directories (docs/observation.md): run.json for what was trained, the logs for what came of it."""

import fcntl
import hashlib
import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.columns import DIVERGED, FINISHED, KILLED, RUNNING
from scaling.curves import final_loss
from scaling.readers.ancestry import Begun, begun
from scaling.readers.histories import AT_END
from scaling.readers.mixture import mixture
from scaling.readers.rows import Row, Tail, changed_at, number, read_all, read_tail, rewritten, scan

RECENT = 600.0
"""Seconds since its last row within which a run without an end is still running."""
TRAINING = "train"
"""What the loss is called where the smoothed training loss is asked for although there are held-out sets."""
ORIGINS = {
    "run": "run.json: name", "source": "its folder", "status": "events.jsonl", "labels": "noticed",
    "loss": "evaluations.jsonl at the end, else a smooth of metrics.jsonl", "loss_error": "AR(1) of the smooth",
    "loss_kind": "which of these", "tokens": "metrics.jsonl, last, less those of ancestors that are other runs",
    "parent_tokens": "run.json of it and its ancestors", "steps": "metrics.jsonl, last",
    "flops": "metrics.jsonl, last", "batch_tokens": "metrics.jsonl, last",
    "final_lr": "run.json: schedule, of a run that finished; else metrics.jsonl, last",
    "lr": "run.json: schedule.peak_lr", "data": "run.json: contents and proportions of the sources",
    "total": "run.json: counts of the last segment", "non_embedding": "run.json: counts of the last segment",
    "active": "run.json: counts of the last segment", "unique_tokens": "run.json: sizes and proportions of the sources",
}  # fmt: skip
"""Where columns come from that are not simply in run.json."""
ENDS = {"finished": FINISHED, "diverged": DIVERGED}
"""Outcomes of a launch; all others are of a run that was stopped."""
STOPPED_EARLY = "stopped_early"
"""What a sweep writes after the end of a run that it stopped, with the rule and its reason."""
HOPELESS = ("initial",)
"""Rules of a sweep by which a run diverged: after the warm-up its loss stayed above that of its first step."""


@dataclass(frozen=True)
class Reading:
    """One run directory as it was read."""

    row: Row
    id: str
    sets: tuple[str, ...]
    """Held-out sets that it has a loss of."""
    digest: str
    """SHA-256 of what was looked at: run.json, evaluations, events, the end of metrics.jsonl, and where it began."""


def read(folder: Path, held_out: str | None = None, *, now: float) -> Reading:
    """The row of a run directory. `held_out` names the set whose loss is taken, or is "train"; by default the first set
    that was evaluated at the run's end. `now` is the Unix time that "recent" is measured from.

    ValueError, naming the file, for a run.json that is no JSON object.
    """
    identity, raw = _identity(folder)
    tail = read_tail(folder / "metrics.jsonl")
    evaluations, eval_labels, eval_bytes = read_all(folder / "evaluations.jsonl")
    events, event_labels, event_bytes = read_all(folder / "events.jsonl")
    labels = [*tail.labels, *eval_labels, *event_labels]
    row: Row = {"run": identity.get("name") or folder.name, "source": str(folder)}
    row |= described(identity)
    planned = row.get("final_lr")
    row |= _progress(folder, tail, events, row)
    row["status"] = _status(folder, tail, events, identity, now, labels)
    if row["status"] == FINISHED and planned is not None:
        row["final_lr"] = planned  # that of the last step is a step short of it, and differs with the batch
    losses = _losses(evaluations, row.get("tokens", float("nan")), identity)
    row |= _loss(tail, losses, held_out, labels)
    beginning = begun(folder, identity)
    row |= _parent(identity, beginning, row.get("tokens", float("nan")))
    labels += beginning.labels
    row["unique_tokens"] = _unique(identity, row.get("tokens", float("nan")))
    labels += _noticed(folder, tail, events, identity, row)
    row["labels"] = "; ".join(dict.fromkeys(labels)) or None
    read_bytes = b"\0".join((raw, eval_bytes, event_bytes, tail.read, str(beginning).encode()))
    return Reading(row, str(identity.get("id", "")), tuple(losses), hashlib.sha256(read_bytes).hexdigest())


def described(identity: Row) -> Row:
    """The columns that run.json knows before training."""
    optimizer, schedule = identity.get("optimizer", {}), identity.get("schedule", {})
    segment = (identity.get("segments") or [{}])[-1]
    counts, betas = segment.get("counts", {}), optimizer.get("betas") or [None, None]
    tokenizer = identity.get("tokenizer", {})
    vocabulary = tokenizer.get("vocab_size")
    row = {
        "seed": identity.get("seed"),
        "total": counts.get("total"),
        "non_embedding": counts.get("non_embedding"),
        "active": counts.get("active"),
        "hidden_size": segment.get("model", {}).get("hidden_size"),
        "num_layers": counts.get("unrolled_depth"),
        "seq_len": segment.get("seq_len"),
        "batch_tokens": segment.get("batch_tokens"),
        "batch_sequences": segment.get("batch_sequences"),
        "lr": schedule.get("peak_lr", optimizer.get("lr")),
        "final_lr": schedule.get("final_lr"),
        "schedule": schedule.get("kind"),
        "warmup_tokens": schedule.get("warmup_tokens"),
        "weight_decay": optimizer.get("weight_decay"),
        "optimizer": optimizer.get("name"),
        "beta1": betas[0],
        "beta2": betas[1],
        "flops_per_token": segment.get("flops_per_token"),
        "precision": segment.get("precision"),
        "tokenizer": tokenizer.get("fingerprint") or (f"vocabulary of {vocabulary}" if vocabulary else None),
        "data": mixture(identity.get("data", {})),
        **_repeated(segment.get("model", {}), counts),
    }
    return {name: value for name, value in row.items() if value is not None}


def _identity(folder: Path) -> tuple[Row, bytes]:
    """run.json; where it is missing, what config.toml says of the same."""
    path = folder / "run.json"
    if path.exists():
        raw = path.read_bytes()
        try:
            identity = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(identity, dict):
            raise ValueError(f"{path}: does not hold a JSON object")
        return identity, raw
    path = folder / "config.toml"
    if not path.exists():
        return {}, b""
    raw = path.read_bytes()
    try:
        config = tomllib.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    optim, data, batch = (config.get(name, {}) for name in ("optim", "data", "batch"))
    segment = {"model": config.get("model", {}), "seq_len": data.get("seq_len")}
    if isinstance(batch.get("sequences"), int) and isinstance(data.get("seq_len"), int):
        segment["batch_sequences"] = batch["sequences"]
        segment["batch_tokens"] = batch["sequences"] * data["seq_len"]
    schedule = {"kind": config.get("schedule", {}).get("kind"), "peak_lr": optim.get("lr")}
    run = config.get("run", {})
    segments = [{name: value for name, value in segment.items() if value is not None}]
    return {"name": run.get("name"), "seed": run.get("seed"), "optimizer": optim, "schedule": schedule,
            "segments": segments}, raw  # fmt: skip


def _repeated(model: Row, counts: Row) -> Row:
    """Streams, recurrences, and of a model that repeats blocks the parameters used once and repeatedly, embedding and
    head left out: of a tied block its matrices and the norms that its uses share; all else is used once."""
    tying, streams = model.get("tying") or {}, model.get("streams") or {}
    row: Row = {"streams": streams.get("count", 1), "recurrences": 1.0}
    plan, loops = tying.get("plan", "none"), tying.get("loops", 1)
    if not model:
        return {}
    if isinstance(plan, list):
        uses = [plan.count(block) for block in set(plan)]
        if len(set(uses)) != 1:
            return {"streams": row["streams"]}
        loops, tied = uses[0], len(uses)
    else:
        ends = tying.get("ends", 1) if plan.startswith("middle_") else 0
        tied = (model["num_layers"] - 2 * ends) // loops
    if plan == "none" or loops == 1:
        return row
    row["recurrences"] = float(loops)
    is_plain = not (model.get("experts") or {}).get("count") and not model.get("templates")
    if is_plain and "non_embedding" in counts:
        hidden, width = model["hidden_size"], model["head_dim"]
        block = 2 * hidden * width * (model["num_heads"] + model["num_kv_heads"])
        block += 3 * hidden * model["intermediate_size"] + (2 * width if model.get("qk_norm") else 0)
        norms = 2 if model.get("sandwich_norm", "none") == "none" else 4
        block += 0 if tying.get("own_norms") else norms * hidden
        row["recurrent"] = tied * block
        row["once"] = counts["non_embedding"] - tied * block
    return row


def _progress(folder: Path, tail: Tail, events: list[Row], known: Row) -> Row:
    """What was reached: tokens, steps, FLOPs, the last rate and batch."""
    told = [row for row in events if row.get("event") != STOPPED_EARLY]
    ends = [row.get("tokens", 0) for row in told[-1:] if row.get("event") == "run_end"]
    row = {name: tail.last(name) for name in ("tokens", "flops", "batch_tokens")}
    row |= {"steps": tail.last("step"), "final_lr": tail.last("lr")}
    if ends and not row["tokens"] >= ends[-1]:
        row["tokens"] = float(ends[-1])
    if "lr" not in known and tail.rows:
        rates = scan(folder / "metrics.jsonl", "lr")
        row["lr"] = float(rates.max()) if rates.size else float("nan")
    row = {name: value for name, value in row.items() if np.isfinite(value)}
    if "batch_tokens" in row and known.get("seq_len"):
        row["batch_sequences"] = row["batch_tokens"] / known["seq_len"]
    return row


def _status(folder: Path, tail: Tail, events: list[Row], identity: Row, now: float, labels: list[str]) -> str:
    """By the last launch's end, or the sweep that stopped it; of one without an end, whether it is still at work."""
    starts = [k for k, row in enumerate(events) if row.get("event") in ("run_start", "resume")]
    if (ended := _ended(events[starts[-1] if starts else 0 :], labels)) is not None:
        return ended
    if tail.rows and not np.isfinite(tail.column("loss")[-1]):
        labels.append("the loss is not finite")
        return DIVERGED
    if now - changed_at(folder / "metrics.jsonl") < RECENT or _is_locked(folder / ".lock"):
        return RUNNING
    horizon = identity.get("schedule", {}).get("horizon_tokens")
    if not events and tail.rows and (horizon is None or tail.last("tokens") >= horizon):
        labels.append("no record of its end; taken for finished")
        return FINISHED
    return KILLED


def _ended(launch: list[Row], labels: list[str]) -> str | None:
    """The status that the events of a launch tell; None of one without an end."""
    stops = [row for row in launch if row.get("event") == STOPPED_EARLY]
    if stops:
        labels.append(f"stopped early: {stops[-1].get('reason')}".replace("; ", ", "))
        return DIVERGED if stops[-1].get("rule") in HOPELESS else KILLED
    ends = [row for row in launch if row.get("event") == "run_end"]
    if not ends:
        return None
    outcome = str(ends[-1].get("outcome"))
    if outcome not in ENDS:
        labels.append(f"stopped: {outcome}")
    return ENDS.get(outcome, KILLED)


def _is_locked(path: Path) -> bool:
    """Whether a launch holds a run's lock. It is asked for only where nothing was written for a while."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _losses(evaluations: list[Row], end: float, identity: Row) -> dict[str, float]:
    """The loss at the run's end of each held-out set, in the order of the configuration, averaged weights last."""
    last: dict[str, float] = {}
    for row in evaluations:
        name, tokens = row.get("set"), row.get("tokens")
        if not isinstance(tokens, int | float) or not isinstance(name, str):
            continue
        if end * (1 - AT_END) <= tokens <= end or not np.isfinite(end):
            last.pop(name, None)
            last[name] = number(row.get("loss"))
    configured = [each.get("name") for each in identity.get("data", {}).get("evaluation_sets", [])]
    places = {name: k for k, name in enumerate(configured)}
    names = sorted(last, key=lambda name: (name not in places, places.get(name, 0), name.endswith("-ema")))
    return {name: last[name] for name in names}


def _loss(tail: Tail, losses: dict[str, float], held_out: str | None, labels: list[str]) -> Row:
    """The final loss, its standard error and kind."""
    if held_out is not None and held_out != TRAINING and held_out not in losses:
        labels.append(f"no evaluation on {held_out} at its end")
        return {"loss": float("nan"), "loss_error": float("nan"), "loss_kind": f"held-out {held_out}"}
    if losses and held_out != TRAINING:
        name = held_out or next(iter(losses))
        if held_out is None and len(losses) > 1:
            labels.append(f"held-out loss of {name}, the first of {', '.join(losses)}")
        return {"loss": losses[name], "loss_error": float("nan"), "loss_kind": f"held-out {name}"}
    smooth = final_loss(tail.column("tokens"), tail.column("loss"))
    if not tail.rows:
        labels.append("empty")
    elif not np.isfinite(smooth.value):
        labels.append(f"no smooth of {smooth.rows} logged losses")
    return {"loss": smooth.value, "loss_error": smooth.error, "loss_kind": "training, smoothed"}


def _parent(identity: Row, beginning: Begun, clock: float) -> Row:
    """The parent, its tokens where it is another run, and those of this run alone, of all that the clock shows."""
    parent = identity.get("parent")
    if not isinstance(parent, dict):
        return {}
    row = {"parent": parent.get("run") or parent.get("checkpoint"), "tokens": clock - beginning.clock}
    return row | ({"parent_tokens": beginning.ancestors} if beginning.ancestors else {})


def _unique(identity: Row, tokens: float) -> float:
    """Different tokens seen: of each source its share of all, but never more than it has."""
    sources = identity.get("data", {}).get("sources") or []
    whole = sum(each.get("weight", 1.0) for each in sources)
    if not sources or not all("tokens" in each for each in sources):
        return float("nan")
    return sum(min(each.get("weight", 1.0) / whole * tokens, each["tokens"]) for each in sources)


def _noticed(folder: Path, tail: Tail, events: list[Row], identity: Row, row: Row) -> list[str]:
    """Labels for what happened on the way."""
    count = {name: sum(each.get("event") == name for each in events) for name in
             ("run_start", "resume", "rollback", "mixture_change", "growth")}  # fmt: skip
    launches = count["run_start"] + count["resume"]
    labels = [f"{launches} launches"] if launches > 1 else []
    if tail.rows and (launches > 1 or count["rollback"] or not events):
        again = rewritten(folder / "metrics.jsonl")
        labels += [f"{again} rows written again after a resume"] if again else []
    if count["growth"] or len(identity.get("segments", [])) > 1:
        starts = [each.get("start_tokens", 0) for each in identity.get("segments", [])][1:]
        labels.append(f"grew at {', '.join(f'{each:.4g}' for each in starts)} tokens" if starts else "grew")
    labels += [f"{count['rollback']} rollbacks"] if count["rollback"] else []
    labels += ["the data mixture changed"] if count["mixture_change"] else []
    if tail.first:
        first, last = tail.first.get("batch_tokens"), row.get("batch_tokens")
        if first and last and first != last:
            labels.append(f"the batch went from {first:.6g} to {last:.6g} tokens")
        loss = tail.first.get("loss")  # of a run that goes on with a parent's weights it is no first one
        if isinstance(loss, int | float) and row.get("loss", 0) > loss and not identity.get("parent"):
            labels.append(f"ends above its first loss, {loss:.4g}")
    return labels
