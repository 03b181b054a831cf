"""Shelf: the models of the local hub cache, listed, fetched and removed. Knows huggingface_hub."""

from dataclasses import dataclass

from d2f_runtime.models.hub import HubModel, fetch_description, fetch_one_by_one, fetch_weights
from d2f_stream.core.errors import MissingExtra, ModelNotFound

__all__ = ["Kept", "kept", "pull", "remove"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A repository in the cache: its id, and its size in bytes."""

    repo: str
    size: int


def kept() -> list[Kept]:
    """Return what the cache holds, by id; an empty list where there is no cache. Blocks.

    Raises:
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError as error:
        raise MissingExtra("the hub's cache", "huggingface_hub", "torch") from error
    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return sorted(
        (
            Kept(info.repo_id, info.size_on_disk)
            for info in found.repos
            if info.repo_type == "model"
        ),
        key=lambda item: item.repo.lower(),
    )


def pull(repo: str) -> str:
    """Fetch a repository's description and weights; return its folder. Blocks.

    huggingface_hub shows the progress. A connection that breaks is taken up in the middle of a
    file; what is interrupted goes on with the first file that is not whole.

    Raises:
        ModelNotFound: there is no such repository, or it is not within reach.
        MissingExtra: huggingface_hub is not installed.
    """
    model = HubModel(*repo.split("@", 1))
    folder = fetch_description(model)
    fetch_one_by_one(model, folder)
    fetch_weights(model, folder)
    return str(folder)


def remove(repo: str) -> int:
    """Delete a repository from the cache; return the bytes that became free. Blocks.

    Raises:
        ModelNotFound: the cache does not hold it.
        MissingExtra: huggingface_hub is not installed.
    """
    if repo not in {item.repo for item in kept()}:
        raise ModelNotFound(
            f"the cache holds no {repo}; `d2f-stream models list` shows what it has"
        )
    from huggingface_hub import constants, scan_cache_dir

    found = scan_cache_dir(constants.HF_HUB_CACHE)
    commits = [
        revision.commit_hash
        for info in found.repos
        if info.repo_id == repo and info.repo_type == "model"
        for revision in info.revisions
    ]
    plan = found.delete_revisions(*commits)
    plan.execute()
    return plan.expected_freed_size
