"""mIoU on domains nobody trained on, the paper's tables and figures, and what a trained segmenter is used for.

    python eval.py --demo                                  # the whole method in the built-in toy world
    python eval.py --table 5 --data toy                    # a table of the paper there; without --data at its own scale
    python eval.py --checkpoint runs/gtav/segmenter.pt --data cityscapes+bdd100k+mapillary --root /data
    torchrun --standalone --nproc_per_node=8 eval.py ...   # the same numbers, sooner
    python eval.py --checkpoint runs/gtav/segmenter.pt --images photos --out segmented    # or --export model.pt2
    python eval.py --figure 5 --models teacher=dinov2_vitb14,GKD=runs/source --patch 16 --data cityscapes --root /data
    python eval.py --probe --models dinov2_vits14,deit_small --data gtav+cityscapes --root /data

Results are printed as Markdown for people and as one line of JSON for programs.
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
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
import distill
import qsd
import segment
from qsd import UserError


@dataclass
class Config:
    """Every constant of the evaluation."""
    # what is measured
    checkpoint: str = ""            # segmenter.pt
    data: str = "paper"             # domains, joined with +; for --demo and --table: toy, camvid or paper (its scale)
    setting: str = "none"           # a key of data.SETTINGS: its unseen domains instead of --data; a part of a --table
    root: str = "data"              # the folder that holds the data sets
    # protocol
    mode: Literal["slide", "whole"] = "slide"  # official: sliding window
    window: int = 0                 # side of the sliding window, pixels; 0: the training crop (official 512)
    stride: float = 2 / 3           # of the window, rounded (official 341 of 512)
    flip: bool = False              # average with the mirrored image (official: no)
    scales: str = "1"               # multiples of the image's size to average over, as in 0.75,1,1.25 (official: 1)
    batch: int = 1                  # images at once; more than 1 needs images of one size
    workers: int = 2                # image-loading processes
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    # figures of several models, and a quick look at encoders
    figure: Literal["none", "3b", "5", "7a", "7b", "8", "9"] = "none"  # a figure of the paper; 9 is printed as a table
    probe: bool = False             # mIoU of a linear classifier on the tokens of each of --models
    models: str = ""                # name=path,name=path; a path is a run's folder, a checkpoint or an encoder's name
    classes: int = 0                # how many your own folder has, for --probe; segmenters know theirs
    official: bool = True           # a named encoder's file must have its SHA-256; no: whatever lies there is taken
    patch: int = 0                  # patch side of the encoders in 5, 7a, 7b and --probe, pixels; 0: as trained
    examples: int = 2               # images of each domain in figures 5 and 8
    subset: int = 300               # images of each domain that figure 7a measures, and that --probe learns from
    tokens: int = 10000             # distances in figure 7a (the paper's number)
    # a segmenter at work
    images: str = ""                # segment this image or folder of images with --checkpoint; the results go to --out
    export: str = ""                # write --checkpoint as a torch.export program (.pt2) or for mmsegmentation (.pth)
    dynamic: bool = False           # the program takes any number of images, not just one
    # the paper's tables
    table: str = "none"             # main, effects, steps, variants, clock, flops, 1 to 10, fig6: run what is missing
    demo: bool = False              # --table main --data toy with one seed, and a picture
    seed: int = 0                   # the first seed of the small worlds' runs
    seeds: int = 0                  # how many seeds; 0: 3, 5 for --table effects, 1 for --demo
    jobs: int = 2                   # runs at the same time, each on its share of the cores
    processes: int = 0              # of each distillation; 0: one per GPU
    run: bool = True                # no: only print what is missing and what is there
    out: str = "runs"               # folder of the tables' runs and of pictures; for --figure also a file


def preset(given):
    """What --demo and --data change in the defaults; given: the flags as a dict."""
    values = {}
    if given.get("demo"):
        values = dict(data="toy", table="main", seeds=1)
    name = (values | given).get("data", Config.data).split("+")[0]
    if name.startswith("toy"):
        values |= dict(batch=50, workers=0)
    elif name == "camvid":
        values |= dict(batch=8, workers=1)
    elif name == "paper":
        values |= dict(jobs=1)
    return values


# --- Files ----------------------------------------------------------------------------------------------------------

def check_place(flag, path):
    """UserError if nothing could be written to a path, found before the work and without writing."""
    place = Path(path)
    try:
        while not is_there(place):
            place = place.parent
        mode = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
        good = os.access(place, mode) and (place.is_dir() or place.is_file() and place == Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {str(path)[:80]}: is no path ({error})") from None
    if not good:
        raise UserError(f"{flag} {path}: {place} is not a folder that can be written to")


def is_there(path):
    """Whether there is a file, a folder or a link, be it to nothing; OSError where there could be none."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def whole(path, mark="part"):
    """Where to write what becomes the file `path` once it is complete: no kill and no full disk leaves half of it."""
    unfinished = path.with_name(f"{mark}.{path.name}")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:    # RuntimeError: what torch makes of a full disk
        raise UserError(f"{path} could not be written ({error}); what was there before is kept. "
                        "Free some space and run the same command again") from None
    finally:
        unfinished.unlink(missing_ok=True)


def read_lines(log):
    """The lines of a run's log.jsonl that hold a dict, as (text, dict); a kill or a full disk cut off the others."""
    for text in log.read_text(errors="replace").splitlines():
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield text, record


def known_fields(Config, stored):
    """A stored Config {name: value} as Config takes it: what it lacks today is left out, EARLIER is filled in."""
    return {name: value for name, value in stored.items() if hasattr(Config, name)}


# --- mIoU ------------------------------------------------------------------------------------------------------------

def confusion(pred, label, num_classes):
    """Count pixels by (label, prediction): two integer maps of one shape -> (K, K) int64; label 255 is left out."""
    valid = label != data.IGNORE
    cell = label[valid] * num_classes + pred[valid]
    return torch.bincount(cell, minlength=num_classes ** 2).view(num_classes, num_classes)


def iou(conf):
    """IoU of each class in [0, 1]: NaN where it is neither labelled nor predicted, 0 where it is only predicted."""
    conf = conf.double()
    intersection = conf.diag()
    return intersection / (conf.sum(0) + conf.sum(1) - intersection)


@torch.no_grad()
def predict(model, x, window, stride=2 / 3, whole=False, flip=False, scales=(1,)):
    """Class scores (B, K, H, W) of normalised images x (B, 3, H, W) of any size.

    window: pixels; stride: a share of it. whole: no window. flip: the sum with the scores of the mirrored images.
    scales: the mean over the images at these multiples of their size, each resized back.
    """
    if tuple(scales) != (1,):
        total = 0
        for scale in scales:
            size = [max(1, round(scale * side)) for side in x.shape[2:]]
            scores = predict(model, segment.resize(x, size), window, stride, whole, flip)
            total = total + segment.resize(scores, x.shape[2:])
        return total / len(scales)
    if flip:
        mirrored = predict(model, x.flip(3), window, stride, whole)
        return predict(model, x, window, stride, whole) + mirrored.flip(3)
    if not whole:
        return slide(model, x, window, stride)
    H, W = x.shape[2:]
    patch = model.encoder.patch_size
    x = F.pad(x, (0, -W % patch, 0, -H % patch))  # to whole patches
    return model.decoder.scores(model(x), x.shape[2:])[:, :, :H, :W]


def slide(model, x, window, stride):
    """Class scores (B, K, H, W) of x (B, 3, H, W), the mean over windows; window and stride as in predict."""
    bands = list(score_bands(model, x, window, stride))
    return torch.cat(bands, 2)[:, :, :x.shape[2]]


def score_bands(model, x, window, stride):
    """What slide returns, in bands (B, K, rows, W) from top to bottom, each as soon as no later window reaches it.

    Only one row of windows is held at a time. A side shorter than the window is padded: the last band may be too long.
    """
    H, W = x.shape[2:]
    x = F.pad(x, (0, max(window - W, 0), 0, max(window - H, 0)))
    step = max(1, round(stride * window))  # pixels
    tops = starts(x.shape[2], window, step)
    lefts = starts(x.shape[3], window, step)
    total = None  # (B, K, window, W): the scores of this row of windows, added up
    count = None  # (window, W): how many windows see a pixel
    for top, next_top in zip(tops, [*tops[1:], x.shape[2]]):
        for left in lefts:
            outputs = model(x[:, :, top:top + window, left:left + window])
            scores = model.decoder.scores(outputs, (window, window))
            if total is None:
                total = scores.new_zeros(*scores.shape[:3], x.shape[3])
                count = scores.new_zeros(window, x.shape[3])
            total[..., left:left + window] += scores
            count[:, left:left + window] += 1
        done = next_top - top
        yield (total[:, :, :done] / count[:done])[..., :W]
        total = F.pad(total[:, :, done:], (0, 0, 0, done))
        count = F.pad(count[done:], (0, 0, 0, done))


def starts(length, window, step):
    """First pixels of the windows along one side; the last window ends flush with the border."""
    last = length - window
    return sorted({min(pixel, last) for pixel in range(0, last + step, step)})


def evaluate(model, dataset, window, device, batch=1, workers=0, title="", **protocol):
    """Confusion matrix (K, K) over labelled images, of which each process takes its share; protocol: of predict."""
    K = dataset.num_classes
    conf = torch.zeros(K, K, dtype=torch.int64, device=device)
    own = range(distill.rank(), len(dataset), distill.world_size())
    for x, label in batches(model, Subset(dataset, own), device, batch, workers, title):
        scores = predict(model, x, window, **protocol)
        pred = classes_of(segment.resize(scores, label.shape[1:]))
        conf += confusion(pred, label.to(device), K)
    return distill.summed(conf).cpu()


def batches(model, dataset, device, batch, workers, title):
    """The images of a labelled dataset, normalised for a model, and their labels; a bar shows the progress."""
    loader = DataLoader(dataset, batch, num_workers=workers,
                        collate_fn=same_size)
    for images, label, _ in tqdm(loader, title, disable=distill.rank() > 0, leave=False):
        yield data.normalize(images.to(device), model.encoder.mean, model.encoder.std), label


def same_size(items):
    """A batch of images and labels of one size."""
    if len({(image.shape, label.shape) for image, label, _ in items}) > 1:
        raise UserError(f"--batch {len(items)}: images or labels of several sizes; use --batch 1")
    return default_collate(items)


def classes_of(scores):
    """The class of the highest score (B, H, W), of scores (B, K, H, W); UserError where they say nothing."""
    check_finite(scores)
    return scores.argmax(1)


def check_finite(*scores):
    if not all(part.isfinite().all() for part in scores):
        raise UserError("the segmenter's scores are not finite; use --precision fp32")


# --- AP of boxes -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def find_objects(model, x, side):
    """The objects in each of normalised images x (B, 3, H, W) of any size: [(D, 6)], see BoxDecoder.scores."""
    H, W = x.shape[2:]
    x = TF.resize(x, [side], max_size=2 * side)  # the short edge as in training, but for long strips
    h, w = x.shape[2:]
    whole = 4 * model.encoder.patch_size  # a pixel of the coarsest map
    maps = model(F.pad(x, (0, -w % whole, 0, -h % whole)))
    check_finite(*maps)
    scale = x.new_tensor([W / w, H / h, W / w, H / h, 1, 1])
    return [objects * scale for objects in model.decoder.scores(maps, (h, w))]


def matched(found, objects):
    """VOC's verdict on what was found in an image (D, 6), best first, given its objects (M, 6): rows class, score, hit.

    A box stands for the object of its class that it overlaps most, with an IoU of at least 0.5. It is a hit if it is
    the first for this object; a box that stands for a difficult object does not count at all.
    """
    objects = F.pad(objects, (0, 0, 0, 1))  # a row of zeros, which no box overlaps: there may be no objects
    ious = box_iou(found[:, :4], objects[:, :4]) * (found[:, 4:5] == objects[:, 4])  # (D, M + 1), 0 between classes
    largest, nearest = ious.max(1)
    stands = largest >= 0.5
    repeats = (stands & (nearest[:, None] == nearest)).tril(-1).any(1)  # a better box stands for the same object
    verdicts = torch.column_stack([found[:, 4:], stands & ~repeats])
    return verdicts[~(stands & objects[nearest, 5].bool())]


def average_precision(scores, hits, count):
    """Area under the precision that is reached at each recall or a higher one (VOC since 2010); NaN without objects."""
    hits = hits[np.argsort(-scores, kind="stable")]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    reached = np.maximum.accumulate(precision[::-1])[::-1]
    return (reached * hits).sum() / count if count else math.nan  # each hit adds 1 / count to the recall


def evaluate_boxes(model, dataset, side, device, batch=1, workers=0, title=""):
    """AP (K,) of each class; of a corrupted set the mean over all corruptions and severities, shared by processes."""
    versions = list(dict.fromkeys(sample.corruption for sample in dataset.samples))  # of each image, in this order
    total = torch.zeros(dataset.num_classes, dtype=torch.float64)
    for number in range(distill.rank(), len(versions), distill.world_size()):
        verdicts = []
        labels = []
        own = Subset(dataset, range(number, len(dataset), len(versions)))
        for x, label in batches(model, own, device, batch, workers, f"{title} {versions[number] or ''}"):
            for found, objects in zip(find_objects(model, x, side), map(data.objects_of, label)):
                verdicts.append(matched(found.cpu(), objects))
                labels += objects[objects[:, 5] == 0, 4].tolist()
        kinds, scores, hits = torch.cat(verdicts).double().numpy().T
        for k in range(dataset.num_classes):
            total[k] += average_precision(scores[kinds == k], hits[kinds == k], labels.count(k))
    return distill.summed(total.to(device)).cpu() / len(versions)


# --- What is measured ------------------------------------------------------------------------------------------------

def measure(title, model, saved, cfg, device):
    """{domain: mIoU in percent, or mean AP} of a segmenter on cfg.data; title: what an error calls it."""
    ious = class_ious(title, model, saved, cfg, device)
    return {name: values.nanmean().item() for name, values in ious.items()}


def class_ious(title, model, saved, cfg, device):
    """{domain: IoU in percent of each class (K,), or AP} of a segmenter on cfg.data; NaN as iou says."""
    window = cfg.window or saved["config"]["size"]
    ious = {}
    for name in data.entries(cfg.data):
        dataset = val_split(name, cfg, title, saved)
        if dataset.boxes and (cfg.mode != "slide" or cfg.flip or scale_list(cfg) != [1]):
            raise UserError("--mode, --flip and --scales are for pixels; boxes are found once, in the whole image")
        with distill.autocast(cfg.precision, device):
            if dataset.boxes:
                values = evaluate_boxes(model, dataset, window, device, cfg.batch, cfg.workers, name)
            else:
                values = iou(evaluate(model, dataset, window, device, cfg.batch, cfg.workers, name, **protocol_of(cfg)))
        if values.isnan().all():
            missing = "object in its images counts" if dataset.boxes else "pixel of its images has a label, all are 255"
            raise UserError(f"--data {name}: no {missing}")
        ious[name] = 100 * values
    return ious


def val_split(name, cfg, title="", saved=None):
    """The val split of a data set, which must have a segmenter's classes.

    Your own folder has as many classes as the segmenter or --classes says, and without any no labels.
    """
    if name == "folder":
        num_classes = len(saved["classes"]) if saved else cfg.classes
        if num_classes:
            return data.scenes(name, cfg.root, "val", classes=num_classes)
        return data.images(name, cfg.root, split="val")
    classes = data.DATASETS[name].classes
    if saved:
        others = list(classes) != saved["classes"]
        if saved.get("released"):  # its file tells how many classes there are, not which
            others = len(classes) != len(saved["classes"])
        if others:
            raise UserError(f"--data {name} has the {len(classes)} classes {', '.join(classes)}, but {title} was "
                            f"trained on {len(saved['classes'])} others")
    return data.scenes(name, cfg.root, "val", data.eval_transform(name))


def protocol_of(cfg):
    """The flags of the protocol as arguments of predict."""
    return dict(stride=cfg.stride, whole=cfg.mode == "whole", flip=cfg.flip, scales=scale_list(cfg))


def scale_list(cfg):
    """--scales as numbers."""
    try:
        scales = [float(part) for part in cfg.scales.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 < scale < 100 for scale in scales):
        raise UserError(f"--scales {cfg.scales}: numbers from 0 to 100 were expected, as in 0.75,1,1.25")
    return scales


def show(rows, columns):
    """Print {row name: [text]} as a Markdown table."""
    lines = [["", *columns]]
    for name, cells in rows.items():
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for cells in lines:
        padded = [text.ljust(width) for text, width in zip(cells, widths)]
        print(f"| {' | '.join(padded)} |")


def show_mious(mious):
    """Print {name: {domain: mIoU}} as a table with the mean of each row; returns the rows with it."""
    rows = {}
    cells = {}
    for name, values in mious.items():
        rows[name] = values | {"mean": sum(values.values()) / len(values)}
        cells[name] = [f"{value:.1f}" for value in rows[name].values()]
    show(cells, rows[name])
    return rows


# --- Runs: each is a command that a user can type --------------------------------------------------------------------

SCRIPTS = {"distill.py": (distill, "student.pt"), "segment.py": (segment, "segmenter.pt")}


@dataclass(frozen=True)
class Run:
    """A command of a training script. Two with the same text are equal: rows that begin alike share their runs."""
    text: str                                   # without the `python` before it
    result: Path = field(compare=False)         # student.pt or segmenter.pt in the folder --out
    needs: tuple = field(compare=False)         # the runs whose results it begins with
    processes: int = field(compare=False)

    def __str__(self):
        """What a user types."""
        several = f"torchrun --standalone --nproc_per_node={self.processes}"
        return f"{several if self.processes > 1 else 'python'} {self.text}"

    @cached_property
    def cfg(self):
        """Its script's Config."""
        script, *flags = shlex.split(self.text)
        module, _ = SCRIPTS[script]
        return distill.configure(module.Config, module.preset, flags)

    def chain(self):
        """The runs that lead to this one, and then it."""
        return [*chain(*[run.chain() for run in self.needs]), self]

    def finished(self):
        """Whether its result is there; UserError if its folder holds a run with other constants."""
        if self.result.exists():
            distill.check_folder(self.cfg)
        return self.result.exists()


def run_of(script, processes=1, **flags):
    """A script's Run with these flags; one that is a Run stands for its result, one that is None is left out."""
    words = [script]
    for name, value in flags.items():
        if isinstance(value, Run):
            value = value.result
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if value is not None:
            words += [f"--{name}", str(value)]
    needs = tuple(value for value in flags.values() if isinstance(value, Run))
    return Run(shlex.join(words), Path(flags["out"], SCRIPTS[script][1]), needs, processes)


class Pair(NamedTuple):
    """Who is distilled into whom; and, as `placed` fills it in, on which images and in which folders."""
    teacher: str
    student: str
    student_depth: int | None = None     # only its first blocks
    proxy: str = "imagenet"              # --data of the proxy stage; "": none, the student is a foundation model (F2F)
    proxy_flags: dict = {}               # of distill.py in the proxy stage
    source_flags: dict = {}              # of distill.py on source images
    one_stage_flags: dict = {}           # of segment.py in the one-stage rows
    tuned_flags: dict = {}               # of segment.py where the labels train the encoder after distillation
    source: str = ""                     # --data of the source stage
    labelled: str = ""                   # --data of the task stage: the source, or the same images with boxes
    common: dict = {}                    # flags of every command
    shared: str = ""                     # folder of the runs that do not depend on the source
    here: str = ""                       # folder of those that do
    processes: int = 1                   # of each run of distill.py


TOY_STUDENT = "toy_student"
EVA_PROXY = "imagenet"  # as the official scripts; the paper's text: "", source images only for all of F2F
NORMED = dict(target_norm="layernorm")
LIGHT = dict(patch=16, batch=16, lr=5e-4, lr_rule="constant", repeats=1, workers=1) | NORMED
PAIRS = {
    "DINOv2-L -> DeiT-B": Pair("dinov2_vitl14", "deit_base_distilled"),
    "DINOv2-B -> DeiT-S": Pair("dinov2_vitb14", "deit_small_distilled"),
    "DINOv2-L -> DINOv2-B": Pair("dinov2_vitl14", "dinov2_vitb14", proxy=""),
    "DINOv2-B -> DINOv2-S": Pair("dinov2_vitb14", "dinov2_vits14", proxy=""),
    "EVA02-L -> EVA02-B": Pair("eva02_large", "eva02_base", proxy=EVA_PROXY),
    "EVA02-B -> EVA02-S": Pair("eva02_base", "eva02_small", proxy=EVA_PROXY),
    "DINOv2-L -> DINO-B": Pair("dinov2_vitl14", "dino_vitb16"),
    "DINOv2-B -> DINO-S": Pair("dinov2_vitb14", "dino_vits16"),
    # Both are shipped: the teacher was trained on a wide world of looks, the student on what whole images show.
    "toy": Pair("toy_teacher", TOY_STUDENT, proxy="toy-proxy", tuned_flags=dict(lr_backbone=2e-4)),
    # Real images: the teacher is an ImageNet ViT-Ti, the student the first 6 of another one's 12 blocks.
    "camvid": Pair("vit_tiny_augreg", "deit_tiny", student_depth=6, proxy_flags=dict(size=128, budget=1000) | LIGHT,
                   source_flags=dict(size=160, budget=500) | LIGHT, one_stage_flags=NORMED),
}
SMALL = ("toy", "camvid")  # worlds for two CPU cores
LIKENED = "DINOv2-B -> DeiT-S"  # whose numbers in the paper stand beside those of the small worlds
SMALLER = {"dinov2_vitl14": "dinov2_vitb14", "dinov2_vitb14": "dinov2_vits14"}  # teacher: one of its student's size


def placed(name, setting, seed, cfg):
    """One of PAIRS on the images of a setting, with the folders of its runs below --out."""
    labelled, _ = data.SETTINGS[setting]
    if name in SMALL:
        folder = f"{cfg.out}/{name}/{seed}"
        return PAIRS[name]._replace(source=name, labelled=labelled, common=dict(root=cfg.root, seed=seed),
                                    shared=folder, here=folder, processes=cfg.processes or 1)
    folder = f"{cfg.out}/paper/{name.replace(' -> ', '-to-').lower()}"
    gpus = torch.cuda.device_count() or 8
    return PAIRS[name]._replace(source=labelled, labelled=labelled, common=dict(root=cfg.root),
                                shared=folder, here=f"{folder}/{labelled}",
                                processes=cfg.processes or 2 ** int(math.log2(gpus)))  # as the batch, a power of two


def distilled(p, name, proxy=True, source=None, source_name=None, **flags):
    """Stage 1, on the proxy set and then on source images: its last run.

    name: of the runs' folders. flags: of distill.py in both stages.
    """
    student = dict(student=p.student, student_depth=p.student_depth)
    if proxy and p.proxy:
        first = run_of("distill.py", p.processes, data=p.proxy, **(p.proxy_flags | flags), teacher=p.teacher, **student,
                       **p.common, out=f"{p.shared}/{name}-proxy")
        student = dict(student=first)
    return run_of("distill.py", p.processes, data=source or p.source, **(p.source_flags | flags), teacher=p.teacher,
                  **student, **p.common, out=f"{p.here}/{source_name or name}-source")


def task(p, name, encoder, source=None, **flags):
    """Stage 2, or a one-stage baseline: its run. flags: of segment.py."""
    if p.labelled != p.source:
        name = f"{name}-{p.labelled}"
    return run_of("segment.py", data=source or p.labelled, encoder=encoder, **flags, **p.common, out=f"{p.here}/{name}")


def as_released(p, role, encoder, ending="", **flags):
    """The run of a decoder on a foundation model as it is: frozen, but for those that the official configs train.

    They train EVA02-B without the smaller rate for encoders, and with drop path 0.15, which is left out here. The paper
    gives EVA02-B 46.6 mIoU as a teacher and 56.2 as a student: one command cannot give both, so that EVA02-B stays
    frozen where its role is "teacher".
    """
    trained = {}
    if encoder == "eva02_base" and role != "teacher":
        trained = dict(freeze=False, lr_backbone=1e-4)
    elif encoder == "eva02_small" or (encoder in ("dinov2_vits14", "dinov2_vitb14") and p.source == "cityscapes"):
        trained = dict(freeze=False)
    state = "tuned" if trained else "frozen"
    return task(p, f"{role}-{state}{ending}", encoder, **trained, **flags)


# --- Rows: each is named after a method, here and in assets/paper.txt ------------------------------------------------

ONE_STAGE = {  # row: its --loss beside that of the task
    "one-stage MSE": "mse", "one-stage QSD": "qsd", "one-stage CWD": "cwd", "one-stage Af-DCD": "afdcd",
    "one-stage G2SD": "g2sd", "one-stage ViTKD": "vitkd", "one-stage Proteus": "proteus",
}
TWO_STAGE = {  # row: the name of its runs, and flags of distill.py
    "two-stage MSE": ("mse", dict(loss="mse")),
    "MSE on source images": ("mse-only", dict(loss="mse", proxy=False)),
    "two-stage CWD": ("cwd", dict(loss="cwd")),
    "two-stage ViTKD": ("vitkd", dict(loss="vitkd")),
    "GKD": ("qsd", dict(loss="qsd")),
    "identity attention": ("identity", dict(loss="qsd", attention="identity")),
}
DISTILL_CHANGES = {  # after a comma in a row's name: what the runs' names get, and flags of distill.py
    "no masks": ("-unmasked", dict(beta=0)),
    "no CLS token": ("-patches", dict(gamma=0)),
    "scaled logits": ("-scale-sqrt", dict(scale="sqrt")),
    "teacher's attention": ("-attention-teacher", dict(attention="teacher")),
    "four layers": ("-layers-four", dict(layers="four")),
    "LayerNorm targets": ("-target_norm-layernorm", dict(target_norm="layernorm")),
}
TASK_CHANGES = {  # likewise, for the last run alone: flags of segment.py
    "frozen": ("-frozen", dict(freeze=None)),
    "tuned": ("-tuned", dict(freeze=False)),    # the labels train the encoder, too
    "1/16 labels": ("-1of16", dict(labels="1/16")),
    "1/8 labels": ("-1of8", dict(labels="1/8")),
    "1/4 labels": ("-1of4", dict(labels="1/4")),
    "all labels": ("", {}),
    "linear": ("-linear", dict(decoder="linear")),
    "SemFPN": ("-fpn", dict(decoder="fpn")),
    "mask decoder": ("", {}),
}
FOUNDATION = "foundation model of that size"


def last_run(p, row, name_ending="", distill_flags={}, **task_flags):
    """The run that makes a row's segmenter; those before it are its needs.

    distill_flags, task_flags: more flags of distill.py, and of segment.py; name_ending: what all its runs' names get.
    """
    method, *changes = row.split(", ")
    task_ending = ""
    for change in changes:
        if change in DISTILL_CHANGES:
            ending, flags = DISTILL_CHANGES[change]
            name_ending = ending + name_ending
            distill_flags = flags | distill_flags
        else:
            ending, flags = TASK_CHANGES[change]
            task_ending += ending
            task_flags = flags | task_flags
    if "tuned" in changes:
        task_flags |= p.tuned_flags

    if method in TWO_STAGE:
        name, flags = TWO_STAGE[method]
        encoder = distilled(p, name + name_ending, **flags, **distill_flags)
        return task(p, name + name_ending + task_ending, encoder, **task_flags)
    ending = name_ending + task_ending
    student = dict(encoder=p.student, depth=p.student_depth)
    if method in ONE_STAGE:
        loss = ONE_STAGE[method]
        return task(p, f"one-stage-{loss}{ending}", **student, freeze=False, kd=1, loss=loss, **p.one_stage_flags,
                    teacher=p.teacher, **task_flags)
    if method == "logit KD":
        return task(p, f"logits{ending}", **student, freeze=False, kd_logits=1, teacher=last_run(p, "teacher"),
                    **task_flags)
    if method == "no KD" and not p.student.startswith(("dinov2", "eva02")):
        return task(p, f"no-kd{ending}", **student, **(dict(freeze=False) | task_flags))
    role, encoder = {
        "teacher": ("teacher", p.teacher),
        "no KD": ("student", p.student),
        FOUNDATION: ("smaller", SMALLER.get(p.teacher)),
    }[method]
    return as_released(p, role, encoder, ending, **task_flags)


def last_runs(p, rows, *more, **flags):
    """{row: last run} of several rows."""
    return {row: last_run(p, row, *more, **flags) for row in rows}


# --- Tables: their rows, and which of them are compared ---------------------------------------------------------------

ONCE = (None,)


class Table(NamedTuple):
    """A table of the paper, or one of this project."""
    title: str
    rows: tuple = ()            # in small worlds, where they are not those of assets/paper.txt
    only_camvid: tuple = ()     # those of them that the toy world leaves out
    rows_at: object = None      # instead: the rows {name: last run} as a function of a Pair and a budget
    worlds: dict = dict(toy=ONCE, camvid=ONCE, paper=ONCE)  # where it can be made, and for which budgets once each
    unit: str = ""              # of a budget
    axis: str = ""              # what a budget is: the table is drawn against it
    reference: str = ""         # the row that all others are compared with on the unseen domains
    gains: tuple = ()           # further comparisons: what is gained, from which row to which
    seeds: int = 3              # in small worlds


def by_steps(p, steps):
    """Whether a method that loses early wins late."""
    rows = ["two-stage MSE", "GKD"]
    if steps <= 4000:
        rows.append("GKD, scaled logits")
    if p.source == "toy" and str(steps) == distill.PRESETS["toy proxy"]["budget"]:  # the runs of the other tables
        return last_runs(p, rows)
    return last_runs(p, rows, f"-{steps}", dict(budget=steps))


def equal_budgets(p, amount, unit):
    """What each objective makes of the same seconds or FLOPs (Laube et al., 2026, arXiv 2604.25530).

    Of two stages, either part of distillation has 40 %, the task stage the rest. What the teacher took, and its decoder
    for logit distillation, does not count. For seconds the machine must be idle.
    """
    whole, stage, rest = [budget_text(share * amount, unit) for share in (1, 0.4, 1 - 2 * 0.4)]
    in_one = ("no KD", "logit KD", *[row for row in ONE_STAGE if row != "one-stage QSD"])
    in_two = ("two-stage MSE", "two-stage CWD", "GKD")
    return (last_runs(p, in_one, f"-{whole}", budget=whole)
            | last_runs(p, in_two, f"-{whole}", dict(budget=stage), budget=rest))


def budget_text(amount, unit):
    """A --budget as text: 24s, or 2.5e12flop."""
    return f"{amount:g}{unit}".replace("+", "")


def more_sources(p, count):
    """Further sources in distillation only, or with their labels as well."""
    if count == 1:
        return dict.fromkeys(("labels of the first", "labels of all"), last_run(p, "GKD"))
    sources = data.TOY_SOURCES if p.source == "toy" else (p.source, "synthia", "urbansyn")
    joined = "+".join(sources[:count])
    name = f"qsd-on-{count}"
    student = distilled(p, "qsd", source=joined, source_name=name, loss="qsd")  # the proxy stage is that of all rows
    return {
        "labels of the first": task(p, f"{name}-labels-1", student),
        "labels of all": task(p, name, student, joined),
    }


TABLES = {
    "main": Table("The paper in one table", (
        "no KD", "no KD, frozen", "one-stage MSE", "two-stage MSE", "two-stage CWD", "GKD", "teacher",
    ), only_camvid=("two-stage CWD",), worlds=dict(toy=ONCE, camvid=ONCE), reference="no KD, frozen", gains=(
        ("CWD instead of MSE", "two-stage MSE", "two-stage CWD"),
        ("GKD instead of MSE", "two-stage MSE", "GKD"),
        ("GKD instead of no KD", "no KD", "GKD"),
    )),
    "effects": Table("The paper's method step by step", seeds=5, rows=(
        "no KD", "one-stage MSE", "MSE on source images, tuned", "two-stage MSE, tuned",
        "identity attention, no masks, tuned", "GKD, no masks, tuned", "GKD, no CLS token, tuned", "GKD, tuned", "GKD",
        "two-stage MSE", "teacher",
    ), worlds=dict(toy=ONCE, camvid=ONCE), gains=(
        ("distil at all, in one stage", "no KD", "one-stage MSE"),
        ("source stage first, then the task", "one-stage MSE", "MSE on source images, tuned"),
        ("proxy stage before it", "MSE on source images, tuned", "two-stage MSE, tuned"),
        ("learned attention instead of identity", "identity attention, no masks, tuned", "GKD, no masks, tuned"),
        ("QSD on CLS and features instead of MSE", "two-stage MSE, tuned", "GKD, no masks, tuned"),
        ("masked patches", "GKD, no masks, tuned", "GKD, tuned"),
        ("CLS token", "GKD, no CLS token, tuned", "GKD, tuned"),
        ("frozen encoder", "GKD, tuned", "GKD"),
        ("GKD instead of two-stage MSE", "two-stage MSE", "GKD"),
        ("GKD instead of no KD", "no KD", "GKD"),
    )),
    "variants": Table("GKD with one thing changed", (
        "GKD", "GKD, scaled logits", "identity attention", "GKD, teacher's attention", "GKD, four layers",
        "GKD, LayerNorm targets",
    ), worlds=dict(toy=ONCE, camvid=ONCE), reference="GKD"),
    "steps": Table("Equal steps", rows_at=by_steps, axis="steps of each stage of distillation", worlds=dict(
        toy=(250, 500, 1000, 2000, 4000, 8000), camvid=(250, 500, 1000, 2000, 4000),
    ), reference="two-stage MSE", gains=(("scaled logits", "GKD", "GKD, scaled logits"),)),
    "clock": Table("Equal seconds", rows_at=partial(equal_budgets, unit="s"), unit="s",
                   axis="seconds of all training of a student", reference="two-stage MSE",
                   worlds=dict.fromkeys(SMALL, (40, 80, 160))),
    "flops": Table("Equal FLOPs", rows_at=partial(equal_budgets, unit="flop"), unit="flop",
                   axis="FLOPs of all training of a student", reference="two-stage MSE",
                   worlds=dict.fromkeys(SMALL, (2.5e12, 5e12, 1e13))),
    "1": Table("Table 1, foundation to local", reference="no KD"),
    "2": Table("Table 2, foundation to foundation", reference="no KD"),
    "3": Table("Table 3, fewer labels", gains=[
        (f"GKD, {share} labels", f"no KD, {share} labels", f"GKD, {share} labels") for share in ("1/16", "1/8", "1/4")
    ]),
    "4": Table("Table 4, one stage or two", reference="one-stage MSE", gains=(
        ("CWD instead of MSE", "two-stage MSE", "two-stage CWD"),
    )),
    "5": Table("Table 5, component by component", reference="one-stage MSE"),
    "6": Table("Table 6, GKD beside domain generalisation methods"),
    "7": Table("Table 7, decoders", (
        "GKD, linear", "GKD, SemFPN", "GKD, mask decoder", "teacher, linear", "teacher, SemFPN",
        "teacher, mask decoder",
    ), gains=(("mask decoder instead of SemFPN", "GKD, SemFPN", "GKD, mask decoder"),)),
    "8": Table("Table 8, students from DINO", reference="no KD"),
    "9": Table("Table 9, surgery", reference="no KD"),
    "10": Table("Table 10, objects (AP)", worlds=dict(toy=ONCE, paper=ONCE), reference="no KD"),
    "fig6": Table("Figure 6, more sources", rows_at=more_sources, axis="sources in distillation",
                  worlds=dict(toy=(1, 2, 3), paper=(1, 2, 3)), reference="labels of the first"),
}


@lru_cache
def paper_numbers(table):
    """What the paper reports in a table, {pair: {setting: {row: [numbers]}}}."""
    numbers = {}
    text = (Path(__file__).parent / "assets" / "paper.txt").read_text()
    for paragraph in text.strip().split("\n\n")[1:]:
        (heading, *settings), *rows = [re.split(r" *\| *", line) for line in paragraph.splitlines()]
        name, pair = heading.split(": ")
        if name == table:
            numbers[pair] = {setting: {} for setting in settings}
            for row, *columns in rows:
                for setting, column in zip(settings, columns, strict=True):
                    numbers[pair][setting][row] = [float(number) for number in column.split()]
    return numbers


def paper_gain(table, before, after):
    """What the paper gains between two rows, of this table or else of another one; None if none has both."""
    for name in (table, *TABLES):
        for numbers in paper_numbers(name).get(LIKENED, {}).values():
            if before in numbers and after in numbers:
                return round(numbers[after][-1] - numbers[before][-1], 1)


class Block(NamedTuple):
    """A table as it is printed, for one pair, one setting and one budget."""
    title: str
    seeds: list     # its rows {name: last run}, once for each seed
    source: list    # domains: the source's own val split in a small world or before corruption, or nothing
    unseen: list    # domains that nobody trained on
    paper: dict     # what the paper reports, {row: [numbers]}
    budget: str     # as text; "": none
    folder: Path    # of pictures


def blocks(cfg):
    """The blocks of --table: a list for each pair and setting, and in it one for each budget."""
    table = TABLES[cfg.table]
    small = cfg.data in SMALL
    numbers = paper_numbers(cfg.table)
    seeds = [0]
    if small:
        numbers = {cfg.data: {"toy-boxes" if cfg.table == "10" else cfg.data: small_rows(cfg)}}
        seeds = range(cfg.seed, cfg.seed + (cfg.seeds or table.seeds))
    groups = []
    for pair, settings in numbers.items():
        for setting, paper in settings.items():
            if cfg.setting not in ("none", setting):
                continue
            source, unseen = data.SETTINGS[setting]
            own = [source] if small or setting == "voc" else []
            title = f"{table.title}, in the {pair} world" if small else f"{table.title}: {pair}, trained on {setting}"
            pairs = [placed(pair, setting, seed, cfg) for seed in seeds]
            group = []
            for amount in table.worlds[cfg.data]:
                budget = budget_text(amount, table.unit) if amount else ""
                rows = [table.rows_at(p, amount) if amount else last_runs(p, paper) for p in pairs]
                group.append(Block(title, rows, own, list(unseen), paper, budget, Path(pairs[0].here)))
            groups.append(group)
    if not groups:
        offered = " ".join(dict.fromkeys(chain(*numbers.values())))
        raise UserError(f"--table {cfg.table} --data {cfg.data} --setting {cfg.setting}: this table has {offered}")
    return groups


def small_rows(cfg):
    """The rows of a table in a small world, its own or those of the paper, and the paper's numbers beside them."""
    def first(found):
        return next(iter(found.values()), {})

    table = TABLES[cfg.table]
    numbers = paper_numbers(cfg.table)      # of pairs, of their settings
    rows = table.rows or first(first(numbers))
    beside = first(numbers.get(LIKENED, {}))
    left_out = {FOUNDATION, *(table.only_camvid if cfg.data == "toy" else ())}
    return {row: beside.get(row, []) for row in rows if row not in left_out}


# --- Tables: what is missing is run, what is there is printed --------------------------------------------------------

def tables(cfg, device):
    """Print --table, after running what is missing of it; --demo and tables with budgets also draw a picture."""
    check_table(cfg)
    table = TABLES[cfg.table]
    for group in blocks(cfg):
        run_missing(group, cfg)
        curves = {}  # {budget: {row that all seeds have finished: [unseen mean of each]}}
        for block in group:
            results = {}
            for name in block.seeds[0]:
                found = [measured(rows[name], block, cfg, device) for rows in block.seeds]
                results[name] = [result for result in found if result]
            show_block(block, results, cfg)
            unseen = {}
            for name, found in results.items():
                if len(found) == len(block.seeds):
                    unseen[name] = [result.miou[-1] for result in found]
            if len(block.seeds) > 1:
                show_gains(table, unseen, cfg)
            curves[block.budget] = unseen
        if sum(map(bool, curves.values())) > 1:
            print(f"picture: {draw_budgets(curves, group[0].folder / f'{cfg.table}.png', table.axis)}")
        if cfg.demo and len(unseen) == len(results):
            print(f"picture: {demo_picture(block, block.folder / 'demo.png', cfg)}")


def check_table(cfg):
    if cfg.table not in TABLES:
        raise UserError(f"--table {cfg.table}: not one of {' '.join(TABLES)}")
    if cfg.demo and cfg.table != "main":
        raise UserError(f"--demo is --table main: without it, --table {cfg.table} --data toy")
    worlds = TABLES[cfg.table].worlds
    if cfg.data not in worlds:
        raise UserError(f"--table {cfg.table} --data {cfg.data}: this table is made with --data {' or '.join(worlds)}")
    if Path(cfg.out).is_file():
        raise UserError(f"--out {cfg.out} is a file, not a folder; choose another --out")


def run_missing(group, cfg):
    """Run what is missing of some blocks; at the paper's scale only what this machine can, after printing all of it."""
    chains = [run.chain() for block in group for rows in block.seeds for run in rows.values()]
    lacks = {}  # {missing run: what this machine lacks for it}
    for run in chain(*chains):
        if run not in lacks and not run.finished():
            lacks[run] = []
            if cfg.data == "paper":
                lacks[run] = absent(run.cfg.data, run.cfg.root) + ([] if torch.cuda.is_available() else ["a GPU"])
    if cfg.data == "paper" or not cfg.run:
        for run, needs in lacks.items():
            print(f"{run}  # needs {' and '.join(needs)}" if needs else run)
    possible = {}   # as a set that keeps their order
    for runs in chains:
        if not any(lacks.get(run) for run in runs):
            possible |= dict.fromkeys(runs)
    if cfg.run:
        work_through([run for run in possible if run in lacks], cfg)


def absent(names, root):
    """Folders below root of the data sets that are not there."""
    folders = [Path(root, entry.folder) for entry in data.entries(names, labelled=False).values() if not entry.generate]
    return [str(folder) for folder in folders if not folder.is_dir()]


def work_through(runs, cfg):
    """Make some runs, --jobs at a time, each after those that it needs.

    Where one fails, and at SIGTERM or Ctrl-C, the others end with their step saved: the same command resumes them.
    """
    def stop(number, frame):
        qsd.say(f"stopped by signal {number}; the same command goes on from there")
        sys.exit(128 + number)

    waiting = list(runs)
    working = {}  # {run: its process and when it began}
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=len(runs), desc="runs", unit="run", dynamic_ncols=True)
    try:
        while waiting or working:
            unfinished = {*waiting, *working}
            ready = [run for run in waiting if unfinished.isdisjoint(run.needs)]
            for run in ready[:cfg.jobs - len(working)]:
                waiting.remove(run)
                working[run] = begin(run, cfg.jobs), time.time()
            time.sleep(0.1)
            for run, (process, began) in list(working.items()):
                if process.poll() is None:
                    continue
                del working[run]
                if process.returncode:
                    raise UserError(failure(run, process.returncode))
                bar.write(f"{run}  # {time.time() - began:.0f} s", file=sys.stdout)
                bar.update()
    finally:
        for process, _ in working.values():
            process.terminate()
        for process, _ in working.values():
            process.wait()
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def begin(run, jobs):
    """Start a run in a process of its own, on its share of the cores; what it prints goes to the file of log_of."""
    script, *flags = shlex.split(run.text)
    words = [sys.executable]
    if run.processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    words += [str(Path(__file__).parent / script), *flags]
    threads = max(1, (os.cpu_count() or 1) // jobs // run.processes)
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(run), "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def log_of(run):
    """Where a run's output goes: <out>.txt, as the bars of several runs would overwrite each other on one terminal."""
    return Path(f"{run.result.parent}.txt")


def failure(run, status):
    """What is said of a run that failed: its command, and the end of its output."""
    lines = [line for line in log_of(run).read_text(errors="replace").splitlines() if line.strip()]
    reason = rf"{run.text.split()[0]}: |\w*(Error|Exception)"     # and not what torchrun adds
    reasons = [line for line in lines if re.match(reason, line)] or lines or [""]
    return f"{run} ended with status {status}: {reasons[-1]} (see {log_of(run)})"


class Result(NamedTuple):
    """What is known of a finished row."""
    miou: list      # of each domain, percent, then the mean of the unseen ones
    seconds: float  # of all stages that led to its encoder and decoder; a distilled one's teacher is not among them
    flops: float    # likewise
    diagonal: float | None = None   # a patch's mean weight on itself when distillation by QSD has ended


def measured(run, block, cfg, device):
    """The Result of a row's last run; None if it or a domain is not there."""
    path = run.result
    if not path.exists():
        return None
    domains = block.source + block.unseen
    mious = known_mious(path, domains, cfg, device)
    if not mious:
        return None
    mean = sum(mious[name] for name in block.unseen) / len(block.unseen)
    ledger = qsd.checked_ledger(path, qsd.open_checkpoint(path).get("ledger"))
    seconds = sum(stage["seconds"] for stage in ledger)
    flops = sum(stage["flops"] for stage in ledger)
    return Result([mious[name] for name in domains] + [mean], seconds, flops, diagonal_of(run))


def known_mious(path, domains, cfg, device):
    """{domain: mIoU} of a segmenter, None if the images of some are neither here nor measured.

    eval.json beside it keeps {protocol: {domain: mIoU}}, until the segmenter is newer.
    """
    kept = path.with_name("eval.json")
    book = {}
    if kept.exists() and kept.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        try:
            book = json.loads(kept.read_text())
        except ValueError:
            qsd.say(f"{kept} is damaged: measured again")
    mious = book.setdefault(f"window {cfg.window}, stride {cfg.stride:.6g}, {cfg.precision}", {})
    missing = "+".join(name for name in domains if not math.isfinite(mious.get(name, math.nan)))
    if missing:
        if absent(missing, cfg.root):
            return None
        model, saved = segment.load_segmenter(path, device)
        mious |= measure(path, model, saved, replace(cfg, data=missing), device)
        distill.write(kept, json.dumps(book))
    return mious


def diagonal_of(run):
    """What the log of a row's source stage ends with as "diagonal"; None without one."""
    for stage in run.needs:
        log = stage.result.with_name("log.jsonl")
        if log.exists():
            return json.loads(log.read_text().splitlines()[-1]).get("diagonal")


def show_block(block, results, cfg):
    """Print a block as a table and as JSON, from {row: its Results}.

    A small world's row also says what it took and what the paper's mean is; at the paper's scale its numbers stand in
    brackets.
    """
    small = cfg.data in SMALL
    domains = block.source + block.unseen
    columns = [*domains, "mean"]
    if small:
        columns = [*domains, "unseen mean", "seconds", "TFLOP"]
        if cfg.table == "steps":
            columns.append("diagonal")
        if any(block.paper.values()):
            columns.append("paper")
    several = ", mean and standard deviation of seeds" if len(block.seeds) > 1 else ""
    budget = f"; {TABLES[cfg.table].axis}: {block.budget}" if block.budget else ""
    print(f"\n{block.title}{budget}{several}{'' if small else ' [paper]'}")
    cells = {}
    record = {}
    for name, found in results.items():
        mious = [result.miou for result in found]
        texts = dict.fromkeys(columns, "-")
        for column, values in zip(columns, zip(*mious)):
            texts[column] = f"{np.mean(values):.1f}"
            if len(values) > 1:
                texts[column] += f" ± {np.std(values, ddof=1):.1f}"
        record[name] = dict(miou=np.round(mious, 2).tolist(), seconds=[round(result.seconds) for result in found],
                            flops=[result.flops for result in found])
        if small and found:
            texts["seconds"] = f"{np.mean([result.seconds for result in found]):.0f}"
            texts["TFLOP"] = f"{np.mean([result.flops for result in found]) / 1e12:.1f}"
        diagonals = [result.diagonal for result in found if result.diagonal is not None]
        if diagonals and "diagonal" in columns:
            texts["diagonal"] = f"{np.mean(diagonals):.3f}"
            record[name]["diagonal"] = diagonals
        paper = block.paper.get(name, [])  # of all unseen domains and their mean, or the mean alone
        if small and paper:
            texts["paper"] = str(paper[-1])
        elif paper:
            for column, number in zip(columns[-len(paper):], paper):
                texts[column] += f" [{number}]"
        cells[name] = [texts[column] for column in columns]
    show(cells, columns)
    print(json.dumps({"table": cfg.table, "title": block.title, "budget": block.budget,
                      "domains": [*domains, "mean"], "rows": record}))


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % points, 1 to 9 degrees of freedom


def show_gains(table, unseen, cfg):
    """Print what a table compares, beside the paper's gains, from {finished row: [unseen mean of each seed]}."""
    others = [row for row in unseen if row != table.reference]
    compared = [(f"{row} over {table.reference}", table.reference, row) for row in others] + list(table.gains)
    cells = {}
    record = {}
    for name, before, after in compared:
        if before in unseen and after in unseen:
            differences = np.subtract(unseen[after], unseen[before])    # (seeds,)
            n = len(differences)
            mean = np.mean(differences)
            half = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * np.std(differences, ddof=1) / math.sqrt(n)
            paper = paper_gain(cfg.table, before, after)
            cells[name] = [f"{mean:+.1f} ± {half:.1f}", "-" if paper is None else f"{paper:+.1f}"]
            record[name] = dict(mean=round(mean, 2), half=round(half, 2), paper=paper)
    if cells:
        print("\nGain on unseen domains, mean of the paired differences and 95 % interval")
        show(cells, ["gain", "paper"])
        print(json.dumps({"gains": record}))


def draw_budgets(curves, path, axis):
    """Draw {budget: {row: [unseen mean of each seed]}}: means, and whiskers of one standard deviation."""
    lines = defaultdict(list)
    whiskers = {}
    for x, rows in enumerate(curves.values()):  # budgets double, or are counted
        for name, values in rows.items():
            lines[name].append((x, np.mean(values)))
            if len(values) > 1:
                whiskers[name, x] = np.std(values, ddof=1)
    return chart(lines, path, axis, "mIoU, mean of the unseen domains", x_texts=dict(enumerate(curves)),
                 whiskers=whiskers)


def demo_picture(block, path, cfg):
    """Draw images of the unseen domains: predictions, and the features of the teacher and the students."""
    folders = {name: block.seeds[0][name].result.parent for name in ("teacher", "no KD", "two-stage MSE", "GKD")}
    students = {name: folder for name, folder in folders.items() if name != "teacher"}
    predicted = students | {"teacher": folders["teacher"]}
    cfg = Config(data="+".join(block.unseen), root=cfg.root, examples=8 // len(block.unseen))
    return compare(predicted, folders, cfg, path, torch.device("cpu"))


# --- Drawing ---------------------------------------------------------------------------------------------------------

LINE_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207),
               (140, 86, 75), (90, 90, 90), (188, 189, 34), (227, 119, 194), (0, 0, 0))
GRID_COLOR = (225, 225, 225)


def pixel(value, ticks, first, last):
    """Where a value lies on an axis whose first and last tick lie at these pixels."""
    return first + (last - first) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def chart(series, path, x_title, y_title, title="", log=False, x_texts=None, whiskers=None):
    """Draw lines {name: [(x, y)]} with axes and a legend, y on a logarithmic scale if log; returns the path.

    x_texts: what stands at which x, {x: text}, in place of round numbers. whiskers: half the length of a vertical bar
    at a point, {(name, x): half}.
    """
    whiskers = whiskers or {}
    lines = {}
    for name, points in series.items():
        lines[name] = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    log = log and all(y > 0 for _, y in chain(*lines.values()))
    if log:
        for name, points in lines.items():
            lines[name] = [(x, math.log10(y)) for x, y in points]
    points = list(chain(*lines.values())) or [(0, 0)]
    reached = [y for _, y in points]
    for (name, x), half in whiskers.items():
        y = dict(lines[name])[x]
        reached += [y - half, y + half]
    x_ticks = sorted(x_texts) if x_texts else ticks([x for x, _ in points])
    x_texts = x_texts or {x: tick_text(x) for x in x_ticks}
    y_ticks = ticks(reached)
    # Powers of ten are no round numbers, but with three digits as good as on the line.
    y_texts = [tick_text(float(f"{10 ** y:.3g}") if log else y) for y in y_ticks]

    # Drawn at twice the size and then halved, lines are smooth.
    width = 1600
    height = 840
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(26)
    top = 60
    bottom = height - 100
    left = 40 + max(map(font.getlength, y_texts))
    right = width - 90 - max(map(font.getlength, lines), default=0)
    x_pixel = partial(pixel, ticks=x_ticks, first=left + 20, last=right - 20)
    y_pixel = partial(pixel, ticks=y_ticks, first=bottom - 20, last=top + 20)

    for value in x_ticks:
        x = x_pixel(value)
        pen.line((x, top, x, bottom), GRID_COLOR, 2)
        pen.text((x, bottom + 10), x_texts[value], "black", font, anchor="ma")
    for value, text in zip(y_ticks, y_texts):
        y = y_pixel(value)
        pen.line((left, y, right, y), GRID_COLOR, 2)
        pen.text((left - 10, y), text, "black", font, anchor="rm")
    pen.rectangle((left, top, right, bottom), outline=(90, 90, 90), width=2)
    pen.text(((left + right) / 2, height - 15), x_title, "black", font, anchor="ms")
    pen.text((10, 10), y_title, "black", font)
    pen.text(((left + right) / 2, 10), title, "black", font, anchor="ma")

    for i, (name, points) in enumerate(lines.items()):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        places = [(x_pixel(x), y_pixel(y)) for x, y in points]
        pen.line(places, color, 4, joint="curve")
        if len(places) < 10:
            for x, y in places:
                pen.ellipse((x - 7, y - 7, x + 7, y + 7), color)
        for x, y in points:
            if (name, x) in whiskers:
                half = whiskers[name, x]
                pen.line((x_pixel(x), y_pixel(y - half), x_pixel(x), y_pixel(y + half)), color, 2)
        y = top + 20 + 36 * i
        pen.line((right + 15, y, right + 55, y), color, 6)
        pen.text((right + 65, y), name, "black", font, anchor="lm")
    return save_picture(canvas.resize((width // 2, height // 2), Image.Resampling.LANCZOS), path)


def ticks(values):
    """At least two round numbers at equal distances that cover all values."""
    low = min(values)
    high = max(values)
    power = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1))
    for step in (0.2 * power, 0.5 * power, power, 2 * power):
        if (high - low) / step <= 7:
            break
    first = math.floor(low / step)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [step * i for i in range(first, last + 1)]


def tick_text(value):
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def with_legend(picture, names, colors, left=10, size=13):
    """The picture, and below it a legend of coloured boxes in as many lines as it takes."""
    font = ImageFont.load_default(size)
    widths = [3 * size + font.getlength(name) for name in names]
    width = round(max(picture.width, 24 * size, left + max(widths, default=0)))
    places = []
    x = left
    y = picture.height + size
    for needed in widths:
        if x > left and x + needed > width:
            x = left
            y += 1.6 * size
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, round(y + size)), "white")
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for (x, y), name, color in zip(places, names, colors):
        pen.rectangle((x, y - size / 2, x + size, y + size / 2), tuple(color), "gray")
        pen.text((x + 1.5 * size, y), name, "black", font, anchor="lm")
    return canvas


def sheet(columns, titles, names, colors, path, width=136, gap=4, top=28):
    """Write {column title: [RGB arrays]} as one picture; returns the path.

    titles: of the rows. names, colors: of the legend below, if there is one. width: of a column, pixels.
    """
    font = ImageFont.load_default(13)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 16 + round(max(ruler.textbbox((0, 0), title, font)[2] for title in titles))
    width = max(width, *(12 + round(font.getlength(name)) for name in columns))
    scaled = {}
    for name, cells in columns.items():
        scaled[name] = [scaled_to(width, cell) for cell in cells]
    heights = [max(cell.height for cell in row) for row in zip(*scaled.values())]

    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + sum(heights) + gap * len(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    tops = [top + sum(heights[:i]) + gap * i for i in range(len(heights))]
    for y, height, title in zip(tops, heights, titles):
        pen.text((left - 8, y + height / 2), title, "black", font, anchor="rm", align="right")
    for j, (name, cells) in enumerate(scaled.items()):
        x = left + j * (width + gap)
        pen.text((x + width / 2, top - 8), name, "black", font, anchor="ms")
        for y, cell in zip(tops, cells):
            canvas.paste(cell, (x, y))
    if names:
        canvas = with_legend(canvas, names, colors, left)
    return save_picture(canvas, path)


def save_picture(picture, path):
    """Write a picture, whole or not at all; returns the path."""
    with whole(path) as unfinished:
        picture.save(unfinished)
    return path


def scaled_to(width, cell):
    """An RGB array as a picture of this width: small ones keep square pixels, large ones get smooth."""
    height = max(1, round(width * cell.shape[0] / cell.shape[1]))
    method = Image.Resampling.NEAREST if cell.shape[1] < width else Image.Resampling.BOX
    return Image.fromarray(cell).resize((width, height), method)


# --- Models and their tokens -----------------------------------------------------------------------------------------

def named(text):
    """--models as {name: path}; a path without a name is its own."""
    models = {}
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        name = name.strip()
        if name in models:
            raise UserError(f"--models {text}: two are called {name}")
        models[name] = path.strip() or name
    if not models:
        raise UserError("--models: say which, as in teacher=dinov2_vitb14,GKD=runs/source/student.pt")
    return models


def file_in(path, *names):
    """The first of these files in a run's folder; any other path as it is."""
    for name in names:
        if Path(path, name).is_file():
            return Path(path, name)
    return path


def segmenters(models, device):
    """{name: (segmenter, its checkpoint)} of models {name: path}; UserError where they know different classes."""
    loaded = {}
    for name, path in models.items():
        loaded[name] = segment.load_segmenter(file_in(path, "segmenter.pt"), device)
    if len({tuple(saved["classes"]) for _, saved in loaded.values()}) > 1:
        raise UserError(f"--models: {', '.join(models)} were trained on different classes")
    return loaded


def encoders(models, cfg, device):
    """{name: frozen encoder} of models {name: path}; UserError where their tokens stand for patches of other sizes."""
    vits = {}
    for name, path in models.items():
        file = file_in(path, "student.pt", "segmenter.pt")
        vit = qsd.load_vit(file, patch_size=cfg.patch or None, official=cfg.official)
        vits[name] = vit.to(device).eval().requires_grad_(False)
    if len({vit.patch_size for vit in vits.values()}) > 1:
        sides = ", ".join(f"{name} {vit.patch_size}" for name, vit in vits.items())
        raise UserError(f"--models have patches of different sides ({sides} pixels): give all the same with --patch")
    return vits


def spread(dataset, count):
    """At most `count` items of a dataset, evenly spread."""
    return Subset(dataset, range(0, len(dataset), math.ceil(len(dataset) / count)))


@torch.no_grad()
def patch_tokens(vit, image, device):
    """Final patch tokens (h, w, C), on the CPU, of a uint8 image (3, H, W) that is scaled to whole patches."""
    h, w = [max(1, round(side / vit.patch_size)) for side in image.shape[1:]]
    x = data.normalize(image[None].to(device), vit.mean, vit.std)
    x = segment.resize(x, (h * vit.patch_size, w * vit.patch_size))
    _, patches = vit(x)
    return patches[0].float().cpu().unflatten(0, (h, w))


def with_constant(x):
    """Tokens (..., C) with a 1 behind each, (..., C + 1) float64: an affine map is linear in them."""
    return F.pad(x.double(), (0, 1), value=1)


def principal(tokens):
    """The three leading principal components (M, 3) of tokens (M, C), each of variance 1."""
    x = tokens - tokens.mean(0)
    _, _, Vh = torch.linalg.svd(x, full_matrices=False)
    x = x @ Vh[:3].T
    return x / x.std(0)


def principal_colors(tokens):
    """RGB in 0..1 (M, 3) for tokens {name: (M, C)}: their principal components, on the axes of the first model's.

    Components have no natural order or sign, so those of each model are rotated as a whole onto the first model's
    (Procrustes). The colours span two and a half deviations either side.
    """
    colors = {}
    first = None
    for name, x in tokens.items():
        x = principal(x)
        first = x if first is None else first
        U, _, Vh = torch.linalg.svd(x.T @ first)
        colors[name] = (x @ U @ Vh / 5 + 0.5).clamp(0, 1)
    return colors


def as_array(image):
    """(3, H, W) as (H, W, 3)."""
    return image.permute(1, 2, 0).numpy()


def compare(predicted, featured, cfg, path, device):
    """Draw images of each domain of cfg.data: the predictions of some models {name: path}, the features of others."""
    loaded = segmenters(predicted, device)
    first = next(iter(predicted), "")
    saved = loaded[first][1] if loaded else None  # the images must have the classes of all segmenters, who agree
    images = []
    labels = []
    titles = []
    for name in data.entries(cfg.data):
        dataset = val_split(name, cfg, first, saved)
        for image, label, *_ in spread(dataset, cfg.examples):
            images.append(image)
            labels.append(label)
            titles.append(name.removeprefix("toy-").removeprefix("camvid-"))

    columns = {"image": [as_array(image) for image in images]}
    names = ()
    colors = ()
    if loaded:
        names = dataset.classes
        colors = dataset.colors
        columns["label"] = [data.label_picture(label, image, names, colors) for label, image in zip(labels, images)]
        for name, (model, saved) in loaded.items():
            columns[name] = []
            for image in images:
                found = classify(model, saved, image, cfg, device)
                columns[name].append(data.label_picture(found, image, names, colors, scored=True))
    for name, pictures in feature_pictures(encoders(featured, cfg, device), images, device).items():
        columns[f"PCA: {name}"] = pictures
    return sheet(columns, titles, names, colors, path)


def feature_pictures(vits, images, device):
    """{name: [RGB arrays]}: each image's tokens as colours, alike for all encoders {name: encoder}."""
    tokens = {}
    for name, vit in vits.items():
        tokens[name] = [patch_tokens(vit, image, device) for image in images]
    flat = {name: torch.cat([x.flatten(0, 1) for x in own]) for name, own in tokens.items()}
    pictures = {}
    for name, colors in principal_colors(flat).items():
        grids = [x.shape[:2] for x in tokens[name]]
        parts = colors.split([h * w for h, w in grids])
        pictures[name] = [(255 * part).byte().view(h, w, 3).numpy() for part, (h, w) in zip(parts, grids)]
    return pictures


# --- Figures of the paper --------------------------------------------------------------------------------------------

def figure_3b(models, cfg, path, device):
    """The losses of several runs against their steps; of a single run all parts of its loss."""
    series = {}
    for name, given in models.items():
        folder = Path(given).parent if Path(given).is_file() else Path(given)
        if not (folder / "log.jsonl").is_file():
            raise UserError(f"{folder}: holds no log.jsonl; this figure wants the folders of runs")
        lines = [line for _, line in read_lines(folder / "log.jsonl")]
        lines = [line for line in lines if {"step", "loss", "lr"} <= line.keys()]
        keys = list(lines[0]) if lines else ["step", "loss", "lr"]
        parts = keys[1:keys.index("lr")]  # all losses stand between step and lr
        shown = {part: part for part in parts}
        if len(models) > 1:
            shown = {name: "kd" if "kd" in parts else "loss"}  # of a one-stage run the distillation alone
        for title, part in shown.items():
            points = [(line["step"], line.get(part)) for line in lines]  # None: it was NaN, which JSON lacks
            series[title] = [(x, y) for x, y in points if qsd.fits(float, x) and qsd.fits(float, y)]
    chart(series, path, "step", "loss", log=True)


def figure_7a(models, cfg, path, device):
    """How far each student's tokens are from those of the teacher, the first model, on random patches of cfg.data.

    A student's tokens are brought to the teacher's space by the affine map that fits best on every second image, and
    measured on the other images. This rule is the same for all methods, whose heads differ.
    """
    vits = encoders(models, cfg, device)
    images = ConcatDataset([spread(val_split(name, cfg), cfg.subset) for name in data.entries(cfg.data)])
    if len(images) < 2:
        raise UserError(f"--data {cfg.data}: has one image, but this figure wants one to fit on and another to measure")
    fit = {}
    tokens = {}
    for name, vit in vits.items():
        fit[name] = random_tokens(vit, Subset(images, range(0, len(images), 2)), cfg, device, f"{name}, fit")
        tokens[name] = random_tokens(vit, Subset(images, range(1, len(images), 2)), cfg, device, f"{name}, measured")
    teacher, *students = vits
    apart = {name: distances(tokens[name], tokens[teacher], fit[name], fit[teacher]) for name in students}

    farthest = torch.cat(list(apart.values())).quantile(0.99).item()
    edges = torch.linspace(0, farthest, 61, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    series = {}
    for name, d in apart.items():
        share = 100 * torch.histogram(d, edges).hist / len(d)
        series[f"{name}: median {d.median():.2f}"] = list(zip(middles.tolist(), share.tolist()))
    x_title = f"Euclidean distance to {teacher} ({len(tokens[teacher])} tokens of {cfg.data})"
    chart(series, path, x_title, "% of the tokens")


def random_tokens(vit, images, cfg, device, title):
    """At most cfg.tokens final patch tokens (M, C) of random places in the images, the same for every encoder."""
    each = math.ceil(cfg.tokens / len(images))
    tokens = []
    for i, (image, *_) in enumerate(tqdm(images, title, leave=False)):
        x = patch_tokens(vit, image, device).flatten(0, 1)
        generator = torch.Generator().manual_seed(data.mix(cfg.seed, i))
        tokens.append(x[torch.randperm(len(x), generator=generator)[:each]])
    return torch.cat(tokens)[:cfg.tokens]


def distances(v_s, v_t, fit_s, fit_t):
    """Euclidean distance (M,) of student tokens (M, C_s) to the teacher's (M, C_t), after the affine map that fits
    others, fit_s (L, C_s) and fit_t (L, C_t), best."""
    # Tokens after a LayerNorm lie in a plane, so the constant depends on them: of all drivers, gelsd copes with that.
    phi = torch.linalg.lstsq(with_constant(fit_s), fit_t.double(), driver="gelsd").solution  # (C_s + 1, C_t)
    return (with_constant(v_s) @ phi - v_t.double()).norm(dim=1)


def figure_7b(models, cfg, path, device):
    """How each QSD student's patches (rows) attend to those of the teacher, the first model (columns).

    Drawn for the first image of cfg.data: all N x N weights, the weight of each patch on itself (the diagonal), and
    the weights of four patches.
    """
    (_, teacher), *students = encoders(models, cfg, device).items()
    image = val_split(next(iter(data.entries(cfg.data))), cfg)[0][0]
    v_t = patch_tokens(teacher, image, device)  # (h, w, C_t)
    grid = v_t.shape[:2]
    h, w = grid
    places = {1: (h // 4, w // 4), 2: (h // 4, 3 * w // 4), 3: (3 * h // 4, w // 4), 4: (3 * h // 4, 3 * w // 4)}
    columns = defaultdict(list)
    titles = []
    for name, student in students:
        v_s = patch_tokens(student, image, device)  # (h, w, C_s)
        kept = file_in(models[name], "student.pt")
        W = attention(kept, student, teacher, v_s.flatten(0, 1), v_t.flatten(0, 1))  # (N, N)
        columns["image"].append(framed(as_array(image), grid, places))
        columns["all N x N weights"].append(framed(heat(W), grid, {}))
        columns["the diagonal"].append(framed(heat(W.diagonal().view(grid)), grid, {}))
        for n, (row, column) in places.items():
            weights = W[row * w + column].view(grid)
            columns[f"patch {n}"].append(framed(heat(weights), grid, {n: (row, column)}))
        titles.append(f"{name}\non the diagonal:\n{W.diagonal().mean():.1%}\n(uniform: {1 / len(W):.1%})")
    names = ["0", "1/4", "1/2", "3/4", "1: the largest weight of the map"]
    sheet(columns, titles, names, HEAT.tolist(), path, width=200)


def attention(path, student, teacher, v_s, v_t):
    """Weights (N, N) with which a student's tokens v_s (N, C_s) attend to the teacher's v_t (N, C_t).

    They are those of the head of L_feat that student.pt keeps; UserError where it has none for these encoders.
    """
    _, heads = qsd.ledger_and_heads(path)
    parts = {}
    for key, value in (heads or {}).items():
        if key.startswith(("feat.phi", "feat.varphi")):
            parts[key.removeprefix("feat.")] = value
    if not parts:
        raise UserError(f"{path}: holds no head of L_feat; this figure wants a student.pt distilled with --loss qsd "
                        "and --alpha above 0")
    saved = qsd.open_checkpoint(path)
    config = qsd.LossConfig(**known_fields(qsd.LossConfig, saved["config"]))
    if config.pool_keys:
        raise UserError(f"{path}: it was distilled with --pool_keys, so that its weights are not N x N")
    head = qsd.build_head(student, teacher, config)
    try:
        head.load_state_dict(parts)
    except RuntimeError:
        width = len(parts["phi.1.weight"])
        raise UserError(f"{path}: its heads are for a teacher of width {width}, not {teacher.embed_dim}") from None
    v_t = v_t[None]
    _, v_t, _ = qsd.normalize_targets((v_t[:, 0], v_t, ()), config.target_norm)  # the CLS token plays no part
    with torch.no_grad():
        return head.weights(v_s[None], v_t)[0]


HEAT = np.array([(255, 255, 255), (255, 225, 140), (245, 130, 50), (170, 20, 70), (40, 0, 60)])  # 0, 1/4, .. 1


def heat(x):
    """Values from 0 (...) as RGB (..., 3), from white to dark at their largest."""
    steps = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(x / x.max(), steps, channel) for channel in HEAT.T]
    return np.stack(channels, -1).astype(np.uint8)


def framed(cell, grid, places):
    """An RGB array, 400 pixels wide, with numbered frames around patches {number: (row, column)} of a grid (h, w)."""
    height = round(400 * cell.shape[0] / cell.shape[1])
    picture = Image.fromarray(cell).resize((400, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(30)
    high = picture.height / grid[0]
    wide = picture.width / grid[1]
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline="gray", width=2)
    for n, (row, column) in places.items():
        box = [column * wide, row * high, (column + 1) * wide, (row + 1) * high]
        pen.rectangle(box, outline="white", width=6)
        pen.rectangle(box, outline=(0, 90, 255), width=4)
        pen.text((box[2] + 6, box[1]), str(n), (0, 90, 255), font, stroke_width=2, stroke_fill="white")
    return np.asarray(picture)


def class_table(models, cfg, device):
    """Figure 9 as text: IoU or AP of each class and their mean, a table for each domain, a column for each model."""
    loaded = segmenters(models, device)
    ious = {}  # of each model, {domain: [IoU or AP in percent of each class or None, their mean]}
    for name, (model, saved) in loaded.items():
        ious[name] = {}
        for domain, values in class_ious(name, model, saved, cfg, device).items():
            values = [*values.tolist(), values.nanmean().item()]
            ious[name][domain] = [None if math.isnan(value) else round(value, 2) for value in values]
    titles = [*saved["classes"], "mean"]
    heading = "IoU on {}, %; -: neither labelled nor predicted"
    if saved["config"]["decoder"] == "boxes":
        heading = "AP on {}, %; -: no object of this class"
    for domain in data.entries(cfg.data):
        rows = {}
        for k, title in enumerate(titles):
            values = [ious[name][domain][k] for name in models]
            rows[title] = ["-" if value is None else f"{value:.1f}" for value in values]
        print(f"\n{heading.format(domain)}")
        show(rows, models)
    print(json.dumps({"figure": "9", "rows": titles, "iou": ious}))


FIGURES = {
    "3b": figure_3b,
    "5": lambda models, *rest: compare({}, models, *rest),  # features on the axes of the first
    "7a": figure_7a,
    "7b": figure_7b,
    "8": lambda models, *rest: compare(models, {}, *rest),  # predictions beside image and label
}

# What each figure shows of a small world where no --models are given: {name: run of --table main}.
TEACHER = {"teacher": "teacher-frozen"}
STUDENTS = {"no KD": "no-kd", "one-stage MSE": "one-stage-mse", "two-stage MSE": "mse", "GKD": "qsd"}
DRAWN = {
    "3b": {"one-stage MSE": "one-stage-mse", "two-stage MSE, proxy": "mse-proxy", "two-stage MSE, source": "mse-source",
           "GKD, proxy": "qsd-proxy", "GKD, source": "qsd-source"},
    "5": TEACHER | {"no KD": "no-kd", "GKD": "qsd"},
    "7a": TEACHER | STUDENTS,
    "7b": TEACHER | {"GKD, proxy": "qsd-proxy", "GKD, source": "qsd-source"},
    "8": STUDENTS | TEACHER,
    "9": STUDENTS | TEACHER,
}


def figure(cfg, device):
    """Draw --figure of --models; where none are given, of the runs of a small world's --table main."""
    if cfg.data == "paper" and cfg.figure != "3b":
        raise UserError("say on which images with --data or --setting")
    out = Path(cfg.out)
    check_place("--out", out)
    is_file = out.suffix.lower() in data.SUFFIXES
    folder = Path(Config.out) if is_file else out
    if cfg.models or cfg.data not in SMALL:
        models = named(cfg.models)
    else:
        folder = folder / cfg.data
        models = {name: folder / str(cfg.seed) / run for name, run in DRAWN[cfg.figure].items()}
        _, unseen = data.SETTINGS[cfg.data]
        cfg = replace(cfg, data="+".join(unseen))
    if cfg.figure in ("7a", "7b") and len(models) < 2:
        raise UserError("--models: this figure wants the teacher, then its students")
    if cfg.figure == "9":
        class_table(models, cfg, device)
        return
    path = out if is_file else folder / f"figure-{cfg.figure}.png"
    FIGURES[cfg.figure](models, cfg, path, device)
    print(f"picture: {path}")


# --- Encoders without a decoder --------------------------------------------------------------------------------------

def probes(cfg, device):
    """Print the mIoU of a linear probe on each encoder of --models, trained on the first domain of cfg.data."""
    if cfg.setting != "none":
        raise UserError("--probe trains on the first of --data: name source and domains there, not with --setting")
    if cfg.data == "paper":
        raise UserError("say on which images with --data")
    if any(entry.boxes for entry in data.entries(cfg.data).values()):
        raise UserError(f"--probe learns the classes of pixels, but --data {cfg.data} labels boxes")
    mious = {}
    for name, path in named(cfg.models).items():
        vit = encoders({name: path}, cfg, device)[name]
        mious[name] = probe(vit, cfg, device)
    mious = show_mious(mious)
    print(json.dumps({"probe": cfg.models, "miou": mious}))


def probe(vit, cfg, device, ridge=1e-3):
    """{domain: mIoU in percent} of ridge regression from patch tokens to the share of each class in a patch.

    Solved in closed form on cfg.subset images of the first domain; measured on those that have a val split.
    """
    source, *_ = data.entries(cfg.data)
    domains = [name for name, entry in data.entries(cfg.data).items() if "val" in entry.splits]
    if not domains:
        raise UserError(f"--data {cfg.data}: none of these has a val split to measure the probe on; add one, as in "
                        "gtav+cityscapes")
    train = data.scenes(source, cfg.root, "train", data.eval_transform(source), classes=cfg.classes)
    K = train.num_classes
    gram = 0
    moment = 0
    for image, label, _ in tqdm(spread(train, cfg.subset), f"probe {source}", leave=False):
        x = with_constant(patch_tokens(vit, image, device))  # (h, w, C + 1)
        occurs = (label == torch.arange(K)[:, None, None]).double()  # (K, H, W)
        share = F.interpolate(occurs[None], x.shape[:2], mode="area")[0].flatten(1).T  # (N, K), of a patch's pixels
        x = x.flatten(0, 1)  # (N, C + 1)
        labelled = share.sum(1, keepdim=True)  # a patch counts as much as it is labelled
        gram = gram + x.T @ (labelled * x)
        moment = moment + x.T @ share
    strength = ridge * gram.diagonal().mean()
    weights = torch.linalg.solve(gram + strength * torch.eye(len(gram)), moment)  # (C + 1, K)

    mious = {}
    for name in domains:
        conf = 0
        for image, label, _ in tqdm(val_split(name, cfg), f"probe {name}", leave=False):
            scores = with_constant(patch_tokens(vit, image, device)) @ weights  # (h, w, K)
            pred = segment.resize(scores.movedim(-1, 0)[None], label.shape).argmax(1)[0]
            conf = conf + confusion(pred, label, K)
        mious[name] = 100 * iou(conf).nanmean().item()
    return mious


# --- A segmenter at work ---------------------------------------------------------------------------------------------

def classify(model, saved, image, cfg, device, least=0.5):
    """The classes (H, W) uint8 of an image (3, H, W) by cfg's protocol, or its objects (D, 6) that score `least`."""
    window = cfg.window or saved["config"]["size"]
    x = data.normalize(image[None].to(device), model.encoder.mean, model.encoder.std)
    with torch.no_grad(), distill.autocast(cfg.precision, device):
        if saved["config"]["decoder"] == "boxes":
            found = find_objects(model, x, window)[0].cpu()
            return found[found[:, 5] >= least]
        if cfg.mode == "slide" and not cfg.flip and scale_list(cfg) == [1]:
            # Band by band, as the scores of all classes of a large photograph would fill the memory.
            bands = score_bands(model, x, window, cfg.stride)
        else:
            bands = [predict(model, x, window, **protocol_of(cfg))]
        classes = torch.cat([classes_of(scores) for scores in bands], 1)[:, :image.shape[1]]
    return classes[0].byte().cpu()


def segment_images(cfg, device):
    """Segment each image of --images: NAME_classes.png holds class numbers, NAME_overlay.png shows them, in --out.

    Of a detector NAME_boxes.json holds lists of left, top, right, bottom, class number and score, NAME_boxes.png shows
    them. Other files there are left alone.
    """
    files = image_files(Path(cfg.images))
    out = Path(cfg.out)
    check_place("--out", out)
    if out.is_file():
        raise UserError(f"--out {out}: is a file; choose another folder for the results")
    if out.resolve() == files[0].parent.resolve():
        raise UserError(f"--out {out}: is where the images lie; choose another folder for the results")
    model, saved = segment.load_segmenter(cfg.checkpoint, device)
    palette = data.palette(saved["colors"]).tobytes()
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with tqdm(files[distill.rank()::distill.world_size()], "images", disable=distill.rank() > 0, leave=False) as bar:
        for file in bar:
            image = data.read_image(file, mapped=False, upright=True)  # (3, H, W)
            found = classify(model, saved, image, cfg, device)
            if saved["config"]["decoder"] == "boxes":
                distill.write(out / f"{file.stem}_boxes.json", json.dumps(found.tolist()))
                picture = data.label_picture(found, image, saved["classes"], saved["colors"], width=800, scored=True)
                save_picture(Image.fromarray(picture), out / f"{file.stem}_boxes.png")
                continue
            picture = Image.fromarray(found.numpy())
            picture.putpalette(palette)
            save_picture(picture, out / f"{file.stem}_classes.png")
            blend = Image.blend(Image.fromarray(as_array(image)), picture.convert("RGB"), 0.5)
            overlay = with_legend(blend, saved["classes"], saved["colors"], size=max(13, blend.width // 80))
            save_picture(overlay, out / f"{file.stem}_overlay.png")
    if distill.rank() == 0:
        print(f"{out}: {len(files)} images, {len(files) / (time.time() - began):.1f} images/s")


def image_files(given):
    """The images at a path, one or a folder of them; UserError where two would have results of one name."""
    if not is_there(given):
        raise UserError(f"--images {given}: no such file or folder")
    at_hand = [given / name for name in data.files_below(given)] if given.is_dir() else [given]
    files = {}
    others = []
    for file in at_hand:
        if file.suffix.lower() not in data.SUFFIXES or file.parent not in (given, given.parent):
            others.append(file.relative_to(given))
            continue
        if file.stem in files:
            raise UserError(f"--images: {files[file.stem]} and {file.name} would both become {file.stem}_classes.png; "
                            "rename one of them")
        files[file.stem] = file
    if not files:
        raise UserError(f"--images {given}: no images directly in it (files that end in "
                        f"{' '.join(sorted(data.SUFFIXES))})")
    qsd.say(f"{len(files)} images in {given}{data.and_without(given, others)}")
    return list(files.values())


class Scores(torch.nn.Module):
    """What is exported: images (B, 3, H, W), normalised by the encoder's statistics -> class scores (B, K, H, W)."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, x):
        return self.segmenter.decoder.scores(self.segmenter(x), x.shape[2:])


def export(checkpoint, path, dynamic):
    """Write a segmenter as a torch.export program for images of its training crop, the window of the protocol.

    It takes one image, or any number if dynamic. Classes, colours, mean and std lie in the file's
    extra_files["about.json"]. UserError where its scores differ from eager mode. A path that ends in .pth gets the
    weights instead, under the names that they have in mmsegmentation.
    """
    if path.suffix not in (".pt2", ".pth"):
        raise UserError(f"--export {path}: torch.export names its files .pt2, mmsegmentation .pth")
    check_place("--export", path)
    model, saved = segment.load_segmenter(checkpoint)
    if saved["config"]["decoder"] == "boxes":
        raise UserError(f"--export {path}: writes the scores of pixels, but {checkpoint} finds boxes")
    if path.suffix == ".pth":
        export_weights(model, saved, path)
        return
    model.frozen = False  # nothing is trained here, so the encoder needs no gradient mode of its own in the program
    eager = Scores(model)
    size = saved["config"]["size"]
    about = dict(classes=saved["classes"], colors=saved["colors"], mean=model.encoder.mean, std=model.encoder.std,
                 size=size)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    example = torch.zeros(2 if dynamic else 1, 3, size, size)
    program = torch.export.export(eager, (example,), dynamic_shapes=shapes)
    with whole(path) as unfinished:
        torch.export.save(program, unfinished, extra_files={"about.json": json.dumps(about)})
        written = torch.export.load(unfinished).module()
        differences = []
        for count in (1, 3) if dynamic else (1,):
            x = torch.randn(count, 3, size, size)
            differences.append((written(x) - eager(x)).abs().max())
        difference = torch.stack(differences).max().item()  # NaN if one is
        if not difference < 1e-4:
            raise UserError(f"{path}: its scores differ from those of {checkpoint} by up to {difference:.1e}")
    images = "any number of images" if dynamic else "one image"
    print(f"{path}: {images} (3, {size}, {size}) to {len(saved['classes'])} scores a pixel; largest difference from "
          f"eager mode {difference:.1e}")


def export_weights(model, saved, path):
    """Write a segmenter's weights as a checkpoint of mmsegmentation; read again, they are the same."""
    meta = dict(dataset_meta=dict(classes=saved["classes"], palette=saved["colors"]))
    distill.save(path, dict(state_dict=segment.official_state_dict(model), meta=meta))
    again, _ = segment.load_segmenter(path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    print(f"{path}: {len(model.state_dict())} tensors under mmsegmentation's names, for an EncoderDecoder with "
          f"Mask2FormerHead; images in 0..1, normalised by mean {model.encoder.mean} and std {model.encoder.std}")


def report(cfg, device):
    """Print the mIoU of --checkpoint on the domains of cfg.data."""
    if cfg.data == "paper":
        raise UserError("say on which images with --data or --setting")
    model, saved = segment.load_segmenter(cfg.checkpoint, device)
    mious = measure(cfg.checkpoint, model, saved, cfg, device)
    if distill.rank() == 0:
        rows = show_mious({cfg.checkpoint: mious})
        print(json.dumps({"checkpoint": cfg.checkpoint, "miou": rows[cfg.checkpoint]}))


def main(argv=None):
    cfg = distill.configure(Config, preset, argv)
    device = distill.launch()
    scale_list(cfg)  # a mistake is told before anything runs
    if cfg.setting not in ("none", *data.SETTINGS):
        raise UserError(f"--setting {cfg.setting}: not one of {' '.join(data.SETTINGS)}")
    if cfg.table != "none":
        tables(cfg, device)
        return
    if cfg.setting != "none":
        _, unseen = data.SETTINGS[cfg.setting]
        cfg = replace(cfg, data="+".join(unseen))
    if (cfg.figure != "none" or cfg.probe) and distill.world_size() > 1:
        raise UserError("--figure and --probe run in one process: start them with python")
    if cfg.figure != "none":
        figure(cfg, device)
    elif cfg.probe:
        probes(cfg, device)
    elif not cfg.checkpoint:
        raise UserError("give --checkpoint segmenter.pt and --data or --setting, or --demo, --table or --figure")
    elif cfg.images:
        segment_images(cfg, device)
    elif cfg.export:
        if distill.rank() == 0:
            export(cfg.checkpoint, Path(cfg.export), cfg.dynamic)
    else:
        report(cfg, device)


if __name__ == "__main__":
    distill.cli(main)
