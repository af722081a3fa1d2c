"""Makes docs/pictures/learning.webp, what a run of the example learned: its gallery over the steps, a prompt a column.

    simpletuner train example=sana-emoji
    python tools/make_learning_picture.py output/sana-emoji

From top to bottom: the base model, each gallery of the run, and the picture that was trained on (none for the new prompts).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from make_emoji_example import FOLDER
from PIL import Image

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "learning.webp"
EDGE_PX = 64
COLUMNS = 14
"""The first prompts of the gallery: a dozen pictures that are learned, and two that are not among them."""
PAINTED = re.compile(r"step_(?P<step>\d+)_.+_(?P<index>\d+)_\d+x\d+\.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's output folder")
    run = parser.parse_args().run
    rows: dict[int, dict[int, Path]] = {}
    for path in [*(run / "benchmark").iterdir(), *(run / "validation").iterdir()]:
        named = PAINTED.fullmatch(path.name)
        assert named, f"{path} is no picture of a gallery"
        if int(named["index"]) < COLUMNS:
            rows.setdefault(int(named["step"]), {})[int(named["index"])] = path
    last = rows[max(rows)]
    strip = Image.new("RGB", (len(last) * EDGE_PX, (len(rows) + 1) * EDGE_PX), "white")
    for row, step in enumerate(sorted(rows)):
        for index, path in rows[step].items():
            strip.paste(Image.open(path), (index * EDGE_PX, row * EDGE_PX))
    for index, path in last.items():
        trained = FOLDER / f"{Image.open(path).info['prompt'].replace(' ', '_')}.webp"
        if trained.is_file():
            picture = Image.open(trained).convert("RGBA").resize((EDGE_PX, EDGE_PX), Image.Resampling.LANCZOS)
            strip.paste(picture, (index * EDGE_PX, len(rows) * EDGE_PX), picture)
    strip.save(TARGET, quality=90, method=6)


if __name__ == "__main__":
    main()
