"""Two passes against one: who sees whom, what the base's rows are, and the loss."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from d2f_export.distill.from_ar.answers import Answers
from d2f_export.distill.from_ar.draft_adapter import adapter_layers, new_adapter
from d2f_export.distill.from_ar.feed import Batch, Feed, Stage
from d2f_export.distill.from_ar.head_loss import head_loss
from d2f_export.distill.from_ar.noise import Noise
from d2f_export.distill.from_ar.settings import Loss
from d2f_export.distill.from_ar.streams import named_weights, streams_of
from d2f_export.distill.from_ar.visibility import Visibility
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.rotary import rotate
from d2f_runtime.models.transformer import Transformer

pytestmark = pytest.mark.torch

MASK = 5
VOCAB = 40
CLEAN, NOISY = 128, 256


def config(**changes: object) -> TransformerConfig:
    values: dict[str, object] = {
        "family": "llama", "vocab_size": VOCAB, "num_tokens": VOCAB, "hidden_size": 24,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 40,
        "mask_id": VOCAB, "eos_ids": (2,), "shift_logits": True, "prompt_attention": "causal",
        "tie_embeddings": True,
    }  # fmt: skip
    return TransformerConfig(**(values | changes))  # type: ignore[arg-type]


def model(kind: TransformerConfig, seed: int = 0) -> Transformer:
    made = Transformer(kind).double()
    made.init_weights(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return made.requires_grad_(False)


def answers(seed: int = 0, count: int = 30) -> Answers:
    random = np.random.default_rng(seed)

    def draw(low: int, high: int) -> list[int]:
        return [int(i) for i in random.integers(6, VOCAB, int(random.integers(low, high)))]

    return Answers.of((draw(2, 9), draw(4, 50)) for _ in range(count))


def batch(number: int = 0, *, sizes: tuple[int, ...] = (2, 4)) -> Batch:
    share = 1 / len(sizes)
    feed = Feed(
        answers(), rows=2, clean_length=CLEAN, noisy_length=NOISY, mask_id=MASK, seed=0,
        stages=[(0, Stage(sizes, (share,) * len(sizes)))], noise=Noise(4, 0.4),
    )  # fmt: skip
    return feed[number]


def factors(base: Transformer) -> dict[str, Tensor]:
    """Return factors that do something, fp64."""
    random = torch.Generator().manual_seed(1)
    drawn = new_adapter(base.config, rank=3, seed=0, table=base.embed_tokens.weight)
    return {
        name: torch.randn(value.shape, generator=random, dtype=torch.float64)
        if name.endswith("_b")
        else value.double()
        for name, value in drawn.items()
    }


def passes(
    base: Transformer, adapter: dict[str, Tensor] | None, given: Batch
) -> tuple[Tensor, Tensor]:
    """Return the final states of the noisy and of the clean half."""
    streams = streams_of(base.config, named_weights(base), compiled=False)
    seen = Visibility(2, CLEAN, NOISY, torch.device("cpu"), fused=False)
    clean_mask, noisy_mask = seen.masks(given)
    clean, cache = streams.clean(given["clean"], given["clean_position"], clean_mask)
    noisy = streams.noisy(
        given["noisy"],
        given["noisy_position"],
        cache,
        noisy_mask,
        mask_id=MASK,
        mask_embedding=torch.zeros(24) if adapter is None else adapter["mask_embedding"],
        adapters=None if adapter is None else adapter_layers(adapter, base.config.num_layers),
    )
    return noisy, clean


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_clean_rows_are_the_bases_own_whatever_the_adapter(changes: dict[str, bool]) -> None:
    base, given = model(config(**changes)), batch()
    _, clean = passes(base, factors(base), given)
    _, without = passes(base, None, given)
    assert torch.equal(clean, without)
    for row in range(2):
        docs = given["clean_doc"][row]
        for doc in range(int(docs.max()) + 1):
            place = (docs == doc).nonzero()[:, 0]
            tokens = given["clean"][row, place][None]
            expected, _ = base(tokens, torch.arange(len(place))[None], None, causal=True)
            torch.testing.assert_close(clean[row, place], expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_noisy_rows_are_what_one_long_row_gives(changes: dict[str, bool]) -> None:
    """Against prompt, answer and noisy window as one row, each position by itself, in fp64."""
    base, given = model(config(**changes)), batch()
    adapter = factors(base)
    noisy, _ = passes(base, adapter, given)
    row = 1
    for window in range(0, int(given["window"][row].max()) + 1, 3):
        place = (given["window"][row] == window).nonzero()[:, 0]
        first = int(given["doc_start"][row, place[0]])
        before = given["clean"][row, first : int(given["window_start"][row, place[0]])]
        expected = one_row(base, adapter, before, given["noisy"][row, place],
                           given["block"][row, place])  # fmt: skip
        # The model turns queries and keys in fp32; a wrong mask is off by 0.1 and more.
        torch.testing.assert_close(noisy[row, place], expected, rtol=1e-4, atol=1e-5)


def one_row(
    base: Transformer, adapter: dict[str, Tensor], clean: Tensor, noisy: Tensor, block: Tensor
) -> Tensor:
    """Run [clean | noisy] with explicit loops over queries; return the noisy half's states."""
    config, count = base.config, len(clean)
    x = base.embed_tokens(torch.cat([clean, noisy]))
    is_mask = torch.cat([clean, noisy]) == MASK
    is_mask[:count] = False
    x[is_mask] = adapter["mask_embedding"]
    # The window follows the clean tokens, so places in the row are positions.
    frequency = config.rope_theta ** (-torch.arange(0, 8, 2).double() / 8)
    angle = torch.arange(len(x)).double()[:, None, None] * frequency.repeat(2)
    draft = torch.arange(len(x)) >= count

    def low(h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (h @ a.T @ b.T) * draft[:, None]

    for index, layer in enumerate(base.layers):
        own = {name.partition(".")[2]: v for name, v in adapter.items() if name[:2] == f"{index}."}
        attention, mlp = layer.self_attn, layer.mlp
        h = layer.input_layernorm(x)  # type: ignore[operator]
        q, k, v = (
            getattr(attention, f"{n}_proj")(h) + low(h, a, own[f"{n}_b"])
            for n, a in zip("qkv", own["qkv_a"].chunk(3), strict=True)
        )
        q = attention.q_norm(q.view(len(x), 4, 8))  # type: ignore[operator, union-attr]
        k = attention.k_norm(k.view(len(x), 2, 8))  # type: ignore[operator, union-attr]
        q, k = rotate(q, angle.cos(), angle.sin()), rotate(k, angle.cos(), angle.sin())
        v, mixed = v.view(len(x), 2, 8), torch.zeros(len(x), 4, 8).double()
        for query in range(len(x)):
            seen = torch.arange(len(x)) <= query
            if query >= count:
                later = torch.cat([torch.ones(count), (block <= block[query - count]).double()])
                seen = later > 0
            for head in range(4):
                scores = k[seen, head // 2] @ q[query, head] / math.sqrt(8)
                mixed[query, head] = scores.softmax(0) @ v[seen, head // 2]
        flat = mixed.reshape(len(x), -1)
        x = x + attention.o_proj(flat) + low(flat, own["out_a"], own["out_b"])  # type: ignore[operator, union-attr]
        h = layer.post_attention_layernorm(x)  # type: ignore[operator]
        a_gate, a_up = own["gate_up_a"].chunk(2)
        gate = mlp.gate_proj(h) + low(h, a_gate, own["gate_b"])  # type: ignore[operator, union-attr]
        up = mlp.up_proj(h) + low(h, a_up, own["up_b"])  # type: ignore[operator, union-attr]
        h = torch.nn.functional.silu(gate) * up
        x = x + mlp.down_proj(h) + low(h, own["down_a"], own["down_b"])  # type: ignore[operator, union-attr]
    states: Tensor = base.norm(x)[count:]
    return states


@pytest.mark.parametrize("kind", ["kl", "ce", "both"])
def test_head_loss_and_its_gradient_are_those_of_autograd(kind: Loss) -> None:
    random = torch.Generator().manual_seed(0)
    count, size = 9, 6
    teacher = torch.randn(count, size, generator=random, dtype=torch.float64)
    head = torch.randn(VOCAB, size, generator=random, dtype=torch.float64)
    labels = torch.randint(VOCAB, (count,), generator=random)
    weights = torch.rand(count, generator=random).double()
    weights[-2:] = 0.0  # padding
    student = torch.randn(count, size, generator=random, dtype=torch.float64).requires_grad_()
    ours = torch.log_softmax(student @ head.T, -1)
    theirs = torch.log_softmax(teacher @ head.T, -1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    ce = torch.nn.functional.nll_loss(ours, labels, reduction="none")
    part = {"kl": kl, "ce": ce, "both": (kl + ce) / 2}[kind]
    expected = (part * weights).sum() / weights.sum()
    (slope,) = torch.autograd.grad(expected, student)
    loss = head_loss(student, teacher, labels, weights, head, kind=kind, fused=False)
    (found,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # sums in fp32
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-7)
