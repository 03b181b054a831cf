from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that what no kernel writes is seen."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.dtype.is_floating_point else out

    def empty_like(x: Tensor, **kwargs: Any) -> Tensor:
        return empty(x.shape, device=x.device, dtype=kwargs.get("dtype", x.dtype))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
