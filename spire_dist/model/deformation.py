"""Networks that turn a latent into motion and occupancy, and the rotations they use."""

import torch
from torch import Tensor, nn


class PairNetwork(nn.Module):
    """A network of (latent, feature) pairs whose first layer is split, so that no tensor of their joint width exists.

    `W [z; f] = W_z z + W_f f`: the two products are small and only their sum has a row per pair. The last layer starts
    at zero, hence the output at `bias` for every pair.
    """

    def __init__(self, latent: int, feature: int, hidden: int, layers: int, outputs: int, bias: float = 0.0) -> None:
        super().__init__()
        self.from_latent = nn.Linear(latent, hidden)
        self.from_feature = nn.Linear(feature, hidden, bias=False)
        self.middle = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.constant_(self.last.bias, bias)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        """[B, latent], [N, feature] -> [B, N, outputs]."""
        hidden = torch.relu_(self.from_latent(latents)[:, None, :] + self.from_feature(features)[None, :, :])
        for layer in self.middle:
            hidden = torch.relu_(layer(hidden))
        return self.last(hidden)


def rotations_from_6d(numbers: Tensor) -> Tensor:
    """Rotations [..., 3, 3] from [..., 6] by Gram-Schmidt on two columns; zeros give the identity.

    The representation of Zhou et al. (CVPR 2019) is continuous over all of SO(3), so a part may turn full circle, which
    a rotation vector cannot follow without a jump.
    """
    first = numbers[..., :3] + numbers.new_tensor([1.0, 0.0, 0.0])
    second = numbers[..., 3:] + numbers.new_tensor([0.0, 1.0, 0.0])
    x = nn.functional.normalize(first, dim=-1)
    y = nn.functional.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y, dim=-1)], dim=-1)
