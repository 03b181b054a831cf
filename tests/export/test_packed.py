"""Matrices of 4 to 6 bits on disk: what a session unpacks, and that rows are computed alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from d2f_export.onnx.graph_builder import GraphBuilder
from d2f_export.onnx.packed import Packing
from d2f_export.onnx.quantize import Linear
from d2f_export.onnx.weights import Checkpoint
from d2f_runtime.backends import onnx_session
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.decoding.window import Window
from d2f_runtime.evaluation.answers import decode_all
from d2f_stream.core.params import GenerationParams
from tiny_models import tiny_folder
from tiny_packed import MASK, write_packed

pytestmark = pytest.mark.torch

PROMPTS = [[5, 9, 12, 40], [70, 71], list(range(20, 60)), [33] * 7]


def run(
    graph: GraphBuilder, levels: str, scale: str, arrays: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the levels around 128 and the scales that a session has of a matrix."""
    outputs = [
        helper.make_tensor_value_info(levels, TensorProto.UINT8, None),
        helper.make_tensor_value_info(graph.op("Identity", scale), TensorProto.FLOAT, None),
    ]
    model = graph.model([], outputs)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    every = [stored for weights in graph.weights for stored in weights.stored]
    for stored, array in zip(every, arrays, strict=True):
        assert stored.shape == array.shape
        assert stored.dtype == str(array.dtype)
        tensors[stored.name].raw_data = array.tobytes()
    found = ort.InferenceSession(model.SerializeToString()).run(None, {})
    return found[0], found[1]


def unpacked(packing: Packing, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return what a session has of a matrix."""
    graph = GraphBuilder()
    levels, scale = packing.store(graph, "w", ["w"], (weight.shape[0], weight.shape[1]))
    return run(graph, levels, scale, packing.pack([weight]))


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("num_in", [64, 32, 50, 3])
def test_weights_are_within_half_a_code_and_two_levels(bits: int, num_in: int) -> None:
    weight = torch.randn(24, num_in, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    levels, scale = unpacked(Packing(bits), weight)
    assert levels.shape == (num_in, 24)
    found = (levels.astype(np.float32) - 128).T * scale[:, None]
    padded = np.pad(weight.numpy(), ((0, 0), (0, -num_in % 32)), mode="edge").reshape(24, -1, 32)
    code = (padded.max(2) - padded.min(2)) / ((1 << bits) - 1)
    allowed = np.repeat(code / 2, 32, axis=1)[:, :num_in] + 2 * scale[:, None]
    assert (np.abs(found - weight.numpy()) <= allowed).all()


def test_smoothed_weights_are_the_products_with_the_factors() -> None:
    weight = torch.randn(24, 50, generator=torch.Generator().manual_seed(0))
    factor = torch.rand(50, generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    factor = factor.half().float()
    graph = GraphBuilder()
    levels, scale = Packing(4).store(graph, "w", ["w"], (24, 50), smooth="s")
    plain_weights, factors = graph.weights
    assert (plain_weights.sources, factors.sources) == (("w",), ("s",))
    arrays = [*plain_weights.pack(weight), *factors.pack(factor)]
    found_levels, found_scale = run(graph, levels, scale, arrays)
    plain_levels, plain_scale = unpacked(Packing(4), weight)
    plain = (plain_levels.astype(np.float32) - 128) * plain_scale  # [K, N]
    found = (found_levels.astype(np.float32) - 128) * found_scale
    allowed = plain_scale * factor.numpy()[:, None] + found_scale
    assert (np.abs(found - plain * factor.numpy()[:, None]) <= allowed).all()
    assert np.abs(found_levels.astype(int) - 128).max() <= 127


def test_codes_of_six_bits_stand_between_the_ends_that_a_session_has() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(7))
    levels, scale = unpacked(Packing(6), weight)
    found = (levels.astype(np.float32) - 128).T  # [N, K]
    exact = weight.numpy() / scale[:, None]
    blocks = exact.reshape(64, 3, 32)
    code = (np.ceil(blocks.max(2)) - np.floor(blocks.min(2))) / 63
    assert (np.abs(found - exact) <= np.repeat(code / 2, 32, axis=1) + 0.501).all()


def test_a_product_of_what_rounding_cut_off_is_added() -> None:
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.standard_normal((40, 64)).astype(np.float32))
    x = rng.standard_normal((1, 5, 64)).astype(np.float32)
    x[:, :, 3] = 60  # beside which the others are a few levels
    levels, scale = unpacked(Packing(4), weight)
    exact = x[0] @ ((levels.astype(np.float32) - 128) * scale)
    errors = []
    for twice in (False, True):
        graph = GraphBuilder()
        out = Linear(graph, "int4-int8")("x", "w", ["w"], (40, 64), twice=twice)
        x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", 64])
        info = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
        model = graph.model([x_info], [info])
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        arrays = graph.weights[0].pack(weight)
        for stored, array in zip(graph.weights[0].stored, arrays, strict=True):
            tensors[stored.name].raw_data = array.tobytes()
        (found,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
        errors.append(float(np.abs(found[0] - exact).max()))
    assert errors[1] < errors[0] / 50


def test_up_projections_are_divided_by_what_down_projections_are_multiplied_with() -> None:
    checkpoint = Checkpoint(tiny_folder("llada", "torch"))
    for layer in range(checkpoint.config.num_layers):
        path = f"layers.{layer}.mlp"
        names = [f"divided.{path}.up_proj.weight", f"smooth.{path}.down_proj"]
        divided, factors = checkpoint(names)
        (rows,) = checkpoint([f"{path}.up_proj.weight"])
        torch.testing.assert_close(divided * factors[:, None], rows.float())
        assert factors.max() > factors.min()
        assert factors.half().float().equal(factors)


def test_what_had_four_bits_keeps_its_codes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 2, 32))
    codes[:, :, 0], codes[:, :, 1] = 0, 15  # as a minimum and a maximum have
    step, lowest = rng.uniform(0.5, 1, (8, 2, 1)), rng.uniform(-9, -6, (8, 2, 1))
    weight = torch.from_numpy((lowest + codes * step).reshape(8, 64)).float()
    low = Packing(4).pack([weight])[0]
    found = np.concatenate([low & 15, low >> 4], axis=1).transpose(2, 0, 1)
    assert (found == codes).all()


def test_products_are_those_of_the_unpacked_matrix() -> None:
    rng = np.random.default_rng(1)
    weight = torch.from_numpy(rng.standard_normal((40, 64)).astype(np.float32))
    levels, scale = unpacked(Packing(4), weight)
    graph = GraphBuilder()
    out = Linear(graph, "int4-int8")("x", "w", ["w"], (40, 64))
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", 64])
    model = graph.model([x_info], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for stored, array in zip(graph.weights[0].stored, graph.weights[0].pack(weight), strict=True):
        tensors[stored.name].raw_data = array.tobytes()
    x = rng.standard_normal((1, 5, 64)).astype(np.float32)
    (found,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    wanted = x[0] @ ((levels.astype(np.float32) - 128) * scale)
    assert np.abs(found[0] - wanted).max() < 0.02 * np.abs(wanted).max()  # rows have 8 bits


@pytest.fixture(scope="module", params=["with a kernel", "without"])
def drafting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> OnnxBackend:
    """A backend on a machine that has a kernel for products of blocks, if this one has, or none."""
    folder = write_packed(tmp_path_factory.mktemp("packed"))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without":
            patch.setattr(onnx_session, "has_block_products", lambda: False)
        return load(folder, device="cpu")


@pytest.mark.parametrize("cached", [0, 1, 31, 40, 70])
def test_a_row_has_the_same_bits_in_every_window(drafting: OnnxBackend, cached: int) -> None:
    tokens = tuple(int(t) for t in np.random.default_rng(cached).integers(1, 150, cached + 12))
    slot = drafting.open_slot(cached + 40)
    if cached:
        drafting.step([_row(slot, Window(0, tokens[:cached], cached, tuple(range(1, cached + 1))))])
    alone = []
    for at in range(cached, cached + 8):
        window = Window(at, (tokens[at], MASK), 1, (at + 1, at + 2))
        alone.append(drafting.logits(_row(slot, window))[-1])
        drafting.step([_row(slot, window)])
    drafting.close_slot(slot)
    slot = drafting.open_slot(cached + 40)
    if cached:
        drafting.step([_row(slot, Window(0, tokens[:cached], cached, tuple(range(1, cached + 1))))])
    stop = cached + 8
    stops = (*range(cached + 1, stop + 1), stop + 4)
    window = Window(cached, (*tokens[cached:stop], *[MASK] * 4), 8, stops, 7)
    together = drafting.logits(_row(slot, window))
    drafting.close_slot(slot)
    for one, other in zip(alone, together, strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("block_size", [2, 4, 8, 16])
@pytest.mark.parametrize("confidence", [0.001, 0.05, 0.9])
def test_verified_answers_are_the_autoregressive_ones(
    drafting: OnnxBackend, block_size: int, confidence: float
) -> None:
    common = GenerationParams(max_new_tokens=40, add_threshold=1.0, max_active_blocks=1)
    ordinary = common.with_overrides({"block_size": 1})
    verified = common.with_overrides(
        {"block_size": block_size, "confidence_threshold": confidence, "commit": "verify"}
    )
    wanted = decode_all(drafting, PROMPTS, ordinary, rows=1)
    found = decode_all(drafting, PROMPTS, verified, rows=1)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in wanted]


def _row(slot: int, window: Window) -> StepRow:
    return StepRow(slot, window)  # type: ignore[arg-type]
