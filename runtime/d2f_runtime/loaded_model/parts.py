"""What makes a loaded model: the key that tells it from others, and the parts of one."""

from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path

from d2f_runtime.backends.base import Backend
from d2f_runtime.models.facts import About, ModelInfo
from d2f_runtime.models.hub import HubModel
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.params import GenerationParams

__all__ = ["ModelKey", "ModelParts"]


@dataclass(frozen=True, slots=True)
class ModelKey:
    """What makes two loaded models the same."""

    path: Path | HubModel
    backend: str
    device: str
    quantization: str
    adapter: Path | HubModel | None = None
    kv_tokens: int | None = None
    family: str | None = None


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What loading a model yields.

    `info` is the backend's, with what its folder tells people, and with a name where its folder is
    not its name.
    """

    backend: Backend
    codec: TextCodec
    defaults: GenerationParams
    about: InitVar[About | None] = None
    name: InitVar[str | None] = None
    info: ModelInfo = field(init=False)

    def __post_init__(self, about: About | None, name: str | None) -> None:
        info = self.backend.info
        info = replace(info, name=name or info.name, **(about or About()).about)
        object.__setattr__(self, "info", info)
