from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from d2f_runtime.engine.prompt_cuts import PromptCuts
from d2f_runtime.engine.request_kind import RequestKind
from d2f_runtime.engine.scheduler import Scheduler
from d2f_stream.core.params import GenerationParams

KIND = RequestKind.of(GenerationParams(max_active_blocks=None), 16)

SESSIONS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 300)), min_size=1, max_size=8)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["step", "pause", "resume", "remove"]), st.integers(0, 7)),
    max_size=20,
)


@given(
    sessions=SESSIONS, actions=ACTIONS, max_rows=st.integers(1, 4), max_sessions=st.integers(1, 5)
)
def test_batch_that_was_taken_back_is_the_next_one(
    sessions: Sequence[tuple[int, int]],
    actions: Sequence[tuple[str, int]],
    max_rows: int,
    max_sessions: int,
) -> None:
    scheduler: Scheduler[int] = Scheduler(
        max_sessions=max_sessions, capacity_tokens=120, max_rows=max_rows, max_step_tokens=200
    )
    for number, (capacity, prompt) in enumerate(sessions):
        scheduler.add(
            number,
            capacity_tokens=capacity,
            prompt=PromptCuts(prompt, (0, 1, 16)[number % 3]),
            kind=KIND,
            may_narrow=number % 2 == 0,
        )
    for action, number in [*actions, ("step", 0)]:
        if action == "pause":
            scheduler.pause(number)
        elif action == "resume":
            scheduler.resume(number)
        elif action == "remove":
            scheduler.remove(number)
        else:
            admits = scheduler.admits
            batch = scheduler.next_batch()
            assert admits == bool(batch.admit)
            assert not scheduler.admits
            scheduler.take_back(batch)
            again = scheduler.next_batch()
            assert (again.run, again.prompts) == (batch.run, batch.prompts)


def test_session_that_left_meanwhile_is_not_taken_back() -> None:
    scheduler: Scheduler[str] = Scheduler(
        max_sessions=2, capacity_tokens=100, max_rows=2, max_step_tokens=200
    )
    for name in ("gone", "stays"):
        scheduler.add(name, capacity_tokens=10, prompt=PromptCuts(4), kind=KIND)
    batch = scheduler.next_batch()
    scheduler.remove("gone")
    scheduler.take_back(batch)
    assert [name for name, _ in scheduler.next_batch().run] == ["stays"]
