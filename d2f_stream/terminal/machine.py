"""Machine: how much memory models may take here, and in which quantisations they run."""

import os
from dataclasses import dataclass
from typing import Final, Self

from d2f_runtime.models.catalogue import ON_CPU, ON_GPU

__all__ = ["GIB", "Machine"]

GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory of a machine.

    Attributes:
        host: bytes.
        gpu: bytes of its GPU; None is none.
    """

    host: int
    gpu: int | None = None

    @classmethod
    def this(cls) -> Self:
        """Look at this one; a GPU is found where torch is installed."""
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        try:
            import torch
        except ImportError:
            return cls(host)
        if not torch.cuda.is_available():
            return cls(host)
        return cls(host, int(torch.cuda.get_device_properties(0).total_memory))

    @property
    def has_gpu(self) -> bool:
        """Whether models run on a GPU."""
        return self.gpu is not None

    @property
    def room(self) -> int:
        """Bytes for a model."""
        return self.host if self.gpu is None else self.gpu

    @property
    def quantizations(self) -> tuple[str, ...]:
        """Which ones run here, the one that is taken by itself first."""
        return ON_CPU if self.gpu is None else ON_GPU

    @property
    def told(self) -> str:
        """The room, for people."""
        room = f"{self.room / GIB:.1f} GiB"
        if self.gpu is None:
            return f"the {room} of this machine's memory (no CUDA GPU was found)"
        return f"the {room} of the GPU's memory"
