from dataclasses import replace

import pytest

from d2f_runtime.backends.choice import Choice, DeviceFacts, choose_quantization, weight_bytes
from d2f_runtime.models.config import TransformerConfig

LLADA = TransformerConfig(
    family="llada", vocab_size=126464, num_tokens=126464, hidden_size=4096, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, ffn_size=12288, mask_id=126336, eos_ids=(126081,),
)  # fmt: skip
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
GIB = 1 << 30


def choose(
    free: float | None,
    capability: tuple[int, int] | None = HOPPER,
    *,
    stored: str = "bf16",
    triton: bool = True,
    config: TransformerConfig = LLADA,
) -> Choice:
    room = None if free is None else int(free * GIB)
    return choose_quantization(config, DeviceFacts(capability, triton, room), stored=stored)


@pytest.mark.parametrize(
    ("free", "capability", "name"),
    [
        (80, HOPPER, "bf16"),
        (20, HOPPER, "bf16"),
        (16, HOPPER, "fp8"),
        (14, HOPPER, "nf4"),  # fp8 comes in 16 bits, which do not fit
        (10, HOPPER, "nf4"),
        (16, AMPERE, "nf4"),  # no fp8 there
        (None, HOPPER, "bf16"),
    ],
)
def test_the_least_change_that_fits(
    free: float | None, capability: tuple[int, int], name: str
) -> None:
    assert choose(free, capability).name == name


def test_the_reason_says_what_would_not_fit() -> None:
    reason = choose(10).reason
    assert "of 10.0 GiB free" in reason
    assert "bf16 would need 18.4 GiB" in reason
    assert "fp8 would need 15.2 GiB" in reason


def test_the_checkpoints_own_comes_first() -> None:
    assert choose(80, stored="fp16").name == "fp16"
    assert choose(80, stored="fp32").name == "fp32"
    assert choose(20, stored="fp32").name == "bf16"
    assert "the checkpoint's own" in choose(80).reason


@pytest.mark.parametrize(
    ("free", "capability", "name"),
    [(80, HOPPER, "bf16"), (16, HOPPER, "fp8"), (1, HOPPER, "nf4"), (1, TURING, "bf16"),
     (None, None, "fp32")],
)  # fmt: skip
def test_blocks_that_no_kernel_multiplies_are_not_kept(
    free: float | None, capability: tuple[int, int] | None, name: str
) -> None:
    choice = choose(free, capability, stored="Q4_K")
    assert choice.name == name
    assert choice.reason.endswith("; the file's Q4_K is dequantised")
    assert "Q4_K would need" not in choice.reason


@pytest.mark.parametrize("stored", ["nf4", "int8"])
@pytest.mark.parametrize("capability", [HOPPER, TURING, None])
def test_what_is_quantised_stays_so(stored: str, capability: tuple[int, int] | None) -> None:
    assert choose(80, capability, stored=stored).name == stored


def test_a_cpu_computes_in_fp32() -> None:
    assert choose(None, None).name == "fp32"


def test_where_the_kernels_do_not_run_nothing_is_quantised() -> None:
    assert choose(10, triton=False).name == "bf16"
    assert choose(10, TURING).name == "bf16"
    assert "none fits" in choose(10, triton=False).reason


def test_where_nothing_fits_the_smallest_is_tried() -> None:
    choice = choose(4)
    assert choice.name == "nf4"
    assert "none fits" in choice.reason


def test_weights_of_llada() -> None:
    assert weight_bytes(LLADA, "bf16") == pytest.approx(16.03e9, rel=1e-3)
    assert weight_bytes(LLADA, "fp8") == pytest.approx(8.53e9, rel=1e-3)
    assert weight_bytes(LLADA, "nf4") == pytest.approx(5.78e9, rel=1e-3)
    tied = replace(LLADA, tie_embeddings=True)
    assert weight_bytes(LLADA, "fp32") - weight_bytes(tied, "fp32") == 4 * 126464 * 4096
