"""Products with weights of 4 and 8 bits, which become 16 bits in registers: a tile of `experts`.

A tile's words are used up by several products of 16 features each; see `expert_weights`. On Hopper
PTX makes pairs of bf16 of two words at once, elsewhere a table says what each code means.

Shapes: a tile is [OUTPUTS, 16] of a weight, and of rows [16, ROWS].
"""

from d2f_runtime.kernels.language import HAS_TRITON, jit, tl
from d2f_runtime.kernels.unpacking import unpack_four_bits, unpack_fp8

__all__ = ["add_codes", "rows_of"]


if HAS_TRITON:
    FOUR_BITS = tl.constexpr(unpack_four_bits(hidden=True))
    OF_FP8 = tl.constexpr(unpack_fp8())


@jit
def rows_of(source, inside, feature, size):
    """Return [features, ROWS] of rows that begin at `source`; 0 beyond them."""
    at = source[None, :] + feature[:, None]
    return tl.load(at, mask=inside[None, :] & (feature < size)[:, None], other=0.0)


@jit
def add_codes(
    total, source, inside, words, scales, table, first_output, first, size, stored_size,
    OUTPUTS: tl.constexpr, BITS: tl.constexpr, BY_WORDS: tl.constexpr,
):  # fmt: skip
    """Add the product of a tile of codes, instruction by instruction; see `expert_weights`."""
    output = first_output + tl.arange(0, OUTPUTS)
    word = tl.arange(0, 16)
    if BITS == 4:
        place = (output // 64 * (stored_size // 128) + first // 128) * 64 + output % 64
        scale = tl.load(scales + place)[:, None]
        at = words + (place * 16)[:, None]
        if BY_WORDS:
            held = tl.load(at + word[None, :])
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                FOUR_BITS, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r",
                [held, scale.broadcast_to((OUTPUTS, 16))],
                dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            even = (scale << 16).to(tl.float32, bitcast=True)  # of two bf16 in a word
            odd = (scale & -65536).to(tl.float32, bitcast=True)
            a = _value(at, word, table, 0, BITS) * even
            b = _value(at, word, table, 1, BITS) * odd
            c = _value(at, word, table, 2, BITS) * even
            d = _value(at, word, table, 3, BITS) * odd
            e = _value(at, word, table, 4, BITS) * even
            f = _value(at, word, table, 5, BITS) * odd
            g = _value(at, word, table, 6, BITS) * even
            h = _value(at, word, table, 7, BITS) * odd
        total = _add(total, a, source, inside, first, size)
        total = _add(total, b, source, inside, first + 64, size)
        total = _add(total, c, source, inside, first + 16, size)
        total = _add(total, d, source, inside, first + 80, size)
        total = _add(total, e, source, inside, first + 32, size)
        total = _add(total, f, source, inside, first + 96, size)
        total = _add(total, g, source, inside, first + 48, size)
        total = _add(total, h, source, inside, first + 112, size)
    else:
        place = (output // 64 * (stored_size // 64) + first // 64) * 64 + output % 64
        at = words + (place * 16)[:, None]
        if BY_WORDS:
            a, b, c, d = tl.inline_asm_elementwise(
                OF_FP8, "=r,=r,=r,=r,r,r", [tl.load(at + word[None, :])],
                dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            a = _value(at, word, table, 0, BITS)
            b = _value(at, word, table, 1, BITS)
            c = _value(at, word, table, 2, BITS)
            d = _value(at, word, table, 3, BITS)
        total = _add(total, a, source, inside, first, size)
        total = _add(total, b, source, inside, first + 16, size)
        total = _add(total, c, source, inside, first + 32, size)
        total = _add(total, d, source, inside, first + 48, size)
    return total


@jit
def _add(total, weight, source, inside, first, size):
    x = rows_of(source, inside, first + tl.arange(0, 16), size)
    return tl.dot(weight.to(x.dtype), x, total, input_precision="ieee")


@jit
def _value(at, word, table, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """Return [OUTPUTS, 16] fp32, unscaled, for the instruction of that number."""
    PER_WORD: tl.constexpr = 16 // BITS
    held = tl.load(at + (word // 2 * 2 + NUMBER // PER_WORD)[None, :])
    shift = BITS * (NUMBER % PER_WORD * 2 + word % 2)
    return tl.load(table + ((held >> shift[None, :]) & (2**BITS - 1)))
