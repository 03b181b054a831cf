"""A model folder of a few bytes, whose answer is written in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

SCRIPT = json.dumps({"answers": "abc"}).encode()


def write_model(folder: Path, **changes: Any) -> Path:
    manifest = {
        "format_version": 1,
        "name": "tiny",
        "family": "scripted",
        "mask_id": 257,
        "eos_ids": [256],
        "shift_logits": False,
        "prompt_attention": "full",
        "native_block_size": 8,
        "max_block_size": 64,
        "max_len": 512,
        "vocab_size": 257,
        "transformer": dict.fromkeys(
            ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"), 1
        ),
        "defaults": {"cpu": {"max_new_tokens": 40}},
        "files": {
            "script.json": {"sha256": hashlib.sha256(SCRIPT).hexdigest(), "bytes": len(SCRIPT)}
        },
    }
    (folder / "script.json").write_bytes(SCRIPT)
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder
