"""The loss trajectory of every layout equals one process's, for every option of the model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import SequenceParallel
from torch.nn import functional as F

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.cross_entropy import LinearCrossEntropy
from runtime.model.depth import Use
from runtime.model.linear import narrowed
from runtime.model.options import TyingConfig
from runtime.model.templates import _TemplateLinear
from runtime.model.tiled_attention import tiled_attention
from runtime.parallel import gradients
from runtime.parallel.fsdp import apply_fsdp, fsdp_modules
from runtime.parallel.mesh import plan_layout
from runtime.parallel.styles import TemplatesParallel
from runtime.parallel.tensor_parallel import HEADS
from tests.distributed.parity import (
    CASES,
    COMPANIONS,
    SEQ_LEN,
    SEQUENCES,
    Case,
    Trajectory,
    cases_of,
    mismatches,
    nested,
    train_alone,
    train_on_mesh,
)
from tests.workers import run_workers

LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"data_replicate": 2}),
    "tp2": (2, {"tensor": 2}),
    "tp4": (4, {"tensor": 4}),
    "fsdp2xtp2": (4, {"tensor": 2}),
}
NAMED = {case.name: case for case in CASES}


def possible(case: Case, layout: str) -> bool:
    world_size, degrees = LAYOUTS[layout]
    if case.layouts and layout not in case.layouts:
        return False
    try:
        plan_layout(ParallelConfig(**degrees), world_size, case.config, SEQ_LEN, SEQUENCES)
    except ValueError:
        return False
    return True


def is_slow(case: Case, layout: str) -> bool:
    """Four ranks of a kind do with an option what two do: of these layouts most cases are for the slow tests."""
    return layout in ("fsdp4", "tp4") and not case.layouts and case.name not in ("plain", "odd_vocabulary_tied")


def train_all(rank: int, layout: str, slow: bool) -> dict[str, Trajectory]:
    chosen = [case for case in CASES if possible(case, layout) and is_slow(case, layout) == slow]
    return {case.name: train_on_mesh(case, *LAYOUTS[layout]) for case in chosen}


@cache
def trajectories(layout: str, slow: bool) -> list[dict[str, Trajectory]]:
    """Each rank's trajectories of all slow cases or of all others, trained in one go."""
    return run_workers(train_all, LAYOUTS[layout][0], layout, slow, timeout=550)


@cache
def alone(name: str) -> Trajectory:
    return train_alone(NAMED[name])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(layout, case.name, marks=[pytest.mark.slow] if is_slow(case, layout) else [])
        for layout in LAYOUTS
        for case in CASES
        if possible(case, layout)
    ],
)
def test_a_mesh_trains_like_one_process(layout, name):
    for rank in trajectories(layout, is_slow(NAMED[name], layout)):
        assert mismatches(rank[name], alone(name)) == []


TILED = Case("tiled", {"num_kv_heads": 2}, document_mask=True), Case("tiled_causal", {})


def train_in_tiles(rank: int, layout: str) -> list[tuple[Trajectory, int]]:
    """Trajectories with attention in tiles, which is for longer sequences, and how often it was."""
    found = []
    with (
        patch.multiple("runtime.model.tiled_attention", _SHORTEST=1, _FEWEST_DIMS=1, _FEWEST_HEADS=1),
        patch("runtime.model.prefix_attention.tiled_attention", wraps=tiled_attention) as taken,
    ):
        for case in TILED:
            taken.reset_mock()
            found.append((train_on_mesh(case, *LAYOUTS[layout]), taken.call_count))
    return found


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_attention_in_tiles_trains_on_a_mesh_as_any_other_alone(layout):
    for rank in run_workers(train_in_tiles, 2, layout):
        for case, (trajectory, calls) in zip(TILED, rank, strict=True):
            assert calls > 0
            assert mismatches(trajectory, train_alone(case)) == []


def test_a_new_option_makes_its_cases():
    class Extended(ModelConfig):
        norm: Literal["rmsnorm", "layernorm", "new"] = "rmsnorm"
        newer: bool = True

    assert added_cases(Extended) == {"norm=new", "newer=false"}


def test_a_new_option_of_a_section_makes_its_cases_and_needs_its_companions():
    class Section(TyingConfig):
        plan: Literal["none", "cycle", "new"] | tuple[int, ...] = "none"
        newer: bool = False

    class Extended(ModelConfig):
        tying: Section = Section()

    with patch.dict(COMPANIONS, {"tying.newer": {"tying.plan": "new"}}):
        assert added_cases(Extended) == {"tying.plan=new", "tying.newer=true"}
        (case,) = (case for case in cases_of(Extended) if case.name == "tying.newer=true")
        assert nested(case.model) == {"tying": {"plan": "new", "newer": True}}
    with pytest.raises(LookupError, match=r"tying\.newer"):
        added_cases(Extended)


def added_cases(extended: type[ModelConfig]) -> set[str]:
    return {case.name for case in cases_of(extended)} - {case.name for case in cases_of(ModelConfig)}


class Unsummed(SequenceParallel):
    """Normalises heads with a weight whose gradient stays the own heads' alone."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        if self.sequence_sharding[0].dim != HEADS:
            return super()._apply(module, mesh)
        module.forward = lambda x: F.rms_norm(x, x.shape[-1:], module.weight.to_local(), module.eps)
        self._replicate_module_fn("", module, mesh)
        return module


class UnsummedCoefficients(TemplatesParallel):
    """Leaves the coefficients with the gradient of the own shard of the weight."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        def forward(x):
            own = module.coefficients.clone()
            if own.requires_grad:
                own.register_hook(lambda gradient: DTensor.from_local(gradient.to_local(), mesh, [Replicate()]))
            return _TemplateLinear.apply(x, own, *module.templates)

        module.forward = forward
        return super()._apply(module, mesh)


def unsummed(tensor):
    """A parameter that is whole on every rank keeps the gradient of the rank's own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fold_from_zero(x, delta, first, folded=narrowed):
    return folded(x, delta)


def averaged(decoder, mesh, *args):
    apply_fsdp(decoder, mesh, *args)
    for module in fsdp_modules(decoder):
        module.set_gradient_divide_factor(float(mesh.size()))


def replicas_apart(decoder, mesh, *args):
    apply_fsdp(decoder, mesh["data_shard"], *args)


def last_rows_kept(parameters, *args):
    gradients.scale_gradients(parameters, *args)
    for parameter in parameters:
        if parameter.shape[0] == 61 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            parameter.grad.to_local().zero_()


def counted_twice(parameter):
    return parameter.grad.device_mesh, 1


def local_order(tensor):
    return [torch.arange(size) for size in tensor.to_local().shape]


def head_detached(self, hidden, weight, *args, whole=LinearCrossEntropy.forward):
    return whole(self, hidden, weight.detach(), *args)


Defect = tuple[str, str, Callable[[], AbstractContextManager[Any]]]
DEFECTS: dict[str, Defect] = {
    "a norm's gradient is not summed over the tensor ranks": (
        "tp2",
        "grouped_query",
        lambda: patch("runtime.parallel.tensor_parallel.SequenceParallel", Unsummed),
    ),
    "the coefficients' gradient is not summed over the tensor ranks": (
        "tp2",
        "templates",
        lambda: patch("runtime.parallel.tensor_parallel.TemplatesParallel", UnsummedCoefficients),
    ),
    "a relaxation's gradient is not summed over the tensor ranks": (
        "tp2",
        "tying.relaxation=lora",
        lambda: patch("runtime.parallel.styles.local", unsummed),
    ),
    "each tensor rank folds its inputs as if they were the first": (
        "tp4",
        "miss.remainder",
        lambda: patch("runtime.parallel.styles.narrowed", fold_from_zero),
    ),
    "the aggregation's gradient is not summed over the tensor ranks": (
        "tp2",
        "streams.backbone=frozen",
        lambda: patch("runtime.parallel.styles.local", unsummed),
    ),
    "a router's gradient is not summed over the tensor ranks": (
        "tp2",
        "experts.balance=none",
        lambda: patch("runtime.parallel.styles.local", unsummed),
    ),
    "each tensor rank counts the experts' balancing loss": (
        "tp2",
        "experts.balance=loss",
        lambda: patch("runtime.parallel.styles.counted_once", lambda loss, ranks: loss),
    ),
    "gradients are averaged": ("fsdp2", "plain", lambda: patch("runtime.parallel.parallelize.apply_fsdp", averaged)),
    "replicas keep their own gradients": (
        "hsdp2x2",
        "plain",
        lambda: patch("runtime.parallel.parallelize.apply_fsdp", replicas_apart),
    ),
    "the last rows of an uneven shard are never updated": (
        "fsdp4",
        "odd_vocabulary_tied",
        lambda: patch("runtime.step.scale_gradients", last_rows_kept),
    ),
    "the optimizer moves what belongs to depths without gradients": (
        "fsdp2",
        "loops.last_ones_trained",
        lambda: patch.object(Use, "detached", lambda use: use),
    ),
    "replicated gradients count twice in the norm": (
        "fsdp2xtp2",
        "plain",
        lambda: patch("runtime.parallel.gradients._mesh_and_copies", counted_twice),
    ),
    "each rank divides by its own valid targets": (
        "fsdp2",
        "uneven_targets",
        lambda: patch("runtime.step.dist.all_reduce", lambda *args, **kwargs: None),
    ),
    "shards are initialised by their own order": (
        "fsdp2",
        "plain",
        lambda: patch("runtime.parallel.parallelize.local_indices", local_order),
    ),
    "a tied head sends no gradient": (
        "fsdp2",
        "tie_embeddings=true",
        lambda: patch.object(LinearCrossEntropy, "forward", head_detached),
    ),
}


def train_with(rank: int, defect: str) -> Trajectory:
    layout, name, inject = DEFECTS[defect]
    with inject():
        return train_on_mesh(NAMED[name], *LAYOUTS[layout])


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_be_seen(defect):
    layout, name, _ = DEFECTS[defect]
    found = run_workers(train_with, LAYOUTS[layout][0], defect)
    assert mismatches(found[0], alone(name))
