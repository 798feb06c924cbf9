"""Raw videos and stills, with a data set's own metadata -> shots -> filtered clips -> shards.

In              a folder of videos and stills of any size, rate, length and codec, damaged or not;
                optionally metadata with captions, times, splits and labels, in our own columns or
                as a data set publishes it (FORMATS is the table of readers)
Out             data/NAME/, which every later stage reads:
    shard-00000.tar             the clips, KEY.mp4 (a still keeps its own bytes) and KEY.json, for
                                any WebDataset reader
    shard-00000.jsonl           a record a clip: key, offset and length in the tar, source, times,
                                frames, fps, size, split, label, captions, scores (SCORES), hash,
                                and what was converted (HDR, interlaced, HEIC)
    shard-00000.rejected.jsonl  rejected clips and files: source, shot_start, shot_end (null: the
                                whole file), reason, figure, threshold
    shard-00000.metadata.jsonl  {key, split, label, captions, scores} of the clips whose metadata
                                changed after the shard was written
    duplicates.jsonl, rejected.jsonl, contact.png, manifest.json    written last
    faults.log                  tracebacks of errors of this program, if any

The idea        Each video is decoded twice, in order, a frame at a time. The first pass sees small
                pictures only: it finds cuts, fades and dissolves, and scores each shot. The second
                encodes the clips that pass the filters, at their own size and rate unless an option
                caps them (a file in plain H.264 that is one clip is copied). A shard is a fixed
                block of the sorted sources, made by one process; each file is written under a
                temporary name and renamed. So a killed run that is started again, and any number of
                workers or parts, end with the same bytes; a decoder that crashes or hangs costs one
                file. Memory holds neither the metadata nor a video.

    python prepare_data.py demo                                 half a minute; makes its own videos
    python prepare_data.py mine --videos ~/videos --meta ~/captions.csv --min_flow 0.02
    python prepare_data.py panda --videos ~/panda --meta panda70m_training_2m.csv --format panda70m
    python prepare_data.py mine --videos ~/videos --part 3/64   job arrays; torchrun likewise
    python prepare_data.py mine --videos ~/videos --finish      join the parts, if none of them did
    python prepare_data.py mine --videos ~/videos --report      look at data/mine/report/
    python prepare_data.py bench --videos ~/videos              frames a second of each step

Rules           Time 0 is a file's first frame. Only the timestamps of frames count, no header does.
                A bad packet is skipped and counted (score bad_packets); decoding continues.
                HDR (PQ, HLG) becomes BT.709: see `tone_mapped`.
                Metadata may change or arrive later: run the same command again; shards keep their
                bytes. The clip that is kept of duplicates gets the caption. A caption with times
                belongs to each clip that lies at least half inside them (a caption of no clip is
                listed as a reject), one without times to every clip of its file. A variable rate
                becomes the median rate: frame k shows the last frame that began at or before
                start + k / fps.
                How a metadata row finds its file: at SourceIndex. What --format reads: at FORMATS.
Legend          T frames, H W pixels. A shot is an uncut run of frames, a clip a shot or a piece of
                one; seconds everywhere.
"""
import os
import signal
import sys


def stop_early(*_):
    """Ctrl-C during the imports, which take seconds, prints one line and no traceback."""
    os.write(2, f"\n{os.path.basename(sys.argv[0])}: stopped\n".encode())
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler and os.path.dirname(
        __file__) == os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__",
                                                             "/"))):    # a script of ours runs
    signal.signal(signal.SIGINT, stop_early)

import argparse
import ast
import codecs
import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import multiprocessing
import operator
import random
import re
import runpy
import shlex
import shutil
import sqlite3
import struct
import tarfile
import tempfile
import textwrap
import threading
import time
import timeit
import traceback
import unicodedata
import zlib
from array import array
from collections import Counter, deque
from fractions import Fraction
from multiprocessing import connection
from pathlib import Path


def tell_missing(kind, error, trace):
    """sys.excepthook: one line where a package is not installed."""
    name = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ModuleNotFoundError) and name in PACKAGES:
        print(f"{Path(sys.argv[0]).name}: {name} is not installed: pip install -r "
              "requirements.txt", file=sys.stderr, flush=True)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


PACKAGES = "av numpy PIL safetensors sentencepiece tokenizers torch tqdm triton".split()
sys.excepthook = tell_missing            # before the first of them is imported
if sys.version_info < (3, 11):
    print(f"{Path(sys.argv[0]).name}: Python 3.11 or newer is needed, this is "
          f"{sys.version_info[0]}.{sys.version_info[1]}", file=sys.stderr)
    sys.exit(2)

import av
import av.filter
import av.sidedata.sidedata
import numpy as np
import PIL
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows: temporary files of killed runs are not removed
    fcntl = None


# -- shots and scores: the first pass over a file --------------------------------------------------

REACH = 5               # frames back that each frame is compared with: flashes last up to 4 frames
WINDOW = 4              # frames on either side that define the usual change
FLOOR = 20.0            # least change of a cut, levels of luma + chroma
GAP = 10.0              # s without a frame: the shot ends, and no frame lasts longer
SAMPLE = 0.5            # s between two samples
LAMP = 0.45             # above this likeness two pictures differ in light only


class Scan:
    """Result of the first pass over a video: a few numbers a frame.
    times [T] s; change [T]: mean difference to the previous frame (levels; inf at the start);
    across {frame: least difference between the frames on either side of it} and alike {frame:
    likeness of both sides} of possible cuts; light, spread [T]: mean and deviation of luma
    (0..255); tiny [T, 3, 12, 12]: thumbnails; samples: a Sample each `every` s; bits [T + 1]: of
    all earlier packets; corrupt [T]: whether the decoder concealed errors; lost [T - 1]: number of
    missing frames after each; sizes {frame: (width, height)} where the stored size changes; breaks:
    frames that always begin a new shot, after a change of size or a gap in time."""

    def __init__(self, video, every=SAMPLE):
        stamps, change, light, spread, bits = (array("d") for _ in range(5))
        tiny, corrupt, is_plain = bytearray(), bytearray(), True     # all that grows with length
        recent, size, last = deque(maxlen=2 * REACH), None, None          # newest first
        self.across, self.alike, self.samples, self.sizes = {}, {}, [], {}
        for n, frame in enumerate(video):
            if size != (frame.width, frame.height):
                self.weigh(range(n - WINDOW, n), change, recent)
                size, last = (frame.width, frame.height), None
                self.sizes[n] = size
                recent.clear()
            small = video.small(frame)
            change.append(difference(small, recent[0]) if recent else math.inf)
            luma = small[0].ravel().astype(np.float64)
            light.append(float(luma.mean()))
            spread.append(math.sqrt(max(0.0, luma @ luma / luma.size - light[-1] ** 2)))
            tiny += fitted(small).tobytes()
            stamps.extend(math.nan if one is None else one for one in (frame.pts, frame.dts))
            bits.append(video.bits)
            at = n / 25 if frame.pts is None else frame.pts * video.tick
            if last is None or abs(at - last.at) > every:
                last = Sample(n, at, video, frame, small, recent, last)
                self.samples.append(last)
            recent.appendleft(small)
            self.weigh([n - WINDOW], change, recent)
            is_plain &= frame.format.name == "yuv420p" and frame.color_range != 2 \
                and not frame.interlaced_frame and frame.color_trc not in HDR
            corrupt.append(frame.is_corrupt)
        if not stamps:
            raise Unreadable("no frame decodes", video.bad_packets)
        self.weigh(range(len(change) - WINDOW, len(change)), change, recent)
        self.tick, self.sar, self.is_plain = video.tick, video.sar, is_plain
        self.times = true_times(np.reshape(stamps, (-1, 2)).T * self.tick, video.step)
        self.change, self.light, self.spread = map(np.array, (change, light, spread))
        self.tiny = np.frombuffer(tiny, np.uint8).reshape(-1, 3, 12, 12)
        self.bits = np.r_[bits, video.bits]
        steps = np.diff(self.times)     # isolated gaps in a constant rate are lost frames
        usual = float(np.median(steps)) if len(steps) else 1.0
        near = np.abs(np.r_[usual, steps, usual] - usual) <= usual / 4 + self.tick
        self.lost = np.where((steps <= GAP) & near[:-2] & near[2:], np.rint(
            steps / usual) - 1, 0).clip(0) * bool(
                near.mean() >= 0.8 and len(steps) > 12 and video.codec)
        self.corrupt = np.frombuffer(corrupt, np.uint8)
        gaps = np.flatnonzero(np.diff(self.times) > GAP) + 1
        self.breaks = sorted({*self.sizes, *gaps.tolist()} - {0})

    def weigh(self, frames, change, recent):
        """Sets across and alike of the `frames` that may be cuts. recent: the last pictures."""
        seen = dict(zip(range(len(change) - 1, -1, -1), recent))
        for j in frames:
            if j < 1 or not FLOOR < change[j] < math.inf or j - 1 not in seen \
                    or change[j] < usual_change(change, j):
                continue
            pairs = [pair for k in range(1, REACH) for pair in ((j, j - 1 - k), (j + k, j - 1))]
            self.across[j] = min((difference(seen[a], seen[b]) for a, b in pairs
                                  if a in seen and b in seen), default=math.inf)
            old, new = seen[j - 1], seen.get(j + 1, seen[j])                # j may be blended
            self.alike[j] = min(likeness(new, old), likeness(new[0], old[0], 8))

    def rate(self):
        """(frames a second, whether constant): constant if no timestamp is further from a straight
        line than 2 ms, an eighth of a frame, or the rounding to ticks (1.5 ticks, at most 0.4
        frames). Otherwise the median rate. A single frame lasts 1 s."""
        n, first, last = len(self.times), self.times[0], self.times[-1]
        if n == 1:
            return 1.0, True
        step = (last - first) / (n - 1)
        far = np.abs(self.times - np.linspace(first, last, n)).max()
        if far <= max(0.002, step / 8, min(1.5 * self.tick, 0.4 * step)):
            return 1 / step, True
        step, k = float(np.median(np.diff(self.times))), min(12, n - 1)
        if step < 1 / 120:              # frames arrive in bunches: average over a dozen
            step = max(step, float(np.median(self.times[k:] - self.times[:-k])) / k)
        return 1 / step, False

    def end(self, frame, fps):
        """Time at which the frame before `frame` ends."""
        if frame < len(self.times) and self.times[frame] - self.times[frame - 1] <= GAP:
            return float(self.times[frame])
        return float(self.times[frame - 1] + min(1 / fps, GAP))

    def looks(self, first, stop):
        """The samples of the frames first..stop-1, or the last before them."""
        inside = [one for one in self.samples if first <= one.n < stop]
        return inside or [one for one in self.samples if one.n <= first][-1:]

    def scores(self, first, stop, fps):
        """Scores of the frames first..stop-1; SCORES says what they are."""
        inside, length = self.change[first + 1:stop], self.end(stop, fps) - self.times[first]
        width, height = [size for n, size in self.sizes.items() if n <= first][-1]
        light, looks = self.light[first:stop], self.looks(first, stop)
        wave = np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2)
        lost = self.lost[first:stop].sum()
        moved = [one for one in looks if one.flow is not None and one.since >= first]
        turns = np.diff([one.pan for one in moved], axis=0) if len(moved) > 1 else np.zeros((1, 2))
        return {"seconds": round(length, 6), "rate": round(fps, 3),
                "motion": round(float(inside.sum() / length), 3),
                "flow": round(float(np.mean([one.flow for one in moved])), 4) if moved else None,
                "shake": round(float(np.median(np.hypot(*turns.T))), 4),
                "flicker": round(float(wave.mean()), 3) if len(wave) else 0.0,
                "repeats": round(float((inside < 0.02).mean()), 4) if len(inside) else 0.0,
                "damage": round(float((self.corrupt[first:stop].sum() + lost) / (
                    stop - first + lost)), 4),
                "bpp": round(float(self.bits[stop] - self.bits[first])
                             / ((stop - first) * width * height), 5),
                **still_scores(looks, width * max(1, self.sar), height * max(1, 1 / self.sar),
                               light.mean(), self.spread[first:stop].mean())}


class Sample:
    """Features of frame n (at s): flow, mean speed of its blocks, diagonals a second, and pan,
    their median velocity [2] (None at the start); since: the first frame it was compared with;
    sharpness; colour: mean distance of chroma from grey; border: black share of the picture at each
    edge (top, bottom, left, right); text: share of cells that look like writing; edges: positions
    of strong edges, packed; thumb uint8 [24, 24]; colours [4, 4, 3]."""

    def __init__(self, n, at, video, frame, small, recent=(), last=None):
        self.n, self.at, self.matrix, self.flow, self.since = n, at, video.matrix, None, n
        luma = video.luma(frame)
        self.colour = float(np.abs(small[1:] - 128).mean())
        self.sharpness, self.border, self.text, self.edges = look_closely(luma)
        self.thumb = fitted(small[:1], 24)[0]
        self.colours = fitted(small).reshape(3, 4, 3, 4, 3).mean((2, 4)).transpose(1, 2, 0)
        if last is not None:
            back = min(len(recent), 6)
            scale = (n - last.n) / max(at - last.at, 1e-3) / math.hypot(*small.shape[1:])
            near = far = block_motion(recent[0][0], small[0])
            if np.hypot(*near.T).mean() * back < 2:    # slow motion: measured over more frames
                far = block_motion(recent[back - 1][0], small[0]) / back
            self.flow, self.since = float(np.hypot(*far.T).mean()) * scale, n - back
            self.pan = np.median(near, axis=0) * scale


def still_scores(samples, width, height, light, contrast):
    """The scores that need no neighbouring frame, of a still or of a shot's samples: width x height
    square pixels; light, contrast: mean and deviation of luma."""
    border = np.min([one.border for one in samples], axis=0)
    edges = np.unpackbits([one.edges for one in samples], axis=1).mean(0)
    moves = [one.flow for one in samples if one.flow is not None]
    lasting = float((edges >= 0.9).mean()) if len(samples) > 2 and np.mean(moves) > 0.01 else None
    return {"side": int(min(width, height)), "aspect": round(float(width / height), 4),
            "brightness": round(float(light), 2), "contrast": round(float(contrast), 2),
            "saturation": round(float(np.mean([one.colour for one in samples])), 2),
            "sharpness": round(float(np.median([one.sharpness for one in samples])), 3),
            "border": round(float(1 - (1 - border[:2].sum()) * (1 - border[2:].sum())), 4),
            "text": round(float(np.median([one.text for one in samples])), 4),
            "overlay": None if lasting is None else round(lasting, 4)}


def difference(a, b):
    """Mean difference of two small pictures, levels of luma + chroma. The sums are of integers or
    halves: exact, in any order."""
    return sum(float(one) / a[0].size for one in np.abs(a - b).reshape(3, -1).sum(1))


def likeness(a, b, soft=math.inf):
    """Correlation of the gradients of two small pictures [..., h, w]: near 1 for the same picture
    under another light, near 0 for different ones. Gradients above `soft` levels saturate, so that
    one strong outline does not outweigh the rest."""
    a, b = (np.stack([one[..., 1:, 1:] - one[..., :-1, 1:],
                      one[..., 1:, 1:] - one[..., 1:, :-1]]).ravel() for one in (a, b))
    a, b = (one / (1 + np.abs(one) / soft) for one in (a, b))
    return float(a @ b / math.sqrt(max(float(a @ a) * float(b @ b), 1e-9)))


def fitted(small, side=12):
    """uint8 [C, side, side] by nearest samples of a small picture [C, h, w]."""
    height, width = small.shape[1:]
    picked = small.reshape(len(small), -1)[:, cells(width, height, width, side, side, 1)[0]]
    return picked.clip(0, 255).astype(np.uint8).reshape(-1, side, side)


@functools.lru_cache(8)
def blocks_of(n, count):
    """float32 [count, n]: 1 where a sample belongs to a block, for `count` about equal blocks."""
    return (np.arange(n) * count // n == np.arange(count)[:, None]).astype(np.float32)


def block_motion(old, new, reach=3, block=8):
    """float [blocks, 2]: dx, dy (px) of each block from `old` to `new` [h, w]: the least mean
    difference within `reach` px, refined by a parabola. Flat blocks are left out; a motion must
    reduce the difference by a fifth."""
    (height, width), size = old.shape, 2 * reach + 1
    down, across = (blocks_of(n, max(1, n // block)) for n in old.shape)
    rows, cols = down / down.sum(1, keepdims=True), (across / across.sum(1, keepdims=True)).T
    y, x = (np.arange(-reach, n + reach).clip(0, n - 1) for n in new.shape)
    padded = new[y][:, x]
    shifted = np.ndarray((size, size, height, width), np.float32, padded, 0, padded.strides * 2)
    cost = np.stack([rows @ np.abs(line - old) @ cols for line in shifted])     # in the cache
    cost = cost.reshape(size * size, -1)
    texture = (rows @ np.abs(old - down.T @ (rows @ old @ cols) @ across) @ cols).ravel()
    best, still = cost.argmin(0), cost[size * size // 2]
    at = np.arange(cost.shape[1])
    best = np.where(cost[best, at] < 0.8 * still - 0.3, best, size * size // 2)
    move = np.stack([best % size, best // size], 1) - float(reach)
    for axis, step in enumerate((1, size)):
        inner = np.abs(move[:, axis]) < reach
        low, mid, high = (cost[np.where(inner, best + d, best), at] for d in (-step, 0, step))
        bend = low + high - 2 * mid
        shift = np.where(inner & (bend > 1.0), (low - high) / (2 * bend + 1e-6), 0)
        move[:, axis] += np.where(np.abs(shift) > 0.1, shift, 0)
    return move[texture > 2] if (texture > 2).any() else np.zeros((1, 2))


def look_closely(luma):
    """(sharpness, border, text, edges) of a frame's luma, as in Sample. Sharpness: mean absolute
    Laplacian (levels) of the central 256 x 256 px. Black: below 30 of 255 along a whole line.
    Writing: many strong rising and falling edges in three adjacent cells."""
    top, left = (max(0, (side - 256) // 2) for side in luma.shape)
    mid = luma[top:top + 256, left:left + 256].astype(np.int16)
    around = mid[:-2, 1:-1] + mid[2:, 1:-1] + mid[1:-1, :-2] + mid[1:-1, 2:]
    laplacian = np.abs(4 * mid[1:-1, 1:-1] - around)
    border = [0.0 if line.all() else float(np.argmin(one)) / len(line)
              for line in (luma[:, ::8].max(1) < 30, luma[::8].max(0) < 30)
              for one in (line, line[::-1])]
    step = max(1, round(max(luma.shape) / 192))
    mid = luma[::step, ::step].astype(np.int16)
    slope = np.diff(mid, axis=1) if mid.shape[1] > 1 else np.zeros_like(mid)
    rise, fall = slope > 40, slope < -40
    down, across = (blocks_of(n // size * size or n, max(1, n // size))
                    for n, size in zip(slope.shape, (6, 8)))
    both = [down @ one[:down.shape[1], :across.shape[1]].astype(np.float32) @ across.T
            for one in (rise, fall)]
    cell = np.minimum(*both) >= 4
    row = cell[:, 2:] & cell[:, 1:-1] & cell[:, :-2]
    return (float(laplacian.mean()) if laplacian.size else 0.0, border,
            float(row.mean()) if row.size else 0.0,
            np.packbits(fitted((rise | fall)[None], 64).astype(bool)))


def usual_change(change, j):
    """The second largest change of the WINDOW frames around frame j (the largest may be another
    cut, or half of this one) or, if less, 1.25 times the mean of the largest of each side (a still
    shot before a fast one)."""
    sides = change[max(1, j - WINDOW):j], change[j + 1:j + 1 + WINDOW]
    sides = [[value for value in side if value < math.inf] for side in sides]
    close = sorted([0, 0, *sides[0], *sides[1]])[-2]
    return max(1.0, min(close, 1.25 * sum(max(side, default=0) for side in sides) / 2))


def find_cuts(scan, ratio, min_shot):
    """First frames of new shots (not frame 0). A cut changes the picture by at least FLOOR levels
    and `ratio` times the usual change, permanently (after a flash the picture is as before), and
    in structure (not only in light). Of cuts less than `min_shot` s apart, or from the start, the
    greatest is kept."""
    change = scan.change.tolist()
    at_frame = {frame: math.inf for frame in scan.breaks}
    for j, across in scan.across.items():
        times_usual = change[j] / usual_change(change, j)
        if times_usual >= ratio and across > 0.4 * change[j] and scan.alike[j] < LAMP:
            at_frame[j] = times_usual
    cuts = []
    for j in sorted(at_frame, key=lambda j: -at_frame[j]):
        gaps = [abs(scan.times[j] - scan.times[other]) for other in [0, *cuts]]
        if min(gaps) >= min_shot - 1e-6 or at_frame[j] == math.inf:
            cuts.append(j)
    return sorted(cuts)


def find_gradual(scan, fps, cuts):
    """[(first, stop)]: frames of fades and dissolves, sorted, disjoint, without cuts inside. A fade
    passes a flat picture. In a dissolve every frame mixes the first and the last, in growing
    parts, and both sides move less."""
    hard, result = np.array(cuts, dtype=int), []
    reach = round(1.2 * fps)
    for level, floor in ((scan.spread, 8), (scan.spread + scan.light, 14)):    # flat; black
        runs = np.flatnonzero(np.diff(np.r_[0, level < floor, 0])).reshape(-1, 2)
        for a, b in runs.tolist():
            sides = level[max(0, a - reach):a], level[b:b + reach]
            full = [np.median(side) if len(side) else 0.0 for side in sides]
            if max(full) < 2 * floor or ((hard >= a - 1) & (hard <= b + 1)).any():
                continue
            early = next((i for i in range(a, max(0, a - reach), -1)
                          if level[i - 1] > 0.85 * full[0]), a)
            late = next((i for i in range(b, min(len(level), b + reach))
                         if level[i] > 0.85 * full[1]), b)
            if a - early + late - b < 4:               # a flash, a blank frame
                continue
            # a long flat run is a shot of its own, with a fade on either side
            result += [(math.inf, early, late)] if b - a < 1.5 * fps else \
                [(math.inf, *span) for span in ((early, a), (b, late)) if span[0] < span[1]]
    for seconds_long in (0.3, 0.45, 0.65, 0.95, 1.4):
        result += dissolves(scan, max(4, round(seconds_long * fps / 4) * 4), hard)
    kept = []
    for _, a, b in sorted(result, reverse=True):
        if all(b <= other or a >= stop for other, stop in kept) and \
                not ((hard > a) & (hard < b)).any():
            kept.append((a, b))
    return sorted(kept)


def dissolves(scan, n, hard):
    """[(score, first, stop)] of the dissolves that take about n frames."""
    runs, pad = [], n // 2
    for at in range(0, len(scan.tiny) - n, 4096):      # in blocks, which become floats
        tiny = scan.tiny[at:at + 4096 + n].reshape(-1, 432)
        some = tiny[:, ::4].astype(np.float32)
        way, half = some[n:] - some[:-n], some[n // 2:-(n // 2)] - some[:-n]
        length = np.einsum("ij,ij->i", way, way) + 1e-6
        part = np.einsum("ij,ij->i", half, way) / length
        rest = np.einsum("ij,ij->i", half, half) - part * part * length
        likely = (length > 108 * 15 ** 2) & (np.abs(part - 0.5) < 0.25) & (rest < 0.12 * length)
        for t in np.flatnonzero(likely).tolist():
            first = at + t
            outer = scan.tiny[[max(0, first - pad), first, first + n,
                               min(len(scan.tiny) - 1, first + n + pad)]].astype(np.float32)
            inner = tiny[t:t + n + 1].astype(np.float32) - outer[1].ravel()
            way = inner[-1]
            parts = inner @ way / (way @ way)
            rest = np.sqrt(((inner - parts[:, None] * way) ** 2).sum(1) / (way @ way))
            quiet = [float(np.abs(x - y).mean() / np.abs(way).mean())
                     for x, y in zip(outer[::2], outer[1::2])]
            ends, mid = scan.spread[[first, first + n]], scan.spread[first + n // 2]
            # a mixture of two pictures has less contrast than their mean, unlike one that brightens
            is_mixed = mid < (np.hypot(*ends) / 2 + ends.mean()) / 2 + 0.5
            if ends.max() > 8 and is_mixed and rest.max() < 0.35 \
                    and max(quiet) < 0.4 and np.diff(parts[::max(1, n // 8)]).min() > 0 \
                    and likeness(outer[1][0], outer[2][0]) < 0.3:
                runs.append((float(np.abs(way).mean() * (1 - rest.max() - max(quiet))),
                              first + 1, first + n))
    return runs


def find_shots(scan, fps, options):
    """[(shot's first, shot's stop, first, stop)]: frames of each detected shot (a fade or dissolve
    is halved), and of its clip: without the transition and --trim s at both ends. Shots whose
    touching frames have the same colours, at most --stitch levels apart, are joined."""
    cuts, n = scan.breaks, len(scan.times)
    edges = [(0, 0, 0), (n, n, n)]
    if options["split"] == "shots":
        cuts = find_cuts(scan, options["cut_ratio"], options["min_shot"])
        for a, b in find_gradual(scan, fps, cuts):
            middle = 0 if a < 2 else n if b > n - 2 else (a + b) // 2
            edges = [edge for edge in edges if edge[0] != middle] + [(middle, a, b)]
    for cut in cuts:
        sides = [np.sort(scan.tiny[k].reshape(3, -1).astype(np.float32)) for k in (cut - 1, cut)] \
            if options["stitch"] and cut not in scan.breaks else [0, math.inf]
        if np.abs(sides[0] - sides[1]).mean() > options["stitch"]:
            edges.append((cut, cut, cut))
    shots, edges = [], sorted(edges)
    for (begin, _, first), (end, stop, _) in zip(edges, edges[1:]):
        first, stop = (0 if begin == first == 0 else first), (n if end == n == stop else stop)
        if options["trim"]:
            inside = np.searchsorted(scan.times, (scan.times[first] + options["trim"] - 1e-6,
                                                  scan.end(stop, fps) - options["trim"] - 1e-6))
            first, stop = int(inside[0]), int(inside[1])
        first = min(first, n - 1)
        shots.append((begin, end, first, max(stop, first + 1)))
    return shots


# -- clips: what to cut, what to leave out, the second pass ----------------------------------------

# score: (meaning, reject reason below --min_SCORE, reject reason above --max_SCORE). None: there is
# no such bound, as --max_seconds and --max_side cut and scale.
SCORES = {
    "seconds": ("length, s", "too short", None),
    "side": ("shorter side, px", "too small", None),
    "aspect": ("width over height", "too narrow", "too wide"),
    "rate": ("frames a second", "too slow a rate", "too fast a rate"),
    "motion": ("change of a small picture, levels a second", "too still", "too restless"),
    "flow": ("mean speed of its blocks, diagonals a second", "too little flow", "too much flow"),
    "shake": ("change of the camera's velocity, diagonals a second", "too steady", "shaking"),
    "brightness": ("mean luma, 0..255", "too dark", "too bright"),
    "contrast": ("deviation of luma within a frame, 0..255", "too flat", "too harsh"),
    "saturation": ("mean distance of chroma from grey, 0..128", "too grey", "too colourful"),
    "sharpness": ("mean Laplacian of luma, levels", "too blurred", "too sharp"),
    "border": ("black part at the edges, 0..1", "no borders", "black borders"),
    "text": ("part that looks like writing, 0..1", "no writing", "writing"),
    "overlay": ("part whose edges stay while the rest moves, 0..1", "no overlay", "overlay"),
    "flicker": ("swing of the mean luma from frame to frame, levels", "no flicker", "flicker"),
    "repeats": ("share of frames that repeat the one before", "no repeats", "repeated frames"),
    "damage": ("share of frames that are damaged or missing", "no damage", "damaged"),
    "bpp": ("bits a pixel of the source", "too few bits", "too many bits")}
# min_seconds: half of --max_seconds if that is less, the shortest of equal pieces
DEFAULTS = {"min_seconds": 0.5, "min_side": 32.0, "min_contrast": 1.0}


def failure(row, options):
    """The reject for the first filter that a row's scores or captions fail, or None. Captions that
    fail are dropped from a row that keeps another (--policy any)."""
    times = (None, None) if row["fps"] is None else (row["start"], row["end"])
    for score, (_, *reasons) in SCORES.items():
        value = row["scores"].get(score)
        for sign, bound, reason in zip((1, -1), ("min_", "max_"), reasons):
            limit = options[bound + score] if reason else None
            if score == "seconds" and limit and options.get("max_seconds") and row["fps"]:
                # pieces are whole frames: 0.5 s at 25 frames/s may be 0.48 s
                limit = min(limit, options["max_seconds"] - 1 / row["fps"])
            if value is not None and limit is not None and sign * value < sign * limit:
                return rejection(row["source"], reason, *times, value, limit)
    faults = [caption_fault(caption["text"], options) for caption in row["captions"]]
    bad = [fault for fault in faults if fault]
    if bad and (options["policy"] == "all" or all(faults)):
        return rejection(row["source"], bad[0][0], *times, *bad[0][1:])
    row["captions"] = [one for one, fault in zip(row["captions"], faults) if not fault]
    return None


def caption_fault(text, options):
    """(reason, figure, threshold) if a caption fails a filter, else None. Each Chinese, Japanese or
    Korean character is a word."""
    east = r"\u3040-\u9fff\uac00-\ud7a3"
    words = re.findall(rf"[{east}]|[^\W{east}]+", text.lower())
    pairs, letters = list(zip(words, words[1:])), [c for c in text if c.isalpha()]
    repeated = round(1 - len(set(pairs)) / max(1, len(pairs)), 4)
    own = sum(unicodedata.name(c, "").startswith(options["alphabet"] or "") for c in letters)
    banned = set(words) & set(options["banned"] or ())
    for limit, sign in ((options["min_words"], 1), (options["max_words"], -1)):
        if limit is not None and sign * len(words) < sign * limit:
            return "caption's length", len(words), limit
    if repeated > options["max_repeated"]:
        return "caption repeats itself", repeated, options["max_repeated"]
    if own < 0.9 * len(letters):
        return "caption's alphabet", round(own / len(letters), 4), options["alphabet"]
    return ("caption has a banned word", min(banned), None) if banned else None


def row_of(source, n, facts, fps, width, height, scores, samples, times=(0.0,) * 4, n_frames=1):
    """The record of a source's n-th clip in the shard's jsonl; times: shot_start, shot_end, start,
    end. Keys are unique in a data set and hold no '.' or '/', at which WebDataset readers split."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).stem).strip("-")[:40] or "clip"
    times = [round(at, 6) for at in times]
    metadata, more = clip_metadata(source, facts, *times[2:])
    return {"key": f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}-{n:03d}",
            "offset": None, "length": None, "source": source, "shot_start": times[0],
            "shot_end": times[1], "start": times[2], "end": times[3], "frames": n_frames,
            "fps": fps, "width": width, "height": height, **metadata, "scores": {**more, **scores},
            "hash": video_hash(samples)}


def plan_clips(scan, source, facts, options):
    """[(row, frames, border)] of a video's clips in order, not filtered yet: `frames` are the
    numbers of the source's frames that the clip shows, border is the part to crop."""
    fps, is_constant = scan.rate()
    if fps > 1000:
        raise Unreadable("too fast a rate", fps)
    every = max(1, math.ceil(fps / options["max_fps"] - 1e-3)) if options["max_fps"] else 1
    place_frames(facts, scan, fps)
    clips = []
    for begin, end, first, stop in find_shots(scan, fps, options):
        shot = float(scan.times[begin]), scan.end(end, fps)
        edges = [first, *inner_edges(scan, first, stop, fps, options), stop]
        for a, b in zip(edges, edges[1:]):
            start, end = float(scan.times[a]), scan.end(b, fps)
            frames = np.arange(a, b, every)
            if not is_constant:         # the slack: rounding to ticks must not repeat a frame
                at = start + np.arange(max(1, round((end - start) * fps / every))) * every / fps
                slack = min(scan.tick, 0.001) + 1e-9
                frames = np.searchsorted(scan.times, at + slack, side="right") - 1
            mine = scan.looks(a, b)
            row = row_of(source, len(clips), facts, round(float(frame_rate(fps / every)), 6), None,
                         None, scan.scores(a, b, fps), mine, (*shot, start, end), len(frames))
            border = np.min([one.border for one in mine], axis=0) if options["crop"] else [0] * 4
            clips.append((row, frames.clip(a, b - 1), tuple(border)))
    return clips


def inner_edges(scan, first, stop, fps, options):
    """Frame numbers at which the shot first..stop is cut into clips of at most --max_seconds."""
    longest, start, end = options["max_seconds"], float(scan.times[first]), scan.end(stop, fps)
    if options["split"] == "none" or not longest:
        return []
    if options["split"] == "seconds":                  # full lengths and a remainder
        at = np.arange(start + longest, end - 1e-6, longest)
    else:                                              # equal pieces
        at = np.linspace(start, end, max(1, math.ceil((end - start) / longest - 1e-6)) + 1)[1:-1]
    inner = np.searchsorted(scan.times, at - min(scan.tick, 0.001) / 2 - 1e-9)
    return sorted({int(frame) for frame in inner if first < frame < stop})


def encode_clips(video, clips, options):
    """Second pass: yields (row, open MP4 file) for the clips [(row, frames, border)], in order.
    Memory holds one frame and one encoder, and no clip."""
    numbered, n, frame = enumerate(video), -1, None

    def shown(numbers, border):
        nonlocal n, frame
        for number in numbers:
            while n < number:
                n, frame = next(numbered, (math.inf, None))
            if frame is None:
                raise Unreadable("changes while it is read")
            yield video.rgb(frame, options["max_side"], border)

    for row, numbers, border in clips:
        file = tempfile.TemporaryFile()
        row["height"], row["width"] = encode(file, shown(numbers, border), row["fps"],
                                             options["crf"])
        yield row, file


def copied(video, scan, clips, options):
    """(row, open MP4 file) with the packets of a file in plain H.264 (8 bits, 4:2:0, limited range,
    square pixels, not rotated, constant rate, nothing to scale or crop) that is one clip. None for
    any other, and if the copy does not decode to the same frames."""
    row, frames, border = clips[0]
    (width, height), n = scan.sizes[0], len(scan.times)
    if len(clips) > 1 or len(frames) != n or (np.diff(frames) != 1).any() or any(border) or \
            video.codec != "h264" or not scan.is_plain or video.bad_packets or video.sar != 1 or \
            video.matrix or width % 2 or height % 2 or len(scan.sizes) > 1 or \
            0 < options["max_side"] < max(width, height) or not scan.rate()[1]:
        return None
    out, shift = tempfile.TemporaryFile(), None
    out.suffix = ".mp4"
    try:
        with opened(video.path) as (source, stream), av.open(out, "w", format="mp4") as target:
            to = target.add_stream_from_template(stream)
            early, step = [], 1 / (scan.rate()[0] * video.tick)
            for packet in demuxed(source, stream):
                if packet.dts is None:                 # the first of Matroska, the empty last one
                    early.append(packet)
                    continue
                for n_more, one in zip(range(len(early), -1, -1), [*early, packet]):
                    one.dts = packet.dts - round(n_more * step)
                    shift = one.dts if shift is None else shift
                    one.pts, one.dts, one.stream = one.pts - shift, one.dts - shift, to
                    target.mux(one)
                early = []
        stamps = [frame.pts for frame in Video(out, video.beat, hdr="reject")]
        if len(stamps) != n or min(np.diff(stamps), default=1) <= 0:    # AVI's times of B-frames
            return None
    except (FFmpegError, TypeError, ValueError, Unreadable) as error:
        if is_machine_error(error):
            raise
        return None                                    # no timestamps, or not allowed in an MP4
    row["width"], row["height"] = width, height
    return row, out


def clips_of(root, source, facts, options, beat=lambda n: None):
    """Yields (row, suffix, open file) for each clip of a file, and (reject, None, None)."""
    try:
        if is_archive(source):                         # a damaged one: its members are sources
            raise Unreadable("archive is not whole", None, archive_index(Path(root, source))[1])
        path, texts = located(root, source)
        if not facts:                                  # no --meta, or none of this file
            facts, rejects = beside(source, texts, options["meta"] or options["format"] is None)
            yield from ((reject, None, None) for reject in rejects)
        is_still = path.suffix.lower() in STILLS and not is_animated(path)
        if is_still:
            row, file = still_row(path, source, facts, options)
            clips, end = [(row,)], 0.0
        else:
            video = Video(path, beat, options["hdr"], options["interlaced"])
            scan = Scan(video)
            if min(map(min, scan.sizes.values())) < 2:
                raise Unreadable("too small", min(map(min, scan.sizes.values())))
            clips = plan_clips(scan, source, facts, options)
            end = scan.end(len(scan.times), scan.rate()[0])
            for row, *_ in clips:
                row["scores"]["bad_packets"] = video.bad_packets
                row |= {"converted": sorted(video.converted)} if video.converted else {}
        rejects = [*unused(source, facts, clips, end)]
        failures = [failure(row, options) for row, *_ in clips]
        kept = [clip for clip, reject in zip(clips, failures) if not reject]
        yield from ((reject, None, None) for reject in [*rejects, *filter(None, failures)])
        if not kept:
            return
        if is_still:
            file = file or (path.open("rb") if isinstance(path, Path) else path)
            suffix, made = getattr(file, "suffix", path.suffix).lower(), [(row, file)]
        else:
            whole = copied(video, scan, kept, options)
            suffix, made = ".mp4", [whole] if whole else encode_clips(video, kept, options)
        for row, file in made:
            n_bytes = file.seek(0, os.SEEK_END)
            if n_bytes <= MOST_BYTES:
                yield row, suffix, file
            else:
                yield rejection(source, "too large for a tar", row["start"], row["end"], n_bytes,
                                MOST_BYTES), None, None
    except Unreadable as error:
        reason, figure, detail = (*error.args, None, None)[:3]
        yield rejection(source, reason, figure=figure, detail=detail), None, None
    except Exception as error:          # an unexpected error rejects this file only
        if is_machine_error(error):
            raise
        if isinstance(error, FileNotFoundError) and not (   # unmounted: all would be rejected
                os.path.isdir(root) and any(os.scandir(root))):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(root)) from None
        yield faulted(source, error), None, None


def faulted(source, error):
    """The reject of a file that raised an exception. If it is an error of this program, the reject
    holds the traceback until `make_shard` writes that to faults.log."""
    if isinstance(error, (FFmpegError, OSError)):
        return rejection(source, f"cannot be read: {error.strerror or error}")
    where = [one.name for one in traceback.extract_tb(error.__traceback__)
             if one.filename == __file__] or ["clips_of"]
    return rejection(source, f"{FAULT}{type(error).__name__} in {where[-1]}", detail=printable(
        error)[:200]) | {"trace": "".join(traceback.format_exception(error))}


def still_row(path, source, facts, options):
    """(row, None or a new file). A still is a clip of one frame without a rate. It keeps its bytes,
    except that HEIC and HDR become PNG; readers scale it to the size in the row."""
    try:
        pixels, converted = decoded_still(path, options["hdr"])
    except PICTURE_ERRORS as error:
        if is_machine_error(error):
            raise
        raise Unreadable("broken picture") from None
    (height, width), cap = pixels.shape[:2], options["max_side"]
    frame, video = av.VideoFrame.from_ndarray(pixels, format="rgb24"), Video(path)
    small = video.small(frame)
    samples, shrink = [Sample(0, 0.0, video, frame, small)], min(1, (cap or math.inf) / max(
        height, width))
    scores = still_scores(samples, width, height, small[0].mean(), small[0].std(dtype=float))
    row, file = row_of(source, 0, facts, None, max(1, round(width * shrink)),
                       max(1, round(height * shrink)), scores, samples), None
    if converted:
        row["converted"], file = sorted(converted), in_memory(b"", ".png")
        Image.fromarray(pixels).save(file, "PNG")
    return row, file


# -- near-duplicates -------------------------------------------------------------------------------

RICH = 0.2              # plain pictures: no more of the hash's neighbouring bits differ
HUE, COLOUR = 6.0, 3.0  # greatest differences of mean colours, levels
NS_A_PAIR = 440.0       # cost of comparing two hashes
LOOK = 32               # side of the pictures that `closer_look` compares


def video_hash(samples):
    """Perceptual hash, hex: 256 bits each for the picture inside its black borders and for its
    middle without 4, 8 and 12% on every side, then 48 bytes, the mean colours of 4 x 4 cells. Bits:
    of four moments, which of 8 x 8 cells are lighter than the median. [] for pictures too plain."""
    top, bottom, left, right = np.min([one.border for one in samples], axis=0)
    some, result = [samples[i] for i in np.linspace(0, len(samples) - 1, 4).round().astype(int)], []
    for margin in (0, 0.04, 0.08, 0.12):
        bits = []
        for one in some:
            y, x = (((np.arange(16) + 0.5) / 16 * (1 - 2 * margin) + margin) * (1 - a - b) + a
                    for a, b in ((top, bottom), (left, right)))
            cell = one.thumb[(y * 24).astype(int)[:, None], (x * 24).astype(int)]
            cell = turned(cell.reshape(8, 2, 8, 2).sum((1, 3), dtype=int), one.matrix)
            bits.append(cell > np.median(cell) + 8)
        result.append(np.packbits(bits).tobytes().hex())
        if np.mean(bits) < 0.2:
            return []
    colours = np.mean([turned(one.colours, one.matrix) for one in some], axis=0)
    return [*result, colours.astype(np.uint8).tobytes().hex()]





@functools.lru_cache(256)
def closer_look(folder, shard, offset, length, n_frames, fps, width, height):
    """float32 [4, 4, LOOK, LOOK]: luma minus its median, of four moments of a clip with the same
    four margins as for the hash."""
    row = {"shard": shard, "offset": offset, "length": length, "fps": fps, "width": width,
           "height": height}
    at = np.linspace(0, n_frames - 1, 4).round().astype(int).tolist()
    seen = dict(zip(sorted(set(at)), clip_frames(folder, row, set(at))))
    seen = {k: Image.fromarray(frame).convert("L") for k, frame in seen.items()}
    looks = np.stack([[np.asarray(seen[k].resize((LOOK, LOOK), Image.Resampling.BOX, (
        *(side * cut for side in seen[k].size), *(side * (1 - cut) for side in seen[k].size))),
        np.float32) for k in at] for cut in (0, 0.04, 0.08, 0.12)])
    return looks - np.median(looks, (2, 3), keepdims=True)


def is_duplicate(folder, a, b):
    """Whether two clips with similar hashes show the same. Pieces of one shot: no frame differs by
    more than a level on average. Others, one perhaps cropped: the same structure, or the same
    except for a small static part (a logo)."""
    if all(a[name] == b[name] for name in ("source", "shot_start", "shot_end")):
        return all(np.abs(x.astype(np.int16) - y).mean() <= 1
                   for x, y in zip(clip_frames(folder, a), clip_frames(folder, b)))
    x, y = (closer_look(folder, *(row[name] for name in (
        "shard", "offset", "length", "frames", "fps", "width", "height"))) for row in (a, b))
    for one, other in (*zip(x, y[:1].repeat(4, 0)), *zip(x[:1].repeat(4, 0), y)):
        size = math.sqrt(float((one * one).sum()) * float((other * other).sum()))
        if (one * other).sum() > 0.97 * size or (np.abs(one - other) > 20).any(0).mean() < 0.05:
            return True
    return False


def bit_distance(a, b):
    """Number of the 256 bits that differ between hashes uint64 [n, 4, 4], one perhaps cropped."""
    return np.minimum(*(np.bitwise_count(x ^ y[:, :1]).sum(2, dtype=int).min(1)
                        for x, y in ((a, b), (b, a))))


def like_pairs(bits, most, stop):
    """(a, b), int [n] each: the pairs a < b < stop[a] that differ in at most `most` bits. Of m
    bands of the bits at least one differs in at most `most // m`: each clip is looked up by band,
    with up to so many bits flipped, in a table of the uncropped ones. All pairs are compared
    instead if that is estimated to be faster (work in ns)."""
    n, plans, pairs = len(bits), [], []
    for m in range(13, 65):
        width, radius = -(-256 // m), most // m
        n_masks = sum(math.comb(width, i) for i in range(radius + 1))
        work = m * (2**(width + 3) + 4 * n_masks * (50000 + 2 * n + 50 * n * n / 2**(256 / m)))
        plans += [(work, m, width, radius)] if n_masks < 10000 else []
    work, m, width, radius = min(plans)
    if work >= NS_A_PAIR * (stop - np.arange(n)).sum():
        for a in range(n):
            b = np.flatnonzero(bit_distance(bits[a:a + 1], bits[a + 1:stop[a]]) <= most) + a + 1
            pairs.append(a * n + b)
        pairs = np.concatenate(pairs)
        return pairs // n, pairs % n
    masks = [sum(1 << i for i in some) for k in range(radius + 1)
             for some in itertools.combinations(range(width), k)]
    for k in range(m):                 # a band is every m-th bit, as neighbouring bits correlate
        codes = [np.unpackbits(np.ascontiguousarray(bits[:, j]).view(np.uint8), axis=1)[:, k::m]
                 for j in range(4)]
        codes = [code @ (1 << np.arange(code.shape[1])) for code in codes]
        order = np.argsort(codes[0], kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(codes[0], minlength=2**width))])
        is_there = np.diff(first) > 0
        for j, mask in itertools.product(range(4), masks):
            wanted = codes[j] ^ mask
            b = np.flatnonzero(is_there[wanted])
            low, n_like = first[wanted[b]], first[wanted[b] + 1] - first[wanted[b]]
            cuts = np.flatnonzero(np.diff(np.cumsum(n_like) // 2**20)) + 1    # bounds the memory
            for b, low, n_like in zip(*(np.split(one, cuts) for one in (b, low, n_like))):
                at = np.arange(n_like.sum()) + np.repeat(low - np.cumsum(n_like) + n_like, n_like)
                a, b = order[at], np.repeat(b, n_like)
                key = np.minimum(a, b) * n + np.maximum(a, b)
                near = (a != b) & (key % n < stop[key // n])
                a, b, key = a[near], b[near], key[near]
                pairs.append(key[np.bitwise_count(bits[a, 0] ^ bits[b, j]).sum(1, dtype=int)
                                 <= most])
        pairs = [np.unique(np.concatenate(pairs))]
    return pairs[0] // n, pairs[0] % n


def near_duplicates(rows, near, same=lambda a, b: True):
    """[(row, the row that is kept, distance)]: clips of similar length and brightness whose hashes
    differ in less than `near` of their bits, one of them perhaps cropped. Of such clips the one
    with the most pixels is kept, then the one with the most bytes, then the first. Each is compared
    with kept ones only, so that similarity does not chain. Chroma must be similar, unless one is
    grey; plain pictures, whose hashes are often equal, must have equal colours. `same` is the final
    test of a pair."""
    hashed = sorted((i for i, row in enumerate(rows) if row.get("hash")),
                   key=lambda i: rows[i]["end"] - rows[i]["start"])
    if not hashed or not near:
        return []
    length = np.array([rows[i]["end"] - rows[i]["start"] for i in hashed])
    stills = np.array([rows[i]["fps"] is None for i in hashed])
    light = np.array([rows[i]["scores"]["brightness"] for i in hashed])
    hashes = np.frombuffer(bytes.fromhex("".join("".join(rows[i]["hash"]) for i in hashed)),
                           np.uint8).reshape(len(hashed), -1)
    bits = np.ascontiguousarray(hashes[:, :128]).reshape(-1, 4, 32).view(np.uint64)
    colours = hashes[:, 128:].reshape(-1, 16, 3).astype(np.int16)
    grey = np.abs(colours[..., 1:] - 128).mean((1, 2)) < 4
    cell = np.unpackbits(hashes[:, :32], axis=1).reshape(-1, 4, 8, 8)
    rich = ((cell[:, :, 1:] != cell[:, :, :-1]).mean((1, 2, 3))
            + (cell[..., 1:] != cell[..., :-1]).mean((1, 2, 3))) / 2 > RICH
    stop, pairs = np.searchsorted(length, length * 1.02 + 0.15, side="right"), {}
    a, b = like_pairs(bits, math.ceil(near * 256) - 1, stop)
    for a, b in zip(*(np.array_split(part, len(a) // 2**16 + 1) for part in (a, b))):
        distance = bit_distance(bits[a], bits[b]) / 256
        alike = (stills[b] == stills[a]) & (np.abs(light[b] - light[a]) < 40)
        luma, *chroma = np.abs(colours[b] - colours[a]).mean(1).T
        hue = np.mean(chroma, axis=0)
        alike &= np.where(rich[b] & rich[a], (hue < HUE) | grey[b] | grey[a],
                          np.maximum(hue, luma) < COLOUR)
        for k in np.flatnonzero(alike).tolist():
            i, j = hashed[a[k]], hashed[b[k]]
            pairs.setdefault(i, []).append((float(distance[k]), j))
            pairs.setdefault(j, []).append((float(distance[k]), i))
    order = sorted(pairs, key=lambda i: (
        not rows[i].get("is_fixed"), -rows[i]["width"] * rows[i]["height"], -rows[i]["length"], i))
    kept, result = set(), []
    for i in order:
        nearest_first = [] if rows[i].get("is_fixed") else sorted(pairs[i])
        distance, j = next(((distance, j) for distance, j in nearest_first
                            if j in kept and same(rows[i], rows[j])), (None, None))
        if j is None:
            kept.add(i)
        else:
            result.append((rows[i], rows[j], distance))
    return result


# -- shards: one process each, watched -------------------------------------------------------------

def run_shard(pipe, *arguments):
    """Entry point of a shard's process. Sends the message of a machine error through `pipe`."""
    die_with_parent()
    try:
        make_shard(pipe, *arguments)
    except Exception as error:
        if not is_machine_error(error):
            raise
        pipe.send(fault_of(error))
        sys.exit(2)


def make_shard(pipe, folder, number, root, sources, database, options, bad):
    """Writes a shard: its tar, rejects and rows, the rows last as they mark it as done. Sends
    (number of the source, frames so far) through `pipe`. `bad` {source: reason}: files at which
    such a process crashed or hung."""
    name, rows, rejects = folder / f"shard-{number:05d}", [], []
    with atomic(f"{name}.tar") as part, \
            tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for n, source in enumerate(sources):
            pipe.send((n, 0))
            if source in bad:
                rejects.append(rejection(source, bad[source]))
                continue
            facts, lost = facts_of(database, options["format"], source) if database else ([], [])
            rejects += lost
            for row, suffix, file in clips_of(root, source, facts, options,
                                              lambda k: pipe.send((n, k))):
                if file is None:
                    note_fault(folder / "faults.log", row)
                    rejects.append(row)
                    continue
                row["offset"], row["length"] = add_member(tar, row["key"] + suffix, file)
                inside = {k: v for k, v in row.items() if k not in ("offset", "length")}
                add_member(tar, row["key"] + ".json", io.BytesIO(json_line(inside).encode()))
                rows.append(row)
        pipe.send((len(sources), 0))
    write_rows(f"{name}.rejected.jsonl", rejects)
    write_rows(f"{name}.jsonl", rows)


def note_fault(log, reject):
    """Moves the traceback of a reject, if it has one, to faults.log, in one write."""
    if trace := reject.pop("trace", None):
        with open(log, "ab") as file:
            file.write(f"{json.dumps(reject['source'])}\n{trace}\n".encode(
                errors="backslashreplace"))


def add_member(tar, name, file):
    """Appends a file, without time or owner; returns the offset and number of its bytes."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = file.seek(0, os.SEEK_END), 0o644
    file.seek(0)
    offset = tar.fileobj.tell() + tarfile.BLOCKSIZE    # short names: the header is one block
    tar.addfile(header, file)
    return offset, header.size


def die_with_parent():
    """Ends this process when its parent ends, even if killed: an orphan would write beside the
    processes of the next run. Only the parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def deaf_children():
    """Processes started inside ignore Ctrl-C from their first instruction on."""
    set_mask = getattr(signal, "pthread_sigmask", lambda *_: ())       # not on Windows
    before = set_mask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        set_mask(signal.SIG_SETMASK, before)


class Job:
    """A shard in progress: its process, its current source, and the crashes so far."""

    def __init__(self, number, sources, *arguments):
        self.number, self.sources, self.arguments = number, sources, arguments
        self.bad, self.crashes = {}, Counter()

    def start(self, context):
        folder, root, database, options = self.arguments
        self.pipe, end = context.Pipe(duplex=False)
        self.at, self.since, self.frames, self.fault = None, time.monotonic(), 0, ""
        self.process = context.Process(target=run_shard, daemon=True, args=(
            end, folder, self.number, root, self.sources, database, options, self.bad))
        with deaf_children():
            self.process.start()
        end.close()

    def check(self, timeout, bar):
        """True once the shard is done, False if it must start again, None while it works."""
        is_alive, before = self.process.is_alive(), self.at or 0
        with contextlib.suppress(EOFError):
            while self.pipe.poll():
                message, self.since = self.pipe.recv(), time.monotonic()
                if isinstance(message, str):
                    self.fault = message
                else:
                    self.at, self.frames = message
        source = None if self.at in (None, len(self.sources)) else self.sources[self.at]
        if source and self.frames:      # progress within a long file
            bar.set_postfix_str(f"{self.frames} frames of {printable(Path(source).name)}",
                                refresh=False)
        bar.update((self.at or 0) - before)
        if is_alive and (source is None or time.monotonic() - self.since <= timeout):
            return None
        if is_alive:
            self.process.kill()
            self.bad[source] = "timed out"
        self.process.join()
        if self.process.exitcode == 0:
            return True
        self.judge(source)
        bar.update(-(self.at or 0))
        return False

    def judge(self, source):
        """Judges the end of the process. A single signal may be a stray kill. Two at one file are a
        crash of the decoder, or kills by the kernel, as when memory runs out."""
        self.crashes[source] += 1
        at, again = f"shard {self.number}{f', at {source}' * bool(source)}: ", \
            "; nothing is lost, the same command goes on"
        if self.fault:
            refuse(at + self.fault + again)
        if self.process.exitcode > 0:
            refuse(f"{at}its process failed, see above")
        if self.crashes[source] < (2 if source else 3) or source in self.bad:
            return
        if source is None or self.process.exitcode in (-signal.SIGTERM, -9):       # SIGKILL
            refuse(f"{at}its process was killed {self.crashes[source]} times, perhaps for lack of "
                   f"memory: give fewer --workers, or take that file away{again}")
        self.bad[source] = "decoder crashed"


def run_jobs(jobs, n_workers, timeout):
    """Runs the jobs, `n_workers` at a time, each in a new process, so that leaks of a decoder end
    with its shard. Time in which this process was suspended does not count as a timeout."""
    context, waiting, running = multiprocessing.get_context("spawn"), deque(jobs), []
    n_files, now = sum(len(job.sources) for job in jobs), time.monotonic()
    with tqdm(total=n_files, unit="file", miniters=0, disable=not jobs) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < n_workers:
                    job = waiting.popleft()
                    job.start(context)
                    running.append(job)
                connection.wait([handle for job in running
                                 for handle in (job.pipe, job.process.sentinel)], timeout=1)
                before, now = now, time.monotonic()
                for job in list(running):
                    job.since += (now - before) * (now - before > 2)
                    state = job.check(timeout, bar)
                    if state is not None:
                        running.remove(job)
                        waiting.extendleft([] if state else [job])
        finally:
            for job in running:
                job.process.kill()


# -- the plan, the run, the end --------------------------------------------------------------------



def find_sources(root, folder, form):
    """([[relative path, bytes]] sorted, {kind: (number, first)} of other files, number of
    thumbnails) under `root`, without hidden files. For formats in archives the members are
    sources, and so is a damaged archive itself. A picture beside a video of the same name is its
    thumbnail."""
    result, others = [], {}

    def pass_over(kind):
        n, first = others.get(kind, (0, name))
        others[kind] = n + 1, min(first, name)
    for where, files in walk(root, folder):
        for path in (where / name for name in files):
            name, kind = path.relative_to(root).as_posix(), path.suffix.lower() or "no suffix"
            if path.name.startswith("."):
                pass_over("hidden")
            elif not path.is_file():
                pass_over("dead link" if path.is_symlink() else "no file")
            elif is_archive(name) and form in IN_ARCHIVES:
                inside, wrong = archive_index(path)
                result += [[f"{name}/{inner}", size] for inner, (_, size) in inside.items()
                          if Path(inner).suffix.lower() in VIDEOS | STILLS
                          and not Path(inner).name.startswith("._")]
                result += [[name, path.stat().st_size]] * bool(wrong)
            elif kind not in VIDEOS | STILLS:
                pass_over("tar" if is_archive(name) else kind)
            else:
                result.append([name, path.stat().st_size])
    stem = lambda name: name[:name.rfind("/") + 1] + bare(name)
    videos = {stem(name) for name, _ in result if Path(name).suffix.lower() in VIDEOS}
    sources = [one for one in result if Path(one[0]).suffix.lower() in VIDEOS
               or stem(one[0]) not in videos]
    return sorted(sources), others, len(result) - len(sources)


def blocks(sources, most, mib):
    """[[first, stop]] of the shards: a block ends with its `most`-th source, or with the source
    that fills `mib` MiB."""
    result, first, size = [], 0, 0
    for n, (_, n_bytes) in enumerate(sources, 1):
        size += n_bytes
        if n - first >= most or size >= mib * 2**20 or n == len(sources):
            result.append([first, n])
            first, size = n, 0
    return result


def make_plan(args, folder, root):
    """(plan, whether it is new) as in plan.json: the sorted sources, the shards, the options that
    shape the result. New files become further shards. Metadata may change: the rows of --meta, or a
    later --meta or --format. Any other difference is refused."""
    options = {name: getattr(args, name) for name in args.shaping} | {"meta": None}
    if args.meta:
        digests = (bytes.fromhex(file_sum(path)) for path in args.meta_files)
        options["meta"] = hashlib.sha256(b"".join(digests)).hexdigest()
    inputs = {"videos": str(args.videos), "meta": str(args.meta) if args.meta else None}
    plan = read_json(folder / "plan.json") if (folder / "plan.json").exists() else None
    sources, others, n_pictures = find_sources(root, folder, args.format)
    args.present = {name for name, _ in sources}
    damaged = [name for name, _ in sources if is_archive(name)]
    is_complete = plan and not missing_shards(folder, plan) and (
        has_manifest(folder) or (folder / "joining.json").exists())
    if plan is None:
        if damaged:
            wrong = f"{damaged[0]} is {archive_index(root / damaged[0])[1]}"
            print(f"warning: {len(damaged)} archives are not whole: {wrong}", file=sys.stderr)
        if len(sources) == len(damaged):
            refuse(f"no videos or stills under {root}: "
                   + (wrong if damaged else passed_over(others, "other files")))
        print(f"{len(sources)} files under {root}; {passed_over(others)}" + (
            f", and {n_pictures} pictures, thumbnails of the videos beside them" if n_pictures
            else ""), file=sys.stderr)
        return {"format": FORMAT, "options": options, "told": inputs, "sources": sources,
                "shards": blocks(sources, args.shard_sources, args.shard_mib)}, True
    before, now = dict(map(tuple, plan["sources"])), dict(map(tuple, sources))
    began = {**inputs, **plan.get("told", {})}
    is_other = os.path.abspath(began["videos"]) != os.path.abspath(args.videos)
    lost = [name for name in before if now.get(
        name, before[name] if is_complete and not is_other else None) != before[name]]
    if lost:
        refuse(f"{folder} was begun with --videos {began['videos']}" + (
            f", not {args.videos}" if is_other else "") + f": {lost[0]} went or changed (files may "
            "only be added); use that, or another NAME")
    new = [source for source in sources if source[0] not in before]
    if gone := [name for name in before if name not in now]:
        print(f"warning: {len(gone)} of the {len(before)} files of {folder} are gone from {root}, "
              f"such as {printable(gone[0])}: their clips stay", file=sys.stderr)
    had, plan["options"] = plan["options"], {**options, **OLD, **plan["options"]}
    is_same = not (began["meta"] and args.meta) or os.path.abspath(began["meta"]) == \
        os.path.abspath(args.meta)
    may_change = {"meta": is_same or new, "format": not {*IN_ARCHIVES} & {
        had.get("format"), args.format}}
    for name, value in sorted(options.items(), key=lambda one: one[0] != "meta"):
        was = had.get(name, value)
        if was != value and not (value and may_change.get(name)):
            was, value = (began["meta"], args.meta) if name == "meta" else (was, value)
            refuse(f"{folder} was made with --{name} {was}, not {value or 'without it'}: give "
                   "that, or another NAME")
        if was != value:
            plan |= {"is_retold": True, "told": {**began, "meta": inputs["meta"]}}
            plan["options"][name] = value
    is_changed = plan["options"] != {**plan["options"], **had}
    if not new or args.finish or (folder / "joining.json").exists():    # a join ends first
        return plan, is_changed
    print(f"{len(new)} new files under {root} are added to {folder}, as further shards; the "
          "existing shards stay as they are", file=sys.stderr)
    added = [[len(before) + n for n in block]
             for block in blocks(new, args.shard_sources, args.shard_mib)]
    return {**plan, "told": inputs, "sources": plan["sources"] + new,
            "shards": plan["shards"] + added}, True


def is_finished(folder, plan):
    """Whether the manifest has all shards of the plan, with its metadata."""
    about = read_json(folder / "manifest.json") if has_manifest(folder) else {"shards": ()}
    return len(about["shards"]) == len(plan["shards"]) and all(
        about.get("options", {}).get(name) == plan["options"][name] for name in ("meta", "format"))


def missing_shards(folder, plan):
    """Numbers of the shards that are not made, or of which a file is missing."""
    return [n for n in range(len(plan["shards"])) if not is_done(folder, n)]


def claim(lock, first, n, wait=False):
    """Locks bytes of an open file for this process; False if another process holds one of them."""
    with contextlib.suppress(BlockingIOError, PermissionError):
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), n, first)
        return True
    return False


OLD = {"hdr": "reject", "interlaced": "keep"}           # folders made before these options
SPAN = 2**40            # bytes of .lock: shards below SPAN, then one for joining, one for --meta


def prepare(args):
    """Makes one data set. A failed first attempt that wrote no shard leaves no folder."""
    folder, root = dataset_dir(args.name), Path(args.videos)
    if not root.is_dir():
        refuse(f"--videos {root} is not a folder")
    if args.meta:
        args.meta_files = meta_files(args.meta, args.format) if args.meta.exists() else []
        if not args.meta_files:
            refuse(f"--meta {args.meta} is not a file, nor a folder with files of --format "
                   f"{args.format}")
    plan, is_new = make_plan(args, folder, root)
    if not is_new and is_finished(folder, plan) and not missing_shards(folder, plan):
        if args.meta or not any(changed_metadata(args, folder, plan, n)[2]
                                for n in range(len(plan["shards"]))):
            print(f"{folder} is finished; nothing to do")
            return report(folder, root) if args.report else None
        is_new = plan["is_retold"] = True              # texts beside the files changed
    had = [path.exists() for path in (folder, folder.parent)]
    folder.mkdir(parents=True, exist_ok=True)
    (part, n_parts), is_ours = args.part, False
    try:
        with open(folder / ".lock", "ab") as lock:
            first = (part - 1) * SPAN // n_parts       # parts of one run share the file
            is_ours = args.finish or claim(lock, first, part * SPAN // n_parts - first)
            if not is_ours:
                refuse(f"another process prepares {folder}: wait for it, or stop it")
            make_shards(args, folder, root, plan, is_new, lock)
    except BaseException:
        if is_ours and not had[0] and n_parts == 1 and not any(folder.glob("shard-*.jsonl")):
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                had[1] or folder.parent.rmdir()
        raise


def make_shards(args, folder, root, plan, is_new, lock):
    """Makes the shards of this process and, if all exist then, joins them."""
    sweep(folder)
    database = (folder / "facts.db").absolute() if args.meta else None
    sources, (part, n_parts) = [name for name, _ in plan["sources"]], args.part
    claim(lock, SPAN + 1, 1, wait=True)                # of concurrent parts one reads --meta
    path, text = folder / "plan.json", json.dumps(plan)
    if is_new and not (path.exists() and path.read_text(encoding="utf-8") == text):
        if database:
            database.unlink(missing_ok=True)           # it is of other files or other rows
        write_text(path, text)
    if args.meta and not database.exists():
        read_metadata(args.meta_files, args.format, sources, database)
    if fcntl:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, SPAN + 1)
    reopen(folder, plan, lock)
    mine = [n for n in missing_shards(folder, plan) if n % n_parts == part - 1 and not args.finish]
    run_jobs([Job(n, sources[slice(*plan["shards"][n])], folder, root.absolute(), database,
                  plan["options"]) for n in mine], args.workers, args.timeout)
    left = missing_shards(folder, plan)
    if left and args.finish:
        refuse(f"{len(left)} of {len(plan['shards'])} shards of {folder} are not done, the first "
               f"is {left[0]}: run its part first")
    if left:
        print(f"this part of {folder} is done; {len(left)} shards are left to others")
        return
    claim(lock, SPAN, 1, wait=True)
    if not is_finished(folder, plan):
        finish(args, folder, plan, database)
    (folder / "facts.db").unlink(missing_ok=True)      # if made again while another part joined
    if args.report:
        report(folder, root)


def reopen(folder, plan, lock):
    """Removes the manifest of a data set if shards are lost or captions changed, so that all are
    joined again. The decision on duplicates stays, in joining.json."""
    def is_joined():
        return has_manifest(folder) and \
            len(read_json(folder / "manifest.json")["shards"]) == len(plan["shards"])
    if is_joined():
        claim(lock, SPAN, 1, wait=True)                # another part may be joining just now
        if is_joined():
            write_text(folder / "joining.json", json.dumps({
                "format": FORMAT, "duplicates": read_rows(folder / "duplicates.jsonl")}))
            (folder / "manifest.json").unlink()
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_UN, 1, SPAN)


def has_manifest(folder):
    return (folder / "manifest.json").is_file()


def is_done(folder, number):
    return all((folder / f"shard-{number:05d}.{suffix}").is_file() for suffix in SUFFIXES)


def settle(folder, plan):
    """[{key, of, distance}] of the duplicates; removes them from the tars and marks their rows.
    joining.json holds the decision until the manifest is written, so that a killed run continues
    with it. Shards of an existing manifest keep their bytes."""
    path, names = folder / "joining.json", [f"shard-{n:05d}" for n in range(len(plan["shards"]))]
    before = read_json(folder / "manifest.json")["shards"] if has_manifest(folder) else ()
    if path.exists():
        duplicates = read_json(path)["duplicates"]
    else:
        known = folder / "duplicates.jsonl"            # may exist without a manifest
        duplicates = read_rows(known) if known.exists() else []
        lost, seen, rows = {one["key"] for one in duplicates}, {}, []
        for name in names:
            for row in read_rows(folder / f"{name}.jsonl"):
                row |= {"shard": name, "is_fixed": name in before}
                if row["key"] in lost:
                    continue
                of = seen.setdefault(hashlib.sha256(read_member(folder, row)).digest(), row["key"])
                if of == row["key"] or row["is_fixed"]:
                    rows.append(row)
                else:
                    duplicates.append({"key": row["key"], "of": of, "distance": 0})
        near = {row["key"]: (of["key"], distance) for row, of, distance in near_duplicates(
            rows, plan["options"]["near"], functools.partial(is_duplicate, folder))}
        for one in duplicates:                         # equal to a clip that is a duplicate itself
            one["of"], one["distance"] = near.get(one["of"], (one["of"], one["distance"]))
        duplicates += [{"key": key, "of": of, "distance": round(distance, 4)}
                       for key, (of, distance) in near.items()]
        write_text(path, json.dumps({"format": FORMAT, "duplicates": duplicates}))
    of = {one["key"]: one["of"] for one in duplicates}
    for name in names:
        if name not in before:
            leave_out(folder, name, of)
    return duplicates


def leave_out(folder, name, of):
    """Removes the clips of a shard that are in `of` from its tar, then marks their rows. Run again
    after a kill between the two, it writes the same bytes."""
    rows = read_rows(folder / f"{name}.jsonl")
    mine, offsets = {row["key"] for row in rows if "duplicate_of" not in row} & of.keys(), {}
    if not mine:
        return
    with tarfile.open(folder / f"{name}.tar", "r:") as old, \
            atomic(folder / f"{name}.tar") as part, \
            tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for one in old:
            key, suffix = one.name.split(".")
            if key not in mine:
                offset = add_member(tar, one.name, old.extractfile(one))
                offsets |= {} if suffix == "json" else {key: offset}
    for row in rows:
        row["offset"], row["length"] = offsets.get(row["key"], (None, None))
        row |= {"duplicate_of": of[row["key"]]} if row["key"] in mine else {}
    write_rows(folder / f"{name}.jsonl", rows)


def finish(args, folder, plan, database):
    """Joins the shards: duplicates.jsonl, rejected.jsonl, contact.png, and manifest.json last. If
    two processes do so, they write the same bytes."""
    duplicates, shards, reasons, changed = settle(folder, plan), {}, Counter(), {}
    for n in range(len(plan["shards"])):
        name, later = f"shard-{n:05d}", folder / f"shard-{n:05d}.metadata.jsonl"
        if plan.get("is_retold"):
            *changed[name], _ = changed_metadata(args, folder, plan, n, database)
            later.unlink(missing_ok=True)
            if changed[name][0]:
                write_rows(later, changed[name][0])
        shards[name] = {f"{name}.{suffix}": file_sum(folder / f"{name}.{suffix}")
                        for suffix in (*SUFFIXES, *["metadata.jsonl"] * later.exists())}
    rows = kept_rows(folder, shards, duplicates)
    if n_changed := sum(len(some) for some, _ in changed.values()):
        print(f"{folder}: captions, labels or splits of {n_changed} clips are others than when "
              "their shards were made: shard-*.metadata.jsonl holds them", file=sys.stderr)

    def rejects():
        missing = query(database, None, "number, note, row, detail") if database else ()
        lost = (rejection(name, reason, figure=n, detail=why) for n, reason, name, why in missing)
        for one in itertools.chain(lost, *(changed[name][1] if name in changed else read_rows(
                folder / f"{name}.rejected.jsonl") for name in shards)):
            reasons[one["reason"]] += 1
            yield one

    write_rows(folder / "duplicates.jsonl", duplicates)
    write_rows(folder / "rejected.jsonl", rejects())
    shown = [rows[len(rows) * i // 36] for i in range(36)] if len(rows) > 36 else rows
    contact_sheet(folder / "contact.png", [sheet_row(folder, row) for row in shown])
    counts = {"sources": len(plan["sources"]), "clips": len(rows), "duplicates": len(duplicates),
              "stills": sum(row["fps"] is None for row in rows),
              "seconds": round(sum(row["end"] - row["start"] for row in rows), 3),
              "captions": sum(len(row["captions"]) for row in rows),
              "captioned_clips": sum(bool(row["captions"]) for row in rows),
              "splits": dict(sorted(Counter(row["split"] for row in rows).items())),
              "rejected": dict(sorted(reasons.items()))}
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "av": av.__version__,
                "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
                "numpy": np.__version__, "pillow": PIL.__version__}
    write_text(folder / "manifest.json", json.dumps(
        {"format": FORMAT, "counts": counts, "options": plan["options"], "versions": versions,
         "shards": shards}, indent=1) + "\n")
    sweep(folder)
    for name in ("facts.db", "joining.json"):
        (folder / name).unlink(missing_ok=True)
    n_rows = sum(n for reason, n in reasons.items() if reason in ROW_REASONS)
    n_lost, n_near = reasons.total() - n_rows, len(duplicates)
    print(f"{folder}: {len(rows)} clips kept of {len(rows) + n_lost + n_near}: {n_lost} rejected, "
          f"{n_near} near-duplicates (rejected.jsonl, duplicates.jsonl); {counts['seconds']:.0f} "
          f"s, {counts['captioned_clips']} captioned"
          + f"; {n_rows} rows of metadata rejected" * bool(n_rows)
          + f"; look at {folder / 'contact.png'}")
    if rows:
        print(next_steps(dataset_name(folder), rows, Path("/dev/nvidiactl").exists()))
    warn(folder, plan["options"], counts, rows)


def dataset_name(folder):
    """The inverse of `dataset_dir`, quoted for a shell."""
    return shlex.quote(folder.name if folder.parent == Path("data") else f"./{folder}"
                       if len(folder.parts) == 1 else str(folder))


def next_steps(name, rows, has_gpu):
    """The size of the data set in tokens, and the commands of the next stages. A latent covers
    4 x 8 x 8 (the first frame has its own), a token 2 x 2 latents. --encode cuts clips above
    --max_cells; a packed row holds four of the largest pieces. Without a GPU, steps and windows
    suit half an hour of clips of 96 px, 12 frames/s and 2 s; windows fit half of the clips."""
    seconds = sum(row["end"] - row["start"] for row in rows)
    example = next((row["captions"][0]["text"] for row in rows if row["captions"]), "")
    prompt = shlex.quote(" ".join(example.split())[:80])
    if name == "demo":                   # the quick start: presets that suit its shapes
        return f"{len(rows)} clips, {seconds:.0f} s; next (6 to 20 minutes on two cores):\n" + (
            "python train_vae.py demo\npython train_vae.py demo --encode\n"
            "python caption.py demo --train --paste 0.1\npython caption.py demo\n"
            f"python train_dit.py demo\npython sample.py demo --prompt {prompt}")
    side, length, cells, least, batch, vae, dit = (
        128, 17, 16384, 8192, 65536, "vae-s", "video-s") if has_gpu else (
        32, 9, 2048, 1024, 1024, "vae-xs-48", "video-xs-2")
    n_tokens, largest = 0, 0
    for row in rows:
        n_frames = 1 + (row["frames"] - 1) // 4
        h, w = (max(1, row[one] // 8) for one in ("height", "width"))
        cells, area = max(cells, h * w), max(1, h // 2) * max(1, w // 2)
        n_tokens += n_frames * area
        largest = max(largest, min(n_frames, cells // (h * w)) * area)
    side = max(8, min(side, int(np.median([max(r["width"], r["height"]) for r in rows])) // 8 * 8))
    length = min(length, int(np.median([row["frames"] for row in rows]) - 1) // 4 * 4 + 1)
    per_row = max(least, -(-4 * largest // 256) * 256)
    time_note, few, quick = "the one before the last with --estimate tells the hours", "", ""
    if not has_gpu:
        n_vae, n_dit, cpu = 300, 3000, Path("/proc/cpuinfo")
        # bf16 where the processor multiplies it: 0.65 of the time of a step of video-xs-2
        is_bf16 = cpu.exists() and re.search("avx512_bf16|amx_bf16", cpu.read_text())
        few = f" --steps {n_vae}"
        # x: a token of 2 x 2 latents is nearly as wide as the network, which cannot also carry the
        # noise. Shift 2: neighbouring patches of real footage are alike, so that the layout is
        # visible except near full noise; timesteps there are drawn more often
        quick = (f" --objective x --times uniform --shift 2 --steps {n_dit} --eval_every 300 "
                 f"--dtype {'bf16' if is_bf16 else 'fp32'}")
        # FLOPs of a window's pixel, and of a token in layers and in attention
        flops = n_vae * 8 * length * side**2 * 2.5e5 + n_dit * per_row * (2.9e7 + 2e4 * largest)
        minutes = flops / 0.4 / matmul_rate() / 60
        less = [cap for cap, is_over in (
            ("--max_side 96", lambda row: max(row["width"], row["height"]) > 96),
            ("--max_fps 12", lambda row: (row.get("fps") or 0) > 12),
            ("--max_seconds 2", lambda row: row["end"] - row["start"] > 2.2))
            if any(map(is_over, rows))]
        time_note = f"about {minutes:.0f} minutes on this processor" + (
            f"; less with {' '.join(less)}" if minutes > 90 and less else "")
    max_cells = f" --max_cells {cells}" * (cells != 2048)
    last = " --checkpoint last" * (len(rows) < 300)      # few are memorised: the best is blurred
    return (f"{len(rows)} clips, {seconds:.0f} s, {n_tokens} tokens of {dit}; next ("
            + "without captions it trains without text; " * (not example) + f"{time_note}):\n"
            f"python train_vae.py {name} --model {vae} --size {side} --frames {length}{few}\n"
            f"python train_vae.py {name} --encode{max_cells}\n"
            f"python train_dit.py {name} --model {dit} --row_tokens {per_row} --batch_tokens "
            f"{per_row * max(1, batch // per_row)}{quick}\n"
            f"python sample.py {name} --prompt {prompt} --n 4{last}")


def sheet_row(folder, row, n_frames=4):
    some = set(np.linspace(0, row["frames"] - 1, n_frames).astype(int).tolist())
    return list(clip_frames(folder, row, some)), (*row["captions"], {"text": row["key"]})[0]["text"]


# -- the command line ------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """argparse type: an int or float within low..high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, must be {low} " + (
                "or more" if high == math.inf else f"to {high}"))
        return value
    parse.__name__ = kind.__name__
    return parse


def part_of(text):
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' must be I/N with 1 <= I <= N, such as 3/64")
    return int(match[1]), int(match[2])


def words_of(text):
    """argparse type: the words of a file, sorted."""
    try:
        return sorted(set(decoded(Path(text).read_bytes())[0].lower().split()))
    except (OSError, ValueError) as error:
        what = f"is {error}" if isinstance(error, ValueError) else "cannot be read"
        raise argparse.ArgumentTypeError(f"{text} {what}") from None


def alphabet(text):
    """argparse type: the first word of the Unicode names of some letters."""
    names = {unicodedata.name(chr(n), "").split(" ")[0] for n in range(2**17) if chr(n).isalpha()}
    if names & {*text.upper().split()[:1]}:
        return text.upper()
    raise argparse.ArgumentTypeError(
        f"{text} begins no letter's name: LATIN, CYRILLIC, GREEK, ARABIC, HEBREW, CJK, HANGUL, "
        "HIRAGANA, KATAKANA, DEVANAGARI, THAI and others do")


def add_filters(parser):
    """The options of scores, filters and near-duplicates."""
    whole, real = number(int, 0), number(float, 0)
    add = parser.add_argument_group(
        "filters: clips that fail go to rejected.jsonl; no bound unless one is given").add_argument
    for name, (what, *reasons) in SCORES.items():
        for (bound, word), reason in zip((("min", "least"), ("max", "greatest")), reasons):
            start = DEFAULTS.get(f"{bound}_{name}")
            default = start and f" ({start:g}" + ", or half of --max_seconds" * (
                name == "seconds") + ")"
            if reason:
                add(f"--{bound}_{name}", type=real, default=None if name == "seconds" else start,
                    metavar="X", help=f"{word} {what}{default or ''}")
    add("--min_words", type=whole, default=0, metavar="N", help="of a caption (%(default)s)")
    add("--max_words", type=whole, metavar="N", help="of a caption")
    add("--max_repeated", type=number(float, 0, 1), default=1.0, metavar="X",
        help="greatest share of a caption's word pairs that are repeats, 0 to 1 (%(default)s)")
    add("--alphabet", type=alphabet, metavar="NAME", help="of at least nine in ten letters of a "
        "caption, by Unicode's names: LATIN, CYRILLIC, GREEK, ARABIC, HEBREW, CJK, HANGUL, …")
    add("--banned", type=words_of, metavar="FILE", help="words that no caption may have")
    add("--policy", choices=["any", "all"], default="any", help="any: a clip keeps its captions "
        "that pass, and needs one; all: every caption must pass (%(default)s)")
    add("--near", type=number(float, 0, 0.3), default=0.15, metavar="X", help="hashes of "
        "near-duplicates differ in less of their bits, 0 (equal bytes) to 0.3 (%(default)s)")


def parse_options(argv=None):
    """The options; `shaping` lists those that change the result, which plan.json holds."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    cores = max(1, len(usable) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))   # ranks share them
    whole, real = number(int, 0), number(float, 0)
    rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    add = parser.add_argument
    add("name", metavar="NAME", help="data set to make: data/NAME, or a path if it has a slash; "
        "'demo' and 'demo-scenes' (landscapes) without --videos render their own into "
        "data/NAME-videos; 'bench' measures the speed")
    add("--videos", metavar="DIR", help="folder of videos and stills, searched to any depth")
    add("--meta", type=Path, metavar="PATH", help="metadata file, or a folder of them")
    add("--finish", action="store_true", help="only join the shards that the parts have made")
    add("--report", action="store_true", help="write report/ at the end: distributions, the cost "
        "of other thresholds, sheets of kept, rejected and duplicate clips")
    add("--verify", action="store_true", help="only compare the checksums of all shards, captions "
        "and latents of a finished data set")
    add("--workers", type=number(int, 1), default=cores, metavar="N", help="processes, 1 or more; "
        "any number gives the same bytes (%(default)s: the processors)")
    add("--part", type=part_of, default=(rank + 1, ranks), metavar="I/N", help="do every N-th "
        "shard from the I-th, 1 <= I <= N: for job arrays (1/1, or torchrun's rank)")
    add("--timeout", type=number(float, 1), default=600.0, metavar="S", help="reject a file that "
        "gives no frame for so many seconds, 1 or more (%(default)s)")
    add("--demo_files", type=number(int, 1, 999), metavar="N", help="videos that 'demo' renders, 1 "
        "to 999; in those beyond 160 shapes also turn and stop (160; demo-scenes: 30)")
    own = {action.dest for action in parser._actions}
    add = parser.add_argument_group("shots (fixed at the first start, like all below)").add_argument
    add("--format", choices=[*FORMATS, *BESIDE], help="layout of --meta (default: its suffix). "
        "Without --meta, NAME.txt beside a file is its caption; folder: and the folder's name its "
        "label; webdataset, bair: the same for files in tars, in records")
    add("--split", choices=["shots", "seconds", "none"], default="shots", help="clips are shots, "
        "pieces of --max_seconds, or whole files (%(default)s)")
    add("--min_shot", type=real, default=0.3, metavar="S",
        help="least time between cuts, s, 0 or more (%(default)s)")
    add("--cut_ratio", type=number(float, 1), default=2.25, metavar="X", help="a cut is so many "
        "times the usual change, 1 or more; higher finds fewer (%(default)s)")
    add("--stitch", type=real, default=0.0, metavar="X", help="join shots whose touching frames "
        "differ less in colours, levels of 0..255; 0: never (%(default)s)")
    add("--trim", type=real, default=0.0, metavar="S",
        help="cut off at both ends of a shot, s, 0 or more (%(default)s)")
    add_filters(parser)
    add = parser.add_argument_group("caps").add_argument
    add("--crop", action="store_true", help="cut black borders off")
    add("--max_side", type=whole, default=0, metavar="PX",
        help="longer side, px, 8 or more; larger clips are scaled down; 0: no limit (%(default)s)")
    add("--max_fps", type=number(float, 0, 1000), default=0.0, metavar="FPS",
        help="frames a second, to 1000; faster clips keep every 2nd, 3rd, … frame; 0: no limit "
        "(%(default)s)")
    add("--hdr", choices=["tonemap", "reject"], default="tonemap", help="videos, AVIF and "
        "HEIC in PQ or HLG: convert them to BT.709, or reject them (%(default)s)")
    add("--interlaced", choices=["deinterlace", "reject", "keep"], default="deinterlace",
        help="interlaced videos: fill in the missing lines, reject, or keep as is (%(default)s)")
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
    if args.min_seconds is None:
        args.min_seconds = min(DEFAULTS["min_seconds"], args.max_seconds / 2 or math.inf)
    args.shaping = [a.dest for a in parser._actions if a.dest not in own]
    return args


def one_line(main):
    """Wraps a script's main: an error of the machine ends it in one line, status 2."""
    @functools.wraps(main)
    def run(*args, **options):
        try:
            return main(*args, **options)
        except Exception as error:
            fault = fault_of(error)
            if not fault:
                raise
            refuse(f"{fault}; nothing is lost, the same command goes on")
    return run


def script(main):
    """Runs a script's main. The first Ctrl-C ends it in one line, status 130, a second at once."""
    def interrupted(*_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:    # as for a shell's background job
        signal.signal(signal.SIGINT, interrupted)
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


@one_line
def main(argv=None):
    args = parse_options(argv)
    if not args.name.strip("./"):
        refuse(f"'{args.name}' cannot be a data set's name")
    if args.verify:
        return verify(dataset_dir(args.name))
    if args.name in ("demo", "demo-scenes") and not args.videos:
        args.videos, args.format = str(dataset_dir(f"{args.name}-videos")), "jsonl"
        args.meta = Path(args.videos, "captions.jsonl")
        files, render = (demo_files(args.demo_files or 160), render_shot) \
            if args.name == "demo" else (scene_files(args.demo_files or 30), render_scene)
        make_demo(Path(args.videos), files, render, args.workers)
    if args.report and not args.videos and has_manifest(folder := dataset_dir(args.name)):
        root = read_json(folder / "plan.json").get("told", {}).get("videos")
        if root and Path(root).is_dir():
            return report(folder, Path(root))
    if not args.videos:
        refuse("--videos DIR is needed: the folder that holds the videos")
    if args.name == "bench":            # only measures: no part of this script
        return runpy.run_path(str(Path(__file__).parent / "tests/bench_data.py"))["bench"](args)
    for name in (*SCORES, "words"):     # --max_side and --max_seconds 0 are caps, not bounds
        low, high = (getattr(args, f"{end}_{name}", None) for end in ("min", "max"))
        if name != "side" and None not in (low, high) and low > high and (
                high or name != "seconds"):
            refuse(f"--min_{name} {low:g} is above --max_{name} {high:g}: no clip could pass")
    if args.meta and not args.format:
        args.format = args.meta.suffix.lower().lstrip(".")
        if args.format not in FORMATS:
            args.meta.is_file() and open_text(args.meta).close()
            refuse(f"--meta {args.meta}: its suffix tells no format, so give --format, one of "
                   f"{' '.join(FORMATS)}")
    for is_wrong, message in (
            (0 < args.max_side < 8, f"--max_side {args.max_side}: a latent covers 8 px, so 8 or "
             "more (0: no limit)"),
            (bool(args.meta) != (args.format in FORMATS), "--meta goes with one of --format "
             f"{' '.join(FORMATS)}, and only with these"),
            (args.split == "seconds" and not args.max_seconds, "--split seconds needs a "
             "--max_seconds above 0")):
        if is_wrong:
            refuse(message)
    prepare(args)


# -- what other stages borrow: files, randomness, refusals -----------------------------------------

FORMAT = 1                               # version of the folder's format


def refuse(message):
    """Ends the script with one line on stderr and status 2: the input is wrong, not the code."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.leave = False
        bar.close()                                    # or tqdm prints its last state after this
    print(f"{Path(sys.argv[0]).name}: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    sys.exit(2)


def printable(text):
    """The text with escapes for unprintable characters, such as those that steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Parser(argparse.ArgumentParser):
    """Refuses wrong options in one line, with the nearest existing name."""

    def error(self, message):
        if choice := re.fullmatch(
                r"argument (\S+?): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            if close := nearest(choice[2], re.findall("[^', ]+", choice[3])):
                message = f"{choice[1]} {choice[2]}: did you mean {close}?"
        elif bad := re.match(r"unrecognized arguments:.*?\s(-[^\s=]+)", message):
            close = nearest(bad[1], self._option_string_actions)
            message = f"{bad[1]} is not an option: " + (f"did you mean {close}?" if close else
                                                        "--help names them")
        refuse(message)


def nearest(word, names):
    """The name closest to `word`, regardless of case and punctuation, or None."""
    plain = lambda text: re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    names = {plain(name): name for name in names}
    return names.get(next(iter(difflib.get_close_matches(plain(word), names, 1)), None))


MACHINE = {getattr(errno, name): remedy for names, remedy in (
    ("ENOSPC EDQUOT", "make room there (TMPDIR names the folder of temporary files)"),
    ("EMFILE ENFILE", "allow more open files (ulimit -n)"),
    ("ENOMEM", "free memory, or start fewer processes at a time"),
    ("EFBIG", "allow larger files (ulimit -f)"),
    ("EIO ESTALE ENOTCONN ETIMEDOUT EREMOTEIO EHOSTUNREACH ENETUNREACH ENETDOWN ECONNRESET ENODEV "
     "ENXIO EUCLEAN", "see to that disk or network"),
    ("EROFS", "make it writable")) for name in names.split() if hasattr(errno, name)}


def is_machine_error(error):
    """Whether an error is of the machine, not of the current file, so that a rerun may succeed.
    FFmpeg also reports ENOMEM for absurd sizes in damaged files: then 2 GiB can be mapped."""
    if isinstance(error, MemoryError):
        with contextlib.suppress(OSError, ValueError):
            return not isinstance(error, FFmpegError) or bool(mmap.mmap(-1, 2**31).close())
        return True
    return getattr(error, "errno", None) in MACHINE


def fault_of(error):
    """The message for an error of the machine or of another rank; '' for any other error."""
    text = str(error)
    number = re.search(r"\(os error (\d+)\)", text)      # of libraries in Rust
    number = int(number[1]) if number else getattr(error, "errno", None)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:       # torch's
        number = errno.ENOMEM
    remedy = MACHINE.get(number) or isinstance(error, PermissionError) and MACHINE[errno.EROFS]
    if remedy and isinstance(number, int):
        path = Path(str(getattr(error, "filename", None) or ""))
        path = path.parent if path.name.startswith(".") else path       # a temporary file's folder
        return (f"{path}: " if path.name else "") + f"{os.strerror(number)}: {remedy}"
    if "gloo" in text or "ProcessGroup" in text or "NCCL" in text:
        return f"rank {os.environ.get('RANK', 0)}: another rank ended, or its machine: see its line"
    return ""


def write_fault(folder):
    """Why a folder cannot be written or created, or ''; creates nothing."""
    existing = next(one for one in (Path(folder), *Path(folder).absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return (error.strerror or str(error)).lower() + f" ({existing})" * (
            existing != Path(folder))


def writable(folder):
    """Refuses, before any work, a folder that cannot be written or created."""
    if fault := write_fault(folder):
        refuse(f"{folder} cannot be written: {fault}")


def dataset_dir(name, parent="data"):
    """Path of a data set: data/NAME for a bare name; a name with a slash is a path itself."""
    if str(name).endswith(".."):
        refuse(f"{name} is no name of a {'data set' if parent == 'data' else 'run'}: give the "
               "folder's own")
    return Path(name) if "/" in str(name) or os.sep in str(name) else Path(parent, name)


run_dir = functools.partial(dataset_dir, parent="runs")            # path of a training run


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path beside `path` (same suffix) to write to. On success the file is
    flushed to disk and renamed, so that `path` is never partial; on an exception it is removed.
    The lock tells `sweep` that the writer is alive."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}-{os.urandom(4).hex()}.tmp{path.suffix}")
    with open(part, "ab") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield part
            with open(part, "rb+") as written:
                is_sole(written)                       # a library may have replaced the file with
                os.chmod(part, os.fstat(lock.fileno()).st_mode & 0o777)     # one of mode 0600
                os.fsync(written.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def sweep(folder):
    """Removes the temporary files of `atomic` whose writers are dead (no lock), and those of
    safetensors, which locks nothing, after an hour without a write."""
    for part in Path(folder).glob(".tmp??????"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
    for part in Path(folder).glob(".*.tmp*") if fcntl else ():
        with contextlib.suppress(FileNotFoundError), open(part, "rb") as file:
            if is_sole(file):
                part.unlink()


def is_sole(file):
    """Locks an open file for this process; False if another process holds the lock."""
    with contextlib.suppress(BlockingIOError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def rng(*key):
    """numpy Generator (Philox) keyed by the sha256 of `key`, strings and integers: the same draws
    on any machine, independent of other draws. rng(seed, "noise", step, clip_key)"""
    text = json.dumps([part if isinstance(part, str) else int(part) for part in key])
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def file_sum(path):
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def json_line(row):
    """One line of JSON in plain UTF-8; escaped only if a file name is not valid text."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    return json.dumps(row) + "\n" if re.search("[\ud800-\udfff]", line) else line


def read_text(path, option=""):
    """The text of a file named by an option; refuses other data."""
    try:
        text, page = decoded(Path(path).read_bytes())
    except ValueError as error:
        refuse(f"{option} {path} is {error}")
    if page:
        print(f"warning: {path} is not in UTF-8, and is read as {page}", file=sys.stderr)
    return text


def lines_of(text):
    """The lines of a text. Only \\n and \\r\\n end a line: U+2028, U+0085 and form feeds occur
    inside of lines."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def write_rows(path, rows):
    with atomic(path) as part, open(part, "w", encoding="utf-8") as file:
        file.writelines(map(json_line, rows))


def read_rows(path):
    """The records of one of our own jsonl files; refuses a damaged line."""
    rows = []
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                refuse(f"{path}: line {n} is damaged: remove the file, and run the command that "
                       "wrote it again")
    return rows


def read_json(path):
    """The object in one of our own files; refuses a damaged file and another FORMAT."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        version = result["format"]
    except (ValueError, TypeError, KeyError):
        refuse(f"{path} is damaged: remove its folder and prepare the data set again")
    if version != FORMAT:
        refuse(f"{path} has format {version}, this version reads {FORMAT}: prepare it again")
    return result


# -- what other stages borrow: pictures and videos, read and written -------------------------------

VIDEOS = {f".{name}" for name in "mp4 m4v mov mkv webm avi flv wmv mpg mpeg ts mts m2ts 3gp 3g2 "
          "ogv mxf vob".split()}
STILLS = {f".{name}" for name in "jpg jpeg png webp gif bmp tif tiff avif heic heif hif "
          "ppm".split()}
PLANAR = {**{f"yuv{j}4{n}p": (np.uint8, 1) for j in ("", "j") for n in ("20", "22", "44")},
          **{f"yuv4{n}p{bits}le": (np.uint16, 2 ** (bits - 8)) for n in ("20", "22", "44")
             for bits in (10, 12)}}      # pixel formats whose planes are read: (dtype, unit)
FORMS_OF_NAMES = (str, functools.partial(unicodedata.normalize, "NFC"),
                  functools.partial(unicodedata.normalize, "NFD"))      # of names on disk
BEAT = 64               # frames between two signs of life of a worker
MOST_PIXELS = 2**26     # of a picture or frame (8192 x 8192); more would take GiB of memory
MOST_BYTES = 2**33 - 1  # of a tar's member
SQUARE = 16             # sample aspect ratios above 16:1 or below 1:16 are damage
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, RuntimeError,
                  LookupError, TypeError, zlib.error)              # Pillow's, on bad files
Image.MAX_IMAGE_PIXELS = None           # `opened_picture` checks MOST_PIXELS instead


class Unreadable(Exception):
    """A file without a usable clip; its arguments, reason and figure, go to rejected.jsonl."""


def read_still(file):
    """uint8 [H, W, 3] of a picture file."""
    return decoded_still(file)[0]


class Video:
    """A video (path, or open file with a suffix). Iterating, more than once if needed, yields its
    frames in display order: av.VideoFrame as stored (not rotated), timestamps in units of `tick`
    (s). Known from the first frame on: `tick`, `sar` (sample aspect ratio), `matrix` (rotation),
    `codec`, `step` (s between frames by the header); after the last: `bad_packets`, `bits` of all
    packets, `converted` (a set: deinterlaced, HDR to BT.709, which `small`, `luma` and `rgb` do).
    Calls `beat` with the number of frames each BEAT frames or each second. Raises Unreadable, also
    for what `hdr` and `interlaced` reject."""

    def __init__(self, path, beat=lambda n: None, hdr="tonemap", interlaced="deinterlace"):
        self.path, self.beat, self.tick, self.sar, self.step = path, beat, 0.001, 1, 0.04
        self.hdr, self.interlaced, self.converted = hdr, interlaced, set()
        self.matrix = self.turn = None
        self.bad_packets, self.bits, self.codec, self.scaler = 0, 0, None, VideoReformatter()

    def __iter__(self):
        self.bad_packets = self.bits = 0
        since = time.monotonic()
        for n, frame in enumerate(animated(self) if self.path.suffix.lower() in STILLS
                                  else progressive(self, self.packets()), 1):
            if n % BEAT == 0 or time.monotonic() - since > 1:
                self.beat(n)
                since = time.monotonic()
            yield frame

    def packets(self):
        """Frames by FFmpeg; a packet that does not decode is counted and skipped."""
        with opened(self.path) as (container, stream):
            self.tick, self.sar = float(stream.time_base), float(stream.sample_aspect_ratio or 1)
            if not 1 / SQUARE <= self.sar <= SQUARE:
                raise Unreadable("pixels far from square", self.sar)
            self.codec, n, n_lost = stream.codec_context.name, 0, 0
            packets, packet, n_packets = demuxed(container, stream), stream, 0
            while packet is not None:                  # None, the end, is decoded too
                try:
                    packet = next(packets, None)
                    n_packets += 1
                except FFmpegError as error:           # the rest of the container is broken
                    raise_machine(error, self.path, stream.index, n_packets)
                    self.bad_packets, packet = self.bad_packets + 1, None
                self.bits += 8 * packet.size if packet else 0
                n_lost += bool(packet and packet.size and not packet.is_discard)
                try:
                    frames = stream.codec_context.decode(packet)
                except FFmpegError as error:
                    if is_machine_error(error):
                        raise
                    self.bad_packets += not isinstance(error, EOFError)
                    n_lost -= not isinstance(error, EOFError)
                    frames = ()
                for frame in frames:
                    if n == 0 or frame.key_frame:
                        self.note_tags(frame)
                        self.step = 1 / min(float(stream.codec_context.framerate or 25), 1000)
                    n, n_lost = n + 1, n_lost - 1
                    self.bad_packets += frame.is_corrupt
                    yield frame
            if self.codec == "hevc":    # its decoder silently drops frames with lost references
                self.bad_packets += max(0, n_lost)

    def note_tags(self, frame):
        if frame.width * frame.height > MOST_PIXELS:
            raise Unreadable("too many pixels", frame.width * frame.height)
        if frame.color_trc in HDR:
            if self.hdr == "reject" or frame.colorspace > 10:       # ICtCp, constant luminance
                raise Unreadable("HDR", max(frame.color_trc, frame.colorspace))
            self.converted.add(f"{HDR[frame.color_trc]} to BT.709")
        if self.turn == frame.rotation:     # reading side_data keeps the frame until a gc
            return
        tags = {data.type.name: data for data in frame.side_data.keys()}
        if "DOVI_METADATA" in tags and frame.colorspace == 2:
            raise Unreadable("HDR", "Dolby Vision without a base layer")
        self.matrix = np.frombuffer(bytes(tags["DISPLAYMATRIX"]), np.int32)[
            [0, 1, 3, 4]].tolist() if "DISPLAYMATRIX" in tags else None
        self.turn = frame.rotation

    def small(self, frame, side=64):
        """float32 [3, h, w]: full-range luma and chroma of the frame, longer side at most `side`.
        For large frames four luma samples and one chroma sample a cell of the decoded planes: 20
        times as fast as scaling, and detects cuts as well."""
        shrink = min(1.0, side / max(frame.width, frame.height))
        width, height = (max(1, round(v * shrink)) for v in (frame.width, frame.height))
        planes = PLANAR.get(frame.format.name)
        if frame.color_trc in HDR:
            pixels = self.pixels(frame, width, height, Interpolation.AREA).astype(np.float32)
            return (pixels @ YCC.T).transpose(2, 0, 1) + np.float32([[[0]], [[128]], [[128]]])
        if shrink > 0.5 or not planes:
            return self.scaler.reformat(
                frame, width, height, "yuv444p", src_colorspace=colour_matrix(frame),
                dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.JPEG,
                interpolation=Interpolation.AREA, threads=1).to_ndarray().astype(np.float32)
        (kind, unit), result = planes, []
        for plane, n in zip(frame.planes, (4, 1, 1)):
            values = np.frombuffer(plane, kind)
            at = cells(plane.width, plane.height, plane.line_size // values.itemsize,
                       width, height, n)
            result.append(values.take(at, mode="clip").sum(0, dtype=np.float32))
        out = np.stack(result).reshape(3, height, width)
        full = frame.color_range == 2 or frame.format.name.startswith("yuvj")
        black, white, swing = (0, 255, 255) if full else (16, 235, 224)
        out[0] = (out[0] * (0.25 / unit) - black) * (255 / (white - black))
        out[1:] = (out[1:] / unit - 128) * (255 / swing) + 128
        return out

    def luma(self, frame):
        """[H, W] luma of a frame, 0..255 (a view if 8 bits are stored, not range-expanded)."""
        if frame.color_trc in HDR:
            return (self.pixels(frame, frame.width, frame.height) @ YCC[0]).astype(np.uint8)
        kind, unit = PLANAR.get(frame.format.name, (None, 1))
        if kind is None or max(frame.width, frame.height) < 128:
            return frame.reformat(format="gray", threads=1).to_ndarray()
        plane = frame.planes[0]
        luma = np.frombuffer(plane, kind).reshape(plane.height, -1)[:, :frame.width]
        return luma if unit == 1 else (luma // unit).astype(np.uint8)

    def rgb(self, frame, max_side=0, border=(0, 0, 0, 0)):
        """uint8 [H, W, 3] of a frame: rotated and mirrored by its display matrix, square pixels,
        even sides, the longer at most `max_side` px (0: no limit), without `border`, the shares to
        crop at the top, bottom, left and right as stored."""
        width, height = frame.width * max(1, self.sar), frame.height * max(1, 1 / self.sar)
        shrink = min(1, max_side / max(width, height)) if max_side else 1
        if shrink < 1 or self.sar != 1:
            width, height = (max(2, 2 * round(v * shrink / 2)) for v in (width, height))
        kind = Interpolation.AREA if width < frame.width else \
            Interpolation.BILINEAR if width == frame.width else Interpolation.BICUBIC
        pixels = self.pixels(frame, int(width), int(height), kind)
        (h, w), (top, bottom, left, right) = pixels.shape[:2], border
        pixels = pixels[math.ceil(top * h):h - math.ceil(bottom * h),
                        math.ceil(left * w):w - math.ceil(right * w)]
        pixels = turned(pixels, self.matrix)
        return np.ascontiguousarray(pixels[:len(pixels) // 2 * 2, :pixels.shape[1] // 2 * 2])

    def pixels(self, frame, width, height, kind=Interpolation.BILINEAR):
        """uint8 [height, width, 3]: a frame scaled and, if HDR, then tone-mapped."""
        is_hdr = frame.color_trc in HDR
        picture = self.scaler.reformat(
            frame, width, height, "rgb48le" if is_hdr else "rgb24", interpolation=kind, threads=1,
            src_colorspace=colour_matrix(frame)).to_ndarray()
        return tone_mapped(picture, frame.color_trc, frame.color_primaries) if is_hdr else picture


YCC = np.float32(((0.2126, 0.7152, 0.0722), (-0.114572, -0.385428, 0.5),
                  (0.5, -0.454153, -0.045847)))        # BT.709's, full range


def turned(pixels, matrix):
    """[H, W, …] rotated and mirrored by a display matrix: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = matrix or (1, 0, 0, 1)
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


@functools.lru_cache(8)
def cells(width, height, line, across, down, n):
    """int [n, down * across]: indices into a plane of `line` samples a row for the cells of a grid
    [down, across]: of their centres (n = 1) or of four points in each (n = 4)."""
    offsets = [(0.5, 0.5)] if n == 1 else [(y, x) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    return np.stack([(((np.arange(down) + y) * height / down).astype(int)[:, None] * line
                      + ((np.arange(across) + x) * width / across).astype(int)).ravel()
                     for y, x in offsets])


@contextlib.contextmanager
def opened(path):
    """Yields (container, stream) of a video (path or open file) and closes it: the largest video
    stream that is no cover art or thumbnail, decoded in one thread, as FFmpeg's threads hang on
    some damaged files. Raises Unreadable."""
    is_open = not isinstance(path, Path)
    if not (path.seek(0, os.SEEK_END) if is_open else path.stat().st_size):
        raise Unreadable("empty file")
    try:
        if is_open:
            path.seek(0)
        container = av.open(path if is_open else str(path), metadata_errors="replace")
    except FFmpegError as error:
        raise_machine(error, path)
        raise Unreadable(f"cannot be opened: {error.strerror}") from None
    with container:
        hidden = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        streams = [s for s in container.streams.video if not s.disposition & hidden]
        decodable = [s for s in streams if s.codec_context is not None]
        if not decodable:
            raise Unreadable("no decoder for its codec" if streams else "no video stream")
        stream = max(decodable, key=lambda s: s.codec_context.width * s.codec_context.height)
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield container, stream


def encode(file, frames, fps, crf=18):
    """Writes H.264 in MP4 to a seekable file object and returns its (height, width): yuv420p,
    tagged BT.709, one thread, so that the bytes are deterministic. frames: iterable of uint8
    [H, W, 3] RGB, at least one, all of one size; odd sides lose their last row or column."""
    rate, scaler = frame_rate(fps), VideoReformatter()
    with av.open(file, "w", format="mp4") as container:
        # x264's mbtree reads uninitialised memory for small frames: the bytes would vary
        stream = container.add_stream("libx264", rate=rate, options={
            "crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"})
        context = stream.codec_context
        context.thread_count, context.time_base = 1, 1 / rate
        context.colorspace = context.color_primaries = context.color_trc = 1        # BT.709
        context.color_range = 1                                                     # 16..235
        for n, rgb in enumerate(frames):
            rgb = np.ascontiguousarray(rgb[:len(rgb) // 2 * 2, :rgb.shape[1] // 2 * 2])
            if n == 0:
                stream.height, stream.width = rgb.shape[:2]
            frame = scaler.reformat(
                av.VideoFrame.from_ndarray(rgb, format="rgb24"), format="yuv420p",
                dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1)
            frame.pts, frame.time_base = n, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return rgb.shape[:2]


def frame_rate(fps):
    """The rate for the encoder: a fraction such as 30000/1001, at least one frame in 1000 s."""
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1000))


def write_video(path, frames, fps, crf=18):
    """Writes an MP4 of `frames` (see `encode`), atomically. crf 0 (lossless) to 51."""
    with atomic(path) as part, open(part, "wb") as file:
        encode(file, map(np.asarray, frames), fps, crf)


def contact_sheet(path, rows, cell=96):
    """Writes a PNG: for each row (frames, label) the frames, uint8 [H, W, 3], fitted into squares
    of `cell` px, with the label below; as many columns as fit a screen."""
    gap, longest = 4, max((len(frames) for frames, _ in rows), default=1)
    sides = [np.asarray(frame).shape[:2] for frames, _ in rows for frame in frames]
    tall = max((round(cell * h / max(h, w)) for h, w in sides), default=cell)
    across, down = longest * (cell + gap) + 3 * gap, tall + 34 + 2 * gap
    n_columns = max(1, min(len(rows), 1280 // across))
    size = n_columns * across + 3 * gap, -(-len(rows) // n_columns) * down + 2 * gap
    sheet = Image.new("RGB", size, (24, 26, 30))
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
        (font, label), n = lettered(str(label)), (across - 3 * gap) // 6
        wrapped = lambda n: textwrap.wrap(label, n, max_lines=2, placeholder=" …")
        while n > 1 and max(map(font.getlength, words := wrapped(n)), default=0) > across - gap:
            n -= 1
        draw.text((left, top + tall + 2), "\n".join(words), (214, 216, 220), font, spacing=2)
    with atomic(path) as part:
        sheet.save(part, format="PNG")


# -- what other stages borrow: a prepared data set -------------------------------------------------

def open_dataset(folder):
    """The rows (dicts, records of shard-*.jsonl) of a finished data set, in shard order, without
    duplicates. Adds row["shard"], and to row["captions"] those that caption.py wrote: {"text",
    "source": RUN, "weight": 1.0}. Refuses a folder that is missing, unfinished, damaged, or of
    another FORMAT."""
    folder = Path(folder)
    if not folder.is_dir():
        refuse(f"{folder} does not exist: prepare it first (python prepare_data.py "
               f"{folder.name} --videos DIR)")
    if not has_manifest(folder):
        refuse(f"{folder} is not finished: run its prepare_data.py command (again)")
    manifest = read_json(folder / "manifest.json")
    for name, files in manifest["shards"].items():
        for path in (folder / file for file in files if re.fullmatch(r".*\d(\.metadata)?\.jsonl",
                                                                     file)):
            if not path.is_file() or not is_done(folder, int(name[-5:])) or \
                    file_sum(path) != files[path.name]:
                refuse(f"{path} or its tar is not what the manifest says: "
                       f"{MAKE_AGAIN.format(name)}")
    rows = kept_rows(folder, manifest["shards"], read_rows(folder / "duplicates.jsonl"))
    mine = {row["key"]: row for row in rows}
    for name in manifest["shards"]:
        for captions in sorted(folder.glob(f"{name}.captions-*.jsonl")):
            run = captions.name[len(f"{name}.captions-"):-len(".jsonl")]
            total = captions.with_name(f"{captions.name}.crc")       # by caption.py
            if total.is_file() and total.read_text().strip() != str(
                    zlib.crc32(captions.read_bytes())):
                refuse(f"{captions} is not as it was written: remove it and caption again, or, if "
                       f"you have edited it, remove {total.name}")
            for row in read_rows(captions):
                if row["key"] in mine:
                    mine[row["key"]]["captions"].append(
                        {"text": row["caption"], "source": run, "weight": 1.0})
    if not int(os.environ.get("RANK", 0)):
        shards = list(manifest["shards"].items())
        stats = [os.stat(folder / file) for _, files in shards for file in files]
        state = folder.absolute(), *((stat.st_size, stat.st_mtime_ns) for stat in stats)
        if state not in CHECKED:
            random.shuffle(shards)                     # a random sample; no result depends on it
            check_sums(folder, shards, time.monotonic() + 1)
            CHECKED.add(state)
    return rows


def kept_rows(folder, shards, duplicates):
    """The rows of shards {name: its files}, without duplicates, with row["shard"], updated by
    metadata.jsonl. A clip without a caption or label gets that of its duplicate."""
    of, kept, left_out = {one["key"]: one["of"] for one in duplicates}, {}, {}
    for name, files in shards.items():
        mine = {row["key"]: {**row, "shard": name} for row in read_rows(folder / f"{name}.jsonl")}
        later = f"{name}.metadata.jsonl"
        for row in read_rows(folder / later) if later in files else ():
            mine[row["key"]] |= row
        for key, row in mine.items():
            (left_out if key in of else kept)[key] = row
    for key, row in left_out.items():
        stays = kept.get(of[key], row)
        stays |= {name: row[name] for name in ("captions", "label")
                  if row[name] and not stays[name]}
    return list(kept.values())


CHECKED = set()         # (folder, sizes and times of its files) that this process has compared
MAKE_AGAIN = "remove {}.tar and run its prepare_data.py command, which makes that shard again"


def check_sums(folder, shards, until=math.inf):
    """Refuses shards [(name, {file: sha256})] whose checksums differ. Stops unchecked at the time
    `until` (of time.monotonic)."""
    for name, files in shards:
        for file, digest in files.items():
            result = hashlib.sha256()
            with open(Path(folder, file), "rb") as opened_file:
                while part := opened_file.read(2**22):
                    result.update(part)
                    if time.monotonic() > until:
                        return
            if result.hexdigest() != digest:
                refuse(f"{folder}/{file} is damaged, its sum is not the manifest's: "
                       f"{MAKE_AGAIN.format(name)}")


def verify(folder):
    """--verify: compares all checksums that the stages wrote."""
    rows = open_dataset(folder)
    shards = list(read_json(folder / "manifest.json")["shards"].items())
    check_sums(folder, tqdm(shards, desc="verify", unit="shard"))
    n_tensors, files = 0, sorted(folder.glob("shard-*.safetensors"))
    for path in files:                                 # latents, embeddings of captions
        with open(path, "rb") as file:
            try:
                size, = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, path.stat().st_size)))
                sums = json.loads(header["__metadata__"]["nanosora"]).get("sums", {})
                offsets = {name: header[name]["data_offsets"] for name in sums}
            except (ValueError, KeyError, TypeError, AttributeError, struct.error):
                refuse(f"{path} is damaged: remove it, and encode again")
            for name, (start, stop) in offsets.items():
                file.seek(8 + size + start)
                if zlib.crc32(file.read(stop - start)) != sums[name]:
                    refuse(f"{path} is damaged at {name}: remove it, and encode again")
            n_tensors += len(sums)
    print(f"{folder}: {len(shards)} shards of {len(rows)} clips, and {n_tensors} latents and "
          f"embeddings in {len(files)} files, are as they were written")


def read_member(folder, row):
    """The bytes of a row's clip, by offset in its tar."""
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
                yield scaler.reformat(frame, format="rgb24", src_colorspace=colour_matrix(frame),
                                      threads=1).to_ndarray()


FIELDS = ("frames", "fps", "width", "height", "start", "end", "split", "label", "source")


def where(rows, text):
    """The rows that satisfy `text`: comparisons (< <= > >= == !=) of a score, or of one of FIELDS,
    with a number or a quoted text, joined by and, or, not and parentheses; false for a row without
    that value. where(rows, "flow > 0.1 and not (text > 0.05)"). Refuses other syntax and scores
    that no row has."""
    rows = list(rows)
    names = {name for row in rows for name in row["scores"]} | set(FIELDS)
    compare = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
               ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne}

    def test_of(node):
        match node:
            case ast.BoolOp(op=op, values=parts):
                tests, join = [test_of(part) for part in parts], \
                    all if isinstance(op, ast.And) else any
                return lambda row: join(test(row) for test in tests)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                test = test_of(inner)
                return lambda row: not test(row)
            case ast.Compare(left=ast.Name(id=name), ops=[sign], comparators=[value]):
                value, holds = ast.literal_eval(value), compare[type(sign)]
                if rows and name not in names:
                    refuse(f"'{text}': no clip has '{name}'; there are {', '.join(sorted(names))}")
                if not isinstance(value, (int, float, str)):
                    raise ValueError

                def test(row):
                    own = row["scores"].get(name, row.get(name) if name in FIELDS else None)
                    return own is not None and isinstance(own, str) == isinstance(value, str) \
                        and holds(own, value)
                return test
        raise ValueError
    try:
        test = test_of(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, KeyError):
        refuse(f"'{text}' is not of the kind: flow > 0.1 and not (text > 0.05 or split == 'test')")
    result = [row for row in rows if test(row)]
    if rows and not result:
        values = {name: [value for row in rows if (value := row["scores"].get(
            name, row.get(name))) is not None] for name in sorted(names & set(
                re.findall(r"\w+", text)))}
        refuse(f"'{text}' holds for none of the {len(rows)} clips: " + "; ".join(
            f"{name} runs from {min(v)} to {max(v)}" if v else f"{name} is never known"
            for name, v in values.items()))
    return result


def frames_of(folder, row, some=None):
    """The frames of a row's clip, or only those numbered in `some`. Raises Unreadable if the clip
    cannot be decoded or frames are missing."""
    try:
        frames = list(clip_frames(folder, row, some))
        if len(frames) == (row["frames"] if some is None else len(some)):
            return frames
        error = f"{len(frames)} frames came"
    except Exception as result:          # any error on damaged bytes concerns this clip only
        if is_machine_error(result):
            raise
        error = result
    raise Unreadable(f"{Path(folder, row['shard'])}.tar: the clip {row['key']} cannot be read "
                     f"({error})")


def read_clip(folder, row):
    """uint8 [T, H, W, 3] RGB of a row of `open_dataset`; T = 1 for a still. Raises Unreadable."""
    return np.stack(frames_of(folder, row))


def matmul_rate(n=1024):
    """FLOP/s of numpy's product of two n x n matrices, the best of four."""
    x = np.ones((n, n), np.float32)
    return 2 * n**3 / min(timeit.repeat(lambda: x @ x, number=1, repeat=4))


# -- the report and its pictures -------------------------------------------------------------------

def report(folder, root):
    """Writes report/ of a finished data set: report.txt (distributions of scores, what other bounds
    would reject, why clips were rejected), spread.png, kept.png, rejected.png, duplicates.png."""
    rejects, duplicates, rows = read_rows(folder / "rejected.jsonl"), read_rows(
        folder / "duplicates.jsonl"), open_dataset(folder)
    values = {name: [row["scores"][name] for row in rows if row["scores"].get(name) is not None]
              for name in SCORES}
    values["words"] = [len(one["text"].split()) for row in rows for one in row["captions"]]
    values = {name: np.sort(numbers) for name, numbers in values.items() if numbers}
    marks = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
    lines = [f"{len(rows)} clips, {len(rejects)} rejects, {len(duplicates)} duplicates", "",
             "How the kept clips' scores are spread, by percent of the clips (a lower bound of "
             "what stands under 10 would lose 10% of them)",
             f"{'':12}" + "".join(f"{mark:>10}" for mark in marks)]
    lines += [f"{name:12}" + "".join(f"{v:10.4g}" for v in np.percentile(numbers, marks))
              for name, numbers in values.items()]
    lines += ["", "Why clips and files were left out, and the bound that would have let a quarter, "
              "half and all of them pass"]
    for reason, n in Counter(one["reason"] for one in rejects).most_common():
        mine = [one for one in rejects if one["reason"] == reason]
        figures = sorted(one["figure"] for one in mine if number_of(one["threshold"]) is not None
                         and number_of(one["figure"]) is not None)
        if figures and figures[0] < mine[0]["threshold"]:
            figures = figures[::-1]                    # a lower bound is relaxed downwards
        lines.append(f"{n:8} {reason:40}" + "".join(
            f"{figures[math.ceil(len(figures) * q) - 1]:10.4g}" for q in (0.25, 0.5, 1) if figures))
    write_text(folder / "report/report.txt", "\n".join(lines) + "\n")
    histograms = []
    for name, numbers in values.items():
        ends = np.percentile(numbers, (1, 99))
        counts, _ = np.histogram(numbers, 48, ends)
        is_bar = np.arange(60, 0, -1)[:, None] <= np.repeat(counts * 60 / max(1, counts.max()), 2)
        histograms.append(([np.where(is_bar[..., None], np.uint8((90, 150, 230)), np.uint8(
            (40, 44, 52)))], "{}: {:.4g} to {:.4g}".format(name, *ends)))
    contact_sheet(folder / "report/spread.png", histograms, 192)
    every = {row["key"]: {**row, "shard": name} for name in read_json(
        folder / "manifest.json")["shards"] for row in read_rows(folder / f"{name}.jsonl")}
    contact_sheet(folder / "report/kept.png", [
        sheet_row(folder, row) for row in rows[::max(1, len(rows) // 36)][:36]])
    contact_sheet(folder / "report/duplicates.png", [
        (sheet_row(folder, every[one["of"]], 1)[0] + glimpse(root, every[one["key"]]),
         f"{one['distance']} {one['key']} of {one['of']}") for one in duplicates[:36]])
    shown = [one for reason in sorted({one["reason"] for one in rejects})
             for one in [one for one in rejects if one["reason"] == reason and one["source"]][:6]]
    contact_sheet(folder / "report/rejected.png", [
        (glimpse(root, one), " ".join(str(part) for part in (
            one["reason"], one["figure"], Path(one["source"]).name) if part is not None))
        for one in shown], 160)
    print(f"look at {folder / 'report'}")


def glimpse(root, reject):
    """[frame] from about the middle of a rejected clip; [] if nothing decodes."""
    try:
        path, _ = located(root, reject["source"])
        if path.suffix.lower() in STILLS:
            return [read_still(path)]
        with opened(path) as (container, stream):
            middle = ((reject["shot_start"] or 0) + (reject["shot_end"] or 0)) / 2
            container.seek(int(middle / stream.time_base) + (stream.start_time or 0), stream=stream)
            return [Video(path).rgb(next(container.decode(stream)), 256)]
    except (FFmpegError, Unreadable, StopIteration, *PICTURE_ERRORS):
        return []


# -- the demo: moving shapes whose form, colour and direction are known ----------------------------

COLOURS = {"red": (240, 60, 50), "green": (60, 210, 80), "blue": (70, 110, 255),
           "yellow": (245, 225, 60), "purple": (205, 80, 240), "cyan": (60, 220, 230)}
FORMS = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
GROUNDS = {"black": 12, "dark": 40, "grey": 68}      # levels far below the luma of every colour
TEXTURES = ("plain", "striped", "checked", "dotted")
DEMO_SIZES = ((32, 32), (48, 32), (32, 40), (40, 32), (36, 32), (32, 48), (40, 40), (32, 36))


def is_left_out(colour, form, direction):
    """Whether the training split lacks this combination: 24 of the 72, chosen so that it has every
    pair (colour and form, form and direction, colour and direction)."""
    index = list(COLOURS).index(colour) + FORMS.index(form) + list(DIRECTIONS).index(direction)
    return index % 3 == 0


def demo_files(n_files=160, seed=0):
    """The plan of the demo: a list of files {name, width, height, fps, split, shots}; a shot has
    the arguments of `render_shot`, its caption, and whether the metadata contains it (captioned).
    Every eighth file is in the test split, where half of the shots show combinations left out. In
    files beyond 160 all shapes turn or stop: see `paced`."""
    every = [(c, f, d) for c in COLOURS for f in FORMS for d in DIRECTIONS]
    seen = [combination for combination in every if not is_left_out(*combination)]
    left_out = [combination for combination in every if is_left_out(*combination)]
    files = []
    for i in range(n_files):
        random = rng(seed, "demo", i)
        width, height = DEMO_SIZES[i % len(DEMO_SIZES)]
        is_test, is_more, shots, level = i % 8 == 7, i >= 160, [], None
        fps = int(random.choice([8, 10, 12]))
        for j in range(8):
            level = random.choice([g for g in GROUNDS if g != level])    # makes each cut visible
            pool = left_out if is_test and j % 2 else seen
            n_shapes = 1 if is_test and j % 2 or random.random() < 0.8 else 2
            picked = [pool[k] for k in random.choice(len(pool), n_shapes, replace=False)]
            if len({colour for colour, _, _ in picked}) < n_shapes:
                picked = picked[:1]
            shot = demo_shot(random, picked, str(level), width, height, fps)
            shots.append(paced(rng(seed, "pace", i, j), shot) if is_more else shot)
        files.append({"name": f"demo-{i:03d}.mp4", "width": width, "height": height, "fps": fps,
                      "split": "test" if is_test else "train", "shots": shots})
    return files


def demo_shot(random, combinations, level, width, height, fps):
    """One shot: shapes [{colour, form, direction, radius, start, stop}] (pixels), a ground, a
    number of frames, a caption. Shapes stay inside the frame and apart; two are smaller than one,
    so that both fit."""
    side, n_frames = min(width, height), int(random.integers(9, 15))
    radii = (0.25, 0.29) if len(combinations) == 1 else (0.17, 0.2)
    for _ in range(200):
        shapes = []
        for colour, form, direction in combinations:
            radius = side * random.uniform(*radii)
            size, step = np.array([width, height]), np.array(DIRECTIONS[direction])
            reach = size / 2 - radius - 1                                 # of the centre
            path = step * random.uniform(0.75, 1.0) * 2 * reach * np.abs(step)
            free = reach - np.abs(path) / 2
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


def paced(random, shot):
    """A longer version of a shot, whose shapes first move backwards and turn, or rest at the end,
    like a video that is extended with the same prompt or another."""
    kind = str(random.choice(["turn", "rest"]))
    more = int(random.integers(5, 9) if kind == "turn" else random.integers(5, 15))
    n_frames = shot["frames"] + more
    return {**shot, "frames": n_frames, kind: more / n_frames, "captioned": True}


def progress(shot):
    """[T]: position of a shape on its path in each frame, 0 at its start and 1 at its stop."""
    turn, rest = shot.get("turn", 0), shot.get("rest", 0)        # shares of the frames
    return np.interp(np.linspace(0, 1, shot["frames"]), [0, turn, 1 - rest, 1],
                     [turn / (1 - turn - rest), 0, 1, 1])


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
        start, stop = np.array(shape["start"]), np.array(shape["stop"])
        for frame, share in zip(frames, progress(shot)):
            centre_x, centre_y = start + share * (stop - start)
            u, v = (x - centre_x) / shape["radius"], (y - centre_y) / shape["radius"]
            inside = {"circle": u * u + v * v < 1,
                      "square": np.maximum(np.abs(u), np.abs(v)) < 0.88,
                      "triangle": (v < 0.85) & (np.abs(u) < 0.56 * (v + 1.1))}[shape["form"]]
            cover = inside.reshape(height, oversample, width, oversample).mean((1, 3))[..., None]
            frame += cover * (np.array(COLOURS[shape["colour"]]) - frame)
    return frames.clip(0, 255).round().astype(np.uint8)


# The second demo: landscapes of textures under a moving camera, to try settings for real footage.
# Colours of the sky at the zenith and at the horizon, and of what is lit.
LIGHTS = {"noon": ((70, 130, 225), (190, 220, 245), (255, 255, 245)),
          "dusk": ((60, 50, 110), (250, 150, 80), (250, 190, 140)),
          "fog": ((150, 160, 170), (205, 210, 212), (205, 210, 215)),
          "night": ((10, 14, 40), (40, 56, 96), (90, 105, 150))}
SCENES = {"hills": ("balloon", (96, 150, 62)), "sea": ("boat", (24, 84, 110)),
          "desert": ("ball", (226, 178, 110))}
CAMERAS = {"still": (0, 1), "pans left": (-0.7, 1), "pans right": (0.7, 1), "zooms in": (0, 1.7)}


def scene_files(n_files=30, seed=0):
    """The plan of demo-scenes, like `demo_files`: two shots a file, every light and scene."""
    files = []
    for i in range(n_files):
        random, shots = rng(seed, "scenes", i), []
        for j in range(2):
            ground, light = list(SCENES)[(i + j) % 3], list(LIGHTS)[(i // 3 + 2 * j) % 4]
            camera = str(random.choice(list(CAMERAS)))
            colour = str(random.choice([c for c in COLOURS if c != "green"]))
            shots.append(dict(
                scene=ground, light=light, camera=camera, colour=colour, frames=48, height=72,
                width=96, seed=(seed, "scene", i, j), captioned=True, caption=f"a {colour} "
                f"{SCENES[ground][0]}, {ground}, {light}, the camera {camera}"))
        files.append({"name": f"scene-{i:03d}.mp4", "fps": 24, "shots": shots,
                      "split": "test" if i % 10 == 9 else "train"})
    return files


def random_texture(random, power, n=128):
    """Periodic noise [n, n] of mean 0.5 in 0..1; a wave of frequency f has the size f**-power."""
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
    f[0, 0] = np.inf
    texture = np.fft.irfft2(np.exp(2j * np.pi * random.random(f.shape)) * f**-power, (n, n))
    return (0.5 + texture / (5 * texture.std())).clip(0, 1)


def look_up(texture, y, x):
    """A periodic texture at real coordinates, between its points bilinear."""
    n, i, j = len(texture), np.floor(y).astype(int), np.floor(x).astype(int)
    a, b = y - i, x - j
    at = lambda k, m: texture[(i + k) % n, (j + m) % n]
    return (1 - a) * ((1 - b) * at(0, 0) + b * at(0, 1)) + a * (
        (1 - b) * at(1, 0) + b * at(1, 1))


def scene_object(kind, u, v, t):
    """(what it covers, how bright it is) of a boat, balloon or ball about (0, 0), of radius 1."""
    r = np.hypot(u, v)
    shade = 0.45 + 0.55 * (1 - np.hypot(u + 0.4, v + 0.45) / 1.7).clip(0, 1)
    if kind == "boat":
        hull, sail = (v > 0.5) & (v < 0.95) & (np.abs(u) < 1.3 - v / 2), (
            (v < 0.45) & (v > -1.2) & (u > -0.1) & (u < 0.6 * (v + 1.2)))
        return hull | sail, np.where(hull, 0.35, 1.1)
    if kind == "balloon":
        basket = (np.abs(u) < 0.25) & (v > 1.25) & (v < 1.6)
        stripes = 0.75 + 0.25 * np.sign(np.sin(7 * u))
        return (r < 1) | basket, np.where(basket, 0.3, shade * stripes)
    turn = np.arctan2(v, u) + 5 * t
    return r < 1, shade * (0.7 + 0.3 * np.sign(np.cos(2 * turn)))


def render_scene(shot):
    """uint8 [T, H, W, 3]: sky with drifting clouds and a sun, ridges or waves, each moved by the
    camera as far as it is near, and the object that crosses it; drawn at twice its size."""
    random, (H, W) = rng(*shot["seed"]), (2 * shot["height"], 2 * shot["width"])
    clouds, rough = random_texture(random, 1.7), random_texture(random, 0.9)
    kind, ground = SCENES[shot["scene"]]
    zenith, low, lit = (np.array(c, float) for c in LIGHTS[shot["light"]])
    ground, colour = np.array(ground) * lit / 255, np.array(COLOURS[shot["colour"]]) * lit / 255
    pan, zoom = CAMERAS[shot["camera"]]
    sun, side, level = random.uniform(-0.5, 0.5), random.choice([-1, 1]), random.uniform(0.25, 0.4)
    y, x = (np.mgrid[:H, :W] + 0.5) / H - np.array([0.5, W / H / 2])[:, None, None]
    mix = lambda a, b, share: a + (b - a) * np.clip(share, 0, 1)[..., None]
    frames = []
    for t in np.linspace(0, 1, shot["frames"]):
        view = lambda depth: (y / (1 + (zoom - 1) * t * depth), pan * depth * (t - 0.5)
                              + x / (1 + (zoom - 1) * t * depth))
        v, u = view(0.15)
        frame = mix(zenith, low, 1.1 + 2 * v)
        frame = mix(frame, lit, 1.2 - np.hypot(u - sun, v + 0.25) * 12)                   # the sun
        frame = mix(frame, lit, 3.5 * look_up(clouds, v * 60, u * 40 + 9 * t) - 2)
        for depth in (0.3, 0.5, 0.8) if shot["scene"] != "sea" else (0.5,):
            v, u = view(depth)
            ridge = depth * 0.55 - 0.16
            if shot["scene"] == "sea":
                ridge, nearness = 0.05, 1 / (v - 0.02).clip(0.03)
                light = look_up(rough, 14 * nearness + 10 * t, 6 * u * nearness) + (
                    0.3 - np.abs(u - sun)).clip(0)
            else:
                ridge = ridge + 0.45 * (1 - depth / 2) * (look_up(clouds, np.full_like(
                    u, 90 * depth), u * 14 + 50 * depth) - 0.5)
                light = look_up(rough, v * 70 / depth, u * 50 / depth)
            face = mix(low, ground * (0.55 + 0.9 * light[..., None]), np.full_like(u, depth + 0.2))
            frame = mix(frame, face, (v - ridge) * H / 2)
        v, u = view(0.8)
        offset = side * (1.1 * t - 0.55)
        height = {"boat": 0.1, "ball": level - 0.1 * np.abs(np.sin(9 * t)),
                  "balloon": -level / 2 - 0.1 * t}[kind]
        size = {"boat": 0.16, "ball": 0.11, "balloon": 0.14}[kind]
        covers, bright = scene_object(kind, (u - offset) / size, (v - height) / size, side * t)
        frame = mix(frame, colour * bright[..., None], covers.astype(float))
        frames.append(frame.reshape(H // 2, 2, W // 2, 2, 3).mean((1, 3)))
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)


def render_file(folder, render, file):
    frames = (frame for shot in file["shots"] for frame in render(shot))
    write_video(folder / file["name"], frames, file["fps"], crf=10)


def make_demo(folder, files, render, n_workers):
    """Renders the missing videos of a demo and writes captions.jsonl, as a user would: the split of
    each file, and the caption of each shot that is `captioned`."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    rows = []
    for file in files:
        rows.append({"video": file["name"], "split": file["split"]})
        edges = np.cumsum([0, *(shot["frames"] for shot in file["shots"])]) / file["fps"]
        rows += [{"video": file["name"], "start": round(float(start), 6),
                  "end": round(float(end), 6), "caption": shot["caption"], "split": file["split"]}
                 for shot, start, end in zip(file["shots"], edges, edges[1:]) if shot["captioned"]]
    there = {path.name for path in folder.glob("*.mp4")}
    if there - {file["name"] for file in files}:
        refuse(f"{folder} holds more than a demo of {len(files)} files: remove it")
    todo = [file for file in files if file["name"] not in there]
    if todo:
        context = multiprocessing.get_context("spawn")
        with deaf_children():
            pool = context.Pool(min(n_workers, len(todo)), die_with_parent)
        with pool:                                     # terminated at once on an error
            work = pool.imap(functools.partial(render_file, folder, render), todo)
            list(tqdm(work, total=len(todo), unit="file", desc="demo videos"))
    write_rows(folder / "captions.jsonl", rows)


# == files as people have them: archives, odd pictures, HDR, damage, encodings, metadata ===========

HEIC = (b"heic", b"heix", b"mif1")
ENDINGS = VIDEOS | STILLS | {".pkl"}     # VideoInstruct's
ARCHIVES = (".tar", ".tfrecords")
PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.I)
LFS = b"version https://git-lfs"         # a pointer that git leaves if Git LFS did not run
NO_TARS = {b"\x1f\x8b": "gzip: unpack it", b"BZh": "bzip2: unpack it", b"\xfd7zXZ": "xz: unpack it",
           b"(\xb5/\xfd": "zstd: unpack it", b"PK\3\4": "zip: unpack it", b"<": "a web page",
           LFS: "a pointer of Git LFS"}


def is_archive(name):
    return Path(name).suffix.lower() in ARCHIVES or bool(PACKED.search(name))


def refuse_pointer(path):
    """Refuses a pointer of Git LFS in a file's place."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            refuse(f"{path} is a Git LFS pointer and not the file: git lfs pull fetches it")


def walk(root, folder):
    """Yields (folder, names of its files) for `root` and all folders below, links included: each
    folder once, by its real path if that is below `root`. Skips hidden folders, the data set's own
    and links to a parent of `root`; warns of unreadable ones."""
    def tell(error):
        print(f"warning: {printable(error.filename)}: {error.strerror}", file=sys.stderr)

    waiting, seen = [Path(root)], {folder.resolve(), *Path(root).resolve().parents}
    while waiting:                                     # real folders first, then links, in order
        links = []
        for top in waiting:
            if top.resolve() in seen:
                continue
            for where, folders, files in os.walk(top, onerror=tell):
                seen.add(Path(where).resolve())
                yield Path(where), files
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                links += [Path(where, name) for name in folders
                          if os.path.islink(os.path.join(where, name))]
                folders[:] = [name for name in folders if Path(where, name).resolve() not in seen]
        waiting = links


def in_memory(data, suffix):
    """An open file of bytes, with a suffix like a path."""
    file = io.BytesIO(data)
    file.suffix = suffix
    return file


class Member(io.RawIOBase):
    """A part of a file as an open file, with a suffix like a path."""

    def __init__(self, path, start, size, suffix):
        self.file, self.start, self.size, self.suffix = open(path, "rb"), start, size, suffix
        self.at = 0

    def readable(self):
        return True

    seekable = readable

    def seek(self, to, whence=os.SEEK_SET):
        self.at = max(0, to + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer):
        self.file.seek(self.start + self.at)
        n = self.file.readinto(memoryview(buffer)[:max(0, self.size - self.at)])
        self.at += n
        return n

    def getvalue(self):
        self.seek(0)
        return self.read()

    def close(self):
        self.file.close()
        super().close()


def members(archive):
    """{name: (offset, bytes)} of the files in a tar (./a//b is a/b), or of the records of a
    TFRecord file (called NUMBER.mkv: see `bair_video`); only those before any damage."""
    return archive_index(archive)[0]


@functools.lru_cache(2)
def archive_index(archive):
    """(`members` of an archive, description of its damage or '')."""
    index, size = {}, archive.stat().st_size
    with open(archive, "rb") as file:
        if archive.suffix.lower() != ".tfrecords":
            head, file_is = file.read(len(LFS)), "compressed: unpack it to a .tar"
            index, wrong = ({}, file_is) if PACKED.search(archive.name) else tar_index(file, size)
            kinds = [kind for mark, kind in NO_TARS.items() if head.startswith(mark)]
            return index, f"no tar but {kinds[0]}" if wrong and kinds and not index else wrong
        while file.tell() + 12 < size:                 # a length, its CRC, the record, its CRC
            length, = struct.unpack("<Q4x", file.read(12))
            if file.tell() + length + 4 > size:
                break
            index[f"{len(index):05d}.mkv"] = file.tell(), length
            file.seek(length + 4, 1)
        return index, f"cut off or damaged behind {len(index)} records" * (file.tell() < size)


def tar_index(file, size):
    """`archive_index` of an open tar of `size` bytes, or of several in one file."""
    index, links, at, wrong = {}, {}, 0, "an empty file" if not size else ""
    plain = lambda path: os.path.normpath("/" + path).replace(os.sep, "/").lstrip("/")
    while at < size and not wrong:
        file.seek(at)
        if not any(block := file.read(tarfile.BLOCKSIZE)):             # an end marker
            at += len(block)
            continue
        file.seek(begin := at)
        with contextlib.suppress(tarfile.TarError, ValueError, OverflowError), \
                tarfile.open(fileobj=file, mode="r:") as tar:
            for one in tar:
                name = "/".join(part for part in one.name.split("/") if part not in ("", "."))
                if one.size < 0:
                    raise ValueError
                if one.issym() or one.islnk():
                    links[name] = plain(one.linkname if one.islnk() else os.path.join(
                        os.path.dirname(name), one.linkname))
                elif one.isfile() and one.offset_data + one.size <= size:      # not cut off
                    index[name] = one.offset_data, one.size
            at = tar.offset
        if at == begin or at >= size:                  # no end marker
            wrong = f"cut off or damaged behind {len(index)} members" if index else "no tar"
    dead = []
    for name, target in links.items():
        for _ in range(8):
            target = links.get(target, target) if target not in index else target
        if target in index:
            index[name] = index[target]
        elif Path(name).suffix.lower() in VIDEOS | STILLS:
            dead.append(name)
    return index, wrong or (f"{len(dead)} links to nothing in it: {dead[0]}" if dead else "")


def located(root, source):
    """(path or open file, {suffix: bytes}) of a source and of the .txt, .json and .cls beside it,
    in lower or upper case. A WebDataset key ends at the first dot of the file's name."""
    path, suffixes = Path(root, source), BESIDE_FILES
    archive = next((one for one in path.parents
                    if one.suffix.lower() in ARCHIVES and one.is_file()), None)
    if archive is None:
        names = {form(path.stem) for form in FORMS_OF_NAMES} if not path.stem.isascii() else \
            {path.stem}
        beside_it = [(suffix, path.with_name(name + ending)) for suffix in suffixes
                     for name in sorted(names) for ending in (suffix.upper(), suffix)]
        return path, {suffix: one.read_bytes() for suffix, one in beside_it if one.is_file()}
    name, index = path.relative_to(archive).as_posix(), members(archive)
    key = re.match(r"(.*/)?[^.]*", name)[0]
    with open(archive, "rb") as file:
        def read(name):
            file.seek(index[name][0])
            return file.read(index[name][1])
        texts = {suffix: read(key + ending) for suffix in suffixes
                 for ending in (suffix.upper(), suffix) if key + ending in index}
        if archive.suffix.lower() == ".tfrecords":
            return in_memory(bair_video(read(name)), ".png"), texts
    return Member(archive, *index[name], path.suffix), texts


def bair_video(record):
    """A lossless video of the main camera's frames in a record of softmotion30_44k, 10 frames a
    second (the record has no rate). The record is a tf.train.Example: each frame's name, the tags
    and lengths of three messages, then 64 x 64 px of raw RGB."""
    frames = dict(re.findall(rb"\n.(\d+)/image_main/encoded\x12..\n..\n\x80\x60(.{12288})", record,
                            re.DOTALL))
    try:
        first, *rest = [Image.frombytes("RGB", (64, 64), frames[b"%d" % n])
                        for n in range(max(1, len(frames)))]
    except KeyError:
        raise Unreadable("not a record of BAIR's") from None
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=rest, duration=100)
    return file.getvalue()


# -- pictures of every kind ------------------------------------------------------------------------

def flat_rgb(picture):
    """uint8 [H, W, 3] of a Pillow picture of any mode, on a white background. The white level is
    2**bits - 1; for floats 1 or, if values are larger, 255 or 65535."""
    if picture.mode[0] in "IF":                                     # 16 bits and more; floats
        tags = getattr(picture, "tag_v2", {})
        values = np.nan_to_num(np.asarray(picture, dtype=np.float32), posinf=0)
        most = values.max(initial=0)
        full = (1 if most <= 1 else 255 if most <= 255 else 65535) if picture.mode == "F" else \
            2 ** min(16, *tags.get(258, (16,))) - 1                 # TIFF's BitsPerSample
        values = (values.clip(0, full) * (255 / full)).round().astype(np.uint8)
        picture = Image.fromarray(255 - values if tags.get(262) == 0 else values)   # WhiteIsZero
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


@contextlib.contextmanager
def opened_picture(file):
    """Yields a Pillow picture (of a path or file object), not loaded yet; a JPEG above MOST_PIXELS
    at a half, a quarter or an eighth of its size. Raises Unreadable."""
    with Image.open(file) as picture:
        size, k = picture.size, 1
        while math.prod(picture.size) > MOST_PIXELS and picture.format in ("JPEG", "MPO") and k < 8:
            k *= 2
            picture.draft(picture.mode, [side // k for side in size])
        if math.prod(picture.size) > MOST_PIXELS:
            raise Unreadable("too many pixels", math.prod(size))
        yield picture


def decoded_still(file, hdr="tonemap"):
    """(uint8 [H, W, 3], conversions) of a picture file (path or file object), in the orientation of
    its tags."""
    if brand_of(file) in (*HEIC, b"avif") and (heif := read_heif(file, hdr)):
        return heif
    with opened_picture(file) as picture:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return flat_rgb(picture), ()


def is_animated(path):
    """Whether a file with a still's suffix is animated. Pages of a TIFF and the second view of a
    stereo JPEG are not frames, so only formats with animation count."""
    if brand_of(path) in HEIC:
        return False
    try:
        with opened_picture(path) as picture:
            return picture.format in ("GIF", "WEBP", "PNG", "AVIF") and \
                getattr(picture, "n_frames", 1) > 1
    except PICTURE_ERRORS as error:
        if is_machine_error(error):
            raise
        raise Unreadable("not a picture that can be read") from None


def brand_of(file):
    """The brand of an ISO file, such as b"heic" or b"avif"; b"" of any other."""
    with open(file, "rb") if isinstance(file, Path) else contextlib.nullcontext(file) as inside:
        inside.seek(0)
        head = inside.read(12)
        inside.seek(0)
    return head[8:] if head[4:8] == b"ftyp" else b""


def boxes(data, start, stop):
    """{type: (start, stop)} of the boxes between two offsets of an ISO file, and the same as a
    list."""
    entries = []
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 16 if size == 1 else 8
        size = struct.unpack_from(">Q", data, start + 8)[0] if size == 1 else size or stop - start
        entries.append((kind, (start + head, min(stop, start + max(size, head)))))
        start += max(size, head)
    return dict(entries), entries


def heif_item(data):
    """(type, [item of each tile], columns, (width, height), [(property, its bytes)]) of the primary
    picture of a HEIF file: a coded picture, or a grid of them."""
    meta, _ = boxes(data, boxes(data, 0, len(data))[0][b"meta"][0] + 4, len(data))
    reads = lambda form, at: struct.unpack_from(">" + form, data, at)
    number = lambda at, is_wide: reads("I" if is_wide else "H", at)[0]
    start = lambda name: (meta[name][0] + 4, data[meta[name][0]])       # behind version and flags
    at, version = start(b"pitm")
    main, kinds, tiles, columns, size, properties = number(at, version), {}, None, 1, None, []
    at, version = start(b"iinf")
    for _, (at, _) in boxes(data, at + (4 if version else 2), meta[b"iinf"][1])[1]:
        wide = data[at] > 2
        kinds[number(at + 4, wide)] = data[at + 8 + 2 * wide:at + 12 + 2 * wide]
    if kinds[main] == b"grid":
        at, wide = start(b"iref")
        for kind, (at, _) in boxes(data, at, meta[b"iref"][1])[1]:
            if kind == b"dimg" and number(at, wide) == main:
                step = 4 if wide else 2
                tiles = [number(at + step + 2 + n * step, wide) for n in range(*reads(
                    "H", at + step))]
        at, version = start(b"iloc")
        sizes = [data[at] >> 4, data[at] & 15, data[at + 1] >> 4,
                 data[at + 1] & 15 if version else 0]
        long = lambda at, n: int.from_bytes(data[at:at + n])
        at, count = at + (6 if version > 1 else 4), number(at + 2, version > 1)
        for _ in range(count):
            item, at = number(at, version > 1), at + (4 if version > 1 else 2)
            method = reads("H", at)[0] & 15 if version else 0
            at += 2 * (version > 0) + 2
            base, n = long(at, sizes[2]), reads("H", at + sizes[2])[0]
            at += sizes[2] + 2
            offset = base + long(at + sizes[3], sizes[0]) + (meta[b"idat"][0] if method == 1 else 0)
            at += n * (sizes[3] + sizes[0] + sizes[1])
            if item == main:                           # version, flags, rows - 1, columns - 1, size
                flags, _, columns, *size = reads("4B" + ("II" if data[offset + 1] & 1 else "HH"),
                                                 offset)[1:]
                columns += 1
    part, _ = boxes(data, *meta[b"iprp"])
    boxes_found = [(kind, data[a:b]) for kind, (a, b) in boxes(data, *part[b"ipco"])[1]]
    at, wide = part[b"ipma"][0] + 8, data[part[b"ipma"][0] + 3] & 1
    for _ in range(*reads("I", at - 4)):
        item, at = number(at, data[part[b"ipma"][0]]), at + (4 if data[part[b"ipma"][0]] else 2)
        for n in range(data[at]):
            k = reads("H", at + 1 + 2 * n)[0] & 0x7fff if wide else data[at + 1 + n] & 0x7f
            if item == main and k:
                properties.append(boxes_found[k - 1])
        at += 1 + data[at] * (2 if wide else 1)
    return kinds[main], tiles or [main], columns, size, properties


def read_heif(file, hdr):
    """(uint8 [H, W, 3], conversions) of a HEIC, also of tiles as phones write it, or of an HDR
    AVIF, by FFmpeg, in its orientation; None for an AVIF that Pillow reads. Raises Unreadable."""
    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    try:
        kind, tiles, columns, size, properties = heif_item(data)
        colour = next((one for name, one in properties if one[:4] == b"nclx"), b"")
        if data[8:11] == b"avi" and int.from_bytes(colour[6:8]) not in HDR:
            return None
        if kind not in (b"hvc1", b"av01", b"grid"):
            raise Unreadable(f"HEIF of type {kind.decode('latin-1')}")
        with av.open(io.BytesIO(data)) as container:
            streams, parts = {one.id: one for one in container.streams.video}, {}
            for packet in container.demux([streams[tile] for tile in tiles]):
                for frame in packet.decode():
                    parts.setdefault(packet.stream.id, frame)
        frames, video = [parts[tile] for tile in tiles], Video(file, hdr=hdr)
        video.note_tags(frames[0])
        frames = [video.pixels(frame, frame.width, frame.height) for frame in frames]
        rows = [np.concatenate(frames[at:at + columns], 1) for at in range(0, len(frames), columns)]
    except (FFmpegError, LookupError, TypeError, ValueError, struct.error):
        raise Unreadable("broken picture") from None
    width, height = size or rows[0].shape[1::-1]
    pixels = np.concatenate(rows)[:height, :width]
    for name, one in properties:
        pixels = np.rot90(pixels, one[0] & 3) if name == b"irot" else \
            np.flip(pixels, one[0] & 1) if name == b"imir" else pixels
    return np.ascontiguousarray(pixels), {"HEIF to PNG", *video.converted}


# -- videos: HDR, timestamps, damage, interlaced frames, animated pictures -------------------------

HDR = {16: "PQ", 18: "HLG"}             # H.273's transfer characteristics
WHITE, PEAK = 203.0, 1000.0             # cd/m2: SDR's white (BT.2408), and the clipping of HDR
TO_709 = {1: np.eye(3), 12: ((1.224940, -0.224940, 0), (-0.042057, 1.042057, 0), (
    -0.019638, -0.078636, 1.098274))}   # primaries' linear RGB in BT.709's: 12 is P3, others 2020
FROM_2020 = ((1.660491, -0.587641, -0.072850), (-0.124550, 1.132900, -0.008349),
             (-0.018151, -0.100579, 1.118730))


def tone_mapped(signal, transfer, primaries=9):
    """uint8 [H, W, 3]: BT.709 for a BT.1886 display, of R'G'B' in PQ or HLG, uint16 [H, W, 3] in
    full range. Display light (HLG: by BT.2100's OOTF at PEAK) is compressed by BT.2390's EETF from
    0..PEAK to 0..WHITE cd/m2, which leaves all below 90 cd/m2 as it is, by the greatest of R, G, B,
    so that hues stay; colours outside of BT.709 are clipped."""
    linear, bent, encoded = hdr_tables(transfer)
    matrix = np.float32(TO_709.get(primaries, FROM_2020))
    flat, out = signal.reshape(-1, 3), np.empty(signal.shape, np.uint8)
    for at in range(0, len(flat), 2**15):              # blocks that fit the processor's cache
        light = linear[np.ascontiguousarray(flat[at:at + 2**15].T)]
        if transfer == 18:
            light *= (np.float32((0.2627, 0.678, 0.0593)) @ light) ** np.float32(0.2)
        top = light.max(0)
        gain = bent[(np.sqrt(top.clip(0, 1)) * 65535).astype(np.uint16)] / top.clip(1e-9)
        light = matrix @ light * gain
        out.reshape(-1, 3)[at:at + 2**15] = encoded[
            (np.sqrt(light.clip(0, 1)) * 65535 + 0.5).astype(np.uint16)].T
    return out


@functools.lru_cache(2)
def hdr_tables(transfer):
    """Tables of 65536 for `tone_mapped`: light / PEAK (HLG: of the scene) by the signal; light /
    WHITE after BT.2390's EETF by the root of light / PEAK; levels by the root of light / WHITE."""
    x = np.linspace(0, 1, 65536)

    def eotf(signal):                                  # of PQ: SMPTE ST 2084
        power = signal ** (1 / 78.84375)
        return 1e4 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (
            1 / 0.1593017578125)

    def inverse(light):
        power = (light / 1e4) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    if transfer == 16:
        linear = eotf(x) / PEAK
    else:
        linear = np.where(x <= 0.5, x * x / 3, (np.exp((x - 0.55991073) / 0.17883277)
                                                + 0.28466892) / 12)
    top, most = inverse(x * x * PEAK) / inverse(PEAK), inverse(WHITE) / inverse(PEAK)
    knee = 1.5 * most - 0.5
    t = (top - knee) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) \
        + (3 * t**2 - 2 * t**3) * most
    bent = eotf(np.where(top < knee, top, curve) * inverse(PEAK)) / WHITE
    return linear.astype(np.float32), bent.astype(np.float32), \
        (x ** (2 / 2.4) * 255).round().astype(np.uint8)


def colour_matrix(frame):
    """src_colorspace for a frame: None = its own tag; untagged is BT.601, or BT.709 at HD sizes, as
    in players; HDR is BT.2020."""
    if frame.colorspace in (2, 10) and frame.color_trc in HDR:
        return Colorspace.BT2020
    if frame.colorspace != 2:                                       # AVCOL_SPC_UNSPECIFIED
        return None
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


def true_times(stamps, step=0.04):
    """Seconds since the first frame [T], strictly increasing, from the timestamps [2, T] = pts, dts
    (s, nan if missing). Frames are in display order, so a timestamp that does not increase is wrong
    (packed B-frames in AVI) and is interpolated. Timestamps that restart, as in concatenated
    streams, continue from the end of the first part. Without any timestamps, as in an elementary
    stream, frames are `step` s apart."""
    raw = min(stamps, key=lambda line: int((~(np.diff(line) > 0)).sum())).copy()  # pts if both do
    steps = np.diff(raw)
    for i in np.flatnonzero(steps < 0) + 1:
        if len(steps) >= i + 8 and (steps[i:i + 8] > 0).all():
            usual = np.median(steps[steps > 0])
            if i > 1 and raw[i - 2] < raw[i] and steps[i - 2] > 10 * usual:
                raw[i - 1] = math.nan                        # a single wrong one, not a restart
            else:
                raw[i:] += raw[i - 1] + usual - raw[i]
    top = np.maximum.accumulate(np.nan_to_num(raw, nan=-math.inf))
    good = np.flatnonzero(raw > np.r_[-math.inf, top[:-1]])
    step = np.median(np.diff(raw[good]) / np.diff(good)) if len(good) > 1 else step
    at = np.arange(len(raw))
    if not len(good):
        return at * step
    times = np.interp(at, good, raw[good])
    times += step * (np.minimum(at - good[0], 0) + np.maximum(at - good[-1], 0))
    return times - times[0]


def raise_machine(error, path, index=0, n_packets=0):
    """Raises an FFmpegError again if it is of the machine. FFmpeg reports EIO and ENOMEM also for
    damaged files: their bytes can be read, but opening them, or demuxing n packets, fails again."""
    if error.errno in (errno.EIO, errno.ENOMEM) and not (
            error.errno == errno.ENOMEM and is_machine_error(error)):
        if isinstance(path, Path):
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass
        else:
            path.seek(0)
        try:
            with av.open(str(path) if isinstance(path, Path) else path) as container:
                deque(itertools.islice(container.demux(container.streams[index]), n_packets), 0)
        except FFmpegError:
            return
    elif not is_machine_error(error):
        return
    raise OSError(error.errno, error.strerror, str(path))


def demuxed(container, stream):
    """The packets of a stream. Skips packets of streams that begin later in the file, for which
    PyAV raises IndexError."""
    for packets in iter(lambda: container.demux(stream), None):
        try:
            yield from packets
            return
        except IndexError:
            continue


def animated(video):
    """Frames of an animated picture by Pillow, with delays as in browsers."""
    at = 0
    try:
        with opened_picture(video.path) as picture:
            if math.prod(picture.size) > MOST_PIXELS // 4:          # Pillow keeps many copies
                raise Unreadable("too many pixels", math.prod(picture.size))
            unit = 10 if picture.format == "GIF" else 1            # of delays, ms
            video.tick = unit / 1000
            for n in range(picture.n_frames):
                picture.seek(n)
                if math.prod(picture.size) > MOST_PIXELS // 4:     # a GIF that grows: damage
                    raise ValueError
                picture.load()
                frame = av.VideoFrame.from_ndarray(flat_rgb(picture), format="rgb24")
                frame.pts, delay = at // unit, round(picture.info.get("duration") or 0)
                at += delay if delay > 10 else 100
                yield frame
    except PICTURE_ERRORS as error:
        if is_machine_error(error):
            raise
        video.bad_packets += 1                      # the frames before the damage stay


def progressive(video, frames):
    """The frames, those from the first interlaced one on through FFmpeg's bwdif."""
    graph, shape, waiting = None, None, deque()

    def deinterlaced(frame):
        graph.vpush(frame)
        with contextlib.suppress(BlockingIOError, EOFError):
            while waiting:
                out = graph.vpull()
                out.pts, out.dts = waiting.popleft()
                yield out
    for frame in frames:
        if graph and shape != (frame.width, frame.height, frame.format.name):
            yield from deinterlaced(None)
            graph = None
        if frame.interlaced_frame and not graph and video.interlaced != "keep" \
                and min(frame.width, frame.height) >= 16:
            if video.interlaced == "reject":
                raise Unreadable("interlaced")
            video.converted.add("deinterlaced")
            shape = frame.width, frame.height, frame.format.name
            graph = deinterlacer(frame)
        if graph:
            waiting.append((frame.pts, frame.dts))
            yield from deinterlaced(frame)
        else:
            yield frame
    if graph:
        yield from deinterlaced(None)


def deinterlacer(frame):
    """FFmpeg's bwdif for frames like `frame`: one frame out for each in, one thread."""
    graph = av.filter.Graph()
    graph.threads = 1
    graph.link_nodes(graph.add_buffer(frame, time_base=frame.time_base or Fraction(1, 1000)),
                     graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                     graph.add("buffersink"))
    graph.configure()
    return graph


def unnamed(kind, value):
    """A member of PyAV's enumeration of side data for an unknown type. Without it PyAV reads no
    side data of that frame, not even the rotation."""
    one = object.__new__(kind)
    one._name_ = one._value_ = value
    return one


av.sidedata.sidedata.Type._missing_ = classmethod(unnamed)


# -- texts in every encoding and script ------------------------------------------------------------

MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8,
         "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def encoding_of(head):
    """The encoding of a text by its byte order mark; without one UTF-8."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


# The two of Windows' code pages that can be recognised: (what no text in them contains, what it
# must contain). cp1252: letters that Czech, Polish and Turkish pages have elsewhere or lack, at
# most two in a row, and no signs inside a word. cp1251: words of Cyrillic letters only, mostly
# lower case, never lower before upper case (as KOI8-R, Greek and Arabic would give); with upper
# case, or letters that Hebrew lacks.
MARKS_1252, CYRILLIC = "‘’“”–—…•€™©®°«»¡¿£·§´\xa0", "А-яЁёІіЇїЄєҐґЎў"
LEGACY = {
    "cp1252": (re.compile(
        f"[^\0-\x7f{MARKS_1252}ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÖØÙÚÛÜŒàáâãäåæçèéêëìíîïñòóôöøùúûüœß]"
        r"|[À-ÿœŒ]{3}|[^\W\d_][‘“”•€™©®°«»¡¿£·§´][^\W\d_]"), re.compile("")),
    "cp1251": (re.compile(
        f"[^\0-\x7f{MARKS_1252}№{CYRILLIC}]|[а-яёіїєґў][А-ЯЁІЇЄҐЎ]|[A-Za-z][{CYRILLIC}]"
        f"|[{CYRILLIC}][A-Za-z]"), re.compile("[А-Яыьэюя]"))}
ZEROS = ("it holds zero bytes, as UTF-16 without its mark does: make it UTF-8 (iconv -f UTF-16LE "
         "-t UTF-8 FILE > NEW; UTF-16BE where the first byte is zero)")


def legacy(data):
    """The code page of a text that is not in UTF-8, if it can be recognised (LEGACY), or None."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(data)
    if not re.search("[\udc80-\udcff]", text) or re.search("[^\0-\x7f\udc80-\udcff]", text):
        return None                                    # UTF-8, perhaps with damage
    for code, (wrong, sure) in LEGACY.items():
        text = data.decode(code, "replace")
        n_small, n_large = (len(re.findall(some, text)) for some in ("[а-яё]", "[А-ЯЁ]"))
        if not wrong.search(text) and sure.search(text) and n_small >= n_large:
            return code
    return None


def decoded(data):
    """(text, code page) of a file's bytes; the page is None for UTF-8, -16 and -32. Raises a
    ValueError that says what the bytes are instead."""
    code = encoding_of(data)
    if code.startswith("utf-8") and b"\0" in data:
        raise ValueError(f"no text in UTF-8: {ZEROS}")
    try:
        return data.decode(code), None
    except UnicodeDecodeError as error:
        if code == "utf-8" and (page := legacy(data)):
            return data.decode(page), page
        raise ValueError(f"no text in {code.upper()}: " + (
            not_utf8(data[error.start]) if code == "utf-8" else error.reason)) from None


def not_utf8(byte):
    """The message for a byte that is not UTF-8."""
    letter = " or ".join(f"'{bytes([byte]).decode(code, 'replace')}' in {code}" for code in LEGACY)
    return (f"it holds byte 0x{byte:x} ({letter}): make it UTF-8 (iconv -f ENCODING -t UTF-8 FILE >"
            " NEW; ENCODING is what wrote it, such as CP1250)")


# Fonts of Linux, macOS and Windows for many scripts, used if installed: Pillow's own has Latin.
FONTS = ("DejaVuSans", "NotoSansCJK-Regular", "NotoSansCJKsc-Regular", "wqy-microhei",
         "DroidSansFallbackFull", "FreeSans", "NotoSans-Regular", "NotoEmoji-Regular",
         "Arial Unicode", "PingFang", "Hiragino Sans GB", "msyh", "Nirmala", "arial", "seguisym")


@functools.lru_cache
def label_fonts(is_latin):
    fonts = [ImageFont.load_default(12)]
    for name in () if is_latin else FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, 12))
    return fonts


def spelled(c):
    """A character in ASCII: the distinctive part of its Unicode name."""
    name, kind = unicodedata.name(c, f"u{ord(c):04x}"), unicodedata.category(c)
    if name.startswith(("COMBINING", "VARIATION SELECTOR")):
        return ""
    name = re.split(" LETTER | SYLLABLE | SIGN |IDEOGRAPH-", name)[-1].partition(" WITH ")[0]
    return {"Cf": "", "Pd": "-", "Pi": "'", "Pf": "'"}.get(kind, name.lower().replace(" ", "-"))


def lettered(text):
    """(font, the text with its missing characters spelled): the font that has most of the text's
    characters. For a missing one it would draw a box."""
    def missing_in(font):
        font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        box = bytes(font.getmask("\uffff"))
        return {c for c in set(text) if not c.isascii() and bytes(font.getmask(c)) == box}

    font = label_fonts(True)[0]
    if missing := missing_in(font):
        font = min(label_fonts(False), key=lambda font: len(missing_in(font)))
        missing = missing_in(font)
    return font, "".join(spelled(c) if c in missing else c for c in text)


# -- what published data sets say of their files ---------------------------------------------------

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val",
          "validation": "val", "test": "test", "testing": "test"}
BESIDE_FILES = (".txt", ".json", ".cls")                             # texts beside a file, NAME.txt
SUFFIXES = ("tar", "rejected.jsonl", "jsonl")                       # of a shard that is done


def columns(**names):
    """A reader of rows whose columns only have other names: ours=theirs."""
    return lambda row: [{our: row[their] for our, their in names.items()}]


def literal(text):
    """The value of a Python literal; raises ValueError, whatever the text is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):    # of deep nesting
        raise ValueError(f"no Python literal: {str(text)[:40]}") from None


def panda70m(row):
    """One row a source video; its cells are Python literals, lists of one length."""
    cells = [literal(row[name]) for name in ("timestamp", "caption", "matching_score")]
    wanted = literal(row.get("desirable_filtering") or "None") or [None] * len(cells[0])
    for (start, end), text, score, kind in zip(*cells, wanted, strict=True):
        scores = {} if kind is None else {"desirable": int(kind == "desirable")}
        yield {"start": start, "end": end, "caption": text, "matching_score": score, **scores}


def shot2story(row):
    """A clip's summary, then each shot's caption; shots are CLIP_FIRST_LAST.mp4, in frames."""
    if "clip_id" in row:                                            # NAME_meta.csv
        yield {"label": literal(row["categories"])[0]}
        return
    yield {"caption": row["whole_caption"]}
    for name, text in zip(row["video_names"], row["captions"], strict=True):
        frames = re.fullmatch(r".*_(\d+)_(\d+)\.\w+", name)
        if not frames:
            raise ValueError(f"{name} is no CLIP_FIRST_LAST.mp4")
        yield {"caption": text, "frames": [int(n) for n in frames.groups()]}


def youku_mplug(row):
    texts = [row[name] for name in ("golden_caption", "caption", "title") if row.get(name)]
    yield {"caption": texts[0] if texts else row["title"], "label": row.get("label")}


def videoinstruct(row):
    """A question a row, or a conversation (question, answer, question, …) a row."""
    turns = [turn["value"] for turn in row.get("conversations", [])] or [row["q"], row["a"]]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        yield {"caption": answer, "prompt": question.replace("<video>", "").strip()}


def ucf101_rows(path):
    """CLASS/FILE.avi, in the training lists a class's number behind it."""
    for line in read_lines(path):
        yield {"video": line.split()[0], "label": line.split("/")[0]}


def msrvtt_rows(path):
    """A row a sentence, merged with the entry of its video."""
    names = dict(line.split("\t")[1::-1] for line in read_lines(path.with_name("category.txt"))
                 if "\t" in line)
    with open_text(path) as file:
        videos = {str(video.get("video_id")): video for video in json_items(file, "videos")
                  if isinstance(video, dict)}
        file.seek(0)
        for sentence in json_items(file, "sentences"):
            video = isinstance(sentence, dict) and videos.get(str(sentence.get("video_id")), {})
            label = video.get("category") if video else None
            yield {"split": None, **video, **sentence, "label": names.get(str(label), label)} \
                if video else sentence


NAMED = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, sorted(VIDEOS | STILLS)))}))(?:\s*[\t|,;:]"
                   r"\s*|\s+)(\S.*)", re.I)


def text_rows(path):
    """A file a line, optionally with its caption after a tab, or after its suffix and a blank or
    punctuation; or a table with tabs and a header."""
    with open_text(path, "") as file:
        head = {our_name(cell) for cell in file.readline().split("\t")}
        file.seek(0)
        if head & {*OWN, *IDS} and head & {*TEXTS, "prompt"}:
            yield from table_rows(file, True)
            return
        for line in filter(None, map(str.strip, file)):
            parts = line.split("\t", 1) if "\t" in line else \
                result.groups() if (result := NAMED.fullmatch(line)) and bare(line) == line.rsplit(
                    "/", 1)[-1] else [line]            # a file name with blanks
            yield dict(zip(("video", "caption"), parts))


def tgif_rows(path):
    """url<TAB>sentence; splits/NAME.txt beside the file lists the addresses of a split."""
    splits = {url: part.stem for part in path.parent.glob("splits/*.txt")
              for url in read_lines(part)}
    for url, text in (line.partition("\t")[::2] for line in read_lines(path)):
        yield {"gif": "/".join(url.split("/")[-2:]), "caption": text, "split": splits.get(url)} \
            if text else None


# --format        reads (--meta: the file, or the folder that holds them), and keeps
# csv tsv json    columns video (path, file), start, end, caption (text; a list:
# jsonl           several), split, label; any other number becomes a score. JSON:
#                 an array, an object a line, {id: caption}, {id: row} (ActivityNet's)
# txt             a file a line, its caption after a tab or its suffix
# panda70m        panda70m_*.csv, 5 or 7 columns: times, captions, matching_score,
#                 desirable; split by the file's name
# webvid          results_*.csv or the mirror's partitions: caption
# internvid       InternVid-*.jsonl: times, caption, both scores
# msrvtt          *videodatainfo.json, category.txt: 20 captions, split, category
# shot2story      *_{train,val,test}.json, *_meta.csv: the clip's summary, each shot's
#                 caption at its frames, category
# youku           any of its csv files: caption, label; split by the file's name
# videoinstruct   VideoInstruct100K.json, or conversations: answers as captions,
#                 questions as their prompt
# ucf101          trainlist0N.txt and testlist0N.txt of one fold: class, split
# tgif            tgif-v1.0.tsv, splits/: captions, split
# folder          NAME.txt .json .cls beside a file, class folders, train/ val/ test/
# webdataset      tars of KEY.mp4 KEY.txt KEY.json KEY.cls, video2dataset's too
# bair            softmotion30_44k/{train,test}/*.tfrecords: split; the main camera,
#                 10 frames/s; actions are not kept
#
# A new data set is one line: the glob of its files in a folder, a function from a file to its rows
# (None: by the suffix), the columns of which one names the video (path, file name or stem), and a
# function from a row to rows of ours (None: it is one). Ours may have start and end (s or
# H:MM:SS.mmm) or frames (first, last), caption (a text or a list), prompt, split, label; every
# other number is a score. If no row has a split, the file's name is searched for one.
OWN = ("video path file videopath filepath filename videofile videofilename videofilepath "
       "videoname image imagepath imagefile imagename imagefilename img imgpath clip clippath "
       "clipname clipfile media mediapath mediafile relpath relativepath fullpath").split()
IDS = ("videoid vid clipid youtubeid ytid uid imageid id key name url videourl imageurl contenturl "
       "link uri").split()             # used if there is no column of OWN
FORMATS = {
    "csv": ("*.csv", None, OWN, None), "tsv": ("*.tsv", None, OWN, None),
    "json": ("*.json", None, OWN, None), "jsonl": ("*.jsonl", None, OWN, None),
    "txt": ("*.txt", text_rows, OWN, None),
    "panda70m": ("*.csv", None, ("videoID",), panda70m),
    "webvid": ("*.csv", None, ("videoid",), columns(caption="name")),
    "internvid": ("*.jsonl", None, ("YoutubeID",), columns(
        start="Start_timestamp", end="End_timestamp", caption="Caption",
        Aesthetic_Score="Aesthetic_Score", UMT_Score="UMT_Score")),
    "msrvtt": ("*videodatainfo.json", msrvtt_rows, ("video_id",), columns(
        caption="caption", split="split", label="label")),
    "shot2story": ("*.json", None, ("video", "clip_id"), shot2story),
    "youku": ("*.csv", None, ("video_id:FILE", "clip_name:FILE"), youku_mplug),
    "videoinstruct": ("*.json", None, ("video_id", "video"), videoinstruct),
    "ucf101": ("*list01.txt", ucf101_rows, OWN, None),
    "tgif": ("*.tsv", tgif_rows, ("gif",), None)}
IN_ARCHIVES = ("webdataset", "bair")
BESIDE = ("folder", *IN_ARCHIVES)       # no --meta: the metadata are beside the videos

NO_TABLES = {b"PK\3\4": "a zip or a workbook: save its table as .csv", b"PAR1": "Parquet: write it "
            "as .jsonl", b"\x1f\x8b": "gzip: unpack it", b"%PDF": "a PDF: save its table as .csv"}
codecs.register_error("half", lambda error: ("\ud800", error.end))


def open_text(path, newline="\n"):
    """An open text file; invalid bytes become lone surrogates, which `plain` refuses."""
    with open(path, "rb") as file:
        head = file.read(8)
        code = encoding_of(head)
        page = legacy(head + file.read(2**20)) if code == "utf-8" else None
    for mark, kind in NO_TABLES.items():
        if head.startswith(mark):
            refuse(f"{path} is {kind}")
    if page:
        print(f"warning: {path} is not in UTF-8, and is read as {page}", file=sys.stderr)
        return open(path, encoding=page, newline=newline, errors="replace")
    if code == "utf-8" and b"\0" in head[:2]:
        refuse(f"{path} is no text in UTF-8: {ZEROS}")
    unit = {"utf-16": 2, "utf-32": 4}.get(code, 1)
    if path.stat().st_size % unit:                     # all text after a lost byte would be wrong
        refuse(f"{path} is damaged: {path.stat().st_size} bytes, and {code.upper()} has {unit} or "
               "more a character: some are missing")
    return open(path, encoding=code, newline=newline,
                errors="surrogateescape" if unit == 1 else "half")


def read_lines(path):
    """The stripped lines of a text file that are not empty; none if the file is missing."""
    with open_text(path) if path.is_file() else io.StringIO() as file:
        yield from filter(None, (line.strip() for line in file))


def file_rows(path):
    """The rows of a metadata file, one at a time: dicts, or an exception for a damaged row."""
    kind = path.suffix.lower()
    with open_text(path, "\n" if kind in (".json", ".jsonl") else "") as file:
        yield from json_rows(file, kind == ".jsonl") if kind in (".json", ".jsonl") else \
            table_rows(file, kind == ".tsv")


def json_rows(file, is_lines):
    """The rows of an open JSON file: an array of objects; an object a line; an object with such an
    array; or an object of captions or rows by file name."""
    head = file.read(2**20)
    file.seek(0)
    text = head.lstrip()
    line = text.split("\n", 1)[0].rstrip()
    if text[:1] != "{":
        yield from json_items(file) if text[:1] == "[" or not is_lines else json_lines(file)
        return
    try:
        is_lines = bool(named(JSON.decode(line), OWN) or text[len(line):].strip())
    except (ValueError, RecursionError):               # cut at 1 MiB, damaged, or of several lines
        is_lines = line != "{" if is_lines else line.endswith("}") and "\n{" in text
    if is_lines:
        yield from json_lines(file)
        return
    key, is_array = wrapped(text)
    for one in json_items(file, key, not is_array):
        if is_array or isinstance(one, Exception):
            yield one
        elif isinstance(one[1], (dict, list, str)):
            is_named = isinstance(one[1], dict) and named(one[1], OWN)
            yield one[1] if is_named else {"video": one[0], **(
                one[1] if isinstance(one[1], dict) else {"caption": one[1]})}


def wrapped(text):
    """(key, whether an array) of the member that has the rows of the object at the start of `text`:
    an array of objects that name a file, or an object of them; (None, False): the object itself."""
    at, key = 1, KEY.match(text, 1)
    while key:
        name, at = key[1], key.end()
        with contextlib.suppress(ValueError, RecursionError):
            if item := re.compile(r"\[\s*(?=\{)").match(text, at):
                if name.lower() in WRAPPERS or named(JSON.raw_decode(text, item.end())[0], OWN):
                    return name, True
            if text[at:at + 1] == "{" and name.lower() in WRAPPERS:
                return name, False
        try:
            key = KEY.match(text, JSON.raw_decode(text, at)[1])
        except (ValueError, RecursionError):
            break
    return None, False


WRAPPERS = ("database", "data", "annotations", "videos", "captions", "results")
KEY = re.compile(r'[\s,]*"((?:[^"\\]|\\.){0,2000}+)"\s*:\s*')
JSON = json.JSONDecoder(strict=False)    # accepts raw tabs and line ends in a string


def json_lines(file):
    """The objects of an open jsonl file; a string with raw line ends may span 100 lines."""
    pending, n_pending, wrong = "", 0, None
    for line in file:
        if pending and (line.lstrip()[:1] == "{" or n_pending == 100):
            yield wrong
            pending = ""
        if not pending and not line.strip():
            continue
        pending, n_pending = pending + line, n_pending + 1 if pending else 1
        try:
            yield JSON.decode(pending)
        except (ValueError, RecursionError) as error:
            wrong = ValueError(fault(error))
            if "Unterminated" in str(error):
                continue
            yield wrong
        pending = ""
    if pending:
        yield wrong


LONGEST = 1000          # lines that a record of a csv may span


def table_rows(file, is_tsv):
    """The rows of an open CSV or TSV. Quotation marks in a TSV are literal, unless all of them are
    placed as a csv writer does. In a CSV an unclosed mark costs its line; the lines after it are
    read separately. Marks inside a field may be doubled, or escaped with \\; blanks may precede a
    quoted field. Commas in a last column of text need no marks. Names of our columns may have
    blanks around them and capitals."""
    csv.field_size_limit(2**31 - 1)                    # Panda-70M's fields pass the default
    is_raw = is_tsv and not is_quoted(file)
    waiting, taken, head = deque([next(filter(str.strip, file), "")]), [], None
    if declared := re.match(r'"?sep=(.)"?\s*\Z', waiting[0]):       # Excel's
        waiting[0] = next(filter(str.strip, file), "")
    comma = declared[1] if declared else "\t" if is_tsv else max(",;\t", key=waiting[0].count)
    form = {"delimiter": comma, "quoting": csv.QUOTE_NONE if is_raw else csv.QUOTE_MINIMAL}
    usual, is_escaped = [] if is_raw else [' "', '\\"'], False

    def lines():
        for line in itertools.chain(iter(lambda: waiting.popleft() if waiting else "", ""), file):
            taken.append(ESCAPED.sub(r'\1""', line) if is_escaped else line)
            yield taken[-1]
            if len(taken) == LONGEST:
                return

    while True:
        for cells in csv.reader(lines(), **form):
            text = taken[0] if len(taken) == 1 else "".join(taken)
            if (' "' in text and any(map(BLANK, cells)) or '\\"' in text) and (mark := next((
                    one for one in usual if one in text and is_meant(
                        one, taken, form, len(head or cells))), None)):
                usual.remove(mark)                     # a rule of this writer from here on
                form["skipinitialspace"] = ' "' not in usual
                is_escaped = '\\"' not in usual
                waiting.extendleft(reversed(taken))
                taken.clear()
                break
            if len(taken) > 1 and hides_rows(taken, form, len(head or cells)):
                yield ValueError(f"a quotation mark that nothing closes; {len(taken) - 1} lines "
                                 "behind it are read on their own")
                waiting.extendleft(reversed(taken[1:]))
                taken.clear()
                break
            taken.clear()
            if not head:
                head = [name.strip() for name in cells]
                if bare(head[0]) == head[0].rsplit("/", 1)[-1] or len(head) > 2:
                    continue
                head = ["video", "caption"][:len(head)]        # the first row is not a header
            while len(cells) > len(head) and not cells[-1].strip():
                cells.pop()
            if len(cells) > len(head) and our_name(head[-1]) in (*TEXTS, "prompt"):
                cells[len(head) - 1:] = [comma.join(cells[len(head) - 1:])]
            if len(cells) == len(head):
                yield dict(zip(head, cells))
            elif cells:
                yield ValueError(f"{len(cells)} cells for {len(head)} columns: cut off, or a text "
                                 "with commas that stands in no quotation marks")
        else:
            return


BLANK = re.compile(r'\s+"').match
ESCAPED = re.compile(r'(?<!\\)((?:\\\\)*)\\"')
MARKED = re.compile(r'(?:(?:"(?:[^"]++|"")*+"|[^"\t\n]++)?(?:[\t\n]|\Z))*+')   # fields of a table
DOUBLED = re.compile(r'(?:^|\t)"(?:[^"\t]*+""|[^"\t\n]*+\n[^"\t]*+"(?:[\t\n]|\Z))', re.M)


def is_quoted(file):
    """Whether the first MiB of an open TSV is quoted like a csv: marks around complete fields only,
    with doubled marks or line ends inside, or around the header."""
    text = file.read(2**20).replace("\r\n", "\n")
    file.seek(0)
    left = text[MARKED.match(text).end():]             # at most a field cut at 1 MiB
    is_cut = len(text) > 2**19 and len(left) < 2**16
    return (is_cut or not left) and bool(
        DOUBLED.search(text) or re.match(r'\s*("[^"\t\n]*"(\t|\n|\Z))+', text))


def is_meant(mark, lines, form, n_columns):
    """Whether a record of a CSV shows that its writer puts blanks before marks (' "'), or escapes
    marks as \\": such rules give the right number of columns where the usual ones do not."""
    def count(lines, **more):
        try:
            return len(next(csv.reader(lines, **{**form, "strict": True, **more})))
        except csv.Error as error:                     # or the field continues in the next line
            return n_columns if more and "end of data" in str(error) else 0
    if mark == ' "':
        return count(lines, skipinitialspace=True) == n_columns
    return count(lines) != n_columns == count([ESCAPED.sub(r'\1""', line) for line in lines],
                                              doublequote=True)


def hides_rows(lines, form, n_columns):
    """Whether the lines of one record of a CSV are separate rows after an unclosed mark."""
    try:
        fields = next(csv.reader(lines, strict=True, **form))
        separate = [next(csv.reader([line], **form), []) for line in lines[1:]]
    except csv.Error:
        return True
    return len(lines) == LONGEST or len(fields) == n_columns and all(
        len(cells) == n_columns for cells in separate) and (
        all(line.count('"') % 2 == 0 for line in lines[1:])
        or all(bare(cells[0]) != cells[0].rsplit("/", 1)[-1] for cells in separate))


ITEM, MEMBER = re.compile(r'\{\s*"'), re.compile(r'"[^"\n]*"\s*:\s*["\[{]')


def json_items(file, key=None, is_object=False):
    """The items of the array (of the one named `key`) in an open JSON file, read in parts; for an
    object, pairs of names and values. Yields an exception for a damaged item and continues with
    what looks like the next one."""
    bracket, text = r"\{" if is_object else r"\[", file.read(2**20)
    start = re.compile(rf'"{re.escape(key)}"\s*:\s*{bracket}' if key else bracket)
    while not (match := start.search(text)):
        more = file.read(2**20)
        text = text[-100:] + more
        if not more:
            yield ValueError(f"no array{key and f' named {key}' or ''}")
            return
    at, is_end, wasted, decode = match.end(), False, 0, JSON.raw_decode
    between, last = re.compile(r"[\s,]*"), re.compile(
        r"\}\s*\}?\s*\Z" if is_object else r"\]\s*([},]\s*\Z|[},]\s*[\"}]|\Z)")
    following = MEMBER if is_object else ITEM

    def decode_member(text, at):
        if not (name := KEY.match(text, at)):
            is_cut = len(text) - at < 2**12 and '":' not in text[at:]
            raise json.JSONDecodeError("no name", text, len(text) if is_cut else at)
        value, at = JSON.raw_decode(text, name.end())
        return (json.loads(f'"{name[1]}"', strict=False), value), at
    decode = decode_member if is_object else decode
    while True:
        at = between.match(text, at).end()
        try:
            if text[at:at + 1] in ("]", "}") and last.match(text, at):
                return
            item, at = decode(text, at)
            yield item
            continue
        except (ValueError, RecursionError) as error:
            wrong = error
        if not is_end and len(text) - at < 2**24 and (
                at == len(text) or isinstance(wrong, json.JSONDecodeError) and (
                    wrong.pos > len(text) - 16 or "Unterminated" in wrong.msg)):     # read more
            more = file.read(max(2**20, len(text) - at))
            is_end, text, at = not more, text[at:] + more, 0
            continue
        yield ValueError(fault(wrong))
        is_deep = isinstance(wrong, RecursionError)    # by 1000 characters at least
        behind = max(at + 1, at + 1000 if is_deep else getattr(wrong, "pos", 0))
        wasted += behind - at
        at = at + 1 if wasted < 2**24 and not is_deep else behind
        if at > max(2**13, len(text) // 256):          # an error counts lines from the beginning
            text, at = text[at:], 0
        while not (match := following.search(text, at)):
            more = file.read(2**20)
            if not more:
                return
            text, at = text[max(at, len(text) - 100):] + more, 0
        at = match.start()


def meta_files(path, form):
    """The files of --meta: the file itself, those of a folder, or both lists of a UCF-101 fold."""
    if path.is_dir():
        return sorted(file for file in path.glob(FORMATS[form][0])
                      if file.is_file() and not file.name.startswith("."))
    return sorted(path.parent.glob(f"*list{path.stem[-2:]}.txt")) if form == "ucf101" else [path]


def bare(name):
    """A file's name without folders and without the suffixes of videos, stills and pickles."""
    name = name.rsplit("/", 1)[-1]
    while (dot := name.rfind(".")) > 0 and name[dot:].lower() in ENDINGS:
        name = name[:dot]
    return name


def split_of(name):
    """The split in a file's name, if its words name exactly one split, else None."""
    words = {SPLITS[word] for word in re.split(r"[\W\d_]|list", name.lower()) if word in SPLITS}
    return words.pop() if len(words) == 1 else None


# What matches a source, and what becomes of other inputs:
# a row's path        the file of the same name, else of the same stem (name without media
#                     suffixes), in any Unicode form, whose folders equal the row's from the last
#                     one up, as far as both have any (\ is /; absolute, relative, ./ and ../
#                     alike); the longest match wins, ties are rejected as ambiguous. Published ids
#                     need no folders
# NAME.txt .json .cls the file beside it, upper or lower case; a caption in .json takes precedence
# a folder            is the label of its files (--format folder), or their split: train, val, test;
#                     numbered ones (00000, shard-01) and folders in tars are neither
# a tar               each of its files, links included; of a damaged one those before the damage;
#                     compressed tars are rejected
# a picture           is a thumbnail, no clip, if a video of the same name is beside it
# a column            ours, or a common synonym (OWN, IDS, TEXTS, ALIASES), regardless of blanks,
#                     punctuation and case; a prompt alone is the caption, a pair (timestamp,
#                     segment, span) is start and end
# a caption           a text, a list, an object (its keys are the styles), nested ones, what an
#                     assistant says; not '', nan, null, none
# a text              UTF-8, or UTF-16 and UTF-32 by their mark; else cp1252 or cp1251 if recognised
#                     (LEGACY); \n and \r\n end lines
# a link to a folder  that folder, once; hidden files and folders are skipped
class SourceIndex:
    """Finds the source of a row's path, in any Unicode form. Candidates have the same file name, or
    else the same stem (name without media suffixes); their folders must equal the row's from the
    last one up, as far as both have any; the longest match wins. With `is_id`, names are unique:
    a single candidate matches in any folder."""

    def __init__(self, sources, is_id):
        self.is_id, self.by_path, self.by_tail = is_id, {}, {}
        for source in sources:
            last = folded(source.rsplit("/", 1)[-1])
            for key in {last, bare(last)}:
                one = self.by_path.setdefault(key, source)
                if one is not source:
                    if isinstance(one, str):
                        self.by_path[key] = one = [one]
                    one.append(source)

    def fitting(self, key, folders):
        """The sources of this name whose folders match best."""
        if isinstance(one := self.by_path[key], str):
            own = folders_of(one)
            return [one] if all(map(operator.eq, own[::-1], folders[::-1])) else []
        if key not in self.by_tail:                    # many of one name: index folders by tails
            tails, full = self.by_tail[key] = {}, {}
            for source in one:
                own = folders_of(source)
                full.setdefault(own, []).append(source)
                for k in range(len(own) + 1):
                    tails.setdefault(own[k:], []).append(source)
        tails, full = self.by_tail[key]
        paths = full.get(folders) or tails.get(folders)
        return paths or next((full[folders[k:]] for k in range(1, len(folders) + 1)
                              if folders[k:] in full), [])

    def find(self, name):
        """(source, "", None), or (None, reason, detail)."""
        if "\\" in name or name[:1].isspace() or name[-1:].isspace():
            name = name if name in self.by_path else name.strip().replace("\\", "/")
        last = folded(name[name.rfind("/") + 1:])
        one = self.by_path.get(last)
        if one == name or last == name and isinstance(one, str):         # the usual case
            return one, "", None
        keys = [key for key in {last: 0, bare(last): 0} if key in self.by_path]
        if not keys:
            return None, "missing video", None
        folders, others = folders_of(name), []
        for key in keys:
            paths = self.fitting(key, folders)
            if len(paths) > 1:                         # names that differ in Unicode form only
                paths = [one for form in FORMS_OF_NAMES for one in paths if form(one) == form(name)
                         ][:1] or paths
            if len(paths) == 1:
                return paths[0], "", None
            if paths:
                return None, "several videos of this name", "ambiguous: " + ", ".join(paths[:4])
            one = self.by_path[key]
            others += [one] if isinstance(one, str) else one
        others = list(dict.fromkeys(others))
        if len(others) > 1:
            return None, "several videos of this name", "none in its folders, but " + ", ".join(
                others[:4])
        return (others[0], "", None) if others and self.is_id else (
            None, "missing video", f"{others[0]} is in another folder" if others else None)


def folded(name):
    return name if name.isascii() else unicodedata.normalize("NFKC", name)


def folders_of(path):
    """The folders of a path, a tuple, without '', '.' and '..'."""
    *folders, _ = path.split("/")
    if "./" in path:
        folders = os.path.normpath("/".join(folders)).replace(os.sep, "/").split("/")
    return tuple(folded(one) for one in folders if one not in ("", ".", ".."))


ROW_REASONS = ("caption behind the end", "caption of no clip", "missing video", "several videos of "
               "this name", "malformed metadata row", "malformed text beside it")
BAD_ROW = (ValueError, TypeError, AttributeError, LookupError, SyntaxError, RecursionError,
           OverflowError)                              # what readers raise


def read_metadata(paths, form, sources, database):
    """Writes the metadata to an SQLite file, so that memory does not hold it: each row as JSON,
    with its number, its source and its file's split; a damaged row, or one whose video is missing,
    without a source, with the reason and the name of its video."""
    with atomic(database) as part, contextlib.closing(sqlite3.connect(part)) as store:
        store.executescript("pragma journal_mode=off; pragma synchronous=off; "
                            "create table rows(source, number, note, detail, row)")
        store.executemany("insert into rows values(?, ?, ?, ?, ?)",
                          placed_rows(paths, form, sources))
        store.execute("create index by_source on rows(source)")
        store.commit()
        n, = store.execute("select count(distinct source) from rows").fetchone()
    if n < len(sources) / 10:
        print(f"warning: {paths[0]} names {n} of {len(sources)} files", file=sys.stderr)


def placed_rows(paths, form, sources):
    """Yields what `read_metadata` stores."""
    _, rows, names, reader = FORMATS[form]
    index, n, is_right, columns_found = SourceIndex(sources, names is not OWN), 0, False, ()
    find = functools.lru_cache(2**16)(index.find)
    missing, is_placed, used_columns = None, not sources, {True} if rows or reader else set()
    first, bad, n_bytes = "", None, 0  # first fault of a row; rows with invalid bytes
    for path in paths:
        split = split_of(path.stem)
        for n, row in enumerate((rows or file_rows)(path), n + 1):
            try:
                if isinstance(row, Exception):
                    raise row
                if not isinstance(row, dict):
                    raise ValueError(f"a row is a {type(row).__name__}, no object of named values")
                columns_found = columns_found or tuple(filter(None, row))
                name, *others = named(row, names) or [row[names[0]]]
                source, reason, detail = find(str(name))
                if source is None:
                    for other in others:               # the first one is an id, a NaN
                        if source is None and (one := find(str(other)))[0]:
                            (source, reason, detail), name = one, other
                    first = first or source is None and f"row {n}: {name}: {detail or reason}"
                text = json.dumps(row)
                if byte := re.search(r"\\udc([89a-f].)", text):
                    bad, n_bytes = bad or (n, int(byte[1], 16)), n_bytes + 1
                is_right = is_right or not reader                # any values are valid
                is_placed, missing = is_placed or reason != "missing video", missing or name
                if not is_right or source is not None and True not in used_columns:
                    facts = read_row(row, reader, None)
                    is_right = is_right or bool(facts)
                    used_columns |= columns_used(row, facts) if source is not None else set()
            except BAD_ROW as error:
                why = "cut off, or not of its format" if row is None else printable(fault(error))
                first = first or f"row {n}: {why}"
                yield None, n, "malformed metadata row", why, None
            else:
                yield (None, n, reason, detail and printable(detail), printable(name)) \
                    if source is None else (stored(source), n, split, None, text)
    if not n:
        refuse(f"{paths[0]} holds no rows")
    if not is_right:
        has_name = {*names, *IDS} & {*columns_found, *map(our_name, columns_found)}
        refuse(f"no row of {paths[0]} reads as --format {form}: " + (
            first if first and (has_name or not columns_found) else "its columns are "
            f"{', '.join(columns_found)}; one of {', '.join(names[:6])} must name the video"))
    if not is_placed:
        refuse(f"no row of {paths[0]} names a file under --videos: it names {missing}, there is "
               f"{sources[0]}")
    if sources and not used_columns and first:
        refuse(f"no row of {paths[0]} is of use: {first}")
    if n_bytes:
        print(f"warning: {n_bytes} rows of {paths[0]} are not in UTF-8, the first is row {bad[0]}: "
              f"{not_utf8(bad[1])}", file=sys.stderr)
    if sources and True not in used_columns:
        refuse_silent(paths[0], used_columns)


def columns_used(row, facts):
    """{True} for a row with a caption, else its columns with a value that is not a number."""
    return {True} if any(fact["captions"] for fact in facts) else {
        name for name, value in ours(row).items() if our_name(name) not in (*OWN, *IDS)
        and value is not None and (name in OURS or number_of(value) is None and value != "")}


def refuse_silent(path, used_columns):
    """Refuses metadata with text columns but no caption; warns of other metadata without one."""
    others = {name: nearest(name, OURS) for name in sorted(used_columns - OURS)}
    if used_columns & {*TEXTS} or {*TEXTS} & {*others.values()} or others and not (
            used_columns & OURS):
        refuse(f"{path} captions nothing: no row has a text in a column named caption or text"
               + "".join(f"; {name}: did you mean {close}?" if close else f"; {name}: not known"
                         for name, close in others.items()))
    print(f"warning: no row of {path} has a caption", file=sys.stderr)


def stored(source):
    """A source as stored in SQLite: bytes, as a file name may not be valid text."""
    return source if source.isascii() else os.fsencode(source)


def query(database, source, names="number, note, row"):
    """Yields `names` of the stored rows of a source; for None, of the rejects."""
    address = f"{Path(database).absolute().as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as store:
        yield from store.execute(f"select {names} from rows where source is ? order by rowid",
                                 [source and stored(source)])


def facts_of(database, form, source):
    """(facts, rejects) from the stored rows of a source."""
    facts, rejects = [], []
    for n, split, row in query(database, source):
        try:
            facts += read_row(json.loads(row), FORMATS[form][3], split)
        except BAD_ROW as error:
            rejects.append(rejection(None, "malformed metadata row", figure=n,
                                     detail=printable(fault(error))))
    return facts, rejects


def fault(error):
    """The message of an exception of BAD_ROW."""
    return f"no column {error}" if isinstance(error, KeyError) else \
        "cut off, or not of its format" if isinstance(error, json.JSONDecodeError) else \
        "lists of unequal lengths" if str(error).startswith("zip()") else \
        " ".join(str(error).split())[:300]


def read_row(row, reader, split):
    """The facts in a row as published; raises one of BAD_ROW."""
    return [read_fact(one, split) for fields in (reader(row) if reader else [ours(row)])
            for one in timed(fields)]


def timed(row):
    """The rows in a row whose caption is a list of objects with their own times, or that has a list
    of times."""
    name = next((name for name in TEXTS if isinstance(row.get(name), list)), None)
    for spans in (row[one] for one in SPANS if name and isinstance(row.get(one), list)):
        if spans and all(map(is_span, spans)):         # as many texts as spans: ActivityNet's
            return [{**row, "start": start, "end": end, name: text}
                    for (start, end), text in zip(spans, row[name], strict=True)]
    if name is None or not any(isinstance(one, dict) and {"start", "end"} <= {*ours(one)}
                               for one in row[name]):
        return [row]
    times, result = ("start", "end", *SPANS), []
    for one in row[name]:
        own = ours(one) if isinstance(one, dict) else {}
        result.append({**row, **{key: own[key] for key in times if key in own}, name: {
            key: one[key] for key in one if our_name(key) not in times} if own else one})
    return result


@functools.lru_cache(2**12)
def our_name(name):
    """Our name of a column, compared in lower case without blanks and punctuation."""
    plain = re.sub(r"[\W_]+", "", name).lower()
    return ALIASES.get(plain, plain if plain in OURS else name.strip())


def ours(row):
    """A row with our names; exact names take precedence. A pair of times is start and end; a prompt
    without any text is the caption."""
    row = {our_name(name): value for name, value in row.items()} | row
    for name in ("start", "end"):
        if (ms := number_of(row.pop(f"{name}ms", None))) is not None:
            row.setdefault(name, ms / 1000)
    for name in SPANS:
        if name[-1] != "s" and is_span(row.get(name)) and "start" not in row:
            row["start"], row["end"] = row.pop(name)
    return {**row, "caption": row["prompt"], "prompt": None} \
        if row.get("prompt") and not any(name in row for name in TEXTS) else row


def is_span(value):
    return isinstance(value, list) and len(value) == 2 and all(
        isinstance(one, (int, float, str)) for one in value)


def named(row, names):
    """The values of the columns that may name a row's file, the best first."""
    if result := [row[name] for name in names if row.get(name)]:
        return result
    row = ours(row)
    return [row[name] for name in names if row.get(name)] or [
        row[name] for name in IDS if row.get(name) and names is OWN]


def plain(text):
    """A stripped text. Raises ValueError if it contains invalid characters."""
    text = text.strip()
    if not text.isascii() and (wrong := re.search("[\ud800-\udfff]", text)):
        byte = ord(wrong[0]) - 0xdc00
        raise ValueError(f"no text: {not_utf8(byte)}" if 0x80 <= byte < 0x100 else
                         f"no text: half a character, {ascii(wrong[0])}")
    return text


def texts_in(value, style=None):
    """[(text, its style)] of a caption of any shape: a text, a list, an object, or one of these in
    JSON or as a Python literal. An object's keys are the styles (nested ones joined by dots),
    unless one of them names the text; the others are then about it (model, language). Of a
    conversation only the assistant's texts count."""
    if isinstance(value, str):
        text, inner = plain(value), None
        for read in (json.loads, literal) if text[:1] in ("[", "{", "(") else ():
            with contextlib.suppress(ValueError, RecursionError):    # otherwise a plain text
                inner = read(text)
                break
        quoted = QUOTES.findall(text) if isinstance(inner, list) else ()
        if len(quoted) > len(inner or ()) and all(isinstance(one, str) for one in inner):
            inner = list(map(literal, quoted))                   # numpy's: no commas
        if isinstance(inner, (list, tuple, set, dict)):
            return texts_in(sorted(inner, key=str) if isinstance(inner, set) else inner, style)
        return [(text, style)] if text.lower() not in NO_TEXTS else []
    if isinstance(value, dict):
        speaker = next((value[key] for key in ("from", "role") if isinstance(value.get(key), str)
                        and ("value" in value or "content" in value)), None)
        if speaker:
            return [] if speaker.strip().lower() in ASKING else texts_in(
                value.get("value", value.get("content")), style)
        words = {key: {*re.split(r"[\W_]+", key.lower())} for key in value}
        keys = [key for key in value if isinstance(value[key], (str, list, dict))
                and not words[key] & ABOUT]
        if any(key.lower() in IN_OBJECTS for key in keys):
            keys = [key for key in keys if words[key] & IN_OBJECTS]
        return [pair for key in keys
                for pair in texts_in(value[key], f"{style}.{key}" if style else key)]
    if value is None or value != value:                # NaN
        return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"a caption is no text: {value!r}")
    return [pair for one in value for pair in texts_in(one, style)]


def frames_in(value):
    """{"frames": (first, last)} of a pair of numbers, or of its text. Other lists (names of
    pictures, sampled frames) give {}."""
    if isinstance(value, str) and (pair := re.fullmatch(r"[\[(]\s*(\d+),\s*(\d+)\s*[\])]",
                                                        value.strip())):
        value = [int(pair[1]), int(pair[2])]
    if not isinstance(value, list) or len(value) != 2 or not any(
            isinstance(one, (int, float)) for one in value):
        return {}
    if not all(isinstance(one, (int, float)) and one == one // 1 for one in value) or \
            not 0 <= value[0] <= value[1]:
        raise ValueError(f"frames {value!r}: not the numbers of the first and the last one")
    return {"frames": [int(min(one, 2**62)) for one in value]}


def read_fact(row, split=None):
    """The metadata in a row ("a fact"): start, end (s, None: the whole file), captions (list of
    str), split and label (or None), scores. Raises one of BAD_ROW."""
    start, end = seconds(row.get("start")), seconds(row.get("end"))
    texts = next(filter(None, (texts_in(row[name]) for name in TEXTS if name in row)), [])
    named, label = plain(str(row.get("split") or "")).lower(), row.get("label")
    named = "" if named in NO_TEXTS else named
    if (start is None) != (end is None) or start is not None and not 0 <= start < end:
        raise ValueError(f"start {row.get('start')!r}, end {row.get('end')!r}: not 0 <= start < "
                         "end")
    if named and named not in SPLITS:
        raise ValueError(f"split {named!r} is none of {', '.join(SPLITS)}")
    label = int(label) if isinstance(label, float) and label.is_integer() else label   # 1.0 is 1
    label = None if str(label).strip().lower() in NO_TEXTS else plain(str(label))
    fact = {"start": start, "end": end, "captions": [text for text, _ in texts],
            "split": SPLITS.get(named, split), "label": label or None}
    fact |= frames_in(row.get("frames"))
    fact |= {"styles": [style for _, style in texts]} if any(style for _, style in texts) else {}
    prompt = plain(str(row.get("prompt") or ""))
    fact |= {"prompt": prompt} if prompt.lower() not in NO_TEXTS else {}
    scores = {key: value for key in row if key not in OURS and our_name(key) not in OURS
              and (value := number_of(row[key])) is not None}
    return fact | {"scores": scores} if scores else fact


ALIASES = {f"{one}{unit}": our for one, our in {"start": "start", "begin": "start", "end": "end",
           "stop": "end"}.items() for unit in ("time", "timestamp", "sec", "seconds")} | {
    "timestart": "start", "timeend": "end", "begin": "start", "stop": "end"}
SPANS = ("timestamps", "timestamp", "segments", "segment", "span", "interval")      # [start, end]
TEXTS = ("caption captions text cap description descriptions sentence sentences longcaption "
         "densecaption detailedcaption shortcaption briefcaption videocaption imagecaption "
         "recaption gptcaption generatedcaption longdescription shortdescription encap "
         "goldencaption conversations messages annotations").split()
IN_OBJECTS = {"caption", "captions", "text", "conversations", "messages"}
ASKING = {"human", "user", "system", "tool", "function"}       # speakers of no captions
ABOUT = set("model lang language id source author license url type version".split())
NO_TEXTS = ("", "nan", "null", "none", "n/a", "#n/a", "<na>", "-")     # as programs write no text
OURS = {*OWN, *IDS, *TEXTS, *SPANS, "start", "end", "startms", "endms", "frames", "prompt", "split",
        "label"}
QUOTES = re.compile(r"'(?:[^'\\]|\\.)*'" r'|"(?:[^"\\]|\\.)*"')


def number_of(value):
    """A finite number, or a text that is one; else None."""
    try:
        return value if math.isfinite(value := float(value)) else None
    except (ValueError, TypeError, OverflowError):
        return None


def seconds(value):
    """Seconds of a number or of a text such as '12.5' or '1:02:03.250'; None of nothing."""
    if value is None or str(value).strip().lower() in NO_TEXTS:
        return None
    total, parts = 0.0, str(value).split(":")
    if len(parts) > 3:
        raise ValueError(f"time {value}: hours, minutes and seconds at most, and no frames")
    for part in parts:
        total = 60 * total + float(part)
    if not math.isfinite(total):
        raise ValueError(f"{value} is no time")
    return total


def beside(source, texts, is_caption_alone=False):
    """(facts, rejects) without --meta: `texts` {suffix: bytes} are the files NAME.txt (caption) and
    NAME.json (our keys) beside the source; its folder is its label, and may name its split. Without
    a --format only the caption is used. A damaged file becomes a reject; the others still count."""
    rejects, result, encoding = [], {".txt": "", ".json": "{}"}, {}

    def lost(suffix, error):
        rejects.append(rejection(source, "malformed text beside it", detail=printable(
            f"{Path(source).stem}{suffix}: {fault(error)}")))

    for suffix, data in texts.items():
        try:
            text, page = decoded(data)
            result[suffix] = plain(" ".join(text.split())) if suffix != ".json" else text
            encoding |= {"encoding": page} if page else {}
        except ValueError as error:
            lost(suffix, error)
    caption = {"caption": result[".txt"]}
    if is_caption_alone:
        return [read_fact(caption) | encoding], [
            one for one in rejects if ".txt: " in one["detail"]]
    *folders, _ = source.split("/")
    n = next((n for n, name in enumerate(folders) if is_archive(name)), len(folders))
    split = next((split_of(name) for name in folders if name.lower() in SPLITS
                  or NUMBERED.fullmatch(name.lower()) and split_of(name)), None) or split_of(
                      "".join(folders[n:n + 1]))
    classes = [result[".cls"]] if ".cls" in result else [
        printable(name) for name in folders[:n] if name.lower() not in SPLITS
        and not NUMBERED.fullmatch(name.lower())]      # folders in a tar are part of the key
    fact = read_fact({"label": classes[-1] if classes else None, **caption}, split) | encoding
    try:
        more = JSON.decode(result[".json"])
        more = {key: value for key, value in ours(
            more if isinstance(more, dict) else {"caption": more}).items()
                if value is not None and (key != "split" or str(value).lower() in SPLITS)}
        facts = [read_fact({"label": fact["label"], **one}, split) | encoding
                 for one in timed(more)]
        merged = {**fact, "captions": []} if any(one["captions"] for one in facts) else fact
        if any(one["start"] is not None or "frames" in one for one in facts):
            return [*facts, merged], rejects            # `merged` applies outside those times
        return [{**facts[0], "captions": facts[0]["captions"] or fact["captions"]}], rejects
    except BAD_ROW as error:
        lost(".json", error)
        return [fact], rejects


NUMBERED = re.compile(rf"\d{{5,}}([-_]\d+)*|(shard|part|chunk|batch|{'|'.join(SPLITS)})[-_. ]*\d+")


def drawn_split(source):
    """The split of a file without one in its metadata, from a hash of its name: 1 in 20 'val'."""
    draw = int(hashlib.sha256(os.fsencode(source)).hexdigest()[8:16], 16) % 20
    return "train" if draw else "val"


def clip_metadata(source, facts, start, end):
    """({split, label, captions}, scores) of the clip start..end (s) of a source, from the facts
    that cover at least half of the clip, or the whole file."""
    mine = [f for f in facts if f["start"] is None or holds(f, start, end)]
    splits = [f["split"] for f in [*mine, *facts] if f["split"]]
    labels = [f["label"] for f in mine if f["label"] is not None]
    return {"split": (splits or [drawn_split(source)])[0], "label": (labels or [None])[0],
            "captions": [{"text": text, "source": "meta", "weight": 1.0,
                          **{key: f[key] for key in ("prompt", "encoding") if key in f},
                          **({"style": style} if style else {})}
                         for f in mine for text, style in itertools.zip_longest(
                             f["captions"], f.get("styles", ()))]}, \
        {name: value for f in mine for name, value in f.get("scores", {}).items()}


def holds(fact, start, end):
    """Whether at least half of start..end lies within a fact's times."""
    return min(end, fact["end"]) - max(start, fact["start"]) >= (end - start) / 2 - 1e-6


def unused(source, facts, clips, stop):
    """The rejects of captions whose times match no clip (row, ...) of a file, `stop` s long."""
    spans = [(row["start"], row["end"]) for row, *_ in clips]
    for fact in facts:
        start, end = fact["start"], fact["end"]
        if fact["captions"] and start is not None and not any(holds(fact, *one) for one in spans):
            times = (None, None) if start == math.inf else (start, end)
            yield rejection(
                source, "caption behind the end" if start >= stop else "caption of no clip", *times,
                figure=round(stop, 3), detail=("" if times[1] else f"frames {fact['frames']}: ")
                + printable(fact["captions"][0])[:100])


def place_frames(facts, scan, fps):
    """Sets the times of facts that have frame numbers (first, last)."""
    for fact in facts:
        if "frames" in fact:
            a, b = (min(n, len(scan.times) - 1) for n in fact["frames"])
            fact |= {"start": float(scan.times[a]), "end": scan.end(b + 1, fps)} \
                if a == fact["frames"][0] else {"start": math.inf, "end": math.inf}


def changed_metadata(args, folder, plan, number, database=None):
    """(rows, rejects, whether the rows differ from metadata.jsonl) of a shard: {key, split, label,
    captions, scores} of the clips whose metadata changed after the shard was made, and the new
    rejects. Files that are gone keep their last metadata. Captions that fail a filter are left
    out."""
    name, options, root = f"shard-{number:05d}", plan["options"], Path(args.videos)
    path, shard, rows = folder / f"{name}.metadata.jsonl", {}, []
    was = {row["key"]: row for row in read_rows(path)} if path.exists() else {}
    lost = [one for one in read_rows(folder / f"{name}.rejected.jsonl")
            if one["reason"] not in ROW_REASONS or not database
            and one["source"] not in args.present]
    for row in read_rows(folder / f"{name}.jsonl"):
        shard.setdefault(row["source"], []).append(row)
    for source, _ in plan["sources"][slice(*plan["shards"][number])]:
        mine = shard.get(source, [])
        if not database and (source not in args.present or options["format"] == "bair"):
            rows += [was[row["key"]] for row in mine if row["key"] in was]
            continue
        facts, wrong = facts_of(database, options["format"], source) if database else ([], [])
        if not facts and (not database or source in args.present):
            facts, more = beside(source, located(root, source)[1],
                                 database or options["format"] is None)
            wrong += more
        if mine and mine[0]["fps"] and any("frames" in fact for fact in facts):
            scan = Scan(Video(located(root, source)[0]))
            place_frames(facts, scan, scan.rate()[0])
        lost += [*wrong, *unused(source, facts, [(row,) for row in mine], math.inf)]
        for row in mine:
            new, more = clip_metadata(source, facts, row["start"], row["end"])
            new["captions"] = [one for one in new["captions"]
                               if not caption_fault(one["text"], options)]
            new["scores"] = {**more, **{one: value for one, value in row["scores"].items()
                                        if one in SCORES or one == "bad_packets"}}
            rows += [{"key": row["key"], **new}] if {**row, **new} != row else []
    return rows, lost, rows != list(was.values())


def warn(folder, options, counts, rows=()):
    """Warns of metadata with few captions, of texts in other encodings, and of errors of this
    program; sorts their log and removes repeats, which a shard that ran twice leaves."""
    n, n_captioned = sum(counts["rejected"][reason] for reason in counts["rejected"]
                         if reason.startswith(FAULT)), counts["captioned_clips"]
    if options["meta"] and n_captioned < counts["clips"] / 10 and options["format"] not in (
            "txt", "ucf101"):
        print(f"warning: --meta captions {n_captioned} of {counts['clips']} clips", file=sys.stderr)
    if texts := Counter(one["encoding"] for row in rows for one in row["captions"]
                        if "encoding" in one):
        print("warning: " + ", ".join(f"{count} captions are read as {page}" for page, count in
                                      sorted(texts.items())) + ", as they are not in UTF-8",
              file=sys.stderr)
    if bad := counts["rejected"].get("malformed text beside it"):
        print(f"warning: {bad} texts beside files cannot be read: {folder / 'rejected.jsonl'} says "
              "why; once they are mended, the same command takes them in", file=sys.stderr)
    if n and (log := folder / "faults.log").is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        write_text(log, "".join(sorted(dict.fromkeys(re.split(r'(?<=\n\n)(?=")', text)))))
        print(f"warning: {n} files ended in faults of this program: {log} has them",
              file=sys.stderr)


def passed_over(others, words="others passed over"):
    """A message: how many files `find_sources` skipped, and of which kinds."""
    kinds = sorted(((n, kind, name) for kind, (n, name) in others.items()
                    if kind not in (*BESIDE_FILES, "hidden")), reverse=True)
    n_beside = sum(others[kind][0] for kind in BESIDE_FILES if kind in others)
    n_others = sum(n for n, _ in others.values()) - n_beside
    return f"{n_others} {words}" + ": " * bool(kinds) + ", ".join(
        f"{n} {kind} ({printable(name)})" for n, kind, name in kinds[:4]) + (
            "; --format webdataset reads tars, bair .tfrecords" if "tar" in others else "") + (
            f"; {n_beside} .txt, .json, .cls: NAME.txt is the caption of the file beside it, "
            "--format folder reads NAME.json and NAME.cls" if n_beside else "")


FAULT = "fault: "       # prefix of the reject reason after an error of this program


def rejection(source, reason, start=None, end=None, figure=None, threshold=None, detail=None):
    return {"source": source, "shot_start": start, "shot_end": end, "reason": reason,
            "figure": figure, "threshold": threshold, **({"detail": detail} if detail else {})}


if __name__ == "__main__":
    script(main)
