"""Named settings and where they come from.

A model's own defaults stand in its manifest or, for a published one, in its generation_config.json
over what its family's row here says.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from d2f_stream.core.params import MAX_BLOCK_SIZE, GenerationParams

__all__ = ["PRESETS"]


def _d2f(
    max_new_tokens: int, block_size: int, add_threshold: float, confidence_threshold: float = 0.9
) -> GenerationParams:
    """Return a row of the paper's table 8; the activation threshold is 0.95 in all of them."""
    return GenerationParams(
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        add_threshold=add_threshold,
        confidence_threshold=confidence_threshold,
    )


PRESETS: Final[Mapping[str, GenerationParams]] = MappingProxyType(
    {
        # The paper's general setting (arXiv 2508.09192, section 5.1), on this runtime's rules.
        "paper": GenerationParams(),
        # The published decoding loop to the letter, as eval_llada.py of the authors' repository
        # (zhijie-group/Discrete-Diffusion-Forcing, commit 771f745) runs HumanEval.
        "reference": GenerationParams(
            max_new_tokens=512, max_active_blocks=None, stop_at_eos="drain", tail="drop"
        ),
        # One block at a time: block diffusion with a cache, the paper's table 5.
        "single-block": GenerationParams(add_threshold=1.0, max_active_blocks=1),
        # Without D2F, as LLaDA publishes it (ML-GSAI/LLaDA, generate.py): full attention, no cache,
        # blocks from left to right, the most confident token of each step. All positions are
        # filled, whatever ends the answer; stop_at_eos="truncate" gives the same text sooner.
        "llada-vanilla": GenerationParams(
            attention="full", num_per_step=1, max_active_blocks=1, stop_at_eos="drain"
        ),
        # The same as Dream publishes it (DreamLM/Dream, diffusion_generate with alg="entropy"): the
        # whole answer is one block, and the token of lowest entropy is taken.
        "dream-vanilla": GenerationParams(
            attention="full",
            num_per_step=1,
            max_active_blocks=1,
            stop_at_eos="drain",
            block_size=256,
            rank="neg_entropy",
        ),
        # The D2F adapters by task: the thresholds of table 8, which are those of eval_llada.sh and
        # eval_dream.sh (commit as above), on this runtime's rules. The tasks' names are those of
        # lm-evaluation-harness.
        "d2f-llada-gsm8k": _d2f(512, 64, 0.7),
        "d2f-llada-humaneval": _d2f(512, 32, 0.1),
        "d2f-llada-mbpp": _d2f(512, 32, 0.9),
        "d2f-llada-minerva_math": _d2f(512, 32, 0.1),
        "d2f-dream-gsm8k_cot": _d2f(256, 32, 0.1),
        "d2f-dream-humaneval": _d2f(256, 32, 0.9, 0.95),
        "d2f-dream-mbpp": _d2f(256, 48, 0.1),
        "d2f-dream-minerva_math": _d2f(256, 64, 0.1),
        # The same repository's chat demo, which is eager to start blocks.
        "d2f-demo": GenerationParams(max_new_tokens=1024, activate_threshold=0.5),
        # Block diffusion, whose blocks are the model's own: the threshold of SDAR's
        # "low_confidence_dynamic" (JetAstra/SDAR, generate.py).
        "sdar": GenerationParams(
            block_size=4, add_threshold=1.0, max_active_blocks=1, confidence_threshold=0.85
        ),
        # TraDo, of the same architecture, as its README calls it (Gen-Verse/dLLM-RL), but greedily.
        "trado": GenerationParams(
            block_size=4, add_threshold=1.0, max_active_blocks=1, confidence_threshold=0.9
        ),
        # SDAR's code's other two ways: one token a step, the most confident or the leftmost.
        "sdar-static": GenerationParams(
            block_size=4, add_threshold=1.0, max_active_blocks=1, num_per_step=1
        ),
        "sdar-sequential": GenerationParams(
            block_size=4, add_threshold=1.0, max_active_blocks=1, num_per_step=1, rank="position"
        ),
        # LLaDA2.0's "LowConfidence" with the threshold that its servers have by default
        # (sgl-project/sglang, dllm/algorithm/low_confidence.py, 0564b52).
        "llada2": GenerationParams(
            add_threshold=1.0, max_active_blocks=1, confidence_threshold=0.95, tail="whole"
        ),
        # LLaDA2.1's "JointThreshold", which edits what it has set: the quality mode (diffusers
        # 0.42.1, LLaDA2Pipeline) and the speed mode (sglang, joint_threshold.py, 17d5721).
        "llada2.1": GenerationParams(
            add_threshold=1.0,
            max_active_blocks=1,
            confidence_threshold=0.7,
            edit_threshold=0.5,
            tail="whole",
        ),
        "llada2.1-speed": GenerationParams(
            add_threshold=1.0,
            max_active_blocks=1,
            confidence_threshold=0.5,
            edit_threshold=0.0,
            tail="whole",
        ),
        # Stable-DiffCoder as its README calls it, one token a step; and with the threshold that its
        # code has by default, where a confidence of exactly 0.95 is enough (ByteDance-Seed/
        # Stable-DiffCoder, ece1ffb, and generate_block of its modeling_stable_diffcoder.py).
        "stable-diffcoder": GenerationParams(
            max_new_tokens=128, block_size=4, add_threshold=1.0, max_active_blocks=1, num_per_step=1
        ),
        "stable-diffcoder-threshold": GenerationParams(
            max_new_tokens=128,
            block_size=4,
            add_threshold=1.0,
            max_active_blocks=1,
            confidence_threshold=math.nextafter(0.95, 0.0),
        ),
        # Qwen's models converted by dllm (Tiny-A2D) and OPDLM, one token a step as their samplers
        # do by default; OPDLM's dynamic decoding is num_per_step=0, confidence_threshold=0.9
        # (ZHZisZZ/dllm, core/samplers/bd3lm.py, ca17675; divelab/OPDLM, 3bb8bf6).
        "tiny-a2d": GenerationParams(
            max_new_tokens=128, add_threshold=1.0, max_active_blocks=1, num_per_step=1
        ),
        "opdlm": GenerationParams(
            max_new_tokens=128,
            block_size=4,
            add_threshold=1.0,
            max_active_blocks=1,
            num_per_step=1,
        ),
        # Fast-dLLM v2 as its model card calls it: sub-blocks of 8, threshold 0.9
        # (Efficient-Large-Model/Fast_dLLM_v2_7B; NVlabs/Fast-dLLM, v2/run_chatbot.py, b9cf368).
        "fast-dllm-v2": GenerationParams(
            block_size=32,
            add_threshold=1.0,
            max_active_blocks=1,
            confidence_threshold=0.9,
            sub_block_size=8,
        ),
        # Nemotron-Labs-Diffusion's diffusion decoding: the first token of a block from the causal
        # row before it, then the best token always and all others of at least 0.9 (the sampler
        # defaults of mlx-vlm 0.7.10).
        "nemotron": GenerationParams(
            add_threshold=1.0,
            max_active_blocks=1,
            confidence_threshold=math.nextafter(0.9, 0.0),
            sub_block_size=MAX_BLOCK_SIZE,  # the whole block, but for its first token
        ),
        # Drafts in blocks, kept where the model's own next tokens agree: for models that were
        # converted from autoregressive ones, or have a draft adapter. Block size and threshold
        # decide the speed alone: a wrong draft costs no answer.
        "verified": GenerationParams(
            block_size=8,
            max_active_blocks=None,
            confidence_threshold=0.01,
            commit="verify",
        ),
        # One token after the other, for models that know no mask.
        "autoregressive": GenerationParams(block_size=1, add_threshold=1.0, max_active_blocks=1),
    }
)
"""Settings by name; a request starts from one with params=PRESETS[name].

- "paper", "reference", "single-block", "d2f-demo", "d2f-llada-gsm8k" and others by model and task:
  D2F as its paper and its authors' code have it.
- "llada-vanilla", "dream-vanilla": these models without D2F.
- "sdar", "sdar-static", "sdar-sequential", "trado", "llada2", ...: as these families are published.
- "verified", "autoregressive": for models made from autoregressive ones.
"""
