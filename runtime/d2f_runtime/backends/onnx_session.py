"""StepSession: an onnxruntime session of a step graph: versions, device, threads, names, shapes.

Knows nothing of windows or slots.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from d2f_runtime.backends.block_products import has_block_products
from d2f_runtime.backends.devices import check_device
from d2f_runtime.backends.settled_memory import settled_memory
from d2f_runtime.backends.unpacked_graph import open_unpacked
from d2f_runtime.cpus import num_cpus
from d2f_runtime.models.manifest import FixedWindow, Manifest, OnnxInfo
from d2f_runtime.text.files import holds_file
from d2f_stream.core.errors import ModelDamaged, UnsupportedModel

__all__ = [
    "GRAPH_FILE",
    "GRAPH_INTERFACE",
    "StepSession",
    "choose_device",
    "nodes_by_provider",
    "open_sessions",
]

GRAPH_FILE: Final = "model.onnx"
MAX_OPSET: Final = 23
GRAPH_INTERFACE: Final = 2  # 1: K/V in one output, states for all predicted rows
BYTES_PER_THREAD: Final = 4 << 20  # fewer weights than this are read faster by one thread less

CUDA: Final = "CUDAExecutionProvider"
CPU: Final = "CPUExecutionProvider"
MIN_CUDA: Final = (1, 31)  # the oldest whose CUDA attention was run
WHEELS: Final = ("onnxruntime", "onnxruntime-gpu")
TYPES: Final = {"tensor(float)": "float32", "tensor(float16)": "float16"}


@dataclass(frozen=True, slots=True)
class StepSession:
    """A graph that is ready to run.

    Attributes:
        session: onnxruntime's.
        device: its kind and index, ("cuda", 0).
        dtype: of K/V and states.
        fixed: the shape of a graph with static shapes.
    """

    session: ort.InferenceSession
    device: tuple[str, int]
    dtype: Any
    fixed: FixedWindow | None = None


def open_sessions(folder: Path, manifest: Manifest, device: str) -> list[StepSession]:
    """Return the folder's graphs: one with symbolic shapes, or those with static ones by width.

    Args:
        folder: of the model.
        manifest: of the folder.
        device: "auto" is CUDA where onnxruntime has it and the weights are not int8, which only
            its CPU kernels run; "cpu", "cuda" or "cuda:N".

    Raises:
        ModelDamaged: a graph is missing, cannot be read, or is not the manifest's.
        UnsupportedModel: onnxruntime is too old, there are two of it, or it has no such device.
    """
    info = manifest.onnx
    if info is None:
        raise ModelDamaged(f"the manifest in {folder} tells of no ONNX graph; export it again")
    _check_installation(_installed())
    _check_versions(manifest, info)
    place, providers = choose_device(device, info.quantization)
    windows: list[tuple[str, FixedWindow | None]] = [(GRAPH_FILE, None)]
    if info.windows:
        windows = [(window.file, window) for window in sorted(info.windows, key=lambda w: w.width)]
    sessions = []
    for file, fixed in windows:
        session = _open(folder, file, manifest, providers)
        dtype = _check_inputs(folder / file, session, manifest, fixed)
        sessions.append(StepSession(session, place, dtype, fixed))
    return sessions


def nodes_by_provider(session: ort.InferenceSession) -> Mapping[str, Mapping[str, int]]:
    """Return how many nodes of each kind every execution provider runs; empty on the CPU alone."""
    found: dict[str, dict[str, int]] = {}
    if session.get_providers() == [CPU]:
        return found
    for subgraph in session.get_provider_graph_assignment_info():
        kinds = found.setdefault(subgraph.ep_name, {})
        for node in subgraph.get_nodes():
            kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    return found


def _open(
    folder: Path, file: str, manifest: Manifest, providers: list[Any]
) -> ort.InferenceSession:
    graph = folder / file
    if not holds_file(graph) or graph.name != file:  # in this folder, not in another
        raise ModelDamaged(f"{graph.parent} has a manifest but no {graph.name}; export it again")
    options = ort.SessionOptions()
    options.intra_op_num_threads = _num_threads(manifest)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if providers == [CPU]:
        # It plans memory by the inputs' shapes, which are new ones in every step of an answer.
        options.enable_mem_pattern = False
    else:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # else it makes 16 bits of int4 first, in every step of more than 16 rows
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    # NOTE: spinning stays on; stopping it after each run costs 1 ms to wake the threads.
    try:
        with settled_memory():
            if manifest.onnx is not None and manifest.onnx.quantization == "int4-int8":
                in_blocks = providers == [CPU] and has_block_products()
                session = open_unpacked(graph, options, providers, in_blocks=in_blocks)
            else:
                session = ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as exc:  # onnxruntime's errors have no common base but this
        raise ModelDamaged(f"{graph} cannot be loaded: {exc}") from exc
    if providers != [CPU] and CUDA not in session.get_providers():  # it falls back silently
        raise UnsupportedModel(
            f"onnxruntime-gpu {ort.__version__} could not start CUDA, as its libraries lack or the "
            "driver is too old; run d2f-stream doctor, or use device='cpu'"
        )
    return session


def _installed() -> dict[str, str]:
    """Return the versions of onnxruntime's distributions."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _check_installation(installed: Mapping[str, str]) -> None:
    if len(installed) > 1:
        both = " and ".join(f"{name} {version}" for name, version in installed.items())
        raise UnsupportedModel(
            f"{both} are both installed and overwrite each other's files; run: pip uninstall -y "
            f"{' '.join(WHEELS)}, then install one of them"
        )


def _check_versions(manifest: Manifest, info: OnnxInfo) -> None:
    needed, found = info.min_onnxruntime, ort.__version__
    if _version(found) < _version(needed):
        raise UnsupportedModel(
            f"model {manifest.name} needs onnxruntime {needed} or newer, but {found} is installed"
        )
    if info.opset > MAX_OPSET:
        raise UnsupportedModel(
            f"model {manifest.name} uses opset {info.opset}, but this build knows "
            f"{MAX_OPSET}; update d2f-stream"
        )
    if info.interface != GRAPH_INTERFACE:
        way_out = "update d2f-stream" if info.interface > GRAPH_INTERFACE else "export it again"
        raise UnsupportedModel(
            f"the graph of model {manifest.name} has interface {info.interface}, but this build "
            f"runs {GRAPH_INTERFACE}; {way_out}"
        )


def _version(text: str) -> tuple[int, ...]:
    """Compare releases by their numbers: 1.9 < 1.23; a suffix such as rc1 is left out."""
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def choose_device(device: str, stored: str) -> tuple[tuple[str, int], list[Any]]:
    """Return the device and onnxruntime's providers for it."""
    has_cuda = CUDA in ort.get_available_providers()
    if device == "auto":
        device = "cuda" if has_cuda and stored != "int8" else "cpu"
    check_device(device, backend="onnx")
    if device == "cpu":
        return ("cpu", 0), [CPU]
    _, _, index = device.partition(":")
    if _version(ort.__version__) < MIN_CUDA:
        raise UnsupportedModel(
            f"CUDA needs onnxruntime-gpu {'.'.join(map(str, MIN_CUDA))} or newer, but "
            f"{ort.__version__} is installed; update it, or use device='cpu'"
        )
    ort.preload_dlls()  # CUDA's libraries, where they are Python packages
    ort.set_default_logger_severity(3)  # it warns of a plugin that it does not need
    number = int(index or 0)
    options = {
        "device_id": number,
        "arena_extend_strategy": "kSameAsRequested",  # else the arena grows in powers of two
        "use_tf32": 0,  # fp32 is there to be exact
    }
    return ("cuda", number), [(CUDA, options), CPU]


def _num_threads(manifest: Manifest) -> int:
    size = sum(file.bytes for name, file in manifest.files.items() if name.startswith(GRAPH_FILE))
    return max(1, min(num_cpus(), size // BYTES_PER_THREAD))


def _check_inputs(
    graph: Path, session: ort.InferenceSession, manifest: Manifest, fixed: FixedWindow | None
) -> Any:
    """Compare names and shapes with the manifest; return the dtype of the K/V."""
    shape = manifest.transformer
    width = shape.num_kv_heads * shape.head_dim
    expected: dict[str, object] = dict.fromkeys(
        ("tokens", "start", "visible_until", "head_rows", "in_full", "temperature", "uniforms")
    )
    if manifest.onnx is not None and manifest.onnx.drafts:
        expected["is_draft"] = None
    if manifest.shift_logits:
        expected |= {"last_hidden": shape.hidden_size, "keep": None}
    expected |= {f"past.{i}.{x}": width for i in range(shape.num_layers) for x in "kv"}
    if fixed is not None:
        expected |= {"tokens": fixed.width, "head_rows": fixed.width}
    found = {value.name: value for value in session.get_inputs()}
    if different := sorted(expected.keys() ^ found.keys()):
        raise ModelDamaged(f"{graph} and its manifest differ in the input {different[0]!r}")
    for name, size in expected.items():
        if size is not None and found[name].shape[-1] != size:
            raise ModelDamaged(
                f"{graph} and its manifest differ in the size of {name!r}: {found[name].shape[-1]} "
                f"and {size}"
            )
    past = found["past.0.k"]
    if fixed is not None and past.shape[1] != fixed.capacity:
        raise ModelDamaged(
            f"{graph} and its manifest differ in the capacity: {past.shape[1]} and {fixed.capacity}"
        )
    if past.type not in TYPES:
        raise ModelDamaged(f"{graph} keeps its K/V as {past.type}, which this build does not")
    return np.dtype(TYPES[past.type])
