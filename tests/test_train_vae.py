"""The autoencoder: causal, chunkable, fitted; runs: resumed, refused, equal on two ranks."""
import json
import math
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import prepare_data
import train_vae as V
from kernels import conv

TINY = dict(dim=8, mults=(1, 2), downs=("t", "st"), n_res=1, patch=2, z_dim=4, linear=True)
DEEP = dict(dim=4, mults=(1, 2, 2, 2), downs=("s", "st", "st"), n_res=1, z_dim=4)
PLAIN = dict(DEEP, residual=False, dec_dim=8)
IMAGE = dict(dim=4, mults=(1, 2, 2, 2), downs=("s", "s", "s"), n_res=1, z_dim=4, residual=False,
             groups=2)
PATCHED = dict(dim=8, mults=(1, 2, 2), downs=("t", "st"), n_res=1, patch=4, z_dim=6, linear=True)


def shaken(options, seed=0):
    """A model none of whose weights is at its initial value, in float64."""
    torch.manual_seed(seed)
    model = V.Autoencoder(**options).double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("options", [DEEP, PLAIN, PATCHED])
@pytest.mark.parametrize("chunks", [(1, 4, 4, 8), (5, 12), (3, 2, 1, 6, 5)])
def test_chunks_equal_the_whole(options, chunks):
    model, video = shaken(options), torch.randn(1, 3, 17, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        mean, logvar = model.encode(video)
        assert mean.shape == logvar.shape == (1, model.z_dim, 5, 1, 2)
        state, parts, start = {}, [], 0
        for n in chunks:
            parts.append(model.encode(video[:, :, start:start + n], state))
            start += n
        for whole, group in zip((mean, logvar), zip(*parts)):
            assert torch.allclose(torch.cat(group, 2), whole, atol=1e-12)
        decoded, state = model.decode(mean), {}
        pieces = [model.decode(mean[:, :, t:t + n], state) for t, n in ((0, 1), (1, 1), (2, 3))]
        assert decoded.shape == video.shape
        assert torch.allclose(torch.cat(pieces, 2), decoded, atol=1e-12)
        assert torch.allclose(torch.cat(list(V.decode_long(model, mean, 2)), 2), decoded, atol=1e-12)
        assert torch.allclose(V.encode_long(model, video)[0], mean, atol=1e-12)


@pytest.mark.parametrize("options", [DEEP, PLAIN, PATCHED, IMAGE])
def test_chunk_size_and_gradients_do_not_change_the_result(options, monkeypatch):
    model, video = shaken(options), torch.randn(2, 3, 9, 16, 24, dtype=torch.float64)
    mean, _ = model.encode(video)                                # with gradients: all at once
    decoded = model.decode(mean)
    monkeypatch.setattr(conv, "CHUNK", 999)                         # a frame or two a piece
    with torch.no_grad():
        assert torch.allclose(model.encode(video)[0], mean, atol=1e-12)
        assert torch.allclose(model.decode(mean), decoded, atol=1e-12)


@pytest.mark.parametrize("options, size", [
    (dict(mults=(1, 2), downs=("s",), z_dim=4, residual=False), (32, 48)),
    (dict(mults=(1,), downs=(), z_dim=48, patch=4), (64, 96))])      # a layer without a norm, too
def test_winograd_on_large_clips_equals_the_plain_convolution(options, size, monkeypatch):
    model = shaken(dict(dim=96, n_res=1, **options)).float()
    video, calls, winograd = torch.randn(1, 3, 11, *size), [], conv.winograd
    monkeypatch.setattr(conv, "winograd", lambda frames, *rest: (
        calls.append(len(frames)), winograd(frames, *rest))[1])
    mean, _ = model.encode(video)                                # with gradients: all at once
    decoded = model.decode(mean)
    assert not calls
    with torch.no_grad():
        assert (model.encode(video)[0] - mean).abs().max() < 1e-5 * mean.abs().max()
        most = len(calls)
        for chunk in (11, 4, 3):
            result = torch.cat(list(V.decode_long(model, mean, chunk)), 2)
            assert (result - decoded).abs().max() < 1e-5 * decoded.abs().max()
        assert 0 < most < len(calls) and max(calls) > 4          # more than a pair at once, too



def test_an_index_names_files_beside_it_and_detectors_are_trusted(tmp_path, capsys, monkeypatch):
    """6 D: an index that named ../x, itself or nothing was opened or ended in a traceback; E: a
    detector's code ran unasked."""
    (tmp_path / "model").mkdir()
    index = tmp_path / "model/model.safetensors.index.json"
    for result in ('{"weight_map": {"a": "../x.safetensors"}}', "[1]", '{"weight_map": [1]}',
                  json.dumps({"weight_map": {"a": index.name}}), '{"weight_map": {"a": 7}}',
                  "[" * 9999):
        index.write_text(result)
        with pytest.raises(SystemExit):
            V.read_tensors(tmp_path / "model")
        assert "does not map names to files beside it" in capsys.readouterr().err
    (tmp_path / "empty.pt").touch()
    with pytest.raises(SystemExit):
        V.read_tensors(tmp_path / "empty.pt")
    assert "it is empty" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "code.pt", "w") as file:
        file.writestr("code", "print()")
    ran = []
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: ran.append(a))
    with pytest.raises(SystemExit):
        V.open_detector(tmp_path / "code.pt", "cpu", "--rfid", False)
    assert "is a program" in (said := capsys.readouterr().err) and "--trust" in said and not ran


def test_the_norm_before_a_convolution_is_the_modules():
    layer, norm, x = V.CausalConv3d(3, 4, 3), V.Norm(3), torch.randn(2, 3, 5, 4, 4)
    norm.gamma.data = torch.rand(3)
    plain = layer(torch.nn.functional.silu(norm(x)), {})
    assert torch.allclose(layer(x, {}, norm), plain, atol=1e-6)


@pytest.mark.parametrize("name, count", [("wan-2.1", 126_892_531), ("wan-2.2", 704_688_668),
                                         ("sd-vae", 83_653_863)])
def test_presets_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        model = V.Autoencoder(**V.MODELS[name])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("options", [DEEP, PLAIN, PATCHED])
def test_a_still_is_the_first_frame_and_the_past_is_never_changed(options):
    model, video = shaken(options), torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    other = video.clone()
    other[:, :, 5:] = torch.randn(1, 3, 4, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        mean = model.encode(video)[0]
        assert torch.allclose(model.encode(video[:, :, :1])[0], mean[:, :, :1], atol=1e-12)
        assert torch.allclose(model.encode(other)[0][:, :, :2], mean[:, :, :2], atol=1e-12)
        assert not torch.allclose(model.encode(other)[0][:, :, 2], mean[:, :, 2])
        assert torch.allclose(model.decode(mean[:, :, :1]), model.decode(mean)[:, :, :1], atol=1e-12)


def test_fold_and_unfold_are_inverse_where_nothing_is_averaged():
    x = torch.randn(1, 4, 3, 4, 4)
    x = torch.cat([x[:, :, :1], x], 2)
    folded = V.fold(x, 32, 2, 2)
    assert folded.shape == (1, 32, 2, 2, 2)
    assert torch.equal(V.unfold(folded, 4, 2, 2), x)
    assert torch.equal(V.fold(x, 16, 2, 2), folded.view(1, 16, 2, 2, 2, 2).mean(2))
    more = V.fold(x, 8, 1, 1)                    # a level that grows without a fold repeats
    assert torch.equal(more, x.repeat_interleave(2, 1)) and torch.equal(V.unfold(more, 4, 1, 1), x)


def test_the_linear_code_is_fitted_in_closed_form():
    """Videos that lie in a space of few dimensions are coded without loss; codes vary alike."""
    torch.manual_seed(0)
    basis = torch.randn(4, 3, 4, 8, 8)
    videos = []
    for _ in range(64):
        first, rest = torch.randn(2, 4)
        still = torch.einsum("k,kchw->chw", first, basis[:, :, 0])[:, None]
        videos.append(torch.cat([still, torch.einsum("k,kcthw->cthw", rest, basis)], 1))
    code = V.PatchCode(4, 8, 4)
    code.fit(videos)
    batch = torch.stack(videos)
    z = code.encode(batch, {})
    assert z.shape == (64, 4, 2, 1, 1)
    assert torch.allclose(code.decode(z, {}), batch, atol=1e-3)
    std = z[:, :, 1].std(0).flatten()
    assert 0.4 < std.min() and std.max() < 2.0


def test_the_linear_code_of_stills_alone():
    """A folder of pictures, or --frames 1: nothing moves, and a still that is repeated is coded so."""
    random = np.random.RandomState(0)
    stills = [random.randint(0, 255, (1, 16, 16, 3), np.uint8) for _ in range(40)]
    for frame in stills:
        frame.setflags(write=False)                          # as pictures that are read
    code = V.PatchCode(4, 8, 4)
    code.fit([V.to_tensor(frame) for frame in stills])
    assert all(torch.isfinite(x).all() for x in code.state_dict().values())
    model = V.Autoencoder(**{**V.MODELS["vae-xxs"], "dim": 8})
    model.linear.fit([V.to_tensor(frame) for frame in stills])


def test_a_fresh_model_with_a_linear_code_is_that_code():
    torch.manual_seed(0)
    model, video = V.Autoencoder(**TINY), torch.randn(1, 3, 5, 16, 16)
    mean, logvar = model.encode(video)
    assert torch.equal(mean, model.linear.encode(video, {}))
    assert torch.allclose(logvar, torch.full_like(logvar, -6.0))


def test_sides_and_lengths_of_any_size_are_fitted_by_the_stated_rule():
    frames = np.arange(7 * 21 * 35 * 3, dtype=np.uint8).reshape(7, 21, 35, 3)
    cut, crop = V.fit_sides(frames, 8)
    assert crop == (2, 1, 16, 32) and np.array_equal(cut, frames[:, 2:18, 1:33])
    padded, crop = V.fit_sides(frames[:, :5, :9], 8)
    assert padded.shape[1:3] == (8, 8) and crop[2:] == (8, 8)
    assert [V.fit_time(n, 4) for n in (1, 4, 5, 8, 9, 17)] == [1, 1, 5, 5, 9, 17]
    assert V.pieces("k", 18, 10, 50, 4) == [("k", 0, 17)]
    assert V.pieces("k", 18, 10, 30, 4) == [("k+0", 0, 9), ("k+1", 9, 9)]
    assert V.pieces("k", 1, 10, 5, 4) == [("k", 0, 1)]


def test_frames_to_tensors_and_back_are_equal():
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    assert np.array_equal(V.to_frames(V.to_tensor(frames)), frames)


def test_psnr_is_the_closed_form():
    a = torch.zeros(2, 3, 1, 4, 4)
    b = torch.stack([torch.full((3, 1, 4, 4), 0.2), torch.full((3, 1, 4, 4), 0.02)])
    assert torch.allclose(V.psnr(a, b), torch.tensor([20.0, 40.0]), atol=1e-3)


def test_a_stream_has_random_access_and_every_row_each_epoch():
    rows = [{"key": f"k{i}"} for i in range(7)]
    stream = V.Stream(rows, 3)
    whole = stream.take(0, 21)
    assert [r["key"] for r in V.Stream(rows, 3).take(9, 5)] == [r["key"] for r in whole[9:14]]
    for epoch in range(3):
        assert sorted(r["key"] for r in whole[7 * epoch:7 * epoch + 7]) == sorted(r["key"] for r in rows)
    assert [r["key"] for r in whole[:7]] != [r["key"] for r in whole[7:14]]


def test_checkpoints_are_renamed_when_complete_and_old_ones_removed(tmp_path):
    tensors = {"model": {"a": torch.arange(3.0)}, "optimizer": {}}
    for step in (1, 2, 3):
        V.save_step(tmp_path, step, tensors)
    (tmp_path / ".step-000009.part").mkdir()
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-000002", "step-000003"]
    step, loaded = V.load_step(V.last_step(tmp_path))
    assert step == 3 and torch.equal(loaded["model"]["a"], torch.arange(3.0))
    before = (V.last_step(tmp_path) / "model.safetensors").read_bytes()
    V.save_step(tmp_path, 3, loaded)
    assert (V.last_step(tmp_path) / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".step-*"))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, capsys):
    """The limit on a file's size stands in for a disk's end: writing fails half-way."""
    V.save_step(tmp_path, 1, {"model": {"a": torch.arange(3.0)}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            V.save_step(tmp_path, 2, {"model": {"a": torch.arange(3.0), "b": torch.zeros(9999)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stop.value.code == 2 and "make room" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert torch.equal(V.load_step(V.last_step(tmp_path))[1]["model"]["a"], torch.arange(3.0))


def loop(folder, learn, steps=6, evaluate=lambda done: {"held_out": 0.5}, work=None, start=0,
         **more):
    """Runs the loop of training with a `learn` of the test's."""
    args = SimpleNamespace(steps=steps, eval_every=4, log_every=2, save_every=2, keep=9, lr=1e-3,
                           warmup=0, schedule="cosine", **more)
    V.fit(args, folder, start, lambda step: step, learn, evaluate,
          lambda: {"model": {"a": torch.zeros(1)}}, work)


def test_the_loop_logs_evaluates_and_saves_when_it_should(tmp_path):
    loop(tmp_path, lambda step, data: ({"loss": torch.tensor(float(step))}, torch.tensor(1.0), []))
    rows = V.read_log(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(2, 0.5), (4, 2.5), (6, 4.5)]
    assert ["held_out" in row for row in rows] == [False, True, True]
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == [f"step-{n:06d}" for n in (2, 4, 6)]


def test_step_time_excludes_evaluation(tmp_path):
    def learn(step, data):
        time.sleep(0.02)
        return {"loss": torch.tensor(1.0)}, torch.tensor(1.0), []

    def evaluate(done):
        time.sleep(0.5)
        return {"held_out": 0.5}
    loop(tmp_path, learn, 6, evaluate, (100, 1e6, 1e9))
    for row in V.read_log(tmp_path):
        assert 0.02 <= row["step_s"] < 0.2
        assert row["tokens_s"] == pytest.approx(100 / row["step_s"], rel=0.01)
        assert row["mfu"] == pytest.approx(1e-3 / row["step_s"], rel=0.01) and row["peak_mib"] > 10
    assert V.read_log(tmp_path)[-1]["seconds"] > 0.6


def test_sums_and_counts_are_logged_as_means():
    """Over the steps since the last row; the same where the sums were saved on the way."""
    steps = [{"loss": torch.tensor(x), "mean": (6 * x, 4), "by_t": torch.tensor([[x, 2], [0, 0]])}
             for x in (1.0, 2.0, 6.0)]
    whole, broken = V.Means({}, True), V.Means({}, True)
    for i, figures in enumerate(steps):
        whole.add(figures)
        broken = V.Means(json.loads(json.dumps(broken.gather())), i == 0)
        broken.add(figures)
    assert whole.row() == broken.row() == {"loss": 3.0, "mean": 4.5, "by_t": [1.5, None]}
    whole.add(steps[0])
    assert whole.row()["loss"] == 1.0


def counted(folder, steps=6, stop_at=None, evaluate=lambda done: {"held_out": 0.5}, number=signal.SIGINT):
    """A run whose weight is the number of its steps; a signal comes amid one, once."""
    weight, path = torch.zeros(1), Path(folder)
    start = 0
    if (last := V.last_step(path)) is not None:
        start, saved = V.load_step(last)
        weight.copy_(saved["model"]["a"])

    def learn(step, data):
        if step == stop_at:
            signal.raise_signal(number)
        V.STOP.agree()                                               # as take_step does
        weight.add_(1)
        return {"loss": torch.tensor(1 / (1 + step))}, weight[0] * 0.1, []
    args = SimpleNamespace(steps=steps, eval_every=4, log_every=3, save_every=100, keep=9, lr=1e-3,
                           warmup=0, schedule="cosine")
    V.fit(args, path, start, lambda step: step, learn, evaluate, lambda: {"model": {"a": weight}})
    return [{key: row.get(key) for key in ("step", "loss", "grad_norm", "held_out", "lr")}
            for row in V.read_log(path)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_at", [0, 2, 3, 4])
def test_a_stopped_step_is_dropped_and_done_again(tmp_path, stop_at, number, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        counted(tmp_path / "broken", stop_at=stop_at, number=number)
    assert stop.value.code == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert capsys.readouterr().err.splitlines()[-1].count(f"stopped after step {stop_at}") == 1
    last = V.last_step(tmp_path / "broken")
    assert (last is None) == (stop_at == 0)
    if last:
        assert V.load_step(last)[1]["model"]["a"].item() == stop_at
    assert counted(tmp_path / "broken") == counted(tmp_path / "whole")


def test_a_run_stopped_in_an_evaluation_logs_it_when_resumed(tmp_path):
    def evaluate(done):
        if done == 4:
            signal.raise_signal(signal.SIGTERM)
        return {"held_out": 0.5}
    with pytest.raises(SystemExit) as stop:
        counted(tmp_path / "broken", evaluate=evaluate)
    assert stop.value.code == 143 and [row["step"] for row in V.read_log(tmp_path / "broken")] == [3]
    assert counted(tmp_path / "broken") == counted(tmp_path / "whole")


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    code = """
import os, signal, sys, time, train_vae as V
def caught(*_):
    signal.raise_signal(signal.SIGINT)                # the second, while the first one's is saved
    time.sleep(60)
with V.STOP:
    V.STOP.begin()
    try:
        signal.raise_signal(signal.SIGINT)
    except V.Stopped:
        caught()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(V.__file__).parent, timeout=50)
    assert done.returncode == 130


def test_the_log_is_strict_json(tmp_path):
    loop(tmp_path, lambda step, data: ({"loss": torch.tensor(1.0)}, torch.tensor(1.0), []),
         evaluate=lambda done: {"held_out": math.nan, "by_t": [math.inf, 1.0]})
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = V.read_log(tmp_path)[-1]
    assert row["held_out"] is None and row["by_t"] == [None, 1.0]
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN}\n')           # as they were
    assert V.read_log(tmp_path) == [{"step": 1, "loss": None}]


def test_safetensors_are_the_librarys_bytes_in_the_file_that_was_opened(tmp_path):
    kinds = list(V.DTYPES)
    tensors = {f"{name}{i}": torch.ones(shape).to(kind) for i, kind in enumerate(kinds)
               for name, shape in (("b", (2, 3)), ("a", ()), ("ü", (0, 4)))}
    tensors["turned"] = torch.arange(6.0).view(2, 3).T
    for metadata in (None, {"nanosora": json.dumps({"a": "é\n"})}):
        path = tmp_path / "ours"
        path.touch(0o644)
        before = path.stat()
        crc = V.save_file(tensors, path, metadata)
        save_file(dict(tensors, turned=tensors["turned"].contiguous()), tmp_path / "theirs", metadata)
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
        assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
        assert crc == V.sum_of(path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, file, cut):
    for step in (1, 2):
        V.save_step(tmp_path, step, {"model": {"a": torch.ones(9)}, "optimizer": {"b": torch.ones(9)}},
                    log={"loss": (0.5, 1)})
    path = tmp_path / "step-000002" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-5] if cut else data)
    assert V.last_step(tmp_path, also_optimizer=True).name == "step-000001"
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "step-000002" in err and file in err
    V.save_step(tmp_path, 2, {"model": {"a": torch.ones(9)}})
    assert V.last_step(tmp_path).name == "step-000002"
    for folder in tmp_path.glob("step-*"):
        (folder / "state.json").write_text("")
    with pytest.raises(SystemExit):
        V.last_step(tmp_path)
    assert "all of its checkpoints are damaged" in capsys.readouterr().err


def test_older_checkpoints_without_checksums_are_read(tmp_path):
    for step in (1, 2):
        V.save_step(tmp_path, step, {"model": {"a": torch.ones(9)}})
        (tmp_path / f"step-{step:06d}/state.json").write_text(json.dumps({"step": step}))
    assert V.last_step(tmp_path).name == "step-000002"
    path = tmp_path / "step-000002/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert V.last_step(tmp_path).name == "step-000001"


def test_a_run_is_locked_by_one_process_and_freed_when_it_is_killed(tmp_path, capsys):
    code = ("import sys, time, train_vae as V\nV.claim(sys.argv[1])\nprint('mine', flush=True)\n"
            "time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], text=True,
                             cwd=Path(V.__file__).parent, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(SystemExit) as stop:
        V.claim(tmp_path / "run")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "another process" in err
    other.kill()
    other.wait()
    V.one_run(lambda args, folder: V.claim(folder))(None, tmp_path / "run")
    assert str(tmp_path / "run") not in V.HELD


def test_a_start_that_fails_removes_its_folder_but_no_other_files(tmp_path, capsys):
    def train(args, folder):
        V.start_run(folder, {"kind": "vae", "args": {}})
        V.refuse("no clips")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").touch()
    for name, left in (("a", None), ("b", ["notes"])):
        with pytest.raises(SystemExit):
            V.one_run(train)(None, tmp_path / name)
        folder = tmp_path / name
        assert ([p.name for p in folder.iterdir()] if folder.exists() else None) == left
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        V.one_run(train)(None, tmp_path / "file")
    assert stop.value.code == 2 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name, data, says", [
    ("notes.txt", b"embeddings follow\n", "no file of tensors"),
    ("page.pt", b"<html>not found</html>", "no file of tensors"),
    ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(99), "no file of tensors"),
    ("empty.pt", b"", "it is empty"), ("zip.pt", b"PK\x03\x04" + bytes(99), "no file of tensors"),
    ("cut.safetensors", None, "cannot be read as weights"), ("cut.pt", None, "no file of tensors"),
    ("list.pt", [1], "no names"), ("nosuch.pt", ..., "no such file"),
    ("folder", ..., "is no run")])
def test_what_is_no_autoencoder_is_refused_in_one_line(tmp_path, capsys, name, data, says):
    path = tmp_path / name
    if isinstance(data, list):
        torch.save(data, path)
    elif data is None:
        (save_file if name.endswith("safetensors") else torch.save)({"a": torch.ones(999)}, path)
        path.write_bytes(path.read_bytes()[:-500])
    elif data is not ...:
        path.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        V.load_autoencoder(str(path))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1, err
    assert says in err and name in err and "weights_only" not in err and "pickle" not in err


@pytest.mark.parametrize("argv, says", [
    (["--modle", "vae-s"], "--modle is not an option: did you mean --model?"),
    (["--Log-Every=3"], "--Log-Every is not an option: did you mean --log_every?"),
    (["--zzzz"], "--zzzz is not an option: --help names them"),
    (["--model", "VAE_S"], "--model VAE_S: did you mean vae-s?"),
    (["--model", "Wan2.1"], "--model Wan2.1: did you mean wan-2.1?"),
    (["--bottleneck", "qqq"], "invalid choice: 'qqq'"),
    (["more"], "unrecognized arguments: more")])
def test_mistyped_options_are_answered_with_the_nearest(capsys, argv, says):
    with pytest.raises(SystemExit) as stop:
        V.parse_options(["demo", *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and says in err


@pytest.mark.parametrize("stage", ["prepare_data", "train_vae", "caption", "train_dit", "sample"])
@pytest.mark.parametrize("change, says", [
    ("sys.modules['av'] = None", "av is not installed: pip install -r requirements.txt"),
    ("sys.version_info = (3, 10, 2)", "Python 3.11 or newer is needed, this is 3.10")])
def test_a_missing_package_is_reported_in_one_line(stage, change, says):
    path = Path(V.__file__).with_name(f"{stage}.py")
    code = f"import runpy, sys; {change}; sys.argv = ['{stage}.py']; runpy.run_path({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr == f"{stage}.py: {says}\n"


def test_ctrl_c_outside_of_a_step_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        prepare_data.script(main)
    assert stop.value.code == 130 and len(capsys.readouterr().err.split("\n")) == 3


def test_what_cannot_be_written_is_refused_before_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    prepare_data.writable(tmp_path / "new" / "folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit):
            prepare_data.writable(folder)
        assert "cannot be written: not a directory" in capsys.readouterr().err

    def full(**_):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(prepare_data.tempfile, "TemporaryFile", full)
    with pytest.raises(SystemExit):
        prepare_data.writable(tmp_path)
    assert "read-only file system" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_machine_without_git_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert V.start_run(tmp_path / "r", {"kind": "vae", "args": {}}) is None
    assert json.loads((tmp_path / "r/config.json").read_text())["git"] is None
    V.HELD.pop(str(tmp_path / "r"))[0].close()


@pytest.mark.parametrize("bad", [2, 3])
def test_a_gradient_that_is_not_finite_is_named_and_never_saved(tmp_path, capsys, bad):
    with pytest.raises(SystemExit) as stop:
        loop(tmp_path, lambda step, data: ({"loss": torch.tensor(1.0)}, torch.tensor(
            math.nan if step == bad else 1.0), [f"clip-{step}"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"step {bad}" in error and f"clip-{bad}" in error
    assert V.last_step(tmp_path).name == "step-000002"


def test_clips_are_skipped_by_key(tmp_path, capsys):
    rows = [{"key": "a"}, {"key": "b"}]
    (tmp_path / "skip").write_text("b\n")
    args = SimpleNamespace(where=None, skip_clips=tmp_path / "skip")
    assert V.chosen(rows, args) == rows[:1]
    assert V.chosen(rows, SimpleNamespace(where=None, skip_clips=None)) == rows
    (tmp_path / "skip").write_text("c\n")
    with pytest.raises(SystemExit):
        V.chosen(rows, args)
    assert "c is no clip" in capsys.readouterr().err


def test_a_log_is_cut_back_to_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 4, "lo')          # a torn line
    loop(tmp_path, None, steps=2, start=2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines[:2])


def test_a_run_resumes_only_with_the_same_options(tmp_path, capsys):
    config = {"kind": "vae", "args": {"lr": 0.1, "steps": 5}}
    assert V.start_run(tmp_path / "r", config) is None
    assert V.start_run(tmp_path / "r", {"kind": "vae", "args": {"lr": 0.1, "steps": 9}}) is None
    for other in ({"kind": "vae", "args": {"lr": 0.2, "steps": 5}},
                  {"kind": "denoiser", "args": config["args"]}):
        with pytest.raises(SystemExit) as error:
            V.start_run(tmp_path / "r", other)
        assert error.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
