"""Answers over MQTT, read from their first block on."""

from d2f_runtime.backends.scripted import StepGate
from d2f_stream.core.session import Session


async def first_block(session: Session, gate: StepGate) -> str:
    gate.let_through(6)
    return (await anext(session)).text


async def rest_of(session: Session) -> str:
    return "".join([block.text async for block in session])
