"""Engines on other machines: an engine over a Ray Serve deployment, and that deployment.

`app` is what `serve run` and Serve's config files name: `d2f_stream.cluster:app`. Ray is imported
with it only. docs/cluster.md tells how the parts fit together.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2f_stream.cluster.deployment import app

__all__ = ["app"]


def __getattr__(name: str) -> object:
    if name == "app":
        from d2f_stream.cluster.deployment import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
