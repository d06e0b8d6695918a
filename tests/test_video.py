"""Videos, animations and numbered pictures: segmented frame by frame, and what is broken."""

import re
import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

import extras.cli
from conftest import command
from extras.video import VideoWriter, open_clip

with_av = pytest.mark.skipif("not __import__('importlib').util.find_spec('av')",
                             reason="PyAV (av) is not installed")


def predict_command(*args, code=0):
    return command("-m", "extras.predict", *args, code=code)


def frame(i, size=(48, 64)):
    """A picture with a bar that moves."""
    pixels = np.full((*size, 3), 40, np.uint8)
    pixels[:, 4 * i:4 * i + 8] = (200, 120, 60)
    return pixels


def write_video(path, frames=12, rate=Fraction(30000, 1001), size=(48, 64)):
    with open(path, "w+b") as file, VideoWriter(file, rate) as writer:
        for i in range(frames):
            writer.add(frame(i, size), i / rate)


def read_frames(path):
    """-> (frames (H, W, 3), times in seconds, average rate)"""
    import av
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        pixels = [one.to_ndarray(format="rgb24") for one in decoded]
        return pixels, [float(one.pts * one.time_base) for one in decoded], stream.average_rate


# ---------------------------------------------------------------- videos

@with_av
def test_a_video_keeps_its_frames_and_rate(checkpoint, tmp_path):
    write_video(tmp_path / "drive.mp4")
    out = tmp_path / "out"
    output = predict_command(checkpoint, tmp_path / "drive.mp4", "--out", out, "--frames")
    assert "drive.mp4: 12 of 12 frames segmented, 29.97 a second" in output
    assert sorted(p.name for p in out.iterdir()) == ["drive", "drive_overlay.mp4"]
    pixels, times, rate = read_frames(out / "drive_overlay.mp4")
    assert len(pixels) == 12 and pixels[0].shape == (48, 64, 3)
    assert abs(rate - Fraction(30000, 1001)) < 0.01
    assert np.allclose(times, np.arange(12) * 1001 / 30000, atol=1e-3)

    ids = sorted((out / "drive").iterdir())
    assert [p.name for p in ids[:2]] == ["000001.png", "000002.png"] and len(ids) == 12
    from data import distinct_colours
    from extras.pictures import overlay
    original = read_frames(tmp_path / "drive.mp4")[0][3]
    expected = overlay(original, np.asarray(Image.open(ids[3])), distinct_colours(3))
    difference = np.abs(expected.astype(int) - pixels[3])
    assert difference.mean() < 12                                 # H.264 loses some


@with_av
def test_frames_keep_their_own_times(tmp_path):
    with open(tmp_path / "x.mp4", "w+b") as file, VideoWriter(file, Fraction(10)) as writer:
        for i, time in enumerate((0, 0.1, 0.5, 0.6)):
            writer.add(frame(i), Fraction(time).limit_denominator(10))
    clip = open_clip(tmp_path / "x.mp4")
    assert [float(moment.time) for moment in clip.frames()] == [0, 0.1, 0.5, 0.6]


@with_av
def test_a_photo_named_as_a_frame_is_refused(checkpoint, tmp_path):
    photos = tmp_path / "photos"
    (photos / "drive").mkdir(parents=True)
    write_video(photos / "drive.mp4")
    Image.fromarray(frame(0)).save(photos / "drive/000001.png")
    output = predict_command(checkpoint, photos, "--out", tmp_path / "out", "--frames", code=2)
    assert "two photos would both be written to drive/000001.png" in output


@with_av
def test_a_measured_rate_is_written(tmp_path):
    """What an .mp4 of frames at their own times has for an average."""
    rate = Fraction(27_000_000, 900_229)
    write_video(tmp_path / "phone.mp4", frames=5, rate=rate)
    _, times, _ = read_frames(tmp_path / "phone.mp4")
    assert np.allclose(times, np.arange(5) / float(rate), atol=1e-3)


@with_av
def test_what_the_decoder_calls_corrupt_is_no_frame(tmp_path):
    import av
    path = tmp_path / "drive.mp4"
    noise = np.random.default_rng(0)
    with open(path, "w+b") as file, VideoWriter(file, Fraction(10)) as writer:
        for i in range(40):
            writer.add(noise.integers(0, 256, (48, 64, 3), np.uint8), Fraction(i, 10))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 60] = bytes(60)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        corrupt = [frame.is_corrupt for frame in container.decode(video=0)]
    found = [moment.image is None for moment in open_clip(path).frames()]
    assert any(corrupt) and found == corrupt


@with_av
def test_a_video_that_is_cut_off_is_said(checkpoint, tmp_path):
    import av
    with av.open(str(tmp_path / "whole.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(40):
            picture = av.VideoFrame.from_ndarray(frame(i % 12), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[:len(content) // 2])
    out = ("--out", tmp_path / "out")
    assert "it may be cut off" not in predict_command(checkpoint, tmp_path / "whole.mkv", *out)
    said = predict_command(checkpoint, tmp_path / "cut.mkv", *out)
    assert re.search(r"cut.mkv says that it has 40 frames, and \d+ were found", said)


@with_av
def test_odd_sides_are_made_even(tmp_path):
    write_video(tmp_path / "x.mp4", frames=2, size=(49, 65))
    assert read_frames(tmp_path / "x.mp4")[0][0].shape == (50, 66, 3)


@with_av
def test_broken_frames_do_not_end_a_video(checkpoint, tmp_path):
    path = tmp_path / "x.avi"
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)           # each frame by itself
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(8):
            picture = av.VideoFrame.from_ndarray(frame(i), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    chunks = [match.end() for match in re.finditer(b"00dc", content)]
    third = chunks[3]                                             # the header has one too
    length, = struct.unpack_from("<I", content, third)
    content[third + 4:third + 4 + length] = bytes(length)
    path.write_bytes(content)
    output = predict_command(checkpoint, path, "--out", tmp_path / "out", code=2)
    assert "x.avi: 7 of 8 frames segmented" in output
    assert "x.avi: 1 frames cannot be read, first at 0.20 s" in output
    _, times, _ = read_frames(tmp_path / "out" / "x_overlay.mp4")
    assert np.allclose(times, [0, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7])


@with_av
def test_a_phone_held_upright_gives_an_upright_video(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, frames=2)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40                      # after version, times, id, ...
    one = 1 << 16
    assert struct.unpack_from(">9i", content, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, matrix, 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    path.write_bytes(content)                                     # shown turned clockwise
    turned = next(open_clip(path).frames()).image
    assert turned.shape == (64, 48, 3)
    assert turned[2, 20, 0] > 150 and turned[40, 20, 0] < 90      # the left bar is at the top


@with_av
def test_what_is_no_video_is_said(checkpoint, tmp_path):
    write_video(tmp_path / "good.mp4", frames=2)
    (tmp_path / "text.mp4").write_text("no video")
    playlist = f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'good.mp4'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)                  # could name any file or address
    for name in ("text.mp4", "list.mp4"):
        output = predict_command(checkpoint, tmp_path / name, "--out", tmp_path / "o", code=2)
        assert f"{name}: not a video that can be read" in output
    output = predict_command(checkpoint, tmp_path / "no.mp4", "--out", tmp_path / "o", code=2)
    assert "no.mp4: there is no such file" in output
    assert not list((tmp_path / "o").iterdir())

    (tmp_path / "o" / "good_overlay.mp4").symlink_to(tmp_path / "text.mp4")
    output = predict_command(checkpoint, tmp_path / "good.mp4", "--out", tmp_path / "o", code=2)
    assert "no regular file" in output
    assert (tmp_path / "text.mp4").read_text() == "no video"


def test_absent_pyav_is_a_sentence(checkpoint, tmp_path):
    absent = "raise ModuleNotFoundError(name='av')"
    (tmp_path / "av.py").write_text(absent)
    (tmp_path / "x.mp4").write_text("-")
    output = command("-m", "extras.predict", checkpoint, tmp_path / "x.mp4", "--out",
                     tmp_path / "o", code=2, env={"PYTHONPATH": f"{tmp_path}:."})
    assert "videos need PyAV, the package av: pip install av" in output


# ---------------------------------------------------------------- animations

@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_is_all_of_its_frames(suffix, checkpoint, tmp_path):
    path = tmp_path / f"moves{suffix}"
    pictures = [Image.fromarray(frame(i)) for i in range(5)]
    durations = [100, 40, 60, 200, 100]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    out = tmp_path / "out"
    output = predict_command(checkpoint, path, "--out", out, "--frames")
    assert f"moves{suffix}: 5 of 5 frames segmented" in output and "1 of 1" not in output
    assert len(list((out / "moves").iterdir())) == 5
    written = open_clip(out / f"moves_overlay{suffix}")
    moments = list(written.frames())
    assert sum(written.durations) == 500 and moments[0].image.shape == (48, 64, 3)
    assert written.loop == 0


def test_a_gif_that_ends_early_gives_what_is_there(checkpoint, tmp_path):
    path = tmp_path / "moves.gif"
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(6)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50)
    path.write_bytes(path.read_bytes()[:-9000])
    output = predict_command(checkpoint, path, "--out", tmp_path / "out", code=2)
    assert "frames cannot be read, first at" in output
    assert (tmp_path / "out" / "moves_overlay.gif").is_file()


# ---------------------------------------------------------------- numbered pictures

@with_av
def test_numbered_pictures_are_a_video(checkpoint, tmp_path):
    for i in (1, 2, 3, 10):
        Image.fromarray(frame(i)).save(tmp_path / f"shot_{i}.png")
    (tmp_path / "shot_2.png").write_bytes(b"no")
    Image.new("RGB", (80, 80)).save(tmp_path / "shot_4.png")      # of another size
    output = predict_command(checkpoint, tmp_path / "shot_%d.png", "--fps", 5, "--out",
                             tmp_path / "out", code=2)
    assert "shot_%d.png: 3 of 5 frames segmented, 5 a second" in output
    assert "2 frames cannot be read, first at 0.20 s" in output
    pixels, times, _ = read_frames(tmp_path / "out" / "shot_overlay.mp4")
    assert len(pixels) == 3 and np.allclose(times, [0, 0.4, 0.8])


@pytest.mark.parametrize("args, sentence", [
    (["{tmp}/no_%d.png"], "there are no pictures of such names"),
    (["{tmp}/x.png", "--fps", "5"], "--fps goes with numbered pictures"),
    (["{tmp}/x.png", "--fps", "0"], "0 is not above 0"),
    (["{tmp}/moves.gif", "--label-ids"], "--label-ids is for photos"),
    (["{tmp}/x.png", "--label-ids", "--frames"], "leave --frames out"),
])
def test_mistakes_are_a_sentence_and_exit_code_2(args, sentence, checkpoint, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    pictures = [Image.fromarray(frame(i)) for i in range(2)]
    pictures[0].save(tmp_path / "moves.gif", save_all=True, append_images=pictures[1:])
    args = [arg.format(tmp=tmp_path) for arg in args]
    assert sentence in predict_command(checkpoint, *args, "--out", tmp_path / "o", code=2)


def test_progress_says_the_time_left(monkeypatch, capsys):
    clock = iter((0, 10, 20))
    monkeypatch.setattr(extras.cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = extras.cli.show_progress("x.mp4")
    progress(10, 100)
    progress(20, None)
    assert "x.mp4 10/100, 1:30 left" in capsys.readouterr().err
    assert extras.cli.describe_seconds(3675) == "1:01:15"
