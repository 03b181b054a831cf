"""DraftSettings and WritingSettings: what shapes a draft adapter and the text that it learns from.

The defaults are those of the adapter of SmolLM2-135M that is described in docs/distillation.md.
"""

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from d2f_export.distill.settings import Positive, RunSettings, Share, check_values
from d2f_stream.core.errors import InvalidParams

__all__ = ["FREE", "SIZES", "DraftSettings", "Loss", "WritingSettings"]

Loss = Literal["kl", "ce", "both"]
SIZES: Final = "rows, noisy_length or clean_length"  # what the memory of a training depends on


class DraftSettings(RunSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a draft adapter is trained. Validated on construction; each field says what it is.

    Raises:
        InvalidParams: on construction, for the first field out of range.
    """

    is_per_start: ClassVar[bool] = True

    from_ar: Annotated[
        str, Meta(min_length=1, description="the autoregressive base: a folder, .gguf or hub id")
    ]
    family: Annotated[str | None, Meta(description="the model's, if its files tell none")] = None
    data: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="JSONL files, or what distill-data wrote (.npz)"),
    ]
    prompt_field: Annotated[str, Meta(description="of a line that has no messages")] = "prompt"
    answer_field: Annotated[str, Meta(description="of a line that has no messages")] = "answer"
    mask_id: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="id of the mask; without it one that is free is found"),
    ] = None
    loss: Annotated[
        Loss, Meta(description="kl is KL(base || draft), ce the cross entropy to the data")
    ] = "kl"
    rank: Annotated[int, Meta(ge=1, description="of the adapter's factors")] = 64
    from_adapter: Annotated[
        str | None, Meta(description="folder of a draft adapter of this base, to begin with")
    ] = None
    block_sizes: Annotated[
        tuple[Annotated[int, Meta(ge=2, le=1024)], ...],
        Meta(min_length=1, description="rising; one more joins at a time"),
    ] = (4, 6, 8, 16)
    window_blocks: Annotated[
        int, Meta(ge=1, le=8, description="blocks drafted at a time; verified decoding drafts one")
    ] = 1
    all_masked: Annotated[
        float,
        Meta(ge=0.0, le=1.0, description="share of windows without any filled position"),
    ] = 1.0
    curriculum: Annotated[
        int, Meta(ge=0, description="steps after which all block sizes are trained")
    ] = 300
    rows: Annotated[int, Meta(ge=1, description="packed rows of a step, per process")] = 8
    clean_length: Annotated[
        int, Meta(ge=128, multiple_of=128, description="tokens of a row's examples together")
    ] = 2048
    noisy_length: Annotated[
        int, Meta(ge=128, multiple_of=128, description="tokens of a row's noisy copies together")
    ] = 4096

    steps: Annotated[int, Meta(ge=1, description="optimiser steps in all")] = 5000
    max_seconds: Annotated[
        Positive | None, Meta(description="end this start of the run after so long")
    ] = None
    lr: Annotated[Positive, Meta(description="learning rate between warm-up and decay")] = 1e-3
    warmup: Annotated[int, Meta(ge=0, description="steps of linear warm-up")] = 100
    decay: Annotated[
        Share, Meta(description="last share of this start in which the rate falls; 0 to go on")
    ] = 0.3
    workers: Annotated[int, Meta(ge=0, description="processes that prepare batches")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.block_sizes) != sorted(set(self.block_sizes)):
            raise InvalidParams("block_sizes", self.block_sizes, "rising")


FREE: Final = frozenset(
    {"data", "steps", "max_seconds", "decay", "workers", "save_every", "log_every"}
)
"""Fields that may change when a run goes on: more data, but no other way of learning from it."""


class WritingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an autoregressive model writes the text that its draft learns from.

    Raises:
        InvalidParams: on construction, for the first field out of range.
    """

    model: Annotated[str, Meta(min_length=1, description="a folder, .gguf or hub id")]
    family: Annotated[str | None, Meta(description="the model's, if its files tell none")] = None
    questions: Annotated[
        tuple[str, ...], Meta(description="JSONL files whose prompts are answered first")
    ] = ()
    starters: Annotated[
        tuple[str, ...],
        Meta(description="JSONL files with first words of requests, in place of common ones"),
    ] = ()
    evaluation: Annotated[
        tuple[str, ...], Meta(description="JSONL files whose texts must not be among the data")
    ] = ()
    prompt_field: Annotated[str, Meta(description="of a line of questions or starters")] = "prompt"
    draft: Annotated[
        str | None,
        Meta(description="folder of a draft adapter: decode what is `written` again with it"),
    ] = None
    written: Annotated[
        tuple[str, ...], Meta(description="files of distill-data whose prompts `draft` answers")
    ] = ()
    block_size: Annotated[int, Meta(ge=2, le=1024, description="of the draft, tokens")] = 8
    answers: Annotated[int, Meta(ge=1, description="end after so many")] = 50_000
    max_seconds: Annotated[Positive | None, Meta(description="end after so long")] = None
    slots: Annotated[int, Meta(ge=1, description="conversations at a time")] = 256
    length: Annotated[int, Meta(ge=64, description="longest conversation, tokens")] = 576
    answer_length: Annotated[int, Meta(ge=16, description="longest answer, tokens")] = 448
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1, description="of what is sampled")] = 0

    def __post_init__(self) -> None:
        check_values(self)
        if self.draft is None and self.written:
            raise InvalidParams("written", self.written, "empty without a draft")
        if self.draft is not None and not self.written:
            raise InvalidParams("written", self.written, "a file that distill-data wrote")
