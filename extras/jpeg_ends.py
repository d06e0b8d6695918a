"""Is a JPEG whole? libjpeg paints what is missing in grey, and Pillow passes that on in silence.

    if lacks_its_end(path): ...

A file that was cut off has no end marker, and Pillow refuses it. One that was cut and then given an
end marker (a download, a repair tool, a frame out of a broken film) decodes without a word. Two
things give it away:

    the scans       a progressive file tells its coefficients in several passes over the picture,
                    from coarse to fine. In a whole one each coefficient is told to its last bit.
    more bytes      put before the end marker, they change nothing in a whole file, since nobody
                    reads on once all blocks are there; in a cut one they are decoded as blocks.

The second needs the file decoded twice. For a file of one scan it is needed only where its last
block is the grey of blocks that are not there. For a progressive one it is left to `thorough`: what
the first cannot see is a cut in the very last scan, which costs no more than the last bit of some
coefficients.

Reference
  ITU-T Recommendation T.81, 1992: annex B (markers, scans), annex G (progressive)
"""

import io
import re

import numpy as np
from PIL import Image

GREY = (127, 128)                                                 # 127: of CMYK, which is turned
START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}                   # of the kinds that Pillow reads
START_OF_SCAN = 0xDA
END_OF_IMAGE = 0xD9
# In a scan 0xFF is followed by 0 (a plain 0xFF), by D0 to D7 (a restart), or by more 0xFF, which
# fill up the room before a marker.
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
MORE_BYTES = bytes(range(1, 128))


def lacks_its_end(path, thorough=False):
    """Is the JPEG at `path`, or in an io.BytesIO, cut? Raises what Pillow does for a broken one, or
    IndexError."""
    content = read_content(path)
    components, scans, end = read_scans(content)
    if end is None or not tells_all_bits(components, scans):
        return True
    if thorough:
        return reads_on(content, end)
    if len(scans) > 1:
        return False
    return ends_grey(decode(content, smallest=True)) and reads_on(content, end)


def read_content(path):
    if isinstance(path, io.BytesIO):
        return path.getvalue()
    with open(path, "rb") as file:
        return file.read()


def ends_grey(picture):
    """Is the last pixel of a PIL picture the grey of a block that is not there?"""
    last = picture.getpixel((picture.width - 1, picture.height - 1))
    channels = last if isinstance(last, tuple) else (last,)
    return all(channel in GREY for channel in channels)


def reads_on(content, end):
    """Does the picture change when there are more bytes before the end marker at `end`?"""
    longer = content[:end].rstrip(b"\xff") + MORE_BYTES + content[end:]
    try:
        changed = decode(longer)
    except (OSError, ValueError, SyntaxError):                    # they are read, and are no blocks
        return True
    return not np.array_equal(np.asarray(changed), np.asarray(decode(content)))


def decode(content, smallest=False):
    """-> PIL's picture; `smallest`: at an eighth of its size, in half of the time."""
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
        if smallest:
            picture.draft(picture.mode, (1, 1))
        picture.load()
        return picture.copy()


# ---------------------------------------------------------------- the scans

def read_scans(content):
    """-> (the picture's components, [scan], the place of the end marker or None).

    A scan is (its components, the first coefficient, the last, the lowest bit told).
    """
    components = ()
    scans = []
    place = 2                                                     # after the start marker
    while True:
        found = NEXT_MARKER.search(content, place)
        if found is None:
            return components, scans, None
        marker = content[found.end() - 1]
        if marker == END_OF_IMAGE:
            return components, scans, found.start()
        start = found.end()
        length = int.from_bytes(content[start:start + 2], "big")
        segment = content[start + 2:start + length]
        if marker in START_OF_FRAME:
            components = tuple(segment[6::3])
        elif marker == START_OF_SCAN:
            scans.append(read_scan(segment))
        place = start + max(length, 2)                            # over a segment, into a scan


def read_scan(header):
    """A scan's header, after its length: how many components, two bytes each, three numbers."""
    count = header[0]
    components = header[1:1 + 2 * count:2]
    first, last, bits = header[1 + 2 * count:4 + 2 * count]
    return tuple(components), first, last, bits & 15


def tells_all_bits(components, scans):
    """Is each of the 64 coefficients of each component told to its last bit?"""
    told = {component: set() for component in components}
    for scanned, first, last, lowest_bit in scans:
        for component in scanned:
            if lowest_bit == 0:
                told.setdefault(component, set()).update(range(first, last + 1))
    return all(len(coefficients) == 64 for coefficients in told.values())
