"""What the code promises, on a CPU without network; what needs timm or the real images beside the repository skips without."""
import argparse
import colorsys
import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import data
import distill
import eval as evaluation
import qsd
import segment
from segment import (DeformableAttention, Linear, MaskDecoder, SemFPN, attended, feature_layers, hungarian, pyramid, resize,
                     sample)

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Fixed random numbers for each test, no waiting for the disk, and Ctrl-C ends the tests even after a run caught it."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- The method: equations 7 to 12 against slow references ------------------------------------------------------------

def vit(width, depth=3, grid=4, name="mini"):
    return qsd.ViT(name, embed_dim=width, depth=depth, num_heads=2, patch_size=4, img_size=4 * grid)


def setting(loss="qsd", batch=4, grid=4, **constants):
    """A student, an objective and all that the objective is given: (student, objective, x, s, t, noise)."""
    student, teacher = vit(16, grid=grid), vit(32, depth=2, grid=grid).eval().requires_grad_(False)
    objective = qsd.LOSSES[loss](student, teacher, qsd.LossConfig(loss=loss, **{"dcd_pool": 1} | constants))
    for p in [*student.parameters(), *objective.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    x, noise = torch.randn(batch, 3, 4 * grid, 4 * grid), torch.rand(batch, grid ** 2)
    with torch.no_grad():
        t = teacher.run(x, layers=objective.layers_t)
    s = student.run(x, layers=objective.layers_s) if objective.plain else None
    return student, objective, x, s, t, noise


def slow_project(project, token):
    """Linear(LayerNorm(token)) for one token (C,)."""
    norm, linear = project
    token = (token - token.mean()) / (token.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
    return linear.weight @ token + linear.bias


def slow_qsd(head, v_s, v_t):
    """Equations 7 and 8 token by token: token i reads token j's value with weight exp(W_ij) over the sum of row i."""
    out = []
    for b, i in np.ndindex(v_s.shape[:2]):
        W = []
        for j in range(v_t.shape[1]):
            query = slow_project(head.varphi, v_s[b, i]) if head.attention == "learned" else v_t[b, i]
            dot, C = sum(query * v_t[b, j]), v_t.shape[2]
            W.append({"one": dot, "sqrt": dot / C ** 0.5,
                      "cosine": dot / (query.norm() * v_t[b, j].norm()) / head.temperature}[head.scale])
        weights = [w.exp() for w in W]
        out.append(sum(w / sum(weights) * slow_project(head.phi, v_s[b, j]) for j, w in enumerate(weights)))
    return torch.stack(out).view_as(v_t)


@pytest.mark.parametrize("attention", ["learned", "teacher"])
@pytest.mark.parametrize("scale", ["one", "sqrt", "cosine"])
def test_qsd_equals_a_slow_loop_in_value_and_gradient(scale, attention):
    head = qsd.QSD(6, 5, attention, scale)
    v_s, v_t = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 5)
    direction, inputs = torch.randn(2, 4, 5), [v_s, *head.parameters()]
    fast, slow = head(v_s, v_t), slow_qsd(head, v_s, v_t)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad((out * direction).sum(), inputs) for out in (fast, slow))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_objective_equals_the_plain_form_that_masks_in_a_second_pass_of_all_images():
    student, objective, x, s, t, noise = setting()
    losses = objective(student, x, s, t, noise)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    for i in (0, 2):
        mask[i, noise[i].argsort()[:8]] = True
    (v_t_cls, v_t, _), (v_s_cls, v_s), v_s_mask = t, student(x), student(x, mask)[1]
    cls, feat = slow_qsd(objective.cls, v_s_cls[:, None], v_t_cls[:, None]), slow_qsd(objective.feat, v_s, v_t)
    L_cls = (cls - v_t_cls[:, None]).square().mean()
    L_feat = torch.cat([cls - v_t_cls[:, None], feat - v_t], 1).square().mean()
    L_mask = (slow_qsd(objective.mask, v_s_mask, v_t) - v_t).square().mean()
    for name, want in {"L_cls": L_cls, "L_feat": L_feat, "L_mask": L_mask, "loss": L_feat + L_mask + L_cls}.items():
        torch.testing.assert_close(losses[name], want, rtol=1e-5, atol=0)
    weights = [*student.parameters(), *objective.parameters()]
    fast, slow = (torch.autograd.grad(loss, weights) for loss in (losses["loss"], L_feat + L_mask + L_cls))
    largest = max(g.abs().max().item() for g in slow)
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


def test_one_token_gives_the_query_a_gradient_of_exactly_zero():
    head = qsd.QSD(6, 5)
    (head(torch.randn(3, 1, 6), torch.randn(3, 1, 5)) * torch.randn(3, 1, 5)).sum().backward()
    assert all((p.grad == 0).all() for p in head.varphi.parameters())
    assert all((p.grad != 0).any() for p in head.phi.parameters())


def test_without_queries_every_output_is_the_mean_value_token():
    head, v_s, v_t = qsd.QSD(6, 5), torch.randn(2, 7, 6), torch.randn(2, 7, 5)
    torch.nn.init.zeros_(head.varphi[1].weight)
    torch.nn.init.zeros_(head.varphi[1].bias)
    torch.testing.assert_close(head(v_s, v_t), head.phi(v_s).mean(1, keepdim=True).expand(2, 7, 5))


def test_a_joint_permutation_of_the_tokens_changes_no_loss_but_one_of_the_students_alone_does():
    head, v_s, v_t, order = qsd.QSD(6, 5), torch.randn(2, 7, 6), torch.randn(2, 7, 5), torch.randperm(7)
    loss = F.mse_loss(head(v_s, v_t), v_t)
    torch.testing.assert_close(F.mse_loss(head(v_s[:, order], v_t[:, order]), v_t[:, order]), loss)
    assert (F.mse_loss(head(v_s[:, order], v_t), v_t) - loss).abs() > 1e-4


def test_equal_tokens_under_identity_projections_are_told_apart_ever_better_as_the_logits_grow():
    v, errors = F.layer_norm(torch.randn(2, 9, 16), (16,)), []
    for temperature in (1.0, 0.2, 0.02):
        head = qsd.QSD(16, 16, scale="cosine", temperature=temperature)
        for project in (head.phi, head.varphi):
            project[1].weight.data, project[1].bias.data = torch.eye(16), torch.zeros(16)
        errors.append(F.mse_loss(head(v, v), v).item())
    assert errors[0] > 0.5 and errors == sorted(errors, reverse=True) and errors[2] < 1e-6


def test_identity_attention_is_the_pointwise_mse():
    student, objective, x, s, t, noise = setting(attention="identity", feat_with_cls=False, beta=0, gamma=0)
    phi = torch.stack([slow_project(objective.feat.phi, token) for token in s[1].flatten(0, 1)]).view_as(t[1])
    torch.testing.assert_close(objective(student, x, s, t, noise)["loss"], (phi - t[1]).square().mean())


def test_queries_and_keys_meet_in_fp32_under_autocast():
    head, v_s, v_t = qsd.QSD(64, 64), torch.randn(1, 9, 64), 5 * torch.randn(1, 9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(v_s, v_t)
        query, value = head.varphi(v_s), head.phi(v_s)
    assert low.dtype == torch.float32 and query.dtype == torch.bfloat16
    torch.testing.assert_close(low, (query.float() @ v_t.mT).softmax(-1) @ value.float())


@pytest.mark.parametrize("term, constants, heads", [
    ("L_feat", dict(alpha=0), {"mask", "cls"}), ("L_mask", dict(beta=0), {"feat", "cls"}), ("L_cls", dict(gamma=0), {"feat", "mask", "cls"}),
    ("L_cls", dict(gamma=0, feat_with_cls=False), {"feat", "mask"})])
def test_a_weight_of_zero_removes_the_term_its_head_and_its_work(term, constants, heads):
    def work(**constants):
        student, objective, x, s, t, noise = setting(**constants)
        return data.count_flops(lambda: objective(student, x, s, t, noise)["loss"].backward())
    student, objective, x, s, t, noise = setting(**constants)
    assert term not in objective(student, x, s, t, noise)
    assert {key.split(".")[0] for key in objective.state_dict()} == heads
    if heads != {"feat", "mask", "cls"}:  # with CLS in the features its head stays in use
        assert work(**constants) < work()


def test_without_a_use_for_the_plain_pass_it_does_not_run():
    student, objective, x, s, t, noise = setting(alpha=0, gamma=0, mask_loss="masked_tokens")
    assert not objective.plain and s is None and objective(student, x, s, t, noise)["loss"].isfinite()
    assert setting(alpha=0, gamma=0)[1].plain  # "all" compares the images without mask, too


@pytest.mark.parametrize("grid, every", [(4, 2), (5, 2), (5, 1)])
def test_exactly_half_of_the_patches_are_hidden_in_every_second_image(grid, every):
    student, objective, x, s, t, noise = setting(grid=grid, mask_every=every)
    seen, forward = [], student.forward
    student.forward = lambda x, mask: (seen.append((x, mask)), forward(x, mask))[1]
    objective(student, x, s, t, noise)
    (images, mask), = seen
    assert torch.equal(images, x[::every]) and mask.sum(1).tolist() == [int(0.5 * grid ** 2)] * (4 // every)


@pytest.mark.parametrize("constants", [{}, dict(mask_every=1), dict(mask_loss="masked_samples"), dict(mask_loss="masked_tokens")])
def test_the_mask_loss_is_over_all_or_masked_samples_or_masked_tokens(constants):
    student, objective, x, s, t, noise = setting(**constants)
    every, over = constants.get("mask_every", 2), constants.get("mask_loss", "all")
    mask = torch.stack([noise[i].argsort().argsort() < 8 * (i % every == 0) for i in range(4)])
    error = (slow_qsd(objective.mask, student(x, mask)[1], t[1]) - t[1]).square()
    want = {"all": error, "masked_samples": error[::every], "masked_tokens": error[mask]}[over].mean()
    torch.testing.assert_close(objective(student, x, s, t, noise)["L_mask"], want)


def test_masks_follow_the_draw_number_and_the_seed_alone():
    draws = torch.tensor([7, 3, 12])
    noise = data.noise(draws, 16, seed=1)
    assert torch.equal(data.noise(draws[[2, 0]], 16, seed=1), noise[[2, 0]]) and noise.min() >= 0 and noise.max() < 1
    assert not torch.equal(data.noise(draws, 16, seed=2), noise) and not torch.equal(noise[0], noise[1])


def test_two_and_four_layers_are_distilled_at_equal_fractions_of_the_depth_with_a_head_each():
    assert qsd.matching_layers(12, 24, "last2") == ([10], [21])
    assert qsd.matching_layers(12, 24, "four") == ([3, 5, 7], [7, 11, 15])
    for layers, more in (("last", 0), ("last2", 1), ("four", 3)):
        student, objective, x, s, t, noise = setting(layers=layers, feat_with_cls=False)
        losses = objective(student, x, s, t, noise)
        want = F.mse_loss(objective.feat(s[1], t[1]), t[1])
        for head, o_s, o_t in zip(objective.inner, s[2], t[2], strict=True):
            o_t = F.layer_norm(o_t, (32,))
            want = want + F.mse_loss(head(o_s, o_t), o_t)
        assert len(objective.inner) == more
        torch.testing.assert_close(losses["L_feat"], want)


def test_targets_are_normalised_per_token_or_all_channels_to_one_variance_by_a_rotation():
    tokens = torch.randn(500, 24) @ torch.randn(24, 24) + 3
    t = tokens[:2], tokens.view(2, 250, 24), [tokens.view(2, 250, 24)]
    assert all(torch.equal(a, b) for a, b in zip(qsd.normalize_targets(t, "none")[:2], t))
    cls, patches, outs = qsd.normalize_targets(t, "layernorm")
    torch.testing.assert_close(patches, (t[1] - t[1].mean(-1, keepdim=True)) / t[1].std(-1, keepdim=True, unbiased=False), rtol=1e-4, atol=1e-4)
    assert torch.equal(cls, patches[0, :2]) and torch.equal(outs[0], t[2][0])
    mean, rotation = qsd.phi_s(tokens)
    _, patches, _ = qsd.normalize_targets(t, "phis", (mean, rotation))
    x = patches.flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(24), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.var(0, unbiased=False), torch.ones(24), rtol=1e-3, atol=0)
    scale = (rotation.T @ rotation)[0, 0]
    torch.testing.assert_close(rotation.T @ rotation, scale * torch.eye(24), rtol=0, atol=1e-4 * scale.item())
    for n in (1, 2, 12, 64, 384):
        H = qsd.hadamard(n)
        torch.testing.assert_close(H @ H.T, torch.eye(n))
        torch.testing.assert_close(H.abs(), torch.full((n, n), n ** -0.5))
    with pytest.raises(qsd.UserError, match="not 20"):
        qsd.hadamard(20)


def test_each_equation_is_computed_in_exactly_one_line_and_named_nowhere_else():
    lines = [line for name in ("qsd", "data", "distill", "segment", "eval") for line in (HERE / f"{name}.py").read_text().splitlines()]
    for number in range(3, 13):
        naming = [line for line in lines if re.search(rf"Eq\. ?{number}([^0-9]|$)", line)]
        assert len(naming) == 1 and re.search(rf"\S.*#.*Eq\. ?{number}([^0-9]|$)", naming[0]), (number, naming)


# --- The rivals: each against its definition --------------------------------------------------------------------------

def identity(linear):
    """Make the projections of a student as wide as its teacher the identity."""
    torch.nn.init.eye_(linear.weight)
    torch.nn.init.zeros_(linear.bias)


def wide_setting(loss):
    """Student and teacher tokens of one width, (B, N, 32), and an objective without a student."""
    objective = qsd.LOSSES[loss](vit(32), vit(32), qsd.LossConfig(dcd_pool=1))
    return objective, torch.rand(2, 16, 32, requires_grad=True), torch.rand(2, 16, 32)


def value(objective, s, t, student=None, noise=None):
    """The losses on patch tokens s and t alone, of 16 x 16 pixels."""
    return objective(student or vit(32), torch.zeros(len(t), 3, 16, 16), (None, s, None), (None, t, None),
                     torch.rand(len(t), 16) if noise is None else noise)


def test_mse_is_zero_at_identity_and_its_gradient_is_twice_the_error_over_their_number():
    objective, s, t = wide_setting("mse")
    identity(objective.phi)
    assert value(objective, t, t)["loss"] == 0
    value(objective, s, t)["loss"].backward()
    torch.testing.assert_close(s.grad, 2 * (s.detach() - t) / t.numel())


def test_cwd_compares_each_channels_distribution_over_space():
    objective, s, t = wide_setting("cwd")
    identity(objective.align)
    loss, want = value(objective, s, t)["loss"], 0
    for b, c in np.ndindex(2, 32):
        p_s, p_t = ((x[b, :, c] / 4).exp() / (x[b, :, c] / 4).exp().sum() for x in (s, t))
        want = want + 16 * (p_t * (p_t / p_s).log()).sum() / 64
    torch.testing.assert_close(loss, want)
    assert value(objective, t, t)["loss"].abs() < 1e-6
    torch.testing.assert_close(value(objective, s + torch.randn(32), t)["loss"], loss)  # a constant per channel
    loss.backward()
    assert s.grad.abs().max() > 1e-5 and s.grad.sum(1).abs().max() < 1e-7
    objective.T = 300.0
    error = s.detach() - t
    error = error - error.mean(1, keepdim=True)
    torch.testing.assert_close(value(objective, s, t)["loss"].detach(), error.square().mean() / 2, rtol=0.05, atol=0)


def test_afdcd_reconstructs_contrasts_and_gives_no_gradient_to_dropped_positions():
    objective, s, t = wide_setting("afdcd")
    identity(objective.align)
    noise = torch.rand(2, 16)
    losses = value(objective, s, t, noise=noise)
    losses["loss"].backward()
    dropped = noise.argsort(1).argsort(1) < 12  # 75 %
    assert (s.grad[dropped] == 0).all() and (s.grad[~dropped] != 0).any(-1).all()
    with torch.no_grad():
        f = objective.project((s * ~dropped[..., None]).mT.unflatten(2, (4, 4))).flatten(2)  # (B, C, N)
    total = 0
    for b, n, m in np.ndindex(2, 16, 16):  # position, group of two channels
        own = f[b, 2 * m:2 * m + 2, n]
        others = [t[b, k, 2 * g:2 * g + 2] for k in range(16) for g in range(16) if g != m]
        logits = torch.stack([-(own - vector).abs().sum() / 0.07 for vector in [t[b, n, 2 * m:2 * m + 2], *others]])
        total += logits.logsumexp(0) - logits[0]
    torch.testing.assert_close(losses["L_con"].detach(), 16 * total / 512, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["L_fd"].detach(), (f.mT - t).square().mean())
    for conv in objective.project[::2]:
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    objective.drop = 0.0
    assert value(objective, t, t)["L_fd"] == 0
    ones = torch.ones(2, 16, 32)
    assert value(objective, ones, ones)["L_con"].item() == pytest.approx(16 * math.log(241))


def test_afdcd_pools_both_maps_before_it_contrasts_them():
    student, objective, x, s, t, noise = setting("afdcd", grid=8, dcd_pool=2)
    tokens = t[1].mT.unflatten(2, (8, 8))
    assert objective.vectors(tokens).shape == (4, 256, 2)
    assert torch.equal(objective.vectors(tokens), setting("afdcd", grid=8)[1].vectors(F.max_pool2d(tokens, 2)))


def test_g2sd_sees_a_quarter_of_the_patches_and_predicts_all_of_them_whatever_the_teachers_scale():
    student, objective, x, s, t, noise = setting("g2sd")
    losses = objective(student, x, s, t, noise)
    assert s is None and not objective.plain
    seen = noise.argsort(1).argsort(1) < 4  # of 16
    pixels = seen.view(4, 1, 4, 1, 4, 1).expand(4, 3, 4, 4, 4, 4).reshape(x.shape)
    other = torch.where(pixels, x, torch.randn_like(x))
    torch.testing.assert_close(objective(student, other, s, t, noise)["loss"], losses["loss"])
    assert (objective(student, -x, s, t, noise)["loss"] - losses["loss"]).abs() > 1e-6
    scaled = (None, 3 * t[1] + 2, ())
    torch.testing.assert_close(objective(student, x, s, scaled, noise)["loss"], losses["loss"], rtol=1e-4, atol=0)
    torch.nn.init.zeros_(objective.decoder[-1].weight)
    for constant in (0.0, 4.0):  # predicted everywhere: errors mostly below 2, and above
        torch.nn.init.constant_(objective.decoder[-1].bias, constant)
        error = (constant - F.layer_norm(t[1], (32,))).abs()
        want = torch.where(error < 2, error ** 2 / 4, error - 1).mean()
        torch.testing.assert_close(objective(student, x, s, t, noise)["loss"], want)


def test_vitkd_mimics_two_blocks_and_generates_the_last_without_its_replaced_positions():
    student, objective, x, s, t, noise = setting("vitkd")
    outs = [o.detach().requires_grad_() for o in s[2]]
    hidden = noise.argsort(1).argsort(1) < 8
    losses = objective(student, x, (None, None, outs), t, noise)
    first, second, last = (align(o) for align, o in zip(objective.align, outs))
    mixed = torch.where(hidden[..., None], objective.token, last)
    error = objective.project(mixed.mT.unflatten(2, (4, 4))).flatten(2).mT - t[2][-1]
    torch.testing.assert_close(losses["L_mimic"], (first - t[2][0]).square().mean() + (second - t[2][1]).square().mean())
    torch.testing.assert_close(losses["L_generate"], error[hidden].square().mean())
    losses["L_generate"].backward()
    assert (outs[2].grad[hidden] == 0).all() and (outs[2].grad[~hidden] != 0).any()


def test_vitkds_mean_form_does_not_change_with_the_number_of_tokens():
    losses = []
    for grid in (4, 8):
        objective = qsd.LOSSES["vitkd"](vit(32), vit(32), qsd.LossConfig())
        for p in objective.parameters():
            torch.nn.init.constant_(p, 0.0)
        t = torch.linspace(-1, 1, 32).expand(2, grid ** 2, 32)
        losses.append(objective(vit(32), torch.zeros(2, 3, 4 * grid, 4 * grid), (None, None, [t] * 3), (None, None, [t] * 3),
                                torch.rand(2, grid ** 2)))
    assert losses[0]["L_mimic"] > 0
    torch.testing.assert_close(losses[0], losses[1])


def test_proteus_compares_cls_all_tokens_and_the_masked_positions():
    student, objective, x, s, t, noise = setting("proteus")
    seen, masked = [], torch.randn(2, 16, 16, requires_grad=True)
    student.forward = lambda x, mask: (seen.append((x, mask)), (None, masked))[1]
    losses = objective(student, x, s, t, noise)
    (images, mask), = seen
    assert torch.equal(images, x[::2]) and mask.sum(1).tolist() == [8, 8]
    tokens = torch.cat([s[0][:, None], s[1]], 1), torch.cat([t[0][:, None], t[1]], 1)

    def error(project, s, t):
        return (torch.stack([slow_project(project, token) for token in s.flatten(0, -2)]).view_as(t) - t).square()
    torch.testing.assert_close(losses["L_cls"], error(objective.cls, s[0], t[0]).mean())
    torch.testing.assert_close(losses["L_feat"], error(objective.feat, *tokens).mean())
    torch.testing.assert_close(losses["L_mask"], error(objective.patch, masked, t[1][::2])[mask].mean())
    torch.testing.assert_close(losses["loss"], losses["L_cls"] + losses["L_feat"] + losses["L_mask"])
    losses["L_mask"].backward()
    assert (masked.grad[~mask] == 0).all() and (masked.grad[mask] != 0).any(-1).all()


@pytest.mark.parametrize("loss", qsd.LOSSES)
def test_every_objective_trains_the_student_and_gives_fp32_losses_under_autocast(loss):
    student, objective, x, s, t, noise = setting(loss)
    losses = objective(student, x, s, t, noise)
    losses["loss"].backward()
    assert student.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        s = student.run(x, layers=objective.layers_s) if objective.plain else None
        low = objective(student, x, s, t, noise)
    for name, loss in losses.items():
        assert low[name].dtype == torch.float32 and low[name].item() == pytest.approx(loss.item(), rel=0.05)


# --- Encoders: helpers ------------------------------------------------------------------------------------------------

DEIT_TINY = SHARED / "data/weights/deit_tiny_patch16_224.pth"
AUGREG_TINY = SHARED / "data/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.pth"
needs_weights = pytest.mark.skipif(not DEIT_TINY.exists(), reason="needs ../shared/data")


def noisy(name, depth=None, **sizes):
    """An encoder of the table with every parameter random (also biases, norms, LayerScale), so that each one counts."""
    vit = qsd.load_vit(name, depth=depth, pretrained=False, **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in vit.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.ndim == 1 and not key.endswith("bias") else
                    noise / p[0].numel() ** 0.5 if p.ndim in (2, 4) else 0.3 * noise)
    return vit.eval()


def plain_state(vit):
    return {key: p.detach().clone() for key, p in vit.state_dict().items() if key != "mask_token"}


def save_student(path, vit):
    """A file as distill.py writes it: the official keys in "model", mask_token beside them."""
    torch.save(dict(model=plain_state(vit), mask_token=vit.mask_token.detach(), encoder=vit.config, ledger=[]), path)
    return path


def save_deit(path, vit, **extra):
    torch.save({"model": plain_state(vit) | extra}, path)
    return path


@pytest.fixture
def small(tmp_path):
    """A file in DeiT's layout, 64 wide, 2 blocks, patch 8, and the encoder in it."""
    torch.manual_seed(0)
    vit = qsd.ViT("small", embed_dim=64, depth=2, num_heads=1, patch_size=8, img_size=32).eval()
    return save_deit(tmp_path / "small.pth", vit), vit


def message(*args, **kwargs):
    with pytest.raises(qsd.UserError) as error:
        qsd.load_vit(*args, **kwargs)
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


# --- Encoders: equal to timm's ----------------------------------------------------------------------------------------

EVA = {"global_pool": "token"}              # timm otherwise moves the final norm behind an average over patches
TIMM = {                                    # timm's name, how many blocks are compared, timm's options
    "deit_tiny": ("deit_tiny_patch16_224", 12, {}),
    "deit_small": ("deit_small_patch16_224", 4, {}),
    "deit_base": ("deit_base_patch16_224", 2, {}),
    "dino_vits16": ("vit_small_patch16_224.dino", 2, {}),
    "dinov2_vits14": ("vit_small_patch14_dinov2", 3, {}),
    "dinov2_vitb14": ("vit_base_patch14_dinov2", 2, {}),
    "dinov2_vitl14": ("vit_large_patch14_dinov2", 2, {}),
    "dinov2_vitg14": ("vit_giant_patch14_dinov2", 1, {}),
    "dinov2_vits14_reg": ("vit_small_patch14_reg4_dinov2", 2, {}),
    "dinov2_vitb14_reg": ("vit_base_patch14_reg4_dinov2", 2, {}),
    "eva02_tiny": ("eva02_tiny_patch14_224", 12, EVA),
    "eva02_small": ("eva02_small_patch14_224", 4, EVA),
    "eva02_base": ("eva02_base_patch14_224", 2, EVA),
    "eva02_large": ("eva02_large_patch14_224", 2, EVA),
}


@pytest.mark.parametrize("name", TIMM)
def test_every_output_equals_timms_at_the_native_and_at_a_resized_nonsquare_size(name):
    timm = pytest.importorskip("timm")
    from timm.models import eva, vision_transformer
    reference, depth, options = TIMM[name]
    module = eva if name.startswith("eva02") else vision_transformer
    vit = noisy(name, depth)
    native = (vit.patch_size * vit.grid[0], vit.patch_size * vit.grid[1])
    resized = (98, 126) if vit.patch_size == 14 else (96, 128)
    for size in [native, resized] if vit.embed_dim <= 384 else [resized]:       # the wide ones take seconds at 518
        model = timm.create_model(reference, depth=depth, num_classes=0, img_size=size, **options).eval()
        state = plain_state(vit) | ({"mask_token": vit.mask_token} if name.startswith("dinov2") else {})    # timm's cue
        state = module.checkpoint_filter_fn(state, model, antialias=False)
        model.load_state_dict(state, strict=True)
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        layers = list(range(depth))
        with torch.no_grad():
            want, blocks = model.forward_intermediates(x, indices=layers, output_fmt="NLC", norm=False)
            cls, patches, outs = vit.run(x, layers=layers)
        prefix = 1 + qsd.ENCODERS[name].registers
        for got, ref in zip([cls, patches, *outs], [want[:, 0], want[:, prefix:], *blocks], strict=True):
            assert (got - ref).abs().max() < 1e-5 * ref.abs().max()


def test_inner_attention_norm_equals_timm():
    timm = pytest.importorskip("timm")
    from timm.models import eva
    vit = qsd.ViT("eva", embed_dim=192, depth=2, num_heads=3, patch_size=14, img_size=56, mlp="swiglu", rope=True,
                  sub_ln=True, inner_attn_ln=True).eval()
    for p in vit.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model = timm.create_model(
        "eva02_base_patch14_224", embed_dim=192, depth=2, num_heads=3, img_size=56, num_classes=0, global_pool="token",
        scale_attn_inner=True).eval()
    model.load_state_dict(eva.checkpoint_filter_fn(plain_state(vit), model), strict=True)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        cls, patches = vit(x)
        got, want = torch.cat([cls[:, None], patches], dim=1), model.forward_features(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, size", [("tiny", 192), ("small", 384), ("base", 768)])
def test_student_checkpoint_loads_strictly_in_timm(tmp_path, name, size):
    timm = pytest.importorskip("timm")
    vit = noisy(f"deit_{name}", depth=2, img_size=64, patch_size=8)
    save_student(tmp_path / "student.pt", vit)
    model = timm.create_model(f"vit_{name}_patch16_224", num_classes=0, img_size=64, patch_size=8, depth=2).eval()
    model.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True)["model"], strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), vit(x)[0], rtol=1e-5, atol=1e-5)
    assert vit.embed_dim == size


# --- Encoders: real weights -------------------------------------------------------------------------------------------

@needs_weights
@pytest.mark.parametrize("path, mean, measured", [(AUGREG_TINY, 0.5, 83), (DEIT_TINY, 0.485, 86)])
def test_real_weights_classify_imagenet(path, mean, measured):
    """The file's own head on our CLS, short side 240, bicubic without antialias, the middle 240; every tenth class, to save time: over
    all 1000 classes 83.1 % (AugReg) and 80.5 % (DeiT) are right."""
    vit, head = qsd.load_vit(path, img_size=240).eval(), torch.load(path, weights_only=True)
    assert vit.mean[0] == mean and vit.name in qsd.ENCODERS
    classes = sorted((SHARED / "data/imagenet/train").iterdir())
    right = 0
    for label in range(0, 1000, 10):
        image = data.read_image(next(classes[label].iterdir()))
        height, width = (round(side * 240 / min(image.shape[1:])) for side in image.shape[1:])
        image = F.interpolate(image[None].float(), (height, width), mode="bicubic").round().clamp(0, 255)
        top, left = (height - 240) // 2, (width - 240) // 2
        with torch.no_grad():
            cls, _ = vit(data.normalize(image[:, :, top:top + 240, left:left + 240], vit.mean, vit.std))
        right += (F.linear(cls, head["head.weight"], head["head.bias"]).argmax().item() == label)
    assert abs(right - measured) <= 2, right                                                # JPEG decoders differ


@needs_weights
def test_a_name_finds_its_file_in_the_weights_folder(monkeypatch, capsys):
    monkeypatch.setattr(qsd, "WEIGHTS", str(DEIT_TINY.parent))
    by_name, by_path = qsd.load_vit("deit_tiny", depth=6), qsd.load_vit(DEIT_TINY)
    assert torch.equal(by_name.blocks[5].mlp.fc2.weight, by_path.blocks[5].mlp.fc2.weight)
    assert "the first 6 of 12 blocks" in capsys.readouterr().out


# --- Encoders: passes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["deit_tiny", "dinov2_vits14_reg", "eva02_tiny"])
def test_masked_and_partial_passes_follow_their_definition(name):
    vit = noisy(name, depth=2)
    p = vit.patch_size
    x, mask = torch.randn(2, 3, 4 * p, 6 * p), torch.rand(2, 24) < 0.5
    with torch.no_grad():
        cls, patches = vit(x)
        assert cls.shape == (2, vit.embed_dim) and patches.shape == (2, 24, vit.embed_dim)
        masked = vit(x, mask)[1]
        elsewhere = x.unflatten(2, (4, p)).unflatten(4, (6, p)).clone()                     # (B, 3, 4, p, 6, p)
        elsewhere = torch.where(mask.view(2, 1, 4, 1, 6, 1), torch.randn_like(elsewhere), elsewhere).reshape(x.shape)
        torch.testing.assert_close(vit(elsewhere, mask)[1], masked)                         # masked pixels are not seen
        assert (masked - patches).abs().max() > 1e-3
        torch.testing.assert_close(vit(x, torch.zeros_like(mask))[1], patches)
        order = torch.stack([torch.randperm(24) for _ in range(2)])
        cls_kept, kept, _ = vit.run(x, keep=order)                                          # all patches, shuffled
        torch.testing.assert_close(cls_kept, cls)
        torch.testing.assert_close(kept, patches.gather(1, order[..., None].expand_as(patches)))
        first, *_ = vit.blocks_out(x, [0])
        _, _, (last, again) = vit.run(x, layers=[1, 0])
        assert torch.equal(first, again) and torch.equal(vit.norm(last), patches)
        seen = torch.cat([vit.cls_token.expand(2, -1, -1) + vit.pos_embed[:, :1], first], dim=1)
        assert seen.shape[1] == 25                                                          # no register among them


def test_blocks_after_the_last_wanted_one_do_not_run():
    vit, ran = noisy("toy_small"), []
    for i, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    vit.blocks_out(torch.randn(1, 3, 64, 64), [1, 0])
    assert ran == [0, 1]


def test_an_image_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(qsd.UserError, match="100x64 pixels .* patches of 8"):
        qsd.load_vit("toy_small")(torch.randn(1, 3, 100, 64))


def test_the_config_of_an_encoder_rebuilds_it():
    for name in qsd.ENCODERS:
        with torch.device("meta"):
            vit = qsd.ViT(**qsd.constructor_values(name, qsd.ENCODERS[name]))
            again = qsd.ViT(**vit.config)
        assert str(again) == str(vit) and again.config == vit.config


# --- Encoders: resizing -----------------------------------------------------------------------------------------------

def test_position_embedding_is_resized_bicubically_with_cls_kept():
    pos = torch.randn(1, 1 + 37 * 37, 8)
    for grid in [(16, 16), (32, 32), (20, 45)]:
        got = qsd.resize_pos_embed(pos, (37, 37), grid)
        for c in range(3):                                                                  # channel by channel
            image = pos[0, 1:, c].view(1, 1, 37, 37)
            want = F.interpolate(image, grid, mode="bicubic", align_corners=False).flatten()
            torch.testing.assert_close(got[0, 1:, c], want)
        assert torch.equal(got[:, 0], pos[:, 0])


@pytest.mark.parametrize("old, new", [(14, 16), (16, 14)])
def test_patch_embedding_is_resized_plainly_by_default_and_by_pseudo_inverse_on_request(old, new, monkeypatch):
    torch.manual_seed(0)
    weight, pixels = torch.randn(5, 3, old, old), torch.randn(7, 3, old, old)
    plain = qsd.resize_patch_embed(weight, new)
    torch.testing.assert_close(plain, F.interpolate(weight, (new, new), mode="bicubic", align_corners=False))
    monkeypatch.setattr(qsd, "PATCH_RESIZE", "pinv")
    flexi = qsd.resize_patch_embed(weight, new)
    assert flexi.shape == plain.shape == (5, 3, new, new)
    larger = F.interpolate(pixels, (new, new), mode="bicubic", align_corners=False)
    tokens = torch.einsum("bihw,oihw->bo", pixels, weight)
    error = [(torch.einsum("bihw,oihw->bo", larger, w) - tokens).square().mean() for w in (flexi, plain)]
    assert error[0] < (1e-6 if new > old else error[1])                                     # exact when enlarging


# --- Encoders: loading ------------------------------------------------------------------------------------------------

def test_sizes_and_depth_given_to_load_vit_are_applied_and_printed(small, capsys):
    path, vit = small
    loaded = qsd.load_vit(path, img_size=(48, 96), patch_size=16, depth=1)
    assert loaded.grid == (3, 6) and loaded.patch_size == 16 and loaded.depth == 1
    want = F.interpolate(vit.patch_embed.proj.weight, (16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(loaded.patch_embed.proj.weight, want)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for change in ["pos_embed 4x4 -> 3x6", "patch 8 -> 16", "first 1 of 2 blocks", "mask_token is new"]:
        assert change in out


def test_student_checkpoint_gives_back_the_same_encoder(tmp_path):
    for name in ["toy_small", "dinov2_vits14_reg", "eva02_base"]:
        vit = noisy(name, depth=1, img_size=(4 * qsd.ENCODERS[name].patch_size, 56))
        again = qsd.load_vit(save_student(tmp_path / "student.pt", vit))
        assert again.config == vit.config
        torch.testing.assert_close(dict(again.state_dict()), dict(vit.state_dict()), rtol=0, atol=0)


def test_segmenter_and_official_gkd_checkpoints_give_their_encoder(tmp_path, small):
    _, vit = small
    inside = {f"encoder.{key}": p for key, p in vit.state_dict().items()} | {"decoder.weight": torch.zeros(3)}
    torch.save({"encoder": vit.config, "model": inside}, tmp_path / "segmenter.pt")
    teacher = qsd.ViT("t", embed_dim=128, depth=1, num_heads=2, patch_size=8, img_size=32).state_dict()
    both = {f"teacher.backbone.{key}": p for key, p in teacher.items()}
    both |= {f"student.backbone.{key}": p for key, p in vit.state_dict().items()}
    both |= {"student.head.bias": torch.zeros(3)}
    torch.save({"model": both, "args": argparse.Namespace(lr=1.0)}, tmp_path / "checkpoint_99.pth")
    for file in ["segmenter.pt", "checkpoint_99.pth"]:
        torch.testing.assert_close(
            dict(qsd.load_vit(tmp_path / file).state_dict()), dict(vit.state_dict()), rtol=0, atol=0)


def test_distilled_deit_loses_its_second_token_and_that_tokens_position(tmp_path, small):
    _, vit = small
    state = plain_state(vit)
    cls, patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    extra = {"dist_token": torch.randn(1, 1, 64), "pos_embed": torch.cat([cls, torch.randn(1, 1, 64), patches], dim=1),
             "head.weight": torch.randn(10, 64), "head_dist.weight": torch.randn(10, 64)}
    loaded = qsd.load_vit(save_deit(tmp_path / "distilled.pth", vit, **extra))
    assert torch.equal(loaded.pos_embed, vit.pos_embed)


def test_official_eva02_layout_loads_strictly(tmp_path):
    vit = noisy("eva02_base", depth=1, img_size=56)
    tables = {f"{where}rope.freqs_{f}": torch.zeros(16, 64) for where in ("", "blocks.0.attn.") for f in ("cos", "sin")}
    state = plain_state(vit) | tables | {"lm_head.weight": torch.zeros(4, 768), "mask_token": vit.mask_token[None]}
    torch.save({"module": state}, tmp_path / "eva02_B_pt_in21k_p14.pt")
    loaded = qsd.load_vit(tmp_path / "eva02_B_pt_in21k_p14.pt")
    assert loaded.config == vit.config                                                      # the file's name tells
    torch.testing.assert_close(dict(loaded.state_dict()), dict(vit.state_dict()), rtol=0, atol=0)


def test_a_renamed_key_is_refused_by_name(tmp_path, small):
    state = plain_state(small[1])
    state["blocks.1.attn.qkv.wight"] = state.pop("blocks.1.attn.qkv.weight")
    torch.save(state, tmp_path / "a.pth")
    text = message(tmp_path / "a.pth")
    assert "blocks.1.attn.qkv.weight is missing" in text and "blocks.1.attn.qkv.wight is not expected" in text


def test_a_transposed_tensor_is_refused_by_name(tmp_path, small):
    path = save_deit(tmp_path / "a.pth", small[1], **{"blocks.0.mlp.fc1.weight": torch.zeros(64, 256)})
    assert "blocks.0.mlp.fc1.weight has shape (64, 256) instead of (256, 64)" in message(path)


def test_a_truncated_file_is_refused(tmp_path, small):
    (tmp_path / "a.pth").write_bytes(small[0].read_bytes()[:5000])
    assert "a.pth is truncated, damaged or no checkpoint (5000 bytes)" in message(tmp_path / "a.pth")


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    for file in ["a.pth", "b.pth"]:
        assert "holds Python objects, which could run code" in message(file)
    assert not Path("ran").exists()


def test_a_web_page_saved_as_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "a.pth").write_text("\n<!DOCTYPE html><html>404</html>")
    assert "a.pth is a web page, not a checkpoint" in message(tmp_path / "a.pth")


def test_unknown_names_files_without_an_encoder_and_impossible_sizes_are_refused(tmp_path, small):
    assert "neither a file nor a known encoder; the names are deit_tiny" in message("dinov2_vits15")
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pth")
    assert "holds no encoder" in message(tmp_path / "a.pth")
    assert "depth must be 1 to 2" in message(small[0], depth=3)
    assert "30x30 pixels does not divide into patches of 8" in message(small[0], img_size=30)
    assert "only a named encoder can start at random" in message(small[0], pretrained=False)


def test_offline_the_address_and_the_place_for_the_file_are_named(tmp_path, monkeypatch):
    def no_network(url, *_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    text = message("dino_vits16")
    assert qsd.ENCODERS["dino_vits16"].url in text and "put it at weights/dino_deitsmall16_pretrain.pth" in text


# --- Datasets: tiny trees in the true layouts -------------------------------------------------------------------------

def write(path, array, mode=None, **options):
    """Save an array as an image file, making its folders; mode "P" keeps the values as indices of a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image.putpalette([255 - value // 3 for value in range(768)])  # turns "L" into "P"
    image.save(path, **options)
    return path


def photo(height=6, width=8, value=0):
    return np.full((height, width, 3), value, np.uint8)


def ids(*values, height=6, width=8):
    """Label (H, W) that repeats the given values along its rows."""
    return np.resize(np.array(values, np.uint8), (height, width))


def write_png16(path, first_channel):
    """A 16-bit RGB PNG, written chunk by chunk since Pillow cannot."""
    values = np.zeros((*np.shape(first_channel), 3), ">u2")
    values[..., 0], values[..., 1] = first_channel, 40000
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def read(name, root, split="train", **kwargs):
    """Images as (H, W, 3) arrays, labels as arrays, of all items."""
    dataset = data.scenes(name, root, split, **kwargs)
    items = [dataset[i] for i in range(len(dataset))]
    for image, label, _ in items:
        assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.is_contiguous()
        assert label.dtype == torch.int64
        assert label.shape == image.shape[1:] or "transform" in kwargs  # at evaluation the label keeps its size
    return [(image.permute(1, 2, 0).numpy(), label.numpy()) for image, label, _ in items]


def preflight(*argv):
    """Exit status of `python data.py`, but for a user's mistake; the picture goes where the data are."""
    argv = [str(word) for word in argv]
    try:
        data.main(argv if "--out" in argv else [*argv, "--out", f"{argv[argv.index('--root') + 1]}/preflight.png"])
    except SystemExit as stop:
        return stop.code
    return 0


def gtav_tree(root, n=3):
    for i in range(n):
        write(root / f"gtav/images/{i:05}.png", photo(value=i))
        write(root / f"gtav/labels/{i:05}.png", ids(7, 26, i % 34), "P")


# --- Datasets: lookup tables, against what the releases document ------------------------------------------------------

def class_of(table, value):
    return data.CITYSCAPES_CLASSES[table[value]] if table[value] < 19 else table[value]


def test_cityscapes_label_ids_are_those_of_its_label_table():
    facts = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
             20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
             27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
    for value in range(256):
        expected = facts.get(value, data.IGNORE if value < 35 or value == 255 else data.UNKNOWN)
        assert class_of(data.LABEL_IDS, value) == expected


def test_synthia_ids_are_those_of_its_readme():
    facts = {1: "sky", 2: "building", 3: "road", 4: "sidewalk", 5: "fence", 6: "vegetation", 7: "pole", 8: "car",
             9: "traffic sign", 10: "person", 11: "bicycle", 12: "motorcycle", 15: "traffic light", 16: "terrain",
             17: "rider", 18: "truck", 19: "bus", 20: "train", 21: "wall", 0: 255, 13: 255, 14: 255, 22: 255,
             23: data.UNKNOWN}
    for value, expected in facts.items():  # 13 parking slot, 14 road work, 22 lane marking
        assert class_of(data.SYNTHIA_IDS, value) == expected


def test_mapillary_ids_are_those_of_its_config():
    names = ("bird, ground animal, curb, fence, guard rail, barrier, wall, bike lane, crosswalk, curb cut, "
             "parking, pedestrian area, rail track, road, service lane, sidewalk, bridge, building, tunnel, "
             "person, bicyclist, motorcyclist, other rider, lane marking crosswalk, lane marking, mountain, sand, "
             "sky, snow, terrain, vegetation, water, banner, bench, bike rack, billboard, catch basin, cctv "
             "camera, fire hydrant, junction box, mailbox, manhole, phone booth, pothole, street light, pole, "
             "traffic sign frame, utility pole, traffic light, traffic sign back, traffic sign front, trash can, "
             "bicycle, boat, bus, car, caravan, motorcycle, on rails, other vehicle, trailer, truck, wheeled slow, "
             "car mount, ego vehicle, unlabeled").split(", ")
    assert len(names) == 66
    same = {"bike lane": "road", "crosswalk": "road", "parking": "road", "service lane": "road",
            "lane marking": "road", "lane marking crosswalk": "road", "curb": "sidewalk", "curb cut": "sidewalk",
            "pedestrian area": "sidewalk", "bicyclist": "rider", "motorcyclist": "rider", "other rider": "rider",
            "utility pole": "pole", "street light": "pole", "traffic sign frame": "traffic sign",
            "traffic sign back": "traffic sign", "traffic sign front": "traffic sign", "on rails": "train"}
    for value, name in enumerate(names):
        found = class_of(data.MAPILLARY_IDS, value)
        assert found == (name if name in data.CITYSCAPES_CLASSES else same.get(name, data.IGNORE)), name
    assert class_of(data.MAPILLARY_IDS, 55) == "car" and data.MAPILLARY_IDS[66] == data.UNKNOWN


def test_every_row_has_one_colour_per_class_and_every_setting_exists():
    for name, entry in data.DATASETS.items():
        assert len(entry.classes) == len(entry.colors) == len(set(entry.colors)), name
    for source, targets in data.SETTINGS.values():
        assert "train" in data.DATASETS[source].splits and all("val" in data.DATASETS[name].splits for name in targets)
        assert {data.DATASETS[name].classes for name in targets} == {data.DATASETS[source].classes}
    counts = {"cityscapes": 19, "potsdam-rgb": 6, "endovis18": 11, "camvid": 11}
    assert {name: data.DATASETS[name].num_classes for name in counts} == counts


# --- Datasets: each from its true layout ------------------------------------------------------------------------------

def test_imagenet_reads_class_folders_grey_cmyk_and_misnamed_files_and_a_flat_folder(tmp_path):
    train = tmp_path / "imagenet/train"
    write(train / "n01/n01_1.JPEG", photo(value=100))
    write(train / "n01/n01_2.JPEG", photo(value=100)[..., 0])  # grey
    (train / "n02").mkdir()
    Image.fromarray(photo(value=100)).convert("CMYK").save(train / "n02/n02_1.JPEG")
    write(train / "n02/n02_2.JPEG", photo(value=100), format="PNG")  # ILSVRC has one of these
    (train / "n02/._n02_1.JPEG").write_bytes(b"macOS")
    (train / "LOC_synset_mapping.txt").write_text("not an image")
    dataset = data.images("imagenet", tmp_path)
    assert len(dataset) == 4
    for i in range(4):
        image, draw = dataset[i]
        assert draw == i and image.shape == (3, 6, 8) and (image.int() - 100).abs().max() <= 2
    assert len(data.images("imagenet", train)) == 4  # the class folders' own parent
    assert len(data.images("imagenet", train / "n01")) == 2  # a flat folder
    assert preflight("--data", "imagenet", "--root", tmp_path) == 0


def test_gtav_keeps_palette_indices_and_resizes_labels_of_another_size(tmp_path, capsys):
    gtav_tree(tmp_path)
    write(tmp_path / "gtav/labels/00002.png", ids(7, 26, height=12, width=16), "P")
    items = read("gtav", tmp_path)
    assert [image[0, 0, 0] for image, _ in items] == [0, 1, 2]
    assert items[0][1][0, :3].tolist() == [0, 13, data.IGNORE]  # 7 road, 26 car, 0 unlabelled
    assert items[2][1].shape == (6, 8)
    assert preflight("--data", "gtav", "--root", tmp_path / "gtav") == 0  # the size is known to differ
    assert "16x12, but its image is 8x6, will be resized" in capsys.readouterr().out
    write(tmp_path / "gtav/labels/00001.png", np.resize(data.CITYSCAPES_COLORS[13], (6, 8, 3)))
    assert (read("gtav", tmp_path)[1][1] == 13).all()  # a mirror with colours


def test_synthia_reads_the_class_from_16_bit_files(tmp_path):
    write(tmp_path / "synthia/RAND_CITYSCAPES/RGB/0000000.png", photo())
    write_png16(tmp_path / "synthia/RAND_CITYSCAPES/GT/LABELS/0000000.png", ids(8, 3, 19, 13))
    expected = ids(13, 0, 15, data.IGNORE)
    assert (read("synthia", tmp_path)[0][1] == expected).all()
    assert (read("synthia", tmp_path / "synthia/RAND_CITYSCAPES")[0][1] == expected).all()
    write_png16(tmp_path / "synthia/RAND_CITYSCAPES/GT/LABELS/0000000.png", np.full((6, 8), 40))
    with pytest.raises(data.UserError, match=r"0000000.png: label values \[40\]"):
        read("synthia", tmp_path)


def test_urbansyn_reads_nested_folders_and_ignores_19(tmp_path):
    write(tmp_path / "urbansyn/rgb/rgb/rgb_0001.png", photo())
    write(tmp_path / "urbansyn/ss/ss/ss_0001.png", ids(0, 18, 19))
    assert read("urbansyn", tmp_path)[0][1][0, :3].tolist() == [0, 18, data.IGNORE]


@pytest.mark.parametrize("kind, values", [("labelIds", (7, 26, 0)), ("labelTrainIds", (0, 13, 255))])
def test_cityscapes_pairs_cities_and_takes_label_ids_or_train_ids(tmp_path, kind, values):
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau"), ("test", "berlin")):
        stem = f"{split}/{city}/{city}_000000_000019"
        write(tmp_path / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png", photo(4, 8))
        write(tmp_path / f"cityscapes/gtFine/{stem}_gtFine_{kind}.png", ids(*values, height=4))
        write(tmp_path / f"cityscapes/gtFine/{stem}_gtFine_color.png", photo(4, 8))
        write(tmp_path / f"cityscapes/gtFine/{stem}_gtFine_instanceIds.png", photo(4, 8))
    assert len(read("cityscapes", tmp_path)) == 2
    (image, label), = read("cityscapes", tmp_path, "val", transform=data.eval_transform("cityscapes"))
    assert image.shape == (512, 1024, 3) and label.shape == (4, 8)  # the label keeps its size
    assert label[0, :3].tolist() == [0, 13, data.IGNORE]


def test_bdd100k_reads_labels_in_both_modes_and_the_old_release(tmp_path):
    for i, mode in enumerate((None, "P")):
        write(tmp_path / f"bdd100k/images/10k/val/{i}.jpg", photo())
        write(tmp_path / f"bdd100k/labels/sem_seg/masks/val/{i}.png", ids(0, 18, 255), mode)
    write(tmp_path / "old/seg/images/val/0.jpg", photo())
    write(tmp_path / "old/seg/labels/val/0_train_id.png", ids(0, 18, 255))
    for _, label in read("bdd100k", tmp_path, "val") + read("bdd100k", tmp_path / "old", "val"):
        assert label[0, :3].tolist() == [0, 18, data.IGNORE]


@pytest.mark.parametrize("inner", ["", "v1.2/"])
def test_mapillary_reads_both_layouts_and_is_evaluated_at_half_size(tmp_path, inner):
    write(tmp_path / "mapillary/validation/images/a.jpg", photo(101, 80))
    write(tmp_path / f"mapillary/validation/{inner}labels/a.png", ids(55, 13, 65, height=101, width=80), "P")
    write(tmp_path / "mapillary/validation/v2.0/labels/a.png", ids(200, height=101, width=80), "P")
    assert read("mapillary", tmp_path, "val")[0][1][0, :3].tolist() == [13, 0, data.IGNORE]
    (image, label), = read("mapillary", tmp_path, "val", transform=data.eval_transform("mapillary"))
    assert label.shape == (50, 40) and image.shape == (640, 512, 3)  # portrait: the short edge decides


def test_acdc_conditions_are_domains_and_reference_folders_stay_out(tmp_path):
    for condition in ("fog", "night", "rain", "snow"):
        for split, seq in (("train", "GOPR01"), ("val", "GP0102"), ("train_ref", "GOPR01"), ("val_ref", "GP0102")):
            kind = "rgb_ref_anon" if "ref" in split else "rgb_anon"
            value = ("fog", "night", "rain", "snow").index(condition)
            write(tmp_path / f"acdc/rgb_anon/{condition}/{split}/{seq}/{seq}_frame_1_{kind}.png", photo(54, 96, value))
            for kind in ("labelTrainIds", "labelIds", "invIds"):
                label = tmp_path / f"acdc/gt/{condition}/{split}/{seq}/{seq}_frame_1_gt_{kind}.png"
                write(label, ids(3, height=54, width=96))
    for value, condition in enumerate(("fog", "night", "rain", "snow")):
        (image, label), = read(f"acdc-{condition}", tmp_path, "val", transform=data.eval_transform(f"acdc-{condition}"))
        assert image[0, 0, 0] == value and image.shape == (540, 960, 3)
        assert (label == 3).all() and label.shape == (54, 96)
    assert len(read("acdc", tmp_path, "val")) == 4


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_isprs_tiles_cover_the_image_and_off_palette_colours_are_cut_at_127(tmp_path, compression):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (700, 600, 3), np.uint8)
    colors = np.array([*data.ISPRS_COLORS, (0, 0, 0)])
    classes = rng.integers(0, 7, (700, 600))
    label = np.abs(colors[classes] - rng.integers(0, 100, (700, 600, 3)))  # shades as in tile 4_12
    root = tmp_path / "potsdam"
    for tile in ("2_10", "2_13", "7_13"):
        write(root / f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif", image, compression=compression)
        write(root / f"3_Ortho_IRRG/top_potsdam_{tile}_IRRG.tif", image, compression=compression)
        write(root / f"5_Labels_all_noBoundary/top_potsdam_{tile}_label_noBoundary.tif", label, compression=compression)
    items = read("potsdam-rgb", tmp_path)
    expected = np.where(classes == 6, data.IGNORE, classes)
    boxes = [(0, 0), (0, 88), (188, 0), (188, 88)]  # top, left
    assert len(items) == 4
    for (crop, classes_of_crop), (top, left) in zip(items, boxes):
        assert (crop == image[top:top + 512, left:left + 512]).all()
        assert (classes_of_crop == expected[top:top + 512, left:left + 512]).all()
    assert len(read("potsdam-irrg", tmp_path, "val")) == 8
    assert len(list(tmp_path.rglob("*.npy"))) == (0 if compression == "raw" else 6)  # compressed: unpacked once
    assert len(data.images("potsdam-rgb", tmp_path)) == 4


def test_a_tiff_whose_strips_lie_out_of_order_is_not_mapped_as_it_lies(tmp_path):
    rows = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)  # strips of two rows, the second one first in the file
    tags = [(256, 4, 1, 5), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 2, 200),
            (277, 3, 1, 3), (278, 4, 1, 2), (279, 4, 2, 208)]  # 273: offsets, 278: rows per strip
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = header.ljust(200, b"\0") + struct.pack("<IIII", 300 + 30, 300, 30, 30)
    (tmp_path / "a.tif").write_bytes(header.ljust(300, b"\0") + rows[2:].tobytes() + rows[:2].tobytes())
    assert (data.read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy() == rows).all()


def test_isprs_tile_counts_are_the_papers():
    assert len(data.tile_boxes(6000, 6000, 512)) * 24 == 3456 and len(data.tile_boxes(6000, 6000, 512)) * 14 == 2016
    counts = [part.count(",") + 1 for part in (*data.POTSDAM.values(), *data.VAIHINGEN.values())]
    assert counts == [24, 14, 16, 17]
    assert data.ISPRS_CLASS_OF[0b110] == 4  # (252, 255, 0): tile 6_7's cars


def test_vaihingen_areas_are_split_and_area_1_is_not_area_11(tmp_path):
    for area in (1, 11, 2):
        write(tmp_path / f"vaihingen/top/top_mosaic_09cm_area{area}.tif", photo(512, 512, area))
        write(tmp_path / f"vaihingen/gts/top_mosaic_09cm_area{area}_noBoundary.tif", photo(512, 512))
    assert [image[0, 0, 0] for image, _ in read("vaihingen-irrg", tmp_path)] == [1, 11]
    assert [image[0, 0, 0] for image, _ in read("vaihingen-irrg", tmp_path, "val")] == [2]


def test_endovis18_reads_rgb_and_rgba_labels_and_no_shadow_tree(tmp_path):
    colors = [(0, 255, 0), (255, 55, 0), (12, 255, 141), (124, 155, 5)]
    root = tmp_path / "endovis18"
    for release, seq, alpha in (("2018_release_1", 1, 0), ("2018_release_1", 4, 1), ("release_2", 5, 1)):
        label = np.resize(np.array(colors, np.uint8), (4, 4, 3))
        label = np.dstack([label, np.full((4, 4), 128)]) if alpha else label
        write(root / f"miccai_challenge_{release}/seq_{seq}/left_frames/frame000.png", photo(4, 4, seq))
        write(root / f"miccai_challenge_{release}/seq_{seq}/labels/frame000.png", label)
        write(root / f"miccai_challenge_{release}/seq_{seq}/right_frames/frame000.png", photo(4, 4))
        write(root / f"__MACOSX/miccai_challenge_{release}/seq_{seq}/left_frames/frame001.png", photo(4, 4))
    items = read("endovis18", tmp_path)
    assert [image[0, 0, 0] for image, _ in items] == [1, 4]
    for _, label in items + read("endovis18", tmp_path, "val"):
        assert label[0].tolist() == [1, 4, data.IGNORE, 10]


def test_camvid_splits_day_by_folder_and_dusk_by_sequence(tmp_path):
    names = {"train": ("0001TP_1", "0006R0_1", "0016E5_1"), "val": ("0016E5_2",), "test": ("0001TP_2", "Seq05VD_1")}
    for split, stems in names.items():
        for stem in stems:
            write(tmp_path / f"camvid/{split}/{stem}.png", photo())
            write(tmp_path / f"camvid/{split}annot/{stem}.png", ids(0, 10, 11))
    domains = (("camvid", "train"), ("camvid", "val"), ("camvid-dusk", "val"))
    assert [len(read(name, tmp_path, split)) for name, split in domains] == [2, 1, 2]
    assert read("camvid", tmp_path)[0][1][0, :3].tolist() == [0, 10, data.IGNORE]


def test_own_folder_needs_a_class_count_and_may_have_splits(tmp_path):
    for part in ("train/", "val/"):
        write(tmp_path / f"images/{part}a.jpg", photo())
        write(tmp_path / f"masks/{part}a.png", ids(0, 1, 2))
    assert read("folder", tmp_path, classes=3)[0][1][0, :3].tolist() == [0, 1, 2]
    assert len(read("folder", tmp_path, "val", classes=3)) == 1
    with pytest.raises(data.UserError, match="--classes"):
        read("folder", tmp_path)
    with pytest.raises(data.UserError, match=r"a.png: label values \[2\] are not"):
        read("folder", tmp_path, classes=2)
    write(tmp_path / "flat/images/b.png", photo())
    write(tmp_path / "flat/masks/b.png", ids(1))
    assert len(read("folder", tmp_path / "flat", classes=2)) == 1
    with pytest.raises(data.UserError, match="val"):  # a flat folder has no held-out part
        read("folder", tmp_path / "flat", "val", classes=2)


def test_sources_join_and_a_generated_set_needs_no_files(tmp_path, monkeypatch):
    gtav_tree(tmp_path)
    def generate(number):
        return photo(value=number), ids(number)
    toy = data.street("toy", splits={"train": range(2), "val": range(7, 9)}, generate=generate)
    monkeypatch.setitem(data.DATASETS, "toy", toy)
    items = read("gtav+toy", tmp_path)
    assert [image[0, 0, 0] for image, _ in items] == [0, 1, 2, 0, 1]
    assert [label[0, 0] for _, label in read("toy", tmp_path, "val")] == [7, 8]
    with pytest.raises(data.UserError, match="different classes"):
        data.scenes("toy+camvid", tmp_path)
    write(tmp_path / "imagenet/train/n01/a.JPEG", photo())
    assert len(data.images("imagenet+gtav", tmp_path)) == 4  # without labels anything joins


@pytest.mark.skipif(not (SHARED / "data/camvid").exists(), reason="needs the shared images")
def test_real_camvid_and_imagenet_load(tmp_path):
    root = SHARED / "data"
    assert len(data.scenes("camvid", root)) == 305
    assert len(data.scenes("camvid", root, "val")) == 171
    dusk = data.scenes("camvid-dusk", root, "val")
    image, label, _ = dusk[0]
    assert len(dusk) == 124 and image.shape == (3, 360, 480) and label.unique().max() == data.IGNORE
    proxy = data.images("imagenet", root, data.distill_transform(64))
    assert len(proxy) == 1000 and all(proxy[i][0].shape == (3, 64, 64) for i in range(0, 1000, 100))


# --- Datasets: which sample when --------------------------------------------------------------------------------------

def first_batches(dataset, steps=3, batch=4, **kwargs):
    batches = iter(data.loader(dataset, batch, seed=5, **kwargs))
    return [next(batches) for _ in range(steps)]


def test_batches_do_not_depend_on_workers_processes_or_accumulation(tmp_path):
    gtav_tree(tmp_path, 5)
    dataset = data.scenes("gtav", tmp_path, transform=data.segment_transform(16))
    alone = first_batches(dataset)
    for other in (first_batches(dataset, workers=2), first_batches(dataset, start_step=0)):
        assert all(torch.equal(a, b) for one, two in zip(alone, other) for a, b in zip(one, two))
    shares = [first_batches(dataset, world=2, rank=rank, workers=2 * rank) for rank in (0, 1)]
    micro = first_batches(dataset, steps=6, accumulate=2)
    for s in range(3):
        for k in range(3):  # image, label, draw
            assert torch.equal(torch.cat([shares[0][s][k], shares[1][s][k]]), alone[s][k])
            assert torch.equal(torch.cat([micro[2 * s][k], micro[2 * s + 1][k]]), alone[s][k])
    resumed = first_batches(dataset, steps=1, start_step=2)
    assert torch.equal(resumed[0][0], alone[2][0]) and torch.equal(resumed[0][2], torch.arange(8, 12))
    other_seed = next(iter(data.loader(dataset, 4, seed=6)))
    assert not torch.equal(other_seed[0], alone[0][0])
    with pytest.raises(data.UserError, match="--batch 4"):
        data.loader(dataset, 4, world=3)


def test_reading_an_item_leaves_the_global_random_state_alone(tmp_path):
    gtav_tree(tmp_path)
    dataset = data.scenes("gtav", tmp_path, transform=data.segment_transform(16))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    dataset[0]
    assert torch.equal(torch.rand(3), expected)


def test_an_items_crop_follows_from_its_draw_and_not_from_its_index(tmp_path):
    gtav_tree(tmp_path)
    dataset = data.images("gtav", tmp_path, lambda image, label: (torch.rand(1, 2, 2), label))
    assert torch.equal(dataset[0, 5][0], dataset[1, 5][0]) and not torch.equal(dataset[0, 5][0], dataset[0, 6][0])


def test_an_epoch_shows_every_image_once_or_a_third_of_them_three_times():
    draws = iter(data.Draws(12, 6, seed=1))
    epochs = [next(draws) + next(draws) for _ in range(2)]
    orders = [[index for index, _ in keys] for keys in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12)) and orders[0] != orders[1]
    assert [draw for keys in epochs for _, draw in keys] == list(range(24))
    draws = iter(data.Draws(12, 6, seed=1, repeats=3))
    order = [index for index, _ in next(draws) + next(draws)]
    assert order[::3] == order[1::3] == order[2::3] == orders[0][:4]


def test_a_label_fraction_is_a_fixed_subset_and_smaller_ones_lie_in_larger_ones(tmp_path):
    gtav_tree(tmp_path, 32)
    def files(labels):
        return {sample.image.name for sample in data.scenes("gtav", tmp_path, labels=labels).samples}
    assert [len(files(labels)) for labels in ("1", "1/4", "1/8", "1/16")] == [32, 8, 4, 2]
    assert files("1/16") < files("1/8") < files("1/4") and files("1/8") == files("1/8")
    for labels in ("0", "2", "many", "1/0"):
        with pytest.raises(data.UserError, match="--labels"):
            files(labels)


# --- Datasets: transforms against slow references ---------------------------------------------------------------------

def smooth_image(height=48, width=64):
    """A colourful uint8 image (3, H, W) without hard edges, so that resampling kernels agree."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + c) * 60 + np.cos(y / 5 - c) * 60 + 128 for c in range(3)]
    return torch.from_numpy(np.array(waves).round().astype(np.uint8))


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def inner_difference(image, reference, border=0):
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(reference).astype(int))
    return difference[border:difference.shape[0] - border, border:difference.shape[1] - border]


@pytest.mark.parametrize("number, name", list(enumerate((
    "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd", "AutoContrast", "Equalize", "Invert",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel"))))
def test_each_rand_augment_operation_is_timms(number, name, monkeypatch):
    timm_ops = pytest.importorskip("timm.data.auto_augment")
    image = smooth_image()
    for level in (0.5, 0.9, 0.97):
        for sign in (1, -1):
            coin = 0.1 if sign == 1 else 0.9  # timm's, for the sign
            monkeypatch.setattr(timm_ops.random, "random", lambda: coin)
            to_arguments = timm_ops.LEVEL_TO_ARG[name]
            arguments = to_arguments(level * 10, {}) if to_arguments else ()
            expected = timm_ops.NAME_TO_OP[name](pillow(image), *arguments, fillcolor=data.FILL, resample=Image.BICUBIC)
            found = data.RAND_AUGMENT[number](image, level, level * sign)
            difference = inner_difference(found, expected)
            if name in ("Rotate", "ShearX", "ShearY"):  # kernels differ a little, borders blend with the fill
                assert (difference <= 3).mean() > 0.93
            elif "Translate" in name:  # whole pixels
                assert (difference <= 12).mean() > 0.9
            else:
                assert difference.max() <= 3 and difference.mean() < 0.8


def test_rand_augment_applies_each_of_two_operations_half_the_time(monkeypatch):
    calls = []
    monkeypatch.setattr(data, "RAND_AUGMENT", tuple(
        lambda image, level, signed, i=i: (calls.append((i, level, signed)), image)[1] for i in range(15)))
    torch.manual_seed(0)
    for _ in range(3000):
        data.rand_augment(smooth_image(4, 4))
    levels = torch.tensor([level for _, level, _ in calls])
    assert abs(len(calls) / 6000 - 0.5) < 0.03 and {i for i, _, _ in calls} == set(range(15))
    assert abs(levels.mean() - 0.9) < 0.01 and abs(levels.std() - 0.05) < 0.01 and levels.max() <= 1
    assert abs(sum(signed > 0 for _, _, signed in calls) / len(calls) - 0.5) < 0.04


def test_distill_transform_crops_areas_and_ratios_in_range_and_resizes_as_pillow(monkeypatch):
    monkeypatch.setattr(data, "rand_augment", lambda image: image)
    image, boxes = smooth_image(60, 80), []
    get_params = data.RandomResizedCrop.get_params
    def remember(*args):
        boxes.append(get_params(*args))
        return boxes[-1]
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", remember)
    torch.manual_seed(0)
    for _ in range(200):
        out, _ = data.distill_transform(32, flip=0)(image)
        top, left, height, width = boxes[-1]
        assert 0.07 < height * width / 4800 <= 1 and 0.7 < width / height < 1.45
        expected = pillow(image).resize((32, 32), Image.BICUBIC, box=(left, top, left + width, top + height))
        assert inner_difference(out, expected, border=2).max() <= 2


def test_image_and_label_move_together_and_padding_is_ignored():
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 5, (9, 12)), np.ones((8, 8))).astype(np.uint8)  # (72, 96): grey level = 40 label
    image, label = torch.from_numpy(blocks * 40)[None].repeat(3, 1, 1), torch.from_numpy(blocks)
    undistorted = data.distort
    data.distort = lambda image: image
    try:
        transform, padded = data.segment_transform(64), 0
        for seed in range(60):
            torch.manual_seed(seed)
            out, classes = transform(image, label)
            assert out.shape == (3, 64, 64) and classes.shape == (64, 64) and classes.dtype == torch.uint8
            valid = classes != data.IGNORE
            agree = (out[0].float() / 40).round()[valid] == classes[valid]
            assert agree.float().mean() > 0.8  # block borders are blurred in the image
            outside = out[:, ~valid]
            assert (outside == torch.tensor(data.FILL)[:, None]).all()
            padded += bool(outside.numel())
        assert padded  # short edges 32..57 need padding
    finally:
        data.distort = undistorted


def test_short_edges_and_long_edge_are_those_of_the_recipe(monkeypatch):
    sizes = []
    monkeypatch.setattr(data, "resize", lambda image, size: sizes.append(size) or image)
    monkeypatch.setattr(data, "resize_label", lambda label, size: label)
    image = torch.zeros(3, 100, 200, dtype=torch.uint8), torch.zeros(100, 200, dtype=torch.uint8)
    for seed in range(300):
        torch.manual_seed(seed)
        data.segment_transform(512)(*image)
    official = [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024]
    assert sorted({height for _, height in sizes}) == official
    assert all(width == 2 * height for width, height in sizes)
    sizes.clear()
    wide = torch.zeros(3, 10, 40, dtype=torch.uint8), torch.zeros(10, 40, dtype=torch.uint8)
    data.segment_transform(512, short_edges=[1024])(*wide)
    assert sizes == [(2048, 512)]


def test_crops_avoid_one_class_filling_more_than_three_quarters():
    label = torch.zeros(64, 256, dtype=torch.uint8)
    label[:, 96:] = 1
    image = torch.zeros(3, 64, 256, dtype=torch.uint8)
    def share(ratio):
        above = 0
        for seed in range(100):
            torch.manual_seed(seed)
            _, crop = data.segment_transform(64, short_edges=[64], cat_max_ratio=ratio)(image, label)
            above += max((crop == 0).float().mean(), (crop == 1).float().mean()) >= 0.75
        return above
    assert share(1.01) > 60 and share(0.75) < 30  # the tenth try is kept whatever it is
    label[:] = data.IGNORE
    data.segment_transform(64)(image, label)  # nothing labelled: any crop


def test_saturation_and_hue_equal_colorsys():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 8, 8), np.uint8))
    for factor, turn in ((0.5, 0.0), (1.5, 0.0), (1.0, 0.08), (1.0, -0.1)):
        found = data.saturate(image, factor) if turn == 0 else data.F.adjust_hue(image, turn)
        for y in range(8):
            for x in range(8):
                h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
                expected = np.array(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * factor), v)) * 255
                assert np.abs(found[:, y, x].numpy() - expected).max() <= 2


def test_distortion_stays_in_range_and_each_part_comes_half_the_time():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)  # grey: saturation and hue change nothing
    torch.manual_seed(0)
    outs = torch.stack([data.distort(image)[0, 0, 0] for _ in range(2000)]).int()
    assert 0.2 < (outs == 100).float().mean() < 0.3  # neither brightness nor contrast
    assert outs.min() >= 34 - 1 and outs.max() <= 198
    only_brightness = torch.stack([data.distort(image, contrast=(1, 1))[0, 0, 0] for _ in range(1000)]).int()
    assert only_brightness.min() < 72 and only_brightness.max() > 128 and only_brightness.max() <= 132


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation():
    image = torch.tensor([0, 124, 255], dtype=torch.uint8)[None, :, None, None]
    expected = [(0 / 255 - 0.485) / 0.229, (124 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    assert torch.allclose(data.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).flatten(), torch.tensor(expected), atol=1e-6)


def test_erasing_depends_on_seed_and_draw_alone_and_hits_a_quarter_with_noise():
    x, draws = torch.full((800, 3, 32, 32), 9.0), torch.arange(800)
    erased = data.erase(x.clone(), draws, seed=3)
    hit = (erased != 9).all(1)  # (800, 32, 32), all channels at once
    assert torch.equal(hit, (erased != 9).any(1))
    assert abs(hit.any(2).any(1).float().mean() - 0.25) < 0.05
    for i in hit.any(2).any(1).nonzero().flatten().tolist():
        height, width = hit[i].any(1).sum().item(), hit[i].any(0).sum().item()
        assert hit[i].sum() == height * width  # one box
        assert 0.015 < height * width / 1024 < 0.37 and 0.2 < height / width < 4.5
    noise = erased[hit[:, None].expand_as(erased)]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    order = torch.randperm(800)
    assert torch.equal(data.erase(x.clone(), draws[order], seed=3), erased[order])
    assert not torch.equal(data.erase(x.clone(), draws, seed=4), erased)


# --- Datasets: what goes wrong ----------------------------------------------------------------------------------------

def broken(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def test_a_corrupt_training_image_is_named_and_replaced_and_too_many_stop(tmp_path, capfd):
    gtav_tree(tmp_path, 120)
    broken(tmp_path / "gtav/images/00003.png")
    dataset = data.scenes("gtav", tmp_path)
    for _ in range(2):
        image, _, draw = dataset[3, 77]
        assert image[0, 0, 0] == 4 and draw == 77  # the next image
    assert capfd.readouterr().err.count("another image takes its place") == 1  # named once
    broken(tmp_path / "gtav/images/00004.png")
    with pytest.raises(data.UserError, match="like 2 of 120 training images"):
        next(iter(data.loader(dataset, 120)))


def test_a_workers_error_is_one_line(tmp_path):
    gtav_tree(tmp_path)
    write(tmp_path / "gtav/labels/00001.png", ids(77), "P")
    with pytest.raises(data.UserError) as error:
        next(iter(data.loader(data.scenes("gtav", tmp_path), 3, workers=1)))
    assert "\n" not in str(error.value) and "00001.png: label values [77]" in str(error.value)


def test_a_corrupt_label_or_evaluation_image_stops_at_once(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"bdd100k/images/10k/{split}/a.jpg", photo())
        write(tmp_path / f"bdd100k/labels/sem_seg/masks/{split}/a.png", ids(0))
    broken(tmp_path / "bdd100k/images/10k/val/a.jpg")
    with pytest.raises(data.UserError, match="a.jpg: cannot be read as an image"):
        data.scenes("bdd100k", tmp_path, "val")[0]
    broken(tmp_path / "bdd100k/labels/sem_seg/masks/train/a.png")
    with pytest.raises(data.UserError, match="a.png: cannot be read as a label"):
        data.scenes("bdd100k", tmp_path)[0]
    write(tmp_path / "bdd100k/labels/sem_seg/masks/train/a.png", ids(0, height=5))
    with pytest.raises(data.UserError, match="a.png: 8x5, but its image is 8x6"):
        data.scenes("bdd100k", tmp_path)[0]
    write(tmp_path / "bdd100k/labels/sem_seg/masks/train/a.png", photo())
    with pytest.raises(data.UserError, match="one 8-bit channel was expected"):
        data.scenes("bdd100k", tmp_path)[0]


def test_preflight_lists_everything_wrong_writes_a_picture_and_exits_with_1(tmp_path, capsys):
    for stem in "abcdef":
        write(tmp_path / f"images/{stem}.png", photo())
        write(tmp_path / f"masks/{stem}.png", ids(0, 1))
    command = ["--data", "folder", "--root", tmp_path, "--classes", "2"]
    assert preflight(*command) == 0
    assert "folder train: 6 pairs, 0 problems" in capsys.readouterr().out
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "masks/b.png").unlink()
    broken(tmp_path / "images/c.png")
    write(tmp_path / "masks/d.png", ids(0, 9))
    write(tmp_path / "masks/e.png", ids(0, height=3))
    assert preflight(*command, "--out", tmp_path / "out.png") == 1
    out = capsys.readouterr().out
    for line in ("4 pairs, 5 problems", "masks/a.png: has no partner", "images/b.png: has no partner",
                 "c.png: cannot be read", "d.png: label values [9]", "e.png: 8x3, but its image is 8x6"):
        assert line in out
    assert Image.open(tmp_path / "out.png").width > 300


def test_training_refuses_images_or_labels_without_partner(tmp_path):
    gtav_tree(tmp_path)
    (tmp_path / "gtav/images/00001.png").unlink()
    with pytest.raises(data.UserError, match="labels/00001.png: has no partner"):
        data.scenes("gtav", tmp_path)
    assert len(data.images("gtav", tmp_path)) == 2  # distillation needs no labels


# --- Datasets: storing at training size -------------------------------------------------------------------------------

def test_a_stored_set_keeps_images_and_labels_paired_and_knows_what_it_was_made_from(tmp_path, capsys):
    for i in range(3):
        half = ids(*[7] * 10, *[26] * 10, height=12, width=20)
        write(tmp_path / f"gtav/images/{i:05}.png", np.where(half[..., None] == 7, 50 + i, 200 + i).repeat(3, 2))
        write(tmp_path / f"gtav/labels/{i:05}.png", half, "P")
    with pytest.raises(data.UserError, match="gtav-6 is not there; run python data.py"):
        data.scenes("gtav", tmp_path, cache=6)
    command = ["--data", "gtav", "--root", str(tmp_path), "--cache", "6"]
    data.main(command)
    with pytest.raises(data.UserError, match="gtav-6 exists"):
        data.main(command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gtav", "gtav-6"]  # nothing unfinished left
    for i, (image, label) in enumerate(read("gtav", tmp_path, cache=6)):
        assert image.shape == (6, 10, 3)
        assert (label[:, :5] == 0).all() and (label[:, 5:] == 13).all()
        assert (image[:, :4] < 60).all() and (image[:, 6:] > 195).all() and image[0, 9, 0] == 200 + i
    assert torch.equal(data.images("gtav", tmp_path, cache=6)[1][0], data.scenes("gtav", tmp_path, cache=6)[1][0])
    write(tmp_path / "gtav/images/00003.png", photo())
    write(tmp_path / "gtav/labels/00003.png", ids(7), "P")
    with pytest.raises(data.UserError, match="was made from other files"):
        data.images("gtav", tmp_path, cache=6)


def test_an_interrupted_store_leaves_nothing(tmp_path):
    gtav_tree(tmp_path)
    broken(tmp_path / "gtav/labels/00002.png")
    with pytest.raises(data.UserError, match="00002.png: cannot be read as a label"):
        data.main(["--data", "gtav", "--root", str(tmp_path), "--cache", "4"])
    assert [path.name for path in tmp_path.iterdir()] == ["gtav"]


# --- The toy world ----------------------------------------------------------------------------------------------------

TOY_HASHES = {  # domain, number[, jumbled]: first digits of the SHA-256 of image and label
    ("game", 0): "3359174cfe6a8e06", ("night", 1): "3f374adb0ce3a274", ("fog", 2): "323c9c8343e1f26c", ("snow", 3): "aab28b346835df1d",
    ("rain", 4): "3d9be02b7d34281d", ("wide", 5): "27d68a18c6c2d247", ("wide", 5, True): "bceacef2d36181b5"}


@pytest.mark.parametrize("scene", TOY_HASHES)
def test_a_toy_scene_is_the_same_on_every_machine(scene):
    image, label = data.toy_scene.__wrapped__(*scene)  # drawn now, not remembered
    assert image.shape == (64, 64, 3) and image.dtype == label.dtype == np.uint8 and image.std() > 10
    assert hashlib.sha256(image.tobytes() + label.tobytes()).hexdigest()[:16] == TOY_HASHES[scene]


def test_toy_seeds_and_scene_numbers_give_other_streets_and_domains_other_looks():
    scenes = [data.toy_scene("game", 0), data.toy_scene("game", 1), data.toy_scene("game", 0, seed=1)]
    assert all((a[1] != b[1]).mean() > 0.05 for a, b in itertools.combinations(scenes, 2))
    looks = [np.mean([data.toy_scene(domain, i)[0].mean((0, 1)) for i in range(20)], 0) for domain in ("game", "night", "fog", "snow", "rain")]
    assert all(np.abs(a - b).max() > 8 for a, b in itertools.combinations(looks, 2))


def test_every_toy_class_occurs_in_every_domain_and_sky_lies_above_road():
    for name in ("toy", "toy-night", "toy-fog", "toy-snow", "toy-rain", "toy-wide"):
        labels = torch.stack([label for _, label, _ in map(data.scenes(name, "nowhere", "val").__getitem__, range(30))])
        assert labels.unique().tolist() == list(range(8)) == list(range(len(data.TOY_CLASSES)))
        height = torch.arange(64).view(1, 64, 1).expand_as(labels)
        assert height[labels == 0].float().mean() < height[labels == 3].float().mean() - 20


def test_toy_labels_are_exact():
    """Without texture, light and weather an object has one colour: the label's borders are the image's."""
    look = dict(palette=np.arange(24).reshape(8, 3) / 24, jitter=0, texture=0, gain=1, tint=np.ones(3), grey=0, fog=0, fog_color=np.ones(3),
                white=0, dots=0, streaks=0, lamps=0, noise=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "toy_look", lambda rng, domain: look)
        image, label = data.toy_scene.__wrapped__("game", 3)
    assert (image == (look["palette"] * 255 + 0.5).astype(np.uint8)[label]).all()


def test_training_never_meets_a_scene_or_a_domain_that_is_evaluated():
    source, unseen = data.SETTINGS["toy"]
    for name in (source, *unseen, "toy-wide", "toy-proxy"):
        splits = data.DATASETS[name].splits
        assert not set(splits.get("train", ())) & set(splits.get("val", ()))
    for name in unseen:
        assert "train" not in data.DATASETS[name].splits and name not in {**distill.PRESETS, **segment.PRESETS}
        for labelled in (data.images, data.scenes):
            with pytest.raises(data.UserError, match=f"--data {name}: has no train split"):
                labelled(name, "nowhere")
    domains = [data.DATASETS[name].generate.args[0] for name in (source, "toy-arcade", "toy-diorama", *unseen, "toy-wide")]
    assert len(set(domains)) == len({sum(domain.encode()) for domain in domains}) == 8  # no two draw the same scenes


PAPER = dict(width=256, queries=100, layers=9, heads=8, ffn=2048, pixel="deform")


def features(batch=2, dim=32, grid=(4, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    return pyramid([torch.randn(batch, grid[0] * grid[1], dim, generator=g) for _ in range(4)], grid)


def blocks(batch, cells, cell, classes, seed=0):
    """Labels of square cells of one class each, (batch, cells cell, cells cell)."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(0, classes, (batch, cells, cells), generator=g)
    return low.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def parameters(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


# --- Decoders: matching -----------------------------------------------------------------------------------------------

def brute_force(cost):
    n, m = cost.shape
    if n > m:
        return brute_force(cost.T)
    return min(cost[range(n), list(cols)].sum() for cols in itertools.permutations(range(m), n))


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "negative"])
def test_hungarian_equals_brute_force(kind):
    rng = np.random.default_rng(0)
    shapes = [(n, m) for n in range(1, 6) for m in range(1, 7)] * 2 + [(6, 6), (7, 5), (7, 7), (5, 9), (7, 9)]
    for n, m in shapes:
        cost = {"random": rng.random((n, m)), "tied": rng.integers(0, 3, (n, m)), "constant": np.full((n, m), 0.3),
                "negative": rng.normal(size=(n, m)) * 10.0 ** rng.integers(-6, 7)}[kind]
        rows, cols = hungarian(cost)
        assert len(rows) == len(cols) == min(n, m) == len(set(rows.tolist())) == len(set(cols.tolist()))
        assert (np.diff(rows) > 0).all()
        assert cost[rows, cols].sum() == pytest.approx(brute_force(cost), rel=1e-9)


def test_hungarian_proves_itself_by_a_transposed_and_a_permuted_run_on_19_by_100():
    rng = np.random.default_rng(1)
    cost = rng.random((1, 100)) + 0.1 * rng.random((19, 100))
    best = cost[hungarian(cost)].sum()
    assert cost.T[hungarian(cost.T)].sum() == pytest.approx(best)
    shuffled = cost[rng.permutation(19)][:, rng.permutation(100)]
    assert shuffled[hungarian(shuffled)].sum() == pytest.approx(best)


def test_hungarian_is_fast_when_all_rows_want_the_same_columns():
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(20):
        cost = rng.random((1, 100)) + 0.1 * rng.random((19, 100))
        start = time.perf_counter()
        hungarian(cost)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.020


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hungarian_refuses_costs_that_are_not_finite(bad):
    cost = np.zeros((3, 4))
    cost[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        hungarian(cost)


# --- Decoders: losses against the formulas, one mask, one pixel set at a time -----------------------------------------

def slow_loss(decoder, outputs, label):
    """Every pixel, every layer, image and mask in a loop; matching by brute force over the masks' own pixels."""
    K, total, L = decoder.num_classes, 0, len(outputs["logits"])
    masks = torch.einsum("lbqc,bchw->lbqhw", outputs["embed"], outputs["pixels"])
    present = [[k for k in range(K) if (image == k).any()] for image in label]
    num_masks = max(1, sum(map(len, present)))

    def weigh(image):
        return (image != 255).float() if decoder.void == "ignore" else torch.ones_like(image, dtype=torch.float)

    def mask_losses(x, t, w):  # t, w in 0..1, and t <= w
        p = 1 / (1 + torch.exp(-x))
        bce = (-t * torch.log(p) - (w - t) * torch.log(1 - p)).sum() / w.sum().clamp(min=1e-6)
        dice = 1 - (2 * (p * t).sum() + 1) / ((p * w).sum() + t.sum() + 1)
        return bce, dice

    for l in range(L):
        ce, ce_weight = 0, 0
        for b, image in enumerate(label):
            cost = torch.zeros(len(present[b]), masks.shape[2])
            for i, k in enumerate(present[b]):
                t, w = ((y[None, None], masks.shape[-2:]) for y in ((image == k).float(), weigh(image)))
                t, w = (F.interpolate(*y, mode="bilinear", align_corners=False)[0, 0] for y in (t, w))
                for q in range(masks.shape[2]):
                    bce, dice = mask_losses(masks[l, b, q], t, w)
                    cost[i, q] = -2 * outputs["logits"][l, b, q].softmax(-1)[k] + 5 * bce + 5 * dice
            choices = itertools.permutations(range(masks.shape[2]), len(present[b]))
            chosen = min(choices, key=lambda cols: sum(cost[i, q].item() for i, q in enumerate(cols)))
            says = dict(zip(chosen, present[b]))
            for q in range(masks.shape[2]):
                weight = 1.0 if q in says else 0.1
                ce = ce - weight * outputs["logits"][l, b, q].log_softmax(-1)[says.get(q, K)]
                ce_weight += weight
            for q, k in says.items():
                x = F.interpolate(masks[l, b, q][None, None], size=image.shape, mode="bilinear")[0, 0]
                bce, dice = mask_losses(x, (image == k).float(), weigh(image))
                total = total + 5 * bce / num_masks + 5 * dice / num_masks
        total = total + 2 * ce / ce_weight
    return total


@pytest.mark.parametrize("void", ["negative", "ignore"])
@pytest.mark.parametrize("cell", [4, 8])  # labels as large as the masks (16 x 16), and larger
def test_loss_and_matching_equal_a_slow_reference(void, cell):
    torch.manual_seed(0)
    decoder = MaskDecoder(32, 3, width=32, queries=5, layers=2, ffn=32, void=void)
    outputs = decoder(features())
    label = blocks(2, 4, cell, 3)
    label[0, :5], label[1, :, :7], label[1][label[1] == 2] = 255, 255, 1
    fast, slow = decoder.loss(outputs, label)["loss"], slow_loss(decoder, outputs, label)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    weights = [p for p in decoder.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(fast, weights, retain_graph=True), torch.autograd.grad(slow, weights)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_sampling_at_all_pixel_centres_is_resizing():
    x = torch.randn(2, 3, 5, 7)
    y, x_ = torch.meshgrid((torch.arange(10) + 0.5) / 10, (torch.arange(14) + 0.5) / 14, indexing="ij")
    points = torch.stack([x_, y], -1).reshape(1, -1, 2).expand(2, -1, -1)
    torch.testing.assert_close(sample(x, points).view(2, 3, 10, 14), resize(x, (10, 14)))


def test_point_losses_equal_the_dense_ones_when_the_points_are_all_pixels(monkeypatch):
    torch.manual_seed(0)
    decoder = MaskDecoder(32, 3, width=32, queries=5, layers=1, ffn=32, points=32 * 32, void="ignore")
    outputs, label = decoder(features()), blocks(2, 4, 8, 3)
    label[0, :3] = 255
    dense = decoder.loss(outputs, label)
    decoder.points = 32 * 32 - 1  # the sampled branch, given every pixel in another order
    order = torch.randperm(32 * 32)
    points = torch.stack([(order % 32 + 0.5) / 32, (order // 32 + 0.5) / 32], -1)
    monkeypatch.setattr(decoder, "uncertain_points", lambda x, generator: points.repeat(len(x), 1, 1))
    for name, value in decoder.loss(outputs, label).items():
        torch.testing.assert_close(value, dense[name], rtol=1e-5, atol=1e-5)


def test_points_are_the_most_uncertain_candidates_and_repeat_with_the_generator():
    decoder = MaskDecoder(32, 3, width=32, queries=3, points=100)
    ramp = torch.linspace(-1, 1, 64).expand(2, 1, 64, 64)  # uncertain at x = 1/2
    a, b = (decoder.uncertain_points(ramp, torch.Generator().manual_seed(7)) for _ in range(2))
    assert a.shape == (2, 100, 2) and torch.equal(a, b)
    off = (a[..., 0] - 0.5).abs()
    assert off[:, :75].max() < 0.25 and off[:, 75:].max() > 0.25  # 75 of 300 candidates: a quarter of the width, about
    outputs, label = decoder(features()), blocks(2, 4, 8, 3)
    losses = [decoder.loss(outputs, label, torch.Generator().manual_seed(s))["loss"] for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_void_pixels_count_as_outside_every_mask_or_not_at_all():
    torch.manual_seed(0)
    label = blocks(1, 4, 4, 2)
    label[:, :8] = 255
    for void in ("negative", "ignore"):
        decoder = MaskDecoder(32, 2, width=32, queries=2, layers=1, ffn=32, void=void)
        outputs = decoder(features(1))
        pixels = outputs["pixels"].detach().requires_grad_()
        decoder.loss({**outputs, "pixels": pixels}, label)["loss"].backward()
        assert (pixels.grad[:, :, :8] == 0).all() == (void == "ignore")


def test_an_image_without_any_class_gives_a_finite_loss_and_gradient():
    sampled = MaskDecoder(32, 3, width=32, points=50, void="ignore")
    for decoder in (MaskDecoder(32, 3, width=32), sampled, Linear(32, 3)):
        loss = decoder.loss(decoder(features()), torch.full((2, 16, 16), 255))["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in decoder.parameters())


# --- Decoders: attention ----------------------------------------------------------------------------------------------

def test_deformable_attention_equals_a_slow_loop():
    torch.manual_seed(0)
    heads, d, sizes = 2, 3, [(2, 3), (4, 5), (3, 1)]
    attn = DeformableAttention(heads * d, heads).double()
    torch.nn.init.normal_(attn.offsets.weight)
    torch.nn.init.normal_(attn.weights.weight)
    N = sum(h * w for h, w in sizes)
    query, value = torch.randn(2, 2, N, heads * d).double()
    v = attn.value(value)

    def read(b, head, level, x, y):  # bilinear at pixel coordinates (x, y), 0 outside the map
        (h, w), start = sizes[level], sum(h * w for h, w in sizes[:level])
        total = torch.zeros(d).double()
        for j in (math.floor(y), math.floor(y) + 1):
            for i in (math.floor(x), math.floor(x) + 1):
                if 0 <= j < h and 0 <= i < w:
                    pixel = v[b, start + j * w + i, head * d : head * d + d]
                    total = total + (1 - abs(x - i)) * (1 - abs(y - j)) * pixel
        return total

    places = [((i + 0.5) / w, (j + 0.5) / h) for h, w in sizes for j in range(h) for i in range(w)]
    out = torch.zeros(2, N, heads * d).double()
    for b, n, head in itertools.product(range(2), range(N), range(heads)):
        weight = attn.weights(query[b, n]).view(heads, 12)[head].softmax(0)
        offset = attn.offsets(query[b, n]).view(heads, 3, 4, 2)[head]
        for level, point in itertools.product(range(3), range(4)):
            dx, dy = offset[level, point].tolist()
            x, y = places[n][0] * sizes[level][1] + dx - 0.5, places[n][1] * sizes[level][0] + dy - 0.5
            out[b, n, head * d : head * d + d] += weight[level * 4 + point] * read(b, head, level, x, y)
    torch.testing.assert_close(attn(query, value, sizes), attn.proj(out))


def test_a_query_reads_inside_its_mask_and_everywhere_if_the_mask_is_empty():
    masks = torch.tensor([[[2.0, -1.0, 0.5], [-1.0, -2.0, -3.0]]])
    assert attended(masks).tolist() == [[[True, False, True], [True, True, True]]]


def test_masks_made_small_equal_masks_of_small_pixels():
    embed, pixels = torch.randn(1, 5, 8), torch.randn(1, 8, 16, 16)
    large = resize(torch.einsum("bqc,bchw->bqhw", embed, pixels), (4, 4)).flatten(2)
    torch.testing.assert_close(embed @ resize(pixels, (4, 4)).flatten(2), large, rtol=1e-4, atol=1e-5)


# --- Decoders: outputs and sizes --------------------------------------------------------------------------------------

def test_feature_layers_follow_the_depth():
    assert [feature_layers(d) for d in (12, 24, 4, 6)] == [[3, 5, 7, 11], [7, 11, 15, 23], [0, 1, 2, 3], [1, 2, 3, 5]]


def test_pyramid_keeps_rows_and_columns_apart():
    outs = [torch.arange(6.0).view(1, 6, 1)] * 4
    feats = pyramid(outs, (2, 3))
    assert [tuple(x.shape[-2:]) for x in feats] == [(8, 12), (4, 6), (2, 3), (1, 1)]
    assert feats[2][0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_parameters_are_those_of_the_paper():
    assert parameters(MaskDecoder(384, 19, **PAPER)) == pytest.approx(19.9, abs=0.05)  # 41.9 M with ViT-S, 22.0 M
    assert parameters(MaskDecoder(768, 19, **PAPER)) == pytest.approx(20.4, abs=0.15)  # 106.8 M with ViT-B, 86.4 M
    assert parameters(SemFPN(384, 19)) == pytest.approx(11.2, abs=0.05)  # 33.2 M with the ViT-S


def test_multiply_adds_cover_convolution_einsum_and_attention():
    class Everything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x):  # (2, 3, 4, 4)
            x = self.conv(x).flatten(2)  # 2 * 16 * 5 * 27
            x = torch.einsum("bcn,bdn->bcd", x, x)[:, None]  # 2 * 5 * 5 * 16
            return F.scaled_dot_product_attention(x, x, x)  # 2 * 2 * 5 * 5 * 5

    multiply_adds = 2 * 16 * 5 * 27 + 2 * 5 * 5 * 16 + 2 * 2 * 5 * 5 * 5
    everything, x = Everything(), torch.randn(2, 3, 4, 4)
    assert data.count_flops(lambda: everything(x)) == 2 * multiply_adds


def test_every_decoder_has_the_same_interface():
    label = blocks(2, 4, 8, 3)
    for decoder in (MaskDecoder(32, 3, width=32), MaskDecoder(32, 3, width=32, pixel="deform", pixel_layers=1),
                    SemFPN(32, 3, width=32, channels=32), Linear(32, 3)):
        outputs = decoder(features())
        losses = decoder.loss(outputs, label, generator=torch.Generator().manual_seed(0))
        losses["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
        scores = decoder.scores(outputs)
        assert scores.shape == (2, 3, 16, 16) and scores.min() >= 0


def test_losses_and_scores_are_fp32_under_autocast():
    label = blocks(2, 4, 8, 3)
    for decoder in (MaskDecoder(32, 3, width=32), SemFPN(32, 3, width=32, channels=32), Linear(32, 3)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = decoder(features())
            assert decoder.loss(outputs, label)["loss"].dtype == decoder.scores(outputs).dtype == torch.float32


def test_odd_grids_work():
    for decoder in (MaskDecoder(32, 3, width=32, queries=4), SemFPN(32, 3, width=32, channels=32), Linear(32, 3)):
        assert decoder.scores(decoder(features(grid=(5, 3)))).shape == (2, 3, 20, 12)


def test_scores_leave_no_object_out():
    decoder = MaskDecoder(32, 2, width=32, queries=2)
    outputs = {"logits": torch.tensor([[[[9.0, 0, 0], [0, 0, 9.0]]]]), "embed": torch.tensor([[[[1.0], [1.0]]]]),
               "pixels": torch.tensor([[[[8.0, -8.0]]]])}
    scores = decoder.scores(outputs)
    assert scores[0, 0, 0, 0] > 0.99 and scores[0, 0, 0, 1] < 0.01 and scores[0, 1].max() < 0.01


def test_order_of_queries_and_of_images_does_not_matter():
    torch.manual_seed(0)
    decoder, label = MaskDecoder(32, 3, width=32, queries=6), blocks(3, 4, 8, 3)
    feats = features(3)
    outputs = decoder(feats)
    loss = decoder.loss(outputs, label)["loss"]
    order = torch.tensor([2, 0, 1])
    turned = decoder([x[order] for x in feats])
    torch.testing.assert_close(decoder.loss(turned, label[order])["loss"], loss)
    queries = torch.randperm(6)
    mixed = {**outputs, "logits": outputs["logits"][:, :, queries], "embed": outputs["embed"][:, :, queries]}
    torch.testing.assert_close(decoder.loss(mixed, label)["loss"], loss)
    torch.testing.assert_close(decoder.scores(mixed), decoder.scores(outputs))


def test_bad_arguments_are_refused_in_words():
    for arguments, words in ((dict(queries=2), "2 queries for 3 classes"), (dict(void="drop"), "void 'drop'"),
                             (dict(pixel="unet"), "pixel decoder 'unet'")):
        with pytest.raises(ValueError, match=words):
            MaskDecoder(32, 3, **arguments)


def overfit(decoder, feats, label, steps, lr, batch=8):
    """Train a decoder on eight images, `batch` at a time; the share of their labelled pixels that it then gets right."""
    optimizer = torch.optim.AdamW(decoder.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) ** 0.9
        part = (step * batch + torch.arange(batch)) % 8
        loss = decoder.loss(decoder([x[part] for x in feats]), label[part])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = decoder.scores(decoder(feats), label.shape[1:]).argmax(1) == label
    return right[label != data.IGNORE].float().mean().item()


@pytest.mark.parametrize("pixel", ["fpn", "deform"])
def test_mask_decoder_overfits_eight_images(pixel):
    decoder = MaskDecoder(32, 5, width=32, queries=8, ffn=64, pixel=pixel, pixel_layers=1, pixel_ffn=64)
    label = blocks(8, 4, 8, 5)
    label[:, 12:20, 12:20] = (label[:, 12:20, 12:20] + 1) % 5
    assert overfit(decoder, features(8, 32), label, 120, 6e-3) > 0.95


@pytest.mark.skipif(not (AUGREG_TINY.exists() and (SHARED / "data/camvid").exists()), reason="needs the shared images and weights")
def test_mask_decoder_overfits_eight_camvid_images_on_the_features_of_a_frozen_vit():
    def small(image, label):
        return data.resize(image, (256, 192)), data.resize_label(label, (256, 192))
    dataset, encoder = data.scenes("camvid", SHARED / "data", transform=small), qsd.load_vit(AUGREG_TINY)
    images, label = (torch.stack([dataset[i][part] for i in range(8)]) for part in (0, 1))
    segmenter = segment.Segmenter(encoder, MaskDecoder(192, dataset.num_classes, layers=1, points=512, void="ignore"))
    feats = segmenter.features(data.normalize(images, encoder.mean, encoder.std))  # computed once: only the decoder is trained
    right = overfit(segmenter.decoder, feats, label, 400, 3e-3, batch=2)
    assert right > 0.95, right  # masks of a quarter of the size, as these are, cannot say more than 97 %


# --- mIoU -------------------------------------------------------------------------------------------------------------

def test_miou_equals_a_case_worked_by_hand():
    label = torch.tensor([[0, 0, 0, 255], [1, 1, 255, 1]])
    pred = torch.tensor([[0, 0, 1, 2], [1, 0, 3, 2]])  # class 2 is only predicted; 3 only where nothing counts
    conf = evaluation.confusion(pred, label, 4)
    assert conf.tolist() == [[2, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = evaluation.iou(conf)
    assert iou[:3].tolist() == pytest.approx([2 / 4, 1 / 4, 0]) and iou[3].isnan()
    assert iou.nanmean().item() == pytest.approx(0.25)


def test_miou_equals_slow_counting_over_several_images():
    rng = np.random.default_rng(0)
    for K in (2, 5, 19):
        label, pred = rng.integers(0, K, (3, 9, 7)), rng.integers(0, max(1, K - 1), (3, 9, 7))
        label[rng.random(label.shape) < 0.2] = 255
        conf = sum(evaluation.confusion(torch.from_numpy(p), torch.from_numpy(y), K) for p, y in zip(pred, label))
        for k, iou in enumerate(evaluation.iou(conf).tolist()):
            union = (((pred == k) | (label == k)) & (label != 255)).sum()
            want = ((pred == k) & (label == k)).sum() / union if union else math.nan
            assert iou == pytest.approx(want, nan_ok=True)


class Lens(torch.nn.Module):
    """A model whose scores in a window depend on the place within it, so that every overlap shows."""
    def __init__(self, window, constant=None):
        super().__init__()
        self.weight, self.constant, self.decoder = torch.rand(window, window), constant, self
        self.encoder = argparse.Namespace(patch_size=4)

    def forward(self, x):
        return x

    def scores(self, x, size):
        assert tuple(x.shape[2:]) == tuple(size)
        if self.constant is not None:
            return torch.full_like(x[:, :2], self.constant)
        return x[:, :2] * self.weight[:size[0], :size[1]]


@pytest.mark.parametrize("height, width, window, stride", [(16, 16, 16, 11), (20, 37, 16, 11), (33, 16, 16, 5), (50, 41, 16, 16)])
def test_the_sliding_window_equals_a_slow_loop_that_counts_overlaps(height, width, window, stride):
    x, model = torch.randn(2, 3, height, width), Lens(window)
    total, count = torch.zeros(2, 2, height, width), torch.zeros(height, width)
    for i in range(math.ceil((height - window) / stride) + 1):
        for j in range(math.ceil((width - window) / stride) + 1):
            top, left = min(i * stride, height - window), min(j * stride, width - window)  # flush with the border
            for a, b in np.ndindex(window, window):
                total[:, :, top + a, left + b] += x[:, :2, top + a, left + b] * model.weight[a, b]
                count[top + a, left + b] += 1
    assert count.min() >= 1
    torch.testing.assert_close(evaluation.slide(model, x, window, stride), total / count)


def test_a_constant_model_gives_a_constant_map_without_seams():
    for constant in (0.5, 0.3):
        scores = evaluation.slide(Lens(16, constant), torch.randn(1, 3, 45, 61), 16, 11)
        torch.testing.assert_close(scores, torch.full((1, 2, 45, 61), constant), rtol=3e-7, atol=0)


def test_an_image_smaller_than_the_window_is_padded_on_the_right_and_below():
    model = Lens(16)
    for height, width in ((10, 7), (10, 40)):
        x = torch.randn(1, 3, height, width)
        padded = F.pad(x, (0, max(0, 16 - width), 0, 6))
        want = evaluation.slide(model, padded, 16, 11)[:, :, :height, :width]
        assert torch.equal(evaluation.slide(model, x, 16, 11), want) and want.shape[2:] == (height, width)


def test_whole_images_are_padded_to_whole_patches_and_flips_are_averaged():
    model, x = Lens(64), torch.randn(1, 3, 10, 15)
    whole = evaluation.predict(model, x, 64, whole=True)
    torch.testing.assert_close(whole, x[:, :2] * model.weight[:10, :15])
    both = evaluation.predict(model, x, 64, whole=True, flip=True)
    mean = (whole + (x.flip(3)[:, :2] * model.weight[:10, :15]).flip(3)) / 2
    torch.testing.assert_close(both / both.sum(), mean / mean.sum())  # their sum is as good
    x = torch.randn(1, 3, 700, 512)
    model = Lens(512)
    assert torch.equal(evaluation.predict(model, x, 512), evaluation.slide(model, x, 512, 341))  # the official stride


# --- Runs: flags ------------------------------------------------------------------------------------------------------

SCRIPTS = {"distill.py": distill, "segment.py": segment, "eval.py": evaluation, "data.py": data}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_is_a_flag_with_a_help_text_that_tells_its_default(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "2000")  # one flag per line
    with pytest.raises(SystemExit) as stop:
        data.configure(SCRIPTS[script].Config, {}, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(SCRIPTS[script].Config):
        text = re.search(rf"^ +--{field.name} \[?X\]? +(\S.*) \(default {re.escape(str(field.default))}\)$", shown, re.M)
        assert text and len(text[1]) >= 4, field.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_is_read_by_the_code(script):
    read = "".join((HERE / name).read_text() for name in {script, "data.py", *(["qsd.py"] if script in ("distill.py", "segment.py") else [])})
    for field in dataclasses.fields(SCRIPTS[script].Config):
        assert re.search(rf"\b(cfg|c|config)\.{field.name}\b", read), field.name


def test_the_command_line_goes_before_the_preset_and_the_preset_before_the_default():
    def configure(*argv):
        return data.configure(distill.Config, distill.PRESETS, list(argv))
    assert distill.Config.lr not in (distill.PRESETS["toy-proxy"]["lr"], 7.0)
    assert configure("--data", "gtav").lr == distill.Config.lr
    assert configure("--data", "toy-proxy").lr == distill.PRESETS["toy-proxy"]["lr"]
    assert configure("--data", "toy-proxy", "--lr", "7").lr == 7.0
    assert configure("--data", "toy-proxy+gtav").lr == distill.PRESETS["toy-proxy"]["lr"]
    cfg = configure("--pretrained", "no", "--keep_heads", "--student_depth", "3", "--scale", "cosine", "--budget", "2h")
    assert (cfg.pretrained, cfg.keep_heads, cfg.student_depth, cfg.scale, cfg.budget) == (False, True, 3, "cosine", "2h")
    assert configure("--student_depth", "none").student_depth is None


@pytest.mark.parametrize("argv, says", [
    (["--pretrained", "maybe"], "--pretrained: 'maybe' is none of yes, no"), (["--scale", "two"], "--scale: 'two' is none of one, sqrt, cosine"),
    (["--batch", "x"], "--batch: 'x' is no int"), (["--lr", ""], "--lr: '' is no float"), (["--lrr", "1"], "arguments: --lrr"),
    (["--see", "1"], "arguments: --see")])
def test_a_wrong_flag_or_value_is_refused_in_words(argv, says):
    with pytest.raises(data.UserError) as error:
        data.configure(distill.Config, {}, argv)
    assert says in str(error.value) and "\n" not in str(error.value) and "functools" not in str(error.value)


def test_budgets_are_steps_epochs_time_or_flops():
    budgets = {"600": ("steps", 600), "3ep": ("steps", 30), "0.5ep": ("steps", 5), "2h": ("seconds", 7200), "1.5m": ("seconds", 90),
               "45s": ("seconds", 45), "3e18flop": ("flops", 3e18)}
    assert {text: data.parse_budget(text, 10) for text in budgets} == budgets
    for text in ("0", "-3", "many", "3 h", "", "5d"):
        with pytest.raises(data.UserError, match="--budget"):
            data.parse_budget(text, 10)


def test_the_learning_rate_follows_the_fraction_of_the_budget():
    cfg = distill.Config(lr=5e-4, lr_min=1e-5, batch=128, warmup=0.1)
    found = [distill.learning_rate(cfg, fraction) for fraction in (0, 0.05, 0.1, 0.55, 1)]
    peak = 5e-4 * 128 / 512
    assert found == pytest.approx([0, peak / 2, peak, (peak + 1e-5) / 2, 1e-5])
    assert distill.learning_rate(dataclasses.replace(cfg, lr_rule="constant"), 0.1) == pytest.approx(5e-4)


def test_weights_decay_as_in_the_official_recipes():
    learner = distill.Learner(qsd.load_vit("toy_small"), torch.nn.Linear(4, 4))
    decayed, still = distill.weight_decay_groups(learner, 0.05)
    assert decayed["weight_decay"] == 0.05 and still["weight_decay"] == 0 and all(p.ndim == 1 for p in still["params"])
    assert len(decayed["params"]) + len(still["params"]) == len(list(learner.parameters()))
    assert any(p is learner.student.pos_embed for p in decayed["params"])
    cfg = segment.Config(lr=1.0, lr_backbone=0.1, freeze=False)
    learner = segment.Learner(segment.Segmenter(qsd.load_vit("toy_small"), MaskDecoder(64, 3), frozen=False), None, cfg)
    group_of = {id(p): group for group in segment.parameter_groups(learner, cfg) for p in group["params"]}
    for name, lr, decay in (("segmenter.encoder.blocks.0.mlp.fc1.bias", 0.1, 0.05), ("segmenter.encoder.norm.weight", 0.1, 0),
                            ("segmenter.encoder.pos_embed", 0.1, 0.05), ("segmenter.decoder.query", 1, 0),
                            ("segmenter.decoder.pixel_decoder.laterals.0.1.weight", 1, 0), ("segmenter.decoder.mask_embed.0.weight", 1, 0.05),
                            ("segmenter.decoder.pixel_decoder.embed.0.weight", 1, 0.05),
                            ("segmenter.decoder.classify.bias", 1, 0.05), ("segmenter.decoder.level_embed", 1, 0)):
        group = group_of[id(learner.get_parameter(name))]
        assert (group["lr"], group["weight_decay"]) == (lr, decay), name


# --- Runs: whole ones in the toy world, in this process ---------------------------------------------------------------

@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A segmenter of two training steps: its encoder is the teacher of all runs below."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    segment.main(f"--data toy-wide --encoder toy_base --freeze no --decoder linear --batch 4 --budget 2 --workers 0 --out {out}".split())
    return out / "segmenter.pt"


@pytest.fixture(scope="session")
def student(teacher):
    """A student.pt of three distillation steps in the toy world."""
    out = teacher.parent.parent / "student"
    distill.main(f"--data toy-proxy --teacher {teacher} --batch 4 --budget 3 --workers 0 --log_every 1 --out {out}".split())
    return out / "student.pt"


EACH = "--save_minutes 0"  # a checkpoint after each step
FEW = data.toy("game", train=1000, val=3)


def distilling(teacher, out, budget=6, more=""):
    return f"--data toy --teacher {teacher} --batch 4 --budget {budget} --workers 0 --log_every 1 --out {out} {more}".split()


def segmenting(encoder, out, budget=6, more=""):
    return f"--data toy --encoder {encoder} --batch 4 --budget {budget} --workers 0 --log_every 1 --out {out} {more}".split()


def weights(path):
    return {key: p for key, p in torch.load(path, weights_only=True)["model"].items()}


def same(a, b):
    """Whether two checkpoints hold the same weights, bit for bit."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def records(out):
    """The lines of a run's log after its header."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]


def losses_of(out):
    """The lines of a run's log without the times in them."""
    drop = ("seconds", "images_per_s", "data_wait", "peak_gb", "eta_s")
    return [{k: v for k, v in line.items() if k not in drop} for line in records(out)]


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def steps_of(main, argv, terminate=0):
    """Run main; how many optimiser steps it took. In step number `terminate` it gets a SIGTERM."""
    step, taken = data.step, []

    def counted(*args):
        taken.append(1)
        if len(taken) == terminate:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "step", counted)
        main(argv)
    return len(taken)


def interrupted(main, argv, steps):
    """Run main, which a SIGTERM ends after so many steps."""
    with pytest.raises(SystemExit) as stop:
        steps_of(main, argv, steps)
    assert stop.value.code == 128 + signal.SIGTERM


def test_a_run_leaves_its_log_its_result_and_nothing_else(teacher, student):
    assert sorted(path.name for path in student.parent.iterdir()) == ["log.jsonl", "loss.png", "student.pt"]
    assert sorted(path.name for path in teacher.parent.iterdir()) == ["log.jsonl", "loss.png", "segmenter.pt"]
    header = json.loads((student.parent / "log.jsonl").read_text().splitlines()[0])
    assert header["config"]["lr"] == distill.PRESETS["toy-proxy"]["lr"] and header["torch"] == torch.__version__
    lines = records(student.parent)
    assert [line["step"] for line in lines] == [1, 2, 3] and {"loss", "L_feat", "L_mask", "L_cls", "lr", "images_per_s"} <= set(lines[0])
    assert all(line["loss"] == pytest.approx(line["L_feat"] + line["L_mask"] + line["L_cls"], abs=1e-5) for line in lines)
    assert lines[0]["lr"] == distill.PRESETS["toy-proxy"]["lr"] > lines[1]["lr"] > lines[2]["lr"]


def test_student_pt_has_exactly_timms_keys_and_loads_bit_for_bit(student):
    saved = torch.load(student, weights_only=True)
    loaded = qsd.load_vit(student)
    assert loaded.config == saved["encoder"] and torch.equal(loaded.mask_token, saved["mask_token"])
    state = loaded.state_dict()
    del state["mask_token"]
    assert state.keys() == saved["model"].keys() and all(torch.equal(state[key], p) for key, p in saved["model"].items())
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=0).eval()
    assert model.state_dict().keys() == saved["model"].keys()
    model.load_state_dict(saved["model"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), loaded.eval()(x)[0], rtol=1e-5, atol=1e-5)


def test_a_second_stage_starts_from_the_firsts_student_and_inherits_its_ledger(teacher, student, tmp_path):
    first = torch.load(student, weights_only=True)
    distill.main(distilling(teacher, tmp_path / "b", 1, f"--student {student} --keep_heads --lr 0 --lr_min 0"))
    second = torch.load(tmp_path / "b/student.pt", weights_only=True)
    assert same(student, tmp_path / "b/student.pt")
    assert all(torch.equal(p, second["objective"][key]) for key, p in first["objective"].items())
    distill.main(distilling(teacher, tmp_path / "c", 1, f"--student {student} --lr 0 --lr_min 0"))
    fresh = torch.load(tmp_path / "c/student.pt", weights_only=True)["objective"]
    assert not torch.equal(fresh["feat.phi.1.weight"], first["objective"]["feat.phi.1.weight"])  # official: fresh heads
    segment.main(segmenting(tmp_path / "b/student.pt", tmp_path / "d", 1))
    ledger = torch.load(tmp_path / "d/segmenter.pt", weights_only=True)["ledger"]
    assert [(stage["script"], stage["data"], stage["steps"], stage["images"]) for stage in ledger] == [
        ("distill", "toy-proxy", 3, 12), ("distill", "toy", 1, 4), ("segment", "toy", 1, 4)]
    assert all(stage["flops"] > 0 and stage["seconds"] > 0 for stage in ledger)


def test_no_gradient_reaches_the_teacher_and_it_sees_what_the_student_sees(teacher, tmp_path, monkeypatch):
    seen = []

    class Spy(qsd.GKD):
        def forward(self, student, x, s, t, noise):
            seen.append((x, t))
            return super().forward(student, x, s, t, noise)
    monkeypatch.setitem(qsd.LOSSES, "qsd", Spy)
    distill.main(distilling(teacher, tmp_path / "a", 1))
    x, t = seen[-1]
    assert not t[0].requires_grad and not t[1].requires_grad
    alone = qsd.load_vit(teacher).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(x)[1], t[1])


@pytest.mark.parametrize("loss", qsd.LOSSES)
def test_every_objective_resumes_to_the_bits_of_an_uninterrupted_run(loss, teacher, tmp_path):
    whole, parts = (distilling(teacher, tmp_path / name, 4, f"--loss {loss}") for name in ("whole", "parts"))
    distill.main(whole)
    interrupted(distill.main, parts, 2)
    assert steps_of(distill.main, parts) == 2
    assert same(tmp_path / "whole/student.pt", tmp_path / "parts/student.pt")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts") and len(records(tmp_path / "parts")) == 4


@pytest.mark.parametrize("more", ["", "--freeze no", "--freeze no --kd 1 --teacher {teacher} --loss vitkd",
                                  "--freeze no --kd_logits 1 --teacher {teacher} --decoder linear", "--points 100", "--val_every 1",
                                  "--data toy+toy-arcade --labels 1/4"])
def test_stage_2_and_its_baselines_resume_to_the_bits_of_an_uninterrupted_run(more, teacher, student, tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "toy", FEW)
    whole, parts = (segmenting(student, tmp_path / name, 3, more.format(teacher=teacher)) for name in ("whole", "parts"))
    segment.main(whole)
    interrupted(segment.main, parts, 1)
    assert steps_of(segment.main, parts) == 2
    assert {path.name for path in (tmp_path / "whole").glob("*.pt")} == {"segmenter.pt", *(["best.pt"] if "val" in more else [])}
    assert all(same(path, tmp_path / "parts" / path.name) for path in (tmp_path / "whole").glob("*.pt"))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


def test_validation_while_training_is_logged_and_keeps_the_best(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "toy", data.toy("game", train=100, val=5))
    segment.main(segmenting(teacher, tmp_path / "a", 2, "--val_every 2"))
    logged = [line["val_miou"] for line in records(tmp_path / "a") if "val_miou" in line]
    saved = segment.load_segmenter(tmp_path / "a/segmenter.pt")
    measured = evaluation.measure("a", *saved, evaluation.Config(data="toy"), torch.device("cpu"))
    assert logged == [pytest.approx(measured["toy"], abs=0.01)]
    scores = iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(segment, "iou", lambda conf: torch.tensor([next(scores)]))
    segment.main(segmenting(teacher, tmp_path / "b", 6, "--val_every 2"))
    assert [(line["step"], line["val_miou"]) for line in records(tmp_path / "b") if "val_miou" in line] == [(2, 30), (4, 50), (6, 40)]
    assert [torch.load(tmp_path / "b" / name, weights_only=True)["ledger"][-1]["steps"] for name in ("best.pt", "segmenter.pt")] == [4, 6]


@pytest.mark.parametrize("main, command, result", [(distill.main, distilling, "student.pt"), (segment.main, segmenting, "segmenter.pt")])
def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(main, command, result, teacher, tmp_path, capsys):
    whole, parts = (command(teacher, tmp_path / name, 5, EACH) for name in ("whole", "parts"))
    main(whole)
    interrupted(main, parts, 3)
    last = tmp_path / "parts/last.pt"
    last.write_bytes(last.read_bytes()[:len(last.read_bytes()) // 2])
    assert steps_of(main, parts) == 3  # prev.pt was after step 2
    assert "last.pt is damaged" in capsys.readouterr().err
    assert same(tmp_path / "whole" / result, tmp_path / "parts" / result)
    assert [line["step"] for line in records(tmp_path / "parts")] == [1, 2, 3, 4, 5]


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    data.save(path, dict(step=1))
    data.save(path, dict(step=2), keep=True)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.UserError, match="last.pt could not be written .*No space left"):
        data.save(path, dict(step=3), keep=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "prev.pt"]
    assert [torch.load(tmp_path / name)["step"] for name in ("last.pt", "prev.pt")] == [2, 1]


def spoil(monkeypatch, bad):
    """Make the pixels of the steps in `bad` NaN (1 is the first; the cost is measured before)."""
    calls, normalize = itertools.count(), data.normalize
    monkeypatch.setattr(data, "normalize", lambda *args: normalize(*args) * (math.nan if next(calls) in bad else 1))


@pytest.mark.parametrize("main, command, result", [(distill.main, distilling, "student.pt"), (segment.main, segmenting, "segmenter.pt")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(main, command, result, teacher, tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 4})
    main(command(teacher, tmp_path / "a", 5, "--max_skips 2"))
    assert [line["skipped"] for line in records(tmp_path / "a")] == [0, 1, 1, 2, 2]
    saved = torch.load(tmp_path / "a" / result, weights_only=True)
    assert all(p.isfinite().all() for p in saved["model"].values()) and saved["ledger"][-1]["skipped"] == 2


@pytest.mark.parametrize("main, command", [(distill.main, distilling), (segment.main, segmenting)])
def test_several_bad_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(main, command, teacher, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {3, 4, 5})  # of batches 1 to 5 the last three
    monkeypatch.setattr(sys, "argv", ["a.py"])
    with pytest.raises(SystemExit) as stop:
        data.cli(lambda: main(command(teacher, tmp_path / "a", 9, "--max_skips 3 " + EACH)))
    error, batches = capsys.readouterr().err, iter(data.Draws(1000, 4, seed=0))
    images = [[index for index, _ in next(batches)] for _ in range(5)][-1]
    assert stop.value.code == 2 and "a.py: 3 steps in a row had non-finite" in error and f"({', '.join(map(str, images))})" in error
    last = torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert last["spent"]["skipped"] == 3 and all(p.isfinite().all() for p in last["learner"].values())


def test_the_one_stage_loss_is_the_task_loss_plus_the_weighted_objectives():
    encoder, teacher, cfg = vit(16), vit(32), segment.Config(kd=0.5, kd_logits=2.0, loss="cwd")
    segmenter = segment.Segmenter(encoder, Linear(16, 3), frozen=False)
    learner = segment.Learner(segmenter, qsd.LOSSES["cwd"](encoder, teacher, cfg), cfg)
    x, label, noise = torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16)), torch.rand(2, 16)
    t, theirs = teacher.run(x), torch.randn(2, 3, 16, 16).softmax(1)
    losses = learner(x, label, None, None, t, noise, theirs)
    outputs = segmenter(x)
    task, ours = segmenter.decoder.loss(outputs, label)["loss"], outputs.softmax(1)
    kd = 0.5 * 50 * learner.objective(encoder, x, encoder.run(x), t, noise)["loss"]  # 50: CWD's published weight
    kl = 2 * sum((theirs[b, :, y, x] * (theirs[b, :, y, x] / ours[b, :, y, x]).log()).sum() for b, y, x in np.ndindex(2, 16, 16)) / 512
    assert task > 0 and kd > 0 and kl > 0
    torch.testing.assert_close(losses["loss"], task + kd + kl)
    alone = segment.Learner(segmenter, None, cfg)(x, label, None, None)
    torch.testing.assert_close(alone["loss"], task)


def test_one_stage_rows_run_with_every_objective_and_the_teacher_changes_the_encoder(teacher, student, tmp_path):
    segment.main(segmenting(student, tmp_path / "alone", 2, "--freeze no"))
    task, alone = records(tmp_path / "alone"), weights(tmp_path / "alone/segmenter.pt")
    for loss in qsd.LOSSES:
        segment.main(segmenting(student, tmp_path / loss, 2, f"--freeze no --kd 1 --loss {loss} --teacher {teacher}"))
        lines, encoder = records(tmp_path / loss), weights(tmp_path / loss / "segmenter.pt")
        assert all(0 < line["kd"] < line["loss"] < math.inf for line in lines), loss
        assert lines[0]["loss"] - lines[0]["kd"] == pytest.approx(task[0]["loss"], rel=1e-5), loss  # Eq. 3
        changed = [not torch.equal(encoder[key], alone[key]) for key in encoder if key.startswith("encoder.blocks")]
        assert sum(changed) > len(changed) / 2, loss


def test_joined_sources_and_a_fraction_of_the_labels_train_on_the_images_they_name(teacher, student, tmp_path, monkeypatch):
    seen, loader = [], data.loader
    monkeypatch.setattr(data, "loader", lambda dataset, *args, **more: seen.append(dataset.samples) or loader(dataset, *args, **more))
    for name, sources, fraction, count in (("a", "toy+toy-arcade", "1", 2000), ("b", "toy", "1/16", 62), ("c", "toy+toy-arcade", "1/16", 125)):
        if fraction == "1":
            distill.main(distilling(teacher, tmp_path / f"{name}-distil", 2, f"--data {sources}"))
        segment.main(segmenting(student, tmp_path / name, 2, f"--data {sources} --labels {fraction}"))
        assert {len(samples) for samples in seen} == {count}
        assert all(len({sample.entry.generate for sample in samples}) == len(sources.split("+")) for samples in seen)
        seen.clear()
    assert all(math.isfinite(line["loss"]) for out in tmp_path.iterdir() for line in records(out)) and len(list(tmp_path.iterdir())) == 4


def test_frozen_means_frozen_and_trained_means_trained(student, tmp_path):
    before = qsd.load_vit(student).eval()
    for freeze in ("yes", "no"):
        segment.main(segmenting(student, tmp_path / freeze, 3, f"--freeze {freeze}"))
        after, x = segment.load_segmenter(tmp_path / freeze / "segmenter.pt")[0].encoder, torch.randn(2, 3, 64, 64)
        kept = [torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)]
        with torch.no_grad():
            outs = [torch.equal(a, b) for a, b in zip(before.blocks_out(x, [0, 3]), after.blocks_out(x, [0, 3]))]
        assert all(kept) and all(outs) if freeze == "yes" else not any(outs)


def test_a_frozen_encoder_builds_no_graph():
    for frozen in (True, False):
        segmenter, kept = segment.Segmenter(qsd.load_vit("toy_small"), Linear(64, 3), frozen), []
        segmenter.encoder.blocks[0].register_forward_hook(lambda module, inputs, out: kept.append(out.requires_grad))
        assert segmenter(torch.randn(1, 3, 64, 64)).requires_grad and kept == [not frozen]
        assert {p.requires_grad for p in segmenter.encoder.parameters()} == {not frozen}


def test_the_miou_that_eval_prints_is_that_of_a_slow_count(teacher, monkeypatch, capsys):
    monkeypatch.setitem(data.DATASETS, "toy-fog", data.toy("fog", val=7))
    evaluation.main(f"--checkpoint {teacher} --data toy-fog --batch 3".split())
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["miou"]
    model, _ = segment.load_segmenter(teacher)
    inter, union = np.zeros(8), np.zeros(8)
    for i in range(7):
        image, label = (torch.from_numpy(array) for array in data.toy_scene("fog", 10 ** 6 + i))
        with torch.no_grad():
            x = data.normalize(image.permute(2, 0, 1)[None], model.encoder.mean, model.encoder.std)
            pred = model.decoder.scores(model(x), (64, 64))[0].argmax(0)
        for k in range(8):
            inter[k] += ((pred == k) & (label == k)).sum()
            union[k] += ((pred == k) | (label == k)).sum()
    want = 100 * np.mean(inter[union > 0] / union[union > 0])
    assert printed["toy-fog"] == pytest.approx(want) == pytest.approx(printed["mean"])


# --- Runs: as a user types them ---------------------------------------------------------------------------------------

def typed(monkeypatch, capfd, command):
    """`python <command>` in this process, which has torch loaded: (exit status, stdout, stderr)."""
    script, *argv = command.split()
    monkeypatch.setattr(sys, "argv", [str(HERE / script), *argv])
    status = 0
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    return status, *capfd.readouterr()


@pytest.mark.parametrize("command, says", [
    ("distill.py --dat toy", "unrecognized arguments: --dat toy"),
    ("segment.py --nonsense", "unrecognized arguments: --nonsense"),
    ("eval.py --batch many", "--batch: 'many' is no int"),
    ("distill.py --data toyy --teacher {teacher}", "--data toyy: not one of"),
    ("segment.py --data gtvv", "--data gtvv: not one of"),
    ("distill.py --data gtav --root {tmp}/nowhere", "nowhere: no such folder"),
    ("segment.py --data gtav --root {tmp}", "holds no files like images/*"),
    ("data.py --data gtav --root {tmp}/nowhere", "nowhere: no such folder"),
    ("data.py --data gtva --root {tmp}", "--data gtva: not one of"),
    ("data.py --data bdd100k --root {tmp}/nolabels", "holds no files like labels/sem_seg"),
    ("distill.py --teacher {tmp}/none.pt --data toy --out {tmp}/a", "none.pt: neither a file nor a known encoder"),
    ("segment.py --data toy --encoder {tmp}/none.pt", "none.pt: neither a file nor a known encoder"),
    ("distill.py --data toy --teacher {tmp}/junk.pt", "junk.pt is truncated, damaged or no checkpoint"),
    ("distill.py --data toy --teacher {teacher} --student {tmp}/junk.pt", "junk.pt is truncated, damaged or no checkpoint"),
    ("eval.py --checkpoint {tmp}/none.pt --data toy", "none.pt: no such file"),
    ("eval.py --checkpoint {tmp}/junk.pt --data toy", "junk.pt is no segmenter.pt"),
    ("eval.py --checkpoint {student} --data toy", "student.pt is no segmenter.pt"),
    ("eval.py --checkpoint {teacher} --data camvid", "camvid has the classes"),
    ("eval.py", "give --checkpoint"),
    ("distill.py --data toy --teacher {teacher} --budget soon --out {tmp}/a", "--budget soon is not one of"),
    ("distill.py --data toy --teacher {teacher} --batch 3 --out {tmp}/a", "--batch 3 does not divide"),
    ("distill.py --data toy --teacher {teacher} --size 60 --out {tmp}/a", "60x60 pixels does not divide into patches of 8"),
    ("segment.py --data toy --kd 1 --teacher {teacher} --out {tmp}/a", "add --freeze no"),
    ("segment.py --data toy --kd 1 --freeze no --out {tmp}/a", "need a --teacher"),
    ("segment.py --data toy --labels 3 --out {tmp}/a", "--labels 3"),
    ("segment.py --data toy --queries 3 --out {tmp}/a", "3 queries for 8 classes"),
    ("segment.py --data toy-night --out {tmp}/a", "toy-night: has no train split"),
    ("distill.py --data toy --teacher {teacher} --student dinov2_vits15", "dinov2_vits15: neither a file nor a known encoder"),
    ("distill.py --data toy --teacher {teacher} --out {tmp}/junk.pt", "junk.pt is a file, not a folder"),
    ("distill.py --data toy --teacher {teacher} --seed -1", "--seed -1: at least 0 was expected"),
    ("segment.py --data toy --log_every 0", "--log_every 0: at least 1 was expected"),
    ("distill.py --data toy --teacher {teacher} --budget 1.2.3 --out {tmp}/a", "--budget 1.2.3 is not one of"),
    ("eval.py --table 5 --data toy --jobs 0", "--jobs 0: at least 1 was expected"),
    ("eval.py --table 5 --data toy --seeds -1", "--seeds -1: at least 0 was expected"),
    ("eval.py --table 5 --data toy --setting gtav", "--setting gtav: belongs to the paper's scale"),
    ("eval.py --table 5 --data toy --out {tmp}/junk.pt", "junk.pt is a file, not a folder"),
    ("eval.py --demo --table 5", "--demo is --table main"),
])
def test_a_users_mistake_is_one_line_and_exit_status_2(command, says, teacher, student, tmp_path, monkeypatch, capfd):
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    write(tmp_path / "nolabels/images/10k/train/a.jpg", photo())
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    status, _, error = typed(monkeypatch, capfd, command.format(tmp=tmp_path, teacher=teacher, student=student))
    assert status == 2 and says in error and error.count("\n") == 1 and error.startswith(command.split()[0] + ": ")
    assert contents(tmp_path) == before  # nothing was begun


@pytest.mark.parametrize("script, result", [("distill.py", "student.pt"), ("segment.py", "segmenter.pt")])
def test_a_folder_with_another_run_or_foreign_files_is_refused_and_left_alone(script, result, teacher, student, tmp_path, monkeypatch, capfd):
    command = f"{script} --data toy --batch 2 --budget 1 " + (f"--teacher {teacher}" if script == "distill.py" else "")
    own = (student if script == "distill.py" else teacher).parent
    before = contents(own)
    status, _, error = typed(monkeypatch, capfd, f"{command} --out {own}")
    assert status == 2 and "holds a run with other constants (" in error and "data toy-" in error and error.count("\n") == 1
    assert contents(own) == before
    (tmp_path / "thesis.txt").write_text("mine")
    status, _, error = typed(monkeypatch, capfd, f"{command} --out {tmp_path}")
    assert status == 2 and "is not empty" in error and error.count("\n") == 1
    assert contents(tmp_path) == {str(tmp_path / "thesis.txt"): b"mine"}


def test_the_other_scripts_run_in_the_folder_is_refused(teacher, student, monkeypatch, capfd):
    for command in (f"segment.py --data toy --out {student.parent}", f"distill.py --data toy --teacher {teacher} --out {teacher.parent}"):
        before = contents(command.split()[-1])
        status, _, error = typed(monkeypatch, capfd, command)
        assert status == 2 and error.count("\n") == 1
        assert contents(command.split()[-1]) == before


def test_a_finished_run_says_so_and_stops(teacher, student, monkeypatch, capfd):
    before = contents(student.parent)
    command = f"distill.py --data toy-proxy --teacher {teacher} --batch 4 --budget 3 --log_every 1 --out {student.parent}"
    status, out, error = typed(monkeypatch, capfd, command)
    assert status == 0 and "student.pt is finished; nothing to do" in out and not error
    assert contents(student.parent) == before


def test_resuming_refuses_other_mathematics_by_name_and_allows_other_logging(teacher, tmp_path):
    argv = distilling(teacher, tmp_path / "a", 3)
    interrupted(distill.main, argv, 1)
    before = contents(tmp_path / "a")
    with pytest.raises(data.UserError, match=r"other constants \(alpha 1.0 -> 0.5, lr 0.001 -> 0.5\)"):
        distill.main([*argv, "--lr", "0.5", "--alpha", "0.5"])
    assert contents(tmp_path / "a") == before
    distill.main([*argv, "--micro", "2", "--save_minutes", "5"])
    assert (tmp_path / "a/student.pt").exists()


# --- Runs: other processes --------------------------------------------------------------------------------------------

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*command):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def test_a_typed_command_with_a_wrong_flag_exits_with_2():
    process = start("distill.py", "--nonsense", "1")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2 and not out and error.startswith("distill.py: unrecognized arguments: --nonsense") and error.count("\n") == 1


# A process that has torch and this file loaded, nothing else done, and copies itself in milliseconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def run_until(moment, number, main, argv, shown):
    """Run main; just before change number `moment` of its folder this process gets a signal. Optimiser steps and half-written
    checkpoints count as changes: what a kill leaves behind follows from the changes before it, so no other moment differs from these."""
    out, changes, step, save = argv[argv.index("--out") + 1], itertools.count(1), data.step, torch.save

    def change(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "step") and str(args[0]).startswith(out) and next(changes) == moment:
            os.kill(os.getpid(), number)

    def torn_save(state, file):
        save(state, whole := io.BytesIO())
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        change("step", [out])
        file.write(whole.getvalue()[len(whole.getvalue()) // 2:])
    sys.stdout = sys.stderr = open(shown, "a", buffering=1)
    data.step = lambda *args: change("step", [out]) or step(*args)
    torch.save, os.fsync, data.DATASETS["toy"] = torn_save, lambda file: None, FEW
    sys.addaudithook(change)
    main(argv)


def killed(main, argv, moment, number, shown):
    """Start main in a process of its own that gets a signal at this moment: its exit status."""
    process = FORKS.Process(target=run_until, args=(moment, number, main, argv, shown))
    process.start()
    process.join(120)
    return process.exitcode


KILLED = [(distill.main, partial(distilling, more=f"--loss mse {EACH}")), (segment.main, partial(segmenting, more=f"--decoder linear --val_every 1 {EACH}"))]


def same_runs(whole, parts):
    """Whether two folders hold the same files, in them the same weights and the same losses."""
    names = [sorted(path.name for path in out.iterdir()) for out in (whole, parts)]
    return names[0] == names[1] and all(same(path, parts / path.name) for path in whole.glob("*.pt")) and losses_of(whole) == losses_of(parts)


@pytest.mark.parametrize("main, command", KILLED)
def test_a_run_killed_at_ten_random_moments_ends_with_the_weights_of_the_uninterrupted_run(main, command, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "toy", FEW)
    whole, parts = (command(teacher, tmp_path / name, 24) for name in ("whole", "parts"))
    main(whole)
    chance, history, reached = random.Random(0), [], [0]
    for i in range(10):
        number, moment = (signal.SIGKILL, signal.SIGTERM)[i % 2], chance.randint(1, 30)
        status = killed(main, parts, moment, number, tmp_path / "shown")
        kept = next((path for name in ("last.pt", "prev.pt") if (path := tmp_path / "parts" / name).exists()), None)
        reached.append(torch.load(kept, weights_only=True)["spent"]["steps"] if kept else 0)
        history.append(f"{number.name} before change {moment}: exit status {status}, step {reached[-1]} kept")
        assert status in (-number, 128 + number), (history, (tmp_path / "shown").read_text())  # -SIGTERM: it came before the first step
        assert reached[-1] >= reached[-2], history
    assert steps_of(main, parts) > 0 and same_runs(tmp_path / "whole", tmp_path / "parts"), history
    shown = (tmp_path / "shown").read_text()
    assert "stopped by signal 15 after step" in shown and "Traceback" not in shown


@pytest.mark.parametrize("main, command", KILLED)
def test_a_run_killed_before_one_change_of_its_folder_after_the_other_is_completed_by_the_same_command(main, command, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "toy", FEW)
    whole, parts = (command(teacher, tmp_path / name, 1) for name in ("whole", "parts"))
    main(whole)
    statuses = [-signal.SIGKILL]
    while statuses[-1] == -signal.SIGKILL:  # the first start is killed before change 1, the second before its change 2, ...
        statuses.append(killed(main, parts, len(statuses), signal.SIGKILL, tmp_path / "shown"))
    assert statuses[-1] == 0 and len(statuses) > 9, (statuses, (tmp_path / "shown").read_text())
    assert same_runs(tmp_path / "whole", tmp_path / "parts"), statuses


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before_it(teacher, tmp_path, monkeypatch):
    argv, replace = distilling(teacher, tmp_path / "a", 4, f"--loss mse {EACH}"), os.replace
    interrupted(distill.main, argv, 3)
    (tmp_path / "a/last.pt").write_bytes(b"damaged")

    def killed(source, target):
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):  # between the two renames of the next save
        distill.main(argv)
    assert torch.load(tmp_path / "a/prev.pt", weights_only=True)["spent"]["steps"] == 2
    monkeypatch.setattr(os, "replace", replace)
    assert steps_of(distill.main, argv) == 2
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["log.jsonl", "loss.png", "student.pt"]


def signal_all(number, argv, shown):
    """Distil, with a process that loads the images; as the training process waits for its third batch both get a signal."""
    os.setsid()
    sys.stdout = sys.stderr = open(shown, "a", buffering=1)
    log, getitem = Path(argv[argv.index("--out") + 1], "log.jsonl"), data.Scenes.__getitem__

    def item(self, key):
        if key[1] == 8:
            while not (log.exists() and '"step": 2,' in log.read_text()):
                time.sleep(0.01)
            os.killpg(0, number)
        return getitem(self, key)
    data.Scenes.__getitem__ = item
    try:
        distill.main(argv)
    except SystemExit as stop:
        os._exit(stop.code)  # multiprocessing would first end the loading process and wait for it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_at_once_leaves_time_to_finish_and_save_the_step(number, teacher, tmp_path):
    process = FORKS.Process(target=signal_all, args=(number, distilling(teacher, tmp_path / "a", 9, "--loss mse --workers 1"), tmp_path / "shown"))
    process.start()
    process.join(120)
    assert process.exitcode == 128 + number, (tmp_path / "shown").read_text()
    assert torch.load(tmp_path / "a/last.pt", weights_only=True)["spent"]["steps"] == 3


def crash(shown):
    """A script that crashes while a process loads its images."""
    sys.stderr = open(shown, "w", buffering=1)

    def main():
        batches = iter(data.loader(data.images("toy", "", data.distill_transform(16)), 2, workers=1))
        raise RuntimeError(f"crashed after {len(next(batches))}")
    data.cli(main)


def test_a_crash_ends_at_once_though_loading_processes_outlast_signals(tmp_path):
    process = FORKS.Process(target=crash, args=(tmp_path / "shown",))
    process.start()
    process.join(20)  # they would live for 30 s
    assert process.exitcode == 1
    assert "Traceback" in (tmp_path / "shown").read_text() and "crashed after 2" in (tmp_path / "shown").read_text()


def run_rows(rows, shown):
    sys.stdout = sys.stderr = open(shown, "w", buffering=1)
    evaluation.run(rows, evaluation.Config(data="toy"))


def test_a_killed_table_ends_its_runs_with_their_step_saved(tmp_path):
    text = f"segment.py --data toy --encoder toy_small --decoder linear --budget 5000 --log_every 1 --out {tmp_path}/a"
    process = FORKS.Process(target=run_rows, args=([evaluation.Row("a", [text])], tmp_path / "shown"))
    process.start()
    log, until = tmp_path / "a/log.jsonl", time.time() + 120
    while not (log.exists() and '"step": 2,' in log.read_text()):
        assert process.is_alive() and time.time() < until, (tmp_path / "shown").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM and "stopped by signal 15; the same command" in (tmp_path / "shown").read_text()
    kept = torch.load(tmp_path / "a/last.pt", weights_only=True)["spent"]["steps"]
    time.sleep(1)
    assert kept == records(tmp_path / "a")[-1]["step"] >= 2  # and nothing goes on there


ONE_STAGE = "--freeze no --kd 1 --kd_logits 1 --teacher {teacher}"


def alike(teacher, student, out):
    """What one process and two must do alike, each run in a folder of its own below out."""
    for loss in qsd.LOSSES:
        distill.main(distilling(teacher, out / loss, 3, f"--batch 8 --loss {loss}"))
    for name, more in (("segment", ""), ("one-stage", ONE_STAGE.format(teacher=teacher))):
        segment.main(segmenting(student, out / name, 3, f"--batch 8 {more}"))
    resumed = distilling(teacher, out / "resumed", 3, "--batch 8")
    last = dist.get_rank() == dist.get_world_size() - 1  # the signal reaches one process; all must end after the same step
    with pytest.raises(SystemExit):
        steps_of(distill.main, resumed, terminate=1 if last else 0)
    dist.barrier()  # in a real restart no process looks for last.pt before the first has written it
    assert steps_of(distill.main, resumed) == 2
    odd = data.Scenes(data.scenes("toy", "").samples[:7], None, labelled=True, training=False)
    confusion = segment.evaluate(segment.load_segmenter(teacher)[0], odd, 64, torch.device("cpu"))
    (out / f"confusion-{dist.get_rank()}.json").write_text(json.dumps(confusion.tolist()))


@pytest.fixture(scope="session")
def one(teacher, student, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    alike(teacher, student, out)
    return out


@pytest.fixture(scope="session")
def two(teacher, student, tmp_path_factory):
    """The same by two processes of torchrun, which starts this file: its last lines."""
    out = tmp_path_factory.mktemp("two")
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, teacher, student, out)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return out


@pytest.mark.parametrize("run", [*qsd.LOSSES, "segment", "one-stage"])
def test_each_objective_and_stage_2_give_under_torchrun_with_two_processes_the_loss_curve_of_one(run, one, two):
    worlds = [json.loads((out / run / "log.jsonl").read_text().splitlines()[0])["world"] for out in (one, two)]
    alone, together = ([line["loss"] for line in records(out / run)] for out in (one, two))
    assert worlds == [1, 2] and len(alone) == 3 and alone[2] != alone[0]
    assert together == pytest.approx(alone, rel=1e-5)


def test_two_processes_resume_to_the_bits_of_an_uninterrupted_run(one, two):
    for out in (one, two):
        assert same(out / "qsd/student.pt", out / "resumed/student.pt") and losses_of(out / "qsd") == losses_of(out / "resumed")


def test_two_processes_count_the_pixels_of_an_odd_number_of_images_as_one_does(one, two):
    counts = [json.loads(path.read_text()) for path in (one / "confusion-0.json", two / "confusion-0.json", two / "confusion-1.json")]
    assert counts[0] == counts[1] == counts[2] and np.sum(counts[0]) == 7 * 64 * 64


@pytest.mark.parametrize("run, command, main", [("qsd", distilling, distill.main), ("segment", segmenting, segment.main)])
def test_accumulation_gives_the_loss_curve_of_whole_batches(run, command, main, teacher, student, one, tmp_path):
    main(command(teacher if run == "qsd" else student, tmp_path / "a", 3, "--batch 8 --micro 2"))
    assert [line["loss"] for line in records(tmp_path / "a")] == pytest.approx([line["loss"] for line in records(one / run)], rel=1e-5)


# --- Tables: lists of runs --------------------------------------------------------------------------------------------

def runs_in(table, world):
    return (table, world) != ("fig6", "camvid") and (world != "paper" or evaluation.TABLES[table].settings)


def rows_of(table, world):
    """All rows of a table in a world, as (block, row)."""
    cfg = evaluation.Config(data=world, out="runs/x", root="/data", seed=3, seeds=1)
    return [(block, row) for block in evaluation.blocks(table, cfg) for row in block.seeds[0]]


@pytest.mark.parametrize("world", ["toy", "camvid", "paper"])
@pytest.mark.parametrize("table", list(evaluation.TABLES))
def test_every_command_of_a_table_is_accepted_by_its_script_and_begins_where_one_before_it_ended(table, world):
    if not runs_in(table, world):
        with pytest.raises(data.UserError, match=f"--table {table} --data {world}.* use --data toy"):
            rows_of(table, world)
        return
    for block, row in rows_of(table, world):
        made = set()
        for text in row.runs:
            _, cfg, result = evaluation.parsed(text)
            assert cfg.root == "/data" and cfg.out.startswith("runs/x/") and (world == "paper" or cfg.seed == 3)
            starts = (cfg.student, cfg.teacher) if text.startswith("distill") else (cfg.encoder, cfg.teacher)
            for start in starts:
                assert start in qsd.ENCODERS or start == "none" or start in made, f"{start} comes from nowhere"
            made.add(str(result))
        assert text.startswith("segment.py")
        assert not block.paper or row.name in block.paper or world != "paper"


def test_runs_of_one_folder_are_the_same_command_in_all_tables():
    for world in ("toy", "camvid", "paper"):
        commands = {}
        for table in evaluation.TABLES:
            for _, row in rows_of(table, world) if runs_in(table, world) else []:
                for text in row.runs:
                    assert commands.setdefault(text.split(" --out ")[1], text) == text


def test_the_papers_numbers_fit_their_rows_and_their_means():
    for name, table in evaluation.TABLES.items():
        for title, text in table.paper.items():
            lines = [[float(x) for x in line.split()] for line in text.strip().splitlines()]
            assert not lines or len(lines) == len(table.rows(evaluation.paper_pair(title, "gtav", "runs", "/data")))
            for line in lines:
                assert len(line) == sum(table.settings.values())
                start = 0
                for setting, count in table.settings.items():
                    *domains, mean = line[start:start + count]
                    start += count
                    assert not domains or len(domains) == len(data.SETTINGS[setting][1]) and mean == pytest.approx(np.mean(domains), abs=0.1)


def test_table_5_adds_one_component_a_row():
    rows = [row for _, row in rows_of("5", "paper")]
    stages = [[evaluation.parsed(text)[1] for text in row.runs] for row in rows]
    assert [[cfg.data for cfg in runs] for runs in stages] == [["gtav"], ["gtav", "gtav"]] + [["imagenet", "gtav", "gtav"]] * 4
    assert [[cfg.loss for cfg in runs[:-1]] for runs in stages[1:]] == [["mse"], ["mse"] * 2, ["qsd"] * 2, ["qsd"] * 2, ["qsd"] * 2]
    assert [runs[0].beta for runs in stages[3:]] == [0, 1, 1] and [runs[-1].freeze for runs in stages] == [False] * 5 + [True]
    assert stages[0][0].kd == 1 and all(runs[-1].kd == 0 for runs in stages[1:])


def test_a_table_at_the_papers_scale_says_what_it_needs_and_runs_nothing_without_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation.main(["--table", "1", "--setting", "potsdam-rgb", "--root", "/nowhere"])
    out = capsys.readouterr().out
    assert "nproc_per_node=8 distill.py --data imagenet --loss qsd --teacher dinov2_vitb14" in out and "# needs /nowhere/potsdam and a GPU" in out
    assert "| + GKD " in out and "- [61.3]" in out and "cityscapes" not in out and not (tmp_path / "runs").exists()


def test_rows_share_a_run_and_a_failed_run_is_reported(tmp_path, capsys):
    shared = f"segment.py --data toy --encoder toy_small --decoder linear --workers 0 --budget 2 --out {tmp_path}/shared"
    rows, cfg = [evaluation.Row("one", [shared]), evaluation.Row("other", [shared])], evaluation.Config(data="toy")
    evaluation.run(rows, cfg)
    assert (tmp_path / "shared/segmenter.pt").exists() and capsys.readouterr().out.count("python segment.py") == 1
    evaluation.run(rows, cfg)
    assert "python segment.py" not in capsys.readouterr().out
    with pytest.raises(data.UserError, match="ended with status 2: .*a fraction like 1/16"):
        evaluation.run([evaluation.Row("bad", [shared.replace("/shared", "/bad") + " --labels 7"])], cfg)


def test_a_table_shows_mean_and_spread_over_seeds_and_the_papers_number(tmp_path, capsys, monkeypatch):
    values = {0: 10.0, 1: 14.0}

    def measured(row, block, cfg, device):
        value = values[int(evaluation.parsed(row.runs[-1])[2].parts[-3])]
        return evaluation.Result([value] * 6, 60.0, 2e12)

    monkeypatch.setattr(evaluation, "run", lambda rows, cfg: None)
    monkeypatch.setattr(evaluation, "measured", measured)
    evaluation.main(["--table", "4", "--data", "toy", "--out", str(tmp_path / "with space"), "--seeds", "2"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| QSD "))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["12.0 ± 2.8"] * 6 + ["60", "2.0", "54.1"]



# --- Figures, prediction, export, probe -------------------------------------------------------------------------------

@pytest.fixture
def few(monkeypatch):
    """Toy domains of a few scenes."""
    for look, name, train in (("game", "toy", 6), ("night", "toy-night", 0), ("fog", "toy-fog", 0)):
        monkeypatch.setitem(data.DATASETS, name, data.toy(look, train=train, val=3))


def test_a_measurement_is_kept_until_its_segmenter_is_trained_again(teacher, few, tmp_path):
    out, cfg = tmp_path / "a", evaluation.Config(data="toy", workers=0)
    row = evaluation.Row("row", [f"segment.py --data toy --encoder toy_small --decoder linear --workers 0 --budget 1 --out {out}"])
    segment.main(row.runs[0].split()[1:])
    block = evaluation.Block("table", [[row]], ["toy"], ["toy-night", "toy-fog"], {})
    first = evaluation.measured(row, block, cfg, torch.device("cpu"))
    assert first.miou[3] == pytest.approx((first.miou[1] + first.miou[2]) / 2)
    kept = json.loads((out / "eval.json").read_text())
    (out / "eval.json").write_text(json.dumps(kept | {"miou": {"toy": 1, "toy-night": 2, "toy-fog": 4}}))
    assert evaluation.measured(row, block, cfg, torch.device("cpu")).miou == [1, 2, 4, 3]
    assert evaluation.measured(row, block, dataclasses.replace(cfg, flip=True), torch.device("cpu")).miou != [1, 2, 4, 3]
    (out / "eval.json").write_text(json.dumps(kept | {"miou": {"toy": 1, "toy-night": 2, "toy-fog": 4}}))
    saved = torch.load(out / "segmenter.pt", weights_only=True)
    saved["ledger"][-1]["seconds"] += 1
    torch.save(saved, out / "segmenter.pt")
    assert evaluation.measured(row, block, cfg, torch.device("cpu")).miou == first.miou


@pytest.mark.parametrize("value", [0, 1e-9, 7, 2000, 40000])
def test_a_chart_of_a_single_value_is_drawn(value, tmp_path):
    assert np.diff(data.ticks(value, value)).min() > 0
    data.chart({"a": [(value, value)]}, tmp_path / "a.png", "x", "y")


def test_a_run_needs_no_git(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    segment.main(segmenting(teacher, tmp_path / "a", budget=1))
    assert json.loads((tmp_path / "a/log.jsonl").read_text().splitlines()[0])["git"] is None


@pytest.mark.parametrize("name, legend", [
    ("3b", data.LINE_COLORS[:2]), ("5", ()), ("7a", data.LINE_COLORS[:1]), ("7b", evaluation.HEAT.tolist()), ("8", data.TOY_COLORS),
    ("9", data.LINE_COLORS[:2]), ("compute", data.LINE_COLORS[:2])])
def test_each_figure_is_drawn_with_its_legend_and_nothing_is_cut_off(name, legend, teacher, student, few, tmp_path, capsys):
    models = f"first={teacher.parent},second={student.parent if name in ('3b', '5', '7a', '7b') else teacher}"
    evaluation.main(["--figure", name, "--models", models, "--data", "toy-night+toy-fog", "--out", str(tmp_path), "--tokens", "200"])
    assert f"picture: {tmp_path}/figure-{name}.png" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / f"figure-{name}.png").convert("RGB"))
    colors = np.unique(picture.reshape(-1, 3), axis=0).astype(int)
    assert min(picture.shape[:2]) > 150 and len(colors) > 20
    assert all(np.abs(colors - color).sum(1).min() <= 9 for color in legend)  # charts are drawn larger and reduced
    inside = picture[2:-2, 2:-2].size
    assert picture.astype(int).sum() - picture[2:-2, 2:-2].astype(int).sum() == 255 * (picture.size - inside)  # a white margin all around


def test_token_distances_are_those_after_the_affine_map_that_fits_other_tokens_best():
    v_t, fit_t, mix = torch.randn(40, 6), torch.randn(60, 6), torch.randn(6, 6)
    assert evaluation.distances(v_t @ mix + 3, v_t, fit_t @ mix + 3, fit_t).max() < 1e-3  # the teacher itself, in other coordinates
    v_s, fit_s = torch.randn(40, 4), torch.randn(60, 4)
    design = np.concatenate([fit_s, np.ones((60, 1))], 1).astype(float)
    phi = np.linalg.inv(design.T @ design) @ design.T @ fit_t.double().numpy()
    want = [math.dist((np.append(s, 1) @ phi).tolist(), t.tolist()) for s, t in zip(v_s.double().numpy(), v_t)]
    assert evaluation.distances(v_s, v_t, fit_s, fit_t).tolist() == pytest.approx(want, rel=1e-5)
    normed, fit = F.layer_norm(v_s, (4,)), F.layer_norm(fit_s, (4,))  # in a plane: the map is not unique, its result is
    assert evaluation.distances(normed, v_t, fit, fit_t).max() < 10


def test_the_features_of_one_model_turn_onto_those_of_another_as_no_other_rotation_does():
    teacher = torch.rand(500, 8) * torch.tensor([9.0, 6, 4, 1, 0.5, 0.3, 0.2, 0.1])  # evenly spread: no colour is cut
    turned = torch.linalg.qr(torch.randn(8, 8))[0]
    found = evaluation.principal_colors({"teacher": teacher, "same": 3 * teacher @ turned - 7, "other": teacher + torch.rand(500, 8)})
    torch.testing.assert_close(found["same"], found["teacher"], atol=1e-3, rtol=0)
    first, other = (5 * (found[name] - 0.5) for name in ("teacher", "other"))
    centred = (teacher - teacher.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]  # by another road: the covariance
    assert torch.corrcoef(torch.cat([centred @ axes, first.double()], 1).T)[:3, 3:].abs().diag().min() > 0.999
    assert all((other @ torch.linalg.qr(torch.randn(3, 3))[0] - first).norm() >= (other - first).norm() for _ in range(300))


def test_class_ious_are_those_of_a_slow_count_and_bars_are_as_long(teacher, few, tmp_path, monkeypatch):
    cfg = evaluation.Config(data="toy+toy-fog", workers=0)
    model, saved = segment.load_segmenter(teacher)
    found = evaluation.class_ious("teacher", model, saved, cfg, torch.device("cpu"))
    for look, name in (("game", "toy"), ("fog", "toy-fog")):
        both, either = np.zeros(8), np.zeros(8)
        for i in range(3):
            image, label = data.toy_scene(look, 10 ** 6 + i)
            pred = evaluation.classify(model, saved, torch.from_numpy(image).permute(2, 0, 1), cfg, torch.device("cpu")).numpy()
            for k in range(8):
                both[k] += ((pred == k) & (label == k)).sum()
                either[k] += ((pred == k) | (label == k)).sum()
        want = [100 * a / b if b else math.nan for a, b in zip(both, either)]
        assert found[name].tolist() == pytest.approx(want, nan_ok=True)
    ious = torch.tensor([0, 10, 50, 100, math.nan, 1, 2, 3.0])
    monkeypatch.setattr(evaluation, "class_ious", lambda title, model, saved, cfg, device: {"toy": ious})
    evaluation.class_bars({"teacher": teacher}, evaluation.Config(data="toy"), tmp_path / "bars.png", torch.device("cpu"))
    blue = (np.asarray(Image.open(tmp_path / "bars.png")) == data.LINE_COLORS[0]).all(2).sum(1)
    runs = [int(np.median(list(group))) for on, group in itertools.groupby(blue, bool) if on]  # the bars, then the legend's box
    want = [1, 27, 131, 261, 4, 6, 9, 63]  # 2.6 pixels for 1 %, both ends included; nothing for NaN
    assert runs[:-1] == pytest.approx([*want[:7], 2.6 * ious.nanmean().item() + 1], abs=1)


def test_compute_is_the_sum_over_all_stages_of_the_ledger(teacher, student, few, tmp_path, monkeypatch):
    out, drawn = tmp_path / "run", {}
    segment.main(segmenting(student, out, budget=1))
    monkeypatch.setattr(data, "chart", lambda series, *args, **kwargs: drawn.update(series))
    evaluation.main(f"--figure compute --models {out},t={teacher} --data toy-fog --out {tmp_path}".split())
    flops = [json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["flops"] for folder in (student.parent, out, teacher.parent)]
    cfg = evaluation.Config(data="toy-fog", workers=0)
    mious = [evaluation.measure("", *segment.load_segmenter(folder / "segmenter.pt"), cfg, torch.device("cpu"))["toy-fog"]
             for folder in (out, teacher.parent)]
    assert drawn == {str(out): [(pytest.approx(flops[0] + flops[1]), pytest.approx(mious[0]))],
                     "t": [(pytest.approx(flops[2]), pytest.approx(mious[1]))]}


def test_the_attention_that_is_drawn_is_that_of_the_students_saved_head(teacher, student):
    v_s, v_t = torch.randn(2, 3, 64), torch.randn(2, 3, 128)
    heads = torch.load(student, weights_only=True)["objective"]
    W, want = evaluation.attention(student, v_s, v_t), torch.zeros(6, 6)
    for i, s in enumerate(v_s.flatten(0, 1)):
        s = (s - s.mean()) / (s.var(unbiased=False) + 1e-5).sqrt() * heads["feat.varphi.0.weight"] + heads["feat.varphi.0.bias"]
        query = heads["feat.varphi.1.weight"] @ s + heads["feat.varphi.1.bias"]
        raw = torch.stack([(query * t).sum() for t in v_t.flatten(0, 1)])
        want[i] = (raw - raw.max()).exp() / (raw - raw.max()).exp().sum()
    torch.testing.assert_close(W, want, atol=1e-5, rtol=1e-4)


def test_scores_at_several_scales_are_averaged_and_scale_1_changes_nothing(teacher, few, capsys):
    model, x = Lens(16), torch.randn(2, 3, 20, 37)
    plain = evaluation.predict(model, x, 16)
    assert torch.equal(evaluation.predict(model, x, 16, scales=(1.0,)), plain)
    for flip in (False, True):
        small, large = (evaluation.predict(model, resize(x, size), 16, flip=flip) for size in ((10, 18), (25, 46)))  # 37 / 2 rounds to even
        want = (resize(small, (20, 37)) + resize(large, (20, 37))) / 2
        torch.testing.assert_close(evaluation.predict(model, x, 16, flip=flip, scales=(0.5, 1.25)), want)
    results = []
    for scales in ("1", "1,1.0", "0.5,1.5"):
        evaluation.main(f"--checkpoint {teacher} --data toy-fog --scales {scales}".split())
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["miou"]["mean"])
    assert results[0] == results[1] != results[2]


def test_images_of_any_size_and_kind_are_segmented_and_foreign_files_left_alone(teacher, tmp_path, capsys):
    given, out = tmp_path / "given", tmp_path / "out"
    color = smooth_image(40, 70).permute(1, 2, 0).numpy()
    ramp = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16), (50, 1))
    given.mkdir()
    for name, image in {"one pixel.png": color[:1, :1], "grey.png": color[..., 0].copy(), "sixteen.png": ramp, "sixteen_tiff.tif": ramp,
                        "alpha.png": np.dstack([color, color[..., 0]]), "strip.bmp": color[:2], "plain.png": color}.items():
        Image.fromarray(image).save(given / name)
    Image.fromarray(color).convert("CMYK").save(given / "cmyk.jpg", quality=95)
    Image.fromarray(color).quantize(16).save(given / "palette.png")
    (given / "notes.txt").write_text("no image")
    write(out / "plain.png", color)
    (out / "thesis.txt").write_text("mine")
    before, mine = contents(given), contents(out)
    for _ in range(2):  # the second time over its own results
        evaluation.main(f"--checkpoint {teacher} --out {out} --images".split() + [str(given)])
    assert contents(given) == before and contents(out).items() >= mine.items() and len(contents(out)) == 2 + 2 * 9
    assert re.search(r"9 images, [\d.]+ images/s", capsys.readouterr().out)
    model, saved = segment.load_segmenter(teacher)
    for file in given.glob("*.*"):
        if file.suffix == ".txt":
            continue
        with Image.open(file) as opened:
            pixels = np.round(ramp / 257) if "sixteen" in file.name else np.asarray(opened.convert("RGB"))
        if file.stem == "cmyk":  # decoders may differ in the last digit
            pixels, near = data.read_image(file).permute(1, 2, 0).numpy(), pixels
            assert np.abs(pixels.astype(int) - near).max() <= 4
        pixels = np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels
        label, overlay = (Image.open(out / f"{file.stem}_{what}.png") for what in ("classes", "overlay"))
        assert label.mode == "P" and label.size == pixels.shape[1::-1] and overlay.width >= label.width and overlay.height > label.height
        x = data.normalize(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None], model.encoder.mean, model.encoder.std)
        want = segment.predict(model, x, 64)[0].argmax(0).numpy()
        assert (np.asarray(label) == want).mean() > 0.999, file
        blend = (pixels.astype(int) + np.array(saved["colors"])[np.asarray(label)]) / 2
        assert np.abs(np.asarray(overlay.convert("RGB"))[:label.height, :label.width] - blend).max() < 1.5, file


def test_16_bit_grey_is_scaled_and_pixels_without_a_known_white_are_refused(tmp_path):
    steps = np.uint16([[0, 257, 32896, 65535]])
    for name, values in {"a.png": steps, "a.tif": steps, "b.tif": np.float32([[0.5, 2]])}.items():
        Image.fromarray(values).save(tmp_path / name)
    for file in ("a.png", "a.tif"):
        assert data.read_image(tmp_path / file)[:, 0].tolist() == [[0, 1, 128, 255]] * 3
    for mapped in (True, False):
        with pytest.raises(data.UserError, match="b.tif: cannot be read as an image .*none is known to be white"):
            data.read_image(tmp_path / "b.tif", mapped=mapped)
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "a.tif", "a.tif.npy", "b.tif"}


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_an_exported_program_gives_the_scores_of_eager_mode_at_any_batch(decoder, tmp_path, capsys, monkeypatch):
    cfg = segment.Config(decoder=decoder, width=32, queries=8, decoder_layers=1, ffn=32, heads=2, pixel="fpn", size=32)
    encoder = qsd.load_vit("toy_small", 32, depth=1)
    model = segment.Segmenter(encoder, segment.build_decoder(64, 3, cfg)).eval()
    data.save(tmp_path / "segmenter.pt", dict(model=model.state_dict(), encoder=encoder.config, config=data.as_plain(cfg), ledger=[],
                                              classes=["a", "b", "c"], colors=[[1, 2, 3]] * 3))
    out, about = tmp_path / "new/model.pt2", {"about.json": ""}
    evaluation.main(f"--checkpoint {tmp_path}/segmenter.pt --export {out} --dynamic yes".split())
    assert "largest difference from eager mode" in capsys.readouterr().out
    program = torch.export.load(out, extra_files=about).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(x), model.decoder.scores(model(x), (32, 32)), atol=1e-5, rtol=0)
    assert json.loads(about["about.json"]) == dict(classes=["a", "b", "c"], colors=[[1, 2, 3]] * 3, mean=list(encoder.mean),
                                                   std=list(encoder.std), size=32)
    if decoder == "linear":
        wrong = argparse.Namespace(module=lambda: lambda x: program(x) + 0.01)
        monkeypatch.setattr(torch.export, "load", lambda path: wrong)
        with pytest.raises(data.UserError, match="differ from those of .* by up to 1.0e-02"):
            evaluation.main(f"--checkpoint {tmp_path}/segmenter.pt --export {out}".split())


def test_the_probe_is_a_ridge_regression_on_patches(student, few, capsys):
    evaluation.main(f"--probe --models s={student.parent},toy_base --data toy+toy-fog --subset 3".split())
    *lines, last = capsys.readouterr().out.splitlines()
    table, printed = [line for line in lines if line.startswith("|")], json.loads(last)["miou"]
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == ["toy", "toy-fog", "mean"]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["s", *(f"{value:.1f}" for value in printed["s"].values())]
    vit = qsd.load_vit(student).eval()

    def patches(look, number):
        image, label = data.toy_scene(look, number)
        with torch.no_grad():
            x = vit(data.normalize(torch.from_numpy(image).permute(2, 0, 1)[None], vit.mean, vit.std))[1][0].double().numpy()
        return np.concatenate([x, np.ones((64, 1))], 1), label
    X, Y = [], []
    for number in (0, 2, 4):  # every second of six
        x, label = patches("game", number)
        X.append(x)
        Y += [[(label[r:r + 8, c:c + 8] == k).mean() for k in range(8)] for r in range(0, 64, 8) for c in range(0, 64, 8)]
    X = np.concatenate(X)
    strength = 1e-3 * np.trace(X.T @ X) / 65
    weights = np.linalg.lstsq(np.concatenate([X, strength ** 0.5 * np.eye(65)]), np.concatenate([Y, np.zeros((65, 8))]), rcond=None)[0]
    for look, name in (("game", "toy"), ("fog", "toy-fog")):
        both, either = np.zeros(8), np.zeros(8)
        for number in range(10 ** 6, 10 ** 6 + 3):
            x, label = patches(look, number)
            scores = torch.from_numpy((x @ weights).T.reshape(1, 8, 8, 8))
            pred = F.interpolate(scores, (64, 64), mode="bilinear").argmax(1)[0].numpy()
            for k in range(8):
                both[k] += ((pred == k) & (label == k)).sum()
                either[k] += ((pred == k) | (label == k)).sum()
        assert printed["s"][name] == pytest.approx(100 * (both / either)[either > 0].mean(), abs=0.02)
    assert set(printed) == {"s", "toy_base"} and printed["s"]["mean"] == pytest.approx((printed["s"]["toy"] + printed["s"]["toy-fog"]) / 2)


@pytest.mark.parametrize("command, says", [
    ("--figure 4 --models a={teacher}", "--figure: '4' is none of none, 3b"),
    ("--figure 8 --data toy-fog", "--models: say which"),
    ("--figure 8 --data toy-fog --models a={teacher},a={teacher}", "two are called a"),
    ("--figure 8 --data toy-fog --models a={tmp}/none.pt", "none.pt: no such file"),
    ("--figure 8 --data toy-fog --models a={student}", "student.pt is no segmenter.pt"),
    ("--figure 8 --data camvid --root {tmp} --models a={teacher}", "camvid has the classes"),
    ("--figure 9 --data toy-fog --models a={teacher},b={tmp}/three.pt", "a, b were trained on different classes"),
    ("--figure 9 --data toy-fog --models a={tmp}/four.pt", "four.pt is no segmenter.pt"),
    ("--figure 5 --data toy-fog --models a={tmp}/none.pt", "none.pt: neither a file nor a known encoder"),
    ("--figure 5 --data toy-fog --models {teacher},toy_small --patch 0 --examples 0", "--examples, --subset and --tokens are at least 1"),
    ("--figure 3b --models a={teacher},b={tmp}", "holds no log.jsonl"),
    ("--figure 7a --data toy-fog --models a={teacher}", "wants the teacher, then its students"),
    ("--figure 5 --data toy-fog --models a={teacher},b={tmp}/wide.pt", "(a 8, b 16 pixels): give all the same with --patch"),
    ("--figure 7b --data toy-fog --models a={student},b={teacher}", "holds no head of L_feat"),
    ("--figure 7b --data toy-fog --models a={student},b={student}", "heads are for a teacher of width 128, not 64"),
    ("--probe --data toy-fog --models a={teacher}", "toy-fog: has no train split"),
    ("--checkpoint {teacher} --data toy-fog --scales 1,x", "--scales 1,x: numbers"),
    ("--checkpoint {teacher} --images {tmp}/nowhere", "nowhere: no such file or folder"),
    ("--checkpoint {teacher} --images {tmp}/empty", "empty: no images here"),
    ("--checkpoint {teacher} --images {tmp}/cut.png --out {tmp}/new", "cut.png: cannot be read as an image"),
    ("--checkpoint {teacher} --images {tmp}/cut.png --out {tmp}", "is where the images lie"),
    ("--checkpoint {teacher} --images {tmp}/cut.png --out {tmp}/four.pt", "four.pt: is a file"),
    ("--checkpoint {teacher} --images {tmp}/twice --out {tmp}/new", "would both become a_classes.png"),
    ("--checkpoint {teacher} --export {tmp}/model.onnx", "torch.export names its files .pt2"),
])
def test_a_mistake_with_models_or_files_is_one_line_and_exit_status_2(command, says, teacher, student, tmp_path, monkeypatch, capfd):
    saved = torch.load(teacher, weights_only=True)
    torch.save(saved | dict(classes=["a", "b", "c", "d"]), tmp_path / "four.pt")  # weights for eight
    decoder = {key: p[:3] if key.startswith("decoder") and len(p) == 8 else p for key, p in saved["model"].items()}
    torch.save(saved | dict(classes=["a", "b", "c"], model=decoder), tmp_path / "three.pt")
    save_student(tmp_path / "wide.pt", qsd.ViT(**qsd.load_vit("toy_small").config | dict(patch_size=16)))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "twice/a.png", photo())
    write(tmp_path / "twice/a.jpg", photo())
    write(tmp_path / "cut.png", smooth_image().permute(1, 2, 0).numpy())
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    status, _, error = typed(monkeypatch, capfd, "eval.py " + command.format(tmp=tmp_path, teacher=teacher, student=student))
    error = re.sub(r"[^\n]*\r", "", error)  # bars
    assert status == 2 and says in error and error.count("\n") == 1 and error.startswith("eval.py: ")


if __name__ == "__main__":  # as torchrun starts it
    alike(*map(Path, sys.argv[1:]))
    dist.destroy_process_group()
