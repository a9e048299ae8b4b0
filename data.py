"""Every dataset of the paper, read from its original download without conversion, and the augmentations of both stages;
at the end what every script shares: flags, processes, checkpoints, the log.

An image is a uint8 tensor (3, H, W), a label an int64 tensor (H, W) of class numbers with 255 = ignore. A domain is a
row of DATASETS; sources join with "+" (gtav+synthia+urbansyn). Check a download, or store it at training size:

    python data.py --data gtav --root /data --out gtav.png  # opens every file; exit status 1 if something is wrong
    python data.py --data gtav --root /data --cache 512     # 25k slow PNGs -> mapped pixels with short side 512
"""
import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import typing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

IGNORE = 255  # label of a pixel that no loss and no metric sees
UNKNOWN = 254  # a label value that the dataset's table does not name: always an error
FILL = (124, 116, 104)  # the mean as a pixel, for what lies outside an image: 0 after normalisation
BAD_SHARE = 0.01  # share of the training images that may be unreadable before a run stops
LABEL_SEED = 0  # of the subset that labels="1/16" takes: the same images in every run
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # of bad files


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, in which file or flag."""

    def __str__(self):
        return super().__str__().split("UserError: ")[-1].strip()  # a loader's worker wraps the line in its traceback


# --- Files to pixels --------------------------------------------------------------------------------------------------

def read_image(path, mapped=True):
    """Read an image as RGB, uint8 (3, H, W); TIFFs, if mapped, and stored .npy files are mapped: a crop reads its own rows only."""
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, mmap_mode="c")).permute(2, 0, 1)
        if path.suffix.lower() in (".tif", ".tiff") and mapped:
            return torch.from_numpy(map_tiff(path)).permute(2, 0, 1)
        if path.suffix.lower() in (".jpg", ".jpeg"):
            try:
                return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)  # twice as fast as Pillow
            except RuntimeError:
                pass  # not a JPEG after all (ImageNet has a PNG): Pillow looks at the content
        return torch.from_numpy(read_rgb(path)).permute(2, 0, 1)
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def read_rgb(path):
    """Read any kind of image with Pillow as uint8 (H, W, 3)."""
    return np.array(to_rgb(Image.open(path)))


def to_rgb(image):
    """A Pillow image of any mode as RGB; 16-bit grey is scaled to 8 bits, where Pillow itself would cut it off at 255."""
    if image.mode == "RGB":
        return image  # convert would copy the pixels once more
    if image.mode[0] in "IF":  # I;16, and in older files I
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{image.mode} pixels from {values.min()} to {values.max()}, of which none is known to be white")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB")


def map_tiff(path):
    """Map a TIFF as uint8 (H, W, 3): as it lies if its pixels are raw, else from a copy unpacked once beside it."""
    unpacked = path.with_name(path.name + ".npy")
    if not unpacked.exists():
        with Image.open(path) as image:
            ends, raw = image.tile[0][2], image.mode == "RGB"
            for codec, (left, _, right, bottom), start, _ in image.tile:  # strips of rows without gaps?
                raw &= codec == "raw" and start == ends and left == 0 and right == image.width
                ends = image.tile[0][2] + bottom * image.width * 3
            if raw:
                return np.memmap(path, np.uint8, "c", image.tile[0][2], (image.height, image.width, 3))
            part, pixels = path.with_name(f"{path.name}.{os.getpid()}.part"), np.asarray(to_rgb(image))
            with open(part, "wb") as file:
                np.save(file, pixels)
            os.replace(part, unpacked)  # whole or absent, whoever else unpacks it now
    return np.load(unpacked, mmap_mode="c")


def resize(image, size, mode=InterpolationMode.BILINEAR, antialias=False):
    """Resize (3, H, W) to size (width, height); without antialias as mmsegmentation does."""
    return F.resize(image, [size[1], size[0]], mode, antialias=antialias)


def resize_label(label, size):
    """Resize (H, W) to size (width, height): the nearest pixel's class, by the same pixel centres as the image."""
    return F.resize(label[None], [size[1], size[0]], InterpolationMode.NEAREST_EXACT)[0]


# --- Files to labels: each decoder takes a path and returns uint8 (H, W), 255 = ignore --------------------------------

def known(path, label, values):
    """The label, unless some of the file's values are in no table."""
    if (label == UNKNOWN).any():
        listed = np.unique(values[label == UNKNOWN], axis=0)[:8].tolist()
        raise UserError(f"{path}: label values {listed} are not among the dataset's classes")
    return label


def lookup_table(classes):
    """256 entries from {label value: class}."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[IGNORE] = IGNORE
    table[list(classes)] = list(classes.values())
    return table


def by_value(path, table):
    """Class = table[value]; of a palette file the indices are the values, never the colours."""
    values = np.asarray(Image.open(path))
    if values.ndim != 2 or values.dtype != np.uint8:
        raise UserError(f"{path}: is {values.dtype} with shape {values.shape}, but one 8-bit channel was expected")
    return known(path, table[values], values)


def by_color(path, colors, unknown=UNKNOWN):
    """Class = position of the pixel's colour in `colors`; an alpha channel is dropped."""
    rgb = read_rgb(path)
    packed = rgb @ np.array([1 << 16, 1 << 8, 1], np.int32)
    label = np.full(packed.shape, unknown, np.uint8)
    for number, (red, green, blue) in enumerate(colors):
        label[packed == (red << 16 | green << 8 | blue)] = number
    return known(path, label, rgb)


def cityscapes_label(path):
    """labelIds or labelTrainIds, told apart by the file's name; some mirrors of GTAV hold colours instead."""
    if "TrainIds" in path.name:
        return by_value(path, TRAIN_IDS)
    if Image.open(path).mode in ("RGB", "RGBA"):
        return by_color(path, CITYSCAPES_COLORS, unknown=IGNORE)
    return by_value(path, LABEL_IDS)


def synthia_label(path):
    """The class is the first channel of a 16-bit PNG, of which Pillow would return the high bytes: zeros."""
    image = Image.open(path)
    image.tile = [(codec, box, start, "RGB;16L") for codec, box, start, _ in image.tile]  # the low bytes
    values = np.asarray(image)[..., 0]
    return known(path, SYNTHIA_IDS[values], values)


def endovis_label(path):
    label = by_color(path, ENDOVIS_COLORS + ((12, 255, 141),))
    label[label == len(ENDOVIS_COLORS)] = IGNORE  # the ultrasound probe is not evaluated
    return label


def isprs_label(path, box=None):
    """Six colours, and black for void; channels are cut at 127 because tiles 4_12 and 6_7 hold shades of them."""
    rgb = crop(read_image(path), box).numpy()
    red, green, blue = rgb > 127
    return known(path, ISPRS_CLASS_OF[red * 4 + green * 2 + blue], np.moveaxis(rgb, 0, 2))


def crop(image, box):
    return image if box is None else image[:, box[1]:box[3], box[0]:box[2]]  # box: left, top, right, bottom


# --- Class names, colours, lookup tables ------------------------------------------------------------------------------

CITYSCAPES_CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                      "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
                      "bicycle")
CITYSCAPES_COLORS = ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                     (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
                     (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))
ISPRS_CLASSES = ("impervious", "building", "low vegetation", "tree", "car", "clutter")
ISPRS_COLORS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
ENDOVIS_CLASSES = ("background", "instrument shaft", "instrument clasper", "instrument wrist", "kidney",
                   "covered kidney", "thread", "clamps", "needle", "suction", "small intestine")
ENDOVIS_COLORS = ((0, 0, 0), (0, 255, 0), (0, 255, 255), (125, 255, 12), (255, 55, 0), (24, 55, 125), (187, 155, 25),
                  (0, 255, 125), (255, 255, 125), (123, 15, 175), (124, 155, 5))
CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                  "bicyclist")
CAMVID_COLORS = ((70, 130, 180), (70, 70, 70), (153, 153, 153), (128, 64, 128), (244, 35, 232), (107, 142, 35),
                 (220, 220, 0), (190, 153, 153), (0, 0, 142), (220, 20, 60), (119, 11, 32))

TRAIN_IDS = lookup_table({number: number for number in range(19)})
URBANSYN_IDS = lookup_table({number: number for number in range(19)} | {19: IGNORE})
CAMVID_IDS = lookup_table({number: number for number in range(11)} | {11: IGNORE})
LABEL_IDS = lookup_table(dict.fromkeys(range(35), IGNORE) | {value: number for number, value in enumerate(
    (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))})  # Cityscapes, GTAV and ACDC
SYNTHIA_IDS = lookup_table(dict.fromkeys(range(23), IGNORE) | {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15, 20: 16,
    12: 17, 11: 18})
MAPILLARY_IDS = lookup_table(dict.fromkeys(range(66), IGNORE) | {
    2: 1, 3: 4, 6: 3, 7: 0, 8: 0, 9: 1, 10: 0, 11: 1, 13: 0, 14: 0, 15: 1, 17: 2, 19: 11, 20: 12, 21: 12, 22: 12,
    23: 0, 24: 0, 27: 10, 29: 9, 30: 8, 44: 5, 45: 5, 46: 7, 47: 5, 48: 6, 49: 7, 50: 7, 52: 18, 54: 15, 55: 13, 57: 17,
    58: 16, 61: 14})
ISPRS_CLASS_OF = np.array([IGNORE, 1, 3, 2, 5, UNKNOWN, 4, 0], np.uint8)  # at red 4 + green 2 + blue; magenta: no class


# --- The toy world: streets drawn on the fly, so that the method runs with no download -----------------------------------------
# A scene is a layout (which object covers which pixel, exact labels) seen in a look (palette, texture, light, weather). One fixed
# look is the labelled source ("the game"), two more ("arcade", "diorama") are further sources; four others are never trained on; the
# wide world draws a random look per image.
# Only rng.random() and exact arithmetic are used, so that a scene is the same on every machine.

TOY_SIZE = 64
TOY_CLASSES = ("sky", "building", "vegetation", "road", "pavement", "car", "pole", "person")
SKY, BUILDING, VEGETATION, ROAD, PAVEMENT, CAR, POLE, PERSON = range(8)
TOY_COLORS = ((70, 130, 180), (70, 70, 70), (107, 142, 35), (128, 64, 128), (244, 35, 232), (0, 0, 142), (220, 220, 0), (220, 20, 60))
GAME = np.array([[.55, .75, .95], [.62, .50, .42], [.25, .50, .20], [.30, .30, .32], [.62, .60, .58], [.75, .15, .15], [.80, .75, .30],
                 [.85, .60, .45]])  # the source's palette, RGB in 0..1
ARCADE = np.array([[.40, .60, .85], [.75, .68, .55], [.35, .60, .25], [.42, .40, .40], [.72, .70, .62], [.20, .45, .75], [.55, .55, .60],
                   [.35, .30, .70]])  # two further labelled sources, as SYNTHIA and UrbanSyn are to GTAV
DIORAMA = np.array([[.80, .85, .90], [.50, .35, .30], [.20, .40, .28], [.22, .22, .25], [.55, .50, .45], [.85, .80, .20], [.30, .30, .30],
                    [.60, .25, .45]])
CITY = np.array([[.70, .72, .75], [.45, .42, .45], [.30, .38, .15], [.38, .37, .36], [.50, .48, .45], [.15, .22, .55], [.14, .14, .17],
                 [.58, .24, .20]])  # the palette under the unseen weather: another place, not a filter over the game


def toy_layout(rng, jumble=False):
    """Draw one scene's objects back to front: object index per pixel (64, 64), and per object its class and distance (0 near, 1 far)."""
    canvas = Image.new("L", (TOY_SIZE, TOY_SIZE), 0)
    pen, kinds, far = ImageDraw.Draw(canvas), [SKY], [1.0]

    def u(low, high):
        return low + (high - low) * rng.random()

    def add(kind, distance, shape, *box):  # shape: the pen's own rectangle, ellipse or polygon
        kinds.append(kind)
        far.append(distance)
        shape(box if shape == pen.polygon else [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])],
              fill=len(kinds) - 1)

    def thing(kind, x, y, s, z):  # one object standing at (x, y) with size s in pixels
        if kind == CAR:
            add(CAR, z, pen.rectangle, x - s, y - .55 * s, x + s, y)
            add(CAR, z, pen.polygon, (x - .7 * s, y - .5 * s), (x - .4 * s, y - s), (x + .4 * s, y - s), (x + .7 * s, y - .5 * s))
        elif kind == POLE:
            add(POLE, z, pen.rectangle, x, y - 3.2 * s, x + .35 * s, y)
            if rng.random() < .6:  # a sign or a lamp on top
                add(POLE, z, pen.rectangle, x - .4 * s, y - 3.6 * s, x + .7 * s, y - 2.7 * s)
        elif kind == PERSON:
            add(PERSON, z, pen.rectangle, x - .4 * s, y - 1.4 * s, x + .4 * s, y)
            add(PERSON, z, pen.ellipse, x - .35 * s, y - 2.1 * s, x + .35 * s, y - 1.3 * s)
        elif kind == VEGETATION:
            add(VEGETATION, z, pen.ellipse, x - .8 * s, y - 2 * s, x + .8 * s, y)
        else:  # a block of building
            add(BUILDING, z, pen.rectangle, x - s, y - u(1., 2.6) * s, x + s, y)

    if jumble:  # the proxy set: the same kinds of objects, but no street; anything anywhere at any size
        add(int(u(0, 5)), 1, pen.rectangle, 0, 0, 64, 64)
        add(int(u(0, 5)), u(0, 1), pen.polygon, (0, u(0, 64)), (64, u(0, 64)), (64, 64), (0, 64))
        for _ in range(int(u(4, 11))):
            thing((BUILDING, VEGETATION, CAR, POLE, PERSON)[int(u(0, 5))], u(0, 64), u(16, 70), u(4, 15), u(0, 1))
    else:
        horizon, vanish = u(18, 30), u(16, 48)
        for _ in range(int(u(2, 6))):
            thing(BUILDING, u(0, 64), horizon + 1, u(6, 13), u(.7, .95))
        for _ in range(int(u(0, 5))):
            thing(VEGETATION, u(0, 64), horizon + 2, u(6, 11), u(.6, .9))
        left, right = u(-14, 14), u(50, 78)
        add(VEGETATION if rng.random() < .4 else PAVEMENT, .5, pen.rectangle, 0, horizon, 64, 64)
        add(PAVEMENT, .5, pen.polygon, (vanish - 4, horizon), (vanish + 4, horizon), (right + u(8, 24), 64), (left - u(8, 24), 64))
        add(ROAD, .5, pen.polygon, (vanish - 2, horizon), (vanish + 2, horizon), (right, 64), (left, 64))
        for t in sorted(u(.08, .95) for _ in range(int(u(2, 6)))):  # far to near
            y, kind = horizon + t * (64 - horizon), (CAR, CAR, POLE, PERSON, VEGETATION)[int(u(0, 5))]
            edge_l, edge_r = vanish + t * (left - vanish), vanish + t * (right - vanish)
            if kind == CAR:
                x = u(edge_l, edge_r)
            else:  # beside the road
                x = edge_l - u(1, 14) if rng.random() < .5 else edge_r + u(1, 14)
            thing(kind, x, y, {CAR: 7 + 8 * t, POLE: 9 + 5 * t, PERSON: 9 + 6 * t, VEGETATION: 7 + 6 * t}[kind], 1 - t)
    return np.array(canvas), np.array(kinds), np.array(far)


def toy_look(rng, domain):
    """One look as plain numbers: fixed for a named domain, random for the wide world."""
    look = dict(palette=GAME, jitter=.08, texture=.10, gain=1., tint=np.ones(3), grey=0., fog=0., fog_color=np.full(3, .8), white=0.,
                dots=0., streaks=0., lamps=0., noise=.02)
    if domain == "arcade":
        look |= dict(palette=ARCADE, gain=1.05, texture=.16, jitter=.12)
    elif domain == "diorama":
        look |= dict(palette=DIORAMA, gain=.85, tint=np.array([1.1, 1., .85]), texture=.05)
    elif domain == "night":
        look |= dict(palette=CITY, gain=.38, tint=np.array([.85, .95, 1.25]), lamps=.5, noise=.06)
    elif domain == "fog":
        look |= dict(palette=CITY, fog=.65, grey=.3, noise=.03)
    elif domain == "snow":
        look |= dict(palette=CITY, white=.65, dots=.04, fog=.25, noise=.03)
    elif domain == "rain":
        look |= dict(palette=CITY, gain=.75, grey=.4, streaks=.06, fog=.3, fog_color=np.full(3, .5), noise=.04)
    elif domain == "wide":
        r = rng.random
        wild = .6 * r() ** 2  # from natural colours towards arbitrary ones
        look |= dict(palette=(1 - wild) * (.5 * GAME + .5 * CITY) + wild * r((8, 3)), jitter=.2 * r(), texture=.25 * r(),
                     gain=.3 + .8 * r(), tint=.75 + .5 * r(3), grey=r(), fog=max(0, 1.6 * r() - .8), fog_color=r(3), white=max(0, 1.4 * r() - .8),
                     dots=max(0, .10 * r() - .06), streaks=max(0, .12 * r() - .07), lamps=max(0, 1.2 * r() - .7), noise=.10 * r())
    return look


@lru_cache(maxsize=8192)  # a scene takes longer to draw than to train on
def toy_scene(domain, index, jumble=False, seed=0):
    """Image (64, 64, 3) uint8 and label (64, 64) uint8 of scene `index`; domain: game, arcade, diorama, night, fog, snow, rain or wide."""
    rng = np.random.Generator(np.random.PCG64([seed, index, sum(domain.encode())]))
    inst, kinds, far = toy_layout(rng, jumble)
    look = toy_look(rng, domain)
    label, y, x = kinds[inst], *np.mgrid[:TOY_SIZE, :TOY_SIZE]
    fine, coarse = rng.random((64, 64)) - .5, np.kron(rng.random((16, 16)), np.ones((4, 4))) - .5
    windows = ((x % 5 < 2) & (y % 6 < 3)) - .3
    fields = np.stack([(y - 24) / 64, windows, coarse + fine, fine, ((x + y) % 8 < 1) - .2, ((y % 7) < 2) - .3, ((y % 6) < 3) - .5, coarse])
    colors = look["palette"][kinds] + look["jitter"] * (rng.random((len(kinds), 1)) + .5 * rng.random((len(kinds), 3)) - .75) * 2
    image = colors[inst] + look["texture"] * np.take_along_axis(fields, label[None], 0)[0][..., None]
    ground = (label == ROAD) | (label == PAVEMENT) | (label == VEGETATION)
    image += look["white"] * (ground * (.6 + .8 * coarse))[..., None] * (1 - image)          # lying snow
    image = image * look["gain"] * look["tint"]
    for i in range(len(kinds)):                                                            # lamps on poles, lights on cars
        if look["lamps"] and kinds[i] in (POLE, CAR) and (inst == i).any():
            py, px = np.argwhere(inst == i)[0]
            image += look["lamps"] / (1 + .06 * ((y - py) ** 2 + (x - px) ** 2))[..., None] * np.array([1., .85, .55])
    image += look["grey"] * (image.mean(2, keepdims=True) - image)
    row = np.clip(1.6 - y / 40, 0, 1)                                                      # the ground recedes row by row
    distance = np.where((label == ROAD) | (label == PAVEMENT), row, far[inst])
    image += (look["fog"] * distance)[..., None] * (look["fog_color"] - image)
    image += ((rng.random((64, 64)) < look["dots"])[..., None]) * (.95 - image)                 # flakes
    fall = np.kron(rng.random((8, 64)) < look["streaks"], np.ones((8, 1)))[..., None]         # streaks
    image += .5 * fall * (.8 - image)
    image += look["noise"] * (rng.random((64, 64, 3)) + rng.random((64, 64, 3)) - 1) * 1.5
    return (np.clip(image, 0, 1) * 255 + .5).astype(np.uint8), label.astype(np.uint8)


# --- The datasets: one row each ---------------------------------------------------------------------------------------
# A pattern names files of any image suffix below the dataset's folder: "*" stands for text within one name, "{a,b}" for
# either, "**/" for any folders, "<split>" for the row's text of that split. Image and label are a pair where "*" and
# "{}" stood for the same texts. Of several patterns (layouts of different releases) the first that finds a file counts.

@dataclass(frozen=True)
class Dataset:
    folder: str  # below --root, which may also be the folder itself
    images: tuple = ()
    labels: tuple = ()
    splits: dict = None  # {split: text of "<split>"}; of a generated set {split: range of scene numbers}
    decode: Callable = None  # label file -> uint8 (H, W)
    classes: tuple = ()
    colors: tuple = ()
    eval_size: tuple = None  # evaluation scales images to fit (long edge, short edge); None: native size
    eval_half: bool = False  # evaluation first halves image and label
    tile: int = None  # images are cut into tiles of this side
    resize_label: bool = False  # labels of another size than their image are known to occur: resized, no error
    generate: Callable = None  # scene number -> image uint8 (H, W, 3), label uint8 (H, W): a set without files

    @property
    def num_classes(self):
        return len(self.classes)


TRAIN, TRAIN_VAL = {"train": "train"}, {"train": "train", "val": "val"}
POTSDAM = {"train": "{2_10,2_11,2_12,3_10,3_11,3_12,4_10,4_11,4_12,5_10,5_11,5_12,"
                    "6_7,6_8,6_9,6_10,6_11,6_12,7_7,7_8,7_9,7_10,7_11,7_12}",
           "val": "{2_13,2_14,3_13,3_14,4_13,4_14,4_15,5_13,5_14,5_15,6_13,6_14,6_15,7_13}"}
VAIHINGEN = {"train": "{1,3,5,7,11,13,15,17,21,23,26,28,30,32,34,37}",
             "val": "{2,4,6,8,10,12,14,16,20,22,24,27,29,31,33,35,38}"}
ENDOVIS = {"train": "miccai_challenge_2018_release_1/seq_{1,2,3,4}", "val": "miccai_challenge_release_2/seq_{5,6,7}"}
street = partial(Dataset, classes=CITYSCAPES_CLASSES, colors=CITYSCAPES_COLORS)
isprs = partial(Dataset, classes=ISPRS_CLASSES, colors=ISPRS_COLORS, decode=isprs_label, tile=512)
camvid = partial(Dataset, classes=CAMVID_CLASSES, colors=CAMVID_COLORS, decode=partial(by_value, table=CAMVID_IDS))


def acdc(condition):
    return street("acdc", (f"rgb_anon/{condition}/<split>/*/*_rgb_anon",),
                  (f"gt/{condition}/<split>/*/*_gt_labelTrainIds", f"gt/{condition}/<split>/*/*_gt_labelIds"),
                  TRAIN_VAL, cityscapes_label, eval_size=(960, 540))


def toy(domain, jumble=False, train=0, val=0):
    splits = {"train": range(train), "val": range(10 ** 6, 10 ** 6 + val)}
    return Dataset("toy", splits={name: numbers for name, numbers in splits.items() if numbers}, classes=TOY_CLASSES, colors=TOY_COLORS,
                   generate=partial(toy_scene, domain, jumble=jumble))


DATASETS = {
    "imagenet": Dataset("imagenet", ("<split>/*/*", "<split>/*", "n*/*", "*"), splits=TRAIN_VAL),  # or any flat folder
    "gtav": street("gtav", ("images/*",), ("labels/*",), TRAIN, cityscapes_label, resize_label=True),
    "synthia": street("synthia", ("**/RGB/*",), ("**/GT/LABELS/*",), TRAIN, synthia_label),
    "urbansyn": street("urbansyn", ("rgb/**/rgb_*",), ("ss/**/ss_*",), TRAIN, partial(by_value, table=URBANSYN_IDS)),
    "cityscapes": street("cityscapes", ("leftImg8bit/<split>/*/*_leftImg8bit",),
                         ("gtFine/<split>/*/*_gtFine_labelIds", "gtFine/<split>/*/*_gtFine_labelTrainIds"),
                         TRAIN_VAL, cityscapes_label, eval_size=(1024, 512)),
    "bdd100k": street("bdd100k", ("images/10k/<split>/*", "seg/images/<split>/*"),
                      ("labels/sem_seg/masks/<split>/*", "seg/labels/<split>/*_train_id"),
                      TRAIN_VAL, partial(by_value, table=TRAIN_IDS), eval_size=(1280, 720)),
    "mapillary": street("mapillary", ("<split>/images/*",), ("<split>/v1.2/labels/*", "<split>/labels/*"),
                        {"train": "training", "val": "validation"}, partial(by_value, table=MAPILLARY_IDS),
                        eval_size=(1024, 512), eval_half=True),
    "acdc-night": acdc("night"),
    "acdc-snow": acdc("snow"),
    "acdc-fog": acdc("fog"),
    "acdc-rain": acdc("rain"),
    "potsdam-rgb": isprs("potsdam", ("**/top_potsdam_<split>_RGB",),
                          ("**/top_potsdam_<split>_label_noBoundary",), POTSDAM),
    "potsdam-irrg": isprs("potsdam", ("**/top_potsdam_<split>_IRRG",),
                           ("**/top_potsdam_<split>_label_noBoundary",), POTSDAM),
    "vaihingen-irrg": isprs("vaihingen", ("**/top_mosaic_09cm_area<split>",),
                            ("**/top_mosaic_09cm_area<split>_noBoundary",), VAIHINGEN),
    "endovis18": Dataset("endovis18", ("**/<split>/left_frames/*",), ("**/<split>/labels/*",), ENDOVIS, endovis_label,
                         ENDOVIS_CLASSES, ENDOVIS_COLORS),
    "camvid": camvid("camvid", ("<split>/{0006R0,0016E5,Seq05VD}_*",), ("<split>annot/{0006R0,0016E5,Seq05VD}_*",),
                     {"train": "train", "val": "test"}),  # by day
    "camvid-dusk": camvid("camvid", ("<split>/0001TP_*",), ("<split>annot/0001TP_*",), {"val": "{train,val,test}"}),
    "folder": Dataset("folder", ("images/<split>*",), ("masks/<split>*",), {"train": "{train/,}", "val": "val/"}),
    "toy": toy("game", train=1000, val=100),
    "toy-night": toy("night", val=100),
    "toy-fog": toy("fog", val=100),
    "toy-snow": toy("snow", val=100),
    "toy-rain": toy("rain", val=100),
    "toy-arcade": toy("arcade", train=1000, val=100),
    "toy-diorama": toy("diorama", train=1000, val=100),
    "toy-wide": toy("wide", train=4000, val=100),
    "toy-proxy": toy("wide", jumble=True, train=2000),
}
ACDC = ("acdc-night", "acdc-snow", "acdc-fog", "acdc-rain")
JOINED = {"acdc": "+".join(ACDC)}
TOY_SOURCES = ("toy", "toy-arcade", "toy-diorama")
SETTINGS = {  # labelled source -> domains of the table row
    "gtav": ("gtav", ("cityscapes", "bdd100k", "mapillary")),
    "gtav-acdc": ("gtav", ACDC),
    "cityscapes": ("cityscapes", ACDC),
    "potsdam-rgb": ("potsdam-rgb", ("potsdam-irrg", "vaihingen-irrg")),
    "endovis18": ("endovis18", ("endovis18",)),  # its val split is the unseen domain: other sequences
    "camvid": ("camvid", ("camvid-dusk",)),
    "toy": ("toy", ("toy-night", "toy-fog", "toy-snow", "toy-rain")),
}


# --- Finding the files ------------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    entry: Dataset
    image: object  # Path, or the number of a generated scene
    label: object = None  # Path
    box: tuple = None  # (left, top, right, bottom) of a tile

    def read_image(self):
        if self.entry.generate:
            return torch.from_numpy(self.entry.generate(self.image)[0]).permute(2, 0, 1)
        return crop(read_image(self.image), self.box)

    def read_label(self):
        """uint8 (H, W) of class numbers and 255; UserError names a file that is broken or holds other values."""
        if self.entry.generate:
            return torch.from_numpy(self.entry.generate(self.image)[1])
        try:
            if self.label.suffix == ".npy":
                return torch.from_numpy(np.load(self.label))
            tile = (self.box,) if self.entry.tile else ()
            return torch.from_numpy(self.entry.decode(self.label, *tile))
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"{self.label}: cannot be read as a label ({error})") from None


def rows(name, classes=None, labelled=True):
    """{name: row of DATASETS} for a name like gtav+synthia; `classes` is the number of classes of --data folder."""
    entries = {}
    for part in "+".join(JOINED.get(part, part) for part in name.split("+")).split("+"):
        if part not in DATASETS:
            raise UserError(f"--data {part}: not one of {' '.join(DATASETS)}")
        entries[part] = DATASETS[part]
        if classes and (part != "folder" or classes > UNKNOWN):
            raise UserError(f"--classes {classes}: is for --data folder, and at most {UNKNOWN}")
        if part == "folder" and classes:
            colors = np.random.default_rng(0).integers(40, 256, (classes, 3)).tolist()
            table = lookup_table({number: number for number in range(classes)})
            entries[part] = replace(DATASETS[part], decode=partial(by_value, table=table),
                                    classes=tuple(map(str, range(classes))), colors=tuple(map(tuple, colors)))
    if labelled and len({entry.classes for entry in entries.values()}) > 1:
        raise UserError(f"--data {name}: these sets have different classes")
    return entries


def locate(root, entry):
    folder = next((folder for folder in (Path(root, entry.folder), Path(root)) if folder.is_dir()), None)
    if folder is None:
        raise UserError(f"--root {root}: no such folder (it holds one folder per dataset, or is the dataset's own)")
    return folder


def find(folder, patterns, split):
    """Files below a folder that the first successful pattern names: sorted {texts for "*" and "{}": Path}."""
    patterns = [pattern.replace("<split>", split) for pattern in patterns]
    for pattern in patterns:
        regex = re.escape(pattern).replace(r"\{", "(").replace(r"\}", ")").replace(",", "|")
        regex = re.compile(regex.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "([^/]*)") + r"(?:\.\w+)")
        top = folder / re.split(r"[*{]", pattern)[0].rpartition("/")[0]  # the files lie nowhere else
        files = {}
        for parent, _, names in os.walk(top):
            below = Path(parent).relative_to(folder).as_posix().removeprefix(".") + "/"
            for name in names if "__MACOSX" not in below else ():
                match = regex.fullmatch((below + name).removeprefix("/"))
                if match and os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                    files[match.groups()] = Path(parent, name)
        if files:
            return dict(sorted(files.items()))
    return {}


def tile_boxes(width, height, side):
    """Boxes (left, top, right, bottom) every `side` pixels, the last flush with the border; 12 x 12 for 6000 px."""
    def starts(length):
        return sorted({max(min(start, length - side), 0) for start in range(0, length, side)})
    return [(left, top, left + side, top + side) for top in starts(height) for left in starts(width)]


def listing(part, entry, root, split, labelled, cache=None):
    """The samples of one dataset, and the files that lack their partner."""
    if split not in entry.splits:
        raise UserError(f"--data {part}: has no {split} split, only {' '.join(entry.splits)}")
    if entry.generate:
        return [Sample(entry, number) for number in entry.splits[split]], []
    if labelled and not entry.decode:
        raise UserError(f"--data {part}: " + ("say how many --classes" if part == "folder" else "has no labels"))
    folder = locate(root, entry)
    images = find(folder, entry.images, entry.splits[split])
    labels = find(folder, entry.labels, entry.splits[split]) if labelled else {}
    for found, patterns in ((images, entry.images), (labels or not labelled, entry.labels)):
        if not found:
            looked_for = " or ".join(pattern.replace("<split>", entry.splits[split]) for pattern in patterns)
            raise UserError(f"--data {part}: {folder} holds no files like {looked_for}")
    alone = [images[key] for key in images if labelled and key not in labels]
    alone += [labels[key] for key in labels if key not in images]
    samples = [Sample(entry, image, labels.get(key)) for key, image in images.items() if key in labels or not labelled]
    if cache and split == "train":  # evaluation sees the original pixels
        samples = stored(samples, part, folder, cache)
    return samples, alone


def gather(name, root, split, labelled, cache, classes=None):
    """All samples of a name like gtav+synthia, tiles cut; UserError where a file lacks its partner."""
    samples = []
    for part, entry in rows(name, classes, labelled).items():
        found, alone = listing(part, entry, root, split, labelled, cache)
        if alone:
            raise UserError(f"{alone[0]}: has no partner, as {len(alone)} files of {part} {split}; list them all with "
                            f"python data.py --data {part} --root {root}")
        for sample in found:
            if entry.tile:
                with Image.open(sample.image) as header:
                    samples += [sample._replace(box=box) for box in tile_boxes(*header.size, entry.tile)]
            else:
                samples.append(sample)
    return samples


# --- Datasets ---------------------------------------------------------------------------------------------------------

class Scenes(torch.utils.data.Dataset):
    """Samples by key (index, draw), or by index: items (image, draw), or (image, label, draw) if labelled.

    All that is random about an item follows from (seed, draw), so that neither the number of workers nor of processes
    changes it. A training image that cannot be read is named and replaced by the next; all else is a UserError."""

    def __init__(self, samples, transform, labelled, training):
        self.samples, self.transform, self.labelled, self.training = samples, transform, labelled, training
        self.seed = 0  # set by loader
        self.unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # known to all workers
        entry = samples[0].entry
        self.classes, self.colors, self.num_classes = entry.classes, entry.colors, entry.num_classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, draw = key if isinstance(key, tuple) else (key, key)
        sample, image = self.read(index)
        label = None
        if self.labelled:
            label = sample.read_label()
            if label.shape != image.shape[1:]:
                if not sample.entry.resize_label:
                    raise UserError(mismatch(sample, image, label))
                label = resize_label(label, (image.shape[2], image.shape[1]))
        if self.transform:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix(self.seed, draw))  # torch.manual_seed would touch the GPU's too
                image, label = self.transform(image, label)
        return (image.contiguous(), label.long(), draw) if self.labelled else (image.contiguous(), draw)

    def read(self, index):
        """The sample at index with its image; while training the next that can be read."""
        while True:
            try:
                if not self.unreadable[index]:
                    return self.samples[index], self.samples[index].read_image()
            except UserError as error:
                if not self.training:
                    raise
                self.unreadable[index] = True
                count = int(self.unreadable.sum())
                print(f"{error}: another image takes its place, {count} so far", file=sys.stderr)
                if count > BAD_SHARE * len(self):
                    raise UserError(f"{error}, like {count} of {len(self)} training images: too many") from None
            index = (index + 1) % len(self)


def mismatch(sample, image, label):
    return f"{sample.label}: {label.shape[1]}x{label.shape[0]}, but its image is {image.shape[2]}x{image.shape[1]}"


def mix(*numbers):
    """One 32-bit seed from several numbers (torch's CPU generator reads 32 bits, and neighbours must differ)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def images(name, root, transform=None, split="train", cache=None):
    """Unlabelled images for distillation; `cache` is the short side of a stored set."""
    return Scenes(gather(name, root, split, False, cache), transform, labelled=False, training=True)


def scenes(name, root, split="train", transform=None, labels="1", classes=None, cache=None):
    """Images with labels; labels="1/16" keeps a fixed random subset, `classes` is the number of classes of "folder"."""
    try:
        share = Fraction(labels)
    except (ValueError, ZeroDivisionError):
        share = 0
    if not 0 < share <= 1:
        raise UserError(f"--labels {labels}: a fraction like 1/16 was expected")
    samples = gather(name, root, split, True, cache, classes)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(LABEL_SEED))
    kept = sorted(order[:max(1, round(share * len(samples)))].tolist())
    return Scenes([samples[i] for i in kept], transform, labelled=True, training=split == "train")


def first_images(dataset, count=64):
    """The first images of a set, augmented, as uint8 (count, 3, H, W): for statistics that all processes must agree on."""
    return torch.stack([dataset[i, i][0] for i in range(min(count, len(dataset)))])


# --- Which image when -------------------------------------------------------------------------------------------------

class Draws:
    """Batch sampler: this process's micro-batches of keys (index, draw), from a step on, forever.

    Draw d of a run belongs to epoch d // n. An epoch is a permutation seeded by (seed, epoch) of which each image comes
    `repeats` times in a row (repeated augmentation), cut to n draws. Step s takes draws [s batch, (s + 1) batch); each
    process a contiguous share of them, in `accumulate` micro-batches: the same images at any number of processes."""

    def __init__(self, n, batch, seed=0, start_step=0, rank=0, world=1, accumulate=1, repeats=1):
        if batch % (world * accumulate):
            raise UserError(f"--batch {batch}: not a multiple of {world} processes x {accumulate} micro-batches")
        self.n, self.batch, self.seed, self.step, self.repeats = n, batch, seed, start_step, repeats
        self.share, self.micro, self.rank = batch // world, batch // (world * accumulate), rank

        self.epoch = None

    def __iter__(self):
        step = self.step
        while True:
            first = step * self.batch + self.rank * self.share
            for start in range(first, first + self.share, self.micro):
                yield [(self.index(draw), draw) for draw in range(start, start + self.micro)]
            step += 1

    def index(self, draw):
        """The image of a draw."""
        if self.epoch != draw // self.n:
            self.epoch = draw // self.n
            self.order = torch.randperm(self.n, generator=torch.Generator().manual_seed(mix(self.seed, 1, self.epoch)))
        return self.order[draw % self.n // self.repeats].item()


def loader(dataset, batch, seed=0, start_step=0, rank=0, world=1, accumulate=1, repeats=1, workers=0):
    """Endless batches (image uint8 (B, 3, H, W), [label int64 (B, H, W),] draw (B,)), B = batch/world/accumulate."""
    dataset.seed = seed
    draws = Draws(len(dataset), batch, seed, start_step, rank, world, accumulate, repeats)
    return DataLoader(dataset, batch_sampler=draws, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      prefetch_factor=4 if workers else None, worker_init_fn=outlast_signals,
                      multiprocessing_context=start_method(workers))


def start_method(workers):
    """How loading processes begin: with a copy of this one; Python 3.14's default would have to pickle the transforms."""
    return "fork" if workers else None


def outlast_signals(worker):
    """Ctrl-C and cluster managers signal all processes at once: the loading ones go on until the training one has finished its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))  # seconds to live; after a crash Python ends them so, too


# --- Stage 1: crop, flip, RandAugment ---------------------------------------------------------------------------------

def chance(p):
    return torch.rand(()).item() < p


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def distill_transform(size, randaugment=True, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=0.5):
    """Augmentation of both distillation stages: random resized crop, flip, RandAugment; uint8 (3, size, size)."""
    def transform(image, label=None):
        box = RandomResizedCrop.get_params(image, scale, ratio)
        image = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        image = image.flip(2) if chance(flip) else image
        return rand_augment(image.contiguous()) if randaugment else image.contiguous(), label
    return transform


def rand_augment(image, ops=2, p=0.5, magnitude=9, std=0.5):
    """RandAugment as timm's "rand-m9-mstd0.5-inc1"; uint8 (3, H, W)."""
    for _ in range(ops):
        op = RAND_AUGMENT[torch.randint(len(RAND_AUGMENT), ()).item()]
        if chance(p):
            level = min(max(magnitude + std * torch.randn(()).item(), 0), 10) / 10
            image = op(image, level, level if chance(0.5) else -level)
    return image


def warp(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """Output pixel (x, y) shows input (a x + b y + c, d x + e y + f), bicubic, FILL outside."""
    height, width = image.shape[1:]
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    grid = torch.stack([(a * x + b * y + c) * (2 / width) - 1, (d * x + e * y + f) * (2 / height) - 1], -1)
    fill = torch.tensor(FILL)[:, None, None]
    out = torch.nn.functional.grid_sample((image.float() - fill)[None], grid[None], mode="bicubic", align_corners=False)
    return out[0].add_(fill).round_().clamp_(0, 255).to(torch.uint8)


def rotate(image, level, signed):
    cos, sin = math.cos(math.radians(30 * signed)), math.sin(math.radians(30 * signed))
    x, y = image.shape[2] / 2, image.shape[1] / 2  # the centre stays
    return warp(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def posterize(image, level, signed):
    return image & (0xFF00 >> 4 - int(4 * level) & 0xFF)  # keeps 4 bits at level 0, none at level 1


def solarize(image, level, signed):
    return torch.where(image < 256 - int(256 * level), image, 255 - image)


def solarize_add(image, level, signed):
    return torch.where(image < 128, image + int(110 * level), image)


def translate(image, dx, dy):
    """Output pixel (x, y) shows input (x + dx, y + dy), in whole pixels: half a pixel off at most, 30 x faster."""
    height, width = image.shape[1:]
    out = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    out[:, max(-dy, 0):height - dy, max(-dx, 0):width - dx] = image[:, max(dy, 0):height + dy, max(dx, 0):width + dx]
    return out


def sharpen(image, factor):
    """Pillow's sharpness: away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, borders kept."""
    x = image.float()
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    inner = x[:, 1:-1, 1:-1]
    smooth = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner).div_(13).round_()
    inner.copy_(smooth.lerp(inner, factor))
    return x.clamp_(0, 255).to(torch.uint8)


def strength(signed):
    return max(0.1, 1 + 0.9 * signed)  # the "increasing" set: away from 1, which changes nothing


RAND_AUGMENT = (  # op(image, level in 0..1, level with a random sign)
    rotate, posterize, solarize, solarize_add,
    lambda image, level, signed: F.autocontrast(image),
    lambda image, level, signed: F.equalize(image),
    lambda image, level, signed: 255 - image,
    lambda image, level, signed: F.adjust_saturation(image, strength(signed)),
    lambda image, level, signed: F.adjust_contrast(image, strength(signed)),
    lambda image, level, signed: F.adjust_brightness(image, strength(signed)),
    lambda image, level, signed: sharpen(image, strength(signed)),
    lambda image, level, signed: warp(image, b=0.3 * signed),  # shear
    lambda image, level, signed: warp(image, d=0.3 * signed),
    lambda image, level, signed: translate(image, round(0.45 * signed * image.shape[2]), 0),
    lambda image, level, signed: translate(image, 0, round(0.45 * signed * image.shape[1])),
)


# --- On the device: normalisation, random erasing ---------------------------------------------------------------------

def normalize(image, mean, std):
    """uint8 (B, 3, H, W) to floats of mean 0 and deviation 1."""
    mean, std = (255 * torch.tensor(values, device=image.device)[:, None, None] for values in (mean, std))
    return (image - mean) / std


def restate(x, model, other):
    """Images normalised for one encoder, normalised for another instead."""
    if (model.mean, model.std) == (other.mean, other.std):
        return x
    scale, shift = ([(a / b) for a, b in zip(model.std, other.std)], [(a - b) / c for a, b, c in zip(model.mean, other.mean, other.std)])
    return x * x.new_tensor(scale)[:, None, None] + x.new_tensor(shift)[:, None, None]


def erase(x, draws, seed=0, p=0.25, area=(0.02, 1 / 3), ratio=(0.3, 3.3)):
    """Random erasing, in place: one box of noise in a share p of normalised x (B, 3, H, W), by (seed, draw) alone."""
    height, width = x.shape[2:]
    noise = torch.Generator(x.device)
    for i, draw in enumerate(draws.tolist()):
        rng = np.random.default_rng((seed, 2, draw))
        for _ in range(10 if rng.random() < p else 0):  # tries until the box fits
            pixels, aspect = rng.uniform(*area) * height * width, math.exp(rng.uniform(*np.log(ratio)))
            h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                x[i, :, top:top + h, left:left + w].normal_(generator=noise.manual_seed(mix(seed, 3, draw)))
                break
    return x


def noise(draws, N, seed):
    """Uniform random numbers (B, N), each row a function of (seed, draw) alone: the same masks at any number of processes."""
    return torch.stack([torch.rand(N, generator=torch.Generator().manual_seed(mix(seed, 4, draw))) for draw in draws.tolist()])


# --- Stage 2: image and label together --------------------------------------------------------------------------------

def segment_transform(size=512, short_edges=None, long_edge=None, cat_max_ratio=0.75, flip=0.5):
    """Random scale, crop, flip, colours, and padding to (size, size), as the official recipe's mmsegmentation pipeline.

    Official defaults: short edge one of 0.5, 0.6, ... 2.0 sizes, long edge at most 4 sizes."""
    short_edges, long_edge = short_edges or [size * k // 10 for k in range(5, 21)], long_edge or 4 * size

    def transform(image, label):
        height, width = label.shape
        short = short_edges[torch.randint(len(short_edges), ()).item()]
        scale = min(short / min(height, width), long_edge / max(height, width))
        scaled = max(1, round(width * scale)), max(1, round(height * scale))
        image, label = resize(image, scaled), resize_label(label, scaled)
        for _ in range(10):  # tries until no class fills more than cat_max_ratio of the crop's labelled pixels
            top, left = (torch.randint(max(edge - size, 0) + 1, ()).item() for edge in label.shape)
            part = label[top:top + size, left:left + size]
            counts = torch.bincount(part.flatten(), minlength=256)[:IGNORE]
            if counts.max() < cat_max_ratio * counts.sum():
                break
        image, label = distort(image[:, top:top + size, left:left + size]), part
        if chance(flip):
            image, label = image.flip(2), label.flip(1)
        pad = [0, 0, size - label.shape[1], size - label.shape[0]]
        return F.pad(image, pad, fill=list(FILL)), F.pad(label[None], pad, fill=IGNORE)[0]
    return transform


def distort(image, brightness=32, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18):
    """Brightness, saturation and hue, with contrast before or after the last two, each with probability 0.5.

    uint8 (3, H, W); brightness in grey levels, hue in OpenCV's half degrees; mmsegmentation's PhotoMetricDistortion."""
    def linear(image, factor, shift):
        return (image * factor + shift).clamp_(0, 255).to(torch.uint8)

    image = linear(image, 1, uniform(-brightness, brightness)) if chance(0.5) else image
    change_contrast, contrast_first = chance(0.5), chance(0.5)
    if change_contrast and contrast_first:
        image = linear(image, uniform(*contrast), 0)
    image = saturate(image, uniform(*saturation)) if chance(0.5) else image
    image = F.adjust_hue(image, uniform(-hue, hue) / 180) if chance(0.5) else image
    if change_contrast and not contrast_first:
        image = linear(image, uniform(*contrast), 0)
    return image


def saturate(image, factor):
    """Scale the S of HSV: the channels' distances to the largest one grow by the factor, until the smallest is 0."""
    largest = image.amax(0).float()
    reach = largest - image.amin(0)
    factor = torch.minimum(torch.full_like(reach, factor), largest / reach.clamp(min=1))
    return (largest - (largest - image) * factor).round_().to(torch.uint8)


def eval_transform(name):
    """Official test size of a dataset for the image; the label keeps its own (Mapillary's is halved)."""
    (entry,) = rows(name).values()

    def transform(image, label):
        height, width = image.shape[1:]
        if entry.eval_half:
            height, width = height // 2, width // 2
            image = resize(image, (width, height), InterpolationMode.BICUBIC, antialias=True)
            label = resize_label(label, (width, height))
        if entry.eval_size:
            scale = min(entry.eval_size[0] / max(height, width), entry.eval_size[1] / min(height, width))
            image = resize(image, (round(width * scale), round(height * scale)))
        return image, label
    return transform


# --- Storing a set at training size: python data.py --data gtav --root /data --cache 512 ------------------------------

def store(name, root, size, classes=None, workers=0):
    """Write the training split at short side `size` beside its folder: raw pixels that are mapped, not decoded.

    The pixels see one bicubic reduction with antialias before the random crop's own: crops smaller than `size` come out
    coarser than from the original. GTAV at 512 takes 36 GB, 3 x 512 x 932 bytes per image. Only "train" is stored."""
    for part, entry in rows(name, classes).items():
        if entry.generate or entry.tile:
            raise UserError(f"--cache {size}: {part} is fast without")
        samples = gather(part, root, "train", bool(entry.decode), None, classes)
        folder = locate(root, entry)
        target = folder.resolve().parent / f"{part}-{size}"
        if target.exists():
            raise UserError(f"--cache {size}: {target} exists; delete it to make it again")
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            job = partial(store_sample, folder=folder, target=unfinished, size=size)
            left_out = sum(in_parallel(job, samples, workers, f"storing {part}"))
            made_from = {"from": str(folder), "short_side": size, "unreadable": left_out,
                         "pixels": "uint8, bicubic with antialias; labels are class numbers, nearest pixel",
                         "images": fingerprint(folder, [sample.image for sample in samples]),
                         "labels": fingerprint(folder, [sample.label for sample in samples if sample.label])}
            (unfinished / "made_from.json").write_text(json.dumps(made_from, indent=1))
            os.replace(unfinished, target)  # complete or absent
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        print(f"{target}: {len(samples) - left_out} images")


def fingerprint(folder, files):
    listed = "\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file in files)
    return f"{len(files)} files, names and sizes have sha256 {hashlib.sha256(listed.encode()).hexdigest()}"


def store_sample(sample, folder, target, size):
    """Write image and label of one sample; returns whether the image is unreadable (training will skip it too)."""
    try:
        image = sample.read_image()
    except UserError as error:
        print(error, file=sys.stderr)
        return True
    scale = min(1, size / min(image.shape[1:]))
    size = round(image.shape[2] * scale), round(image.shape[1] * scale)
    arrays = {sample.image: resize(image, size, InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0)}
    if sample.label:
        arrays[sample.label] = resize_label(sample.read_label(), size)
    for source, array in arrays.items():
        file = target / source.relative_to(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{file}.npy", np.ascontiguousarray(array))
    return False


def stored(samples, part, folder, size):
    """The same samples with the stored files; UserError unless those were made from the files as they are now."""
    target = folder.resolve().parent / f"{part}-{size}"
    try:
        made_from = json.loads((target / "made_from.json").read_text())
    except FileNotFoundError:
        made_from = {}
    files_of = {"images": [sample.image for sample in samples], "labels": [sample.label for sample in samples]}
    for kind, files in files_of.items():
        if files[0] and made_from.get(kind) != fingerprint(folder, files):
            state = "was made from other files; delete it and run" if made_from else "is not there; run"
            raise UserError(f"--cache {size}: {target} {state} "
                            f"python data.py --data {part} --root {folder} --cache {size}")

    def moved(file):
        return file and Path(f"{target / file.relative_to(folder)}.npy")
    return [sample._replace(image=moved(sample.image), label=moved(sample.label)) for sample in samples]


def in_parallel(job, items, workers, title):
    """Results of job(item) in order, behind a bar."""
    if workers:
        with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from tqdm(pool.map(job, items, chunksize=8), title, len(items))
    else:
        yield from tqdm(map(job, items), title, len(items))


# --- Runs: flags, processes, checkpoints and the log, the same for every script ---------------------------------------------------------

def configure(Config, presets, argv=None):
    """Build a Config: its defaults, then the preset of --data, then the command line; every field is a flag, its comment the help."""
    given = vars(flags(Config).parse_args(argv))
    preset = presets.get(given.get("data", Config.data).split("+")[0], {})
    for name, value in given.items():  # nothing is negative; these are above 0, unless their 0 has a meaning, the default
        least = 1 if name in ("batch", "micro", "size", "patch", "log_every", "max_skips", "jobs") and getattr(Config, name) else 0
        if type(value) is int and value < least:
            fail(f"--{name} {value}: at least {least} was expected")
    return Config(**{**preset, **given})


@lru_cache
def flags(Config):
    """The command line of a Config, as a parser."""
    help_of = {name: text for cls in Config.__mro__[-2::-1]
               for name, text in re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M)}
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    for f in dataclasses.fields(Config):
        bare = {"nargs": "?", "const": True} if f.type is bool else {}  # --demo alone means yes
        parser.add_argument(f"--{f.name}", type=partial(parse_value, f.type), default=argparse.SUPPRESS, metavar="X", **bare,
                            help=f"{help_of.get(f.name, '')} (default {f.default})".replace("%", "%%"))
    return parser


def parse_value(kind, text):
    """One flag's text as the type its field declares."""
    if typing.get_origin(kind) is types.UnionType:  # int | None
        return None if text == "none" else parse_value(typing.get_args(kind)[0], text)
    allowed = ("yes", "no") if kind is bool else typing.get_args(kind)  # a Literal's values; nothing for int, float, str
    if allowed and text not in allowed:
        raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(allowed)}")
    try:
        return text == "yes" if kind is bool else text if allowed else kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no {kind.__name__}") from None


def fail(message):
    raise UserError(message)


def cli(main, *errors):
    """Run a script's main; a user's mistake becomes one line on stderr and exit status 2."""
    status = 0
    try:
        main()
    except (UserError, *errors) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if status:
        sys.exit(status)  # here, where nothing holds main's loading processes any more: they would be waited for


def launch():
    """Join the processes torchrun started (a lone process is a world of size one): rank, world, device."""
    rank, world, local = (int(os.environ.get(key, value)) for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    return rank, world, device


def open_run(cfg, result, free):
    """Open --out for this Config: the checkpoint to resume from, None for a fresh run, or 'finished'.

    A folder with another run in it is refused and left as it is; the fields in `free` may change between starts."""
    out, now = Path(cfg.out), as_plain(cfg)
    if (out / "log.jsonl").exists():
        before = json.loads((out / "log.jsonl").read_text().split("\n", 1)[0])["config"]
        changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if k not in free and before.get(k) != v]
        if changed:
            fail(f"--out {out} holds a run with other constants ({', '.join(changed)}); choose another --out")
    elif out.is_file():
        fail(f"--out {out} is a file, not a folder; choose another --out")
    elif out.exists() and any(path.name != "log.tmp" for path in out.iterdir()):  # log.tmp: killed before its first step
        fail(f"--out {out} is not empty and holds no log.jsonl of this script; choose another --out")
    if (out / result).exists():
        if dist.get_rank() == 0:
            tidy(out)
        return "finished"
    for name in ("last.pt", "prev.pt"):  # prev.pt: what last.pt was before, should last.pt be damaged
        try:
            return torch.load(out / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            pass
        except (OSError, MemoryError) as error:  # of the disk, the network, the machine: the file itself may be sound
            fail(f"{out / name} cannot be read ({error}); nothing was changed")
        except Exception as error:  # torch raises whatever the zip reader or the unpickler met
            print(f"{out / name} is damaged ({first_line(error)}); trying the checkpoint before it", file=sys.stderr)
            if dist.get_rank() == 0:  # set aside, or the next save would keep it in the good one's place
                os.replace(out / name, out / f"damaged-{name}")
    return None


def first_line(error):
    """The beginning of an exception's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:80]


def as_plain(cfg):
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def save(path, state, keep=False):
    """Write a checkpoint beside its place and rename it, so that no kill at any moment leaves a damaged one; keep: the old as prev.pt."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"{path} could not be written ({error}); the checkpoint before it is kept. Free some space and run the same command again")
    if keep and path.exists():
        os.replace(path, path.with_name("prev.pt"))
    os.replace(temporary, path)


def resume(checkpoint, **parts):
    """Load a checkpoint (None: a fresh run) into module, optimizer and scaler; returns the run's ledger so far."""
    if not checkpoint:
        return dict(steps=0, images=0, tokens=0, flops=0.0, seconds=0.0, skipped=0, waited=0.0, peak_gb=0.0)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["spent"]


def keep(cfg, saved, at_once, spent, **parts):
    """Write last.pt if asked or due; returns the time of the last save. Only the first process writes."""
    if dist.get_rank() == 0 and (at_once or time.time() - saved > 60 * cfg.save_minutes):
        save(Path(cfg.out) / "last.pt", {name: part.state_dict() for name, part in parts.items()} | dict(spent=spent), keep=True)
        return time.time()
    return saved


def finish(cfg, result, checkpoint):
    """Write a run's result and the picture of its losses, then drop what resuming needed."""
    save(Path(cfg.out) / result, checkpoint)
    tidy(Path(cfg.out))


def tidy(out):
    """Leave a finished run with its picture and without what resuming needed; what a kill in here left, the next start puts right."""
    if not (out / "loss.png").exists():
        loss_curves({str(out): out}, out / "loss.png")
    for path in (*out.glob("*.tmp"), *out.glob("last.pt"), *out.glob("prev.pt"), *out.glob("damaged-*.pt")):
        path.unlink(missing_ok=True)


def start_log(cfg, step, **header):
    """Write the header line of a fresh run's log, or cut a resumed one's lines back to its checkpoint's step."""
    path = Path(cfg.out) / "log.jsonl"
    if step and path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines[1:] if line.endswith("}") and json.loads(line)["step"] <= step]
        text = "\n".join([lines[0], *kept]) + "\n"
    else:
        ask = ["git", "rev-parse", "--short", "HEAD"]
        git = subprocess.run(ask, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() if shutil.which("git") else ""
        text = json.dumps(dict(config=as_plain(cfg), command=" ".join(sys.argv), git=git or None, torch=torch.__version__,
                               torchvision=torchvision.__version__, python=sys.version.split()[0], **header)) + "\n"
    write(path, text)


def write(path, text):
    """Write a text file beside its place and rename it: no kill leaves half of it."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def log(out, record):
    with open(Path(out) / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def passes(batch, micro, world, pairs=True):
    """Forward passes a step takes on each process: none holds more than `micro` images, all make up the batch; pairs: none is odd."""
    own, least = batch // world, 2 if pairs else 1
    if batch < 1 or batch % (least * world):
        fail(f"--batch {batch} does not divide into {'pairs of ' if pairs else ''}images over {world} processes; "
             f"use a multiple of {least * world}")
    return next(n for n in range(1, own + 1) if own % (least * n) == 0 and (own // n <= micro or own // n == least))


def leave(cfg, spent, stop, skips, dataset, loader, draws):
    """End the run, its checkpoint written, after a signal or after too many non-finite steps in a row; else do nothing."""
    if stop:
        print(f"stopped by signal {int(stop)} after step {spent['steps']}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + int(stop))
    if skips == cfg.max_skips:
        names = [str(dataset.samples[loader.batch_sampler.index(draw)].image) for draw in draws.tolist()]
        fail(f"{skips} steps in a row had non-finite gradients and changed nothing; {cfg.out}/last.pt holds the weights before them. "
             f"Look at the last images ({', '.join(names[:8])}), lower --lr or use --precision fp32")


def parse_budget(text, steps_per_epoch):
    """A budget as (unit, amount): '600' and '300ep' in steps, '2h' and '30m' in seconds, '3e18flop' in FLOPs."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)(ep|h|m|s|flop|)", text)
    if not match or float(match[1]) <= 0:
        fail(f"--budget {text} is not one of 600 (steps), 300ep, 2h, 30m, 45s, 3e18flop")
    amount, unit = float(match[1]), match[2]
    if unit == "flop":
        return "flops", amount
    if unit in ("h", "m", "s"):
        return "seconds", amount * {"h": 3600, "m": 60, "s": 1}[unit]
    return "steps", max(1, round(amount * (steps_per_epoch if unit == "ep" else 1)))


def agree(*values):
    """The largest of each value over all processes, as floats: one small exchange a step, so that all take the same decision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def catch_signals():
    """A list that becomes non-empty at SIGTERM or SIGINT, so that a step can finish and be saved before the process ends."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: caught.append(n))
    return caught


def precision(name, device):
    """The autocast context of --precision on this device: bf16 on CUDA and fp32 on CPU where it is 'auto'."""
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16,
             "fp16": torch.float16}[name]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def step(optimizer, scaler):
    """One optimiser step on the gradients at hand; False, and no step, where they are not finite."""
    scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = bool(torch.nn.utils.get_total_norm(grads).isfinite())
    if finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return finite


def spend(spent, **amounts):
    """Add one step's amounts to a run's ledger."""
    for name, amount in amounts.items():
        spent[name] += amount
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    spent["peak_gb"] = max(spent["peak_gb"], peak / 2 ** 30)


def report(cfg, bar, spent, unit, budget, losses, optimizer):
    """Move the bar; every log_every steps (and at the end) write a line of the log, its losses the mean over all processes."""
    bar.total = max(round(spent["steps"] * budget / spent[unit]), spent["steps"])
    bar.update(spent["steps"] - bar.n)
    if spent["steps"] % cfg.log_every and spent[unit] < budget:
        return
    means = torch.stack([value.double() for value in losses.values()])
    dist.all_reduce(means)
    means = (means / dist.get_world_size()).tolist()
    record = dict(step=spent["steps"], **{name: round(mean, 6) for name, mean in zip(losses, means)}, lr=optimizer.param_groups[0]["lr"],
                  images_per_s=round(spent["images"] / spent["seconds"], 1), data_wait=round(spent["waited"] / spent["seconds"], 3),
                  peak_gb=round(spent["peak_gb"], 2), skipped=int(spent["skipped"]), flops=spent["flops"],
                  seconds=round(spent["seconds"], 2), eta_s=round(spent["seconds"] * (budget / spent[unit] - 1)))
    bar.set_postfix(loss=record["loss"], data_wait=record["data_wait"])
    if dist.get_rank() == 0:
        log(cfg.out, record)


def count_flops(work):
    """Floating-point operations (2 per multiply-add) of calling work(), backward passes included: convolutions, matrix products,
    attention; sampling, resizing, norms and element-wise work are not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's fused attention would not be counted
        work()
    return counter.get_total_flops()


def loss_curves(runs, path):
    """Draw the losses of runs {name: folder} against their steps: of a single run all parts, of several the distillation's alone."""
    series = {}
    for name, folder in runs.items():
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()[1:]]
        lines = [line for line in lines if "loss" in line]
        parts = list(lines[0])[1:list(lines[0]).index("lr")] if lines else ["loss"]  # between step and lr
        parts = parts if len(runs) == 1 else ["kd" if "kd" in parts else "loss"]
        series |= {part if len(runs) == 1 else name: [(line["step"], line[part]) for line in lines] for part in parts}
    chart(series, path, "step", "loss", title=name if len(runs) == 1 else "", log=True)


LINE_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75), (90, 90, 90))


def chart(series, path, x_title, y_title, title="", log=False, size=(640, 400), marks=False):
    """Draw lines {name: [(x, y)]} with axes and a legend; log: logarithmic y, log="x": logarithmic x; returns the path."""
    s, font = 2, ImageFont.load_default(26)                    # drawn at twice the size, then halved: smooth lines
    series = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
    xs, ys = ([point[i] for points in series.values() for point in points] or [0, 1] for i in (0, 1))
    log_x, log_y = log == "x" and min(xs) > 0, log is True and min(ys) > 0
    x_ticks, y_ticks = ticks(min(xs), max(xs), log_x), ticks(min(ys), max(ys), log_y)
    legend = max(font.getlength(name) for name in series) + 80 if series else 0
    left, right = 40 + max(font.getlength(number(y)) for y in y_ticks), size[0] * s - legend - 10
    top, bottom, edge = 60, size[1] * s - 100, 20 if marks else 0  # an edge, so that no mark lies on the border
    canvas = Image.new("RGB", (size[0] * s, size[1] * s), "white")
    pen = ImageDraw.Draw(canvas)

    def place(value, limits, log, low, high):
        a, b, v = (math.log(t) if log else t for t in (*limits, value))
        low, high = (low + edge, high - edge) if low < high else (low - edge, high + edge)
        return low + (high - low) * (v - a) / (b - a)

    x_limits, y_limits = ((min(t[0], *v), max(t[-1], *v)) for t, v in ((x_ticks, xs), (y_ticks, ys)))
    for x in x_ticks:
        at = place(x, x_limits, log_x, left, right)
        pen.line((at, top, at, bottom), (225, 225, 225), 2)
        pen.text((at, bottom + 10), number(x), "black", font, anchor="ma")
    for y in y_ticks:
        at = place(y, y_limits, log_y, bottom, top)
        pen.line((left, at, right, at), (225, 225, 225), 2)
        pen.text((left - 10, at), number(y), "black", font, anchor="rm")
    pen.rectangle((left, top, right, bottom), outline=(90, 90, 90), width=2)
    pen.text(((left + right) / 2, size[1] * s - 15), x_title, "black", font, anchor="ms")
    pen.text((10, 10), y_title, "black", font)
    pen.text(((left + right) / 2, 10), title, "black", font, anchor="ma")
    for i, (name, points) in enumerate(series.items()):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        dots = [(place(x, x_limits, log_x, left, right), place(y, y_limits, log_y, bottom, top)) for x, y in points]
        pen.line(dots, color, 4, joint="curve")
        for x, y in dots if marks or len(dots) == 1 else ():
            pen.ellipse((x - 7, y - 7, x + 7, y + 7), color)
        pen.line((right + 15, top + 20 + 36 * i, right + 55, top + 20 + 36 * i), color, 6)
        pen.text((right + 65, top + 20 + 36 * i), name, "black", font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.resize(size, Image.Resampling.LANCZOS).save(path)
    return path


def ticks(low, high, log=False):
    """Round numbers that cover [low, high]."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        some = [m * 10.0 ** d for d in decades for m in ((1, 2, 5) if len(decades) < 4 else (1,))]
        inside = [t for t in some if low <= t <= high]
        return inside if len(inside) > 1 else [low, high] if high > low else [low, low * 10]
    step = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1))
    step *= next((m for m in (0.2, 0.5, 1, 2) if (high - low) / (m * step) <= 7), 2)
    first = math.floor(low / step)
    return [step * i for i in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)]


def number(value):
    """A tick's text."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}"


def palette(colors):
    """The colour of each class number as an array (256, 3), uint8: black for those that are none, as 255."""
    return np.array([*colors, *[(0, 0, 0)] * (256 - len(colors))], np.uint8)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# --- Preflight: python data.py --data gtav --root /data ---------------------------------------------------------------

def check(sample):
    """Open both files: what is wrong or None, what is odd but known or None, and the pixels of each class (256,)."""
    wrong, odd, pixels = None, None, np.zeros(256, np.int64)
    try:
        image = sample.read_image()
        if sample.label or sample.entry.generate:
            label = sample.read_label()
            pixels = np.bincount(label.numpy().ravel(), minlength=256)
            if label.shape != image.shape[1:]:
                odd = mismatch(sample, image, label)
                wrong = None if sample.entry.resize_label else odd
    except UserError as error:
        wrong = str(error)
    return wrong, odd, pixels


def preflight(name, root, out=None, classes=None, workers=0):
    """Open every file of every split that is there and print what was found; returns the number of problems."""
    problems, shown, pixels = 0, [], np.zeros(256, np.int64)
    for part, entry in rows(name, classes).items():
        splits = [split for split, text in entry.splits.items()
                  if entry.generate or find(locate(root, entry), entry.images, text)]
        for split in splits or list(entry.splits)[:1]:  # nothing there: listing says so
            samples, alone = listing(part, entry, root, split, bool(entry.labels))
            results = list(in_parallel(check, samples, workers, f"{part} {split}"))
            wrong = [f"{file}: has no partner" for file in alone] + [wrong for wrong, _, _ in results if wrong]
            odd = [f"{odd}, will be resized" for wrong, odd, _ in results if odd and not wrong]
            kind = "pairs" if entry.classes else "images"
            print(f"{part} {split}: {len(samples)} {kind}, {len(wrong)} problems")
            print("".join(f"  {line}\n" for line in wrong + odd), end="")
            good = [sample for sample, (wrong, _, _) in zip(samples, results) if not wrong]
            shown += good[::max(1, -(-len(good) // 4))]  # 4 at most, evenly
            pixels += sum(counts for _, _, counts in results)
            problems += len(wrong)
    if out and shown:
        overview(shown, pixels).save(out)
    return problems


def overview(samples, pixels, width=300, gap=10, bar=22):
    """Picture of some samples, image above label, and below them each class's share of the pixels."""
    entry, font, blocks = samples[0].entry, ImageFont.load_default(14), []
    for sample in samples:
        image = Image.fromarray(sample.read_image().permute(1, 2, 0).numpy())
        size = width, round(width * image.height / image.width)
        block = [image.resize(size)]
        if entry.classes:
            block.append(Image.fromarray(palette(entry.colors)[sample.read_label().numpy()]).resize(size, Image.Resampling.NEAREST))
        blocks.append(block)
    columns, cell = min(4, len(blocks)), max(sum(picture.height for picture in block) for block in blocks) + gap
    names, counts = [*entry.classes, "ignored"], [*pixels[:entry.num_classes], pixels[IGNORE]]
    chart = -(-len(blocks) // columns) * cell + 2 * gap
    height = chart + (bar * len(names) + gap if entry.classes else 0)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, height), "white")
    for i, block in enumerate(blocks):
        for j, picture in enumerate(block):
            sheet.paste(picture, (gap + i % columns * (width + gap), gap + i // columns * cell + j * picture.height))
    pen, left = ImageDraw.Draw(sheet), 2 * gap + max(font.getlength(name) for name in names)
    for i, (name, count) in enumerate(zip(names, counts) if entry.classes else ()):
        share, y = count / max(1, sum(counts)), chart + i * bar
        right = left + share / max(counts) * sum(counts) * (sheet.width - left - 80)
        pen.text((left - gap, y + bar / 2), name, "black", font, anchor="rm")
        pen.rectangle((left, y + 3, right, y + bar - 3), (*entry.colors, (0, 0, 0))[i], "gray")
        pen.text((right + gap, y + bar / 2), f"{share:.2%}", "black", font, anchor="lm")
    return sheet


@dataclass
class Config:
    """Flags of the preflight."""
    data: str = "toy"         # one name of data.DATASETS, or several joined with +
    root: str = "data"        # holds one folder per dataset, or is the dataset's own folder
    classes: int = 0          # how many, for --data folder
    out: str = "preflight.png"  # picture of some samples and the shares of the classes
    cache: int = 0            # instead store the training split at this short side, pixels
    workers: int = 0          # processes that open files


def main(argv=None):
    cfg = configure(Config, {}, argv)
    if cfg.cache:
        store(cfg.data, cfg.root, cfg.cache, cfg.classes, cfg.workers)
    elif preflight(cfg.data, cfg.root, cfg.out, cfg.classes, cfg.workers):
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
