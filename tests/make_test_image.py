"""Makes `test_image.jpg`, a darkroom at night: python tests/make_test_image.py.

1024 x 688 in 4:2:0: both sides are a whole number of MCUs (16 pixels), so it mirrors losslessly. It reads
"Safelight", so that a mirror image shows. The bytes depend on Pillow's version, the size in KB does not.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

WIDTH, HEIGHT = 1024, 688
KILOBYTES = 82
LAMP = (250, 190)


def glow() -> Image.Image:
    """The light of a red lamp on a wall: bright near it, dark in the far corner."""
    small = Image.new("RGB", (WIDTH // 8, HEIGHT // 8))
    for y in range(small.height):
        for x in range(small.width):
            away = ((x * 8 - LAMP[0]) ** 2 + (y * 8 - LAMP[1]) ** 2) / 90_000
            light = 1 / (1 + away)
            small.putpixel((x, y), (int(28 + 215 * light), int(12 + 62 * light**2), int(14 + 30 * light**3)))
    return small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def wall(picture: Image.Image, dice: random.Random) -> None:
    """Bricks, each of its own shade."""
    shade = Image.new("L", picture.size, 128)
    draw = ImageDraw.Draw(shade)
    for row in range(13):
        for column in range(-1, 12):
            x, y = column * 96 + (row % 2) * 48, row * 36
            draw.rectangle((x, y, x + 93, y + 33), fill=dice.randint(142, 186))
    picture.paste(ImageChops.multiply(picture, Image.merge("RGB", [shade.filter(ImageFilter.GaussianBlur(1))] * 3)))


def furniture(picture: Image.Image) -> None:
    """A lamp, drying prints, a table with trays, a bottle, a clock: nothing is where its mirror image would be."""
    draw = ImageDraw.Draw(picture)
    draw.line((LAMP[0], 0, LAMP[0], 120), fill=(20, 8, 8), width=5)
    draw.polygon(((190, 170), (310, 170), (280, 116), (220, 116)), fill=(40, 14, 14))
    draw.ellipse((208, 146, 292, 230), fill=(255, 120, 84))
    draw.ellipse((226, 160, 266, 200), fill=(255, 196, 160))
    draw.line((400, 92, 1024, 60), fill=(14, 8, 8), width=3)
    for at, (x, tilt) in enumerate(((470, 2), (640, -3), (810, 4))):
        paper = Image.new("RGBA", (118, 146), (214, 126, 112, 255))
        pen = ImageDraw.Draw(paper)
        pen.rectangle((9, 9, 108, 112), fill=(60, 22, 22, 255))
        pen.polygon(((9, 112), (50 + 20 * at, 40), (108, 112)), fill=(150, 66, 58, 255))
        pen.ellipse((74 - 22 * at, 20, 92 - 22 * at, 38), fill=(230, 150, 130, 255))
        turned = paper.rotate(tilt, expand=True, resample=Image.Resampling.BICUBIC)
        picture.paste(turned, (x, 88), turned)
    draw.ellipse((60, 300, 150, 390), fill=(180, 84, 74), outline=(20, 8, 8), width=6)
    draw.line((105, 345, 105, 316), fill=(20, 8, 8), width=5)
    draw.line((105, 345, 128, 352), fill=(20, 8, 8), width=5)
    draw.polygon(((0, 560), (1024, 520), (1024, 688), (0, 688)), fill=(46, 20, 16))
    for x, y, colour in ((90, 590, (120, 44, 40)), (360, 578, (150, 60, 40)), (630, 566, (96, 36, 48))):
        draw.polygon(((x, y), (x + 220, y - 9), (x + 240, y + 60), (x - 16, y + 70)), fill=(26, 12, 12))
        draw.polygon(((x + 14, y + 9), (x + 208, y + 1), (x + 224, y + 48), (x + 4, y + 57)), fill=colour)
    draw.rounded_rectangle((900, 400, 966, 560), 14, fill=(70, 26, 20))
    draw.rectangle((918, 366, 948, 404), fill=(52, 20, 16))
    draw.rectangle((900, 450, 966, 510), fill=(206, 130, 112))


def scene(grain_percent: int) -> Image.Image:
    """The whole picture, with the grain of a fast film."""
    dice = random.Random(82)
    picture = glow()
    wall(picture, dice)
    furniture(picture)
    font = ImageFont.load_default(92)
    draw = ImageDraw.Draw(picture)
    draw.text((364, 336), "Safelight", font=font, fill=(24, 8, 8))
    draw.text((360, 331), "Safelight", font=font, fill=(255, 176, 140))
    picture = picture.filter(ImageFilter.GaussianBlur(0.6))
    grain = Image.frombytes("L", (WIDTH, HEIGHT), dice.randbytes(WIDTH * HEIGHT)).filter(ImageFilter.GaussianBlur(0.8))
    grain = grain.point([128 + (value - 128) * grain_percent // 100 for value in range(256)])
    return ImageChops.add(picture, Image.merge("RGB", [grain] * 3), offset=-128)


def make() -> bytes:
    """A baseline 4:2:0 JPEG of `KILOBYTES`, with as much grain as that leaves room for."""
    for grain_percent in range(16, 0, -1):
        picture = scene(grain_percent)
        for quality in range(85, 74, -1):
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=quality, subsampling="4:2:0")
            if (len(out.getvalue()) + 512) // 1024 == KILOBYTES:
                return out.getvalue()
    raise SystemExit(f"no amount of grain makes a file of {KILOBYTES} KB")


if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("test_image.jpg").write_bytes(make())
