"""mIoU on domains nobody trained on, the paper's tables as lists of runs, its figures, and what a trained segmenter is used for.

    python eval.py --demo                                             # the whole method in the built-in toy world
    python eval.py --table 5 --data toy                               # a table of the paper there; without --data at the paper's scale
    python eval.py --checkpoint runs/gtav/segmenter.pt --data cityscapes+bdd100k+mapillary --root /data
    torchrun --standalone --nproc_per_node=8 eval.py ...              # the same numbers, sooner
    python eval.py --checkpoint runs/gtav/segmenter.pt --images photos --out segmented     # or --export model.pt2
    python eval.py --figure 5 --models teacher=dinov2_vitb14,GKD=runs/source --patch 16 --data cityscapes --root /data
    python eval.py --probe --models dinov2_vits14,deit_small --data gtav+cityscapes --root /data
"""
import json
import math
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

import data
import distill
import qsd
import segment
from segment import confusion, evaluate, iou, predict, slide  # noqa: F401, the names are part of this file's interface


@dataclass
class Config:
    """Every constant of the evaluation."""
    # what is measured
    checkpoint: str = ""           # segmenter.pt
    data: str = "paper"            # domains, joined with +; for --demo and --table: toy, camvid, or paper (the paper's scale)
    setting: str = "none"          # gtav, gtav-acdc, cityscapes, potsdam-rgb, endovis18: instead of --data, its unseen domains; of a --table its part
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
    # the paper's tables
    table: str = "none"            # main, clock, 1 to 9, fig6: run what is missing of it and print it
    demo: bool = False             # --table main --data toy with one seed, and the picture
    seed: int = 0                  # the first seed of the small worlds' runs
    seeds: int = 0                 # how many; 0 = 3, and 1 for --demo
    jobs: int = 2                  # rows that run side by side, each process on its share of the cores
    processes: int = 0             # of each distillation; 0 = one per GPU
    run: bool = True               # no: only print what is missing and what is there
    out: str = "runs"              # the folder of the tables' runs and pictures; of --images' results; folder or file of --figure


PRESETS = {name: dict(batch=50, workers=0) for name in data.DATASETS if name.startswith("toy")} | {
    "camvid": dict(batch=8, workers=1), "paper": dict(jobs=1)}


# --- What is measured -------------------------------------------------------------------------------------------------------

def measure(title, model, saved, cfg, device):
    """{domain: mIoU in percent} of a segmenter on cfg.data."""
    return {name: each.nanmean().item() for name, each in class_ious(title, model, saved, cfg, device).items()}


def with_mean(result):
    """{domain: mIoU} and their plain mean as "mean"."""
    return result | {"mean": sum(result.values()) / len(result)}


def class_ious(title, model, saved, cfg, device):
    """{domain: IoU in percent of each class (K,), NaN where it neither occurs nor is predicted} of a segmenter on cfg.data."""
    result = {}
    for name in data.rows(cfg.data):
        with data.precision(cfg.precision, device):
            conf = evaluate(model, domain(name, cfg, title, saved), cfg.window or saved["config"]["size"], device, cfg.stride,
                            cfg.mode == "whole", cfg.flip, cfg.batch, cfg.workers, name, multiples(cfg))
        result[name] = 100 * iou(conf)
    return result


def domain(name, cfg, title="", saved=None):
    """The val split of a data set, which must have the classes of a segmenter; your own folder has as many, or without any no labels."""
    if name == "folder":
        classes = len(saved["classes"]) if saved else cfg.classes
        return data.scenes(name, cfg.root, "val", classes=classes) if classes else data.images(name, cfg.root, split="val")
    if saved and list(data.DATASETS[name].classes) != saved["classes"]:
        data.fail(f"--data {name} has the classes {', '.join(data.DATASETS[name].classes)}, but {title} was trained on others")
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
    """Print {row name: [text]} as a table, in Markdown."""
    lines = [["", *columns], *([name, *cells] for name, cells in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    print("\n".join("| " + " | ".join(f"{text:<{width}}" for text, width in zip(line, widths)) + " |" for line in lines))


def show_mious(rows):
    """Print {name: {domain: mIoU}} as a table with their mean; returns the rows with it."""
    rows = {name: with_mean(result) for name, result in rows.items()}
    show({name: [f"{value:.1f}" for value in result.values()] for name, result in rows.items()}, list(next(iter(rows.values()))))
    return rows


# --- Tables: lists of runs --------------------------------------------------------------------------------------------------
# A run is a command that a user can type; a row is the list of runs that leads to one segmenter, the last of them. Rows that begin
# alike share those runs, within a table and between tables.

class Row(NamedTuple):
    """A row of a table: its name and its runs."""
    name: str
    runs: list


class Pair(NamedTuple):
    """Who is distilled into whom on which images, and what all commands of these rows have in common."""
    teacher: str
    student: str
    proxy: str = "imagenet"      # --data of the proxy stage, with its own flags; "" = no such stage (F2F in the paper)
    smaller: str = ""            # a foundation model of the student's size, for comparison
    source: str = "gtav"         # labelled
    on_source: str = ""          # more flags of distill.py on it
    kd: str = ""                 # more flags of the one-stage rows
    tuned: str = "--freeze no"   # stage 2 with the encoder trained at a tenth of the decoder's rate
    before: tuple = ()           # the runs that make the teacher
    common: str = ""             # flags of every command
    out: str = ""                # folder of the runs that do not depend on the source
    here: str = ""               # folder of those that do


F2L_B = Pair("dinov2_vitl14", "deit_base_distilled", smaller="dinov2_vitb14")
F2L_S = Pair("dinov2_vitb14", "deit_small_distilled", smaller="dinov2_vits14")
PAIRS = {"DINOv2-L -> DeiT-B": F2L_B, "DINOv2-B -> DeiT-S": F2L_S,
         "DINOv2-L -> DINOv2-B": Pair("dinov2_vitl14", "dinov2_vitb14", ""), "DINOv2-B -> DINOv2-S": Pair("dinov2_vitb14", "dinov2_vits14", ""),
         "EVA02-L -> EVA02-B": Pair("eva02_large", "eva02_base", ""), "EVA02-B -> EVA02-S": Pair("eva02_base", "eva02_small", ""),
         "DINOv2-L -> DINO-B": F2L_B._replace(student="dino_vitb16"), "DINOv2-B -> DINO-S": F2L_S._replace(student="dino_vits16")}


SMALL = ("toy", "camvid")  # worlds for two CPU cores


def small_pair(world, out, seed, root):
    """The pair of a small world, one seed of it."""
    out = f"{shlex.quote(out)}/{world}/{seed}"
    common = f"--root {shlex.quote(root)} --seed {seed}"
    if world == "toy":  # the teacher is trained on a wide world of looks, the student starts from random weights
        wide = f"segment.py --data toy-wide --encoder toy_base --freeze no --decoder linear {common} --out {out}/teacher"
        return Pair(f"{out}/teacher/segmenter.pt", "toy_small", "toy-proxy", "", "toy", tuned="--freeze no --lr_backbone 2e-4",
                    before=(wide,), common=common, out=out, here=out)
    # camvid: real images; an ImageNet ViT-Ti is the teacher, the first 3 of 12 blocks of another the student
    kd = "--target_norm layernorm"
    small = f"--patch 16 --batch 16 --lr 5e-4 --lr_rule constant --repeats 1 --workers 1 {kd}"
    return Pair("vit_tiny_augreg", "deit_tiny --depth 3", f"imagenet --size 128 --budget 400 {small}", "", "camvid",
                f"--size 160 --budget 200 {small}", kd, common=common, out=out, here=out)


def paper_pair(title, source, out, root):
    """A pair of the paper, on one of its labelled sources."""
    folder = f"{shlex.quote(out)}/paper/{title.replace(' -> ', '-to-').lower()}"
    return PAIRS[title]._replace(source=source, common=f"--root {shlex.quote(root)}", out=folder, here=f"{folder}/{source}")


def distilled(p, loss, flags="", name=None, proxy=True, source=None):
    """Stage 1, on the proxy set and then on source images: its runs, and the student they make."""
    name, runs, student, stages = name or loss, [*p.before], p.student.replace("--depth", "--student_depth"), []
    if proxy and p.proxy:
        stages.append((p.proxy, f"{p.out}/{name.split('-on-')[0]}-proxy"))  # shared by all choices of sources
    for images, out in [*stages, (f"{source or p.source} {p.on_source}", f"{p.here}/{name}-source")]:
        runs.append(line(f"distill.py --data {images} --loss {loss} {flags} --teacher {p.teacher} --student {student} {p.common} --out {out}"))
        student = f"{out}/student.pt"
    return runs, student


def task(p, name, encoder, flags="", source=None):
    """Stage 2, or a one-stage baseline: its command."""
    return line(f"segment.py --data {source or p.source} --encoder {encoder} {flags} {p.common} --out {p.here}/{name}")


def line(text):
    return " ".join(text.split())  # flags that a row does not have leave no gap


def two_stage(p, loss="qsd", flags="", name=None, proxy=True, then="", suffix=""):
    """The runs of two-stage distillation; `then` are stage 2's flags, `suffix` what its folder's name adds for them."""
    runs, student = distilled(p, loss, flags, name, proxy)
    return [*runs, task(p, (name or loss) + suffix, student, then)]


def one_stage(p, loss, flags="", suffix=""):
    return [*p.before, task(p, f"one-stage-{loss}{suffix}", p.student, f"--freeze no --kd 1 --loss {loss} {p.kd} --teacher {p.teacher} {flags}")]


def no_kd(p, flags="", suffix=""):
    if p.student.startswith(("dinov2", "eva02")):  # a foundation model as it is: frozen, as the paper's teachers
        return [task(p, f"student-frozen{suffix}", p.student, flags)]
    return [task(p, f"no-kd{suffix}", p.student, f"--freeze no {flags}")]


def teacher(p):
    return [*p.before, task(p, "teacher-frozen", p.teacher)]


def main_rows(p):
    return [Row("no KD", no_kd(p)), Row("one-stage MSE", one_stage(p, "mse")), Row("two-stage MSE", two_stage(p, "mse")),
            Row("GKD (QSD)", two_stage(p)), Row("teacher", teacher(p))]


def rivals(p, losses):
    titles = {"mse": "Vanilla KD", "cwd": "CWD", "afdcd": "Af-DCD", "g2sd": "G2SD", "vitkd": "ViTKD", "proteus": "Proteus"}
    smaller = [Row("foundation model of that size", [task(p, "smaller-frozen", p.smaller)])] if p.smaller else []
    return [Row("teacher", teacher(p)), *smaller, Row("student", no_kd(p)), *[Row(f"+ {titles[loss]}", one_stage(p, loss)) for loss in losses],
            Row("+ GKD", two_stage(p))]


def label_fractions(p):
    kinds = {"student": no_kd, "+ Af-DCD": lambda p, flags, suffix: one_stage(p, "afdcd", flags, suffix),
             "+ GKD": lambda p, flags, suffix: two_stage(p, then=flags, suffix=suffix)}
    shares = {"1/16": "-1of16", "1/8": "-1of8", "1/4": "-1of4", "all": ""}
    return [Row(f"{title}, {share} labels", runs(p, f"--labels {share}" if suffix else "", suffix))
            for title, runs in kinds.items() for share, suffix in shares.items()]


def strategies(p):
    return [Row("one-stage MSE", one_stage(p, "mse")), Row("one-stage QSD", one_stage(p, "qsd")),
            *[Row(title, two_stage(p, loss)) for title, loss in (("MSE", "mse"), ("CWD", "cwd"), ("ViTKD", "vitkd"), ("QSD", "qsd"))]]


def components(p):
    tuned = dict(then=p.tuned, suffix="-tuned")
    return [Row("one-stage MSE", one_stage(p, "mse")),
            Row("MSE on source images", two_stage(p, "mse", name="mse-only", proxy=False, **tuned)),
            Row("MSE, proxy set first", two_stage(p, "mse", **tuned)),
            Row("QSD: CLS and features", two_stage(p, "qsd", "--beta 0", "qsd-unmasked", **tuned)),
            Row("QSD: with masked patches", two_stage(p, "qsd", **tuned)),
            Row("QSD, encoder frozen", two_stage(p))]


def decoders(p):
    linear = [("linear", "--decoder linear", "-linear")] if p.source in SMALL else []
    kinds = linear + [("SemFPN", "--decoder fpn", "-fpn"), ("mask decoder", "", "")]
    made = [("GKD", two_stage(p))] + ([("teacher", teacher(p))] if p.source in SMALL else [])
    return [Row(f"{title}, {kind}", [*runs[:-1], line(runs[-1].replace(" --out", f" {flags} --out")) + suffix])
            for title, runs in made for kind, flags, suffix in kinds]


def more_sources(p):
    """Figure 6: further sources in distillation only, or with their labels as well."""
    joined = data.TOY_SOURCES if p.source == "toy" else (p.source, "synthia", "urbansyn")
    rows = [Row("1 source", two_stage(p))]
    for n in (2, 3):
        source = "+".join(joined[:n])
        runs, student = distilled(p, "qsd", name=f"qsd-on-{n}", source=source)
        rows += [Row(f"{n} sources, labels of 1", [*runs, task(p, f"qsd-on-{n}-labels-1", student)]),
                 Row(f"{n} sources, all labels", [*runs, task(p, f"qsd-on-{n}", student, source=source)])]
    return rows


def equal_seconds(p, seconds=30):
    """What each objective makes of the same wall-clock time in each stage; run it on an idle machine."""
    variants = {"MSE": "mse", "Proteus": "proteus", "QSD": "qsd", "QSD, scale C^-1/2": "qsd --scale sqrt",
                "QSD, identity attention": "qsd --attention identity", "QSD, teacher's attention": "qsd --attention teacher",
                "QSD, four layers": "qsd --layers four", "QSD, LayerNorm targets": "qsd --target_norm layernorm"}
    rows = []
    for title, text in variants.items():
        loss, _, flags = text.partition(" ")
        name = text.replace(" --", "-").replace(" ", "-") + f"-{seconds}s"
        rows.append(Row(title, two_stage(p, loss, f"{flags} --budget {seconds}s", name)))
    return rows


class Table(NamedTuple):
    """A table: its rows as a function of the pair, and what the paper reports, a line per row and pair."""
    title: str
    rows: Callable
    settings: dict = {}  # a key of data.SETTINGS -> how many of a line's numbers are its: a number per domain and their mean, or the mean
    paper: dict = {}     # a key of PAIRS -> lines of numbers in the order of the settings


CITY_WEATHER_AIR = {"gtav": 4, "cityscapes": 5, "potsdam-rgb": 3}
TABLES = {
    "main": Table("The paper in one table", main_rows),
    "clock": Table("Equal seconds in each stage of distillation", equal_seconds),
    "1": Table("Table 1, foundation to local", partial(rivals, losses=("mse", "cwd", "afdcd", "g2sd", "vitkd", "proteus")), CITY_WEATHER_AIR, {
        "DINOv2-L -> DeiT-B": """
            63.3 56.1 63.9 61.1  54.6 69.4 78.9 72.6 68.9  76.7 63.4 70.1
            59.6 54.3 62.6 58.8  49.9 67.6 77.5 69.9 66.2  72.3 55.9 64.1
            43.1 41.8 47.7 44.2  28.1 47.2 64.1 48.5 47.0  67.5 34.1 50.8
            48.5 48.2 53.2 49.9  33.2 55.7 71.3 57.0 54.3  69.0 42.9 56.0
            49.3 46.7 51.8 49.3  33.1 53.8 70.5 54.1 52.9  70.0 41.5 55.8
            48.4 45.2 53.4 49.0  31.7 54.3 67.3 55.3 52.1  69.5 42.5 56.0
            50.8 49.1 53.4 51.1  33.1 55.7 69.5 56.8 53.8  72.4 46.7 59.5
            45.1 45.6 49.8 46.8  31.1 55.2 66.3 52.8 51.4  67.8 39.8 53.8
            48.1 46.4 52.8 49.1  32.5 54.6 69.4 54.6 52.8  70.1 43.5 56.8
            58.3 54.2 61.3 57.9  43.8 69.4 76.7 68.4 64.6  74.5 55.6 65.1""",
        "DINOv2-B -> DeiT-S": """
            59.6 54.3 62.6 58.8  49.9 67.6 77.5 69.9 66.2  72.3 55.9 64.1
            53.2 51.3 57.1 53.9  39.3 64.1 68.7 61.0 58.3  73.9 54.0 64.0
            34.9 33.8 42.8 37.2  22.7 43.0 55.0 42.2 40.7  67.6 28.7 48.2
            45.0 44.2 49.9 46.4  31.4 51.3 63.6 50.1 49.1  70.3 37.6 54.0
            45.9 44.5 49.8 46.7  31.7 51.0 64.7 52.6 50.0  70.4 38.6 54.5
            44.7 45.6 50.9 47.1  31.6 49.9 70.1 49.9 50.4  71.2 38.2 54.7
            45.2 45.9 52.3 47.8  33.5 51.4 65.6 54.2 51.2  72.7 40.2 56.5
            42.5 42.5 48.2 44.4  28.0 51.3 65.1 45.9 47.6  62.9 34.9 48.9
            47.4 44.6 50.2 47.4  32.8 51.3 62.1 49.3 48.9  70.8 38.5 54.7
            54.9 49.8 57.8 54.1  39.3 60.4 72.7 58.4 57.7  73.8 48.7 61.3"""}),
    "2": Table("Table 2, foundation to foundation", partial(rivals, losses=("mse", "afdcd", "vitkd", "proteus")), CITY_WEATHER_AIR, {
        "DINOv2-L -> DINOv2-B": """
            63.3 56.1 63.9 61.1  54.6 69.4 78.9 72.6 68.9  76.7 63.4 70.1
            59.6 54.3 62.6 58.8  49.9 67.6 77.5 69.9 66.2  72.3 55.9 64.1
            59.9 54.5 60.2 58.2  48.6 68.0 79.4 70.5 66.6  75.9 52.9 64.4
            59.5 53.0 60.0 57.5  48.9 68.0 79.1 71.0 66.7  76.2 52.3 64.3
            58.0 53.0 59.3 56.7  46.6 67.6 77.1 69.6 65.2  75.5 51.6 63.6
            60.1 54.6 61.4 58.7  48.3 67.6 79.7 71.1 66.7  75.6 53.5 64.6
            62.6 55.0 61.8 59.8  48.3 71.3 80.3 72.0 68.0  75.4 56.4 65.9""",
        "DINOv2-B -> DINOv2-S": """
            59.6 54.3 62.6 58.8  49.9 67.6 77.5 69.9 66.2  72.3 55.9 64.1
            53.2 51.3 57.1 53.9  39.3 64.1 68.7 61.0 58.3  73.9 54.0 64.0
            52.9 49.4 56.3 52.9  38.6 62.6 73.8 61.8 59.2  76.5 48.9 62.7
            54.0 50.2 55.7 53.3  37.5 63.2 75.4 59.3 58.8  74.2 42.6 58.4
            49.9 49.1 55.7 51.6  37.8 62.9 73.5 60.3 58.6  71.7 43.7 57.7
            53.5 49.7 56.9 53.4  37.6 62.5 74.9 62.6 59.4  76.0 42.5 59.3
            57.1 51.3 58.4 55.6  39.2 62.6 75.5 62.2 59.9  74.0 53.5 63.8""",
        "EVA02-L -> EVA02-B": """
            58.4 52.5 59.0 56.7  39.1 64.9 73.3 62.6 60.0  74.8 48.8 61.8
            56.2 53.0 59.4 56.2  46.1 65.1 76.7 62.6 62.6  74.7 51.6 63.2
            54.4 53.2 59.4 55.7  43.5 65.2 75.3 62.5 61.6  71.4 47.4 59.4
            55.8 52.9 58.0 55.6  46.4 65.8 75.4 63.5 62.7  72.8 47.5 60.2
            48.6 50.2 55.2 51.3  32.5 59.2 68.4 56.6 54.2  71.2 44.2 57.7
            53.7 52.8 59.4 55.3  45.4 64.7 74.2 61.1 61.4  73.5 48.6 61.1
            59.0 54.5 61.0 58.2  46.9 67.8 77.1 65.8 64.4  76.4 57.9 67.2""",
        "EVA02-B -> EVA02-S": """
            45.9 44.1 49.8 46.6  20.9 54.6 63.3 48.7 46.9  66.4 34.0 50.2
            48.5 47.0 52.8 49.4  37.6 56.4 70.8 54.4 54.8  69.4 42.8 56.1
            47.5 46.2 52.2 48.6  34.1 57.1 69.7 52.1 53.2  69.9 42.2 56.1
            48.3 47.2 52.1 49.2  36.1 56.8 70.9 55.0 54.7  70.3 42.6 56.5
            43.3 42.1 47.7 44.4  28.9 52.2 66.1 49.7 49.2  66.0 34.8 50.4
            47.1 45.1 51.1 47.8  34.0 56.3 70.8 50.6 52.9  68.4 41.8 55.1
            51.1 45.9 53.7 50.2  36.0 59.0 71.2 55.8 55.5  71.7 45.7 58.7"""}),
    "3": Table("Table 3, fewer labels", label_fractions, {"gtav": 1, "cityscapes": 1}, {
        "DINOv2-L -> DINOv2-B": "58.3 62.1\n 58.4 63.9\n 58.7 64.1\n 58.8 66.2\n 56.2 60.9\n 56.6 62.2\n 56.9 63.9\n 57.5 66.7\n"
                                "58.4 62.3\n 58.6 64.7\n 59.1 64.9\n 59.8 67.2",
        "DINOv2-B -> DINOv2-S": "52.4 53.0\n 53.0 55.0\n 53.5 56.8\n 53.9 58.3\n 48.9 52.3\n 49.7 55.2\n 52.4 57.4\n 53.3 58.8\n"
                                "54.7 54.7\n 55.0 56.5\n 55.3 57.6\n 55.6 59.9",
        "DINOv2-L -> DeiT-B": "42.1 39.1\n 42.1 42.6\n 43.2 43.4\n 44.2 47.0\n 47.4 45.2\n 48.4 48.9\n 49.0 50.4\n 49.0 52.1\n"
                              "56.5 59.1\n 56.8 60.0\n 56.8 61.2\n 57.9 64.6",
        "DINOv2-B -> DeiT-S": "35.7 32.7\n 36.7 38.0\n 37.5 38.2\n 37.2 40.7\n 46.0 43.6\n 46.1 46.5\n 46.2 49.0\n 47.1 50.4\n"
                              "51.4 54.6\n 51.5 54.8\n 53.6 57.0\n 54.1 57.7"}),
    "4": Table("Table 4, one stage or two", strategies, {"gtav": 4}, {"DINOv2-B -> DeiT-S": """
            45.0 44.2 49.9 46.4
            48.9 46.5 51.1 48.8
            54.2 49.0 56.1 53.1
            53.0 48.9 53.8 51.9
            53.2 48.7 55.0 52.3
            54.9 49.8 57.8 54.1"""}),
    "5": Table("Table 5, component by component", components, {"gtav": 1}, {"DINOv2-B -> DeiT-S": "46.4\n 50.9\n 53.1\n 53.4\n 54.0\n 54.1"}),
    "6": Table("Table 6, GKD beside domain generalisation methods", lambda p: [Row("GKD", two_stage(p))], {"gtav": 4, "gtav-acdc": 1}, {
        "DINOv2-B -> DeiT-S": "54.9 49.8 57.8 54.1  46.5", "DINOv2-L -> DeiT-B": "58.3 54.2 61.3 57.9  51.2"}),
    "7": Table("Table 7, decoders", decoders, {"gtav": 4, "cityscapes": 5}, {
        "DINOv2-L -> DeiT-B": """
            55.5 54.0 59.5 56.3  43.2 67.5 75.3 67.8 63.5
            58.3 54.2 61.3 57.9  43.8 69.4 76.7 68.4 64.6""",
        "DINOv2-B -> DeiT-S": """
            54.7 50.6 56.6 54.0  38.6 61.5 71.7 61.9 58.4
            54.9 49.8 57.8 54.1  39.3 60.4 72.7 58.4 57.7"""}),
    "8": Table("Table 8, students from DINO", partial(rivals, losses=("mse", "cwd", "afdcd")), {"gtav": 4, "cityscapes": 5}, {
        "DINOv2-L -> DINO-B": """
            63.3 56.1 63.9 61.1  54.6 69.4 78.9 72.6 68.9
            59.6 54.3 62.6 58.8  49.9 67.6 77.5 69.9 66.2
            44.5 42.7 49.2 45.4  29.0 51.1 65.6 46.7 48.1
            47.9 45.0 51.7 48.2  32.5 53.2 63.3 52.4 50.3
            45.0 44.8 49.5 46.4  29.3 52.0 67.2 55.9 51.1
            47.1 46.4 50.0 47.8  31.1 53.9 66.1 52.6 50.9
            60.5 53.6 61.1 58.4  43.2 63.2 75.6 61.0 60.7""",
        "DINOv2-B -> DINO-S": """
            59.6 54.3 62.6 58.8  49.9 67.6 77.5 69.9 66.2
            53.2 51.3 57.1 53.9  39.3 64.1 68.7 61.0 58.3
            39.7 36.9 44.7 40.4  27.8 48.0 66.4 44.5 46.6
            45.4 41.5 47.9 45.0  30.8 52.7 67.9 50.6 50.5
            44.0 41.4 47.1 44.1  30.7 51.4 62.1 51.4 48.9
            44.5 42.6 47.3 44.8  28.7 52.0 68.2 50.4 49.8
            53.2 48.6 55.5 52.4  35.6 59.0 72.4 56.8 55.9"""}),
    "9": Table("Table 9, surgery", lambda p: rivals(p._replace(smaller=""), ("cwd", "vitkd")), {"endovis18": 1}, {
        "DINOv2-B -> DeiT-S": "53.7\n 43.3\n 46.5\n 45.1\n 51.6"}),
    "fig6": Table("Figure 6, more sources", more_sources, {"gtav": 0}, {"DINOv2-L -> DeiT-B": "", "DINOv2-B -> DeiT-S": ""}),
}


class Block(NamedTuple):
    """A table as it is printed, for one pair and one setting: its rows once per seed, the domains, the paper's numbers by row name."""
    title: str
    seeds: list
    source: list   # its own val split in a small world; nothing at the paper's scale
    unseen: list
    paper: dict


def paper_numbers(table, title, setting):
    """The paper's numbers {row name: [one per domain, their mean]}, or [their mean], of a pair on a setting; nothing where it has none."""
    if title not in table.paper or setting not in table.settings:
        return {}
    names = [row.name for row in table.rows(paper_pair(title, data.SETTINGS[setting][0], "", ""))]
    start = sum(list(table.settings.values())[:list(table.settings).index(setting)])
    lines = [[float(x) for x in line.split()] for line in table.paper[title].strip().splitlines()]
    return {name: line[start:start + table.settings[setting]] for name, line in zip(names, lines)}


def blocks(name, cfg):
    """The blocks of a table: one in a small world; at the paper's scale one per pair and setting (all, or --setting's)."""
    table = TABLES[name]
    if cfg.data == "paper":
        chosen = [(title, setting) for title in table.paper for setting in table.settings if cfg.setting in ("none", setting)]
        if not chosen:
            data.fail(f"--table {name} --data paper --setting {cfg.setting}: this table has "
                      f"{' '.join(table.settings) or 'no rows at the paper scale: use --data toy'}")
        return [Block(f"{table.title}: {title}, trained on {setting}",
                      [table.rows(paper_pair(title, data.SETTINGS[setting][0], cfg.out, cfg.root))],
                      [], [*data.SETTINGS[setting][1]], paper_numbers(table, title, setting)) for title, setting in chosen]
    if name == "fig6" and cfg.data != "toy":
        data.fail(f"--table fig6 --data {cfg.data}: has no further sources; use --data toy or paper")
    source, unseen = data.SETTINGS[cfg.data]
    seeds = [table.rows(small_pair(cfg.data, cfg.out, seed, cfg.root)) for seed in range(cfg.seed, cfg.seed + (cfg.seeds or 3))]
    return [Block(f"{table.title}, in the {cfg.data} world", seeds, [source], [*unseen], paper_numbers(table, "DINOv2-B -> DeiT-S", "gtav"))]


def processes(text, cfg):
    """How many processes a run takes: stage 1 one per GPU, their number a power of two as the batch's; stage 2, whose batch is 4, one."""
    if text.startswith("segment"):
        return 1
    gpus = torch.cuda.device_count() or 8
    return cfg.processes or (1 << gpus.bit_length() - 1 if cfg.data == "paper" else 1)


def command(text, cfg):
    """What a user types for a run."""
    world = processes(text, cfg)
    return f"torchrun --standalone --nproc_per_node={world} {text}" if world > 1 else f"python {text}"


def parsed(text):
    """A run's script as a module, its Config and its result's path; UserError where the command is wrong."""
    script, *argv = shlex.split(text)
    module = {"distill.py": distill, "segment.py": segment}[script]
    cfg = data.configure(module.Config, module.PRESETS, argv)
    return module, cfg, Path(cfg.out) / ("student.pt" if module is distill else "segmenter.pt")


def finished(text):
    """Whether a run's result is there; UserError if its folder holds a run with other constants."""
    module, cfg, result = parsed(text)
    return result.exists() and data.open_run(cfg, result.name, module.FREE) == "finished"


def absent(names, root):
    """Folders below root of the sets that are not there."""
    folders = [Path(root, entry.folder) for entry in data.rows(names, labelled=False).values() if not entry.generate]
    return [str(folder) for folder in folders if not folder.is_dir()]


def lacking(text):
    """What a run would need that this machine does not have, or nothing."""
    cfg = parsed(text)[1]
    return absent(cfg.data, cfg.root) + ([] if torch.cuda.is_available() else ["a GPU"])


def run(rows, cfg):
    """Run the commands of some rows that are not finished, --jobs at a time, each process on its share of the cores; a command of several
    rows runs once, and first of all those that most others wait for."""
    needs = {text: set() for row in rows for text in row.runs}
    for row in rows:
        for i, text in enumerate(row.runs):
            needs[text] |= set(row.runs[:i])
    done = {text for text in needs if finished(text)}
    pending = sorted((text for text in needs if text not in done), key=lambda text: -sum(text in before for before in needs.values()))
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // cfg.jobs))  # torch reads it as it is loaded: in the runs
    context = multiprocessing.get_context("forkserver")  # loads torch and torchvision once; each run, a copy, begins seconds sooner
    context.set_forkserver_preload(["torchvision.transforms.v2", "torch.distributed.run"])
    working, signals = {}, data.catch_signals()
    with tqdm(total=len(needs), initial=len(done), desc="runs", unit="run", dynamic_ncols=True) as bar:
        while pending or working:
            for text in [text for text in pending if needs[text] <= done][:cfg.jobs - len(working)]:
                pending.remove(text)
                out = parsed(text)[2].parent
                out.parent.mkdir(parents=True, exist_ok=True)
                said = Path(f"{out}.txt")  # bars of several runs on one terminal would overwrite each other
                said.write_text("")
                process = context.Process(target=execute, args=(text, processes(text, cfg), said))
                process.start()
                working[text] = process, said, time.time()
            wait([process.sentinel for process, _, _ in working.values()], timeout=1)
            for text in [text for text, (process, _, _) in working.items() if process.exitcode is not None and not signals]:
                process, said, began = working.pop(text)
                if process.exitcode:
                    data.fail(f"{command(text, cfg)} ended with status {process.exitcode}: "
                              f"{' '.join(said.read_text().splitlines()[-1:])} (see {said})")
                done.add(text)
                bar.write(f"{command(text, cfg)}  # {time.time() - began:.0f} s", file=sys.stdout)
                bar.update()
            if signals:  # Ctrl-C has reached the runs, too, kill has not: they save their step and end
                for process, _, _ in working.values():
                    process.terminate()
                for process, _, _ in working.values():
                    process.join()
                print(f"stopped by signal {signals[0]}; the same command goes on from there", file=sys.stderr)
                sys.exit(128 + signals[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def execute(text, world, said):
    """Do in this process what a run's command does on a terminal, in `world` processes; what it says goes to a file."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    script, *argv = shlex.split(text)
    sys.argv, status = [str(Path(__file__).parent / script), *argv], 0
    try:
        if world > 1:
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ["OMP_NUM_THREADS"]) // world))
            sys.argv = ["torchrun", "--standalone", f"--nproc_per_node={world}", *sys.argv]
            runpy.run_module("torch.distributed.run", run_name="__main__")
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    sys.exit(status)  # here, where nothing holds the run's loading processes any more: they would be waited for


class Result(NamedTuple):
    """What is known of a finished row."""
    miou: list      # per domain, percent, then the mean of the unseen ones
    seconds: float  # of all stages that led to its encoder and decoder; a distilled one's teacher is not among them
    flops: float    # likewise


def measured(row, block, cfg, device):
    """A finished row's Result, its mIoU kept in eval.json beside its segmenter; None if it is not finished or a domain is not here."""
    path, domains = parsed(row.runs[-1])[2], block.source + block.unseen
    if not path.exists():
        return None
    kept, ledger = path.with_name("eval.json"), torch.load(path, map_location="cpu", weights_only=True)["ledger"]
    protocol = [cfg.mode, cfg.window, cfg.stride, cfg.flip, cfg.scales, cfg.precision, ledger]  # another training, another measurement
    known = json.loads(kept.read_text()) if kept.exists() else {}
    miou = known.get("miou", {}) if known.get("protocol") == protocol else {}
    if missing := "+".join(domain for domain in domains if domain not in miou):
        if absent(missing, cfg.root):
            return None
        miou |= measure(path, *segment.load_segmenter(path, device), replace(cfg, data=missing), device)
        data.write(kept, json.dumps(dict(protocol=protocol, miou=miou)))
    mean = sum(miou[domain] for domain in block.unseen) / len(block.unseen)
    return Result([miou[domain] for domain in domains] + [mean], *(sum(stage[key] for stage in ledger) for key in ("seconds", "flops")))


def prepare(block, cfg):
    """Run what is missing of a block's rows; at the paper's scale only what this machine can, after all missing commands are printed."""
    rows = [row for seed in block.seeds for row in seed]
    outstanding = [text for text in dict.fromkeys(text for row in rows for text in row.runs) if not finished(text)]
    needs = {text: lacking(text) if cfg.data == "paper" else [] for text in outstanding}
    if cfg.data == "paper" or not cfg.run:
        for text in outstanding:
            print(command(text, cfg) + (f"  # needs {' and '.join(needs[text])}" if needs[text] else ""))
    if cfg.run:
        run([row for row in rows if not any(needs.get(text) for text in row.runs)], cfg)


def tabulate(name, block, cfg, device):
    """Print a block: mIoU, in a small world what it took and the paper's mean, at the paper's scale the paper's numbers in brackets.
    Returns whether all its rows could be measured."""
    small, complete, rows, record = cfg.data != "paper", True, {}, {}
    for i, row in enumerate(block.seeds[0]):
        done = [result for seed in block.seeds if (result := measured(seed[i], block, cfg, device))]
        complete = complete and len(done) == len(block.seeds)
        miou, paper = np.array([result.miou for result in done]), block.paper.get(row.name, [])      # (seeds, domains + 1)
        cells = [spread_of(column) for column in miou.T] if done else ["-"] * (len(block.source + block.unseen) + 1)
        if small:
            cells += [f"{np.mean([r.seconds for r in done]):.0f}", f"{np.mean([r.flops for r in done]) / 1e12:.1f}"] if done else ["-", "-"]
            cells += [f"{paper[-1]}" if paper else "-"] if block.paper else []
        else:
            cells = [ours + theirs for ours, theirs in zip(cells, [""] * (len(cells) - len(paper)) + [f" [{x}]" for x in paper])]
        rows[row.name] = cells
        record[row.name] = dict(miou=miou.round(2).tolist(), seconds=[round(r.seconds) for r in done], flops=[r.flops for r in done])
    columns = [*block.source, *block.unseen] + (["unseen mean", "seconds", "TFLOP"] + ["paper"] * bool(block.paper) if small else ["mean"])
    print(f"\n{block.title}" + (", mean and standard deviation of seeds" if len(block.seeds) > 1 else "") + ("" if small else " [paper]"))
    show(rows, columns)
    print(json.dumps({"table": name, "title": block.title, "domains": [*block.source, *block.unseen, "mean"], "rows": record}))
    return complete


def spread_of(values):
    """Mean, and with several seeds their standard deviation, as text."""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def sources_figure(block, path, cfg, device):
    """Figure 6: unseen mIoU against the number of sources, with the further sources' labels and without."""
    means = {row.name: np.mean([measured(seed[i], block, cfg, device).miou[-1] for seed in block.seeds])
             for i, row in enumerate(block.seeds[0])}
    lines = {title: [(1, means["1 source"])] + [(n, means[f"{n} sources, {labels}"]) for n in (2, 3)]
             for title, labels in (("labels of the first source", "labels of 1"), ("labels of all", "all labels"))}
    return data.chart(lines, path, "sources in distillation", "mIoU, mean of the unseen domains", title=block.title, marks=True)


# --- Pictures -----------------------------------------------------------------------------------------------------------

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
    paths = {row.name: parsed(row.runs[-1])[2].parent for row in rows}
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
                columns["label"].append(data.palette(dataset.colors)[label])
            for title, (model, saved) in models.items():
                columns[title].append(data.palette(dataset.colors)[classify(model, saved, image, cfg, device)])
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
    """Draw --figure of --models; where none are given, of the runs of a small world's --table main."""
    path = Path(cfg.out)
    if cfg.models or cfg.data not in SMALL:
        models = named(cfg.models)
    else:
        is_file = path.suffix.lower() in data.SUFFIXES
        folder, path = Path(Config.out if is_file else path, cfg.data, str(cfg.seed)), path if is_file else path / cfg.data
        models, cfg = {name: folder / run for name, run in DRAWN[cfg.figure].items()}, replace(cfg, data="+".join(data.SETTINGS[cfg.data][1]))
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
    config = torch.load(path, map_location="cpu", weights_only=True)["config"]
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
    pen, font, high, wide = ImageDraw.Draw(picture), ImageFont.load_default(30), picture.height / grid[0], picture.width / grid[1]
    pen.rectangle((0, 0, picture.width - 1, picture.height - 1), outline="gray", width=2)
    for number, (row, column) in places.items():
        box = [column * wide, row * high, (column + 1) * wide, (row + 1) * high]
        pen.rectangle(box, outline="white", width=6)
        pen.rectangle(box, outline=(0, 90, 255), width=4)
        pen.text((box[2] + 6, box[1]), str(number), (0, 90, 255), font, stroke_width=2, stroke_fill="white")
    return np.asarray(picture)


def class_bars(models, cfg, path, device):
    """Figure 9: the IoU of each class, and their mean, as bars: a panel for each domain, a colour for each model."""
    loaded = segmenters(models, device)
    classes = [*next(iter(loaded.values()))[1]["classes"], "mean"]
    ious = {name: class_ious(name, model, saved, cfg, device) for name, (model, saved) in loaded.items()}
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
    """mIoU against the FLOPs of all stages that led to each segmenter; those of a distilled one's teacher are not among them."""
    points = {name: [(sum(stage["flops"] for stage in saved["ledger"]), with_mean(measure(name, model, saved, cfg, device))["mean"])]
              for name, (model, saved) in segmenters(models, device).items()}
    data.chart(points, path, "FLOPs of the student's training, all stages (2 per multiply-add; log scale)", f"mIoU, %, mean of {cfg.data}",
               log="x", size=(800, 420), marks=True)


STUDENTS = {"no KD": "no-kd", "one-stage MSE": "one-stage-mse", "two-stage MSE": "mse", "GKD": "qsd"}
STAGES = {"two-stage MSE, proxy": "mse-proxy", "two-stage MSE, source": "mse-source", "GKD, proxy": "qsd-proxy", "GKD, source": "qsd-source"}
FROZEN = {"teacher": "teacher-frozen"}
DRAWN = {  # what each figure shows of a small world where no --models are given: runs of --table main
    "3b": {"one-stage MSE": "one-stage-mse"} | STAGES, "5": FROZEN | {"no KD": "no-kd", "GKD": "qsd"}, "7a": FROZEN | STUDENTS,
    "7b": FROZEN | {"GKD, proxy": "qsd-proxy", "GKD, source": "qsd-source"}, "8": STUDENTS | FROZEN, "9": STUDENTS | FROZEN, "compute": STUDENTS}
FIGURES = {"3b": losses, "5": features, "7a": distance_histogram, "7b": attention_maps, "8": predictions, "9": class_bars,
           "compute": compute}


# --- Encoders without a decoder -------------------------------------------------------------------------------------------

def probes(cfg, device):
    """Print the mIoU of a linear probe on each encoder of --models, trained on the first domain of cfg.data."""
    rows = {name: probe(encoders({name: path}, cfg, device)[name], cfg, device) for name, path in named(cfg.models).items()}
    rows = show_mious(rows)
    print(json.dumps({"probe": cfg.models, "miou": rows}))


def probe(vit, cfg, device, ridge=1e-3):
    """{domain: mIoU in percent}, for the domains of cfg.data that have a val split, of ridge regression from the final patch tokens to the
    share of each class in a patch (h, w, K), in closed form on cfg.subset images; scores are resized to the label as always."""
    source, *_ = data.rows(cfg.data)
    if not any("val" in entry.splits for entry in data.rows(cfg.data).values()):
        data.fail(f"--data {cfg.data}: none of these has a val split to measure the probe on; add one, as in gtav+cityscapes")
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
    return result


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
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with tqdm(files[rank::world], "images", disable=rank > 0, leave=False) as bar:
        for file in bar:
            image = data.read_image(file, mapped=False)  # mapping would unpack TIFFs beside themselves
            picture = Image.fromarray(classify(model, saved, image, cfg, device).numpy())
            picture.putpalette(data.palette(saved["colors"]).tobytes())
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
        path.unlink()
        data.fail(f"{path}: its scores differ from those of {checkpoint} by up to {difference:.1e}")
    print(f"{path}: {'any number of images' if dynamic else 'one image'} (3, {size}, {size}) to {len(saved['classes'])} scores a pixel; "
          f"largest difference from eager mode {difference:.1e}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg = data.configure(Config, PRESETS, argv)
    if cfg.demo and cfg.data == "paper":  # once more, with the toy world's preset
        cfg = data.configure(Config, PRESETS, [*argv, "--data", "toy"])
    if cfg.demo:
        if cfg.table not in ("none", "main"):
            data.fail(f"--demo is --table main: without it, --table {cfg.table} --data toy")
        cfg = replace(cfg, table="main", seeds=cfg.seeds or 1)
    rank, world, device = data.launch()
    if not 0 < cfg.stride <= 1:
        data.fail(f"--stride {cfg.stride} is a share of the window, above 0 and at most 1")
    multiples(cfg)
    if cfg.setting not in ("none", *data.SETTINGS):
        data.fail(f"--setting {cfg.setting}: not one of {' '.join(data.SETTINGS)}")
    if cfg.table != "none":
        if cfg.table not in TABLES:
            data.fail(f"--table {cfg.table}: not one of {' '.join(TABLES)}")
        if cfg.data not in ("paper", *SMALL):
            data.fail(f"--data {cfg.data}: the tables are run in the worlds toy and camvid, or at the paper's scale with --data paper")
        if cfg.setting != "none" and cfg.data != "paper":
            data.fail(f"--setting {cfg.setting}: belongs to the paper's scale, not to --data {cfg.data}")
        if Path(cfg.out).is_file():
            data.fail(f"--out {cfg.out} is a file, not a folder; choose another --out")
        if world > 1:
            data.fail("--demo and --table start their own processes: start them with python")
        for block in blocks(cfg.table, cfg):
            prepare(block, cfg)
            complete = tabulate(cfg.table, block, cfg, device)
            folder = parsed(block.seeds[0][0].runs[-1])[2].parent.parent
            if cfg.table == "fig6" and complete:
                print(f"picture: {sources_figure(block, folder / 'figure-6.png', cfg, device)}")
            if cfg.demo and complete:
                print(f"picture: {picture(block.seeds[0], block.unseen, cfg.root, folder / 'demo.png')}")
        return
    if cfg.setting != "none":
        if cfg.probe:
            data.fail("--probe trains on the first of --data: name source and domains there, not with --setting")
        cfg = replace(cfg, data="+".join(data.SETTINGS[cfg.setting][1]))
    if cfg.figure != "none" or cfg.probe:
        if world > 1:
            data.fail("--figure and --probe run in one process: start them with python")
        if min(cfg.examples, cfg.subset, cfg.tokens) < 1:
            data.fail("--examples, --subset and --tokens are at least 1")
        if cfg.data == "paper" and cfg.figure != "3b":
            data.fail("say on which images with --data or --setting")
        return figure(cfg, device) if cfg.figure != "none" else probes(cfg, device)
    if not cfg.checkpoint:
        data.fail("give --checkpoint segmenter.pt and --data or --setting, or --demo, --table or --figure")
    if cfg.images:
        return segment_images(cfg, rank, world, device)
    if cfg.export:
        return export(cfg.checkpoint, Path(cfg.export), cfg.dynamic) if rank == 0 else None
    if cfg.data == "paper":
        data.fail("say on which images with --data or --setting")
    result = measure(cfg.checkpoint, *segment.load_segmenter(cfg.checkpoint, device), cfg, device)
    if rank == 0:
        rows = show_mious({cfg.checkpoint: result})
        print(json.dumps({"checkpoint": cfg.checkpoint, "miou": rows[cfg.checkpoint]}))


if __name__ == "__main__":
    data.cli(main, qsd.UserError)
