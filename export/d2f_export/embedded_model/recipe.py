"""The shapes and recipes of the embedded model, and a tiny one for tests.

The recipe: an autoregressive twin, a bidirectional teacher that starts from it (Dream's way), a D2F
student distilled from the teacher. Figures of the recipe are recorded in bench/embedded.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from d2f_export.embedded_model.corpus import EOS_ID, MASK_ID
from d2f_export.stages import (
    Distillation,
    NoiseSettings,
    Objective,
    StudentObjective,
    TeacherObjective,
    TwinObjective,
)
from d2f_export.training import TrainSettings
from d2f_runtime.models.checkpoints import load_checkpoint
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import Transformer

__all__ = ["RECIPES", "STAGES", "Recipe", "Stage", "prepare"]

Stage = Literal["twin", "teacher", "student"]
STAGES: tuple[Stage, ...] = ("twin", "teacher", "student")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the trainings of one model need.

    Attributes:
        config: of teacher and student; the twin differs by its attention and block size.
        twin: settings of the first training.
        teacher: settings of the second.
        student: settings of the third.
        study: of a student in the ablation studies, of which there are many.
        distillation: the student's noise and loss; the teacher meets the noise too.
    """

    config: TransformerConfig
    twin: TrainSettings
    teacher: TrainSettings
    student: TrainSettings
    study: TrainSettings
    distillation: Distillation

    @property
    def twin_config(self) -> TransformerConfig:
        """The autoregressive twin: the same sizes, causal, block size 1."""
        return replace(
            self.config,
            family="llama",
            prompt_attention="causal",
            native_block_size=1,
            max_block_size=1,
        )


_EMBEDDED = TransformerConfig(
    family="dream",
    vocab_size=1024,
    num_tokens=1024,
    hidden_size=384,
    num_layers=9,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=1152,
    mask_id=MASK_ID,
    eos_ids=(EOS_ID,),
    tie_embeddings=True,
    shift_logits=True,
    native_block_size=16,
    max_block_size=64,
    max_len=512,
)
_TINY = replace(
    _EMBEDDED, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=128
)
_DISTILLATION = Distillation(
    NoiseSettings(
        schedules=("ramp", "ramp", "monotone"),
        block_sizes=(16, 16, 32),
        low=0.1,
        high=1.0,
        stepped=0.5,
    ),
    forward_kl=0.7,
    data=0.3,
)
_TINY_STEPS = TrainSettings(steps=4, tokens_per_batch=2048, warmup=2, log_every=1)

RECIPES = {
    "embedded": Recipe(
        config=_EMBEDDED,
        twin=TrainSettings(steps=1_950, lr=2e-3),
        teacher=TrainSettings(steps=7_700, lr=1.5e-3),
        student=TrainSettings(steps=6_150, lr=1e-3),
        study=TrainSettings(steps=1_000, tokens_per_batch=49_152, lr=1e-3, warmup=50, log_every=20),
        distillation=_DISTILLATION,
    ),
    "tiny": Recipe(
        config=_TINY,
        twin=_TINY_STEPS,
        teacher=_TINY_STEPS,
        student=_TINY_STEPS,
        study=_TINY_STEPS,
        distillation=_DISTILLATION,
    ),
}


def prepare(
    stage: Stage,
    recipe: Recipe,
    *,
    start: Path | None = None,
    teacher: Path | None = None,
    distillation: Distillation | None = None,
    block_share: float = 0.5,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Transformer, Objective]:
    """Return the model to train and its loss.

    Args:
        stage: which training.
        recipe: sizes and settings.
        start: checkpoint to start from; None draws fresh weights by `seed`.
        teacher: checkpoint of the student's frozen teacher; None is `start`.
        distillation: the student's, instead of the recipe's.
        block_share: of the teacher's batches, see TeacherObjective.
        seed: of fresh weights.
        device: where the teacher runs.

    Raises:
        ValueError: a student without a teacher.
    """
    model = Transformer(recipe.twin_config if stage == "twin" else recipe.config)
    if start is None:
        model.init_weights(seed)
    else:
        model.load_state_dict(load_checkpoint(start).state_dict())
    match stage:
        case "twin":
            return model, TwinObjective()
        case "teacher":
            return model, TeacherObjective(recipe.distillation.noise, block_share)
        case "student":
            folder = teacher or start
            if folder is None:
                raise ValueError("the student needs a teacher; give --start or --teacher")
            frozen = load_checkpoint(folder).to(device).eval().requires_grad_(False)
            return model, StudentObjective(frozen, distillation or recipe.distillation)
