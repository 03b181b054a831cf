"""Samples: what the pair writes after three openings of our own, for people to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from d2f_export.open_text.continuations import continue_all
from d2f_export.open_text.scores import opened
from d2f_export.open_text.systems import System
from d2f_export.tokenizer_training import END_OF_TEXT
from d2f_stream.params import GenerationParams

__all__ = ["write_samples"]

OPENINGS: Final = (
    "Return a new table with the rows of this one in the given order. The order is a list of "
    "column names, each of which may begin with a minus sign to reverse it.",
    "This module reads messages from a queue and writes them to a file. Messages may arrive out of "
    "order, so that each of them carries a number.",
    "Compute the distance between every pair of points. The result is a square matrix whose "
    "diagonal is zero. If the number of points is large,",
)


def write_samples(folder: Path, output: Path, *, num_new: int, device: str) -> None:
    """Continue the openings by the twin and, over thresholds, by the student."""
    tokenizer = Tokenizer.from_file(str(folder / "corpus" / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in OPENINGS]
    written: dict[str, list[str]] = {}
    for label, system in _systems(num_new).items():
        assert system.stage is not None
        answers = continue_all(opened(folder / system.stage, device), prompts, system.params)
        written[label] = [
            f"[{label}, {answer.num_useful} tokens in {answer.num_steps} steps]"
            f"{_text(tokenizer, answer.tokens)}"
            for answer in answers
        ]
    parts = [
        "\n\n".join([opening, *(texts[index] for texts in written.values())])
        for index, opening in enumerate(OPENINGS)
    ]
    line = "\n\n" + "=" * 100 + "\n\n"
    output.write_text(line.join(parts) + "\n", encoding="utf-8")


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text, with a mark where another document begins."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
    return text.replace(END_OF_TEXT, " [end]\n")


def _systems(num_new: int) -> dict[str, System]:
    def params(**values: float) -> GenerationParams:
        return GenerationParams(max_new_tokens=num_new).with_overrides(values)  # type: ignore[arg-type]

    ar = {"block_size": 1, "max_active_blocks": 1}
    return {
        "autoregressive, greedy": System("ar", "twin", params(**ar)),
        "autoregressive, temperature 1": System("ar", "twin", params(**ar, temperature=1.0)),
        **{
            f"D2F, confidence above {threshold:g}": System(
                "d2f", "student", params(block_size=16, confidence_threshold=threshold)
            )
            for threshold in (0.9, 0.5)
        },
        "D2F, confidence above 0.9, temperature 1": System(
            "d2f", "student", params(block_size=16, confidence_threshold=0.9, temperature=1.0)
        ),
    }
