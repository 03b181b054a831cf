"""What makes a loaded model: the key that tells it from others, and the parts of one."""

from dataclasses import InitVar, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import msgspec

from d2f_runtime.backends.base import Backend
from d2f_runtime.models.facts import About, ModelInfo
from d2f_runtime.models.hub import HubModel
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.identity import ModelIdentity
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

    `info` is the backend's, with what its folder tells people, with its identity, and with a name
    where its folder is not its name. `files` is the digest of the model's files, if it has any.
    """

    backend: Backend
    codec: TextCodec
    defaults: GenerationParams
    about: InitVar[About | None] = None
    name: InitVar[str | None] = None
    files: InitVar[str] = ""
    info: ModelInfo = field(init=False)

    def __post_init__(self, about: About | None, name: str | None, files: str) -> None:
        info = self.backend.info
        info = replace(info, name=name or info.name, **(about or About()).about)
        identity = _identity(info, self.defaults, files)
        object.__setattr__(self, "info", replace(info, identity=identity))


def _identity(info: ModelInfo, defaults: GenerationParams, files: str) -> ModelIdentity:
    common = GenerationParams()  # a later version may have more fields, which change nothing
    chosen = {
        name: value
        for name, value in msgspec.structs.asdict(defaults).items()
        if value != getattr(common, name)
    }
    # Folders may be called differently on each machine; what has none has only its name.
    told = [files or info.name, info.quantization, info.family, sorted(chosen.items())]
    digest = blake2b(msgspec.json.encode(told), digest_size=8).hexdigest()
    return ModelIdentity(info.name, digest)
