"""Readers of prepare_data.py: rows written here as the data sets publish them, and the whole of
../shared/data/metadata where that lies beside the checkout."""
import io
import json
import os
import struct
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import prepare_data as pd  # noqa: E402
from test_prepare_data import BLUE, RED, encode, row_lines, run, shot  # noqa: E402

SHARED = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared/data")) / "metadata"


def told(folder, form, path, sources):
    """({source: [fact]}, rejects) of a metadata file or folder."""
    database = folder / "facts.db"
    database.unlink(missing_ok=True)
    pd.read_metadata(pd.meta_files(path, form), form, sources, database)
    lost = [pd.rejection(name, reason, figure=n) for n, reason, name in pd.query(database, None)]
    result = {source: pd.facts_of(database, form, source) for source in sources}
    return ({source: facts for source, (facts, _) in result.items() if facts},
            lost + [one for _, rejects in result.values() for one in rejects])


def brief(facts):
    """What most layouts tell: captions, split, label."""
    return {source: [(f["captions"], f["split"], f["label"]) for f in mine]
            for source, mine in facts.items()}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


# -- rows as published -----------------------------------------------------------------------------

PANDA = """videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection
-a1,https://y/-a1,"[['0:00:00.000', '0:00:01.000'], ['0:00:01', '1:00:02.500']]",\
"['A dog''s ""day"".', "it's"]","[0.45, 0.5]","['desirable', '1_still_foreground_image']",\
"[['0:00:00.000', '0:00:01.000']]"\r
gone,https://y/gone,"[['0:00:16.300', '0:00:32.566']]","['lost']","[0.4]","['desirable']","[[]]"\r
-a1,https://y/-a1,"[['0:00:00.000', '0:00:01.0"""


def test_panda70m(tmp_path):
    text = PANDA.replace("\"it's\"", '""it\'s""').replace("''s", "\\'s")
    path = write(tmp_path / "panda70m_testing.csv", text)
    facts, rejects = told(tmp_path, "panda70m", path, ["x/-a1.mp4.mkv"])
    first, second = facts["x/-a1.mp4.mkv"]
    assert (first["start"], first["end"], first["captions"]) == (0, 1, ["A dog's \"day\"."])
    assert (second["start"], second["end"], second["captions"]) == (1, 3602.5, ["it's"])
    assert first["scores"] == {"desirable": 1, "matching_score": 0.45} and first["split"] == "test"
    assert second["scores"]["desirable"] == 0
    assert [(r["source"], r["reason"], r["figure"]) for r in rejects] == [
        ("gone", "missing video", 2), (None, "malformed metadata row", 3)]


@pytest.mark.parametrize("head", ["videoid,name,page_idx,page_dir,duration,contentUrl",
                                  "videoid,contentUrl,duration,page_dir,name"])
def test_webvid(tmp_path, head):
    row = {"videoid": "105", "name": '"A, b ""c"""', "page_idx": "1", "page_dir": "",
           "duration": "PT00H00M17S", "contentUrl": "https://s/105.mp4"}
    lines = [head, ",".join(row[name] for name in head.split(",")), "106,cut off"]
    path = write(tmp_path / "results_2M_val.csv", "\r\n".join(lines))
    facts, rejects = told(tmp_path, "webvid", path, ["videos/027/105.mp4"])
    assert brief(facts) == {"videos/027/105.mp4": [(['A, b "c"'], "val", None)]}
    assert [r["reason"] for r in rejects] == ["malformed metadata row"]


def test_internvid(tmp_path):
    row = {"YoutubeID": "k", "Start_timestamp": "00:01:06.673", "End_timestamp": "00:01:08.5",
           "Caption": "a hand", "Aesthetic_Score": 5.5, "UMT_Score": 0.25}
    bare = {**row, "Caption": "", "Aesthetic_Score": "", "UMT_Score": ""}
    path = write(tmp_path / "InternVid-10M-flt.jsonl", json.dumps(row) + "\n" + json.dumps(bare)
                 + "\n" + json.dumps(row)[:40])
    facts, rejects = told(tmp_path, "internvid", path, ["k.mp4"])
    first, second = facts["k.mp4"]
    assert (first["start"], first["end"]) == (66.673, 68.5)
    assert first["scores"] == {"Aesthetic_Score": 5.5, "UMT_Score": 0.25}
    assert second["captions"] == [] and "scores" not in second and len(rejects) == 1


def msrvtt(folder):
    videos = [{"category": 9, "url": "u", "video_id": f"video{n}", "start time": 3.5,
               "end time": 8.5, "split": split, "id": n}
              for n, split in enumerate(("train", "validate"))]
    said = [{"caption": f"{word} {n}", "video_id": f"video{n}", "sen_id": k}
            for k, (word, n) in enumerate([("a", 1), ("b", 0), ("c", 1), ("d", 0)])]
    write(folder / "train_val_videodatainfo.json", json.dumps(
        {"info": {"year": "2016"}, "videos": videos, "sentences": said}))
    write(folder / "test_videodatainfo.json", json.dumps(
        {"info": {}, "videos": [{**videos[0], "video_id": "video7010", "split": "test"}],
         "sentences": [{"caption": "t", "video_id": "video7010", "sen_id": 9}]}))
    write(folder / "category.txt", "music\t0\r\nvehicles/autos\t9\r\n")


def test_msrvtt(tmp_path):
    msrvtt(tmp_path)
    names = ["TestVideo/video7010.mp4", "TrainValVideo/video0.mp4", "TrainValVideo/video1.mp4"]
    facts, rejects = told(tmp_path, "msrvtt", tmp_path, names)
    car = "vehicles/autos"
    assert brief(facts) == {names[0]: [(["t"], "test", car)],
                            names[1]: [([w], "train", car) for w in ("b 0", "d 0")],
                            names[2]: [([w], "val", car) for w in ("a 1", "c 1")]}
    assert not rejects and facts[names[0]][0]["start"] is None
    path = tmp_path / "train_val_videodatainfo.json"
    path.write_text(path.read_text()[:-20])                             # a damaged end
    facts, rejects = told(tmp_path, "msrvtt", path, names)
    assert len(facts[names[1]]) + len(facts[names[2]]) == 3
    assert [r["reason"] for r in rejects] == ["malformed metadata row"]


def test_shot2story(tmp_path):
    item = {"video": "L.78.mp4", "image_id": "L.78.mp4", "id": 0, "whole_caption": "both",
            "whole_ASR": "", "nvid": "L.78.mp4", "video_names": ["L.78_0_24.mp4", "L.78_25_49.mp4"],
            "audio_captions": ["", ""], "captions": ["one", "two"], "ASR": ["", ""]}
    path = write(tmp_path / "20k_test.json", json.dumps([item])[:-1] + ', {"video": "L.7')
    facts, rejects = told(tmp_path, "shot2story", path, ["L.78.mp4", "L.mp4"])
    assert brief(facts) == {"L.78.mp4": [([c], "test", None) for c in ("both", "one", "two")]}
    assert [f.get("frames") for f in facts["L.78.mp4"]] == [None, [0, 24], [25, 49]]
    assert len(rejects) == 1
    meta = write(tmp_path / "20k_meta.csv", "clip_id,categories,duration,youtube_id\r\nL.78,"
                 "['Film & Animation'],\"['00:12:10.470', '00:12:23.490']\",L\r\n")
    facts, _ = told(tmp_path, "shot2story", meta, ["L.78.mp4", "L.mp4"])
    assert brief(facts) == {"L.78.mp4": [([], None, "Film & Animation")]}


def test_youku(tmp_path):
    for name, text in (("pretrain.csv", "video_id:FILE,title\nvideos/pretrain/a.flv,妈妈，看\n"),
                       ("classification_train.csv",
                        "video_id:FILE,title,label\r\nvideos/classification/b.mp4,兔,宠物\r\n"),
                       ("retrieval_val.csv", "clip_name:FILE,caption\nvideos/retrieval/c.mp4,路\n"),
                       ("captioning_test.csv", "video_id:FILE,golden_caption\n"
                        "videos/caption/d.mp4,\"['一', '二']\"\nvideos/caption/e.mp4")):
        write(tmp_path / name, text)
    facts, rejects = told(tmp_path, "youku", tmp_path, [f"videos/x/{n}.mp4" for n in "abcde"])
    assert brief(facts) == {
        "videos/x/a.mp4": [(["妈妈，看"], None, None)],
        "videos/x/b.mp4": [(["兔"], "train", "宠物")], "videos/x/c.mp4": [(["路"], "val", None)],
        "videos/x/d.mp4": [(["一", "二"], "test", None)]}
    assert len(rejects) == 1


def test_videoinstruct(tmp_path):
    rows = [{"q": "What?", "a": "A man.\nHe goes.", "video_id": "v_k"},
            {"id": 7, "video": "v_k.pkl", "conversations": [
                {"from": "human", "value": "<video>\nWhere?"}, {"from": "gpt", "value": "Here."}]}]
    path = write(tmp_path / "VideoInstruct100K.json", json.dumps(rows)[:-1] + ', {"q": "Wh')
    facts, rejects = told(tmp_path, "videoinstruct", path, ["v_k.webm"])
    assert [(f["prompt"], f["captions"]) for f in facts["v_k.webm"]] == [
        ("What?", ["A man.\nHe goes."]), ("Where?", ["Here."])]
    assert len(rejects) == 1


def test_ucf101(tmp_path):
    write(tmp_path / "trainlist01.txt",
          "HandstandPushups/v_HandStandPushups_g08_c01.avi 37\r\n\r\n")
    write(tmp_path / "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi\r\n")
    write(tmp_path / "testlist02.txt", "YoYo/v_YoYo_g08_c01.avi\r\n")
    sources = ["HandstandPushups/v_HandStandPushups_g08_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]
    want = {sources[0]: [([], "train", "HandstandPushups")], sources[1]: [([], "test", "YoYo")]}
    for path in (tmp_path, tmp_path / "trainlist01.txt"):
        facts, rejects = told(tmp_path, "ucf101", path, sources)
        assert brief(facts) == want and not rejects


def test_tgif(tmp_path):
    url = "https://38.media.tumblr.com/9f6c/tumblr_m_500.gif"
    path = write(tmp_path / "tgif-v1.0.tsv", f"{url}\ta man\n{url}\tagain\nhttps://x/y/z.gif")
    write(tmp_path / "splits/test.txt", url + "\n")
    for source in ("9f6c/tumblr_m_500.gif", "gifs/tumblr_m_500.gif"):
        facts, rejects = told(tmp_path, "tgif", path, [source])
        assert brief(facts) == {source: [(["a man"], "test", None), (["again"], "test", None)]}
        assert len(rejects) == 1


def test_lists(tmp_path):
    """Our own columns, Open-Sora's csv, JSON and plain lists."""
    write(tmp_path / "a.csv", "path,text,num_frames,aes,flow\n../v/a.mp4,\"a, b\",51,4.5,\n")
    facts, _ = told(tmp_path, "csv", tmp_path / "a.csv", ["a.mp4"])
    assert facts["a.mp4"][0]["captions"] == ["a, b"]
    assert facts["a.mp4"][0]["scores"] == {"aes": 4.5, "num_frames": 51}
    write(tmp_path / "a.json", '\ufeff [{"video": "a", "caption": ["x", "y"], "split": "Val"}]')
    facts, _ = told(tmp_path, "json", tmp_path / "a.json", ["a.mp4"])
    assert brief(facts) == {"a.mp4": [(["x", "y"], "val", None)]}
    write(tmp_path / "a.txt", "v/a.mp4\r\nv/gone.mp4\r\n")
    facts, rejects = told(tmp_path, "txt", tmp_path / "a.txt", ["a.mp4"])
    assert brief(facts) == {"a.mp4": [([], None, None)]} and rejects[0]["source"] == "v/gone.mp4"
    _, rejects = told(tmp_path, "txt", tmp_path / "a.txt", ["1/a.mp4", "2/a.mp4"])
    assert rejects[0]["reason"] == "several videos of this name"


def test_many_rows_are_read_as_a_stream(tmp_path):
    """Chunks of JSON arrays meet anywhere; memory does not grow with the rows."""
    rows = [{"video": f"v{n % 7}", "caption": "é" * (n % 50), "n": n} for n in range(15_000)]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=1, ensure_ascii=False))
    with pd.open_text(path) as file:
        assert list(pd.json_items(file)) == rows
    del rows
    tracemalloc.start()
    facts, rejects = told(tmp_path, "json", path, ["v0.mp4"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(facts["v0.mp4"]) == -(-15_000 // 7) and len(rejects) == 15_000 - -(-15_000 // 7)
    assert peak < 40 * 2**20


# -- rows and media, end to end --------------------------------------------------------------------

def test_msrvtt_end_to_end(tmp_path):
    msrvtt(tmp_path / "meta")
    (tmp_path / "in/TrainValVideo").mkdir(parents=True)
    for n in range(2):
        encode(tmp_path / f"in/TrainValVideo/video{n}.mp4", shot((RED, BLUE)[n], 25), fps=25)
    run(tmp_path, "set", "--videos", "in", "--meta", "meta", "--format", "msrvtt", "--workers", 1)
    rows = pd.open_dataset(tmp_path / "data/set")
    assert [([c["text"] for c in r["captions"]], r["split"], r["label"]) for r in rows] == [
        (["b 0", "d 0"], "train", "vehicles/autos"), (["a 1", "c 1"], "val", "vehicles/autos")]
    lost, = row_lines(tmp_path / "data/set/rejected.jsonl")
    assert (lost["source"], lost["reason"]) == ("video7010", "missing video")
    assert not (tmp_path / "data/set/facts.db").exists()


def test_frames_become_seconds(tmp_path):
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/L.78.mp4", shot(RED, 25) + shot(BLUE, 25), fps=25)
    write(tmp_path / "20k_test.json", json.dumps([{
        "video": "L.78.mp4", "whole_caption": "both", "captions": ["one", "two"],
        "video_names": ["L.78_0_24.mp4", "L.78_25_49.mp4"]}]))
    run(tmp_path, "set", "--videos", "in", "--meta", "20k_test.json", "--format", "shot2story",
        "--workers", 1)
    assert [[c["text"] for c in row["captions"]] for row in pd.open_dataset(tmp_path / "data/set")
            ] == [["both", "one"], ["both", "two"]]


def test_webdataset(tmp_path):
    encode(tmp_path / "a.mp4", shot(RED, 25), fps=25)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/00000.tar", "w") as tar:
        for name, data in {"s/000.1.mp4": (tmp_path / "a.mp4").read_bytes(), "s/000.txt": b"red\n",
                           "s/000.json": b'{"matching_score": 0.5, "status": "success"}',
                           "s/000.cls": b"7", "s/001.json": b"{}"}.items():
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    run(tmp_path, "set", "--videos", "in", "--format", "webdataset", "--workers", 1)
    row, = pd.open_dataset(tmp_path / "data/set")
    assert (row["source"], row["label"], row["frames"]) == ("00000.tar/s/000.1.mp4", "7", 25)
    assert row["captions"][0]["text"] == "red"      # its key ends at the name's first dot
    assert row["scores"]["matching_score"] == 0.5


def message(*fields):
    """A protobuf message of (number, bytes)."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
    return b"".join(varint(number << 3 | 2) + varint(len(data)) + data for number, data in fields)


def test_bair(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    record = message((1, message(*[
        (1, message((1, f"{i}/{name}".encode()), (2, message((kind, message((1, data)))))))
        for i in range(30) for name, kind, data in (
            ("image_main/encoded", 1, pixels[i].tobytes()),
            ("action", 2, struct.pack("<4f", 1, 2, 3, 4)))])))
    path = tmp_path / "in/train/traj_0_to_255.tfrecords"
    path.parent.mkdir(parents=True)
    whole = struct.pack("<Q4x", len(record)) + record + bytes(4)
    path.write_bytes(whole + whole[:1000])                              # the last one is damaged
    run(tmp_path, "set", "--videos", "in", "--format", "bair", "--workers", 1, "--crf", 0)
    row, = pd.open_dataset(tmp_path / "data/set")
    assert (row["source"], row["split"], row["label"]) == (
        "train/traj_0_to_255.tfrecords/00000.mkv", "train", None)
    assert (row["frames"], row["width"], row["height"]) == (30, 64, 64)
    video = pd.Video(pd.located(tmp_path / "in", row["source"])[0])
    assert np.array_equal(np.stack([video.rgb(frame) for frame in video]), pixels)


# -- the whole of the shared excerpts --------------------------------------------------------------

def every(folder, form, path):
    """All that a file tells, as if every video were there, and the number of bad rows."""
    names = {name for *_, name in pd.placed_rows(pd.meta_files(path, form), form, []) if name}
    facts, rejects = told(folder, form, path, sorted(f"{name}.mp4" if pd.bare(name) == name.rsplit(
        "/", 1)[-1] else name.lstrip("./") for name in names))
    return [f for mine in facts.values() for f in mine], facts, len(rejects)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared excerpts are not beside the checkout")
def test_every_row_of_the_excerpts(tmp_path):
    def count(form, name):
        return every(tmp_path, form, SHARED / name)
    for name, split in (("training_2m", "train"), ("validation", "val")):
        result, facts, bad = count("panda70m", f"Panda-70M/panda70m_{name}.csv")
        assert (len(result), len(facts), bad) == (6, 2, 0) and {f["split"] for f in result} == {split}
        last = facts["---7zZh4oZk.mp4"][-1]
        assert (last["start"], last["end"], last["scores"]["matching_score"]) == (
            40.12, 49.04, 0.454345703125)
        assert last["captions"] == ["A tv screen with a man standing in front of a group of men."]
    assert last["scores"]["desirable"] == 0
    for name in ("results_2M_val.csv", "0000.csv"):
        result, facts, bad = count("webvid", f"WebVid/{name}")
        assert (len(result), bad) == (4, 0) and facts["6251156.mp4"][0]["captions"][0].startswith(
            "Asian girl sexy santa claus")
    result, facts, bad = count("internvid", "InternVid/InternVid-10M-flt.jsonl")
    assert (len(result), bad) == (4, 0) and facts["fg0ZQ9Ysm8A.mp4"][0]["end"] == 543.676
    assert facts["fg0ZQ9Ysm8A.mp4"][0]["scores"]["UMT_Score"] == 0.439209
    result, _, bad = count("internvid", "InternVid/InternVid-full.jsonl")
    assert (len(result), bad) == (7, 0) and result[-1]["captions"] == ["the thai language in english"]
    assert sum(not f["captions"] for f in result) == 0
    result, facts, bad = count("msrvtt", "MSR-VTT")
    assert bad == 0 and {len(mine) for mine in facts.values()} == {20}
    for name in ("train_val", "test"):
        truth = json.loads((SHARED / f"MSR-VTT/{name}_videodatainfo.json").read_text())
        for video in truth["videos"]:
            mine = facts[f"{video['video_id']}.mp4"]
            assert {f["split"] for f in mine} == {pd.SPLITS[video["split"]]}
            assert sorted(f["captions"][0] for f in mine) == sorted(
                s["caption"].strip() for s in truth["sentences"]
                if s["video_id"] == video["video_id"])
    result, facts, bad = count("shot2story", "Shot2Story/20k_test.json")
    assert (len(result), len(facts), bad) == (7, 2, 0)
    assert facts["R2-Usq--J3U.2.mp4"][-1]["frames"] == [331, 464]
    result, facts, bad = count("shot2story", "Shot2Story/20k_meta.csv")
    assert (len(result), bad, result[0]["label"] is None) == (20, 0, False)
    assert facts["FT-vF-lvu7A.14.mp4"][0]["label"] == "People & Blogs"
    result, _, bad = count("youku", "Youku-mPLUG")
    assert (len(result), bad) == (4, 0) and {f["label"] for f in result} == {None, "宠物"}
    result, facts, bad = count("videoinstruct", "VideoInstruct-100K/VideoInstruct100K.json")
    assert (len(result), bad) == (4, 0)
    assert facts["v_ZNVhz7ctTq0.mp4"][0]["captions"] == ["Outdoors."]
    result, facts, bad = count("ucf101", "UCF-101/ucfTrainTestlist")
    splits = [f["split"] for f in result]
    assert (len(result), bad, splits.count("train"), splits.count("test")) == (13320, 0, 9537, 3783)
    assert len({f["label"] for f in result}) == 101
    result, _, bad = count("tgif", "TGIF/tgif-v1.0.tsv")
    assert (len(result), bad) == (len((SHARED / "TGIF/tgif-v1.0.tsv").read_text().splitlines()), 0)
    for form in ("csv", "jsonl", "txt"):
        result, facts, bad = count(form, f"list/list.{form}")
        assert (len(facts), bad) == (19, 0)
        if form != "txt":
            last, = [mine for name, mine in facts.items() if "uguibLEdeCU" in name]
            assert last[0]["captions"] == ["A close up of a blender with strawberries in it."]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared excerpts are not beside the checkout")
def test_every_file_of_the_excerpts(tmp_path):
    run(tmp_path, "bair", "--videos", SHARED / "BAIR", "--format", "bair", "--near", 0)
    rows = pd.open_dataset(tmp_path / "data/bair")
    assert {row["frames"] for row in rows} == {30} and {row["split"] for row in rows} == {
        "train", "test"} and len(rows) == len({row["source"] for row in rows}) == 2
    run(tmp_path, "web", "--videos", SHARED / "WebDataset", "--format", "webdataset")
    with tarfile.open(SHARED / "WebDataset/00000.tar") as tar:
        texts = {name: tar.extractfile(name).read().decode().strip()
                 for name in tar.getnames() if name.endswith(".txt")}
        videos = [name for name in tar.getnames() if name.endswith(".mp4")]
    rows = pd.open_dataset(tmp_path / "data/web")
    assert {row["source"] for row in rows} == {f"00000.tar/{name}" for name in videos}
    for row in rows:
        assert row["captions"][0]["text"] == texts[row["source"][10:-4] + ".txt"]
    run(tmp_path, "net", "--videos", SHARED / "ImageNet/train", "--format", "folder")
    assert sorted(row["label"] for row in pd.open_dataset(tmp_path / "data/net")) == [
        "n02123045", "n02123045", "n04275548", "n07920052"]
