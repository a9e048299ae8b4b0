"""The method of GKD: the encoders (ViTs that load the official weights), QSD, and the distillation losses.

In this order: ranges of constants, the table of encoders, the ViT, the loading of checkpoints, the objectives'
constants, QSD and GKD, ablations beyond the paper, the rivals. Who reads for the method starts at the constants.
"""
import hashlib
import math
import os
import pickle
import re
import stat
import time
import types
import typing
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, in which file or flag; scripts print it, with status 2."""

    def __str__(self):
        return super().__str__().split("UserError: ")[-1].strip()   # a loader's worker wraps the line in its traceback


# --- What a constant may be: its type names the range, which --help shows and which flags and files are checked by ----

class Range(NamedTuple):
    """The finite numbers from `least` to `most`; open: without `least` itself."""
    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, number):
        above = number > self.least if self.open else number >= self.least
        return above and number <= self.most and math.isfinite(number)

    def __str__(self):
        if self.open:
            return f"above {self.least:g}" + (f", at most {self.most:g}" if math.isfinite(self.most) else "")
        return f"{self.least:g} to {self.most:g}" if math.isfinite(self.most) else f"at least {self.least:g}"


Count = Annotated[int, Range(1, 10 ** 9)]
Batch = Annotated[int, Range(1, 2 ** 16)]
CountOr0 = Annotated[int, Range(0, 10 ** 9)]        # 0 stands for something, which the field says
Pixels = Annotated[int, Range(1, 2 ** 14)]          # along one side
PixelsOr0 = Annotated[int, Range(0, 2 ** 14)]
Workers = Annotated[int, Range(0, 256)]
Few = Annotated[int, Range(0, 1000)]
Classes = Annotated[int, Range(0, 254)]             # a label has 8 bits, 254 and 255 are none; 0: as the data set says
Seed = Annotated[int, Range(0, 10 ** 18)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, open=True)]
Weight = Annotated[float, Range(0)]                 # 0: left out


def fits(kind, value):
    """Whether a value is of a field's type, and in its range."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Annotated:
        return fits(parts[0], value) and value in parts[1]
    if typing.get_origin(kind) is Literal:
        return value in parts
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(part, value) for part in parts)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, (tuple, list)) if kind is tuple else isinstance(value, kind)


# --- Encoders: the table --------------------------------------------------------------------------------------------

WEIGHTS = "weights"         # official files are looked for in this folder first, then in torch.hub's cache
PATCH_RESIZE = "bicubic"    # patch-embedding kernels: "bicubic" (official code) | "pinv" (FlexiViT, arXiv:2212.08013)
ANTIALIAS = False           # in every bicubic resize (official code: False; timm: True)

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
SATELLITE = dict(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))


class Encoder(NamedTuple):
    """A row of ENCODERS: the architecture, the statistics its images are normalised with, and the official file."""
    embed_dim: Annotated[int, Range(1, 2 ** 16)]
    depth: Annotated[int, Range(1, 1000)]
    num_heads: Annotated[int, Range(1, 1000)]
    patch_size: Pixels
    img_size: Pixels | tuple        # pixels, one number or (H, W): the size that pos_embed is stored for
    url: str | None = None          # None: no official file exists, the encoder starts at random
    sha256: str | None = None       # its first digits; None: not known
    file: str | None = None         # its name on disk, where the address's last part says nothing
    layerscale: bool = False        # DINOv2, DINOv3: each branch times a learned vector
    registers: Few = 0              # DINOv2 "_reg", DINOv3: extra tokens between CLS and patches, without a position
    mlp: Literal["gelu", "swiglu"] = "gelu"     # the latter in DINOv2-g, EVA-02 and DINOv3's "plus" models
    mlp_ratio: Count = 4            # an MLP's hidden width over embed_dim; SwiGLU takes two thirds of it
    rope: Literal["", "eva02", "dinov3"] | bool = ""    # queries and keys are rotated by position, keys have no bias
    sub_ln: bool = False            # EVA-02 B and L: a LayerNorm inside the MLP; q, k, v and the MLP's gate not fused
    inner_attn_ln: bool = False     # some EVA-02 files: a LayerNorm before attn.proj as well
    eps: Positive = 1e-6            # of every LayerNorm; DINOv3: 1e-5
    mean: tuple = IMAGENET["mean"]
    std: tuple = IMAGENET["std"]


DEIT = "https://dl.fbaipublicfiles.com/deit/"
DINO = "https://dl.fbaipublicfiles.com/dino/"
V2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_"
EVA = "https://huggingface.co/Yuxin-CV/EVA-02/resolve/main/eva02/pt/"
TIMM = "https://huggingface.co/timm/"
AUGREG = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
ON_REQUEST = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"     # DINOv3: a form, not a file
TI = (192, 12, 3)           # width, depth, heads
S = (384, 12, 6)
B = (768, 12, 12)
L = (1024, 24, 16)
H = (1280, 32, 20)
G = (1536, 40, 24)
LS = dict(layerscale=True)
REG = dict(layerscale=True, registers=4)
EVA02 = dict(mlp="swiglu", rope="eva02", **CLIP)    # official GKD feeds EVA-02 with IMAGENET's statistics instead
V3 = dict(layerscale=True, registers=4, rope="dinov3", eps=1e-5)
V3PLUS = dict(mlp="swiglu", mlp_ratio=6, **V3)


def dinov3(shape, model, digits, **options):
    """A row of DINOv3. It has no pos_embed and takes any grid; 256 is the size it was trained at."""
    return Encoder(*shape, 16, 256, ON_REQUEST, digits, f"dinov3_{model}-{digits}.pth", **options)


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
    "dinov3_vits16":        dinov3(S, "vits16_pretrain_lvd1689m", "08c60483", **V3),
    "dinov3_vits16plus":    dinov3(S, "vits16plus_pretrain_lvd1689m", "4057cbaa", **V3PLUS),
    "dinov3_vitb16":        dinov3(B, "vitb16_pretrain_lvd1689m", "73cec8be", **V3),
    "dinov3_vitl16":        dinov3(L, "vitl16_pretrain_lvd1689m", "8aa4cbdd", **V3),
    "dinov3_vitl16_sat":    dinov3(L, "vitl16_pretrain_sat493m", "eadcf0ff", **V3, **SATELLITE),
    "dinov3_vith16plus":    dinov3(H, "vith16plus_pretrain_lvd1689m", "7c1da9a5", **V3PLUS),
    "eva02_tiny":           Encoder(*TI, 14, 224, EVA + "eva02_Ti_pt_in21k_p14.pt", **EVA02),
    "eva02_small":          Encoder(*S, 14, 224, EVA + "eva02_S_pt_in21k_p14.pt", **EVA02),
    "eva02_base":           Encoder(*B, 14, 224, EVA + "eva02_B_pt_in21k_p14.pt", sub_ln=True, **EVA02),
    "eva02_large":          Encoder(*L, 14, 224, EVA + "eva02_L_pt_m38m_p14.pt", sub_ln=True, **EVA02),
    "toy_small":            Encoder(64, 4, 2, 8, 64),        # for the built-in toy world: no official file
    "toy_base":             Encoder(128, 4, 4, 8, 64),
    "toy_student":          Encoder(64, 4, 2, 8, 64, "assets/toy_student.pt"),  # shipped; trained as DeiT is, on labels
    "toy_teacher":          Encoder(128, 4, 4, 8, 64, "assets/toy_teacher.pt", "49a3b23f"),  # shipped
}


# --- The vision transformer -----------------------------------------------------------------------------------------
# Parameter names are those of the official checkpoints (DINOv3's are changed when loading, see official_to_ours);
# e is the encoder's row. Without options this is DeiT and DINO. e.layerscale and e.registers are what DINOv2 adds,
# e.sub_ln and rope="eva02" what EVA-02 changes, e.eps and rope="dinov3" (which also means: no pos_embed) what DINOv3
# changes; e.mlp and e.mlp_ratio differ between the sizes of one family.

class PatchEmbed(nn.Module):
    def __init__(self, e):
        super().__init__()
        self.proj = nn.Conv2d(3, e.embed_dim, e.patch_size, stride=e.patch_size)

    def forward(self, x):                                                   # (B, 3, H, W)
        return self.proj(x).flatten(2).transpose(1, 2)                      # (B, N, C)


class Attention(nn.Module):
    def __init__(self, e):
        super().__init__()
        dim = e.embed_dim
        self.num_heads = e.num_heads
        self.rope = e.rope
        self.key_bias = not e.rope
        self.fused = not e.sub_ln
        if self.fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=self.key_bias)
        else:
            self.q_proj = nn.Linear(dim, dim, bias=False)
            self.k_proj = nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim, bias=False)
        if not self.key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.inner_attn_ln = nn.LayerNorm(dim, e.eps) if e.inner_attn_ln else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotation=None):                                    # (B, T, C), T = 1 + registers + N
        qkv = self.qkv(x) if self.key_bias else self.without_key_bias(x)    # (B, T, 3 C)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))                    # (B, T, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # each (B, heads, T, C / heads)
        if rotation is not None:
            q = rotate(q, *rotation, self.rope)
            k = rotate(k, *rotation, self.rope)
        x = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, T, C / heads)
        x = x.transpose(1, 2).flatten(2)                                    # (B, T, C)
        return self.proj(self.inner_attn_ln(x))

    def without_key_bias(self, x):
        """Queries, keys and values in one product (B, T, 3 C), the keys' bias being 0."""
        if self.fused:
            weight = self.qkv.weight
        else:
            weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, weight, bias)


class Mlp(nn.Module):
    def __init__(self, e):
        super().__init__()
        hidden = e.mlp_ratio * e.embed_dim
        self.fc1 = nn.Linear(e.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, e.embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """A gate times a value; two thirds as wide as Mlp, so that its three matrices cost as much as Mlp's two."""
    def __init__(self, e):
        super().__init__()
        hidden = 2 * e.mlp_ratio * e.embed_dim // 3     # DINO's code rounds up to a multiple of 8, which it is already
        self.fused = not (e.sub_ln or e.rope == "dinov3")       # w12: one matrix makes both gate and value
        if self.fused:
            self.w12 = nn.Linear(e.embed_dim, 2 * hidden)
        else:
            self.w1 = nn.Linear(e.embed_dim, hidden)
            self.w2 = nn.Linear(e.embed_dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, e.eps) if e.sub_ln else nn.Identity()
        self.w3 = nn.Linear(hidden, e.embed_dim)

    def forward(self, x):
        if self.fused:
            gate, value = self.w12(x).chunk(2, dim=-1)
        else:
            gate = self.w1(x)
            value = self.w2(x)
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
        self.norm1 = nn.LayerNorm(e.embed_dim, e.eps)
        self.norm2 = nn.LayerNorm(e.embed_dim, e.eps)
        self.attn = Attention(e)
        self.mlp = SwiGLU(e) if e.mlp == "swiglu" else Mlp(e)
        self.ls1 = LayerScale(e) if e.layerscale else nn.Identity()
        self.ls2 = LayerScale(e) if e.layerscale else nn.Identity()

    def forward(self, x, rotation=None):                                    # (B, T, C), the residual stream
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


EVA02_GRID = 16             # EVA-02's pretraining grid (224 / 14): positions in any other grid are scaled to span it
EVA02_BASE = 10000.
DINOV3_BASE = 100.          # DINOv3's wavelengths go from 1 almost to 100, and every grid spans -1 to 1


def rope_angles(rope, grid, head_dim, device):
    """Rotation angles (N, D / 2) of D = head_dim channels in pairs: half of the pairs turn with y, half with x."""
    h, w = grid
    rows = torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    exponents = torch.arange(head_dim // 4, device=device) / (head_dim // 4)
    if rope == "eva02":
        y = rows / h * EVA02_GRID
        x = columns / w * EVA02_GRID
        freqs = EVA02_BASE ** -exponents
    else:
        y = 2 * (rows + 0.5) / h - 1
        x = 2 * (columns + 0.5) / w - 1
        freqs = 2 * math.pi / DINOV3_BASE ** exponents
    angles_y = (y[:, None] * freqs)[:, None].expand(h, w, -1)               # (h, w, D / 4)
    angles_x = (x[:, None] * freqs)[None].expand(h, w, -1)                  # (h, w, D / 4)
    return torch.cat([angles_y, angles_x], dim=-1).flatten(0, 1)            # (N, D / 2)


def rotate(x, cos, sin, rope):
    """Turns the channel pairs of x (B, heads, T, D) by D / 2 angles; cos and sin (1 or B, 1, T, D / 2), in fp32."""
    if rope == "eva02":                     # channels 2 i and 2 i + 1 are a pair
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:                                   # channels i and i + D / 2 are a pair
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.type_as(x)


class ViT(nn.Module):
    """A vision transformer: ViT(name, **values), the values being Encoder's (but for its file).

    `cls, patches = vit(x)`: x (B, 3, H, W), normalised by vit.mean and vit.std, H and W any multiples of the patch;
    cls (B, C) and patches (B, N, C), both after the final norm.
    """
    def __init__(self, name, **values):
        super().__init__()
        e = Encoder(**values)
        if isinstance(e.rope, bool):        # a stored checkpoint may say True, which means EVA-02's
            e = e._replace(rope="eva02" if e.rope else "")
        self.config = constructor_values(name, e)
        self.name = name
        self.mean = e.mean
        self.std = e.std
        self.embed_dim = e.embed_dim
        self.depth = e.depth
        self.num_heads = e.num_heads
        self.patch_size = e.patch_size
        self.rope = e.rope
        self.grid = grid_of(e.img_size, e.patch_size)                       # (h, w) of the stored pos_embed
        self.prefix = 1 + e.registers                                       # tokens before the patches

        N = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(e)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, e.embed_dim))
        self.pos_embed = None if e.rope == "dinov3" else nn.Parameter(torch.zeros(1, 1 + N, e.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, e.embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, e.registers, e.embed_dim)) if e.registers else None
        self.blocks = nn.ModuleList(Block(e) for _ in range(e.depth))
        self.norm = nn.LayerNorm(e.embed_dim, e.eps)
        for key, parameter in self.named_parameters():                      # as DeiT
            if parameter.ndim == 2 or "token" in key or key == "pos_embed":
                nn.init.trunc_normal_(parameter, std=0.02)
            elif key.endswith("bias") and "patch_embed" not in key:
                nn.init.zeros_(parameter)

    def forward(self, x, mask=None):
        cls, patches, _ = self.run(x, mask)
        return cls, patches

    def run(self, x, mask=None, keep=None, layers=()):
        """One pass: cls (B, C) and patches (B, N, C), normed, and the raw patches after each block of `layers`.

        mask (B, N) bool: True = the patch embedding is replaced by mask_token, before its position is added.
        keep (B, K) int64: only these patches enter the blocks, N becomes K (MAE, arXiv:2111.06377).
        """
        x, outs = self.tokens(x, mask, keep, layers)                        # (B, T, C)
        x = self.norm(x)                                                    # (B, T, C)
        return x[:, 0], x[:, self.prefix:], outs                            # (B, C), (B, N, C), each (B, N, C)

    def blocks_out(self, x, layers):
        """Raw outputs [(B, N, C)] of the blocks with these indices; blocks after the last of them do not run."""
        _, outs = self.tokens(x, layers=layers, depth=max(layers) + 1)
        return outs

    def tokens(self, x, mask=None, keep=None, layers=(), depth=None):
        """The residual stream (B, T, C) after `depth` blocks (default: all), and the patches after each of `layers`."""
        grid = grid_of(x.shape[-2:], self.patch_size)                       # (h, w), N = h w
        x = self.patch_embed(x)                                             # (B, N, C)
        if mask is not None:                                                # (B, N)
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)    # (B, N, C)

        cls = self.cls_token                                                # (1, 1, C)
        if self.pos_embed is not None:
            pos_embed = resize_pos_embed(self.pos_embed, self.grid, grid)   # (1, 1 + N, C)
            cls = cls + pos_embed[:, :1]                                    # (1, 1, C)
            x = x + pos_embed[:, 1:]                                        # (B, N, C)
        if keep is not None:                                                # (B, K), N becomes K
            x = x.gather(1, keep[..., None].expand(-1, -1, self.embed_dim))     # (B, K, C)

        first = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        first = torch.cat(first, dim=1).expand(x.shape[0], -1, -1)          # (B, 1 + registers, C)
        x = torch.cat([first, x], dim=1)                                    # (B, T, C)

        rotation = self.rotary_position(grid, keep, x.device) if self.rope else None
        depth = self.depth if depth is None else depth
        outs = {}
        for i in range(depth):
            x = self.blocks[i](x, rotation)                                 # (B, T, C)
            if i in layers:
                outs[i] = x[:, self.prefix:]                                # (B, N, C)
        return x, [outs[i] for i in layers]

    def rotary_position(self, grid, keep, device):
        """Cosines and sines, each (1 or B, 1, T, D / 2), D = C / heads, of the angles that rotary positions turn by."""
        angles = rope_angles(self.rope, grid, self.embed_dim // self.num_heads, device)     # (N, D / 2)
        angles = angles[None] if keep is None else angles[keep]             # (1 or B, N, D / 2)
        angles = F.pad(angles, (0, 0, self.prefix, 0))[:, None]             # CLS, registers: no position, angle 0
        return angles.cos(), angles.sin()


# --- Other image and patch sizes ------------------------------------------------------------------------------------

def grid_of(img_size, patch_size):
    """Patches along (height, width); img_size is one number or (H, W) in pixels."""
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    if h % patch_size or w % patch_size or min(h, w) < patch_size:
        raise UserError(f"an image of {h}x{w} pixels does not divide into patches of {patch_size}: use multiples of it")
    return h // patch_size, w // patch_size


def resize_pos_embed(pos_embed, old, new, offset=0.0):
    """pos_embed (1, 1 + h w, C) of grid old = (h, w), interpolated to grid new; CLS's row is kept.

    offset: interpolate by the factors (new + offset) / old instead of to the size. DINOv2's hub models do so with 0.1,
    which gives as many positions, sampled at slightly other places.
    """
    if tuple(old) == tuple(new):
        return pos_embed
    cls = pos_embed[:, :1]
    patches = pos_embed[:, 1:].unflatten(1, old).permute(0, 3, 1, 2).float()                # (1, C, h, w)
    if offset:
        target = dict(scale_factor=((new[0] + offset) / old[0], (new[1] + offset) / old[1]))
    else:
        target = dict(size=tuple(new))
    patches = F.interpolate(patches, **target, mode="bicubic", align_corners=False, antialias=ANTIALIAS)
    patches = patches.flatten(2).transpose(1, 2).to(cls.dtype)                              # (1, N, C)
    return torch.cat([cls, patches], dim=1)


def resize_patch_embed(weight, size):
    """Patch kernels (C, 3, P, P) resized to (C, 3, size, size), see PATCH_RESIZE."""
    old = weight.shape[-1]
    if size == old:
        return weight
    how = dict(size=(size, size), mode="bicubic", align_corners=False, antialias=ANTIALIAS)
    if PATCH_RESIZE == "bicubic":
        return F.interpolate(weight, **how)
    # "pinv": the kernel whose products with resized patches B x are nearest to those of the old one with patches x
    pixels = torch.eye(old * old).view(-1, 1, old, old)
    B = F.interpolate(pixels, **how).flatten(1).T                                        # (size^2, old^2)
    return (weight.flatten(2) @ torch.linalg.pinv(B)).unflatten(-1, (size, size))


# --- Loading --------------------------------------------------------------------------------------------------------
# Strict: a key that is missing or left over is an error, except for these, which no encoder here has a use for.

DROPPED = re.compile(r"(head|head_dist|lm_head)\."              # classifiers; DINO's and EVA-02's pretraining heads
                     r"|dist_token$"                            # DeiT's distillation token (and its row of pos_embed)
                     r"|(blocks\.\d+\.attn\.)?rope\."           # EVA-02's rotation tables: rope_angles computes them
                     r"|rope_embed\."                           # DINOv3's wavelengths: likewise
                     r"|blocks\.\d+\.attn\.qkv\.bias_mask$"     # DINOv3: 0 for keys, which have no bias here
                     r"|local_cls_norm\.")                      # DINOv3's satellite model: for its training only


def load_vit(name_or_path, img_size=None, patch_size=None, depth=None, pretrained=True, offset=0.0, official=True):
    """Builds an encoder with its weights; prints one line that says from which file and what was changed.

    name_or_path: a name of ENCODERS, or a checkpoint: an official file, this project's student.pt or segmenter.pt, or
    a checkpoint of the official GKD repository. img_size (int or (H, W)) and patch_size, in pixels, resize pos_embed
    and the patch kernels; depth keeps the first blocks only; pretrained=False gives a name's architecture at random.
    offset: of a DINOv2's pos_embed, see resize_pos_embed; other families have none. official: a name's file must have
    its SHA-256. Raises UserError where the name, the file, its keys, its numbers or the sizes are wrong.
    """
    name = str(name_or_path)
    row = ENCODERS.get(name)
    if row is None and not pretrained:
        raise UserError(f"{name}: only a named encoder can start at random, one of {', '.join(ENCODERS)}")
    if row is not None and (row.url is None or not pretrained):
        vit = ViT(**resized(constructor_values(name, row), img_size, patch_size, depth))
        say(f"{name}: starts at random, {vit.depth} blocks, patch {vit.patch_size}, grid {vit.grid[0]}x{vit.grid[1]}")
        return vit
    path = find_file(name, row)
    check_file(path)
    origin = origin_of(path, row, official)
    state, values, contents = read_encoder(path, name, row)
    wanted = resized(values, img_size, patch_size, depth)
    is_dinov2 = values["layerscale"] and not values["rope"]
    vit, changes = vit_of(path, state, values, wanted, offset if is_dinov2 else 0.0)
    say(f"{vit.name}: " + "; ".join(origin + contents + changes))
    return vit


def student_checkpoint(vit):
    """What student.pt holds: "model" has the encoder's keys, which timm loads (not DINOv3's); mask_token beside it."""
    model = vit.state_dict()
    mask_token = model.pop("mask_token")
    return dict(encoder=vit.config, mask_token=mask_token, model=model)


def ledger_and_heads(name_or_path):
    """What a checkpoint of this project brings along: the ledgers of the stages behind it, and its heads (or None)."""
    if name_or_path in ENCODERS or not Path(name_or_path).is_file():
        return [], None
    saved = open_checkpoint(name_or_path)
    return checked_ledger(name_or_path, saved.get("ledger", [])), saved.get("objective")


def checked_ledger(path, ledger):
    """The ledgers of a checkpoint's stages, a dict each; found damaged here, not when they are added up at last."""
    for stage in ledger if isinstance(ledger, list) else [None]:
        for cost in ("seconds", "flops"):
            if not isinstance(stage, dict) or not fits(Weight, stage.get(cost)):
                raise UserError(f"{path}: its ledger, which says what its training took, is damaged: it was changed by "
                                "hand; make the file again")
    return ledger


def is_first(variable):
    """Whether this process is alone, or the one whose RANK, or LOCAL_RANK, is 0 of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get(variable, "0") == "0"


def say(line):
    if is_first("RANK"):                                                        # one process speaks for all
        print(line, flush=True)


# --- Loading: which file --------------------------------------------------------------------------------------------

def find_file(name, row):
    """The file of a named encoder, downloaded if no copy lies in WEIGHTS or in torch.hub's cache; or the path given."""
    if row is None:
        if not Path(name).is_file():
            raise UserError(f"{name}: neither a file nor a known encoder; the names are {', '.join(ENCODERS)}")
        return Path(name)
    file = file_name(row)
    place = Path(WEIGHTS, file)
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    shipped = Path(__file__).parent / row.url  # of the toy teacher
    for path in [place, Path(WEIGHTS, f"{bare(file)}.pth"), Path(WEIGHTS, f"{name}.pth"), cached, shipped]:
        if path.is_file():
            return path
    if row.url == ON_REQUEST:
        raise UserError(f"{name}: its weights are given on request only: ask at {row.url} and put the file at {place}")
    if not is_first("LOCAL_RANK"):                                              # one process of a machine downloads
        while not cached.is_file():                                             # if it fails, torchrun ends all
            time.sleep(1)
        return cached
    say(f"{name}: downloading {row.url} to {cached}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(row.url, str(cached), hash_prefix=row.sha256)
    except (OSError, RuntimeError) as error:                                    # no network; RuntimeError: a wrong hash
        raise UserError(f"{name}: {row.url} cannot be had ({error}): download it and put it at {place}")
    return cached


def file_name(row):
    return row.file or row.url.rsplit("/", 1)[-1]


def bare(path):
    """A file's name without its ending and without the hash that DeiT's and DINOv3's files carry."""
    return re.sub(r"(-[0-9a-f]{8})?\.(pth|pt|bin)$", "", Path(path).name)


def origin_of(path, row, official):
    """Notes that say which file was read; UserError if it had to be the official one of this row and is another."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    notes = [f"{path} (SHA-256 {digest[:8]})"]
    if row is not None and row.sha256 and not digest.startswith(row.sha256):
        if official:
            raise UserError(f"{path}: its SHA-256 starts with {digest[:8]}, the official file's with {row.sha256}; "
                            "fetch it again, or say --official no if this file is meant")
        notes.append(f"not the official file, whose SHA-256 starts with {row.sha256}")
    return notes


# --- Loading: the tensors in it, and their architecture -------------------------------------------------------------

def read_encoder(path, name, row):
    """The file's encoder: {parameter: tensor}, the ViT's constructor values, and notes on what was dropped or added."""
    checkpoint = open_checkpoint(path)
    state, prefix = encoder_tensors(path, checkpoint)
    notes = [f"keys under {prefix} only"] if prefix else []
    saved = checkpoint.get("encoder")
    ours = isinstance(saved, dict) and not saved.keys().isdisjoint(Encoder._fields)     # a checkpoint of this project
    if "encoder" in checkpoint and not isinstance(saved, dict):
        raise UserError(f"{path}: its \"encoder\" describes no encoder: it is a {type(saved).__name__}")
    if ours and torch.is_tensor(checkpoint.get("mask_token")):
        state["mask_token"] = checkpoint["mask_token"]
    state, dropped = official_to_ours(state)

    if row is not None:
        values = constructor_values(name, row)
    elif ours:
        values = stored_values(f'{path}: its "encoder"', saved)
    else:
        values, guess = infer_values(path, state)
        if prefix.endswith("backbone."):                                        # official GKD: so for EVA-02, too
            values |= IMAGENET
            guess = []
        notes += guess
    inner_attn_ln = any("inner_attn_ln" in key for key in state)                # EVA-02 exists with and without
    if dropped:
        notes.append(f"dropped {' '.join(dropped)}")
    if "mask_token" not in state:
        state["mask_token"] = 0.02 * torch.randn(1, values["embed_dim"])
        notes.append("mask_token is new")
    return state, values | dict(inner_attn_ln=inner_attn_ln), notes


def open_checkpoint(path):
    """The dict in a checkpoint, of whatever kind: here alone one is opened.

    UserError where it is damaged or none."""
    path = Path(path)
    check_file(path)
    try:
        if zipfile.is_zipfile(path):                                            # torch.load does not check the sums
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > 100 * path.stat().st_size:
                    raise ValueError("it claims to hold a hundred times its own size")
                damaged = parts.testzip()
            if damaged:
                raise ValueError(f"the bytes of {damaged} have changed")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:                                          # it holds other things than tensors
            saved = read_foreign(path)
        for tensor in tensors_in(saved):
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(f"a tensor claims to hold {tensor.numel()} numbers, and they are not there")
    except Exception as error:                                                  # damaged bytes raise nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:80]
        raise UserError(f"{path} is truncated, damaged or no checkpoint ({path.stat().st_size} bytes; {reason}): fetch "
                        "it again") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds no dict of tensors, but {type(saved).__name__}: save the state dict")
    return saved


def check_file(path):
    """UserError unless a path leads to a file that can be read as a whole."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: is a folder or a device, not a file")
        with open(path, "rb") as file:
            beginning = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    if beginning.lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, not a checkpoint: the download did not reach the file, repeat it")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 512 * found.st_blocks < found.st_size / 8 or found.st_size > memory:
        there = 512 * found.st_blocks / 1e9
        raise UserError(f"{path} has {found.st_size / 1e9:.0f} GB, of which {there:.1f} are there: no checkpoint that "
                        "this machine could load; fetch it again")


class Foreign(dict):
    """Stands for every class and function that a file names: can be called and filled, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    def append(self, item):
        pass

    def add(self, item):
        pass

    __hash__ = object.__hash__                                                  # it may be a key


def rebuild_tensor(storage, offset, size, stride, *unused):
    return storage.as_strided(size, stride, offset)


def rebuild_parameter(tensor, *unused):
    return tensor


KNOWN = {  # all that a file may name and get; a storage's type is taken for its dtype
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}


class ForeignUnpickler(pickle.Unpickler):
    """Reads a pickle of torch.save: tensors and plain values as they are, all else as Foreign.

    storage(name, dtype, count) gives the numbers that a tensor is a view of."""

    def __init__(self, file, storage):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module, name):
        return KNOWN.get((module, name), Foreign)

    def persistent_load(self, saved_id):
        _, dtype, name, _, count, *_ = saved_id                                 # "storage", type, name, device, length
        return self.storage(name, dtype, count)


def read_foreign(path):
    """The content of a file of torch.save that pickles objects beside its tensors, as mmengine's do.

    No class or function that it names is imported or called, so that a file made to run code runs none.
    """
    if not zipfile.is_zipfile(path):
        return read_old(path)
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].split("/")[0]

        def storage(name, dtype, count):
            content = bytearray(archive.read(f"{folder}/data/{name}"))
            if not content or dtype is Foreign:
                return torch.empty(0)
            return torch.frombuffer(content, dtype=dtype)
        return ForeignUnpickler(archive.open(f"{folder}/data.pkl"), storage).load()


def read_old(path):
    """The same of a file of torch before 1.6, as timm's and DeiT's: a pickle, then all numbers."""
    storages = {}

    def storage(name, dtype, count):
        if count * dtype.itemsize > path.stat().st_size:
            raise ValueError("it claims to hold more than its own size")
        return storages.setdefault(name, torch.zeros(count, dtype=dtype))
    with open(path, "rb") as file:
        *_, saved, names = [ForeignUnpickler(file, storage).load() for _ in range(5)]   # number, version, machine first
        for name in names:
            file.seek(8, os.SEEK_CUR)                                           # the length, which is known
            if file.readinto(storages[name].view(torch.uint8).numpy()) != storages[name].nbytes:
                raise EOFError("it ends too soon")
    return saved


def tensors_in(saved):
    """All tensors in nested dicts and lists, which may hold themselves."""
    seen = set()
    left = [saved]
    while left:
        part = left.pop()
        if torch.is_tensor(part):
            yield part
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            left += part.values() if isinstance(part, dict) else part


def encoder_tensors(path, checkpoint):
    """The tensors of the one encoder in a checkpoint, and the prefix of their keys, which is taken off."""
    ending = "patch_embed.proj.weight"                                          # every encoder has this key
    state = checkpoint
    for _ in range(4):                                                          # and no deeper: a dict may hold itself
        if isinstance(state, dict) and not any(str(key).endswith(ending) for key in state):
            inner = [key for key in ("model", "module", "state_dict", "teacher") if key in state]
            state = state[inner[0]] if inner else None
    if not isinstance(state, dict) or not any(str(key).endswith(ending) for key in state):
        raise UserError(f"{path} holds no encoder: no key in it ends in {ending}")
    prefixes = [key.removesuffix(ending) for key in state if str(key).endswith(ending)]
    students = [prefix for prefix in prefixes if prefix.endswith("student.backbone.")]      # official GKD saves both
    prefix = (students + prefixes)[0]
    tensors = {}
    for key, tensor in state.items():
        if str(key).startswith(prefix) and torch.is_tensor(tensor):
            tensors[key.removeprefix(prefix)] = tensor
    return tensors, prefix


def official_to_ours(state):
    """An official file's tensors as ViT holds them, in fp32, and the names of those that were dropped."""
    ours = {}
    dropped = set()
    for key, tensor in state.items():
        if DROPPED.match(key):
            dropped.add(key.split("attn.")[-1])                                 # one name for all blocks' key
        else:
            ours[key] = tensor.float() if tensor.is_floating_point() else tensor    # which no weights are: check_state
    if "dist_token" in dropped:
        ours["pos_embed"] = torch.cat([ours["pos_embed"][:, :1], ours["pos_embed"][:, 2:]], dim=1)
    if "mask_token" in ours:
        ours["mask_token"] = ours["mask_token"].reshape(1, -1)                  # DINOv2 (1, C), EVA-02 (1, 1, C)
    if "storage_tokens" in ours:                                                # DINOv3
        ours["register_tokens"] = ours.pop("storage_tokens")
        for key in [key for key in ours if key.endswith("attn.qkv.bias")]:
            q_bias, _, v_bias = ours.pop(key).chunk(3)                          # bias_mask sets the keys' third to 0
            ours[key.replace("qkv.bias", "q_bias")] = q_bias.clone()
            ours[key.replace("qkv.bias", "v_bias")] = v_bias.clone()
    return ours, sorted(dropped)


def infer_values(path, state):
    """Constructor values of an official file, from its tensors and its name, and notes on what is a guess."""
    kernel = state["patch_embed.proj.weight"]
    pos_embed = state.get("pos_embed")
    rope = ""
    if "blocks.0.attn.q_bias" in state:                                         # a v_bias, too, but no bias of keys
        rope = "dinov3" if pos_embed is None else "eva02"
    unusual = kernel.ndim != 4 or len(kernel) % 64
    if rope != "dinov3":
        unusual = unusual or pos_embed is None or pos_embed.ndim != 3
    if unusual:
        raise UserError(f"{path}: the architecture is unclear, as pos_embed is missing or its shape or that of "
                        "patch_embed.proj.weight is unusual; give the encoder's name and put the file into WEIGHTS")

    dim = len(kernel)
    patch_size = kernel.shape[-1]
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    side = 16 if pos_embed is None else math.isqrt(pos_embed.shape[1] - 1)      # a row or two are not patches
    blocks = [key.split(".")[1] for key in state if key.startswith("blocks.")]
    values = dict(
        embed_dim=dim, depth=max(1, len(set(blocks))), num_heads=dim // 64,
        patch_size=patch_size, img_size=side * patch_size,
        layerscale="blocks.0.ls1.gamma" in state,
        registers=registers,
        rope=rope,
        sub_ln="blocks.0.attn.q_proj.weight" in state,
        eps=1e-5 if rope == "dinov3" else 1e-6)
    if "blocks.0.mlp.w3.weight" in state:
        hidden = state["blocks.0.mlp.w3.weight"].shape[1]
        values.update(mlp="swiglu", mlp_ratio=round(1.5 * hidden / dim))

    for name, row in ENCODERS.items():
        if row.url and bare(path) in (name, bare(file_name(row))):
            return values | dict(name=name, mean=row.mean, std=row.std), []
    family = "ImageNet"
    if "augreg" in path.name.lower():
        family = "AugReg"
    if rope == "eva02":
        family = "EVA-02"
    statistics = {"EVA-02": CLIP, "AugReg": HALF, "ImageNet": IMAGENET}[family]
    return values | dict(name=bare(path)) | statistics, [f"normalisation taken to be {family}'s"]


def stored_values(what, saved):
    """The "encoder" of one of this project's checkpoints, of which ViT is built; UserError where it is none."""
    kinds = typing.get_type_hints(Encoder, include_extras=True) | dict(name=str)
    required = set(kinds) - set(Encoder._field_defaults)
    wrong = [f"{key} is missing" for key in sorted(required - saved.keys())]
    for key, value in saved.items():
        if key not in kinds:
            wrong.append(f"{key} is unknown to this version")
        elif not fits(kinds[key], value):
            wrong.append(f"{key} is {value!r}"[:80])
    for key, count, kind in (("mean", 3, Positive), ("std", 3, Positive), ("img_size", 2, Pixels)):
        numbers = saved.get(key)
        if isinstance(numbers, (tuple, list)) and (len(numbers) != count or not all(fits(kind, n) for n in numbers)):
            wrong.append(f"{key} is {numbers!r}"[:80])
    if not wrong and saved["embed_dim"] % saved["num_heads"]:
        wrong.append(f"{saved['num_heads']} heads do not share a width of {saved['embed_dim']}")
    if wrong:
        raise UserError(f"{what} describes no encoder: {', '.join(wrong[:4])}")
    return saved


def constructor_values(name, e):
    """What ViT is built from, and what checkpoints store: a row without its file."""
    values = dict(name=name, **e._asdict())
    for key in ("url", "sha256", "file"):
        del values[key]
    return values


# --- Loading: the sizes asked for -----------------------------------------------------------------------------------

def resized(values, img_size, patch_size, depth):
    """Constructor values with the asked sizes; without img_size the stored one, rounded down to whole patches."""
    patch = patch_size or values["patch_size"]
    if img_size is None:
        size = values["img_size"]
        img_size = size // patch * patch if isinstance(size, int) else tuple(n // patch * patch for n in size)
    if depth is None:
        depth = values["depth"]
    if not 1 <= depth <= values["depth"]:
        raise UserError(f"depth must be 1 to {values['depth']} for {values['name']}, not {depth}")
    return values | dict(img_size=img_size, patch_size=patch, depth=depth)


def vit_of(path, state, values, wanted, offset):
    """The ViT of the wanted constructor values with the tensors of one of the file's, and notes on what was changed."""
    if f"blocks.{values['depth'] - 1}.norm1.weight" not in state:               # before so many blocks are built
        raise UserError(f"{path} does not fit the encoder: block {values['depth'] - 1} is missing")
    with torch.device("meta"):                                                  # shapes only: no memory, no draws
        old = ViT(**values)
        vit = ViT(**wanted)
    check_state(f"{path} does not fit the encoder", state, old.state_dict())

    notes = []
    if vit.pos_embed is not None and old.grid != vit.grid:
        h, w = old.grid
        how = f"bicubic, offset {offset:g}" if offset else "bicubic"
        notes.append(f"pos_embed {h}x{w} -> {vit.grid[0]}x{vit.grid[1]} ({how})")
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], old.grid, vit.grid, offset)
    if old.patch_size != vit.patch_size:
        notes.append(f"patch {old.patch_size} -> {vit.patch_size} ({PATCH_RESIZE})")
        state["patch_embed.proj.weight"] = resize_patch_embed(state["patch_embed.proj.weight"], vit.patch_size)
    if old.depth != vit.depth:
        notes.append(f"the first {vit.depth} of {old.depth} blocks")
    vit.load_state_dict({key: state[key] for key in vit.state_dict()}, assign=True)
    return vit, notes


def check_state(complaint, state, expected):
    """Refuses a state dict whose names, shapes or numbers are not those expected: UserError, the complaint and them."""
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is not expected" for key in state if key not in expected]
    for key in expected:
        if key in state and state[key].shape != expected[key].shape:
            wrong.append(f"{key} has shape {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}")
        elif key in state and state[key].is_floating_point() != expected[key].is_floating_point():
            wrong.append(f"{key} holds {state[key].dtype} numbers, and {expected[key].dtype} ones are expected")
        elif key in state and not state[key].isfinite().all():
            wrong.append(f"{key} holds numbers that are not finite")
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(f"{complaint}: {', '.join(wrong[:6])}{more}")


# --- The objectives' constants --------------------------------------------------------------------------------------

@dataclass
class LossConfig:
    """Constants of the objectives; distill.Config and segment.Config inherit them: each is a flag of both scripts."""
    loss: Literal["qsd", "mse", "cwd", "afdcd", "g2sd", "vitkd", "proteus"] = "qsd"  # a key of qsd.LOSSES
    # the paper's objective, --loss qsd
    alpha: Weight = 1.0         # weight of L_feat; 0 leaves out the term, its head and its work
    beta: Weight = 1.0          # weight of L_mask; likewise
    gamma: Weight = 1.0         # weight of L_cls; 0 leaves the CLS token out of every term
    distance: Literal["mse", "l1", "cosine"] = "mse"  # between student and teacher, in all three terms; paper: mse
    feat_with_cls: bool = True  # official: L_feat is the mean over [CLS; patches]; the paper: over the patches
    mask_ratio: Share = 0.5     # share of the patches hidden in a masked image: int(mask_ratio N) exactly
    mask_all: bool = False      # no: every second image is masked (official: half of the batch); yes: all (the paper)
    mask_loss: Literal["all", "masked_samples", "masked_tokens"] = "all"  # L_mask: of all tokens (official), or these
    attention: Literal["learned", "identity", "teacher"] = "learned"  # who queries: v_s (paper), nobody (W = 1), v_t
    scale: Literal["one", "sqrt", "cosine"] = "one"  # logits times 1 (paper), times C_t^-1/2, or cosines / temperature
    temperature: Positive = 0.07    # for --scale cosine only
    qsd_queries: CountOr0 = 0   # patches of an image that query in L_feat and L_mask, drawn at random; 0 (paper): all
    pool_keys: bool = False     # yes: the N keys and values are averaged 2x2 to N / 4; paper: no
    layers: Literal["last", "four"] = "last"  # paper: the last block; four: also the three others that a decoder reads
    # every objective
    target_norm: Literal["none", "layernorm"] = "none"  # of the teacher's final tokens; paper and official: none
    dcd_pool: Count = 4         # Af-DCD pools both maps by this first (4 needs a grid of 16x16 patches or more)


# --- Query-based soft distillation ----------------------------------------------------------------------------------

# Every objective has one interface, so that a training loop does not know which one it runs:
#   objective = build_objective(student, teacher, config)
#   losses = objective(student, x, s, t, noise) -> dict of scalars; losses["loss"] is what is minimised
# x (B, 3, H, W) are the images. t = (cls, patches, outs) is the teacher's pass, with the raw outs of layers_t.
# s is the student's plain pass likewise, or None where objective.plain is False. noise (B, N), uniform in 0..1, is the
# only source of randomness. objective.weight is the published weight beside a task loss, for the mean reductions here.

def cosine_distance(a, b):
    return (1 - F.cosine_similarity(a, b, dim=-1)).mean()


DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "cosine": cosine_distance}


def projection(dim_s, dim_t):
    """To the teacher's width: "a linear projection layer" in the paper, LayerNorm and Linear in the official code."""
    return nn.Sequential(nn.LayerNorm(dim_s), nn.Linear(dim_s, dim_t))


def matmul(a, b):
    """a @ b of fp32 numbers, under autocast, too: a softmax of large, unscaled logits does not bear bf16's rounding."""
    dtype = torch.promote_types(b.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def tokens_at(v, index):
    """The tokens of v (B, N, C) at these indices (B, K): (B, K, C). All of them where the indices are None."""
    if index is None:
        return v
    return v.gather(1, index[..., None].expand(-1, -1, v.shape[-1]))


class QSD(nn.Module):
    """Every student token queries all teacher tokens, and their similarities reweight the student's own values.

    v_s (B, N, C_s), v_t (B, N, C_t) -> v_s' (B, N, C_t), in fp32. With queries (B, K) only these tokens of an image
    query: v_s' (B, K, C_t).
    """
    def __init__(self, dim_s, dim_t):
        super().__init__()
        self.varphi = projection(dim_s, dim_t)                      # the paper's φ makes the queries
        self.phi = projection(dim_s, dim_t)                         # the paper's ϕ makes the values

    def weights(self, v_s, v_t, queries=None):
        asking = tokens_at(v_s, queries)                            # paper: all N tokens
        W = matmul(self.varphi(asking), v_t.mT)                     # Eq. 7  (B, N, N)
        return W.softmax(-1)

    def forward(self, v_s, v_t, queries=None):
        return matmul(self.weights(v_s, v_t, queries), self.phi(v_s))   # Eq. 8  (B, N, C_t)


class GKD(nn.Module):
    """The paper's objective, L_QSD: features, masked patches and CLS token, each through a QSD head of its own.

    GKD is the paper's name for the whole method, of which this is what stage 1 minimises.
    """
    weight = 1.0
    layers_s = layers_t = ()

    def __init__(self, student, teacher, config):
        super().__init__()
        c = self.config = config
        if not (c.alpha or c.beta or c.gamma):
            raise UserError("--alpha, --beta and --gamma are all 0: nothing is left to learn from")
        self.feat = build_head(student, teacher, c) if c.alpha else None
        self.mask = build_head(student, teacher, c) if c.beta else None
        self.cls = build_head(student, teacher, c) if c.gamma else None
        self.unmasked_count = c.mask_loss == "all" and not c.mask_all   # tokens of unmasked images count in L_mask
        self.plain = bool(c.alpha or c.gamma or (c.beta and self.unmasked_count))

    def forward(self, student, x, s, t, noise):
        c = self.config
        distance = DISTANCES[c.distance]                            # paper: the squared error
        v_t_cls, v_t, _ = t                                         # (B, C_t), (B, N, C_t)
        v_s_cls, v_s, _ = s if self.plain else (None, None, None)   # (B, C_s), (B, N, C_s)
        N = v_t.shape[1]
        L_feat = L_mask = L_cls = 0.0

        if c.alpha:
            queries = random_queries(noise, c.qsd_queries)          # (B, K); paper: None, all N query
            v_s_prime = self.feat(v_s, v_t, queries)                # (B, N, C_t)
            v_t_asked = tokens_at(v_t, queries)
            L_feat = distance(v_s_prime, v_t_asked)                 # Eq. 9
        if c.beta:
            v_s_mask_prime, v_t_mask = self.masked(student, x, v_s, v_t, noise)
            L_mask = distance(v_s_mask_prime, v_t_mask)             # Eq. 10
        if c.gamma:                                                 # one key: the softmax is 1, only phi learns
            v_s_cls_prime = self.cls(v_s_cls[:, None], v_t_cls[:, None])[:, 0]      # (B, C_t)
            L_cls = distance(v_s_cls_prime, v_t_cls)                # Eq. 11
        if c.alpha and c.gamma and c.feat_with_cls:
            L_feat = (N * L_feat + L_cls) / (N + 1)                 # the official mean over [CLS; patches]
        loss = c.alpha * L_feat + c.beta * L_mask + c.gamma * L_cls     # Eq. 12

        losses = {"L_feat": L_feat, "L_mask": L_mask, "L_cls": L_cls, "loss": loss}
        return {name: value for name, value in losses.items() if torch.is_tensor(value)}    # no term of weight 0

    def masked(self, student, x, v_s, v_t, noise):
        """The masked pass through its head, v_s'^mask, and the teacher tokens that it must equal: both (B', N', C_t).

        B' and N' are what --mask_loss counts: images, or masked ones; patches, or hidden ones. Only the masked images
        go through the student again. Where the others count, too (all), their tokens are those of the plain pass, which
        a second pass without a mask would equal.
        """
        c = self.config
        which = masked_images(c)
        hidden = random_mask(noise[which], c.mask_ratio)            # (M, N), for the M masked images
        v_s_mask = student(x[which], hidden)[1]                     # (M, N, C_s)
        if self.unmasked_count:
            index = torch.arange(len(x), device=x.device)[which]
            v_s_mask = v_s.to(v_s_mask.dtype).index_copy(0, index, v_s_mask)    # (B, N, C_s)
        else:
            v_t = v_t[which]
            noise = noise[which]
        if c.mask_loss == "masked_tokens":
            queries = hidden_tokens(hidden, c.mask_ratio)           # (B', N')
        else:
            queries = random_queries(noise, c.qsd_queries)
        return self.mask(v_s_mask, v_t, queries), tokens_at(v_t, queries)


def masked_images(config):
    """Which images are masked: micro-batches are even, so every second one of each is every second of the batch."""
    return slice(0, None, 1 if config.mask_all else 2)


def random_mask(noise, ratio):
    """Hides exactly int(ratio N) patches of each image: uniform noise (B, N) -> mask (B, N) bool, True = hidden."""
    return noise.argsort(1).argsort(1) < int(ratio * noise.shape[1])


def hidden_tokens(mask, ratio):
    """Indices (B, K), ascending, of the patches that random_mask hides with this ratio.

    mask.nonzero() would do, but a GPU would have to wait until the CPU knows how many those are: here K is known
    beforehand.
    """
    K = int(ratio * mask.shape[1])
    return mask.int().argsort(dim=1, descending=True, stable=True)[:, :K]


def random_queries(noise, K):
    """Indices (B, K) of random patches, or None for K = 0: all of them.

    They stand at equal distances in the order of the noise, at whose beginning random_mask hides: as large a share of
    them is hidden as of all, and a mean over them is an unbiased estimate of the mean over all.
    """
    if not K:
        return None
    N = noise.shape[1]
    return noise.argsort(1)[:, torch.arange(K, device=noise.device) * N // K]


def normalize_targets(t, how):
    """The teacher's pass t = (cls, patches, outs) as the objectives see it: in fp32, its tokens under --target_norm."""
    cls, patches, outs = t
    cls = cls.float()
    patches = patches.float()
    if how == "layernorm":
        cls = F.layer_norm(cls, cls.shape[-1:])
        patches = F.layer_norm(patches, patches.shape[-1:])
    return cls, patches, [out.float() for out in outs]


# --- Ablations of it, beyond the paper ------------------------------------------------------------------------------

class QSDVariant(QSD):
    """QSD with another attention, another scale of its logits or fewer keys; see LossConfig."""
    def __init__(self, dim_s, dim_t, grid, config):
        super().__init__(dim_s, dim_t)
        self.grid = grid
        self.config = config
        if config.attention != "learned":
            del self.varphi                                         # nothing asks for learned queries

    def forward(self, v_s, v_t, queries=None):
        if self.config.attention == "identity":                     # without the product by the unit matrix
            return self.phi(tokens_at(v_s, queries)).float()
        return matmul(self.weights(v_s, v_t, queries), self.pooled(self.phi(v_s)))

    def weights(self, v_s, v_t, queries=None):
        c = self.config
        if c.attention == "identity":                               # every token keeps its own value: pointwise
            return torch.eye(v_t.shape[1], device=v_t.device, dtype=v_t.dtype).expand(len(v_t), -1, -1)
        query = self.varphi(tokens_at(v_s, queries)) if c.attention == "learned" else tokens_at(v_t, queries)
        key = self.pooled(v_t)
        if c.scale == "sqrt":
            query = query * v_t.shape[-1] ** -0.5
        elif c.scale == "cosine":
            query = F.normalize(query.to(key.dtype), dim=-1) / c.temperature
            key = F.normalize(key, dim=-1)
        return matmul(query, key.mT).softmax(-1)                    # (B, N, N)

    def pooled(self, v):
        """Under --pool_keys, means of 2x2 tokens: (B, N, C) -> (B, N / 4, C). A CLS token is alone and stays."""
        if not self.config.pool_keys or v.shape[1] == 1:
            return v
        maps = v.mT.unflatten(-1, self.grid)                        # (B, C, h, w)
        return F.avg_pool2d(maps, 2, ceil_mode=True).flatten(2).mT


def build_head(student, teacher, config):
    """The QSD head that a LossConfig describes, between two encoders."""
    if config.attention == "learned" and config.scale == "one" and not config.pool_keys:
        return QSD(student.embed_dim, teacher.embed_dim)
    return QSDVariant(student.embed_dim, teacher.embed_dim, student.grid, config)


def feature_layers(depth):
    """The four blocks a decoder reads: [3, 5, 7, 11] of 12, in proportion at other depths ([7, 11, 15, 23] of 24)."""
    return [max(0, round(depth * part / 12) - 1) for part in (4, 6, 8, 12)]


class GKDFourLayers(GKD):
    """GKD that also distils the three earlier blocks which a decoder reads (--layers four), as a term L_inner."""
    def __init__(self, student, teacher, config):
        super().__init__(student, teacher, config)
        if not config.alpha:
            raise UserError("--layers four adds to L_feat, which --alpha 0 leaves out")
        self.layers_s = feature_layers(student.depth)[:3]
        self.layers_t = feature_layers(teacher.depth)[:3]
        self.inner = nn.ModuleList(build_head(student, teacher, config) for _ in self.layers_t)

    def forward(self, student, x, s, t, noise):
        losses = super().forward(student, x, s, t, noise)
        L_inner = 0.0
        for head, v_s, v_t in zip(self.inner, s[2], t[2], strict=True):
            v_t = F.layer_norm(v_t, v_t.shape[-1:])                 # raw outputs of different blocks differ in scale
            L_inner = L_inner + DISTANCES[self.config.distance](head(v_s, v_t), v_t)
        loss = losses.pop("loss") + self.config.alpha * L_inner
        return losses | {"L_inner": L_inner, "loss": loss}


# --- The rivals of Tables 1, 2 and 4 --------------------------------------------------------------------------------

class MSE(nn.Module):
    """Vanilla KD (FitNets, Romero et al. 2015): the mean of (phi(s) - t)^2 over the patches, phi linear."""
    weight = 1.0
    plain = True
    layers_s = layers_t = ()

    def __init__(self, student, teacher, config):
        super().__init__()
        self.phi = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        return {"loss": F.mse_loss(self.phi(s[1]).float(), t[1])}


class CWD(nn.Module):
    """Channel-wise distillation (Shu et al. 2021): KL(teacher || student) of each channel's softmax over space."""
    weight = 50.0                       # CIRKD's weight of CWD on features, for this very reduction
    plain = True
    layers_s = layers_t = ()
    T = 4.0                             # temperature

    def __init__(self, student, teacher, config):
        super().__init__()
        self.align = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        log_p_s = (self.align(s[1]).float() / self.T).log_softmax(1)            # (B, N, C_t), a distribution over N
        log_p_t = (t[1] / self.T).log_softmax(1)
        kl = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)   # (B, C_t)
        return {"loss": self.T ** 2 * kl.mean()}


class AfDCD(nn.Module):
    """Augmentation-free dense contrastive distillation (Fan et al. 2023): reconstruct the teacher, then contrast.

    Published weights in sum form: reconstruction 1e-6 to 4e-5, contrast 1e-3 to 4e-2; in mean form here 1 and 1e-2.
    """
    weight = 1.0
    plain = True
    layers_s = layers_t = ()
    groups = 16                         # the channels are cut into groups, each a vector of its own
    patch = 4                           # vectors are contrasted within patches of 4x4 positions
    tau = 0.07                          # temperature of the contrast
    drop = 0.75                         # share of the student's tokens hidden before the reconstruction
    contrast = 1e-2                     # weight of the contrast

    def __init__(self, student, teacher, config):
        super().__init__()
        dim = teacher.embed_dim
        self.pool = config.dcd_pool
        self.align = nn.Linear(student.embed_dim, dim)
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, student, x, s, t, noise):
        h, w = grid_of(x.shape[2:], student.patch_size)
        if min(h, w) < self.pool * self.patch:
            raise UserError(f"--dcd_pool {self.pool} leaves no {self.patch}x{self.patch} patch on a grid of {h}x{w}: "
                            "use a smaller one")
        kept = ~random_mask(noise, self.drop)                                   # (B, N)
        f_s = (self.align(s[1]) * kept[..., None]).mT.unflatten(2, (h, w))      # (B, C_t, h, w)
        f_s = self.project(f_s).float()
        f_t = t[1].mT.unflatten(2, (h, w))
        L_fd = F.mse_loss(f_s, f_t)

        distance = torch.cdist(self.vectors(f_s), self.vectors(f_t), p=1)       # (B P, 16 M, 16 M)
        which = torch.arange(distance.shape[1], device=x.device)
        group = which % self.groups
        same_group = (group[:, None] == group) & (which[:, None] != which)
        logits = (-distance / self.tau).masked_fill(same_group, float("-inf"))  # the positive and other groups' vectors
        L_con = self.groups * F.cross_entropy(logits.mT, which.expand(len(logits), -1))
        return {"L_fd": L_fd, "L_con": L_con, "loss": L_fd + self.contrast * L_con}

    def vectors(self, f):
        """Map (B, C, h, w), pooled, cut into P patches of 4x4 -> vectors (B P, 16 M, C / M), M groups of channels."""
        f = F.max_pool2d(f, self.pool)
        cut = F.unfold(f, self.patch, stride=self.patch)                        # (B, C * 16, P)
        cut = cut.unflatten(1, (self.groups, -1, self.patch ** 2))              # (B, M, C / M, 16, P)
        return cut.permute(0, 4, 3, 1, 2).flatten(2, 3).flatten(0, 1)           # (B P, 16 M, C / M)


class G2SD(nn.Module):
    """Generic-to-specific distillation, generic stage (Huang et al. 2023): a quarter of the patches predicts all."""
    weight = 1.0
    plain = False                       # the student sees the kept patches only
    layers_s = layers_t = ()
    keep = 0.25                         # share of the patches that the student sees
    width = 256                         # of the decoder
    depth = 4                           # its blocks
    beta = 2.0                          # of the smooth L1 loss

    def __init__(self, student, teacher, config):
        super().__init__()
        N = student.grid[0] * student.grid[1]
        self.embed = nn.Linear(student.embed_dim, self.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, N, self.width))
        block = Encoder(embed_dim=self.width, depth=self.depth, num_heads=8, patch_size=1, img_size=1)
        blocks = [Block(block) for _ in range(self.depth)]
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(self.width), nn.Linear(self.width, teacher.embed_dim))

    def forward(self, student, x, s, t, noise):
        B, N = noise.shape
        keep = noise.argsort(1)[:, :int(self.keep * N)]                         # (B, K), indices of visible patches
        seen = self.embed(student.run(x, keep=keep)[1])                         # (B, K, 256)
        everywhere = self.mask_token.to(seen.dtype).expand(B, N, -1)
        full = everywhere.scatter(1, keep[..., None].expand_as(seen), seen)     # (B, N, 256)
        predicted = self.decoder(full + self.pos_embed).float()                 # (B, N, C_t)
        target = F.layer_norm(t[1], t[1].shape[-1:])
        return {"loss": F.smooth_l1_loss(predicted, target, beta=self.beta)}


class ViTKD(nn.Module):
    """ViTKD (Yang et al. 2024): mimic the first two blocks, generate the last one from half of its positions.

    The published weights 3e-5 and 3e-6 / 0.5 of sums are about 4.5 and 0.23 of means, at 196 tokens of width 384.
    """
    weight = 1.0
    plain = True
    mimic = 4.5
    generate = 0.23
    hidden = 0.5                        # share of the positions that are generated

    def __init__(self, student, teacher, config):
        super().__init__()
        dim = teacher.embed_dim
        self.layers_s = (0, 1, student.depth - 1)
        self.layers_t = (0, 1, teacher.depth - 1)
        self.align = nn.ModuleList(nn.Linear(student.embed_dim, dim) for _ in range(3))
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, student, x, s, t, noise):
        first, second, last = [align(out) for align, out in zip(self.align, s[2])]      # each (B, N, C_t)
        first_t, second_t, last_t = t[2]
        L_mimic = F.mse_loss(first.float(), first_t) + F.mse_loss(second.float(), second_t)

        hidden = random_mask(noise, self.hidden)[..., None]                     # (B, N, 1)
        f = torch.where(hidden, self.token.to(last.dtype), last)
        f = self.project(f.mT.unflatten(2, grid_of(x.shape[2:], student.patch_size)))   # (B, C_t, h, w)
        error = (f.flatten(2).mT.float() - last_t) ** 2 * hidden                # (B, N, C_t)
        L_generate = error.sum() / (hidden.sum() * error.shape[-1])
        loss = self.mimic * L_mimic + self.generate * L_generate
        return {"L_mimic": L_mimic, "L_generate": L_generate, "loss": loss}


class Proteus(nn.Module):
    """Proteus (Zhang et al. 2025): CLS, all tokens, hidden patches of masked images, each LayerNorm -> Linear."""
    weight = 1.0
    plain = True
    layers_s = layers_t = ()

    def __init__(self, student, teacher, config):
        super().__init__()
        self.config = config
        self.cls = projection(student.embed_dim, teacher.embed_dim)
        self.feat = projection(student.embed_dim, teacher.embed_dim)
        self.patch = projection(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        which = masked_images(self.config)
        ratio = self.config.mask_ratio
        hidden = random_mask(noise[which], ratio)                               # (B/2, N)
        v_s_mask = self.patch(student(x[which], hidden)[1]).float()
        tokens_s = torch.cat([s[0][:, None], s[1]], 1)                          # (B, 1 + N, C_s)
        tokens_t = torch.cat([t[0][:, None], t[1]], 1)
        L_cls = F.mse_loss(self.cls(s[0]).float(), t[0])
        L_feat = F.mse_loss(self.feat(tokens_s).float(), tokens_t)
        counted = hidden_tokens(hidden, ratio)
        L_mask = F.mse_loss(tokens_at(v_s_mask, counted), tokens_at(t[1][which], counted))
        return {"L_cls": L_cls, "L_feat": L_feat, "L_mask": L_mask, "loss": L_cls + L_feat + L_mask}


OF_QSD = ("alpha", "beta", "gamma", "distance", "feat_with_cls", "mask_loss", "attention", "scale", "temperature",
          "qsd_queries", "pool_keys", "layers")  # constants that no other objective reads
LOSSES = {"qsd": GKD, "mse": MSE, "cwd": CWD, "afdcd": AfDCD, "g2sd": G2SD, "vitkd": ViTKD, "proteus": Proteus}


def build_objective(student, teacher, config):
    """The objective that a LossConfig describes, for these two encoders."""
    N = student.grid[0] * student.grid[1]
    hidden = int(config.mask_ratio * N)
    if not hidden and (config.mask_loss == "masked_tokens" or config.loss == "proteus"):
        raise UserError(f"--mask_ratio {config.mask_ratio} hides no patch, but the loss is one of hidden patches alone")
    if config.loss != "qsd":
        given = asdict(config)
        default = asdict(LossConfig())
        for name in OF_QSD:
            if given[name] != default[name]:
                raise UserError(f"--{name} {given[name]} changes nothing: --loss {config.loss} does not read it")
    if config.qsd_queries > N:
        raise UserError(f"--qsd_queries {config.qsd_queries}: an image has only {N} patches")
    if config.qsd_queries and config.mask_loss == "masked_tokens":
        raise UserError("--qsd_queries draws from all patches, --mask_loss masked_tokens counts the hidden ones only: "
                        "leave out one of the two")
    if config.loss == "qsd" and config.layers == "four":
        return GKDFourLayers(student, teacher, config)
    return LOSSES[config.loss](student, teacher, config)


def load_heads(objective, heads, path):
    """Continue with the heads that a student's checkpoint holds, instead of fresh ones (--keep_heads)."""
    try:
        check_state(f"{path} does not fit the objective", heads or {}, objective.state_dict())
        objective.load_state_dict(heads)
    except (UserError, AttributeError, RuntimeError) as error:
        raise UserError(f"--keep_heads: {path} holds no heads of this --loss, teacher and student ({error})"
                        ) from None
