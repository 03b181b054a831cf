import csv
import struct
from pathlib import Path

import pytest

from d2f_stream.core.params import GenerationParams
from lab.ablations.__main__ import main
from lab.bench.sweep import COLUMNS
from lab.bench.sweep_grid import SYSTEMS, Grid, settings_of

pytest.importorskip("matplotlib")


def table(path: Path, *, timed: bool) -> Path:
    """A row for every setting of every system, with made-up figures."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, setting in enumerate(settings_of(Grid(), SYSTEMS), 1):
            params = GenerationParams().with_overrides(setting.overrides)
            row = {name: getattr(params, name, "") for name in COLUMNS}
            row |= {"model": "tiny", "task": "sums", "system": setting.system}
            row |= {"num_problems": 50, "score": 0.9, "tokens_per_step": number}
            writer.writerow({**row, "tokens_per_s": 10 * number if timed else ""})
    return path


def size_of(picture: Path) -> tuple[int, ...]:
    return struct.unpack(">II", picture.read_bytes()[16:24])


def test_every_system_is_drawn_and_speed_gets_its_own_panel(tmp_path: Path) -> None:
    sizes = []
    for timed in (False, True):
        source, picture = table(tmp_path / "sweep.csv", timed=timed), tmp_path / "sweep.png"
        main(["plot", str(source), "--output", str(picture)])
        sizes.append(size_of(picture))
    (narrow, height), (wide, same) = sizes
    assert (wide, same) == (2 * narrow, height)
