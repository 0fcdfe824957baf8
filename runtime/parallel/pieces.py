"""Squared norms of the pieces of a batch's gradient, seen before they are summed.

A piece is what one micro-batch of one data-parallel rank contributes. Under FSDP it passes, whole, through the unit's
reduce-scatter, which `FSDPModule.set_custom_reduce_scatter` lets us listen to; without FSDP autograd hands it to the
parameter. Nothing is kept of it but a squared norm for each group of parameters, and these travel with the norm of the
gradient, which needs a collective of one number anyway: 40 bytes more.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor

from runtime.model.parametrization import Role, role
from runtime.parallel.fsdp import fsdp_modules
from runtime.parallel.gradients import local_squares
from runtime.parallel.mesh import Mesh
from schedulers.noise_scale import Moments, moments

GROUPS = ("embedding", "attention", "feed_forward", "norms", "other")
_BY_ROLE = {
    Role.EMBEDDING: "embedding",
    Role.HEAD: "embedding",
    Role.NORM: "norms",
    Role.FINAL_NORM: "norms",
    Role.SCALE: "norms",
    Role.PREFIX: "attention",
    Role.PREFIX_BIAS: "attention",
    Role.ROUTER: "feed_forward",
    Role.INJECTION: "other",
    Role.AGGREGATION_IN: "other",
    Role.AGGREGATION_OUT: "other",
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def group_of(name: str) -> str:
    """The one of `GROUPS` that a parameter belongs to: a head to "embedding", what is added to a linear layer to that
    layer's."""
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    return _BY_ROLE.get(role(name)) or ("attention" if _ATTENTION.intersection(parts) else "feed_forward")


class Pieces:
    """Listens to the gradients of a decoder that is in its place on a mesh and has its values.

    For each step: `begin`, a backward and `end_piece` for each micro-batch, `finish`. Outside of a step, and where a
    step is one piece, it costs nothing and measures nothing.
    """

    def __init__(self, decoder: nn.Module, mesh: Mesh):
        self._mesh = mesh
        self._tally = _Tally(mesh.device)
        self._groups: list[list[nn.Parameter]] = [[] for _ in GROUPS]
        trained = {each: name for name, each in decoder.named_parameters() if each.requires_grad}
        for parameter, name in trained.items():
            self._groups[GROUPS.index(group_of(name))].append(parameter)
        self._units = [_Unit(module, trained, mesh, self._tally) for module in fsdp_modules(decoder)]
        if not self._units:
            for parameter, name in trained.items():
                parameter.register_hook(_Hook(self._tally, GROUPS.index(group_of(name))))

    def begin(self, micro_batches: int) -> None:
        """A step of so many micro-batches on each rank."""
        self._tally.begin(is_listening=self._mesh.layout.data * micro_batches > 1)
        for unit in self._units:
            unit.begin()

    @torch.no_grad()
    def end_piece(self, targets: Tensor, all_targets: Tensor) -> None:
        """After a micro-batch's backward: 0-d, how many targets it had, and the whole batch, by which its loss was
        divided. A piece without targets is none.

        A piece's own gradient is all / targets times what it contributed, and its weight targets / all: of the squared
        norm, the product remains.
        """
        tally = self._tally
        if tally.is_listening:
            tally.collect()
            weighted = tally.piece * (all_targets / targets.clamp(min=1))
            tally.sums[:-1] += torch.where(targets > 0, weighted, torch.zeros_like(weighted))
            tally.sums[-1] += (targets > 0) / self._mesh.layout.tensor
            tally.piece.zero_()

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor] | None:
        """The L2 norm of the whole gradient, before it is changed, and what `moments_of` reads; float32 and equal on
        every rank. None where the step is one piece. A collective.

        Each parameter's gradient is shared out among the ranks that hold it, so that sums over all ranks are right.
        """
        if not self._tally.is_listening:
            return None
        self._tally.is_listening = False
        for unit in self._units:
            unit.learn()
        big = torch.stack([local_squares(group, self._mesh.device) for group in self._groups])
        found = torch.cat((big, self._tally.sums))
        if self._mesh.layout.world_size > 1:
            dist.all_reduce(found)
        return found[: len(GROUPS)].sum().sqrt(), found


def moments_of(found: Sequence[float], sequences: int) -> dict[str, Moments] | None:
    """S and |G|^2 of each group, from what `Pieces.finish` returned for a batch of so many sequences; None where fewer
    than two pieces had targets, or the step could not be measured.

    A piece's size is its share of the valid targets, in sequences; the pieces' mean is weighted by it, so that the mean
    of their inverse sizes is M / B (the between-group sum of squares of an analysis of variance).
    """
    count = len(GROUPS)
    pieces = found[2 * count]
    if not pieces > 1.5:
        return None
    pairs = zip(GROUPS, found[count : 2 * count], found[:count], strict=True)
    inverse = round(pieces) / sequences
    return {name: moments(small, big, inverse, sequences) for name, small, big in pairs if small or big}


class _Tally:
    """What those who listen write to; it knows none of them, so that a decoder that is given up is freed at once."""

    def __init__(self, device: torch.device):
        self.is_listening = False
        self.piece = torch.zeros(len(GROUPS), device=device)
        """Of the present micro-batch: this rank's share of the squared norm of each group's gradient."""
        self.sums = torch.zeros(len(GROUPS) + 1, device=device)
        """Of the step: weighted squares of each group, and the number of pieces."""
        self.single: list[list[Tensor]] = [[] for _ in GROUPS]
        """Of the present micro-batch: the squares of single parameters of each group, that are not in `piece` yet."""

    def begin(self, *, is_listening: bool) -> None:
        self.is_listening = is_listening
        self.collect()
        self.piece.zero_()
        self.sums.zero_()

    def collect(self) -> None:
        """Add the squares of single parameters to the piece's."""
        for group, squares in enumerate(self.single):
            if squares:
                self.piece[group] += torch.stack(squares).sum()
                squares.clear()

    def spoil(self) -> None:
        """Leave this step out: a part of a piece could not be told."""
        self.sums.fill_(torch.nan)


class _Hook:
    """Of a plain parameter, whose gradient autograd has summed over its uses and not yet over micro-batches."""

    def __init__(self, tally: _Tally, group: int):
        self._tally, self._group = tally, group

    def __call__(self, gradient: Tensor) -> None:
        if self._tally.is_listening:
            self._tally.single[self._group].append(_square(gradient))


class _Unit(DefaultReduceScatter):
    """torch's reduce-scatter of one unit of FSDP, which looks at the buffer of the rank's gradients first.

    The buffer, as [shard ranks, columns], has each parameter's rows dealt out to the ranks in order, padded with zeros;
    parameters without a gradient are left out of it. Which those are is only known from the step before.
    """

    def __init__(self, module: FSDPModule, trained: Mapping[nn.Parameter, str], mesh: Mesh, tally: _Tally):
        self._tally, self._mesh, self._shards = tally, mesh, mesh.layout.data_shard
        own = dict.fromkeys(each for each in _own_parameters(module) if each in trained)
        self._parameters = {each: GROUPS.index(group_of(trained[each])) for each in own}
        self._layouts: dict[int, _Layout] = {}
        """By the buffer's size."""
        self._seen: set[int] = set()
        self._filled: Tensor | None = None
        self._remember(list(self._parameters))
        module.set_custom_reduce_scatter(self)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any) -> Any:
        self._measure(input_tensor)
        return super().__call__(output_tensor, input_tensor, *args, **options)

    def allocate(self, *args: Any, **options: Any) -> Tensor:
        """A buffer to torch's needs. Where the shards are whole there is nothing to call for: torch then asks for a
        buffer, fills it, and asks for another to copy it to."""
        buffer = super().allocate(*args, **options)
        if self._shards == 1:
            if self._filled is not None:
                self._measure(self._filled)
            self._filled = buffer if self._filled is None else None
        return buffer

    def begin(self) -> None:
        self._seen.clear()
        self._filled = None

    def _measure(self, buffer: Tensor) -> None:
        """A micro-batch's gradients, flat, before they are reduced."""
        if not self._tally.is_listening:
            return
        self._seen.add(buffer.numel())
        layout = self._layouts.get(buffer.numel())
        if layout is None:
            self._tally.spoil()
        else:
            parts = buffer.view(self._shards, -1).split(layout.widths, 1)
            self._tally.piece.addmv_(layout.weights, torch.stack([_square_of_rows(part) for part in parts]))

    def learn(self) -> None:
        """After a step: which parameters do have gradients; the step is spoiled if others were taken to."""
        if not self._seen:
            return
        with_gradients = [each for each in self._parameters if each.grad is not None]
        layout = self._layouts.get(next(iter(self._seen)))
        if len(self._seen) > 1 or layout is None or layout.parameters != with_gradients:
            self._tally.spoil()
            self._remember(with_gradients)

    def _remember(self, parameters: list[nn.Parameter]) -> None:
        if parameters:
            layout = _Layout(parameters, self._parameters, self._mesh)
            self._layouts[self._shards * sum(layout.widths)] = layout


class _Layout:
    """Runs of columns that belong to one group and are held alike: their widths, and their weights [groups, runs].

    A parameter that every tensor-parallel rank holds whole has the same gradient on each of them, and counts as a share
    on each.
    """

    def __init__(self, parameters: list[nn.Parameter], groups: Mapping[nn.Parameter, int], mesh: Mesh):
        self.parameters = parameters
        self.widths: list[int] = []
        kinds: list[tuple[int, float]] = []
        for parameter in parameters:
            shape, copies = _on_tensor_rank(parameter, mesh.layout.tensor)
            width = -(-shape[0] // mesh.layout.data_shard) * shape[1:].numel()
            kind = (groups[parameter], 1 / copies)
            if kinds and kinds[-1] == kind:
                self.widths[-1] += width
            else:
                kinds.append(kind)
                self.widths.append(width)
        weights = torch.zeros(len(GROUPS), len(kinds))
        for run, (group, weight) in enumerate(kinds):
            weights[group, run] = weight
        self.weights = weights.to(mesh.device)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """A unit's parameters in FSDP's order: of modules, the inner ones first."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)
    yield from module.parameters(recurse=False)


def _on_tensor_rank(parameter: nn.Parameter, degree: int) -> tuple[torch.Size, int]:
    """The shape of what a tensor-parallel rank holds of a parameter, FSDP apart, and how many ranks hold the same."""
    if degree == 1:
        return parameter.shape, 1
    assert isinstance(parameter, DTensor) and "tensor" in parameter.device_mesh.mesh_dim_names
    placement = parameter.placements[parameter.device_mesh.mesh_dim_names.index("tensor")]
    if placement.is_replicate():
        return parameter.shape, degree
    shape = list(parameter.shape)
    shape[placement.dim] //= degree
    return torch.Size(shape), 1


def _square(gradient: Tensor) -> Tensor:
    """Sum of the squares, 0-d float32. Of a hundred parameters' the calls cost as much as the reading: they are few."""
    if gradient.is_cuda:
        return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
    flat = gradient.float().reshape(-1)
    return torch.dot(flat, flat)


def _square_of_rows(rows: Tensor) -> Tensor:
    """`_square` of [rows, columns]. On a CPU a strided sum takes six times as long as rows."""
    if rows.is_cuda or len(rows) == 1:
        return _square(rows)
    return torch.stack([_square(row) for row in rows]).sum()
