"""What a published family is made of, with tiny sizes; and the chat templates that several have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LLADA_TEMPLATE", "QWEN_TEMPLATE", "Tiny"]

QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLADA_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """A family's published files, with tiny sizes.

    Attributes:
        model_type: of config.json.
        classes: prefix of transformers' classes that compute the same.
        config: config.json; token ids are added when it is written.
        mask: text of the mask token.
        ends: texts that must end an answer; the first is the config's eos_token_id.
        tokens: further added tokens.
        template: chat template.
        attention: "full", "causal", "prompt_grid" or the size of the grid.
        parts: vocab.json and merges.txt instead of tokenizer.json.
    """

    model_type: str
    classes: str
    config: Mapping[str, Any]
    mask: str | None
    ends: tuple[str, ...]
    attention: str | int
    tokens: tuple[str, ...] = ("<|im_start|>",)
    template: str = QWEN_TEMPLATE
    parts: bool = False
    shifted: bool = True
    generation: Mapping[str, Any] = field(default_factory=dict)
