"""Streams the answer to one question from the word-problem model, block by block.

Every `block` is final: its text will not change any more. Leaving the loop early frees the model.
"""

import asyncio

import d2f_stream

QUESTION = (
    "Nora starts the day with 48 apples. She gives 12 of them to Sam. The next day, her aunt gives "
    "her 20 apples. The bus ride costs 3 dollars. Then she splits her apples into 7 equal piles "
    "and keeps one. A lucky day leaves her with 9 times as many. How many apples does Nora have "
    "now?"
)


async def main() -> None:
    """Print each block as it becomes final."""
    async for block in d2f_stream.generate(QUESTION, model="word-problems"):
        print(block.text, end="", flush=True)
    print()


asyncio.run(main())
