"""ConversationRouter: which replica Ray Serve gives a call to. Runs wherever a handle is.

Not Serve's own consistent hashing, which knows no load short of a full replica, nor its mixin for
the order of waiting calls, which gives a replica that was found for one to another. Serve pickles
this module by value.
"""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from d2f_stream.cluster.conversations import IN_DOUBT, home_of

__all__ = ["ConversationRouter"]


class ConversationRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Gives a conversation's calls to its home, and others to the emptier of two replicas.

    Serve tells it only of replicas that are neither dead nor draining.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return whom to try: the first group that has room gets the call, its emptiest member."""
        if not candidate_replicas:
            return []
        by_load = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [by_load]
        pending_request.routing_context.should_backoff = True  # or Serve asks again without a pause
        key = pending_request.metadata.session_id
        if key == IN_DOUBT:
            for replica in candidate_replicas:  # Serve asks those of which it knows nothing
                self.replica_queue_len_cache.invalidate_key(replica.replica_id)
        if key in ("", IN_DOUBT):
            return [by_load]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # What this process has not heard of for 10 s counts as idle; Serve asks before it sends.
        loads = {
            name: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for name, replica in replicas.items()
        }
        home = home_of(key, loads)
        return [by_load] if home is None else [[replicas[home]], by_load]
