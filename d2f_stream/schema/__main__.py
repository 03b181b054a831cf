"""Command that writes the documents: `python -m d2f_stream.schema [FOLDER]`, by default here."""

import sys
from pathlib import Path

from d2f_stream.schema.documents import documents

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
for name, text in documents().items():
    (folder / name).write_text(text, encoding="utf-8")
