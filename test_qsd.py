"""What the code promises, on a CPU without network; the test of real weights wants GKD_TEST_DATA."""
import argparse
import colorsys
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, OrderedDict, deque
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageColor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm
from unittest.mock import Mock

import data
import distill
import eval as evaluation
import qsd
import segment
from segment import Linear, MaskDecoder, SemFPN, hungarian, pyramid, resize

REAL = Path(os.environ.get("GKD_TEST_DATA", "nowhere")) / "data"  # weights and imagenet, if there are any
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


# --- The method and its rivals: slow references -----------------------------------------------------------------------

def mini_vit(width, depth=3, grid=(3, 5)):
    """An encoder with patches of 4x4 pixels, small enough for slow references."""
    img_size = (4 * grid[0], 4 * grid[1])
    return qsd.ViT("mini", embed_dim=width, depth=depth, num_heads=2, patch_size=4, img_size=img_size)


def setting(loss="qsd", grid=(3, 5), **constants):
    """A student 16 wide, the objective with a teacher 32 wide, and what it is given: x, both passes s and t, noise."""
    student = mini_vit(16, grid=grid)
    teacher = mini_vit(32, depth=2, grid=grid)
    objective = qsd.build_objective(student, teacher, qsd.LossConfig(loss=loss, **constants))
    for p in [*student.parameters(), *teacher.parameters(), *objective.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(4, 3, 4 * grid[0], 4 * grid[1])
    noise = torch.rand(4, grid[0] * grid[1])
    with torch.no_grad():
        t = teacher.tokens(x, layers=objective.layers_t)
    s = student.tokens(x, layers=objective.layers_s) if objective.reads_s else None
    return student, objective, x, s, t, noise


def slow_weights(head, config, v_s, v_t):
    """The share that token i takes of token j is exp(W_ij) over the sum of row i."""
    B, N, C = v_t.shape
    if config.attention == "identity":
        return torch.eye(N).expand(B, N, N)
    query = head.varphi(v_s) if config.attention == "learned" else v_t
    W = (query[:, :, None] * v_t[:, None]).sum(3) / (C ** 0.5 if config.scale == "sqrt" else 1)
    return W.exp() / W.exp().sum(2, keepdim=True)


def slow_errors(head, config, v_s, v_t):
    """Token i becomes the sum of all values j, each times the share that i takes of it; how far from v_t: (B, N)."""
    made = (slow_weights(head, config, v_s, v_t)[..., None] * head.phi(v_s)[:, None]).sum(2)
    return (made - v_t).square().mean(-1)


def slow_mask(noise, ratio):
    """Hides the patches of smallest noise."""
    count = math.floor(ratio * noise.shape[1])
    return noise < noise.sort(1).values[:, count:count + 1]


def slow_gkd(objective, student, x, t, noise):
    """The paper's equations as they stand: a second pass of all images, some of them masked, and no work shared."""
    c = objective.config
    v_t_cls, v_t, outs_t = t
    v_s_cls, v_s, outs_s = student.tokens(x, layers=objective.layers_s)
    losses = {}
    if c.gamma:
        cls_errors = slow_errors(objective.cls, c, v_s_cls[:, None], v_t_cls[:, None])
        losses["L_cls"] = cls_errors.mean()
    if c.alpha:
        counted = [cls_errors] if c.gamma and c.feat_with_cls else []
        losses["L_feat"] = torch.cat(counted + [slow_errors(objective.feat, c, v_s, v_t)], 1).mean()
        own = slow_weights(objective.feat, c, v_s, v_t) * torch.eye(v_t.shape[1])
        losses["diagonal"] = own.sum(2).mean().detach()
    if c.beta:
        mask = slow_mask(noise, c.mask_ratio)
        mask[1::2] &= c.mask_all  # every second image has none
        losses["L_mask"] = slow_errors(objective.mask, c, student(x, mask)[1], v_t).mean()
    if c.layers == "four":
        losses["L_inner"] = 0
        for head, out_s, out_t in zip(objective.inner, outs_s, outs_t, strict=True):
            losses["L_inner"] += slow_errors(head, c, out_s, F.layer_norm(out_t, (32,))).mean()
    weights = dict(L_feat=c.alpha, L_mask=c.beta, L_cls=c.gamma, L_inner=c.alpha, diagonal=0)
    return losses | {"loss": sum(weights[name] * value for name, value in losses.items())}


def slow_cwd(objective, student, x, t, noise):
    """Each channel is a distribution over space; 4 is the temperature."""
    p_s, p_t = [(v / 4).exp() / (v / 4).exp().sum(1, keepdim=True) for v in (objective.align(student(x)[1]), t[1])]
    return {"loss": 4 ** 2 * (p_t * (p_t / p_s).log()).sum(1).mean()}


def slow_afdcd(objective, student, x, t, noise):
    """A quarter of the tokens reconstructs all; vectors (of 16 channel groups) contrast within 4x4 pooled positions."""
    kept = ~slow_mask(noise, 0.75)[..., None]
    f_s = objective.project((objective.align(student(x)[1]) * kept).mT.unflatten(2, (8, 16)))  # (B, C, h, w)
    f_t = t[1].mT.unflatten(2, (8, 16))
    L_fd = (f_s - f_t).square().mean()
    pooled = [f.unflatten(3, (8, 2)).unflatten(2, (4, 2)).amax((3, 5)) for f in (f_s, f_t)]  # (B, C, 4, 8)
    terms = []
    for b, left in np.ndindex(4, 2):
        cut_s, cut_t = [f[b, :, :, 4 * left:4 * left + 4].reshape(16, 2, 16).mT for f in pooled]  # group, position, C
        logits = -(cut_s[:, :, None, None] - cut_t).abs().sum(-1) / 0.07  # of a student's vector and a teacher's
        for m in range(16):
            positive = logits[m, :, m].diagonal()[:, None]
            others = logits[m][:, torch.arange(16) != m].flatten(1)
            terms.append(torch.cat([positive, others], 1).logsumexp(1) - positive[:, 0])
    L_con = 16 * torch.cat(terms).mean()
    return {"L_fd": L_fd, "L_con": L_con, "loss": L_fd + 0.01 * L_con}


def slow_g2sd(objective, student, x, t, noise):
    """A quarter of the patches is seen; four blocks predict every normalised token, by smooth L1 with 2 as its bend."""
    keep = noise.argsort(1)[:, :3]  # 15 / 4, rounded down
    full = objective.mask_token.expand(4, 15, 256).clone()
    full[torch.arange(4)[:, None], keep] = objective.embed(student.tokens(x, keep=keep)[1])
    error = (objective.decoder(full + objective.pos_embed) - F.layer_norm(t[1], (32,))).abs()
    return {"loss": torch.where(error < 2, error ** 2 / 4, error - 1).mean()}


def slow_vitkd(objective, student, x, t, noise):
    """The first two blocks are mimicked, the last one is generated at the hidden half of its positions."""
    outs = [align(out) for align, out in zip(objective.align, student.tokens(x, layers=(0, 1, 2))[2])]
    hidden = slow_mask(noise, 0.5)
    mixed = torch.where(hidden[..., None], objective.token, outs[2]).mT.unflatten(2, (3, 5))
    L_mimic = sum((outs[i] - t[2][i]).square().mean() for i in (0, 1)) / 2
    L_generate = (objective.project(mixed).flatten(2).mT - t[2][2])[hidden].square().mean()
    return {"L_mimic": L_mimic, "L_generate": L_generate, "loss": 4.5 * L_mimic + 0.23 * L_generate}


def slow_proteus(objective, student, x, t, noise):
    """CLS, all tokens, and the hidden patches of every second image (or all), each through a projection of its own."""
    v_s, v_t = [torch.cat([cls[:, None], patches], 1) for cls, patches in (student(x), t[:2])]
    mask = slow_mask(noise, objective.config.mask_ratio)
    every = 1 if objective.config.mask_all else 2
    masked = objective.patch(student(x, mask)[1])
    L_cls = (objective.cls(v_s[:, 0]) - v_t[:, 0]).square().mean()
    L_feat = (objective.feat(v_s) - v_t).square().mean()
    L_mask = (masked - t[1])[::every][mask[::every]].square().mean()
    return {"L_cls": L_cls, "L_feat": L_feat, "L_mask": L_mask, "loss": L_cls + L_feat + L_mask}


# --- The method and its rivals: equal to them -------------------------------------------------------------------------

SLOW = dict(qsd=slow_gkd, cwd=slow_cwd, afdcd=slow_afdcd, g2sd=slow_g2sd, vitkd=slow_vitkd, proteus=slow_proteus,
            mse=lambda objective, student, x, t, noise: {"loss": (objective.phi(student(x)[1]) - t[1]).square().mean()})


@pytest.mark.parametrize("loss, constants", [
    ("qsd", {}), ("qsd", dict(alpha=0.3, beta=0.5, gamma=0.7, layers="four")),
    ("qsd", dict(alpha=0)), ("qsd", dict(beta=0)), ("qsd", dict(gamma=0)), ("qsd", dict(alpha=0, gamma=0)),
    ("qsd", dict(feat_with_cls=False)), ("qsd", dict(feat_with_cls=False, layers="four")),
    ("qsd", dict(mask_ratio=0.75)), ("qsd", dict(mask_all=True)), ("qsd", dict(attention="identity")),
    ("qsd", dict(attention="teacher", scale="sqrt", layers="four")), ("qsd", dict(scale="sqrt")),
    ("mse", {}), ("cwd", {}), ("afdcd", dict(grid=(8, 16), dcd_pool=2)), ("g2sd", {}), ("vitkd", {}),
    ("proteus", {}), ("proteus", dict(mask_all=True, mask_ratio=0.3)),
], ids=str)
def test_an_objective_equals_its_slow_form_in_value_and_gradient_and_stays_fp32_under_autocast(loss, constants):
    student, objective, x, s, t, noise = setting(loss, **constants)
    losses = objective(student, x, s, t, noise)
    want = SLOW[loss](objective, student, x, t, noise)  # no term has a weight of 0
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    inputs = [*student.parameters(), *objective.parameters()]
    slow = torch.autograd.grad(want["loss"], inputs, retain_graph=True, materialize_grads=True)
    losses["loss"].backward()
    largest = max(gradient.abs().max().item() for gradient in slow)
    for p, gradient in zip(inputs, slow):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * largest)
    assert all(p.grad is not None for p in objective.parameters())  # no head is idle
    assert objective.weight == (50 if loss == "cwd" else 1)  # the published one, beside a task loss
    with torch.autocast("cpu", torch.bfloat16):
        s = student.tokens(x, layers=objective.layers_s) if objective.reads_s else None
        low = objective(student, x, s, t, noise)
    for name, value in losses.items():
        assert low[name].dtype == torch.float32 and low[name].item() == pytest.approx(value.item(), rel=0.05)


def test_attention_is_computed_in_fp32_under_autocast():
    head = qsd.QSD(64, 64)
    v = 5 * torch.randn(1, 9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        query = head.varphi(v).float()  # of bf16
        value = head.phi(v).float()
        out, _ = head(v, v)
    torch.testing.assert_close(out, (query @ v.mT).softmax(-1) @ value)


def test_only_masked_images_go_through_the_student_twice():
    student, objective, x, s, _, noise = setting()
    masked = lambda: objective.masked_pass(student, x, s[1], noise)
    assert distill.count_flops(masked) == distill.count_flops(lambda: student(x[::2]))


def test_each_equation_is_computed_in_exactly_one_line_and_named_nowhere_else():
    names = ("qsd", "data", "distill", "segment", "eval")
    text = "\n".join(Path(qsd.__file__).with_name(f"{name}.py").read_text() for name in names)
    for number in range(3, 13):
        naming = re.findall(rf".*Eqs?\. ?{number}\b.*", text)
        assert len(naming) == 1 and re.match(r" +\w.*[=(].*#", naming[0]), (number, naming)


# --- The method: equal to one step of the authors' own code -----------------------------------------------------------
# Their MetaArch ran it in float64 on the tensors of recorded_tensor. A case has its image and patch size, the offset of
# DINOv2's positions, the student's file before resizing, and these numbers: the norms of the teacher's CLS tokens
# and patches, L_feat, L_mask, L_cls, their sum, the norm of all heads' gradients, and the sum over the encoder's
# parameters, in the order of their names, of 1, 2, 3, ... times the norm of its gradient.
OFFICIAL_STEP = {
    "DeiT, proxy stage": (56, 14, 0.1, dict(patch_size=16, img_size=64, layerscale=False), (
        17.7421506861, 69.2917240534, 2.22590580787, 2.40342600265, 2.15047808621,
        6.77980989674, 3.09426268278, 606.032224607)),
    "DINOv2 student, source stage": (64, 16, 0.0, dict(patch_size=14, img_size=56, layerscale=True), (
        17.4828428398, 68.6925345839, 2.08594823433, 2.09970541453, 2.11287071636,
        6.29852436522, 2.971420264, 648.34058177)),
}


def normal_numbers(name, shape):
    """The same for a name wherever they are drawn: NumPy's generator is frozen."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def recorded_tensor(role, key, shape):
    """The tensor that the recorded step had under this name."""
    z = normal_numbers(f"{role} {key}".strip(), shape)
    if z.ndim == 1 and key.endswith("gamma"):
        z = 0.5 + 0.1 * z
    elif z.ndim == 1:
        z = 1 + 0.2 * z if key.endswith("weight") else 0.1 * z
    elif "pos_embed" in key or "token" in key:
        z = 0.3 * z
    elif role:  # images and noise have none
        z = z / math.sqrt(math.prod(shape[1:]))
    return torch.tensor(z, dtype=torch.float32)


def recorded_encoder(role, folder, size, patch, offset, **file):
    """The encoder as load_vit resizes it from a file of other sizes."""
    vit = qsd.ViT(role, num_heads=2, **file)
    vit.load_state_dict({key: recorded_tensor(role, key, p.shape) for key, p in vit.state_dict().items()})
    torch.save(qsd.student_checkpoint(vit), folder / "encoder.pt")
    return qsd.load_vit(folder / "encoder.pt", size, patch, offset=offset).double()


@pytest.mark.parametrize("form", [distill.Learner, distill.OfficialLearner])  # as trained; as --bench official times
@pytest.mark.parametrize("case", OFFICIAL_STEP)
def test_losses_and_every_gradient_equal_the_authors_step(case, form, tmp_path):
    size, patch, offset, file, want = OFFICIAL_STEP[case]
    student = recorded_encoder("student", tmp_path, size, patch, offset, embed_dim=48, depth=2, **file)
    teacher = recorded_encoder("teacher", tmp_path, size, patch, offset, embed_dim=64, depth=3, patch_size=14,
                               img_size=70, layerscale=True)
    objective = qsd.build_objective(student, teacher, qsd.LossConfig()).double()
    for key, p in objective.named_parameters():
        head, layer = key.split(".", 1)
        official = layer.replace("varphi", "proj_q").replace("phi", "proj_v")
        p.data = recorded_tensor(f"head {head}", official, p.shape).double()
    order = [0, 2, 1, 3]  # the authors mask the first half of a batch, this project every second image
    x = recorded_tensor("", "images", (4, 3, size, size)).double()[order]
    noise = recorded_tensor("", "noise", (4, 16))[order]
    with torch.no_grad():
        t = teacher.tokens(x)
    losses = form(student, objective)(x, t, noise)
    losses["loss"].backward()
    got = [t[0].norm(), t[1].norm(), losses["L_feat"], losses["L_mask"], losses["L_cls"], losses["loss"]]
    got.append(torch.cat([p.grad.flatten() for p in objective.parameters()]).norm())
    got.append(sum(i * p.grad.norm() for i, (_, p) in enumerate(sorted(student.named_parameters()), 1)))
    assert [number.item() for number in got] == pytest.approx(want, rel=1e-9, abs=0)


# --- Encoders ---------------------------------------------------------------------------------------------------------

def shuffle(module):
    """Makes every parameter count, also biases, norms and LayerScale."""
    for p in module.requires_grad_(False).parameters():
        fan_in = p[0].numel() if p.ndim in (2, 4) else 25
        p += torch.randn_like(p) / fan_in ** 0.5
    return module


def official_dinov3(vit):
    """The state dict of an official DINOv3 file with the tensors of this encoder."""
    state = vit.state_dict()
    state["storage_tokens"] = state.pop("register_tokens")
    for i in range(vit.depth):
        q_bias = state.pop(f"blocks.{i}.attn.q_bias")
        v_bias = state.pop(f"blocks.{i}.attn.v_bias")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q_bias, torch.randn_like(q_bias), v_bias])  # keys' is masked
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([q_bias ** 0, 0 * q_bias, v_bias ** 0])
    return state | {"rope_embed.periods": torch.ones(16), "local_cls_norm.weight": torch.ones(vit.embed_dim)}


def assert_equals_timm(vit, model, size):
    """CLS, patches and the output of every block are those of timm's model."""
    x = torch.randn(1, 3, *size)
    blocks = list(range(vit.depth))
    with torch.no_grad():
        last, wanted = model.eval().forward_intermediates(x, indices=blocks, output_fmt="NLC", norm=False)
        cls, patches, outs = vit.tokens(x, layers=blocks)
    for got, want in zip([cls, patches, *outs], [last[:, 0], last[:, vit.prefix:], *wanted], strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


TIMM = {  # the file's name, which tells a row of ENCODERS or nothing, and timm's name
    "deit_tiny": "deit_tiny_patch16_224", "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2", "dinov2_vitg14": "vit_giant_patch14_dinov2",
    "eva02_tiny": "eva02_tiny_patch14_224", "eva02_base": "eva02_base_patch14_224",
    "norm-in-attention": "eva02_base_patch16_clip_224", "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb", "dinov3-without-bias": "vit_small_patch16_dinov3",
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_own_files_give_timms_features_and_timm_reads_a_students_checkpoint(name, tmp_path):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    create = partial(timm.create_model, TIMM[name], depth=2, num_classes=0)
    if "eva02" in TIMM[name]:
        create = partial(create, global_pool="token")  # else the norm follows an average
    if "giant" in TIMM[name] or "base" in TIMM[name]:
        create = partial(create, embed_dim=192, num_heads=3)  # narrower
    model = shuffle(create(img_size=112))
    safetensors.save_file(model.state_dict(), tmp_path / f"{name}.bin")  # under which torch does not read it
    vit = qsd.load_vit(tmp_path / f"{name}.bin")
    assert_equals_timm(vit, model, (112, 112))
    if name in qsd.ENCODERS:
        img_size = 256 if name.startswith("dinov3") else 112
        made = dict(depth=2, img_size=img_size, embed_dim=vit.embed_dim, num_heads=vit.num_heads)
        assert vit.config == qsd.constructor_values(name, qsd.ENCODERS[name]) | made

    size = (7 * vit.patch_size, 9 * vit.patch_size)
    state = qsd.student_checkpoint(vit)["model"]
    if name.startswith("dinov2"):
        state["mask_token"] = vit.mask_token
    elif name.startswith("dinov3"):
        state = official_dinov3(vit)
    if name != "dinov3-without-bias":  # timm's model has no place for the biases here
        family = sys.modules[type(model).__module__]
        resized = create(img_size=size)
        resized.load_state_dict(family.checkpoint_filter_fn(state, resized, antialias=False))
        assert_equals_timm(vit, resized, size)


@pytest.mark.parametrize("name", ["deit_tiny", "dinov2_vits14_reg", "eva02_tiny", "dinov3_vits16"])
def test_masked_and_partial_passes_follow_their_definition(name):
    vit = shuffle(qsd.load_vit(name, depth=2, pretrained=False))
    P = vit.patch_size
    x = torch.randn(2, 3, 4 * P, 6 * P)
    mask = torch.rand(2, 24) < 0.5
    black = x * ~mask.view(2, 1, 4, 6).repeat_interleave(P, 2).repeat_interleave(P, 3)
    vit.mask_token.copy_(vit.patch_embed.proj.bias[None])  # the embedding of a black patch
    torch.testing.assert_close(vit(x, mask), vit(black))
    cls, patches = vit(x)
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    cls_kept, kept, _ = vit.tokens(x, keep=order)  # all patches, shuffled
    torch.testing.assert_close((cls_kept, kept), (cls, patches.gather(1, order[..., None].expand_as(patches))))


# --- Encoders: loading ------------------------------------------------------------------------------------------------

@pytest.fixture
def small(tmp_path, monkeypatch):
    """The encoder in small.pth (DeiT's layout: 64 wide, 2 blocks, patch 8), in the current folder."""
    monkeypatch.chdir(tmp_path)
    vit = qsd.ViT("small", embed_dim=64, depth=2, num_heads=1, patch_size=8, img_size=32)
    vit.half().float().requires_grad_(False)
    torch.save({"model": qsd.student_checkpoint(vit)["model"]}, "small.pth")
    return vit


def test_asked_sizes_and_depth_are_applied_and_printed_and_positions_are_resized_as_the_family_does(small, capsys):
    plain = qsd.load_vit("small.pth", img_size=48, offset=0.1)  # which only DINOv2 has, see the authors' step
    assert torch.equal(plain.pos_embed, qsd.resize_pos_embed(small.pos_embed, (4, 4), (6, 6)))
    vit = qsd.ViT(**small.config | dict(layerscale=True, registers=4))
    torch.save(qsd.student_checkpoint(vit)["model"], "small.pth")
    loaded = qsd.load_vit("small.pth", img_size=(48, 96), patch_size=16, depth=1, offset=0.1)
    assert loaded.grid == (3, 6) and loaded.patch_size == 16 and loaded.depth == len(loaded.blocks) == 1
    patches = F.interpolate(vit.pos_embed[:, 1:].mT.unflatten(2, (4, 4)), (3, 6), mode="bicubic", antialias=True)
    assert torch.equal(loaded.pos_embed[:, 1:], patches.flatten(2).mT)
    assert capsys.readouterr().out.endswith("mask_token is new; pos_embed 4x4 -> 3x6 (bicubic, antialiased); "
                                            "patch 8 -> 16 (bicubic); the first 1 of 2 blocks\n")
    with pytest.raises(qsd.UserError, match="depth must be 1 to 2 for small, not 3"):
        qsd.load_vit("small.pth", depth=3)


def under(prefix, state):
    return {f"{prefix}{key}": p for key, p in state.items()}


TRANSFORMERS = [  # a part of a name here, and the same of Dinov2Model, Dinov2WithRegistersModel
    ("^norm", "layernorm"), ("^(.*_tokens?)$", r"embeddings.\1"), ("^pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."),
    (r"attn\.proj", "attention.output.dense"), (r"ls(.)\.gamma", r"layer_scale\1.lambda1"),
    (r"mlp\.w12", "mlp.weights_in"), (r"mlp\.w3", "mlp.weights_out"),
]


def of_transformers(vit):
    state = {}
    for key, p in vit.state_dict().items():
        for ours, theirs in TRANSFORMERS:
            key = re.sub(ours, theirs, key)
        parts = ["query", "key", "value"] if "qkv" in key else [""]
        for part, tensor in zip(parts, p.chunk(len(parts))):
            state[key.replace("attn.qkv", f"attention.attention.{part}")] = tensor.clone()
    return {"net": under("dinov2.", state)}


class Trap:
    """Pickled, it makes a folder when it is read by pickle."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


OBJECTS = dict(trap=Trap(), args=argparse.Namespace(lr=0.1, out=Path("x")), epoch=np.float64(3), log=np.ones(3),
               count=Counter("aab"), last=deque([1, 2], maxlen=2), names={1, 2}, device=torch.device("cpu"))
ODD = torch.ones(1, 1, 64)  # a tensor that no encoder has
LS = dict(layerscale=True)
REG = dict(layerscale=True, registers=4)
EVA02 = dict(mlp="swiglu", rope="eva02", sub_ln=True, inner_attn_ln=True, **qsd.CLIP)
DINOV3 = dict(REG, rope="dinov3", eps=1e-5, mlp="swiglu", mlp_ratio=6, img_size=128)
ENCODER_FILES = {  # what an encoder has that small has not, and how a file holds it
    "student": (dict(REG, img_size=(32, 48)), lambda vit: qsd.student_checkpoint(vit) | {"objective": {"feat": ODD}}),
    "segmenter": ({}, lambda vit: {"model": under("encoder.", vit.state_dict()) | {"decoder.bias": ODD}}),
    "official GKD, which normalises as ImageNet": (EVA02 | qsd.IMAGENET, lambda vit: {
        "model": {"teacher.backbone.patch_embed.proj.weight": ODD} | under("student.backbone.", vit.state_dict())}),
    "DINO's training": ({}, lambda vit: {
        "student": under("module.backbone.", qsd.ViT(**vit.config).state_dict()),
        "teacher": under("backbone.", vit.state_dict())}),
    "distilled": ({}, lambda vit: vit.state_dict() | {
        "dist_token": ODD, "head.bias": ODD, "head_dist.bias": ODD,
        "pos_embed": torch.cat([vit.pos_embed[:, :1], ODD, vit.pos_embed[:, 1:]], 1)}),
    "chunks": (LS, lambda vit: {key.replace("ks.", "ks.0."): p for key, p in vit.state_dict().items()}),
    "transformers": (REG, of_transformers),
    "transformers, SwiGLU": (dict(LS, mlp="swiglu"), of_transformers),
    "ViT-H": (dict(embed_dim=1280, num_heads=16, depth=1), lambda vit: vit.state_dict()),
    "EVA-02": (EVA02, lambda vit: {"module": vit.state_dict() | {
        "rope.freqs_cos": ODD, "blocks.0.attn.rope.freqs_cos": ODD, "mask_token": vit.mask_token[None]}}),
    "DINOv3": (DINOV3, official_dinov3),
    "objects beside it": ({}, lambda vit: OBJECTS | {"state_dict": dict(vit.named_parameters())}),
    "objects beside it, torch before 1.6": ({}, lambda vit: OBJECTS | {"state_dict": dict(vit.named_parameters())}),
}


@pytest.mark.parametrize("layout", ENCODER_FILES)
def test_each_layout_gives_its_encoder_and_runs_nothing(layout, small):
    values, contents = ENCODER_FILES[layout]
    vit = shuffle(qsd.ViT(**small.config | values))
    torch.save(contents(vit), "small.pth", _use_new_zipfile_serialization="before" not in layout)
    loaded = qsd.load_vit("small.pth")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(vit.state_dict()), rtol=0, atol=0)
    assert loaded.config == vit.config and not Path("trap").exists()


def test_heads_and_normalisation_are_named_where_guessed_and_can_be_said_behind_the_path(small, capsys):
    state = qsd.load_vit("deit_small", depth=1, pretrained=False).state_dict()
    moco = under("module.base_encoder.", state) | under("module.momentum_encoder.", state)
    torch.save({"state_dict": moco}, "moco.pth.tar")
    assert qsd.load_vit("moco.pth.tar").num_heads == 12
    line = capsys.readouterr().out
    assert "base_encoder. only, not state_dict.module.momentum_encoder.; taken to be 12 heads and mean 0.485 (" in line
    torch.save(qsd.ViT(**small.config).state_dict(), "lr=1,seed=2.pth")
    vit = qsd.load_vit("lr=1,seed=2.pth:heads=4,mean=half")
    assert vit.num_heads == 4 and vit.mean == (0.5, 0.5, 0.5)
    for wrong, text in [("heads=5", "small.pth: 64 channels do not make 5 heads: add small.pth:heads=NUMBER"),
                        ("mean=grey", "mean=grey is none of heads=NUMBER, mean=imagenet|half|clip|satellite")]:
        with pytest.raises(qsd.UserError, match=re.escape(text)):
            qsd.load_vit(f"small.pth:{wrong}")


KEY = "blocks.1.attn.qkv.weight"
BAD_FILES = [  # how small.pth, of path p and state s, is made wrong, and what the user reads
    (lambda p, s: torch.save(s | {KEY: s[KEY].T}, p), f"small.pth does not fit .*: .*size mismatch for {KEY}"),
    (lambda p, s: torch.save(s | {KEY: s[KEY] / 0}, p), f"small.pth does not fit .*: {KEY} holds NaN or infinite"),
    (lambda p, s: torch.save(s | {"norm_pre.bias": s[KEY]}, p), "small.pth holds a CLIP or SigLIP, which is not"),
    (lambda p, s: torch.save(s | {"pos_embed": s["pos_embed"][:, 1:], "blocks.0.gamma_1": s[KEY]}, p), "a DeiT III, o"),
    (lambda p, s: torch.save({KEY: s[KEY]}, p), r"holds no patch_embed.proj.weight, but \['blocks.1.attn"),
    (lambda p, s: torch.save(dict(learner=s, optimizer={}), p), "is the state of an unfinished run: give the student"),
    (lambda p, s: torch.save(s | {"decoder_embed.bias": s[KEY]}, p), "holds an MAE with its decoder: take the "),
    (lambda p, s: torch.save([Path("x")], p), "small.pth holds no dict of tensors, but list: save the state dict"),
    (lambda p, s: p.write_text("<!DOCTYPE html><title>404</title>"), "small.pth is a web page: what the address gave"),
    (lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1"), "small.pth is a pointer of Git LFS"),
    (lambda p, s: np.savez(p.open("wb"), w=s[KEY].numpy()), "small.pth is NumPy's, as of a JAX model: torch"),
    (lambda p, s: torch.save({KEY: s[KEY].numpy()}, p), r"but \[\]: save a state dict of tensors"),
    (lambda p, s: torch.jit.script(torch.nn.ReLU()).save(p), "small.pth is TorchScript, a program: torch.save"),
    (lambda p, s: p.write_bytes(pickle.dumps(Trap(), protocol=2)), "small.pth is truncated, damaged or no checkpoint"),
]


@pytest.mark.parametrize("spoil, text", BAD_FILES)
def test_a_wrong_file_is_refused_in_one_line_and_runs_nothing(spoil, text, small):
    spoil(Path("small.pth"), qsd.student_checkpoint(small)["model"])
    with pytest.raises(qsd.UserError, match=text) as error:
        qsd.load_vit("small.pth")
    assert "\n" not in str(error.value) and not Path("trap").exists()


def test_a_named_encoders_file_is_found_or_downloaded_or_its_address_and_place_are_named(small, monkeypatch, capsys):
    url = "https://host/small-01234567.pth"
    cached = Path("cache/checkpoints/small-01234567.pth")
    download = Mock(side_effect=lambda *request, hash_prefix: Path("small.pth").rename(cached))
    monkeypatch.setitem(qsd.ENCODERS, "little", qsd.Spec(64, 2, 1, 8, 32, url, "01234567"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):  # the second time it lies in the cache
        assert torch.equal(qsd.load_vit("little").norm.weight, small.norm.weight)
    download.assert_called_once_with(url, str(cached), hash_prefix="01234567")
    Path("weights").mkdir()
    path = cached.rename("weights/small.pth")
    qsd.load_vit("little")
    assert "little: weights/small.pth; " in capsys.readouterr().out
    path.unlink()
    with pytest.raises(qsd.UserError, match=f"{url} cannot be had .*: download it and put it at weights/small-0123"):
        qsd.load_vit("little")


@pytest.mark.skipif(not REAL.is_dir(), reason="GKD_TEST_DATA names no folder with data/weights and data/imagenet")
@pytest.mark.parametrize("file, mean, measured", [
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 0.5, 83), ("deit_tiny_patch16_224", 0.485, 86)])
def test_real_weights_classify_imagenet(file, mean, measured):
    """The file's own head on our CLS: short side 240, the middle 240; every tenth class (of all, 83.1 and 80.5 %)."""
    vit = qsd.load_vit(REAL / f"weights/{file}.pth", img_size=240).requires_grad_(False)
    head = torch.load(REAL / f"weights/{file}.pth", weights_only=True)
    assert vit.mean[0] == mean and vit.name in qsd.ENCODERS
    right = 0
    for label, folder in list(enumerate(sorted((REAL / "imagenet/train").iterdir())))[::10]:
        image = data.read_image(next(folder.iterdir())).float()
        image = TF.resize(image, 240, TF.InterpolationMode.BICUBIC, antialias=False).round().clamp(0, 255)
        cls, _ = vit(data.normalize(TF.center_crop(image, 240)[None], vit.mean, vit.std))
        right += (cls @ head["head.weight"].T + head["head.bias"]).argmax().item() == label
    assert abs(right - measured) <= 2, right  # JPEG decoders differ


# --- Datasets: small files --------------------------------------------------------------------------------------------

def save_files(root, files):
    """Write files from a text of "path=content": images of 6x8 pixels, all of them alike.

    Content: 7 one channel, 1-2-3 a colour, P7 the index of a palette, D7 of twice the size, ! what is no image."""
    for name, content in re.findall(r"(\S+)=(\S+)", files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [int(value) for value in re.findall(r"\d+", content)] or [0]
        size = (12, 16) if content[0] == "D" else (6, 8)
        image = Image.fromarray(np.full((*size, len(values)), values, np.uint8).squeeze())
        if content[0] == "P":
            image.putpalette(768 * [9])  # colours that mean nothing; "L" becomes "P"
        image.save(path, "PNG" if content == "!" else None)
        if content == "!":
            path.write_bytes(b"\x89PNG")


def png16(red):
    """The bytes of a 16-bit RGB PNG of one row with this red channel, chunk by chunk since Pillow cannot."""
    row = np.full((len(red), 3), 40000, ">u2")
    row[:, 0] = red
    header = struct.pack(">IIBBBBB", len(red), 1, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row.tobytes())), (b"IEND", b"")):
        file += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return file



# What the values and colours of label files mean, as the releases document it; "-" is ignored.
CITYSCAPES = re.findall(r"([a-z ]+) (\d+) (\d+) (\d+) (\d+)", """road 7 128 64 128,sidewalk 8 244 35 232,
building 11 70 70 70,wall 12 102 102 156,fence 13 190 153 153,pole 17 153 153 153,traffic light 19 250 170 30,
traffic sign 20 220 220 0,vegetation 21 107 142 35,terrain 22 152 251 152,sky 23 70 130 180,person 24 220 20 60,
rider 25 255 0 0,car 26 0 0 142,truck 27 0 0 70,bus 28 0 60 100,train 31 0 80 100,motorcycle 32 0 0 230,
bicycle 33 119 11 32""")  # class, label id and colour, in the order of the train ids
LABEL_IDS = dict.fromkeys(range(35), "-") | {int(row[1]): row[0] for row in CITYSCAPES}
TRAIN_IDS = dict(enumerate(row[0] for row in CITYSCAPES))
STREET_COLORS = {tuple(map(int, row[2:])): row[0] for row in CITYSCAPES}
CAMVID = dict(enumerate("sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist,-".split(",")))
SYNTHIA = dict(enumerate(("-,sky,building,road,sidewalk,fence,vegetation,pole,car,traffic sign,person,bicycle,"
                          "motorcycle,-,-,traffic light,terrain,rider,truck,bus,train,wall,-").split(",")))
MAPILLARY = dict(enumerate((  # bird, ground animal, curb, fence, guard rail, barrier, wall, bike lane, crosswalk, ...
    "-,-,sidewalk,fence,-,-,wall,road,road,sidewalk,road,sidewalk,-,road,road,sidewalk,-,building,-,person,rider,rider,"
    "rider,road,road,-,-,sky,-,terrain,vegetation,-,-,-,-,-,-,-,-,-,-,-,-,-,pole,pole,traffic sign,pole,traffic light,"
    "traffic sign,traffic sign,-,bicycle,-,bus,car,-,motorcycle,train,-,-,truck,-,-,-,-").split(",")))
ISPRS = {(255, 255, 255): "impervious", (0, 0, 255): "building", (0, 255, 255): "low vegetation", (0, 255, 0): "tree",
         (255, 255, 0): "car", (255, 0, 0): "clutter", (0, 0, 0): "-"}
ENDOVIS = {(0, 0, 0): "background", (0, 255, 0): "instrument shaft", (0, 255, 255): "instrument clasper",
           (125, 255, 12): "instrument wrist", (255, 55, 0): "kidney", (24, 55, 125): "covered kidney",
           (187, 155, 25): "thread", (0, 255, 125): "clamps", (255, 255, 125): "needle", (123, 15, 175): "suction",
           (124, 155, 5): "small intestine", (12, 255, 141): "-"}
LABEL_FILES = {  # dataset and label file: {value or colour: class}
    "cityscapes labelIds": LABEL_IDS, "cityscapes labelTrainIds": TRAIN_IDS, "gtav ids": LABEL_IDS,
    "gtav colors": STREET_COLORS | {(1, 2, 3): "-"}, "bdd100k ids": TRAIN_IDS, "urbansyn ids": TRAIN_IDS | {19: "-"},
    "synthia ids": SYNTHIA, "mapillary ids": MAPILLARY, "camvid ids": CAMVID, "endovis18 colors": ENDOVIS,
    "potsdam-rgb colors": ISPRS}


@pytest.mark.parametrize("case", LABEL_FILES)
def test_every_value_or_colour_of_a_label_file_is_the_documented_class_or_an_error(case, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "checked", lambda label, values: label)  # which makes of 254 an error
    name, kind = case.split()
    path = tmp_path / f"a_{kind}.png"
    known = LABEL_FILES[case]
    if kind != "colors":
        known = dict.fromkeys(range(255), "error") | {255: "-"} | known
    Image.fromarray(np.uint8([[*known]])).save(path)
    if name == "synthia":
        path.write_bytes(png16([*known]))
    classes = dict(enumerate(data.DATASETS[name].classes)) | {254: "error", 255: "-"}
    assert [classes[number] for number in data.DATASETS[name].decode(path)[0]] == [*known.values()]


WEATHER = ""
for grey, weather in enumerate(("fog", "night", "rain", "snow")):
    WEATHER += f"rgb_anon/{weather}/val/GP/a_rgb_anon.png={grey} gt/{weather}/val/GP/a_gt_labelTrainIds.png={grey} "
LAYOUTS = [  # sets with what is read from them (grey level:class of each item), the files in the dataset's folder
    ("imagenet train 100 102, imagenet val 108", """train/n01/a.JPEG=100-100-100 train/n02/b.JPEG=102 val/c.JPEG=108
        train/n01/._b.JPEG=! train/map.txt=!"""),
    ("imagenet train 2 4 6", "a.webp=2 b.BMP=4 n01/c.JPEG=6 c.txt=! masks/a.png=9 5_Labels/a.png=9"),  # no labels
    ("gtav train 1:13 2:8 3:0",  # a palette, colours, another size; a converter's train ids do not count
     """images/1.png=1 labels/1.png=P26 labels/1_labelTrainIds.png=5 images/2.png=2 labels/2.png=107-142-35
        images/3.png=3 labels/3.png=D7"""),
    ("synthia train 1:13", "CITY/RGB/1.png=1 CITY/GT/LABELS/1.png=8-0-0 CITY/GT/COLOR/1.png=9"),
    ("urbansyn train 1:0 2:18", "rgb/rgb_1.png=1 ss/ss_1.png=0 rgb/rgb/rgb_2.png=2 ss/ss/ss_2.png=18"),
    ("cityscapes train 1:13, cityscapes val 2:1", """leftImg8bit/train/u/u_leftImg8bit.png=1
        gtFine/train/u/u_gtFine_labelIds.png=26 gtFine/train/u/u_gtFine_labelTrainIds.png=5
        leftImg8bit/val/b/b_leftImg8bit.png=2 gtFine/val/b/b_gtFine_labelTrainIds.png=1 leftImg8bit/test/r/r.png=3"""),
    ("bdd100k train 2:0", "images/10k/train/a.jpg=2 labels/sem_seg/masks/train/a.png=0"),
    ("bdd100k val 2:18", "seg/images/val/a.jpg=2 seg/labels/val/a_train_id.png=P18"),  # the old release
    ("mapillary train 2:13, mapillary val 4:0", """training/images/a.jpg=2 training/v1.2/labels/a.png=P55
        training/v2.0/labels/a.png=P99 validation/images/b.jpg=4 validation/labels/b.png=P13"""),
    ("acdc-snow val 3:3, acdc val 1:1 3:3 0:0 2:2", WEATHER),
    ("potsdam-rgb train 1:3, potsdam-rgb val 2:0, potsdam-irrg train 3:3",
     """RGB/top_potsdam_2_10_RGB.tif=1 RGB/top_potsdam_2_13_RGB.tif=2 IRRG/top_potsdam_2_10_IRRG.tif=3
        L/top_potsdam_2_10_label_noBoundary.tif=0-255-0 L/top_potsdam_2_13_label_noBoundary.tif=255"""),
    ("vaihingen-irrg train 1:4 3:0",  # area 1 is not area 11
     """top/top_mosaic_09cm_area1.tif=1 top/top_mosaic_09cm_area11.tif=3 gts/top_mosaic_09cm_area11_noBoundary.tif=255
        gts/top_mosaic_09cm_area1_noBoundary.tif=252-255-0 gts_for_participants/top_mosaic_09cm_area1.tif=9"""),
    ("endovis18 train 1:6, endovis18 val 5:0", """miccai_challenge_2018_release_1/seq_1/left_frames/0.png=1
        __MACOSX/miccai_challenge_2018_release_1/seq_1/left_frames/1.png=9
        miccai_challenge_2018_release_1/seq_1/labels/0.png=187-155-25
        miccai_challenge_release_2/seq_5/left_frames/0.png=5 miccai_challenge_release_2/seq_5/labels/0.png=0"""),
    ("camvid train 1:1, camvid val 5:5, camvid-dusk val 4:4 0:0", """train/0006R0_a.png=1 trainannot/0006R0_a.png=1
        val/0016E5_b.png=3 valannot/0016E5_b.png=3 test/Seq05VD_a.png=5 testannot/Seq05VD_a.png=5
        train/0001TP_a.png=0 trainannot/0001TP_a.png=0 test/0001TP_b.png=4 testannot/0001TP_b.png=4"""),
]


@pytest.mark.parametrize("sets, files", LAYOUTS, ids=[sets for sets, _ in LAYOUTS])
def test_each_dataset_is_read_from_its_true_layout_without_complaint(sets, files, tmp_path):
    folder = "acdc" if "acdc" in sets else data.DATASETS[sets.split()[0]].folder
    save_files(tmp_path / folder, files)
    for root in (tmp_path, tmp_path / folder):  # what holds all datasets, or the dataset's own folder
        for line in sets.split(", "):
            name, split, *expected = line.split()
            found = [f"{image.float().mean():.0f}" for image, _ in data.images(name, root, split=split)]
            if name != "imagenet":
                labels = [label[-1, -1] for _, label, _ in data.scenes(name, root, split)]
                found = [f"{grey}:{label}" for grey, label in zip(found, labels, strict=True)]
            assert found == expected
            assert data.preflight(name, root) == 0


def test_tiles_cover_an_image_and_a_tiff_is_unpacked_again_only_when_it_is_newer(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = tmp_path / "top_potsdam_2_10_RGB.tif"
    classes = rng.integers(0, 6, (700, 600))
    shades = np.abs(np.array([*ISPRS])[classes] - rng.integers(0, 128, (700, 600, 3)))  # as in tile 4_12
    Image.fromarray(shades.astype(np.uint8)).save(tmp_path / "top_potsdam_2_10_label_noBoundary.tif")
    for writable in (False, True, True):
        monkeypatch.setattr(os, "access", lambda *given: writable)
        image = rng.integers(0, 256, (700, 600, 3), np.uint8)
        Image.fromarray(image).save(path, compression="tiff_lzw")
        for unpacked in tmp_path.glob("*.npy"):
            os.utime(unpacked, (0, 0))
        tiles = data.scenes("potsdam-rgb", tmp_path)
        for (tile, label, _), (top, left) in zip(tiles, [(0, 0), (0, 88), (188, 0), (188, 88)], strict=True):
            assert (tile.permute(1, 2, 0).numpy() == image[top:top + 512, left:left + 512]).all()
            assert (label.numpy() == classes[top:top + 512, left:left + 512]).all()
        assert len([*tmp_path.glob("*.npy")]) == 2 * writable
    Image.new("RGB", (600, 700)).save(path)
    os.utime(path, (0, 0))
    assert data.read_image(path).any()


WRONG_FILES = [  # set (with --classes) and split, the files of its folder, the one line
    ("gtav train", "images/1.png=0 labels/1.png=7 labels/2.png=7", r"labels/2.png: its partner is missing \(one of 1"),
    ("gtav train", "images/1.png=0 labels/a/1.png=7", "holds no files like labels/.*; there are labels/a/1.png and 0"),
    ("gtav val", "images/1.png=0", "--data gtav: has no val split, only train"),
    ("cityscapes train", "gtav/images/1.png=0", "--root .*: no such folder as .*cityscapes"),
    ("gtav+camvid train", "images/1.png=0", r"--data gtav\+camvid: these sets have different classes"),
    ("folder train", "images/a.png=0 masks/a.png=2", "--data folder: say how many --classes"),
    ("folder:2 val", "images/val/a.png=0 masks/val/a.png=0 images/val/b.png=0 masks/val/b.png=255",
     "--data folder: the labels hold 0 and 255 alone; 255 is void: save what it marks as 1"),
    ("folder:2 train", "images/a.png=0 masks/a.jpg=0", "masks/a.jpg: .*a JPEG of mode L, not a PNG"),
    ("folder:2 train", "images/a.png=0 masks/a.png=0-0-0", "masks/a.png: .* of mode RGB, not a PNG with one"),
    ("folder:2 val", "images/val/a.png=! masks/val/a.png=0", r"a.png: cannot be read as .*\)$")]


@pytest.mark.parametrize("case, files, line", WRONG_FILES)
def test_a_wrong_file_or_flag_is_one_line_that_names_it(case, files, line, tmp_path):
    name, classes, split = re.fullmatch(r"([^:]+):?(\d*) (\w+)", case).groups()
    save_files(tmp_path, files)
    with pytest.raises(data.UserError, match=line):
        data.scenes(name, tmp_path, split, classes=int(classes or 0))[0]


def test_an_unreadable_training_image_is_named_and_replaced_and_too_many_in_a_row_stop_the_run(tmp_path, capfd):
    for i in range(11, 41):
        save_files(tmp_path, f"images/{i}.png={i} labels/{i}.png=P{7 + i % 2}")
    dataset = data.scenes("gtav", tmp_path)
    save_files(tmp_path, "images/18.png=! images/40.png=! images/11.png=!")
    for index, found, named in ((7, 19, ["18"]), (29, 12, ["40", "11"])):
        image, label, draw = dataset[index, 77]
        assert image[0, 0, 0] == found and label[0, 0] == found % 2 and draw == 77
        assert re.findall(r"(\d+).png: cannot be .*: the next image takes its place", capfd.readouterr().err) == named
    save_files(tmp_path, " ".join(f"images/{i}.png=!" for i in range(11, 21)))
    batches = iter(data.loader(dataset, 30, workers=1))
    with pytest.raises(data.UserError, match=r"\A.*/(19|20).png: cannot be .*, like 9 before it: too many\Z"):
        next(batches)
    batches._shutdown_workers()  # now, not when Python collects its garbage


def test_the_preflight_lists_all_that_is_wrong_or_can_hardly_be_meant_and_the_shares_of_classes(tmp_path, capsys):
    save_files(tmp_path, """images/a.jpg=0 masks/a.png=0 images/b.png=0 masks/b.png=1 images/c.png=0 masks/c.png=1
        images/d.png=0 masks/d.png=255 images/e.tif=0 masks/e.png=0 images/f.png=0 masks/f.png=9
        images/g.png=0 masks/g.png=D0 images/h.png=0 masks/i.png=0""")
    for number, value in enumerate((0, 1, 2, 255, 255, 255, 255)):
        save_files(tmp_path, f"images/val/{number}.png=200 masks/val/{number}.png={value}")
    exif = Image.Exif()
    exif[0x112] = 6  # one's own photographs stand upright, as their labels do
    Image.new("RGB", (6, 8)).save(tmp_path / "images/a.jpg", exif=exif)
    Image.fromarray(np.full((6, 8), 386, np.uint16)).save(tmp_path / "images/c.png")  # 1.502 of 255
    Image.fromarray(np.full((6, 8), 0.5, np.float32)).save(tmp_path / "images/e.tif")
    with pytest.raises(SystemExit, match="1"):
        data.main(f"--data folder --root {tmp_path} --classes 3 --out {tmp_path}/out.png".split())
    text = capsys.readouterr().out
    for line in ("train: 7 pairs, 5 problems", "masks/i.png: its partner is missing", "images/h.png: its partner is",
                 "e.tif: cannot be read as an image (which", "f.png: cannot be read as a label (values [9]",
                 "g.png: (12, 16) pixels, its image (6, 8)", "in 4 images looked at nothing is brighter than 2 of 255",
                 "25% is void (255), classes without a pixel: 2;", "57% is void (255), classes without a pixel: none;"):
        assert line in text
    shares = [("0", "18.18"), ("1", "27.27"), ("2", "9.09"), ("ignored", "45.45")]
    assert re.findall(r"(\w+) +(\d+\.\d+)\n", text) == shares and text.count("looked at") == 3


# --- Datasets: which image when ---------------------------------------------------------------------------------------

def seeded(*numbers):
    """The generator of a random stream, its seed derived as numpy does."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def test_batches_are_the_same_for_any_workers_processes_and_micro_batches_and_after_resuming():
    dataset = data.scenes("toy", "nowhere", labels="1/200", transform=partial(data.segment_transform, size=16))
    whole = [torch.cat(part) for part in zip(*itertools.islice(data.loader(dataset, 4, seed=5), 3))]
    for draw in range(12):
        image, label, _ = dataset[data.image_of(draw, 5, seed=5), draw]
        assert torch.equal(whole[0][draw], image) and torch.equal(whole[1][draw], label) and whole[2][draw] == draw
    for options, count, draws in (
            (dict(workers=1, passes=2), 6, slice(0, 12)), (dict(start_step=1), 2, slice(4, 12)),
            (dict(start_step=1, rank=1, world=2, passes=2), 2, slice(6, 8))):
        batches = itertools.islice(data.loader(dataset, 4, seed=5, **options), count)
        for found, expected in zip(zip(*batches), whole):
            assert torch.equal(torch.cat(found), expected[draws]) and dataset.seed == 5


def test_sets_with_their_transforms_can_be_pickled_for_processes_that_begin_anew(tmp_path):
    save_voc(tmp_path)
    boxes = data.scenes("voc", tmp_path, transform=partial(data.detect_transform, size=4))
    toys = data.scenes("toy+toy-arcade", tmp_path, transform=partial(data.segment_transform, size=8))
    proxy = data.images("toy-proxy", tmp_path, partial(data.distill_transform, size=8))
    for dataset in (boxes, toys, proxy):
        for found, expected in zip(pickle.loads(pickle.dumps(dataset))[1, 7], dataset[1, 7]):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_shuffles_label_fractions_and_all_that_is_random_about_an_item_follow_from_their_seeds_alone():
    for repeats, epoch in itertools.product((1, 3), range(3)):
        order = torch.randperm(10, generator=seeded(7, 1, epoch))
        found = [data.image_of(draw, 10, 7, repeats) for draw in range(10 * epoch, 10 * epoch + 10)]
        assert found == order[torch.arange(10) // repeats].tolist()
    dataset = data.images("toy+toy-boxes", "nowhere", lambda image, label: (torch.rand(3), label))
    dataset.seed = 7
    before = torch.get_rng_state()
    assert torch.equal(dataset[1000, 5][0], torch.rand(3, generator=seeded(7, 5)))
    assert torch.equal(torch.get_rng_state(), before)  # the rest of the program's numbers are left alone
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    assert [x.image for x in data.scenes("toy", "nowhere", labels="1/4").samples] == sorted(order[:250])


# Each transform is held against a slow form that draws the same random numbers, the recipe's constants spelled out.
def smooth_image(height, width):
    """A colourful uint8 image (3, H, W) without hard edges, so that resampling kernels agree."""
    x = torch.arange(width) / 7 + torch.arange(3)[:, None, None]
    y = torch.arange(height)[:, None] / 5 - torch.arange(3)[:, None, None]
    return (60 * x.sin() + 60 * y.cos() + 128).round().to(torch.uint8)


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def test_distillation_crops_flips_and_augments_as_in_the_recipe(monkeypatch):
    operation = Mock(side_effect=lambda image, *levels: image)
    monkeypatch.setattr(data, "RAND_AUGMENT", 15 * [operation])
    crop = RandomResizedCrop(32, (0.08, 1.0), (3 / 4, 4 / 3), TF.InterpolationMode.BICUBIC)
    image = torch.randint(80, 180, (3, 60, 80)).to(torch.uint8)  # fine detail, nothing to clip
    levels = []
    for seed in range(60):
        torch.manual_seed(seed)
        found, _ = data.distill_transform(image, size=32)
        torch.manual_seed(seed)
        assert (found.int() - RandomHorizontalFlip()(crop(image)).int()).abs().max() <= 2
        for _ in range(2):
            torch.randint(15, ())
            if uniform(0, 1) < 0.5:
                level = min(9 + 0.5 * torch.randn(()).item(), 10) / 10
                levels.append((level, level if uniform(0, 1) < 0.5 else -level))
    assert [call.args[1:] for call in operation.call_args_list] == levels


@pytest.mark.parametrize("number, name", [*enumerate((
    "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "AutoContrast", "Equalize", "Invert",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel"))])
def test_each_operation_of_rand_augment_is_timms(number, name, monkeypatch):
    timm_ops = pytest.importorskip("timm.data.auto_augment")
    image = smooth_image(200, 200)
    for level, sign in itertools.product((0.3, 0.5, 0.9), (1, -1)):  # with which translations are whole pixels
        monkeypatch.setattr(timm_ops.random, "random", lambda: 0.5 - 0.4 * sign)  # timm's coin for the sign
        to_arguments = timm_ops.LEVEL_TO_ARG[name]
        arguments = to_arguments(level * 10, {}) if to_arguments else ()
        operation = partial(timm_ops.NAME_TO_OP[name], fillcolor=(124, 116, 104), resample=Image.BICUBIC)
        expected = operation(to_pil_image(image), *arguments)
        found = data.RAND_AUGMENT[number](image, level, level * sign)
        near = (found.int() - pil_to_tensor(expected).int()).abs() <= 3
        assert near.double().mean() > (0.97 if name in ("Rotate", "ShearX", "ShearY") else 0.9999)  # at borders


def test_segmentation_scales_crops_flips_and_pads_image_and_label_together_as_in_the_recipe(monkeypatch):
    monkeypatch.setattr(data, "distort", lambda image: 255 - image)
    mean = torch.tensor([124, 116, 104])[:, None, None]  # ImageNet's, which is 0 after normalisation
    image = smooth_image(30, 80)
    label = (torch.arange(2400).view(30, 80) // 7 % 3 * (torch.arange(80) > 40)).to(torch.uint8)
    label[:, :5] = 255
    for seed in range(80):
        torch.manual_seed(seed)
        found, classes = data.segment_transform(image, label, size=32)
        torch.manual_seed(seed)
        short_edge = (16, 19, 22, 25, 28, 32, 35, 38, 41, 44, 48, 51, 54, 57, 60, 64)[torch.randint(16, ()).item()]
        scale = min(short_edge / 30, 128 / 80)
        resized = F.interpolate(image[None].float(), (round(30 * scale), round(80 * scale)), mode="bilinear")[0].round()
        known = F.interpolate(label[None, None], resized.shape[1:], mode="nearest-exact")[0, 0]
        for _ in range(10):
            top = torch.randint(max(known.shape[0] - 32, 0) + 1, ()).item()
            left = torch.randint(max(known.shape[1] - 32, 0) + 1, ()).item()
            part = known[top:top + 32, left:left + 32]
            if max((part == c).sum() / (part < 255).sum() for c in range(3)) < 0.75:
                break
        expected = 255 - resized[:, top:top + 32, left:left + 32]
        if uniform(0, 1) < 0.5:
            expected = expected.flip(2)
            part = part.flip(1)
        beyond = (0, 32 - part.shape[1], 0, 32 - part.shape[0])
        assert torch.equal(classes, F.pad(part, beyond, value=255))
        assert (found - mean - F.pad(expected - mean, beyond)).abs().max() <= 1


def test_distortion_changes_brightness_contrast_saturation_and_hue_half_the_time_each():
    for seed in range(150):
        pixel = torch.randint(0, 256, (3, 1, 1), generator=seeded(seed)).to(torch.uint8)
        torch.manual_seed(seed)
        found = data.distort(pixel)
        torch.manual_seed(seed)
        shift = uniform(-32, 32) if uniform(0, 1) < 0.5 else 0
        contrast = uniform(0, 1) < 0.5
        first = uniform(0, 1) < 0.5
        gain = uniform(0.5, 1.5) if contrast and first else 1
        factor = uniform(0.5, 1.5) if uniform(0, 1) < 0.5 else 1
        turn = uniform(-0.1, 0.1) if uniform(0, 1) < 0.5 else 0
        last_gain = uniform(0.5, 1.5) if contrast and not first else 1
        expected = np.clip(np.clip(pixel.flatten().numpy() + shift, 0, 255) * gain, 0, 255)
        h, s, v = colorsys.rgb_to_hsv(*expected / 255)
        expected = np.array(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * factor), v))
        assert np.abs(found.flatten().numpy() - np.clip(255 * expected * last_gain, 0, 255)).max() < 6


def test_images_are_normalised_for_any_encoder_and_boxes_and_masks_follow_from_seed_and_draw_alone():
    x = data.normalize(torch.tensor([0, 124, 255]).view(1, 3, 1, 1), mean=(0.5, 0.4, 0.6), std=(0.5, 0.25, 0.2))
    assert x.flatten().tolist() == pytest.approx([-1, (124 / 255 - 0.4) / 0.25, 2])
    draws = torch.randperm(2000, generator=seeded(0))[:800]
    found = data.erase(torch.zeros(800, 3, 24, 32), draws, seed=5)
    shares = [(image[0] != 0).double().mean().item() for image in found if image.any()]
    assert 0.22 < len(shares) / 800 < 0.28 and 0.015 < min(shares) < 0.04 and 0.3 < max(shares) < 0.345
    assert found[found != 0].std() == pytest.approx(1, abs=0.01)
    assert torch.equal(data.erase(torch.zeros(50, 3, 24, 32), draws[90:140], seed=5), found[90:140])
    for row, draw in zip(data.uniform_noise(draws[:9], 16, seed=5), draws.tolist()):  # which patches are hidden
        assert torch.equal(row, torch.rand(16, generator=seeded(5, 4, draw)))


def test_evaluation_sees_images_at_the_official_size():
    image = torch.randint(80, 180, (3, 200, 360)).to(torch.uint8)
    half = pil_to_tensor(to_pil_image(image).resize((180, 100), Image.BICUBIC))  # as Mapillary's own evaluation does
    for name, seen, size in (("cityscapes", image, (512, 922)), ("bdd100k", image, (711, 1280)),
                             ("acdc-fog", image, (533, 960)), ("mapillary", half, (512, 922))):
        found, label = data.eval_transform(image, image[0], name)
        expected = F.interpolate(seen[None].float(), size, mode="bilinear")[0]
        assert label.shape == seen.shape[1:] and (found - expected).abs().max() < 3


def test_a_toy_scene_is_the_same_on_every_machine_and_no_tile_is_both_trained_on_and_evaluated():
    found = hashlib.sha256()
    for scene in (("game", 0), ("night", 1), ("fog", 2), ("snow", 3), ("rain", 4), ("wide", 5), ("wide", 5, True),
                  ("arcade", 6), ("diorama", 7)):
        image, label = data.toy_scene.__wrapped__(*scene)  # drawn now, not remembered
        found.update(image.tobytes() + label.tobytes())
    for number in range(40):
        found.update(data.toy_things.__wrapped__("night", number)[1].tobytes())
    assert found.hexdigest()[:16] == "ae9b735e2d710025"
    for name, train, val in (("potsdam-rgb", 24, 14), ("vaihingen-irrg", 16, 17)):
        tiles = [text.strip("{}").split(",") for text in data.DATASETS[name].splits.values()]
        assert [*map(len, tiles)] == [train, val] and not {*tiles[0]} & {*tiles[1]}


def features(grid, batch=2):
    """What a decoder reads: 4 x (batch, 32, ., .) in float64, finest first."""
    return pyramid([torch.randn(batch, grid[0] * grid[1], 32).double() for _ in range(4)], grid)


def cells(batch, side):
    """Labels of 4 x 4 cells of one of three classes each, with void in two images: (batch, 4 side, 4 side)."""
    label = torch.randint(0, 3, (batch, 4, 4)).repeat_interleave(side, 1).repeat_interleave(side, 2)
    label[0, :side + 1] = 255
    label[1, :, :7] = 255
    label[1][label[1] == 2] = 1  # one class less than in other images
    return label


# --- Matching and losses ----------------------------------------------------------------------------------------------

def test_hungarian_finds_the_cheapest_assignment_of_all():
    rng = np.random.default_rng(0)
    for n, m in itertools.combinations_with_replacement(range(1, 7), 2):
        choices = np.array(list(itertools.permutations(range(m), n)))
        for power in range(-6, 7):
            for cost in (rng.normal(size=(n, m)) * 10.0 ** power, rng.integers(0, 3, (n, m))):  # the second with ties
                columns = hungarian(cost)
                assert len(columns) == n == len(set(columns))
                assert cost[range(n), columns].sum() == pytest.approx(cost[range(n), choices].sum(1).min(), rel=1e-9)


def slow_mask_losses(x, t):
    dice = 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)
    return F.binary_cross_entropy_with_logits(x.double(), t), dice


def slow_loss(logits, masks, label):
    """A read-out's loss, each mask by itself, and its costs; logits (B, 5, 4), masks (B, 5, h, w)."""
    costs = []
    ce = ce_weight = mask_loss = num_masks = 0
    for b, image in enumerate(label):
        targets = {k: (image == k).double() for k in range(3) if k in image}
        cost = {}
        for k, q in itertools.product(targets, range(5)):
            bce, dice = slow_mask_losses(masks[b, q], resize(targets[k][None, None], masks.shape[2:])[0, 0])
            cost[k, q] = (5 * bce + 5 * dice - 2 * logits[b, q].softmax(-1)[k]).item()
        costs += cost.values()
        choices = itertools.permutations(range(5), len(targets))
        best = min(choices, key=lambda queries: sum(cost[pair] for pair in zip(targets, queries)))
        for q in range(5):
            k = dict(zip(best, targets)).get(q, 3)
            weight = 1 if k < 3 else 0.1
            ce_weight += weight
            ce -= weight * logits[b, q].log_softmax(-1)[k]
            if k < 3:
                x = resize(masks[b, q][None, None], image.shape)[0, 0]
                mask_loss += sum(slow_mask_losses(x, targets[k]))
                num_masks += 1
    return 2 * ce / ce_weight + 5 * mask_loss / num_masks, costs


@pytest.mark.parametrize("side", [4, 8])  # labels as large as the masks (16 x 16), and larger
def test_costs_matching_and_loss_equal_a_slow_reference_in_value_and_gradient(side):
    decoder = MaskDecoder(32, 3, width=32)
    shapes = dict(logits=(3, 4, 5, 4), embed=(3, 4, 5, 8), pixels=(4, 8, 16, 16))
    outputs = {name: torch.randn(shape).mul(0.8).requires_grad_() for name, shape in shapes.items()}
    label = cells(4, side)
    full_masks = torch.einsum("lbqc,bchw->lbqhw", outputs["embed"], outputs["pixels"])
    read_outs = [slow_loss(*read_out, label) for read_out in zip(outputs["logits"], full_masks)]
    classes, real, masks = decoder.targets(label)
    costs = decoder.matching_cost(**outputs, classes=classes, masks=masks, generator=None)
    for cost, (_, slow_costs) in zip(costs, read_outs):
        assert cost[real].flatten().tolist() == pytest.approx(slow_costs, abs=1e-5)  # the costs decide the matching
    fast = decoder.loss(outputs, label, None, segment.divisors_of([label]))["loss"]
    slow = sum(loss for loss, _ in read_outs)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5, check_dtype=False)
    fast_gradients, slow_gradients = [torch.autograd.grad(x, outputs.values()) for x in (fast, slow)]
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-4, atol=1e-5)
    outputs["embed"] = torch.full((3, 4, 5, 8), math.nan)  # a step that diverged
    assert decoder.matching_cost(**outputs, classes=classes, masks=masks, generator=None).isfinite().all()


def test_points_lie_where_masks_are_uncertain_and_those_at_all_pixels_give_the_dense_losses(monkeypatch):
    decoder = MaskDecoder(32, 3, width=32, points=20000)
    ramp = torch.linspace(-1, 1, 64).expand(2, 1, 64, 64)  # uncertain at x = 1/2
    off = (decoder.uncertain_points(ramp, None)[..., 0] - 0.5).abs()  # 15000 of 60000 candidates lie within 1/8
    assert (off < 0.11).float().mean(1).tolist() == pytest.approx([0.75 * 0.88 + 0.25 * 0.22] * 2, abs=0.02)
    classes, _, masks = decoder.targets(cells(2, 4))
    given = torch.randn(2, *classes.shape, 8), torch.randn(2, 8, 16, 16), masks, None
    dense = decoder.mask_losses(*given)
    points = segment.centres((16, 16), "cpu").repeat(2 * classes.numel(), 1, 1)
    monkeypatch.setattr(decoder, "uncertain_points", lambda x, generator: points)
    decoder.points = 255
    torch.testing.assert_close(decoder.mask_losses(*given), dense, rtol=1e-4, atol=1e-5)


# --- Decoders and the segmenter ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("build", [
    partial(MaskDecoder, width=32), partial(MaskDecoder, width=32, pixel="deform", pixel_layers=1, points=50), Linear,
    partial(SemFPN, width=32, channels=32), partial(segment.BoxDecoder, patch=8, width=32, ffn=16, rois=8)])
def test_every_decoder_trains_all_its_parameters_and_computes_losses_and_scores_in_fp32(build):
    decoder = build(32, 3)
    boxes = isinstance(decoder, segment.BoxDecoder)
    nothing = torch.zeros(2, 100, 6) if boxes else torch.full((2, 32, 32), 255)
    label = torch.tensor(data.as_label([(3, 5, 30, 20, 2, 0)])).expand(2, -1, -1) if boxes else cells(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = decoder([x.float() for x in features((4, 4))])
        loss = decoder.loss(outputs, label, seeded(0), (5, 900))["loss"]
        without_classes = decoder.loss(outputs, nothing, seeded(0), (0, 0))["loss"]
        scores = decoder.scores(outputs, (32, 32))
    assert loss.dtype == scores[0].dtype == torch.float32
    without_classes.backward(retain_graph=True)
    assert without_classes.isfinite() and all(p.grad is not None for p in decoder.parameters())  # DDP waits for them
    loss.backward()
    for name, p in decoder.named_parameters():
        assert p.grad.isfinite().all() and (p.grad.any() or "level_encoding" in name), name  # what reads it starts at 0


def test_parameters_and_the_blocks_that_are_read_are_those_of_the_paper():
    mask = partial(segment.build_decoder, num_classes=19, cfg=segment.Config())
    with torch.device("meta"):
        decoders = [mask(384), mask(768), SemFPN(384, 19)]
    millions = [torch.nn.utils.parameters_to_vector(decoder.parameters()).numel() / 1e6 for decoder in decoders]
    assert millions == pytest.approx([19.9, 20.4, 11.2], abs=0.15)  # 41.9, 106.8, 33.2 M with ViT-S, -B, -S
    assert [qsd.feature_layers(depth) for depth in (1, 12, 24)] == [[0, 0, 0, 0], [3, 5, 7, 11], [7, 11, 15, 23]]


def test_the_one_stage_loss_is_the_task_loss_plus_the_weighted_objectives():
    encoder = mini_vit(16, depth=4, grid=(2, 4))
    cfg = segment.Config(kd=0.5, kd_logits=2.0, loss="cwd")
    segmenter = segment.Segmenter(encoder, Linear(16, 3), frozen=False)
    objective = qsd.build_objective(encoder, encoder, cfg)
    x = torch.randn(2, 3, 8, 16)
    label = torch.randint(0, 3, (2, 8, 16))
    label[0, :3] = 255
    t = encoder.tokens(x + 1)
    p_t = torch.randn(2, 3, 8, 16).softmax(1)
    logits = resize(segmenter(x), (8, 16))
    task = F.cross_entropy(logits, label, ignore_index=255)
    kd = 0.5 * 50 * objective(encoder, x, encoder.tokens(x), t, None)["loss"]  # 50: CWD's published weight
    kl = 2 * (p_t * (p_t / logits.softmax(1)).log()).sum() / (2 * 8 * 16)  # mean over pixels
    learner = segment.Learner(segmenter, objective, cfg)
    losses = learner(x, label, None, segment.divisors_of([label]), t, None, p_t)
    torch.testing.assert_close(losses["loss"], task + kd + kl)


def test_initial_weights_are_drawn_as_mmdet_draws_them():
    decoder = MaskDecoder(384, 19, width=256, queries=100, layers=1, ffn=2048, pixel="deform", pixel_layers=1)
    for name, p in decoder.named_parameters():
        if name.endswith("bias"):
            assert bool(p.any()) == bool(re.search("ffn|mask_embed|cls_embed|sampling_offsets", name)), name
        elif p.ndim > 1:
            fan_in = p[0].numel()
            fans = fan_in + p[:, 0].numel()
            draws = {"query|level": ("normal", 1), r"_attn\.(in|out)_proj|ffn": ("normal", math.sqrt(2 / fans)),
                     "mask_embed|cls_embed": ("uniform", fan_in ** -0.5),
                     r"lateral|embed\.\d": ("uniform", math.sqrt(3 / fan_in)),
                     "input_convs|value_proj|output_proj": ("uniform", math.sqrt(6 / fans)), "": ("uniform", 0)}
            draw, size = next(how for names, how in draws.items() if re.search(names, name))
            assert p.std().item() == pytest.approx(size / math.sqrt(3 if draw == "uniform" else 1), rel=0.06), name
            assert (p.abs().max() <= size) == (draw == "uniform"), name
    start = decoder.pixel_decoder.layers[0].self_attn.sampling_offsets.bias.view(4, 3, 4, 2)
    torch.testing.assert_close(start[:2, 1, 2], torch.tensor([[3.0, 0], [0, 3]]))  # the third points of two heads


# --- Released segmenters: equal to the authors' code ------------------------------------------------------------------
# The numbers were recorded from mmsegmentation 1.2.2, mmdet 3.3.0 and mmcv 2.1.0 in float64 with the authors'
# configuration, but a backbone of width 64, one head, 12 blocks, and 5 classes. Weights follow from the names there.
SLIDE_NORM = 821.2294028203435
SLIDE = {(0, 0, 0): 0.8595307808175633, (1, 10, 20): 6.787133105731442, (2, 31, 63): 3.370055302344709,
         (3, 63, 5): 0.8882775287196047, (4, 40, 40): 0.8006591065745017}
THEIRS = {  # what mmsegmentation calls a part of a name of ours
    "^encoder": "backbone", "^decoder": "decode_head", r"head\.(layers|post_norm)": r"head.transformer_decoder.\1",
    r"(head.*_attn)": r"\1.attn", r"pixel_decoder\.layers(.*)\.attn": r"pixel_decoder.encoder.layers\1",
    "pixel_decoder.layers": "pixel_decoder.encoder.layers", "lateral": "lateral_convs.0",
    r"r\.embed\.3": "r.mask_feature", r"r\.embed": "r.output_convs.0", r"(convs\.\d)\.0": r"\1.conv",
    r"(convs\.\d)\.1": r"\1.gn", r"ffn\.0": "ffn.layers.0.0", r"ffn\.2": "ffn.layers.1"}


def recorded_value(key, shape):
    values = normal_numbers(f"segmenter {key}", shape)
    if len(shape) == 1 and key.endswith("weight"):
        return torch.from_numpy(1 + 0.2 * values).float()
    unit = 1 / math.sqrt(math.prod(shape[1:]))
    scales = {"sampling_offsets": 0.5 / math.sqrt(shape[-1]), "bias": 0.1, "pos_embed|token": 0.3,
              "query_|level_": 3, "cls_embed": 1.5 * unit, "attn.out_proj": 0.7 * unit, "": unit}
    scale, *_ = [scale for names, scale in scales.items() if re.search(names, key)]
    return torch.from_numpy(scale * values).float()


def as_released(depth=12, width=256, layers=9):
    with torch.device("meta"):
        decoder = MaskDecoder(64, 5, width=width, queries=100, layers=layers, heads=8, ffn=8 * width, pixel="deform")
        encoder = qsd.ViT("small", embed_dim=64, depth=depth, num_heads=1, patch_size=16, img_size=64)
    state = OrderedDict({"backbone.mask_token": torch.zeros(1, 64)})
    for key, parameter in segment.Segmenter(encoder, decoder).named_parameters():
        for ours, theirs in THEIRS.items():
            key = re.sub(ours, theirs, key)
        state[key] = recorded_value(key, parameter.shape)
    return state


def test_a_released_segmenter_computes_what_the_official_code_computes(tmp_path):
    torch.save(dict(meta=argparse.Namespace(epoch=1), state_dict=as_released()), tmp_path / "iter_40000.pth")
    model, saved = segment.load_segmenter(tmp_path / "iter_40000.pth")
    image = torch.from_numpy(normal_numbers("image", (1, 3, 80, 96))).float().double()
    slid, = evaluation.slide(model.double(), image, 64, 2 / 3)
    assert slid.norm().item() == pytest.approx(SLIDE_NORM, rel=1e-5)  # one bit of one attention mask would be 3e-5
    assert {at: slid[at].item() for at in SLIDE} == pytest.approx(SLIDE, rel=1e-5)
    assert saved["classes"] == list("01234") and (saved["config"]["size"], saved["config"]["patch"]) == (64, 16)


def test_a_released_segmenter_of_19_classes_names_them_and_a_run_may_have_known_other_constants(tmp_path):
    path = tmp_path / "a.pth"
    head = {"decode_head.cls_embed.weight": torch.zeros(20, 32), "decode_head.cls_embed.bias": torch.zeros(20)}
    torch.save(as_released(depth=1, width=32, layers=1) | head, path)
    _, saved = segment.load_segmenter(path)
    assert saved["classes"] == list(data.DATASETS["cityscapes"].classes)
    del saved["config"]["blocks"]
    saved["config"]["a_constant_of_another_time"] = 1
    torch.save(saved, path)
    segment.load_segmenter(path)


# --- Runs: helpers ----------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
CPU = torch.device("cpu")
LOOK = {"toy": "game", "toy-night": "night", "toy-fog": "fog", "toy-snow": "snow", "toy-rain": "rain"}
SCRIPTS = {"distill": distill, "segment": segment}
QUICK = "--batch 4 --budget 2 --workers 0 --log_every 1"
ONE_STAGE = "--freeze no --teacher {teacher}"


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """No bars, and no process group, which a lone process does not need."""
    monkeypatch.setattr(dist, "init_process_group", None)
    monkeypatch.setattr(distill, "tqdm", lambda *args, **more: tqdm(*args, **more | dict(disable=True)))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A segmenter.pt of two training steps: its encoder is the teacher of all runs below."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    segment.main(f"--data toy-wide --encoder toy_base --freeze no --decoder linear {QUICK} --out {out}".split())
    dinov2 = qsd.ViT(**qsd.load_vit("toy_base").config | dict(layerscale=True))
    torch.save(qsd.student_checkpoint(dinov2), out / "dinov2.pt")
    return out / "segmenter.pt"


@pytest.fixture(scope="session")
def student(teacher):
    out = teacher.parent.parent / "student"
    distill.main(f"--data toy-proxy --teacher {teacher} {QUICK} --budget 3 --out {out}".split())
    return out / "student.pt"


def flags_of(teacher, student, script, out, more=""):
    own = {"distill": "--teacher {teacher}", "segment": "--encoder {student} --decoder linear"}[script]
    return f"--data toy {own} {QUICK} --out {out} {more}".format(teacher=teacher, student=student).split()


@pytest.fixture(scope="session")
def flags(teacher, student):
    return partial(flags_of, teacher, student)


def train(script, argv, before_step=lambda run: None):
    """A script's main, without the count of operations, half of the time. Returns how many optimiser steps it took."""
    finite = distill.Run.finite
    taken = []
    def counted(run):
        before_step(run)
        taken.append(run)
        return finite(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.Run, "finite", counted)
        patch.setattr(distill, "count_flops", lambda work: (work(), 1)[1])
        SCRIPTS[script].main(argv)
    return len(taken)


def interrupt(script, argv):
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        train(script, argv, lambda run: signal.raise_signal(signal.SIGTERM))


def weights(out):
    """All that a run has trained, bit for bit, from the one checkpoint in its folder."""
    path, = out.glob("*.pt")
    saved = torch.load(path, weights_only=True)
    tensors = saved["model"] | {"mask_token": saved.get("mask_token", torch.zeros(1))} | saved.get("objective", {})
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def records(out):
    """The lines of a run's log after its header, without what is measured in seconds and GB."""
    measured = r', "(seconds|images_per_s|data_wait|peak_gb)": [^,}]+'
    lines = (out / "log.jsonl").read_text().splitlines()[1:]
    return [json.loads(re.sub(measured, "", line)) for line in lines]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_runs(a, b):
    """Whether two folders hold the same files and losses and, bit for bit, the same weights."""
    return contents(a).keys() == contents(b).keys() and records(a) == records(b) and weights(a) == weights(b)


# --- Runs: every setting reaches the weights --------------------------------------------------------------------------

LOSS = ("--loss cwd --alpha 0.5 --beta 0.5 --gamma 0.5 --feat_with_cls no --mask_ratio 0.25 "
        "--mask_all yes --attention identity --scale sqrt --layers four --target_norm layernorm --teacher toy_base")
OTHER_VALUES = [    # script, what it takes for the constants behind it to matter, another value of each
    ("distill", "", f"{LOSS} --data toy-arcade --student {{student}} --student_depth 2 --size 32 --patch 16 --erase 1 "
     "--randaugment no --repeats 2 --batch 8 --budget 3 --lr 0.01 --lr_rule batch/512 --lr_min 0.0005 --warmup 0.5 "
     "--weight_decay 0.1 --seed 1 --precision fp16"),
    ("distill", "--loss afdcd", "--dcd_pool 2"),
    ("distill", "--size 48 --teacher {teacher.parent}/dinov2.pt", "--hub_offset 0.1"),
    ("segment", "", "--data toy-arcade --labels 1/16 --encoder toy_small --depth 2 --freeze no --decoder mask --seed 1 "
     "--blocks four --size 32 --patch 16 --cat_max_ratio 0.3 --batch 8 --budget 3 --lr 0.01 --power 2 "
     "--weight_decay 0.1 --precision bf16"),
    ("segment", "--freeze no", "--lr_backbone 0.01"),
    ("segment", "--decoder mask", "--width 32 --queries 16 --decoder_layers 2 --ffn 128 --pixel deform --heads 2 "
     "--points 50"),
    ("segment", "--data toy-boxes --decoder boxes --ffn 16", "--rois 4 --proposals 10"),
    ("segment", f"{ONE_STAGE} --kd 1", f"{LOSS} --kd_logits 1"),
    ("segment", f"{ONE_STAGE} --kd 1 --loss afdcd", "--dcd_pool 2"),
    ("segment", f"{ONE_STAGE} --kd_logits 1", "--kd 1")]
NOT_LEARNED = distill.FREE | {"compile", "stage", "pretrained", "classes", "bench"}     # they have tests of their own


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_constant_has_another_value_above(script):
    text = " ".join(values for of, _, values in OTHER_VALUES if of == script)
    constants = {field.name for field in dataclasses.fields(SCRIPTS[script].Config)}
    assert set(re.findall(r"--(\w+)", text)) == constants - NOT_LEARNED


@pytest.mark.parametrize("script, needs, values", OTHER_VALUES)
def test_another_value_of_each_constant_gives_other_weights(script, needs, values, flags, tmp_path):
    found = {}
    for change in ["", *re.findall(r"--\w+ \S+", values)]:
        out = tmp_path / str(len(found))
        train(script, flags(script, out, f"{needs} {change}"))
        found[change] = weights(out)
        assert change == "" or found[change] != found[""], change


@pytest.mark.parametrize("script, more, encoders", [
    ("distill", "--erase 0", 2), ("segment", "--freeze no --kd 1 --kd_logits 1", 3)])
def test_student_and_teachers_see_the_same_pixels_each_normalised_as_it_was_trained(
        script, more, encoders, teacher, flags, tmp_path, monkeypatch):
    saved = torch.load(teacher, weights_only=True)
    saved["encoder"] |= dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    torch.save(saved, tmp_path / "other.pt")
    run = qsd.ViT.tokens
    seen = []
    def record(vit, x, *args, **options):
        seen.append((vit.mean, data.renormalize(x, vit, SimpleNamespace(mean=(0, 0, 0), std=[1 / 255] * 3))))
        return run(vit, x, *args, **options)
    monkeypatch.setattr(qsd.ViT, "tokens", record)
    train(script, flags(script, tmp_path / "a", f"{more} --loss mse --teacher {tmp_path}/other.pt"))
    means, pixels = zip(*seen[-encoders:])
    assert sorted(means) == [(0.485, 0.456, 0.406)] + [(0.5, 0.4, 0.3)] * (encoders - 1)
    for x in pixels:
        torch.testing.assert_close(x, pixels[0].round(), rtol=1e-3, atol=1e-3)


STILL = {"distill": r"bias$|norm|^objective\.\w+\.\w+\.0\.",        # the parameters that do not decay, officially
         "segment": r"^segmenter\.decoder\.(query|level_embed|post_norm|layers.*norm"
                    r"|pixel_decoder\.(layers.*norm|lateral\.1\.|input_convs\.\d\.1\.|embed\.1\.))"}
POLYNOMIAL = "--decoder mask --pixel deform --lr 0.004 --lr_backbone 0.001 --power 2 --budget 8flop"     # 2 a step


@pytest.mark.parametrize("script, more, rates", [
    ("distill", "--lr 0.512 --lr_rule batch/512 --lr_min 0.001 --warmup 0.5", [0, 0.002, 0.004, 0.0025]),
    ("distill", "--lr 0.004 --lr_rule constant --lr_min 0 --budget 0.016ep", [0.004, 0.00341421, 0.002, 0.00058579]),
    ("segment", f"{POLYNOMIAL} --freeze no", [0.004, 0.00225, 0.001, 0.00025]),
    ("segment", f"{POLYNOMIAL} --freeze yes --pixel fpn", [0.004, 0.00225, 0.001, 0.00025])])
def test_adamw_has_the_published_betas_decays_and_rates_over_the_budget(script, more, rates, flags, tmp_path):
    def check(run):
        names = {parameter: name for name, parameter in run.learner.named_parameters() if parameter.requires_grad}
        encoder = [name for name in names.values() if name.startswith(("student.", "segmenter.encoder."))]
        assert bool(encoder) == ("--freeze yes" not in more) and type(run.optimizer) is torch.optim.AdamW
        for group in run.optimizer.param_groups:
            assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, False)
            for name in [names.pop(parameter) for parameter in group["params"]]:
                slower = 4 if name in encoder and script == "segment" else 1
                assert group["lr"] == pytest.approx(rates[run.ledger["steps"]] / slower, rel=1e-5), name
                assert group["weight_decay"] == (0 if re.search(STILL[script], name) else 0.3), name
        assert not names
    argv = flags(script, tmp_path / "a", f"--budget 4 --log_every 3 --weight_decay 0.3 {more}")
    assert train(script, argv, check) == 4
    assert [line["step"] for line in records(tmp_path / "a")] == [3, 4]


def test_a_flag_beats_the_preset_of_data_and_stage_which_beats_the_default():
    def found(script, text=""):
        cfg = distill.configure(script.Config, script.preset, text.split())
        return cfg.size, cfg.batch, cfg.lr, cfg.budget
    assert found(distill, "--data imagenet") == found(distill, "--data gtav --stage proxy") == (224, 512, 5e-4, "100ep")
    assert found(distill, "--data gtav") == found(distill, "--data imagenet --stage source")
    assert found(distill, "--data gtav") == (512, 128, 5e-4, "300ep")
    assert found(distill, "--data toy-proxy") == found(distill, "--stage proxy") == (64, 16, 2e-3, "1000")
    assert found(distill, "--data toy+toy-arcade --size 96 --lr 7") == (96, 16, 7, "1000")
    assert found(segment) == (512, 4, 1e-4, "40000") and found(segment, "--data camvid") == (224, 8, 1e-3, "250")
    assert distill.learning_rate(distill.Config(batch=8), 0.9) == 5e-4 * 8 / 512  # already below lr_min


# --- Runs: resumed ----------------------------------------------------------------------------------------------------

RUNS = {name: ("distill", f"--loss {name} --size 32") for name in qsd.LOSSES} | {
    "joined": ("segment", "--data toy+toy-arcade --labels 1/4 --workers 1"), "masks": ("segment", "--decoder mask"),
    "one-stage": ("segment", f"{ONE_STAGE} --kd 1 --kd_logits 1 --loss vitkd")}


@pytest.mark.parametrize("script, more", RUNS.values(), ids=RUNS)
def test_every_objective_and_stage_resumes_to_the_bits_of_an_uninterrupted_run(script, more, flags, tmp_path):
    train(script, flags(script, tmp_path / "whole", f"--budget 3 {more}"))
    parts = flags(script, tmp_path / "parts", f"--budget 3 {more}")
    interrupt(script, parts)
    assert train(script, parts) == 2 and same_runs(tmp_path / "whole", tmp_path / "parts")
    assert train(script, [*parts, "--micro", "2", "--root", "elsewhere"]) == 0      # it is finished


def test_a_run_killed_at_any_change_of_its_folder_is_completed_by_the_same_command(flags, tmp_path):
    out = tmp_path / "parts"
    argv = flags("distill", out, "--size 32 --loss mse --save_minutes 0")
    left = []                                               # what kill -9 would leave at each line of distill.py

    def look(frame, event, arg):
        if contents(out) not in left:
            left.append(contents(out))
        return look
    sys.settrace(lambda frame, *rest: look if frame.f_code.co_filename == distill.__file__ else None)
    interrupt("distill", argv)
    train("distill", argv)
    sys.settrace(None)
    os.rename(out, tmp_path / "whole")
    assert len(left) >= 9
    for files in left:
        shutil.rmtree(out, ignore_errors=True)
        for name, content in files.items():
            out.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
        train("distill", argv)
        assert same_runs(tmp_path / "whole", out), files.keys()


def test_a_checkpoint_that_cannot_be_written_to_its_end_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    distill.save(path, dict(step=1))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        distill.save(path, dict(step=lambda: 2))
    assert torch.load(path) == dict(step=1)


def test_signals_to_all_processes_of_a_typed_command_leave_time_to_finish_and_save_the_step(flags, tmp_path):
    log = tmp_path / "a/log.jsonl"
    command = ["distill.py", *flags("distill", tmp_path / "a", "--budget 9999 --workers 1")]
    process = subprocess.Popen([sys.executable, *command], cwd=HERE, start_new_session=True, stderr=subprocess.PIPE)
    while not log.exists() or '"step": 2,' not in log.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    _, error = process.communicate(timeout=20)
    assert process.returncode in (130, 143) and b"the same command goes on" in error and b"Traceback" not in error
    assert torch.load(tmp_path / "a/last.pt")["ledger"]["steps"] == records(tmp_path / "a")[-1]["step"]


def test_however_a_run_ends_signals_and_loading_processes_are_as_before_and_a_thread_sets_no_handler(flags, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    argv = flags("distill", tmp_path / "a", "--workers 1 --loss mse")
    with pytest.raises(RuntimeError) as kept:                       # holds the frames, as a notebook does
        train("distill", argv, before_step=Mock(side_effect=RuntimeError))
    assert kept and [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not multiprocessing.active_children()
    thread = threading.Thread(target=train, args=["distill", flags("distill", tmp_path / "b", "--loss mse")])
    thread.start()
    thread.join()
    assert contents(tmp_path / "b").keys() == {"log.jsonl", "student.pt"}


@pytest.mark.parametrize("script, more, scale", [
    ("distill", "--precision fp16 --loss mse --student {student}", 2 ** (16 - 6)), ("segment", "", 1)])
def test_steps_that_are_not_finite_are_skipped_and_counted_and_too_many_in_a_row_end_the_run(
        script, more, scale, flags, tmp_path, monkeypatch):
    argv = flags(script, tmp_path / "a", f"--budget 10 --save_minutes 0 {more}")
    factors = iter([1, 1, math.nan, 1, math.nan, math.nan, 1, math.nan, math.nan, math.nan])    # 0 is the dry run
    normalize = data.normalize
    monkeypatch.setattr(distill, "MAX_SKIPS", 3)
    with monkeypatch.context() as patch, pytest.raises(qsd.UserError, match=r"a: 3 steps in a row had gradients that"):
        patch.setattr(data, "normalize", lambda *args: normalize(*args) * next(factors))
        train(script, argv)
    assert [line["skipped"] for line in records(tmp_path / "a")] == [0, 1, 1, 2, 3, 3, 4, 5]
    scales = []
    assert train(script, argv, lambda run: scales.append(run.scaler.get_scale())) == 2
    assert scales == [scale * 2 ** (scale > 1)] * 2                 # of fp16 losses: each bad step before has halved it
    ledger = torch.load(next(tmp_path.glob("a/*.pt")), weights_only=True)["ledger"]
    spent = [(stage["script"], stage["steps"], stage["images"], stage["tokens"], stage["skipped"]) for stage in ledger]
    assert spent == [("distill", 3, 12, 768, 0), (script, 10, 40, 2560, 5)]


@pytest.mark.parametrize("more", ["--budget 2", "--budget 9 --save_minutes 0"])
def test_weights_that_a_step_has_ruined_are_neither_saved_nor_a_result(more, flags, tmp_path):
    argv = flags("distill", tmp_path / "a", f"--loss mse {more}")
    interrupt("distill", argv)
    good = contents(tmp_path / "a")["last.pt"]
    def ruin(run):
        next(run.learner.parameters()).data.fill_(math.nan)
    with pytest.raises(qsd.UserError, match="a: step 2 left weights that are not finite, which are not saved"):
        train("distill", argv, ruin)
    files = contents(tmp_path / "a")
    assert files.keys() == {"log.jsonl", "last.pt"} and files["last.pt"] == good


def test_a_new_constant_orphans_no_run_and_another_value_is_never_mixed_in(flags, tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Newer(distill.Config):
        smoothing: float = 0.5  # a constant of tomorrow
    argv = flags("distill", tmp_path / "a")
    interrupt("distill", argv)
    monkeypatch.setattr(distill, "Config", Newer)
    with pytest.raises(qsd.UserError, match=r"with other constants \(seed 0 -> 1, smoothing 0.5 -> 0.7\); choose"):
        train("distill", [*argv, "--seed", "1", "--smoothing", "0.7"])
    assert train("distill", [*argv, "--save_minutes", "3", "--workers", "1"]) == 1


# --- Runs: the mistakes that people make ------------------------------------------------------------------------------

D = f"distill.py --data toy --teacher {{teacher}} {QUICK}"
S = f"segment.py --data toy --encoder {{student}} --decoder linear {QUICK}"
MISTAKES = {    # a command as typed, and what its one line says
    f"{D} --lr_rat constant": "unrecognized arguments: --lr_rat constant",
    f"{D} --loss kd": "argument --loss: invalid choice: 'kd'",
    f"{S} --freeze maybe": "argument --freeze: yes or no was expected, not maybe",
    f"{D} --seed -1": "argument --seed: a number (int) of 0 or more was expected, not -1",
    f"{D} --budget 300epochs": "--budget 300epochs is not one of",
    f"{D} --batch 0": "--batch 0 does not divide into pairs",
    f"{D} --batch 3": "--batch 3 does not divide into pairs of images over 1 processes",
    "data.py --data gtva": "--data gtva: not one of",
    f"{D} --data gtav --root {{teacher}}/nowhere": "nowhere: no such folder",
    f"{S} --classes 3": "--classes 3: is for --data folder",
    f"{S} --labels 2": "--labels 2: a fraction like 1/16 was expected",
    f"{D} --lr nan": "argument --lr: a number (float) of 0 or more was expected, not nan",
    f"{D} --size 60": "60x60 pixels does not divide into patches of 8",
    f"{D} --mask_ratio 50": "--mask_ratio 50.0 hides 3200 of 64 patches: give a share",
    f"{D} --loss afdcd --dcd_pool 4": "--dcd_pool 4 leaves no 4x4 patch on a grid of 8x8",
    f"{D} --teacher dinov2_vitb15": "dinov2_vitb15: neither a file nor a known encoder",
    f"{D} --student {{student.parent}}/log.jsonl": "log.jsonl is truncated, damaged or no checkpoint",
    f"{D} --student {{student}} --pretrained no": "only a named encoder can start at random",
    f"{D} --loss mse --layers four": "--layers four changes nothing: --loss mse ignores it",
    f"{D} --compile yes": "--compile needs a C compiler: install gcc, or say --compile no",
    "distill.py --data toy --bench official --loss mse": "--bench official is about the paper's objective",
    f"{D} --out {{teacher.parent.parent}}": "holds something else than a run; choose another --out",
    f"{S} --out {{teacher}}": "segmenter.pt holds something else than a run",
    f"{S} --out {{student.parent}}": "student holds a run with other constants (",
    f"{S} --decoder mask --heads 3": "attention one of --heads 3",
    f"{D} --student_depth 0": "depth must be 1 to 4 for toy_student, not 0",
    f"{S} --encoder toy_small --kd 1": "add --freeze no and --teacher",
    f"{S} --encoder toy_small --freeze no --teacher toy_base": "--teacher toy_base teaches nothing: add --kd 1",
    f"{S} --encoder toy_small --freeze no --loss cwd": "--loss cwd distils nothing: add --kd 1",
    f"{S} --encoder toy_small --freeze no --kd_logits 1 --teacher {{student}}": "student.pt is no segmenter.pt, nor",
    "eval.py --checkpoint {teacher} --data cityscapes": "--data cityscapes has the 19 classes",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_status_2_and_nothing_is_begun(
        command, teacher, student, tmp_path, monkeypatch, capfd):
    before = contents(teacher.parent.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill.Run, "steps", None)
    monkeypatch.setenv("PATH", "")      # a machine without a compiler
    monkeypatch.delenv("CC", raising=False)
    script, *argv = command.format(teacher=teacher, student=student).split()
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(HERE / script), run_name="__main__")
    error = capfd.readouterr().err
    assert error.startswith(f"{script}: ") and MISTAKES[command] in error and error.count("\n") == 1
    assert contents(teacher.parent.parent) == before and not contents(tmp_path)


@pytest.mark.parametrize("module", [distill, segment, evaluation], ids=lambda module: module.__name__)
def test_help_shows_every_constant_with_its_comment(module, capsys):
    with pytest.raises(SystemExit, match="0"):
        distill.configure(module.Config, module.preset, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name} " in shown and f"(default {field.default})" in shown, field.name


# --- Runs: several processes ------------------------------------------------------------------------------------------

def train_together(teacher, student, out):
    """Runs that are stopped after a step and resumed: one process takes a pass a step, two take two passes each."""
    curves = {}
    world = distill.world_size()
    last = distill.rank() == world - 1
    for name in ("qsd", "masks", "one-stage"):
        script, more = RUNS[name]
        argv = flags_of(teacher, student, script, out / name, f"--batch 8 --micro {8 if world == 1 else 2} {more}")
        norms = []
        def note(run):
            gradients = [p.grad for p in run.learner.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients).item())
            assert run.passes == world
            if last and len(norms) == 1:        # a signal reaches one process, and all must end
                signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(script, argv, note)
        if last and world > 1:                  # a machine without the shared disk has no last.pt
            argv += ["--out", f"{out}/elsewhere/{name}"]
        assert train(script, argv, note) == 1
        distill.largest(0)                      # waits until the first has written its log
        curves[name] = norms + [line["loss"] for line in records(out / name)]
    (out / f"{distill.rank()}.json").write_text(json.dumps(curves))


def test_two_processes_in_two_passes_each_have_the_losses_and_gradients_of_one_with_the_whole_batch(
        teacher, student, tmp_path):
    train_together(teacher, student, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, __file__, teacher, student, tmp_path / "two"], check=True, cwd=HERE, timeout=300)
    one, *two = [json.loads((tmp_path / name).read_text()) for name in ("one/0.json", "two/0.json", "two/1.json")]
    for name, curve in one.items():
        assert len(curve) == 4 and all(curves[name] == pytest.approx(curve, rel=1e-4) for curves in two), name


# --- Runs: on CUDA, as far as a CPU can tell --------------------------------------------------------------------------
# Fake tensors have a device, a shape and a dtype, but no values. An operation of them on two devices fails as
# it does on CUDA, and so does any whose result the CPU must read before it can go on.

@pytest.fixture
def fake_cuda(monkeypatch):
    """A machine with a GPU on which all tensors are fake; whatever needs the values of one is replaced."""
    cuda = torch.device("cuda", 0)
    def move(module, device):
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fake_device = cuda
        return module
    scenes = data.scenes("toy", "data")
    monkeypatch.setattr(data, "images", lambda *rest, **more: scenes)
    monkeypatch.setattr(data, "scenes", lambda *rest, **more: scenes)
    monkeypatch.setattr(distill, "launch", lambda: cuda)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, std: tensor)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    for name, row in qsd.ENCODERS.items():
        monkeypatch.setitem(qsd.ENCODERS, name, row._replace(url=None, depth=2))    # all start at random
    monkeypatch.setattr(distill, "two_images", lambda size: (torch.zeros(2, 3, size, size).byte(), [Mock()]))
    monkeypatch.setattr(data, "erase", lambda x, *rest: x)
    monkeypatch.setattr(data, "mix", lambda *numbers: 0)
    monkeypatch.setattr(data, "uniform_noise", lambda draws, N, seed: torch.rand(2, N))
    monkeypatch.setattr(torch, "Generator", lambda device: Mock(manual_seed=lambda seed: None))
    with FakeTensorMode():
        yield cuda


@pytest.mark.parametrize("dtype, more", [
    *((torch.bfloat16, f"--precision bf16 --loss {loss}") for loss in qsd.LOSSES),
    (torch.float32, "--mask_all yes --scale sqrt --layers four --teacher dinov3_vits16plus --student eva02_base"),
    (torch.float32, "--decoder fpn"), (torch.float32, "--decoder linear"),
    (torch.float16, "--precision fp16 --decoder mask --decoder_layers 1 --pixel deform --points 16 --freeze no --kd 1 "
     "--teacher dinov2_vits14_reg")])
def test_on_cuda_no_tensor_is_left_behind_no_loss_waits_and_products_have_the_precision(
        dtype, more, fake_cuda, tmp_path, monkeypatch):
    script = segment if "--decoder" in more else distill
    if script is segment:       # the CPU reads how many pixels and which classes there are, and what a match costs
        monkeypatch.setattr(FakeTensor, "__int__", lambda tensor: 2, raising=False)
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [2] * len(tensor))
        monkeypatch.setattr(FakeTensor, "numpy", lambda tensor: np.zeros(tensor.shape, dtype=int), raising=False)
    losses = {}
    products = set()
    def stop_after(learner, losses_of_two_images):
        losses.update(losses_of_two_images())
        sys.exit()
    def watch(module, inputs, output):
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            products.add((output.device, output.dtype))
    monkeypatch.setattr(distill, "dry_run", stop_after)
    with torch.nn.modules.module.register_module_forward_hook(watch), pytest.raises(SystemExit):
        script.main(f"--data toy --precision fp32 {more} --workers 0 --out {tmp_path / 'a'}".split())
    assert {(loss.device, loss.dtype) for loss in losses.values()} == {(fake_cuda, torch.float32)}
    assert products == {(fake_cuda, dtype)}


def test_on_cuda_evaluation_leaves_no_tensor_behind(fake_cuda, monkeypatch):
    batch = torch.zeros(2, 3, 64, 70, dtype=torch.uint8), torch.zeros(2, 128, 140, dtype=torch.int64), None
    decoder = segment.build_decoder(64, 8, segment.Config(**segment.LIGHT | dict(decoder_layers=1)))
    model = segment.Segmenter(qsd.load_vit("toy_small"), decoder).to(fake_cuda)
    monkeypatch.setattr(evaluation, "DataLoader", lambda *rest, **more: [batch])
    monkeypatch.setattr(evaluation, "check_finite", lambda scores: None)    # fake tensors have no values
    monkeypatch.setattr(evaluation, "confusion", compare := Mock(return_value=torch.zeros(8, 8).long().to(fake_cuda)))
    evaluation.evaluate(model, data.scenes("toy"), 64, ONE_BY_ONE, fake_cuda)
    pred, label, _ = compare.call_args.args
    assert pred.device == label.device == fake_cuda and pred.shape == label.shape


# --- Runs: compiled, and how fast they are ----------------------------------------------------------------------------

def test_a_compiled_run_is_two_graphs_compiled_once_with_the_losses_of_eager_mode(flags, tmp_path, monkeypatch):
    run = partial(flags, "distill", more="--budget 3 --student_depth 1")
    train("distill", run(tmp_path / "eager"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced as ever, but no C++ built
    torch._dynamo.reset()
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        train("distill", run(tmp_path / "compiled") + ["--compile", "yes"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - traced == 2         # teacher; student and objective
    for eager, compiled in zip(records(tmp_path / "eager"), records(tmp_path / "compiled"), strict=True):
        assert compiled == pytest.approx(eager, rel=1e-5)


def test_the_bench_prints_speed_parts_and_ratio_of_a_step_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    distill.save(Path("kept"), "")
    distill.main("--data toy --bench official --micro 2 --student_depth 1 --out kept".split())
    speed, parts, ratio = capsys.readouterr().out.splitlines()[-3:]
    images, tflops = re.search(r" 2 images a step: (\S+) images/s \[\S+], (\S+) TFLOP/s", speed).groups()
    assert 1e3 * float(tflops) / float(images) == pytest.approx(0.176, rel=0.03)    # GFLOP an image
    assert sum(map(int, re.findall(r"(-?\d+)%", parts))) == pytest.approx(100, abs=2)
    low, high = re.search(r"times as long \[(\S+)\.\.(\S+)]", ratio).groups()
    assert 0 < float(low) <= float(high) and os.listdir() == ["kept"]


# --- Evaluation: helpers ----------------------------------------------------------------------------------------------

def slow_ious(pairs, K):
    """IoU in percent of each class over (prediction, label) pairs, counted class by class; NaN if it never occurs."""
    pred = np.concatenate([np.ravel(pred) for pred, _ in pairs])
    label = np.concatenate([np.ravel(label) for _, label in pairs])
    ious = []
    for k in range(K):
        both = ((pred == k) & (label == k)).sum()
        either = (((pred == k) | (label == k)) & (label != 255)).sum()
        ious.append(100 * both / either if either else math.nan)
    return ious


def scenes(name):
    """Pairs (image uint8 (3, 64, 64), label (64, 64)) of the first three scenes that a toy domain is evaluated on."""
    pairs = [data.toy_scene(LOOK[name], 10 ** 6 + i) for i in range(3)]
    return [(torch.from_numpy(image).permute(2, 0, 1), label) for image, label in pairs]


@pytest.fixture
def few(monkeypatch):
    """Toy domains of three scenes to evaluate on."""
    for name, look in LOOK.items():
        monkeypatch.setitem(data.DATASETS, name, data.toy(look, train=6, val=3))


def save_segmenter(path, only=None, decoder="linear"):
    """Write a segmenter with random weights, or one that sees the class `only` wherever it looks."""
    cfg = segment.Config(decoder=decoder, size=64, width=32, queries=8, decoder_layers=1, ffn=32, heads=2, pixel="fpn")
    model = segment.Segmenter(qsd.load_vit("toy_small", depth=1), segment.build_decoder(64, 8, cfg))
    if only is not None:
        model.decoder.heads[0][1].bias.data[only] = 1000
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=model.state_dict(), encoder=model.encoder.config, config=dataclasses.asdict(cfg),
                    ledger=[dict(seconds=60, flops=1e12), dict(seconds=10, flops=2e12)],
                    classes=list(data.TOY_CLASSES), colors=list(map(list, data.TOY_COLORS))), path)
    return path


ONE_BY_ONE = evaluation.Config(batch=1, workers=0)


def in_two_processes(work, monkeypatch):
    """What two processes find, before it is added up."""
    with monkeypatch.context() as patch:
        patch.setattr(distill, "world_size", lambda: 2)
        first = work()
        patch.setattr(distill, "rank", lambda: 1)
        return first, work()


def printed_table(text):
    """The cells of printed tables, with their headers."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [re.split(r" *\| *", line)[1:-1] for line in lines]


def test_miou_equals_a_slow_count_in_which_unlabelled_pixels_and_absent_classes_play_no_part():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 2, 3, 4, 255], (9, 7, 3))
    pred = rng.integers(0, 4, (9, 7, 3))  # 1 is only predicted, 5 absent
    conf = evaluation.confusion(torch.from_numpy(pred), torch.from_numpy(label), 6)
    expected = slow_ious([(pred, label)], 6)
    assert (100 * evaluation.iou(conf)).tolist() == pytest.approx(expected, nan_ok=True)
    assert conf[2, 1] == ((label == 2) & (pred == 1)).sum()


@pytest.mark.parametrize("height, width, stride, step", [
    (16, 16, 2 / 3, 11), (20, 37, 2 / 3, 11), (50, 41, 1, 16), (10, 40, 0.7, 11)])
def test_the_sliding_window_equals_a_slow_mean_over_the_windows(height, width, stride, step):
    weight = torch.rand(16, 16)  # scores depend on the place within a window, so that every overlap shows
    decoder = SimpleNamespace(scores=lambda x, size: x[:, :2] * weight.view(size))
    model = Mock(side_effect=lambda x: x, decoder=decoder)
    x = torch.randn(2, 3, height, width)
    padded = F.pad(x, (0, max(0, 16 - width), 0, max(0, 16 - height)))
    total = torch.zeros_like(padded[:, :2])
    count = torch.zeros_like(padded[:1, :1])
    H, W = padded.shape[2:]
    for i, j in np.ndindex(math.ceil((H - 16) / step) + 1, math.ceil((W - 16) / step) + 1):
        top = min(i * step, H - 16)  # the last one ends flush with the border
        left = min(j * step, W - 16)
        total[..., top:top + 16, left:left + 16] += padded[:, :2, top:top + 16, left:left + 16] * weight
        count[..., top:top + 16, left:left + 16] += 1
    torch.testing.assert_close(evaluation.slide(model, x, 16, stride), (total / count)[..., :height, :width])
    x[0, 1, -1, -1] = math.inf
    with pytest.raises(qsd.UserError, match="scores are not finite"):
        evaluation.slide(model, x, 16)


def test_the_miou_that_eval_prints_is_that_of_a_slow_count_and_shared_by_processes(few, tmp_path, monkeypatch, capsys):
    path = save_segmenter(tmp_path / "segmenter.pt")
    model, _ = segment.load_segmenter(path)
    expected = {}
    for name in ("toy-fog", "toy-night"):
        pairs = []
        for image, label in scenes(name):
            x = data.normalize(image[None], model.encoder.mean, model.encoder.std)
            pairs.append((model.decoder.scores(model(x), (64, 64))[0].argmax(0), label))
        expected[name] = np.nanmean(slow_ious(pairs, 8))
    expected["mean"] = (expected["toy-fog"] + expected["toy-night"]) / 2
    evaluation.main(f"--checkpoint {path} --data toy-fog+toy-night --batch 2".split())
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1]) == {"checkpoint": str(path), "miou": pytest.approx(expected)}
    assert printed_table(text) == [["", *expected], [str(path), *[f"{value:.1f}" for value in expected.values()]]]
    evaluation.main(f"--figure 9 --models a={path},b={path} --data toy-night".split())
    _, *rows = printed_table(capsys.readouterr().out)
    texts = [f"{value:.1f}".replace("nan", "-") for value in [*slow_ious(pairs, 8), expected["toy-night"]]]
    assert rows == [[name, text, text] for name, text in zip([*data.TOY_CLASSES, "mean"], texts)]
    counted = partial(evaluation.evaluate, model, data.scenes("toy-fog", "", "val"), 64, ONE_BY_ONE, CPU)
    first, second = in_two_processes(counted, monkeypatch)
    assert torch.equal(first + second, counted()) and first.sum() == 2 * second.sum()


# --- Evaluation: tables are lists of runs -----------------------------------------------------------------------------

@cache
def blocks_of(table, world):
    cfg = evaluation.Config(table=table, data=world, out="runs/x", root="/data", seed=3, seeds=1)
    return list(itertools.chain(*evaluation.blocks(cfg)))


@pytest.mark.parametrize("world", ["toy", "camvid", "paper"])
def test_every_command_of_every_table_is_accepted_and_begins_where_one_before_it_ended(world):
    command_of = {}  # of each folder: the same in all tables
    tables = [table for table, worlds in evaluation.ABOUT["worlds"].items() if world in worlds.split()]
    for block in itertools.chain(*[blocks_of(table, world) for table in tables]):
        for *domains, mean in filter(None, block.paper.values()):  # the paper's numbers fit
            assert not domains or float(mean) == pytest.approx(np.mean(list(map(float, domains))), abs=0.1)
        rows = block.seeds[0].values()
        assert len({last.text for last in rows}) == len(rows) or block.budget == "1"  # source: all is of the first
        for last in rows:
            made = {"none", *qsd.ENCODERS}
            for run in [*last.before, last]:
                cfg = run.cfg
                assert command_of.setdefault(cfg.out, run.text) == run.text
                assert cfg.out.startswith("runs/x/") and cfg.root == "/data" and (cfg.seed == 3 or world == "paper")
                assert {cfg.student if " distill.py " in run.text else cfg.encoder, cfg.teacher} <= made
                made.add(str(run.result))
            assert " segment.py " in last.text and (cfg.decoder == "boxes") == ("(AP)" in block.title)


def test_budgets_are_steps_of_each_stage_or_shares_of_40_percent_and_a_worlds_own_is_that_of_other_tables():
    main, = blocks_of("main", "toy")
    for block in blocks_of("steps", "toy"):
        rows = block.seeds[0]
        assert [run.cfg.budget for run in rows["GKD"].before] == 2 * [block.budget]
        own = block.budget == "1000"
        assert (rows["GKD"] == main.seeds[0]["GKD"]) == ("GKD, scaled logits" in rows) == own
    for table, whole, stage, rest in (("clock", "40s", "16s", "8s"), ("flops", "5e12flop", "2e12flop", "1e12flop")):
        rows, = [block.seeds[0] for block in blocks_of(table, "toy") if block.budget == whole]
        assert [run.cfg.budget for run in [*rows["GKD"].before, rows["GKD"]]] == [stage, stage, rest]
        assert rows["one-stage Af-DCD"].cfg.budget == rows["no KD"].cfg.budget == rows["logit KD"].cfg.budget == whole


def test_a_table_at_the_papers_scale_says_what_it_needs_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    evaluation.main("--table 1 --setting potsdam-rgb --root /nowhere".split())
    out = capsys.readouterr().out
    assert "\ntorchrun --standalone --nproc_per_node=8 distill.py --data imagenet --loss qsd --teacher dinov2_v" in out
    assert "\npython segment.py --data potsdam-rgb" in out and "# needs /nowhere/potsdam and a GPU" in out
    assert "cityscapes" not in out and not list(tmp_path.iterdir())
    assert printed_table(out)[10] == ["GKD", "- [74.5]", "- [55.6]", "- [65.1]"]


STAND_IN = """import os, signal, sys, time
name = os.path.basename(sys.argv[-1])
def tell(what):
    print(what, name, os.environ["OMP_NUM_THREADS"], file=open("TOLD", "a"))
signal.signal(signal.SIGTERM, lambda *received: sys.exit(tell("ended")))
tell("began")
while name in ("bad", "stop") and "long" not in open("TOLD").read():
    time.sleep(0.02)
if name == "bad":
    sys.exit("first line\\nthe reason")
if name == "stop":
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(20 if name == "long" else 0.5)
tell("finished")"""


def test_runs_wait_for_those_before_them_and_all_end_with_a_failed_one_or_a_signal(tmp_path, monkeypatch):
    told = tmp_path / "told"
    (tmp_path / "segment.py").write_text(STAND_IN.replace("TOLD", str(told)))
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "eval.py"))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    def run(name, **needs):
        return evaluation.run_of("segment.py", data="toy", encoder="toy_small", **needs, out=tmp_path / name)
    evaluation.work_through([run("2", teacher=run("1")), run("1"), run("3"), run("4")], jobs=2)
    lines = told.read_text().splitlines()
    assert sorted(lines) == [f"{what} {name} 3" for what, name in itertools.product(("began", "finished"), "1234")]
    assert lines.index("finished 1 3") < lines.index("began 2 3")
    assert max(itertools.accumulate(1 if "began" in line else -1 for line in lines)) == 2
    for name, error in {"bad": qsd.UserError, "stop": KeyboardInterrupt}.items():
        told.write_text("")
        with pytest.raises(error, match="the reason .see .*bad.txt" if name == "bad" else None):
            evaluation.work_through([run("long"), run(name), run("never")], jobs=2)
        assert "ended long 3" in told.read_text() and not (tmp_path / "never").exists()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: words)
    words = evaluation.begin(evaluation.run_of("distill.py", 2, data="toy", out=tmp_path / "5"), 1)
    assert words[1:6] == [*"-m torch.distributed.run --standalone --nproc_per_node=2".split(), f"{tmp_path}/distill.py"]


def test_a_table_prints_means_deviations_gains_and_the_papers_numbers_and_draws_its_budgets(monkeypatch, capsys):
    value = {"qsd-250": 10, "qsd-500": 14, "qsd": 30, "mse-250": 5}
    monkeypatch.setattr(evaluation, "chart", chart := Mock())

    def found(run, block, *more):
        name = run.result.parent.name
        if name not in value or (name, run.cfg.seed) == ("qsd", 1):
            return None
        miou = value[name] + run.cfg.seed * (4 if "qsd" in name else 2)
        mious = dict.fromkeys([*block.source, *block.unseen, "unseen mean"], miou)
        return mious | {"seconds": 60 + 20 * run.cfg.seed, "TFLOP": 1.5, "diagonal": 0.5}
    monkeypatch.setattr(evaluation, "measured", found)
    evaluation.main("--table steps --data toy --seeds 2 --run no".split())
    lines, *_ = chart.call_args.args
    assert lines == {"GKD": [(0, 12, pytest.approx(8 ** 0.5)), (1, 16, pytest.approx(8 ** 0.5))],
                     "two-stage MSE": [(0, 6, pytest.approx(2 ** 0.5))]}
    header, mse, _, _, gain, *_ = printed_table(capsys.readouterr().out)
    assert header == ["", *LOOK, "unseen mean", "seconds", "TFLOP", "diagonal"]
    assert mse == ["two-stage MSE", *["6.0 ± 1.4"] * 6, "70", "1.5", "0.500"]
    assert gain == ["GKD over two-stage MSE", "+6.0 ± 12.7", "+1.0"]
    assert evaluation.paper_gain("10", "no KD", "GKD") == 23.9  # its own, and not table 1's
    evaluation.main("--table 4 --data toy --seeds 2 --run no".split())
    assert printed_table(capsys.readouterr().out)[6] == ["GKD", "30.0", *["30.0"] * 5, "60", "1.5", "54.1"]
    monkeypatch.setattr(evaluation, "measured", lambda *args: {"unseen mean": 1})
    monkeypatch.setattr(evaluation, "compare", compare := Mock())
    evaluation.main("--demo --run no".split())
    predicted, featured, cfg, *_ = compare.call_args.args
    assert [*predicted] == ["no KD", "two-stage MSE", "GKD", "teacher"] == [*featured][1:] + [*featured][:1]
    assert cfg.data == "toy-night+toy-fog+toy-snow+toy-rain" and predicted["GKD"] == Path("runs/toy/0/qsd")


def test_a_measurement_is_kept_by_protocol_and_domain_until_its_segmenter_is_trained_again(few, tmp_path, monkeypatch):
    run = evaluation.run_of("segment.py", data="toy", encoder="toy_small", out=tmp_path / "a")
    monkeypatch.setattr(evaluation, "measure", measure := Mock(side_effect=evaluation.measure))

    def measured(unseen="toy-night", **protocol):
        block = evaluation.Block("table", [{"row": run}], ["toy"], [unseen], {}, "", tmp_path)
        return evaluation.measured(run, block, evaluation.Config(data="toy", workers=0, **protocol), CPU)
    assert measured() is None
    save_segmenter(run.result, only=3)
    first = measured()
    night = np.nanmean(slow_ious([(np.full((64, 64), 3), label) for _, label in scenes("toy-night")], 8))
    assert list(first.values())[1:] == pytest.approx([night, night, 70, 3])
    for change in ({}, dict(unseen="toy-rain"), dict(window=32), dict(stride=0.5), dict(precision="bf16")):
        measured(**change)
    looked = [call.args[3].data for call in measure.call_args_list]
    assert looked == ["toy+toy-night", "toy-rain"] + 3 * ["toy+toy-night"]
    save_segmenter(run.result, only=0)
    os.utime(run.result, (time.time() + 1, time.time() + 1))
    assert measured()["toy"] != first["toy"]


# --- Evaluation: figures ----------------------------------------------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """The columns that a figure gives to `sheet`, or the lines that it gives to `chart`."""
    given = {}
    for name in ("chart", "sheet"):
        monkeypatch.setattr(evaluation, name, lambda lines, *more, **options: given.update(lines))
    return given


def test_figure_3b_draws_each_runs_loss_of_one_stage_the_distillation_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = {"a": [dict(step=5, loss=1), dict(step=7, loss=None), dict(step=9, loss=1)],  # None: it was NaN
            "b": [dict(step=5, loss=60, ce=50, kd=10), dict(step=9, loss=70, ce=60, kd=10)],
            "c": [dict(step=5, loss=19), dict(step=9, loss=19)]}
    for name, lines in logs.items():
        distill.save(Path(name, "log.jsonl"), "\n".join(map(json.dumps, [{"config": {}}, *lines])))
    evaluation.main("--figure 3b --models a,b,c --out new/a.png".split())
    picture = np.asarray(Image.open("new/a.png")).astype(int)[:, :600]
    heights = []
    for color in evaluation.LINE_COLORS[:3]:
        y, _ = np.nonzero(np.abs(picture - ImageColor.getrgb(color)).sum(2) < 40)
        heights.append(np.median(y))
    low, middle, high = heights
    assert low - middle == pytest.approx(middle - high, abs=20) and low - high > 200  # 1, 10, 19


def test_figure_8_shows_each_segmenter_in_the_column_of_its_name(few, tmp_path):
    save_segmenter(tmp_path / "a/segmenter.pt", only=1)
    save_segmenter(tmp_path / "b.pt", only=3)
    evaluation.main(f"--figure 8 --models a={tmp_path}/a,b={tmp_path}/b.pt --data toy-fog --out {tmp_path}".split())
    picture = np.asarray(Image.open(tmp_path / "figure-8.png"))[28:164, -4 * 140:]  # the first row
    _, label = scenes("toy-fog")[0]
    colors = data.palette(data.TOY_COLORS)
    enlarged = Image.fromarray(colors[label]).resize((136, 136), Image.Resampling.NEAREST)
    assert np.array_equal(picture[:, 140:276], enlarged)
    assert (picture[:, 280:416] == colors[1]).all() and (picture[:, 420:556] == colors[3]).all()


def tokens_of(path, *images):
    """Patch tokens (images, 64, C) of the encoder in a checkpoint."""
    vit = qsd.load_vit(path).eval()
    x = data.normalize(torch.stack(images), vit.mean, vit.std)
    return vit(x)[1].detach()


def test_figure_5_shows_principal_components_of_each_encoder_turned_onto_those_of_the_first(few, tmp_path, drawn):
    first = save_segmenter(tmp_path / "a.pt")
    evaluation.main(f"--figure 5 --models a={first},b={save_segmenter(tmp_path / 'b.pt')} --data toy-night".split())
    _, a, b = [torch.from_numpy(np.stack(pictures)).flatten(0, 2) for pictures in drawn.values()]
    x = tokens_of(first, *[image for image, _ in scenes("toy-night")[::2]]).flatten(0, 1)
    axes = torch.linalg.eigh(x.T.cov()).eigenvectors.flip(1)[:, :3]  # by another road
    assert torch.corrcoef(torch.cat([x @ axes, a], 1).T)[:3, 3:].diag().abs().min() > 0.97
    cross = (b - b.float().mean(0)).T @ (a - a.float().mean(0))  # no other rotation is better: it is symmetric
    assert (cross - cross.T).abs().max() < 0.1 * cross.max() and torch.linalg.eigvalsh(cross).min() > 0


def test_figure_7a_shows_distances_after_the_map_that_fits_other_images_best(teacher, student, few, drawn):
    evaluation.main(f"--figure 7a --models t={teacher},twin={teacher},far={student} --data toy-night+toy-fog".split())
    images = [image for image, _ in scenes("toy-night") + scenes("toy-fog")]
    s = F.pad(tokens_of(student, *images), (0, 1), value=1).double()
    t = tokens_of(teacher, *images).double()
    phi = torch.linalg.pinv(s[::2].flatten(0, 1), rtol=1e-9) @ t[::2].flatten(0, 1)
    distances = (s[1::2] @ phi - t[1::2]).norm(dim=2)
    assert list(drawn) == ["twin: median 0.00", f"far: median {distances.median():.2f}"]


def test_figure_7b_shows_the_attention_of_a_students_own_saved_head(teacher, student, few, drawn, capsys):
    evaluation.main(f"--figure 7b --models t={teacher},s={student} --data toy-fog".split())
    image, _ = scenes("toy-fog")[0]
    head = torch.load(student, weights_only=True)["objective"]
    x = F.layer_norm(tokens_of(student, image)[0], (64,), head["feat.varphi.0.weight"], head["feat.varphi.0.bias"])
    queries = F.linear(x, head["feat.varphi.1.weight"], head["feat.varphi.1.bias"])
    W = (queries @ tokens_of(teacher, image)[0].T).softmax(1)  # as in Eq. 7
    assert f"s: {W.diagonal().mean():.1%} of the weight is a patch's own" in capsys.readouterr().out
    picture = drawn["lower left"][0]
    weights = W[6 * 8 + 2]
    shades = 255 * (1 - weights / weights.max()).view(8, 8).numpy()
    assert np.abs(picture[25::50, 25::50, 0] - shades).max() <= 2  # the middles of patches
    assert (picture[300, 101:150] == (0, 90, 255)).all()  # the patch's frame


def test_images_are_segmented_upright_at_any_size(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8).repeat(15, 0).repeat(12, 1)  # 135 x 144
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(color).save(tmp_path / "turned.png", exif=exif)
    path = save_segmenter(tmp_path / "segmenter.pt")
    evaluation.main(f"--checkpoint {path} --images {tmp_path} --out {tmp_path}/new/out --stride 0.3".split())
    model, saved = segment.load_segmenter(path)
    upright = np.rot90(color, -1).copy()
    x = data.normalize(torch.from_numpy(upright).permute(2, 0, 1)[None], model.encoder.mean, model.encoder.std)
    expected = evaluation.slide(model, x, 64, 0.3)[0].argmax(0).numpy()
    colors = np.array(saved["colors"])[expected]
    picture = Image.open(tmp_path / "new/out/turned_classes.png")
    assert np.array_equal(picture, expected) and np.array_equal(picture.convert("RGB"), colors)
    overlay = Image.open(tmp_path / "new/out/turned_overlay.png").crop((0, 0, 135, 144))
    assert np.abs(np.asarray(overlay) - (upright.astype(int) + colors) / 2).max() < 1.5


def test_an_exported_program_gives_the_scores_of_eager_mode_at_any_batch(tmp_path):
    path = save_segmenter(tmp_path / "segmenter.pt", decoder="mask")
    about = {"about.json": ""}
    evaluation.main(f"--checkpoint {path} --export {tmp_path}/new/model.pt2".split())
    program = torch.export.load(tmp_path / "new/model.pt2", extra_files=about).module()
    model, _ = segment.load_segmenter(path)
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program(x), model.decoder.scores(model(x), (64, 64)), atol=1e-5, rtol=0)
    assert json.loads(about["about.json"])["mean"] == list(model.encoder.mean)


# --- Boxes: files, toy world, transforms, corruptions -----------------------------------------------------------------

DOG = "<object><name>dog</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>7</xmax><ymax>6</ymax></bndbox></object>"
LARGE_DOG = DOG.replace(">3<", ">1<").replace(">2<", ">1<").replace(">7<", ">8<")
PERSON = """<object><name>person</name><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax>
    <ymax>2</ymax></bndbox></part><difficult>1</difficult><bndbox><xmax>8</xmax><xmin>1</xmin><ymin>1.5</ymin>
    <ymax>6</ymax></bndbox></object>"""  # the order of tags differs between the releases


def save_voc(root, objects=DOG):
    """VOC as its archives unpack, an image of 8 x 6 pixels with these objects in each list."""
    for grey, line in zip((0, 20, 40), ("VOC2007 05 trainval", "VOC2007 01 test", "VOC2012 2008_02 trainval")):
        year, name, part = line.split()
        save_files(root, f"VOCdevkit/{year}/JPEGImages/{name}.jpg={grey}")
        for path, text in ((f"Annotations/{name}.xml", f"<annotation>{objects}</annotation>"),
                           (f"ImageSets/Main/{part}.txt", f"{name}\n")):
            file = root / "VOCdevkit" / year / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def test_voc_is_read_as_downloaded_its_boxes_without_parts_and_its_test_images_in_every_corruption(tmp_path):
    save_voc(tmp_path, DOG + PERSON)
    for root, split, greys in ((tmp_path, "train", (0, 40)), (tmp_path / "VOCdevkit", "val", (20,))):
        for (image, label, _), grey in zip(data.scenes("voc", root, split), greys, strict=True):
            assert image.shape == (3, 6, 8) and abs(image[0, 0, 0].item() - grey) < 3
            assert data.objects_of(label).tolist() == [[2, 1, 7, 6, 11, 0], [0, 0.5, 8, 6, 14, 1]]
    samples = data.scenes("voc-corruptions", tmp_path, "val").samples
    assert [sample.corruption for sample in samples] == [*itertools.product(data.CORRUPTIONS, range(1, 6))]
    brighter = data.corrupt(samples[0]._replace(corruption=None).read_image(), "brightness", 4)
    assert torch.equal(samples[33].read_image(), brighter)
    assert data.preflight("voc", tmp_path, tmp_path / "out.png") == 0
    for old, new in (("dog", "dgo"), (">7<", ">2<"), ("</object>", ""), ("<ymax>6</ymax>", "")):
        save_voc(tmp_path, DOG.replace(old, new))
        with pytest.raises(data.UserError, match="01.xml: cannot be read as a label .*(not in|no area|mism|to float)"):
            data.scenes("voc", tmp_path, "val")[0]


def test_images_and_boxes_are_scaled_cropped_and_flipped_together_and_cut_boxes_dropped():
    image = torch.zeros(3, 20, 60, dtype=torch.uint8)
    image[1] = torch.linspace(50, 200, 60)  # grows to the right, unless flipped
    image[0, 5:13, 24:36] = 255
    start = torch.from_numpy(data.as_label([(24, 5, 36, 13, 3, 1)]))
    counts = Counter()
    for _ in range(60):
        found, label = data.detect_transform(image, start, 40)
        y, x = np.nonzero(found[0].numpy() > 127)
        objects = data.objects_of(label)
        share = len(x) / (16 * 24)
        assert len(objects) == (share > 0.3) or abs(share - 0.3) < 0.05
        if len(objects):
            assert objects[0].numpy() == pytest.approx([x.min(), y.min(), x.max() + 1, y.max() + 1, 3, 1], abs=1.1)
        counts.update(kept=len(objects), flipped=int(found[1, 0, 0] > found[1, 0, -1]))
    assert found.shape == (3, 40, 40) and 15 < counts["flipped"] < 45 and 30 < counts["kept"] < 60


@pytest.mark.parametrize("name", data.CORRUPTIONS)
def test_corruptions_grow_with_severity_and_follow_from_the_image_alone(name):
    errors = torch.zeros(5)
    for number in range(60 if name == "fog" else 8):  # whose clouds are as random as its severities
        image = torch.from_numpy(data.toy_scene("game", number)[0]).permute(2, 0, 1)[:, :, :60 + number % 5]
        for severity in range(1, 6):
            found = data.corrupt(image, name, severity)
            errors[severity - 1] += (found.float() - image).square().mean()
    assert errors[0] > 0 and (errors.diff() > 0).all()
    torch.rand(1)  # another state of the generator that all share
    assert found.shape == image.shape and torch.equal(found, data.corrupt(image, name, 5))


def test_zoom_blur_is_the_mean_of_an_image_and_its_zooms():
    ramp = torch.arange(255, dtype=torch.uint8).expand(3, 40, -1)  # 127 in the middle, which stays where it is
    slope = np.mean([1, *1 / np.arange(1, 1.21, 0.02)])
    found = data.corrupt(ramp, "zoom_blur", 3)[0, 20, 30:225].tolist()
    assert found == pytest.approx((127 + slope * (np.arange(30, 225) - 127)).tolist(), abs=0.7)


def test_impulse_noise_blackens_and_whitens_equally_many_pixels():
    noisy = data.corrupt(torch.full((3, 200, 200), 128, dtype=torch.uint8), "impulse_noise", 3)
    assert (noisy.flatten().bincount()[[0, 255]] / noisy.numel()).tolist() == pytest.approx([0.045, 0.045], rel=0.06)


# --- Boxes: Faster R-CNN as a decoder, and AP -------------------------------------------------------------------------

def test_losses_and_boxes_of_the_box_decoder_are_those_of_torchvisions_faster_rcnn_as_published():
    decoder = segment.BoxDecoder(32, 3, width=32, ffn=16)
    for p in decoder.judge.box_predictor.parameters():
        p.data.normal_()
    maps = decoder([x.float() for x in features((4, 8))])
    backbone = Mock(out_channels=32, return_value=dict(zip(["0", "1", "2", "3", "pool"], maps)))
    anchors = segment.AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    official = segment.FasterRCNN(backbone, min_size=64, max_size=128, rpn_anchor_generator=anchors, num_classes=4)
    official.transform.eval()  # else it draws an image's size, of which there is one
    official.rpn.load_state_dict(decoder.propose.state_dict())
    official.roi_heads.box_head = decoder.judge.box_head
    official.roi_heads.box_predictor = decoder.judge.box_predictor
    objects = [(3, 5, 60, 40, 2, 0), (50, 2, 120, 60, 0, 0), (0, 0, 9, 9, 1, 1)]  # the last one is difficult
    label = torch.from_numpy(np.stack([data.as_label(objects), data.as_label([])]))
    targets = [dict(boxes=label[0, :2, :4], labels=torch.tensor([3, 1])),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))]
    images = torch.zeros(2, 3, 64, 128)
    torch.manual_seed(7)
    expected = official(images, targets)
    expected["loss"] = sum(expected.values())
    torch.testing.assert_close(decoder.loss(maps, label, torch.Generator().manual_seed(7), None), expected)
    official.eval()
    for one, other in zip(decoder.scores(maps, (64, 128)), official(images), strict=True):
        torch.testing.assert_close(one, torch.column_stack([other["boxes"], other["labels"] - 1, other["scores"]]))
        assert len(one) > 20 and len(one[:, 4].unique()) > 1
    small, = decoder.scores([x[:1] for x in maps], (50, 100))
    assert small[:, [0, 2]].max() == 100 and small[:, [1, 3]].max() == 50  # what was padded holds no objects


def slow_ap(images, k):
    """VOC's own loop for class k over images of (found rows, object rows)."""
    detections = []
    count = 0
    for i, (found, objects) in enumerate(images):
        detections += [(row[5], i, row[:4]) for row in found if row[4] == k]
        count += sum(row[4] == k and not row[5] for row in objects)
    seen = set()
    curve = []
    for _, i, (left, top, right, bottom) in sorted(detections, reverse=True):
        ious = [(0, None)]
        for j, (l, t, r, b, kind, difficult) in enumerate(images[i][1]):
            common = max(0, min(right, r) - max(left, l)) * max(0, min(bottom, b) - max(top, t))
            area = (right - left) * (bottom - top) + (r - l) * (b - t) - common
            ious.append((common / area * (kind == k), (i, j, difficult)))
        iou, which = max(ious, key=lambda pair: pair[0])
        if iou < 0.5:
            curve.append(False)
        elif not which[2]:
            curve.append(which not in seen)
            seen.add(which)
    precision = np.cumsum(curve) / np.arange(1, len(curve) + 1)
    return sum(precision[i:].max() for i, hit in enumerate(curve) if hit) / count if count else math.nan


def test_ap_of_boxes_at_random_is_that_of_vocs_own_loop():
    rng = np.random.default_rng(0)
    images = []
    for _ in range(20):
        corners = rng.uniform(0, 6, (16, 2))
        boxes = np.column_stack([corners, corners + rng.uniform(3, 6, (16, 2)), rng.integers(0, 3, 16)])
        found = np.column_stack([boxes[:12], np.sort(rng.random(12))[::-1]])
        images.append((found, np.column_stack([boxes[12:], rng.integers(0, 2, 4)])))  # half of them difficult
    verdicts = [evaluation.matched(torch.from_numpy(found), torch.from_numpy(objects)) for found, objects in images]
    classes, scores, hits = torch.cat(verdicts).numpy().T
    kinds, difficult = np.concatenate([objects for _, objects in images])[:, 4:].T
    for k in range(4):  # there is none of the last class
        count = sum((kinds == k) & (difficult == 0))
        ap = evaluation.average_precision(scores[classes == k], hits[classes == k], count)
        assert ap == pytest.approx(slow_ap(images, k), nan_ok=True) and ap != 0


# --- Boxes: runs and what is made of them -----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def detector(teacher, tmp_path_factory):
    """A segmenter.pt of two training steps on VOC, which lies in the folder above its own."""
    root = tmp_path_factory.mktemp("voc")
    save_voc(root, LARGE_DOG + PERSON)
    flags = f"--data voc --root {root} --encoder toy_small --width 32 --size 64 --patch 8 {QUICK} --ffn 16 --rois 8"
    flags += f" --proposals 100 --freeze no --kd 1 --loss cwd --teacher {teacher} --decoder boxes --out {root}/a"
    train("segment", flags.split())
    return root / "a/segmenter.pt"


def test_a_detector_of_voc_is_evaluated_on_all_corruptions(detector, monkeypatch, capsys):
    root = detector.parent.parent
    monkeypatch.setattr(data, "CORRUPTIONS", {"contrast": data.CORRUPTIONS["contrast"]})
    everything = partial(segment.FasterRCNN, box_score_thresh=0, box_detections_per_img=1000)  # after two steps only
    monkeypatch.setattr(segment, "FasterRCNN", everything)
    evaluation.main(f"--checkpoint {detector} --data voc+voc-corruptions --root {root}".split())
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["miou"]
    model, _ = segment.load_segmenter(detector)
    expected = []
    for corruption in (None, *itertools.product(["contrast"], range(1, 6))):
        sample = data.scenes("voc", root, "val").samples[0]._replace(corruption=corruption)
        x = data.normalize(sample.read_image()[None], model.encoder.mean, model.encoder.std)  # 6 x 8 pixels
        x = TF.resize(x, [64, 85], antialias=True)
        boxes, = model.decoder.scores(model(F.pad(x, (0, 11))), (64, 85))
        boxes[:, :4] *= torch.tensor([8 / 85, 6 / 64, 8 / 85, 6 / 64])
        expected.append(slow_ap([(boxes.tolist(), data.objects_of(sample.read_label()).tolist())], 11))
    assert found["voc"] == pytest.approx(100 * expected[0]) and max(expected) > 0  # the person is difficult
    assert found["voc-corruptions"] == pytest.approx(100 * np.mean(expected[1:]))
    dataset = data.scenes("voc-corruptions", root, "val")
    shares = in_two_processes(partial(evaluation.evaluate_boxes, model, dataset, 64, ONE_BY_ONE, CPU), monkeypatch)
    assert 100 * sum(shares)[11] == pytest.approx(found["voc-corruptions"]) and shares[0][11] < sum(shares)[11]


def test_the_boxes_that_a_detector_finds_are_written_and_drawn(detector, tmp_path, monkeypatch):
    found = torch.tensor([[16, 8, 48, 32, 6, 0.875], [2, 2, 9, 9, 0, 0.4]])
    monkeypatch.setattr(evaluation, "find_objects", lambda model, x, side: [found * len(x) * (side == 64)])
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    evaluation.main(f"--checkpoint {detector} --images {tmp_path}/a.png --out {tmp_path}/out".split())
    assert json.loads((tmp_path / "out/a_boxes.json").read_text()) == [[16, 8, 48, 32, 6, 0.875]]
    assert Image.open(tmp_path / "out/a_boxes.png").getpixel((200, 300)) == tuple(data.DATASETS["voc"].colors[6])


BAD_EVALUATIONS = {
    "eval.py --data toy-fog": "give --checkpoint or --figure",
    "eval.py --table 10 --data camvid": "this table is made with --data toy or paper",
    "eval.py --table 5 --setting voc": "--setting voc: this table has gtav",
    "eval.py --table main --data toy --run no --out {tmp}": "holds a run with other constants",
    "eval.py --checkpoint {teacher} --data toy-fog --stride 341": "--stride 341.0: a share of the window",
    "eval.py --figure 8 --data toy --models a={teacher},b={detector}": "; b was trained on 20 others",
    "eval.py --figure 5 --data toy-fog --models s=toy_small,l={tmp}/large.pt": "patches of different sides",
    "eval.py --figure 3b --models a={teacher},b={tmp}": "holds no log.jsonl with losses",
    "eval.py --figure 7a --data toy-fog --models a={teacher}": "want the teacher and at least one student",
    "eval.py --figure 7b --data toy-fog --models a={student},b={teacher}": "was not distilled by --loss qsd",
    "eval.py --checkpoint {teacher} --images {tmp}/nowhere": "nowhere: no images directly in it",
    "eval.py --checkpoint {teacher} --images {tmp}/twice --out {tmp}/new": "must differ in more than their ending",
    "eval.py --checkpoint {detector} --export {tmp}/model.pt2": "scores of pixels, no boxes",
    "segment.py --data toy-boxes --decoder linear": "--data toy-boxes has other labels than",
    "segment.py --data toy-boxes --kd_logits 1 --freeze no --teacher {teacher}": "was trained on other classes",
    "segment.py --data toy-boxes --patch 14 --size 56": "wants a --patch of 4, 8, 16 or 32",
    "segment.py --data toy-boxes --width 40": "and a multiple of 32 as --width",
}


@pytest.mark.parametrize("command", BAD_EVALUATIONS)
def test_a_mistake_with_models_images_or_boxes_is_told_in_one_line(command, teacher, student, detector, tmp_path):
    for name in ("twice/a.png", "twice/a.jpg", "toy/0/no-kd/segmenter.pt", "toy/0/no-kd/log.jsonl"):
        distill.save(tmp_path / name, '{"config": {"budget": "7"}}')
    torch.save(qsd.student_checkpoint(qsd.load_vit("toy_small", patch_size=16)), tmp_path / "large.pt")
    script, *argv = command.format(tmp=tmp_path, teacher=teacher, student=student, detector=detector).split()
    with pytest.raises(qsd.UserError) as error:
        {"segment.py": segment, "eval.py": evaluation}[script].main(["--out", str(tmp_path / "a"), *argv])
    assert BAD_EVALUATIONS[command] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists() and not (tmp_path / "model.pt2").exists()


if __name__ == "__main__":  # as torchrun starts it
    distill.launch()
    train_together(*map(Path, sys.argv[1:]))
    dist.destroy_process_group()
