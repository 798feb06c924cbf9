"""`python train_dit.py bench`, `train_vae.py bench` and `sample.py bench`: ours beside diffusers',
equal weights, in one run."""
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiTTransformer2DModel, WanTransformer3DModel

import sample as S
import train_dit as D
import train_vae as V
from kernels.memory import keep_memory
from kernels.optim import MuonAdamW


def wan(layers, dim, heads):
    """(diffusers' WanTransformer3DModel, our DiT of the same weights)."""
    peer = WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=dim // heads,
                                 ffn_dim=4 * dim, num_layers=layers, text_dim=256, in_channels=16,
                                 out_channels=16)
    shake(peer)
    config = dict(num_layers=layers, num_attention_heads=heads, ffn_dim=4 * dim)
    options = D.wan_options(peer.state_dict(), config, "diffusers")
    ours = D.DiT(**options)
    ours.load_state_dict(D.from_published(peer.state_dict(), "diffusers", ours, "diffusers"))
    return peer, ours


def dit(layers, dim, heads, side):
    """(diffusers' DiTTransformer2DModel, our DiT of the same weights)."""
    peer = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=dim // heads,
                                 in_channels=4, out_channels=8, num_layers=layers,
                                 sample_size=side, norm_eps=1e-6).eval()
    shake(peer)
    for block in peer.transformer_blocks:                # one embedder for all, as in DiT's code
        block.norm1.emb = peer.transformer_blocks[0].norm1.emb
    peer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 0
    ours = D.DiT(4, dim, layers, heads, (1, 2, 2), out_channels=8, classes=1001, own_table=True,
               positions="sincos", grid=(side // 2, side // 2))
    theirs, state = peer.state_dict(), {"pos_embed": ours.pos_embed}
    names = [(r"pos_embed.proj", "embed"), (r"proj_out_1", "head_modulation"),
             (r"proj_out_2", "head"),
             (r"transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "time.0"),
             (r"transformer_blocks.0.norm1.emb.timestep_embedder.linear_2", "time.2"),
             (r"transformer_blocks.0.norm1.emb.class_embedder.embedding_table", "classes")]
    for n in range(layers):
        block = f"transformer_blocks.{n}"
        names += [(f"{block}.norm1.linear", f"blocks.{n}.modulation"),
                  (f"{block}.attn1.to_out.0", f"blocks.{n}.attn.out"),
                  (f"{block}.ff.net.0.proj", f"blocks.{n}.up"),
                  (f"{block}.ff.net.2", f"blocks.{n}.down")]
        for kind in ("weight", "bias"):
            state[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(
                [theirs[f"{block}.attn1.to_{part}.{kind}"] for part in "qkv"])
    for name, own in names:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in theirs:
                how = "conv" if (own, kind) == ("embed", "weight") else own if own == "head" else ""
                state[f"{own}.{kind}"] = D.relayout(theirs[f"{name}.{kind}"], how, ours.patch)
    ours.load_state_dict(state)
    return peer, ours


def shake(model):
    """Random weights of a trained model's size, none of them at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.02 if p.dim() > 1 else 0.1)
                    + (p.mean() if p.dim() < 2 else 0))


def bench_case(side, kind, layers, dim, heads, shapes, device):
    """(the model of `side`, its step's forward: a function that returns the outputs, one a clip).
    Theirs takes the clips padded to the largest, or each alone."""
    torch.manual_seed(1)
    is_wan = kind == "wan"
    with torch.device(device):
        both = wan(layers, dim, heads) if is_wan else dit(layers, dim, heads, shapes[0][2])
    model = both[side == "ours"].to(device)
    channels = 16 if is_wan else 4
    clips = [torch.randn(channels, *shape).to(device) for shape in shapes]
    largest = [max(sides) for sides in zip(*shapes)]
    padded = torch.zeros(len(clips), channels, *largest, device=device)
    for b, clip in enumerate(clips):
        padded[(b, slice(None), *(slice(n) for n in clip.shape[1:]))] = clip
    times = torch.randint(0, 1000, (len(clips),)).to(device)
    texts = [torch.randn(20 + b, 256).to(device) for b in range(len(clips))]
    row = D.lay_out([tuple(clip.shape) for clip in clips], [None] * len(clips),
                    [[]] * len(clips), None, (1, 2, 2)).to(device)
    row.labels = times
    packed, row.cu_text = D.fill_texts(texts) if is_wan else (None, None)

    def theirs(alone=False):
        if not is_wan:
            return list(model(padded[:, :, 0], times, class_labels=times).sample[:, :, None])
        if not alone:
            return list(model(padded, times, packed.view(len(clips), -1, 256)).sample)
        return [model(clip[None], t[None], text[None]).sample[0] for clip, t, text
                in zip(clips, times, packed.view(len(clips), -1, 256))]

    def mine(alone=False):
        out = model(D.patchify(clips, model.patch), times.float(), row, packed)
        return D.unpatchify(out, [(model.out_channels, *shape) for shape in shapes], model.patch)

    return model, mine if side == "ours" else theirs


def step_seconds(step, repeats):
    """The seconds of training steps, after three to warm up."""
    times = []
    for _ in range(3 + repeats):
        sync()
        began = time.perf_counter()
        step()
        sync()
        times.append(time.perf_counter() - began)
    return times[3:]


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


ROUNDS = "processes of each, by turns (%(default)s)"


def alone(function, side, *rest):
    """What function(side, *rest) of this file returns, in a process of its own: theirs has memory as
    Python starts, ours as our scripts have it."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
           "THP_MEM_ALLOC_ENABLE": str(int(side == "ours" and function is coder_side))}
    done = subprocess.run([sys.executable, __file__, function.__name__, json.dumps([side, *rest])],
                          env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def by_turns(rounds, function, *rest):
    """[(median seconds, most MiB) of theirs, of ours]: each round a process of either."""
    result = {"theirs": [], "ours": []}
    for _ in range(rounds):
        for side, rows in result.items():
            rows.append(alone(function, side, *rest))
    return [(float(np.median([s for times, _ in rows for s in times])), max(mib for _, mib in rows))
            for rows in result.values()]


def distance(home):
    """The largest difference of theirs.npy and ours.npy in a folder, as a share of theirs' largest."""
    theirs, ours = (np.load(f"{home}/{side}.npy") for side in ("theirs", "ours"))
    return np.abs(theirs - ours).max() / np.abs(theirs).max()


MIXED = [(4, 8, 8), (4, 16, 12), *((frames, 16, 16) for frames in (5, 7, 9, 11, 13, 16))]
STEPS = {"cpu": [("DiT-S/2, 32 x 256 tokens", "dit", 12, 384, 6, [(1, 32, 32)] * 32),
                 ("Wan, 6 x 384, 8 x 512 tokens", "wan", 6, 384, 6, [(8, 16, 16)] * 8),
                 ("Wan, 6 x 384, 2 x 2048 tokens", "wan", 6, 384, 6, [(8, 32, 32)] * 2),
                 ("Wan, 6 x 384, 64 to 1024 tokens", "wan", 6, 384, 6, MIXED)],
         "cuda": [("DiT-XL/2, 128 x 256 tokens", "dit", 28, 1152, 16, [(1, 32, 32)] * 128),
                  ("DiT-XL/2, 8 x 4096 tokens", "dit", 28, 1152, 16, [(1, 128, 128)] * 8),
                  ("DiT-XL/2, 2 x 16384 tokens", "dit", 28, 1152, 16, [(1, 256, 256)] * 2),
                  ("Wan, 12 x 1536, 64 to 1024 tokens", "wan", 12, 1536, 12, MIXED * 8)]}


def step_side(side, i, dtype, device, repeats, home):
    """(Seconds of training steps of STEPS[device][i], the most MiB of GPU memory that they take); what
    it puts out goes to home/SIDE.npy. On a GPU either's blocks are compiled."""
    is_cuda, name = device != "cpu", STEPS[device][i][1]
    is_half = dtype == "bf16" and (side == "ours" or is_cuda)            # as one would run it
    precision = functools.partial(torch.autocast, torch.device(device).type, torch.bfloat16, is_half)
    model, forward = bench_case(side, *STEPS[device][i][1:], device)
    with torch.no_grad(), precision():
        outs = forward(alone=name == "wan")
    outs = torch.cat([out.flatten() for out in outs]).float()
    np.save(f"{home}/{side}.npy", outs.cpu().numpy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=is_cuda or None)
    for module in model.children() if is_cuda else ():
        for block in module if isinstance(module, torch.nn.ModuleList) else ():
            block.compile()

    def step():
        with precision():
            outs = forward()
        sum(out.float().square().mean() for out in outs).backward()
        optimizer.step()
        optimizer.zero_grad()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    return step_seconds(step, repeats), torch.cuda.max_memory_allocated() / 2**20 if is_cuda else 0


def bench(argv):
    """Prints a table: a step of ours and of diffusers' with equal weights, in one run."""
    parser = V.option_parser("A training step beside diffusers' (which must be installed)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"],
                        help="of ours, on a GPU of both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=STEPS)
    parser.add_argument("--repeats", type=V.number(int, 1), default=5,
                        help="steps of each (%(default)s)")
    parser.add_argument("--rounds", type=V.number(int, 1), default=1, help=ROUNDS)
    args = parser.parse_args(argv)
    is_cuda = args.device != "cpu"
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {args.device}, "
          f"{torch.get_num_threads()} threads; theirs "
          f"{args.dtype if is_cuda else 'fp32'}, ours {args.dtype}")
    print(f"{'step':34} {'theirs s':>9} {'ours s':>9} {'ratio':>6} {'difference':>11}"
          + " theirs MiB ours MiB" * is_cuda)
    with tempfile.TemporaryDirectory() as home:
        for i, (name, *_) in enumerate(STEPS[args.device]):
            (a, m), (b, n) = by_turns(args.rounds, step_side, i, args.dtype, args.device,
                                      args.repeats, home)
            print(f"{name:34} {a:9.3f} {b:9.3f} {b / a:6.2f} {distance(home):11.1e}"
                  + f" {m:10.0f} {n:8.0f}" * is_cuda, flush=True)


# ---- autoencoders


def autoencoder(dim, is_ours):
    """diffusers' AutoencoderKLWan of this width, or ours with the same weights."""
    torch.manual_seed(0)
    peer = AutoencoderKLWan(base_dim=dim, z_dim=16).eval().requires_grad_(False)
    if not is_ours:
        return peer
    options, layout, _, _ = V.wan_options(peer.state_dict(), dict(peer.config))
    ours = V.Autoencoder(**options).eval().requires_grad_(False)
    V.load_names(ours, V.published_names(ours, layout), peer.state_dict(), "diffusers")
    return ours


def memory(field):
    """MiB of VmRSS (held now) or VmHWM (the most so far) of this process."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def settled():
    """MiB held once what was freed is given back to the system; the high water starts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    return memory("VmRSS")


def coder_side(side, dim, shape, name, device, repeats, home):
    """(Seconds of calls, peak MiB above what was held before); the output goes to home/SIDE.npy."""
    is_ours = side == "ours"
    torch.set_num_threads(2)
    model = autoencoder(dim, is_ours).to(device)
    torch.manual_seed(1)
    T, H, W = shape
    video = (torch.rand(1, 3, T, H, W) * 2 - 1).to(device)
    z = torch.randn(1, 16, 1 + (T - 1) // 4, H // 8, W // 8).to(device)
    calls = {"encode": lambda: model.encode(video)[0] if is_ours else
             model.encode(video).latent_dist.mean,
             "decode": lambda: model.decode(z).clamp(-1, 1) if is_ours else model.decode(z).sample}
    before, times = settled() if device == "cpu" else torch.cuda.memory_allocated() / 2**20, []
    with torch.no_grad():
        for _ in range(1 + repeats):
            sync()
            began = time.perf_counter()
            out = calls[name]()
            sync()
            times.append(time.perf_counter() - began)
    peak = memory("VmHWM") - before
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**20 - before
    np.save(f"{home}/{side}.npy", out.cpu().numpy())
    return times[1:], peak


class Theirs(torch.nn.Module):
    """diffusers' AutoencoderKLWan as large as our vae-xs, for the same latents, with our calls."""
    stride, time_stride, first, z_dim = 8, 4, 1, 24
    bottleneck, n_codes, linear = None, 0, None
    encode = V.Autoencoder.encode

    def __init__(self):
        super().__init__()
        self.peer = AutoencoderKLWan(base_dim=16, z_dim=self.z_dim, num_res_blocks=1)

    def features(self, video, state=None):
        return self.peer.encode(video).latent_dist.parameters

    def decode(self, z):
        return self.peer.decode(z).sample


def train_on_footage(model, optimizer, clips, splits, args, seed):
    """(held-out PSNR in dB, a mean over clips; steps) after a plain loop of args.minutes: L1 + L2 +
    1e-5 KL on windows of 9 frames of 32 x 32 px, the learning rate warmed up and let down by the
    clock. Our model's linear code is fitted within that time."""
    rows, held_out = splits
    stream, began = V.Stream(rows, seed), time.perf_counter()
    rate = SimpleNamespace(lr=args.lr, warmup=50, steps=1000, schedule="cosine")

    def window(row, *purpose):
        return V.draw_window(clips(row), V.rng(seed, *purpose, row["key"]), 9, 32, model)

    def batch(step):
        picked = stream.take(8 * step, 8)
        videos = [window(row, "window", step) for row in picked]
        shapes = [(model.z_dim, 1 + (T - 1) // 4, H // 8, W // 8)
                  for _, T, H, W in (video.shape for video in videos)]
        keys = [row["key"] for row in picked]
        return videos, V.gaussians("posterior", seed, step, keys, shapes)

    if model.linear is not None:
        model.linear.fit([window(row, "fit") for row in rows])
    for step, (videos, noises) in V.prefetch(batch, 0, 10**6):
        share = (time.perf_counter() - began) / (60 * args.minutes)
        if share >= 1:
            break
        terms = V.losses(V.reconstruct(model, videos, noises))
        ((terms["l1"] + terms["mse"] + 1e-5 * terms["latent"]) / len(videos)).backward()
        V.take_step(model, optimizer, V.lr_at(1000 * share, rate))
    with torch.no_grad():
        bank = [x[None, :, :17] for x in V.held_out_bank(model, clips, held_out, 0, 24)[1]]
        result = [V.psnr(model.decode(model.encode(x)[0]), x).item() for x in bank]
    return float(np.mean(result)), step


def muon(model):
    return MuonAdamW(model, plain=("to_pixels", "linear", "conv_out"))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)


SIDES = {"ours": (lambda: V.Autoencoder(**V.MODELS["vae-xs"]), muon), "theirs": (Theirs, adamw),
         "theirs-muon": (Theirs, muon)}


def bench_footage(args):
    """Prints held-out PSNR of real footage: our model and optimizer, and diffusers' model with
    AdamW and with our optimizer, for equal minutes, batches, losses and learning rates."""
    keep_memory()
    torch.set_num_threads(2)
    folder, result = V.dataset_dir(args.footage), {side: [] for side in args.sides}
    rows, clips = V.open_dataset(folder), V.ClipCache(folder)
    splits = V.split_rows(rows, args.footage)
    for row in rows:                                     # decoding video is not what is compared
        clips(row)
    print(f"{folder}: {len(splits[0])} clips to learn from, {len(splits[1])} held out; "
          f"{args.minutes:g} min each, lr {args.lr:g}, torch {torch.__version__}, 2 threads")
    for seed in args.seeds:
        for side in args.sides:
            build, optimizer = SIDES[side]
            torch.manual_seed(seed)
            model = build()
            score, steps = train_on_footage(model, optimizer(model), clips, splits, args, seed)
            result[side].append(score)
            size = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"seed {seed}, {side:12} {size:.2f}M parameters, {steps:5d} steps: {score:.2f} dB",
                  flush=True)
    for side, scores in result.items():
        print(f"{side:12} {np.mean(scores):.2f} dB, {min(scores):.2f} to {max(scores):.2f}")


def bench_autoencoder(argv):
    """Prints a table: encoding and decoding, ours and diffusers', each in a process of its own; with
    --footage what both learn in equal time."""
    parser = V.option_parser("Autoencoders beside diffusers' (which must be installed)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=V.number(int, 1), default=3,
                        help="calls of each (%(default)s)")
    parser.add_argument("--rounds", type=V.number(int, 1), default=1, help=ROUNDS)
    parser.add_argument("--dims", type=V.number(int, 8), nargs="+", default=[32, 96],
                        help="base widths (%(default)s)")
    parser.add_argument("--footage", help="data set to learn from, in the place of the table (none)")
    parser.add_argument("--minutes", type=V.number(float, 0), default=1.0, help="(%(default)s)")
    parser.add_argument("--seeds", type=V.number(int, 0), nargs="+", default=[0, 1, 2],
                        help="(%(default)s)")
    parser.add_argument("--lr", type=V.number(float, 0, 1), default=4e-3, help="(%(default)s)")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES), help="(all)")
    args = parser.parse_args(argv)
    if args.footage:
        return bench_footage(args)
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {args.device}, 2 threads, "
          "fp32")
    print(f"{'autoencoder':34} {'theirs s':>9} {'ours s':>8} {'ratio':>6} {'theirs MiB':>11} "
          f"{'ours MiB':>9} {'ratio':>6} {'difference':>11}")
    cases = [(dim, shape, name) for dim in args.dims for shape in ((17, 128, 128), (33, 192, 320))
             for name in ("encode", "decode")]
    with tempfile.TemporaryDirectory() as home:
        for dim, shape, name in cases:
            (a, before), (b, after) = by_turns(args.rounds, coder_side, dim, shape, name,
                                               args.device, args.repeats, home)
            title = f"dim {dim}, {' x '.join(map(str, shape))}, {name}"
            print(f"{title:34} {a:9.3f} {b:8.3f} {b / a:6.2f} {before:11.0f} {after:9.0f} "
                  f"{after / before:6.2f} {distance(home):11.1e}", flush=True)


# ---- `python sample.py bench`: from noise to frames beside diffusers' WanPipeline, equal weights

VIDEOS = [(17, 128, 128), (81, 64, 64)]          # frames, height, width


def texts():
    """Embeddings of a prompt and of what it is guided away from."""
    return [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (30, 120)]


def save_pipeline(folder):
    """A Wan folder as diffusers writes it: 6 layers of width 384, an autoencoder of width 32."""
    wan(6, 384, 6)[0].save_pretrained(folder / "transformer")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=32, z_dim=16).save_pretrained(folder / "vae")
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
            folder / "scheduler")


def our_pipeline(folder, video, device, dtype):
    frames, height, width = video
    args = S.parse_options([str(folder), "--prompt", "x", "--frames", str(frames), "--size",
                            f"{height}x{width}", "--steps", "8", "--negative", "", "--device", device,
                            "--dtype", dtype])
    args.quiet = True
    _, _, device = V.setup(args)
    sampler = S.Sampler(args, device)
    sampler.part.openers["text"] = lambda: lambda prompt: texts()[not prompt].to(device)
    request = S.request_of(args, {"prompt": "x"})
    return lambda: np.stack(list(sampler.frames(sampler([request])[0])))


def their_pipeline(folder, video, device, dtype):
    frames, height, width = video
    part = {"transformer": WanTransformer3DModel, "vae": diffusers.AutoencoderKLWan,
            "scheduler": diffusers.UniPCMultistepScheduler}
    parts = {name: kind.from_pretrained(folder / name) for name, kind in part.items()}
    if dtype == "bf16":                          # as the model cards have it: the autoencoder float32
        parts["transformer"] = parts["transformer"].to(torch.bfloat16)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, **parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    shape = 16, 1 + (frames - 1) // 4, height // 8, width // 8
    noise = V.gaussians("sample", 0, 0, ["x"], [shape])[0][None].to(device)
    told, other = (D.fill_texts([text])[0][None].to(device) for text in texts())

    def run():
        out = pipe(prompt_embeds=told, negative_prompt_embeds=other, latents=noise, height=height,
                   width=width, num_frames=frames, num_inference_steps=8, output_type="np").frames[0]
        return (255 * out).round().astype(np.uint8)
    return run


def sampling_side(side, folder, video, device, dtype, repeats):
    """(Seconds of each run but the first, MiB of the first run beyond the loaded models)."""
    folder = Path(folder)
    run = {"ours": our_pipeline, "theirs": their_pipeline}[side](folder, video, device, dtype)
    is_cuda, before, times = device == "cuda", settled(), []
    if is_cuda:
        before = torch.cuda.memory_allocated() / 2**20
    np.save(folder / f"{side}.npy", run())
    most = torch.cuda.max_memory_allocated() / 2**20 if is_cuda else memory("VmHWM")
    for _ in range(repeats):
        sync()
        began = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - began)
    return times, most - before


def bench_sampling(argv):
    """Prints a table: seconds and memory of a video, ours and diffusers', each in its own process."""
    parser = V.option_parser("Sampling beside diffusers' WanPipeline (which must be installed)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the denoisers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=V.number(int, 1), default=3, help="(%(default)s)")
    parser.add_argument("--rounds", type=V.number(int, 1), default=2, help=ROUNDS)
    args = parser.parse_args(argv)
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {args.device}, {args.dtype}, "
          f"{torch.get_num_threads()} threads; 8 steps of UniPC, guidance 5")
    print(f"{'video':24} {'theirs s':>9} {'ours s':>8} {'ratio':>6} {'theirs MiB':>11} {'ours MiB':>9} "
          f"{'ratio':>6} {'levels':>7}")
    with tempfile.TemporaryDirectory() as home:
        save_pipeline(Path(home))
        for video in VIDEOS:
            (a, m), (b, n) = by_turns(args.rounds, sampling_side, home, video, args.device,
                                      args.dtype, args.repeats)
            away = np.abs(np.load(f"{home}/ours.npy").astype(int) - np.load(f"{home}/theirs.npy")).max()
            print(f"{'{} frames of {} x {}'.format(*video):24} {a:9.2f} {b:8.2f} {b / a:6.2f} "
                  f"{m:11.0f} {n:9.0f} {n / m:6.2f} {away:7d}", flush=True)


if __name__ == "__main__":
    told = json.loads(sys.argv[2])
    if told[0] == "ours":
        keep_memory(coding=sys.argv[1] == "coder_side")
    print(json.dumps(globals()[sys.argv[1]](*told)))
