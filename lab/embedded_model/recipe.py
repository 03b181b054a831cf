"""The shapes and recipes of the embedded model, and a tiny one for tests.

The recipe: an autoregressive twin, a bidirectional teacher that starts from it (Dream's way), a D2F
student distilled from the teacher. Figures of the recipe are recorded in bench/embedded.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from d2f_export.distill.corruption import BlockNoise
from d2f_export.distill.distiller import LossWeights, Objective
from d2f_export.distill.settings import TrainSettings
from d2f_runtime.models.config import TransformerConfig
from lab.embedded_model.corpus import EOS_ID, MASK_ID
from lab.embedded_model.next_token import NextToken

__all__ = ["DISTILLATION", "RECIPES", "STAGES", "Recipe", "Stage", "StageSettings"]

Stage = Literal["twin", "teacher", "student"]
STAGES: tuple[Stage, ...] = ("twin", "teacher", "student")


class StageSettings(TrainSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one of the trainings goes, and from what. Validated on construction.

    Attributes:
        stage: which one.
        recipe: name of the model's sizes.
        tokens_per_batch: padding included.
        tokenizer: a tokenizer.json.
        start: checkpoint to start from; None draws fresh weights by the seed.
        teacher: checkpoint of the student's frozen teacher; None is `start`.
    """

    stage: Stage
    recipe: str = "embedded"
    tokens_per_batch: Annotated[int, Meta(ge=1)] = 98_304
    tokenizer: str = ""
    start: str | None = None
    teacher: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the trainings of one model need.

    Attributes:
        config: of teacher and student; the twin differs by its attention and block size.
        twin: settings of the first training.
        teacher: settings of the second.
        student: settings of the third.
        study: of a student in the ablation studies, of which there are many.
    """

    config: TransformerConfig
    twin: StageSettings
    teacher: StageSettings
    student: StageSettings
    study: StageSettings

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

    def objective(self, stage: Stage, *, uniform: float = 0.5) -> Objective:
        """Return what a stage learns.

        Args:
            stage: the twin predicts the next token. The teacher sees all and predicts masks, as
                LLaDA does and, in the other batches, by the student's noise, so that it is at home
                on what it will be asked. The student is distilled from it.
            uniform: share of the teacher's batches with LLaDA's noise.
        """
        data = LossWeights(forward_kl=0.0, cross_entropy=1.0)
        match stage:
            case "twin":
                return Objective(NextToken(), data, sees="before")
            case "teacher":
                noise = replace(NOISE, stepped=0.0, uniform=uniform)
                return Objective(noise, data, sees="all", mean_over="answer")
            case "student":
                return DISTILLATION


NOISE = BlockNoise(
    schedules=("ramp", "ramp", "monotone"),
    block_sizes=(16, 16, 32),
    low=0.1,
    high=1.0,
    stepped=0.5,
)
DISTILLATION = Objective(NOISE, LossWeights(forward_kl=0.7, cross_entropy=0.3), mean_over="answer")
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
_ANY = StageSettings(stage="twin", accumulation=1, warmup=100, decay=0.4, log_every=50, seed=1)
_TINY_STEPS = {
    "recipe": "tiny", "steps": 4, "lr": 1e-3, "tokens_per_batch": 2048, "warmup": 2, "log_every": 1,
}  # fmt: skip

RECIPES = {
    "embedded": Recipe(
        config=_EMBEDDED,
        twin=msgspec.structs.replace(_ANY, steps=1_950, lr=2e-3),
        teacher=msgspec.structs.replace(_ANY, stage="teacher", steps=7_700, lr=1.5e-3),
        student=msgspec.structs.replace(_ANY, stage="student", steps=6_150, lr=1e-3),
        study=msgspec.structs.replace(
            _ANY, stage="student", steps=1_000, tokens_per_batch=49_152, lr=1e-3, warmup=50,
            log_every=20,
        ),
    ),
    "tiny": Recipe(
        config=_TINY,
        twin=msgspec.structs.replace(_ANY, **_TINY_STEPS),
        teacher=msgspec.structs.replace(_ANY, stage="teacher", **_TINY_STEPS),
        student=msgspec.structs.replace(_ANY, stage="student", **_TINY_STEPS),
        study=msgspec.structs.replace(_ANY, stage="student", **_TINY_STEPS),
    ),
}  # fmt: skip
