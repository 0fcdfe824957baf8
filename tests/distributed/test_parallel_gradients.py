"""The norm and the clipping of gradients that live on several ranks and meshes."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from runtime.parallel.gradients import gradient_norm, scale_gradients
from tests.workers import run_workers

LARGEST = 0.5


def distributed_parameters(poison: float | None) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """Parameters on four meshes with gradients, and the same gradients whole."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    places = [
        (both, [Shard(0), Shard(1)]),
        (both, [Shard(0), Replicate()]),
        (both, [Replicate(), Replicate()]),
        (flat, [Shard(0)]),
        (both["tensor"], [Shard(0)]),
        (None, None),
    ]
    parameters, gradients = [], []
    for number, (mesh, placements) in enumerate(places):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        if poison is not None and number == 3:
            gradient[4, 2] = poison
        gradients.append(gradient)
        local = gradient.clone() if mesh is None else distribute_tensor(gradient.clone(), mesh, placements)
        parameter = nn.Parameter(torch.zeros_like(local))
        parameter.grad = local
        parameters.append(parameter)
    unused = nn.Parameter(torch.zeros(3))
    return [*parameters, unused, parameters[0]], gradients


def norm_and_clipped(rank: int, poison: float | None) -> tuple[float, float, list[torch.Tensor], list[torch.Tensor]]:
    parameters, gradients = distributed_parameters(poison)
    norm = gradient_norm(parameters)
    assert norm.ndim == 0 and norm.dtype == torch.float32
    scale_gradients(parameters, norm, LARGEST)
    clipped = [each.grad for each in parameters[: len(gradients)]]
    clipped = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in clipped]
    plain = [nn.Parameter(torch.zeros_like(each)) for each in gradients]
    for parameter, gradient in zip(plain, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(plain, LARGEST)
    return norm.item(), expected.item(), clipped, [each.grad for each in plain]


def test_norm_and_clipping_are_those_of_the_whole_gradients():
    for norm, expected_norm, clipped, expected in run_workers(norm_and_clipped, 4, None):
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        torch.testing.assert_close(clipped, expected)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_non_finite_gradient_on_one_rank_reaches_all(poison):
    for norm, *_ in run_workers(norm_and_clipped, 4, poison):
        assert norm == poison or (math.isnan(norm) and math.isnan(poison))


def test_a_small_gradient_is_left_alone():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    norm = gradient_norm([parameter])
    scale_gradients([parameter], norm, 5.1)
    assert norm == 5 and parameter.grad.tolist() == [3.0, 4.0]


def test_no_gradient_at_all_is_a_zero_norm():
    assert gradient_norm([nn.Parameter(torch.ones(2))]) == 0
