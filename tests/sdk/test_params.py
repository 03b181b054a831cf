from typing import Any, get_type_hints

import msgspec
import pytest

from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams, ParamOverrides, Stop
from d2f_stream.core.presets import PRESETS


def test_overrides_are_exactly_the_fields() -> None:
    fields = get_type_hints(GenerationParams)
    overrides = get_type_hints(ParamOverrides)
    assert overrides == {name: fields[name] for name in GenerationParams.__struct_fields__}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("block_size", 0),
        ("block_size", 1025),
        ("add_threshold", 0.0),
        ("activate_threshold", 1.1),
        ("confidence_threshold", float("nan")),
        ("confidence_threshold", "0.9"),
        ("max_active_blocks", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("seed", -(2**63) - 1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("rank", "best"),
        ("stop", 7),
        ("stop", {"a"}),
        ("stop", ["a", 1]),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop_at_eos", "later"),
        ("tail", "keep"),
        ("commit", "later"),
        ("sub_block_size", -1),
        ("sub_block_size", 1025),
        ("max_new_tokens", 10**30),
        ("max_active_blocks", 2**63),
        ("max_edit_steps", 2**63),
        ("stop", "\ud83d"),
    ],
)
def test_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidParams, match=f"^{field} is ") as caught:
        GenerationParams(**{field: value})
    assert caught.value.name == field


def test_integer_that_python_does_not_write_is_refused_too() -> None:
    with pytest.raises(InvalidParams, match="max_new_tokens is a value of the type int that is"):
        GenerationParams(max_new_tokens=10**5000)


def test_edges_of_the_ranges_are_allowed() -> None:
    GenerationParams(
        max_new_tokens=1,
        block_size=1024,
        add_threshold=1.0,
        activate_threshold=1e-9,
        confidence_threshold=1,
        max_active_blocks=None,
        temperature=100,
        top_p=1.0,
        seed=2**63 - 1,
        stop=tuple("abcdefghijklmnop"),
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("\n\n", ("\n\n",)),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
        ("", ()),
        ([], ()),
        ((), ()),
    ],
)
def test_stop_is_a_string_a_list_or_a_tuple(given: Stop, kept: tuple[str, ...]) -> None:
    params = GenerationParams(stop=given)
    assert params.stop == kept
    assert GenerationParams().with_overrides({"stop": given}) == params
    assert msgspec.convert({"stop": given}, GenerationParams) == params
    assert hash(params) == hash(GenerationParams(stop=kept))


@pytest.mark.parametrize("seed", [-1, -(2**63), 0, 2**63 - 1])
def test_seed_is_a_signed_64_bit_integer(seed: int) -> None:
    assert GenerationParams(seed=seed).seed == seed


def test_with_overrides_changes_a_copy() -> None:
    params = GenerationParams(block_size=16)
    changed = params.with_overrides({"max_new_tokens": 5, "drafts": True})
    assert (changed.max_new_tokens, changed.block_size, changed.drafts) == (5, 16, True)
    assert params.max_new_tokens == 256


def test_with_overrides_checks_the_values() -> None:
    with pytest.raises(InvalidParams, match="top_p"):
        GenerationParams().with_overrides({"top_p": 2.0})


def test_unknown_override_lists_the_known_ones() -> None:
    with pytest.raises(InvalidParams, match=r"'max_tokens' but must be one of .*top_p"):
        GenerationParams().with_overrides({"max_tokens": 5})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("max_new_tokens", "tail", "num_blocks"),
    [(64, "cut", 2), (65, "cut", 3), (65, "drop", 2), (1, "cut", 1)],
)
def test_num_blocks(max_new_tokens: int, tail: Any, num_blocks: int) -> None:
    params = GenerationParams(max_new_tokens=max_new_tokens, block_size=32, tail=tail)
    assert params.num_blocks == num_blocks


def test_dropping_the_tail_needs_one_whole_block() -> None:
    with pytest.raises(InvalidParams, match="at least block_size"):
        GenerationParams(max_new_tokens=31, block_size=32, tail="drop")


def test_params_are_frozen_and_comparable() -> None:
    params = GenerationParams()
    assert params == GenerationParams()
    with pytest.raises(AttributeError):
        params.top_p = 0.5  # type: ignore[misc]


def test_params_survive_json() -> None:
    params = GenerationParams(stop=("a", "b"), seed=7, max_active_blocks=None)
    assert msgspec.json.decode(msgspec.json.encode(params), type=GenerationParams) == params


def test_unknown_field_in_json_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="max_tokens"):
        msgspec.json.decode(b'{"max_tokens": 5}', type=GenerationParams)


def test_reference_preset_is_the_published_loop() -> None:
    params = PRESETS["reference"]
    assert (params.stop_at_eos, params.tail, params.max_active_blocks) == ("drain", "drop", None)
    thresholds = (
        params.add_threshold,
        params.activate_threshold,
        params.confidence_threshold,
    )
    assert thresholds == (0.1, 0.95, 0.9)


@pytest.mark.parametrize(
    ("name", "row"),  # max_new, B, add, confidence; table 8 of arXiv 2508.09192
    [
        ("d2f-llada-gsm8k", (512, 64, 0.7, 0.9)),
        ("d2f-llada-mbpp", (512, 32, 0.9, 0.9)),
        ("d2f-llada-minerva_math", (512, 32, 0.1, 0.9)),
        ("d2f-llada-humaneval", (512, 32, 0.1, 0.9)),
        ("d2f-dream-gsm8k_cot", (256, 32, 0.1, 0.9)),
        ("d2f-dream-mbpp", (256, 48, 0.1, 0.9)),
        ("d2f-dream-minerva_math", (256, 64, 0.1, 0.9)),
        ("d2f-dream-humaneval", (256, 32, 0.9, 0.95)),
    ],
)
def test_task_presets_are_those_of_the_paper(name: str, row: tuple[int, int, float, float]) -> None:
    params = PRESETS[name]
    found = params.max_new_tokens, params.block_size, params.add_threshold
    assert (*found, params.confidence_threshold) == row
    assert params.activate_threshold == 0.95


def test_single_block_preset_switches_the_pipeline_off() -> None:
    params = PRESETS["single-block"]
    assert (params.add_threshold, params.max_active_blocks) == (1.0, 1)
