"""Every kind of backend over every tiny family."""

from collections.abc import Iterator

import pytest

from backend_rigs import KINDS, Rig
from d2f_runtime.backends import open_backend
from d2f_runtime.backends.base import Backend
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint
from tiny_models import CONFIGS, MIXTURES, tiny_folder


@pytest.fixture(scope="module", params=[*CONFIGS, *MIXTURES])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, family: str) -> Iterator[Rig]:
    model = load_checkpoint(tiny_folder(family, "torch"))
    backend: Backend
    if request.param.startswith("fast"):
        backend = TorchBackend(
            model,
            name="fast",
            device="cpu" if request.param == "fast-references" else "cuda",
            runner="fast",
            graphs="lazy" if request.param == "fast" else "off",
        )
    else:
        folder = tiny_folder(family, "torch" if request.param == "torch" else "fp32")
        backend = open_backend(request.param, folder, device="cpu", quantization="auto")
    yield Rig(backend, model)
    backend.close()
