"""FlatWeights: what is trained, as one flat fp32 vector and a working copy that computes.

One vector makes the sum over GPUs, the clipping, the test for finite values, the optimiser and the
checkpoint one operation each. The working copy is bf16 on a GPU; its gradients are rounded once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from d2f_stream.core.errors import InvalidRequest

__all__ = ["FlatWeights"]


class FlatWeights:
    """Named tensors that share one vector.

    Args:
        initial: by name; copied.
        device: of all.
        dtype: of the working copy.
    """

    def __init__(
        self, initial: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._shapes = {name: tensor.shape for name, tensor in initial.items()}
        sizes = [tensor.numel() for tensor in initial.values()]
        total = sum(-(-size // 64) * 64 for size in sizes)  # aligned for fused kernels
        self.master = torch.zeros(total, device=device).requires_grad_()
        self._working = torch.zeros(total, device=device, dtype=dtype)
        self._gradient = torch.zeros(total, device=device, dtype=dtype)
        self._places: dict[str, int] = {}
        self.named: dict[str, Tensor] = {}
        place = 0
        for (name, tensor), size in zip(initial.items(), sizes, strict=True):
            self._places[name] = place
            with torch.no_grad():
                self.master[place : place + size] = tensor.reshape(-1).to(device, torch.float32)
            view = self._working[place : place + size].view(tensor.shape).detach()
            view.requires_grad_()
            view.grad = self._gradient[place : place + size].view(tensor.shape)
            self.named[name] = view
            place += -(-size // 64) * 64
        self.refresh()

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over values of the same names and shapes.

        Raises:
            InvalidRequest: one is missing, or of another shape.
        """
        for name, place in self.stored().items():
            found = tuple(values[name].shape) if name in values else None
            if found != place.shape:
                raise InvalidRequest(
                    f"the adapter's {name} has the shape {found}, but this base needs "
                    f"{tuple(place.shape)}; give an adapter of this base"
                )
            place.copy_(values[name])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the vector into the working copy and clear the gradients."""
        self._working.copy_(self.master)
        self._gradient.zero_()

    def gradient(self) -> Tensor:
        """Return the gradient of the vector, fp32, a new tensor."""
        return self._gradient.float()

    def stored(self) -> dict[str, Tensor]:
        """Return the fp32 values by name: views of the vector."""
        vector = self.master.detach()
        return {
            name: vector[place : place + self._shapes[name].numel()].view(self._shapes[name])
            for name, place in self._places.items()
        }
