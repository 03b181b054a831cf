"""Generation: the autoregressive model answers many prompts at once, on one GPU or a CPU.

Every slot feeds one token a step: those of its prompt, then its own. So there is one step, of one
shape, in one CUDA graph, and a slot that is done takes the next prompt. The host looks every few
steps.

Shapes: S slots, L positions, KV key/value heads, G query heads of each, hd head size.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2f_export.distill.from_ar.loops import loop_lengths
from d2f_export.distill.from_ar.streams import LayerWeights, Streams
from d2f_runtime.models.rotary import rotary, rotate

__all__ = ["Generation", "Job", "Outcome"]

LOOK: Final = 16  # steps between looks of the host
LOOP_LOOKS: Final = 2  # looks between searches for loops


@dataclass(frozen=True, slots=True)
class Job:
    """What to write.

    Attributes:
        prompt: token ids.
        temperature: 0 is greedy.
        max_new: tokens.
        tag: the caller's.
    """

    prompt: list[int]
    temperature: float
    max_new: int
    tag: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written.

    Attributes:
        job: it was asked for.
        tokens: new ones, the end included where it is there, those that only repeat left out.
        reason: "end", "length" or "loop".
    """

    job: Job
    tokens: list[int]
    reason: str


class Generation:
    """A static batch of slots.

    Args:
        streams: the model.
        slots: S.
        length: L, prompt and answer together.
        end_ids: ids that end an answer.
        seed: of the draws.
    """

    def __init__(
        self, streams: Streams, *, slots: int, length: int, end_ids: Sequence[int], seed: int
    ) -> None:
        config, table = streams.config, streams.table
        device, dtype = table.device, table.dtype
        self._streams, self._slots, self._length = streams, slots, length
        self._device = device
        self._groups = config.num_heads // config.num_kv_heads
        shape = (config.num_layers, slots, config.num_kv_heads, length, config.head_dim)
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self._values = torch.zeros(shape, device=device, dtype=dtype)
        self._tokens = torch.zeros(slots, length + 1, dtype=torch.int64, device=device)
        self._place = torch.zeros(slots, dtype=torch.int64, device=device)
        self._prompt = torch.ones(slots, dtype=torch.int64, device=device)
        self._stop = torch.zeros(slots, dtype=torch.int64, device=device)  # no token beyond it
        self._heat = torch.zeros(slots, 1, device=device)
        self._running = torch.zeros(slots, dtype=torch.bool, device=device)
        self._end_ids = frozenset(end_ids)
        self._ends = torch.tensor(list(end_ids), device=device)
        self._jobs: list[Job | None] = [None] * slots
        self.num_tokens = 0  # fed in slots that had a job
        is_cuda = device.type == "cuda"
        self._rows = torch.arange(slots, device=device)
        self._before: Callable[..., Any] = self._before_attention
        self._after: Callable[..., Any] = self._after_attention
        self._pick: Callable[..., Tensor] = _pick
        if is_cuda:
            self._before = torch.compile(self._before_attention, dynamic=False)
            self._after = torch.compile(self._after_attention, dynamic=False)
            self._pick = torch.compile(_pick, dynamic=False)
            torch.cuda.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        self._graph: Any = None

    def run(
        self,
        next_job: Callable[[], Job | None],
        on_done: Callable[[Outcome], None],
        *,
        seconds: float = float("inf"),
    ) -> None:
        """Write until there are no jobs, or time is over; what is unfinished then is cut.

        Args:
            next_job: gives the next job, or None where there is none now.
            on_done: takes each outcome; it may make new jobs.
            seconds: at most.
        """
        started = time.monotonic()
        looks = 0
        while True:
            self._fill(next_job)
            if all(job is None for job in self._jobs):
                return
            if time.monotonic() - started > seconds:
                self._collect(on_done, look_for_loops=True, is_last=True)
                return
            for _ in range(LOOK):
                self._step()
            looks += 1
            self._collect(on_done, look_for_loops=looks % LOOP_LOOKS == 0)

    def _fill(self, next_job: Callable[[], Job | None]) -> None:
        slots, jobs = [], []
        for slot, running in enumerate(self._jobs):
            if running is None:
                job = next_job()
                if job is None:
                    break
                self._jobs[slot] = job
                slots.append(slot)
                jobs.append(job)
        if not slots:
            return
        rows = np.zeros((len(jobs), self._length + 1), np.int64)
        for row, job in zip(rows, jobs, strict=True):
            row[: len(job.prompt)] = job.prompt
        place = torch.tensor(slots, device=self._device)
        prompts = np.array([len(job.prompt) for job in jobs])
        stops = np.minimum(prompts + [job.max_new for job in jobs], self._length)
        heat = np.array([[job.temperature] for job in jobs], np.float32)
        self._tokens[place] = torch.from_numpy(rows).to(self._device)
        self._place[place] = 0
        self._prompt[place] = torch.from_numpy(prompts).to(self._device)
        self._stop[place] = torch.from_numpy(stops).to(self._device)
        self._heat[place] = torch.from_numpy(heat).to(self._device)
        self._running[place] = True

    def _collect(
        self,
        on_done: Callable[[Outcome], None],
        *,
        look_for_loops: bool,
        is_last: bool = False,
    ) -> None:
        running = self._running.cpu().numpy()
        places = self._place.cpu().numpy()
        busy = np.array([job is not None for job in self._jobs])
        done = busy & ~running
        repeated = np.zeros(len(done), np.int64)
        if not (done.any() or look_for_loops):
            return
        tokens = self._tokens.cpu().numpy()
        if look_for_loops:
            live = (busy & running).nonzero()[0]
            repeated[live] = loop_lengths(tokens[live], places[live] + 1)
            if repeated.any():
                self._running &= ~torch.from_numpy(repeated > 0).to(self._device)
        taken = busy if is_last else done | (repeated > 0)
        for slot in taken.nonzero()[0]:
            job = self._jobs[slot]
            assert job is not None
            count = int(places[slot]) + 1
            size = len(job.prompt)
            written = tokens[slot, size : max(size, count - int(repeated[slot]))].tolist()
            self._jobs[slot] = None
            self.num_tokens += count
            ended = bool(written) and written[-1] in self._end_ids
            reason = "loop" if repeated[slot] else "end" if ended else "length"
            on_done(Outcome(job, written, reason))

    @torch.no_grad()
    def _step(self) -> None:
        if self._device.type != "cuda":
            self._forward()
            return
        if self._graph is None:
            for _ in range(2):
                self._forward()  # compiles; a graph takes no first run
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._forward()
        self._graph.replay()

    def _forward(self) -> None:
        """Feed one token of every slot and write the next one."""
        streams = self._streams
        at = self._place
        x = F.embedding(self._tokens.gather(1, at[:, None])[:, 0], streams.table)[:, None]
        cos, sin, _ = rotary(at[:, None], streams.config)
        seen = torch.arange(self._length, device=self._device) <= at[:, None]
        bias = torch.where(seen, 0.0, float("-inf"))[:, None, None]  # [S, 1, 1, L]
        for index, weights in enumerate(streams.layers):
            q, k, v = self._before(x, cos, sin, weights)
            # Outside of compiled code, which would copy the whole cache to change one place of it.
            self._keys[index][self._rows, :, at] = k
            self._values[index][self._rows, :, at] = v
            x = self._after(x, q, self._keys[index], self._values[index], bias, weights)
        states = F.rms_norm(x[:, 0], (x.shape[-1],), streams.norm, streams.config.norm_eps)
        chosen = self._pick(states @ streams.head.T, self._heat)
        following = at + 1
        given = self._tokens.gather(1, following[:, None])[:, 0]
        is_prompt = following < self._prompt
        token = torch.where(is_prompt, given, chosen)
        ended = torch.isin(token, self._ends) & ~is_prompt
        moves = self._running
        self._tokens.scatter_(1, following[:, None], torch.where(moves, token, given)[:, None])
        self._place.copy_(torch.where(moves, following, at))
        self._running &= ~(ended | (following + 1 >= self._stop))

    def _before_attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, weights: LayerWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [S, KV, G, hd], and keys and values [S, KV, hd]."""
        config = self._streams.config
        slots, _, size = x.shape
        head, kv = config.head_dim, config.num_kv_heads
        h = F.rms_norm(x, (size,), weights.first_norm, config.norm_eps)
        joined = F.linear(h, weights.qkv, weights.qkv_bias)
        q, k, v = torch.split(joined, [config.num_heads * head, kv * head, kv * head], dim=-1)
        q, k = q.view(slots, 1, -1, head), k.view(slots, 1, -1, head)
        if weights.q_norm is not None:
            q = F.rms_norm(q, (head,), weights.q_norm, config.norm_eps)
        if weights.k_norm is not None:
            k = F.rms_norm(k, (head,), weights.k_norm, config.norm_eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.view(slots, kv, self._groups, head), k[:, 0], v.view(slots, kv, head)

    def _after_attention(
        self,
        x: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        weights: LayerWeights,
    ) -> Tensor:
        """Attend by two plain products and return the residual stream [S, 1, D]."""
        slots, _, size = x.shape
        scores = q @ keys.transpose(2, 3)
        shares = (scores.float() * q.shape[-1] ** -0.5 + bias).softmax(dim=-1).to(x.dtype)
        x = x + F.linear((shares @ values).reshape(slots, 1, -1), weights.out)
        h = F.rms_norm(x, (size,), weights.second_norm, self._streams.config.norm_eps)
        gate, up = F.linear(h, weights.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, weights.down)


def _pick(logits: Tensor, heat: Tensor) -> Tensor:
    """Return [S] the best token, or a drawn one where the temperature is above 0."""
    logits = logits.float()
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
    return (logits + heat * noise).argmax(dim=-1)
