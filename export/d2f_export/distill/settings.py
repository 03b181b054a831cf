"""DistillSettings: everything that shapes a distillation, one frozen, validated value.

RunSettings is the part of it that every run has, TrainSettings what the embedded model's has too.

Read from a TOML file and from the command line, written into the run's folder. The defaults are
those of the released D2F training (zhijie-group/Discrete-Diffusion-Forcing, commit 771f745) and of
the paper (arXiv 2508.09192, section 5.1) where the two differ in length only.
"""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from d2f_stream.core.errors import InvalidParams, InvalidRequest
from d2f_stream.core.nearest import one_of

__all__ = [
    "FREE",
    "DistillSettings",
    "RunSettings",
    "TrainSettings",
    "build_settings",
    "check_values",
    "read_settings",
    "to_toml",
]

Settings = TypeVar("Settings", bound=msgspec.Struct)
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long and how fast a run trains. Validated on construction.

    Raises:
        InvalidParams: on construction, for the first field out of range.
    """

    is_per_start: ClassVar[bool] = False
    """Whether time and decay are those of one start of the run, not of the whole run."""

    steps: Annotated[int, Meta(ge=1, description="optimiser steps in all")] = 50_000
    max_seconds: Annotated[
        Positive | None, Meta(description="end after this time, the decay done by then")
    ] = None
    lr: Annotated[Positive, Meta(description="learning rate at its peak")] = 1e-5
    warmup: Annotated[int, Meta(ge=0, description="steps of linear warm-up")] = 0
    decay: Annotated[
        Share, Meta(description="share of the steps, the last ones, in which the rate falls to 0")
    ] = 0.0
    clip: Annotated[Positive, Meta(description="largest gradient norm")] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1, description="of data order and noise")] = 0
    save_every: Annotated[int, Meta(ge=1, description="steps that a kill loses at most")] = 1000
    log_every: Annotated[int, Meta(ge=1, description="steps between rows of log.csv")] = 10

    def __post_init__(self) -> None:
        check_values(self)


class TrainSettings(RunSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every training of a whole canvas has. Validated on construction."""

    accumulation: Annotated[int, Meta(ge=1, description="micro-batches of an optimiser step")] = 3
    weight_decay: Annotated[float, Meta(ge=0.0, description="of AdamW")] = 0.05
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], Meta(description="auto is bf16 on a GPU, else fp32")
    ] = "auto"


class DistillSettings(TrainSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a student is distilled. Validated on construction; each field says what it is.

    Raises:
        InvalidParams: on construction, for the first field out of range.
    """

    model: Annotated[str, Meta(min_length=1, description="the teacher: a folder or a hub id")]
    family: Annotated[str | None, Meta(description="the model's, if its files tell none")] = None
    data: Annotated[
        tuple[str, ...], Meta(min_length=1, description="JSONL files of prompts and answers")
    ]
    prompt_field: Annotated[str, Meta(description="of a line that has no messages")] = "prompt"
    answer_field: Annotated[str, Meta(description="of a line that has no messages")] = "answer"
    chat_template: Annotated[bool, Meta(description="put prompts through the chat template")] = True
    length: Annotated[
        int, Meta(ge=2, description="prompt, answer and EOS padding together, tokens")
    ] = 512
    overlong: Annotated[
        Literal["auto", "drop", "cut"],
        Meta(description="longer examples; auto drops for LLaDA and cuts for Dream"),
    ] = "auto"
    min_answer: Annotated[
        int, Meta(ge=1, description="cut: room for the answer, else the example is dropped")
    ] = 100
    shuffle_buffer: Annotated[int, Meta(ge=1, description="examples held while shuffling")] = 10_000
    micro_batch: Annotated[int, Meta(ge=1, description="sequences of a forward, per process")] = 1

    schedule: Annotated[
        Literal["monotone", "random", "ramp"], Meta(description="mask ratios of the blocks")
    ] = "monotone"
    low: Annotated[Share, Meta(description="lowest mask ratio")] = 0.2
    high: Annotated[Share, Meta(description="highest mask ratio")] = 0.7
    block_size: Annotated[int, Meta(ge=1, le=1024, description="block of training, tokens")] = 16

    forward_kl: Annotated[
        float, Meta(ge=0.0, description="weight of KL(teacher || student) in the loss")
    ] = 1.0
    reverse_kl: Annotated[float, Meta(ge=0.0, description="weight of KL(student || teacher)")] = 0.0
    cross_entropy: Annotated[
        float, Meta(ge=0.0, description="weight of the cross entropy to the data")
    ] = 0.0
    mean_over: Annotated[
        Literal["masks", "answer"], Meta(description="what the sum over a batch is divided by")
    ] = "masks"

    full: Annotated[bool, Meta(description="train all weights instead of a LoRA")] = False
    lora_rank: Annotated[int, Meta(ge=1, description="of the LoRA's factors")] = 32
    lora_alpha: Positive = 32.0
    lora_dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.1
    attention: Annotated[
        Literal["auto", "flex", "dense"], Meta(description="auto is flex_attention on a GPU")
    ] = "auto"
    checkpointing: Annotated[
        bool, Meta(description="recompute activations in the backward pass to save memory")
    ] = True
    logit_rows: Annotated[
        int, Meta(ge=1, description="positions whose logits are held at a time")
    ] = 512

    validation: Annotated[
        str | None, Meta(description="JSONL file of held-out examples to decode")
    ] = None
    validate_every: Annotated[int, Meta(ge=1, description="steps between validations")] = 500
    validation_examples: Annotated[int, Meta(ge=1, description="decoded each time")] = 32
    validation_tokens: Annotated[int, Meta(ge=1, description="longest answer")] = 256
    validation_block_size: Annotated[int, Meta(ge=1, le=1024, description="of their decoding")] = 32
    validation_rows: Annotated[int, Meta(ge=1, description="answers decoded side by side")] = 8
    score: Annotated[
        Literal["exact", "contains", "regex"],
        Meta(description="right is: the same text, the expected text within, the same match"),
    ] = "exact"
    score_pattern: Annotated[
        str | None, Meta(description="regex: its first group, else all of it, last match")
    ] = None
    patience: Annotated[
        int, Meta(ge=0, description="stop after so many validations without a gain; 0 never does")
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise InvalidParams("low", self.low, f"at most high, which is {self.high}")
        if self.forward_kl + self.reverse_kl + self.cross_entropy == 0:
            raise InvalidParams("forward_kl", 0, "above 0 where the other two losses are off")
        if self.patience and self.validation is None:
            raise InvalidParams("patience", self.patience, "0 without a validation file")
        if (self.score == "regex") != (self.score_pattern is not None):
            raise InvalidParams(
                "score_pattern", self.score_pattern, "given with score 'regex' only"
            )
        try:
            re.compile(self.score_pattern or "")
        except re.error as error:
            allowed = f"a regular expression ({error})"
            raise InvalidParams("score_pattern", self.score_pattern, allowed) from error

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a part that the teacher gives."""
        return self.forward_kl > 0 or self.reverse_kl > 0


FREE: Final = frozenset(
    {
        "steps", "max_seconds", "save_every", "log_every", "precision", "attention",
        "checkpointing", "logit_rows", "validation_rows", "patience",
    }
)  # fmt: skip
"""Fields that may change when a run is resumed: they do not change what a step learns."""


def build_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Build settings from plain values, as TOML and the command line give them.

    Raises:
        InvalidParams: for the first unknown, missing or bad one.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in values:
        if name not in fields:
            raise InvalidParams("setting", name, one_of(name, sorted(fields)))
    for name, field in fields.items():
        if field.required and name not in values:
            raise InvalidRequest(f"{name} is missing; give --{name}, or {name} in --config")
    listed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return kind(**listed)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file, unchecked.

    Raises:
        InvalidRequest: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError) as error:
        raise InvalidRequest(f"the settings {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path} is not valid TOML: {error}") from error


def to_toml(settings: msgspec.Struct) -> str:
    """Return a TOML file that `read_settings` reads back; fields that are None are left out."""
    values = msgspec.structs.asdict(settings)
    # TOML's strings, numbers, booleans and lists of strings are written as JSON's.
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in values.items()
        if value is not None
    )


def check_values(settings: msgspec.Struct) -> None:
    """Check every field against its type and bounds.

    Raises:
        InvalidParams: for the first one out of range.
    """
    for field in msgspec.structs.fields(settings):
        _check(field.name, getattr(settings, field.name), field.type)


def _check(name: str, value: object, kind: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidParams(name, value, "a finite number")
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        choices = get_args(get_args(kind)[0]) if get_origin(kind) is Annotated else ()
        allowed = str(error).removeprefix("Expected ").partition(", got")[0].replace("`", "")
        if choices and all(isinstance(choice, str) for choice in choices):
            allowed = one_of(str(value), choices)
        raise InvalidParams(name, value, allowed.partition(" - at")[0]) from error
