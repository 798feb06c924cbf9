"""What `python prepare_data.py bench --videos DIR` runs: frames a second of each stage of the first
pass beside a bare decode of the same files, in one process; of three rounds the best of each.

    python prepare_data.py bench --videos DIR [--meta expected.jsonl]

With a list of cuts (JSON lines: file, cuts, gradual; frame numbers) it prints precision and recall
of hard cuts, two frames either way, beside PySceneDetect's detectors and ffmpeg's where
`scenedetect` and `imageio_ffmpeg` can be imported; what is
detected inside a listed fade or dissolve counts neither way.
"""
import contextlib
import math
import re
import subprocess
import time
from pathlib import Path

import av
import numpy as np
import prepare_data as pd


def decode(path):
    with av.open(str(path)) as container:
        stream = pd.main_stream(container)
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        return sum(1 for _ in container.decode(stream))


def stages(root, args):
    """{name: function from a path to a number of frames}."""
    def cuts(path):
        scan = pd.Scan(pd.Video(path), "cuts")
        pd.find_cuts(scan, args.cut_ratio, args.min_shot)
        return len(scan.times)

    def everything(path):
        scan = pd.Scan(pd.Video(path))
        pd.plan_clips(scan, path.name, [], vars(args))
        return len(scan.times)

    def encoding(path):
        list(pd.clips_of(root, path.relative_to(root).as_posix(), [], vars(args)))
        return 0

    return {"decode": decode, "decode, cuts": cuts,
            "decode, cuts, fades, scores, hashes": everything,
            "the same, clips encoded": encoding}


def speed(paths, works):
    frames, best = {}, {}
    for _ in range(3):
        for name, work in works.items():
            began, found = time.process_time(), 0
            for path in paths:
                with contextlib.suppress(av.FFmpegError, pd.Unreadable):
                    found += work(path)
            best[name] = min(best.get(name, math.inf), time.process_time() - began)
            frames[name] = found
    n = frames["decode"]
    for name, spent in best.items():
        print(f"{name:40}{n / spent:9.0f} frames/s   {best['decode'] / spent:5.2f} of decoding")


# -- cuts, beside others ---------------------------------------------------------------------------

def ours(path, args):
    scan = pd.Scan(pd.Video(path))
    cuts = pd.find_cuts(scan, args.cut_ratio, args.min_shot)
    return cuts, pd.find_gradual(scan, scan.rate()[0], cuts), scan.times


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


def judge(found, truth, gradual):
    """(right, wrong, missed)."""
    left, right, wrong = list(truth), 0, 0
    for frame in found:
        near = [cut for cut in left if abs(cut - frame) <= 2]
        if near:
            left.remove(min(near, key=lambda cut: abs(cut - frame)))
            right += 1
        else:
            wrong += not any(a - 2 <= frame <= b + 2 for _, a, b in gradual)
    return right, wrong, len(left)


def table(root, path, args):
    rows = [row for row in pd.read_rows(path) if row.get("cuts") is not None]
    rows = [row for row in rows if (root / row["file"]).is_file()]
    detectors = {"ours": lambda path: ours(path, args)[0]}
    with contextlib.suppress(ImportError):
        from scenedetect import AdaptiveDetector, ContentDetector, HashDetector, HistogramDetector
        detectors |= {kind.__name__: by_scenedetect(kind) for kind in (
            ContentDetector, AdaptiveDetector, HashDetector, HistogramDetector)}
    with contextlib.suppress(ImportError):
        import imageio_ffmpeg  # noqa: F401
        detectors["ffmpeg scene 0.3"] = by_ffmpeg
    print(f"{len(rows)} files, {sum(len(row['cuts']) for row in rows)} cuts")
    for name, work in detectors.items():
        began = time.process_time()
        counts = np.sum([judge(work(root / row["file"]), row["cuts"], row.get("gradual") or [])
                         for row in rows], axis=0)
        right, wrong, missed = counts.tolist()
        print(f"{name:20} right {right:3} wrong {wrong:3} missed {missed:3}  F1 "
              f"{2 * right / (2 * right + wrong + missed):.3f} {time.process_time() - began:7.1f} s")
    hits = total = extra = 0
    for row in rows:
        listed = [[a, b] for kind, a, b in row.get("gradual") or []]
        spans = ours(root / row["file"], args)[1]
        total += len(listed)
        hits += sum(any(a < stop and first < b for first, stop in spans) for a, b in listed)
        extra += sum(not any(a < stop and first < b for a, b in listed) for first, stop in spans)
    print(f"fades and dissolves: {hits} of {total} found, {extra} that are none")


def bench(args):
    root = Path(args.videos)
    paths = [root / name for name, _ in pd.find_sources(root, root / ".none", None)[0]
             if Path(name).suffix.lower() not in pd.STILLS]
    if not paths:
        pd.refuse(f"no videos under {root}")
    speed(paths, stages(root, args))
    if args.meta:
        table(root, args.meta, args)
