"""What `python prepare_data.py bench --videos DIR` runs: frames a second of each stage of the first
pass beside a bare decode of the same files, in one process; of three rounds the best of each.

    python prepare_data.py bench --videos DIR [--meta expected.jsonl]

With a list of cuts (JSON lines: file, cuts, gradual; frame numbers) it prints how many of the hard
cuts are found, two frames either way, and of the dissolves and fades, with the processors' time,
beside PySceneDetect's detectors and ffmpeg's where `scenedetect` and `imageio_ffmpeg` can be
imported.
"""
import contextlib
import math
import os
import re
import subprocess
import time
from pathlib import Path

import av
import numpy as np
import prepare_data as pd


def decode(path):
    with pd.opened(path) as (container, stream):
        with contextlib.suppress(av.FFmpegError):      # damaged from here on
            for packet in pd.demuxed(container, stream):
                packet.decode()


def stages(root, args):
    """{name: function of a path}."""
    return {"decode": decode, "decode, cuts": lambda path: cuts_alone(path, args),
            "decode, cuts, fades, scores, hashes": lambda path: pd.plan_clips(
                pd.Scan(pd.Video(path)), path.name, [], vars(args)),
            "the same, clips encoded": lambda path: list(pd.clips_of(
                root, path.relative_to(root).as_posix(), [], vars(args)))}


def speed(paths, works):
    frames, spent, good = 0, dict.fromkeys(works, math.inf), []
    for path in paths:                                 # a file that is refused costs no decoding
        with contextlib.suppress(av.FFmpegError, pd.Unreadable):
            n_frames = sum(1 for _ in pd.Video(path))
            frames, good = frames + n_frames, good + [path] * bool(n_frames)
    for n in range(3):
        for name, work in list(works.items())[:None if n == 0 else -1]:      # encodes once
            began = time.process_time()
            for path in good:
                work(path)
            spent[name] = min(spent[name], time.process_time() - began)
    print(f"{len(good)} of {len(paths)} files, {frames} frames")
    for name, seconds in spent.items():
        print(f"{name:40}{frames / seconds:9.0f} frames/s   {spent['decode'] / seconds:5.2f} of "
              "decoding")


# -- cuts, beside others ---------------------------------------------------------------------------

def ours(path, args):
    """(cuts, fades and dissolves, the video's Scan)."""
    scan = pd.Scan(pd.Video(path))
    cuts = pd.find_cuts(scan, args.cut_ratio, args.min_shot)
    return cuts, pd.find_gradual(scan, scan.rate()[0], cuts), scan


def cuts_alone(path, args):
    """(cuts, Scan) without closer looks at any frame but the first."""
    scan = pd.Scan(pd.Video(path), math.inf)
    return pd.find_cuts(scan, args.cut_ratio, args.min_shot), scan


def boundaries(path, args):
    cuts, spans, scan = ours(path, args)
    return cuts + [(a + b) // 2 for a, b in spans if a > 1 and b < len(scan.times) - 1]


def by_scenedetect(detector):
    import scenedetect

    def work(path):
        scenes = scenedetect.detect(str(path), detector())
        return [scene[0].frame_num for scene in scenes[1:]]
    return work


def by_ffmpeg(path):
    import imageio_ffmpeg
    done = subprocess.run([
        imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-threads", "1", "-i", str(path), "-vf",
        "select='gt(scene,0.3)',showinfo", "-fps_mode", "passthrough", "-f", "null", "-"],
        capture_output=True, text=True, errors="replace")
    times = [float(at) for at in re.findall(r"pts_time:\s*([\d.]+)", done.stderr)]
    video = pd.Video(path)
    stamps = np.array([float(frame.pts or 0) for frame in video]) * video.tick
    return [int(np.abs(stamps - at).argmin()) for at in times if at > stamps[0]]


def judge(result, truth, gradual):
    """(right, wrong, missed) of hard cuts, (found, listed) of dissolves, the same of fades; none of
    those that begin the file. What is found inside one counts as neither right nor wrong."""
    left, right, wrong = list(truth), 0, 0
    for frame in result:
        near = [cut for cut in left if abs(cut - frame) <= 2]
        if near:
            left.remove(min(near, key=lambda cut: abs(cut - frame)))
            right += 1
        else:
            wrong += not any(a - 2 <= frame <= b + 2 for _, a, b in gradual)
    counts = [right, wrong, len(left)]
    for is_dissolve in (True, False):
        spans = [(a, b) for kind, a, b in gradual if a and (kind == "dissolve") == is_dissolve]
        counts += [sum(any(a - 2 <= frame <= b + 2 for frame in result) for a, b in spans),
                   len(spans)]
    return counts


def table(root, path, args):
    rows = [row for row in pd.read_rows(path) if row.get("cuts") is not None]
    rows = [row for row in rows if (root / row["file"]).is_file()]
    detectors = {"ours, scores and all": lambda path: boundaries(path, args),
                 "ours, cuts alone": lambda path: cuts_alone(path, args)[0]}
    with contextlib.suppress(ImportError):
        import scenedetect
        detectors |= {name: by_scenedetect(getattr(scenedetect, name)) for name in (
            "ContentDetector", "AdaptiveDetector", "ThresholdDetector", "HashDetector",
            "HistogramDetector")}
    with contextlib.suppress(ImportError):
        __import__("imageio_ffmpeg")
        detectors["ffmpeg scene 0.3"] = by_ffmpeg
    print(f"{len(rows)} files, {sum(len(row['cuts']) for row in rows)} cuts\n{'':20}  right  wrong "
          "missed     F1  dissolves  fades   CPU s")
    for name, work in detectors.items():
        began = cpu_time()
        counts = np.sum([judge(work(root / row["file"]), row["cuts"], row.get("gradual") or [])
                         for row in rows], axis=0)
        right, wrong, missed, dissolves, of_dissolves, fades, of_fades = counts.tolist()
        f1 = 2 * right / max(1, 2 * right + wrong + missed)
        print(f"{name:20} {right:6} {wrong:6} {missed:6} {f1:6.3f} {dissolves:4} of "
              f"{of_dissolves:2} {fades:3} of {of_fades:2} {cpu_time() - began:6.1f}")


def cpu_time():
    """s of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def bench(args):
    root = Path(args.videos)
    paths = [root / name for name, _ in pd.find_sources(root, root / ".none", None)[0]
             if Path(name).suffix.lower() not in pd.STILLS]
    if not paths:
        pd.refuse(f"no videos under {root}")
    speed(paths, stages(root, args))
    if args.meta:
        table(root, args.meta, args)
