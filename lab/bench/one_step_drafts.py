"""How good a draft is on answers that it has not learnt from, without decoding them.

The one-step length is the cheapest figure of speed: how many tokens are the base's own, up to the
first that is not, of those that a step with a block of masks brings. The first is always right, it
comes from a causal row; each mask brings one more.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.feed import Feed, Stage
from d2f_export.distill.from_ar.noise import Noise
from d2f_export.distill.from_ar.training import Training

__all__ = ["OneStep", "one_step"]


@dataclass(frozen=True, slots=True)
class OneStep:
    """The figure for one block size.

    Attributes:
        block_size: masks.
        length: mean tokens accepted, the first one included.
        right: share of right tokens that each mask brings.
        num_blocks: that were looked at.
    """

    block_size: int
    length: float
    right: tuple[float, ...]
    num_blocks: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


@torch.no_grad()
def one_step(training: Training, answers: Answers, block_size: int, num_batches: int) -> OneStep:
    """Draft blocks of answers in one step each, and compare with what the base would say."""
    settings = training.settings
    feed = Feed(
        answers,
        rows=settings.rows,
        clean_length=settings.clean_length,
        noisy_length=settings.noisy_length,
        mask_id=training.mask_id,
        seed=12345,
        stages=[(0, Stage((block_size,), (1.0,)))],
        noise=Noise(),
    )
    lengths: list[int] = []
    rights = np.zeros((block_size, 2))
    for number in range(num_batches):
        batch = training.on_device(feed[number])
        states, goal = training.states(batch)
        drafted = _best(states.flatten(0, 1)[batch["student_row"]], training.base.head)
        wanted = _best(goal.flatten(0, 1)[batch["teacher_row"]], training.base.head)
        right = np.zeros(settings.rows * settings.noisy_length, np.int8)
        right[batch["student_row"].cpu().numpy()] = (drafted == wanted).cpu().numpy() + 1
        window = batch["window"].cpu().numpy()
        for row, places in zip(right.reshape(window.shape), window, strict=True):
            edges = np.flatnonzero(np.diff(places)) + 1
            for part in np.split(row, edges)[1:-1]:
                if len(part) != block_size or not part.all():  # the answer ends there
                    continue
                good = part == 2
                rights[:, 0] += good
                rights[:, 1] += 1
                lengths.append(1 + int(good.cumprod().sum()))
    shares = tuple(round(float(share), 4) for share in rights[:, 0] / rights[:, 1].clip(min=1))
    mean = float(np.mean(lengths)) if lengths else 0.0
    return OneStep(block_size, round(mean, 4), shares, len(lengths))


def _best(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    parts = [(states[i : i + 4096] @ head.T).argmax(dim=-1) for i in range(0, len(states), 4096)]
    return torch.cat(parts)
