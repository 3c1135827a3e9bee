"""The collectives that training needs, differentiable where it must be; for one process alone each is the identity.

Images are sums over Gaussians, so a gauss group adds partial images: `scatter_sum` forward and `gather` backward, and for
what every rank of the group needs of the others' particles the other way round. Both move each number once, which an
all-reduce with the same loss on every rank would do too, but with gradients G times too large.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spire_dist.distributed.mesh import Mesh
from spire_dist.distributed.pulse import WAITING
from spire_dist.errors import ElsewhereError, SpireError

# torch 2.13 renamed both; older ones do not know the new names, newer ones warn of the old.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None
Found = TypeVar("Found")


def gather(own: Tensor, group: Group) -> Tensor:
    """Rows [n, ...] of every rank, one rank after the other [G n, ...]; the gradient of a row is summed over the ranks."""
    return own if group is None else _Gather.apply(own, group)  # type: ignore[return-value]


def scatter_sum(partial: Tensor, group: Group) -> Tensor:
    """Sum over the group's ranks of `partial` [G n, ...], of which each gets its own rows [n, ...]."""
    return partial if group is None else _ScatterSum.apply(partial, group)  # type: ignore[return-value]


@torch.no_grad()
def sum_over(tensors: Iterable[Tensor], group: Group) -> None:
    """Replace tensors of one type by their sums over a group's ranks, in place and in one message."""
    tensors = list(tensors)
    if group is None or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with WAITING.counted():
        dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def sum_to_first(tensor: Tensor, group: Group) -> None:
    """Add up a tensor of every rank on the first one, in place; the others' are of no use then."""
    if group is not None:
        with WAITING.counted():
            dist.reduce(tensor, group=group, group_dst=0)


def exchange(leaving: Tensor, leaving_counts: list[int], arriving_counts: list[int], group: Group) -> Tensor:
    """Rows that every rank sends to every other: `leaving` [sum, ...] are sorted by who gets them, the result by who sent."""
    if group is None:
        return leaving
    arrived = leaving.new_empty(sum(arriving_counts), *leaving.shape[1:])
    with WAITING.counted():
        dist.all_to_all_single(arrived, leaving.contiguous(), arriving_counts, leaving_counts, group=group)
    return arrived


def everyones(own: object, group: Group) -> list:
    """A small object of every rank, rank by rank, on all of them."""
    if group is None:
        return [own]
    found: list[object] = [None] * group.size()
    with WAITING.counted():
        dist.all_gather_object(found, own, group=group)
    return found


def first_alone(mesh: Mesh, work: Callable[[], Found]) -> Found | None:
    """What `work()` returns on the first rank, which alone does it; the others wait and get None.

    A user's mistake (SpireError) ends all of them: the first one raises it, the others ElsewhereError with its exit code.
    """
    found, error = None, None
    if mesh.rank == 0:
        try:
            found = work()
        except SpireError as refused:
            error = refused
    if mesh.pulse is not None:
        with WAITING.counted():  # no collective, which would give up after some minutes
            code = mesh.pulse.from_first(error.exit_code if error else 0)
        if code != 0 and mesh.rank != 0:
            raise ElsewhereError(code)
    if error is not None:
        raise error
    return found


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = own.new_empty(group.size() * len(own), *own.shape[1:])
    with WAITING.counted():
        _gather_into(result, own.contiguous(), group=group)
    return result


def _scattered(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    if partial.device.type == "cpu":  # gloo's reduce-scatter is an all-reduce, which sends twice as much
        arrived = torch.empty_like(partial, memory_format=torch.contiguous_format)
        with WAITING.counted():
            dist.all_to_all_single(arrived, partial.contiguous(), group=group)
        return arrived.view(group.size(), -1, *partial.shape[1:]).sum(0)
    result = partial.new_empty(len(partial) // group.size(), *partial.shape[1:])
    with WAITING.counted():
        _scatter_into(result, partial.contiguous(), group=group)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, group):
        ctx.group = group
        return _gathered(own, group)

    @staticmethod
    def backward(ctx, *gradients):
        return _scattered(gradients[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):
        ctx.group = group
        return _scattered(partial, group)

    @staticmethod
    def backward(ctx, *gradients):
        return _gathered(gradients[0], ctx.group), None
