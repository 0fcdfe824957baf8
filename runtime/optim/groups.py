"""Parameters in groups that share the multipliers of their roles."""

from typing import NamedTuple, NotRequired, TypedDict

from torch import nn

from runtime.model.parametrization import Role, has_decay, role


class Scales(NamedTuple):
    """What a role multiplies a run's base rates by."""

    lr: float
    weight_decay: float


class ParameterGroup(TypedDict):
    """Parameters that are updated alike; `names` and `params` belong together in order."""

    names: list[str]
    params: list[nn.Parameter]
    lr_scale: float
    lr: NotRequired[float]
    """The group's own rate, `lr_scale` times the base rate: assigned before every step."""
    weight_decay: float


def scales(role: Role) -> Scales:
    """Standard parametrisation: one learning rate for all, and decay by role."""
    return Scales(lr=1.0, weight_decay=1.0 if has_decay(role) else 0.0)


def parameter_groups(decoder: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Every parameter of a decoder exactly once, in as few groups as its roles have distinct scales."""
    groups: dict[Scales, ParameterGroup] = {}
    for name, parameter in decoder.named_parameters():
        found = scales(role(name))
        empty = ParameterGroup(names=[], params=[], lr_scale=found.lr, weight_decay=weight_decay * found.weight_decay)
        group = groups.setdefault(found, empty)
        group["names"].append(name)
        group["params"].append(parameter)
    return list(groups.values())
