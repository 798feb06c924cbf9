"""Random legal configurations of published denoisers, autoencoders, schedulers and pipelines, ours
beside diffusers' with equal weights. Not in the suite: it needs diffusers and transformers.

    python tests/differential_dit.py [--draws 40] [--seed 0] [--only wan vae kl dit scheduler ddim t2v i2v]

Prints a row a family: draws that are equal, refused (by what words) and wrong. Folders are saved by
diffusers itself, some with half of the precision, in shards, without what equals its default."""
import argparse
import contextlib
import inspect
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample as S  # noqa: E402
import train_dit as D  # noqa: E402
import train_vae as V  # noqa: E402
from peers import dit  # noqa: E402


def pick(r, *of):
    return of[r.integers(len(of))]


def shaken(model, r):
    """Random weights of a trained model's size."""
    torch.manual_seed(int(r.integers(2**31)))
    for p in model.parameters():
        p.data.copy_(torch.randn_like(p) * (0.3 / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1)
                     + (p.data.mean() if p.dim() < 2 or p.numel() == len(p) else 0))
    return model.eval().requires_grad_(False)


def saved(model, folder, r):
    """Saves a model in a way of several; it then holds what was saved, in float32."""
    dtype = pick(r, torch.float32, torch.float32, torch.bfloat16, torch.float16)
    model.to(dtype).save_pretrained(folder, safe_serialization=bool(r.integers(4)), variant=pick(
        r, None, None, "fp16"), max_shard_size=pick(r, "10GB", "200KB"))
    leave_out(folder / "config.json", type(model), r)
    return model.float()


def leave_out(path, kind, r):
    """Half of the files lose what equals the class's default."""
    config = json.loads(path.read_text())
    if r.integers(2):
        usual = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
        config = {k: v for k, v in config.items() if k not in usual or v != (
            list(usual[k]) if isinstance(usual[k], tuple) else usual[k])}
    path.write_text(json.dumps(config))


def away(ours, theirs):
    """The largest difference as a share of the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()


def wan_config(r, channels=None, image=False):
    heads, width = int(r.integers(1, 4)), 2 * int(r.integers(3, 17))
    channels = channels or int(r.integers(1, 9))
    dim = heads * width
    more = dict(image_dim=int(r.integers(4, 40)), added_kv_proj_dim=dim) if image else {}
    return dict(num_attention_heads=heads, attention_head_dim=width, in_channels=channels,
                out_channels=channels, ffn_dim=int(r.integers(8, 99)), freq_dim=2 * int(r.integers(4, 40)),
                text_dim=int(r.integers(4, 40)), num_layers=int(r.integers(1, 4)), patch_size=pick(
                    r, (1, 2, 2), (1, 2, 2), (1, 1, 1), (1, 2, 1)), **more)


def wan(r, home):
    config = wan_config(r, image=bool(r.integers(3) == 0))
    if config.get("image_dim"):
        config["in_channels"] = 2 * config["out_channels"] + 4
        if r.integers(2):
            config["pos_embed_seq_len"] = 10
    peer = saved(shaken(diffusers.WanTransformer3DModel(**config), r), home, r)
    model, layout, _ = D.load_published(home)
    shape = config["in_channels"], int(r.integers(1, 4)), *(2 * r.integers(1, 4, 2))
    x, text = torch.randn(shape), torch.randn(int(r.integers(1, 30)), config["text_dim"])
    t = torch.tensor(float(r.integers(1000)))
    n = config.get("pos_embed_seq_len") and 10 or 7
    image = torch.randn(n, config["image_dim"]) if config.get("image_dim") else None
    row = D.lay_out([shape], [None], [[]], None, model.patch)
    packed, row.cu_text = D.fill_texts([text])
    if image is not None:
        row.cu_image = torch.tensor([0, n], dtype=torch.int32)
    with torch.no_grad():
        out = model(D.patchify([x], model.patch), t[None], row, packed, image)
        ours = D.unpatchify(out, [(config["out_channels"], *shape[1:])], model.patch)[0]
        # two images of 5 tokens each are one row of 10 in the network: diffusers' own view of them
        their = peer(x[None], t[None], packed[None], None if image is None else (
            image.view(2, 5, -1) if n == 10 else image[None])).sample[0]
    return away(ours, their)


def vae(r, home):
    n, is_22 = int(r.integers(3, 5)), bool(r.integers(3) == 0)
    z, base = int(r.integers(1, 9)), int(r.integers(1, 4)) * (4 if is_22 else 2)
    mults = sorted(int(2 ** r.integers(0, 3)) for _ in range(n))
    config = dict(base_dim=base, z_dim=z, dim_mult=mults, num_res_blocks=int(r.integers(1, 3)),
                  temperal_downsample=r.permutation([True, True, False][:n - 1]).tolist(),
                  latents_mean=r.normal(size=z).round(3).tolist(),
                  latents_std=(0.5 + r.random(z)).round(3).tolist())
    if is_22:
        config |= dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, dim_mult=[1, 2, 4, 4],
                       temperal_downsample=[False, True, True], decoder_base_dim=base * int(r.integers(1, 3)),
                       scale_factor_spatial=16)
    peer = saved(shaken(diffusers.AutoencoderKLWan(**config), r), home, r)
    model, about = V.load_published(home)
    T, side = 1 + model.time_stride * int(r.integers(0, 3)), model.stride * int(r.integers(1, 4))
    video = torch.randn(1, 3, T, side, side).clamp(-1, 1)
    with torch.no_grad():
        mean, _ = model.encode(video)
        their = peer.encode(video).latent_dist.mode()
        one = away(mean, their)
        other = away(model.decode(their).clamp(-1, 1), peer.decode(their).sample)
    assert about["latents_mean"] == config["latents_mean"]
    return max(one, other)


def kl(r, home):
    groups, n = int(r.integers(1, 5)), int(r.integers(1, 4))
    first = groups * int(r.integers(1, 4))
    config = dict(block_out_channels=[first, *(first * int(r.integers(1, 4)) for _ in range(n - 1))],
                  down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
                  layers_per_block=int(r.integers(1, 3)), latent_channels=int(r.integers(1, 9)),
                  norm_num_groups=groups, scaling_factor=float(r.random() + 0.1),
                  shift_factor=pick(r, None, 0.1))
    config |= pick(r, {}, {}, dict(use_quant_conv=False, use_post_quant_conv=False),
                   dict(mid_block_add_attention=False))
    peer = saved(shaken(diffusers.AutoencoderKL(**config), r), home, r)
    model, about = V.load_published(home)
    image = torch.randn(1, 3, *(model.stride * r.integers(2, 5, 2)))
    with torch.no_grad():
        mean, _ = model.encode(image[:, :, None])
        their = peer.encode(image).latent_dist.mode()
        m, s = V.normaliser(about)
        scaled = (their - (config["shift_factor"] or 0)) * config["scaling_factor"]
        return max(away(mean[:, :, 0], their), away(model.decode(their[:, :, None])[:, :, 0],
                   peer.decode(their).sample), away((mean - m) / s, scaled[:, :, None]))


def dit_file(r, home):
    heads, side = int(r.integers(1, 4)), 2 * int(r.integers(1, 5))
    dim = heads * 4 * int(r.integers(1, 20))
    peer, ours = dit(int(r.integers(1, 4)), dim, heads, side)
    dtype = pick(r, torch.float32, torch.bfloat16, torch.float16)
    state = {name: x.to(dtype) for name, x in D.to_published(ours.state_dict(), "dit", ours).items()}
    before = pick(r, "", "", "module.", "_orig_mod.", "model.")
    state = {before + name: x for name, x in state.items()}
    torch.save(pick(r, state, {"ema": state, "opt": {}}, {"state_dict": state}), home / "dit.pt")
    for p in (*peer.parameters(), peer.pos_embed.pos_embed):
        p.data = p.data.to(dtype).float()
    model, _, _ = D.load_published(home / "dit.pt", heads)
    x, y, t = torch.randn(1, 4, side, side), torch.tensor([int(r.integers(1000))]), torch.tensor([7.0])
    row = D.lay_out([(4, 1, side, side)], [None], [int(y)], None, model.patch)
    with torch.no_grad():
        out = model(D.patchify([x[0][:, None]], model.patch), t, row)
        ours = D.unpatchify(out, [(8, 1, side, side)], model.patch)[0][:, 0]
        return away(ours, peer(x, t, class_labels=y).sample[0])


def analytic(x, t):
    return 0.4 * x + torch.cos(0.003 * t)


def args_of(home, sampler, n, about, how=D.Objective(), *more):
    args = S.parse_options([str(home), "--prompt", "x", "--steps", str(n), *more] + (
        ["--sampler", sampler] if sampler else []))
    S.resolve(args, about, how, 8)
    return args


def scheduler(r, home):
    name = pick(r, "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    n, shift = int(r.integers(2, 60)), pick(r, 1.0, 3.0, 5.0, 8.0, 0.7)
    if name.startswith("Flow"):
        config = dict(shift=shift, **pick(r, {}, {}, dict(shift_terminal=0.1), dict(use_karras_sigmas=True),
                                          dict(use_exponential_sigmas=True), dict(use_dynamic_shifting=True)))
    else:
        config = dict(flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction",
                      solver_order=int(r.integers(1, 4)), final_sigmas_type=pick(r, "zero", "zero", "sigma_min"))
        if name.startswith("Uni"):
            config |= pick(r, {}, dict(solver_type="bh1", final_sigmas_type="sigma_min"), dict(disable_corrector=[0, 1]), dict(
                predict_x0=False), dict(shift_terminal=0.05))
        else:
            config |= pick(r, {}, dict(lower_order_final=False), dict(euler_at_final=True), dict(
                solver_type="heun"), dict(use_lu_lambdas=True))
    peer = getattr(diffusers, name)(**config)
    peer.save_pretrained(home / "scheduler")
    leave_out(home / "scheduler" / "scheduler_config.json", type(peer), r)
    about = {"kind": "wan", "layout": "diffusers", **S.read_scheduler(home, None)}
    args = args_of(home, None, n, about)
    peer.set_timesteps(n, **({"mu": 1.0} if config.get("use_dynamic_shifting") else {}))
    told, z = [], torch.randn(1, 9)

    def read(x, t, at):
        told.append(1000 * float(torch.as_tensor(t)))
        v = analytic(x, torch.tensor(told[-1]))
        return v, x - float(at) * v, x + (1 - float(at)) * v, None
    *_, ours = S.trajectory(args, D.Objective(), read, z, None, 1.0, args.shift, None)
    x = z
    for t in peer.timesteps:
        x = peer.step(analytic(x, t.float()), t, x).prev_sample
    assert np.allclose(told, peer.timesteps.numpy(), atol=2e-3), (config, n, told, peer.timesteps)
    return away(ours, x)


def ddim(r, home):
    n, spacing = int(r.integers(2, 120)), pick(r, "linspace", "leading", "trailing")
    path = pick(r, "ddpm", "sd")
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear") if path == "sd" else {}
    peer = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing, steps_offset=1, **betas)
    peer.set_timesteps(n)
    if len(peer.timesteps) != n:         # of 61 trailing steps diffusers makes 62, the last one -1
        return 0.0
    args = args_of(home, "ddim", n, {"kind": "own"}, D.Objective("noise", path), "--size", "8x8",
                   *(["--spacing", spacing] if spacing != "linspace" else []))
    z, off = torch.randn(1, 9), int(path == "sd")

    def read(x, t, at):
        eps = analytic(x, 1000 * torch.as_tensor(t) - off)
        return None, (x - at[1] * eps) / at[0], eps, None
    *_, ours = S.trajectory(args, D.Objective("noise", path), read, z, None, 1.0, 1.0, None)
    x = z
    for t in peer.timesteps:
        x = peer.step(analytic(x, t.float()), t, x).prev_sample
    return away(ours, x)


def pipeline(r, home, with_image=False):
    """A whole folder, T2V or I2V, from noise to latents."""
    z, config = 4, wan_config(r, 4)
    config["patch_size"] = (1, 2, 2)
    clip = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                image_size=28, patch_size=14, hidden_act="gelu")
    if with_image:
        config |= dict(in_channels=2 * z + 4, image_dim=32, added_kv_proj_dim=config["num_attention_heads"]
                       * config["attention_head_dim"])
    model = saved(shaken(diffusers.WanTransformer3DModel(**config), r), home / "transformer", r)
    coder = saved(shaken(diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=z, dim_mult=[1, 2, 4, 4], latents_mean=[0.1] * z, latents_std=[1.3] * z), r),
        home / "vae", r)
    shift = float(r.integers(1, 9))
    plan = pick(r, diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), diffusers.UniPCMultistepScheduler(
        flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"))
    plan.save_pretrained(home / "scheduler")
    kind = diffusers.WanImageToVideoPipeline if with_image else diffusers.WanPipeline
    parts, more = dict(tokenizer=None, text_encoder=None, vae=coder, scheduler=plan, transformer=model), {}
    height, width, n = *(16 * r.integers(1, 4, 2)), int(r.integers(2, 6))
    frames, told, other = 1 + 4 * int(r.integers(0, 3)), *torch.randn(2, 20, config["text_dim"])
    pad = lambda text: D.fill_texts([text])[0][None]
    argv = [str(home), "--prompt", "x", "--steps", str(n), "--frames", str(frames), "--size", f"{height}x{width}",
            "--negative", "", "--cfg", "3"]
    if with_image:
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
        tower = shaken(CLIPVisionModel(CLIPVisionConfig(**clip)), r)
        tower.save_pretrained(home / "image_encoder")
        grow = pick(r, 1, 2, 3.5)
        picture = Image.fromarray(r.integers(0, 255, (int(height * grow), int(width * grow), 3), np.uint8))
        picture.save(home / "picture.png")
        parts |= dict(image_encoder=tower, image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}))
        argv, more = [*argv, "--image", str(home / "picture.png")], dict(image=picture)
    (home / "model_index.json").write_text(json.dumps({"_class_name": kind.__name__}))
    args = S.parse_options(argv)
    sampler = S.Sampler(args, torch.device("cpu"))
    sampler.part.openers["text"] = lambda: lambda prompt: told if prompt else other
    args.quiet = True
    timeline, = sampler([S.request_of(args, {"prompt": "x"})])
    noise = V.gaussians("sample", 0, 0, ["x"], [timeline.shape])[0][None]
    peer = kind(**parts)
    peer.set_progress_bar_config(disable=True)
    out = peer(prompt_embeds=pad(told), negative_prompt_embeds=pad(other), latents=noise, height=int(height),
               width=int(width), num_frames=frames, num_inference_steps=n, guidance_scale=3.0,
               output_type="latent", **more).frames[0]
    return away(timeline.segments[0].latents, out)


FAMILIES = {            # function, the largest share of the largest value that is still equal
    "wan": (wan, 1e-4), "vae": (vae, 1e-4), "kl": (kl, 1e-4), "dit": (dit_file, 1e-4),
    "scheduler": (scheduler, 1e-4), "ddim": (ddim, 1e-3), "t2v": (pipeline, 1e-3),
    "i2v": (lambda r, home: pipeline(r, home, True), 3e-3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=40, help="of each family (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families (all)")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}\n"
          f"{'family':10} {'equal':>5} {'refused':>7} {'wrong':>5}  largest difference; refusals")
    for name in args.only:
        run, most = FAMILIES[name]
        counts, largest, words = Counter(), 0.0, Counter()
        for i in range(args.draws):
            r, home = np.random.default_rng([args.seed, i]), Path(tempfile.mkdtemp())
            torch.manual_seed(i)
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    error = run(r, home)
                kind = "equal" if error <= most else "wrong"
                largest = max(largest, error)
                if kind == "wrong":
                    print(f"{name} {i}: {error:.2g}", file=sys.stderr)
            except Exception as fault:
                kind = "wrong"
                print(f"{name} {i}: {type(fault).__name__}: {str(fault)[:300]}", file=sys.stderr)
            except SystemExit:
                kind, line = "refused", said.getvalue().strip().splitlines()[-1]
                words[line.split(": ", 1)[-1].replace(str(home), "")[:90]] += 1
            counts[kind] += 1
            shutil.rmtree(home)
        print(f"{name:10} {counts['equal']:5} {counts['refused']:7} {counts['wrong']:5}  {largest:.1e}; "
              + "; ".join(f"{n} x {line}" for line, n in words.items()), flush=True)


if __name__ == "__main__":
    main()
