"""The method of GKD: the encoders (ViTs that load the official weights), QSD, and the distillation losses."""
import argparse
import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A user's mistake (a wrong name, file or size); the scripts print it as one line and exit with status 2."""


# --- Encoders: the table --------------------------------------------------------------------------------------------

WEIGHTS = "weights"         # official files are looked for in this folder first, then in torch.hub's cache
PATCH_RESIZE = "bicubic"    # patch-embedding kernels: "bicubic" (official code) | "pinv" (FlexiViT, arXiv:2212.08013)
ANTIALIAS = False           # in every bicubic resize (official code: False; timm: True)

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


class Encoder(NamedTuple):
    """A row of ENCODERS: the architecture, the statistics its images are normalised with, and the official file."""
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    img_size: int | tuple           # pixels, one number or (H, W): the size that pos_embed is stored for
    url: str | None = None          # None: no official file exists, the encoder starts at random
    sha256: str | None = None       # its first digits; None: not known
    file: str | None = None         # its name on disk, where the address's last part says nothing
    layerscale: bool = False        # DINOv2: each branch times a learned vector
    registers: int = 0              # DINOv2 "_reg": extra tokens between CLS and the patches, without a position
    mlp: str = "gelu"               # "swiglu" in DINOv2-g and EVA-02
    rope: bool = False              # EVA-02: queries and keys are rotated by position, keys have no bias
    sub_ln: bool = False            # EVA-02 B and L: a LayerNorm inside the MLP; q, k, v and the MLP's gate not fused
    inner_attn_ln: bool = False     # some EVA-02 files: a LayerNorm before attn.proj as well
    mean: tuple = IMAGENET["mean"]
    std: tuple = IMAGENET["std"]


DEIT = "https://dl.fbaipublicfiles.com/deit/"
DINO = "https://dl.fbaipublicfiles.com/dino/"
V2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_"
EVA = "https://huggingface.co/Yuxin-CV/EVA-02/resolve/main/eva02/pt/"
TIMM = "https://huggingface.co/timm/"
AUGREG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
TI, S, B, L, G = (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1536, 40, 24)    # width, depth, heads
LS = dict(layerscale=True)
REG = dict(layerscale=True, registers=4)
EVA02 = dict(mlp="swiglu", rope=True, **CLIP)   # official GKD feeds EVA-02 with IMAGENET's statistics instead

ENCODERS = {                # size, patch, image, official file, its SHA-256, what differs from DeiT
    "deit_tiny":            Encoder(*TI, 16, 224, DEIT + "deit_tiny_patch16_224-a1311bcf.pth", "a1311bcf"),
    "deit_small":           Encoder(*S, 16, 224, DEIT + "deit_small_patch16_224-cd65a155.pth", "cd65a155"),
    "deit_base":            Encoder(*B, 16, 224, DEIT + "deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d"),
    "deit_tiny_distilled":  Encoder(*TI, 16, 224, DEIT + "deit_tiny_distilled_patch16_224-b40b3cf7.pth", "b40b3cf7"),
    "deit_small_distilled": Encoder(*S, 16, 224, DEIT + "deit_small_distilled_patch16_224-649709d9.pth", "649709d9"),
    "deit_base_distilled":  Encoder(*B, 16, 224, DEIT + "deit_base_distilled_patch16_224-df68dfff.pth", "df68dfff"),
    "vit_tiny_augreg":      Encoder(*TI, 16, 224, f"{TIMM}{AUGREG}/resolve/main/pytorch_model.bin", None,
                                    f"{AUGREG}.pth", **HALF),
    "dino_vits16":          Encoder(*S, 16, 224, DINO + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vitb16":          Encoder(*B, 16, 224, DINO + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dinov2_vits14":        Encoder(*S, 14, 518, V2 + "vits14/dinov2_vits14_pretrain.pth", "b938bf1b", **LS),
    "dinov2_vitb14":        Encoder(*B, 14, 518, V2 + "vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f8", **LS),
    "dinov2_vitl14":        Encoder(*L, 14, 518, V2 + "vitl14/dinov2_vitl14_pretrain.pth", "d5383ea8", **LS),
    "dinov2_vitg14":        Encoder(*G, 14, 518, V2 + "vitg14/dinov2_vitg14_pretrain.pth", "baf8467e",
                                    mlp="swiglu", **LS),
    "dinov2_vits14_reg":    Encoder(*S, 14, 518, V2 + "vits14/dinov2_vits14_reg4_pretrain.pth", "f4331770", **REG),
    "dinov2_vitb14_reg":    Encoder(*B, 14, 518, V2 + "vitb14/dinov2_vitb14_reg4_pretrain.pth", "73182a08", **REG),
    "dinov2_vitl14_reg":    Encoder(*L, 14, 518, V2 + "vitl14/dinov2_vitl14_reg4_pretrain.pth", "36e4deff", **REG),
    "dinov2_vitg14_reg":    Encoder(*G, 14, 518, V2 + "vitg14/dinov2_vitg14_reg4_pretrain.pth", "746ecb8c",
                                    mlp="swiglu", **REG),
    "eva02_tiny":           Encoder(*TI, 14, 224, EVA + "eva02_Ti_pt_in21k_p14.pt", **EVA02),
    "eva02_small":          Encoder(*S, 14, 224, EVA + "eva02_S_pt_in21k_p14.pt", **EVA02),
    "eva02_base":           Encoder(*B, 14, 224, EVA + "eva02_B_pt_in21k_p14.pt", sub_ln=True, **EVA02),
    "eva02_large":          Encoder(*L, 14, 224, EVA + "eva02_L_pt_in21k_p14.pt", sub_ln=True, **EVA02),
    "toy_small":            Encoder(64, 4, 2, 8, 64),        # for the built-in toy world: no official file
    "toy_base":             Encoder(128, 4, 4, 8, 64),
}


# --- The vision transformer -----------------------------------------------------------------------------------------
# Parameter names are those of the official checkpoints; e is the encoder's row. Without options this is DeiT and DINO;
# e.layerscale, e.registers mark what DINOv2 adds, e.rope, e.sub_ln what EVA-02 changes, e.mlp what both do.

def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6)      # every encoder of the table was trained with 1e-6, not torch's 1e-5


class PatchEmbed(nn.Module):
    def __init__(self, e):
        super().__init__()
        self.proj = nn.Conv2d(3, e.embed_dim, e.patch_size, stride=e.patch_size)

    def forward(self, x):                                                       # (B, 3, H, W)
        return self.proj(x).flatten(2).transpose(1, 2)                          # (B, N, C)


class Attention(nn.Module):
    def __init__(self, e):
        super().__init__()
        dim, self.num_heads, self.key_bias, self.fused = e.embed_dim, e.num_heads, not e.rope, not e.sub_ln
        if self.fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=self.key_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        if not self.key_bias:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.inner_attn_ln = layer_norm(dim) if e.inner_attn_ln else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=None):                                            # (B, T, C), T = 1 + registers + N
        if self.key_bias:
            qkv = self.qkv(x)
        else:
            weight = self.qkv.weight if self.fused else torch.cat(
                [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
            qkv = F.linear(x, weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)     # each (B, heads, T, C / heads)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)          # (B, T, C)
        return self.proj(self.inner_attn_ln(x))


class Mlp(nn.Module):
    def __init__(self, e):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(e.embed_dim, 4 * e.embed_dim), nn.Linear(4 * e.embed_dim, e.embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """A gate times a value (DINOv2-g, EVA-02); two thirds as wide as Mlp, so that it costs the same."""
    def __init__(self, e):
        super().__init__()
        hidden, self.fused = 8 * e.embed_dim // 3, not e.sub_ln
        if self.fused:
            self.w12 = nn.Linear(e.embed_dim, 2 * hidden)
        else:
            self.w1, self.w2 = nn.Linear(e.embed_dim, hidden), nn.Linear(e.embed_dim, hidden)
        self.ffn_ln = layer_norm(hidden) if e.sub_ln else nn.Identity()
        self.w3 = nn.Linear(hidden, e.embed_dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(self.ffn_ln(F.silu(gate) * value))


class LayerScale(nn.Module):
    def __init__(self, e):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(e.embed_dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, e):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(e.embed_dim), layer_norm(e.embed_dim)
        self.attn = Attention(e)
        self.mlp = SwiGLU(e) if e.mlp == "swiglu" else Mlp(e)
        self.ls1, self.ls2 = (LayerScale(e), LayerScale(e)) if e.layerscale else (nn.Identity(), nn.Identity())

    def forward(self, x, rope=None):                                            # (B, T, C), the residual stream
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


ROPE_GRID = 16              # EVA-02's pretraining grid (224 / 14): positions in any other grid are scaled to span it
ROPE_BASE = 10000.


def rope_angles(grid, head_dim, device):
    """Rotation angles (N, head_dim) of EVA-02: half of the channels turn with y, half with x, in pairs."""
    freqs = ROPE_BASE ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    y, x = (torch.arange(n, device=device) / n * ROPE_GRID for n in grid)
    angles = torch.cat(torch.broadcast_tensors((y[:, None] * freqs)[:, None], (x[:, None] * freqs)[None]), dim=-1)
    return angles.flatten(0, 1).repeat_interleave(2, dim=-1)


def rotate(x, cos, sin):
    """Turns each channel pair of x (B, heads, T, D) by its angle; cos and sin broadcast to x, in fp32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin).type_as(x)


class ViT(nn.Module):
    """A vision transformer: ViT(name, **values), the values being Encoder's (but for its file).

    `cls, patches = vit(x)`: x (B, 3, H, W), normalised by vit.mean and vit.std, H and W any multiples of the patch;
    cls (B, C) and patches (B, N, C), both after the final norm.
    """
    def __init__(self, name, **values):
        super().__init__()
        e = Encoder(**values)
        self.config = constructor_values(name, e)
        self.name, self.mean, self.std, self.rope = name, e.mean, e.std, e.rope
        self.embed_dim, self.depth, self.num_heads, self.patch_size = e.embed_dim, e.depth, e.num_heads, e.patch_size
        self.grid = grid_of(e.img_size, e.patch_size)                           # (h, w) of the stored pos_embed
        self.prefix = 1 + e.registers                                           # tokens before the patches
        self.patch_embed = PatchEmbed(e)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, e.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], e.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, e.embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, e.registers, e.embed_dim)) if e.registers else None
        self.blocks = nn.ModuleList(Block(e) for _ in range(e.depth))
        self.norm = layer_norm(e.embed_dim)
        for key, parameter in self.named_parameters():                          # as DeiT
            if parameter.ndim == 2 or "token" in key or key == "pos_embed":
                nn.init.trunc_normal_(parameter, std=0.02)
            elif key.endswith("bias") and "patch_embed" not in key:
                nn.init.zeros_(parameter)

    def tokens(self, x, mask=None, keep=None, layers=(), depth=None):
        """The residual stream (B, T, C) after `depth` blocks (default: all), and the patches after each of `layers`."""
        grid = grid_of(x.shape[-2:], self.patch_size)
        pos_embed = resize_pos_embed(self.pos_embed, self.grid, grid)
        x = self.patch_embed(x)                                                 # (B, N, C)
        if mask is not None:                                                    # (B, N)
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + pos_embed[:, 1:]
        if keep is not None:                                                    # (B, K): N becomes K
            x = x.gather(1, keep[..., None].expand(-1, -1, self.embed_dim))
        first = [self.cls_token + pos_embed[:, :1]] + ([self.register_tokens] if self.prefix > 1 else [])
        x = torch.cat([token.expand(x.shape[0], -1, -1) for token in first] + [x], dim=1)           # (B, T, C)

        rope = None
        if self.rope:
            angles = rope_angles(grid, self.embed_dim // self.num_heads, x.device)              # (N, C / heads)
            angles = angles[None] if keep is None else angles[keep]
            angles = F.pad(angles, (0, 0, self.prefix, 0))[:, None]             # CLS has no position: angle 0
            rope = angles.cos(), angles.sin()                                   # each (1 or B, 1, T, C / heads)
        outs = {}
        for i in range(self.depth if depth is None else depth):
            x = self.blocks[i](x, rope)
            if i in layers:
                outs[i] = x[:, self.prefix:]
        return x, [outs[i] for i in layers]

    def run(self, x, mask=None, keep=None, layers=()):
        """One pass: cls (B, C) and patches (B, N, C), normed, and the raw patches after each block of `layers`.

        mask (B, N) bool: True = the patch embedding is replaced by mask_token, before its position is added.
        keep (B, K) int64: only these patches enter the blocks, N becomes K (MAE, arXiv:2111.06377).
        """
        x, outs = self.tokens(x, mask, keep, layers)
        x = self.norm(x)
        return x[:, 0], x[:, self.prefix:], outs

    def forward(self, x, mask=None):
        cls, patches, _ = self.run(x, mask)
        return cls, patches

    def blocks_out(self, x, layers):
        """Raw outputs [(B, N, C)] of the blocks with these indices; blocks after the last of them do not run."""
        return self.tokens(x, layers=layers, depth=max(layers) + 1)[1]


# --- Other image and patch sizes ------------------------------------------------------------------------------------

def grid_of(img_size, patch_size):
    """Patches along (height, width); img_size is one number or (H, W) in pixels."""
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    if h % patch_size or w % patch_size or min(h, w) < patch_size:
        raise UserError(f"an image of {h}x{w} pixels does not divide into patches of {patch_size}: use multiples of it")
    return h // patch_size, w // patch_size


def resize_pos_embed(pos_embed, old, new):
    """pos_embed (1, 1 + h w, C) of grid old = (h, w), interpolated to grid new; CLS's row is kept."""
    if tuple(old) == tuple(new):
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.unflatten(1, old).permute(0, 3, 1, 2)                     # (1, C, h, w)
    patches = F.interpolate(patches.float(), tuple(new), mode="bicubic", align_corners=False, antialias=ANTIALIAS)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def resize_patch_embed(weight, size):
    """Patch kernels (C, 3, P, P) resized to (C, 3, size, size), see PATCH_RESIZE."""
    old, resize = weight.shape[-1], dict(size=(size, size), mode="bicubic", align_corners=False, antialias=ANTIALIAS)
    if size == old:
        return weight
    if PATCH_RESIZE == "bicubic":
        return F.interpolate(weight, **resize)
    # "pinv": the kernel whose products with resized patches B x are nearest to those of the old one with patches x
    B = F.interpolate(torch.eye(old * old).view(-1, 1, old, old), **resize).flatten(1).T      # (size^2, old^2)
    return (weight.flatten(2) @ torch.linalg.pinv(B)).unflatten(-1, (size, size))


# --- Loading --------------------------------------------------------------------------------------------------------
# Strict: a key that is missing or left over is an error, except for these, which no encoder here has a use for.

DROPPED = re.compile(r"(head|head_dist|lm_head)\."         # classifiers; DINO's and EVA-02's pretraining heads
                     r"|dist_token$"                       # DeiT's distillation token (its row of pos_embed goes too)
                     r"|(blocks\.\d+\.attn\.)?rope\.")     # EVA-02's rotation tables: rope_angles computes them


def load_vit(name_or_path, img_size=None, patch_size=None, depth=None, pretrained=True):
    """Builds an encoder with its weights; prints one line that says from which file and what was changed.

    name_or_path: a name of ENCODERS, or a checkpoint: an official file, this project's student.pt or segmenter.pt, or
    a checkpoint of the official GKD repository. img_size (int or (H, W)) and patch_size, in pixels, resize pos_embed
    and the patch kernels; depth keeps the first blocks only; pretrained=False gives a name's architecture at random.
    Raises UserError where the name, the file, its keys or the sizes are wrong.
    """
    name, row = str(name_or_path), ENCODERS.get(str(name_or_path))
    if row and (row.url is None or not pretrained):
        vit = ViT(**resized(constructor_values(name, row), img_size, patch_size, depth))
        say(f"{name}: starts at random, {vit.depth} blocks, patch {vit.patch_size}, grid {vit.grid[0]}x{vit.grid[1]}")
        return vit
    if not pretrained:
        raise UserError(f"{name}: only a named encoder can start at random, one of {', '.join(ENCODERS)}")
    path = find_file(name, row)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    notes = [f"{path} (SHA-256 {digest[:8]})"]
    if row and row.sha256 and not digest.startswith(row.sha256):
        notes.append(f"not the official file, whose SHA-256 starts with {row.sha256}")
    state, stored = read_checkpoint(path, notes)
    stored = constructor_values(name, row) if row else stored or infer_values(path, state, notes)
    stored["inner_attn_ln"] = any("inner_attn_ln" in key for key in state)      # EVA-02 exists with and without

    dropped = [key for key in state if DROPPED.match(key)]
    if dropped:
        notes.append("dropped " + " ".join(sorted({key.split("attn.")[-1] for key in dropped})))
    if "dist_token" in dropped:
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], dim=1)
    state = {key: tensor.float() for key, tensor in state.items() if key not in dropped}
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"].reshape(1, -1)                # DINOv2 (1, C), EVA-02 (1, 1, C)
    else:
        state["mask_token"] = 0.02 * torch.randn(1, stored["embed_dim"])
        notes.append("mask_token is new")
    with torch.device("meta"):                                                  # shapes only: no memory, no draws
        old, vit = ViT(**stored), ViT(**resized(stored, img_size, patch_size, depth))
    check_state(path, state, old.state_dict())

    if old.grid != vit.grid:
        notes.append("pos_embed {}x{} -> {}x{} (bicubic)".format(*old.grid, *vit.grid))
    if old.patch_size != vit.patch_size:
        notes.append(f"patch {old.patch_size} -> {vit.patch_size} ({PATCH_RESIZE})")
    if old.depth != vit.depth:
        notes.append(f"the first {vit.depth} of {old.depth} blocks")
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], old.grid, vit.grid)
    state["patch_embed.proj.weight"] = resize_patch_embed(state["patch_embed.proj.weight"], vit.patch_size)
    vit.load_state_dict({key: state[key] for key in vit.state_dict()}, assign=True)
    say(f"{vit.name}: " + "; ".join(notes))
    return vit


def student_checkpoint(vit):
    """What student.pt holds: "model" has exactly the encoder's keys in timm (no heads), mask_token lies beside it."""
    model = vit.state_dict()
    return dict(encoder=vit.config, mask_token=model.pop("mask_token"), model=model)


def lineage(name_or_path):
    """What a checkpoint of this project brings along: the ledgers of the stages that made it, and its heads (or None)."""
    if not Path(name_or_path).is_file():
        return [], None
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(name_or_path, map_location="cpu", weights_only=True)
    return saved.get("ledger", []), saved.get("objective")


def constructor_values(name, e):
    return dict(name=name, **{key: value for key, value in e._asdict().items() if key not in ("url", "sha256", "file")})


def resized(values, img_size, patch_size, depth):
    """Constructor values with the asked sizes; without img_size the stored one, rounded down to whole patches."""
    patch, size = patch_size or values["patch_size"], values["img_size"]
    depth = values["depth"] if depth is None else depth
    if img_size is None:
        img_size = size // patch * patch if isinstance(size, int) else tuple(n // patch * patch for n in size)
    if not 1 <= depth <= values["depth"]:
        raise UserError(f"depth must be 1 to {values['depth']} for {values['name']}, not {depth}")
    return values | dict(img_size=img_size, patch_size=patch, depth=depth)


def say(line):
    if os.environ.get("RANK", "0") == "0":                                      # torchrun's: one process speaks for all
        print(line, flush=True)


def file_name(row):
    return row.file or row.url.rsplit("/", 1)[-1]


def bare(path):
    """A file's name without its ending and without the hash that DeiT's files carry."""
    return re.sub(r"(-[0-9a-f]{8})?\.(pth|pt|bin)$", "", Path(path).name)


def find_file(name, row):
    """The file of a named encoder, downloaded if no copy lies in WEIGHTS or in torch.hub's cache; or the path given."""
    if not row:
        if not Path(name).is_file():
            raise UserError(f"{name}: neither a file nor a known encoder; the names are {', '.join(ENCODERS)}")
        return Path(name)
    file, cache = file_name(row), Path(torch.hub.get_dir()) / "checkpoints"
    for path in [Path(WEIGHTS, file), Path(WEIGHTS, f"{bare(file)}.pth"), Path(WEIGHTS, f"{name}.pth"), cache / file]:
        if path.is_file():
            return path
    say(f"{name}: downloading {row.url} to {cache / file}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(row.url, str(cache / file), hash_prefix=row.sha256)
    except (OSError, RuntimeError) as error:                                    # no network; RuntimeError: a wrong hash
        raise UserError(f"{name}: {row.url} cannot be had ({error}): download it and put it at {Path(WEIGHTS, file)}")
    return cache / file


def read_checkpoint(path, notes):
    """The encoder's tensors under official names, and the constructor values this project saved with them, or None."""
    with open(path, "rb") as file:
        if file.read(512).lstrip().startswith(b"<"):
            raise UserError(f"{path} is a web page, not a checkpoint: the download did not reach the file, repeat it")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):            # DeiT-style training saves its flags
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                  # damaged bytes raise nearly anything
        if "GLOBAL" in str(error) or "Unsupported operand" in str(error):
            raise UserError(f"{path} holds Python objects, which could run code, beside or instead of tensors, and is "
                            "not opened: save its state dict alone")
        raise UserError(f"{path} is truncated, damaged or no checkpoint ({path.stat().st_size} bytes): fetch it again")
    ending, state = "patch_embed.proj.weight", checkpoint
    while isinstance(state, dict) and not any(str(key).endswith(ending) for key in state):
        state = next((state[key] for key in ("model", "module", "state_dict", "teacher") if key in state), None)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no encoder: no key in it ends in {ending}")
    prefixes = [key.removesuffix(ending) for key in state if key.endswith(ending)]
    prefix = next((p for p in prefixes if p.endswith("student.backbone.")), prefixes[0])    # official GKD saves both
    if prefix:
        notes.append(f"keys under {prefix} only")
    state = {key.removeprefix(prefix): p for key, p in state.items() if key.startswith(prefix) and torch.is_tensor(p)}
    saved = checkpoint.get("encoder")
    if not isinstance(saved, dict) or "embed_dim" not in saved:                 # not a checkpoint of this project
        return state, None
    if "mask_token" in checkpoint:
        state["mask_token"] = checkpoint["mask_token"]
    return state, saved


def infer_values(path, state, notes):
    """Constructor values of an official file, from its tensors and its name."""
    kernel, pos_embed = state["patch_embed.proj.weight"], state.get("pos_embed")
    if pos_embed is None or pos_embed.ndim != 3 or kernel.ndim != 4 or len(kernel) % 64:
        raise UserError(f"{path}: the architecture is unclear, as pos_embed is missing or its shape or that of "
                        "patch_embed.proj.weight is unusual; give the encoder's name and put the file into WEIGHTS")
    side = math.isqrt(pos_embed.shape[1] - 1)                                   # a row or two are not patches
    has = [key.removeprefix("blocks.0.") for key in state]
    values = dict(
        embed_dim=len(kernel), num_heads=len(kernel) // 64,
        patch_size=kernel.shape[-1], img_size=side * kernel.shape[-1],
        depth=1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=0),
        layerscale="ls1.gamma" in has, mlp="swiglu" if "mlp.w3.weight" in has else "gelu", rope="attn.q_bias" in has,
        registers=state["register_tokens"].shape[1] if "register_tokens" in has else 0,
        sub_ln="attn.q_proj.weight" in has, inner_attn_ln="attn.inner_attn_ln.weight" in has)
    for name, row in ENCODERS.items():
        if row.url and bare(path) in (name, bare(file_name(row))):
            return values | dict(name=name, mean=row.mean, std=row.std)
    family = "EVA-02" if values["rope"] else "AugReg" if "augreg" in path.name.lower() else "ImageNet"
    notes.append(f"normalisation taken to be {family}'s")
    return values | dict(name=bare(path)) | {"EVA-02": CLIP, "AugReg": HALF, "ImageNet": IMAGENET}[family]


def check_state(path, state, expected):
    """Refuses a state dict whose names or shapes differ from the expected ones, naming them."""
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is not expected" for key in state if key not in expected]
    wrong += [f"{key} has shape {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
              for key in expected if key in state and state[key].shape != expected[key].shape]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(f"{path} does not fit the encoder: {', '.join(wrong[:6])}{more}")


# --- The objectives' constants ----------------------------------------------------------------------------------------------------

@dataclass
class LossConfig:
    """Constants of the objectives; distill.Config and segment.Config inherit them, so each is also a flag of both scripts."""
    loss: Literal["qsd", "mse", "cwd", "afdcd", "g2sd", "vitkd", "proteus"] = "qsd"  # the objective, a key of qsd.LOSSES
    alpha: float = 1.0                 # weight of L_feat; 0 also skips its work (so for the next two)
    beta: float = 1.0                  # weight of L_mask
    gamma: float = 1.0                 # weight of L_cls
    feat_with_cls: bool = True         # official code: L_feat is the mean over [CLS; patches]; the paper: patches only
    mask_ratio: float = 0.5            # share of the patches hidden in a masked image, int(0.5 N) exactly (official; Proteus too)
    mask_every: int = 2                # every 2nd image of the batch is masked (official: its first half); 1 = all
    mask_loss: Literal["all", "masked_samples", "masked_tokens"] = "all"  # official: all patches of all samples; Proteus: masked_tokens
    scale: Literal["one", "sqrt", "cosine"] = "one"  # of the logits: none (paper and code); C_t^-1/2; cosine / temperature
    temperature: float = 0.07          # for scale = cosine only
    attention: Literal["learned", "identity", "teacher"] = "learned"  # paper: learned; identity: W = 1, pointwise; teacher: v_t v_t^T
    layers: Literal["last", "last2", "four"] = "last"  # (loss qsd) paper: last; last2 adds the block before; four: the blocks the decoder reads
    target_norm: Literal["none", "layernorm", "phis"] = "none"  # of the teacher's final tokens; none = paper and code
    dcd_pool: int = 4                  # Af-DCD pools both maps by this before contrasting (4 needs a grid of 16x16 or more)


# --- Query-based soft distillation ------------------------------------------------------------------------------------------------

class QSD(nn.Module):
    """Student tokens v_s (B, N, C_s) query the teacher's v_t (B, N, C_t) and reweight the student's own values: v_s' (B, N, C_t).

    value (B, N, D) takes the place of the student's own: with the unit matrix the attention itself comes out, (B, N, N)."""

    def __init__(self, dim_s, dim_t, attention="learned", scale="one", temperature=0.07):
        super().__init__()
        self.attention, self.scale, self.temperature = attention, scale, temperature
        if attention == "learned":
            self.varphi = nn.Sequential(nn.LayerNorm(dim_s), nn.Linear(dim_s, dim_t))  # the paper's φ: queries
        self.phi = nn.Sequential(nn.LayerNorm(dim_s), nn.Linear(dim_s, dim_t))         # the paper's ϕ: values

    def forward(self, v_s, v_t, value=None):
        value = self.phi(v_s).float() if value is None else value                      # (B, N, C_t)
        if self.attention == "identity":  # every token attends to itself alone: what is left is the pointwise MSE of vanilla KD
            return value
        query, key = self.varphi(v_s).float() if self.attention == "learned" else v_t, v_t
        if self.scale == "sqrt":
            query = query * query.shape[-1] ** -0.5
        elif self.scale == "cosine":
            query, key = F.normalize(query, dim=-1) / self.temperature, F.normalize(key, dim=-1)
        with torch.autocast(v_t.device.type, enabled=False):  # in bf16 unscaled logits of large keys cost 22 % of the output
            W = query @ key.mT                                                         # Eq. 7  (B, N, N)
            return W.softmax(-1) @ value                                               # Eq. 8  (B, N, C_t)


def masked_rows(config):
    """The images of a batch that are masked; their choice may not depend on how the batch is split, which is always in pairs."""
    if config.mask_every not in (1, 2):
        raise UserError(f"--mask_every {config.mask_every}: 2 (every second image) or 1 (all)")
    return slice(None, None, config.mask_every)


def random_mask(noise, ratio):
    """Hide exactly int(ratio N) patches of each image: noise (B, N) uniform numbers -> mask (B, N) bool, True = hidden."""
    return noise.argsort(1).argsort(1) < int(ratio * noise.shape[1])


def matching_layers(depth_s, depth_t, layers):
    """Indices of the intermediate blocks to distil, student and teacher: at equal fractions of either depth."""
    fractions = {"last": (), "last2": (11 / 12,), "four": (4 / 12, 6 / 12, 8 / 12)}[layers]
    return [max(round(f * depth_s) - 1, 0) for f in fractions], [max(round(f * depth_t) - 1, 0) for f in fractions]


def normalize_targets(t, how, statistics=None):
    """The teacher's tokens as an objective sees them: t = (cls, patches, outs) in fp32, cls and patches normalised by target_norm."""
    cls, patches, outs = t[0].float(), t[1].float(), [o.float() for o in t[2]]
    if how == "layernorm":
        cls, patches = (F.layer_norm(x, x.shape[-1:]) for x in (cls, patches))
    elif how == "phis":
        mean, rotation = statistics
        with torch.autocast(patches.device.type, enabled=False):
            cls, patches = (cls - mean) @ rotation, (patches - mean) @ rotation
    return cls, patches, outs


def phi_s(tokens):
    """PHI-S statistics (Ranzinger et al., arXiv:2410.01680) of tokens (M, C): mean (C,) and matrix (C, C).

    The principal axes, rotated by a Hadamard matrix so that all channels have one variance, over that deviation."""
    mean = tokens.mean(0)
    variance, axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
    return mean, axes @ hadamard(tokens.shape[1]).to(tokens) / variance.mean().sqrt()


@torch.no_grad()
def target_statistics(teacher, images):
    """PHI-S statistics of the teacher's patches on some uint8 images (B, 3, H, W): every process gives the same images."""
    mean, std = (255 * torch.tensor(values, device=images.device)[:, None, None] for values in (teacher.mean, teacher.std))
    return phi_s(teacher((images - mean) / std)[1].flatten(0, 1).float())


def hadamard(n):
    """Orthogonal (n, n) matrix with entries +-n^-1/2, for n = 2^k or 12 * 2^k (Sylvester; Paley's construction for 12)."""
    H = torch.ones(1, 1)
    if n % 3 == 0:  # I + S with S from the squares modulo 11
        squares = {i * i % 11 for i in range(1, 11)}
        S = torch.zeros(12, 12)
        S[0, 1:], S[1:, 0] = 1, -1
        S[1:, 1:] = torch.tensor([[0 if i == j else 1 if (j - i) % 11 in squares else -1 for j in range(11)] for i in range(11)])
        H = torch.eye(12) + S
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    if len(H) != n:
        raise UserError(f"--target_norm phis needs a teacher of width 2^k or 12 * 2^k, not {n}")
    return H / n ** 0.5


# Every objective has one interface, so that a training loop does not know which one it runs:
#   objective = LOSSES[name](student, teacher, config)
#   losses = objective(student, x, s, t, noise) -> dict of scalars; losses["loss"] is what is minimised
# x (B, 3, H, W) the images; t = (cls, patches, outs) = teacher.run(x, layers=objective.layers_t); s likewise from the student's plain
# pass, or None where objective.plain is False; noise (B, N) uniform random numbers, the only source of randomness.
# objective.weight is the published weight beside a task loss, for the mean reductions used here.

class GKD(nn.Module):
    """The paper's objective: features, masked patches and CLS token, each through a QSD head of its own (equations 9 to 12)."""
    weight = 1.0

    def __init__(self, student, teacher, config):
        super().__init__()
        c = self.config = config
        self.layers_s, self.layers_t = matching_layers(student.depth, teacher.depth, c.layers)
        self.plain = bool(c.alpha or c.gamma or (c.beta and c.mask_loss == "all" and c.mask_every > 1))

        def head():
            return QSD(student.embed_dim, teacher.embed_dim, c.attention, c.scale, c.temperature)
        self.feat = head() if c.alpha else None
        self.mask = head() if c.beta else None
        self.cls = head() if c.gamma or (c.alpha and c.feat_with_cls) else None
        self.inner = nn.ModuleList(head() for _ in self.layers_t) if c.alpha else []

    def forward(self, student, x, s, t, noise):
        c, losses = self.config, {}
        v_t_cls, v_t, outs_t = t                                             # (B, C_t), (B, N, C_t)
        v_s_cls, v_s, outs_s = s if self.plain else (None, None, ())           # (B, C_s), (B, N, C_s)
        if self.cls is not None:  # one query, one key: the softmax is 1, so this head is Linear(LayerNorm(cls))
            cls = self.cls(v_s_cls[:, None], v_t_cls[:, None])                 # (B, 1, C_t)
        if c.alpha:
            feat, target = self.feat(v_s, v_t), v_t
            if c.feat_with_cls:
                feat, target = torch.cat([cls, feat], 1), torch.cat([v_t_cls[:, None], v_t], 1)
            losses["L_feat"] = F.mse_loss(feat, target)                        # Eq. 9
            for head, o_s, o_t in zip(self.inner, outs_s, outs_t):  # raw block outputs have no common scale: targets are normalised
                o_t = F.layer_norm(o_t.float(), o_t.shape[-1:])
                losses["L_feat"] = losses["L_feat"] + F.mse_loss(head(o_s, o_t), o_t)
        if c.beta:
            losses["L_mask"] = self.masked(student, x, v_s, v_t, noise)
        if c.gamma:
            losses["L_cls"] = F.mse_loss(cls, v_t_cls[:, None])                # Eq. 11
        weights = {"L_feat": c.alpha, "L_mask": c.beta, "L_cls": c.gamma}
        losses["loss"] = sum(weights[name] * losses[name] for name in list(losses))  # Eq. 12
        return losses

    def masked(self, student, x, v_s, v_t, noise):
        """L_mask; only masked images go through the student again: the others' masked pass would equal the plain one."""
        c, rows = self.config, masked_rows(self.config)
        mask = random_mask(noise[rows], c.mask_ratio)                          # (B/2, N)
        v_s_mask, target = student(x[rows], mask)[1], v_t[rows]                # (B/2, N, C_s), (B/2, N, C_t)
        if c.mask_loss == "all" and c.mask_every > 1:
            index = torch.arange(0, len(x), c.mask_every, device=x.device)
            v_s_mask, target = v_s.to(v_s_mask.dtype).index_copy(0, index, v_s_mask), v_t
        v_s_mask = self.mask(v_s_mask, target)                                 # (B, N, C_t)
        if c.mask_loss == "masked_tokens":
            return (((v_s_mask - target) ** 2).mean(-1) * mask).sum() / mask.sum()
        return F.mse_loss(v_s_mask, target)                                    # Eq. 10


# --- The rivals of Tables 1, 2 and 4 ------------------------------------------------------------------------------------------------

class MSE(nn.Module):
    """Vanilla KD (FitNets, Romero et al. 2015): mean (phi(s) - t)^2 over the patches, phi linear."""
    weight, plain, layers_s, layers_t = 1.0, True, (), ()

    def __init__(self, student, teacher, config):
        super().__init__()
        self.phi = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        return {"loss": F.mse_loss(self.phi(s[1]).float(), t[1])}


class CWD(nn.Module):
    """Channel-wise distillation (Shu et al. 2021): each channel's softmax over space, student against teacher, T = 4."""
    weight, plain, layers_s, layers_t = 50.0, True, (), ()  # CIRKD's feature weight, for this very reduction
    T = 4.0

    def __init__(self, student, teacher, config):
        super().__init__()
        self.align = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        log_p_s = (self.align(s[1]).float() / self.T).log_softmax(1)           # (B, N, C_t), a distribution over N
        log_p_t = (t[1] / self.T).log_softmax(1)
        kl = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)  # (B, C_t)
        return {"loss": self.T ** 2 * kl.mean()}


class AfDCD(nn.Module):
    """Augmentation-free dense contrastive distillation (Fan et al. 2023): masked reconstruction and omni-contrasting.

    Published weights (sum form): reconstruction 1e-6 to 4e-5, contrast 1e-3 to 4e-2; in the mean form used here 1 and 1e-2."""
    weight, plain, layers_s, layers_t = 1.0, True, (), ()
    groups, patch, tau, drop, contrast = 16, 4, 0.07, 0.75, 1e-2

    def __init__(self, student, teacher, config):
        super().__init__()
        dim, self.pool = teacher.embed_dim, config.dcd_pool
        self.align = nn.Linear(student.embed_dim, dim)
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def vectors(self, tokens):
        """Map (B, C, h, w) -> (patches, positions * groups, C / groups): pooled, cut in 4x4 patches, channels split in groups."""
        tokens = F.max_pool2d(tokens, self.pool)
        cut = F.unfold(tokens, self.patch, stride=self.patch)                  # (B, C * 16, patches)
        B, _, P = cut.shape
        cut = cut.view(B, self.groups, -1, self.patch ** 2, P)                 # (B, M, C / M, 16, P)
        return cut.permute(0, 4, 3, 1, 2).flatten(2, 3).flatten(0, 1)          # (B P, 16 M, C / M)

    def forward(self, student, x, s, t, noise):
        grid = (-1, t[1].shape[-1], x.shape[2] // student.patch_size, x.shape[3] // student.patch_size)
        if min(grid[2:]) < self.pool * self.patch:
            raise UserError(f"--dcd_pool {self.pool} leaves no {self.patch}x{self.patch} patch on a grid of {grid[2]}x{grid[3]}: "
                            "use a smaller one")
        kept = ~random_mask(noise, self.drop)                                  # (B, N)
        f = self.project((self.align(s[1]) * kept[..., None]).mT.reshape(grid)).float()  # (B, C_t, h, w)
        target = t[1].mT.reshape(grid)
        distance = torch.cdist(self.vectors(f), self.vectors(target), p=1)     # (B P, 16 M, 16 M)
        group = torch.arange(distance.shape[1], device=x.device) % self.groups
        same = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool, device=x.device)
        logits = (-distance / self.tau).masked_fill(same, float("-inf"))  # left: the positive and the 240 vectors of other groups
        positive = torch.arange(len(group), device=x.device).expand(len(logits), -1)
        losses = {"L_fd": F.mse_loss(f, target), "L_con": self.groups * F.cross_entropy(logits.mT, positive)}
        return losses | {"loss": losses["L_fd"] + self.contrast * losses["L_con"]}


class G2SD(nn.Module):
    """Generic-to-specific distillation, generic stage (Huang et al. 2023): from 25 % of the patches predict all teacher tokens."""
    weight, plain, layers_s, layers_t = 1.0, False, (), ()
    keep, width, depth, beta = 0.25, 256, 4, 2.0

    def __init__(self, student, teacher, config):
        super().__init__()
        self.embed = nn.Linear(student.embed_dim, self.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.randn(1, student.pos_embed.shape[1] - 1, self.width) * 0.02)
        blocks = (Block(Encoder(self.width, self.depth, 8, 1, 1)) for _ in range(self.depth))
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(self.width),
                                     nn.Linear(self.width, teacher.embed_dim))

    def forward(self, student, x, s, t, noise):
        N, C = noise.shape[1], self.width
        keep = noise.argsort(1)[:, :int(self.keep * N)]                        # (B, K) indices of the visible patches
        seen = self.embed(student.run(x, keep=keep)[1])                        # (B, K, 256)
        full = self.mask_token.to(seen.dtype).expand(len(x), N, C).scatter(1, keep[..., None].expand(-1, -1, C), seen)
        predicted = self.decoder(full + self.pos_embed).float()                # (B, N, C_t)
        target = F.layer_norm(t[1], t[1].shape[-1:])
        return {"loss": F.smooth_l1_loss(predicted, target, beta=self.beta)}


class ViTKD(nn.Module):
    """ViTKD (Yang et al. 2024): mimic the first two blocks, generate the last one from half of its positions.

    Published weights 3e-5 and 3e-6 / 0.5 in sum form are about 4.5 and 0.23 in mean form at 196 tokens of width 384."""
    weight, plain = 1.0, True
    mimic, generate = 4.5, 0.23

    def __init__(self, student, teacher, config):
        super().__init__()
        dim = teacher.embed_dim
        self.layers_s, self.layers_t = (0, 1, student.depth - 1), (0, 1, teacher.depth - 1)
        self.align = nn.ModuleList(nn.Linear(student.embed_dim, dim) for _ in range(3))
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, student, x, s, t, noise):
        first, second, last = (align(o) for align, o in zip(self.align, s[2]))  # (B, N, C_t)
        hidden = random_mask(noise, 0.5)[..., None]                            # (B, N, 1)
        grid = (x.shape[2] // student.patch_size, x.shape[3] // student.patch_size)
        f = self.project(torch.where(hidden, self.token.to(last.dtype), last).mT.unflatten(2, grid)).flatten(2).mT.float()
        error = (f - t[2][2]) ** 2 * hidden
        losses = {"L_mimic": F.mse_loss(first.float(), t[2][0]) + F.mse_loss(second.float(), t[2][1]),
                  "L_generate": error.sum() / (hidden.sum() * f.shape[-1])}
        return losses | {"loss": self.mimic * losses["L_mimic"] + self.generate * losses["L_generate"]}


class Proteus(nn.Module):
    """Proteus (Zhang et al. 2025): CLS, all tokens, and masked patches at the masked positions only, each LayerNorm -> Linear."""
    weight, plain, layers_s, layers_t = 1.0, True, (), ()

    def __init__(self, student, teacher, config):
        super().__init__()
        self.config = config
        self.cls, self.feat, self.patch = (
            nn.Sequential(nn.LayerNorm(student.embed_dim), nn.Linear(student.embed_dim, teacher.embed_dim)) for _ in range(3))

    def forward(self, student, x, s, t, noise):
        rows = masked_rows(self.config)
        mask = random_mask(noise[rows], self.config.mask_ratio)
        error = (self.patch(student(x[rows], mask)[1]).float() - t[1][rows]) ** 2
        losses = {"L_cls": F.mse_loss(self.cls(s[0]).float(), t[0]),
                  "L_feat": F.mse_loss(self.feat(torch.cat([s[0][:, None], s[1]], 1)).float(), torch.cat([t[0][:, None], t[1]], 1)),
                  "L_mask": (error.mean(-1) * mask).sum() / mask.sum()}
        return losses | {"loss": losses["L_cls"] + losses["L_feat"] + losses["L_mask"]}


LOSSES = {"qsd": GKD, "mse": MSE, "cwd": CWD, "afdcd": AfDCD, "g2sd": G2SD, "vitkd": ViTKD, "proteus": Proteus}
