"""prepare_data.py on natural motion made here (textures that move) and on ../shared/data where that
lies beside the checkout: shots, scores, near-duplicates, copies, hangs, the report, where()."""
import gc
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import prepare_data as pd  # noqa: E402
from test_prepare_data import (  # noqa: E402
    GREEN, RED, bytes_of, encode, row_lines, run)

SHARED = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared/data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data is not there")


def scenery(seed, n, speed=(0.6, 0.2), size=(192, 112), shake=0.0):
    """n frames of a cloudy coloured texture under a moving window; shake in px."""
    random, (width, height) = np.random.default_rng(seed), size
    y, x = np.mgrid[:height * 2, :width * 3].astype(np.float32)
    wide = np.zeros((height * 2, width * 3, 3), np.float32)
    for k in range(10):
        fx, fy = random.normal(0, 0.02 + 0.01 * k, 2).astype(np.float32)
        colour = random.uniform(0.4, 1, 3).astype(np.float32) / (1 + k / 3)
        wide += np.sin(x * fx + y * fy + np.float32(random.uniform(0, 6)))[..., None] * colour
    wide = (wide - wide.mean()) * (52 / wide.std()) + random.uniform(90, 160, 3)
    places = np.cumsum(np.broadcast_to(speed, (n, 2)), 0) + random.normal(0, 1, (n, 2)) * shake
    places = (places - places.min(0)).round().astype(int)
    return [wide[v:v + height, u:u + width].clip(0, 255).astype(np.uint8) for u, v in places]


def test_frames_are_freed_as_they_are_read(tmp_path):
    """Each a key frame, as ProRes and MJPEG have it: none may wait for the garbage collector, as
    one does whose side data were asked for. (A film of two hours kept 3 MB a second so.)"""
    encode(tmp_path / "a.mov", scenery(0, 40), codec="mjpeg", pix_fmt="yuvj420p", turn=(90, True))
    gc.collect()
    gc.disable()
    try:
        video = pd.Video(tmp_path / "a.mov")
        keys = sum(frame.key_frame for frame in video)
        waiting = sum(type(one).__name__ == "SideDataContainer" for one in gc.get_objects())
    finally:
        gc.enable()
    assert keys == 40 and video.matrix and waiting <= 1, (keys, waiting)


def mixed(a, b):
    """A dissolve from frames a to frames b."""
    return [(p * (1 - w) + q * w).astype(np.uint8)
            for p, q, w in zip(a, b, (np.arange(len(a)) + 1) / (len(a) + 1))]


def scan_of(path, frames, fps=25):
    encode(path, frames, fps=fps, crf="20")
    return pd.Scan(pd.Video(path))


# -- shots -----------------------------------------------------------------------------------------

def test_dissolves_and_fades_are_found(tmp_path):
    a, b, c = (scenery(seed, 60) for seed in (1, 2, 3))
    dim = [(frame * w).astype(np.uint8) for frame, w in zip(b[48:], np.linspace(1, 0, 12))]
    rise = [(frame * w).astype(np.uint8) for frame, w in zip(c[:12], np.linspace(0, 1, 12))]
    frames = a[:44] + mixed(a[44:], b[:16]) + b[16:48] + dim + rise + c[12:]
    scan = scan_of(tmp_path / "a.mp4", frames)
    cuts = pd.find_cuts(scan, 2.25, 0.3)
    first, second = pd.find_gradual(scan, 25, cuts)
    assert cuts == []
    assert abs(first[0] - 44) <= 4 and abs(first[1] - 60) <= 4
    assert abs(second[0] - 93) <= 4 and abs(second[1] - 115) <= 4
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "a.mp4", tmp_path / "in")
    run(tmp_path, "set", "--videos", "in", "--workers", 1)
    rows = pd.open_dataset(tmp_path / "data/set")
    assert len(rows) == 3 and rows[0]["end"] <= 48 / 25 < rows[0]["shot_end"] < 56 / 25
    assert rows[1]["shot_start"] == rows[0]["shot_end"] < rows[1]["start"]


def test_motion_light_and_flashes_are_no_transitions(tmp_path):
    pan = scenery(4, 90, speed=(3, 0))
    for frame in pan[40:42]:
        frame[:] = 250                                                  # a flash
    lamp = [(frame * 0.35).astype(np.uint8) for frame in scenery(5, 30)] + scenery(5, 60)[30:]
    slow = [(frame * w).astype(np.uint8) for frame, w in zip(scenery(6, 60), np.linspace(
        0.5, 1, 60))]                                                   # a cloud goes by
    for name, frames in (("pan", pan), ("lamp", lamp), ("slow", slow)):
        scan = scan_of(tmp_path / f"{name}.mp4", frames)
        cuts = pd.find_cuts(scan, 2.25, 0.3)
        assert (name, cuts, pd.find_gradual(scan, 25, cuts)) == (name, [], [])


def test_cuts_where_much_stays_are_no_lamps(tmp_path):
    """The demo's hardest: a shape of one colour and form stays about where it was."""
    files = pd.demo_files(38)
    for file, first in ((files[31], 2), (files[37], 3)):
        one, two = file["shots"][first:first + 2]
        frames = [*pd.render_shot(one), *pd.render_shot(two)]
        scan = scan_of(tmp_path / "a.mp4", frames, file["fps"])
        cuts = pd.find_cuts(scan, 2.25, 0.3)
        assert cuts == [one["frames"]] and pd.find_gradual(scan, file["fps"], cuts) == []


def test_stitching_and_trimming(tmp_path):
    (tmp_path / "in").mkdir()
    one = scenery(7, 40)
    jump = one[:20] + [np.ascontiguousarray(frame[:, ::-1]) for frame in one[20:]]  # same colours
    encode(tmp_path / "in/a.mp4", jump + scenery(8, 30), fps=25, crf="20")
    scan, common = pd.Scan(pd.Video(tmp_path / "in/a.mp4")), vars(pd.parse_options(["x"]))
    for options, want in (({}, [20, 20, 30]), ({"stitch": 10}, [40, 30])):
        shots = pd.find_shots(scan, 25, {**common, **options})
        assert [stop - first for _, _, first, stop in shots] == want
    run(tmp_path, "trimmed", "--videos", "in", "--workers", 1, "--trim", 0.08)
    rows = pd.open_dataset(tmp_path / "data/trimmed")
    assert [row["frames"] for row in rows] == [16, 16, 26]
    assert (rows[1]["shot_start"], rows[1]["start"], rows[1]["end"], rows[1]["shot_end"]) == (
        0.8, 0.88, 1.52, 1.6)


@needs_shared
def test_cut_lists(tmp_path):
    """F1 of hard cuts on the shared lists, and every listed fade and dissolve."""
    import bench_data
    right = wrong = missed = 0
    options = pd.parse_options(["x"])
    for row in row_lines(SHARED / "expected.jsonl"):
        if row.get("cuts") is None:
            continue
        cuts, spans, scan = bench_data.ours(SHARED / row["file"], options)
        listed = row.get("gradual") or []
        counts = bench_data.judge(cuts, row["cuts"], listed)[:3]
        right, wrong, missed = (x + y for x, y in zip((right, wrong, missed), counts))
        for _, a, b in listed:
            assert any(a < stop and first < b for first, stop in spans), (row["file"], spans)
        for first, stop in spans:                       # what begins or ends in black is not listed
            assert first == 0 or stop == len(scan.times) or any(
                a < stop and first < b for _, a, b in listed), (row["file"], spans)
    assert 2 * right / (2 * right + wrong + missed) >= 0.95


# -- scores ----------------------------------------------------------------------------------------

def scores(tmp_path, frames):
    scan = scan_of(tmp_path / "a.mp4", frames)
    return scan.scores(0, len(frames), 25.0)


def test_motion(tmp_path):
    """px a frame over the diagonal, times 25: the block motion is what was drawn."""
    diagonal = np.hypot(192, 112)
    still = scores(tmp_path, scenery(1, 1) * 40)
    slow = scores(tmp_path, scenery(1, 40, (0.5, 0)))
    fast = scores(tmp_path, scenery(1, 40, (4, 0)))
    shaking = scores(tmp_path, scenery(1, 40, (0, 0), shake=3))
    assert still["flow"] == 0 and still["repeats"] > 0.9 and slow["repeats"] < 0.6
    assert slow["flow"] == pytest.approx(0.5 * 25 / diagonal, rel=0.3)
    assert fast["flow"] == pytest.approx(4 * 25 / diagonal, rel=0.3)
    assert shaking["shake"] > 5 * max(still["shake"], slow["shake"], 0.01)


def test_borders_text_overlays(tmp_path):
    plain, boxed, marked = (scenery(9, 40, (2, 1)) for _ in range(3))
    for frame in boxed:
        frame[:14] = frame[-14:] = 8
    for frame in marked:
        frame[8:28:4, 120:180:3] = 255
        frame[10:28:4, 121:180:3] = 0
    a, b, c = (scores(tmp_path, frames) for frames in (plain, boxed, marked))
    assert a["border"] == 0 and b["border"] == pytest.approx(28 / 112, abs=0.02)
    assert a["text"] < 0.01 < c["text"] and a["overlay"] < 0.005 < c["overlay"]
    assert {*pd.SCORES} <= {*a}
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/boxed.mp4", boxed, fps=25)
    run(tmp_path, "set", "--videos", "in", "--crop", "--workers", 1)
    row, = pd.open_dataset(tmp_path / "data/set")
    assert (row["width"], row["height"]) == (192, 84)


def test_filters_and_captions(tmp_path):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("still", "moving", "spoken")):
        encode(tmp_path / f"in/{name}.mp4", scenery(seed, 30, (2, 0)) if seed else
               scenery(0, 1) * 30, fps=25)
    (tmp_path / "words").write_text("Buy\nnow\n")
    said = [("moving", "a cloud goes by slowly"), ("moving", "buy this cloud"),
            ("spoken", "на небе большое облако"), ("still", "ok here it is")]
    (tmp_path / "meta.jsonl").write_text("".join(
        json.dumps({"video": name, "caption": text}) + "\n" for name, text in said))
    common = ["--videos", "in", "--meta", "meta.jsonl", "--min_flow", 0.02, "--min_words", 2,
              "--alphabet", "latin", "--banned", "words", "--max_repeated", 0.5, "--workers", 1]
    run(tmp_path, "any", *common)
    rejects = {r["source"]: r for r in row_lines(tmp_path / "data/any/rejected.jsonl")}
    assert {name: r["reason"] for name, r in rejects.items()} == {
        "still.mp4": "too little flow", "spoken.mp4": "caption's alphabet"}
    assert rejects["still.mp4"]["threshold"] == 0.02
    row, = pd.open_dataset(tmp_path / "data/any")
    assert [c["text"] for c in row["captions"]] == ["a cloud goes by slowly"]
    run(tmp_path, "all", *common, "--policy", "all")
    assert pd.open_dataset(tmp_path / "data/all") == []
    refused = run(tmp_path, "any", *common, "--min_flow", 0.03, check=False)
    assert refused.returncode == 2 and "--min_flow 0.02" in refused.stderr


def test_where(capsys):
    rows = [{"key": "a", "fps": 25.0, "split": "train", "scores": {"flow": 0.2, "text": 0.0}},
            {"key": "b", "fps": 12.0, "split": "test", "scores": {"flow": 0.05, "text": 0.3}},
            {"key": "c", "fps": None, "split": "val", "scores": {"text": None}}]
    for text, want in {
            "flow>0.1": "a", "flow > 1e-1": "a", "not flow>0.1": "bc",
            "flow < 0.1 or fps >= 25": "ab", "split == 'test'": "b", "split != \"test\"": "ac",
            "text <= 0 and (flow > 1 or fps == 25)": "a",
            "flow>=-1 and not (text>0.1)": "a"}.items():
        assert "".join(row["key"] for row in pd.where(rows, text)) == want, text
    for text in ("", "flow", "flow >", "flow > 0.1 and", "(flow > 1", "flow > 1)", "speed > 1",
                 "flow > 100", "flow > x", "__import__('os')", "flow > 1; 2", "flow = 1", "1 < flow"):
        with pytest.raises(SystemExit) as stop:
            pd.where(rows, text)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1, (text, error)
        assert text != "flow > 100" or "none of the 3 clips: flow runs from 0.05 to 0.2" in error


# -- near-duplicates, copies -----------------------------------------------------------------------

def test_near_duplicates(tmp_path):
    (tmp_path / "in").mkdir()
    frames = scenery(1, 30, (1, 1))
    encode(tmp_path / "in/a.mp4", frames, fps=25, crf="30")
    encode(tmp_path / "in/b.mp4", frames, fps=25, crf="1")              # the most bytes: it stays
    grey = [np.repeat(frame.mean(2, keepdims=True), 3, 2).astype(np.uint8) for frame in frames]
    encode(tmp_path / "in/grey.mp4", grey, fps=25, crf="20")
    encode(tmp_path / "in/crop.mp4", [frame[8:-8, 14:-14] for frame in frames], fps=25, crf="20")
    logo = [frame.copy() for frame in frames]
    for frame in logo:
        frame[6:20, 6:36] = 255
    encode(tmp_path / "in/logo.mkv", logo, codec="mpeg4", fps=25)
    for seed in range(2, 7):
        encode(tmp_path / f"in/other{seed}.mp4", scenery(seed, 30, (1, 1)), fps=25, crf="20")
    run(tmp_path, "set", "--videos", "in")
    twins = row_lines(tmp_path / "data/set/duplicates.jsonl")
    assert {r["key"].split("-")[0] for r in twins} == {"a", "grey", "crop", "logo"}
    assert {r["of"].split("-")[0] for r in twins} == {"b"}
    run(tmp_path, "again", "--videos", "in", "--workers", 1, "--shard_sources", 6)
    strip = [{key: row[key] for key in ("key", "of")} for row in row_lines(
        tmp_path / "data/again/duplicates.jsonl")]
    assert strip == [{key: row[key] for key in ("key", "of")} for row in twins]


def test_pieces_of_one_shot_are_duplicates_by_their_pixels_alone(tmp_path):
    """A slow shot's hashes are alike, its pieces differ; a slide's pieces are the same."""
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/slow.mp4", scenery(1, 75, (0.12, 0)), fps=25, crf="10")
    encode(tmp_path / "in/slide.mp4", [scenery(2, 1)[0]] * 75, fps=25, crf="10")
    run(tmp_path, "set", "--videos", "in", "--max_seconds", 1, "--workers", 1)
    rows = [{**row, "shard": "shard-00000"} for row in row_lines(
        tmp_path / "data/set/shard-00000.jsonl")]
    slow = [row for row in rows if row["source"] == "slow.mp4"]
    assert pd.near_duplicates(slow, 0.15), "the test has lost its point"
    assert [(r["key"].split("-")[0], r["of"].split("-")[0]) for r in row_lines(
        tmp_path / "data/set/duplicates.jsonl")] == [("slide", "slide")] * 2
    kept = [pd.read_clip(tmp_path / "data/set", row).astype(float) for row in slow]
    assert min(np.abs(a - b).mean() for a, b in zip(kept, kept[1:])) > 1
    with tarfile.open(tmp_path / "data/set/shard-00000.tar") as tar:    # row, tar, count agree
        inside = {name.split(".")[0] for name in tar.getnames()}
    manifest = json.loads((tmp_path / "data/set/manifest.json").read_text())
    assert inside == {row["key"] for row in pd.open_dataset(tmp_path / "data/set")} == {
        row["key"] for row in rows if "duplicate_of" not in row} and len(inside) == 4
    assert manifest["counts"]["clips"] == 4 and manifest["counts"]["duplicates"] == 2
    for lost in (row for row in rows if "duplicate_of" in row):
        assert lost["offset"] is None and lost["duplicate_of"] in inside


def test_joining_goes_on_after_a_kill_at_each_rename(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for n in range(4):
        encode(tmp_path / f"in/{n}.mp4", scenery(n % 2, 30), fps=25, crf="10")
    monkeypatch.chdir(tmp_path)
    options = ["--videos", "in", "--shard_sources", "2", "--workers", "1"]
    run(tmp_path, "set", *options)
    want = bytes_of(tmp_path / "data/set")
    assert len(row_lines(tmp_path / "data/set/duplicates.jsonl")) == 2
    run(tmp_path, "cut", *options, "--part", "1/2"), run(tmp_path, "cut", *options, "--part", "2/2")
    assert bytes_of(tmp_path / "data/cut") == want
    shutil.rmtree(tmp_path / "data/cut")
    replace, left = os.replace, 0

    def failing(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyError("killed")
        replace(*paths)

    monkeypatch.setattr(pd, "finish", lambda *_: None)
    pd.main(["cut", *options])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "replace", failing)
    for n_renames in range(9):
        left = n_renames % 3 if n_renames < 8 else 99
        try:
            pd.main(["cut", *options])
        except KeyError:
            continue
    assert bytes_of(tmp_path / "data/cut") == want


@needs_shared
def test_no_piece_of_a_real_shot_is_lost(tmp_path):
    for name, near in (("set", 0.15), ("all", 0)):
        run(tmp_path, name, "--videos", SHARED / "train", "--max_side", 96, "--max_seconds", 1,
            "--near", near)
    rows = {row["key"]: row for row in pd.open_dataset(tmp_path / "data/all")}
    assert len(rows) > 150
    for one in row_lines(tmp_path / "data/set/duplicates.jsonl"):
        a, b = (pd.read_clip(tmp_path / "data/all", rows[one[k]]).astype(float)
                for k in ("key", "of"))
        n = min(len(a), len(b))
        assert rows[one["key"]]["source"] != rows[one["of"]]["source"] or \
            np.abs(a[:n] - b[:n]).mean() <= 1


def test_plain_clips_are_told_apart_by_colour(tmp_path):
    """Light above dark: their hashes are equal. A smaller copy of one is found all the same."""
    (tmp_path / "in").mkdir()
    brown = (100, 60, 60)
    for name, light, dark, size in (("red", RED, brown, 96), ("green", GREEN, brown, 96),
                                    ("blue", (90, 120, 255), brown, 96),
                                    ("night", RED, (60, 60, 140), 96), ("copy", RED, brown, 64)):
        frame = np.empty((size, size, 3), np.uint8)
        frame[:size * 3 // 8], frame[size * 3 // 8:] = light, dark
        encode(tmp_path / f"in/{name}.mp4", [frame] * 25, fps=25)
    run(tmp_path, "set", "--videos", "in", "--workers", 1)
    twins = row_lines(tmp_path / "data/set/duplicates.jsonl")
    assert [(r["key"].split("-")[0], r["of"].split("-")[0]) for r in twins] == [("copy", "red")]


@needs_shared
def test_shared_near_duplicates(tmp_path):
    truth = json.loads((SHARED / "expected_duplicates.json").read_text())
    (tmp_path / "in").mkdir()
    for folder in ("neardup", "train/panda", "train/UCF-101/Punch"):
        for path in (SHARED / folder).glob("*.*"):
            (tmp_path / "in" / path.name).symlink_to(path)
    run(tmp_path, "set", "--videos", "in", "--max_side", 64, "--crf", 40)
    rows = {}
    for path in (tmp_path / "data/set").glob("shard-?????.jsonl"):
        rows |= {row["key"]: row["source"] for row in row_lines(path)}
    got = {frozenset((rows[one["key"]], rows[one["of"]]))
           for one in row_lines(tmp_path / "data/set/duplicates.jsonl")}
    assert got == {frozenset(Path(name).name for name in pair) for pair in truth["near"]}


def test_plain_h264_is_copied(tmp_path):
    (tmp_path / "in").mkdir()
    frames = scenery(3, 40)
    encode(tmp_path / "in/plain.mp4", frames, fps=25, crf="20")
    encode(tmp_path / "in/box.mov", frames[:30], fps=25, crf="20")
    encode(tmp_path / "in/other_box.mkv", scenery(7, 30), fps=30, crf="20")     # times in ms
    encode(tmp_path / "in/disorder.avi", scenery(8, 30), fps=25)    # times in order of decoding
    encode(tmp_path / "in/sar.mp4", scenery(4, 30), fps=25, sar=2)
    encode(tmp_path / "in/cut.mp4", scenery(5, 20) + scenery(6, 20), fps=25)
    run(tmp_path, "set", "--videos", "in", "--workers", 1)
    rows = {}
    for row in pd.open_dataset(tmp_path / "data/set"):
        rows.setdefault(row["source"], []).append(row)
    for name, is_copy in (("plain.mp4", 1), ("box.mov", 1), ("other_box.mkv", 1),
                          ("disorder.avi", 0), ("sar.mp4", 0), ("cut.mp4", 0)):
        data = pd.read_member(tmp_path / "data/set", rows[name][0])
        assert (b"mbtree=0" not in data) == is_copy, name               # our encoder's mark
    assert len(rows["cut.mp4"]) == 2 and rows["plain.mp4"][0]["frames"] == 40
    video = pd.Video(tmp_path / "in/plain.mp4")
    got = pd.read_clip(tmp_path / "data/set", rows["plain.mp4"][0])
    assert np.abs(got - np.stack([np.int16(video.rgb(frame)) for frame in video])).mean() < 2


# -- every kind of file, hangs, the report ---------------------------------------------------------

@needs_shared
def test_every_shared_file(tmp_path):
    """Frames, size and health of all listed files, from the first pass of the script itself."""
    for row in row_lines(SHARED / "expected.jsonl"):
        if row["file"].startswith(("train", "scenes", "neardup")):
            continue
        path = SHARED / row["file"]
        try:
            if path.suffix.lower() in pd.STILLS and not pd.is_animated(path):
                pd.read_still(path)
                assert row["kind"] != "video"
                continue
            video = pd.Video(path)
            scan = pd.Scan(video)
        except (pd.Unreadable, *pd.PICTURE_ERRORS) as error:
            hdr = row.get("transfer") in ("smpte2084", "arib-std-b67")
            assert not row["decodable"] or hdr or "broken" in row["file"], (row["file"], error)
            continue
        assert abs(len(scan.times) - row["frames"]) <= (2 if row["reason"] != "ok" else 0), row
        height, width = video.rgb(next(iter(video))).shape[:2]
        sar = 1 if row["sar"] in (None, "1:1") else float(video.sar)
        want = sorted((row["width"] * max(1, sar), row["height"] * max(1, 1 / sar)))
        assert np.abs(np.sort([width, height]) - want).max() <= 2, (row["file"], width, height)
        step = np.median(np.diff(scan.times)) if len(scan.times) > 1 else 0
        near = max(0.02, step) * (1 if row["reason"] == "ok" else 3) + 0.01
        assert abs(scan.times[-1] + step - row["duration"]) <= near, row["file"]


def test_report(tmp_path):
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/a.mp4", scenery(1, 40), fps=25, crf="20")
    encode(tmp_path / "in/b.mp4", scenery(1, 40), fps=25, crf="30")
    encode(tmp_path / "in/short.mp4", scenery(2, 5), fps=25)
    (tmp_path / "in/text.mp4").write_text("404" * 99)
    run(tmp_path, "set", "--videos", "in", "--workers", 1)
    before = bytes_of(tmp_path / "data/set")
    run(tmp_path, "set", "--videos", "in", "--report")
    after = bytes_of(tmp_path / "data/set")
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {
        f"report/{name}" for name in ("report.txt", "spread.png", "kept.png", "rejected.png",
                                      "duplicates.png")}
    text = (tmp_path / "data/set/report/report.txt").read_text()
    assert "1 clips, 2 rejects, 1 duplicates" in text and "too short" in text and "flow" in text
