"""FastRunner: runs the rows of a step near the time that reading the weights takes.

Steps are padded to a few static shapes (`buckets`), each captured once as a CUDA graph; what varies
(positions, places, lengths) is read from one integer buffer on the device. A greedy step is one
launch, whose first kernel reads page-locked memory of the host and whose last one writes it.
Without CUDA the same code runs uncaptured over the kernels' references, for tests.

Shapes: M rows, N masks, D hidden size.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2f_runtime.backends.answers import MAX_HEAD_ELEMENTS, answer_states, sampling_of
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.buckets import BUCKETS, CROWD, MAX_ROWS, Bucket, bucket_for
from d2f_runtime.backends.kv_pool import KVPool, Span
from d2f_runtime.backends.rows import MAX_BRANCH_MASKS, Floats, Masks
from d2f_runtime.backends.step_plan import StepPlan, plan_step
from d2f_runtime.backends.step_shape import StepShape
from d2f_runtime.kernels.compilation import CompilationLog
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.models.fast_transformer import FastTransformer

__all__ = ["FastRunner"]

logger = logging.getLogger("d2f_stream.fast_runner")

MAX_ROWS_AT_ONCE: Final = 8192  # bounds the memory of activations
EAGER_MULTIPLE: Final = 64  # rows outside of graphs are padded to this, so few shapes occur


class _Piece(NamedTuple):
    """Rows that run at once: a part of a step's rows where they would take too much memory."""

    rows: Sequence[StepRow]
    spans: Sequence[Span]
    plan: StepPlan


class FastRunner:
    """Implements Runner with a FastTransformer.

    Args:
        model: packed, on the pool's device.
        pool: of the K/V, on the same device.
        info: of the model.
        use_graphs: capture each shape when it first occurs.

    Attributes:
        graph_bytes: memory that the graphs of each captured shape took from the device.
    """

    def __init__(
        self, model: FastTransformer, pool: KVPool, info: ModelInfo, *, use_graphs: bool = True
    ) -> None:
        self._model = model
        self._pool = pool
        self._info = info
        config = model.config
        self._group = config.num_heads // config.num_kv_heads
        self._device = pool.store.device
        self._use_graphs = use_graphs and self._device.type == "cuda"
        self._shapes: dict[Bucket, StepShape] = {}
        self._is_warm = False
        self._compilations = CompilationLog()
        self._graph_pool: Any = None  # torch gives the handle no public type
        self.graph_bytes: dict[Bucket, int] = {}

    @torch.inference_mode()
    def warm_up(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Capture shapes beforehand, and run one step that is too long to be captured.

        Args:
            buckets: None are all that occur: of as many sessions as share a step, and of more runs
                where the windows of these may have branches.
        """
        if not self._use_graphs:
            return
        began = time.perf_counter()
        if buckets is None:
            most = CROWD if self._info.branches else self._info.step_sessions
            buckets = [b for b in BUCKETS if b.sessions <= most and b.rows > b.sessions // 4]
            buckets.sort(key=lambda bucket: -bucket.rows)  # the others fit into their memory
        with self._current():
            for bucket in buckets:
                self._shape(bucket)
            long = StepShape(Bucket(1, MAX_ROWS + EAGER_MULTIPLE), self._group, self._device)
            self._run_empty(long, 0)
            torch.cuda.synchronize(self._device)
        self._is_warm = True
        logger.info(
            "captured %s shapes in %.1f s (%s); graphs take %.0f MB of the device",
            len(buckets),
            time.perf_counter() - began,
            self._compilations.news() or "all kernels were there",
            sum(self.graph_bytes.values()) / 1e6,
        )

    @torch.inference_mode()
    def replay(self, bucket: Bucket) -> None:
        """Launch a shape's last step again, wide ones without head, and do not wait; for timing."""
        shape = self._shape(bucket)
        graph = shape.greedy_graph or shape.body_graph
        if graph is None:
            raise RuntimeError(f"{bucket} is not captured")
        graph.replay()

    def run(self, rows: Sequence[StepRow], spans: Sequence[Span]) -> tuple[Masks, Floats]:
        """Run the rows and write their K/V; see Runner."""
        with self._current():
            pieces = self._pieces(rows, spans)
            if len(pieces) == 1:
                answers = self._run(pieces[0])
            else:
                answers = np.concatenate([self._run(p).copy() for p in pieces], axis=1)
        if news := self._compilations.news():
            logger.info("a step had to wait: %s", news)
        return [positions for piece in pieces for positions in piece.plan.masks], answers

    def _current(self) -> AbstractContextManager[object]:
        """Make the device the one that kernels are launched on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _pieces(self, rows: Sequence[StepRow], spans: Sequence[Span]) -> list[_Piece]:
        """Plan the rows, in halves where they are too much at once."""
        plan = plan_step(rows, spans, self._info, scratch=self._pool.scratch)
        fits = plan.num_rows <= MAX_ROWS_AT_ONCE and plan.num_branch_masks <= MAX_BRANCH_MASKS
        # Of more runs there is no graph, and a step without one takes longer than two that have.
        if len(rows) == 1 or (fits and plan.num_runs <= CROWD):
            return [_Piece(rows, spans, plan)]
        half = len(rows) // 2
        return self._pieces(rows[:half], spans[:half]) + self._pieces(rows[half:], spans[half:])

    def _run(self, piece: _Piece) -> Floats:
        plan = piece.plan
        bucket = bucket_for(max(plan.num_rows, plan.num_masks), plan.num_runs)
        shape = self._eager_shape(plan) if bucket is None else self._shape(bucket)
        shape.fill(plan)
        if any([row.temperature > 0 for row in piece.rows]):
            return self._sample(piece, shape)
        if shape.greedy_graph is not None:
            shape.greedy_graph.replay()
        else:
            self._greedy(shape, plan.num_masks)
        return shape.answers(plan.num_masks)

    @torch.inference_mode()
    def _sample(self, piece: _Piece, shape: StepShape) -> Floats:
        """Run the layers as ever, and the head with torch."""
        plan = piece.plan
        if shape.greedy_graph is not None and shape.body_graph is None:
            shape.body_graph = self._captured(lambda: self._body(shape))
            shape.fill(plan)
        self._launch(shape)
        if not plan.num_masks:
            return shape.answers(0)
        assert shape.states is not None
        sampling, nucleus = sampling_of(piece.rows, plan.masks)
        answers = answer_states(
            shape.states[: plan.num_masks],
            self._model.logits,
            self._model.config,
            sampling=sampling,
            nucleus=nucleus,
        )
        out: Floats = answers.cpu().numpy()
        return out

    @torch.inference_mode()
    def _greedy(self, shape: StepShape, num_masks: int) -> None:
        """Run a whole step, of whose answers the first `num_masks` matter."""
        self._launch(shape)
        assert shape.states is not None
        self._head(shape.states, num_masks, shape.found)

    def _launch(self, shape: StepShape) -> None:
        """Run what `_body` does, by its graph if there is one."""
        if shape.body_graph is None:
            self._body(shape)
        else:
            shape.body_graph.replay()

    def _body(self, shape: StepShape) -> None:
        """Run the layers; set the states that predict masks, and keep the slots' last ones."""
        self._model.ops.fetch(shape.sent, shape.fetched)
        hidden = self._model.forward(shape.tensors, self._pool.store)
        if not self._info.shift_logits:
            shape.states = hidden.index_select(0, shape.head)
            return
        last_hidden, head = self._pool.last_hidden, shape.head
        inside = hidden.index_select(0, head.clamp(min=0))
        before = last_hidden.index_select(0, (-1 - head).clamp(min=0))
        shape.states = torch.where((head >= 0)[:, None], inside, before)
        last_hidden.index_copy_(0, shape.last_to.long(), hidden.index_select(0, shape.last_from))

    def _head(self, states: Tensor, number: int, found: Tensor) -> None:
        """Write [4, M] answers, of which the first `number` matter, to the host's memory."""
        length = MAX_HEAD_ELEMENTS // self._model.config.vocab_size
        if number == states.shape[0] <= length:
            self._model.best_tokens(states, out=found)
            return
        # of few sizes, as kernels are compiled anew for some of the others
        length = max(EAGER_MULTIPLE, length - length % EAGER_MULTIPLE)
        until = min(number + -number % EAGER_MULTIPLE, states.shape[0])
        for begin in range(0, until, length):
            piece = slice(begin, min(begin + length, until))
            found[:, piece].copy_(self._model.best_tokens(states[piece]), non_blocking=True)

    @torch.inference_mode()
    def _eager_shape(self, plan: StepPlan) -> StepShape:
        """Return buffers of about the plan's size, for a step that no bucket holds."""
        rows = max(plan.num_rows, plan.num_masks)
        rows += -rows % EAGER_MULTIPLE
        return StepShape(Bucket(plan.num_runs, rows), self._group, self._device)

    def _shape(self, bucket: Bucket) -> StepShape:
        shape = self._shapes.get(bucket)
        if shape is None:
            shape = self._shapes[bucket] = self._new_shape(bucket)
        return shape

    @torch.inference_mode()
    def _new_shape(self, bucket: Bucket) -> StepShape:
        shape = StepShape(bucket, self._group, self._device)
        if self._use_graphs:
            self._capture(bucket, shape)
        return shape

    def _capture(self, bucket: Bucket, shape: StepShape) -> None:
        began = time.perf_counter()
        self._run_empty(shape, bucket.rows)  # compiles the kernels
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # as a capture does, so that the difference is the graph's
        before = torch.cuda.memory_reserved(self._device)
        if bucket.is_wide:
            shape.body_graph = self._captured(lambda: self._body(shape))
        else:
            shape.greedy_graph = self._captured(lambda: self._greedy(shape, bucket.rows))
        self.graph_bytes[bucket] = torch.cuda.memory_reserved(self._device) - before
        logger.log(
            logging.INFO if self._is_warm else logging.DEBUG,
            "captured a step of %s rows and %s sessions in %.2f s, %s bytes",
            *(bucket.rows, bucket.sessions),
            *(time.perf_counter() - began, self.graph_bytes[bucket]),
        )

    def _run_empty(self, shape: StepShape, num_masks: int) -> None:
        """Run a step without rows, which writes nothing that anybody reads."""
        shape.fill(plan_step([], [], self._info))
        self._greedy(shape, num_masks)

    def _captured(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._graph_pool, capture_error_mode="thread_local"):
            launch()
        return graph
