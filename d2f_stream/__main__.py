"""python -m d2f_stream: the same as the command d2f-stream."""

import sys

from d2f_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
