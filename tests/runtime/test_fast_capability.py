import pytest

from d2f_runtime.backends.capability import RunnerChoice, choose_runner, is_proven

HOPPER, ADA, AMPERE, TURING = (9, 0), (8, 9), (8, 0), (7, 5)


def choose(
    capability: tuple[int, int] | None = HOPPER,
    *,
    triton: bool = True,
    quantization: str = "bf16",
    head_dim: int = 128,
    fault: str = "",
    wanted: str = "auto",
) -> RunnerChoice:
    return choose_runner(
        device="cpu" if capability is None else "cuda",
        compute_capability=capability,
        has_triton=triton,
        quantization=quantization,
        head_dim=head_dim,
        fault=fault,
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
def test_anything_else_is_plain_and_says_why(choice: RunnerChoice, why: str) -> None:
    assert choice.name == "plain"
    assert why in choice.reason


def test_fp8_needs_the_fast_step_on_a_gpu_that_knows_it() -> None:
    assert choose(HOPPER, quantization="fp8").name == "fast"
    assert choose(ADA, quantization="fp8").name == "fast"
    for refused in (
        choose(AMPERE, quantization="fp8"),
        choose(None, quantization="fp8"),
        choose(quantization="fp8", wanted="plain"),
    ):
        assert refused.name is None
        assert "fp8 needs the fast step, but" in refused.reason
    assert "8.0, not 8.9" in choose(AMPERE, quantization="fp8").reason


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
    assert choose(TURING, wanted="fast").name is None


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
    assert choose(fault=fault) == RunnerChoice("plain", fault)
    refused = choose(fault=fault, quantization="fp8")
    assert refused.name is None
    assert fault in refused.reason
    assert fault in choose(fault=fault, wanted="fast").reason
    assert "no CUDA device" in choose(None, fault=fault).reason
