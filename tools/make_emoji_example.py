"""Chooses the pictures of the example `sana-emoji` from the npm package @lobehub/fluent-emoji-3d 1.1.0 (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    python tools/make_emoji_example.py lobehub-fluent-emoji-3d-1.1.0.tgz

The files are copied byte for byte (256 px WebP with alpha); only their names are ours: they are the captions.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "simpletuner" / "examples" / "sana_emoji" / "fluent_emoji"
CAPTION = "a 3d emoji of {}"

PICTURES = {
    "1f34e": "a red apple",
    "1f34b": "a yellow lemon",
    "1f353": "a strawberry",
    "1f349": "a slice of watermelon",
    "1f352": "two cherries",
    "1f347": "a bunch of grapes",
    "1f951": "half an avocado",
    "1f966": "a green broccoli",
    "1f955": "an orange carrot",
    "1f344": "a red mushroom",
    "1f369": "a chocolate doughnut",
    "1f354": "a hamburger",
    "1f355": "a slice of pizza",
    "1f436": "a dog face",
    "1f431": "an orange cat face",
    "1f437": "a pink pig face",
    "1f438": "a green frog face",
    "1f427": "a penguin",
    "1f98a": "a fox face",
    "1f43c": "a panda face",
    "1f422": "a green turtle",
    "1f33b": "a sunflower",
    "1f339": "a red rose",
    "1f335": "a green cactus",
    "2b50": "a yellow star",
    "1f525": "a flame",
    "1f3c0": "an orange basketball",
    "1f388": "a red balloon",
    "1f680": "a rocket",
    "1f697": "a red car",
    "1f451": "a golden crown",
    "1f48e": "a blue gem",
}
"""Code point -> what the picture shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="lobehub-fluent-emoji-3d-1.1.0.tgz")
    with tarfile.open(parser.parse_args().package) as package:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for code_point, noun in PICTURES.items():
            member = package.extractfile(f"package/assets/{code_point}.webp")
            assert member is not None, f"{code_point} is no file of the package"
            name = CAPTION.format(noun).replace(" ", "_")
            (FOLDER / f"{name}.webp").write_bytes(member.read())


if __name__ == "__main__":
    main()
