"""A whole verification of an artefact: figures, the target's bound, and whether it holds."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from d2f_export.onnx.verify import compare_backends, compare_logits
from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.evaluation.answers import decode_all
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.manifest import Manifest, read_manifest, verify_files
from d2f_runtime.models.transformer import Transformer
from d2f_runtime.text.tokenizer import TextCodec
from d2f_stream.core.errors import EngineFailed, InvalidRequest, PromptTooLong
from d2f_stream.core.params import GenerationParams

__all__ = [
    "EXACT",
    "MAX_LOSS",
    "Question",
    "Verification",
    "first_block",
    "read_questions",
    "verify_artefact",
]

EXACT: Final = 2e-5  # largest error of an fp32 logit, by the largest of its row
MAX_LOSS: Final = 0.01  # of accuracy, for other weights
NUM_LOGITS: Final = 8  # prompts whose logits are compared: each step is a forward of the canvas
START_TIMEOUT_S: Final = 600.0

FIRST_BLOCK: Final = """
import asyncio, json, sys
import d2f_stream

async def main():
    async with d2f_stream.load(sys.argv[1], backend="auto", device=sys.argv[2]) as engine:
        print("loaded", flush=True)
        async for block in engine.generate(json.loads(sys.argv[3])):
            print("block", flush=True)
            return
        print("block", flush=True)

asyncio.run(main())
"""


@dataclass(frozen=True, slots=True)
class Question:
    """Something to decode.

    Attributes:
        prompt: token ids.
        ending: an answer that ends so is right; None is not scored.
    """

    prompt: Sequence[int]
    ending: str | None = None


@dataclass(slots=True)
class Verification:
    """What was found.

    Attributes:
        artefact: name, target, quantization and files with their sizes.
        startup_s: from a new process to the loaded model and to the first block.
        logits: see LogitsComparison; empty without a checkpoint, as for the next two.
        decoding: see Comparison.
        accuracy: share of right answers of checkpoint and artefact, and their number.
        bounds: sentences on what must hold, and whether it does.
    """

    artefact: dict[str, Any]
    startup_s: dict[str, float]
    logits: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, bool] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all bounds hold."""
        return all(self.bounds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and whether it passed, as JSON-ready values."""
        return {"passed": self.passed, **asdict(self)}


def verify_artefact(
    folder: Path,
    questions: Sequence[Question],
    codec: TextCodec,
    *,
    checkpoint: Path | None,
    adapter: Path | None = None,
    family: str | None = None,
    device: str = "cpu",
    num_compared: int = 80,
) -> Verification:
    """Check an artefact's files and compare it with its checkpoint.

    Args:
        folder: of the artefact.
        questions: all are scored where they have an ending.
        codec: of the artefact.
        checkpoint: that the artefact was made of; None compares nothing.
        adapter: that was merged in.
        family: of the checkpoint, where its files do not tell.
        device: of the artefact; the checkpoint runs on the CPU in fp32.
        num_compared: so many questions are decoded step by step with both.

    Raises:
        ModelError: the artefact or the checkpoint cannot be loaded, or a file has changed.
        PromptTooLong: a question and its answer are more than the artefact holds.
        EngineFailed: a new process could not answer with it.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    candidate = load(folder, device=device)
    try:
        num_new = manifest.params_for(candidate.info.device).max_new_tokens
        longest = max(len(question.prompt) for question in questions)
        if longest + num_new > candidate.info.max_len:
            raise PromptTooLong(longest, num_new, candidate.info.max_len)
        startup = first_block(folder, device, questions[0].prompt)
        found = Verification(_artefact(manifest), startup)
        if checkpoint is not None:
            import torch

            model = load_checkpoint(checkpoint, adapter=adapter, family=family, dtype=torch.float32)
            _compare(found, candidate, manifest, questions, codec, model, num_compared)
    finally:
        candidate.close()
    return found


def read_questions(path: Path, codec: TextCodec, number: int) -> list[Question]:
    """Read JSON lines with `prompt` or `messages`, and `ending` where answers are scored.

    Raises:
        InvalidRequest: a line is no such object, or there is none; with its number.
    """
    questions: list[Question] = []
    with path.open(encoding="utf-8-sig") as file:
        for at, line in enumerate(file, 1):
            if len(questions) == number:
                break
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text = entry["prompt"] if "prompt" in entry else codec.render(entry["messages"])
                ids = codec.encode(text)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InvalidRequest(
                    f"{path}, line {at}: each line must be an object with prompt or messages "
                    f"({type(error).__name__}: {error})"
                ) from error
            questions.append(Question(ids, entry.get("ending")))
    if not questions:
        raise InvalidRequest(f"{path} has no questions")
    return questions


def _artefact(manifest: Manifest) -> dict[str, Any]:
    assert manifest.onnx is not None
    sizes = {name: file.bytes for name, file in manifest.files.items()}
    return {
        "name": manifest.name,
        "target": manifest.onnx.target,
        "quantization": manifest.onnx.quantization,
        "bytes": sum(sizes.values()),
        "files": sizes,
    }


def first_block(folder: Path, device: str, prompt: Sequence[int]) -> dict[str, float]:
    """Time a new process to the loaded model and to its first block.

    Raises:
        EngineFailed: it ends without a block, or does not end.
    """
    command = [sys.executable, "-c", FIRST_BLOCK, str(folder), device, json.dumps(list(prompt))]
    began = time.perf_counter()
    times: dict[str, float] = {}
    with (
        tempfile.TemporaryFile("w+") as told,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True) as process,
    ):
        assert process.stdout is not None
        guard = threading.Timer(START_TIMEOUT_S, process.kill)
        guard.start()
        try:
            for line in process.stdout:
                times[line.strip()] = round(time.perf_counter() - began, 3)
            code = process.wait()
        finally:
            guard.cancel()
        if code or "block" not in times:
            told.seek(0)
            reason = told.read().strip().rpartition("\n")[2] or f"it ended with {code}"
            raise EngineFailed(f"a new process could not answer with {folder}: {reason}")
    return times


def _compare(
    found: Verification,
    candidate: OnnxBackend,
    manifest: Manifest,
    questions: Sequence[Question],
    codec: TextCodec,
    model: Transformer,
    num_compared: int,
) -> None:
    params = manifest.params_for(candidate.info.device)
    params = params.with_overrides({"temperature": 0.0})
    prompts = [question.prompt for question in questions]
    is_exact = found.artefact["quantization"] == "fp32"
    exact = EXACT if is_exact else float("inf")
    logits = compare_logits(model, candidate, prompts[:NUM_LOGITS], params, exact=exact)
    found.logits = asdict(logits)
    reference = TorchBackend(model, name="checkpoint", device="cpu", runner="plain")
    decoding = compare_backends(reference, candidate, prompts[:num_compared], params)
    found.decoding = asdict(decoding)
    scored = [question for question in questions if question.ending is not None]
    if scored:
        found.accuracy = {
            "checkpoint": _accuracy(reference, scored, codec, params),
            "artefact": _accuracy(candidate, scored, codec, params),
            "questions": len(scored),
        }
    reference.close()
    if is_exact:
        found.bounds = {
            f"logits within {EXACT:g} of their size": logits.max_relative <= EXACT,
            "identical tokens": decoding.token_agreement == decoding.same_answers == 1.0,
        }
    elif scored:
        loss = found.accuracy["checkpoint"] - found.accuracy["artefact"]
        found.bounds = {f"accuracy within {MAX_LOSS:.0%} of fp32": loss <= MAX_LOSS + 1e-9}


def _accuracy(
    backend: OnnxBackend | TorchBackend,
    questions: Sequence[Question],
    codec: TextCodec,
    params: GenerationParams,
) -> float:
    answers = decode_all(backend, [question.prompt for question in questions], params, rows=64)
    right = [
        codec.decode(answer.tokens).strip().endswith(question.ending or "")
        for answer, question in zip(answers, questions, strict=True)
    ]
    return round(sum(right) / len(right), 4)
