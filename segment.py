"""Stage 2 of GKD: train a decoder on labelled source images, the encoder frozen; and the one-stage baselines.

    python segment.py --data gtav --root /data --encoder runs/source/student.pt --out runs/gtav
    python segment.py --data voc --decoder boxes --root /data --encoder runs/source/student.pt --out runs/voc
    python segment.py --data folder --root my_images --classes 5 --encoder dinov2_vits14 --out runs/mine

The same command resumes. With `--kd 1 --loss cwd --teacher dinov2_vitb14 --freeze no` a rival of the paper learns
from labels and teacher at once. --kd_logits 1 is Hinton's distillation, which the paper does not have.
"""
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList

import data
import distill
import qsd
from data import IGNORE
from qsd import UserError


# --- From the encoder to the decoders --------------------------------------------------------------------------------

def pyramid(outs, grid):
    """Outputs of four blocks as maps of 4, 2, 1 and 0.5 times the token grid (official).

    outs 4 x (B, N, C), not normalised; grid (h, w), h w = N -> 4 x (B, C, ., .), finest first.
    """
    maps = []
    for x, scale in zip(outs, (4, 2, 1, 0.5), strict=True):
        x = x.transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
        maps.append(resize(x, [max(1, int(scale * side)) for side in grid]))
    return maps


def resize(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def centres(size, device):
    """Pixel centres of an (h, w) grid, row by row: (h w, 2) points (x, y) in 0..1."""
    h, w = size
    y = (torch.arange(h, device=device) + 0.5) / h
    x = (torch.arange(w, device=device) + 0.5) / w
    x, y = torch.meshgrid(x, y, indexing="xy")  # (h, w) each
    return torch.stack([x, y], -1).flatten(0, 1)


def sine_position(size, width, device):
    """mmdet's sines and cosines of the places of an (h, w) grid, of y, then of x: (h w, width)."""
    h, w = size
    frequency = 2 * math.pi * 10000 ** (-4 * torch.arange(width // 4, device=device) / width)
    y = torch.arange(1, h + 1, device=device) / (h + 1e-6)
    x = torch.arange(1, w + 1, device=device) / (w + 1e-6)
    y, x = torch.meshgrid(y, x, indexing="ij")  # (h, w) each
    angle = torch.stack([y, x], -1).flatten(0, 1)[:, :, None] * frequency  # (h w, 2, width / 4)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def sample(x, points):
    """Bilinear values of maps x (B, C, h, w) at points (B, P, 2), (x, y) in 0..1 -> (B, C, P); 0 outside."""
    points = 2 * points[:, :, None] - 1  # (B, P, 1, 2), in -1..1
    return F.grid_sample(x, points, align_corners=False)[..., 0]


def drawn(module, draw, zero_biases=True):
    """The module with initial weights as mmdet draws them."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            draw(parameter)
        elif zero_biases:
            nn.init.zeros_(parameter)
    return module


zeros = partial(drawn, draw=nn.init.zeros_)
xavier_uniform = partial(drawn, draw=nn.init.xavier_uniform_)
xavier_normal = partial(drawn, draw=nn.init.xavier_normal_, zero_biases=False)
caffe2_xavier = partial(drawn, draw=partial(nn.init.kaiming_uniform_, a=1))


def with_norm(conv):
    return nn.Sequential(conv, nn.GroupNorm(32, conv.out_channels))


def feed_forward(width, hidden):
    return xavier_normal(nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)))


# --- Pixel decoder: the levels learn from each other -----------------------------------------------------------------

class DeformableAttention(nn.Module):
    """Each token reads a few places per head and level, at offsets it chooses (Zhu et al., 2021).

    query, value (B, N, width): tokens of all levels in a row; sizes: (h, w) of each -> (B, N, width).
    """
    def __init__(self, width, heads, levels=3, points=4):
        super().__init__()
        self.heads = heads
        self.levels = levels
        self.points = points
        self.value_proj = xavier_uniform(nn.Linear(width, width))
        self.output_proj = xavier_uniform(nn.Linear(width, width))
        self.attention_weights = zeros(nn.Linear(width, heads * levels * points))
        self.sampling_offsets = zeros(nn.Linear(width, heads * levels * points * 2))

        # At first head h looks in the direction 2 pi h / heads, its points 1, 2, .. pixels away.
        angle = 2 * math.pi * torch.arange(heads) / heads
        ray = torch.stack([angle.cos(), angle.sin()], -1)  # (heads, 2)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # on the border of the unit square
        distance = torch.arange(1, points + 1)[:, None]  # (points, 1)
        start = ray[:, None, None] * distance  # (heads, 1, points, 2)
        self.sampling_offsets.bias.data.copy_(start.expand(-1, levels, -1, -1).flatten())

    def forward(self, query, value, sizes):
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))  # (B, N, heads, levels, points)
        offsets = self.sampling_offsets(query)  # in pixels of the level
        offsets = offsets.unflatten(-1, (self.heads, self.levels, self.points, 2))
        here = torch.cat([centres(size, query.device) for size in sizes])[:, None, None]  # (N, 1, 1, 2)
        value = self.value_proj(value).unflatten(-1, (self.heads, -1))  # (B, N, heads, d)
        value = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B heads, d, N)
        levels = value.split([h * w for h, w in sizes], -1)

        out = 0
        for i, (h, w) in enumerate(sizes):
            at = here + offsets[:, :, :, i] / offsets.new_tensor([w, h])  # (B, N, heads, points, 2)
            at = 2 * at.transpose(1, 2).flatten(0, 1) - 1  # (B heads, N, points, 2)
            seen = F.grid_sample(levels[i].unflatten(2, (h, w)), at, align_corners=False)
            weight = weights[:, :, :, i].transpose(1, 2).flatten(0, 1)  # (B heads, N, points)
            out = out + (seen * weight[:, None]).sum(-1)  # (B heads, d, N)
        out = out.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2)  # (B, N, width)
        return self.output_proj(out)


class DeformableLayer(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.self_attn = DeformableAttention(width, heads)
        self.ffn = feed_forward(width, ffn)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x, pos, sizes):
        x = self.norms[0](x + self.self_attn(x + pos, x, sizes))
        return self.norms[1](x + self.ffn(x))


class PixelDecoder(nn.Module):
    """The maps that the queries read, and the finest map, whose pixels they compare with.

    feats 4 x (B, dim, ., .), finest first -> maps 3 x (B, width, ., .), coarsest first; pixels (B, width, h, w).
    Levels mix by deformable attention ("deform", Mask2Former's) or a top-down sum ("fpn", light).
    """
    def __init__(self, dim, width, kind, layers, heads, ffn):
        super().__init__()
        self.deform = kind == "deform"
        self.lateral = with_norm(caffe2_xavier(nn.Conv2d(dim, width, 1, bias=False)))
        convs = [xavier_uniform(nn.Conv2d(dim, width, 1)) for _ in range(3)]  # finer ones first
        self.input_convs = nn.ModuleList(map(with_norm, convs[::-1]))
        if self.deform:
            self.level_encoding = nn.Embedding(3, width)
            self.layers = nn.ModuleList(DeformableLayer(width, heads, ffn) for _ in range(layers))
        groups = 1 if self.deform else width  # depthwise where it must be light
        smooth = caffe2_xavier(nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False))
        pixels = caffe2_xavier(nn.Conv2d(width, width, 1))
        self.embed = nn.Sequential(smooth, nn.GroupNorm(32, width), nn.ReLU(), pixels)

    def forward(self, feats):
        finest = self.lateral(feats[0])
        maps = [conv(x) for conv, x in zip(self.input_convs, feats[:0:-1], strict=True)]  # coarsest first
        if self.deform:
            maps = self.attend(maps)
        else:
            for i in (1, 2):
                maps[i] = maps[i] + resize(maps[i - 1], maps[i].shape[-2:])
        return maps, self.embed(finest + resize(maps[2], finest.shape[-2:]))

    def attend(self, maps):
        sizes = [x.shape[-2:] for x in maps]
        positions = []
        for size, level in zip(sizes, self.level_encoding.weight):
            positions.append(sine_position(size, len(level), level.device) + level)
        positions = torch.cat(positions)  # (N, width), of all three maps
        x = torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)  # (B, N, width)
        for layer in self.layers:
            x = layer(x, positions, sizes)
        parts = x.transpose(1, 2).split([h * w for h, w in sizes], 2)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes)]


# --- Mask classification ---------------------------------------------------------------------------------------------

class MaskLayer(nn.Module):
    """Queries read the map under their masks, then each other.

    x (B, Q, width), pos (Q, width): the queries. tokens (B, N, width), tokens_pos (N, width): the map.
    hidden (B, Q, N): True where a query may not read.
    """
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.heads = heads
        self.cross_attn = xavier_normal(nn.MultiheadAttention(width, heads, batch_first=True))
        self.self_attn = xavier_normal(nn.MultiheadAttention(width, heads, batch_first=True))
        self.ffn = feed_forward(width, ffn)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, pos, tokens, tokens_pos, hidden):
        hidden = hidden.repeat_interleave(self.heads, 0)  # (B heads, Q, N)
        keys = tokens + tokens_pos
        read, _ = self.cross_attn(x + pos, keys, tokens, attn_mask=hidden, need_weights=False)
        x = self.norms[0](x + read)
        heard, _ = self.self_attn(x + pos, x + pos, x, need_weights=False)
        x = self.norms[1](x + heard)
        return self.norms[2](x + self.ffn(x))


class MaskDecoder(nn.Module):
    """Each query names one of K classes or "no object", and its pixels (Mask2Former, Cheng et al., 2022).

    feats 4 x (B, dim, ., .) -> a dict: logits (R, B, Q, K+1), and two factors of the masks: embed (R, B, Q, width),
    pixels (B, width, h, w). The queries are read out R times, at first and after each layer.
    """
    # Mask2Former's constants
    ce_weight = 2      # of the three losses
    bce_weight = 5
    dice_weight = 5
    no_object = 0.1    # weight of a query without a mask in the cross-entropy
    oversample = 3     # candidates per point
    importance = 0.75  # share of the points that are the most uncertain candidates

    def __init__(self, dim, num_classes, width=64, queries=32, layers=3, heads=4, ffn=256,
                 pixel="fpn", pixel_layers=6, pixel_ffn=1024, points=12544):
        super().__init__()
        if width % 32 or width % heads:
            raise UserError(f"--width {width}: GroupNorm wants a multiple of 32, attention one of --heads {heads}")
        if queries < num_classes:
            raise UserError(f"{queries} queries for {num_classes} classes: each class needs its own")
        self.num_classes = num_classes
        self.points = points  # on which masks are compared
        self.pixel_decoder = PixelDecoder(dim, width, pixel, pixel_layers, heads, pixel_ffn)
        self.layers = nn.ModuleList(MaskLayer(width, heads, ffn) for _ in range(layers))
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)  # their positions
        self.level_embed = nn.Embedding(3, width)
        self.post_norm = nn.LayerNorm(width)
        self.cls_embed = nn.Linear(width, num_classes + 1)
        self.mask_embed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                                        nn.Linear(width, width))

    def forward(self, feats):
        maps, pixels = self.pixel_decoder(feats)
        levels = []
        for x, level in zip(maps, self.level_embed.weight):
            size = x.shape[-2:]
            tokens = x.flatten(2).transpose(1, 2) + level  # (B, N, width)
            pos = sine_position(size, x.shape[1], x.device)  # (N, width)
            small = resize(pixels, size).flatten(2)  # (B, width, N), for small masks
            levels.append((tokens, pos, small))

        x = self.query_feat.weight.expand(pixels.shape[0], -1, -1)  # (B, Q, width)
        states = [self.post_norm(x)]
        for i, layer in enumerate(self.layers):
            tokens, pos, small = levels[i % 3]  # the three coarser levels in turn, coarsest first
            hidden = (self.mask_embed(states[-1]) @ small).detach() < 0  # (B, Q, N)
            hidden = hidden & ~hidden.all(-1, keepdim=True)  # an empty mask hides nothing
            x = layer(x, self.query_embed.weight, tokens, pos, hidden)
            states.append(self.post_norm(x))
        states = torch.stack(states)  # (R, B, Q, width)
        return {"logits": self.cls_embed(states), "embed": self.mask_embed(states), "pixels": pixels}

    def scores(self, outputs, size):
        """Scores (B, K, H, W) at `size`: each query votes for classes where its mask is."""
        with torch.autocast(outputs["pixels"].device.type, enabled=False):
            embed = outputs["embed"][-1].float()  # (B, Q, width)
            masks = torch.einsum("bqc,bchw->bqhw", embed, outputs["pixels"].float())
            masks = resize(masks, size)
            votes = outputs["logits"][-1].float().softmax(-1)[..., :-1]  # (B, Q, K)
            return torch.einsum("bqk,bqhw->bkhw", votes, masks.sigmoid())

    def loss(self, outputs, label, generator, divisors):
        """Class, BCE and dice losses after matching, summed over read-outs; to log, the last one's.

        label (B, H, W) int64, 255 = ignore; generator, on its device, draws the points; divisors: see divisors_of.
        """
        with torch.autocast(label.device.type, enabled=False):
            logits, embed, pixels = [outputs[name].float() for name in ("logits", "embed", "pixels")]
            classes, real, masks = self.targets(label)
            num_masks, _ = divisors
            cost = self.matching_cost(logits, embed, pixels, classes, masks, generator)
            query_of_mask, class_of_query = self.match(cost, classes, real)

            R, B, Q = class_of_query.shape
            weight = logits.new_ones(self.num_classes + 1)
            weight[-1] = self.no_object
            ce = F.cross_entropy(logits.flatten(0, 2), class_of_query.flatten(), weight, reduction="none")
            ce = ce.view(R, -1).sum(1) / (num_masks + weight[-1] * (B * Q - num_masks))  # (R,)

            matched = query_of_mask[..., None].expand(-1, -1, -1, embed.shape[-1])  # (R, B, S, width)
            bce, dice = self.mask_losses(embed.gather(2, matched), pixels, masks, generator)  # (B, S, R) each
            bce = (bce * real[..., None]).sum((0, 1)) / max(num_masks, 1)  # (R,)
            dice = (dice * real[..., None]).sum((0, 1)) / max(num_masks, 1)  # (R,)
            total = self.ce_weight * ce.sum() + self.bce_weight * bce.sum() + self.dice_weight * dice.sum()
            return {"loss": total, "ce": ce[-1], "bce": bce[-1], "dice": dice[-1]}

    def targets(self, label):
        """Classes present (B, S), ascending; which are no padding (B, S); masks (B, S, H, W), without void."""
        K = self.num_classes
        present = torch.zeros(len(label), K + 1, dtype=torch.bool, device=label.device)  # void is class K here
        present = present.scatter(1, label.masked_fill(label == IGNORE, K).flatten(1), True)[:, :K]
        S = max(1, int(present.sum(1).max()))
        classes = present.int().argsort(dim=1, descending=True, stable=True)[:, :S]
        masks = label[:, None] == classes[..., None, None]
        return classes, present.gather(1, classes), masks.float()

    @torch.no_grad()
    def matching_cost(self, logits, embed, pixels, classes, masks, generator):
        """The loss of each query with each mask, (R, B, S, Q), on points that masks share."""
        B, _, h, w = pixels.shape
        R, _, Q, _ = logits.shape
        if self.points >= h * w:  # a mask knows no more than its own pixels
            points = centres((h, w), pixels.device).expand(B, -1, -1)
        else:
            points = torch.rand(B, self.points, 2, generator=generator, device=pixels.device)
        x = embed.transpose(0, 1).flatten(1, 2) @ sample(pixels, points)  # (B, R Q, P), mask logits
        t = sample(masks, points).transpose(1, 2)  # (B, P, S)

        # As in mask_losses, but for all pairs of a query and a mask: (B, R Q, S).
        p = x.sigmoid()
        bce = (F.softplus(x).sum(-1, keepdim=True) - x @ t) / x.shape[-1]
        dice = 1 - (2 * p @ t + 1) / (p.sum(-1, keepdim=True) + t.sum(1, keepdim=True) + 1)
        probability = logits.softmax(-1).transpose(0, 1).flatten(1, 2)  # (B, R Q, K+1)
        named = probability.gather(2, classes[:, None].expand_as(bce))
        cost = self.ce_weight * -named + self.bce_weight * bce + self.dice_weight * dice
        cost = cost.nan_to_num()  # a diverged step is skipped anyway
        return cost.view(B, R, Q, -1).permute(1, 0, 3, 2)

    def match(self, cost, classes, real):
        """A query for each mask -> query_of_mask (R, B, S), class_of_query (R, B, Q)."""
        R, B, S, Q = cost.shape
        query_of_mask = np.zeros((R, B, S), dtype=np.int64)
        class_of_query = np.full((R, B, Q), self.num_classes)  # no object
        costs, classes, real = [x.cpu().numpy() for x in (cost, classes, real)]
        for r, b in np.ndindex(R, B):
            queries = hungarian(costs[r, b, real[b]])
            query_of_mask[r, b, real[b]] = queries
            class_of_query[r, b, queries] = classes[b, real[b]]
        return torch.from_numpy(query_of_mask).to(cost.device), torch.from_numpy(class_of_query).to(cost.device)

    def mask_losses(self, embed, pixels, masks, generator):
        """BCE and dice, (B, S, R) each, of matched queries (R, B, S, width) and masks (B, S, H, W)."""
        R, B, S, _ = embed.shape
        H, W = masks.shape[-2:]
        x = embed.permute(1, 2, 0, 3).flatten(1, 2) @ pixels.flatten(2)  # (B, S R, h w), mask logits
        x = x.view(B * S * R, 1, *pixels.shape[-2:])
        if self.points >= H * W:  # every pixel is a point
            x = resize(x, (H, W)).view(B, S, R, -1)
            t = masks.view(B, S, 1, -1)
        else:
            points = self.uncertain_points(x, generator)  # (B S R, P, 2)
            x = sample(x, points).view(B, S, R, -1)
            t = sample(masks.view(B * S, 1, H, W), points.view(B * S, -1, 2)).view_as(x)

        p = x.sigmoid()  # (B, S, R, P)
        bce = (F.softplus(x) - t * x).mean(-1)  # of a logit x
        dice = 1 - (2 * (t * p).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
        return bce, dice

    @torch.no_grad()
    def uncertain_points(self, x, generator):
        """Points (n, P, 2) for masks x (n, 1, h, w), most where logits are near 0 (PointRend, 2020)."""
        candidates = self.oversample * self.points
        hard = int(self.importance * self.points)
        others = self.points - hard
        points = torch.rand(len(x), candidates + others, 2, generator=generator, device=x.device)
        distance = sample(x, points[:, :candidates])[:, 0].abs()  # (n, candidates)
        chosen = distance.topk(hard, largest=False).indices[..., None].expand(-1, -1, 2)
        return torch.cat([points.gather(1, chosen), points[:, candidates:]], 1)


def hungarian(cost):
    """Each row's column at least total cost (n, m), n <= m -> (n,) (Jonker and Volgenant, 1987)."""
    cost = np.asarray(cost, dtype=np.float64)
    n, m = cost.shape
    price = np.zeros(m)  # less its column's price, each assigned pair is a cheapest of its row
    col_of = np.full(n, -1)  # -1: not assigned
    row_of = np.full(m, -1)
    liked, first = np.unique(cost.argmin(1), return_index=True)
    col_of[first] = liked  # the first row that likes a column best has it
    row_of[liked] = first

    # Each of the other rows: Dijkstra from this row to the nearest free column.
    for start in np.flatnonzero(col_of < 0):
        length = cost[start] - price  # of the shortest path known to each column
        parent = np.full(m, start)    # the row from which it is reached
        done = np.zeros(m, dtype=bool)
        col = length.argmin()
        while (row := row_of[col]) >= 0:
            done[col] = True
            more = cost[row] - price
            through = length[col] + (more - more[col])
            closer = (through < length) & ~done
            length[closer] = through[closer]
            parent[closer] = row
            col = np.where(done, np.inf, length).argmin()
        price[done] += length[done] - length[col]
        while col >= 0:  # back along the path, each row takes the column that was reached from it
            row_of[col] = parent[col]
            col_of[parent[col]], col = col, col_of[parent[col]]
    return col_of


def divisors_of(labels):
    """Masks and labelled pixels to divide a micro-batch's losses by: their mean is the batch's."""
    images = torch.cat(labels)
    masks = sum(len(label[label != IGNORE].unique()) for label in images)
    pixels = int((images != IGNORE).sum())
    device = "cuda" if torch.cuda.is_available() and distill.world_size() > 1 else "cpu"
    total = distill.summed(torch.tensor([masks, pixels], dtype=torch.float64, device=device))
    return (total / distill.world_size() / len(labels)).tolist()


# --- One class per pixel, the same interface -------------------------------------------------------------------------

class PixelClassifier(nn.Module):
    """Loss and scores of the decoders whose outputs are class logits (B, K, h, w)."""

    def loss(self, outputs, label, generator, divisors):
        """Cross-entropy per labelled pixel; nothing is drawn."""
        _, pixels = divisors
        logits = resize(outputs.float(), label.shape[1:])
        ce = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
        return {"loss": ce / max(pixels, 1)}

    def scores(self, outputs, size):
        return resize(outputs.float(), size).softmax(1)


class Linear(PixelClassifier):
    """LayerNorm and one linear layer per map; their logits are added at the finest size."""
    def __init__(self, dim, num_classes):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes)) for _ in range(4))

    def forward(self, feats):
        total = 0
        for head, x in zip(self.heads, feats, strict=True):
            logits = head(x.movedim(1, -1)).movedim(-1, 1)  # (B, K, ., .)
            total = total + resize(logits, feats[0].shape[-2:])
        return total


class SemFPN(PixelClassifier):
    """Panoptic FPN's semantic branch (Kirillov et al., 2019), as in Table 7."""
    def __init__(self, dim, num_classes, width=384, channels=256):  # the paper's 11.2 M parameters on ViT-S
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(dim, width, 1) for _ in range(4))
        self.outputs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.towers = nn.ModuleList()
        for count in (1, 1, 2, 3):  # convolutions of each level, the finest first
            inputs = [width, channels, channels][:count]
            convs = [nn.Conv2d(wide, channels, 3, padding=1, bias=False) for wide in inputs]
            self.towers.append(nn.ModuleList(with_norm(conv).append(nn.ReLU()) for conv in convs))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, feats):
        maps = [lateral(x) for lateral, x in zip(self.laterals, feats, strict=True)]
        sizes = [x.shape[-2:] for x in maps]  # finest first
        for i in (2, 1, 0):
            maps[i] = maps[i] + resize(maps[i + 1], sizes[i])
        total = 0
        for i, tower in enumerate(self.towers):
            x = self.outputs[i](maps[i])
            level = i
            for block in tower:
                level = max(0, level - 1)  # a level finer, if there is one
                x = resize(block(x), sizes[level])
            total = total + x
        return self.classify(total)


# --- Boxes for pixels, the same interface: all that changes with the task (Table 10) ---------------------------------

class BoxDecoder(nn.Module):
    """torchvision's Faster R-CNN (Ren et al., 2015) on the feature pyramid of ViTDet (Li et al., 2022).

    It reads one map, of the token grid's size -> 5 maps (B, width, ., .) of 4, 2, 1, 0.5, 0.25 times it.
    """
    def __init__(self, dim, num_classes, patch=16, width=256, ffn=1024, rois=512, proposals=1000):
        super().__init__()
        if patch not in (4, 8, 16, 32) or width % 32:  # torchvision takes strides for powers of two
            raise UserError("--decoder boxes wants a --patch of 4, 8, 16 or 32, and a multiple of 32 as --width")
        self.patch = patch
        self.lateral = with_norm(nn.Conv2d(dim, width, 1))
        twice = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        four_times = nn.Sequential(twice(), nn.GroupNorm(32, width), nn.GELU(), twice())
        self.scales = nn.ModuleList([four_times, twice(), nn.Identity(), nn.MaxPool2d(2)])
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in self.scales]
        self.smooth = nn.ModuleList(map(with_norm, convs))

        self.out_channels = width  # all that torchvision asks of a backbone
        anchors = AnchorGenerator([[2 * patch * 2 ** level] for level in range(5)], [[0.5, 1.0, 2.0]] * 5)
        parts = FasterRCNN(
            self, rpn_anchor_generator=anchors, box_head=TwoMLPHead(7 * 7 * width, ffn),
            box_predictor=FastRCNNPredictor(ffn, num_classes + 1), box_batch_size_per_image=rois,
            rpn_pre_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals, rpn_post_nms_top_n_test=proposals)  # all else as published
        self.propose = parts.rpn
        self.judge = parts.roi_heads

    def forward(self, feats):
        x = self.lateral(feats[2])
        maps = [smooth(scale(x)) for scale, smooth in zip(self.scales, self.smooth)]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]

    def loss(self, maps, label, generator, divisors):
        """torchvision's four losses, and "loss", their sum; label (B, OBJECTS, 6): see data.as_label."""
        targets = []
        for objects in map(data.objects_of, label):
            objects = objects[objects[:, 5] == 0]  # not the difficult ones
            targets.append({"boxes": objects[:, :4], "labels": objects[:, 4].long() + 1})  # 0: background
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())  # torchvision draws from the global generator
            _, losses = self.both_stages(maps, None, targets)
        return losses | {"loss": sum(losses.values())}

    def scores(self, maps, size):
        """The objects found in each image, [(D, 6)], best first: box in pixels, class, score."""
        found, _ = self.both_stages(maps, size)
        return [torch.column_stack([image["boxes"], image["labels"] - 1, image["scores"]]) for image in found]

    def both_stages(self, maps, size, targets=None):
        """Proposals, then classes and boxes, in fp32 -> found objects, or with targets losses."""
        self.train(targets is not None)  # decides which of the two torchvision returns
        maps = {str(level): x.float() for level, x in enumerate(maps)}  # torchvision's names
        padded = [side * self.patch // 4 for side in maps["0"].shape[2:]]
        images = ImageList(torch.empty(padded, device="meta"), [size or padded] * len(maps["0"]))  # sizes only
        with torch.autocast(maps["0"].device.type, enabled=False):
            boxes, of_proposals = self.propose(images, maps, targets)
            found, of_boxes = self.judge(maps, boxes, images.image_sizes, targets)
        return found, of_proposals | of_boxes


# --- Stage 2: the constants ------------------------------------------------------------------------------------------

@dataclass
class Config(qsd.LossConfig):
    """Every constant of stage 2 and of the one-stage baselines."""
    # what is trained
    data: str = "gtav"              # a name of data.DATASETS, or several joined with +
    root: str = "data"              # the folder that holds the data sets
    labels: str = "1"               # share of the labelled images: 1, 1/4, 1/8, 1/16 (Table 3)
    classes: int = 0                # how many --data folder has; 0: as the data set says
    encoder: str = "dinov2_vits14"  # a name of qsd.ENCODERS or a checkpoint, usually a student.pt
    depth: int | None = None        # only the encoder's first k blocks
    freeze: bool = True             # no: the encoder is trained, too (Table 5)
    out: str = "runs/segment"       # log.jsonl, last.pt, segmenter.pt
    # decoder
    decoder: Literal["mask", "fpn", "linear", "boxes"] = "mask"  # Mask2Former, SemFPN, one layer, Faster R-CNN
    blocks: Literal["four", "last"] = "four"  # that it reads: [3, 5, 7, 11] of 12 (official); 4 x the last
    width: int = 256                # channels of the mask and box decoders
    queries: int = 100              # of the mask decoder, each proposes a mask
    decoder_layers: int = 9         # transformer layers of the mask decoder
    ffn: int = 2048                 # hidden width of those layers, and of the box head
    pixel: Literal["fpn", "deform"] = "deform"  # pixel decoder: Mask2Former's; fpn: light
    heads: int = 8                  # of the mask decoder's attention
    points: int = 12544             # pixels on which its masks are compared
    rois: int = 512                 # boxes of an image from which the box decoder's head learns
    proposals: int = 1000           # boxes it sees when it predicts; in training twice as many
    # one-stage distillation (equation 3)
    kd: float = 0.0                 # weight of --loss, in units of its published weight
    kd_logits: float = 0.0          # weight of Hinton's logit distillation
    teacher: str = "none"           # an encoder for --kd, a segmenter.pt for --kd_logits
    # images
    size: int = 512                 # side of the square crop, pixels
    patch: int = 16                 # patch side of the encoder, pixels
    cat_max_ratio: float = 0.75     # a crop is drawn again while one class fills more of it
    workers: int = 8                # image-loading processes per training process; 0: none
    # optimiser
    batch: int = 4                  # global, whatever the number of processes
    micro: int = 4                  # most images of one forward pass; the rest is accumulation
    budget: str = "40000"           # 40000 (steps), 50ep, 2h, 3e18flop
    lr: float = 1e-4                # of the decoder
    lr_backbone: float = 1e-5       # of the encoder where it is trained (the paper's 1e-5)
    power: float = 0.9              # of the polynomial decay to 0
    weight_decay: float = 0.05      # not of the decoder's norms and embeddings (official)
    # running
    seed: int = 42                  # as the official code
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    log_every: int = 50             # steps
    save_minutes: float = 10.0      # between checkpoints


POINTS = data.MASKS + 1  # for data.mix: the points of masks have random numbers of their own

LIGHT = dict(width=64, queries=32, decoder_layers=3, ffn=256, heads=4, pixel="fpn")  # for small worlds
TOY = LIGHT | dict(encoder="toy_student", size=64, patch=8, batch=8, micro=8, budget="200", lr=2e-3, lr_backbone=1e-3,
                   workers=1, seed=0, log_every=20, cat_max_ratio=1.0, blocks="last", dcd_pool=1)
WIDE = TOY | dict(batch=16, micro=16, budget="16000", lr=1.5e-3, lr_backbone=1.5e-3)
CAMVID = LIGHT | dict(size=224, points=2048, batch=8, micro=8, budget="250", lr=1e-3, lr_backbone=1e-4,
                      workers=1, seed=0, log_every=20, dcd_pool=1)
VOC = dict(decoder="boxes", blocks="last", ffn=1024, batch=16, micro=16, budget="12ep")
BOXES = TOY | dict(decoder="boxes", width=32, rois=32, proposals=100)
PRESETS = dict.fromkeys(data.TOY_SOURCES, TOY) | {"toy-wide": WIDE, "toy-boxes": BOXES, "camvid": CAMVID, "voc": VOC}


def preset(given):
    """The row of PRESETS for the first name of --data; given: the flags as a dict."""
    return PRESETS.get(given.get("data", Config.data).split("+")[0], {})


# --- Encoder and decoder together ------------------------------------------------------------------------------------

class Segmenter(nn.Module):
    """x (B, 3, H, W) normalised -> the decoder's outputs."""
    def __init__(self, encoder, decoder, frozen=True, blocks="four"):
        super().__init__()
        self.encoder = encoder.requires_grad_(not frozen)
        self.decoder = decoder
        self.layers = qsd.feature_layers(encoder.depth) if blocks == "four" else [encoder.depth - 1] * 4

    def forward(self, x):
        return self.run(x)[1]

    def run(self, x, layers=()):
        """One pass for two losses: the encoder's (cls, patches, outs of `layers`), the decoder's outputs."""
        cls, patches, outs = self.encoder.tokens(x, layers=[*layers, *self.layers])
        maps = pyramid(outs[len(layers):], qsd.grid_of(x.shape[2:], self.encoder.patch_size))
        return (cls, patches, outs[:len(layers)]), self.decoder(maps)


def build_decoder(dim, num_classes, cfg):
    if cfg.decoder == "linear":
        return Linear(dim, num_classes)
    if cfg.decoder == "fpn":
        return SemFPN(dim, num_classes)
    if cfg.decoder == "boxes":
        return BoxDecoder(dim, num_classes, cfg.patch, cfg.width, cfg.ffn, cfg.rois, cfg.proposals)
    return MaskDecoder(dim, num_classes, width=cfg.width, queries=cfg.queries, layers=cfg.decoder_layers,
                       heads=cfg.heads, ffn=cfg.ffn, pixel=cfg.pixel, points=cfg.points)


def load_segmenter(path, device="cpu"):
    """A segmenter.pt or a released checkpoint: the model, ready to predict, and what a segmenter.pt holds.

    Constants that its run did not know have today's default. UserError if it is no whole segmenter.
    """
    saved = qsd.open_checkpoint(Path(path))
    try:
        if "classes" not in saved:
            saved = from_mmsegmentation(path, saved.get("state_dict", saved))
        cfg = Config(**{name: value for name, value in saved["config"].items() if hasattr(Config, name)})
        encoder = qsd.ViT(**saved["encoder"])
        decoder = build_decoder(encoder.embed_dim, len(saved["classes"]), cfg)
        model = Segmenter(encoder, decoder, blocks=cfg.blocks)
        qsd.load_strictly(model, saved["model"], f"{path} does not fit its segmenter")
    except KeyError as error:
        raise UserError(f"{path} is no segmenter.pt, nor a released one: {error.args[0]} is missing") from None
    return model.to(device).eval().requires_grad_(False), saved


# --- Released segmenters: mmsegmentation's checkpoints of the authors' own training ----------------------------------

# What mmdet's Mask2Former calls a part of a parameter's name, and what it is called here.
MMDET_NAMES = {
    "decode_head.": "decoder.",
    "transformer_decoder.": "",
    "pixel_decoder.encoder.": "pixel_decoder.",
    "lateral_convs.0.": "lateral.",
    "output_convs.0.": "embed.",
    "mask_feature.": "embed.3.",
    ".conv.": ".0.",
    ".gn.": ".1.",
    "_attn.attn.": "_attn.",
    ".ffn.layers.0.0.": ".ffn.0.",
    ".ffn.layers.1.": ".ffn.2.",
}
RELEASED_CLASSES = {19: "cityscapes", 6: "potsdam-rgb"}  # by their number


def from_mmsegmentation(path, state):
    """What a segmenter.pt holds, from mmsegmentation's state dict; classes without names are numbered."""
    encoder = qsd.load_vit(path)  # reads what lies under backbone.
    model = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    for key, tensor in state.items():
        for theirs, ours in MMDET_NAMES.items():
            key = key.replace(theirs, ours)
        if not key.startswith("backbone."):
            model[key] = tensor

    queries, width = model["decoder.query_feat.weight"].shape
    num_classes = len(model["decoder.cls_embed.weight"]) - 1
    attention = "decoder.pixel_decoder.layers.0.self_attn.attention_weights.weight"
    heads = len(model[attention]) // 12  # 3 levels, 4 points
    ffn = len(model["decoder.layers.0.ffn.0.weight"])
    layers = sum(key.endswith("cross_attn.in_proj_weight") for key in model)
    name = RELEASED_CLASSES.get(num_classes, "folder")
    entry = data.entries(name, num_classes if name == "folder" else 0)[name]
    cfg = Config(data=name, size=encoder.config["img_size"], patch=encoder.patch_size, width=width,
                 queries=queries, decoder_layers=layers, ffn=ffn, heads=heads)
    return dict(model=model, encoder=encoder.config, config=asdict(cfg), released=True, ledger=[],
                classes=list(entry.classes), colors=[list(color) for color in entry.colors])


# --- The training step -----------------------------------------------------------------------------------------------

class Learner(nn.Module):
    """All that is trained, as one module: the segmenter and, of a one-stage baseline, the objective."""
    def __init__(self, segmenter, objective, cfg):
        super().__init__()
        self.segmenter = segmenter
        self.objective = objective
        self.cfg = cfg

    def forward(self, x, label, generator, divisors, t=None, noise=None, teacher_scores=None):
        """The losses of normalised images x (B, 3, H, W), as a dict; "loss" is minimised.

        t, noise: as in qsd.Objective; teacher_scores (B, K, H, W); the rest as in MaskDecoder.loss.
        """
        decoder = self.segmenter.decoder
        s, outputs = self.segmenter.run(x, self.objective.layers_s if self.objective else ())
        losses = decoder.loss(outputs, label, generator, divisors)  # Eq. 6
        if self.objective:
            distilled = self.objective(self.segmenter.encoder, x, s, t, noise)
            losses["kd"] = self.cfg.kd * self.objective.weight * distilled["loss"]
        if teacher_scores is not None:
            student_scores = decoder.scores(outputs, x.shape[2:])
            losses["kd_logits"] = self.cfg.kd_logits * divergence(teacher_scores, student_scores)
        losses["loss"] = losses["loss"] + losses.get("kd", 0) + losses.get("kd_logits", 0)  # Eq. 3
        return losses


def divergence(teacher_scores, student_scores):
    """Hinton's logit distillation at temperature 1: KL divergence of class scores (B, K, H, W)."""
    scores = teacher_scores.clamp(min=1e-6), student_scores.clamp(min=1e-6)
    p_t, p_s = [x / x.sum(1, keepdim=True) for x in scores]
    return (p_t * (p_t / p_s).log()).sum(1).mean()


def parameter_groups(learner, cfg):
    """AdamW's groups, as in the official code: the encoder at lr_backbone, all else at lr."""
    groups = {}
    still = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)  # whose parameters do not decay outside the encoder
    for name, module in learner.named_modules():
        lr = cfg.lr
        weight_decay = cfg.weight_decay
        if name.startswith("segmenter.encoder"):
            lr = cfg.lr_backbone
        elif isinstance(module, still) and not name.endswith("level_encoding"):
            weight_decay = 0.0
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                groups.setdefault((lr, weight_decay), []).append(parameter)
    return [dict(params=group, lr=lr, peak=lr, weight_decay=decay) for (lr, decay), group in groups.items()]


def check_flags(cfg):
    """UserError where flags of the one-stage baselines contradict each other."""
    distils = cfg.kd or cfg.kd_logits
    if distils and (cfg.freeze or cfg.teacher == "none"):
        raise UserError("--kd and --kd_logits train the encoder with a teacher: add --freeze no and --teacher")
    if not distils and cfg.teacher != "none":
        raise UserError(f"--teacher {cfg.teacher} teaches nothing: add --kd 1 or --kd_logits 1")
    if not cfg.kd and cfg.loss != Config.loss:
        raise UserError(f"--loss {cfg.loss} distils nothing: add --kd 1")


def main(argv=None):
    cfg = distill.configure(Config, preset, argv)
    check_flags(cfg)
    run = distill.Run(cfg, "segmenter.pt")  # joins the processes, looks at --out
    if run.finished:
        return

    # the labelled images, the encoder and its decoder
    torch.manual_seed(cfg.seed)
    transform = partial(data.segment_transform, size=cfg.size, cat_max_ratio=cfg.cat_max_ratio)
    if cfg.decoder == "boxes":
        transform = partial(data.detect_transform, size=cfg.size)
    dataset = data.scenes(cfg.data, cfg.root, "train", transform, cfg.labels, cfg.classes)
    if dataset.boxes != (cfg.decoder == "boxes"):
        raise UserError(f"--data {cfg.data} has other labels than --decoder {cfg.decoder} reads: boxes or pixels")
    encoder = qsd.load_vit(cfg.encoder, cfg.size, cfg.patch, cfg.depth)
    decoder = build_decoder(encoder.embed_dim, dataset.num_classes, cfg)
    segmenter = Segmenter(encoder, decoder, cfg.freeze, cfg.blocks).to(run.device)
    ancestors = qsd.ledger_of(cfg.encoder)
    N = (cfg.size // cfg.patch) ** 2

    # what a one-stage baseline imitates: the tokens of an encoder, the class scores of a segmenter
    objective = None
    if cfg.kd:
        teacher = qsd.load_vit(cfg.teacher, cfg.size, cfg.patch).to(run.device).eval().requires_grad_(False)
        objective = qsd.build_objective(encoder, teacher, cfg).to(run.device)
    if cfg.kd_logits:
        teacher_segmenter, trained = load_segmenter(cfg.teacher, run.device)
        if trained["classes"] != list(dataset.classes):
            raise UserError(f"--teacher {cfg.teacher} was trained on other classes than --data {cfg.data} has")
    learner = Learner(segmenter, objective, cfg)

    def losses_of(model, images, label, draws, divisors):
        """The losses on uint8 images (B, 3, H, W), their label and their draws (B)."""
        x = data.normalize(images.to(run.device, non_blocking=True), encoder.mean, encoder.std)
        label = label.to(run.device, non_blocking=True)
        generator = torch.Generator(run.device).manual_seed(data.mix(cfg.seed, POINTS, draws[0].item()))
        t = noise = teacher_scores = None
        with run.autocast:
            with torch.no_grad():
                if cfg.kd:
                    noise = data.uniform_noise(draws, N, cfg.seed).to(run.device)  # (B, N)
                    t = teacher.tokens(data.renormalize(x, encoder, teacher), layers=objective.layers_t)
                    t = qsd.normalize_targets(t, cfg.target_norm)
                if cfg.kd_logits:
                    outputs = teacher_segmenter(data.renormalize(x, encoder, teacher_segmenter.encoder))
                    teacher_scores = teacher_segmenter.decoder.scores(outputs, x.shape[2:])  # (B, K, H, W)
            return model(x, label, generator, divisors, t, noise, teacher_scores)

    # two black images through one step: its cost per image, and which parameters it does not train
    images, draws = distill.two_images(cfg.size)
    label = torch.zeros(2, data.OBJECTS, 6) if dataset.boxes else images[:, 0].long()
    flops = distill.dry_run(learner, partial(losses_of, learner, images, label, draws, divisors=(1, 1)))
    optimizer = torch.optim.AdamW(parameter_groups(learner, cfg), fused=True)
    run.start(learner, optimizer, dataset, flops, tokens=N, pairs=bool(cfg.kd))

    with run:  # signals now wait for the end of a step
        for micro_batches in run.steps():  # until --budget is spent
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - run.fraction) ** cfg.power
            divisors = divisors_of([label for _, label, _ in micro_batches])
            for images, label, draws in micro_batches:  # gradient accumulation
                with run.sync():  # processes average gradients in the last one
                    losses = losses_of(run.model, images, label, draws, divisors)
                    run.scaler.scale(losses["loss"] / len(micro_batches)).backward()
                run.note(losses)
            if run.finite():  # else the step is skipped and counted
                run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad()
            run.after()  # ledger, log, checkpoint, signals

        ledger = ancestors + [dict(script="segment", data=cfg.data, **run.ledger)]
        run.finish(dict(model=segmenter.state_dict(), encoder=encoder.config, config=asdict(cfg), ledger=ledger,
                        classes=list(dataset.classes), colors=[list(color) for color in dataset.colors]))


if __name__ == "__main__":
    distill.cli(main)
