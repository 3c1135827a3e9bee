"""Networks that turn a latent into motion and occupancy, and the rotations they use."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spire_dist.model import pair_kernels

KERNEL_FROM = 64
"""Gaussians from which the CPU kernel pays; it works on blocks of 128."""
CHUNK_BYTES = 2**26
"""Of one hidden layer's values that exist at a time where there is no kernel."""


class PairNetwork(nn.Module):
    """A network of (latent, feature) pairs whose first layer is split, so that no tensor of their joint width exists.

    `W [z; f] = W_z z + W_f f`: the two products are small and only their sum has a row per pair. Of the hidden layers'
    values nothing is kept for the backward pass, which computes them again: in the cache of a CPU (`pair_kernels`, float32),
    elsewhere, where a layer is larger than `CHUNK_BYTES`, a chunk of Gaussians at a time. On a GPU in bfloat16. The last
    layer starts at zero, hence the output at `gain · bias` for every pair.
    """

    def __init__(
        self, latent: int, feature: int, hidden: int, layers: int, outputs: int, bias: float = 0.0, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.gain = gain
        self.from_latent = nn.Linear(latent, hidden)
        self.from_feature = nn.Linear(feature, hidden, bias=False)
        self.middle = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, bias)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """[B, latent], [N, feature] -> [B, N, outputs]."""
        own, shared = self.from_latent(latents), self.from_feature(features)
        last, bias = self.gain * self.last.weight, self.gain * self.last.bias  # cheaper than to scale every pair
        if own.device.type == "cpu" and own.dtype == torch.float32 and len(shared) >= KERNEL_FROM:
            middle, biases = self._stacked("weight", own.shape[1]), self._stacked("bias")
            return _Pairs.apply(own, shared, middle, biases, last, bias)  # type: ignore[return-value]
        chunk = max(1, CHUNK_BYTES // max(1, own.numel() * own.element_size()))
        if len(shared) <= chunk:
            return self._layers(own, shared, last, bias)
        pieces = [
            checkpoint(self._layers, own, piece, last, bias, use_reentrant=False, preserve_rng_state=False)
            for piece in shared.split(chunk)
        ]
        return torch.cat(pieces, dim=1)  # type: ignore[arg-type]

    def _layers(self, own: Tensor, shared: Tensor, last: Tensor, bias: Tensor) -> Tensor:
        """What follows the first layer's halves, [B, hidden] and [N, hidden]."""
        low = own.device.type == "cuda" and len(shared) >= KERNEL_FROM  # a few anchors gain nothing by it
        if low:
            own, shared = own.bfloat16(), shared.bfloat16()
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            hidden = torch.relu_(own[:, None, :] + shared[None, :, :])
            for layer in self.middle:
                hidden = torch.relu_(layer(hidden))
            return nn.functional.linear(hidden, last, bias).to(last.dtype)

    def _stacked(self, name: str, *width: int) -> Tensor:
        """A parameter of all further hidden layers, [layers - 1, hidden, ...]."""
        found: list[Tensor] = [layer.get_parameter(name) for layer in self.middle]
        return torch.stack(found) if found else self.last.weight.new_zeros(0, self.last.in_features, *width)


class _Pairs(torch.autograd.Function):
    """`pair_kernels` seen by autograd."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        own, shared, middle, biases, last, bias = (t.detach().numpy() for t in inputs)
        return torch.from_numpy(pair_kernels.pair_forward(own, shared, middle, biases, last, bias))

    @staticmethod
    def backward(ctx, *gradients):
        own, shared, middle, biases, last, _ = (t.detach().numpy() for t in ctx.saved_tensors)
        gradient = gradients[0].contiguous().numpy()
        found = pair_kernels.pair_backward(own, shared, middle, biases, last, gradient)
        return tuple(torch.from_numpy(array) for array in found)


def rotations_from_6d(numbers: Tensor) -> Tensor:
    """Rotations [..., 3, 3] from [..., 6] by Gram-Schmidt on two columns; zeros give the identity.

    The representation of Zhou et al. (CVPR 2019) is continuous over all of SO(3), so a part may turn full circle, which
    a rotation vector cannot follow without a jump.
    """
    start = numbers.new_zeros(6)  # made where the numbers are: a tensor of a list would stop a GPU to be copied there
    start[0] = start[4] = 1.0
    first, second = (numbers + start).split(3, dim=-1)
    x = nn.functional.normalize(first, dim=-1)
    y = nn.functional.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=-1)], dim=-1)
