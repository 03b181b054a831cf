"""The three trainings of the embedded model: autoregressive twin, teacher, student.

Each is an objective of the one training loop (d2f_export.distill) on generated problems. The
teacher starts from the twin, whose shifted logits it keeps (as Dream does); the student starts from
the teacher, which it is distilled from (asymmetric distillation, arXiv 2508.09192, section 3).
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from d2f_export.distill.distillation import Distillation
from d2f_export.distill.distiller import Distiller, Objective
from d2f_export.distill.loop import train
from d2f_export.distill.run_folder import RunFolder, RunState, write_model
from d2f_export.distill.sequences import Counts
from d2f_export.distill.trainer import open_accelerator
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.transformer import Transformer
from d2f_stream.core.errors import InvalidRequest
from lab.embedded_model.corpus import Corpus
from lab.embedded_model.recipe import RECIPES, STAGES, StageSettings

__all__ = ["train_stage"]


def train_stage(
    settings: StageSettings,
    output: Path,
    *,
    objective: Objective | None = None,
    num_workers: int = 0,
    cpu: bool = False,
    compile_layers: bool = False,
    console: Console | None = None,
) -> Path:
    """Run one of the trainings, or go on with it where the folder holds a part of it. Blocks.

    Args:
        settings: of the training.
        output: the run's folder; at the end also the model's.
        objective: instead of the recipe's.
        num_workers: processes that write problems.
        cpu: leave the GPUs alone.
        compile_layers: compile them, which pays on a GPU.
        console: where progress is shown; None is silent.

    Returns:
        The model's folder.

    Raises:
        InvalidRequest: a student without a teacher; or see train, as for other errors.
    """
    recipe = RECIPES[settings.recipe]
    config = recipe.twin_config if settings.stage == "twin" else recipe.config
    is_student = settings.stage == "student"
    teacher_folder = (settings.teacher or settings.start) if is_student else None
    if is_student and teacher_folder is None:
        raise InvalidRequest("the student needs a teacher; give --start or --teacher")
    accelerator = open_accelerator(settings, cpu=cpu)

    def open_distiller() -> Distiller:
        model = Transformer(config).to(accelerator.device)
        if settings.start is None:
            model.init_weights(settings.seed)
        else:
            model.load_state_dict(load_checkpoint(Path(settings.start)).state_dict())
        teacher = None
        if teacher_folder is not None:
            teacher = load_checkpoint(Path(teacher_folder), device=accelerator.device)
            teacher.requires_grad_(False)
        if compile_layers:
            for layer in (*model.layers, *(teacher.layers if teacher is not None else ())):
                layer.compile(dynamic=True)
        return Distiller(
            model,
            teacher,
            objective or recipe.objective(settings.stage),
            attention="dense",  # batches have several lengths, and fused kernels compile for each
            checkpointing=False,
            logit_rows=settings.tokens_per_batch,
        )

    def open_corpus(state: RunState) -> Corpus:
        return Corpus(
            Path(settings.tokenizer),
            settings.seed * 10 + STAGES.index(settings.stage),
            tokens_per_batch=settings.tokens_per_batch,
            num_workers=num_workers,
            position=state.position,
            counts=Counts(state.used),
        )

    return train(
        RunFolder(output, settings),
        lambda: Distillation(
            settings,
            open_distiller(),
            accelerator=accelerator,
            open_feed=open_corpus,
            write=partial(write_model, config=config),
        ),
        accelerator=accelerator,
        console=console,
    )
