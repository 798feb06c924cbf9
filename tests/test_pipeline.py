"""The demo end to end with real files, at fewer steps; kills; wrong input: each script as people run it."""
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

import prepare_data as P

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "prepare": ["prepare_data.py", "demo", "--demo_files", "26", "--shard_sources", "9"],
    "vae": ["train_vae.py", "demo", "--steps", "12", "--eval_every", "6", "--save_every", "3",
            "--warmup", "3"],
    "encode": ["train_vae.py", "demo", "--encode"],
    "captioner": ["caption.py", "demo", "--train", "--paste", "0.1", "--few", "--steps", "16",
                  "--eval_every", "8", "--save_every", "4", "--log_every", "4"],
    "caption": ["caption.py", "demo", "--sure", "0"],
    "dit": ["train_dit.py", "demo", "--steps", "16", "--eval_every", "8", "--save_every", "4"],
}


def start(folder, command):
    return subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def run(folder, command, status=0):
    """(stdout, stderr) of a command that must end with this status and without a traceback."""
    process = start(folder, command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"{command}: {process.returncode}\n{err[-3000:]}"
    assert "Traceback" not in err
    return out, err


def run_here(folder, command, status=0):
    """(stdout, stderr) of a command in this process, without the seconds that a new one imports."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out, (
            contextlib.redirect_stderr(io.StringIO())) as err, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            result = importlib.import_module(command[0][:-3]).main(command[1:]) or 0
        except SystemExit as end:
            result = end.code
    assert result == status, f"{command}: {result}\n{err.getvalue()[-3000:]}"
    return out.getvalue(), err.getvalue()


def log(folder, name):
    return [json.loads(line) for line in open(folder / "runs" / name / "log.jsonl")]


def digests(folder):
    """sha256 of what a run of the stages must leave, the same whatever happened on the way."""
    files = [p for pattern in ("data/demo/shard-*", "data/demo/*.json*", "runs/*/step-*/*.safetensors",
                               "runs/*/tokenizer.json") for p in sorted(folder.glob(pattern))]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which every stage has run, unbroken."""
    folder = tmp_path_factory.mktemp("demo")
    for command in STAGES.values():
        run_here(folder, command)
    return folder


def test_prepare_keeps_every_shot(demo):
    rows = P.open_dataset(demo / "data/demo")
    plan = {file["name"]: file for file in P.demo_files(26)}
    assert len(rows) >= 0.995 * sum(len(file["shots"]) for file in plan.values())
    captioned = [row for row in rows if any(c["source"] != "demo-captioner" for c in row["captions"])]
    assert 0.4 < len(captioned) / len(rows) < 0.6
    for row in rows[::97]:
        file = plan[row["source"]]
        assert (row["width"], row["height"]) == (file["width"], file["height"])
        assert abs(row["fps"] - file["fps"]) < 0.01 and row["split"] == file["split"]
        assert P.read_clip(demo / "data/demo", row).shape == (row["frames"], row["height"], row["width"], 3)


def test_the_autoencoder_learns_and_latents_name_it(demo):
    rows = [row for row in log(demo, "demo-vae") if "psnr" in row]
    assert rows[-1]["psnr"] > rows[0]["psnr"] - 0.1 and rows[-1]["psnr"] > 24
    config = json.loads((demo / "runs/demo-vae/config.json").read_text())
    assert len(config["latents_mean"]) == len(config["latents_std"]) == config["model"]["z_dim"]
    shards = sorted((demo / "data/demo").glob("shard-*.tar"))
    latents = sorted((demo / "data/demo").glob(f"shard-*.latents-{config['hash']}.safetensors"))
    assert len(latents) == len(shards) == 3
    from safetensors import safe_open
    with safe_open(latents[0], "np") as file:
        header = json.loads(file.metadata()["nanosora"])
        key, about = next(iter(header["clips"].items()))
        _, _, height, width = about["crop"]
        assert file.get_slice(key).get_shape() == [2 * config["model"]["z_dim"],
                                                   1 + (about["frames"] - 1) // 4, height // 8, width // 8]


def test_every_clip_has_a_caption(demo):
    rows = P.open_dataset(demo / "data/demo")
    assert all(row["captions"] for row in rows)
    assert {c["source"] for row in rows for c in row["captions"]} > {"demo-captioner"}
    losses = [row["loss"] for row in log(demo, "demo-captioner")]
    assert losses[-1] < 0.9 * losses[0]


def test_the_denoiser_learns_and_shows_it(demo):
    rows = log(demo, "demo")
    assert [row["held_out"] for row in rows if "held_out" in row][-1] < 1.6
    assert rows[-1]["step"] == 16 and all(np.isfinite(row["loss"]) for row in rows)
    for name in ("samples/step-000008.png", "samples/step-000016.png", "loss.png"):
        assert (demo / "runs/demo" / name).stat().st_size > 1000
    assert sorted(p.name for p in (demo / "runs/demo").glob("step-*"))[-1] == "step-000016"


def test_an_estimate_is_a_table_that_writes_nothing(demo):
    before = sorted(demo.rglob("*"))
    out, _ = run_here(demo, ["train_dit.py", "demo", "--run", "planned", "--estimate", "--steps",
                             "3600", "--price_per_hour", "2"])
    assert sorted(demo.rglob("*")) == before
    seconds = float(re.search(r"^a step +([\d.]+) s: .* TFLOP/s measured on", out, re.M)[1])
    hours, price = re.search(r"^3600 steps +([\d.]+) hours, ([\d.]+) in", out, re.M).groups()
    hours, price = float(hours), float(price)
    assert abs(hours - seconds) <= 0.01 and abs(price - 2 * hours) <= 0.02
    fits = [int(n) for n in re.findall(r"^\d+ GB hold +--row_tokens (\d+)$", out, re.M)]
    assert len(fits) == 4 and fits == sorted(fits) and fits[0] > 2048


def test_a_run_says_how_well_it_goes(demo):
    row = log(demo, "demo")[-1]
    assert len(row["loss_by_t"]) == len(row["held_out_by_t"]) == 4
    assert 0.9 < row["fullness"] <= 1 <= row["evenness"] < 2 and 0 < row["mfu"] < 1.5
    assert row["tokens_s"] > 0 and row["step_s"] > 0 and row["peak_mib"] > 100


def test_sample_writes_what_was_asked_for(demo):
    out, _ = run_here(demo, ["sample.py", "demo", "--prompt", "a red circle moves left", "--size",
                             "36x44", "--frames", "11", "--fps", "8", "--steps", "3"])
    path = demo / out.strip()
    assert path.suffix == ".mp4" and path.with_suffix(".png").exists()
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert stream.codec_context.name == "h264" and float(stream.average_rate) == 8
    assert np.stack(frames).shape == (11, 36, 44, 3)
    first = path.read_bytes()
    run(demo, ["sample.py", "demo", "--prompt", "a red circle moves left", "--size", "36x44",
               "--frames", "11", "--fps", "8", "--steps", "3"])
    assert path.read_bytes() == first


def test_eval_writes_its_shares(demo):
    run_here(demo, ["sample.py", "demo", "--eval", "demo", "--n_eval", "2", "--steps", "2"])
    result = json.loads((demo / "runs/demo/eval.json").read_text())
    assert set(result) == {"seen", "left_out"}
    for part in result.values():
        assert part["n"] == 2 and set(part) == {"n", "form", "colour", "direction", "all"}
        assert all(0 <= part[key] <= 1 for key in part if key != "n")


def test_finished_stages_end_at_once_and_change_nothing(demo):
    before = digests(demo)
    for command in STAGES.values():
        begun = time.time()
        run_here(demo, command)
        assert time.time() - begun < 20, command
    assert digests(demo) == before


def test_killed_at_any_time_each_stage_finishes_with_the_same_bytes(demo, tmp_path):
    """kill -9 of the whole process group at random moments of each stage, then the same command."""
    (tmp_path / "data").mkdir()
    os.symlink(demo / "data/demo-videos", tmp_path / "data/demo-videos")     # rendered once
    chance = random.Random(int(os.environ.get("KILL_SEED", "1")))
    for name, command in STAGES.items():
        process = start(tmp_path, command)
        time.sleep(chance.uniform(2.5, 5.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        run_here(tmp_path, command)
    assert digests(tmp_path) == digests(demo)


def test_sigterm_saves_and_leaves_with_143(demo):
    command = ["train_vae.py", "demo", "--run", "stopped", "--steps", "4000", "--log_every", "1"]
    process, path = start(demo, command), demo / "runs/stopped/log.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    saved = int(sorted((demo / "runs/stopped").glob("step-*"))[-1].name[5:])
    assert saved == max(row["step"] for row in log(demo, "stopped"))


@pytest.mark.parametrize("command, says", [
    (["prepare_data.py", "x", "--videos", "nowhere"], "nowhere"),
    (["train_vae.py", "nothing"], "nothing"),
    (["train_vae.py", "demo", "--lr", "-1"], "lr"),
    (["train_vae.py", "demo", "--batch", "9"], "batch"),
    (["train_vae.py", "demo", "--encode", "--vae", "demo"], "denoiser"),
    (["caption.py", "nothing", "--train"], "nothing"),
    (["caption.py", "demo", "--vlm", "demo-vae"], "vae"),
    (["train_dit.py", "nothing"], "nothing"),
    (["train_dit.py", "demo", "--run", "new", "--row_tokens", "16", "--batch_tokens", "16"], "row_tokens"),
    (["train_dit.py", "demo", "--batch_tokens", "1000"], "batch_tokens"),
    (["train_dit.py", "demo", "--model", "video-xxl"], "model"),
    (["sample.py", "demo-vae", "--prompt", "x"], "vae"),
    (["sample.py", "demo"], "prompt"),
    (["sample.py", "demo", "--prompt", "x", "--steps", "0"], "steps"),
    (["sample.py", "nothing", "--prompt", "x"], "nothing"),
])
def test_wrong_input_is_one_line_and_status_2(demo, command, says):
    lines = run_here(demo, command, status=2)[1].strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(command[0]) and says in lines[0]


def test_a_run_of_another_version_is_refused(demo, tmp_path):
    (tmp_path / "run").mkdir()
    config = json.loads((demo / "runs/demo/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**config, "format": 99}))
    _, err = run_here(demo, ["sample.py", str(tmp_path / "run"), "--prompt", "x"], status=2)
    assert "99" in err and len(err.strip().splitlines()) == 1


def test_docstring_commands_run(demo):
    """The quick look that each docstring promises, with a figure from each."""
    for script, name in (("train_vae.py", "psnr"), ("caption.py", "loss"), ("train_dit.py", "held_out")):
        command = re.search(rf"python ({script} demo [^#\n]*--run quick [^#\n]*?)(?:  |\n)",
                            (ROOT / script).read_text())[1].split()
        command += ["--few"] * (script == "caption.py")      # of a small demo
        begun = time.time()
        run(demo, command)
        assert time.time() - begun < 60
        assert name in log(demo, "quick")[-1]
        os.rename(demo / "runs/quick", demo / f"runs/quick-{script[:-3]}")


def readme_commands():
    """The commands in the fenced blocks of README.md and tests/README.md, split as a shell does; a
    block that begins with '# with published files' is left out, and so are pip and pytest."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "tests/README.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks if not block.startswith("# with published files\n")
             for line in block.splitlines()]
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    assert {words[0] for words in commands} <= {"python", "pip", "pytest"}
    return [words[1:] for words in commands if words[0] == "python"]


def shortened(command):
    """A command with fewer steps and less to look at: as STAGES has it where it is one of those."""
    script, name, *options = command
    for stage in STAGES.values():
        if stage[:len(command)] == command and not {"--train", "--encode"} & {*stage[len(command):]}:
            return stage
    few = ["--steps", "2"]
    training = [*few, "--eval_every", "2", "--save_every", "2", "--warmup", "1"]
    return command + {
        "prepare_data.py": [], "caption.py": ["--sure", "0"],
        "sample.py": few + ["--n_eval", "1"] * ("--eval" in options),
        "train_vae.py": [] if "--encode" in options else training + ["--batch", "1"],
        "train_dit.py": training + ["--row_tokens", "1024", "--batch_tokens", "1024"]}[script]


def test_every_command_of_the_readme_runs(demo, tmp_path, monkeypatch):
    """In the README's order, each as it stands there but for fewer steps; ~ is a folder with a few
    videos and a csv of their captions."""
    commands = readme_commands()
    stages = [stage for stage in STAGES.values() if stage in map(shortened, commands)]
    assert len(stages) == len(STAGES) and len(commands) > 25
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "videos").mkdir()
    for n, file in enumerate((demo / "data/demo-videos").glob("*.mp4")):
        if n < 8:
            os.symlink(file, tmp_path / "videos" / file.name)
    (tmp_path / "captions.csv").write_text("video,caption\n" + "".join(
        f"{file.name},a shape moves\n" for file in sorted((tmp_path / "videos").iterdir())))
    if not (demo / "tests").exists():
        shutil.copytree(ROOT / "tests/demo", demo / "tests/demo")
        shutil.copytree(ROOT / "tests/demo-vae", demo / "tests/demo-vae")
    for command in commands:
        run_here(demo, [os.path.expanduser(word) for word in shortened(command)])
    assert len(list((demo / "runs/mine/samples").glob("*.mp4"))) == 1


@pytest.mark.parametrize("script", ["prepare_data", "train_vae", "caption", "train_dit", "sample"])
def test_ctrl_c_while_packages_are_imported_ends_in_one_line(script, tmp_path):
    name = "av" if script == "prepare_data" else "torch"
    (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n1 / 0\n")
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "demo"], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, f"\n{script}.py: stopped\n")
