"""The experiment: corpus, twin, teacher, student, evaluation, figure, inside a given time.

A run lives in a folder. What is there is not made again, so a run that was stopped goes on; a
training goes on from its last saved state. Each phase gets its share of the time that is left.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, cast

import torch
from tokenizers import Tokenizer

from d2f_export.embedded import STAGES, Stage, prepare
from d2f_export.open_text.documents import Gathered, gather
from d2f_export.open_text.figure import plot_open_text
from d2f_export.open_text.pieces import Pieces, cut, without_copies
from d2f_export.open_text.recipe import OPEN_TEXT, HiddenInputs
from d2f_export.open_text.samples import write_samples
from d2f_export.open_text.scores import (
    HELD_OUT_FILE,
    TRAIN_FILE,
    Job,
    missing,
    read_records,
    score_all,
)
from d2f_export.open_text.sources import installed_roots
from d2f_export.open_text.systems import REFERENCES, systems
from d2f_export.open_text.text_corpus import TextCorpus
from d2f_export.open_text.vocabulary import train_vocabulary
from d2f_export.training import train

__all__ = ["Experiment"]

FINISHED: Final = "finished"  # an empty file beside a training's weights once they are whole
PHASES: Final = ("corpus", *STAGES, "evaluation")
CLOSING_S: Final = 20.0  # the last scores, the samples, the figure


@dataclass(frozen=True, slots=True)
class Experiment:
    """A run.

    Attributes:
        folder: of the run.
        seconds: for everything from now on.
        recipe: a key of OPEN_TEXT.
        roots: folders to read; empty takes the standard library and all installed packages.
        device: "cpu", "cuda", ...
        compile_layers: in the trainings; takes some 25 s of each, which pays beyond a minute.
        num_readers: processes that read the documentation; 0 reads in this one.
        num_scorers: processes of the evaluation; 0 scores in this one.
        seed: of weights, noise and order.
        say: is told what happens.
    """

    folder: Path
    seconds: float
    recipe: str = "pair"
    roots: Sequence[Path] = ()
    device: str = "cpu"
    compile_layers: bool = False
    num_readers: int = 0
    num_scorers: int = 0
    seed: int = 1
    say: Callable[[str], object] = lambda _: None
    _began: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Do what is missing in the folder.

        Raises:
            ValueError: the folder holds a run of another recipe, or the roots hold too little.
        """
        self._claim_folder()
        for phase in PHASES:
            began, end = time.monotonic(), self._end_of(phase)
            self.say(f"{phase}: until {end - self._began:.0f} s of {self.seconds:.0f}")
            match phase:
                case "corpus":
                    self._make_corpus()
                case "evaluation":
                    self._evaluate(end)
                case stage:
                    self._train(cast(Stage, stage), end)
            self.say(f"{phase}: {time.monotonic() - began:.1f} s")

    def _claim_folder(self) -> None:
        """Write down what the run is, or compare."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        mine = {"recipe": self.recipe, "seed": self.seed}
        if not path.exists():
            path.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        elif (found := json.loads(path.read_text(encoding="utf-8"))) != mine:
            raise ValueError(f"{self.folder} holds a run of {found}, not {mine}; name another")

    def _end_of(self, phase: str) -> float:
        """Return when (monotonic) a phase that begins now should end."""
        shares = OPEN_TEXT[self.recipe].shares
        coming = sum(shares[later] for later in PHASES[PHASES.index(phase) :])
        now = time.monotonic()
        left = max(0.0, self._began + self.seconds - CLOSING_S - now)
        return now + left * shares[phase] / coming

    def _make_corpus(self) -> None:
        folder = self.folder / "corpus"
        if folder.exists():
            return
        partial = self.folder / "corpus.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        gathered = gather(self.roots or installed_roots(), num_workers=self.num_readers)
        self.say(
            f"read {gathered.num_files} files, kept {gathered.num_kept / 1e6:.1f} M characters"
        )
        texts = ("\n\n".join(document) for document in gathered.train)
        tokenizer = train_vocabulary(texts, size=OPEN_TEXT[self.recipe].vocab_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        figures = _cut_both(gathered, tokenizer, partial)
        self.say(json.dumps(figures))
        (partial / "corpus.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)

    def _train(self, stage: Stage, end: float) -> None:
        folder = self.folder / stage
        if (folder / FINISHED).exists():
            return
        recipe = OPEN_TEXT[self.recipe]
        settings = getattr(recipe.training, stage)
        before = STAGES[STAGES.index(stage) - 1] if stage != "twin" else None
        model, objective = prepare(
            stage,
            recipe.training,
            start=self.folder / before if before else None,
            seed=self.seed,
            device=self.device,
        )
        corpus = TextCorpus(Pieces.read(self.folder / TRAIN_FILE), self.seed)
        if stage == "twin":
            objective = HiddenInputs()
            num_batches = corpus.num_batches(settings.tokens_per_batch)
            settings = replace(
                settings, steps=min(settings.steps, recipe.twin_epochs * num_batches)
            )
        train(
            model,
            objective,
            corpus,
            folder,
            replace(settings, max_seconds=max(1.0, end - time.monotonic()), seed=self.seed),
            device=self.device,
            compile_layers=self.compile_layers,
        )
        (folder / FINISHED).touch()
        del model, objective
        torch.compiler.reset()  # or the next training would exceed dynamo's number of variants
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _evaluate(self, end: float) -> None:
        recipe = OPEN_TEXT[self.recipe]
        path = self.folder / "records.jsonl"
        jobs = [
            Job(self.folder, system, recipe.num_texts, recipe.num_new, self.device)
            for system in (*REFERENCES, *systems(recipe.num_new, recipe.thresholds))
        ]
        records = read_records(path)
        todo = missing(jobs, records)
        with path.open("a", encoding="utf-8") as file:
            for record in score_all(todo, num_workers=self.num_scorers, deadline=end):
                records.append(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                self.say(_line(record))
        left_out = missing(jobs, records)
        if left_out:
            self.say(f"time is up: {len(left_out)} systems have no record; run it again for them")
        write_samples(
            self.folder, self.folder / "samples.txt", num_new=recipe.num_new, device=self.device
        )
        plot_open_text(path, self.folder / "open-text.png")


def _cut_both(gathered: Gathered, tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Write the pieces of both parts; return the corpus's figures."""
    train_pieces = cut(gathered.train, tokenizer)
    held_out = cut(gathered.held_out, tokenizer)
    fresh = without_copies(held_out, train_pieces)
    train_pieces.save(folder / Path(TRAIN_FILE).name)
    fresh.save(folder / Path(HELD_OUT_FILE).name)
    return {
        "files": gathered.num_files,
        "prose_characters": gathered.num_characters,
        "kept_characters": gathered.num_kept,
        "train_documents": len(gathered.train),
        "train_pieces": len(train_pieces),
        "train_tokens": train_pieces.tokens.size,
        "held_out_pieces": len(fresh),
        "held_out_copies_left_out": len(held_out) - len(fresh),
    }


def _line(record: dict[str, object]) -> str:
    names = (
        "tokens_per_step",
        "perplexity",
        "repeated_4grams",
        "doubled",
        "seconds",
    )
    figures = " ".join(f"{name} {record[name]}" for name in names)
    return f"{record['system']} {json.dumps(record['setting'])}: {figures}"
