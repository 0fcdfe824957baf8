"""Linear layers whose weights are generated from templates (Pham et al. 2023, MixtureGrowth, arXiv 2311.04251).

A generated weight is sum_t c_t T_t: templates T_t of the weight's own shape, and a coefficient for each. Several
members can read one set of templates by coefficient vectors orthogonal to each other; after training, `fold` leaves
plain weights. With |c| = 1 and templates drawn like plain weights, a generated weight begins with the variance of a
plain one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from runtime.model.config import ModelConfig
from runtime.model.linear import Linear, linear, product_over_rows


def build_linear(config: ModelConfig, in_features: int, out_features: int) -> nn.Module:
    """A linear layer of a block, plain or generated as the configuration says."""
    if config.templates:
        return TemplateLinear(in_features, out_features, config.templates)
    return Linear(in_features, out_features)


class TemplateLinear(nn.Module):
    """A linear layer without a bias, generated from `templates.{t}` [out, in] and `coefficients` [templates]."""

    def __init__(self, in_features: int, out_features: int, templates: int):
        super().__init__()
        self.templates = nn.ParameterList(Linear(in_features, out_features).weight for _ in range(templates))
        self.coefficients = nn.Parameter(torch.full((templates,), templates**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return _TemplateLinear.apply(x, self.coefficients, *self.templates)


class _TemplateLinear(torch.autograd.Function):
    """Generates the weight anew in the backward: kept from the forward, those of all blocks would be the whole model
    on every rank, which FSDP is there to avoid."""

    @staticmethod
    def forward(ctx, x, coefficients, *templates):
        ctx.save_for_backward(x, coefficients, *templates)
        return linear(x, mix(coefficients, templates))

    @staticmethod
    def backward(ctx, grad):
        x, coefficients, *templates = ctx.saved_tensors
        x_grad = linear(grad, mix(coefficients, templates).t())
        weight_grad = product_over_rows(grad.flatten(0, -2), x.flatten(0, -2)).contiguous()
        coefficients_grad = torch.stack([(weight_grad * template).sum() for template in templates])
        return x_grad, coefficients_grad, *(weight_grad * each for each in coefficients.unbind())


def mix(coefficients: Tensor, templates: Sequence[Tensor]) -> Tensor:
    """sum_t coefficients[t] templates[t], of templates of equal shape."""
    first, *others = coefficients.unbind()
    mixed = templates[0] * first
    for coefficient, template in zip(others, templates[1:], strict=True):
        mixed = torch.addcmul(mixed, template, coefficient)
    return mixed


def fold(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The same decoder with plain weights, in the tensors' own precision; one without templates as it is.

    `tensors` has all parameters of a decoder by name, or any one linear's complete; it may read them when asked.
    """
    folded = {}
    for name in tensors:
        linear_name, _, template = name.partition(".templates.")
        if template == "0":
            templates = [tensors[f"{linear_name}.templates.{index}"] for index in range(config.templates)]
            folded[f"{linear_name}.weight"] = mix(tensors[f"{linear_name}.coefficients"], templates)
        elif not template and not name.endswith(".coefficients"):
            folded[name] = tensors[name]
    return config.model_copy(update={"templates": 0, "template_member": 0}), folded


def orthogonal_coefficients(previous: Tensor) -> Tensor:
    """Unit coefficients [templates], float64, in the direction that those of the members so far, [m, templates], cover
    least: the last right-singular vector, orthogonal to all of them where m < templates.

    Where several directions are covered equally little, it is the coordinate axis nearest to their space, projected
    into it; either way the largest entry is positive. So it depends on no decomposition's choices.
    """
    _, values, directions = torch.linalg.svd(previous.double(), full_matrices=True)
    covered = torch.zeros(previous.shape[1], dtype=torch.float64, device=previous.device)
    covered[: len(values)] = values
    tolerance = 1e-9 * covered[0]
    least = directions[covered <= covered[-1] + tolerance]
    projection = least.mT @ least
    nearest = projection.diagonal() >= projection.diagonal().amax() - 1e-9
    axis = projection[nearest.nonzero()[0, 0]]
    return axis / axis.norm()
