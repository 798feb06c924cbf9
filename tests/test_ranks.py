"""Two gloo ranks, real processes: losses and weights as on one; kills, SIGTERM, too few rows."""
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prepare_data
import train_dit
import train_vae

ROOT = Path(__file__).resolve().parents[1]
OFTEN = ["--log_every", "1", "--save_every", "2", "--keep", "99"]
VAE = ["train_vae.py", "demo", "--steps", "3", "--eval_every", "3", "--size", "16", "--frames", "5",
       "--device", "cpu", *OFTEN]
DIT = ["train_dit.py", "demo", "--steps", "6", "--eval_every", "6", "--row_tokens", "256",
       "--batch_tokens", "768", "--device", "cpu", *OFTEN]              # three rows: the ranks get two and one


def alone(folder, command):
    """One command on one rank, in this process: to start another takes seconds."""
    stage = {each.__name__: each for each in (prepare_data, train_dit, train_vae)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage[Path(command[0]).stem].main(command[1:])


def start(folder, command):
    """The processes of one command on two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
               WORLD_SIZE="2")
    return [subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], cwd=folder,
                             env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)), text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for rank in range(2)]


def end(processes, status=0):
    """Their stderr; all must end with this status and none with a traceback."""
    errors = [process.communicate(timeout=120)[1] for process in processes]
    for process, error in zip(processes, errors):
        assert process.returncode == status and "Traceback" not in error, error[-3000:]
    return errors


def rows(run):
    return [json.loads(line) for line in open(run / "log.jsonl")]


def wait_for(processes, is_there):
    while not is_there():
        time.sleep(0.01)
        assert all(process.poll() is None for process in processes), end(processes)


def digests(run):
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(run.glob("step-*/*"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small data set and its latents, by an autoencoder that one rank trained."""
    folder = tmp_path_factory.mktemp("ranks")
    for command in (["prepare_data.py", "demo", "--demo_files", "12"], VAE,
                    ["train_vae.py", "demo", "--encode"]):
        alone(folder, command)
    return folder


@pytest.fixture(scope="module")
def pair(small):
    """The run of the denoiser on two ranks, unbroken."""
    end(start(small, [*DIT, "--run", "pair"]))
    return small / "runs/pair"


def check_same(one, two, figures):
    """Two runs' figures at every step to 1e-4, gradients' norms and last weights to 1e-3: where a
    gradient is only rounding, as of outputs that begin at zero, Muon makes a step of it."""
    flat = lambda x: [y or 0.0 for y in (x if isinstance(x, list) else [x])]     # None: no clip
    for a, b in zip(rows(one), rows(two), strict=True):
        for name in (*figures, "grad_norm"):
            near = pytest.approx(flat(a[name]), rel=1e-3 if name == "grad_norm" else 1e-4)
            assert flat(b[name]) == near, (a["step"], name)
    for step, most in ((2, 1e-4), (rows(one)[-1]["step"], 1e-3)):
        a, b = (load_file(run / f"step-{step:06d}/model.safetensors") for run in (one, two))
        away = torch.stack([(a[name] - b[name]).norm() for name in a]).norm()
        assert away <= most * torch.stack([x.norm() for x in a.values()]).norm(), step


def test_two_ranks_train_the_denoiser_as_one(small, pair):
    alone(small, [*DIT, "--run", "alone"])
    check_same(small / "runs/alone", pair, ["loss", "loss_by_t", "fullness", "evenness"])


def test_two_ranks_train_the_autoencoder_as_one(small):
    end(start(small, [*VAE, "--run", "vae-pair"]))
    check_same(small / "runs/demo-vae", small / "runs/vae-pair", ["l1", "mse", "latent"])


def test_a_rank_of_stills_alone_has_no_gradients_over_time(small):
    """It ended in gloo's abort: its flat buffer was shorter than the other rank's."""
    more = ["--stills", "0.3", "--batch", "2", "--model", "vae-xxs"]
    alone(small, [*VAE, *more, "--run", "stills-alone"])
    end(start(small, [*VAE, *more, "--run", "stills-pair"]))
    check_same(small / "runs/stills-alone", small / "runs/stills-pair", ["l1", "mse", "latent"])


def test_two_ranks_follow_one_codebook_and_discriminator(small):
    """The gradient's norm is no figure here: the discriminator's pull is scaled by it."""
    more = ["--bottleneck", "vq", "--codes", "32", "--gan", "0.1", "--gan_start", "2"]
    alone(small, [*VAE, *more, "--run", "vq-alone"])
    end(start(small, [*VAE, *more, "--run", "vq-pair"]))
    check_same(small / "runs/vq-alone", small / "runs/vq-pair", ["l1", "mse", "latent"])


@pytest.mark.slow
def test_two_ranks_train_the_prior_as_one(small):
    """On real codes; dropout is a row's own, on whatever rank."""
    prior = ["train_dit.py", "demo", "--vae", "demo-vq", "--model", "gpt-xs", "--steps", "4",
             "--eval_every", "4", "--row_tokens", "256", "--batch_tokens", "768", *OFTEN]
    for command in (["train_vae.py", "demo", "--run", "demo-vq", "--bottleneck", "vq", "--codes",
                     "64", "--steps", "4", "--eval_every", "4"],
                    ["train_vae.py", "demo", "--encode", "--vae", "demo-vq"],
                    [*prior, "--run", "prior"]):
        alone(small, command)
    end(start(small, [*prior, "--run", "prior-pair"]))
    check_same(small / "runs/prior", small / "runs/prior-pair", ["loss", "loss_by_t"])


@pytest.mark.slow
def test_ranks_killed_and_started_again_go_on_with_the_same_bits(small, pair):
    command, run = [*DIT, "--run", "killed"], small / "runs/killed"
    processes = start(small, command)
    wait_for(processes, (run / "step-000002").exists)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (run / "step-000006").exists()
    end(start(small, command))
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(pair)]
    assert digests(run) == digests(pair)


@pytest.mark.slow
def test_sigterm_at_one_rank_saves_and_both_leave_with_143(small):
    command, run = [*DIT, "--run", "stopped", "--steps", "4000"], small / "runs/stopped"
    processes = start(small, command)
    wait_for(processes, (run / "step-000002").exists)
    processes[1].send_signal(signal.SIGTERM)
    end(processes, 143)
    assert max(run.glob("step-*")).name == f"step-{rows(run)[-1]['step']:06d}"


def test_fewer_rows_than_ranks_are_refused(small):
    for error in end(start(small, [*DIT, "--run", "few", "--batch_tokens", "256"]), 2):
        assert len(error.splitlines()) == 1 and "--batch_tokens" in error and "2 ranks" in error
    assert not (small / "runs/few").exists()


def test_a_rank_that_dies_ends_the_other_in_one_line(small):
    """6 C: 25 lines of traceback before."""
    command, run = [*DIT, "--run", "dies", "--steps", "4000"], small / "runs/dies"
    processes = start(small, command)
    wait_for(processes, (run / "step-000002").exists)
    processes[0].kill()
    lines = processes[1].communicate(timeout=60)[1].splitlines()
    assert processes[1].returncode == 2 and lines[-1].startswith(
        "train_dit.py: rank 1: another rank ended") and len(lines) == 1, lines
    processes[0].communicate()


def test_ranks_wait_without_a_limit_and_say_for_whom(monkeypatch, capsys):
    """6 C: ranks whose shards differ by more than 30 minutes died at the barrier; a stopped rank
    was waited for without a word."""
    class Store(dict):
        set, get = dict.__setitem__, dict.__getitem__

        def check(self, keys):
            return all(key in self for key in keys)

    given = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: given.update(k))
    monkeypatch.setattr(train_vae.WATCH, "start", lambda *a: None)
    monkeypatch.setattr(train_vae.WATCH, "meet", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    train_vae.setup(train_vae.parse_options(["x", "--device", "cpu"]))
    assert given["timeout"].days > 30

    monkeypatch.setattr(train_vae, "PATIENCE", 0.3)
    watch, store = train_vae.Watch(), Store({"waits/1": b"0", "waits/2": b"1"})
    watch.start(0, 3)
    meeting = threading.Thread(target=watch.exchange, args=(store,))
    meeting.start()
    with watch:
        time.sleep(2.5)
    watch.over.set()
    meeting.join()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "rank 0 has waited 0.3 s for rank 1, which is busy" in said[0]


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(small):
    """6 C: they went on, and the same command trained beside them."""
    command, run = [*DIT, "--run", "orphans", "--steps", "4000"], small / "runs/orphans"
    going = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
                              "2", "--", ROOT / command[0], *command[1:]], cwd=small,
                             env=dict(os.environ, OMP_NUM_THREADS="1"), text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (run / "step-000002").exists():
        time.sleep(0.1)
        assert going.poll() is None
    ranks = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
             if path.read_text().rpartition(")")[2].split()[1] == str(going.pid)]
    going.kill()
    going.communicate()
    since = time.time()
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.1)
        assert time.time() - since < 60
    assert len(ranks) == 2 and not (run / ".lock").exists()
