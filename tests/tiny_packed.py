"""A tiny model's `int4-int8` artefact with a draft adapter."""

from pathlib import Path

from d2f_export.onnx.artefact import Description, write_artefact
from tiny_drafts import write_draft_adapter
from tiny_models import CONFIGS, tiny_folder

__all__ = ["MASK", "write_packed"]

MASK = 160


def write_packed(root: Path) -> Path:
    """Write it below an empty folder, and return where it is."""
    write_draft_adapter(root / "adapter", CONFIGS["llama"], mask_id=MASK)
    (root / "tokenizer.json").write_text("{}")
    write_artefact(
        tiny_folder("llama", "torch"),
        root / "artefact",
        Description(name="tiny", tokenizer=root / "tokenizer.json"),
        quantization="int4-int8",
        adapter=root / "adapter",
    )
    return root / "artefact"
