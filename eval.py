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
import hashlib
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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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


def read_book(path):
    """The dict in a JSON file that this project wrote; an empty one where it is absent or damaged."""
    try:
        book = json.loads(path.read_text())
    except (OSError, ValueError):
        book = {}
    return book if isinstance(book, dict) else {}


def dict_in(book, name):
    """The dict that a book holds under a name; an empty one where there is none."""
    part = book.get(name)
    return part if isinstance(part, dict) else {}


def read_lines(log):
    """The lines of a run's log.jsonl that hold a dict, as (text, dict); a kill or a full disk cut off the others."""
    for text in log.read_text(errors="replace").splitlines():
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield text, record


def contents_of(dataset):
    """A text that tells a set of images from another: their number, names of 4096, bytes of 64."""
    n = len(dataset)
    digest = hashlib.sha256(str(n).encode())
    for i in range(0, n, math.ceil(n / 4096)):
        for file in (dataset.samples[i].image, dataset.samples[i].label):
            digest.update((file.name if isinstance(file, Path) else str(file)).encode())
    for i in range(0, n, math.ceil(n / 64)):
        if isinstance(dataset.samples[i].image, Path):
            digest.update(data.fingerprint(dataset.samples[i].image).encode())
    return digest.hexdigest()


def known_fields(Config, stored):
    """A stored Config {name: value} as Config takes it: what it lacks today is left out, EARLIER is filled in."""
    return {name: value for name, value in stored.items() if hasattr(Config, name)}


def catch_signals():
    """A list that becomes non-empty at the first signal to end, so that a step can finish and be saved before."""
    caught = []
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, frame: caught.append(received))
    return caught


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that ask a process to end
STARTED_BY = "GKD_TABLE"


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
    return data.scenes(name, cfg.root, "val", partial(data.eval_transform, name=name))


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

def command(script, **flags):
    """A run as text, without the `python` before it; a flag that is None is left out."""
    words = [script]
    for name, value in flags.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


SCRIPTS = {"distill.py": (distill, "student.pt"), "segment.py": (segment, "segmenter.pt")}


def parsed(text):
    """A run's script as a module, its Config and its result's path; UserError where the command is wrong."""
    script, *argv = shlex.split(text)
    module, result = SCRIPTS[script]
    cfg = distill.configure(module.Config, module.preset, argv)
    return module, cfg, Path(cfg.out, result)


def finished(text):
    """Whether a run's result is there; UserError if its folder holds a run with other constants."""
    module, cfg, result = parsed(text)
    if not result.exists():
        return False
    distill.check_folder(cfg)
    return True


class Pair(NamedTuple):
    """Who is distilled into whom on which images, and what all commands of these rows have in common."""
    teacher: str
    student: str
    student_depth: int | None = None     # only its first blocks
    smaller: str = ""                    # a foundation model of the student's size, for comparison
    proxy: str = "imagenet"              # --data of the proxy stage; "": none, the student is a foundation model (F2F)
    source: str = "gtav"                 # labelled
    labelled: str = ""                   # --data of the task stage; "": the source
    proxy_flags: dict = {}               # of distill.py in the proxy stage
    source_flags: dict = {}              # of distill.py on source images
    one_stage_flags: dict = {}           # of segment.py in the one-stage rows
    tuned: dict = dict(freeze=False)     # the task stage with the encoder trained at a tenth of the decoder's rate
    common: dict = {}                    # flags of every command
    shared: str = ""                     # folder of the runs that do not depend on the source
    here: str = ""                       # folder of those that do


EVA_PROXY = "imagenet"  # as the official scripts; the paper's text: "", source images only for all of F2F
F2L_B = Pair("dinov2_vitl14", "deit_base_distilled", smaller="dinov2_vitb14")
F2L_S = Pair("dinov2_vitb14", "deit_small_distilled", smaller="dinov2_vits14")
PAIRS = {
    "DINOv2-L -> DeiT-B": F2L_B,
    "DINOv2-B -> DeiT-S": F2L_S,
    "DINOv2-L -> DINOv2-B": Pair("dinov2_vitl14", "dinov2_vitb14", proxy=""),
    "DINOv2-B -> DINOv2-S": Pair("dinov2_vitb14", "dinov2_vits14", proxy=""),
    "EVA02-L -> EVA02-B": Pair("eva02_large", "eva02_base", proxy=EVA_PROXY),
    "EVA02-B -> EVA02-S": Pair("eva02_base", "eva02_small", proxy=EVA_PROXY),
    "DINOv2-L -> DINO-B": F2L_B._replace(student="dino_vitb16"),
    "DINOv2-B -> DINO-S": F2L_S._replace(student="dino_vits16"),
}
SMALL = ("toy", "camvid")  # worlds for two CPU cores


def paper_pair(title, source, out, root):
    """A pair of the paper, on one of its labelled sources."""
    folder = f"{out}/paper/{title.replace(' -> ', '-to-').lower()}"
    return PAIRS[title]._replace(source=source, common=dict(root=root), shared=folder, here=f"{folder}/{source}")


def small_pair(world, out, seed, root):
    """The pair of a small world, one seed of it."""
    folder = f"{out}/{world}/{seed}"
    common = dict(root=root, seed=seed)
    if world == "toy":
        # The teacher was trained on a wide world of looks and is shipped; the student starts from random weights.
        return Pair("toy_teacher", "toy_small", proxy="toy-proxy", source="toy",
                    tuned=dict(freeze=False, lr_backbone=2e-4), common=common, shared=folder, here=folder)
    # Real images: the teacher is an ImageNet ViT-Ti, the student the first 6 of another one's 12 blocks.
    normed = dict(target_norm="layernorm")
    light = dict(patch=16, batch=16, lr=5e-4, lr_rule="constant", repeats=1, workers=1) | normed
    return Pair("vit_tiny_augreg", "deit_tiny", student_depth=6, proxy="imagenet", source="camvid",
                proxy_flags=dict(size=128, budget=1000) | light, source_flags=dict(size=160, budget=500) | light,
                one_stage_flags=normed, common=common, shared=folder, here=folder)


def distilled(p, name, source=None, source_name=None, proxy=True, **flags):
    """Stage 1, on the proxy set and then on source images: its runs, and the student that they make.

    name: of the runs' folders. flags: of distill.py in both stages.
    """
    runs = []
    student = dict(student=p.student, student_depth=p.student_depth)
    if proxy and p.proxy:
        out = f"{p.shared}/{name}-proxy"
        runs.append(command("distill.py", data=p.proxy, **(p.proxy_flags | flags), teacher=p.teacher, **student,
                            **p.common, out=out))
        student = dict(student=f"{out}/student.pt")
    out = f"{p.here}/{source_name or name}-source"
    runs.append(command("distill.py", data=source or p.source, **(p.source_flags | flags), teacher=p.teacher,
                        **student, **p.common, out=out))
    return runs, f"{out}/student.pt"


def task(p, name, encoder, source=None, **flags):
    """Stage 2, or a one-stage baseline: its command. flags: of segment.py."""
    if p.labelled not in ("", p.source):
        source = p.labelled
        name = f"{name}-{p.labelled}"
    return command("segment.py", data=source or p.source, encoder=encoder, **flags, **p.common, out=f"{p.here}/{name}")


def two_stage(p, loss="qsd", name=None, proxy=True, suffix="", then=None, **flags):
    """The runs of distillation and then task learning.

    flags: of distill.py. then: flags of segment.py; suffix: what they add to the name of its folder.
    """
    name = name or loss
    runs, student = distilled(p, name, proxy=proxy, loss=loss, **flags)
    return [*runs, task(p, name + suffix, student, **(then or {}))]


def one_stage(p, loss, suffix="", **flags):
    """The run of task learning and distillation at once, equation 3."""
    return [task(p, f"one-stage-{loss}{suffix}", p.student, depth=p.student_depth, freeze=False, kd=1, loss=loss,
                 **p.one_stage_flags, teacher=p.teacher, **flags)]


def as_released(p, role, encoder, suffix="", **flags):
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
    return [task(p, f"{role}-{state}{suffix}", encoder, **trained, **flags)]


def no_kd(p, suffix="", **flags):
    """The run of the student alone."""
    if p.student.startswith(("dinov2", "eva02")):
        return as_released(p, "student", p.student, suffix, **flags)
    return [task(p, f"no-kd{suffix}", p.student, depth=p.student_depth, freeze=False, **flags)]


def teacher_alone(p, suffix="", **flags):
    """The run of a decoder on the teacher."""
    return as_released(p, "teacher", p.teacher, suffix, **flags)


# --- Rows: the runs that lead to one segmenter, the last of them -----------------------------------------------------
# Rows that begin alike share those runs, within a table and between tables.

class Row(NamedTuple):
    """A row of a table: its name and its runs."""
    name: str
    runs: list


def main_rows(p):
    frozen = []
    cwd = []
    if p.source != "toy":
        # This student starts from trained weights, so that freezing alone is a method.
        frozen = [Row("no KD, frozen", [task(p, "no-kd-frozen", p.student, depth=p.student_depth)])]
        # What did best in the toy world, whose own table 4 has it: the demo, which is this table, should stay short.
        cwd = [Row("two-stage CWD", two_stage(p, "cwd"))]
    return [
        Row("no KD", no_kd(p)),
        *frozen,
        Row("one-stage MSE", one_stage(p, "mse")),
        Row("two-stage MSE", two_stage(p, "mse")),
        *cwd,
        Row("GKD (QSD)", two_stage(p)),
        Row("teacher", teacher_alone(p)),
    ]


RIVALS = {"mse": "Vanilla KD", "cwd": "CWD", "afdcd": "Af-DCD", "g2sd": "G2SD", "vitkd": "ViTKD", "proteus": "Proteus"}


def rivals(p, losses):
    """GKD beside one-stage distillation by these losses, keys of RIVALS."""
    rows = [Row("teacher", teacher_alone(p))]
    if p.smaller:
        rows.append(Row("foundation model of that size", as_released(p, "smaller", p.smaller)))
    rows.append(Row("student", no_kd(p)))
    for loss in losses:
        rows.append(Row(f"+ {RIVALS[loss]}", one_stage(p, loss)))
    rows.append(Row("+ GKD", two_stage(p)))
    return rows


SHARES = {"1/16": "-1of16", "1/8": "-1of8", "1/4": "-1of4", "all": ""}  # of the labels: the suffix of their folders


def label_shares(p):
    student = []
    rival = []
    gkd = []
    for share, suffix in SHARES.items():
        labels = None if share == "all" else share
        student.append(Row(f"student, {share} labels", no_kd(p, suffix, labels=labels)))
        rival.append(Row(f"+ Af-DCD, {share} labels", one_stage(p, "afdcd", suffix, labels=labels)))
        gkd.append(Row(f"+ GKD, {share} labels", two_stage(p, suffix=suffix, then=dict(labels=labels))))
    return student + rival + gkd


def strategies(p):
    return [
        Row("one-stage MSE", one_stage(p, "mse")),
        Row("one-stage QSD", one_stage(p, "qsd")),
        Row("MSE", two_stage(p, "mse")),
        Row("CWD", two_stage(p, "cwd")),
        Row("ViTKD", two_stage(p, "vitkd")),
        Row("QSD", two_stage(p, "qsd")),
    ]


def components(p):
    tuned = dict(suffix="-tuned", then=p.tuned)
    return [
        Row("one-stage MSE", one_stage(p, "mse")),
        Row("MSE on source images", two_stage(p, "mse", name="mse-only", proxy=False, **tuned)),
        Row("MSE, proxy set first", two_stage(p, "mse", **tuned)),
        Row("QSD: CLS and features", two_stage(p, "qsd", name="qsd-unmasked", beta=0, **tuned)),
        Row("QSD: with masked patches", two_stage(p, "qsd", **tuned)),
        Row("QSD, encoder frozen", two_stage(p, "qsd")),
    ]


def effect_rows(p):
    """The paper's method step by step; between some two of these rows stands each of EFFECTS."""
    tuned = dict(suffix="-tuned", then=p.tuned)
    return [
        Row("no KD", no_kd(p)),
        Row("one-stage MSE", one_stage(p, "mse")),
        Row("MSE on source images", two_stage(p, "mse", name="mse-only", proxy=False, **tuned)),
        Row("MSE, proxy set first", two_stage(p, "mse", **tuned)),
        Row("identity attention, no masks",
            two_stage(p, name="identity-unmasked", attention="identity", beta=0, **tuned)),
        Row("QSD, no masks", two_stage(p, name="qsd-unmasked", beta=0, **tuned)),
        Row("QSD, no CLS token", two_stage(p, name="qsd-patches", gamma=0, **tuned)),
        Row("QSD", two_stage(p, **tuned)),
        Row("QSD, encoder frozen", two_stage(p)),
        Row("MSE, encoder frozen", two_stage(p, "mse")),
        Row("teacher", teacher_alone(p)),
    ]


class Effect(NamedTuple):
    """What a table's row adds to another one, and the two rows of the paper that say it."""
    name: str
    before: str
    after: str
    paper: tuple = ()  # (table, row, row) of PAPER, DINOv2-B -> DeiT-S on GTAV; (): it has no such rows


EFFECTS = (
    Effect("distil at all, in one stage", "no KD", "one-stage MSE", ("1", "student", "+ Vanilla KD")),
    Effect("source stage first, then the task", "one-stage MSE", "MSE on source images",
           ("5", "one-stage MSE", "MSE on source images")),
    Effect("proxy stage before it", "MSE on source images", "MSE, proxy set first",
           ("5", "MSE on source images", "MSE, proxy set first")),
    Effect("learned attention instead of identity", "identity attention, no masks", "QSD, no masks"),
    Effect("QSD on CLS and features instead of MSE", "MSE, proxy set first", "QSD, no masks",
           ("5", "MSE, proxy set first", "QSD: CLS and features")),
    Effect("masked patches", "QSD, no masks", "QSD", ("5", "QSD: CLS and features", "QSD: with masked patches")),
    Effect("CLS token", "QSD, no CLS token", "QSD"),
    Effect("frozen encoder", "QSD", "QSD, encoder frozen", ("5", "QSD: with masked patches", "QSD, encoder frozen")),
    Effect("GKD instead of two-stage MSE", "MSE, encoder frozen", "QSD, encoder frozen", ("4", "MSE", "QSD")),
    Effect("GKD instead of no KD", "no KD", "QSD, encoder frozen", ("1", "student", "+ GKD")),
)
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % points, 1 to 9 degrees of freedom


def interval(differences):
    """Mean of paired differences and half the width of its 95 % confidence interval, infinite for a single one."""
    n = len(differences)
    if n < 2:
        return np.mean(differences), math.inf
    t = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]
    return np.mean(differences), t * np.std(differences, ddof=1) / math.sqrt(n)


def verdict(mean, half, paper):
    """What a gain here, mean +- half, says about the paper's: reproduced if it is of the same sign and not smaller."""
    if half >= abs(mean):  # the interval holds 0: does it also hold what the paper gained?
        return "within noise" if paper is None or abs(paper - mean) <= half else "not reproduced"
    if paper is None:
        return "gain" if mean > 0 else "loss"
    if mean * paper < 0:
        return "contradicted"
    return "reproduced" if abs(mean) + half >= abs(paper) else "smaller"


def show_effects(effects, record):
    """Print effects, with intervals and the paper's gains, from {row: {"miou": (seeds, domains + 1)}}."""
    cells = {}
    gains = {}
    for effect in effects:
        unseen = {row: np.array(record[row]["miou"])[:, -1] for row in (effect.before, effect.after)}  # (seeds,) each
        mean, half = interval(unseen[effect.after] - unseen[effect.before])
        paper = None
        if effect.paper:
            table, before, after = effect.paper
            numbers = numbers_beside(table)
            paper = round(numbers[after][-1] - numbers[before][-1], 1)
        cells[effect.name] = [f"{mean:+.1f} ± {half:.1f}", "-" if paper is None else f"{paper:+.1f}",
                              verdict(mean, half, paper)]
        gains[effect.name] = dict(mean=round(mean, 2), half=round(half, 2), paper=paper)
    print("\nGain on unseen domains, mean of the paired differences and 95 % interval")
    show(cells, ["gain", "paper", "verdict"])
    print(json.dumps({"effects": gains}))


def decoders(p):
    small = p.source in SMALL
    kinds = {"SemFPN": ("-fpn", dict(decoder="fpn")), "mask decoder": ("", {})}
    if small:
        kinds = {"linear": ("-linear", dict(decoder="linear"))} | kinds
    rows = []
    for kind, (suffix, flags) in kinds.items():
        rows.append(Row(f"GKD, {kind}", two_stage(p, suffix=suffix, then=flags)))
    if small:
        for kind, (suffix, flags) in kinds.items():
            rows.append(Row(f"teacher, {kind}", teacher_alone(p, suffix, **flags)))
    return rows


def more_sources(p):
    """Further sources in distillation only, or with their labels as well."""
    joined = data.TOY_SOURCES if p.source == "toy" else (p.source, "synthia", "urbansyn")
    rows = [Row("1 source", two_stage(p))]
    for n in (2, 3):
        source = "+".join(joined[:n])
        name = f"qsd-on-{n}"
        runs, student = distilled(p, "qsd", source, source_name=name, loss="qsd")  # the proxy stage is that of all rows
        rows.append(Row(f"{n} sources, labels of 1", [*runs, task(p, f"{name}-labels-1", student)]))
        rows.append(Row(f"{n} sources, all labels", [*runs, task(p, name, student, source)]))
    return rows


def variants(p):
    """QSD with one thing changed, at equal steps."""
    return [
        Row("QSD", two_stage(p)),
        Row("QSD, scale C^-1/2", two_stage(p, name="qsd-scale-sqrt", scale="sqrt")),
        Row("QSD, identity attention", two_stage(p, name="identity", attention="identity")),
        Row("QSD, teacher's attention", two_stage(p, name="qsd-attention-teacher", attention="teacher")),
        Row("QSD, four layers", two_stage(p, name="qsd-layers-four", layers="four")),
        Row("QSD, LayerNorm targets", two_stage(p, name="qsd-target_norm-layernorm", target_norm="layernorm")),
        Row("QSD, 16 random queries", two_stage(p, name="qsd-queries-16", qsd_queries=16)),
        Row("QSD, keys pooled 2x2", two_stage(p, name="qsd-pool_keys", pool_keys=True)),
    ]


EQUAL = {"s": (40, 80, 160), "flop": (2.5e12, 5e12, 1e13)}  # seconds and FLOPs of all training of a student
ONE_STAGE = RIVALS | {"mse": "one-stage MSE"}
TWO_STAGE = {"mse": "two-stage MSE", "cwd": "two-stage CWD", "qsd": "GKD"}
DISTILLED = 0.4  # share of either stage of distillation; the task stage has the rest


def equal_budgets(p, unit):
    """What each objective makes of the same seconds or FLOPs (Laube et al., 2026, arXiv 2604.25530).

    What the teacher took, and its decoder for logit distillation, does not count. For seconds the machine must be idle.
    """
    teacher, = teacher_alone(p)
    _, _, segmenter = parsed(teacher)
    rows = []
    for total in EQUAL[unit]:
        whole = budget_of(total, unit)
        stage = budget_of(DISTILLED * total, unit)
        rest = budget_of((1 - 2 * DISTILLED) * total, unit)
        logits = task(p, f"logits-{whole}", p.student, depth=p.student_depth, freeze=False, kd_logits=1,
                      teacher=segmenter, budget=whole)
        rows.append(Row(f"no KD, {whole}", no_kd(p, f"-{whole}", budget=whole)))
        rows.append(Row(f"logit KD, {whole}", [teacher, logits]))
        for loss, title in ONE_STAGE.items():
            rows.append(Row(f"{title}, {whole}", one_stage(p, loss, f"-{whole}", budget=whole)))
        for loss, title in TWO_STAGE.items():
            runs = two_stage(p, loss, f"{loss}-{whole}", budget=stage, then=dict(budget=rest))
            rows.append(Row(f"{title}, {whole}", runs))
    return rows


def budget_of(amount, unit):
    """A --budget as text: 24s, or 2.5e12flop."""
    return f"{amount:g}{unit}".replace("+", "")


def beside_mse(rows):
    """Of a table of equal budgets: what each objective gains over two-stage MSE of the same budget."""
    return [Effect(row, f"two-stage MSE, {budget_in(row)}", row) for row in rows if not row.startswith("two-stage MSE")]


def budget_in(row):
    """The budget in a row's name, the 2000 of "QSD, no masks, 2000"; None where there is none."""
    _, comma, budget = row.rpartition(", ")
    return budget if comma else None


STEPS = (250, 500, 1000, 2000, 4000)  # of each stage of distillation
COURSES = {  # of the figure of mIoU against steps: their runs' name and what they change in GKD
    "MSE": ("mse", dict(loss="mse")),
    "identity attention": ("identity", dict(attention="identity")),
    "QSD": ("qsd", {}),
    "QSD, no masks": ("qsd-unmasked", dict(beta=0)),
}


def by_steps(p):
    """Whether a method that loses early wins late."""
    rows = [Row("no KD", no_kd(p))]
    for title, (name, flags) in COURSES.items():
        for steps in STEPS:
            if steps == 500 and p.source == "toy":  # that world's own budget: the run of the other tables
                rows.append(Row(f"{title}, {steps}", two_stage(p, name=name, **flags)))
            else:
                rows.append(Row(f"{title}, {steps}", two_stage(p, name=f"{name}-{steps}", budget=steps, **flags)))
    return rows


COURSE_EFFECTS = (  # what is compared at each number of STEPS: two of COURSES, or one with the row without distillation
    Effect("MSE instead of no KD", "no KD", "MSE"),
    Effect("identity attention instead of no KD", "no KD", "identity attention"),
    Effect("all of GKD but its attention", "MSE", "identity attention"),
    Effect("learned attention instead of identity", "identity attention", "QSD"),
    Effect("masked patches", "QSD, no masks", "QSD"),
    Effect("GKD instead of MSE", "MSE", "QSD", ("4", "MSE", "QSD")),
    Effect("GKD instead of no KD", "no KD", "QSD", ("1", "student", "+ GKD")),
)


def at_equal_steps(rows):
    """COURSE_EFFECTS at each number of steps."""
    found = []
    for steps in STEPS:
        for effect in COURSE_EFFECTS:
            before = effect.before if effect.before == "no KD" else f"{effect.before}, {steps}"
            after = f"{effect.after}, {steps}"
            found.append(Effect(f"{effect.name}, {steps}", before, after, effect.paper))
    return found


TABLES = {  # title, and rows as a function of the pair
    "main": ("The paper in one table", main_rows),
    "effects": ("The paper's method step by step", effect_rows),
    "steps": ("Unseen mIoU against steps of each stage of distillation", by_steps),
    "variants": ("QSD with one thing changed", variants),
    "clock": ("Equal seconds", partial(equal_budgets, unit="s")),
    "flops": ("Equal FLOPs", partial(equal_budgets, unit="flop")),
    "1": ("Table 1, foundation to local", partial(rivals, losses=RIVALS)),
    "2": ("Table 2, foundation to foundation", partial(rivals, losses=("mse", "afdcd", "vitkd", "proteus"))),
    "3": ("Table 3, fewer labels", label_shares),
    "4": ("Table 4, one stage or two", strategies),
    "5": ("Table 5, component by component", components),
    "6": ("Table 6, GKD beside domain generalisation methods", lambda p: [Row("GKD", two_stage(p))]),
    "7": ("Table 7, decoders", decoders),
    "8": ("Table 8, students from DINO", partial(rivals, losses=("mse", "cwd", "afdcd"))),
    "9": ("Table 9, surgery", lambda p: rivals(p._replace(smaller=""), losses=("cwd", "vitkd"))),
    "10": ("Table 10, objects (AP)", lambda p: rivals(p._replace(smaller=""), losses=("cwd", "vitkd"))),
    "fig6": ("Figure 6, more sources", more_sources),
}


def beside(reference, table, rows):
    """What each row gains over one of them."""
    paper = numbers_beside(table)
    found = []
    for row in rows:
        if row != reference:
            in_paper = (table, reference, row) if row in paper and reference in paper else ()
            found.append(Effect(row, reference, row, in_paper))
    return found


def gains_in_main(rows):
    """What each row gains over the student without distillation, frozen where that is a row, and GKD over its rival."""
    found = beside("no KD, frozen" if "no KD, frozen" in rows else "no KD", "main", rows)
    for row in rows:
        if row in ("two-stage CWD", "GKD (QSD)"):
            found.append(Effect(f"{row} instead of two-stage MSE", "two-stage MSE", row))
    return found


CWD_EFFECT = Effect("CWD instead of MSE", "MSE", "CWD", ("4", "MSE", "CWD"))  # which of the two stands first
EFFECTS_OF = {  # what is printed below a table of several seeds, as a function of the names of its rows
    "main": gains_in_main,
    "effects": lambda rows: EFFECTS,
    "steps": at_equal_steps,
    "variants": partial(beside, "QSD", "variants"),
    "clock": beside_mse,
    "flops": beside_mse,
    "1": partial(beside, "student", "1"),
    "4": lambda rows: beside("one-stage MSE", "4", rows) + [CWD_EFFECT],
}

# What the paper reports, mIoU in percent. A paragraph is a pair of PAIRS, a column a key of data.SETTINGS; in it stand
# its domains in that order and their mean, or the mean alone, in table 3 once for each of SHARES:
#   gtav         Cityscapes, BDD100K, Mapillary, mean
#   cityscapes   ACDC night, snow, fog, rain, mean
#   potsdam-rgb  Potsdam IRRG, Vaihingen IRRG, mean
PAPER = {
    "1": """
DINOv2-L -> DeiT-B            | gtav                | cityscapes               | potsdam-rgb
teacher                       | 63.3 56.1 63.9 61.1 | 54.6 69.4 78.9 72.6 68.9 | 76.7 63.4 70.1
foundation model of that size | 59.6 54.3 62.6 58.8 | 49.9 67.6 77.5 69.9 66.2 | 72.3 55.9 64.1
student                       | 43.1 41.8 47.7 44.2 | 28.1 47.2 64.1 48.5 47.0 | 67.5 34.1 50.8
+ Vanilla KD                  | 48.5 48.2 53.2 49.9 | 33.2 55.7 71.3 57.0 54.3 | 69.0 42.9 56.0
+ CWD                         | 49.3 46.7 51.8 49.3 | 33.1 53.8 70.5 54.1 52.9 | 70.0 41.5 55.8
+ Af-DCD                      | 48.4 45.2 53.4 49.0 | 31.7 54.3 67.3 55.3 52.1 | 69.5 42.5 56.0
+ G2SD                        | 50.8 49.1 53.4 51.1 | 33.1 55.7 69.5 56.8 53.8 | 72.4 46.7 59.5
+ ViTKD                       | 45.1 45.6 49.8 46.8 | 31.1 55.2 66.3 52.8 51.4 | 67.8 39.8 53.8
+ Proteus                     | 48.1 46.4 52.8 49.1 | 32.5 54.6 69.4 54.6 52.8 | 70.1 43.5 56.8
+ GKD                         | 58.3 54.2 61.3 57.9 | 43.8 69.4 76.7 68.4 64.6 | 74.5 55.6 65.1

DINOv2-B -> DeiT-S            | gtav                | cityscapes               | potsdam-rgb
teacher                       | 59.6 54.3 62.6 58.8 | 49.9 67.6 77.5 69.9 66.2 | 72.3 55.9 64.1
foundation model of that size | 53.2 51.3 57.1 53.9 | 39.3 64.1 68.7 61.0 58.3 | 73.9 54.0 64.0
student                       | 34.9 33.8 42.8 37.2 | 22.7 43.0 55.0 42.2 40.7 | 67.6 28.7 48.2
+ Vanilla KD                  | 45.0 44.2 49.9 46.4 | 31.4 51.3 63.6 50.1 49.1 | 70.3 37.6 54.0
+ CWD                         | 45.9 44.5 49.8 46.7 | 31.7 51.0 64.7 52.6 50.0 | 70.4 38.6 54.5
+ Af-DCD                      | 44.7 45.6 50.9 47.1 | 31.6 49.9 70.1 49.9 50.4 | 71.2 38.2 54.7
+ G2SD                        | 45.2 45.9 52.3 47.8 | 33.5 51.4 65.6 54.2 51.2 | 72.7 40.2 56.5
+ ViTKD                       | 42.5 42.5 48.2 44.4 | 28.0 51.3 65.1 45.9 47.6 | 62.9 34.9 48.9
+ Proteus                     | 47.4 44.6 50.2 47.4 | 32.8 51.3 62.1 49.3 48.9 | 70.8 38.5 54.7
+ GKD                         | 54.9 49.8 57.8 54.1 | 39.3 60.4 72.7 58.4 57.7 | 73.8 48.7 61.3
""",
    "2": """
DINOv2-L -> DINOv2-B | gtav                | cityscapes               | potsdam-rgb
teacher              | 63.3 56.1 63.9 61.1 | 54.6 69.4 78.9 72.6 68.9 | 76.7 63.4 70.1
student              | 59.6 54.3 62.6 58.8 | 49.9 67.6 77.5 69.9 66.2 | 72.3 55.9 64.1
+ Vanilla KD         | 59.9 54.5 60.2 58.2 | 48.6 68.0 79.4 70.5 66.6 | 75.9 52.9 64.4
+ Af-DCD             | 59.5 53.0 60.0 57.5 | 48.9 68.0 79.1 71.0 66.7 | 76.2 52.3 64.3
+ ViTKD              | 58.0 53.0 59.3 56.7 | 46.6 67.6 77.1 69.6 65.2 | 75.5 51.6 63.6
+ Proteus            | 60.1 54.6 61.4 58.7 | 48.3 67.6 79.7 71.1 66.7 | 75.6 53.5 64.6
+ GKD                | 62.6 55.0 61.8 59.8 | 48.3 71.3 80.3 72.0 68.0 | 75.4 56.4 65.9

DINOv2-B -> DINOv2-S | gtav                | cityscapes               | potsdam-rgb
teacher              | 59.6 54.3 62.6 58.8 | 49.9 67.6 77.5 69.9 66.2 | 72.3 55.9 64.1
student              | 53.2 51.3 57.1 53.9 | 39.3 64.1 68.7 61.0 58.3 | 73.9 54.0 64.0
+ Vanilla KD         | 52.9 49.4 56.3 52.9 | 38.6 62.6 73.8 61.8 59.2 | 76.5 48.9 62.7
+ Af-DCD             | 54.0 50.2 55.7 53.3 | 37.5 63.2 75.4 59.3 58.8 | 74.2 42.6 58.4
+ ViTKD              | 49.9 49.1 55.7 51.6 | 37.8 62.9 73.5 60.3 58.6 | 71.7 43.7 57.7
+ Proteus            | 53.5 49.7 56.9 53.4 | 37.6 62.5 74.9 62.6 59.4 | 76.0 42.5 59.3
+ GKD                | 57.1 51.3 58.4 55.6 | 39.2 62.6 75.5 62.2 59.9 | 74.0 53.5 63.8

EVA02-L -> EVA02-B   | gtav                | cityscapes               | potsdam-rgb
teacher              | 58.4 52.5 59.0 56.7 | 39.1 64.9 73.3 62.6 60.0 | 74.8 48.8 61.8
student              | 56.2 53.0 59.4 56.2 | 46.1 65.1 76.7 62.6 62.6 | 74.7 51.6 63.2
+ Vanilla KD         | 54.4 53.2 59.4 55.7 | 43.5 65.2 75.3 62.5 61.6 | 71.4 47.4 59.4
+ Af-DCD             | 55.8 52.9 58.0 55.6 | 46.4 65.8 75.4 63.5 62.7 | 72.8 47.5 60.2
+ ViTKD              | 48.6 50.2 55.2 51.3 | 32.5 59.2 68.4 56.6 54.2 | 71.2 44.2 57.7
+ Proteus            | 53.7 52.8 59.4 55.3 | 45.4 64.7 74.2 61.1 61.4 | 73.5 48.6 61.1
+ GKD                | 59.0 54.5 61.0 58.2 | 46.9 67.8 77.1 65.8 64.4 | 76.4 57.9 67.2

EVA02-B -> EVA02-S   | gtav                | cityscapes               | potsdam-rgb
teacher              | 45.9 44.1 49.8 46.6 | 20.9 54.6 63.3 48.7 46.9 | 66.4 34.0 50.2
student              | 48.5 47.0 52.8 49.4 | 37.6 56.4 70.8 54.4 54.8 | 69.4 42.8 56.1
+ Vanilla KD         | 47.5 46.2 52.2 48.6 | 34.1 57.1 69.7 52.1 53.2 | 69.9 42.2 56.1
+ Af-DCD             | 48.3 47.2 52.1 49.2 | 36.1 56.8 70.9 55.0 54.7 | 70.3 42.6 56.5
+ ViTKD              | 43.3 42.1 47.7 44.4 | 28.9 52.2 66.1 49.7 49.2 | 66.0 34.8 50.4
+ Proteus            | 47.1 45.1 51.1 47.8 | 34.0 56.3 70.8 50.6 52.9 | 68.4 41.8 55.1
+ GKD                | 51.1 45.9 53.7 50.2 | 36.0 59.0 71.2 55.8 55.5 | 71.7 45.7 58.7
""",
    "3": """
DINOv2-L -> DINOv2-B | gtav                | cityscapes
student              | 58.3 58.4 58.7 58.8 | 62.1 63.9 64.1 66.2
+ Af-DCD             | 56.2 56.6 56.9 57.5 | 60.9 62.2 63.9 66.7
+ GKD                | 58.4 58.6 59.1 59.8 | 62.3 64.7 64.9 67.2

DINOv2-B -> DINOv2-S | gtav                | cityscapes
student              | 52.4 53.0 53.5 53.9 | 53.0 55.0 56.8 58.3
+ Af-DCD             | 48.9 49.7 52.4 53.3 | 52.3 55.2 57.4 58.8
+ GKD                | 54.7 55.0 55.3 55.6 | 54.7 56.5 57.6 59.9

DINOv2-L -> DeiT-B   | gtav                | cityscapes
student              | 42.1 42.1 43.2 44.2 | 39.1 42.6 43.4 47.0
+ Af-DCD             | 47.4 48.4 49.0 49.0 | 45.2 48.9 50.4 52.1
+ GKD                | 56.5 56.8 56.8 57.9 | 59.1 60.0 61.2 64.6

DINOv2-B -> DeiT-S   | gtav                | cityscapes
student              | 35.7 36.7 37.5 37.2 | 32.7 38.0 38.2 40.7
+ Af-DCD             | 46.0 46.1 46.2 47.1 | 43.6 46.5 49.0 50.4
+ GKD                | 51.4 51.5 53.6 54.1 | 54.6 54.8 57.0 57.7
""",
    "4": """
DINOv2-B -> DeiT-S | gtav
one-stage MSE      | 45.0 44.2 49.9 46.4
one-stage QSD      | 48.9 46.5 51.1 48.8
MSE                | 54.2 49.0 56.1 53.1
CWD                | 53.0 48.9 53.8 51.9
ViTKD              | 53.2 48.7 55.0 52.3
QSD                | 54.9 49.8 57.8 54.1
""",
    "5": """
DINOv2-B -> DeiT-S       | gtav
one-stage MSE            | 46.4
MSE on source images     | 50.9
MSE, proxy set first     | 53.1
QSD: CLS and features    | 53.4
QSD: with masked patches | 54.0
QSD, encoder frozen      | 54.1
""",
    "6": """
DINOv2-B -> DeiT-S | gtav                | gtav-acdc
GKD                | 54.9 49.8 57.8 54.1 | 46.5

DINOv2-L -> DeiT-B | gtav                | gtav-acdc
GKD                | 58.3 54.2 61.3 57.9 | 51.2
""",
    "7": """
DINOv2-L -> DeiT-B | gtav                | cityscapes
GKD, SemFPN        | 55.5 54.0 59.5 56.3 | 43.2 67.5 75.3 67.8 63.5
GKD, mask decoder  | 58.3 54.2 61.3 57.9 | 43.8 69.4 76.7 68.4 64.6

DINOv2-B -> DeiT-S | gtav                | cityscapes
GKD, SemFPN        | 54.7 50.6 56.6 54.0 | 38.6 61.5 71.7 61.9 58.4
GKD, mask decoder  | 54.9 49.8 57.8 54.1 | 39.3 60.4 72.7 58.4 57.7
""",
    "8": """
DINOv2-L -> DINO-B            | gtav                | cityscapes
teacher                       | 63.3 56.1 63.9 61.1 | 54.6 69.4 78.9 72.6 68.9
foundation model of that size | 59.6 54.3 62.6 58.8 | 49.9 67.6 77.5 69.9 66.2
student                       | 44.5 42.7 49.2 45.4 | 29.0 51.1 65.6 46.7 48.1
+ Vanilla KD                  | 47.9 45.0 51.7 48.2 | 32.5 53.2 63.3 52.4 50.3
+ CWD                         | 45.0 44.8 49.5 46.4 | 29.3 52.0 67.2 55.9 51.1
+ Af-DCD                      | 47.1 46.4 50.0 47.8 | 31.1 53.9 66.1 52.6 50.9
+ GKD                         | 60.5 53.6 61.1 58.4 | 43.2 63.2 75.6 61.0 60.7

DINOv2-B -> DINO-S            | gtav                | cityscapes
teacher                       | 59.6 54.3 62.6 58.8 | 49.9 67.6 77.5 69.9 66.2
foundation model of that size | 53.2 51.3 57.1 53.9 | 39.3 64.1 68.7 61.0 58.3
student                       | 39.7 36.9 44.7 40.4 | 27.8 48.0 66.4 44.5 46.6
+ Vanilla KD                  | 45.4 41.5 47.9 45.0 | 30.8 52.7 67.9 50.6 50.5
+ CWD                         | 44.0 41.4 47.1 44.1 | 30.7 51.4 62.1 51.4 48.9
+ Af-DCD                      | 44.5 42.6 47.3 44.8 | 28.7 52.0 68.2 50.4 49.8
+ GKD                         | 53.2 48.6 55.5 52.4 | 35.6 59.0 72.4 56.8 55.9
""",
    "9": """
DINOv2-B -> DeiT-S | endovis18
teacher            | 53.7
student            | 43.3
+ CWD              | 46.5
+ ViTKD            | 45.1
+ GKD              | 51.6
""",
    "10": """
DINOv2-B -> DeiT-S | voc
teacher            | 79.9
student            | 49.0
+ CWD              | 56.3
+ ViTKD            | 56.6
+ GKD              | 72.9
""",
    "fig6": "DINOv2-L -> DeiT-B | gtav\n\nDINOv2-B -> DeiT-S | gtav",  # drawn: the paper gives no numbers
}


def paper_numbers(name):
    """What PAPER holds of a table, {pair: {setting: {row name: [numbers]}}}; nothing of tables that are not in it."""
    numbers = {}
    paragraphs = PAPER[name].strip().split("\n\n") if name in PAPER else []
    for paragraph in paragraphs:
        (pair, *settings), *rows = [re.split(r" *\| *", line) for line in paragraph.splitlines()]
        numbers[pair] = {setting: {} for setting in settings}
        for title, *columns in rows:
            for setting, column in zip(settings, columns, strict=True):
                values = [float(value) for value in column.split()]
                if name == "3":
                    for share, mean in zip(SHARES, values, strict=True):
                        numbers[pair][setting][f"{title}, {share} labels"] = [mean]
                else:
                    numbers[pair][setting][title] = values
    return numbers


def numbers_beside(table, setting="gtav"):
    """The paper's numbers that are shown beside those of small worlds, {row name: [numbers]}: DINOv2-B -> DeiT-S."""
    return paper_numbers(table).get("DINOv2-B -> DeiT-S", {}).get(setting, {})


# --- Tables: what is missing is run, what is there is printed --------------------------------------------------------

def tables(cfg, device):
    """Print --table, after running what is missing of it; --demo and some tables also draw a picture."""
    check_table(cfg)
    for block in blocks(cfg.table, cfg):
        prepare(block, cfg)
        results = {}  # {row name: the Results of its finished seeds}
        for versions in zip(*block.seeds):
            found = [measured(row, block, cfg, device) for row in versions]
            results[versions[0].name] = [result for result in found if result]
        record = tabulate(block, results, cfg)
        complete = [name for name, found in results.items() if len(found) == len(block.seeds)]
        if cfg.table in EFFECTS_OF and len(block.seeds) > 1:
            effects = [effect for effect in EFFECTS_OF[cfg.table](complete)
                       if effect.before in complete and effect.after in complete]
            if effects:
                show_effects(effects, record)
        unseen = {name: [result.miou[-1] for result in results[name]] for name in complete}
        folder = segmenter_of(block.seeds[0][0]).parent.parent
        if cfg.table in BUDGETS and len({budget_in(row) for row in complete} - {None}) > 1:
            print(f"picture: {figure_budgets(unseen, folder / f'{cfg.table}.png', BUDGETS[cfg.table])}")
        if len(complete) < len(results):
            continue
        if cfg.table == "fig6":
            print(f"picture: {figure_6(unseen, folder / 'figure-6.png', block.title)}")
        if cfg.demo:
            print(f"picture: {demo_picture(block, folder / 'demo.png', cfg)}")


def check_table(cfg):
    if cfg.demo and cfg.table != "main":
        raise UserError(f"--demo is --table main: without it, --table {cfg.table} --data toy")
    if cfg.table not in TABLES:
        raise UserError(f"--table {cfg.table}: not one of {' '.join(TABLES)}")
    if cfg.demo and cfg.data == "paper":
        raise UserError("--demo --data paper: the demo is for a small world, toy or camvid")
    if cfg.data not in ("paper", *SMALL):
        raise UserError(f"--data {cfg.data}: the tables are run in the worlds toy and camvid, or at the paper's scale "
                        "with --data paper")
    if cfg.setting != "none" and cfg.data != "paper":
        raise UserError(f"--setting {cfg.setting}: belongs to the paper's scale, not to --data {cfg.data}")
    check_place("--out", cfg.out)
    if Path(cfg.out).is_file():
        raise UserError(f"--out {cfg.out} is a file, not a folder; choose another --out")
    if distill.world_size() > 1:
        raise UserError("--demo and --table start their own processes: start them with python")


class Block(NamedTuple):
    """A table as it is printed, for one pair and one setting."""
    title: str
    seeds: list    # its rows, once for each seed
    source: list   # domains: the source's own val split in a small world or before corruption, or nothing
    unseen: list   # domains that nobody trained on
    paper: dict    # what the paper reports, {row name: numbers}


def blocks(name, cfg):
    """The blocks of a table: one in a small world; at the paper's scale one for each pair and setting."""
    title, rows_of = TABLES[name]
    if cfg.data == "paper":
        return paper_blocks(name, cfg)
    if name in ("10", "fig6") and cfg.data != "toy":
        needs = "boxes" if name == "10" else "further sources"
        raise UserError(f"--table {name} --data {cfg.data}: has no {needs}; use --data toy or paper")
    world = "toy-boxes" if name == "10" else cfg.data
    source, unseen = data.SETTINGS[world]
    seeds = []
    count = cfg.seeds or (5 if name == "effects" else 3)
    for seed in range(cfg.seed, cfg.seed + count):
        seeds.append(rows_of(small_pair(cfg.data, cfg.out, seed, cfg.root)._replace(labelled=world)))
    numbers = numbers_beside(name, "voc" if name == "10" else "gtav")
    return [Block(f"{title}, in the {cfg.data} world", seeds, [source], list(unseen), numbers)]


def paper_blocks(name, cfg):
    """The blocks of a table at the paper's scale: all, or those of --setting."""
    title, rows_of = TABLES[name]
    found = []
    offered = []
    for pair, settings in paper_numbers(name).items():
        offered = list(settings)
        for setting, numbers in settings.items():
            if cfg.setting in ("none", setting):
                source, unseen = data.SETTINGS[setting]
                rows = rows_of(paper_pair(pair, source, cfg.out, cfg.root))
                clean = [source] if setting == "voc" else []
                found.append(Block(f"{title}: {pair}, trained on {setting}", [rows], clean, list(unseen), numbers))
    if not found:
        has = " ".join(offered) or "no rows at the paper scale: use --data toy"
        raise UserError(f"--table {name} --data paper --setting {cfg.setting}: this table has {has}")
    return found


def segmenter_of(row):
    """The path of a row's segmenter."""
    _, _, result = parsed(row.runs[-1])
    return result


def prepare(block, cfg):
    """Run what is missing of a block; at the paper's scale only what this machine can, after printing all of it."""
    rows = list(chain(*block.seeds))
    lacks = {}  # {missing run: what this machine lacks for it}
    for row in rows:
        for text in row.runs:
            if text not in lacks and not finished(text):
                lacks[text] = lacking(text) if cfg.data == "paper" else []
    if cfg.data == "paper" or not cfg.run:
        for text, needs in lacks.items():
            print(typed(text, cfg) + (f"  # needs {' and '.join(needs)}" if needs else ""))
    if cfg.run:
        run_rows([row for row in rows if not any(lacks.get(text) for text in row.runs)], cfg)


def lacking(text):
    """What a run would need that this machine does not have."""
    _, cfg, _ = parsed(text)
    needs = absent(cfg.data, cfg.root)
    if not torch.cuda.is_available():
        needs.append("a GPU")
    return needs


def absent(names, root):
    """Folders below root of the data sets that are not there."""
    folders = [Path(root, entry.folder) for entry in data.entries(names, labelled=False).values() if not entry.generate]
    return [str(folder) for folder in folders if not folder.is_dir()]


def typed(text, cfg):
    """What a user types for a run."""
    world = processes_of(text, cfg)
    return f"torchrun --standalone --nproc_per_node={world} {text}" if world > 1 else f"python {text}"


def processes_of(text, cfg):
    """How many processes a run takes: stage 2, whose batch is 4, one; stage 1 at the paper's scale one for each GPU."""
    if text.startswith("segment.py"):
        return 1
    if cfg.processes:
        return cfg.processes
    if cfg.data != "paper":
        return 1
    gpus = torch.cuda.device_count() or 8
    return 2 ** int(math.log2(gpus))  # as the batch, a power of two


def run_rows(rows, cfg):
    """Run the commands of some rows that are not finished, --jobs at a time; a command of several rows runs once."""
    before = defaultdict(set)  # what must be finished before a run can start
    for row in rows:
        for i, text in enumerate(row.runs):
            before[text].update(row.runs[:i])
    waiting = Counter(chain(*before.values()))  # how many runs wait for this one
    done = {text for text in before if finished(text)}
    pending = [text for text in before if text not in done]
    pending.sort(key=lambda text: waiting[text], reverse=True)

    working = {}  # {command: its process}
    began = {}
    handlers = {number: signal.getsignal(number) for number in ENDING}
    signals = catch_signals()
    bar = tqdm(total=len(before), initial=len(done), desc="runs", unit="run", dynamic_ncols=True)
    try:
        while (pending or working) and not signals:
            ready = [text for text in pending if before[text] <= done]
            for text in ready[:cfg.jobs - len(working)]:
                pending.remove(text)
                working[text] = begin(text, cfg)
                began[text] = time.time()
            time.sleep(0.1)
            for text, process in list(working.items()):
                if process.poll() is None or signals:
                    continue
                if process.returncode:
                    raise UserError(failure(text, process.returncode, cfg))
                del working[text]
                done.add(text)
                bar.write(f"{typed(text, cfg)}  # {time.time() - began[text]:.0f} s", file=sys.stdout)
                bar.update()
    finally:
        for process in working.values():
            process.terminate()  # it finishes its step and saves it
        for process in working.values():
            try:
                process.wait(None if signals else 15)
            except subprocess.TimeoutExpired:
                process.kill()
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        print(f"stopped by signal {signals[0]}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signals[0])


def begin(text, cfg):
    """Start a run in a process of its own, on its share of the cores; what it prints goes to the file of log_of."""
    script, *argv = shlex.split(text)
    world = processes_of(text, cfg)
    words = [sys.executable]
    if world > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    words += [str(Path(__file__).parent / script), *argv]
    threads = max(1, (os.cpu_count() or 1) // cfg.jobs // world)
    log_of(text).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(text), "w") as file:
        env = os.environ | {"OMP_NUM_THREADS": str(threads), STARTED_BY: str(os.getpid())}
        return subprocess.Popen(words, stdout=file, stderr=file, env=env)


def log_of(text):
    """Where a run's output goes: <out>.txt, as the bars of several runs would overwrite each other on one terminal."""
    _, cfg, _ = parsed(text)
    return Path(f"{cfg.out}.txt")


def failure(text, status, cfg):
    script = text.split()[0]
    output = log_of(text).read_text(errors="replace")
    lines = [line for line in output.splitlines() if line.strip()] or [""]
    reasons = re.findall(rf"{script}: .*|^\w*(?:Error|Exception).*", output, re.M)     # and not what torchrun adds
    return f"{typed(text, cfg)} ended with status {status}: {(reasons or lines)[-1]} (see {log_of(text)})"


@lru_cache
def val_contents(name, root):
    """A text that tells a domain's images from others; None where they are not on this machine."""
    return None if absent(name, root) else contents_of(data.scenes(name, root, "val"))


class Result(NamedTuple):
    """What is known of a finished row."""
    miou: list      # of each domain, percent, then the mean of the unseen ones
    seconds: float  # of all stages that led to its encoder and decoder; a distilled one's teacher is not among them
    flops: float    # likewise


def measured(row, block, cfg, device):
    """A finished row's Result, kept in eval.json beside its segmenter; None if the row or a domain is not there."""
    path = segmenter_of(row)
    if not path.exists():
        return None
    ledger = qsd.checked_ledger(path, qsd.open_checkpoint(path).get("ledger"))
    # Another protocol is another measurement, and so is another training, which the ledger tells.
    protocol = [cfg.mode, cfg.window, cfg.stride, cfg.flip, cfg.scales, cfg.precision, ledger]
    kept = path.with_name("eval.json")
    domains = block.source + block.unseen
    inputs = {name: val_contents(name, cfg.root) for name in domains} | {path.name: data.fingerprint(path)}
    stored = read_book(kept)
    before = inputs | dict_in(stored, "of")  # older versions did not note it
    known = {}  # of this segmenter by this protocol, the domains of other tables among them
    if stored.get("protocol") == protocol and before[path.name] == inputs[path.name]:
        known = dict_in(stored, "miou")
    mious = {}
    for name in domains:
        # Images that have left this machine were measured when they were here.
        if inputs[name] in (None, before[name]) and qsd.fits(qsd.Weight, known.get(name)):
            mious[name] = known[name]
    missing = "+".join(name for name in domains if name not in mious)
    if missing:
        if absent(missing, cfg.root):
            return None
        model, saved = segment.load_segmenter(path, device)
        mious |= measure(path, model, saved, replace(cfg, data=missing), device)
        here = {name: text for name, text in inputs.items() if text}
        distill.write(kept, json.dumps(dict(protocol=protocol, miou=known | mious, of=before | here)))
    mean = sum(mious[name] for name in block.unseen) / len(block.unseen)
    seconds = sum(stage["seconds"] for stage in ledger)
    flops = sum(stage["flops"] for stage in ledger)
    return Result([mious[name] for name in domains] + [mean], seconds, flops)


def tabulate(block, results, cfg):
    """Print a block as a table and as JSON, from {row name: [its Results]}; returns the JSON's rows."""
    small = cfg.data != "paper"
    domains = block.source + block.unseen
    columns = [*domains, "unseen mean", "seconds", "TFLOP"] if small else [*domains, "mean"]
    if small and block.paper:
        columns.append("paper")
    several = ", mean and standard deviation of seeds" if len(block.seeds) > 1 else ""
    print(f"\n{block.title}{several}{'' if small else ' [paper]'}")
    cells = {}
    record = {}
    for title, found in results.items():
        cells[title] = row_cells(title, found, block, small)
        record[title] = dict(miou=[np.round(result.miou, 2).tolist() for result in found],
                             seconds=[round(result.seconds) for result in found],
                             flops=[result.flops for result in found])
    show(cells, columns)
    print(json.dumps({"table": cfg.table, "title": block.title, "domains": [*domains, "mean"], "rows": record}))
    return record


def row_cells(title, results, block, small):
    """A row as text: of each domain and their mean, the mean and standard deviation over the seeds.

    A small world's row also says what it took and what the paper's mean is; at the paper's scale its numbers stand in
    brackets.
    """
    cells = []
    for values in zip(*[result.miou for result in results]):
        deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{deviation}")
    if small and results:
        cells.append(f"{np.mean([result.seconds for result in results]):.0f}")
        cells.append(f"{np.mean([result.flops for result in results]) / 1e12:.1f}")
    if not results:
        cells = ["-"] * (len(block.source + block.unseen) + (3 if small else 1))
    paper = block.paper.get(title, [])  # of all domains and their mean, or the mean alone
    if small and block.paper:
        cells.append(str(paper[-1]) if paper else "-")
    if not small:
        for i, value in enumerate(paper, start=len(cells) - len(paper)):
            cells[i] += f" [{value}]"
    return cells


BUDGETS = {  # tables whose rows are named after an objective and its budget, and what their picture's axis says
    "steps": "steps of each stage of distillation (logarithmic)",
    "clock": "seconds of all training of a student (logarithmic)",
    "flops": "FLOPs of all training of a student (logarithmic)",
}


def figure_budgets(unseen, path, x_title):
    """Unseen mIoU {row name: [of each seed]} against the budget: means, and whiskers of one standard deviation."""
    lines = defaultdict(list)
    whiskers = {}
    x_texts = {}
    for row, values in unseen.items():
        budget = budget_in(row)
        if not budget:
            continue
        name = row.removesuffix(f", {budget}")
        _, amount = distill.parse_budget(budget, steps_per_epoch=1)
        x = math.log2(amount)
        lines[name].append((x, np.mean(values)))
        x_texts[x] = tick_text(amount)
        if len(values) > 1:
            whiskers[name, x] = np.std(values, ddof=1)
    return chart(lines, path, x_title, "mIoU, mean of the unseen domains", x_texts=x_texts, whiskers=whiskers)


def figure_6(unseen, path, title):
    """Unseen mIoU {row name: [of each seed]} against the number of sources, with all labels or those of the first."""
    lines = {}
    for name, labels in {"labels of the first source": "labels of 1", "labels of all": "all labels"}.items():
        rows = {1: "1 source", 2: f"2 sources, {labels}", 3: f"3 sources, {labels}"}
        lines[name] = [(n, np.mean(unseen[row])) for n, row in rows.items()]
    return chart(lines, path, "sources in distillation", "mIoU, mean of the unseen domains", title)


def demo_picture(block, path, cfg):
    """Draw images of the unseen domains: predictions, and the features of the teacher and the students."""
    folders = {row.name: segmenter_of(row).parent for row in block.seeds[0]}
    students = {name: folders[name] for name in ("no KD", "two-stage MSE", "GKD (QSD)")}
    teacher = {"teacher": folders["teacher"]}
    predicted = students | teacher
    featured = teacher | students
    cfg = Config(data="+".join(block.unseen), root=cfg.root, examples=8 // len(block.unseen))
    return compare(predicted, featured, cfg, path, torch.device("cpu"))


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
    transform = partial(data.eval_transform, name=source)
    train = data.scenes(source, cfg.root, "train", transform, classes=cfg.classes)
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
