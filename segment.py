"""Stage 2 of GKD: train a decoder on labelled source images, the encoder frozen. Also the one-stage baselines.

    python segment.py --data gtav --root /data --encoder runs/source/student.pt --out runs/gtav
    python segment.py --data folder --root my_images --classes 5 --encoder dinov2_vits14 --out runs/mine

The same command resumes. With --kd or --kd_logits a rival of the paper is trained: task loss and distillation at once.
"""
import math
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import qsd
from data import IGNORE


# --- From the encoder to the decoders ---------------------------------------------------------------------------------
def feature_layers(depth):
    """The four blocks a decoder reads: [3, 5, 7, 11] of 12, in proportion at other depths ([7, 11, 15, 23] of 24)."""
    return [max(0, round(depth * part / 12) - 1) for part in (4, 6, 8, 12)]


def pyramid(outs, grid):
    """Four block outputs (B, N, C), not normalised, on a token grid (h, w) -> four maps (B, C, ., .) of 4, 2, 1 and 0.5
    times the grid, the earliest block finest; bilinear, without parameters, as in the official code."""
    sizes = [[max(1, int(scale * side)) for side in grid] for scale in (4, 2, 1, 0.5)]
    return [resize(x.transpose(1, 2).unflatten(2, grid), size) for x, size in zip(outs, sizes, strict=True)]


def resize(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def centres(size, device):
    """Pixel centres of an (h, w) grid, row by row: (h w, 2) points (x, y) in 0..1."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side for side in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def sine_position(size, width, device):
    """Sine and cosine of x and y at geometric frequencies, (h w, width)."""
    frequency = 2 * math.pi * 10000 ** (-4 * torch.arange(width // 4, device=device) / width)
    angle = centres(size, device)[:, :, None] * frequency  # (h w, 2, width / 4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)


def sample(x, points):
    """Bilinear values of maps x (B, C, h, w) at points (B, P, 2), (x, y) in 0..1 -> (B, C, P)."""
    return F.grid_sample(x, 2 * points[:, :, None] - 1, padding_mode="border", align_corners=False)[..., 0]


def linear(dim_in, dim_out):
    layer = nn.Linear(dim_in, dim_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(*widths):
    layers = [layer for pair in zip(widths, widths[1:]) for layer in (linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# --- Pixel decoder: the levels learn from each other ------------------------------------------------------------------
class DeformableAttention(nn.Module):
    """Each token reads a few places per head and level, at offsets it chooses (Zhu et al., Deformable DETR, 2021).
    query, value (B, N, width): the tokens of all levels in a row; sizes: (h, w) per level -> (B, N, width)."""

    def __init__(self, width, heads, levels=3, points=4):
        super().__init__()
        self.shape = heads, levels, points
        self.value, self.proj = linear(width, width), linear(width, width)
        self.weights = nn.Linear(width, heads * levels * points)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        for p in (*self.weights.parameters(), self.offsets.weight):
            nn.init.zeros_(p)
        # at first head h looks towards 2 pi h / heads, its points 1, 2, .. pixels away, all with equal weight
        angle = 2 * math.pi * torch.arange(heads) / heads
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # (heads, 2), on the border of the unit square
        start = ray[:, None, None] * torch.arange(1, points + 1)[:, None]  # (heads, 1, points, 2)
        self.offsets.bias.data.copy_(start.expand(-1, levels, -1, -1).flatten())

    def forward(self, query, value, sizes):
        heads, levels, points = self.shape
        weights = self.weights(query).unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, (levels, points))
        offsets = self.offsets(query).unflatten(-1, (heads, levels, points, 2))  # (B, N, ..., 2), in pixels
        here = torch.cat([centres(size, query.device) for size in sizes])[:, None, None]  # (N, 1, 1, 2)
        value = self.value(value).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, d, N)
        out = 0
        for i, (x, (h, w)) in enumerate(zip(value.split([h * w for h, w in sizes], -1), sizes)):
            at = here + offsets[:, :, :, i] / offsets.new_tensor([w, h])  # (B, N, heads, points, 2)
            at = 2 * at.transpose(1, 2).flatten(0, 1) - 1  # (B heads, N, points, 2)
            seen = F.grid_sample(x.unflatten(2, (h, w)), at, align_corners=False)  # (B heads, d, N, points), 0 outside
            out = out + (seen * weights[:, :, :, i].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.proj(out.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2))


class DeformableLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.attn, self.norm1 = DeformableAttention(width, heads), nn.LayerNorm(width)
        self.ffn, self.norm2 = mlp(width, ffn, width), nn.LayerNorm(width)

    def forward(self, x, pos, sizes):
        x = self.norm1(x + self.attn(x + pos, x, sizes))
        return self.norm2(x + self.ffn(x))


class PixelDecoder(nn.Module):
    """feats 4 x (B, dim, ., .), finest first -> maps 3 x (B, width, ., .), coarsest first, for the queries to read, and
    pixels (B, width, h, w), the finest. The three mix by deformable attention ("deform") or a top-down sum ("fpn")."""

    def __init__(self, dim, width, kind, layers, heads, ffn):
        super().__init__()
        if kind not in ("fpn", "deform"):
            raise ValueError(f"pixel decoder {kind!r} is unknown: use 'fpn' or 'deform'")
        laterals = [nn.Sequential(nn.Conv2d(dim, width, 1), nn.GroupNorm(32, width)) for _ in range(4)]
        self.laterals = nn.ModuleList(laterals)
        self.deform = kind == "deform"
        if self.deform:
            self.level_embed = nn.Parameter(torch.randn(3, width))
            self.layers = nn.ModuleList(DeformableLayer(width, heads, ffn) for _ in range(layers))
        groups = 1 if self.deform else width  # the finest map costs the most: the light decoder filters it depthwise
        smooth = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.embed = nn.Sequential(smooth, nn.GroupNorm(32, width), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, feats):
        finest, *maps = [lateral(x) for lateral, x in zip(self.laterals, feats, strict=True)]
        maps, sizes = maps[::-1], [x.shape[-2:] for x in maps[::-1]]
        if self.deform:
            pos = [sine_position(size, len(e), e.device) + e for size, e in zip(sizes, self.level_embed)]
            pos = torch.cat(pos)  # (N, width)
            x = torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)  # (B, N, width)
            for layer in self.layers:
                x = layer(x, pos, sizes)
            maps = x.transpose(1, 2).split([h * w for h, w in sizes], 2)
            maps = [x.unflatten(2, size) for x, size in zip(maps, sizes)]
        else:
            for i in (1, 2):
                maps[i] = maps[i] + resize(maps[i - 1], sizes[i])
        return maps, self.embed(finest + resize(maps[2], finest.shape[-2:]))


# --- Mask classification ----------------------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (linear(width, width) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        q, k, v = self.q(query), self.k(key), self.v(value)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, ., d)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class MaskLayer(nn.Module):
    """Queries read the map under their masks, then each other; post-norm."""

    def __init__(self, width, heads, ffn):
        super().__init__()
        self.read, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.talk, self.norm2 = Attention(width, heads), nn.LayerNorm(width)
        self.ffn, self.norm3 = mlp(width, ffn, width), nn.LayerNorm(width)

    def forward(self, x, pos, tokens, tokens_pos, mask):
        x = self.norm1(x + self.read(x + pos, tokens + tokens_pos, tokens, mask))
        x = self.norm2(x + self.talk(x + pos, x + pos, x))
        return self.norm3(x + self.ffn(x))


class MaskDecoder(nn.Module):
    """Each query names a class (K, or "no object") and the pixels it stands for (Cheng et al., Mask2Former, 2022).

    feats 4 x (B, dim, ., .) -> dict for the query initialisation and the L layers after it: logits (L+1, B, Q, K+1);
    masks as two factors, embed (L+1, B, Q, width) and pixels (B, width, h, w), multiplied out only where used.
    The paper's size: width=256, queries=100, layers=9, heads=8, ffn=2048, pixel="deform". ValueError on bad arguments.
    """

    def __init__(self, dim, num_classes, width=64, queries=32, layers=3, heads=4, ffn=256,
                 pixel="fpn", pixel_layers=6, pixel_ffn=1024, points=12544, oversample=3, importance=0.75,
                 no_object=0.1, weights=(2, 5, 5), void="negative"):
        super().__init__()
        if width % 32:
            raise qsd.UserError(f"--width {width}: GroupNorm wants a multiple of 32")
        if queries < num_classes:
            raise qsd.UserError(f"{queries} queries for {num_classes} classes: each class needs a query of its own")
        if void not in ("negative", "ignore"):
            raise ValueError(f"void {void!r} is unknown: use 'negative' (outside every mask) or 'ignore' (left out)")
        self.num_classes, self.weights, self.void = num_classes, weights, void
        self.points, self.oversample, self.importance = points, oversample, importance
        self.pixel_decoder = PixelDecoder(dim, width, pixel, pixel_layers, heads, pixel_ffn)
        self.layers = nn.ModuleList(MaskLayer(width, heads, ffn) for _ in range(layers))
        self.query = nn.Parameter(torch.randn(queries, width))
        self.query_pos = nn.Parameter(torch.randn(queries, width))
        self.level_embed = nn.Parameter(torch.randn(3, width))
        self.norm = nn.LayerNorm(width)
        self.classify, self.mask_embed = nn.Linear(width, num_classes + 1), mlp(width, width, width, width)
        self.register_buffer("class_weight", torch.tensor([1.0] * num_classes + [no_object]), persistent=False)

    def forward(self, feats):
        maps, pixels = self.pixel_decoder(feats)
        levels = []
        for x, level in zip(maps, self.level_embed):
            pos = sine_position(x.shape[-2:], x.shape[1], x.device)
            # masks are linear in the pixels: those of a small map are the small versions of the full masks
            levels.append((x.flatten(2).transpose(1, 2) + level, pos, resize(pixels, x.shape[-2:]).flatten(2)))
        x = self.query.expand(pixels.shape[0], -1, -1)  # (B, Q, width)
        states = [self.norm(x)]
        for i, layer in enumerate(self.layers):
            tokens, pos, small = levels[i % 3]  # the three coarser levels in turn, coarsest first
            x = layer(x, self.query_pos, tokens, pos, attended(self.mask_embed(states[-1]) @ small)[:, None])
            states.append(self.norm(x))
        states = torch.stack(states)
        return {"logits": self.classify(states), "embed": self.mask_embed(states), "pixels": pixels}

    def scores(self, outputs, size=None):
        """Semantic scores (B, K, h, w), or at `size`: where its mask is, each query votes for its classes, "no object" left out."""
        with torch.autocast(outputs["pixels"].device.type, enabled=False):
            masks = torch.einsum("bqc,bchw->bqhw", outputs["embed"][-1].float(), outputs["pixels"].float())
            masks = (resize(masks, size) if size else masks).sigmoid()
            return torch.einsum("bqk,bqhw->bkhw", outputs["logits"][-1].float().softmax(-1)[..., :-1], masks)

    def loss(self, outputs, label, generator=None, share=None):
        """Class, BCE and dice losses after matching, summed over the outputs; label (B, H, W) int64, 255 = ignore.

        -> "loss", and for the log the last output's "ce", "bce", "dice", unweighted. The generator, on the label's
        device, draws the points. share: what to divide by (see count_share) where this is only a part of the batch.
        """
        with torch.autocast(label.device.type, enabled=False):
            logits, embed, pixels = (outputs[key].float() for key in ("logits", "embed", "pixels"))
            classes, counts, target, keep = self.targets(label)
            query, says = self.match(logits, embed, pixels, classes, counts, target, keep, generator)

            weight = self.class_weight[says].flatten(1)  # (L+1, B Q)
            ce = F.cross_entropy(logits.flatten(0, 2), says.flatten(), reduction="none").view_as(weight)
            masks = sum(counts) if share is None else share[0]
            no_object = self.class_weight[-1] * (len(label) * says.shape[2] - masks)
            ce = (ce * weight).sum(1) / (masks + no_object)  # (L+1,)

            (L, B, S), (h, w), (H, W) = query.shape, pixels.shape[-2:], label.shape[-2:]
            embed = embed.gather(2, query[..., None].expand(-1, -1, -1, embed.shape[-1]))  # (L+1, B, S, width)
            x = embed.permute(1, 2, 0, 3).flatten(1, 2) @ pixels.flatten(2)  # masks of the matched queries only
            x = x.view(B * S * L, 1, h, w)
            if self.points >= H * W:  # every pixel
                x = resize(x, (H, W)).view(B, S, L, -1)
                t, keep = target.view(B, S, 1, -1), keep.view(B, 1, 1, -1)
            else:
                points = self.uncertain_points(x, generator)  # (B S (L+1), P, 2)
                x = sample(x, points).view(B, S, L, -1)
                t = sample(target.view(B * S, 1, H, W), points.view(B * S, -1, 2)).view_as(x)
                keep = sample(keep, points.view(B, -1, 2)).view_as(x)
            p = x.sigmoid()  # (B, S, L+1, P); t = 0 in void, which is a negative if keep = 1 and nothing if keep = 0
            bce = (keep * F.softplus(x) - t * x).sum(-1) / keep.sum(-1).clamp(min=1e-6)
            dice = 1 - (2 * (t * p).sum(-1) + 1) / ((keep * p).sum(-1) + t.sum(-1) + 1)

            real = torch.arange(S, device=x.device) < torch.tensor(counts, device=x.device)[:, None]  # (B, S), not padding
            bce, dice = ((each * real[..., None]).sum((0, 1)) / max(masks, 1) for each in (bce, dice))  # (L+1,)
            loss = sum(weight * each.sum() for weight, each in zip(self.weights, (ce, bce, dice), strict=True))
            return {"loss": loss, "ce": ce[-1].detach(), "bce": bce[-1].detach(), "dice": dice[-1].detach()}

    def targets(self, label):
        """One mask per class present: classes (B, S), counts[b] real ones and then padding; their masks (B, S, H, W);
        and the pixels that count, keep (B, 1, H, W)."""
        void = label == IGNORE
        present = torch.zeros(len(label), self.num_classes + 1, dtype=torch.bool, device=label.device)
        present = present.scatter(1, label.masked_fill(void, self.num_classes).flatten(1), True)[:, :-1]
        counts = present.sum(1).tolist()
        classes = present.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, *counts)]
        keep = ~void if self.void == "ignore" else torch.ones_like(void)
        return classes, counts, (label[:, None] == classes[..., None, None]).float(), keep[:, None].float()

    @torch.no_grad()
    def match(self, logits, embed, pixels, classes, counts, target, keep, generator=None):
        """Give each class present a query, at least total cost -> query (L+1, B, S); and the class each query should
        name, says (L+1, B, Q), K = none. The costs of all outputs and images are computed and fetched together."""
        (B, _, h, w), device = pixels.shape, pixels.device
        if self.points >= h * w:  # a mask knows no more than its own pixels
            points = centres((h, w), device).expand(B, -1, -1)
        else:
            points = torch.rand(B, self.points, 2, generator=generator, device=device)  # shared by an image's masks
        x = embed.transpose(0, 1).flatten(1, 2) @ sample(pixels, points)  # (B, (L+1) Q, P)
        t, keep = (sample(y, points).transpose(1, 2) for y in (target, keep))  # (B, P, S), (B, P, 1)
        p = x.sigmoid()
        # as in loss(), for all pairs (B, (L+1) Q, S)
        bce = (F.softplus(x) @ keep - x @ t) / keep.sum(1, keepdim=True).clamp(min=1e-6)
        dice = 1 - (2 * p @ t + 1) / (p @ keep + t.sum(1, keepdim=True) + 1)
        named = logits.softmax(-1).transpose(0, 1).flatten(1, 2).gather(2, classes[:, None].expand_as(bce))
        cost = sum(weight * each for weight, each in zip(self.weights, (-named, bce, dice), strict=True))
        cost = cost.nan_to_num()  # a diverged step is skipped by its gradients, whatever it is matched to
        cost, classes = cost.unflatten(1, logits.shape[::2]).transpose(2, 3).cpu().numpy(), classes.cpu().numpy()
        query = np.zeros((len(logits), *classes.shape), dtype=np.int64)
        says = np.full(logits.shape[:3], self.num_classes)
        for l, b in np.ndindex(says.shape[:2]):
            _, columns = hungarian(cost[b, l, : counts[b]])  # (classes, queries)
            query[l, b, : counts[b]], says[l, b, columns] = columns, classes[b, : counts[b]]
        return torch.from_numpy(query).to(device), torch.from_numpy(says).to(device)

    @torch.no_grad()
    def uncertain_points(self, x, generator=None):
        """Points for masks x (n, 1, h, w) -> (n, P, 2): a share `importance` the most uncertain (logit nearest 0) of
        `oversample` P candidates, the rest anywhere (Kirillov et al., PointRend, 2020)."""
        many, hard = self.oversample * self.points, int(self.importance * self.points)
        points = torch.rand(len(x), many + self.points - hard, 2, generator=generator, device=x.device)
        chosen = sample(x, points[:, :many])[:, 0].abs().topk(hard, largest=False).indices
        return torch.cat([points.gather(1, chosen[..., None].expand(-1, -1, 2)), points[:, many:]], 1)


def attended(masks):
    """Mask logits (B, Q, N) -> which tokens each query may read, bool: its mask, or everything if its mask is empty."""
    inside = masks.detach() >= 0
    return inside | ~inside.any(-1, keepdim=True)


def hungarian(cost):
    """The assignment of least total cost: each row gets a column of its own (or each column a row, if they are fewer).

    cost (n, m) array -> rows, cols, each (min(n, m),), rows ascending. Exact, in O(n^2 m), by shortest augmenting paths
    (Jonker and Volgenant, 1987). ValueError where a cost is NaN or infinite.
    """
    cost = np.asarray(cost, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("matching costs hold NaN or inf: the model has diverged; lower the learning rate or use fp32")
    if len(cost) > cost.shape[1]:
        cols, rows = hungarian(cost.T)
        order = rows.argsort()
        return rows[order], cols[order]
    n, m = cost.shape
    # prices u, v with cost - u - v >= 0 everywhere, and = 0 on all assigned pairs, prove an assignment cheapest
    u, v = cost.min(1), np.zeros(m)
    col_of, row_of = np.full(n, -1), np.full(m, -1)
    for row, col in enumerate(cost.argmin(1)):  # whoever likes a column best and comes first has it
        if row_of[col] < 0:
            col_of[row], row_of[col] = col, row
    for start in np.flatnonzero(col_of < 0):  # for the others: Dijkstra over the costs less prices, to a free column
        length, parent, done = np.full(m, np.inf), np.full(m, start), np.zeros(m, dtype=bool)
        row, path = start, 0.0
        while row >= 0:
            step = path + cost[row] - u[row] - v
            closer = (step < length) & ~done
            length[closer], parent[closer] = step[closer], row
            col = np.where(done, np.inf, length).argmin()
            path, row, done[col] = length[col], row_of[col], True
        done[col] = False  # the free column has no row, and keeps its price
        gain = path - length[done]
        u[start] += path
        u[row_of[done]] += gain
        v[done] -= gain
        while row != start:  # back along the path, each row takes the column that was reached from it
            row = parent[col]
            row_of[col], col_of[row], col = row, col, col_of[row]
    return np.arange(n), col_of


def count_share(labels):
    """Masks (one per class present in an image) and labelled pixels of the average part of a step; labels: this process's parts.

    Losses divided by these sum, over all parts and processes, to the loss of the whole batch at once."""
    masks = sum(len(label.unique()) - int((label == IGNORE).any()) for part in labels for label in part)
    pixels = sum(int((part != IGNORE).sum()) for part in labels)
    total = torch.tensor([masks, pixels], dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return (total / len(labels)).tolist()


# --- One class per pixel, the same interface --------------------------------------------------------------------------
class PixelClassifier(nn.Module):
    """Loss and scores of the decoders whose outputs are class logits (B, K, h, w)."""

    def loss(self, outputs, label, generator=None, share=None):  # the generator is for decoders that draw points
        logits = resize(outputs.float(), label.shape[1:])
        ce = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
        return {"loss": ce / max(count_share([label])[1] if share is None else share[1], 1)}

    def scores(self, outputs, size=None):
        return (resize(outputs.float(), size) if size else outputs.float()).softmax(1)


class Linear(PixelClassifier):
    """LayerNorm and one linear layer per map; their logits, added at the finest size, are linear in all four blocks."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes)) for _ in range(4))

    def forward(self, feats):
        logits = [head(x.movedim(1, -1)).movedim(-1, 1) for head, x in zip(self.heads, feats, strict=True)]
        return sum(resize(x, feats[0].shape[-2:]) for x in logits)


class SemFPN(PixelClassifier):
    """Panoptic FPN's semantic branch (Kirillov et al., 2019), as in the supplement's Table 7: a top-down pyramid of
    `width`, then per level 3x3 convolutions of `channels`, doubling the size after each until all are finest.

    384 and 256 give 11.2 M parameters on ViT-S as in the paper, 11.8 M on ViT-B (paper 13.3 M); the usual 256 and 128
    would give 4.4 M.
    """

    def __init__(self, dim, num_classes, width=384, channels=256):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(dim, width, 1) for _ in range(4))
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.towers = nn.ModuleList()
        for steps in (1, 1, 2, 3):  # at 4, 2, 1, 0.5 times the grid
            widths = [width] + [channels] * steps
            convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths, widths[1:])]
            self.towers.append(nn.ModuleList(nn.Sequential(c, nn.GroupNorm(32, channels), nn.ReLU()) for c in convs))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, feats):
        maps = [lateral(x) for lateral, x in zip(self.laterals, feats, strict=True)]
        sizes = [x.shape[-2:] for x in maps]
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize(maps[i + 1], sizes[i])
        total = 0
        for i, (x, output, tower) in enumerate(zip(maps, self.outputs, self.towers)):
            x = output(x)
            for step, block in enumerate(tower, 1):
                x = resize(block(x), sizes[max(0, i - step)])
            total = total + x
        return self.classify(total)


# --- Stage 2: the constants -------------------------------------------------------------------------------------------------------------

@dataclass
class Config(qsd.LossConfig):
    """Every constant of stage 2 and of the one-stage baselines."""
    # what is trained
    data: str = "gtav"             # a name of data.DATASETS, or several joined with +; picks the preset below
    root: str = "data"             # the folder that holds the data sets
    split: str = "train"           # the images trained on
    labels: str = "1"              # share of the labelled images: 1, 1/4, 1/8, 1/16 (Table 3), a fixed subset
    classes: int = 0               # number of classes of your own folder; 0 = as the data set says
    encoder: str = "dinov2_vits14"  # a name of qsd.ENCODERS or a checkpoint, usually distill.py's student.pt
    pretrained: bool = True        # no: the encoder starts from random weights
    depth: int | None = None       # only the encoder's first k blocks
    freeze: bool = True            # the paper's stage 2; no: the encoder is trained, too (Table 5's last row but one)
    out: str = "runs/segment"      # log.jsonl, last.pt, segmenter.pt
    # decoder
    decoder: Literal["mask", "fpn", "linear"] = "mask"  # Mask2Former-like; SemFPN (supplement, Table 7); one linear layer
    blocks: Literal["four", "last"] = "four"  # encoder blocks it reads: official [3, 5, 7, 11] of 12; the last at all four scales
    width: int = 256               # channels of the mask decoder
    queries: int = 100             # masks it proposes
    decoder_layers: int = 9        # its transformer layers
    ffn: int = 2048                # their hidden width
    pixel: Literal["fpn", "deform"] = "deform"  # its pixel decoder: Mask2Former's; fpn: light
    heads: int = 8                 # attention heads of both
    points: int = 12544            # pixels on which its masks are compared
    void: Literal["negative", "ignore"] = "negative"  # pixels labelled 255: outside every mask (official) or left out
    # one-stage distillation (equation 3)
    kd: float = 0.0                # weight of the objective --loss, in units of its published weight; 0 = no teacher
    kd_logits: float = 0.0         # weight of Hinton's logit distillation; its teacher is a segmenter.pt
    teacher: str = "none"          # encoder name or checkpoint for --kd; a segmenter.pt for --kd_logits
    # images
    size: int = 512                # side of the square crop, pixels
    patch: int = 16                # patch side of the encoder, pixels
    cache: int = 0                 # read the copy that `python data.py --cache SIZE` made with this short side; 0 = the originals
    cat_max_ratio: float = 0.75    # a crop is drawn again while one class fills more of it
    workers: int = 8               # image-loading processes per training process; 0 = load in the training process
    # optimiser
    batch: int = 4                 # global, whatever the number of processes
    micro: int = 4                 # most images of one forward pass; the rest is gradient accumulation
    budget: str = "40000"          # 40000 (steps), 50ep, 2h, 3e18flop: the schedule follows the fraction spent
    lr: float = 1e-4               # of the decoder
    lr_backbone: float = 1e-5      # of the encoder where it is trained (the paper's 1e-5)
    power: float = 0.9             # of the polynomial decay to 0
    weight_decay: float = 0.05     # not on norms and embeddings
    # running
    seed: int = 42                 # as the official code
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    log_every: int = 50            # steps
    val_every: int = 0             # steps between evaluations on the source's own val split; best.pt is the best, segmenter.pt the last
    save_minutes: float = 10.0     # between checkpoints
    max_skips: int = 10            # non-finite steps in a row that end the run


FREE = {"root", "workers", "micro", "log_every", "val_every", "save_minutes", "max_skips"}  # may change when a run resumes

LIGHT = dict(width=64, queries=32, decoder_layers=3, ffn=256, heads=4, pixel="fpn")  # the light decoder of the small worlds
TOY = LIGHT | dict(encoder="toy_small", size=64, patch=8, batch=8, micro=8, budget="200", lr=2e-3, lr_backbone=1e-3, workers=1,
                   seed=0, log_every=20, cat_max_ratio=1.0, blocks="last", dcd_pool=1)
CAMVID = LIGHT | dict(size=224, points=2048, batch=8, micro=8, budget="250", lr=1e-3, lr_backbone=1e-4, workers=1, seed=0, log_every=20,
                      dcd_pool=1)
PRESETS = dict.fromkeys(data.TOY_SOURCES, TOY) | {
    "toy-wide": TOY | dict(batch=16, micro=16, budget="700", lr=1.5e-3, lr_backbone=1.5e-3), "camvid": CAMVID}


# --- Encoder and decoder together -----------------------------------------------------------------------------------------

class Segmenter(nn.Module):
    """An encoder and a decoder: x (B, 3, H, W) normalised -> the decoder's outputs."""

    def __init__(self, encoder, decoder, frozen=True, blocks="four"):
        super().__init__()
        self.encoder, self.decoder, self.frozen = encoder, decoder, frozen
        self.layers = feature_layers(encoder.depth) if blocks == "four" else [encoder.depth - 1] * 4
        encoder.requires_grad_(not frozen)

    def features(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):  # frozen: no graph, no memory for it
            return pyramid(self.encoder.blocks_out(x, self.layers), self.grid(x))  # 4 x (B, C, ., .), not normalised

    def forward(self, x):
        return self.decoder(self.features(x))

    def grid(self, x):
        return x.shape[2] // self.encoder.patch_size, x.shape[3] // self.encoder.patch_size


def build_decoder(dim, num_classes, cfg):
    """The decoder that a Config describes, for an encoder of width dim."""
    if cfg.decoder == "linear":
        return Linear(dim, num_classes)
    if cfg.decoder == "fpn":
        return SemFPN(dim, num_classes)
    return MaskDecoder(dim, num_classes, cfg.width, cfg.queries, cfg.decoder_layers, cfg.heads, cfg.ffn, cfg.pixel,
                       points=cfg.points, void=cfg.void)


def load_segmenter(path, device="cpu"):
    """A trained segmenter from segmenter.pt, ready to predict, and the checkpoint it came from."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        encoder, cfg = qsd.ViT(**saved["encoder"]), Config(**saved["config"])
        model = Segmenter(encoder, build_decoder(encoder.embed_dim, len(saved["classes"]), cfg), blocks=cfg.blocks)
        model.load_state_dict(saved["model"])
    except FileNotFoundError:
        raise qsd.UserError(f"{path}: no such file") from None
    except Exception as error:  # the zip reader, the unpickler and the missing keys each raise their own
        raise qsd.UserError(f"{path} is no segmenter.pt of this project ({data.first_line(error)})") from None
    return model.to(device).eval().requires_grad_(False), saved


# --- Prediction and mIoU ----------------------------------------------------------------------------------------------------

def confusion(pred, label, num_classes):
    """Count pixels by (label, prediction): two integer maps of one shape -> (K, K) int64; label 255 is left out."""
    valid = label != IGNORE
    return torch.bincount(label[valid] * num_classes + pred[valid], minlength=num_classes ** 2).view(num_classes, num_classes)


def iou(conf):
    """IoU of each class in [0, 1]; NaN where a class is neither in the labels nor predicted, 0 where it is only predicted."""
    conf = conf.double()
    return conf.diag() / (conf.sum(0) + conf.sum(1) - conf.diag())


def slide(model, x, window, stride):
    """Class scores (B, K, H, W) of x (B, 3, H, W), averaged over windows of one side every `stride` pixels; a short side is padded."""
    H, W = x.shape[2:]
    x = F.pad(x, (0, max(window - W, 0), 0, max(window - H, 0)))
    total = count = 0
    for top in starts(x.shape[2], window, stride):
        for left in starts(x.shape[3], window, stride):
            around = left, x.shape[3] - left - window, top, x.shape[2] - top - window
            scores = model.decoder.scores(model(x[:, :, top:top + window, left:left + window]), (window, window))
            total = total + F.pad(scores, around)
            count = count + F.pad(torch.ones_like(scores[:1, :1]), around)
    return (total / count)[:, :, :H, :W]


def starts(length, window, stride):
    """First pixels of the windows along one side; the last window ends flush with the border."""
    return sorted({min(i, length - window) for i in range(0, length - window + stride, stride)})


@torch.no_grad()
def predict(model, x, window, stride=2 / 3, whole=False, flip=False, scales=(1,)):
    """Class scores (B, K, H, W) of normalised images x (B, 3, H, W) of any size; stride as a share of the window.

    scales: the scores are the mean over the images at these multiples of their size, each resized back."""
    if tuple(scales) != (1,):
        sizes = [[max(1, round(scale * side)) for side in x.shape[2:]] for scale in scales]
        return sum(resize(predict(model, resize(x, size), window, stride, whole, flip), x.shape[2:]) for size in sizes) / len(sizes)
    if flip:
        return predict(model, x, window, stride, whole) + predict(model, x.flip(3), window, stride, whole).flip(3)
    if not whole:
        return slide(model, x, window, max(1, round(stride * window)))
    (H, W), patch = x.shape[2:], model.encoder.patch_size
    padded = F.pad(x, (0, -W % patch, 0, -H % patch))
    return model.decoder.scores(model(padded), padded.shape[2:])[:, :, :H, :W]


def evaluate(model, dataset, window, device, stride=2 / 3, whole=False, flip=False, batch=1, workers=0, title="", scales=(1,)):
    """Confusion matrix (K, K) over labelled images, each process taking its share; scores are resized to the label's size."""
    rank, world, K = dist.get_rank(), dist.get_world_size(), dataset.num_classes
    conf = torch.zeros(K, K, dtype=torch.int64, device=device)
    loader = DataLoader(Subset(dataset, range(rank, len(dataset), world)), batch, num_workers=workers,
                        multiprocessing_context=data.start_method(workers))
    for images, label, _ in tqdm(loader, title, disable=rank > 0, leave=False):
        x = data.normalize(images.to(device), model.encoder.mean, model.encoder.std)
        scores = resize(predict(model, x, window, stride, whole, flip, scales), label.shape[1:])
        conf += confusion(scores.argmax(1), label.to(device), K)
    dist.all_reduce(conf)
    return conf.cpu()


# --- The training step ----------------------------------------------------------------------------------------------------

class Learner(nn.Module):
    """Everything that is trained, as one module for DDP: the segmenter and, in one-stage distillation, the objective."""

    def __init__(self, segmenter, objective, cfg):
        super().__init__()
        self.segmenter, self.objective, self.cfg = segmenter, objective, cfg

    def forward(self, x, label, generator, share, t=None, noise=None, teacher_scores=None):
        segmenter, cfg = self.segmenter, self.cfg
        if self.objective is None and teacher_scores is None:
            outputs = segmenter(x)
            return segmenter.decoder.loss(outputs, label, generator, share)  # Eq. 6
        layers = tuple(self.objective.layers_s) if self.objective else ()
        cls, patches, outs = segmenter.encoder.run(x, layers=layers + tuple(segmenter.layers))
        outputs = segmenter.decoder(pyramid(outs[len(layers):], segmenter.grid(x)))
        losses = segmenter.decoder.loss(outputs, label, generator, share)
        if self.objective:
            kd = self.objective(segmenter.encoder, x, (cls, patches, outs[:len(layers)]), t, noise)
            losses["kd"] = cfg.kd * self.objective.weight * kd["loss"]
        if teacher_scores is not None:  # Hinton's logit distillation, T = 1: KL of the classes at each pixel
            ours, theirs = (scores.clamp(min=1e-6) / scores.clamp(min=1e-6).sum(1, keepdim=True)  # (B, K, H, W)
                            for scores in (segmenter.decoder.scores(outputs, x.shape[2:]), teacher_scores))
            losses["kd_logits"] = cfg.kd_logits * (theirs * (theirs / ours).log()).sum(1).mean()
        losses["loss"] = losses["loss"] + losses.get("kd", 0) + losses.get("kd_logits", 0)  # Eq. 3
        return losses


def parameter_groups(learner, cfg):
    """AdamW's groups: the encoder at lr_backbone, all else at lr; norms and embeddings do not decay, biases do (official)."""
    norms = {id(p) for m in learner.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
    groups = {}
    for name, p in learner.named_parameters():
        if p.requires_grad:
            no_decay = id(p) in norms or name.rpartition(".")[2] in ("query", "query_pos", "level_embed", "gamma")
            lr = cfg.lr_backbone if name.startswith("segmenter.encoder") else cfg.lr
            decay = 0.0 if no_decay else cfg.weight_decay
            groups.setdefault((lr, no_decay), {"params": [], "lr": lr, "peak": lr, "weight_decay": decay})["params"].append(p)
    return list(groups.values())


def main(argv=None):
    cfg = data.configure(Config, PRESETS, argv)
    rank, world, device = data.launch()
    out, resumed = Path(cfg.out), data.open_run(cfg, "segmenter.pt", FREE)
    if resumed == "finished":
        return print(f"{out}/segmenter.pt is finished; nothing to do") if rank == 0 else None
    if (cfg.kd or cfg.kd_logits) and cfg.freeze:
        data.fail("--kd and --kd_logits train the encoder: add --freeze no")
    if cfg.val_every and "+" in cfg.data:
        data.fail(f"--val_every: validation is on one set's own val split, not on {cfg.data}")
    if (cfg.kd or cfg.kd_logits) and cfg.teacher == "none":
        data.fail("--kd and --kd_logits need a --teacher")

    torch.manual_seed(cfg.seed)
    transform = data.segment_transform(cfg.size, cat_max_ratio=cfg.cat_max_ratio)
    dataset = data.scenes(cfg.data, cfg.root, cfg.split, transform, cfg.labels, cfg.classes or None, cfg.cache or None)
    encoder = qsd.load_vit(cfg.encoder, cfg.size, cfg.patch, depth=cfg.depth, pretrained=cfg.pretrained)
    validation = data.scenes(cfg.data, cfg.root, "val", data.eval_transform(cfg.data), classes=cfg.classes or None) if cfg.val_every else None
    segmenter = Segmenter(encoder, build_decoder(encoder.embed_dim, dataset.num_classes, cfg), cfg.freeze, cfg.blocks).to(device)
    objective = teacher = judge = None
    if cfg.kd:
        teacher = qsd.load_vit(cfg.teacher, cfg.size, cfg.patch).to(device).eval().requires_grad_(False)
        objective = qsd.LOSSES[cfg.loss](encoder, teacher, cfg).to(device)
    if cfg.kd_logits:
        judge, trained = load_segmenter(cfg.teacher, device)
        if trained["classes"] != list(dataset.classes):
            data.fail(f"--teacher {cfg.teacher} was trained on other classes than those of --data {cfg.data}")
    statistics = None
    if cfg.kd and cfg.target_norm == "phis":
        statistics = qsd.target_statistics(teacher, data.first_images(dataset).to(device))
    learner, autocast = Learner(segmenter, objective, cfg), data.precision(cfg.precision, device)
    N = (cfg.size // cfg.patch) ** 2

    def learn(model, images, label, draws, share):
        """The losses on one batch: images uint8 (B, 3, H, W), label (B, H, W), draw numbers (B) naming all randomness."""
        x = data.normalize(images.to(device, non_blocking=True), encoder.mean, encoder.std)
        generator = torch.Generator(device).manual_seed(data.mix(cfg.seed, 5, draws[0].item()))  # of the sampled points
        with autocast:
            with torch.no_grad():
                t = noise = scores = None
                if teacher:
                    noise = data.noise(draws, N, cfg.seed).to(device)    # (B, N): decides which patches are hidden
                    t = teacher.run(data.restate(x, encoder, teacher), layers=objective.layers_t)
                    t = qsd.normalize_targets(t, cfg.target_norm, statistics)
                if judge:
                    scores = judge.decoder.scores(judge(data.restate(x, encoder, judge.encoder)), x.shape[2:])
            return model(x, label.to(device, non_blocking=True), generator, share, t, noise, scores)

    # two images through one step: what it costs, and which parameters it does not touch
    ancestors = qsd.lineage(cfg.encoder)[0]
    maps = [x.detach() for x in segmenter.features(torch.zeros(1, 3, cfg.size, cfg.size, device=device))]
    macs = data.count_flops(lambda: segmenter.decoder(maps)) / 2
    if rank == 0:
        own, below = (sum(p.numel() for p in module.parameters()) / 1e6 for module in (segmenter.decoder, encoder))
        print(f"{cfg.decoder} decoder: {own:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds at {cfg.size} px; "
              f"encoder {'frozen' if cfg.freeze else 'trained'}: {below:.2f} M parameters")
    two = torch.zeros(2, 3, cfg.size, cfg.size, dtype=torch.uint8), torch.zeros(2, cfg.size, cfg.size, dtype=torch.int64), torch.arange(2), None
    cost = data.count_flops(lambda: learn(learner, *two)["loss"].backward()) / 2
    for p in learner.parameters():
        p.requires_grad_(p.grad is not None)
    learner.zero_grad()

    warnings.filterwarnings("ignore", "Grad strides do not match")  # 1x1 and depthwise convolutions: a copy of a small tensor
    model = DistributedDataParallel(learner)
    optimizer = torch.optim.AdamW(parameter_groups(learner, cfg), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    parts = dict(learner=learner, optimizer=optimizer, scaler=scaler)
    spent = data.resume(resumed, **parts)                                # this stage's ledger
    spent.setdefault("best_miou", 0.0)
    unit, budget = data.parse_budget(cfg.budget, len(dataset) / cfg.batch)
    passes = data.passes(cfg.batch, cfg.micro, world, pairs=bool(cfg.kd))
    loader = data.loader(dataset, cfg.batch, cfg.seed, spent["steps"], rank, world, passes, workers=cfg.workers)
    batches = iter(loader)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        data.start_log(cfg, spent["steps"], device=data.device_name(device), world=world, gflop_per_image=cost / 1e9)
    bar = tqdm(initial=spent["steps"], desc=str(out), disable=rank > 0, unit="step", dynamic_ncols=True)

    def result():  # what evaluation needs
        return dict(model=segmenter.state_dict(), encoder=encoder.config, config=data.as_plain(cfg), classes=list(dataset.classes),
                    colors=[list(c) for c in dataset.colors], ledger=ancestors + [dict(script="segment", data=cfg.data, **spent)])

    signals, skips, saved = data.catch_signals(), 0, time.time()
    while spent[unit] < budget:
        began = time.time()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - spent[unit] / budget) ** cfg.power
        micros = [next(batches) for _ in range(passes)]
        waited = time.time() - began
        share, totals = count_share([label for _, label, _ in micros]), {}
        for i, (images, label, draws) in enumerate(micros):
            with model.no_sync() if i < passes - 1 else nullcontext():
                losses = learn(model, images, label, draws, share)
                scaler.scale(losses["loss"] / passes).backward()
            totals = {k: totals.get(k, 0) + v.detach() / passes for k, v in losses.items()}
        bad, stop, seconds = data.agree(not data.step(optimizer, scaler), signals[0] if signals else 0, time.time() - began)

        data.spend(spent, steps=1, images=cfg.batch, tokens=cfg.batch * N, flops=cfg.batch * cost, seconds=seconds, skipped=bad, waited=waited)
        skips = skips + 1 if bad else 0
        data.report(cfg, bar, spent, unit, budget, totals, optimizer)
        if cfg.val_every and spent["steps"] % cfg.val_every == 0:
            with autocast:
                miou = 100 * iou(evaluate(segmenter, validation, cfg.size, device, title="validation")).nanmean().item()
            if rank == 0:
                data.log(out, dict(step=spent["steps"], val_miou=round(miou, 2)))
                if miou > spent["best_miou"]:
                    spent["best_miou"] = miou
                    data.save(out / "best.pt", result())
        saved = data.keep(cfg, saved, stop or skips == cfg.max_skips, spent, **parts)
        data.leave(cfg, spent, stop, skips, dataset, loader, draws)

    if rank == 0:
        data.finish(cfg, "segmenter.pt", result())
    bar.close()


if __name__ == "__main__":
    data.cli(main, qsd.UserError)
