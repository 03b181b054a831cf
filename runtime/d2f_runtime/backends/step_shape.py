"""StepShape: the buffers of one static shape of the fast step, and its graphs.

Shapes: M rows, D hidden size.
"""

import torch
from torch import Tensor

from d2f_runtime.backends.buckets import Bucket
from d2f_runtime.backends.rows import Floats
from d2f_runtime.backends.step_plan import Layout, StepPlan
from d2f_runtime.kernels.attention import TILE_FIELDS, rows_per_tile
from d2f_runtime.models.fast_transformer import StepTensors

__all__ = ["StepShape"]


class StepShape:
    """The buffers of one static shape, and its graphs once they are captured.

    Attributes:
        layout: of the integers.
        per_tile: rows of an attention tile.
        sent: the integers, page-locked; they must stay as they are until a step has ended.
        host: the same, to be written.
        fetched: the same on the device, during a step.
        found: [4, M] answers, page-locked.
        states: [M, D] final states that predict masks; set by a forward.
        greedy_graph: a whole greedy step, the copies to and from the device included.
        body_graph: the same without the head: of wide steps, and where something is sampled.
    """

    def __init__(self, bucket: Bucket, group: int, device: torch.device) -> None:
        self.per_tile = rows_per_tile(bucket.rows, group)
        self.layout = Layout(bucket.rows, bucket.num_tiles(self.per_tile), bucket.sessions)
        pinned = device.type == "cuda"
        self.sent = torch.zeros(self.layout.size, dtype=torch.int32, pin_memory=pinned)
        self.host = self.sent.numpy().data
        self.fetched = torch.zeros(self.layout.size, dtype=torch.int32, device=device)
        parts = torch.split(self.fetched, list(self.layout.sizes))
        tokens, positions, places, visible, self.head, drafts, *rest = parts
        tiles, self.last_from, self.last_to = rest
        tiles = tiles.view(-1, TILE_FIELDS)
        self.tensors = StepTensors(tokens, positions, places, visible, tiles, drafts)
        self.found = torch.zeros((4, bucket.rows), pin_memory=pinned)
        self._answers: Floats = self.found.numpy()
        self._geometry: tuple[object, ...] | None = None
        self.states: Tensor | None = None
        self.greedy_graph: torch.cuda.CUDAGraph | None = None
        self.body_graph: torch.cuda.CUDAGraph | None = None

    def fill(self, plan: StepPlan) -> None:
        """Write a step's integers; most steps of a stream differ from the last in tokens alone."""
        geometry = plan.geometry
        same = geometry == self._geometry
        plan.fill(self.host, self.layout, self.per_tile, same_geometry=same)
        self._geometry = geometry

    def answers(self, number: int) -> Floats:
        """Wait for the device; return a view of the first `number` columns that it found."""
        if self.fetched.is_cuda:
            torch.cuda.current_stream(self.fetched.device).synchronize()
        return self._answers[:, :number]
