"""mIoU on domains nobody trained on, the paper's tables as lists of runs, its figures, and what a trained segmenter is used for.

    python eval.py --demo                                             # the whole method in the built-in toy world
    python eval.py --checkpoint runs/gtav/segmenter.pt --data cityscapes+bdd100k+mapillary --root /data
    torchrun --standalone --nproc_per_node=8 eval.py ...              # the same numbers, sooner
    python eval.py --checkpoint runs/gtav/segmenter.pt --images photos --out segmented     # or --export model.pt2
    python eval.py --figure 5 --models teacher=dinov2_vitb14,GKD=runs/source --patch 16 --data cityscapes --root /data
    python eval.py --probe --models dinov2_vits14,deit_small --data gtav+cityscapes --root /data
"""
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

import data
import qsd
import segment
from segment import confusion, evaluate, iou, predict, slide  # noqa: F401, the names are part of this file's interface


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
    stride: float = 2 / 3          # of its side, rounded (official 341 of 512 pixels)
    flip: bool = False             # average with the mirrored image (official: no)
    scales: str = "1"              # multiples of the image's size to average over, as "0.75,1,1.25" (official: 1)
    batch: int = 1                 # images at once; more than 1 needs images of one size
    workers: int = 2               # image-loading processes
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    # pictures of several models, and a quick look at encoders
    figure: Literal["none", "3b", "5", "7a", "7b", "8", "9", "compute"] = "none"  # draw this figure of the paper, or mIoU against FLOPs
    probe: bool = False            # mIoU of a linear classifier on the tokens of each of --models, trained on the first of --data
    models: str = ""               # name=path,name=path; a path is a run's folder, a checkpoint or an encoder's name
    classes: int = 0               # number of classes of your own folder, for --probe; segmenters know theirs
    patch: int = 0                 # patch side of the encoders of 5, 7a, 7b and --probe, pixels; 0 = as they were trained
    examples: int = 2              # images of each domain in figures 5 and 8
    subset: int = 300              # images of each domain whose tokens figure 7a measures and --probe learns from
    tokens: int = 10000            # distances in figure 7a (the paper's number)
    # a segmenter at work
    images: str = ""               # segment this image or folder of images with --checkpoint; the results go to --out
    export: str = ""               # write --checkpoint as a torch.export program to this file, name.pt2
    dynamic: bool = False          # the program takes any number of images, not just one
    # the paper in the toy world
    table: Literal["none", "main", "7"] = "none"  # run the rows of this table for --data toy or camvid, and print it
    demo: bool = False             # --table main, and the picture
    seed: int = 0                  # of the table's runs
    jobs: int = 2                  # rows that run side by side, each process on its share of the cores
    out: str = "runs/demo"         # the folder of the table's runs, and of demo.png; of --images' results; folder or file of --figure


PRESETS = {name: dict(batch=50, workers=0) for name in data.DATASETS if name.startswith("toy")} | {"camvid": dict(batch=8, workers=1)}


# --- What is measured -------------------------------------------------------------------------------------------------------

def measure(checkpoint, cfg, device):
    """mIoU in percent of a segmenter on each domain of cfg.data, and their plain mean as "mean"."""
    return with_mean({name: each.nanmean().item() for name, each in class_ious(checkpoint, cfg, device).items()})


def with_mean(result):
    return result | {"mean": sum(result.values()) / len(result)}


def class_ious(checkpoint, cfg, device):
    """{domain: IoU in percent of each class (K,), NaN where it neither occurs nor is predicted} of a segmenter on cfg.data."""
    (model, saved), result = segment.load_segmenter(checkpoint, device), {}
    for name in data.rows(cfg.data):
        with data.precision(cfg.precision, device):
            conf = evaluate(model, domain(name, cfg, checkpoint, saved), cfg.window or saved["config"]["size"], device, cfg.stride,
                            cfg.mode == "whole", cfg.flip, cfg.batch, cfg.workers, name, multiples(cfg))
        result[name] = 100 * iou(conf)
    return result


def domain(name, cfg, checkpoint="", saved=None):
    """The val split of a data set, which must have the classes of a checkpoint; your own folder has as many, or without any no labels."""
    if name == "folder":
        classes = len(saved["classes"]) if saved else cfg.classes
        return data.scenes(name, cfg.root, "val", classes=classes) if classes else data.images(name, cfg.root, split="val")
    if saved and list(data.DATASETS[name].classes) != saved["classes"]:
        data.fail(f"--data {name} has the classes {', '.join(data.DATASETS[name].classes)}, but {checkpoint} was trained on others")
    return data.scenes(name, cfg.root, "val", data.eval_transform(name))


def multiples(cfg):
    """--scales as numbers."""
    try:
        scales = [float(part) for part in cfg.scales.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 < scale < 100 for scale in scales):
        data.fail(f"--scales {cfg.scales}: numbers from 0 to 100 were expected, as in 0.75,1,1.25")
    return scales


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
    """The paper's comparison on a small scale: one teacher, one student, and what is done with them."""
    common = f"--root {root} --seed {seed} --out {out}"
    if world == "toy":  # the teacher is trained on a wide world of looks, the student starts from random weights
        teacher, student, proxy, source, one_stage = f"{out}/teacher/segmenter.pt", "toy_small", "toy-proxy", "toy", ""
        before = [f"segment.py --data toy-wide --encoder toy_base --freeze no --decoder linear {common}/teacher"]
    else:  # camvid: real images; an ImageNet ViT-Ti is the teacher, the first 3 of 12 blocks of another the student
        teacher, student, before = "vit_tiny_augreg", "deit_tiny --depth 3", []
        one_stage = "--target_norm layernorm"
        small = f"--patch 16 --batch 16 --lr 5e-4 --lr_rule constant --repeats 1 --workers 1 {one_stage}"
        proxy, source = f"imagenet --size 128 --budget 400 {small}", f"camvid --size 160 --budget 200 {small}"

    def two_stages(loss):  # stage 1 on the proxy set, then on source images; stage 2 with the encoder frozen
        first, then = student.replace("--depth", "--student_depth"), f"{out}/{loss}-proxy/student.pt"
        return before + [f"distill.py --data {proxy} --loss {loss} --teacher {teacher} --student {first} {common}/{loss}-proxy",
                         f"distill.py --data {source} --loss {loss} --teacher {teacher} --student {then} {common}/{loss}-source",
                         f"segment.py --data {world} --encoder {out}/{loss}-source/student.pt {common}/{loss}"]

    return [
        Row("no KD", [f"segment.py --data {world} --encoder {student} --freeze no {common}/no-kd"]),
        Row("one-stage MSE", before + [f"segment.py --data {world} --encoder {student} --freeze no --kd 1 --loss mse {one_stage} "
                                       f"--teacher {teacher} {common}/one-stage"]),
        Row("two-stage MSE", two_stages("mse")),
        Row("GKD (QSD)", two_stages("qsd")),
        Row("teacher", before + [f"segment.py --data {world} --encoder {teacher} {common}/teacher-frozen"]),
    ]


def decoders(world, out, seed, root):
    """The supplement's Table 7: the same frozen encoders under each decoder."""
    rows = []
    for row in small_world(world, out, seed, root)[2:]:
        flags, folder = row.runs[-1].split(" --out ")
        rows += [Row(f"{row.name}, {title}", [*row.runs[:-1], f"{flags} --decoder {kind} --out {folder}{suffix}"])
                 for kind, title, suffix in (("linear", "linear", "-linear"), ("fpn", "SemFPN", "-fpn"), ("mask", "mask decoder", ""))]
    return rows


TABLES = {"main": small_world, "7": decoders}


def run(rows, jobs):
    """Run the rows' commands, `jobs` rows at a time, each process on its share of the cores; a command of several rows runs once."""
    commands = list(dict.fromkeys(command for row in rows for command in row.runs))
    busy, finished = {command: Lock() for command in commands}, set()
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    bar = tqdm(total=len(commands), desc="runs", unit="run", dynamic_ncols=True)

    def follow(row):
        for command in row.runs:
            with busy[command]:
                if command in finished:
                    continue
                script, *argv = shlex.split(command)
                out, began = Path(argv[argv.index("--out") + 1]), time.time()
                out.parent.mkdir(parents=True, exist_ok=True)
                with open(f"{out}.txt", "w") as said:  # bars of several runs on one terminal would overwrite each other
                    status = subprocess.run([sys.executable, Path(__file__).parent / script, *argv], stdout=said, stderr=said,
                                            env=environment).returncode
                if status:
                    data.fail(f"python {command} ended with status {status}: {Path(said.name).read_text().splitlines()[-1:]}, see {said.name}")
                finished.add(command)
                bar.write(f"python {command}  # {time.time() - began:.0f} s", file=sys.stdout)
                bar.update()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(follow, rows))
    bar.close()


def table(cfg, rows, source, unseen, device):
    """Run what is missing of a table's rows, measure them, print the table; a second start reuses what is finished."""
    run(rows, cfg.jobs)
    results, cfg = {}, replace(cfg, data="+".join([source, *unseen]))
    for row in rows:
        folder = Path(row.runs[-1].split(" --out ")[1])
        path, protocol = folder / "eval.json", [cfg.data, cfg.mode, cfg.window, cfg.stride, cfg.flip, cfg.precision]
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("protocol") != protocol:
            known = dict(protocol=protocol, miou=measure(folder / "segmenter.pt", cfg, device))
            path.write_text(json.dumps(known))
        ledger = torch.load(folder / "segmenter.pt", weights_only=True)["ledger"]
        results[row.name] = {name: known["miou"][name] for name in (source, *unseen)} | {
            "unseen": sum(known["miou"][name] for name in unseen) / len(unseen), "seconds": f"{sum(stage['seconds'] for stage in ledger):.0f}"}
    print()
    show(results, [source, *unseen, "unseen", "seconds"])
    print(json.dumps({"table": cfg.out, "seed": cfg.seed, "rows": results}))


# --- Pictures -----------------------------------------------------------------------------------------------------------

def colorize(label, colors):
    """Class numbers (H, W) as an RGB array; 255 is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:len(colors)] = colors
    return palette[np.asarray(label)]


def with_legend(picture, names, colors, left=10, size=13):
    """The picture, and below it a legend of coloured boxes in as many lines as it takes."""
    font, places, x, y = ImageFont.load_default(size), [], left, size
    widths = [3 * size + font.getlength(name) for name in names]
    width = round(max(picture.width, 24 * size, left + max(widths, default=0)))
    for needed in widths:
        if x > left and x + needed > width:
            x, y = left, y + 1.6 * size
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, round(picture.height + y + size)), "white")
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for (x, y), name, color in zip(places, names, colors):
        y += picture.height
        pen.rectangle((x, y - size / 2, x + size, y + size / 2), tuple(color), "gray")
        pen.text((x + 1.5 * size, y), name, "black", font, anchor="lm")
    return canvas


def sheet(columns, titles, names, colors, path, width=136, gap=4, top=28):
    """Write {column title: [RGB arrays]} as one picture, a title before each row and a legend of colours below; returns the path."""
    font, ruler = ImageFont.load_default(13), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 16 + round(max(ruler.textbbox((0, 0), title, font)[2] for title in titles))
    width = max(width, *(12 + round(font.getlength(name)) for name in columns))

    def scaled(cell):  # small cells keep square pixels, large ones get smooth
        size = width, max(1, round(width * cell.shape[0] / cell.shape[1]))
        return Image.fromarray(cell).resize(size, Image.Resampling.NEAREST if cell.shape[1] < width else Image.Resampling.BOX)

    rows = [[scaled(cell) for cell in row] for row in zip(*columns.values())]
    heights = [max(cell.height for cell in row) for row in rows]
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + sum(heights) + gap * len(heights)), "white")
    pen, y = ImageDraw.Draw(canvas), top
    for j, name in enumerate(columns):
        pen.text((left + j * (width + gap) + width / 2, top - 8), name, "black", font, anchor="ms")
    for title, row, height in zip(titles, rows, heights):
        pen.text((left - 8, y + height / 2), title, "black", font, anchor="rm", align="right")
        for j, cell in enumerate(row):
            canvas.paste(cell, (left + j * (width + gap), y))
        y += height + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    (with_legend(canvas, names, colors, left) if names else canvas).save(path)
    return path


def picture(rows, domains, root, path, images=8):
    """Draw images of the unseen domains: input, label, the rows' predictions, and the features of teacher and students."""
    paths = {row.name: Path(row.runs[-1].split(" --out ")[1]) for row in rows}
    predicted, featured = ("no KD", "two-stage MSE", "GKD (QSD)"), ("teacher", "no KD", "two-stage MSE", "GKD (QSD)")
    cfg = Config(data="+".join(domains), root=root, examples=images // len(domains))
    return compare({name: paths[name] for name in predicted}, {name: paths[name] for name in featured}, cfg, path, torch.device("cpu"))


def compare(predicted, featured, cfg, path, device):
    """Draw images of each domain of cfg.data beside the predictions of some models {name: path} and the features of others, whose
    colours are three principal components, turned onto the axes of the first of them."""
    models = segmenters(predicted, device)
    known = (next(iter(predicted)), next(iter(models.values()))[1]) if predicted else ()  # whose classes the images must have
    columns = {"image": []} | ({"label": []} if predicted else {}) | {name: [] for name in predicted}
    images, titles = [], []
    for name in data.rows(cfg.data):
        dataset = domain(name, cfg, *known)
        for image, label, *_ in spread(dataset, cfg.examples):
            images.append(image)
            titles.append(name.removeprefix("toy-").removeprefix("camvid-"))
            columns["image"].append(image.permute(1, 2, 0).numpy())
            if predicted:
                columns["label"].append(colorize(label, dataset.colors))
            for title, (model, saved) in models.items():
                columns[title].append(colorize(classify(model, saved, image, cfg, device), dataset.colors))
    tokens = {name: [patch_tokens(vit, image, device) for image in images] for name, vit in encoders(featured, cfg, device).items()}
    for name, colors in principal_colors({name: torch.cat([x.flatten(0, 1) for x in own]) for name, own in tokens.items()}).items():
        parts = colors.split([x.shape[0] * x.shape[1] for x in tokens[name]])
        columns[f"PCA: {name}"] = [(part * 255).byte().view(*x.shape[:2], 3).numpy() for part, x in zip(parts, tokens[name])]
    return sheet(columns, titles, *((dataset.classes, dataset.colors) if predicted else ((), ())), path)


def file_in(path, *names):
    """The first of these files in a run's folder; any other path as it is."""
    return next((file for name in names if (file := Path(path, name)).is_file()), path)


def segmenters(models, device):
    """Trained segmenters and their checkpoints of models {name: path}; UserError where they know different classes."""
    loaded = {name: segment.load_segmenter(file_in(path, "segmenter.pt"), device) for name, path in models.items()}
    if len({tuple(saved["classes"]) for _, saved in loaded.values()}) > 1:
        data.fail(f"--models: {', '.join(models)} were trained on different classes")
    return loaded


def encoders(models, cfg, device):
    """Frozen encoders of models {name: path}; UserError where their tokens would not stand for the same pixels."""
    vits = {name: qsd.load_vit(file_in(path, "student.pt", "segmenter.pt"), patch_size=cfg.patch or None) for name, path in models.items()}
    if len({vit.patch_size for vit in vits.values()}) > 1:
        sides = ", ".join(f"{name} {vit.patch_size}" for name, vit in vits.items())
        data.fail(f"--models have patches of different sides ({sides} pixels): give all the same with --patch")
    return {name: vit.to(device).eval().requires_grad_(False) for name, vit in vits.items()}


def spread(dataset, count):
    """At most `count` items of a dataset, evenly spread."""
    return Subset(dataset, range(0, len(dataset), -(-len(dataset) // count)))


@torch.no_grad()
def patch_tokens(vit, image, device):
    """Final patch tokens (h, w, C), on the CPU, of a uint8 image (3, H, W) that is scaled to whole patches."""
    side = vit.patch_size
    h, w = (max(1, round(pixels / side)) for pixels in image.shape[1:])
    x = segment.resize(data.normalize(image[None].to(device), vit.mean, vit.std), (h * side, w * side))
    return vit(x)[1][0].float().cpu().unflatten(0, (h, w))


def principal(tokens):
    """The three leading principal components (M, 3) of tokens (M, C), each of variance 1."""
    x = tokens - tokens.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False)[2][:3].T
    return x / x.std(0)


def principal_colors(tokens):
    """RGB in 0..1 (M, 3) for tokens {name: (M, C)} of several models: their principal components on the axes of the first model's."""
    own = {name: principal(x) for name, x in tokens.items()}
    for name, x in own.items():  # components have no natural order or sign: all are turned as a whole (Procrustes)
        U, _, Vh = torch.linalg.svd(x.T @ next(iter(own.values())))
        own[name] = x @ U @ Vh
    return {name: (x / 5 + 0.5).clamp(0, 1) for name, x in own.items()}  # two and a half deviations either side


# --- Figures of the paper: models {name: path}, and where the picture goes ------------------------------------------------

def figure(cfg, device):
    """Draw --figure of --models."""
    models, path = named(cfg.models), Path(cfg.out)
    if cfg.figure in ("7a", "7b") and len(models) < 2:
        data.fail("--models: this figure wants the teacher, then its students")
    if path.suffix.lower() not in data.SUFFIXES:
        path = path / f"figure-{cfg.figure}.png"
    FIGURES[cfg.figure](models, cfg, path, device)
    print(f"picture: {path}")


def named(text):
    """--models as {name: path}; a path without a name is its own."""
    models = {}
    for part in filter(None, text.split(",")):
        name, _, path = (word.strip() for word in part.partition("="))
        if name in models:
            data.fail(f"--models {text}: two are called {name}")
        models[name] = path or name
    if not models:
        data.fail("--models: say which, as in teacher=dinov2_vitb14,GKD=runs/source/student.pt")
    return models


def losses(models, cfg, path, device):
    """Figure 3b: the losses of several runs against their steps."""
    runs = {name: Path(place).parent if Path(place).is_file() else Path(place) for name, place in models.items()}
    for folder in runs.values():
        if not (folder / "log.jsonl").is_file():
            data.fail(f"{folder}: holds no log.jsonl; this figure wants the folders of runs")
    data.loss_curves(runs, path)


def features(models, cfg, path, device):
    """Figure 5: the features of several encoders as colours, on the axes of the first."""
    compare({}, models, cfg, path, device)


def predictions(models, cfg, path, device):
    """Figure 8: the predictions of several segmenters beside image and label."""
    compare(models, {}, cfg, path, device)


def distance_histogram(models, cfg, path, device):
    """Figure 7a: how far each student's tokens are from those of the teacher, the first of the models, on random patches of cfg.data.

    A student's tokens are brought to the teacher's space by the affine map that fits best on every second image, and measured on
    the other images: the same rule for all methods, as heads differ (a QSD head mixes tokens, a pointwise one does not)."""
    vits = encoders(models, cfg, device)
    images = ConcatDataset([spread(domain(name, cfg), cfg.subset) for name in data.rows(cfg.data)])
    if len(images) < 2:
        data.fail(f"--data {cfg.data}: has one image, but this figure wants one to fit on and another to measure on")
    halves = [Subset(images, range(start, len(images), 2)) for start in (0, 1)]
    tokens = {name: [random_tokens(vit, half, cfg, device, f"{name}, {what}") for half, what in zip(halves, ("fit", "measured"))]
              for name, vit in vits.items()}
    (fit_t, v_t), *students = tokens.values()
    apart = {name: distances(v_s, v_t, fit_s, fit_t) for name, (fit_s, v_s) in zip(list(tokens)[1:], students)}
    edges = torch.linspace(0, torch.cat(list(apart.values())).quantile(0.99).item(), 61, dtype=torch.float64)
    series = {}
    for name, d in apart.items():
        share = 100 * torch.histogram(d, edges).hist / len(d)
        series[f"{name}: median {d.median():.2f}"] = list(zip(((edges[1:] + edges[:-1]) / 2).tolist(), share.tolist()))
    data.chart(series, path, f"Euclidean distance to {next(iter(models))} ({len(v_t)} tokens of {cfg.data})", "% of the tokens",
               size=(800, 420))


def random_tokens(vit, images, cfg, device, title):
    """cfg.tokens final patch tokens (M, C) of random places in the images, the same for every encoder; fewer where there are no more."""
    each, tokens = -(-cfg.tokens // len(images)), []
    for i, (image, *_) in enumerate(tqdm(images, title, leave=False)):
        x = patch_tokens(vit, image, device).flatten(0, 1)
        tokens.append(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(data.mix(cfg.seed, i)))[:each]])
    return torch.cat(tokens)[:cfg.tokens]


def distances(v_s, v_t, fit_s, fit_t):
    """Euclidean distance (M,) of student tokens (M, C_s) to the teacher's (M, C_t), after the affine map that fits others best."""
    v_s, fit_s = (F.pad(x.double(), (0, 1), value=1) for x in (v_s, fit_s))
    # tokens after a LayerNorm lie in a plane, so the constant is not independent of them: gelsd copes
    phi = torch.linalg.lstsq(fit_s, fit_t.double(), driver="gelsd").solution
    return (v_s @ phi - v_t.double()).norm(dim=1)


HEAT = np.array([(255, 255, 255), (255, 225, 140), (245, 130, 50), (170, 20, 70), (40, 0, 60)])


def heat(x):
    """Values 0..1 as colours (..., 3) from white to dark."""
    return np.stack([np.interp(x, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], -1).astype(np.uint8)


def attention_maps(models, cfg, path, device):
    """Figure 7b: how each QSD student's patches (rows) attend to those of the teacher, the first of the models (columns), on the first
    image of cfg.data: all N x N weights, the weight of each patch on itself (the diagonal), and the weights of four patches."""
    (_, teacher), *students = encoders(models, cfg, device).items()
    image = domain(next(iter(data.rows(cfg.data))), cfg)[0][0]
    v_t = patch_tokens(teacher, image, device)
    h, w, _ = v_t.shape
    places = [(y * h // 4, x * w // 4) for y in (1, 3) for x in (1, 3)]
    columns, titles = {title: [] for title in ("image", "all N x N weights", "the diagonal", *(f"patch {n}" for n in range(1, 5)))}, []
    for name, vit in students:
        W = attention(file_in(models[name], "student.pt"), patch_tokens(vit, image, device), v_t)
        maps = [x / x.max() for x in (W, W.diagonal().view(h, w), *(W[y * w + x].view(h, w) for y, x in places))]
        marked = [{}, {}, *({n: place} for n, place in enumerate(places, 1))]
        cells = [framed(image.permute(1, 2, 0).numpy(), (h, w), dict(enumerate(places, 1)))]
        cells += [framed(heat(x), (h, w), marks) for x, marks in zip(maps, marked)]
        for title, cell in zip(columns, cells):
            columns[title].append(cell)
        titles.append(f"{name}\non the diagonal:\n{W.diagonal().mean():.1%}\n(uniform: {1 / len(W):.1%})")
    steps = torch.linspace(0, 1, 5)
    sheet(columns, titles, ["0", "1/4", "1/2", "3/4", "1: the largest weight of the map"], heat(steps).tolist(), path, width=200)


def attention(path, v_s, v_t):
    """Weights (N, N) with which a student's tokens v_s (h, w, C_s) attend to the teacher's v_t (h, w, C_t), by the head that student.pt
    keeps of L_feat; UserError where it has none."""
    heads = {key.removeprefix("feat."): p for key, p in (qsd.lineage(path)[1] or {}).items() if key.startswith(("feat.phi", "feat.varphi"))}
    if not heads:
        data.fail(f"{path}: holds no head of L_feat; this figure wants a student.pt distilled with --loss qsd and --alpha above 0")
    config = torch.load(path, weights_only=True)["config"]
    if config["target_norm"] == "phis":
        data.fail(f"{path}: was distilled with --target_norm phis, whose statistics no checkpoint keeps")
    head = qsd.QSD(v_s.shape[-1], v_t.shape[-1], config["attention"], config["scale"], config["temperature"])
    try:
        head.load_state_dict(heads)
    except RuntimeError:
        data.fail(f"{path}: its heads are for a teacher of width {heads['phi.1.weight'].shape[0]}, not {v_t.shape[-1]}")
    v_s, v_t = v_s.flatten(0, 1)[None], v_t.flatten(0, 1)[None]
    v_t = qsd.normalize_targets((v_t[:, 0], v_t, ()), config["target_norm"])[1]
    with torch.no_grad():
        return head(v_s, v_t, torch.eye(v_t.shape[1])[None])[0]


HEAT = np.array([(255, 255, 255), (255, 225, 140), (245, 130, 50), (170, 20, 70), (40, 0, 60)])  # the colours of 0, 1/4 .. 1


def heat(x):
    """Values in 0..1 (...) as RGB (..., 3), from white to dark."""
    return np.stack([np.interp(x, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], -1).astype(np.uint8)


def framed(cell, grid, places):
    """An RGB array, 400 pixels wide, with a numbered frame around some patches {number: (row, column)} of a grid (h, w)."""
    picture = Image.fromarray(cell).resize((400, round(400 * cell.shape[0] / cell.shape[1])), Image.Resampling.NEAREST)
    pen, font, side = ImageDraw.Draw(picture), ImageFont.load_default(30), picture.width / grid[1]
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline="gray", width=2)
    for number, (row, column) in places.items():
        box = [column * side, row * side, (column + 1) * side, (row + 1) * side]
        pen.rectangle(box, outline="white", width=6)
        pen.rectangle(box, outline=(0, 90, 255), width=4)
        pen.text((box[2] + 6, box[1]), str(number), (0, 90, 255), font, stroke_width=2, stroke_fill="white")
    return np.asarray(picture)


def class_bars(models, cfg, path, device):
    """Figure 9: the IoU of each class, and their mean, as bars: a panel for each domain, a colour for each model."""
    classes = [*next(iter(segmenters(models, device).values()))[1]["classes"], "mean"]
    ious = {name: class_ious(file_in(place, "segmenter.pt"), cfg, device) for name, place in models.items()}
    font, small = ImageFont.load_default(13), ImageFont.load_default(10)
    colors = [data.LINE_COLORS[i % len(data.LINE_COLORS)] for i in range(len(models))]
    bar, panel, top = 12, 260, 34
    row, left = bar * len(models) + 10, 20 + round(max(map(font.getlength, classes)))
    domains = list(data.rows(cfg.data))
    canvas = Image.new("RGB", (left + (panel + 40) * len(domains), top + row * len(classes) + 24), "white")
    pen = ImageDraw.Draw(canvas)
    for k, name in enumerate(classes):
        pen.text((left - 10, top + (k + 0.5) * row), name, "black", font, anchor="rm")
    for j, name in enumerate(domains):
        x, bottom = left + j * (panel + 40), top + row * len(classes)
        pen.text((x, 8), f"IoU on {name}, %", "black", font)
        for value in range(0, 101, 20):
            pen.line((x + value / 100 * panel, top, x + value / 100 * panel, bottom), (225, 225, 225))
            pen.text((x + value / 100 * panel, bottom + 4), str(value), "black", font, anchor="ma")
        for i, each in enumerate(ious.values()):
            for k, value in enumerate([*each[name].tolist(), each[name].nanmean().item()]):
                y = top + k * row + 5 + i * bar
                if math.isnan(value):
                    pen.text((x + 4, y + bar / 2), "not in these images", "gray", small, anchor="lm")
                else:
                    pen.rectangle((x, y, x + value / 100 * panel, y + bar - 2), colors[i])
                    pen.text((x + value / 100 * panel + 3, y + bar / 2 - 1), f"{value:.0f}", "black", small, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with_legend(canvas, list(models), colors, left).save(path)


def compute(models, cfg, path, device):
    """mIoU against the FLOPs of all stages that made each segmenter, its teacher's training not among them."""
    points = {}
    for name, place in models.items():
        checkpoint = file_in(place, "segmenter.pt")
        miou = measure(checkpoint, cfg, device)["mean"]
        points[name] = [(sum(stage["flops"] for stage in torch.load(checkpoint, weights_only=True)["ledger"]), miou)]
    data.chart(points, path, "FLOPs of the student's training, all stages (2 per multiply-add; log scale)", f"mIoU, %, mean of {cfg.data}",
               log="x", size=(800, 420), marks=True)


FIGURES = {"3b": losses, "5": features, "7a": distance_histogram, "7b": attention_maps, "8": predictions, "9": class_bars,
           "compute": compute}


# --- Encoders without a decoder -------------------------------------------------------------------------------------------

def probes(cfg, device):
    """Print the mIoU of a linear probe on each encoder of --models, trained on the first domain of cfg.data."""
    rows = {name: probe(encoders({name: path}, cfg, device)[name], cfg, device) for name, path in named(cfg.models).items()}
    show(rows, list(next(iter(rows.values()))))
    print(json.dumps({"probe": cfg.models, "miou": rows}))


def probe(vit, cfg, device, ridge=1e-3):
    """mIoU in percent on the domains of cfg.data that have a val split, and "mean", of ridge regression from the final patch tokens to
    the share of each class in a patch (h, w, K), in closed form on cfg.subset images; scores are resized to the label as always."""
    source, *_ = data.rows(cfg.data)
    train = data.scenes(source, cfg.root, "train", data.eval_transform(source), classes=cfg.classes or None)
    K, gram, moment, result = train.num_classes, 0, 0, {}
    for image, label, _ in tqdm(spread(train, cfg.subset), f"probe {source}", leave=False):
        x = patch_tokens(vit, image, device).double()
        share = F.interpolate((label == torch.arange(K)[:, None, None])[None].double(), x.shape[:2], mode="area")[0].flatten(1).T  # (N, K)
        x = F.pad(x.flatten(0, 1), (0, 1), value=1)                          # (N, C + 1)
        labelled = share.sum(1, keepdim=True)  # a patch counts as much as it is labelled
        gram, moment = gram + x.T @ (labelled * x), moment + x.T @ share
    weights = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), moment)
    for name, entry in data.rows(cfg.data).items():
        if "val" in entry.splits:
            conf = 0
            for image, label, _ in tqdm(domain(name, cfg), f"probe {name}", leave=False):
                scores = F.pad(patch_tokens(vit, image, device).double(), (0, 1), value=1) @ weights  # (h, w, K)
                conf += confusion(segment.resize(scores.movedim(-1, 0)[None], label.shape).argmax(1)[0], label, K)
            result[name] = 100 * iou(conf).nanmean().item()
    return with_mean(result)


# --- A segmenter at work --------------------------------------------------------------------------------------------------

def classify(model, saved, image, cfg, device):
    """The class of each pixel (H, W), uint8, that a segmenter sees in an image uint8 (3, H, W), under the protocol of cfg."""
    x = data.normalize(image[None].to(device), model.encoder.mean, model.encoder.std)
    with data.precision(cfg.precision, device):
        scores = predict(model, x, cfg.window or saved["config"]["size"], cfg.stride, cfg.mode == "whole", cfg.flip, multiples(cfg))
    return scores[0].argmax(0).byte().cpu()


def segment_images(cfg, rank, world, device):
    """Write NAME_classes.png, whose values are class numbers and whose palette their colours, and NAME_overlay.png into --out for each
    image of --images; other files there are left alone. Prints images per second."""
    given, out = Path(cfg.images), Path(cfg.out)
    if not given.exists():
        data.fail(f"--images {given}: no such file or folder")
    files = sorted(given.iterdir()) if given.is_dir() else [given]
    files = [file for file in files if file.suffix.lower() in data.SUFFIXES and file.is_file() and not file.name.startswith(".")]
    stems = {file.stem: file for file in files}
    if not files:
        data.fail(f"--images {given}: no images here (files that end in {' '.join(sorted(data.SUFFIXES))})")
    if len(stems) < len(files):
        twice = next(file for file in files if stems[file.stem] != file)
        data.fail(f"--images: {twice} and {stems[twice.stem].name} would both become {twice.stem}_classes.png; rename one of them")
    if out.is_file() or out.resolve() == files[0].parent.resolve():
        data.fail(f"--out {out}: is {'a file' if out.is_file() else 'where the images lie'}; choose another folder for the results")
    model, saved = segment.load_segmenter(cfg.checkpoint, device)
    colors = np.zeros((256, 3), np.uint8)
    colors[:len(saved["colors"])] = saved["colors"]
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with tqdm(files[rank::world], "images", disable=rank > 0, leave=False) as bar:
        for file in bar:
            image = data.read_image(file, mapped=False)  # mapping would unpack TIFFs beside themselves
            picture = Image.fromarray(classify(model, saved, image, cfg, device).numpy())
            picture.putpalette(colors.tobytes())
            picture.save(out / f"{file.stem}_classes.png")
            blend = Image.blend(Image.fromarray(image.permute(1, 2, 0).numpy()), picture.convert("RGB"), 0.5)
            with_legend(blend, saved["classes"], saved["colors"], size=max(13, blend.width // 80)).save(out / f"{file.stem}_overlay.png")
    if rank == 0:
        print(f"{out}: {len(files)} images, {world * len(files[::world]) / (time.time() - began):.1f} images/s")


class Scores(torch.nn.Module):
    """What is exported: images (B, 3, H, W), normalised by the encoder's statistics -> scores (B, K, H, W), the largest names the class."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, x):
        return self.segmenter.decoder.scores(self.segmenter(x), x.shape[2:])


def export(checkpoint, path, dynamic):
    """Write a segmenter as a torch.export program for images of its training crop, the window of the protocol: one image, or any number
    if dynamic. Classes, colours, mean and std lie in the file's extra_files["about.json"]. UserError where it differs from eager mode."""
    if path.suffix != ".pt2":
        data.fail(f"--export {path}: torch.export names its files .pt2")
    model, saved = segment.load_segmenter(checkpoint)
    model.frozen = False  # nothing is trained here, so the encoder needs no gradient mode of its own in the program
    size, batch = saved["config"]["size"], 2 if dynamic else 1
    about = {key: saved[key] for key in ("classes", "colors")} | dict(mean=model.encoder.mean, std=model.encoder.std, size=size)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(Scores(model), (torch.zeros(batch, 3, size, size),), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    loaded, difference = torch.export.load(path).module(), 0
    for count in (1, 3) if dynamic else (1,):
        x = torch.randn(count, 3, size, size)
        difference = max(difference, (loaded(x) - Scores(model)(x)).abs().max().item())
    if not difference < 1e-4:
        data.fail(f"{path}: its scores differ from those of {checkpoint} by up to {difference:.1e}")
    print(f"{path}: {'any number of images' if dynamic else 'one image'} (3, {size}, {size}) to {len(saved['classes'])} scores a pixel; "
          f"largest difference from eager mode {difference:.1e}")


def main(argv=None):
    cfg = data.configure(Config, PRESETS, argv)
    rank, world, device = data.launch()
    if cfg.demo or cfg.table != "none":
        if cfg.data not in ("toy", "camvid"):
            data.fail(f"--data {cfg.data}: the tables are run in the small worlds toy and camvid only")
        if world > 1:
            data.fail("--demo and --table run in one process: start them with python, or their commands one by one with torchrun")
        rows = TABLES["main" if cfg.demo else cfg.table](cfg.data, cfg.out, cfg.seed, cfg.root)
        table(cfg, rows, *data.SETTINGS[cfg.data], device)
        if cfg.demo:
            print(f"picture: {picture(rows, data.SETTINGS[cfg.data][1], cfg.root, Path(cfg.out) / 'demo.png')}")
        return
    if not 0 < cfg.stride <= 1:
        data.fail(f"--stride {cfg.stride} is a share of the window, above 0 and at most 1")
    if cfg.figure != "none" or cfg.probe:
        if world > 1:
            data.fail("--figure and --probe run in one process: start them with python")
        if min(cfg.examples, cfg.subset, cfg.tokens) < 1:
            data.fail("--examples, --subset and --tokens are at least 1")
        return figure(cfg, device) if cfg.figure != "none" else probes(cfg, device)
    if not cfg.checkpoint:
        data.fail("give --checkpoint segmenter.pt and --data, or --demo")
    if cfg.images:
        return segment_images(cfg, rank, world, device)
    if cfg.export:
        return export(cfg.checkpoint, Path(cfg.export), cfg.dynamic) if rank == 0 else None
    result = measure(cfg.checkpoint, cfg, device)
    if rank == 0:
        show({cfg.checkpoint: result}, list(result))
        print(json.dumps({"checkpoint": cfg.checkpoint, "miou": result}))


if __name__ == "__main__":
    data.cli(main, qsd.UserError)
