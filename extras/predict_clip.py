"""A video, an animation or numbered pictures, segmented frame by frame: for `extras.predict`."""

import sys
from dataclasses import dataclass, field
from fractions import Fraction

from data import DatasetError
from extras.cli import show_progress
from extras.outputs import output_below
from extras.predict import check_size
from extras.video import Animation, VideoWriter, count_up, open_clip, write_animation
from extras.view_flags import describe_protocol

USUAL_RATE = Fraction(25)                                         # of numbered pictures


@dataclass
class Tally:
    """Frames met, and the times (seconds) of those that were broken."""
    met: int = 0
    broken: list = field(default_factory=list)


def segment_clip(segmenter, item):
    """Write the overlay of a clip, and with --frames its ids; print a line. -> [a sentence, where
    frames are broken]. Raises DatasetError and UsageError."""
    clip = open_clip(item.path, segmenter.args.fps or USUAL_RATE)
    tally = Tally()
    moments = overlays(segmenter, item, clip, tally)
    first = next(moments, None)                                   # nothing is written without one
    if first is None:
        raise DatasetError(f"{item.path}: none of its frames can be read")
    with output_below(segmenter.out, item.overlay) as file:
        if isinstance(clip, Animation):
            images = [first[0], *(image for image, _ in moments)]
            write_animation(file, clip, images)
        else:
            with VideoWriter(file, clip.rate) as writer:
                writer.add(*first)
                for image, time in moments:
                    writer.add(image, time)

    done = tally.met - len(tally.broken)
    speed = f", {float(clip.rate):g} a second" if clip.rate else ""
    print(f"{item.path}: {done} of {tally.met} frames segmented{speed}"
          f"{describe_protocol(segmenter.args)}: {segmenter.out / item.overlay}")
    if clip.count and tally.met < 0.95 * clip.count - 1:          # the count may be an estimate
        print(f"note: {item.path} says that it has {clip.count} frames, and {tally.met} were "
              f"found: it may be cut off", file=sys.stderr)
    if not tally.broken:
        return []
    return [f"{item.path}: {len(tally.broken)} frames cannot be read, first at "
            f"{float(tally.broken[0]):.2f} s"]


def overlays(segmenter, item, clip, tally):
    """Yield (overlay (H, W, 3), time) of each frame that can be read."""
    progress = show_progress(item.path.name)
    size = None
    for name, moment in zip(count_up(), clip.frames(), strict=False):
        tally.met += 1
        progress(tally.met, clip.count)
        image = moment.image
        if image is not None and size is None:
            check_size(image, item.path)
            size = image.shape
        if image is None or image.shape != size:                  # a video has one size
            tally.broken.append(moment.time)
            continue
        classes = segmenter.classes_of(image, item.path)
        if segmenter.args.frames:
            segmenter.write_ids(f"{item.name}/{name}.png", classes)
        yield segmenter.overlay_of(image, classes), moment.time
