"""The method of GKD: the distillation losses, and the encoders (ViTs that load the official weights).

Read it from the top: constants, QSD and GKD as in the paper, their rivals, the encoders' table, the ViT, and last, of
interest to few, how files are read. "Official" is the code of GKD's authors, "official files" are released weights.
"""
import json
import math
import os
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """A user's mistake, in one line: what is wrong, in which file or flag. Scripts end with status 2."""

    def __str__(self):
        return super().__str__().split("UserError: ")[-1].strip()  # workers wrap it in a traceback


def say(line):
    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        print(line, flush=True)


# --- The objectives' constants --------------------------------------------------------------------------------------

@dataclass
class LossConfig:
    """Constants of the objectives, flags of distill.py and segment.py, whose Configs inherit them."""
    loss: Literal["qsd", "mse", "cwd", "afdcd", "g2sd", "vitkd", "proteus"] = "qsd"  # a key of qsd.LOSSES
    target_norm: Literal["none", "layernorm"] = "none"  # of the teacher's final tokens (paper: none)
    dcd_pool: int = 4           # afdcd pools both maps by this first (4 needs 16x16 patches at least)
    # the paper's objective, --loss qsd; proteus reads its mask_ratio and mask_all
    alpha: float = 1.0          # weight of L_feat; 0 leaves out the term, its head and its work
    beta: float = 1.0           # weight of L_mask; likewise
    gamma: float = 1.0          # weight of L_cls; 0 leaves the CLS token out of every term
    feat_with_cls: bool = True  # official: L_feat is the mean over [CLS; patches]; paper: patches
    mask_ratio: float = 0.5     # share of the patches hidden in a masked image: int(mask_ratio N)
    mask_all: bool = False      # no: every second image of L_mask is masked (official: half); yes: all (paper)
    attention: Literal["learned", "identity", "teacher"] = "learned"  # who queries: v_s (paper), none (σ(W) = I), v_t
    scale: Literal["one", "sqrt"] = "one"  # of the logits: 1 (paper) or C_t^-1/2
    layers: Literal["last", "four"] = "last"  # paper: the last; four: all that a decoder reads


# --- Query-based soft distillation ----------------------------------------------------------------------------------

class Objective(nn.Module):
    """What all objectives share, so that a training loop does not know which one it runs.

    `losses = objective(student, x, s, t, noise)`: a dict of scalars; losses["loss"] is minimised. x (B, 3, H, W) are
    images; t = (cls, patches, outs) is the teacher's pass: (B, C_t), (B, N, C_t), raw outputs of layers_t; s is the
    student's. noise (B, N), uniform in 0..1, is the only source of randomness.
    """
    weight = 1.0  # the published weight beside a task loss, which segment.py multiplies by
    reads_s = True  # False: it makes its own pass, s is None
    layers_s = layers_t = ()  # blocks whose raw outputs it reads


def projection(dim_s, dim_t):
    """To the teacher's width: in the paper "a linear projection layer", officially this."""
    return nn.Sequential(nn.LayerNorm(dim_s), nn.Linear(dim_s, dim_t))


def matmul_fp32(a, b):
    """a @ b in fp32 (CUDA: TF32) or fp64, also under autocast: bf16 would round logits by 0.1 and more."""
    dtype = torch.promote_types(b.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


class QSD(nn.Module):
    """Every student token queries all teacher tokens, and their similarities reweight the student's own values.

    v_s (B, N, C_s), v_t (B, N, C_t) -> v_s' (B, N, C_t), in fp32, and the attention σ(W) (B, N, N) that made it.
    """
    def __init__(self, dim_s, dim_t, attention="learned", scale="one"):
        super().__init__()
        self.attention = attention
        self.scale = scale
        self.varphi = projection(dim_s, dim_t)  # the paper's φ makes the queries
        self.phi = projection(dim_s, dim_t)  # the paper's ϕ makes the values
        if attention != "learned":  # it was drawn and is dropped, so that phi starts the same
            self.varphi = None

    def forward(self, v_s, v_t):
        sigma_W = self.weights(v_s, v_t)  # (B, N, N)
        return matmul_fp32(sigma_W, self.phi(v_s)), sigma_W  # Eq. 8  (B, N, C_t)

    def weights(self, v_s, v_t):
        """σ(W): row i tells how much student token i takes of the value at each place j."""
        if self.attention == "identity":  # ablation: each token keeps its own value
            return torch.eye(v_t.shape[1], device=v_t.device, dtype=v_t.dtype).expand(len(v_t), -1, -1)
        query = v_t if self.attention == "teacher" else self.varphi(v_s)  # paper: φ(v_s)
        if self.scale == "sqrt":  # ablation: as in a transformer
            query = query * v_t.shape[-1] ** -0.5
        W = matmul_fp32(query, v_t.mT)  # Eq. 7  (B, N, N)
        return W.softmax(-1)


class GKD(Objective):
    """The paper's objective, L_QSD: features, masked patches and CLS token, each through a QSD head of its own.

    "diagonal" is no term, but the share of L_feat's attention that a patch pays to its own place: with
    learned queries some 1 / N at first, more as it becomes local. --layers four adds L_inner, of earlier blocks.
    """
    def __init__(self, student, teacher, config):
        super().__init__()
        c = self.config = config
        if not (c.alpha or c.beta or c.gamma):
            raise UserError("--alpha, --beta and --gamma are all 0: nothing is left to learn from")
        head = partial(QSD, student.embed_dim, teacher.embed_dim, c.attention, c.scale)
        self.feat = head() if c.alpha else None
        self.mask = head() if c.beta else None
        self.cls = head() if c.gamma else None
        if c.layers == "four":
            if not c.alpha:
                raise UserError("--layers four adds to L_feat, which --alpha 0 leaves out")
            self.layers_s = feature_layers(student.depth)[:3]
            self.layers_t = feature_layers(teacher.depth)[:3]
            self.inner = nn.ModuleList(head() for _ in self.layers_t)

    def forward(self, student, x, s, t, noise):
        c = self.config
        v_s_cls, v_s, outs_s = s                                # (B, C_s), (B, N, C_s)
        v_t_cls, v_t, outs_t = t                                # (B, C_t), (B, N, C_t)
        N = v_t.shape[1]
        L_feat = L_mask = L_cls = diagonal = 0.0

        if c.alpha:
            v_s_prime, sigma_W = self.feat(v_s, v_t)            # (B, N, C_t), (B, N, N)
            L_feat = F.mse_loss(v_s_prime, v_t)                 # Eq. 9
            diagonal = sigma_W.detach().diagonal(dim1=1, dim2=2).mean()
        if c.beta:
            v_s_mask = self.masked_pass(student, x, v_s, noise)  # (B, N, C_s)
            v_s_mask_prime, _ = self.mask(v_s_mask, v_t)        # (B, N, C_t)
            L_mask = F.mse_loss(v_s_mask_prime, v_t)            # Eq. 10
        if c.gamma:                                             # one key: σ(W) = 1, so varphi's gradient is 0
            v_s_cls_prime, _ = self.cls(v_s_cls[:, None], v_t_cls[:, None])  # (B, 1, C_t)
            L_cls = F.mse_loss(v_s_cls_prime[:, 0], v_t_cls)    # Eq. 11
        if c.alpha and c.gamma and c.feat_with_cls:
            L_feat = (N * L_feat + L_cls) / (N + 1)             # official: the mean over [CLS; patches]
        loss = c.alpha * L_feat + c.beta * L_mask + c.gamma * L_cls  # Eq. 12

        losses = {"L_feat": L_feat, "L_mask": L_mask, "L_cls": L_cls, "diagonal": diagonal}
        if c.layers == "four":
            L_inner = losses["L_inner"] = self.inner_loss(outs_s, outs_t)
            loss = loss + c.alpha * L_inner
        losses["loss"] = loss
        return {name: value for name, value in losses.items() if torch.is_tensor(value)}  # no term of weight 0

    def inner_loss(self, outs_s, outs_t):
        """L_feat, without CLS, of the three earlier blocks that a decoder reads."""
        L_inner = 0.0
        for head, v_s, v_t in zip(self.inner, outs_s, outs_t, strict=True):  # each (B, N, C_s), (B, N, C_t)
            v_t = F.layer_norm(v_t, v_t.shape[-1:])  # raw outputs differ in scale
            L_inner = L_inner + F.mse_loss(head(v_s, v_t)[0], v_t)
        return L_inner

    def masked_pass(self, student, x, v_s, noise):
        """Patches (B, N, C_s) for L_mask; the images not masked, officially half, count in it with their v_s."""
        which = masked_images(self.config)
        hidden = random_mask(noise[which], self.config.mask_ratio)  # (M, N), for the M masked images
        v_s_mask = v_s.clone()
        v_s_mask[which] = student(x[which], hidden)[1]
        return v_s_mask


def masked_images(config):
    """Which images are masked: all, or every second one, that is even draws, since micro-batches begin with one."""
    return slice(0, None, 1 if config.mask_all else 2)


def random_mask(noise, ratio):
    """Uniform noise (B, N) -> mask (B, N) bool: True hides int(ratio N) patches of each image."""
    return noise.argsort(1).argsort(1) < int(ratio * noise.shape[1])


def normalize_targets(t, how):
    """The pass t = (cls, patches, outs) in fp32; --target_norm applies to cls and patches."""
    cls, patches, outs = t
    cls = cls.float()
    patches = patches.float()
    if how == "layernorm":
        cls = F.layer_norm(cls, cls.shape[-1:])
        patches = F.layer_norm(patches, patches.shape[-1:])
    return cls, patches, [out.float() for out in outs]


def feature_layers(depth):
    """The four blocks a decoder reads: [3, 5, 7, 11] of 12, [7, 11, 15, 23] of 24 and so on."""
    return [max(0, round(depth * part / 12) - 1) for part in (4, 6, 8, 12)]


# --- The rivals of Tables 1, 2 and 4 --------------------------------------------------------------------------------

class MSE(Objective):
    """Vanilla KD (FitNets, Romero et al. 2015): the mean of (phi(s) - t)^2, phi linear."""
    def __init__(self, student, teacher, config):
        super().__init__()
        self.phi = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        return {"loss": F.mse_loss(self.phi(s[1]).float(), t[1])}


class CWD(Objective):
    """Channel-wise distillation (Shu et al. 2021): KL of each channel's softmax over space."""
    weight = 50.0  # CIRKD's, for a KL that is summed over space and averaged over channels
    T = 4.0        # temperature

    def __init__(self, student, teacher, config):
        super().__init__()
        self.align = nn.Linear(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        log_p_s = (self.align(s[1]).float() / self.T).log_softmax(1)               # (B, N, C_t), over N
        log_p_t = (t[1] / self.T).log_softmax(1)
        kl = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(1)  # (B, C_t)
        return {"loss": self.T ** 2 * kl.mean()}


class AfDCD(Objective):
    """Augmentation-free dense contrastive distillation (Fan et al. 2023): reconstruct the teacher, then contrast."""
    groups = 16  # the channels are cut into groups, each a vector of its own
    patch = 4    # vectors are contrasted within patches of 4x4 positions
    tau = 0.07   # temperature of the contrast
    drop = 0.75  # share of the student's tokens hidden before the reconstruction
    contrast = 1e-2  # weight of the contrast (published: 1e-3 to 4e-2)

    def __init__(self, student, teacher, config):
        super().__init__()
        dim = teacher.embed_dim
        self.pool = config.dcd_pool
        self.align = nn.Linear(student.embed_dim, dim)
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def vectors(self, f):
        """Map (B, C, h, w), pooled, in P patches of 16 places -> (B P, 16 M, C / M), M groups, at M * place + group."""
        f = F.max_pool2d(f, self.pool)
        cut = F.unfold(f, self.patch, stride=self.patch)               # (B, C * 16, P)
        cut = cut.unflatten(1, (self.groups, -1, self.patch ** 2))     # (B, M, C / M, 16, P)
        return cut.permute(0, 4, 3, 1, 2).flatten(2, 3).flatten(0, 1)  # (B P, 16 M, C / M)

    def forward(self, student, x, s, t, noise):
        h, w = grid_of(x.shape[2:], student.patch_size)
        if min(h, w) < self.pool * self.patch:
            raise UserError(f"--dcd_pool {self.pool} leaves no {self.patch}x{self.patch} patch on a grid of {h}x{w}: "
                            "use a smaller one")
        kept = ~random_mask(noise, self.drop)  # (B, N)
        f_s = (self.align(s[1]) * kept[..., None]).mT.unflatten(2, (h, w))  # (B, C_t, h, w)
        f_s = self.project(f_s).float()
        f_t = t[1].mT.unflatten(2, (h, w))
        L_fd = F.mse_loss(f_s, f_t)  # a mean of 1024 x 768 is 1.3e-6 of the sum (published: 1e-6 to 4e-5)

        distance = torch.cdist(self.vectors(f_s), self.vectors(f_t), p=1)  # (B P, 16 M of s, 16 M of t)
        index = torch.arange(distance.shape[1], device=x.device)
        group = index % self.groups
        # A student's vector shall find the teacher's of its place and group among those of other groups at all places.
        # As published, the same group elsewhere is left out, and the loss is summed over groups.
        same_group = (group[:, None] == group) & (index[:, None] != index)
        logits = (-distance / self.tau).masked_fill(same_group, float("-inf"))
        L_con = self.groups * F.cross_entropy(logits.mT, index.expand(len(logits), -1))
        return {"L_fd": L_fd, "L_con": L_con, "loss": L_fd + self.contrast * L_con}


class G2SD(Objective):
    """Generic-to-specific distillation, generic stage (Huang et al. 2023): a quarter of the patches predicts all."""
    reads_s = False  # the student sees the kept patches only
    keep = 0.25    # share of the patches that the student sees
    width = 256    # of the decoder
    depth = 4      # its blocks
    beta = 2.0     # of the smooth L1 loss

    def __init__(self, student, teacher, config):
        super().__init__()
        N = student.grid[0] * student.grid[1]
        self.embed = nn.Linear(student.embed_dim, self.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, N, self.width))
        spec = Spec(self.width, self.depth, num_heads=8, patch_size=1, img_size=1)  # Block reads no patch or image
        blocks = [Block(spec) for _ in range(self.depth)]
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(self.width), nn.Linear(self.width, teacher.embed_dim))

    def forward(self, student, x, s, t, noise):
        B, N = noise.shape
        keep = noise.argsort(1)[:, :int(self.keep * N)]  # (B, K), indices of visible patches
        seen = self.embed(student.tokens(x, keep=keep)[1])  # (B, K, 256)
        everywhere = self.mask_token.to(seen.dtype).expand(B, N, -1)
        full = everywhere.scatter(1, keep[..., None].expand_as(seen), seen)  # (B, N, 256)
        predicted = self.decoder(full + self.pos_embed).float()  # (B, N, C_t)
        target = F.layer_norm(t[1], t[1].shape[-1:])
        return {"loss": F.smooth_l1_loss(predicted, target, beta=self.beta)}


class ViTKD(Objective):
    """ViTKD (Yang et al. 2024): mimic the first two blocks, generate the last one from half of its positions."""
    mimic = 4.5      # of a mean; published 3e-5 of a sum: 3e-5 x 2 blocks x 196 x 384
    generate = 0.23  # likewise 6e-6 x 98 hidden places x 384
    hidden = 0.5  # share of the positions that are generated

    def __init__(self, student, teacher, config):
        super().__init__()
        dim = teacher.embed_dim
        self.layers_s = (0, 1, student.depth - 1)
        self.layers_t = (0, 1, teacher.depth - 1)
        self.align = nn.ModuleList(nn.Linear(student.embed_dim, dim) for _ in range(3))
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.project = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, student, x, s, t, noise):
        first, second, last = [align(out) for align, out in zip(self.align, s[2])]  # each (B, N, C_t)
        first_t, second_t, last_t = t[2]
        L_mimic = (F.mse_loss(first.float(), first_t) + F.mse_loss(second.float(), second_t)) / 2

        hidden = random_mask(noise, self.hidden)[..., None]       # (B, N, 1)
        f = torch.where(hidden, self.token.to(last.dtype), last)
        f = self.project(f.mT.unflatten(2, grid_of(x.shape[2:], student.patch_size)))  # (B, C_t, h, w)
        error = (f.flatten(2).mT.float() - last_t) ** 2 * hidden  # (B, N, C_t)
        L_generate = error.sum() / (hidden.sum() * error.shape[-1])
        loss = self.mimic * L_mimic + self.generate * L_generate
        return {"L_mimic": L_mimic, "L_generate": L_generate, "loss": loss}


class Proteus(Objective):
    """Proteus (Zhang et al. 2025): CLS, all tokens, hidden patches of masked images, each LayerNorm -> Linear."""
    def __init__(self, student, teacher, config):
        super().__init__()
        self.config = config
        self.cls = projection(student.embed_dim, teacher.embed_dim)
        self.feat = projection(student.embed_dim, teacher.embed_dim)
        self.patch = projection(student.embed_dim, teacher.embed_dim)

    def forward(self, student, x, s, t, noise):
        which = masked_images(self.config)
        hidden = random_mask(noise[which], self.config.mask_ratio)  # (M, N)
        v_s_mask = self.patch(student(x[which], hidden)[1]).float()
        tokens_s = torch.cat([s[0][:, None], s[1]], 1)              # (B, 1 + N, C_s)
        tokens_t = torch.cat([t[0][:, None], t[1]], 1)
        L_cls = F.mse_loss(self.cls(s[0]).float(), t[0])
        L_feat = F.mse_loss(self.feat(tokens_s).float(), tokens_t)
        K = int(self.config.mask_ratio * hidden.shape[1])
        places = noise[which].argsort(1)[:, :K, None]  # (M, K, 1); indexing by a mask makes a GPU wait
        L_mask = F.mse_loss(v_s_mask.take_along_dim(places, 1), t[1][which].take_along_dim(places, 1))
        return {"L_cls": L_cls, "L_feat": L_feat, "L_mask": L_mask, "loss": L_cls + L_feat + L_mask}


OF_QSD = ("alpha", "beta", "gamma", "feat_with_cls", "attention", "scale", "layers")  # rivals read none
LOSSES = {"qsd": GKD, "mse": MSE, "cwd": CWD, "afdcd": AfDCD, "g2sd": G2SD, "vitkd": ViTKD, "proteus": Proteus}


def build_objective(student, teacher, config):
    """The objective that a LossConfig describes, for these two encoders."""
    N = student.grid[0] * student.grid[1]
    hidden = int(config.mask_ratio * N)
    if hidden > N or (config.loss == "proteus" and not hidden):
        raise UserError(f"--mask_ratio {config.mask_ratio} hides {hidden} of {N} patches: give a share")
    unread = () if config.loss == "qsd" else OF_QSD
    if config.loss not in ("qsd", "proteus"):
        unread += ("mask_ratio", "mask_all")
    for name in unread:
        if getattr(config, name) != getattr(LossConfig, name):
            raise UserError(f"--{name} {getattr(config, name)} changes nothing: --loss {config.loss} ignores it")
    return LOSSES[config.loss](student, teacher, config)


# --- Encoders: the table --------------------------------------------------------------------------------------------

WEIGHTS = "weights"  # where official files are looked for first, then in torch.hub's cache
# Whether bicubic resizes of pos_embed and patch kernels are antialiased: officially not, in timm yes. The pos_embed
# of DINOv2 with registers always is when load_vit resizes it, as in its hub models.
ANTIALIAS = False

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
SATELLITE = dict(mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))
STATISTICS = dict(imagenet=IMAGENET, half=HALF, clip=CLIP, satellite=SATELLITE)


class Spec(NamedTuple):
    """A row of ENCODERS: the architecture, what images are normalised with, the official file."""
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int            # pixels
    img_size: int | tuple      # pixels, one number or (H, W): the size that pos_embed is stored for
    url: str | None = None     # None: no official file exists, the encoder starts at random
    sha256: str | None = None  # its first digits, which downloads are checked by
    file: str | None = None    # its name on disk, if the address does not say it
    layerscale: bool = False   # DINOv2, DINOv3: each branch times a learned vector
    registers: int = 0         # DINOv2 "_reg", DINOv3: tokens between CLS and patches, without a position
    mlp: Literal["gelu", "swiglu"] = "gelu"  # the latter in DINOv2-g, EVA-02 and DINOv3's "plus" models
    mlp_ratio: int = 4         # an MLP's hidden width over embed_dim; SwiGLU takes two thirds of it
    rope: Literal["", "eva02", "dinov3"] = ""  # queries and keys are rotated by position, keys have no bias
    sub_ln: bool = False       # EVA-02 B and L: a LayerNorm inside the MLP; q, k, v and the MLP's gate not fused
    inner_attn_ln: bool = False  # some EVA-02 files: a LayerNorm before attn.proj as well
    eps: float = 1e-6          # of every LayerNorm; DINOv3: 1e-5
    mean: tuple = IMAGENET["mean"]
    std: tuple = IMAGENET["std"]


DEIT = "https://dl.fbaipublicfiles.com/deit/"
DINO = "https://dl.fbaipublicfiles.com/dino/"
V2 = "https://dl.fbaipublicfiles.com/dinov2/dinov2_"
EVA = "https://huggingface.co/Yuxin-CV/EVA-02/resolve/main/eva02/pt/"
TIMM = "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
ON_REQUEST = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"  # DINOv3: a form
TI = (192, 12, 3)  # width, depth, heads
S = (384, 12, 6)
B = (768, 12, 12)
L = (1024, 24, 16)
H = (1280, 32, 20)
G = (1536, 40, 24)
LS = dict(layerscale=True)
REG = dict(layerscale=True, registers=4)
GLU = dict(mlp="swiglu")
EVA02 = dict(rope="eva02", **GLU, **CLIP)  # official GKD feeds EVA-02 with IMAGENET's statistics instead
V3 = dict(url=ON_REQUEST, layerscale=True, registers=4, rope="dinov3", eps=1e-5)  # no pos_embed: any grid
V3PLUS = dict(mlp_ratio=6, **GLU, **V3)

ENCODERS = {  # size, patch, image, official file, its SHA-256, what differs from DeiT
    "deit_tiny": Spec(*TI, 16, 224, DEIT + "deit_tiny_patch16_224-a1311bcf.pth", "a1311bcf"),
    "deit_small": Spec(*S, 16, 224, DEIT + "deit_small_patch16_224-cd65a155.pth", "cd65a155"),
    "deit_base": Spec(*B, 16, 224, DEIT + "deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d"),
    "deit_tiny_distilled": Spec(*TI, 16, 224, DEIT + "deit_tiny_distilled_patch16_224-b40b3cf7.pth", "b40b3cf7"),
    "deit_small_distilled": Spec(*S, 16, 224, DEIT + "deit_small_distilled_patch16_224-649709d9.pth", "649709d9"),
    "deit_base_distilled": Spec(*B, 16, 224, DEIT + "deit_base_distilled_patch16_224-df68dfff.pth", "df68dfff"),
    "vit_tiny_augreg": Spec(*TI, 16, 224, TIMM + "/resolve/main/pytorch_model.bin",
        file="vit_tiny_patch16_224.augreg_in21k_ft_in1k.pth", **HALF),
    "dino_vits16": Spec(*S, 16, 224, DINO + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vitb16": Spec(*B, 16, 224, DINO + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dinov2_vits14": Spec(*S, 14, 518, V2 + "vits14/dinov2_vits14_pretrain.pth", "b938bf1b", **LS),
    "dinov2_vitb14": Spec(*B, 14, 518, V2 + "vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f8", **LS),
    "dinov2_vitl14": Spec(*L, 14, 518, V2 + "vitl14/dinov2_vitl14_pretrain.pth", "d5383ea8", **LS),
    "dinov2_vitg14": Spec(*G, 14, 518, V2 + "vitg14/dinov2_vitg14_pretrain.pth", "baf8467e", **LS, **GLU),
    "dinov2_vits14_reg": Spec(*S, 14, 518, V2 + "vits14/dinov2_vits14_reg4_pretrain.pth", "f4331770", **REG),
    "dinov2_vitb14_reg": Spec(*B, 14, 518, V2 + "vitb14/dinov2_vitb14_reg4_pretrain.pth", "73182a08", **REG),
    "dinov2_vitl14_reg": Spec(*L, 14, 518, V2 + "vitl14/dinov2_vitl14_reg4_pretrain.pth", "36e4deff", **REG),
    "dinov2_vitg14_reg": Spec(*G, 14, 518, V2 + "vitg14/dinov2_vitg14_reg4_pretrain.pth", "746ecb8c", **REG, **GLU),
    "dinov3_vits16": Spec(*S, 16, 256, file="dinov3_vits16_pretrain_lvd1689m-08c60483.pth", **V3),
    "dinov3_vits16plus": Spec(*S, 16, 256, file="dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth", **V3PLUS),
    "dinov3_vitb16": Spec(*B, 16, 256, file="dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth", **V3),
    "dinov3_vitl16": Spec(*L, 16, 256, file="dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", **V3),
    "dinov3_vitl16_sat": Spec(*L, 16, 256, file="dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", **V3, **SATELLITE),
    "dinov3_vith16plus": Spec(*H, 16, 256, file="dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth", **V3PLUS),
    "eva02_tiny": Spec(*TI, 14, 224, EVA + "eva02_Ti_pt_in21k_p14.pt", **EVA02),
    "eva02_small": Spec(*S, 14, 224, EVA + "eva02_S_pt_in21k_p14.pt", **EVA02),
    "eva02_base": Spec(*B, 14, 224, EVA + "eva02_B_pt_in21k_p14.pt", sub_ln=True, **EVA02),
    "eva02_large": Spec(*L, 14, 224, EVA + "eva02_L_pt_m38m_p14.pt", sub_ln=True, **EVA02),
    "toy_small": Spec(64, 4, 2, 8, 64),  # for the built-in toy world: no official file
    "toy_base": Spec(128, 4, 4, 8, 64),
    "toy_student": Spec(64, 4, 2, 8, 64, "assets/toy_student.pt"),  # shipped; trained on image labels
    "toy_teacher": Spec(128, 4, 4, 8, 64, "assets/toy_teacher.pt"),  # shipped
}


def constructor_values(name, row):
    """What ViT is built from, and what checkpoints store: a row without its file."""
    values = dict(name=name, **row._asdict())
    for key in ("url", "sha256", "file"):
        del values[key]
    return values


# --- The vision transformer -----------------------------------------------------------------------------------------
# Parameters have the names of the official files (but DINOv3's, see KEYS); e is a row of the table. Without options it
# is DeiT and DINO; what others add stands in their rows. DINOv3 has rope instead of pos_embed.

class Attention(nn.Module):
    def __init__(self, e):
        super().__init__()
        self.e = e
        dim = e.embed_dim
        if e.sub_ln:
            self.q_proj = nn.Linear(dim, dim, bias=False)
            self.k_proj = nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim, bias=False)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=not e.rope)
        if e.rope:  # keys have no bias
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.inner_attn_ln = nn.LayerNorm(dim, e.eps) if e.inner_attn_ln else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotation=None):      # (B, T, C), T = 1 + registers + N
        if self.e.sub_ln:
            weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        else:
            weight = self.qkv.weight
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]) if self.e.rope else self.qkv.bias
        qkv = F.linear(x, weight, bias)       # (B, T, 3 C)
        qkv = qkv.unflatten(-1, (3, self.e.num_heads, -1))  # (B, T, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        if rotation is not None:
            q = rotate(q, *rotation, self.e.rope)
            k = rotate(k, *rotation, self.e.rope)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, C / heads)
        x = x.transpose(1, 2).flatten(2)      # (B, T, C)
        return self.proj(self.inner_attn_ln(x))


def mlp(e):
    hidden = e.mlp_ratio * e.embed_dim
    layers = dict(fc1=nn.Linear(e.embed_dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, e.embed_dim))
    return nn.Sequential(OrderedDict(layers))


class SwiGLU(nn.Module):
    """A gate times a value, two thirds as wide: three matrices cost as much as mlp's two."""
    def __init__(self, e):
        super().__init__()
        hidden = 2 * e.mlp_ratio * e.embed_dim // 3  # DINOv2 rounds up to a multiple of 8, which G's 4096 is
        self.fused = not (e.sub_ln or e.rope == "dinov3")  # w12 makes gate and value
        if self.fused:
            self.w12 = nn.Linear(e.embed_dim, 2 * hidden)
        else:
            self.w1 = nn.Linear(e.embed_dim, hidden)
            self.w2 = nn.Linear(e.embed_dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, e.eps) if e.sub_ln else nn.Identity()
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
        self.norm1 = nn.LayerNorm(e.embed_dim, e.eps)
        self.norm2 = nn.LayerNorm(e.embed_dim, e.eps)
        self.attn = Attention(e)
        self.mlp = SwiGLU(e) if e.mlp == "swiglu" else mlp(e)
        self.ls1 = LayerScale(e) if e.layerscale else nn.Identity()
        self.ls2 = LayerScale(e) if e.layerscale else nn.Identity()

    def forward(self, x, rotation=None):  # (B, T, C), the residual stream
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


def rope_angles(rope, grid, head_dim, device):
    """Angles (N, D / 2) of the pairs of D = head_dim channels: half turn with y, half with x."""
    h, w = grid
    rows = torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    exponents = torch.arange(head_dim // 4, device=device) / (head_dim // 4)
    if rope == "eva02":  # any grid spans 0 to 16, the grid of EVA-02's pretraining (224 / 14)
        y = rows / h * 16
        x = columns / w * 16
        freqs = 10000. ** -exponents
    else:  # any grid spans -1 to 1; wavelengths go from 1 almost to 100
        y = 2 * (rows + 0.5) / h - 1
        x = 2 * (columns + 0.5) / w - 1
        freqs = 2 * math.pi / 100. ** exponents
    angles_y = (y[:, None] * freqs)[:, None].expand(h, w, -1)     # (h, w, D / 4)
    angles_x = (x[:, None] * freqs)[None].expand(h, w, -1)        # (h, w, D / 4)
    return torch.cat([angles_y, angles_x], dim=-1).flatten(0, 1)  # (N, D / 2)


def rotate(x, cos, sin, rope):
    """Turns the channel pairs of x (B, heads, T, D); cos and sin are (1 or B, 1, T, D / 2), in fp32."""
    if rope == "eva02":  # channels 2 i and 2 i + 1 are a pair
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:  # channels i and i + D / 2 are a pair
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.type_as(x)


class ViT(nn.Module):
    """A vision transformer: ViT(name, **values), values being Spec's fields without its file.

    `cls, patches = vit(x)`: x (B, 3, H, W), normalised by vit.mean and vit.std, H and W multiples of the patch;
    cls (B, C) and patches (B, N, C), both after the final norm.
    """
    def __init__(self, name, **values):
        super().__init__()
        e = Spec(**values)
        self.config = constructor_values(name, e)
        self.name = name
        self.mean = e.mean
        self.std = e.std
        self.embed_dim = e.embed_dim
        self.depth = e.depth
        self.num_heads = e.num_heads
        self.patch_size = e.patch_size
        self.rope = e.rope
        self.grid = grid_of(e.img_size, e.patch_size)  # (h, w) of the stored pos_embed
        self.prefix = 1 + e.registers  # tokens before the patches

        N = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, e.embed_dim, e.patch_size, e.patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, e.embed_dim))
        self.pos_embed = None if e.rope == "dinov3" else nn.Parameter(torch.zeros(1, 1 + N, e.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, e.embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, e.registers, e.embed_dim)) if e.registers else None
        self.blocks = nn.ModuleList(Block(e) for _ in range(e.depth))
        self.norm = nn.LayerNorm(e.embed_dim, e.eps)
        for key, parameter in self.named_parameters():  # as DeiT
            if parameter.ndim == 2 or "token" in key or key == "pos_embed":
                nn.init.trunc_normal_(parameter, std=0.02)
            elif key.endswith("bias") and "patch_embed" not in key:
                nn.init.zeros_(parameter)

    def forward(self, x, mask=None):
        return self.tokens(x, mask)[:2]

    def blocks_out(self, x, layers):
        """Raw outputs [(B, N, C)] of the blocks with these indices; later blocks do not run."""
        return self.tokens(x, layers=layers, depth=max(layers) + 1)[2]

    def tokens(self, x, mask=None, keep=None, layers=(), depth=None):
        """One pass: cls (B, C) and patches (B, N, C), normed, and the raw patches after each block of `layers`.

        mask (B, N) bool: True = mask_token instead of the patch's embedding, before its position is added.
        keep (B, K) int64: only these patches enter the blocks, N becomes K (MAE, arXiv:2111.06377).
        depth: only so many blocks run.
        """
        grid = grid_of(x.shape[-2:], self.patch_size)  # (h, w), N = h w
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, C)
        if mask is not None:                # (B, N)
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)  # (B, N, C)

        cls = self.cls_token                # (1, 1, C)
        if self.pos_embed is not None:
            pos_embed = resize_pos_embed(self.pos_embed, self.grid, grid)  # (1, 1 + N, C)
            cls = cls + pos_embed[:, :1]    # (1, 1, C)
            x = x + pos_embed[:, 1:]        # (B, N, C)
        if keep is not None:                # (B, K), N becomes K
            x = x.gather(1, keep[..., None].expand(-1, -1, self.embed_dim))  # (B, K, C)

        first = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        first = torch.cat(first, dim=1).expand(x.shape[0], -1, -1)  # (B, 1 + registers, C)
        x = torch.cat([first, x], dim=1)    # (B, T, C)
        rotation = self.rotary_position(grid, keep, x.device) if self.rope else None
        outs = {}
        for i in range(self.depth if depth is None else depth):
            x = self.blocks[i](x, rotation)  # (B, T, C)
            if i in layers:
                outs[i] = x[:, self.prefix:]  # (B, N, C)
        x = self.norm(x)                    # (B, T, C)
        return x[:, 0], x[:, self.prefix:], [outs[i] for i in layers]  # (B, C), (B, N, C), each (B, N, C)

    def rotary_position(self, grid, keep, device):
        """Cosines and sines (1 or B, 1, T, D / 2), D = C / heads, of rotary positions."""
        angles = rope_angles(self.rope, grid, self.embed_dim // self.num_heads, device)  # (N, D / 2)
        angles = angles[None] if keep is None else angles[keep]  # (1 or B, N, D / 2)
        angles = F.pad(angles, (0, 0, self.prefix, 0))[:, None]  # CLS, registers: no position, angle 0
        return angles.cos(), angles.sin()


def grid_of(img_size, patch_size):
    """Patches along (height, width); img_size is one number or (H, W) in pixels."""
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    if h % patch_size or w % patch_size or min(h, w) < patch_size:
        raise UserError(f"an image of {h}x{w} pixels does not divide into patches of {patch_size}: use multiples of it")
    return h // patch_size, w // patch_size


def resize_pos_embed(pos_embed, old, new, offset=0.0, antialias=ANTIALIAS):
    """pos_embed (1, 1 + h w, C) of grid old = (h, w), interpolated to grid new; CLS's row is kept.

    offset: DINOv2's interpolate_offset, 0.1 in hub models without registers; scales by (new + offset) / old.
    """
    if tuple(old) == tuple(new):
        return pos_embed
    cls = pos_embed[:, :1]
    patches = pos_embed[:, 1:].unflatten(1, old).permute(0, 3, 1, 2).float()  # (1, C, h, w)
    factors = ((new[0] + offset) / old[0], (new[1] + offset) / old[1])
    target = dict(scale_factor=factors) if offset else dict(size=tuple(new))
    patches = F.interpolate(patches, **target, mode="bicubic", antialias=antialias)
    patches = patches.flatten(2).transpose(1, 2).to(cls.dtype)  # (1, N, C)
    return torch.cat([cls, patches], dim=1)


def resized(values, img_size, patch_size, depth):
    """Constructor values with the asked sizes; a stored img_size is cut to whole patches."""
    patch = patch_size or values["patch_size"]
    if img_size is None:
        size = values["img_size"]
        img_size = size // patch * patch if isinstance(size, int) else tuple(n // patch * patch for n in size)
    depth = values["depth"] if depth is None else depth
    if not 1 <= depth <= values["depth"]:
        raise UserError(f"depth must be 1 to {values['depth']} for {values['name']}, not {depth}")
    return values | dict(img_size=img_size, patch_size=patch, depth=depth)


# --- Loading --------------------------------------------------------------------------------------------------------

def load_vit(name_or_path, img_size=None, patch_size=None, depth=None, pretrained=True, offset=0.0):
    """Builds an encoder with its weights; one line tells from which file, what was changed, what guessed.

    name_or_path: a name of ENCODERS or a checkpoint: official, of timm, transformers, this project or official GKD.
    img_size (int or (H, W)) and patch_size, in pixels, resize pos_embed and the patch kernels; depth: only the first
    blocks; pretrained=False: random weights; offset: of DINOv2 without registers, see resize_pos_embed. UserError
    where the name, the file, its keys, numbers or sizes are wrong.
    """
    name, given = split_options(name_or_path)
    row = ENCODERS.get(name)
    if row is None and not pretrained:
        raise UserError(f"{name}: only a named encoder can start at random, one of {', '.join(ENCODERS)}")
    if row is not None and (row.url is None or not pretrained):
        vit = ViT(**resized(constructor_values(name, row) | given, img_size, patch_size, depth))
        say(f"{name}: starts at random, {vit.depth} blocks, patch {vit.patch_size}, grid {vit.grid[0]}x{vit.grid[1]}")
        return vit

    path = find_file(name, row)
    state, values, notes = read_encoder(path, name, row, given)
    with torch.device("meta"):  # shapes only: no memory, no draws
        stored = ViT(**values)  # as stored: the file is checked by it
        vit = ViT(**resized(values, img_size, patch_size, depth))  # as asked for
    load_strictly(stored, state, f"{path} does not fit the encoder", assign=True)
    if vit.pos_embed is not None and vit.grid != stored.grid:
        antialias = ANTIALIAS or values["registers"] > 0  # as in DINOv2's hub models
        offset = offset if values["layerscale"] and not values["registers"] else 0.0  # DINOv2, no registers
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], stored.grid, vit.grid, offset, antialias)
        how = "antialiased" if antialias else f"offset {offset:g}"
        notes.append("pos_embed {}x{} -> {}x{} (bicubic, {})".format(*stored.grid, *vit.grid, how))
    if vit.patch_size != stored.patch_size:
        key = "patch_embed.proj.weight"  # (C, 3, P, P)
        state[key] = F.interpolate(state[key], 2 * (vit.patch_size,), mode="bicubic", antialias=ANTIALIAS)
        notes.append(f"patch {stored.patch_size} -> {vit.patch_size} (bicubic)")
    if vit.depth != stored.depth:
        notes.append(f"the first {vit.depth} of {stored.depth} blocks")
    vit.load_state_dict({key: state[key] for key in vit.state_dict()}, assign=True)
    say(f"{vit.name}: " + "; ".join([str(path)] + notes))
    return vit


def split_options(name_or_path):
    """A name or path, and what a file does not tell, given behind it: "weights.pth:heads=12,mean=half"."""
    name, *options = re.split(r":(?=\w+=[^/\\]*$)", str(name_or_path))
    values = {}
    for option in options[0].split(",") if options else []:
        key, _, value = option.partition("=")
        if key == "heads" and value.isdecimal():
            values["num_heads"] = int(value)
        elif key == "mean" and value in STATISTICS:
            values |= STATISTICS[value]
        else:
            raise UserError(f"{name_or_path}: {option} is none of heads=NUMBER, mean={'|'.join(STATISTICS)}")
    return name, values


def student_checkpoint(vit):
    """What student.pt holds: "model" has the encoder's keys, which timm loads, and mask_token stands beside it.

    timm reads DeiT, DINO and DINOv2 as they are, others by checkpoint_filter_fn of a module in timm.models:
    - DINOv2-g, registers: vision_transformer.checkpoint_filter_fn(model | {"mask_token": mask_token}, timm_model)
    - EVA-02: eva.checkpoint_filter_fn(model, timm_model), made with global_pool="token"
    - DINOv3: the same, of "..._qkvb"; "register_tokens" must be called "storage_tokens"
    """
    model = vit.state_dict()
    mask_token = model.pop("mask_token")
    return dict(encoder=vit.config, mask_token=mask_token, model=model)


def ledger_of(name_or_path):
    """What the stages behind a checkpoint of this project have cost, a dict each."""
    name, _ = split_options(name_or_path)
    return [] if name in ENCODERS else open_checkpoint(name).get("ledger", [])


def load_strictly(module, state, what, assign=False):
    """Fills a module with a state dict of its names and shapes, all numbers finite; or UserError."""
    expected = module.state_dict()
    wrong = None
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:  # several lines: keys missing, left over, of another shape
        wrong = " ".join(str(error).split())[:400]
    for key, tensor in state.items():
        if key in expected and tensor.is_floating_point() != expected[key].is_floating_point():
            wrong = f"{key} holds {tensor.dtype} numbers instead of {expected[key].dtype}"
        elif not tensor.isfinite().all():
            wrong = f"{key} holds NaN or infinite numbers"
    if wrong:
        raise UserError(f"{what}: {wrong}")


def find_file(name, row):
    """The path given, or a named encoder's file, downloaded unless in WEIGHTS or torch.hub's cache."""
    if row is None:
        return Path(name)
    file = Path(row.file or row.url).name
    place = Path(WEIGHTS, file)
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    shipped = Path(__file__).parent / "assets" / file
    for path in [place, Path(WEIGHTS, f"{bare(file)}.pth"), Path(WEIGHTS, f"{name}.pth"), cached, shipped]:
        if path.is_file():
            return path
    if row.url == ON_REQUEST:
        raise UserError(f"{name}: its weights are given on request: ask at {row.url} and put the file at {place}")
    say(f"{name}: downloading {row.url} to {cached}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(row.url, str(cached), hash_prefix=row.sha256)
    except (OSError, RuntimeError, ValueError) as error:  # no network, a wrong hash, a shipped file gone
        raise UserError(f"{name}: {row.url} cannot be had ({error}): download it and put it at {place}") from None
    return cached


def bare(path):
    """A file's name without its ending and the hash that DeiT's and DINOv3's end with."""
    return re.sub(r"(-[0-9a-f]{8})?\.(pth|pt|bin|safetensors)$", "", Path(path).name)


# --- Files of any origin --------------------------------------------------------------------------------------------
# Checkpoints of mmengine, timm and the authors pickle objects beside their tensors. The unpickler here knows what
# tensors are made of and nothing else: whatever class or function a file names, none is imported or called.

class Inert(dict):
    """Stands for every other class and function of a file: does nothing when called."""
    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = append = __init__  # how pickle fills an object


class InertPickle:
    """What torch.load takes for the module pickle."""
    KNOWN = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(module, name) if f"{module}.{name}" in InertPickle.KNOWN else Inert

    @staticmethod
    def load(file, **options):  # files of torch before 1.6 are several pickles
        return InertPickle.Unpickler(file, **options).load()


FILES = {  # how files begin that torch.load cannot read, and what they are
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch that with git lfs pull",
    rb"\s*<": "a web page: what the address gave is no file of weights",
    rb"\x1f\x8b|PK(?!.*(data\.pkl|\.npy))": "an archive: unpack it and give the file in it",
    rb"\x93NUMPY|PK.*\.npy": "NumPy's, as of a JAX model: torch.save a dict of tensors that have PyTorch's layout",
    rb"PK.*constants\.pkl": "TorchScript, a program: torch.save the state_dict() of the model it was made of",
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def open_checkpoint(path):
    """The dict in a checkpoint of any origin, on the CPU, or a UserError; runs no code from it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: neither a file nor a known encoder; the names are {', '.join(ENCODERS)}")
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":
                return read_safetensors(file)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # it holds other things than tensors
            saved = torch.load(path, map_location="cpu", weights_only=False, pickle_module=InertPickle)
    except Exception as error:  # damaged bytes raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        content = Path(path).read_bytes()
        known = [what for pattern, what in FILES.items() if re.match(pattern, content, re.DOTALL)]
        what = known[0] if known else f"truncated, damaged or no checkpoint of PyTorch's ({reason}): fetch it again"
        raise UserError(f"{path} is {what}") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds no dict of tensors, but {type(saved).__name__}: save the state dict")
    return saved


def read_safetensors(file):
    """The tensors of a .safetensors file: eight bytes of length, so much JSON, raw numbers."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    state = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        numbers = torch.frombuffer(bytearray(file.read(end - start)), dtype=DTYPES[entry["dtype"]])
        state[key] = numbers.reshape(entry["shape"])
    return state


def tensors_in(contents, prefix=""):
    """{key: tensor} of a dict and of dicts in it, whose names stand before a dot; floats in fp32."""
    found = {}
    for key, value in contents.items():
        if isinstance(value, dict):
            found |= tensors_in(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value.float() if value.is_floating_point() else value
    return found


PATCH_EMBED = r"(.*?)(patch_embed\.proj|embeddings\.patch_embeddings(\.projection)?)\.weight"  # all have it
# What files call a part of a tensor's name, and its name here, in this order. A name that becomes "" is left out.
KEYS = [
    # transformers: Dinov2, Dinov2WithRegisters, DINOv3ViT, ViT and DeiT
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.)?([qkv])(_proj|uery|ey|alue)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^(layernorm|fc_norm)\.", "norm."),  # the latter: timm's for pooled patches
    # timm: DINOv2 with registers, EVA-02, DINOv3
    (r"^(reg_token|storage_tokens)$", "register_tokens"),  # the latter: official DINOv3
    (r"\.(gamma_|layer_scale)(\d)(\.lambda1)?$", r".ls\2.gamma"),  # the latter: transformers
    (r"\.mlp\.(fc1_g|gate_proj)\.", ".mlp.w1."),  # the latter: transformers
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
    # official files
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's training: chunks of blocks, counted throughout
    (r"\.attn\.([qkv])(_proj)?\.bias$", r".attn.\1_bias"),
    # of no use here
    (r"^(head|head_dist|lm_head|pooler)\..*", ""),  # classifiers; DINO's and EVA-02's pretraining heads
    (r"^((blocks\.\d+\.attn\.)?rope|rope_embed)\..*", ""),  # rotation tables: rope_angles computes them
    (r"^blocks\.\d+\.attn\.qkv\.bias_mask$", ""),  # DINOv3: 0 for keys, which have no bias here
    (r"^local_cls_norm\..*", ""),  # DINOv3's satellite model: for its training only
]
OTHERS = {  # a part of a key that tells of an encoder which is not among those here
    r"decoder_(embed|blocks)": "an MAE with its decoder: take the file without it, mae_pretrain_vit_*.pth",
    r"norm_pre|visual\.|vision_model|attn_pool": "a CLIP or SigLIP, which is not supported",
    r"layers\.\d+\.blocks|rel(ative)?_pos|dwconv|layer1\.0\.conv": "a Swin, BEiT, SAM, ConvNeXt or ResNet: unsupported",
}


def read_encoder(path, name, row, given):
    """A file's encoder: {parameter: tensor}, the ViT's constructor values, notes."""
    checkpoint = open_checkpoint(path)
    if "learner" in checkpoint and "optimizer" in checkpoint:
        raise UserError(f"{path} is the state of an unfinished run: give the student.pt or segmenter.pt it ends with")
    tensors = tensors_in(checkpoint)
    prefix, state, notes = find_encoder(path, tensors)
    ours = "embed_dim" in (checkpoint.get("encoder") or ())  # a checkpoint of this project
    if not ours:
        state = official_to_ours(path, state)
    elif "mask_token" in tensors:
        state["mask_token"] = tensors["mask_token"]
    if row is not None:
        values = constructor_values(name, row)
    elif ours:
        values = checkpoint["encoder"]
    else:
        values, guess = infer_values(path, prefix, state, given)
        notes += guess
    if "mask_token" not in state:
        state["mask_token"] = 0.02 * torch.randn(1, values["embed_dim"])
        notes.append("mask_token is new")
    inner_attn_ln = any("inner_attn_ln" in key for key in state)  # EVA-02 with and without
    return state, values | dict(inner_attn_ln=inner_attn_ln) | given, notes


def find_encoder(path, tensors):
    """The encoder in a file: what its keys begin with, {rest of key: tensor}, and a note if there are others.

    Of a student and a teacher it is the student. But a teacher of the student's shapes is DINO's, the running average
    of the student's weights, and then the one to take.
    """
    encoders = {}
    for match in filter(None, map(re.compile(PATCH_EMBED).fullmatch, tensors)):
        start = match[1]
        encoders[start] = {key.removeprefix(start): tensors[key] for key in tensors if key.startswith(start)}
    students = [start for start in encoders if "student" in start]
    chosen = next(iter(students or encoders), None)
    keys = " ".join(encoders[chosen] if encoders else tensors)  # if there is none, all may tell another family
    for pattern, family in OTHERS.items():
        if re.search(pattern, keys):
            raise UserError(f"{path} holds {family}")
    if not encoders:
        raise UserError(f"{path} holds no patch_embed.proj.weight, but {[*tensors][:3]}: save a state dict of tensors")
    shapes = [tensor.shape for tensor in encoders[chosen].values()]
    for start, parts in encoders.items():
        if students and "teacher" in start and [tensor.shape for tensor in parts.values()] == shapes:
            chosen = start
    others = [start for start in encoders if start != chosen]
    notes = [f"keys under {chosen} only, not {', '.join(others)}"] if others else []
    return chosen, encoders[chosen], notes


def official_to_ours(path, state):
    """A file's tensors as ViT names and holds them."""
    ours = {}
    for key, tensor in state.items():
        for pattern, name in KEYS:
            key = re.sub(pattern, name, key)
        if key:
            ours[key] = tensor

    pos_embed = ours.get("pos_embed")  # (1, 1 + N, C)
    rows = 0 if pos_embed is None else pos_embed.shape[1]
    if rows and "dist_token" in ours:  # DeiT's distillation token has a row of pos_embed
        del ours["dist_token"]
        ours["pos_embed"] = torch.cat([pos_embed[:, :1], pos_embed[:, 2:]], dim=1)
    elif rows and math.isqrt(rows) ** 2 == rows:  # CLS has no row
        if "blocks.0.ls1.gamma" in ours and "register_tokens" not in ours:
            raise UserError(f"{path} holds a DeiT III, or a ViT of timm's with rotary positions: neither is supported")
        ours["pos_embed"] = F.pad(pos_embed, (0, 0, 1, 0))
    if "mask_token" in ours:
        ours["mask_token"] = ours["mask_token"].reshape(1, -1)  # DINOv2 (1, C), EVA-02 (1, 1, C)

    # A SwiGLU under the names of a plain MLP: timm and transformers have its gate apart, so that fc1 is the value (w2);
    # or gate and value are both in fc1 (w12), which is then twice as wide as what fc2 reads.
    gated = "blocks.0.mlp.w1.weight" in ours
    fc1, fc2 = [ours.get(f"blocks.0.mlp.fc{i}.weight", torch.zeros(1, 1)) for i in (1, 2)]  # (1, 1): absent
    if gated or len(fc1) == 2 * fc2.shape[1]:
        fc1_is = "w2" if gated else "w12"
        ours = {key.replace("mlp.fc1.", f"mlp.{fc1_is}.").replace("mlp.fc2.", "mlp.w3."): ours[key] for key in ours}
    # transformers keeps q, k and v apart, which are one here. In its DINOv3 keys have no bias, so that its q_bias and
    # v_bias stay, as a ViT wants them; other DINOv3 files have one qkv.bias or none, of which the last loop makes two.
    for key in [key for key in ours if key.endswith((".attn.k.weight", ".attn.k_bias"))]:
        parts = [key.replace(".attn.k", f".attn.{part}") for part in "qkv"]
        ours[re.sub(r"\.k[._]", ".qkv.", key)] = torch.cat([ours.pop(part) for part in parts])
    if "pos_embed" not in ours and "register_tokens" in ours:  # DINOv3
        for key in [key for key in ours if key.endswith("attn.qkv.weight")]:
            bias = ours.pop(key.replace("weight", "bias"), torch.zeros(len(ours[key])))
            q_bias, _, v_bias = bias.chunk(3)
            ours.setdefault(key.replace("qkv.weight", "q_bias"), q_bias.clone())
            ours.setdefault(key.replace("qkv.weight", "v_bias"), v_bias.clone())
    return ours


def infer_values(path, prefix, state, given):
    """Constructor values of a file's encoder, from its tensors and name, and guesses."""
    dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 1 + 16 * 16  # DINOv3 stores none
    swiglu = "blocks.0.mlp.w3.weight" in state
    rope = ""
    if "blocks.0.attn.q_bias" in state and "pos_embed" not in state:  # q_bias and v_bias, but no k_bias
        rope = "dinov3"
    elif "blocks.0.attn.q_bias" in state and swiglu:  # EVA-01 has a GELU: its q_bias does not fit a ViT here
        rope = "eva02"
    heads = dim // 64 if dim % 64 == 0 else 0
    heads = {(1280, ""): 16, (4096, "dinov3"): 32}.get((dim, rope), heads)  # ViT-H, DINOv3-7B
    if re.search("(base|momentum)_encoder", prefix):  # MoCo v3, whose ViT-S has narrow heads
        heads = 12
    heads = given.get("num_heads", heads)
    if not heads or dim % heads:
        raise UserError(f"{path}: {dim} channels do not make {heads or 'whole'} heads: add {path}:heads=NUMBER")
    values = dict(
        name=bare(path), embed_dim=dim, num_heads=heads, patch_size=patch_size,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        img_size=patch_size * math.isqrt(positions - 1),
        layerscale="blocks.0.ls1.gamma" in state,
        registers=state.get("register_tokens", torch.zeros(1, 0, 1)).shape[1],
        rope=rope,
        sub_ln="blocks.0.mlp.ffn_ln.weight" in state,
        eps=1e-5 if rope == "dinov3" else 1e-6)
    if swiglu:
        hidden = state["blocks.0.mlp.w3.weight"].shape[1]
        values |= dict(mlp="swiglu", mlp_ratio=round(1.5 * hidden / dim))

    # The name of an official file tells its statistics, so that nothing is guessed.
    for name, row in ENCODERS.items():
        if row.url and bare(path) in (name, bare(row.file or row.url)):
            return values | dict(name=name, mean=row.mean, std=row.std), []
    mean = "half" if "augreg" in path.name.lower() else "imagenet"
    if rope == "eva02" and not prefix.endswith("backbone."):  # those of official GKD's files have IMAGENET's
        mean = "clip"
    values |= STATISTICS[mean] | given
    return values, [f"taken to be {heads} heads and mean {values['mean'][0]:g} (else: {path}:heads=NUMBER,mean=NAME)"]
