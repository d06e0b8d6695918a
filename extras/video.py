"""Moving pictures, frame by frame, in and out: videos, animations and numbered pictures.

    clip = open_clip(path)                            # .rate .count, see Clip
    for moment in clip.frames():                      # .image uint8 (H, W, 3) or None, .time
        ...
    with VideoWriter(file, clip.rate) as writer:      # an .mp4, H.264
        writer.add(image, moment.time)

Videos (.mp4 .mov .m4v .avi .mkv .webm .mpg) need PyAV, pip install av. Animations (.gif .webp .png)
are read and written by Pillow. A frame that is broken is a moment without an image, and what
comes after it is read all the same, where the format allows it. Sound is not kept.
"""

import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from data import BROKEN_PICTURE, DatasetError, read_picture
from extras.cli import UsageError
from extras.packages import import_package

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
ANIMATION_FORMATS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
# What FFmpeg may take a file for: no playlists, which name other files and addresses.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
ENCODERS = ("libx264", "mpeg4")                                   # the first that is there
USUAL_DURATION = 100                                              # ms, where a GIF says 0


@dataclass
class Moment:
    """A frame of a clip. image: uint8 (H, W, 3), or None where it is broken; time: seconds."""
    image: np.ndarray | None
    time: Fraction


class Clip:
    """path; rate: frames a second; count: frames, None where the file does not say."""

    def __init__(self, path, rate, count):
        self.path = Path(path)
        self.rate = rate
        self.count = count

    def frames(self):
        """Yield each Moment."""
        raise NotImplementedError


def open_clip(path, rate=None):
    """A video, an animation or a pattern of numbered pictures -> Clip. Raises DatasetError and
    UsageError."""
    path = Path(path)
    if is_pattern(path):
        return Sequence(path, rate)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return Video(path)
    return Animation(path)


# ---------------------------------------------------------------- videos

def import_av():
    """-> PyAV. Raises UsageError where it is not installed."""
    av = import_package("av", "videos need PyAV,")
    av.logging.set_level(av.logging.PANIC)                        # we say what is broken ourselves
    return av


class Video(Clip):
    def __init__(self, path):
        with self.open(path) as container:
            if not container.streams.video:
                raise DatasetError(f"{path}: there is no video in it")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            count = stream.frames
            if not count and container.duration:                  # of the latter: microseconds
                count = round(rate * container.duration / 1_000_000)
        super().__init__(path, Fraction(rate), count or None)

    @staticmethod
    def open(path):
        av = import_av()
        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
        try:
            return av.open(str(path), options=options)
        except FileNotFoundError:
            raise DatasetError(f"{path}: there is no such file") from None
        except (av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DatasetError(f"{path}: not a video that can be read ({reason})") from None

    def frames(self):
        av = import_av()
        time = Fraction(0)
        with self.open(self.path) as container:
            stream = container.streams.video[0]
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except av.FFmpegError:                            # from here on the file is broken
                    yield Moment(None, time)
                    return
                if packet is None:
                    return
                try:
                    decoded = packet.decode()
                except av.FFmpegError:
                    at = packet.pts * packet.time_base if packet.pts is not None else time
                    yield Moment(None, at)
                    continue
                for frame in decoded:
                    if frame.pts is not None:
                        time = frame.pts * frame.time_base
                    # What the decoder calls corrupt is pieces of other frames.
                    image = None if frame.is_corrupt else upright(frame)
                    yield Moment(image, time)
                    time += 1 / self.rate


def upright(frame):
    """PyAV's frame as a person sees it: turned as the camera was held -> uint8 (H, W, 3)."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4                     # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, quarters))


class VideoWriter:
    """Frames -> an .mp4 in an open binary file; each is shown at its own time.

    The first frame says the size. H.264 wants even sides: an odd one gets a repeated row or column.
    """

    def __init__(self, file, rate):
        self.av = import_av()
        self.container = self.av.open(file, "w", format="mp4")
        # A rate that was measured, 27000000/900229, has numbers that FFmpeg's 32 bits do not hold a
        # thousand times; that of television is 30000/1001.
        self.rate = Fraction(rate).limit_denominator(1001)
        self.stream = None
        self.time_base = 1 / (self.rate * 1000)                   # a thousandth of a frame
        self.last = -1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None and self.stream:
            self.container.mux(self.stream.encode())
        self.container.close()

    def start(self, height, width):
        codecs = self.av.codecs_available
        encoder = next(name for name in ENCODERS if name in codecs)
        self.stream = self.container.add_stream(encoder, rate=self.rate)
        self.stream.height = height
        self.stream.width = width
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = self.time_base

    def add(self, image, time):
        """image: uint8 (H, W, 3); time: seconds, later than the one before."""
        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        if self.stream is None:
            self.start(*image.shape[:2])
        frame = self.av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = max(round(time / self.time_base), self.last + 1)
        frame.time_base = self.time_base
        self.last = frame.pts
        self.container.mux(self.stream.encode(frame))


# ---------------------------------------------------------------- animations

def is_animation(path):
    """Is it a .gif, .webp or .png of more than one picture? False for what cannot be read."""
    kind = ANIMATION_FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        return False
    try:
        with Image.open(path, formats=[kind]) as picture:
            return getattr(picture, "n_frames", 1) > 1
    except BROKEN_PICTURE:
        return False


class Animation(Clip):
    """Its frames' durations are their own: `durations` in ms, filled while frames are read."""

    def __init__(self, path):
        self.kind = ANIMATION_FORMATS[path.suffix.lower()]
        with Image.open(path, formats=[self.kind]) as picture:
            count = picture.n_frames
            self.loop = picture.info.get("loop")                  # None: shown once
        self.durations = []
        super().__init__(path, None, count)

    def frames(self):
        self.durations = []
        time = Fraction(0)
        with Image.open(self.path, formats=[self.kind]) as picture:
            for i in range(self.count):
                try:
                    picture.seek(i)
                    image = np.array(picture.convert("RGB"))
                except (*BROKEN_PICTURE, EOFError):
                    yield Moment(None, time)
                    continue
                duration = picture.info.get("duration") or USUAL_DURATION
                self.durations.append(round(duration))
                yield Moment(image, time)
                time += Fraction(round(duration), 1000)


def write_animation(file, clip, images):
    """RGB arrays, an iterable, one for each duration of `clip` -> an animation of its format."""
    pictures = [Image.fromarray(image) for image in images]
    options = {"duration": clip.durations}
    if clip.loop is not None:
        options["loop"] = clip.loop
    first, *others = pictures
    first.save(file, format=clip.kind, save_all=True, append_images=others, **options)


# ---------------------------------------------------------------- numbered pictures

NUMBER = re.compile(r"%0?\d*d")                                   # %d or %04d, as in C


def is_pattern(path):
    return NUMBER.search(Path(path).name) is not None


class Sequence(Clip):
    """frames/shot_%04d.png: the pictures of these names, in the order of their numbers."""

    def __init__(self, path, rate):
        before, after = NUMBER.split(path.name, maxsplit=1)
        name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        found = {}
        if path.parent.is_dir():
            for file in path.parent.iterdir():
                match = name.fullmatch(file.name)
                if match:
                    found[int(match[1]), file.name] = file
        if not found:
            raise UsageError(f"{path}: there are no pictures of such names")
        self.files = [found[key] for key in sorted(found)]
        super().__init__(path, Fraction(rate), len(self.files))

    def frames(self):
        for i, file in enumerate(self.files):
            try:
                image = read_picture(file, upright=True)
            except DatasetError:
                image = None
            yield Moment(image, i / self.rate)


def sequence_name(path):
    """What results of a pattern are called: shot for frames/shot_%04d.png, frames for %04d.png."""
    name = NUMBER.split(path.stem, maxsplit=1)[0].rstrip("_-. ")
    return name or path.resolve().parent.name


def count_up():
    """000001, 000002, ...: the names of a clip's frames."""
    for i in itertools.count(1):
        yield f"{i:06d}"
