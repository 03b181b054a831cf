"""Writing: an autoregressive model makes the data of its own draft, from settings to a file.

It makes up prompts and answers them; or it answers prompts again with a draft that it has by now.

The file is what `d2f-stream distill --from-ar` reads. On several GPUs, start one on each with its
own seed and output.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from rich.console import Console

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.base import ArBase, open_ar_base
from d2f_export.distill.from_ar.generation import Generation
from d2f_export.distill.from_ar.rollout import roll_out
from d2f_export.distill.from_ar.self_written import STARTERS, ChatFrame, Overlap, SelfWritten
from d2f_export.distill.from_ar.settings import WritingSettings
from d2f_export.distill.from_ar.streams import named_weights, streams_of
from d2f_runtime.backends.torch_backend import load
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_stream.core.errors import InvalidRequest

__all__ = ["write_data"]

SUFFIX = ".npz"


def write_data(
    settings: WritingSettings,
    output: Path,
    *,
    cpu: bool = False,
    console: Console | None = None,
) -> Answers:
    """Let a model write prompts and answers, and store them. Blocks.

    Args:
        settings: of the writing.
        output: the file, which must not exist.
        cpu: leave the GPUs alone.
        console: where counts are shown; None is silent.

    Raises:
        InvalidRequest: a file does not fit, or nothing usable was written.
        ModelError: the model cannot be used.
        NoChatTemplate: it has no chat template.
    """
    if output.suffix != SUFFIX:
        raise InvalidRequest(f"the output is {output}, but its name must end with {SUFFIX}")
    if output.exists():
        raise InvalidRequest(f"{output} exists; choose another name, or remove it")
    base = open_ar_base(settings.model, family=settings.family)
    if settings.length > base.config.max_len:
        raise InvalidRequest(
            f"length is {settings.length} but {base.name} holds {base.config.max_len} tokens; "
            "lower it"
        )
    make = _wrote if settings.draft is None else _decoded_again
    answers, counts = make(settings, base, cpu=cpu)
    if console is not None:
        console.print(
            f"{output}: {len(answers)} answers, {answers.num_answer_tokens} tokens ({counts})",
            highlight=False,
        )
    if not len(answers):
        raise InvalidRequest(
            f"{base.name} wrote nothing that could be used ({counts}); give it more time, or "
            "questions"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    answers.write(output)
    return answers


def _wrote(settings: WritingSettings, base: ArBase, *, cpu: bool) -> tuple[Answers, str]:
    """Return what the model makes up, and counts of it as words."""
    written = _source(settings, base)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = named_weights(
        load_checkpoint(base.path, family=base.family, device="cpu", dtype=torch.float32)
    )
    weights = {name: value.to(device, dtype) for name, value in weights.items()}
    generation = Generation(
        streams_of(base.config, weights, compiled=False),
        slots=settings.slots,
        length=settings.length,
        end_ids=base.config.eos_ids,
        seed=settings.seed,
    )
    generation.run(
        lambda: written.next_job() if len(written.examples) < settings.answers else None,
        written.take,
        seconds=settings.max_seconds or float("inf"),
    )
    counts = ", ".join(f"{name} {count}" for name, count in sorted(written.counts.items()))
    return Answers.of(written.examples), counts


def _decoded_again(settings: WritingSettings, base: ArBase, *, cpu: bool) -> tuple[Answers, str]:
    """Return the answers that the model gives with its draft, and counts of them as words."""
    assert settings.draft is not None
    written = Answers.joined([Answers.read(Path(path)) for path in settings.written])
    most = int(written.prompts.max()) + settings.answer_length + settings.block_size
    backend = load(
        base.path,
        device="cpu" if cpu else "auto",
        adapter=Path(settings.draft),
        family=base.family,
        kv_tokens=2 * settings.slots * most,  # each takes its places in one piece
    )
    backend.warm_up()
    answers = roll_out(
        backend,
        written,
        block_size=settings.block_size,
        answer_length=settings.answer_length,
        rows=settings.slots,
        limit=settings.answers,
        seconds=settings.max_seconds or float("inf"),
    )
    return answers, f"{int(answers.begins.sum())} windows"


def _source(settings: WritingSettings, base: ArBase) -> SelfWritten:
    codec = base.codec

    def render(messages: list[dict[str, str]]) -> str:
        return codec.render(messages)

    return SelfWritten(
        ChatFrame.of(render, codec.encode, codec.special_tokens.values(), base.end_id),
        codec.encode,
        codec.decode,
        questions=_texts(settings.questions, settings.prompt_field),
        starters=_starters(settings),
        overlap=Overlap(_texts(settings.evaluation, None)),
        answer_limit=settings.answer_length,
        length=settings.length,
        seed=settings.seed,
    )


def _starters(settings: WritingSettings) -> Sequence[str]:
    """Return the settings' first words of requests, else common ones.

    Raises:
        InvalidRequest: see `_texts`; or the files hold none.
    """
    if not settings.starters:
        return STARTERS
    found = [text for text in _texts(settings.starters, settings.prompt_field) if text.strip()]
    if not found:
        names = ", ".join(settings.starters)
        raise InvalidRequest(f"{names} holds no starters; give it some, or leave it out")
    return found


def _texts(paths: Sequence[str], field: str | None) -> list[str]:
    """Return a field of every line; None is all of its texts, each by itself.

    Raises:
        InvalidRequest: a file cannot be read, or a line lacks the field.
    """
    found: list[str] = []
    for path in paths:
        try:
            lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = msgspec.json.decode(line, type=dict[str, object])
            except msgspec.DecodeError as error:
                raise InvalidRequest(f"{path}:{number} is no JSON object: {error}") from error
            wanted = values.values() if field is None else [values.get(field)]
            texts = [value for value in wanted if isinstance(value, str)]
            if not texts:
                raise InvalidRequest(f"{path}:{number} has no text {field or ''!r}; see --help")
            found += texts
    return found
