"""Matrix products of the blocks in float8, by torchao: forward and backward, with scales found anew for each product.

Parameters, their names, gradients and moments stay as they are, and so does what FSDP gathers. Scales are powers of
two, so that a number is rounded alike whatever else is in its tensor, as long as both lie within the 2^15 that float8
spans: the loss then depends as little on the mesh and the micro-batch as in float32, where other scales change it by a
percent.
"""

import importlib.util
from dataclasses import replace

import torch
from torch import nn

from runtime.config import ParallelConfig
from runtime.model.config import ModelConfig
from runtime.model.linear import Linear

MULTIPLE = 16
"""Of both sizes of a weight and of the tokens of a micro-batch, which the kernels need."""
CAPABILITY = (8, 9)
"""CUDA compute capability from which on there are kernels."""


def refuse_float8(parallel: ParallelConfig, model: ModelConfig, seq_len: int) -> None:
    """ValueError where float8 is asked for and this model, mesh or length of sequences has none."""
    if parallel.float8 == "none":
        return
    asked = f'parallel.float8 = "{parallel.float8}"'
    if parallel.tensor > 1:
        raise ValueError(f"{asked} and parallel.tensor = {parallel.tensor}: accepted is one of them")
    if model.tying.relaxation != "none" or model.templates:
        raise ValueError(f"{asked}: accepted are models without model.tying.relaxation and model.templates")
    if seq_len % MULTIPLE:
        raise ValueError(f"{asked}: accepted are multiples of {MULTIPLE} as data.seq_len, which is {seq_len}")


def check_available(parallel: ParallelConfig) -> None:
    """ValueError where float8 is asked for and cannot be had here."""
    if parallel.float8 == "none":
        return
    asked = f'parallel.float8 = "{parallel.float8}"'
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f'{asked} needs the torchao package, which is not installed: pip install "meristem[float8]"')
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        name = torch.cuda.get_device_name()
        raise ValueError(f"{asked} needs a GPU of compute capability 8.9 or more, and this is an {name}")


def apply_float8(blocks: nn.Module, recipe: str, *, emulate: bool) -> None:
    """Replace the linears of attention and dense feed-forward, in place, by torchao's of the same parameters.

    `recipe` as torchao names it: "tensorwise" has one scale a tensor, "rowwise" one for each row of inputs and column
    of weights. `emulate`: round to float8 but multiply in float32, as a CPU must. Experts, routers, embedding and head
    stay as they are, and so does a linear that is not trained, or has a size that no kernel takes.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), round_scales_to_power_of_2=True, emulate=emulate)
    convert_to_float8_training(blocks, config=config, module_filter_fn=_is_taken)


def _is_taken(module: nn.Module, name: str) -> bool:
    if type(module) is not Linear or not module.weight.requires_grad:
        return False
    fits = all(size % MULTIPLE == 0 for size in module.weight.shape)
    return fits and not {"experts", "router"} & set(name.split("."))
