"""mIoU on domains nobody trained on, the paper's tables and figures, a segmenter at work.

    python eval.py --demo                # the whole method in the built-in toy world
    python eval.py --table 5 --data toy  # a table of the paper there; without --data at its scale
    python eval.py --checkpoint runs/gtav/segmenter.pt --setting gtav --root /data
    torchrun --standalone --nproc_per_node=8 eval.py ...  # the same numbers, sooner
    python eval.py --checkpoint runs/gtav/segmenter.pt --images photos --out segmented
    python eval.py --figure 5 --models DINOv2=dinov2_vitb14,GKD=runs/source --patch 16 --data gtav

Results are printed as Markdown for people and as a line of JSON for programs.
"""
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

import data
import distill
import qsd
import segment
from data import SETTINGS
from qsd import UserError

TABLES = "main effects variants steps clock flops 1 2 3 4 5 6 7 8 9 10 fig6".split()


@dataclass
class Config:
    """Every constant of the evaluation."""
    # what is measured
    checkpoint: str = ""    # segmenter.pt
    data: str = "paper"     # domains, joined with +; of a --table: toy, camvid, paper
    setting: Literal[("none", *SETTINGS)] = "none"  # its domains, not --data; a part of a --table
    root: str = "data"      # the folder that holds the data sets
    # protocol
    window: int = 0         # side of the sliding window, pixels; 0: the training crop (512)
    stride: float = 2 / 3   # of the window, rounded (official 341 of 512)
    batch: int = 1          # images at once; more than 1 must be of one size
    workers: int = 2        # image-loading processes
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    # figures of several models
    figure: Literal["none", "3b", "5", "7a", "7b", "8", "9"] = "none"  # 9 is printed as a table
    models: str = ""        # name=path,..: a run's folder, a checkpoint, an encoder's name
    patch: int = 0          # side of a patch in figures 5, 7a and 7b, pixels; 0: as trained
    examples: int = 2       # images of each domain in figures 5 and 8
    subset: int = 300       # images of each domain that figure 7a measures
    tokens: int = 10000     # distances in figure 7a (the paper's number)
    # a segmenter at work
    images: str = ""        # segment this image or folder of images into --out
    export: str = ""        # write --checkpoint as a torch.export program, NAME.pt2
    # the paper's tables, which assets/tables.txt describes
    table: Literal[("none", *TABLES)] = "none"  # run what is missing of it, print what is there
    demo: bool = False      # --table main --data toy with one seed, and a picture
    seed: int = 0           # the first seed of the small worlds' runs
    seeds: int = 0          # how many seeds; 0: 3, 5 for --table effects, 1 for --demo
    jobs: int = 2           # runs at the same time, each on its share of the cores
    processes: int = 0      # of each distillation; 0: one per GPU
    run: bool = True        # no: only print what is missing and what is there
    out: str = "runs"       # folder of runs and pictures; for --figure also a file


PRESETS = {"toy": dict(batch=50, workers=0), "camvid": dict(batch=8, workers=1), "paper": dict(jobs=1)}


def preset(given):
    """What --demo and --data change in the defaults; given: the flags as a dict."""
    values = dict(data="toy", table="main", seeds=1) if given.get("demo") else {}
    domain = (values | given).get("data", Config.data)
    return values | PRESETS.get("toy" if domain.startswith("toy") else domain, {})


# --- mIoU ------------------------------------------------------------------------------------------------------------

def confusion(pred, label, num_classes):
    """Pixels of two integer maps, counted by (label, prediction): (K, K), but for label 255."""
    valid = label != data.IGNORE
    cell = label[valid] * num_classes + pred[valid]
    return torch.bincount(cell, minlength=num_classes ** 2).view(num_classes, num_classes)


def iou(conf):
    """IoU of each class in [0, 1]: NaN if neither labelled nor predicted, 0 if only predicted."""
    conf = conf.double()
    intersection = conf.diag()
    return intersection / (conf.sum(0) + conf.sum(1) - intersection)


@torch.no_grad()
def slide(model, x, window, stride=2 / 3):
    """Scores (B, K, H, W) of images x (B, 3, H, W): means over the windows that see a pixel."""
    if stride > 1:
        raise UserError(f"--stride {stride}: a share of the window was expected, as 0.667")
    H, W = x.shape[2:]
    x = F.pad(x, (0, max(window - W, 0), 0, max(window - H, 0)))  # no side is shorter
    step = max(1, round(stride * window))
    total = None  # (B, K, H, W): the scores of all windows that see a pixel, added up
    count = None  # (H, W): how many these are
    for top in starts(x.shape[2], window, step):
        for left in starts(x.shape[3], window, step):
            here = (..., slice(top, top + window), slice(left, left + window))
            scores = model.decoder.scores(model(x[here]), (window, window))
            if total is None:
                total = scores.new_zeros(*scores.shape[:2], *x.shape[2:])
                count = scores.new_zeros(x.shape[2:])
            total[here] += scores
            count[here] += 1
    total /= count
    check_finite(total)
    return total[..., :H, :W]


def starts(length, window, step):
    """First pixels of the windows along one side; the last ends flush with the border."""
    last = length - window
    return sorted({min(pixel, last) for pixel in range(0, last + step, step)})


def check_finite(*scores):
    if not all(part.isfinite().all() for part in scores):
        raise UserError("the segmenter's scores are not finite; use --precision fp32")


def evaluate(model, dataset, window, cfg, device, title=""):
    """Confusion matrix (K, K) over labelled images; each process counts its share."""
    K = dataset.num_classes
    conf = torch.zeros(K, K, dtype=torch.int64, device=device)
    share = Subset(dataset, range(distill.rank(), len(dataset), distill.world_size()))
    for x, label in batches(model, share, cfg, device, title):
        scores = slide(model, x, window, cfg.stride)
        pred = segment.resize(scores, label.shape[1:]).argmax(1)  # (B, H, W)
        conf += confusion(pred, label.to(device), K)
    return distill.summed(conf).cpu()


def batches(model, dataset, cfg, device, title):
    """The images of a labelled dataset, normalised for a model, and their labels."""
    loader = DataLoader(dataset, cfg.batch, num_workers=cfg.workers)
    for images, label, _ in tqdm(loader, title, disable=distill.rank() > 0, leave=False):
        yield data.normalize(images.to(device), model.encoder.mean, model.encoder.std), label


# --- AP of boxes -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def find_objects(model, x, side):
    """The objects in each of images x (B, 3, H, W): [(D, 6)], see BoxDecoder.scores."""
    H, W = x.shape[2:]
    x = TF.resize(x, [side], max_size=2 * side)  # as in training, but for strips
    h, w = x.shape[2:]
    whole = 4 * model.encoder.patch_size  # a pixel of the coarsest map
    maps = model(F.pad(x, (0, -w % whole, 0, -h % whole)))
    check_finite(*maps)
    scale = x.new_tensor([W / w, H / h, W / w, H / h, 1, 1])
    return [objects * scale for objects in model.decoder.scores(maps, (h, w))]


def matched(found, objects):
    """VOC's verdict on boxes found (D, 6), best first, of objects (M, 6): rows class, score, hit.

    A box stands for the object of its class that it overlaps most, with an IoU of 0.5 or more, and
    is a hit if it is the first. One that stands for a difficult object does not count at all.
    """
    objects = F.pad(objects, (0, 0, 0, 1))  # a row of zeros, as there may be no objects
    same = found[:, 4:5] == objects[:, 4]
    largest, nearest = (same * box_iou(found[:, :4], objects[:, :4])).max(1)  # (D,)
    stands = largest >= 0.5
    repeats = (stands & (nearest[:, None] == nearest)).tril(-1).any(1)  # a better box does
    verdicts = torch.column_stack([found[:, 4:], stands & ~repeats])
    return verdicts[~(stands & objects[nearest, 5].bool())]


def average_precision(scores, hits, count):
    """Area under the best precision at each recall or a higher one (VOC since 2010), or NaN."""
    hits = hits[np.argsort(-scores, kind="stable")]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    reached = np.maximum.accumulate(precision[::-1])[::-1]
    return (reached * hits).sum() / count if count else math.nan  # recall grows by 1 / count


def evaluate_boxes(model, dataset, side, cfg, device, title=""):
    """AP (K,) of each class; of a corrupted set the mean over its versions."""
    versions = list(dict.fromkeys(sample.corruption for sample in dataset.samples))  # or [None]
    total = torch.zeros(dataset.num_classes, dtype=torch.float64)
    for number in range(distill.rank(), len(versions), distill.world_size()):
        verdicts = []  # of each image: (D, 3), see matched
        labels = []  # the class of each object that counts
        share = Subset(dataset, range(number, len(dataset), len(versions)))  # all images
        for x, label in batches(model, share, cfg, device, f"{title} {versions[number] or ''}"):
            for found, objects in zip(find_objects(model, x, side), map(data.objects_of, label)):
                verdicts.append(matched(found.cpu(), objects))
                difficult = objects[:, 5] > 0
                labels += objects[~difficult, 4].tolist()
        classes, scores, hits = torch.cat(verdicts).double().numpy().T
        for k in range(dataset.num_classes):
            total[k] += average_precision(scores[classes == k], hits[classes == k], labels.count(k))
    return distill.summed(total.to(device)).cpu() / len(versions)


# --- What is measured ------------------------------------------------------------------------------------------------

def measure(title, model, saved, cfg, device):
    """{domain: IoU in percent of each class (K,), or AP} on cfg.data; NaN as iou says."""
    window = cfg.window or saved["config"]["size"]
    ious = {}
    for name in data.entries(cfg.data):
        dataset = val_split(name, cfg, title, saved)
        with distill.autocast(cfg.precision, device):
            if dataset.boxes:
                values = evaluate_boxes(model, dataset, window, cfg, device, name)
            else:
                values = iou(evaluate(model, dataset, window, cfg, device, name))
        if values.isnan().all():
            raise UserError(f"--data {name}: no label in its images counts")
        ious[name] = 100 * values
    return ious


def val_split(name, cfg, title="", saved=None):
    """The val split of a data set, which must have the classes of the segmenter `title`."""
    if name == "folder" and not saved:
        return data.images(name, cfg.root, split="val")
    if name == "folder":
        return data.scenes(name, cfg.root, "val", classes=len(saved["classes"]))
    classes = list(data.DATASETS[name].classes)
    known = saved["classes"] if saved else classes
    counts_alone = saved and saved.get("released")  # it tells only how many there are
    if len(classes) != len(known) or (classes != known and not counts_alone):
        raise UserError(f"--data {name} has the {len(classes)} classes {', '.join(classes)}; "
                        f"{title} was trained on {len(known)} others")
    return data.scenes(name, cfg.root, "val", partial(data.eval_transform, name=name))


def show(rows, columns):
    """Print {row name: [text]} as a Markdown table."""
    lines = [[name, *cells] for name, cells in ({"": columns} | rows).items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for cells in lines:
        padded = [text.ljust(width) for text, width in zip(cells, widths)]
        print(f"| {' | '.join(padded)} |")


# --- Runs: each is a command that a user can type --------------------------------------------------------------------

SCRIPTS = {"distill.py": (distill, "student.pt"), "segment.py": (segment, "segmenter.pt")}


@dataclass(frozen=True)
class Run:
    """A command of a training script. Two of one text are equal: rows share their runs."""
    text: str
    cfg: object = field(compare=False)  # its script's Config
    result: Path = field(compare=False)  # student.pt or segmenter.pt in the folder --out
    before: list = field(compare=False)  # all runs that lead to it
    processes: int = field(compare=False)


def run_of(script, processes=1, **flags):
    """A script's Run with these flags: a Run stands for its result, None is left out."""
    words = []
    before = []
    for name, value in flags.items():
        if isinstance(value, Run):
            before += [*value.before, value]
            value = value.result
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if value is not None:
            words += [f"--{name}", str(value)]
    module, result = SCRIPTS[script]
    cfg = distill.configure(module.Config, module.preset, words)
    launcher = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python"
    text = f"{launcher} {script} {shlex.join(words)}"
    return Run(text, cfg, Path(cfg.out, result), before, processes)


class Pair(NamedTuple):
    """Who is distilled into whom; and, filled in by `placed`, on which images and where."""
    teacher: str
    student: str
    student_depth: int | None = None  # only its first blocks
    proxy: str = "imagenet"  # --data of the proxy stage; "": none, as for foundation models
    flags: dict = {}  # more of them for "proxy", "source", "one-stage" and "tuned"
    source: str = ""  # --data of the source stage
    labelled: str = ""  # --data of the task stage: the source, or the same images with boxes
    common: dict = {}  # flags of every command
    shared: str = ""  # folder of the runs that do not depend on the source
    here: str = ""  # folder of those that do
    processes: int = 1  # of each run of distill.py


EVA_PROXY = "imagenet"  # as in the official scripts; by the paper's text ""
NORMED = dict(target_norm="layernorm")
LIGHT = dict(patch=16, batch=16, lr=5e-4, lr_rule="constant", repeats=1, workers=1) | NORMED
CAMVID = {"proxy": dict(size=128, budget=1000) | LIGHT, "source": dict(size=160, budget=500) | LIGHT,
          "one-stage": NORMED}
PAIRS = {
    "DINOv2-L -> DeiT-B": Pair("dinov2_vitl14", "deit_base_distilled"),
    "DINOv2-B -> DeiT-S": Pair("dinov2_vitb14", "deit_small_distilled"),
    "DINOv2-L -> DINOv2-B": Pair("dinov2_vitl14", "dinov2_vitb14", proxy=""),
    "DINOv2-B -> DINOv2-S": Pair("dinov2_vitb14", "dinov2_vits14", proxy=""),
    "EVA02-L -> EVA02-B": Pair("eva02_large", "eva02_base", proxy=EVA_PROXY),
    "EVA02-B -> EVA02-S": Pair("eva02_base", "eva02_small", proxy=EVA_PROXY),
    "DINOv2-L -> DINO-B": Pair("dinov2_vitl14", "dino_vitb16"),
    "DINOv2-B -> DINO-S": Pair("dinov2_vitb14", "dino_vits16"),
    # The teacher was trained on a wide world of looks, the student on what whole images show.
    "toy": Pair("toy_teacher", "toy_student", proxy="toy-proxy", flags={"tuned": dict(lr_backbone=2e-4)}),
    # Two ViT-Ti of ImageNet, the student only the first half of one.
    "camvid": Pair("vit_tiny_augreg", "deit_tiny", student_depth=6, flags=CAMVID),
}
SMALL = ("toy", "camvid")  # worlds for two CPU cores
LIKENED = "DINOv2-B -> DeiT-S"  # the paper's numbers of it stand beside the small worlds'
SMALLER = {"dinov2_vitl14": "dinov2_vitb14", "dinov2_vitb14": "dinov2_vits14"}  # as its student


def placed(name, setting, seed, cfg):
    """One of PAIRS on the images of a setting, with the folders of its runs below --out."""
    labelled, _ = SETTINGS[setting]
    p = PAIRS[name]._replace(labelled=labelled)
    if name in SMALL:
        folder = f"{cfg.out}/{name}/{seed}"
        common = dict(root=cfg.root, seed=seed)
        return p._replace(source=name, common=common, shared=folder, here=folder, processes=cfg.processes or 1)
    folder = f"{cfg.out}/paper/{name.replace(' -> ', '-to-').lower()}"
    gpus = 2 ** int(math.log2(torch.cuda.device_count() or 8))  # as the batch, a power of two
    return p._replace(source=labelled, common=dict(root=cfg.root), shared=folder, here=f"{folder}/{labelled}",
                      processes=cfg.processes or gpus)


def distilled(p, name, proxy=True, source=None, source_name=None, **flags):
    """The last run of stage 1: on the proxy set, then on source images; flags: of both."""
    student = dict(student=p.student, student_depth=p.student_depth)
    if proxy and p.proxy:
        first = run_of("distill.py", p.processes, data=p.proxy, **(p.flags.get("proxy", {}) | flags),
                       teacher=p.teacher, **student, **p.common, out=f"{p.shared}/{name}-proxy")
        student = dict(student=first)
    return run_of("distill.py", p.processes, data=source or p.source, **(p.flags.get("source", {}) | flags),
                  teacher=p.teacher, **student, **p.common, out=f"{p.here}/{source_name or name}-source")


def task(p, name, encoder, source=None, **flags):
    """Stage 2, or a one-stage baseline: its run. flags: of segment.py."""
    if p.labelled != p.source:
        name = f"{name}-{p.labelled}"
    flags |= p.common | dict(out=f"{p.here}/{name}")
    return run_of("segment.py", data=source or p.labelled, encoder=encoder, **flags)


def as_released(p, role, encoder, ending="", **flags):
    """The run of a decoder on a foundation model, frozen where the official configs freeze it."""
    # In the paper EVA02-B has 46.6 mIoU as a teacher and 56.2 as a student: as a teacher it stays frozen.
    trained = {}
    if encoder == "eva02_base" and role != "teacher":
        trained = dict(freeze=False, lr_backbone=1e-4)  # officially with drop path 0.15
    if encoder == "eva02_small" or (encoder in ("dinov2_vits14", "dinov2_vitb14") and p.source == "cityscapes"):
        trained = dict(freeze=False)
    return task(p, f"{role}-{'tuned' if trained else 'frozen'}{ending}", encoder, **trained, **flags)


# --- Rows: each is named after a method, here and in assets/tables.txt -----------------------------------------------

TWO_STAGE = {  # methods beside "two-stage" and a rival: name of the runs, flags of distill.py
    "MSE on source images": ("mse-only", dict(loss="mse", proxy=False)),
    "GKD": ("qsd", dict(loss="qsd")),
    "identity attention": ("identity", dict(loss="qsd", attention="identity")),
}
CHANGES = {  # after a comma in a row's name: a script, the ending of its runs' names, flags
    "no masks": ("distill", "-unmasked", dict(beta=0)),
    "no CLS token": ("distill", "-patches", dict(gamma=0)),
    "scaled logits": ("distill", "-scale-sqrt", dict(scale="sqrt")),
    "teacher's attention": ("distill", "-attention-teacher", dict(attention="teacher")),
    "four layers": ("distill", "-layers-four", dict(layers="four")),
    "LayerNorm targets": ("distill", "-target_norm-layernorm", dict(target_norm="layernorm")),
    "frozen": ("segment", "-frozen", dict(freeze=None)),
    "tuned": ("segment", "-tuned", dict(freeze=False)),  # the labels train the encoder, too
    "1/16 labels": ("segment", "-1of16", dict(labels="1/16")),
    "1/8 labels": ("segment", "-1of8", dict(labels="1/8")),
    "1/4 labels": ("segment", "-1of4", dict(labels="1/4")),
    "all labels": ("segment", "", {}),
    "linear": ("segment", "-linear", dict(decoder="linear")),
    "SemFPN": ("segment", "-fpn", dict(decoder="fpn")),
    "mask decoder": ("segment", "", {}),
}
FOUNDATION = "foundation model of that size"


def last_run(p, row, budget=""):
    """A row's last run; budget: of each distillation, or with a unit of all training."""
    method, *changes = row.split(", ")
    if method.startswith("labels of"):
        return with_more_sources(p, row, int(budget))
    two_stages = method in TWO_STAGE or method.startswith("two-stage")
    endings, flags = changed(p, changes, budget, two_stages)
    ending = endings["distill"] + endings["segment"]
    task_flags = flags["segment"]
    loss = method.split()[-1].replace("-", "").lower()  # "one-stage Af-DCD": afdcd
    if two_stages:
        name, objective = TWO_STAGE.get(method, (loss, dict(loss=loss)))
        encoder = distilled(p, name + endings["distill"], **objective, **flags["distill"])
        return task(p, name + ending, encoder, **task_flags)
    if method == "teacher":
        return as_released(p, "teacher", p.teacher, ending, **task_flags)
    if method == FOUNDATION:
        return as_released(p, "smaller", SMALLER[p.teacher], ending, **task_flags)
    if method == "no KD" and p.student.startswith(("dinov2", "eva02")):
        return as_released(p, "student", p.student, ending, **task_flags)
    student = dict(encoder=p.student, depth=p.student_depth, freeze=False)
    if method == "no KD":
        return task(p, f"no-kd{ending}", **(student | task_flags))
    if method == "logit KD":
        teacher = last_run(p, "teacher")
        return task(p, f"logits{ending}", **student, kd_logits=1, teacher=teacher, **task_flags)
    student |= dict(kd=1, loss=loss, **p.flags.get("one-stage", {}))
    return task(p, f"one-stage-{loss}{ending}", **student, teacher=p.teacher, **task_flags)


def changed(p, changes, budget, two_stages):
    """What a row's changes and budget add to runs: ({script: ending}, {script: flags})."""
    endings = {"distill": "", "segment": ""}
    flags = {"distill": {}, "segment": {}}
    for change in changes:
        script, ending, more = CHANGES[change]
        endings[script] += ending
        flags[script] |= more | p.flags.get(change, {})
    usual = distill.PRESETS["toy proxy"]["budget"] if p.source == "toy" else ""
    if budget not in ("", usual):  # else the runs are those of other tables
        endings["distill"] += f"-{budget}"
        flags["distill"]["budget"] = budget
    unit = budget.lstrip("0123456789.e")
    if unit:  # Laube et al. (arXiv 2604.25530) give 40 % to each stage of distillation
        whole = float(budget.removesuffix(unit))
        flags["distill"]["budget"] = f"{0.4 * whole:g}{unit}".replace("+", "")
        rest = f"{0.2 * whole:g}{unit}".replace("+", "")
        flags["segment"]["budget"] = rest if two_stages else budget
    return endings, flags


def with_more_sources(p, row, count):
    """GKD's last run with `count` sources in distillation, labels of the first or of all."""
    if count == 1:
        return last_run(p, "GKD")
    sources = data.TOY_SOURCES if p.source == "toy" else (p.source, "synthia", "urbansyn")
    joined = "+".join(sources[:count])
    name = f"qsd-on-{count}"
    student = distilled(p, "qsd", source=joined, source_name=name, loss="qsd")
    if row == "labels of all":
        return task(p, name, student, joined)
    return task(p, f"{name}-labels-1", student)


# --- Tables: their rows, and which of them are compared ---------------------------------------------------------------

def read_tables():
    """assets/tables.txt: {table: {pair, world or "gains": {column or "": {row: text}}}}."""
    found = defaultdict(dict)
    text = Path(__file__).with_name("assets").joinpath("tables.txt").read_text()
    for paragraph in text.strip().split("\n\n")[1:]:
        (heading, *columns), *rows = [re.split(r" *\| *", line) for line in paragraph.splitlines()]
        numbers = {}
        for i, column in enumerate(columns or [""], start=1):
            numbers[column] = {row[0]: [*row, ""][i] for row in rows}
        tables, pairs = heading.split(": ")
        for table, pair in product(tables.split(", "), pairs.split(", ")):
            found[table][pair] = numbers
    return found


WRITTEN = read_tables()
ABOUT = WRITTEN["tables"]["all"]  # {title, reference, ..: {table: text}}


class Block(NamedTuple):
    """A table as it is printed, for one pair, one setting and one budget."""
    title: str
    seeds: list  # its rows {name: last run}, once for each seed
    source: list  # the source's own val split in a small world or before corruption, or nothing
    unseen: list  # domains that nobody trained on
    paper: dict  # what the paper reports, {row: [numbers as text]}
    budget: str  # "": none
    folder: Path  # of pictures


def blocks(cfg):
    """The blocks of --table, one for each budget, in a list for each pair and setting."""
    small = cfg.data in SMALL
    numbers = {pair: settings for pair, settings in WRITTEN[cfg.table].items() if " -> " in pair}
    stands = {}  # {row of a small world: the budgets at which it stands, or "": all}
    seeds = [0]
    if small:
        stands = WRITTEN[cfg.table].get(cfg.data, {"": {}})[""]
        rows = stands or next(chain(*[settings.values() for settings in numbers.values()]))
        beside = next(iter(numbers.get(LIKENED, {}).values()), {})
        paper = {row: beside.get(row, "") for row in rows if row != FOUNDATION}
        numbers = {cfg.data: {"toy-boxes" if cfg.table == "10" else cfg.data: paper}}
        seeds = range(cfg.seed, cfg.seed + (cfg.seeds or int(ABOUT["seeds"][cfg.table])))
    groups = []
    for pair, settings in numbers.items():
        for setting, paper in settings.items():
            if cfg.setting not in ("none", setting):
                continue
            source, unseen = SETTINGS[setting]
            own = [source] if small or setting == "voc" else []
            title = ABOUT["title"][cfg.table]
            title += f", in the {pair} world" if small else f": {pair}, trained on {setting}"
            pairs = [placed(pair, setting, seed, cfg) for seed in seeds]
            paper = {row: text.split() for row, text in paper.items()}
            groups.append([])
            for budget in ABOUT["budgets"][cfg.table].split() or [""]:
                rows = [row for row in paper if not stands.get(row) or budget in stands[row].split()]
                runs = []
                for p in pairs:
                    runs.append({row: last_run(p, row, budget) for row in rows})
                if rows:
                    groups[-1].append(Block(title, runs, own, list(unseen), paper, budget, Path(pairs[0].here)))
    if not groups:
        offered = " ".join(dict.fromkeys(chain(*numbers.values())))
        raise UserError(f"--table {cfg.table} --setting {cfg.setting}: this table has {offered}")
    return groups


# --- Tables: what is missing is run, what is there is printed --------------------------------------------------------

def tables(cfg, device):
    """Run what is missing of --table and print it; --demo and budgets also draw a picture."""
    worlds = ABOUT["worlds"][cfg.table].split()
    if cfg.data not in worlds:
        raise UserError(f"--table {cfg.table} --data {cfg.data}: this table is made with "
                        f"--data {' or '.join(worlds)}")
    for group in blocks(cfg):
        run_missing(group, cfg)
        lines = defaultdict(list)  # {row: [(number of the budget, mean, standard deviation)]}
        for x, block in enumerate(group):
            results = {}
            unseen = {}  # {row that all seeds have finished: [unseen mean of each]}
            for name in block.seeds[0]:
                found = [measured(rows[name], block, cfg, device) for rows in block.seeds]
                results[name] = [result for result in found if result]
                if all(found):
                    unseen[name] = [result["unseen mean"] for result in found]
                    deviation = np.std(unseen[name], ddof=1) if len(found) > 1 else 0
                    lines[name].append((x, np.mean(unseen[name]), deviation))
            show_block(block, results, cfg)
            if len(block.seeds) > 1:
                show_gains(unseen, cfg)
        if len(group) > 1 and lines:
            chart(lines, block.folder / f"{cfg.table}.png", ABOUT["axis"][cfg.table],
                  "mIoU, mean of the unseen domains", x_texts=[block.budget for block in group])
        if cfg.demo and cfg.table == "main" and len(unseen) == len(results):
            demo_picture(block, cfg, block.folder / "demo.png", device)


def run_missing(group, cfg):
    """Run what is missing; at the paper's scale print it, and run what this machine can."""
    chains = []
    for block in group:
        for rows in block.seeds:
            chains += [[*last.before, last] for last in rows.values()]
    lacks = {}  # {missing run: what this machine lacks for it}
    for run in dict.fromkeys(chain(*chains)):
        if run.result.exists():
            distill.check_folder(run.cfg)  # UserError if it holds a run with other constants
            continue
        lacks[run] = []
        if cfg.data == "paper":
            lacks[run] = absent(run.cfg.data, run.cfg.root)
            lacks[run] += [] if torch.cuda.is_available() else ["a GPU"]
        if cfg.data == "paper" or not cfg.run:
            print(f"{run.text}  # needs {' and '.join(lacks[run])}" if lacks[run] else run.text)
    possible = {}  # as keys: each run once, in order
    for runs in chains:
        if not any(map(lacks.get, runs)):
            possible |= dict.fromkeys(run for run in runs if run in lacks)
    if cfg.run:
        work_through(possible, cfg.jobs)


def absent(names, root):
    """Folders below root of the data sets that are not there."""
    entries = data.entries(names, labelled=False).values()
    folders = [Path(root, entry.folder) for entry in entries if not entry.generate]
    return [str(folder) for folder in folders if not folder.is_dir()]


def work_through(runs, jobs):
    """Make runs, `jobs` at a time, each after those before it; all end with a failed one."""
    followers = Counter(chain(*[run.before for run in runs]))
    waiting = sorted(runs, key=followers.__getitem__, reverse=True)  # long chains first: no core idles
    working = {}  # {run: its process}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends this as Ctrl-C does
    bar = tqdm(total=len(waiting), desc="runs", unit="run", dynamic_ncols=True)
    try:
        while waiting or working:
            unfinished = {*waiting, *working}
            ready = [run for run in waiting if unfinished.isdisjoint(run.before)]
            for run in ready[:jobs - len(working)]:
                waiting.remove(run)
                working[run] = begin(run, jobs)
            time.sleep(0.1)
            for run in [run for run, process in working.items() if process.poll() is not None]:
                if working.pop(run).returncode:
                    *_, reason = Path(f"{run.cfg.out}.txt").read_text(errors="replace").strip().split("\n")
                    raise UserError(f"{run.text} has failed: {reason} (see {run.cfg.out}.txt)")
                bar.write(run.text, file=sys.stdout)
                bar.update()
    finally:
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()
        bar.close()


def begin(run, jobs):
    """Start a run in its own process, on its share of the cores; it prints to <out>.txt."""
    launcher, *words = shlex.split(run.text)
    words = [str(Path(__file__).with_name(word)) if word in SCRIPTS else word for word in words]
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", *words]
    threads = max(1, (os.cpu_count() or 1) // jobs // run.processes)
    run.result.parent.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.cfg.out}.txt", "w") as file:
        return subprocess.Popen([sys.executable, *words], stdout=file, stderr=file,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def measured(run, block, cfg, device):
    """What is known of a row's last run, or None: {domain or "unseen mean": mIoU in percent, ..}.

    "seconds" and "TFLOP" are of all the student's training, "diagonal" is of its attention.
    """
    path = run.result
    if not path.exists():
        return None
    kept = path.with_name("eval.json")  # {protocol: {domain: mIoU}}
    fresh = kept.exists() and kept.stat().st_mtime_ns >= path.stat().st_mtime_ns
    book = json.loads(kept.read_text()) if fresh else {}
    mious = book.setdefault(f"window {cfg.window}, stride {cfg.stride:.6g}, {cfg.precision}", {})
    missing = "+".join(name for name in block.source + block.unseen if name not in mious)
    if missing:
        if absent(missing, cfg.root):
            return None
        model, saved = segment.load_segmenter(path, device)
        for name, values in measure(path, model, saved, replace(cfg, data=missing), device).items():
            mious[name] = values.nanmean().item()
        distill.save(kept, json.dumps(book))
    result = {name: mious[name] for name in block.source + block.unseen}
    result["unseen mean"] = sum(mious[name] for name in block.unseen) / len(block.unseen)
    ledger = qsd.open_checkpoint(path)["ledger"]
    result["seconds"] = sum(stage["seconds"] for stage in ledger)
    result["TFLOP"] = sum(stage["flops"] for stage in ledger) / 1e12
    for stage in run.before:
        log = stage.result.with_name("log.jsonl")
        last = json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}
        if "diagonal" in last:
            result["diagonal"] = last["diagonal"]
    return result


def show_block(block, results, cfg):
    """Print a block as a table and as JSON, from {row: what was measured of each seed}."""
    small = cfg.data in SMALL
    mious = [*block.source, *block.unseen, "unseen mean"]
    digits = dict.fromkeys(mious, 1)
    if small:
        digits |= dict(seconds=0, TFLOP=1)
    if cfg.table == "steps":
        digits["diagonal"] = 3
    cells = {}
    for name, found in results.items():
        texts = {}
        for column, n in digits.items():
            values = [result[column] for result in found if column in result]
            texts[column] = f"{np.mean(values):.{n}f}" if values else "-"
            if column in mious and len(values) > 1:
                texts[column] += f" ± {np.std(values, ddof=1):.{n}f}"
        paper = block.paper[name]  # of all unseen domains and their mean, or the mean alone
        if not small:
            for column, number in zip(reversed(mious), reversed(paper)):
                texts[column] += f" [{number}]"
        elif any(block.paper.values()):
            texts["paper"] = paper[-1] if paper else "-"  # its mean
        cells[name] = texts.values()
    budget = f"; {ABOUT['axis'][cfg.table]}: {block.budget}" if block.budget else ""
    several = ", mean and standard deviation of seeds" if len(block.seeds) > 1 else ""
    print(f"\n{block.title}{budget}{several}{'' if small else ' [paper]'}")
    show(cells, texts)
    print(json.dumps(dict(table=cfg.table, title=block.title, budget=block.budget, rows=results)))


# 97.5 % points of Student's distribution with 1 to 9 degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def show_gains(unseen, cfg):
    """Print what a table compares beside the paper's gains; unseen: {row: [mean of each seed]}."""
    reference = ABOUT["reference"][cfg.table]
    compared = [(f"{row} over {reference}", reference, row) for row in unseen if row != reference]
    gains = WRITTEN[cfg.table].get("gains", {"from": {}})
    compared += [(name, before, gains["to"][name]) for name, before in gains["from"].items()]
    cells = {}
    record = {}
    for name, before, after in compared:
        if before in unseen and after in unseen:
            differences = np.subtract(unseen[after], unseen[before])  # (seeds,)
            n = len(differences)
            mean = np.mean(differences)
            t = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]
            half = t * np.std(differences, ddof=1) / math.sqrt(n)
            paper = paper_gain(cfg.table, before, after)
            cells[name] = [f"{mean:+.1f} ± {half:.1f}", "-" if paper is None else f"{paper:+.1f}"]
            record[name] = dict(mean=round(mean, 2), half=round(half, 2), paper=paper)
    if cells:
        print("\nGain on unseen domains, mean of the paired differences and 95 % interval")
        show(cells, ["gain", "paper"])
        print(json.dumps({"gains": record}))


def paper_gain(table, before, after):
    """The paper's gain between two rows, of this table or else another, or None."""
    for name in (table, *TABLES):
        for numbers in WRITTEN[name].get(LIKENED, {}).values():
            means = [float(numbers[row].split()[-1]) for row in (before, after) if numbers.get(row)]
            if len(means) == 2:
                return round(means[1] - means[0], 1)


def demo_picture(block, cfg, path, device):
    """Draw images of the unseen domains: predictions, and features of teacher and students."""
    folders = {name: block.seeds[0][name].result.parent for name in ("no KD", "two-stage MSE", "GKD", "teacher")}
    cfg = replace(cfg, data="+".join(block.unseen), examples=8 // len(block.unseen))
    compare(folders, {"teacher": folders["teacher"]} | folders, cfg, path, device)


# --- Drawing ---------------------------------------------------------------------------------------------------------

LINE_COLORS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #5a5a5a #bcbd22 #e377c2 black".split()


def chart(lines, path, x_title, y_title, x_texts=None):
    """Draw lines {name: [(x, y, half a whisker)]}; x_texts stand at 0, 1, .."""
    xs, ys, halves = np.array(list(chain(*lines.values()))).T
    x_texts = dict(enumerate(x_texts)) if x_texts else {x: f"{x:g}" for x in ticks(xs)}
    y_texts = {y: f"{y:g}" for y in ticks([*(ys - halves), *(ys + halves)])}
    # Drawn at twice the size and then halved, lines are smooth.
    canvas = Image.new("RGB", (1600, 840), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(26)
    top = 60
    bottom = 740
    left = 40 + max(map(font.getlength, y_texts.values()))
    right = 1510 - max(map(font.getlength, lines))

    def across(x):
        return np.interp(x, [min(x_texts), max(x_texts)], [left + 20, right - 20])

    def down(y):
        return np.interp(y, [min(y_texts), max(y_texts)], [bottom - 20, top + 20])

    for x, text in x_texts.items():
        pen.line((across(x), top, across(x), bottom), "#e1e1e1", 2)
        pen.text((across(x), bottom + 10), text, "black", font, anchor="ma")
    for y, text in y_texts.items():
        pen.line((left, down(y), right, down(y)), "#e1e1e1", 2)
        pen.text((left - 10, down(y)), text, "black", font, anchor="rm")
    pen.rectangle((left, top, right, bottom), outline="#5a5a5a", width=2)
    pen.text(((left + right) / 2, 825), x_title, "black", font, anchor="ms")
    pen.text((10, 10), y_title, "black", font)

    for i, (name, points) in enumerate(lines.items()):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        pen.line([(across(x), down(y)) for x, y, _ in points], color, 4, joint="curve")
        for x, y, half in points if len(points) < 10 else []:
            pen.circle((across(x), down(y)), 7, color)
            pen.line((across(x), down(y - half), across(x), down(y + half)), color, 2)
        y = top + 20 + 36 * i
        pen.line((right + 15, y, right + 55, y), color, 6)
        pen.text((right + 65, y), name, "black", font, anchor="lm")
    save_picture(canvas.resize((800, 420), Image.Resampling.LANCZOS), path)


def ticks(values):
    """Round numbers that cover all values, at equal distances."""
    low = min(values)
    high = max(values)
    power = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1))
    for step in power * np.array([0.2, 0.5, 1, 2]):  # from dense to sparse
        numbers = step * np.arange(low // step, high // step + 3)
        first = np.searchsorted(numbers, low, "right") - 1
        last = max(np.searchsorted(numbers, high), first + 1)
        if last - first <= 7:
            break
    return numbers[first:last + 1].tolist()


def with_legend(picture, names, colors, left=10, size=13):
    """The picture, and below it, from `left` on, coloured boxes and their names in columns."""
    font = ImageFont.load_default(size)
    wide = 3 * size + max(map(font.getlength, names))
    width = max(picture.width, math.ceil(left + wide), 24 * size)
    columns = max(1, int((width - left) / wide))
    lines = math.ceil(len(names) / columns)
    below = round(size * (1.6 * lines + 0.4))
    canvas = ImageOps.expand(picture, (0, 0, width - picture.width, below), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (name, color) in enumerate(zip(names, colors)):
        x = left + wide * (i % columns)
        y = picture.height + size * (1 + 1.6 * (i // columns))
        pen.rectangle((x, y - size / 2, x + size, y + size / 2), tuple(color), "gray")
        pen.text((x + 1.5 * size, y), name, "black", font, anchor="lm")
    return canvas


def sheet(columns, titles, path, names=(), colors=(), width=136):
    """Write {column title: [RGB arrays]} as one picture, with titles of rows and a legend."""
    font = ImageFont.load_default(13)
    left = 16 + round(max(map(font.getlength, "\n".join(titles).split("\n"))))
    width = max(width, *[12 + round(font.getlength(name)) for name in columns])
    cells = list(chain(*zip(*columns.values())))  # row by row
    height = max(round(width * cell.shape[0] / cell.shape[1]) for cell in cells)
    pictures = [TF.to_image(fitted(cell, width, height)) for cell in cells]
    grid = make_grid(pictures, len(columns), padding=4, pad_value=255)[:, 4:, 4:]
    canvas = ImageOps.expand(TF.to_pil_image(grid), (left, 28, 0, 0), "white")
    pen = ImageDraw.Draw(canvas)
    for j, name in enumerate(columns):
        pen.text((left + j * (width + 4) + width / 2, 20), name, "black", font, anchor="ms")
    for i, title in enumerate(titles):
        y = 28 + i * (height + 4) + height / 2
        pen.text((left - 8, y), title, "black", font, anchor="rm", align="right")
    save_picture(with_legend(canvas, names, colors, left) if names else canvas, path)


def fitted(cell, width, height):
    """An RGB array scaled into a white frame; small ones keep square pixels."""
    method = Image.Resampling.NEAREST if cell.shape[1] < width else Image.Resampling.BOX
    return ImageOps.pad(Image.fromarray(cell), (width, height), method, "white", centering=(0, 0))


def save_picture(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(f"picture: {path}")


# --- Figures of the paper --------------------------------------------------------------------------------------------

def file_in(path):
    """The checkpoint in a run's folder; any other path, or an encoder's name, as it is."""
    files = [Path(path, name) for name in ("student.pt", "segmenter.pt")]
    return next((file for file in files if file.is_file()), path)


def segmenters(models, device):
    """{name: (segmenter, its checkpoint)} of models {name: path}."""
    return {name: segment.load_segmenter(file_in(path), device) for name, path in models.items()}


def encoders(models, cfg, device):
    """{name: frozen encoder} of models {name: path}, with patches of one size."""
    vits = {}
    for name, path in models.items():
        vit = qsd.load_vit(file_in(path), patch_size=cfg.patch or None)
        vits[name] = vit.to(device).eval().requires_grad_(False)
    if len({vit.patch_size for vit in vits.values()}) > 1:
        raise UserError("--models have patches of different sides: say --patch")
    return vits


def spread(dataset, count):
    """At most `count` items of a dataset, evenly spread."""
    return Subset(dataset, range(0, len(dataset), math.ceil(len(dataset) / count)))


@torch.no_grad()
def patch_tokens(vit, image, device):
    """Final patch tokens (h, w, C) of an image (3, H, W) scaled to whole patches."""
    h, w = [max(1, round(side / vit.patch_size)) for side in image.shape[1:]]
    x = data.normalize(image[None].to(device), vit.mean, vit.std)
    x = segment.resize(x, (h * vit.patch_size, w * vit.patch_size))
    _, patches = vit(x)
    return patches[0].float().cpu().unflatten(0, (h, w))


def feature_pictures(tokens):
    """Principal components of tokens {name: [(h, w, C)]} of images as RGB {name: [(h, w, 3)]}."""
    # They have no natural order or sign: each model's are rotated onto the first one's (Procrustes).
    pictures = {}
    first = None
    for name, grids in tokens.items():
        x = torch.cat([grid.flatten(0, 1) for grid in grids])  # (M, C)
        x = x - x.mean(0)
        _, _, Vh = torch.linalg.svd(x, full_matrices=False)
        x = x @ Vh[:3].T  # (M, 3)
        x = x / x.std(0)
        first = x if first is None else first
        U, _, Vh = torch.linalg.svd(x.T @ first)
        colors = (x @ U @ Vh / 5 + 0.5).clamp(0, 1).mul(255).byte()  # 2.5 deviations
        parts = colors.split([grid[..., 0].numel() for grid in grids])
        pictures[name] = [part.view(*grid.shape[:2], 3).numpy() for part, grid in zip(parts, grids)]
    return pictures


def compare(predicted, featured, cfg, path, device):
    """Draw images of each domain, predictions of models {name: path}, features of models."""
    loaded = segmenters(predicted, device)
    images = []
    titles = []
    columns = defaultdict(list)
    for domain in data.entries(cfg.data):
        if not loaded:
            dataset = val_split(domain, cfg)
        for name, (_, saved) in loaded.items():
            dataset = val_split(domain, cfg, name, saved)
        draw = partial(data.label_picture, classes=dataset.classes, colors=dataset.colors)
        for image, label, *_ in spread(dataset, cfg.examples):
            images.append(image)
            titles.append(domain.removeprefix("toy-").removeprefix("camvid-"))
            columns["image"].append(image.permute(1, 2, 0).numpy())
            if loaded:
                columns["label"].append(draw(label, image))
            for name, (model, saved) in loaded.items():
                found = classify(model, saved, image, cfg, device)
                columns[name].append(draw(found, image, scored=True))
    tokens = {}
    for name, vit in encoders(featured, cfg, device).items():
        tokens[f"PCA: {name}"] = [patch_tokens(vit, image, device) for image in images]
    columns |= feature_pictures(tokens)
    legend = (dataset.classes, dataset.colors) if loaded else ()
    sheet(columns, titles, path, *legend)


def figure_3b(models, cfg, path, device):
    """The losses of several runs against their steps, of one-stage runs what is distilled."""
    lines = defaultdict(list)
    for name, folder in models.items():
        log = Path(folder, "log.jsonl")
        for record in map(json.loads, log.read_text().splitlines() if log.is_file() else []):
            loss = record.get("kd", record.get("loss"))
            if loss is not None:  # as in the header, or where it was NaN, which JSON lacks
                lines[name].append((record["step"], loss, 0))
        if name not in lines:
            raise UserError(f"{folder}: holds no log.jsonl with losses, as folders of runs do")
    chart(lines, path, "step", "loss")


def figure_7a(models, cfg, path, device):
    """How far students' tokens are from those of the first model, the teacher."""
    # An affine map, the best on every second image, takes random patches to the teacher's; others are measured.
    images = ConcatDataset([spread(val_split(name, cfg), cfg.subset) for name in data.entries(cfg.data)])
    each = math.ceil(2 * cfg.tokens / len(images))
    tokens = {}  # of each encoder: (L, C) of every second image, (M, C) of the others
    for name, vit in encoders(models, cfg, device).items():
        found = []
        for i, (image, *_) in enumerate(tqdm(images, name, leave=False)):
            x = patch_tokens(vit, image, device).flatten(0, 1).double()
            generator = torch.Generator().manual_seed(data.mix(cfg.seed, i // 2))  # alike for all
            found.append(x[torch.randperm(len(x), generator=generator)[:each]])
        tokens[name] = [torch.cat(found[part::2])[:cfg.tokens] for part in (0, 1)]
    teacher, *students = models
    apart = {name: distances(*tokens[name], *tokens[teacher]) for name in students}

    farthest = torch.cat(list(apart.values())).quantile(0.99).item()
    edges = torch.linspace(0, farthest, 61, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    lines = {}
    for name, d in apart.items():
        shares = 100 * torch.histogram(d, edges).hist / len(d)
        points = zip(middles.tolist(), shares.tolist())
        lines[f"{name}: median {d.median():.2f}"] = [(x, y, 0) for x, y in points]
    x_title = f"Euclidean distance to {teacher} ({len(tokens[teacher][1])} tokens of {cfg.data})"
    chart(lines, path, x_title, "% of the tokens")


def distances(fit_s, v_s, fit_t, v_t):
    """Distances (M,) of v_s (M, C_s) to v_t (M, C_t) after the best map of fit_s to fit_t."""
    fit_s, v_s = [F.pad(x, (0, 1), value=1) for x in (fit_s, v_s)]  # for the constant of the map
    # Tokens after a LayerNorm lie in a plane, so that the constant depends on them: gelsd copes with that.
    phi = torch.linalg.lstsq(fit_s, fit_t, driver="gelsd").solution  # (C_s + 1, C_t)
    return (v_s @ phi - v_t).norm(dim=1)


def figure_7b(models, cfg, path, device):
    """How QSD students attend to the teacher, the first model, as a whole and in four patches."""
    (_, teacher), *students = encoders(models, cfg, device).items()
    image = val_split(next(iter(data.entries(cfg.data))), cfg)[0][0]
    v_t = patch_tokens(teacher, image, device)  # (h, w, C_t)
    h, w = v_t.shape[:2]
    places = {"upper left": (h // 4, w // 4), "upper right": (h // 4, 3 * w // 4),
              "lower left": (3 * h // 4, w // 4), "lower right": (3 * h // 4, 3 * w // 4)}
    columns = defaultdict(list)
    titles = []
    for name, student in students:
        v_s = patch_tokens(student, image, device).flatten(0, 1)  # (N, C_s)
        W = attention(file_in(models[name]), student, teacher, v_s, v_t.flatten(0, 1))  # (N, N)
        columns["image"].append(image.permute(1, 2, 0).numpy())
        columns["all N x N weights"].append(framed(W))
        columns["the diagonal"].append(framed(W.diagonal().view(h, w)))
        for title, (row, column) in places.items():
            weights = W[row * w + column].view(h, w)
            columns[title].append(framed(weights, row, column))
        diagonal = f"{W.diagonal().mean():.1%}"
        uniform = f"{1 / len(W):.1%}"
        titles.append(f"{name}\non the diagonal:\n{diagonal}\n(uniform: {uniform})")
        print(f"{name}: {diagonal} of the weight is a patch's own (uniform: {uniform})")
    sheet(columns, titles, path, width=200)


def attention(path, student, teacher, v_s, v_t):
    """Weights (N, N) of tokens v_s (N, C_s) on v_t (N, C_t), by student.pt's head of L_feat."""
    saved = qsd.open_checkpoint(path)
    stored = saved.get("config", {})
    known = {name: value for name, value in stored.items() if hasattr(qsd.LossConfig, name)}
    config = qsd.LossConfig(**known | dict(loss="qsd", alpha=1))
    objective = qsd.build_objective(student, teacher, config)
    what = f"{path}: was not distilled by --loss qsd and --alpha from the first of --models"
    qsd.load_strictly(objective, saved.get("objective") or {}, what)
    if config.target_norm == "layernorm":
        v_t = F.layer_norm(v_t, v_t.shape[-1:])
    with torch.no_grad():
        return objective.feat.weights(v_s[None], v_t[None])[0]


def framed(weights, *place):
    """Weights (h, w) in shades of grey; place: row and column of a framed patch."""
    h, w = weights.shape
    shades = (255 * (1 - weights / weights.max())).byte()
    picture = fitted(shades[..., None].expand(-1, -1, 3).numpy(), 400, round(400 * h / w))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline="gray", width=2)
    if place:
        side = 400 / w
        y, x = np.multiply(place, side)
        pen.rectangle((x, y, x + side, y + side), outline="#005aff", width=4)
    return np.asarray(picture)


def figure_9(models, cfg, path, device):
    """Print IoU or AP of each class: a table for each domain, a column for each model."""
    loaded = segmenters(models, device)
    for domain in data.entries(cfg.data):
        ious = {}  # of each model: that of each class and the mean, in percent, or None
        for name, (model, saved) in loaded.items():
            values = measure(name, model, saved, replace(cfg, data=domain), device)[domain]
            values = [*values.tolist(), values.nanmean().item()]
            ious[name] = [None if math.isnan(value) else round(value, 2) for value in values]
        heading = f"IoU on {domain}, %; -: neither labelled nor predicted"
        if saved["config"]["decoder"] == "boxes":
            heading = f"AP on {domain}, %; -: no object of this class"
        rows = {}
        for title, *values in zip([*saved["classes"], "mean"], *ious.values(), strict=True):
            rows[title] = ["-" if value is None else f"{value:.1f}" for value in values]
        print(f"\n{heading}")
        show(rows, models)
        print(json.dumps({"figure": "9", "data": domain, "rows": list(rows), "iou": ious}))


FIGURES = {
    "3b": figure_3b,
    "5": lambda models, *rest: compare({}, models, *rest),  # features on the axes of the first
    "7a": figure_7a,
    "7b": figure_7b,
    "8": lambda models, *rest: compare(models, {}, *rest),  # predictions beside image and label
    "9": figure_9,
}


def figure(cfg, device):
    """Draw --figure of --models, {name: path}; a path without a name is its own."""
    models = {}
    for part in filter(None, cfg.models.split(",")):
        name, _, path = part.partition("=")
        models[name.strip()] = path.strip() or name.strip()
    if len(models) < (2 if cfg.figure.startswith("7") else 1):
        raise UserError("--models: say which, as in teacher=dinov2_vitb14,GKD=runs/source; figures 7a "
                        "and 7b want the teacher and at least one student")
    path = Path(cfg.out)
    if path.suffix.lower() not in data.SUFFIXES:
        path = path / f"figure-{cfg.figure}.png"
    FIGURES[cfg.figure](models, cfg, path, device)


# --- A segmenter at work ---------------------------------------------------------------------------------------------

@torch.no_grad()
def classify(model, saved, image, cfg, device):
    """The classes (H, W) uint8 of an image (3, H, W), or its objects (D, 6) that score 0.5."""
    window = cfg.window or saved["config"]["size"]
    x = data.normalize(image[None].to(device), model.encoder.mean, model.encoder.std)
    with distill.autocast(cfg.precision, device):
        if saved["config"]["decoder"] == "boxes":
            found = find_objects(model, x, window)[0].cpu()
            return found[found[:, 5] >= 0.5]
        return slide(model, x, window, cfg.stride)[0].argmax(0).byte().cpu()


def segment_images(cfg, device):
    """Segment --images into --out: numbers in NAME_classes.png, colours in NAME_overlay.png."""
    given = Path(cfg.images)
    out = Path(cfg.out)
    files = sorted(given.iterdir()) if given.is_dir() else [given]
    files = [file for file in files if file.suffix.lower() in data.SUFFIXES]
    if not files:
        raise UserError(f"--images {given}: no images directly in it ({' '.join(data.SUFFIXES)})")
    names = {file.stem for file in files}
    if len(names) < len(files) or out.resolve() == files[0].parent.resolve():
        raise UserError(f"--images {given}: results have the images' names, so that these must differ in more "
                        f"than their ending, and lie elsewhere than --out {out}")
    model, saved = segment.load_segmenter(cfg.checkpoint, device)
    legend = (saved["classes"], saved["colors"])
    out.mkdir(parents=True, exist_ok=True)
    share = files[distill.rank()::distill.world_size()]
    for file in tqdm(share, "images", disable=distill.rank() > 0, leave=False):
        image = data.read_image(file, own=True)  # (3, H, W)
        found = classify(model, saved, image, cfg, device)
        if saved["config"]["decoder"] == "boxes":
            picture = data.label_picture(found, image, *legend, width=800, scored=True)
            Image.fromarray(picture).save(out / f"{file.stem}_boxes.png")
            (out / f"{file.stem}_boxes.json").write_text(json.dumps(found.tolist()))
            continue
        picture = Image.fromarray(found.numpy())
        picture.putpalette(data.palette(saved["colors"]).tobytes())
        picture.save(out / f"{file.stem}_classes.png")
        blend = Image.blend(TF.to_pil_image(image), picture.convert("RGB"), 0.5)
        overlay = with_legend(blend, *legend, size=max(13, blend.width // 80))
        overlay.save(out / f"{file.stem}_overlay.png")
    qsd.say(f"{out}: {len(files)} images")


class Scores(torch.nn.Module):
    """What is exported: normalised images (B, 3, H, W) -> class scores (B, K, H, W)."""
    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, x):
        return self.segmenter.decoder.scores(self.segmenter(x), x.shape[2:])


def export(checkpoint, path):
    """Write a segmenter as a torch.export program for images of its training crop."""
    model, saved = segment.load_segmenter(checkpoint)
    if path.suffix != ".pt2" or saved["config"]["decoder"] == "boxes":
        raise UserError(f"--export {path}: writes scores of pixels, no boxes, into a .pt2 file")
    eager = Scores(model)
    size = saved["config"]["size"]
    x = torch.randn(2, 3, size, size)
    any_number = {0: torch.export.Dim("batch")}
    program = torch.export.export(eager, (torch.zeros_like(x),), dynamic_shapes=(any_number,))
    torch.testing.assert_close(program.module()(x), eager(x), atol=1e-4, rtol=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = dict(classes=saved["classes"], colors=saved["colors"], size=size,
                 mean=model.encoder.mean, std=model.encoder.std)
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    print(f"{path}: images (B, 3, {size}, {size}) to {len(saved['classes'])} scores a pixel")


def report(cfg, device):
    """Print the mIoU of --checkpoint on the domains of cfg.data, and their mean."""
    model, saved = segment.load_segmenter(cfg.checkpoint, device)
    ious = measure(cfg.checkpoint, model, saved, cfg, device)
    mious = {name: values.nanmean().item() for name, values in ious.items()}
    mious["mean"] = sum(mious.values()) / len(mious)
    if distill.rank() == 0:
        show({cfg.checkpoint: [f"{value:.1f}" for value in mious.values()]}, mious)
        print(json.dumps({"checkpoint": cfg.checkpoint, "miou": mious}))


def main(argv=None):
    cfg = distill.configure(Config, preset, argv)
    device = distill.launch()
    if distill.world_size() > 1 and (cfg.export or not cfg.checkpoint):
        raise UserError("torchrun is for many images of one --checkpoint; all else wants python")
    if Path(cfg.out).is_file() and cfg.figure == "none":
        raise UserError(f"--out {cfg.out} is a file, not a folder; choose another --out")
    if cfg.table != "none":
        tables(cfg, device)
        return
    if cfg.setting != "none":
        cfg = replace(cfg, data="+".join(SETTINGS[cfg.setting][1]))
    if cfg.checkpoint and cfg.images:
        segment_images(cfg, device)
    elif cfg.checkpoint and cfg.export:
        export(cfg.checkpoint, Path(cfg.export))
    elif cfg.figure == "3b" or (cfg.figure != "none" and cfg.data != "paper"):
        figure(cfg, device)
    elif cfg.checkpoint and cfg.data != "paper":
        report(cfg, device)
    else:
        raise UserError("give --checkpoint or --figure with --data or --setting, or else --demo or --table")


if __name__ == "__main__":
    distill.cli(main)
