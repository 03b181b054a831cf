"""PTX that turns the codes of a thread into pairs of bf16, as the streamed product needs them.

Nothing but text: the kernel pastes it in. A weight costs 2.6 integer instructions and half a
multiplication (4 bits), or 1.5 and one subtraction (8 bits).
"""

from d2f_runtime.kernels.fragments import nf4_bytes

__all__ = ["unpack_eight_bits", "unpack_four_bits", "unpack_fp8"]


def unpack_four_bits(*, hidden: bool = False) -> str:
    """Return PTX that makes eight pairs of bf16 of two words and the scales of their two outputs.

    A value's bytes come from two tables of 16, and `prmt` selects four bytes from eight at once:
    both halves are asked, and a second `prmt` takes the answer of the half that the code's highest
    bit names. Operands: $0 to $7 the pairs, $8 and $9 the words, $10 two scales in bf16.

    An instruction holds one table in itself and takes the other from a register; `hidden` keeps
    the compiler from knowing what that one is, or it would set the register again and again.
    """
    names = ("ha0", "ha1", "hb0", "hb1", "la0", "la1", "lb0", "lb1")
    moves = "".join(f"mov.b32 {n}, {v:#x};" for n, v in zip(names, nf4_bytes(), strict=True))
    if hidden:  # nothing of them changes: no lane has the first one above it
        moves += "mov.u32 c, %lanemask_gt; and.b32 c, c, 1;"
        moves += "".join(f"xor.b32 {name}, {name}, c;" for name in names[::2])
    select = "".join(
        f"prmt.b32 a, {s}a0, {s}a1, c; prmt.b32 b, {s}b0, {s}b1, c; prmt.b32 {s}, a, b, m;"
        for s in "hl"
    )
    text = f"{{ .reg .b32 s0, s1, c, m, a, b, h, l, {', '.join(names)}; {moves}"
    text += "prmt.b32 s0, $10, $10, 0x1010; prmt.b32 s1, $10, $10, 0x3232;"
    for word, out in ((8, 0), (9, 4)):
        text += f"and.b32 c, ${word}, 0x77777777; shr.u32 m, ${word}, 1;"
        text += "and.b32 m, m, 0x44444444; or.b32 m, m, 0x32103210;"
        for half in (out, out + 2):
            text += select
            text += f"prmt.b32 ${half}, l, h, 0x5140; prmt.b32 ${half + 1}, l, h, 0x7362;"
            text += "" if half > out else "shr.u32 c, c, 16; shr.u32 m, m, 16;"
        text += "".join(f"mul.rn.bf16x2 ${out + i}, ${out + i}, s{i % 2};" for i in range(4))
    return text + "}"


def unpack_eight_bits() -> str:
    """Return PTX that makes four pairs of bf16 of two words of bytes, each 128 too large.

    A byte becomes the low bits of 2 ** 23 in fp32, from which 2 ** 23 + 128 is subtracted; the
    upper half of the result is the bf16 number. Operands: $0 to $3 the pairs, $4 and $5 the words.
    """
    text = "{ .reg .f32 f; .reg .b32 b, last, magic; mov.b32 magic, 0x4b000000;"  # 2 ** 23
    for word, out in ((4, 0), (5, 2)):
        for i in range(4):
            text += f"prmt.b32 b, ${word}, magic, 0x765{i}; mov.b32 f, b;"
            text += "sub.rn.f32 f, f, 0f4b000080; mov.b32 b, f;"
            text += f"prmt.b32 ${out + i // 2}, last, b, 0x7632;" if i % 2 else "mov.b32 last, b;"
    return text + "}"


def unpack_fp8() -> str:
    """Return PTX that makes four pairs of bf16 of two words of e4m3 numbers.

    Sign, exponent and fraction go where bf16 has them; the exponent, which counts from another
    place, is mended by a multiplication, which also makes small numbers right. Operands: $0 to $3
    the pairs, $4 and $5 the words.
    """
    text = "{ .reg .b32 b, m, by; mov.b32 by, 0x7b807b80;"  # 2 ** 120 twice
    for word, out in ((4, 0), (5, 2)):
        for pair, selector in enumerate(("0x1404", "0x3424")):
            text += f"prmt.b32 b, ${word}, 0, {selector}; and.b32 m, b, 0x7f007f00;"
            text += "shr.u32 m, m, 4; lop3.b32 b, b, 0x80008000, m, 0xEA;"
            text += f"mul.rn.bf16x2 ${out + pair}, b, by;"
    return text + "}"
