"""python -m d2f_export.distill: the same as `d2f-stream distill`, for accelerate's launcher."""

import sys

from d2f_export.distill.command import main
from d2f_stream.core.errors import D2FError

if __name__ == "__main__":
    try:
        main(prog="python -m d2f_export.distill")
    except D2FError as error:
        sys.exit(f"error: {error}")
