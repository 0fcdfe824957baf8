"""Mean sizes of a decoder's activations over its first steps, for one shape after another.

Under a parametrisation that transfers they are those of the base at every width (Yang et al. 2022, arXiv 2203.03466,
appendix D.1) and, where it scales depth, at every depth.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.config import OptimConfig
from runtime.model.block import Block
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.depth import Depth, Relaxation
from runtime.model.experts import MixtureOfExperts
from runtime.model.initialization import initialize
from runtime.model.linear import linear
from runtime.model.streams import PrefixParameters
from runtime.optim.optimizers import build

_HAND_OUT_PARAMETERS = Depth, Relaxation, PrefixParameters
"""Modules whose results are no activations."""


class Coordinate(NamedTuple):
    """A measurement: a row of the table."""

    size: int
    """Width or depth."""
    seed: int
    step: int
    """Updates before it."""
    output: str
    """What was measured, such as "attention.q_proj", whichever block it is in."""
    depth: int | None
    """Unrolled: each use of a block is a row of its own. Of an injection that which it is the input of."""
    mean_abs: float
    change: float
    """Mean absolute difference from step 0."""


def at_width(model: ModelConfig, width: int, scaled: str = "heads") -> ModelConfig:
    """The model with all its widths times width / hidden_size: the feed-forward, and the number of heads or, for
    `scaled` = "head_dim", their size. ValueError where that is no whole number."""
    sizes = ("num_heads", "num_kv_heads") if scaled == "heads" else ("head_dim",)
    changes = {"hidden_size": width}
    for name in ("intermediate_size", *sizes):
        changes[name], rest = divmod(getattr(model, name) * width, model.hidden_size)
        if rest or not changes[name]:
            raise ValueError(
                f"width {width}: {name} {getattr(model, name)} x {width} / {model.hidden_size} is not whole"
            )
    return ModelConfig(**{**model.model_dump(), **changes})


def at_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """The model with another unrolled depth. ValueError where its depth plan does not fit."""
    return ModelConfig(**{**model.model_dump(), "num_layers": depth})


def with_base(models: Sequence[ModelConfig]) -> list[ModelConfig]:
    """The models with the first one's shape as their base, where they need one and have none."""
    base = models[0]
    options = base.parametrization
    if options.kind == "standard":
        return list(models)
    names = ["hidden_size", "intermediate_size", "num_heads", "head_dim"]
    names += ["num_layers"] if options.kind == "completep" else []
    given = {f"base_{name}": getattr(options, f"base_{name}") or getattr(base, name) for name in names}
    return [each.model_copy(update={"parametrization": options.model_copy(update=given)}) for each in models]


def measure(
    model: ModelConfig, optim: OptimConfig, tokens: Tensor, steps: int, seed: int, size: int
) -> list[Coordinate]:
    """Train on one batch [b, s + 1] for some steps at a constant rate; what is measured before each and after the
    last."""
    decoder = Decoder(model)
    initialize(decoder, seed)
    optimizer = build(decoder, optim)
    optimizer.set_learning_rate(optim.lr)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    first: dict[tuple[str, int | None], Tensor] = {}
    found = []
    for step in range(steps + 1):
        for key, value in recorded(decoder, inputs).items():
            change = (value - first.setdefault(key, value)).abs().mean()
            found.append(Coordinate(size, seed, step, *key, float(value.abs().mean()), float(change)))
        if step < steps:
            (decoder(inputs, targets).total / targets.numel()).backward()
            optimizer.step()
            for parameter in decoder.parameters():
                parameter.grad = None
    return found


@torch.no_grad()
def recorded(decoder: Decoder, tokens: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """The output of every module, and the largest attention logit, by name and unrolled depth; the final norm's without
    the output's multiplier. Of a mixture the scores of all experts, and what the layers of the first one make of every
    token, chosen or not, since which are sent to it changes from step to step."""
    observer = _Observer()
    with observer.listening(decoder):
        observer.values["logits", None] = decoder(tokens, probe=observer)
    if decoder.aggregation is None:
        observer.values["norm", None] = observer.values["norm", None] / decoder.scales.output
    return observer.values


class _Observer:
    """Keeps what modules return, each use apart, which a name alone would not."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int | None], Tensor] = {}
        self._depth: int | None = None
        self._next_depth = 0
        self._latest: Tensor | None = None

    def depth_output(self, depth: int, x: Tensor) -> None:
        self.values["block", depth] = x

    def attention_logits(self, depth: int, maximum: Tensor) -> None:
        self.values["attention_logits", depth] = maximum

    @contextmanager
    def listening(self, decoder: Decoder) -> Iterator[None]:
        handles = []
        for name, module in decoder.named_modules():
            if isinstance(module, Block):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            elif name == "injection":
                handles.append(module.register_forward_hook(self._inject))
            elif name and not isinstance(module, (nn.ModuleList, *_HAND_OUT_PARAMETERS)):
                handles.append(module.register_forward_hook(self._keeper(name)))
            if isinstance(module, MixtureOfExperts):
                handles.append(module.register_forward_pre_hook(self._look_inside))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._depth = kwargs["depth"]
        self._next_depth = self._depth + 1

    def _leave(self, *_: Any) -> None:
        self._depth = None

    def _inject(self, module: nn.Module, args: Any, result: Tensor) -> None:
        self.values["injection", self._next_depth] = result

    def _look_inside(self, module: MixtureOfExperts, args: tuple[Tensor]) -> None:
        self.values["feed_forward.router", self._depth] = linear(args[0], module.router.weight)
        module.experts[0](args[0])

    def _keeper(self, name: str) -> Any:
        output = ".".join(part for part in name.removeprefix("blocks.").split(".") if not part.isdigit())

        def keep(module: nn.Module, args: Any, result: Any) -> None:
            result = result[0] if isinstance(result, tuple) else result
            # What a module only passes on from its last part is no other output.
            if isinstance(result, Tensor) and result is not self._latest:
                self.values[output, self._depth] = self._latest = result

        return keep


def slopes(rows: Iterable[Coordinate], column: str = "mean_abs") -> dict[tuple[str, int], float]:
    """For each output and step the slope of log(size of the activation) over log(width or depth), by least squares;
    depths and seeds are averaged first."""
    values: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row.output, row.step][row.size].append(getattr(row, column))
    found = {}
    for key, by_size in values.items():
        points = [(math.log(size), sum(each) / len(each)) for size, each in by_size.items()]
        if len(points) > 1 and all(0 < value < math.inf for _, value in points):
            found[key] = _slope([(x, math.log(value)) for x, value in points])
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
