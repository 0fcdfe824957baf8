"""ParScale: fewer streams for a trained model."""

from typing import Annotated

import torch
from pydantic import Field

from growth.dimensions import module_of, parameter_shapes
from growth.maps import Axis, TensorMap, Term
from growth.operator import Growth, operator
from growth.policies import Moments
from runtime.model.config import ModelConfig


@operator(preserves="nothing", moments=Moments.KEEP, source="arXiv 2505.10475, undone")
def keep(model: ModelConfig, *, count: Annotated[int, Field(gt=0)]) -> Growth:
    """Compute every token in the first `count` of the model's streams alone from here on.

    They keep their prefixes, and the aggregation its rows and inputs of them; what belongs to the others goes, and what
    those said is missing from the logits. With 1 the model is a plain one, without prefixes and aggregation: that of
    before `streams.add`, where the backbone was frozen.

    Example: ``keep(model, count=2)`` of a model of four streams.
    """
    old = model.streams
    if count >= old.count:
        raise ValueError(f"count {count} is not less than the model's {old.count} streams")
    streams = old.model_dump() | {"count": count} if count > 1 else {}
    target = ModelConfig(**model.model_dump() | {"streams": streams})
    maps = {name: _kept(name, shape, old.count, count) for name, shape in parameter_shapes(target).items()}
    return Growth(target, maps, preserves=False)


def _kept(name: str, shape: tuple[int, ...], before: int, count: int) -> TensorMap:
    """The part of a parameter that belongs to the first streams: rows, which are in their order, or the inputs of the
    aggregation, of which i * before + p is entry i of stream p."""
    axes = list(map(Axis.identity, shape))
    if module_of(name) == "aggregation_in" and len(shape) == 2:
        inputs = torch.arange(shape[1])
        axes[1] = Axis.of(inputs // count * before + inputs % count)
    return TensorMap(shape, (Term(name, tuple(axes)),))
