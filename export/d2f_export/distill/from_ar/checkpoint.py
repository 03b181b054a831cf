"""A checkpoint of a training: adapter, optimiser, and the place in the data, in one file.

The random numbers of a step are a function of the seed and the step's number, so the place is all
of them that has to be kept.
"""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from d2f_export.distill.from_ar.training import Training
from d2f_export.distill.whole_files import replacing
from d2f_stream.core.errors import D2FError, ModelDamaged

__all__ = ["Progress", "read_checkpoint", "write_checkpoint"]

FILE: Final = "checkpoint.pt"


@dataclass(slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: batches taken, the place in the data.
        skipped: updates that were left out because a gradient was not finite.
        tokens: noisy answer tokens, over all processes.
        seconds: spent.
    """

    step: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0


def write_checkpoint(folder: Path, training: Training, progress: Progress) -> None:
    """Write the file beside the last one, which goes when this is whole.

    Raises:
        D2FError: it cannot be written; the one before it is still there.
    """
    moments = training.optimizer.state_dict()["state"].get(0, {})
    content = {
        "progress": asdict(progress),
        "adapter": training.flat.master.detach().cpu(),
        "optimizer": {name: value.cpu() for name, value in moments.items()},
    }
    try:
        with replacing(folder / FILE) as partial:
            torch.save(content, partial)
    except (OSError, RuntimeError) as error:  # torch's own, where the disk is full
        partial.unlink(missing_ok=True)
        raise D2FError(
            f"the checkpoint {folder / FILE} could not be written: {error}; free some space and "
            "start the same command again, it goes on from the checkpoint before"
        ) from error


def read_checkpoint(folder: Path, training: Training) -> Progress:
    """Put the folder's checkpoint into a training; a folder without one begins.

    Raises:
        ModelDamaged: it cannot be read, or is another training's.
    """
    path = folder / FILE
    if not path.exists():
        return Progress()
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            training.flat.master.copy_(content["adapter"])
        training.flat.refresh()
        if moments := content["optimizer"]:
            groups = training.optimizer.state_dict()["param_groups"]
            training.optimizer.load_state_dict({"state": {0: moments}, "param_groups": groups})
        return Progress(**content["progress"])
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ModelDamaged(
            f"the checkpoint {path} cannot be read: {error}; remove it to begin anew"
        ) from error
