"""System errors: what the system says of a file or a disk, without Python's own words."""

__all__ = ["sentence_of"]


def sentence_of(error: OSError) -> str:
    """Return the system's sentence, with the file where it is about one."""
    if error.strerror is None:  # of a library, with a text of its own
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
