"""diffusers' denoisers beside ours, with equal weights: for `python train_dit.py bench` alone."""
import diffusers
import torch
from diffusers import DiTTransformer2DModel, WanTransformer3DModel

import train_dit as D

VERSION = diffusers.__version__


def wan(layers, dim):
    """(diffusers' WanTransformer3DModel, our DiT of the same weights)."""
    peer = WanTransformer3DModel(num_attention_heads=dim // 64, attention_head_dim=64,
                                 ffn_dim=4 * dim, num_layers=layers, text_dim=256, in_channels=16,
                                 out_channels=16)
    shake(peer)
    config = dict(num_layers=layers, num_attention_heads=dim // 64, ffn_dim=4 * dim)
    options = D.wan_options(peer.state_dict(), config, "diffusers")
    ours = D.DiT(**options)
    ours.load_state_dict(D.from_published(peer.state_dict(), "diffusers", ours))
    return peer, ours


def dit(layers, dim, side):
    """(diffusers' DiTTransformer2DModel, our DiT of the same weights)."""
    peer = DiTTransformer2DModel(num_attention_heads=dim // 64, attention_head_dim=64, in_channels=4,
                                 out_channels=8, num_layers=layers, sample_size=side,
                                 norm_eps=1e-6).eval()
    shake(peer)
    for block in peer.transformer_blocks:                # one embedder for all, as in DiT's own code
        block.norm1.emb = peer.transformer_blocks[0].norm1.emb
    peer.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift = 0
    ours = D.DiT(4, dim, layers, dim // 64, (1, 2, 2), out_channels=8, classes=1001, own_table=True,
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
        for kind in D.LINEAR:
            state[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(
                [theirs[f"{block}.attn1.to_{part}.{kind}"] for part in "qkv"])
    for name, own in names:
        for kind in D.LINEAR:
            if f"{name}.{kind}" in theirs:
                how = "conv" if (own, kind) == ("embed", "weight") else own if own == "head" else ""
                state[f"{own}.{kind}"] = D.turn(theirs[f"{name}.{kind}"], how, ours.patch)
    ours.load_state_dict(state)
    return peer, ours


def shake(model):
    """Random weights of a trained model's size, none of them at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.02 if p.dim() > 1 else 0.1)
                    + (p.mean() if p.dim() < 2 else 0))
