"""Small photographs of two plain colours, which a net tells apart within a few updates."""

from pathlib import Path

from PIL import Image


def write_plain_photos(folder: Path, *, train: int, val: int = 4) -> Path:
    """Writes `train` and `val` photographs of 40 x 30 pixels for each of two classes; returns the folder."""
    for split, count in (("train", train), ("val", val)):
        for name, color in (("blue", (20, 40, 200)), ("red", (200, 30, 20))):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                shade = tuple(min(255, channel + 3 * number) for channel in color)
                Image.new("RGB", (40, 30), shade).save(place / f"{number:03d}.jpg")
    return folder
