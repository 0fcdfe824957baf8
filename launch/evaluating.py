"""The held-out losses of checkpoints, as the run they are of evaluates them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from runtime.checkpoint.store import CheckpointStore
from runtime.config import Config
from runtime.data.evaluation_set import EvaluationSet
from runtime.evaluation import evaluate
from runtime.inputs import open_held_out
from runtime.model.decoder import Decoder
from runtime.parallel.mesh import Layout, build, plan_layout
from runtime.parallel.parallelize import parallelize
from runtime.state import model_tensors

Losses = dict[str, dict[str, Any]]
"""By set, as of `runtime.evaluation.evaluate`."""


@dataclass(frozen=True)
class Evaluation:
    """What a run evaluates on, opened and checked."""

    config: Config
    layout: Layout
    held_out: dict[str, EvaluationSet]


def open_evaluation(stored: Mapping[str, Any]) -> Evaluation:
    """The held-out sets of the configuration that a checkpoint holds, for the processes at hand. ValueError if there
    are none, one cannot be read, or the model does not fit the processes."""
    known = {key: value for key, value in stored.items() if key in Config.model_fields}
    parallel = known.get("parallel", {}) | {"data_shard": "auto", "data_replicate": 1, "float8": "none"}
    config = Config.model_validate(known | {"parallel": parallel})
    if not config.evaluation.sets:
        raise ValueError("the run has no evaluation.sets to evaluate on")
    sizes = config.data.seq_len, *config.batches.sizes
    layout = plan_layout(config.parallel, dist.get_world_size(), config.model, *sizes)
    return Evaluation(config, layout, open_held_out(config))


def losses(evaluation: Evaluation, checkpoints: Mapping[str, tuple[CheckpointStore, str]]) -> dict[str, Losses]:
    """The losses of each checkpoint, a store and a name, by their labels; a collective."""
    config = evaluation.config
    mesh = build(evaluation.layout, "cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        decoder = Decoder(config.model)
    parallelize(decoder, mesh, config.parallel)
    decoder.to_empty(device=mesh.device)
    share = config.batch.sequences // mesh.layout.data
    micro = config.evaluation.micro_sequences or config.batch.micro_sequences or share
    found = {}
    for label, (store, name) in checkpoints.items():
        store.load(name, model_tensors(decoder), partial_load=True)
        sets = evaluation.held_out.items()
        found[label] = {key: evaluate(decoder, each, mesh, micro, lambda: True) for key, each in sets}
    return found
