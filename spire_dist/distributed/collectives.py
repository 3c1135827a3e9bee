"""The collectives that training needs, differentiable where it must be; for one process alone each is the identity.

Images are sums over Gaussians, so a gauss group adds partial images: `scatter_sum` forward and `gather` backward, and for
what every rank of the group needs of the others' particles the other way round. Both move each number once, which an
all-reduce with the same loss on every rank would do too, but with gradients G times too large.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; older ones do not know the new names, newer ones warn of the old.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup | None


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
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: Group) -> None:
    """Give every rank of a group the first one's values, in place."""
    if group is not None:
        for tensor in tensors:
            dist.broadcast(tensor, group=group, group_src=0)


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = own.new_empty(group.size() * len(own), *own.shape[1:])
    _gather_into(result, own.contiguous(), group=group)
    return result


def _scattered(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = partial.new_empty(len(partial) // group.size(), *partial.shape[1:])
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
