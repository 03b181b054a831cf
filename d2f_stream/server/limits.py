"""What a server takes on: bounds on messages, answers, streams and rates. Pure values.

Every refusal is a LimitExceeded that names the limit and the value.
"""

from dataclasses import dataclass

from d2f_stream.core.errors import RateLimited

__all__ = ["RateLimit", "ServeLimits"]


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """Bounds of one server.

    Attributes:
        max_message_bytes: of one incoming message or HTTP body.
        max_prompt_tokens: of one request; None leaves it to the model.
        max_new_tokens: of one answer; None leaves it to the model.
        max_streams: streams that run or wait at once.
        max_streams_per_client: of those, with one client's token; None is no bound of its own.
        max_streams_per_connection: streams that one connection reads at once.
        max_sockets: connections at once, of all kinds; fewer where the process may open fewer
            files.
        max_connections: of all, websockets.
        max_connections_per_client: of those, with one client's token; None is no bound of its own.
        max_idle_connections: of all, those that have not sent a whole request, and those that wait
            for the next one: the oldest such is closed for a new one.
        max_unauthenticated: websockets at once that have not shown their token yet: the oldest is
            closed for a new one.
        max_failed_logins: wrong tokens on one connection before it is closed.
        requests_per_minute: of one client; None is no bound.
        max_running: streams that the engine works on at once; the others wait, and clients take
            turns.
        max_running_per_client: of those, with one client's token, so that the next client finds
            room; None is three quarters.
        max_running_tokens: prompt and `max_new_tokens`, summed over all streams that run or wait.
        max_running_tokens_per_client: of those, with one client's token; None is three quarters.
            It does not bind a client's only stream.
        max_retained_bytes: of the streams that have ended and can still be resumed; the oldest of
            the client who has most go first.
        resume_ttl_s: how long a stream can be resumed after its end, seconds.
        stall_timeout_s: how long a reader may not take what is sent to it, seconds.
        auth_timeout_s: how long a connection may take to authenticate, seconds.
        max_bad_messages: messages of one connection that cannot be read before it is closed.
    """

    max_message_bytes: int = 256 * 1024
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_streams: int = 1024
    max_streams_per_client: int | None = 512
    max_streams_per_connection: int = 64
    max_running: int = 64
    max_running_per_client: int | None = None
    max_sockets: int = 2048
    max_connections: int = 1024
    max_connections_per_client: int | None = 512
    max_idle_connections: int = 256
    max_unauthenticated: int = 64
    max_failed_logins: int = 3
    requests_per_minute: int | None = None
    max_running_tokens: int = 4_000_000
    max_running_tokens_per_client: int | None = None
    max_retained_bytes: int = 8 * 1024 * 1024
    resume_ttl_s: float = 300.0
    stall_timeout_s: float = 30.0
    auth_timeout_s: float = 10.0
    max_bad_messages: int = 16

    @property
    def running_share(self) -> int:
        """Streams of one client that the engine works on at once."""
        return _share_of(self.max_running, self.max_running_per_client)

    @property
    def token_share(self) -> int:
        """Tokens that the streams of one client may take together."""
        return _share_of(self.max_running_tokens, self.max_running_tokens_per_client)


def _share_of(most: int, given: int | None) -> int:
    """Return what one client may have, so that the next one finds room."""
    return max(1, most * 3 // 4) if given is None else given


class RateLimit:
    """A token bucket per client: `per_minute` requests at once, refilled evenly.

    Pure: the caller brings the time, in seconds of any monotonic clock.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # client -> (left, when)

    def take(self, client: str, now_s: float) -> None:
        """Count one request.

        Raises:
            RateLimited: the client has used its requests up; the sentence says when the next may
                come, and `retry_after_s` of the error holds it.
        """
        if self._per_minute is None:
            return
        left, then = self._buckets.get(client, (float(self._per_minute), now_s))
        left = min(float(self._per_minute), left + (now_s - then) * self._per_minute / 60)
        if left < 1:
            self._buckets[client] = (left, now_s)
            wait_s = (1 - left) * 60 / self._per_minute
            error = RateLimited(
                f"the limit of {self._per_minute} requests a minute is used up; "
                f"try again in {wait_s:.1f} s"
            )
            error.retry_after_s = wait_s
            raise error
        self._buckets[client] = (left - 1, now_s)
        if len(self._buckets) > 10_000:
            self._drop_full(now_s)

    def _drop_full(self, now_s: float) -> None:
        assert self._per_minute is not None
        self._buckets = {
            client: (left, then)
            for client, (left, then) in self._buckets.items()
            if left + (now_s - then) * self._per_minute / 60 < self._per_minute
        }
