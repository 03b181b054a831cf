import pytest

from d2f_runtime.backends.choice import Choice, DeviceFacts, choose_runner, is_proven
from d2f_stream.core.errors import UnsupportedModel

HOPPER, ADA, AMPERE, TURING = (9, 0), (8, 9), (8, 0), (7, 5)


def choose(
    capability: tuple[int, int] | None = HOPPER,
    *,
    triton: bool = True,
    quantization: str = "bf16",
    head_dim: int = 128,
    fault: str = "",
    wanted: str = "auto",
) -> Choice:
    return choose_runner(
        DeviceFacts(capability, triton, fault_of=lambda *_: fault),
        quantization=quantization,
        head_dim=head_dim,
        wanted=wanted,
    )


@pytest.mark.parametrize("capability", [HOPPER, ADA, AMPERE, (12, 0)])
@pytest.mark.parametrize("quantization", ["bf16", "fp16"])
def test_cuda_with_triton_is_fast(capability: tuple[int, int], quantization: str) -> None:
    assert choose(capability, quantization=quantization).name == "fast"


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (choose(None), "no CUDA device"),
        (choose(triton=False), "triton is not installed"),
        (choose(TURING), r"compute capability 7.5, not 8.0"),
        (choose(head_dim=96), "head size 96 is no power of two"),
        (choose(quantization="fp32"), "the weights are fp32"),
        (choose(wanted="plain"), "asked for"),
    ],
)
def test_anything_else_is_plain_and_says_why(choice: Choice, why: str) -> None:
    assert choice.name == "plain"
    assert why in choice.reason


def test_fp8_needs_the_fast_step_on_a_gpu_that_knows_it() -> None:
    assert choose(HOPPER, quantization="fp8").name == "fast"
    assert choose(ADA, quantization="fp8").name == "fast"
    for capability, wanted, why in (
        (AMPERE, "auto", "the GPU is of compute capability 8.0, not 8.9"),
        (None, "auto", "there is no CUDA device"),
        (HOPPER, "plain", "the plain step was asked for"),
    ):
        with pytest.raises(UnsupportedModel, match=f"^fp8 needs the fast step, but {why}"):
            choose(capability, quantization="fp8", wanted=wanted)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_low_bits_run_anywhere_but_dequantised_on_the_plain_step(quantization: str) -> None:
    assert choose(AMPERE, quantization=quantization).name == "fast"
    for choice in (
        choose(None, quantization=quantization),
        choose(TURING, quantization=quantization),
        choose(triton=False, quantization=quantization),
        choose(quantization=quantization, wanted="plain"),
    ):
        assert choice.name == "plain"
        assert f"multiplies {quantization} weights dequantised" in choice.reason


def test_the_fast_step_can_be_insisted_on() -> None:
    assert choose(None, wanted="fast", quantization="fp32").name == "fast"
    assert choose(HOPPER, wanted="fast", quantization="fp32").name == "fast"
    with pytest.raises(UnsupportedModel, match="asked for, but the GPU is of compute capability"):
        choose(TURING, wanted="fast")
    with pytest.raises(UnsupportedModel, match=r"8\.0, not 8\.9"):
        choose(AMPERE, wanted="fast", quantization="fp8")


@pytest.mark.parametrize(
    ("version", "capability", "proven"),
    [
        ("3.6.0", HOPPER, True),
        ("3.6.1+git1234", HOPPER, True),
        ("3.6.0", AMPERE, False),
        ("3.60.0", HOPPER, False),
        ("3.9.0", HOPPER, False),
        ("main", HOPPER, False),
        ("", HOPPER, False),
    ],
)
def test_kernels_are_proven_where_they_were_run(
    version: str, capability: tuple[int, int], proven: bool
) -> None:
    assert is_proven(version, capability) is proven


def test_kernels_at_fault_are_not_used() -> None:
    fault = "a trial of the fast step with Triton 3.9.0 errs by 0.3"
    assert choose(fault=fault) == Choice("plain", fault)
    with pytest.raises(UnsupportedModel, match=fault):
        choose(fault=fault, quantization="fp8")
    with pytest.raises(UnsupportedModel, match=fault):
        choose(fault=fault, wanted="fast")
    assert "no CUDA device" in choose(None, fault=fault).reason
