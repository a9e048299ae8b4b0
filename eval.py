"""mIoU on domains nobody trained on, the paper's tables as lists of runs, and the demo.

    python eval.py --demo                                             # the whole method in the built-in toy world
    python eval.py --checkpoint runs/gtav/segmenter.pt --data cityscapes+bdd100k+mapillary --root /data
    torchrun --standalone --nproc_per_node=8 eval.py ...              # the same numbers, sooner
"""
import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import distill
import qsd
import segment


@dataclass
class Config:
    """Every constant of the evaluation."""
    # what is measured
    checkpoint: str = ""           # segmenter.pt
    data: str = "toy"              # domains, joined with +
    root: str = "data"             # the folder that holds the data sets
    # protocol
    mode: Literal["slide", "whole"] = "slide"  # official: sliding window
    window: int = 0                # its side, pixels; 0 = the training crop (official 512)
    stride: float = 341 / 512      # of its side (official 341 of 512 pixels)
    flip: bool = False             # average with the mirrored image (official: no)
    batch: int = 1                 # images at once; more than 1 needs images of one size
    workers: int = 2               # image-loading processes
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    # the paper in the toy world
    demo: bool = False             # train and compare the rows of small_world for --data toy or camvid; toy: draw the picture
    seed: int = 0                  # of the demo's runs
    out: str = "runs/demo"         # the demo's folder; results.json and demo.png lie there


PRESETS = {name: dict(batch=50, workers=0) for name in data.DATASETS if name.startswith("toy")}


# --- mIoU -----------------------------------------------------------------------------------------------------------------

def confusion(pred, label, num_classes):
    """Count pixels by (label, prediction): two integer maps of one shape -> (K, K) int64; label 255 is left out."""
    valid = label != data.IGNORE
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
            box = left, x.shape[3] - left - window, top, x.shape[2] - top - window
            scores = model.decoder.scores(model(x[:, :, top:top + window, left:left + window]), (window, window))
            total = total + F.pad(scores, box)
            count = count + F.pad(torch.ones_like(scores[:1, :1]), box)
    return (total / count)[:, :, :H, :W]


def starts(length, window, stride):
    """First pixels of the windows along one side; the last window ends flush with the border."""
    return sorted({min(i, length - window) for i in range(0, max(length - window + stride, 1), stride)})


@torch.no_grad()
def predict(model, x, cfg, window):
    """Class scores (B, K, H, W) of normalised images at their own size, by the Config's protocol."""
    patch = model.encoder.patch_size
    if cfg.mode == "whole":  # one window that holds the image
        H, W = x.shape[2:]
        padded = F.pad(x, (0, -W % patch, 0, -H % patch))
        scores = model.decoder.scores(model(padded), padded.shape[2:])[:, :, :H, :W]
    else:
        scores = slide(model, x, window, max(1, round(cfg.stride * window)))
    if cfg.flip:
        scores = scores + predict(model, x.flip(3), replace(cfg, flip=False), window).flip(3)
    return scores


def evaluate(model, name, cfg, window, device):
    """Confusion matrix (K, K) of one domain's val split, each process taking its share of the images."""
    dataset = data.scenes(name, cfg.root, "val", data.eval_transform(name))
    rank, world = dist.get_rank(), dist.get_world_size()
    loader = DataLoader(Subset(dataset, range(rank, len(dataset), world)), cfg.batch, num_workers=cfg.workers)
    conf = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.int64, device=device)
    for images, label, _ in tqdm(loader, name, disable=rank > 0, leave=False):
        x = data.normalize(images.to(device), model.encoder.mean, model.encoder.std)
        with data.precision(cfg.precision, device):
            scores = predict(model, x, cfg, window)
        pred = F.interpolate(scores, size=label.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        conf += confusion(pred, label.to(device), dataset.num_classes)
    dist.all_reduce(conf)
    return conf.cpu()


def measure(checkpoint, cfg, device):
    """mIoU in percent of a segmenter on each domain of cfg.data, and their plain mean as "mean"."""
    model, saved = segment.load_segmenter(checkpoint, device)
    result = {}
    for name in data.rows(cfg.data):
        if list(data.DATASETS[name].classes) != saved["classes"] and data.DATASETS[name].classes:
            data.fail(f"--data {name} has the classes {', '.join(data.DATASETS[name].classes)}, but {checkpoint} was trained on others")
        result[name] = 100 * iou(evaluate(model, name, cfg, cfg.window or saved["config"]["size"], device)).nanmean().item()
    return result | {"mean": sum(result.values()) / len(result)}


def show(rows, columns):
    """Print {row name: {column: number or text}} as a table."""
    width = max(map(len, rows))
    print(" " * width, *(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{row[c]:10.1f}" if isinstance(row[c], float) else f"{row[c]:>10}" for c in columns))


# --- Tables: lists of runs --------------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """A row of a table: its runs as commands, each a line a user can type; the last one makes the segmenter that is measured."""
    name: str
    runs: list


def small_world(world, out, seed, root):
    """The paper's comparison on a small scale: one teacher, one student, and what is done with them; each row starts where its name says."""
    common = f"--root {root} --seed {seed}"
    if world == "toy":  # the teacher is trained on a wide world of looks, the student starts from random weights
        teacher, student, proxy, source = f"{out}/teacher/segmenter.pt", "toy_small", "toy-proxy", "toy"
        before = [f"segment.py --data toy-wide --encoder toy_base --freeze no --decoder linear --out {out}/teacher {common}"]
    else:  # camvid: real images, an ImageNet ViT-Ti as teacher and the first 3 of 12 blocks of another as student
        teacher, student, before = "vit_tiny_augreg", "deit_tiny --depth 3", []
        small = "--patch 16 --batch 16 --lr 5e-4 --lr_rule constant --repeats 1 --workers 1 --target_norm layernorm"
        proxy, source = f"imagenet --size 128 --budget 400 {small}", f"camvid --size 160 --budget 200 {small}"

    def two_stages(loss):  # stage 1 on the proxy set, then on source images; stage 2 with the encoder frozen
        first = student.replace("--depth", "--student_depth")
        return before + [
            f"distill.py --data {proxy} --loss {loss} --teacher {teacher} --student {first} --out {out}/{loss}-proxy {common}",
            f"distill.py --data {source} --loss {loss} --teacher {teacher} --student {out}/{loss}-proxy/student.pt --out {out}/{loss}-source {common}",
            f"segment.py --data {world} --encoder {out}/{loss}-source/student.pt --out {out}/{loss} {common}"]

    one_stage = f"--freeze no --kd 1 --loss mse --target_norm {'none' if world == 'toy' else 'layernorm'} --teacher {teacher}"
    return [
        Row("no KD", [f"segment.py --data {world} --encoder {student} --freeze no --out {out}/no-kd {common}"]),
        Row("one-stage MSE", before + [f"segment.py --data {world} --encoder {student} {one_stage} --out {out}/one-stage {common}"]),
        Row("two-stage MSE", two_stages("mse")),
        Row("GKD (QSD)", two_stages("qsd")),
        Row("teacher", before + [f"segment.py --data {world} --encoder {teacher} --out {out}/teacher-frozen {common}"]),
    ]


def execute(command):
    """Run one command of a table in this process; a finished run is left as it is. Returns its folder."""
    script, *argv = shlex.split(command)
    out = Path(argv[argv.index("--out") + 1])
    result = out / ("student.pt" if script == "distill.py" else "segmenter.pt")
    if not result.exists():
        print(f"\npython {command}", flush=True)
        {"distill.py": distill.main, "segment.py": segment.main}[script](argv)
    return out


def table(cfg, rows, source, unseen, device):
    """Run what is missing of a table's rows, measure them, print the table; a second start reuses what is finished."""
    results, cfg = {}, replace(cfg, data="+".join([source, *unseen]))
    for row in rows:
        folder = [execute(command) for command in row.runs][-1]
        path = folder / "eval.json"
        if not path.exists():
            path.write_text(json.dumps(measure(folder / "segmenter.pt", cfg, device)))
        scores = json.loads(path.read_text())
        ledger = torch.load(folder / "segmenter.pt", weights_only=True)["ledger"]
        results[row.name] = {name: scores[name] for name in (source, *unseen)} | {
            "unseen": sum(scores[name] for name in unseen) / len(unseen), "seconds": f"{sum(stage['seconds'] for stage in ledger):.0f}"}
    print()
    show(results, [source, *unseen, "unseen", "seconds"])
    print(json.dumps({"table": cfg.out, "seed": cfg.seed, "rows": results}))


# --- Pictures -----------------------------------------------------------------------------------------------------------

def colorize(label, colors):
    """Class numbers (H, W) to an RGB image array; 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(colors)] = colors
    return palette[np.asarray(label)]


def pca_rgb(features, side):
    """Three leading principal components of tokens [(N, C)], fitted over all of them, as RGB arrays of `side` pixels."""
    x = torch.cat(features)
    x = x - x.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False)[2][:3].T                # (sum N, 3)
    low, high = x.quantile(0.02, dim=0), x.quantile(0.98, dim=0)
    x = ((x - low) / (high - low)).clamp(0, 1)
    maps = [part.view(int(len(part) ** 0.5), -1, 3).movedim(2, 0) for part in x.split([len(f) for f in features])]
    return [(F.interpolate(m[None], (side, side), mode="bicubic")[0].clamp(0, 1).movedim(0, 2) * 255).byte().numpy() for m in maps]


@torch.no_grad()
def picture(cfg, rows, path, side=128, per_domain=2):
    """Draw, for images of each unseen domain: input, label, predictions of no KD and GKD, PCA of student's and teacher's features."""
    folders = {row.name: Path(shlex.split(row.runs[-1])[shlex.split(row.runs[-1]).index("--out") + 1]) for row in rows}
    models = {name: segment.load_segmenter(folders[name] / "segmenter.pt")[0] for name in ("no KD", "two-stage MSE", "GKD (QSD)", "teacher")}
    columns = {title: [] for title in ("image", "label", "no KD", "two-stage MSE", "GKD (QSD)", "no KD ", "GKD (QSD) ", "teacher ")}
    titles = []
    for name in data.SETTINGS["toy"][1]:
        dataset = data.scenes(name, cfg.root, "val")
        for i in range(per_domain):
            image, label, _ = dataset[i]
            x = data.normalize(image[None], data.MEAN, data.STD)
            columns["image"].append(image.permute(1, 2, 0).numpy())
            columns["label"].append(colorize(label, dataset.colors))
            for kind in ("no KD", "two-stage MSE", "GKD (QSD)"):
                scores = predict(models[kind], x, cfg, x.shape[2])
                columns[kind].append(colorize(scores[0].argmax(0).byte(), dataset.colors))
            for kind in ("no KD", "GKD (QSD)", "teacher"):
                columns[kind + " "].append(models[kind].encoder(x)[1][0])
            titles.append(name.removeprefix("toy-"))
    for kind in ("no KD ", "GKD (QSD) ", "teacher "):
        columns[kind] = pca_rgb(columns[kind], side)
    return grid(columns, titles, dataset.classes, dataset.colors, side, path)


def grid(columns, titles, classes, colors, side, path, gap=4, top=44, left=56):
    """Write {column title: [RGB arrays]} as one picture with row titles and a legend of the classes."""
    font, rows = ImageFont.load_default(15), len(titles)
    sheet = Image.new("RGB", (left + len(columns) * (side + gap), top + rows * (side + gap) + 36), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (name, cells) in enumerate(columns.items()):
        x = left + j * (side + gap)
        pen.text((x + side / 2, top - 8), name.strip() + (" features" if name.endswith(" ") else ""), "black", font, anchor="ms")
        for i, cell in enumerate(cells):
            sheet.paste(Image.fromarray(cell).resize((side, side), Image.Resampling.NEAREST), (x, top + i * (side + gap)))
    for i, name in enumerate(titles):
        pen.text((left - 8, top + i * (side + gap) + side / 2), name, "black", font, anchor="rm")
    x = left
    for name, color in zip(classes, colors):
        pen.rectangle((x, sheet.height - 26, x + 16, sheet.height - 10), tuple(color), "gray")
        pen.text((x + 22, sheet.height - 18), name, "black", font, anchor="lm")
        x += 38 + font.getlength(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def main(argv=None):
    cfg = data.configure(Config, PRESETS, argv)
    rank, world, device = data.launch()
    if cfg.demo:
        rows = small_world(cfg.data, cfg.out, cfg.seed, cfg.root)
        table(cfg, rows, *data.SETTINGS[cfg.data], device)
        if cfg.data == "toy":
            print(f"picture: {picture(cfg, rows, Path(cfg.out) / 'demo.png')}")
        return
    if not cfg.checkpoint:
        data.fail("give --checkpoint segmenter.pt and --data, or --demo")
    result = measure(cfg.checkpoint, cfg, device)
    if rank == 0:
        show({cfg.checkpoint: result}, list(result))
        print(json.dumps({"checkpoint": cfg.checkpoint, "miou": result}))


if __name__ == "__main__":
    data.cli(main, qsd.UserError)
