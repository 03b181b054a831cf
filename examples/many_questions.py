"""Asks several questions at once; one engine answers them in the same steps of the model.

`load` keeps the model open, and each `generate` is a request of its own. The blocks arrive as they
become final, so those of different answers come mixed.
"""

import asyncio

import d2f_stream

QUESTIONS = (
    "Ben has 34 books. He buys 18 more books. How many books does he have now?",
    "There are 60 photos in Priya's basket. She gives away half of them. Then she finds 12 photos "
    "in an old box. How many photos does she have in the end?",
    "Leo starts the day with 15 stickers. A month later, he has 4 times that number. "
    "He gives 22 stickers to Mia. How many stickers does Leo end up with?",
)


async def answer(engine: d2f_stream.Engine, number: int, question: str) -> None:
    """Print the blocks of one answer, each with the number of its question."""
    async for block in engine.generate([{"role": "user", "content": question}]):
        print(f"{number}: {block.text.strip()}", flush=True)


async def main() -> None:
    """Start all questions, then wait until each is answered."""
    async with d2f_stream.load("word-problems") as engine, asyncio.TaskGroup() as group:
        for number, question in enumerate(QUESTIONS, start=1):
            print(f"{number}? {question}")
            group.create_task(answer(engine, number, question))


asyncio.run(main())
