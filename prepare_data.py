"""Raw videos and stills, with a data set's own metadata -> shots -> filtered clips -> shards.

What goes in    a folder of videos and stills of any size, rate, length, codec and state of health;
                optionally a metadata file with captions, times, splits and labels
What comes out  data/NAME/, which every later stage reads:
    shard-00000.tar             the clips, KEY.mp4 (a still keeps its own bytes) and KEY.json, for
                                any WebDataset reader
    shard-00000.jsonl           a row a clip: key, offset and length in the tar, source, times,
                                frames, rate, size, split, label, scores, captions
    shard-00000.rejected.jsonl  what was left out: source, shot_start, shot_end (null: all of the
                                file), reason, figure, threshold
    duplicates.jsonl, rejected.jsonl, contact.png, manifest.json    written last

The idea        Each video is decoded twice, in order, a frame at a time. The first pass sees small
                pictures only: it finds the cuts and scores each shot. The second encodes what the
                filters keep, at its own size and rate unless an option caps them. A shard is a
                fixed block of the sorted sources, made by one process; each file is written under
                a temporary name and renamed. So a run killed at any instant and started again ends
                with the same bytes, and so does any number of workers or parts; and a decoder that
                crashes or hangs costs one file.

    python prepare_data.py demo                                 half a minute; makes its own videos
    python prepare_data.py mine --videos ~/videos --meta ~/captions.csv
    python prepare_data.py mine --videos ~/videos --part 3/64   job arrays; torchrun likewise
    python prepare_data.py mine --videos ~/videos --finish      join the parts, if none of them did

Rules           Time 0 is a file's first frame; only the frames' timestamps count, no header does.
                A bad packet is skipped and counted (scores: bad_packets); decoding goes on.
                A caption with times belongs to each clip of which at least half lies inside them,
                one without times to every clip of its file. A variable rate becomes the median
                rate: frame k shows the last frame that began at or before start + k / fps.
Legend          T frames, H W pixels. A shot is an uncut run of frames, a clip a shot or a piece of
                one; seconds everywhere.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import tarfile
import textwrap
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import connection
from pathlib import Path

import av
import numpy as np
import PIL
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows: what a killed run left half-written stays behind
    fcntl = None

FORMAT = 1                               # version of the folder's format
VIDEOS = {f".{name}" for name in "mp4 m4v mov mkv webm avi flv wmv mpg mpeg ts mts m2ts 3gp 3g2 "
          "ogv mxf vob".split()}
STILLS = {f".{name}" for name in "jpg jpeg png webp gif bmp tif tiff avif heic ppm".split()}
SPLITS = {"train": "train", "training": "train", "val": "val", "validate": "val",
          "validation": "val", "test": "test", "testing": "test"}
SUFFIXES = ("tar", "rejected.jsonl", "jsonl")                       # of a shard that is done
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error,
                  Image.DecompressionBombError)                    # Pillow's, on bad files


# -- files, randomness, refusals -------------------------------------------------------------------

def refuse(message):
    """Ends the script with one line on stderr and status 2: the input is wrong, not the code."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def dataset_dir(name):
    """Path of a data set: a bare name means data/NAME, anything with a slash is a path."""
    return Path(name) if "/" in str(name) or os.sep in str(name) else Path("data", name)


def run_dir(name):
    """Path of a training run: a bare name means runs/NAME, anything with a slash is a path."""
    return Path(name) if "/" in str(name) or os.sep in str(name) else Path("runs", name)


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path` (same suffix) to write to. On success the file is
    flushed to disk and renamed, so that `path` never holds half of anything; on an exception it is
    removed. The lock tells `sweep` that its writer lives."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(4).hex()}.tmp{path.suffix}")
    with open(part, "ab") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield part
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def sweep(folder):
    """Removes the temporary files of `atomic` whose writers are dead (nobody holds their lock)."""
    for part in Path(folder).glob(".*.tmp*") if fcntl else ():
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def rng(*key):
    """numpy Generator (Philox) keyed by the sha256 of `key`, any strings and integers: the same
    draws whatever else was drawn before, on any machine. rng(seed, "noise", step, clip_key)"""
    text = json.dumps([part if isinstance(part, str) else int(part) for part in key])
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def write_text(path, text):
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def json_line(row):
    """One line of JSON, as people read it; escapes only where a file's name is no text."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    return json.dumps(row) + "\n" if re.search("[\ud800-\udfff]", line) else line


def write_rows(path, rows):
    write_text(path, "".join(map(json_line, rows)))


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_json(path):
    """The object in one of our own files; refuses a damaged one and one of another FORMAT."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        version = found["format"]
    except (ValueError, TypeError, KeyError):
        refuse(f"{path} is damaged: remove its folder and prepare the data set again")
    if version != FORMAT:
        refuse(f"{path} has format {version}, this version reads {FORMAT}: prepare it again")
    return found


# -- reading pictures and videos -------------------------------------------------------------------

class Unreadable(Exception):
    """A file that gives no clip; its arguments, reason and figure, go into rejected.jsonl."""


def flat_rgb(picture):
    """uint8 [H, W, 3] of a Pillow picture of any mode; what is transparent shows white."""
    if picture.mode[0] in "IF":                                     # 16 bits and more; floats
        values = np.asarray(picture, dtype=np.float64)
        most = values.max(initial=0)
        full = 65535.0 if most > 255 else 255.0 if most > 1 else 1.0
        picture = Image.fromarray((values.clip(0, full) / full * 255).round().astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def read_still(file):
    """uint8 [H, W, 3] of a picture file (path or file object), turned the way its EXIF says."""
    with Image.open(file) as picture:
        picture.load()
        return flat_rgb(ImageOps.exif_transpose(picture))


def is_animated(path):
    """Whether a still's extension hides a video. Pages of a TIFF and the second view of a stereo
    JPEG are no frames, so only the formats that animate count."""
    try:
        with Image.open(path) as picture:
            return picture.format in ("GIF", "WEBP", "PNG", "AVIF") and \
                getattr(picture, "n_frames", 1) > 1
    except PICTURE_ERRORS:
        raise Unreadable("not a picture that can be read") from None


class Video:
    """A video file. Iterating yields its frames in order of display: av.VideoFrame, as stored (not
    yet rotated), timestamps in units of `tick` (s); it can be done again. After the first frame it
    knows `tick`, `sar` (sample aspect ratio) and `matrix` (rotation); after the last `bad_packets`.
    Raises Unreadable."""

    def __init__(self, path):
        self.path, self.tick, self.sar, self.matrix, self.bad_packets = path, 0.001, 1, None, 0
        self.scaler, self.small_scaler = VideoReformatter(), VideoReformatter()

    def __iter__(self):
        self.bad_packets = 0
        return self.pictures() if Path(self.path).suffix.lower() in STILLS else self.packets()

    def pictures(self):
        """Frames of an animated picture by Pillow, with delays as browsers take them."""
        at = 0
        try:
            with Image.open(self.path) as picture:
                for n in range(picture.n_frames):
                    picture.seek(n)
                    picture.load()
                    frame = av.VideoFrame.from_ndarray(flat_rgb(picture), format="rgb24")
                    frame.pts, delay = at, round(picture.info.get("duration") or 0)
                    at += delay if delay > 10 else 100
                    yield frame
        except PICTURE_ERRORS:
            self.bad_packets += 1                      # the frames before the damage stay

    def packets(self):
        """Frames by FFmpeg in one thread (its threads hang on some damaged files)."""
        if os.path.getsize(self.path) == 0:
            raise Unreadable("empty file")
        try:
            container = av.open(str(self.path), metadata_errors="replace")
        except FFmpegError as error:
            raise Unreadable(f"cannot be opened: {error.strerror}") from None
        with container:
            stream = main_stream(container)
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            self.tick, self.sar = float(stream.time_base), stream.sample_aspect_ratio or 1
            for frame in self.decoded(container, stream):
                if frame.color_trc in (16, 18):        # smpte2084 (PQ), arib-std-b67 (HLG)
                    raise Unreadable("HDR", frame.color_trc)
                turn = [d for d in frame.side_data.keys() if d.type.name == "DISPLAYMATRIX"]
                self.matrix = np.frombuffer(bytes(turn[0]), np.int32)[[0, 1, 3, 4]].tolist() \
                    if turn else None
                yield frame

    def decoded(self, container, stream):
        """Frames packet by packet; one that does not decode is counted and skipped."""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:                        # the container is broken from here on
                self.bad_packets += 1
                packet = None
            try:                                       # None: let the decoder give what it holds
                yield from stream.codec_context.decode(packet)
            except FFmpegError as error:
                self.bad_packets += not isinstance(error, EOFError)
            if packet is None:
                return

    def small(self, frame, side=64):
        """int16 [3, h, w]: full-range luma and chroma of the frame, longer side at most `side`."""
        shrink = min(1.0, side / max(frame.width, frame.height))
        small = self.small_scaler.reformat(
            frame, max(1, round(frame.width * shrink)), max(1, round(frame.height * shrink)),
            "yuv444p", src_colorspace=colour_matrix(frame), dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.JPEG, interpolation=Interpolation.AREA, threads=1)
        return small.to_ndarray().astype(np.int16)

    def rgb(self, frame, max_side=0):
        """uint8 [H, W, 3] of a frame: turned and mirrored as the file says, square pixels, even
        sides, the longer at most `max_side` px (0: no limit)."""
        width, height = frame.width * max(1, self.sar), frame.height * max(1, 1 / self.sar)
        shrink = min(1, max_side / max(width, height)) if max_side else 1
        if shrink < 1 or self.sar != 1:
            width, height = (max(2, 2 * round(v * shrink / 2)) for v in (width, height))
        kind = Interpolation.AREA if width < frame.width else \
            Interpolation.BILINEAR if width == frame.width else Interpolation.BICUBIC
        pixels = self.scaler.reformat(
            frame, int(width), int(height), "rgb24", src_colorspace=colour_matrix(frame),
            interpolation=kind, threads=1).to_ndarray()
        if self.matrix:
            a, b, c, d = self.matrix                   # x' = a x + c y, y' = b x + d y
            if abs(b) > abs(a):
                pixels, a, d = pixels.transpose(1, 0, 2), c, b
            pixels = pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
        return np.ascontiguousarray(pixels[:len(pixels) // 2 * 2, :pixels.shape[1] // 2 * 2])


def main_stream(container):
    """The video stream that people see: cover art and thumbnails are none, the largest wins."""
    hidden = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & hidden]
    known = [s for s in streams if s.codec_context is not None]
    if not known:
        raise Unreadable("no decoder for its codec" if streams else "no video stream")
    return max(known, key=lambda s: s.codec_context.width * s.codec_context.height)


def colour_matrix(frame):
    """What to pass as src_colorspace: None = the frame's own tag; untagged is BT.601, or BT.709
    at HD sizes, as players have it."""
    if frame.colorspace != 2:                                       # AVCOL_SPC_UNSPECIFIED
        return None
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


# -- writing videos and contact sheets -------------------------------------------------------------

class Encoder:
    """H.264 in MP4 to a seekable file object: yuv420p, tagged BT.709, one thread, hence the same
    bytes each time. Frames are uint8 [H, W, 3]; odd sides lose their last row or column."""

    def __init__(self, file, fps, crf=18):
        self.rate, self.crf, self.frames = frame_rate(fps), crf, 0
        self.container, self.scaler = av.open(file, "w", format="mp4"), VideoReformatter()

    def add(self, rgb):
        rgb = np.ascontiguousarray(rgb[:len(rgb) // 2 * 2, :rgb.shape[1] // 2 * 2])
        if not self.frames:
            # x264's mbtree reads memory that nobody wrote (frames of few blocks): bytes would vary
            self.stream = self.container.add_stream("libx264", rate=self.rate, options={
                "crf": str(self.crf), "preset": "veryfast", "x264-params": "mbtree=0"})
            self.stream.height, self.stream.width = rgb.shape[:2]
            context = self.stream.codec_context
            context.thread_count, context.time_base = 1, 1 / self.rate
            context.colorspace = context.color_primaries = context.color_trc = 1    # BT.709
            context.color_range = 1                                                 # 16..235
        frame = self.scaler.reformat(
            av.VideoFrame.from_ndarray(rgb, format="rgb24"), format="yuv420p",
            dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1)
        frame.pts, frame.time_base = self.frames, 1 / self.rate
        self.container.mux(self.stream.encode(frame))
        self.frames += 1

    def close(self):
        self.container.mux(self.stream.encode(None))
        self.container.close()


def frame_rate(fps):
    """The rate as the encoder takes it: a fraction such as 30000/1001, at least one in 1000 s."""
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1000))


def write_video(path, frames, fps, crf=18):
    """Writes an MP4 of `frames` (iterable of uint8 [H, W, 3] RGB, at least one, all of one size),
    whole or not at all. fps in frames a second, crf 0 (lossless) to 51."""
    with atomic(path) as part, open(part, "wb") as file:
        encoder = Encoder(file, fps, crf)
        for frame in frames:
            encoder.add(np.asarray(frame))
        encoder.close()


def contact_sheet(path, rows, cell=96):
    """Writes a PNG for people: per row (frames, label) its frames, uint8 [H, W, 3], fitted into
    squares of `cell` px, with the label below; rows fill as many columns as suit a screen."""
    gap, longest = 4, max((len(frames) for frames, _ in rows), default=1)
    sides = [np.asarray(frame).shape[:2] for frames, _ in rows for frame in frames]
    tall = max((round(cell * h / max(h, w)) for h, w in sides), default=cell)
    across, down = longest * (cell + gap) + 3 * gap, tall + 34 + 2 * gap
    n_columns = max(1, min(len(rows), 1280 // across))
    size = n_columns * across + 3 * gap, -(-len(rows) // n_columns) * down + 2 * gap
    sheet, font = Image.new("RGB", size, (24, 26, 30)), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)
    for i, (frames, label) in enumerate(rows):
        left, top = 3 * gap + i % n_columns * across, 2 * gap + i // n_columns * down
        for k, frame in enumerate(frames):
            picture = Image.fromarray(np.asarray(frame))
            scale = cell / max(picture.size)
            picture = picture.resize([max(1, round(v * scale)) for v in picture.size],
                                     Image.Resampling.NEAREST if scale > 1.5
                                     else Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + k * (cell + gap) + (cell - picture.width) // 2,
                                  top + tall - picture.height))
        words = textwrap.wrap(str(label), (across - 3 * gap) // 6, max_lines=2, placeholder=" …")
        draw.text((left, top + tall + 2), "\n".join(words), (214, 216, 220), font, spacing=2)
    with atomic(path) as part:
        sheet.save(part, format="PNG")


# -- shots and scores: the first pass --------------------------------------------------------------

REACH = 5               # how many frames back each frame is compared: flashes up to 4 frames long
WINDOW = 4              # frames on either side that say what change is usual here
FLOOR = 20.0            # levels of luma + chroma: less is no cut, however still the picture
GAP = 10.0              # s without a frame: the shot ends, nothing is shown for longer


class Scan:
    """What the first pass over a video leaves: a few numbers a frame.
    times [T] s; change [T, REACH]: mean difference to the frame 1..REACH back (levels; inf before
    the start); light, spread [T]: mean and deviation of luma (0..255); sharp {frame: sharpness};
    sizes {frame: (width, height)} from which the stored size is another; breaks: frames that begin
    a new shot whatever they show, for their size or after a gap in time."""

    def __init__(self, video):
        stamps, change, light, spread, self.sharp, self.sizes = [], [], [], [], {}, {}
        recent, size = deque(maxlen=REACH), None
        for n, frame in enumerate(video):
            if size != (frame.width, frame.height):
                size = self.sizes[n] = frame.width, frame.height
                recent.clear()
            small = video.small(frame)
            back = [float(np.abs(small - old).mean(axis=(1, 2)).sum()) for old in recent]
            change.append(back + [math.inf] * (REACH - len(back)))
            recent.appendleft(small)
            stamps.append([frame.pts, frame.dts])
            light.append(float(small[0].mean()))
            spread.append(float(small[0].std()))
            if not back or back[0] > FLOOR or n % 12 == 0:
                self.sharp[n] = sharpness(frame)
        if not stamps:
            raise Unreadable("no frame decodes", video.bad_packets)
        self.tick, self.sar = video.tick, video.sar
        self.times = true_times(np.array(stamps, dtype=np.float64).T * self.tick)
        self.change, self.light, self.spread = map(np.array, (change, light, spread))
        gaps = np.flatnonzero(np.diff(self.times) > GAP) + 1
        self.breaks = sorted({*self.sizes, *gaps.tolist()} - {0})

    def rate(self):
        """(frames a second, whether constant): constant if no timestamp is further from a straight
        line than 2 ms, an eighth of a frame, or what rounding to ticks does (1.5 of them, but never
        half a frame: that is a lost one). Else the median rate. A lone frame counts as 1 s."""
        n, first, last = len(self.times), self.times[0], self.times[-1]
        if n == 1:
            return 1.0, True
        step = (last - first) / (n - 1)
        far = np.abs(self.times - np.linspace(first, last, n)).max()
        if far <= max(0.002, step / 8, min(1.5 * self.tick, 0.4 * step)):
            return 1 / step, True
        return 1 / float(np.median(np.diff(self.times))), False

    def end(self, frame, fps):
        """Time at which the frame before `frame` ends."""
        if frame < len(self.times) and self.times[frame] - self.times[frame - 1] <= GAP:
            return float(self.times[frame])
        return float(self.times[frame - 1] + 1 / fps)

    def scores(self, first, stop, fps):
        """Scores of the frames first..stop-1: seconds; side, the shorter one in square pixels;
        motion (levels a second), brightness and contrast (0..255), sharpness (levels)."""
        inside, seconds = self.change[first + 1:stop, 0], self.end(stop, fps) - self.times[first]
        width, height = [size for n, size in self.sizes.items() if n <= first][-1]
        sharp = [value for n, value in self.sharp.items() if first <= n < stop]
        return {"seconds": round(seconds, 6),
                "side": int(min(width * max(1, self.sar), height * max(1, 1 / self.sar))),
                "motion": round(float(inside.sum() / seconds), 3),
                "brightness": round(float(self.light[first:stop].mean()), 2),
                "contrast": round(float(self.spread[first:stop].mean()), 2),
                "sharpness": round(float(np.median(sharp)), 3) if sharp else None}


def true_times(stamps):
    """Seconds since the first frame [T], strictly growing, of the timestamps [2, T] = pts, dts (s,
    nan where missing). Frames come in order of display, so a timestamp that does not grow is wrong
    (packed B-frames in AVI, streams joined); it is replaced by its neighbours' line."""
    raw = min(stamps, key=lambda line: int((~(np.diff(line) > 0)).sum()))     # pts if both do
    top = np.maximum.accumulate(np.nan_to_num(raw, nan=-math.inf))
    good = np.flatnonzero(raw > np.r_[-math.inf, top[:-1]])
    step = np.median(np.diff(raw[good]) / np.diff(good)) if len(good) > 1 else 0.04
    at = np.arange(len(raw))
    if not len(good):
        return at * step
    times = np.interp(at, good, raw[good])
    times += step * (np.minimum(at - good[0], 0) + np.maximum(at - good[-1], 0))
    return times - times[0]


def sharpness(frame):
    """Mean absolute Laplacian (levels) of the central 256 x 256 px of the luma, at native size."""
    luma = frame.reformat(format="gray", threads=1).to_ndarray()
    top, left = (max(0, (side - 256) // 2) for side in luma.shape)
    luma = luma[top:top + 256, left:left + 256].astype(np.int16)
    if min(luma.shape) < 3:
        return 0.0
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.abs(4 * luma[1:-1, 1:-1] - around).mean())


def find_cuts(scan, ratio, min_shot):
    """First frames of new shots (not frame 0). A cut changes the picture by FLOOR levels at least,
    by `ratio` times what is usual, and for good: behind a flash all is as before it. Usual is the
    second largest change of the WINDOW frames on both sides (the largest may be another cut, or
    half of this one) or, if less, 1.25 times the mean of either side's largest (a still shot before
    a fast one). Of cuts less than `min_shot` s apart, or from the start, the greatest stays."""
    change, n = scan.change[:, 0], len(scan.times)
    found = {frame: math.inf for frame in scan.breaks}
    for j in range(1, n):
        if FLOOR < change[j] < math.inf:
            sides = change[max(1, j - WINDOW):j], change[j + 1:j + 1 + WINDOW]
            sides = [side[np.isfinite(side)] for side in sides]
            near = np.sort(np.r_[0, 0, *sides])[-2]
            usual = max(1.0, min(near, 1.25 * np.mean([side.max(initial=0) for side in sides])))
            across = [scan.change[at, k] for k in range(1, REACH) for at in (j, j + k) if at < n]
            if change[j] >= ratio * usual and min(across) > 0.4 * change[j]:
                found[j] = change[j] / usual
    cuts = []
    for j in sorted(found, key=lambda j: -found[j]):
        gaps = [abs(scan.times[j] - scan.times[other]) for other in [0, *cuts]]
        if min(gaps) >= min_shot - 1e-6 or found[j] == math.inf:
            cuts.append(j)
    return sorted(cuts)


# -- metadata: what a data set says of its files ---------------------------------------------------

def read_metadata(path, form, sources):
    """({source: [fact]}, rejects) of a metadata file. A fact has start and end (s, None: the whole
    file), captions (list of str), split and label (or None). A row names its file by relative path,
    or by a file name or stem that only one source has. Rows that are malformed or whose video is
    missing become rejects, with their number as figure."""
    places, facts, rejects = {}, {}, []
    for source in sources:
        for name in {source, Path(source).name, Path(source).stem}:
            places[name] = source if name == source or name not in places else None
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        for n, row in enumerate(metadata_rows(file, form, path), 1):
            try:
                name, fact = read_fact(row)
            except (ValueError, TypeError, AttributeError, KeyError):
                rejects.append(rejection(None, "malformed metadata row", figure=n))
                continue
            if places.get(name) is None:
                rejects.append(rejection(name, "missing video", fact["start"], fact["end"], n))
            else:
                facts.setdefault(places[name], []).append(fact)
    return facts, rejects


def metadata_rows(file, form, path):
    """The rows of an open metadata file, as dicts; None for a line that is no JSON."""
    if form == "jsonl":
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                yield None
        return
    csv.field_size_limit(2**31 - 1)                    # Panda-70M's fields pass the default
    rows = csv.DictReader(file, delimiter="\t" if form == "tsv" else ",")
    if not {"video", "path", "file"} & set(rows.fieldnames or ()):
        refuse(f"{path} has no column 'video' (or 'path'); its first line must name the columns")
    yield from rows


def read_fact(row):
    """(file name, fact) of a metadata row; raises ValueError, TypeError, KeyError on a bad one."""
    name = str(row.get("video") or row.get("path") or row["file"])
    start, end = seconds(row.get("start")), seconds(row.get("end"))
    texts = row.get("caption") or row.get("text") or []
    if isinstance(texts, str) and texts.startswith("["):
        with contextlib.suppress(ValueError):          # a list in a csv cell; else just a text
            texts = json.loads(texts)
    texts = [texts] if isinstance(texts, str) else texts
    split, label = str(row.get("split") or "").lower(), row.get("label")
    if (start is None) != (end is None) or start is not None and not 0 <= start < end:
        raise ValueError("times")
    if split and split not in SPLITS or not all(isinstance(text, str) for text in texts):
        raise ValueError("split or caption")
    return os.path.normpath(name).replace(os.sep, "/"), {
        "start": start, "end": end, "captions": [t.strip() for t in texts if t.strip()],
        "split": SPLITS.get(split), "label": None if label in (None, "") else str(label)}


def seconds(value):
    """Seconds of a number or of a text such as '12.5' or '1:02:03.250'; None of nothing."""
    if value is None or value == "":
        return None
    total = 0.0
    for part in str(value).split(":"):
        total = 60 * total + float(part)
    if not math.isfinite(total):
        raise ValueError(value)
    return total


def beside(path, source):
    """Facts of --format folder: NAME.txt beside the file is its caption, its folder its label."""
    text, folders = Path(path).with_suffix(".txt"), source.split("/")[:-1]
    caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
    return [{"start": None, "end": None, "captions": [" ".join(caption.split())] if caption else [],
             "split": None, "label": folders[-1] if folders else None}]


def told(source, facts, start, end):
    """split, label and captions of the clip start..end (s) of a source, by its facts: those that
    hold at least half of the clip, or speak of the whole file. The split of a file of which no
    fact names one is drawn by its name: one in twenty 'val', the rest 'train'."""
    mine = [f for f in facts if f["start"] is None
            or min(end, f["end"]) - max(start, f["start"]) >= (end - start) / 2 - 1e-6]
    draw = int(hashlib.sha256(os.fsencode(source)).hexdigest()[8:16], 16) % 20
    splits = [f["split"] for f in [*mine, *facts] if f["split"]]
    labels = [f["label"] for f in mine if f["label"] is not None]
    return {"split": (splits or ["train" if draw else "val"])[0], "label": (labels or [None])[0],
            "captions": [{"text": text, "source": "meta", "weight": 1.0}
                         for f in mine for text in f["captions"]]}


def rejection(source, reason, start=None, end=None, figure=None, threshold=None):
    return {"source": source, "shot_start": start, "shot_end": end, "reason": reason,
            "figure": figure, "threshold": threshold}


# -- clips: what to cut, what to leave out, the second pass ----------------------------------------

FILTERS = (             # score, option, +1 (at least) or -1 (at most), reason of the reject
    ("seconds", "min_seconds", 1, "too short"), ("side", "min_side", 1, "too small"),
    ("motion", "min_motion", 1, "too still"), ("contrast", "min_contrast", 1, "too flat"),
    ("brightness", "min_brightness", 1, "too dark"),
    ("brightness", "max_brightness", -1, "too bright"),
    ("sharpness", "min_sharpness", 1, "too blurred"))


def failure(row, options):
    """The reject of a row whose scores fail a filter (the first that they fail), or None."""
    for score, option, sign, reason in FILTERS:
        value = row["scores"].get(score)
        if value is not None and sign * value < sign * options[option]:
            times = (None, None) if row["fps"] is None else (row["start"], row["end"])
            return rejection(row["source"], reason, *times, value, options[option])
    return None


def row_of(source, n, facts, fps, width, height, scores, times=(0.0,) * 4, n_frames=1):
    """The row of a source's n-th clip, as in the shard's jsonl; times: shot_start, shot_end, start,
    end. Keys are unique over a data set and hold no '.' or '/': WebDataset readers cut there."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).stem).strip("-")[:40] or "clip"
    times = [round(at, 6) for at in times]
    return {"key": f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}-{n:03d}",
            "offset": None, "length": None, "source": source, "shot_start": times[0],
            "shot_end": times[1], "start": times[2], "end": times[3], "frames": n_frames,
            "fps": fps, "width": width, "height": height, **told(source, facts, *times[2:]),
            "scores": scores}


def plan_clips(scan, source, facts, options):
    """[(row, frames)] of a video's clips in order, those that filters will drop too: `frames` are
    the numbers of the source's frames that the clip shows."""
    fps, is_constant = scan.rate()
    every = max(1, math.ceil(fps / options["max_fps"] - 1e-3)) if options["max_fps"] else 1
    cuts = find_cuts(scan, options["cut_ratio"], options["min_shot"]) \
        if options["split"] == "shots" else scan.breaks
    clips = []
    for first, stop in zip([0, *cuts], [*cuts, len(scan.times)]):
        shot = float(scan.times[first]), scan.end(stop, fps)
        edges = [first, *borders(scan, first, stop, *shot, options), stop]
        for a, b in zip(edges, edges[1:]):
            start, end = float(scan.times[a]), scan.end(b, fps)
            frames = np.arange(a, b, every)
            if not is_constant:         # a tick's rounding must not show a frame twice, then none
                at = start + np.arange(max(1, round((end - start) * fps / every))) * every / fps
                slack = min(scan.tick, 0.001) + 1e-9
                frames = np.searchsorted(scan.times, at + slack, side="right") - 1
            row = row_of(source, len(clips), facts, round(float(frame_rate(fps / every)), 6), None,
                         None, scan.scores(a, b, fps), (*shot, start, end), len(frames))
            clips.append((row, frames.clip(a, b - 1)))
    return clips


def borders(scan, first, stop, start, end, options):
    """Frame numbers inside the shot first..stop (start..end, s) where its further clips begin."""
    longest = options["max_seconds"]
    if options["split"] == "none" or not longest:
        return []
    if options["split"] == "seconds":                  # whole lengths, and what is left
        at = np.arange(start + longest, end - 1e-6, longest)
    else:                                              # equal pieces
        at = np.linspace(start, end, max(1, math.ceil((end - start) / longest - 1e-6)) + 1)[1:-1]
    inner = np.searchsorted(scan.times, at - min(scan.tick, 0.001) / 2 - 1e-9)
    return sorted({int(frame) for frame in inner if first < frame < stop})


def encode_clips(video, clips, options):
    """Second pass: yields (row, bytes of its MP4) for the clips [(row, frames)], in order. Memory
    holds one frame and one encoder at a time."""
    waiting, shown = deque(clips), 0
    for n, frame in enumerate(video):
        while waiting and waiting[0][1][shown] == n:
            row, frames = waiting[0]
            if shown == 0:
                file = io.BytesIO()
                encoder = Encoder(file, row["fps"], options["crf"])
            rgb = video.rgb(frame, options["max_side"])
            encoder.add(rgb)
            shown += 1
            if shown == len(frames):
                encoder.close()
                row["height"], row["width"] = rgb.shape[:2]
                yield row, file.getvalue()
                waiting.popleft()
                shown = 0
        if not waiting:
            return
    raise Unreadable("changes while it is read")


def clips_of(path, source, facts, options):
    """Yields (row, suffix, bytes) for each clip of a file, and (reject, None, None)."""
    facts = beside(path, source) if options["format"] == "folder" else facts
    try:
        if Path(path).suffix.lower() in STILLS and not is_animated(path):
            row = still_row(path, source, facts, options)
            lost = failure(row, options)
            yield (lost, None, None) if lost else (row, path.suffix.lower(), path.read_bytes())
            return
        video, kept = Video(path), []
        for row, frames in plan_clips(Scan(video), source, facts, options):
            row["scores"]["bad_packets"] = video.bad_packets
            lost = failure(row, options)
            if lost:
                yield lost, None, None
            else:
                kept.append((row, frames))
        for row, data in encode_clips(video, kept, options) if kept else ():
            yield row, ".mp4", data
    except Unreadable as error:
        reason, figure = (*error.args, None)[:2]
        yield rejection(source, reason, figure=figure), None, None
    except (FFmpegError, OSError) as error:
        yield rejection(source, f"cannot be read: {error.strerror}"), None, None


def still_row(path, source, facts, options):
    """A still is a clip of one frame without a rate, and keeps its own bytes; a cap on its side is
    a size in the row, to which readers bring it."""
    try:
        pixels = read_still(path)
    except PICTURE_ERRORS:
        raise Unreadable("broken picture") from None
    (height, width), cap = pixels.shape[:2], options["max_side"]
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    luma = Video(path).small(frame)[0]
    scores = {"side": min(height, width), "brightness": round(float(luma.mean()), 2),
              "contrast": round(float(luma.std()), 2), "sharpness": round(sharpness(frame), 3)}
    shrink = min(1, cap / max(height, width)) if cap else 1
    return row_of(source, 0, facts, None, max(1, round(width * shrink)),
                  max(1, round(height * shrink)), scores)


# -- shards: one process each, watched -------------------------------------------------------------

def make_shard(folder, number, root, sources, facts, options, bad, pipe):
    """The work of one process: a shard's tar, rejects and rows; the rows last, they say that it is
    done. Tells `pipe` the number of each source before touching it. `bad` {source: reason} are
    files that ended such a process before."""
    die_with_parent()
    name, rows, rejects = folder / f"shard-{number:05d}", [], []
    with atomic(f"{name}.tar") as part, \
            tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for n, source in enumerate(sources):
            pipe.send(n)
            if source in bad:
                rejects.append(rejection(source, bad[source]))
                continue
            mine = facts.get(source, [])
            for row, suffix, data in clips_of(root / source, source, mine, options):
                if data is None:
                    rejects.append(row)
                    continue
                row["offset"] = add_member(tar, row["key"] + suffix, data)
                row["length"] = len(data)
                inside = {k: v for k, v in row.items() if k not in ("offset", "length")}
                add_member(tar, row["key"] + ".json", json_line(inside).encode())
                rows.append(row)
        pipe.send(len(sources))
    write_rows(f"{name}.rejected.jsonl", rejects)
    write_rows(f"{name}.jsonl", rows)


def add_member(tar, name, data):
    """Appends a file to the tar; returns the offset of its bytes. No time, no owner."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    offset = tar.fileobj.tell() + tarfile.BLOCKSIZE    # names are short: the header is one block
    tar.addfile(header, io.BytesIO(data))
    return offset


def die_with_parent():
    """Lets this process end when its parent does, however that ended: an orphan would go on
    writing beside the next run's processes. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Job:
    """A shard in work: its process, the source that it is at, and what went wrong so far."""

    def __init__(self, number, sources, *arguments):
        self.number, self.sources, self.arguments = number, sources, arguments
        self.bad, self.crashes = {}, Counter()

    def start(self, context):
        folder, root, facts, options = self.arguments
        self.pipe, end = context.Pipe(duplex=False)
        self.at, self.since = None, time.monotonic()
        self.process = context.Process(target=make_shard, daemon=True, args=(
            folder, self.number, root, self.sources, facts, options, self.bad, end))
        self.process.start()
        end.close()

    def check(self, timeout, bar):
        """True once the shard is done, False if it must start again, None while it works."""
        is_alive, before = self.process.is_alive(), self.at or 0
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                self.at, self.since = self.pipe.recv(), time.monotonic()
        bar.update((self.at or 0) - before)
        source = None if self.at in (None, len(self.sources)) else self.sources[self.at]
        if is_alive and (source is None or time.monotonic() - self.since <= timeout):
            return None
        if is_alive:
            self.process.kill()
            self.bad[source] = "timed out"
        self.process.join()
        if self.process.exitcode == 0:
            return True
        self.crashes[source] += 1       # one may be the lack of memory, or somebody's kill
        if self.process.exitcode > 0 or self.crashes[None] > 2:
            raise RuntimeError(f"shard {self.number}: its process failed, see above")
        if self.crashes[source] > 1 and source is not None:
            self.bad.setdefault(source, "decoder crashed")
        bar.update(-(self.at or 0))
        return False


def run_jobs(jobs, n_workers, timeout):
    """Runs the jobs, `n_workers` processes at a time; a fresh process each, so that what a decoder
    leaks is gone with its shard."""
    context, waiting, running = multiprocessing.get_context("spawn"), deque(jobs), []
    with tqdm(total=sum(len(job.sources) for job in jobs), unit="file", disable=not jobs) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < n_workers:
                    running.append(waiting.popleft())
                    running[-1].start(context)
                connection.wait([handle for job in running
                                 for handle in (job.pipe, job.process.sentinel)], timeout=1)
                for job in list(running):
                    state = job.check(timeout, bar)
                    if state is not None:
                        running.remove(job)
                        waiting.extendleft([] if state else [job])
        finally:
            for job in running:
                job.process.kill()


# -- the plan, the run, the end --------------------------------------------------------------------

def find_sources(root, folder):
    """([[relative path, bytes]] sorted, number of other files) under `root`. Hidden files (half
    written ones, a Mac's '._' twins) and the data set's own folder are passed over."""
    found, n_others = [], 0
    for where, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")
                      and Path(where, name).resolve() != folder.resolve()]
        for path in (Path(where, name) for name in files):
            if path.name.startswith(".") or path.suffix.lower() not in VIDEOS | STILLS \
                    or not path.is_file():
                n_others += 1
            else:
                found.append([path.relative_to(root).as_posix(), path.stat().st_size])
    return sorted(found), n_others


def blocks(sources, most, mib):
    """[[first, stop]] of the shards: a block ends with its `most`-th source, or with the one whose
    bytes fill `mib`."""
    found, first, size = [], 0, 0
    for n, (_, n_bytes) in enumerate(sources, 1):
        size += n_bytes
        if n - first >= most or size >= mib * 2**20 or n == len(sources):
            found.append([first, n])
            first, size = n, 0
    return found


def make_plan(args, folder, root):
    """What the data set is made of, fixed at the first start in plan.json: the sorted sources, the
    shards, the options that shape the result. Refuses to go on with anything else."""
    options = {name: getattr(args, name) for name in args.shaping}
    options["meta"] = hashlib.sha256(args.meta.read_bytes()).hexdigest() if args.meta else None
    path, plan = folder / "plan.json", None
    if path.exists():
        plan = read_json(path)
        for name, value in options.items():
            before = plan["options"].get(name)
            if before != value:
                before = "another file, or none" if name == "meta" else before
                refuse(f"{folder} was begun with --{name} {before}: use that, or another NAME")
        if (folder / "manifest.json").exists():
            return plan
    sources, n_others = find_sources(root, folder)
    if not sources:
        refuse(f"no videos or stills under {root} ({n_others} other files)")
    if plan is None:
        print(f"{len(sources)} files under {root}; {n_others} others passed over", file=sys.stderr)
        plan = {"format": FORMAT, "options": options, "sources": sources,
                "shards": blocks(sources, args.shard_sources, args.shard_mib)}
        write_text(path, json.dumps(plan))
    elif plan["sources"] != sources:
        changed = {tuple(source) for source in plan["sources"]} ^ set(map(tuple, sources))
        refuse(f"{root} is not what {folder} was begun with ({min(changed)[0]} came, went or "
               "changed): prepare it under another NAME")
    return plan


def prepare(args):
    """The whole stage for one data set: plan, shards, and, once all are there, the end."""
    folder, root = dataset_dir(args.name), Path(args.videos)
    if not root.is_dir():
        refuse(f"--videos {root} is not a folder")
    if args.meta and not args.meta.is_file():
        refuse(f"--meta {args.meta} is not a file")
    sweep(folder)
    plan = make_plan(args, folder, root)
    if (folder / "manifest.json").exists():
        read_json(folder / "manifest.json")
        print(f"{folder} is finished; nothing to do")
        return
    sources, (part, n_parts), jobs = [name for name, _ in plan["sources"]], args.part, []
    facts, rejects = read_metadata(args.meta, args.format, sources) if args.meta else ({}, [])
    for n, (first, stop) in enumerate(plan["shards"]) if not args.finish else ():
        if n % n_parts == part - 1 and not is_done(folder, n):
            mine = {source: facts[source] for source in sources[first:stop] if source in facts}
            jobs.append(Job(n, sources[first:stop], folder, root.absolute(), mine, plan["options"]))
    run_jobs(jobs, args.workers, args.timeout)
    left = [n for n in range(len(plan["shards"])) if not is_done(folder, n)]
    if left and args.finish:
        refuse(f"{len(left)} of {len(plan['shards'])} shards of {folder} are not done, the first "
               f"is {left[0]}: run its part first")
    if left:
        print(f"this part of {folder} is done; {len(left)} shards are left to others")
    else:
        finish(folder, plan, rejects)


def is_done(folder, number):
    return all((folder / f"shard-{number:05d}.{suffix}").is_file() for suffix in SUFFIXES)


def finish(folder, plan, rejects):
    """Joins the shards: duplicates.jsonl, rejected.jsonl, contact.png, and manifest.json last.
    Whoever comes second writes the same bytes."""
    seen, duplicates, rows, shards = {}, [], [], {}
    for name in (f"shard-{n:05d}" for n in range(len(plan["shards"]))):
        mine = [{**row, "shard": name} for row in read_rows(folder / f"{name}.jsonl")]
        for row in mine:
            of = seen.setdefault(hashlib.sha256(read_member(folder, row)).digest(), row["key"])
            if of != row["key"]:
                duplicates.append({"key": row["key"], "of": of, "distance": 0})
        shards[name] = {}
        for suffix in SUFFIXES:
            with open(folder / f"{name}.{suffix}", "rb") as file:
                shards[name][f"{name}.{suffix}"] = hashlib.file_digest(file, "sha256").hexdigest()
        rejects = rejects + read_rows(folder / f"{name}.rejected.jsonl")
        rows += mine
    write_rows(folder / "duplicates.jsonl", duplicates)
    write_rows(folder / "rejected.jsonl", rejects)
    twins = {row["key"] for row in duplicates}
    shown = [row for row in rows if row["key"] not in twins]
    shown = [shown[len(shown) * i // 36] for i in range(36)] if len(shown) > 36 else shown
    contact_sheet(folder / "contact.png", [sheet_row(folder, row) for row in shown])
    counts = {"sources": len(plan["sources"]), "clips": len(rows), "duplicates": len(duplicates),
              "stills": sum(row["fps"] is None for row in rows),
              "seconds": round(sum(row["end"] - row["start"] for row in rows), 3),
              "captions": sum(len(row["captions"]) for row in rows),
              "captioned_clips": sum(bool(row["captions"]) for row in rows),
              "splits": dict(sorted(Counter(row["split"] for row in rows).items())),
              "rejected": dict(sorted(Counter(row["reason"] for row in rejects).items()))}
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "av": av.__version__,
                "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
                "numpy": np.__version__, "pillow": PIL.__version__}
    write_text(folder / "manifest.json", json.dumps(
        {"format": FORMAT, "counts": counts, "options": plan["options"], "versions": versions,
         "shards": shards}, indent=1) + "\n")
    sweep(folder)
    print(f"{folder}: {len(rows)} clips ({counts['seconds']:.0f} s, {counts['captioned_clips']} "
          f"captioned) of {len(plan['sources'])} files; {len(rejects)} rejects in rejected.jsonl, "
          f"{len(duplicates)} duplicates; look at {folder / 'contact.png'}")


def sheet_row(folder, row, n_frames=4):
    some = set(np.linspace(0, row["frames"] - 1, n_frames).astype(int).tolist())
    return list(clip_frames(folder, row, some)), (*row["captions"], {"text": row["key"]})[0]["text"]


# -- reading a prepared data set: what the later stages use ----------------------------------------

def open_dataset(folder):
    """The kept rows (dicts, a row of shard-*.jsonl each) of a finished data set, in shard order,
    duplicates left out. Adds row["shard"], and to row["captions"] those that caption.py wrote:
    {"text", "source": RUN, "weight": 1.0}. Refuses a folder that is missing, unfinished, damaged,
    or of another FORMAT."""
    folder = Path(folder)
    if not folder.is_dir():
        refuse(f"{folder} does not exist: prepare it first (python prepare_data.py "
               f"{folder.name} --videos DIR)")
    if not (folder / "manifest.json").is_file():
        refuse(f"{folder} is not finished: run its prepare_data.py command (again)")
    manifest, rows = read_json(folder / "manifest.json"), []
    twins = {row["key"] for row in read_rows(folder / "duplicates.jsonl")}
    for name, files in manifest["shards"].items():
        path = folder / f"{name}.jsonl"
        if not is_done(folder, int(name[-5:])) or \
                hashlib.sha256(path.read_bytes()).hexdigest() != files[path.name]:
            refuse(f"{path} or its tar is not what the manifest says: prepare the data set again")
        mine = {row["key"]: {**row, "shard": name} for row in read_rows(path)
                if row["key"] not in twins}
        for captions in sorted(folder.glob(f"{name}.captions-*.jsonl")):
            run = captions.name[len(f"{name}.captions-"):-len(".jsonl")]
            for row in read_rows(captions):
                if row["key"] in mine:
                    mine[row["key"]]["captions"].append(
                        {"text": row["caption"], "source": run, "weight": 1.0})
        rows += mine.values()
    return rows


def read_member(folder, row):
    """The bytes of a row's clip, found in its tar by offset."""
    with open(Path(folder, f"{row['shard']}.tar"), "rb") as file:
        file.seek(row["offset"])
        return file.read(row["length"])


def clip_frames(folder, row, some=None):
    """Yields the frames of a row's clip, uint8 [H, W, 3] RGB; only those numbered in `some`."""
    data = io.BytesIO(read_member(folder, row))
    if row["fps"] is None:
        pixels, size = read_still(data), (row["width"], row["height"])
        yield pixels if pixels.shape[1::-1] == size else np.array(
            Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        return
    scaler = VideoReformatter()
    with av.open(data) as container:
        container.streams.video[0].thread_type = "NONE"
        for n, frame in enumerate(container.decode(video=0)):
            if some is None or n in some:
                yield scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()


def read_clip(folder, row):
    """uint8 [T, H, W, 3] RGB of a row of `open_dataset`; T = 1 for a still."""
    return np.stack(list(clip_frames(folder, row)))


# -- demo: moving shapes whose form, colour and direction are known --------------------------------

COLOURS = {"red": (240, 60, 50), "green": (60, 210, 80), "blue": (70, 110, 255),
           "yellow": (245, 225, 60), "purple": (205, 80, 240), "cyan": (60, 220, 230)}
FORMS = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
GROUNDS = {"black": 12, "dark": 40, "grey": 68}      # levels far below every colour's own luma
TEXTURES = ("plain", "striped", "checked", "dotted")
DEMO_SIZES = ((32, 32), (48, 32), (32, 40), (40, 32), (36, 32), (32, 48), (40, 40), (32, 36))


def is_left_out(colour, form, direction):
    """Whether the training split never shows this combination: 24 of the 72, chosen so that every
    pair (colour and form, form and direction, colour and direction) is still seen."""
    index = list(COLOURS).index(colour) + FORMS.index(form) + list(DIRECTIONS).index(direction)
    return index % 3 == 0


def demo_files(n_files=160, seed=0):
    """The plan of the demo: a list of files {name, width, height, fps, split, shots}; a shot holds
    all that `render_shot` needs, its caption, and whether the metadata file tells that caption.
    Every eighth file is for the test split, and half of its shots show combinations left out."""
    every = [(c, f, d) for c in COLOURS for f in FORMS for d in DIRECTIONS]
    seen = [combination for combination in every if not is_left_out(*combination)]
    left_out = [combination for combination in every if is_left_out(*combination)]
    files = []
    for i in range(n_files):
        random = rng(seed, "demo", i)
        width, height = DEMO_SIZES[i % len(DEMO_SIZES)]
        is_test, shots, level = i % 8 == 7, [], None
        fps = int(random.choice([8, 10, 12]))
        for j in range(8):
            level = random.choice([g for g in GROUNDS if g != level])    # so that every cut shows
            pool = left_out if is_test and j % 2 else seen
            n_shapes = 1 if is_test and j % 2 or random.random() < 0.8 else 2
            picked = [pool[k] for k in random.choice(len(pool), n_shapes, replace=False)]
            if len({colour for colour, _, _ in picked}) < n_shapes:
                picked = picked[:1]
            shots.append(demo_shot(random, picked, str(level), width, height, fps))
        files.append({"name": f"demo-{i:03d}.mp4", "width": width, "height": height, "fps": fps,
                      "split": "test" if is_test else "train", "shots": shots})
    return files


def demo_shot(random, combinations, level, width, height, fps):
    """One shot: shapes [{colour, form, direction, radius, start, stop}] (pixels), a ground, a
    number of frames, a caption. Shapes stay inside the frame and clear of each other; two are
    smaller than one, so that there is room for both ways."""
    side, n_frames = min(width, height), int(random.integers(9, 15))
    radii = (0.25, 0.29) if len(combinations) == 1 else (0.17, 0.2)
    for _ in range(200):
        shapes = []
        for colour, form, direction in combinations:
            radius = side * random.uniform(*radii)
            size, step = np.array([width, height]), np.array(DIRECTIONS[direction])
            room = size / 2 - radius - 1                                 # how far a centre may go
            path = step * random.uniform(0.75, 1.0) * 2 * room * np.abs(step)
            free = room - np.abs(path) / 2
            middle = size / 2 + random.uniform(-1, 1, 2) * free
            shapes.append({"colour": colour, "form": form, "direction": direction,
                           "radius": float(radius), "start": (middle - path / 2).tolist(),
                           "stop": (middle + path / 2).tolist()})
        at = [np.linspace(s["start"], s["stop"], n_frames) for s in shapes]
        gap = min((np.linalg.norm(at[0] - other, axis=1).min() for other in at[1:]), default=side)
        if gap > 1.3 * sum(s["radius"] for s in shapes[:2]) or len(shapes) == 1:
            break
    else:
        shapes = shapes[:1]                                              # no room for both
    texture = str(random.choice(TEXTURES))
    caption = " and ".join(f"a {s['colour']} {s['form']} moves {s['direction']}" for s in shapes)
    if random.random() < 0.5:
        caption += f" on a {texture} {level} ground"
    return {"shapes": shapes, "texture": texture, "level": level,
            "cell": int(random.integers(4, 8)), "tint": random.uniform(-6, 6, 3).round(1).tolist(),
            "frames": n_frames, "width": width, "height": height, "fps": fps,
            "caption": caption, "captioned": random.random() < 0.5}


def render_shot(shot, oversample=4):
    """uint8 [T, H, W, 3]: the shot drawn at `oversample` times its size and averaged down."""
    height, width, cell = shot["height"], shot["width"], shot["cell"]
    y, x = np.mgrid[:height, :width]
    pattern = {"plain": np.zeros_like(x), "striped": (x + y) // cell % 2,
               "checked": (x // cell + y // cell) % 2,
               "dotted": (x % cell < cell // 2) & (y % cell < cell // 2)}[shot["texture"]]
    ground = GROUNDS[shot["level"]] + 10.0 * pattern[..., None] + np.array(shot["tint"])
    frames = np.repeat(ground[None], shot["frames"], axis=0)
    y, x = (np.mgrid[:height * oversample, :width * oversample] + 0.5) / oversample
    for shape in shot["shapes"]:
        places = np.linspace(shape["start"], shape["stop"], shot["frames"])
        for frame, (centre_x, centre_y) in zip(frames, places):
            u, v = (x - centre_x) / shape["radius"], (y - centre_y) / shape["radius"]
            inside = {"circle": u * u + v * v < 1,
                      "square": np.maximum(np.abs(u), np.abs(v)) < 0.88,
                      "triangle": (v < 0.85) & (np.abs(u) < 0.56 * (v + 1.1))}[shape["form"]]
            cover = inside.reshape(height, oversample, width, oversample).mean((1, 3))[..., None]
            frame += cover * (np.array(COLOURS[shape["colour"]]) - frame)
    return frames.clip(0, 255).round().astype(np.uint8)


def render_file(folder, file):
    write_video(folder / file["name"], (frame for shot in file["shots"]
                                        for frame in render_shot(shot)), file["fps"], crf=10)


def make_demo(folder, n_files, n_workers):
    """Renders the demo's videos, those that are not there, and captions.jsonl, as if they were a
    user's: each file's split, and the captions of about half of its shots."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    files, rows = demo_files(n_files), []
    for file in files:
        rows.append({"video": file["name"], "split": file["split"]})
        edges = np.cumsum([0, *(shot["frames"] for shot in file["shots"])]) / file["fps"]
        rows += [{"video": file["name"], "start": round(float(start), 6),
                  "end": round(float(end), 6), "caption": shot["caption"], "split": file["split"]}
                 for shot, start, end in zip(file["shots"], edges, edges[1:]) if shot["captioned"]]
    there = {path.name for path in folder.glob("*.mp4")}
    if there - {file["name"] for file in files}:
        refuse(f"{folder} holds more than a demo of {n_files} files: remove it")
    todo = [file for file in files if file["name"] not in there]
    if todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(n_workers, context, initializer=die_with_parent) as pool:
            work = pool.map(render_file, [folder] * len(todo), todo)
            list(tqdm(work, total=len(todo), unit="file", desc="demo videos"))
    write_rows(folder / "captions.jsonl", rows)


# -- options ---------------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """argparse type: an int or float within low..high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, must be {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def part_of(text):
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' must be I/N with 1 <= I <= N, such as 3/64")
    return int(match[1]), int(match[2])


def parse_options(argv=None):
    """The options; `shaping` lists those that change the result, which plan.json holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    cores = max(1, len(usable) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))   # ranks share them
    level, whole, real = number(float, 0, 255), number(int, 0), number(float, 0)
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    add = parser.add_argument
    add("name", metavar="NAME", help="data set to make: data/NAME, or a path if it has a slash; "
        "'demo' without --videos renders its own videos into data/demo-videos")
    add("--videos", metavar="DIR", help="folder of videos and stills, searched to any depth")
    add("--meta", type=Path, metavar="FILE", help="metadata; columns (or keys): video or path; "
        "start, end (s or H:MM:SS.mmm); caption or text (a list: several); split; label")
    add("--finish", action="store_true", help="only join the shards that the parts have made")
    add("--workers", type=number(int, 1), default=cores, metavar="N", help="processes "
        "at a time, 1 or more; any number gives the same bytes (%(default)s: the processors)")
    add("--part", type=part_of, default=(rank + 1, ranks), metavar="I/N", help="do every N-th "
        "shard from the I-th, 1 <= I <= N: for job arrays (1/1, or torchrun's rank)")
    add("--timeout", type=number(float, 1), default=600.0, metavar="S",
        help="a file that takes more seconds than this, 1 or more, is left out (%(default)s)")
    add("--demo_files", type=number(int, 1, 999), default=160, metavar="N",
        help="videos that 'demo' renders, 1 to 999 (%(default)s)")
    own = {action.dest for action in parser._actions}
    add = parser.add_argument_group("shots (fixed at the first start, like all below)").add_argument
    add("--format", choices=["jsonl", "csv", "tsv", "folder"], help="form of --meta (its suffix); "
        "folder: NAME.txt beside a file is its caption, its folder's name its label")
    add("--split", choices=["shots", "seconds", "none"], default="shots", help="what clips are: "
        "shots, lengths of --max_seconds, or whole files (%(default)s)")
    add("--min_shot", type=real, default=0.3, metavar="S",
        help="least time between cuts, s, 0 or more (%(default)s)")
    add("--cut_ratio", type=number(float, 1), default=2.25, metavar="X", help="how many times the "
        "usual change makes a cut, 1 or more; higher finds fewer (%(default)s)")
    add = parser.add_argument_group("filters: clips that fail go to rejected.jsonl").add_argument
    add("--min_seconds", type=real, default=0.5, metavar="S",
        help="shortest clip, s, 0 or more (%(default)s)")
    add("--min_side", type=number(int, 2), default=32, metavar="PX",
        help="smallest shorter side, px, 2 or more (%(default)s)")
    add("--min_motion", type=real, default=0.0, metavar="X", help="least change of a small "
        "picture, levels of 0..255 a second, 0 or more (%(default)s)")
    add("--min_brightness", type=level, default=0.0, metavar="X",
        help="least mean luma, 0 to 255 (%(default)s)")
    add("--max_brightness", type=level, default=255.0, metavar="X",
        help="greatest mean luma, 0 to 255 (%(default)s)")
    add("--min_contrast", type=level, default=1.0, metavar="X", help="least deviation of luma "
        "within a frame, 0 to 255; 0 keeps blank clips (%(default)s)")
    add("--min_sharpness", type=real, default=0.0, metavar="X",
        help="least mean Laplacian of luma, levels, 0 or more (%(default)s)")
    add = parser.add_argument_group("caps").add_argument
    add("--max_side", type=whole, default=0, metavar="PX",
        help="longer side, px; larger clips are scaled down; 0: no limit (%(default)s)")
    add("--max_fps", type=real, default=0.0, metavar="FPS", help="frames a second; faster clips "
        "keep every 2nd, 3rd, … frame; 0: no limit (%(default)s)")
    add("--max_seconds", type=real, default=20.0, metavar="S",
        help="longer shots are cut into equal pieces, s; 0: no limit (%(default)s)")
    add("--crf", type=number(int, 0, 51), default=18, metavar="Q",
        help="H.264 quality of the clips, 0 (lossless) to 51 (%(default)s)")
    add = parser.add_argument_group("shards").add_argument
    add("--shard_sources", type=number(int, 1), default=64, metavar="N",
        help="most files a shard, 1 or more (%(default)s)")
    add("--shard_mib", type=number(float, 0.001), default=1024.0, metavar="MIB",
        help="MiB of files that end a shard, 0.001 or more (%(default)s)")
    args = parser.parse_args(argv)
    args.shaping = [a.dest for a in parser._actions if a.dest not in own]
    return args


def main(argv=None):
    args = parse_options(argv)
    if args.name == "bench" or not args.name.strip("./"):
        refuse(f"'{args.name}' cannot be a data set's name")
    if args.name == "demo" and not args.videos:
        args.videos, args.format = str(dataset_dir("demo-videos")), "jsonl"
        args.meta = Path(args.videos, "captions.jsonl")
        make_demo(Path(args.videos), args.demo_files, args.workers)
    if not args.videos:
        refuse("--videos DIR is needed: the folder that holds the videos")
    if args.meta and not args.format:
        args.format = args.meta.suffix.lower().lstrip(".")
    if bool(args.meta) != (args.format in ("jsonl", "csv", "tsv")):
        refuse("--meta FILE goes with --format jsonl, csv or tsv, and only with these")
    if args.split == "seconds" and not args.max_seconds:
        refuse("--split seconds needs a --max_seconds above 0")
    prepare(args)


if __name__ == "__main__":
    main()
