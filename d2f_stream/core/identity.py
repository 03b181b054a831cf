"""ModelIdentity: what tells a model, and what its answers depend on, from every other one."""

import msgspec

__all__ = ["ModelIdentity"]


class ModelIdentity(msgspec.Struct, frozen=True):
    """Which model it is. Two that have the same digest go on with each other's answers.

    Attributes:
        name: for people.
        digest: of its files, its quantization and the parameters that requests leave open, in hex.
    """

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} (version {self.digest})"
