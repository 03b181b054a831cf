"""Decodes an exported model with onnxruntime, numpy and tokenizers alone, one block at a time.

Masks are filled where the model is sure, at least one in each step. The first step of a block
stores the K/V of the one before. Models without shifted logits have no last_hidden, keep and kept.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers

FOLDER = Path(__file__).parents[1] / "runtime/d2f_runtime/models/embedded"
QUESTION = "Ben has 12 apples. He buys 3 more apples. How many apples does Ben have now?"

manifest = json.loads((FOLDER / "manifest.json").read_text())
shape, mask, size = manifest["transformer"], manifest["mask_id"], manifest["native_block_size"]
session = onnxruntime.InferenceSession(FOLDER / "model.onnx")
tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
layers = [f"{i}.{x}" for i in range(shape["num_layers"]) for x in "kv"]
outputs = ["proposals", "kept", *(f"new.{name}" for name in layers)]
empty = np.zeros((1, 0, shape["num_kv_heads"] * shape["head_dim"]), np.float32)
state = {f"past.{name}": empty for name in layers}
state["last_hidden"] = np.zeros((1, shape["hidden_size"]), np.float32)


def step(start: int, stored: list[int], block: list[int]) -> np.ndarray:
    """Run filled tokens and a block behind them, store the former; [tokens, confidences]."""
    first, stop = len(stored), len(stored) + len(block)
    window = {
        "tokens": np.array([stored + block]),
        "start": np.array([start]),
        "visible_until": np.array([[start + first] * first + [start + stop] * len(block)]),
        "head_rows": np.arange(first, stop)[None],
        "keep": np.array([0]),  # the state that predicts the first of these
        "in_full": np.array(False),
        "temperature": np.zeros(1, np.float32),
        "uniforms": np.zeros((1, len(block)), np.float32),
    }
    proposals, state["last_hidden"], *new = session.run(outputs, state | window)
    for name, values in zip(layers, new, strict=True):
        state[f"past.{name}"] = np.append(state[f"past.{name}"], values[:, :first], axis=1)
    answers: np.ndarray = proposals[:2, 0]
    return answers


start, stored = 0, tokenizer.encode(QUESTION).ids
while not set(stored) & set(manifest["eos_ids"]):
    block = [mask] * size
    while mask in block:
        tokens, confidence = step(start, stored, block)
        start, stored = start + len(stored), []
        masked = [i for i, token in enumerate(block) if token == mask]
        best = max(masked, key=lambda i: confidence[i])
        for i in masked:
            block[i] = int(tokens[i]) if confidence[i] > 0.9 or i == best else mask
    stored = block
    print(tokenizer.decode(block), end="", flush=True)
print()
