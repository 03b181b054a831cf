"""The local engine: sessions over the decoder, the scheduler, and the step loop that runs them."""

from d2f_runtime.engine.limits import Limits
from d2f_runtime.engine.local import LocalEngine

__all__ = ["Limits", "LocalEngine"]
