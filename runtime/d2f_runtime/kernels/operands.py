"""The left operand of a matrix instruction, made in registers of codes of 4 or 8 bits.

The codes lie as `fragments` has them, so that no thread needs what another one holds: after the
arithmetic of `unpacking` all that is left is to say which number is which. Hopper only.
"""

from d2f_runtime.kernels.gluon import (
    HAS_GLUON,
    gl,
    gluon,
)
from d2f_runtime.kernels.unpacking import unpack_eight_bits, unpack_four_bits

__all__ = ["operand_of_4", "operand_of_8", "quarters_of"]

if HAS_GLUON:
    _FOUR_BITS = gl.constexpr(unpack_four_bits())
    _EIGHT_BITS = gl.constexpr(unpack_eight_bits())

    @gluon.jit
    def quarters_of(values, GROUPS: gl.constexpr, SIZE: gl.constexpr):
        """Return four tensors [GROUPS, SIZE]."""
        if SIZE == 512:  # words: one quarter after the other
            parted = gl.permute(gl.reshape(values, (GROUPS, 2, 2, SIZE)), (0, 3, 1, 2))
        else:
            parted = gl.reshape(values, (GROUPS, SIZE, 2, 2))
        even, odd = gl.split(parted)
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        return first, second, third, fourth

    @gluon.jit
    def operand_of_4(words, scales, GROUPS: gl.constexpr, layout: gl.constexpr):
        """Return [GROUPS 64, 64] bf16 as the left operand of a product, from a tile's words."""
        words = gl.reshape(words, (GROUPS, 32, 16))
        beside: gl.constexpr = gl.SliceLayout(2, words.type.layout)
        scales = gl.convert_layout(scales, beside, assert_trivial=True)
        _, scales = gl.broadcast(words, gl.expand_dims(scales, 2))
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            _FOUR_BITS, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [words, scales],
            dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip
        low = gl.join(gl.join(a, b), gl.join(c, d))
        high = gl.join(gl.join(e, f), gl.join(g, h))
        parted = gl.join(low, high)  # ..., n3, k3, k4
        # group, n5, n4, n2-n0, k2, k1, k5, k0, n3, k3, k4
        parted = gl.reshape(parted, (GROUPS, 2, 2, 8, 2, 2, 2, 2, 2, 2, 2))
        ordered = gl.permute(parted, (0, 1, 2, 8, 3, 6, 10, 9, 4, 5, 7))
        operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
        left = gl.reshape(ordered, (GROUPS * 64, 64))
        return gl.convert_layout(left, operand, assert_trivial=True)

    @gluon.jit
    def operand_of_8(low, high, GROUPS: gl.constexpr, layout: gl.constexpr):
        """Return [GROUPS 64, 64] bf16 as the left operand of a product, from a tile's words."""
        words = gl.permute(gl.join(low, high), (0, 2, 1))  # group, k5, 512
        a, b, c, d = gl.inline_asm_elementwise(
            _EIGHT_BITS, "=r,=r,=r,=r,r,r", [words], dtype=(gl.bfloat16,) * 4, is_pure=True, pack=2
        )
        parted = gl.join(gl.join(a, b), gl.join(c, d))  # ..., n3, k3
        # group, k5, n5, n4, n2-n0, k2, k1, k4, k0, n3, k3
        parted = gl.reshape(parted, (GROUPS, 2, 2, 2, 8, 2, 2, 2, 2, 2, 2))
        ordered = gl.permute(parted, (0, 2, 3, 9, 4, 1, 7, 10, 5, 6, 8))
        operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
        left = gl.reshape(ordered, (GROUPS * 64, 64))
        return gl.convert_layout(left, operand, assert_trivial=True)
