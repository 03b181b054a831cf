"""The picture of the terminal, over the embedded model."""

import html

from lab.pictures import drawing_of

QUESTION = "Tom has 3 apples. He buys 4 more. How many apples does he have now?"


async def test_drawing_shows_the_question_and_what_is_written() -> None:
    drawing = await drawing_of("word-problems", QUESTION)
    assert drawing.startswith("<svg")
    text = html.unescape(drawing).replace("\xa0", " ")
    assert QUESTION in text
    assert "3 + 4 = 7" in text
