"""Pictures from strangers: thousands of damaged files of each format, none of which may crash or
hang. Each is read, or refused in one sentence that names it.

    python tests/fuzz_pictures.py             # 2,000 of each format, seed 0; prints how they ended
    python tests/fuzz_pictures.py --count 20  # what the tests run

A file is damaged as in tests/fuzz.py; in half of the cases some bytes of its head are replaced too,
and the checksums of a PNG are made right again, so that the damage gets past them. Each is read as
a frame, as a label and as a photo, and looked at as a run's start does.
"""

import collections
import io
import struct
import sys
import tempfile
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from fuzz import mutate, parse_args  # noqa: E402

from data import DatasetError, measure_picture, read_picture  # noqa: E402  (after the path is set)
from extras.data_checks import check_end  # noqa: E402

HEAD = 400                                                        # bytes
SIZE = (120, 90)


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def make_originals():
    """-> {name: bytes of a good file}"""
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 6, SIZE[0] // 6, 3))
    scene = Image.fromarray(noise.astype(np.uint8)).resize(SIZE, Image.Resampling.BILINEAR)
    ids = (np.arange(SIZE[0] * SIZE[1]) % 12).astype(np.uint8).reshape(SIZE[1], SIZE[0])
    label = Image.fromarray(ids)
    with_palette = label.convert("P")
    with_palette.putpalette(list(range(36)))
    exif = Image.Exif()
    exif[0x0112] = 6                                              # turned by the camera
    exif[0x010E] = "x" * 300                                      # a description
    return {
        "JPEG": encode(scene, "JPEG"),
        "JPEG, progressive": encode(scene, "JPEG", progressive=True),
        "JPEG with EXIF": encode(scene, "JPEG", exif=exif),
        "two JPEGs in one": encode(scene, "MPO", save_all=True, append_images=[scene]),
        "PNG": encode(scene, "PNG"),
        "PNG of ids": encode(label, "PNG"),
        "PNG with a palette": encode(with_palette, "PNG", bits=4),
        "WebP": encode(scene, "WEBP"),
        "BMP": encode(scene, "BMP"),
        "TIFF": encode(scene, "TIFF"),
    }


def damage(content, rng):
    """bytes -> bytes, damaged."""
    data = bytearray(mutate(content, rng))
    if data and rng.random() < 0.5:
        for _ in range(3):
            data[int(rng.integers(min(len(data), HEAD)))] = int(rng.integers(256))
    if content.startswith(b"\x89PNG") and rng.random() < 0.5:
        mend_checksums(data)
    return bytes(data)


def mend_checksums(data):
    """Make the checksum of each chunk of a PNG right, as far as its chunks can be followed."""
    place = 8
    while place + 12 <= len(data):
        length, = struct.unpack(">I", data[place:place + 4])
        end = place + 8 + length
        if end + 4 > len(data):
            return
        data[end:end + 4] = struct.pack(">I", zlib.crc32(data[place + 4:end]))
        place = end + 4


READERS = (                                                       # path -> anything
    read_picture,
    partial(read_picture, mode="ids"),
    partial(read_picture, mode="ids or colours"),
    partial(read_picture, upright=True),
    measure_picture,
)


def try_to_read(path):
    """-> "read" where any way to read it works, else "refused"; any other error than a DatasetError
    in one sentence goes on."""
    end = "refused"
    for read in READERS:
        try:
            read(path)
        except DatasetError as error:
            message = str(error)
            assert path.name in message and len(message) < 2000, message
        else:
            end = "read"
    try:
        check_end(path)
    except DatasetError as error:
        assert path.name in str(error)
    return end


def main():
    args = parse_args(__doc__.splitlines()[0])
    warnings.simplefilter("ignore")                               # Pillow's, of odd metadata
    with tempfile.TemporaryDirectory() as folder:
        for name, content in make_originals().items():
            path = Path(folder) / "damaged.png"
            path.write_bytes(content)
            assert try_to_read(path) == "read", name
            rng = np.random.default_rng(args.seed)
            ends = collections.Counter()
            slowest = 0
            for _ in range(args.count):
                path.write_bytes(damage(content, rng))
                start = time.perf_counter()
                ends[try_to_read(path)] += 1
                slowest = max(slowest, time.perf_counter() - start)
            print(f"{name:<20}{args.count} files: {ends['read']} read, {ends['refused']} refused; "
                  f"slowest {slowest:.2f} s", flush=True)


if __name__ == "__main__":
    main()
