"""OnnxSlot: one session's K/V on onnxruntime's device, and the bindings of graphs to them.

A graph reads the cached columns where they lie and writes the window's new K/V right behind them,
so that caching is counting and nothing is copied. A run of a small model takes a few milliseconds,
so what stays the same from step to step stays bound: the cache is bound in multiples of some
tokens, new K/V while the window is at the same place. Where rows are to be computed alike in every
window, exactly what is cached is bound: a key then has the same column as long as it is seen, and a
row's sums have one order.

Shapes: W window, P columns of the cache that are bound, L layers, KV key/value heads, hd head size,
D hidden size.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from d2f_runtime.backends.onnx_session import StepSession
from d2f_runtime.backends.rows import Floats
from d2f_runtime.models.manifest import Manifest

__all__ = ["ALIKE_ROWS", "OnnxSlot"]

PAST_STEP: Final = 32  # tokens
ALIKE_ROWS: Final = 2  # of one alone, CPU kernels add up in another order
ALIGNED: Final = 4  # columns of past and window; of others CUDA's fused attention takes no mask

Array = npt.NDArray[Any]


@dataclass(slots=True)
class _Binding:
    """What one graph has bound."""

    io: Any
    past: int = -1  # columns
    place: tuple[int, int] = (-1, -1)  # start and width of the new K/V
    kept: int = -1  # which of the two states is the output


@dataclass(slots=True, init=False)
class OnnxSlot:
    """Storage for `capacity` tokens.

    Attributes:
        capacity: tokens that may be cached.
        num_cached: tokens.
    """

    capacity: int
    num_cached: int
    _manifest: Manifest
    _alike: bool
    _device: tuple[str, int]
    _dtype: Any
    _rows: int
    _cache: list[ort.OrtValue]
    _states: tuple[ort.OrtValue, ort.OrtValue]
    _current: int
    _bindings: dict[int, _Binding]

    def __init__(
        self, capacity: int, session: StepSession, manifest: Manifest, *, alike: bool = False
    ) -> None:
        self.capacity, self.num_cached = capacity, 0
        self._manifest, self._device, self._alike = manifest, session.device, alike
        self._dtype = session.dtype
        self._bindings = {}
        self._current = 0
        state = np.zeros((1, manifest.transformer.hidden_size), self._dtype)
        self._states = (self._placed(state), self._placed(state.copy()))
        self._rows = capacity + (ALIKE_ROWS - 1 if alike else 0)
        if session.fixed is not None:  # it reads all its columns and writes all its rows
            self._rows = session.fixed.capacity + session.fixed.width
        self._cache = self._reserved()

    def bind(
        self, session: StepSession, start: int, width: int, host: dict[str, Array], answers: Floats
    ) -> Any:
        """Return the binding for a run; inputs and outputs must outlive it.

        Args:
            session: of the graph.
            start: of the window.
            width: of the window as the graph sees it.
            host: the inputs that are no K/V, by name.
            answers: [4, 1, R], gets the proposals.
        """
        binding = self._bindings.get(id(session))
        if binding is None:
            binding = self._bindings[id(session)] = _Binding(session.session.io_binding())
        for name, array in host.items():
            binding.io.bind_cpu_input(name, array)
        self._bind_past(binding, session, start, width)
        self._bind_new(binding, start, width)
        if self._manifest.shift_logits:
            self._bind_state(binding)
        address = answers.ctypes.data
        binding.io.bind_output("proposals", "cpu", 0, np.float32, answers.shape, address)
        return binding.io

    def read(self, session: StepSession, start: int) -> dict[str, Array]:
        """Return the inputs that `bind` leaves on the device, on the host."""
        stop = start if session.fixed is None else session.fixed.capacity
        parts = zip(self._places(0), self._cache, strict=True)
        found = {f"past.{name}": value.numpy()[None, :stop] for (name, _), value in parts}
        if self._manifest.shift_logits:
            found["last_hidden"] = self._states[self._current].numpy()
        return found

    def keep(self, start: int, num_to_cache: int) -> None:
        """Count the first rows of the window that the last run wrote as cached."""
        if num_to_cache:
            self._current = 1 - self._current
        self.num_cached = start + num_to_cache

    def copy_from(self, other: "OnnxSlot", num_tokens: int) -> None:
        """Store the first tokens of another slot here, too; by way of the host."""
        assert num_tokens <= min(other.num_cached, self.capacity), "more than is stored, or fits"
        for mine, theirs in zip(self._cache, other._cache, strict=True):
            values = mine.numpy().copy()
            values[:num_tokens] = theirs.numpy()[:num_tokens]
            mine.update_inplace(values)
        self.num_cached = num_tokens

    def _reserved(self) -> list[ort.OrtValue]:
        """Make room for all K/V. Zeros: rows that are bound but unused must be finite."""
        number, shape = 2 * self._manifest.transformer.num_layers, (self._rows, self._width)
        values: list[ort.OrtValue] = []
        for index in range(number):
            if index and self._device[0] != "cpu":
                values.append(self._copied(values[0]))  # cheaper than sending zeros
            else:
                values.append(self._placed(np.zeros(shape, self._dtype)))
        return values

    def _placed(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, *self._device)

    def _copied(self, value: ort.OrtValue) -> ort.OrtValue:
        """Copy from device to device."""
        shape = value.shape()
        other = ort.OrtValue.ortvalue_from_shape_and_type(shape, self._dtype, *self._device)
        other.update_inplace(value)
        return other

    @property
    def _width(self) -> int:
        shape = self._manifest.transformer
        return shape.num_kv_heads * shape.head_dim

    def _places(self, row: int) -> list[tuple[str, int]]:
        """Return the name of each layer's keys and values, and the address of their row."""
        offset = row * self._width * np.dtype(self._dtype).itemsize
        names = (f"{i}.{x}" for i in range(self._manifest.transformer.num_layers) for x in "kv")
        parts = zip(names, self._cache, strict=True)
        return [(name, value.data_ptr() + offset) for name, value in parts]

    def _num_columns(self, start: int, width: int) -> int:
        """Return how many columns to bind: the cached ones and some more, which `start` masks."""
        if self._alike:
            return start
        rounded = -(-start // PAST_STEP) * PAST_STEP + -width % ALIGNED
        if rounded > self._rows:
            rounded = start + -(start + width) % ALIGNED
        return min(rounded, self._rows)

    def _bind_past(self, binding: _Binding, session: StepSession, start: int, width: int) -> None:
        stop = self._num_columns(start, width)
        if session.fixed is not None:
            stop = session.fixed.capacity
        if binding.past == stop:
            return
        shape = (1, stop, self._width)
        for name, address in self._places(0):
            binding.io.bind_input(f"past.{name}", *self._device, self._dtype, shape, address)
        binding.past = stop

    def _bind_new(self, binding: _Binding, start: int, width: int) -> None:
        if binding.place == (start, width):
            return
        shape = (1, width, self._width)
        for name, address in self._places(start):
            binding.io.bind_output(f"new.{name}", *self._device, self._dtype, shape, address)
        binding.place = (start, width)

    def _bind_state(self, binding: _Binding) -> None:
        """Let the run read the current state and write the other one."""
        other = 1 - self._current
        if binding.kept == other:
            return
        shape = (1, self._manifest.transformer.hidden_size)
        last, kept = self._states[self._current].data_ptr(), self._states[other].data_ptr()
        binding.io.bind_input("last_hidden", *self._device, self._dtype, shape, last)
        binding.io.bind_output("kept", *self._device, self._dtype, shape, kept)
        binding.kept = other
