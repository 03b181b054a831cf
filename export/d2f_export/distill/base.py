"""Base: the model that is distilled, without its weights: folder, config, tokenizer, ends.

Only models that see the whole canvas can be the teacher: the LLaDA and Dream families.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.hub import HubModel, fetch_description, fetch_weights, locate
from d2f_runtime.models.layouts import Layout
from d2f_runtime.models.published import find_published
from d2f_runtime.models.stored_weights import read_config
from d2f_runtime.text.tokenizer import Tokenizer, token_source
from d2f_stream.core.errors import UnsupportedModel

__all__ = ["Base", "open_base"]

TEACHERS: Final = ("llada", "dream")
END_OF_TURN: Final = {"llada": "<|eot_id|>"}  # what ends an answer where that is not the EOS


@dataclass(frozen=True, slots=True)
class Base:
    """What a training has to know of the model it starts from.

    Attributes:
        name: for people, and what an adapter names as its base.
        folder: of the checkpoint.
        family: that was said, where its files do not tell.
        config: of the model.
        layout: of the checkpoint's names; None is this project's own.
        codec: its tokenizer.
        end_id: ends an answer in the data.
        padding_id: EOS, which fills a sequence.
    """

    name: str
    folder: Path
    family: str | None
    config: TransformerConfig
    layout: Layout | None
    codec: Tokenizer
    end_id: int
    padding_id: int

    @property
    def overlong(self) -> Literal["drop", "cut"]:
        """What the released trainings do with examples that are too long."""
        return "drop" if self.config.family == "llada" else "cut"


def open_base(model: str, *, family: str | None = None) -> Base:
    """Find a model, fetching it where it is on the hub; weights are not read yet.

    Raises:
        ModelNotFound: there is no such model, or it lacks its tokenizer.
        ModelDamaged: one of its files cannot be read.
        UnsupportedModel: it is of a family that cannot be the teacher.
    """
    source = locate(model)
    folder = fetch_description(source) if isinstance(source, HubModel) else source
    config = read_config(folder, family=family)
    published = find_published(folder, family=family)
    if config.family not in TEACHERS or config.prompt_attention != "full":
        raise UnsupportedModel(
            f"{model} is a {config.family} model, but a teacher must see the whole canvas: "
            f"distillation starts from a model of the families {' and '.join(TEACHERS)}"
        )
    codec = Tokenizer.from_folder(folder, mask_id=config.mask_id)
    if isinstance(source, HubModel):
        fetch_weights(source, folder)
    end_id, padding_id = _ends(folder, config)
    return Base(
        name=str(source) if isinstance(source, HubModel) else model,
        folder=folder,
        family=family,
        config=config,
        layout=None if published is None else published.family.layout,
        codec=codec,
        end_id=end_id,
        padding_id=padding_id,
    )


def _ends(folder: Path, config: TransformerConfig) -> tuple[int, int]:
    """Return the id that ends an answer and the one that pads it."""
    vocabulary = token_source(folder).vocabulary()
    padding = vocabulary.find(None, named="eos_token")
    if padding is None or padding not in config.eos_ids:
        padding = config.eos_ids[0]
    end = vocabulary.find(END_OF_TURN.get(config.family))
    return (end if end in config.eos_ids else padding), padding
