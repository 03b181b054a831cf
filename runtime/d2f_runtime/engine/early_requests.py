"""EarlyRequests: what was asked of an engine before its model was loaded."""

import logging
from collections.abc import Callable

from d2f_runtime.engine.limits import Limits
from d2f_runtime.engine.request import Request
from d2f_runtime.engine.stream import Stream, StreamId
from d2f_runtime.loaded_model import ModelParts
from d2f_stream.core.errors import D2FError

__all__ = ["EarlyRequests"]

logger = logging.getLogger("d2f_stream.engine")


class EarlyRequests:
    """Requests in order of arrival, until they become streams or are turned away."""

    def __init__(self) -> None:
        self._requests: dict[StreamId, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, stream_id: StreamId) -> bool:
        return stream_id in self._requests

    def add(self, request: Request) -> None:
        """Take a request on."""
        self._requests[request.id] = request

    def cancel(self, stream_id: StreamId) -> None:
        """End a request. Nothing happens where it is not, or not any more, among these."""
        request = self._requests.pop(stream_id, None)
        if request is not None:
            request.buffer.append(request.before.cancelled(stream_id))

    def start(self, parts: ModelParts, limits: Limits, add: Callable[[Stream], None]) -> None:
        """Make streams of all requests and add them; turn away those that are refused."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            try:
                add(request.stream(parts, limits))
            except D2FError as error:
                request.buffer.reject(error)
            except Exception as error:
                logger.exception("a request failed")
                request.buffer.reject(D2FError(f"the request failed: {error!r}"))

    def reject(self, error: D2FError) -> None:
        """Turn all requests away."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.buffer.reject(error)
