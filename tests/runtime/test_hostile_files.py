"""Model folders from elsewhere: whatever a file says, it is loaded or refused, in bounded time."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.torch_backend import load
from d2f_runtime.decoding.window import Window
from d2f_runtime.engine.denoiser import decoder_of
from d2f_runtime.models.hub import locate
from d2f_runtime.models.manifest import read_manifest, verify_files
from d2f_runtime.models.published import read_published
from d2f_runtime.text.tokenizer import Tokenizer
from d2f_stream.core.errors import D2FError, ModelNotFound
from d2f_stream.core.params import GenerationParams
from tiny_checkpoints import FAMILIES, oracle, write_adapter, write_model
from tiny_models import tiny_folder

pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**62, 10**400, 0.5, -1e308, 1e308, float("nan"),
    float("inf"), "", "x", "x" * 5000, "\ud800", "../../etc/passwd", "\0", [], [None], [[]], [-1],
    [2**62], {}, {"x": {}}, {"content": None},
]  # fmt: skip


def places(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a JSON value, of long lists and objects of a part."""
    yield at
    if isinstance(values, dict):
        for key in list(values)[:40]:
            yield from places(values[key], (*at, key))
    elif isinstance(values, list):
        for index in range(min(len(values), 5)):
            yield from places(values[index], (*at, index))


def changed(values: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[at[0]] = changed(values[at[0]], at[1:], value)
    return copy


def put(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module", params=["qwen2", "llada", "Dream", "sdar"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    write_model(root / "model", request.param)
    tiny = FAMILIES[request.param]
    write_adapter(root / "adapter", tiny, oracle(tiny).state_dict())
    put(
        root / "model" / "generation_config.json",
        {"do_sample": True, "temperature": 1.0, "top_p": 0.9},
    )
    return root


def use(root: Path, adapter: Path | None = None) -> None:
    """Load everything and run a step; no error but ours."""
    try:
        published = read_published(root)
        params = published.defaults(adapted=False)
        codec = Tokenizer.from_folder(root, mask_id=published.config.mask_id)
        prompt = codec.encode("Ann has 3 apples.")
        codec.decode(range(300))
        backend = load(root, device="cpu", quantization="fp32", adapter=adapter, kv_tokens=64)
        backend.check(params)
    except D2FError as refusal:
        if len(str(refusal)) > 3000:
            raise AssertionError("a sentence of that length helps nobody") from refusal
        return
    short = GenerationParams(max_new_tokens=4, block_size=backend.info.native_block_size)
    decoder = decoder_of(backend.info, [t for t in prompt if t < 200][:8] or [5], short)
    window = decoder.next_window()
    assert isinstance(window, Window)
    (proposals,) = backend.step([StepRow(backend.open_slot(48), window)])
    try:
        decoder.apply(proposals)
    except D2FError:  # its logits are no numbers
        return
    assert all(token < backend.info.num_tokens for token in proposals.tokens)


def check(root: Path, name: str, data: st.DataObject, run: Callable[[], None]) -> None:
    path = root / name
    kept = path.read_bytes()
    values = json.loads(kept)
    try:
        for _ in range(data.draw(st.integers(1, 2))):
            at = data.draw(st.sampled_from(list(places(values))))
            values = changed(values, at, data.draw(st.sampled_from(HOSTILE)))
            if not isinstance(values, dict):
                break
        put(path, values)
        run()
    finally:
        path.write_bytes(kept)


SETTINGS = settings(
    max_examples=25,
    deadline=30_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SETTINGS
@given(data=st.data(), name=st.sampled_from(["config.json", "generation_config.json"]))
def test_configs(folder: Path, data: st.DataObject, name: str) -> None:
    check(folder / "model", name, data, lambda: use(folder / "model"))


@SETTINGS
@given(data=st.data())
def test_tokenizer_files(folder: Path, data: st.DataObject) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"]
    held = [name for name in names if (folder / "model" / name).exists()]
    name = data.draw(st.sampled_from(held))
    check(folder / "model", name, data, lambda: use(folder / "model"))


@SETTINGS
@given(data=st.data())
def test_adapters(folder: Path, data: st.DataObject) -> None:
    run = lambda: use(folder / "model", folder / "adapter")  # noqa: E731
    check(folder / "adapter", "adapter_config.json", data, run)


@SETTINGS
@given(data=st.data())
def test_headers_of_weights(folder: Path, data: st.DataObject) -> None:
    which = data.draw(
        st.sampled_from(["model/model.safetensors", "adapter/adapter_model.safetensors"])
    )
    path = folder / which
    kept = path.read_bytes()
    (length,) = struct.unpack("<Q", kept[:8])
    header = json.loads(kept[8 : 8 + length])
    try:
        at = data.draw(st.sampled_from(list(places(header))))
        text = json.dumps(changed(header, at, data.draw(st.sampled_from(HOSTILE)))).encode()
        size = data.draw(st.sampled_from([len(text), 0, 2**63, len(text) + 9]))
        path.write_bytes(struct.pack("<Q", size) + text + kept[8 + length :])
        use(folder / "model", folder / "adapter")
    finally:
        path.write_bytes(kept)


@SETTINGS
@given(data=st.data())
def test_manifests(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    from d2f_runtime.backends.onnx_backend import load as load_onnx

    root = tmp_path_factory.getbasetemp() / "manifested"
    if not root.exists():
        shutil.copytree(tiny_folder("dream", "device"), root)

    def run() -> None:
        try:
            manifest = read_manifest(root)
            verify_files(root, manifest)
            params = manifest.params_for("cpu")
            backend = load_onnx(root, device="cpu")
            backend.check(params)
            decoder = decoder_of(backend.info, [5, 6, 7], params)
            window = decoder.next_window()
            assert isinstance(window, Window)
            backend.step([StepRow(backend.open_slot(min(90, backend.info.max_len)), window)])
        except D2FError:
            pass

    check(root, "manifest.json", data, run)


def test_names_that_no_file_has() -> None:
    for name in ("x" * 5000, "a\0b", "x/" * 3000):
        with pytest.raises(ModelNotFound, match="there is no model"):
            locate(name)
