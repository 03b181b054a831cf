"""Scores: one record for each system, on the same held-out texts, in several processes.

A process runs one system's continuations with all texts side by side; what a step costs is mostly
the decoders' Python, so that several processes share one GPU well.
"""

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from d2f_export.corpus import EOS_ID
from d2f_export.open_text.continuations import continue_all
from d2f_export.open_text.measures import likelihood, repetition
from d2f_export.open_text.pieces import NUM_TOKENS, Pieces
from d2f_export.open_text.systems import System
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer

__all__ = [
    "HELD_OUT_FILE",
    "TRAIN_FILE",
    "Job",
    "Record",
    "Texts",
    "missing",
    "opened",
    "read_records",
    "score",
    "score_all",
    "texts_of",
]

TRAIN_FILE: Final = "corpus/train.npz"
HELD_OUT_FILE: Final = "corpus/held_out.npz"

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts and their own continuations, `num_new` tokens each."""

    prompts: list[list[int]]
    continuations: list[list[int]]


@dataclass(frozen=True, slots=True)
class Job:
    """One system on the texts of a run's folder."""

    folder: Path
    system: System
    num_texts: int
    num_new: int
    device: str


def texts_of(pieces: Pieces, number: int, num_new: int) -> Texts:
    """Choose texts whose prompt lies in one document, spread over the pieces.

    Raises:
        ValueError: there is none.
    """
    at = np.arange(NUM_TOKENS)[None]
    broken = ((pieces.tokens == EOS_ID) & (at < pieces.prompt_lens[:, None])).any(axis=1)
    whole = np.flatnonzero(~broken)
    if not len(whole):
        raise ValueError(f"none of {len(pieces)} held-out pieces has a prompt; read more folders")
    chosen = whole[np.linspace(0, len(whole) - 1, min(number, len(whole)), dtype=int)]
    prompts: list[list[int]] = []
    continuations: list[list[int]] = []
    for index in chosen:
        start = int(pieces.prompt_lens[index])
        row = pieces.tokens[index].tolist()
        prompts.append(row[:start])
        continuations.append(row[start : start + num_new])
    return Texts(prompts, continuations)


def score_all(jobs: Sequence[Job], *, num_workers: int, deadline: float) -> Iterator[Record]:
    """Yield the jobs' records as they come; none is begun after the deadline (monotonic)."""
    if num_workers == 0:
        for job in itertools.takewhile(lambda _: time.monotonic() < deadline, jobs):
            yield score(job)
        return
    waiting = list(jobs)[::-1]
    running: set[Future[Record]] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < num_workers and time.monotonic() < deadline:
                running.add(pool.submit(score, waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def score(job: Job) -> Record:
    """Continue the texts by the job's system and measure what came out."""
    is_training = job.system.name == "training"
    pieces = Pieces.read(job.folder / (TRAIN_FILE if is_training else HELD_OUT_FILE))
    texts = texts_of(pieces, job.num_texts, job.num_new)
    began = time.perf_counter()
    written, num_steps = texts.continuations, None
    if job.system.stage is not None:
        backend = opened(job.folder / job.system.stage, job.device)
        answers = continue_all(backend, texts.prompts, job.system.params)
        written = [list(answer.tokens) for answer in answers]
        num_steps = sum(answer.num_steps for answer in answers)
    seconds = time.perf_counter() - began
    likely = likelihood(_judge(job.folder / "twin", job.device), texts.prompts, written)
    repeats = repetition(written)
    num_tokens = sum(map(len, written))
    return {
        "system": job.system.name,
        "setting": job.system.setting,
        "num_texts": len(written),
        "num_new": job.num_new,
        "documents_ended": round(sum(text.count(EOS_ID) for text in written) / len(written), 3),
        "tokens_per_step": None if num_steps is None else round(num_tokens / num_steps, 3),
        "bits_per_token": round(likely.bits, 4),
        "bits_error": round(likely.error, 4),
        "perplexity": round(likely.perplexity, 3),
        **{name: round(value, 4) for name, value in asdict(repeats).items()},
        "seconds": round(seconds, 1),
    }


def _key_of(record: Record) -> str:
    """Return what two records of one system and setting share."""
    return json.dumps([record["system"], record["setting"]], sort_keys=True)


def read_records(path: Path) -> list[Record]:
    """Read a records file; a last line that was not written whole is cut off it."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with path.open("r+b") as file:
            file.truncate(len(whole.encode()))
    return [json.loads(line) for line in whole.splitlines()]


def missing(jobs: Iterable[Job], records: Sequence[Record]) -> list[Job]:
    """Return the jobs that have no record yet."""
    known = set(map(_key_of, records))
    return [
        job
        for job in jobs
        if _key_of({"system": job.system.name, "setting": job.system.setting}) not in known
    ]


@lru_cache(maxsize=4)
def opened(folder: Path, device: str) -> TorchBackend:
    """Load a checkpoint for decoding, once a process."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load_checkpoint(folder)
    # the plain step: with hundreds of rows a step is far beyond what the fast one captures
    return TorchBackend(model, name=folder.name, device=device, dtype=dtype, runner="plain")


@lru_cache(maxsize=1)
def _judge(folder: Path, device: str) -> Transformer:
    return load_checkpoint(folder).to(device).eval()
