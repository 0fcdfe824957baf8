"""Signs of a model's health, measured on a cadence of their own."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.model.decoder import Decoder
from runtime.model.initialization import fill
from runtime.model.parametrization import role
from runtime.parallel.shards import copies, local_indices


class HealthProbe:
    """Listens to one forward: RMS of each depth's output and its largest attention logit.

    Pass it as `probe` to `Decoder.forward`. A sequence-parallel depth output is this rank's part of the
    sequence; sums over ranks make the mean square right for parts and for copies alike.
    """

    def __init__(self) -> None:
        self._squares: dict[int, Tensor] = {}
        self._largest: dict[int, Tensor] = {}

    def depth_output(self, depth: int, x: Tensor) -> None:
        x = _local(x).detach().float()
        number = x.new_full((), x.numel(), dtype=torch.float64)
        self._squares[depth] = torch.stack((x.square().sum(dtype=torch.float64), number))

    def attention_logits(self, depth: int, maximum: Tensor) -> None:
        self._largest[depth] = _local(maximum).detach().float()

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, list[float]]:
        """`depth_rms` and `max_attention_logit`, a number for each unrolled depth, equal on every rank.

        `group` holds all ranks of the run (None: the default group). A collective.
        """
        depths = sorted(self._squares)
        squares = torch.stack([self._squares[depth] for depth in depths])
        largest = torch.stack([self._largest[depth] for depth in depths])
        dist.all_reduce(squares, dist.ReduceOp.SUM, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        rms = [math.sqrt(total / count) for total, count in squares.tolist()]
        return {"depth_rms": rms, "max_attention_logit": largest.tolist()}


@torch.no_grad()
def measure(
    decoder: nn.Module, tokens: Tensor, document_ids: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> dict[str, list[float]]:
    """One extra forward of this rank's `tokens` [b, s] under a probe; a collective over the whole run."""
    probe = HealthProbe()
    decoder(tokens, document_ids=document_ids, targets=tokens, probe=probe)
    return probe.reduce(group)


class UpdateRatio:
    """Norm of one step's parameter change over the norm of the parameters, by role.

    Built before the step, with a copy of this rank's shards that lives until `measure`. A healthy AdamW
    run shows about its learning rate divided by the parameters' RMS.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]):
        self._parameters = list(named_parameters)
        self._before = [_local(parameter).detach().clone() for _, parameter in self._parameters]

    @torch.no_grad()
    def measure(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The ratio of each role, equal on every rank; 0 for a skipped step. A collective over the whole run."""
        roles = sorted({role(name) for name, _ in self._parameters})
        device = self._before[0].device
        sums = torch.zeros(len(roles), 2, dtype=torch.float64, device=device)
        for (name, parameter), before in zip(self._parameters, self._before, strict=True):
            after = _local(parameter).detach()
            squares = torch.stack([(after - before).double().square().sum(), before.double().square().sum()])
            sums[roles.index(role(name))] += squares / copies(parameter)
        self._before = []
        dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
        return {
            str(each): math.sqrt(changed / total) if total > 0 else 0.0
            for each, (changed, total) in zip(roles, sums.tolist(), strict=True)
        }


@torch.no_grad()
def distance_from_start(decoder: Decoder, seed: int, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """L2 norm of the weights minus the first weights of this seed: of each role and, as "total", of all of them.

    It grows with the logarithm of the steps while training is a slow diffusion (Hoffer, Hubara and Soudry, arXiv
    1705.08741). The first weights are a function of seed, name and index, so they are made again, one shard at a time.
    Equal on every rank; a collective over the whole run.
    """
    named = list(decoder.named_parameters())
    roles = sorted({role(name) for name, _ in named})
    squares = torch.zeros(len(roles), dtype=torch.float64, device=_local(named[0][1]).device)
    for name, parameter in named:
        now = _local(parameter).detach()
        first = torch.empty_like(now, memory_format=torch.contiguous_format)
        fill(first, local_indices(parameter), parameter.shape, decoder.config, seed, name)
        squares[roles.index(role(name))] += (now - first).double().square().sum() / copies(parameter)
    dist.all_reduce(squares, dist.ReduceOp.SUM, group=group)
    found = {str(key): square for key, square in zip(roles, squares.tolist(), strict=True)}
    return {"total": math.sqrt(sum(found.values()))} | {key: math.sqrt(square) for key, square in found.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
