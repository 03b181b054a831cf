"""The examples of a training: JSONL files through the base's tokenizer, or what distill-data wrote.

Token ids that are too large, and examples that do not fit into a row, are found before it begins.
"""

from pathlib import Path

from d2f_export.distill.examples import ExampleFiles
from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.base import ArBase
from d2f_export.distill.from_ar.settings import DraftSettings
from d2f_stream.core.errors import InvalidRequest

__all__ = ["read_examples"]

WRITTEN = ".npz"  # what distill-data writes


def read_examples(settings: DraftSettings, base: ArBase) -> tuple[Answers, int]:
    """Return the examples that fit into a row, and how many do not.

    Raises:
        InvalidRequest: a file cannot be read, a line is no example, an id is not the base's, or
            nothing is left.
    """
    parts = [Answers.read(Path(path)) for path in settings.data if Path(path).suffix == WRITTEN]
    texts = [path for path in settings.data if Path(path).suffix != WRITTEN]
    if texts:
        parts.append(_tokenised(texts, settings, base))
    answers = Answers.joined(parts)
    highest = int(answers.tokens.max(initial=0))
    if highest >= base.config.vocab_size:
        raise InvalidRequest(
            f"the data holds the token {highest}, but {base.name} has {base.config.vocab_size}; "
            "was it written by another model?"
        )
    fitting = (answers.lengths <= settings.clean_length).nonzero()[0]
    if not len(fitting):
        raise InvalidRequest(
            f"none of the {len(answers)} examples fits into clean_length, "
            f"{settings.clean_length} tokens; the shortest has {answers.lengths.min(initial=0)}"
        )
    return answers.select(fitting), len(answers) - len(fitting)


def _tokenised(paths: list[str], settings: DraftSettings, base: ArBase) -> Answers:
    files = ExampleFiles(
        paths, prompt_field=settings.prompt_field, answer_field=settings.answer_field
    )
    files.check()
    end = base.end_id
    examples = []
    for example in files:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        prompt = base.codec.encode(base.codec.render(turns))
        examples.append((prompt, [*base.codec.encode(example.answer), end]))
    return Answers.of(examples)
