"""mIoU on domains nobody trained on, the paper's tables as lists of runs, and the demo.

    python eval.py --demo                                             # the whole method in the built-in toy world
    python eval.py --checkpoint runs/gtav/segmenter.pt --data cityscapes+bdd100k+mapillary --root /data
    torchrun --standalone --nproc_per_node=8 eval.py ...              # the same numbers, sooner
"""
import json
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
    batch: int = 1                 # images at once; more than 1 needs images of one size
    workers: int = 2               # image-loading processes
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # official: fp32
    # the paper in the toy world
    table: Literal["none", "main", "7"] = "none"  # run the rows of this table for --data toy or camvid, and print it
    demo: bool = False             # --table main, and the picture
    seed: int = 0                  # of the table's runs
    jobs: int = 2                  # rows that run side by side, each process on its share of the cores
    out: str = "runs/demo"         # the folder of the table's runs, and of demo.png


PRESETS = {name: dict(batch=50, workers=0) for name in data.DATASETS if name.startswith("toy")} | {"camvid": dict(batch=8, workers=1)}


# --- What is measured -------------------------------------------------------------------------------------------------------

def measure(checkpoint, cfg, device):
    """mIoU in percent of a segmenter on each domain of cfg.data, and their plain mean as "mean"."""
    model, saved = segment.load_segmenter(checkpoint, device)
    result = {}
    for name in data.rows(cfg.data):
        own = name == "folder"
        if not own and list(data.DATASETS[name].classes) != saved["classes"]:
            data.fail(f"--data {name} has the classes {', '.join(data.DATASETS[name].classes)}, but {checkpoint} was trained on others")
        dataset = data.scenes(name, cfg.root, "val", data.eval_transform(name), classes=len(saved["classes"]) if own else None)
        with data.precision(cfg.precision, device):
            conf = evaluate(model, dataset, cfg.window or saved["config"]["size"], device, cfg.stride, cfg.mode == "whole", cfg.flip,
                            cfg.batch, cfg.workers, name)
        result[name] = 100 * iou(conf).nanmean().item()
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


def principal(tokens):
    """The three leading principal components (M, 3) of tokens (M, C), each of variance 1."""
    x = tokens - tokens.mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False)[2][:3].T
    return x / x.std(0)


@torch.no_grad()
def picture(rows, domains, root, path, images=8):
    """Draw images of the unseen domains: input, label, predictions, and features in the colours of their three principal components."""
    models = {row.name: segment.load_segmenter(Path(row.runs[-1].split(" --out ")[1]) / "segmenter.pt") for row in rows}
    featured, predicted = ("teacher", "no KD", "two-stage MSE", "GKD (QSD)"), ("no KD", "two-stage MSE", "GKD (QSD)")
    columns = {"image": [], "label": []} | {name: [] for name in predicted} | {f"PCA: {name}": [] for name in featured}
    tokens, grids, titles = {name: [] for name in featured}, [], []
    for domain in domains:
        dataset = data.scenes(domain, root, "val")
        for i in range(0, len(dataset), -(-len(dataset) * len(domains) // images)):  # evenly spread
            image, label, _ = dataset[i]
            columns["image"].append(image.permute(1, 2, 0).numpy())
            columns["label"].append(colorize(label, dataset.colors))
            for name, (model, saved) in models.items():
                x = data.normalize(image[None], model.encoder.mean, model.encoder.std)
                if name in predicted:
                    scores = predict(model, x, saved["config"]["size"])
                    columns[name].append(colorize(scores[0].argmax(0).byte(), dataset.colors))
                if name in featured:
                    patch = model.encoder.patch_size
                    h, w = x.shape[2] // patch, x.shape[3] // patch
                    tokens[name].append(model.encoder(x[:, :, :h * patch, :w * patch])[1][0])
            grids.append((h, w))
            titles.append(domain.removeprefix("toy-").removeprefix("camvid-"))
    teacher = principal(torch.cat(tokens["teacher"]))
    for name in featured:  # components have no natural order or sign: each model's are turned onto the teacher's as a whole
        own = principal(torch.cat(tokens[name]))
        U, _, Vh = torch.linalg.svd(own.T @ teacher)
        rgb = ((own @ U @ Vh) / 5 + 0.5).clamp(0, 1)                         # two and a half deviations either side
        columns[f"PCA: {name}"] = [(part.view(h, w, 3) * 255).byte().numpy()
                                   for part, (h, w) in zip(rgb.split([h * w for h, w in grids]), grids)]
    return sheet(columns, titles, dataset.classes, dataset.colors, path)


def sheet(columns, titles, classes, colors, path, width=136, gap=4, top=28, left=52):
    """Write {column title: [RGB arrays]} as one picture with a title per row and a legend of the classes; returns the path."""
    font, first = ImageFont.load_default(13), columns["image"][0]
    height = width * first.shape[0] // first.shape[1]
    canvas = Image.new("RGB", (left + len(columns) * (width + gap), top + len(titles) * (height + gap) + 32), "white")
    pen = ImageDraw.Draw(canvas)
    for j, (name, cells) in enumerate(columns.items()):
        x = left + j * (width + gap)
        pen.text((x + width / 2, top - 8), name, "black", font, anchor="ms")
        for i, cell in enumerate(cells):
            canvas.paste(Image.fromarray(cell).resize((width, height), Image.Resampling.NEAREST), (x, top + i * (height + gap)))
    for i, name in enumerate(titles):
        pen.text((left - 8, top + i * (height + gap) + height / 2), name, "black", font, anchor="rm")
    x = left
    for name, color in zip(classes, colors):
        pen.rectangle((x, canvas.height - 24, x + 14, canvas.height - 10), tuple(color), "gray")
        pen.text((x + 20, canvas.height - 17), name, "black", font, anchor="lm")
        x += 36 + font.getlength(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


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
    if not cfg.checkpoint:
        data.fail("give --checkpoint segmenter.pt and --data, or --demo")
    result = measure(cfg.checkpoint, cfg, device)
    if rank == 0:
        show({cfg.checkpoint: result}, list(result))
        print(json.dumps({"checkpoint": cfg.checkpoint, "miou": result}))


if __name__ == "__main__":
    data.cli(main, qsd.UserError)
