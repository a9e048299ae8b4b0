"""Every dataset of the paper, read from its original download without conversion, and the augmentations of both stages;
in the last part what every training script shares: flags, processes, the run with its checkpoints and its log.

An image is a uint8 tensor (3, H, W), a label an int64 tensor (H, W) of class numbers, 255 = ignore, or boxes: as_label.
A domain is a row of DATASETS; sources join with "+" (gtav+synthia). Check a download, or store it at training size:

    python data.py --data gtav --root /data --out gtav.png  # opens every file; exit status 1 if something is wrong
    python data.py --data gtav --root /data --cache 512     # 25k slow PNGs -> mapped pixels with short side 512
"""
import argparse
import dataclasses
import datetime
import fcntl
import hashlib
import inspect
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import typing
import zlib
from array import array
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C while torch is loaded: no traceback; see cli

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_area
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import Compose, RandomCrop, RandomHorizontalFlip, Resize, functional as TF
from torchvision.tv_tensors import BoundingBoxes
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # where python -P does not look
import qsd
from qsd import UserError

IGNORE = 255                # label of a pixel that no loss and no metric sees
UNKNOWN = 254               # a label value that the dataset's table does not name: always an error
FILL = (124, 116, 104)      # the mean as a pixel, for what lies outside an image: 0 after normalisation
BAD_SHARE = 0.01            # share of the training images that may be unreadable before a run stops
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # what damaged files raise


# --- Files to pixels ------------------------------------------------------------------------------------------------

def read_image(path, mapped=True, upright=False):
    """Read an image as RGB, uint8 (3, H, W); upright: turned as its EXIF data say that the camera was held.

    Stored .npy files are mapped into memory, and so are TIFFs if `mapped`: a crop then reads its own rows only."""
    try:
        if path.suffix == ".npy":
            pixels = np.load(path, mmap_mode="c")
        elif path.suffix.lower() in (".tif", ".tiff") and mapped:
            pixels = map_tiff(path)
        else:
            pixels = read_rgb(path, upright)
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def read_rgb(path, upright=False):
    """Read any kind of image with Pillow as uint8 (H, W, 3); upright as in read_image."""
    with Image.open(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        return np.array(to_rgb(image))


def to_rgb(image):
    """A Pillow image of any mode as RGB; 16-bit grey is scaled to 8 bits, where Pillow would cut it off at 255."""
    if image.mode == "RGB":
        return image  # convert would copy the pixels once more
    if image.mode[0] in "IF":  # I;16, and in older files I
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{image.mode} pixels from {values.min()} to {values.max()}, "
                             "of which none is known to be white")
        scaled = (values.astype(np.uint32) * 255 + 32767) // 65535
        image = Image.fromarray(scaled.astype(np.uint8))
    return image.convert("RGB")


def map_tiff(path):
    """Map a TIFF as uint8 (H, W, 3): as it lies if its pixels are raw, else from a copy unpacked once beside it."""
    unpacked = path.with_name(path.name + ".npy")
    made_from = bytes.fromhex(fingerprint(path, path.stat().st_mtime_ns))   # stands behind the pixels of the copy
    if not unpacked.exists() or np.memmap(unpacked, mode="r")[-len(made_from):].tobytes() != made_from:
        with Image.open(path) as image:
            offset = raw_offset(image)
            if offset is not None:
                return np.memmap(path, np.uint8, "c", offset, (image.height, image.width, 3))
            pixels = np.asarray(to_rgb(image))
        with whole(unpacked, f"part.{os.getpid()}") as part, open(part, "wb") as file:  # others may unpack it just now
            np.save(file, pixels)
            file.write(made_from)
    return np.load(unpacked, mmap_mode="c")


def fingerprint(path, *more):
    """A text that changes with a file's size, with some of its bytes (all, up to 64 KB) and with `more`."""
    digest = hashlib.sha256(repr(more).encode())
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for i in range(16):
            file.seek(max(0, min(i * size // 16, size - 4096)))
            digest.update(file.read(4096))
    return digest.hexdigest()


def raw_offset(image):
    """Where in its file a TIFF's pixels begin if they are raw RGB rows without gaps; None for every other TIFF."""
    begin = image.tile[0][2]
    expected = begin
    for codec, (left, _, right, bottom), start, _ in image.tile:  # strips of whole rows, each after the one before
        if image.mode != "RGB" or codec != "raw" or start != expected or left != 0 or right != image.width:
            return None
        expected = begin + bottom * image.width * 3
    return begin


def resize(image, size, mode=InterpolationMode.BILINEAR, antialias=False):
    """Resize (3, H, W) to size (height, width); without antialias as mmsegmentation does."""
    return TF.resize(image, list(size), mode, antialias=antialias)


LABEL_RESIZE = InterpolationMode.NEAREST_EXACT  # the image's pixel centres; official: NEAREST, up to half a pixel off


def resize_label(label, size):
    """Resize (H, W) to size (height, width): the nearest pixel's class."""
    return TF.resize(label[None], list(size), LABEL_RESIZE)[0]


def crop(image, box):
    """The part of (3, H, W) inside the box (left, top, right, bottom); all of it if box is None."""
    if box is None:
        return image
    left, top, right, bottom = box
    return image[:, top:bottom, left:right]


# --- Files to labels: each decoder takes a path and returns uint8 (H, W), 255 = ignore ------------------------------

def checked(path, label, values):
    """The label, unless some of the file's values are in no table."""
    if (label == UNKNOWN).any():
        listed = np.unique(values[label == UNKNOWN], axis=0)[:8].tolist()
        raise UserError(f"{path}: label values {listed} are not among the dataset's classes")
    return label


def lookup_table(values, ignored=()):
    """The class of each of 256 label values; `values` holds the value of one class after the other, or a list of them.

    Values in `ignored` that belong to no class, and 255, become IGNORE, all others UNKNOWN."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[IGNORE] = IGNORE
    table[list(ignored)] = IGNORE
    for number, values_of_class in enumerate(values):
        table[values_of_class] = number
    return table


def by_value(path, table):
    """Class = table[value]; of a palette file the indices are the values, never the colours."""
    values = np.asarray(Image.open(path))
    if values.ndim != 2 or values.dtype != np.uint8:
        raise UserError(f"{path}: is {values.dtype} with shape {values.shape}, but one 8-bit channel was expected")
    return checked(path, table[values], values)


def by_color(path, colors, ignored=(), unknown=UNKNOWN):
    """Class = position of the pixel's colour in `colors`; an alpha channel is dropped."""
    rgb = read_rgb(path)
    packed = rgb @ np.array([1 << 16, 1 << 8, 1], np.int32)  # (H, W), 0xRRGGBB
    label = np.full(packed.shape, unknown, np.uint8)
    for number, (red, green, blue) in enumerate((*colors, *ignored)):
        label[packed == (red << 16 | green << 8 | blue)] = number if number < len(colors) else IGNORE
    return checked(path, label, rgb)


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
    return checked(path, SYNTHIA_IDS[values], values)


def isprs_label(path, box=None):
    """Six colours, and black for void; channels are cut at 127 because tiles 4_12 and 6_7 hold shades of them."""
    rgb = crop(read_image(path), box).numpy()
    red, green, blue = rgb > 127
    return checked(path, ISPRS_CLASS_OF[red * 4 + green * 2 + blue], np.moveaxis(rgb, 0, 2))


# --- Files to boxes: the labels of a detection set ------------------------------------------------------------------

OBJECTS = 100   # rows of a label; no image of VOC shows as many


def as_label(objects):
    """Objects as float32 (OBJECTS, 6): left, top, right, bottom in pixels, class, whether it is difficult (0 or 1).

    Difficult ones are neither learned nor counted. Rows of zeros follow, as images of a batch need equally many."""
    padding = (OBJECTS - len(objects)) * [6 * [0]]
    return np.array([*objects, *padding], np.float32)


def objects_of(label):
    """The rows that are objects: those with an area."""
    return label[label[:, 2] > label[:, 0]]


def voc_boxes(path):
    """The objects of an annotation, whose pixels are numbered from 1, the last one included."""
    annotation = ElementTree.parse(path)
    width, height = [float(annotation.findtext(f"size/{side}", "")) for side in ("width", "height")]
    objects = []
    for item in annotation.iterfind("object"):
        name = item.findtext("name")
        if name not in VOC_CLASSES:
            raise UserError(f"{path}: holds an object of class {name}, which is not among the dataset's classes")
        box = [float(item.findtext(f"bndbox/{border}", "")) for border in ("xmin", "ymin", "xmax", "ymax")]
        left, top, right, bottom = box  # of the item itself: a person's <part> has a bndbox, too
        if not (0 < left <= right < width + 1 and 0 < top <= bottom < height + 1):
            raise UserError(f"{path}: the box {box} of a {name} has no area, or exceeds the image")
        objects.append([left - 1, top - 1, right, bottom, VOC_CLASSES.index(name), item.findtext("difficult") == "1"])
    if not 0 < len(objects) <= OBJECTS:
        raise UserError(f"{path}: holds {len(objects)} objects, but 1 to {OBJECTS} were expected")
    return as_label(objects)


# --- Class names, colours, lookup tables ----------------------------------------------------------------------------

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
ENDOVIS_PROBE = (12, 255, 141)  # the ultrasound probe, which is not evaluated
CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                  "bicyclist")
CAMVID_COLORS = ((70, 130, 180), (70, 70, 70), (153, 153, 153), (128, 64, 128), (244, 35, 232), (107, 142, 35),
                 (220, 220, 0), (190, 153, 153), (0, 0, 142), (220, 20, 60), (119, 11, 32))
VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")

TRAIN_IDS = lookup_table(range(19))
URBANSYN_IDS = lookup_table(range(19), ignored=[19])
CAMVID_IDS = lookup_table(range(11), ignored=[11])
LABEL_IDS = lookup_table((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
                         ignored=range(35))  # Cityscapes, GTAV and ACDC
SYNTHIA_IDS = lookup_table((3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11), ignored=range(23))
MAPILLARY_IDS = lookup_table((
    [7, 8, 10, 13, 14, 23, 24],     # road: also bike lane, crosswalk, parking, service lane, lane markings
    [2, 9, 11, 15],                 # sidewalk: also curb, curb cut, pedestrian area
    17, 6, 3,                       # building, wall, fence
    [44, 45, 47],                   # pole: also street light, utility pole
    48,                             # traffic light
    [46, 49, 50],                   # traffic sign: its frame, back and front
    30, 29, 27, 19,                 # vegetation, terrain, sky, person
    [20, 21, 22],                   # rider: bicyclist, motorcyclist, other
    55, 61, 54, 58, 57, 52,         # car, truck, bus, train (on rails), motorcycle, bicycle
), ignored=range(66))
ISPRS_CLASS_OF = np.array([IGNORE, 1, 3, 2, 5, UNKNOWN, 4, 0], np.uint8)  # at red 4 + green 2 + blue; magenta: no class


# --- The toy world: streets drawn on the fly, so that the method runs with no download ------------------------------
# A scene is a layout (which object covers which pixel, with exact labels) seen in a look (palette, texture, light,
# weather). One fixed look is the labelled source ("the game"), two more ("arcade", "diorama") are further sources, as
# SYNTHIA and UrbanSyn are to GTAV; four others are never trained on. The wide world draws a random look for each image.
# Coordinates are pixels of 64 x 64. Only rng.random() and exact arithmetic make a scene: the same on every machine.

TOY_SIZE = 64
TOY_CLASSES = ("sky", "building", "vegetation", "road", "pavement", "car", "pole", "person")
SKY, BUILDING, VEGETATION, ROAD, PAVEMENT, CAR, POLE, PERSON = range(8)
TOY_COLORS = ((70, 130, 180), (70, 70, 70), (107, 142, 35), (128, 64, 128), (244, 35, 232), (0, 0, 142), (220, 220, 0),
              (220, 20, 60))

# The palettes: each class's colour, RGB in 0..1, in the order of TOY_CLASSES. The city is the place under the unseen
# weather: it has colours of its own and is not the game behind a filter.
GAME = np.array([[.55, .75, .95], [.62, .50, .42], [.25, .50, .20], [.30, .30, .32],
                 [.62, .60, .58], [.75, .15, .15], [.80, .75, .30], [.85, .60, .45]])
ARCADE = np.array([[.40, .60, .85], [.75, .68, .55], [.35, .60, .25], [.42, .40, .40],
                   [.72, .70, .62], [.20, .45, .75], [.55, .55, .60], [.35, .30, .70]])
DIORAMA = np.array([[.80, .85, .90], [.50, .35, .30], [.20, .40, .28], [.22, .22, .25],
                    [.55, .50, .45], [.85, .80, .20], [.30, .30, .30], [.60, .25, .45]])
CITY = np.array([[.70, .72, .75], [.45, .42, .45], [.30, .38, .15], [.38, .37, .36],
                 [.50, .48, .45], [.15, .22, .55], [.14, .14, .17], [.58, .24, .20]])

GAME_LOOK = dict(
    palette=GAME,
    jitter=.08,             # how far an object's colour may lie from its class's
    texture=.10,            # contrast of each class's pattern
    gain=1.,                # brightness of the light
    tint=np.ones(3),        # its colour
    grey=0.,                # share of the colour that is lost
    fog=0.,                 # share of the fog's colour in what is farthest away
    fog_color=np.full(3, .8),
    white=0.,               # how much snow lies on the ground and on plants
    dots=0.,                # share of the pixels that are falling flakes
    streaks=0.,             # share of the pixels that are streaks of rain
    lamps=0.,               # brightness of lamps on poles and of lights on cars
    noise=.02,              # of the camera
)
LOOKS = {  # in what a domain differs from the game
    "game": {},
    "arcade": dict(palette=ARCADE, gain=1.05, texture=.16, jitter=.12),
    "diorama": dict(palette=DIORAMA, gain=.85, tint=np.array([1.1, 1., .85]), texture=.05),
    "night": dict(palette=CITY, gain=.38, tint=np.array([.85, .95, 1.25]), lamps=.5, noise=.06),
    "fog": dict(palette=CITY, fog=.65, grey=.3, noise=.03),
    "snow": dict(palette=CITY, white=.65, dots=.04, fog=.25, noise=.03),
    "rain": dict(palette=CITY, gain=.75, grey=.4, streaks=.06, fog=.3, fog_color=np.full(3, .5), noise=.04),
}


def toy_look(rng, domain):
    """One look as plain numbers: fixed for a named domain, random for "wide": any light, now and then each weather."""
    if domain != "wide":
        return GAME_LOOK | LOOKS[domain]
    wild = .6 * rng.random() ** 2  # from natural colours towards arbitrary ones
    return dict(
        palette=(1 - wild) * (.5 * GAME + .5 * CITY) + wild * rng.random((8, 3)),
        jitter=.2 * rng.random(),
        texture=.25 * rng.random(),
        gain=.3 + .8 * rng.random(),
        tint=.75 + .5 * rng.random(3),
        grey=rng.random(),
        fog=max(0, 1.6 * rng.random() - .8),
        fog_color=rng.random(3),
        white=max(0, 1.4 * rng.random() - .8),
        dots=max(0, .10 * rng.random() - .06),
        streaks=max(0, .12 * rng.random() - .07),
        lamps=max(0, 1.2 * rng.random() - .7),
        noise=.10 * rng.random(),
    )


class ToyCanvas:
    """A scene while it is drawn, back to front: a map of object numbers, and each object's class and distance."""

    def __init__(self, rng):
        self.rng = rng
        self.map = Image.new("L", (TOY_SIZE, TOY_SIZE), 0)
        self.pen = ImageDraw.Draw(self.map)
        self.kinds = [SKY]          # object 0 is the sky, and
        self.distances = [1.0]      # as far away as anything can be; 0 is near

    def between(self, low, high):
        return low + (high - low) * self.rng.random()

    def one_of(self, *kinds):
        return kinds[int(self.between(0, len(kinds)))]

    def new_object(self, kind, distance):
        """The number of a new object, which the pen draws over those before it."""
        self.kinds.append(kind)
        self.distances.append(distance)
        return len(self.kinds) - 1

    def rectangle(self, kind, distance, left, top, right, bottom):
        self.pen.rectangle([left, top, right, bottom], fill=self.new_object(kind, distance))

    def ellipse(self, kind, distance, left, top, right, bottom):
        self.pen.ellipse([left, top, right, bottom], fill=self.new_object(kind, distance))

    def polygon(self, kind, distance, *corners):
        self.pen.polygon(corners, fill=self.new_object(kind, distance))

    def thing(self, kind, x, y, s, distance):
        """A thing that stands at (x, y), of size s in pixels."""
        if kind == CAR:
            self.rectangle(CAR, distance, x - s, y - .55 * s, x + s, y)
            self.polygon(CAR, distance, (x - .7 * s, y - .5 * s), (x - .4 * s, y - s),
                         (x + .4 * s, y - s), (x + .7 * s, y - .5 * s))
        elif kind == POLE:
            self.rectangle(POLE, distance, x, y - 3.2 * s, x + .35 * s, y)
            if self.rng.random() < .6:  # a sign or a lamp on top
                self.rectangle(POLE, distance, x - .4 * s, y - 3.6 * s, x + .7 * s, y - 2.7 * s)
        elif kind == PERSON:
            self.rectangle(PERSON, distance, x - .4 * s, y - 1.4 * s, x + .4 * s, y)
            self.ellipse(PERSON, distance, x - .35 * s, y - 2.1 * s, x + .35 * s, y - 1.3 * s)
        elif kind == VEGETATION:
            self.ellipse(VEGETATION, distance, x - .8 * s, y - 2 * s, x + .8 * s, y)
        elif kind == BUILDING:
            height = self.between(1., 2.6) * s
            self.rectangle(BUILDING, distance, x - s, y - height, x + s, y)


def toy_layout(rng, jumble=False):
    """Draw one scene: object number per pixel (64, 64), and per object its class and distance (0 near, 1 far)."""
    canvas = ToyCanvas(rng)
    if jumble:
        draw_jumble(canvas)
    else:
        draw_street(canvas)
    return np.array(canvas.map), np.array(canvas.kinds), np.array(canvas.distances)


def draw_jumble(canvas):
    """A scene of the proxy set: the same kinds of things, but no street; anything anywhere at any size."""
    between = canvas.between

    # Two grounds of any classes share the image; a slanted border divides them.
    grounds = (SKY, BUILDING, VEGETATION, ROAD, PAVEMENT)
    canvas.rectangle(canvas.one_of(*grounds), 1, 0, 0, 64, 64)
    canvas.polygon(canvas.one_of(*grounds), between(0, 1), (0, between(0, 64)), (64, between(0, 64)), (64, 64), (0, 64))

    # Four to ten things lie before them.
    for _ in range(int(between(4, 11))):
        kind = canvas.one_of(BUILDING, VEGETATION, CAR, POLE, PERSON)
        canvas.thing(kind, x=between(0, 64), y=between(16, 70), s=between(4, 15), distance=between(0, 1))


def draw_street(canvas):
    """A street that leads to a vanishing point on the horizon, with things on it and beside it."""
    between = canvas.between
    horizon = between(18, 30)
    vanish = between(16, 48)

    # Buildings and trees stand along the horizon.
    for _ in range(int(between(2, 6))):
        canvas.thing(BUILDING, x=between(0, 64), y=horizon + 1, s=between(6, 13), distance=between(.7, .95))
    for _ in range(int(between(0, 5))):
        canvas.thing(VEGETATION, x=between(0, 64), y=horizon + 2, s=between(6, 11), distance=between(.6, .9))

    # The ground is grass or pavement; on it lie the street's own pavement and, narrower, its road.
    left = between(-14, 14)
    right = between(50, 78)
    ground = VEGETATION if canvas.rng.random() < .4 else PAVEMENT
    canvas.rectangle(ground, .5, 0, horizon, 64, 64)
    right_curb = right + between(8, 24)
    left_curb = left - between(8, 24)
    canvas.polygon(PAVEMENT, .5, (vanish - 4, horizon), (vanish + 4, horizon), (right_curb, 64), (left_curb, 64))
    canvas.polygon(ROAD, .5, (vanish - 2, horizon), (vanish + 2, horizon), (right, 64), (left, 64))

    # Cars drive on the road, other things stand beside it, from far (nearness 0) to near (nearness 1).
    count = int(between(2, 6))
    for nearness in sorted(between(.08, .95) for _ in range(count)):
        left_edge = vanish + nearness * (left - vanish)
        right_edge = vanish + nearness * (right - vanish)
        kind = canvas.one_of(CAR, CAR, POLE, PERSON, VEGETATION)
        if kind == CAR:
            x = between(left_edge, right_edge)
        elif canvas.rng.random() < .5:
            x = left_edge - between(1, 14)
        else:
            x = right_edge + between(1, 14)
        y = horizon + nearness * (64 - horizon)
        sizes = {CAR: 7 + 8 * nearness, POLE: 9 + 5 * nearness, PERSON: 9 + 6 * nearness, VEGETATION: 7 + 6 * nearness}
        canvas.thing(kind, x, y, sizes[kind], distance=1 - nearness)


def scene_rng(domain, index):
    """The random numbers of a scene: its layout's, then its look's and its pixels'."""
    return np.random.Generator(np.random.PCG64([0, index, sum(domain.encode())]))


@lru_cache(maxsize=8192)  # a scene takes longer to draw than to train on
def toy_scene(domain, index, jumble=False):
    """Image (64, 64, 3) uint8 and label (64, 64) uint8 of scene number `index`; domain: a key of LOOKS, or "wide"."""
    rng = scene_rng(domain, index)
    objects, kinds, distances = toy_layout(rng, jumble)
    look = toy_look(rng, domain)
    label = kinds[objects]
    y, x = np.mgrid[:TOY_SIZE, :TOY_SIZE]

    # Materials: each object has its own shade of its class's colour, each class its pattern.
    fine = rng.random((64, 64)) - .5
    coarse = np.kron(rng.random((16, 16)), np.ones((4, 4))) - .5
    patterns = np.stack([
        (y - 24) / 64,                              # sky: brighter towards the horizon
        ((x % 5 < 2) & (y % 6 < 3)) - .3,           # building: windows
        coarse + fine,                              # vegetation: leaves
        fine,                                       # road
        ((x + y) % 8 < 1) - .2,                     # pavement: diagonal joints
        (y % 7 < 2) - .3,                           # car
        (y % 6 < 3) - .5,                           # pole: rings
        coarse,                                     # person
    ])  # (8, 64, 64)
    shade = rng.random((len(kinds), 1)) + .5 * rng.random((len(kinds), 3)) - .75
    colors = look["palette"][kinds] + look["jitter"] * shade * 2
    pattern = np.take_along_axis(patterns, label[None], 0)[0]
    image = colors[objects] + look["texture"] * pattern[..., None]

    # Light: snow lies on the ground before the light falls on it; lamps shine of themselves.
    paved = (label == ROAD) | (label == PAVEMENT)
    ground = paved | (label == VEGETATION)
    snow = ground * (.6 + .8 * coarse)
    image += look["white"] * snow[..., None] * (1 - image)
    image = image * look["gain"] * look["tint"]
    for number, kind in enumerate(kinds):
        visible = objects == number
        if look["lamps"] and kind in (POLE, CAR) and visible.any():
            top, left = np.argwhere(visible)[0]
            glow = look["lamps"] / (1 + .06 * ((y - top) ** 2 + (x - left) ** 2))
            image += glow[..., None] * np.array([1., .85, .55])

    # Weather: colours fade, fog thickens with the distance, flakes and streaks fall before all else.
    image += look["grey"] * (image.mean(2, keepdims=True) - image)
    ground_distance = np.clip(1.6 - y / 40, 0, 1)  # road and pavement recede row by row
    distance = np.where(paved, ground_distance, distances[objects])
    image += (look["fog"] * distance)[..., None] * (look["fog_color"] - image)
    flakes = rng.random((64, 64)) < look["dots"]
    image += flakes[..., None] * (.95 - image)
    streaks = np.kron(rng.random((8, 64)) < look["streaks"], np.ones((8, 1)))
    image += .5 * streaks[..., None] * (.8 - image)

    # The camera adds its noise.
    image += look["noise"] * (rng.random((64, 64, 3)) + rng.random((64, 64, 3)) - 1) * 1.5
    image = np.clip(image, 0, 1) * 255 + .5
    return image.astype(np.uint8), label.astype(np.uint8)


@lru_cache(maxsize=8192)
def toy_things(domain, index, least=12):
    """The image of toy_scene, and as its label boxes around what is visible of each thing.

    One of which fewer than `least` pixels are visible is difficult."""
    image, _ = toy_scene(domain, index)
    objects, kinds, distances = toy_layout(scene_rng(domain, index))  # that scene's layout again
    found = []
    for kind, distance in sorted(set(zip(kinds, distances))):  # only parts of one thing are equal in both
        y, x = np.nonzero((kinds[objects] == kind) & (distances[objects] == distance))
        if kind >= CAR and len(x):
            found.append([x.min(), y.min(), x.max() + 1, y.max() + 1, kind - CAR, len(x) < least])
    return image, as_label(found)


# --- The datasets: one row each -------------------------------------------------------------------------------------
# A pattern names files of any image suffix below the dataset's folder: "*" stands for text within one name, "{a,b}" for
# either, "**/" for any folders, "<split>" for the row's text of that split. Image and label are a pair where "*" and
# "{}" stood for the same texts. A space is between patterns for the layouts of several releases: the first that finds a
# file counts.

@dataclass(frozen=True)
class Dataset:
    folder: str                 # below --root, which may also be the folder itself
    images: str = ""            # patterns
    labels: str = ""
    splits: dict = None         # {split: text of "<split>"}; of a generated set {split: range of scene numbers}
    decode: Callable = None     # label file -> uint8 (H, W), or boxes
    classes: tuple = ()
    colors: tuple = ()
    eval_size: tuple = None     # evaluation scales images to fit (long edge, short edge); None: native size
    eval_half: bool = False     # evaluation first halves image and label
    tile: int = None            # images are cut into tiles of this side
    resize_label: bool = False  # labels of another size than their image are known to occur: resized, no error
    generate: Callable = None   # scene number -> image uint8 (H, W, 3) and a label like decode's: a set without files
    own: bool = False           # one's own pictures: upright as their EXIF data say, and what is left out is named
    converted: tuple = ()       # ends of names of files that converters write beside the labels: no labels of this set
    boxes: bool = False         # labels are boxes; of a set with files, "splits" name VOC's lists of images
    corrupted: bool = False     # every image comes in all CORRUPTIONS at all severities

    @property
    def num_classes(self):
        return len(self.classes)


CONVERTED = ("_labelTrainIds",)
TRAIN = {"train": "train"}
TRAIN_VAL = {"train": "train", "val": "val"}
POTSDAM = {"train": "{2_10,2_11,2_12,3_10,3_11,3_12,4_10,4_11,4_12,5_10,5_11,5_12,"
                    "6_7,6_8,6_9,6_10,6_11,6_12,7_7,7_8,7_9,7_10,7_11,7_12}",
           "val": "{2_13,2_14,3_13,3_14,4_13,4_14,4_15,5_13,5_14,5_15,6_13,6_14,6_15,7_13}"}
VAIHINGEN = {"train": "{1,3,5,7,11,13,15,17,21,23,26,28,30,32,34,37}",
             "val": "{2,4,6,8,10,12,14,16,20,22,24,27,29,31,33,35,38}"}
ENDOVIS = {"train": "miccai_challenge_2018_release_1/seq_{1,2,3,4}", "val": "miccai_challenge_release_2/seq_{5,6,7}"}
VOC = {"train": "VOC2007/trainval VOC2012/trainval", "val": "VOC2007/test"}
street = partial(Dataset, classes=CITYSCAPES_CLASSES, colors=CITYSCAPES_COLORS)
isprs = partial(Dataset, classes=ISPRS_CLASSES, colors=ISPRS_COLORS, decode=isprs_label, tile=512)
camvid = partial(Dataset, classes=CAMVID_CLASSES, colors=CAMVID_COLORS, decode=partial(by_value, table=CAMVID_IDS))
voc = Dataset("VOCdevkit", "VOC2007/JPEGImages/*", splits=VOC, decode=voc_boxes, boxes=True, classes=VOC_CLASSES,
              colors=(*CITYSCAPES_COLORS, (255, 140, 0)))


def acdc(condition):
    """One of the four conditions of ACDC, each a domain."""
    return street("acdc", f"rgb_anon/{condition}/<split>/*/*_rgb_anon",
                  f"gt/{condition}/<split>/*/*_gt_labelTrainIds gt/{condition}/<split>/*/*_gt_labelIds",
                  TRAIN_VAL, cityscapes_label, eval_size=(960, 540))


def toy(domain, jumble=False, train=0, val=0):
    """A toy domain with so many scenes for training and for evaluation."""
    splits = {"train": range(train), "val": range(10 ** 6, 10 ** 6 + val)}
    splits = {split: numbers for split, numbers in splits.items() if numbers}
    return Dataset("toy", splits=splits, classes=TOY_CLASSES, colors=TOY_COLORS,
                   generate=partial(toy_scene, domain, jumble=jumble))


def toy_boxes(domain, corrupted=False, **counts):
    """A toy domain whose labels are boxes; their classes are the last ones of TOY_CLASSES."""
    return replace(toy(domain, **counts), classes=TOY_CLASSES[CAR:], colors=TOY_COLORS[CAR:],
                   generate=partial(toy_things, domain), boxes=True, corrupted=corrupted)


DATASETS = {
    # ImageNet, or any folder of images
    "imagenet": Dataset("imagenet", "<split>/{**/}* {**/}*", splits=TRAIN_VAL, own=True),
    # synthetic streets
    "gtav": street("gtav", "images/*", "labels/*", TRAIN, cityscapes_label, resize_label=True, converted=CONVERTED),
    "synthia": street("synthia", "**/RGB/*", "**/GT/LABELS/*", TRAIN, synthia_label, converted=CONVERTED),
    "urbansyn": street("urbansyn", "rgb/**/rgb_*", "ss/**/ss_*", TRAIN, partial(by_value, table=URBANSYN_IDS)),
    # real streets
    "cityscapes": street("cityscapes", "leftImg8bit/<split>/*/*_leftImg8bit",
                         "gtFine/<split>/*/*_gtFine_labelIds gtFine/<split>/*/*_gtFine_labelTrainIds",
                         TRAIN_VAL, cityscapes_label, eval_size=(1024, 512)),
    "bdd100k": street("bdd100k", "images/10k/<split>/* seg/images/<split>/*",
                      "labels/sem_seg/masks/<split>/* seg/labels/<split>/*_train_id",
                      TRAIN_VAL, partial(by_value, table=TRAIN_IDS), eval_size=(1280, 720)),
    "mapillary": street("mapillary", "<split>/images/*", "<split>/v1.2/labels/* <split>/labels/*",
                        {"train": "training", "val": "validation"}, partial(by_value, table=MAPILLARY_IDS),
                        eval_size=(1024, 512), eval_half=True),
    **{f"acdc-{condition}": acdc(condition) for condition in ("night", "snow", "fog", "rain")},
    # from the air
    "potsdam-rgb": isprs("potsdam", "**/top_potsdam_<split>_RGB", "**/top_potsdam_<split>_label_noBoundary", POTSDAM),
    "potsdam-irrg": isprs("potsdam", "**/top_potsdam_<split>_IRRG", "**/top_potsdam_<split>_label_noBoundary", POTSDAM),
    "vaihingen-irrg": isprs("vaihingen", "**/top_mosaic_09cm_area<split>", "**/top_mosaic_09cm_area<split>_noBoundary",
                            VAIHINGEN),
    # surgery
    "endovis18": Dataset("endovis18", "**/<split>/left_frames/*", "**/<split>/labels/*", ENDOVIS,
                         partial(by_color, colors=ENDOVIS_COLORS, ignored=[ENDOVIS_PROBE]), ENDOVIS_CLASSES,
                         ENDOVIS_COLORS),
    # CamVid by day, and at dusk as an unseen domain
    "camvid": camvid("camvid", "<split>/{0006R0,0016E5,Seq05VD}_*", "<split>annot/{0006R0,0016E5,Seq05VD}_*",
                     {"train": "train", "val": "test"}),
    "camvid-dusk": camvid("camvid", "<split>/0001TP_*", "<split>annot/0001TP_*", {"val": "{train,val,test}"}),
    # VOC 2007 and 2012, whose labels are boxes; the corruptions of its test images are an unseen domain
    "voc": voc,
    "voc-corruptions": replace(voc, corrupted=True),
    # one's own images
    "folder": Dataset("folder", "images/<split>*", "masks/<split>*", {"train": "{train/,}", "val": "val/"}, own=True),
    # the toy world
    "toy": toy("game", train=1000, val=100),
    **{f"toy-{look}": toy(look, val=100) for look in ("night", "fog", "snow", "rain")},
    "toy-arcade": toy("arcade", train=1000, val=100),
    "toy-diorama": toy("diorama", train=1000, val=100),
    "toy-wide": toy("wide", train=4000, val=100),
    "toy-proxy": toy("wide", jumble=True, train=2000),
    "toy-boxes": toy_boxes("game", train=1000, val=100),
    **{f"toy-boxes-{look}": toy_boxes(look, val=100) for look in ("night", "fog", "snow", "rain")},
    "toy-boxes-corruptions": toy_boxes("game", val=20, corrupted=True),
}
ACDC = ("acdc-night", "acdc-snow", "acdc-fog", "acdc-rain")
JOINED = {"acdc": ACDC}  # short names of several rows
TOY_SOURCES = ("toy", "toy-arcade", "toy-diorama")
SETTINGS = {  # labelled source -> domains of the table row
    "gtav": ("gtav", ("cityscapes", "bdd100k", "mapillary")),
    "gtav-acdc": ("gtav", ACDC),
    "cityscapes": ("cityscapes", ACDC),
    "potsdam-rgb": ("potsdam-rgb", ("potsdam-irrg", "vaihingen-irrg")),
    "endovis18": ("endovis18", ("endovis18",)),  # its val split is the unseen domain: other sequences
    "camvid": ("camvid", ("camvid-dusk",)),
    "toy": ("toy", ("toy-night", "toy-fog", "toy-snow", "toy-rain")),
    "voc": ("voc", ("voc-corruptions",)),
    "toy-boxes": ("toy-boxes", tuple(f"toy-boxes-{look}" for look in ("night", "fog", "snow", "rain", "corruptions"))),
}


# --- Finding the files ----------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    """One image with its label: where they lie, and how they are read."""
    entry: Dataset
    image: object           # Path, or the number of a generated scene
    label: object = None    # Path
    box: tuple = None       # (left, top, right, bottom) of a tile
    corruption: tuple = None    # a key of CORRUPTIONS and a severity, 1 to 5

    def read_image(self):
        """uint8 (3, H, W); UserError names a file that is broken."""
        if self.entry.generate:
            image = torch.from_numpy(self.entry.generate(self.image)[0]).permute(2, 0, 1)
        else:
            image = crop(read_image(self.image, upright=self.entry.own), self.box)
        return corrupt(image, *self.corruption) if self.corruption else image

    def read_label(self):
        """uint8 (H, W) of class numbers and 255, or boxes; UserError names a file that is broken or holds others."""
        if self.entry.generate:
            return torch.from_numpy(self.entry.generate(self.image)[1])
        try:
            if self.label.suffix == ".npy":
                label = np.load(self.label)
            elif self.box:
                label = self.entry.decode(self.label, self.box)
            else:
                label = self.entry.decode(self.label)
            return torch.from_numpy(label)
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"{self.label}: cannot be read as a label ({error})") from None


def entries(name, classes=0, labelled=True):
    """{name: row of DATASETS} for a name like gtav+synthia; `classes` is the number of classes of --data folder."""
    parts = []
    for part in name.split("+"):
        parts += JOINED.get(part, [part])
    found = {}
    for part in parts:
        if part not in DATASETS or part in found:
            reason = "named twice" if part in found else f"not one of {' '.join(DATASETS)}"
            raise UserError(f"--data {part}: {reason}")
        if classes and (part != "folder" or classes > UNKNOWN):
            raise UserError(f"--classes {classes}: is for --data folder, and at most {UNKNOWN}")
        found[part] = numbered_classes(DATASETS[part], classes) if classes else DATASETS[part]
    if labelled and len({entry.classes for entry in found.values()}) > 1:
        raise UserError(f"--data {name}: these sets have different classes")
    return found


def numbered_classes(entry, classes):
    """The row for one's own images with so many classes, which have numbers for names and bright colours."""
    colors = np.random.default_rng(0).integers(40, 256, (classes, 3)).tolist()
    table = lookup_table(range(classes))
    return replace(entry, decode=partial(by_value, table=table), classes=tuple(map(str, range(classes))),
                   colors=tuple(map(tuple, colors)))


def locate(root, entry):
    """The dataset's folder: below root, or root itself."""
    own = Path(root, entry.folder)
    if own.is_dir():
        return own
    others = sorted({other.folder for other in DATASETS.values() if Path(root, other.folder).is_dir()})
    if others:  # the folder of all datasets: what lies below it is not this dataset
        raise UserError(f"--root {root}: holds {' '.join(others)}, but no folder {entry.folder}")
    if not Path(root).is_dir():
        raise UserError(f"--root {root}: no such folder (it holds one folder per dataset, or is the dataset's own)")
    return Path(root)


class Names:
    """Texts in one buffer: a million Python objects would take 700 MB, and each loading process would copy them."""

    def __init__(self):
        self.buffer = bytearray()
        self.ends = array("q", [0])

    def append(self, text):
        self.buffer += os.fsencode(text)
        self.ends.append(len(self.buffer))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(bytes(self.buffer[self.ends[i]:self.ends[i + 1]]))


@dataclass
class Samples:
    """The Samples of a set with files, each made when it is asked for."""
    entry: Dataset
    folder: Path
    images: Names | list
    labels: list = None     # names of the same length and order
    ending: str = ""        # what follows each name

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        label = self.folder / (self.labels[i] + self.ending) if self.labels else None
        return Sample(self.entry, self.folder / (self.images[i] + self.ending), label)


def find(folder, patterns, text, skipped=()):
    """The files below a folder by the first pattern that matches any: Names, regular expression, Names of all others.

    `text` stands for <split>; files whose name without suffix ends in one of `skipped` are passed over."""
    for pattern in patterns.replace("<split>", text).split():
        regex = as_regex(pattern)
        top = re.split(r"[*{]", pattern)[0].rpartition("/")[0]  # the folder below which all its files lie
        names = Names()
        others = Names()
        for name in files_below(folder, top):
            if not regex.fullmatch(name):
                others.append(name)
            elif not os.path.splitext(name)[0].endswith(skipped):
                names.append(name)
        if len(names):
            return names, regex, others
    return Names(), None, Names()


def find_some(part, folder, patterns, text, skipped=()):
    """What `find` returns, found by the first process for all of them; UserError where no file matches."""
    names, regex, others = from_the_first(find, folder, patterns, text, skipped)
    if not len(names):
        looked_for = " or ".join(patterns.replace("<split>", text).split())
        raise UserError(f"--data {part}: {folder} holds no files like {looked_for}")
    return names, regex, others


def by_key(names, regex):
    """{texts for "*" and "{}" in a pattern: [names]}, sorted; several names are one with several suffixes."""
    found = {}
    for name in names:
        found.setdefault(regex.fullmatch(name).groups(), []).append(name)
    return dict(sorted(found.items()))


def files_below(folder, top=""):
    """All files below folder / top that are not hidden, as texts below folder; each folder once, links followed."""
    seen = set()
    for parent, folders, names in os.walk(folder / top, onerror=refuse, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen or os.path.basename(parent) == "__MACOSX":
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder)
        for name in sorted(names):
            if not name.startswith("."):
                yield name if below == "." else f"{below}/{name}"


def refuse(error):
    """A folder that is not there has no files; one that cannot be listed would hide those it has."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def as_regex(pattern):
    """A pattern of DATASETS as a regular expression, whose groups are the texts for "*" and "{}"."""
    regex = re.escape(pattern)
    regex = regex.replace(r"\{", "(").replace(r"\}", ")").replace(",", "|")
    regex = regex.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "([^/]*)")
    suffix = "|".join(map(re.escape, SUFFIXES))
    return re.compile(f"{regex}(?i:{suffix})")


def tile_boxes(width, height, side):
    """Boxes (left, top, right, bottom) every `side` pixels, the last flush with the border; 12 x 12 for 6000 px."""
    lefts = [min(left, max(width - side, 0)) for left in range(0, width, side)]
    tops = [min(top, max(height - side, 0)) for top in range(0, height, side)]
    return [(left, top, left + side, top + side) for top in tops for left in lefts]


def listing(part, entry, root, split, labelled, cache=0):
    """The samples of one dataset, and the files that have no partner, or several."""
    if split not in entry.splits:
        raise UserError(f"--data {part}: has no {split} split, only {' '.join(entry.splits)}")
    if entry.generate:
        return [Sample(entry, number) for number in entry.splits[split]], []
    if entry.boxes:
        return voc_samples(part, entry, locate(root, entry), split), []
    if labelled and not entry.decode:
        missing = "say how many --classes" if part == "folder" else "has no labels"
        raise UserError(f"--data {part}: {missing}")

    folder = locate(root, entry)
    images, regex, others = find_some(part, folder, entry.images, entry.splits[split])
    labels = None
    alone = []
    if labelled:
        labels, labels_regex, _ = find_some(part, folder, entry.labels, entry.splits[split], entry.converted)
        images, labels, alone = paired(by_key(images, regex), by_key(labels, labels_regex))
    samples = Samples(entry, folder, images, labels)
    if cache and split == "train":  # evaluation sees the original pixels
        samples = use_stored(samples, part, cache)
    rest = left_out(folder, entry, others) if entry.own else ""
    qsd.say(f"{part} {split}: {len(samples)} images in {folder}{rest}")
    return samples, [folder / name for name in alone]


def paired(images, labels):
    """Of {key: [names]} twice: the images with one label each, those labels, and the names of all others."""
    with_label = []
    with_image = []
    alone = []
    for key in images | labels:
        here = images.get(key, [])
        there = labels.get(key, [])
        if len(here) == len(there) == 1:
            with_label += here
            with_image += there
        else:
            alone += here + there
    return with_label, with_image, alone


def left_out(folder, entry, others):
    """The end of a line that says how many files of one's own folder belong to no split."""
    patterns = " ".join(entry.images.replace("<split>", text) for text in entry.splits.values())
    regex = re.compile("|".join(as_regex(pattern).pattern for pattern in patterns.split()))
    return and_without(folder, [name for name in others if not regex.fullmatch(name)])


def and_without(folder, names):
    """The end of a line on a folder's images: how many other files below it are left out, with an example."""
    return f"; {len(names)} other files there are left out, such as {folder / names[0]}" if names else ""


def preflight_command(part, entry, root):
    """The command that looks through a dataset, as a shell takes it."""
    classes = f" --classes {entry.num_classes}" if part == "folder" and entry.num_classes else ""
    return f"python data.py --data {part} --root {shlex.quote(str(root))}{classes}"


def voc_samples(part, entry, folder, split):
    """The samples that VOC's lists name: JPEGImages/NAME.jpg and Annotations/NAME.xml in the folder of the year."""
    samples = []
    for text in entry.splits[split].split():  # as VOC2007/trainval
        year = folder / Path(text).parent
        file = year / f"ImageSets/Main/{Path(text).name}.txt"
        if not file.is_file():
            raise UserError(f"--data {part}: {file} is not there")
        names = file.read_text(errors="replace").split()
        if not names:
            raise UserError(f"{file}: names no image")
        for name in names:
            samples.append(Sample(entry, year / f"JPEGImages/{name}.jpg", year / f"Annotations/{name}.xml"))
    qsd.say(f"{part} {split}: {len(samples)} images in {folder}")
    return samples


def gather(name, root, split, labelled, cache=0, classes=0):
    """All samples of a name like gtav+synthia, each tile, each corruption; UserError where a file lacks its partner."""
    samples = []
    for part, entry in entries(name, classes, labelled).items():
        found, alone = listing(part, entry, root, split, labelled, cache)
        if alone:
            raise UserError(f"{alone[0]}: has no partner ({len(alone)} such files in {part} {split}); list them with "
                            f"{preflight_command(part, entry, root)}")
        if entry.tile or entry.corrupted:
            found = list(itertools.chain.from_iterable(map(pieces, found)))
        samples.append(found)
    return samples[0] if len(samples) == 1 else ConcatDataset(samples)


def pieces(sample):
    """The tiles of a large image, or all corruptions of one."""
    if sample.entry.corrupted:
        return [sample._replace(corruption=pair) for pair in itertools.product(CORRUPTIONS, range(1, 6))]
    with Image.open(sample.image) as header:
        boxes = tile_boxes(*header.size, sample.entry.tile)
    return [sample._replace(box=box) for box in boxes]


# --- Datasets -------------------------------------------------------------------------------------------------------

class Scenes(torch.utils.data.Dataset):
    """Samples by key (index, draw), or by index: items (image, draw), or (image, label, draw) if labelled.

    All that is random about an item follows from (seed, draw), so that neither the number of workers nor of processes
    changes it. A training image that cannot be read is named and replaced by the next; all else is a UserError."""

    def __init__(self, samples, transform, labelled, training):
        self.samples = samples
        self.transform = transform
        self.labelled = labelled
        self.training = training
        self.seed = 0  # set by loader
        self.unreadable = torch.frombuffer(mmap.mmap(-1, len(samples)), dtype=torch.bool)  # known to all workers
        entry = samples[0].entry
        self.boxes = entry.boxes
        self.classes = entry.classes
        self.colors = entry.colors
        self.num_classes = entry.num_classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, draw = key if isinstance(key, tuple) else (key, key)
        sample, image = self.read(index)
        label = None
        if self.labelled:
            label = sample.read_label()
            if not self.boxes and label.shape != image.shape[1:]:
                if not sample.entry.resize_label:
                    raise UserError(mismatch(sample, image, label))
                label = resize_label(label, image.shape[1:])
        if self.transform:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix(self.seed, draw))  # torch.manual_seed would touch the GPU's too
                image, label = self.transform(image, label)
        if self.labelled:
            return image.contiguous(), label if self.boxes else label.long(), draw
        return image.contiguous(), draw

    def read(self, index):
        """The sample at index with its image; while training the next that can be read."""
        while True:
            sample = self.samples[index]
            try:
                if not self.unreadable[index]:
                    return sample, sample.read_image()
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


ORDER, ERASED_BOX, ERASED_PIXELS, MASKS = range(1, 5)  # each use of a draw's number has random numbers of its own


def mix(*numbers):
    """One 32-bit seed from several numbers (torch's CPU generator reads 32 bits, and neighbours must differ)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def images(name, root, transform=None, split="train", cache=0):
    """Images without labels, for distillation and for figures; `cache` is the short side of a stored set."""
    return Scenes(gather(name, root, split, False, cache), transform, labelled=False, training=split == "train")


LABEL_SEED = 0  # of the subset that labels="1/16" takes: the same images in every run


def scenes(name, root, split="train", transform=None, labels="1", classes=0, cache=0):
    """Images with labels; labels="1/16" keeps a fixed random subset, `classes` is the number of classes of "folder"."""
    try:
        share = Fraction(labels)
    except (ValueError, ZeroDivisionError):
        share = 0
    if not 0 < share <= 1:
        raise UserError(f"--labels {labels}: a fraction like 1/16 was expected")
    samples = gather(name, root, split, True, cache, classes)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(LABEL_SEED))
    count = max(1, round(share * len(samples)))
    kept = sorted(order[:count].tolist())
    return Scenes([samples[i] for i in kept], transform, labelled=True, training=split == "train")


# --- Which image when -----------------------------------------------------------------------------------------------

@dataclass
class Draws:
    """Batch sampler: this process's micro-batches of keys (index, draw), from a step on, forever.

    Draw d of a run belongs to epoch d // n. An epoch is a permutation seeded by (seed, epoch) of which each image comes
    `repeats` times in a row (repeated augmentation), cut to n draws. Step s takes draws [s batch, (s + 1) batch); each
    process a contiguous share of them, in `accumulate` micro-batches: the same images at any number of processes.
    world x accumulate divides the batch: see passes_of."""
    n: int
    batch: int
    seed: int = 0
    start_step: int = 0
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    repeats: int = 1

    def __iter__(self):
        share = self.batch // self.world
        micro = share // self.accumulate
        for step in itertools.count(self.start_step):
            first = step * self.batch + self.rank * share
            for start in range(first, first + share, micro):
                yield [(self.index(draw), draw) for draw in range(start, start + micro)]

    def index(self, draw):
        """The image of a draw."""
        order = order_of_epoch(self.n, self.seed, draw // self.n)
        return order[draw % self.n // self.repeats].item()


@lru_cache(maxsize=1)
def order_of_epoch(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, ORDER, epoch)))


def loader(dataset, batch, workers=0, **order):
    """Endless batches (image uint8 (B, 3, H, W), [label int64 (B, H, W),] draw (B,)), B = batch/world/accumulate.

    `order`: the constants of Draws that follow batch."""
    draws = Draws(len(dataset), batch, **order)
    dataset.seed = draws.seed
    return DataLoader(dataset, batch_sampler=draws, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      prefetch_factor=4 if workers else None, worker_init_fn=outlast_signals,
                      multiprocessing_context=start_method(workers))


def start_method(workers):
    """How loading processes begin: as a copy of this one; Python 3.14's default would have to pickle the transforms."""
    return "fork" if workers else None


def outlast_signals(worker):
    """Keep a loading process alive until the training one has finished its step: signals often reach both.

    SIGTERM leaves it 30 seconds and no more, for that is how Python ends it after a crash, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


# --- Stage 1: crop, flip, RandAugment -------------------------------------------------------------------------------

def chance(p):
    return torch.rand(()).item() < p


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def distill_transform(size, randaugment=True, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=0.5):
    """Augmentation of both distillation stages: random resized crop, flip, RandAugment; uint8 (3, size, size)."""
    def transform(image, label=None):
        box = RandomResizedCrop.get_params(image, scale, ratio)
        image = TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        if chance(flip):
            image = image.flip(2)
        image = image.contiguous()
        if randaugment:
            image = rand_augment(image)
        return image, label
    return transform


def rand_augment(image, ops=2, p=0.5, magnitude=9, std=0.5):
    """RandAugment as timm's "rand-m9-mstd0.5-inc1"; uint8 (3, H, W)."""
    for _ in range(ops):
        op = RAND_AUGMENT[torch.randint(len(RAND_AUGMENT), ()).item()]
        if chance(p):
            level = min(max(magnitude + std * torch.randn(()).item(), 0), 10) / 10
            signed = level if chance(0.5) else -level
            image = op(image, level, signed)
    return image


def warp(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """Output pixel (x, y) shows input (a x + b y + c, d x + e y + f), bicubic, FILL outside."""
    height, width = image.shape[1:]
    x = torch.arange(width) + 0.5
    y = torch.arange(height)[:, None] + 0.5
    grid_x = (a * x + b * y + c) * (2 / width) - 1
    grid_y = (d * x + e * y + f) * (2 / height) - 1
    grid = torch.stack([grid_x, grid_y], -1)  # (H, W, 2), in -1..1 as grid_sample wants it
    fill = torch.tensor(FILL)[:, None, None]
    difference = (image.float() - fill)[None]  # outside, grid_sample reads 0
    out = F.grid_sample(difference, grid[None], mode="bicubic", align_corners=False)
    return out[0].add_(fill).round_().clamp_(0, 255).to(torch.uint8)


def shift(image, dx, dy):
    """Output pixel (x, y) shows input (x + dx, y + dy), in whole pixels: half a pixel off at most, 30 x faster."""
    pad = [max(-dx, 0), max(-dy, 0), max(dx, 0), max(dy, 0)]  # left, top, right, bottom
    padded = TF.pad(image, pad, fill=list(FILL))
    return TF.crop(padded, max(dy, 0), max(dx, 0), *image.shape[1:])


def rotate(image, signed):
    angle = math.radians(30 * signed)
    cos = math.cos(angle)
    sin = math.sin(angle)
    x = image.shape[2] / 2  # the centre, which stays
    y = image.shape[1] / 2
    return warp(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def sharpen(image, factor):
    """Pillow's sharpness: away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, borders kept."""
    x = image.float()
    inner = x[:, 1:-1, 1:-1]
    three_rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    nine = three_rows[:, :, :-2] + three_rows[:, :, 1:-1] + three_rows[:, :, 2:]
    smooth = (nine + 4 * inner).div_(13).round_()
    inner.copy_(smooth.lerp(inner, factor))
    return x.clamp_(0, 255).to(torch.uint8)


def strength(signed):
    """A factor that changes nothing at 1; the level leads away from 1 ("increasing")."""
    return max(0.1, 1 + 0.9 * signed)


RAND_AUGMENT = (  # each operation takes an image, a level in 0..1, and the level with a random sign
    lambda image, level, signed: rotate(image, signed),
    lambda image, level, signed: image & (0xF0 << int(4 * level) & 0xFF),   # posterize: 4 bits stay at level 0, 0 at 1
    lambda image, level, signed: torch.where(image < 256 - int(256 * level), image, 255 - image),   # solarize
    lambda image, level, signed: torch.where(image < 128, image + int(110 * level), image),         # solarize, add
    lambda image, level, signed: TF.autocontrast(image),
    lambda image, level, signed: TF.equalize(image),
    lambda image, level, signed: 255 - image,                                                       # invert
    lambda image, level, signed: TF.adjust_saturation(image, strength(signed)),
    lambda image, level, signed: TF.adjust_contrast(image, strength(signed)),
    lambda image, level, signed: TF.adjust_brightness(image, strength(signed)),
    lambda image, level, signed: sharpen(image, strength(signed)),
    lambda image, level, signed: warp(image, b=0.3 * signed),                                       # shear x
    lambda image, level, signed: warp(image, d=0.3 * signed),                                       # shear y
    lambda image, level, signed: shift(image, round(0.45 * signed * image.shape[2]), 0),            # translate x
    lambda image, level, signed: shift(image, 0, round(0.45 * signed * image.shape[1])),            # translate y
)


# --- On the device: normalisation, random erasing, the noise of the masks -------------------------------------------

def normalize(image, mean, std):
    """uint8 (B, 3, H, W) to floats of mean 0 and deviation 1."""
    mean = 255 * torch.tensor(mean, device=image.device)[:, None, None]
    std = 255 * torch.tensor(std, device=image.device)[:, None, None]
    return (image - mean) / std


def renormalize(x, model, other):
    """Images normalised for one encoder, normalised for another instead: x std + mean are the pixels of both."""
    if (model.mean, model.std) == (other.mean, other.std):
        return x
    scale = np.divide(model.std, other.std)
    offset = np.subtract(model.mean, other.mean) / other.std
    return x * x.new_tensor(scale)[:, None, None] + x.new_tensor(offset)[:, None, None]


def erase(x, draws, seed=0, p=0.25, area=(0.02, 1 / 3), ratio=(0.3, 3.3)):
    """Random erasing, in place: one box of noise in a share p of normalised x (B, 3, H, W), by (seed, draw) alone."""
    height, width = x.shape[2:]
    generator = torch.Generator(x.device)
    for i, draw in enumerate(draws.tolist()):
        rng = np.random.default_rng((seed, ERASED_BOX, draw))
        if rng.random() >= p:
            continue
        for _ in range(10):  # tries until the box fits
            pixels = rng.uniform(*area) * height * width
            aspect = math.exp(rng.uniform(*np.log(ratio)))
            h = round(math.sqrt(pixels * aspect))
            w = round(math.sqrt(pixels / aspect))
            if h < height and w < width:
                top = rng.integers(height - h + 1)
                left = rng.integers(width - w + 1)
                generator.manual_seed(mix(seed, ERASED_PIXELS, draw))
                x[i, :, top:top + h, left:left + w].normal_(generator=generator)
                break
    return x


def uniform_noise(draws, N, seed):
    """Random numbers in 0..1, (B, N), each row by (seed, draw) alone: the same masks at any number of processes."""
    generators = [torch.Generator().manual_seed(mix(seed, MASKS, draw)) for draw in draws.tolist()]
    return torch.stack([torch.rand(N, generator=generator) for generator in generators])


# --- Stage 2: image and label together ------------------------------------------------------------------------------

def segment_transform(size=512, cat_max_ratio=0.75, flip=0.5):
    """Random scale, crop, flip, colours, and padding to (size, size), as the official mmsegmentation pipeline does."""
    short_edges = [size * tenths // 10 for tenths in range(5, 21)]  # 0.5, 0.6, .. 2.0 sizes
    long_edge = 4 * size  # at most

    def transform(image, label):
        height, width = label.shape
        short_edge = short_edges[torch.randint(len(short_edges), ()).item()]
        scale = min(short_edge / min(height, width), long_edge / max(height, width))
        scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = resize(image, scaled)
        label = resize_label(label, scaled)
        rows, columns = varied_crop(label, size, cat_max_ratio)
        image = distort(image[:, rows, columns])
        label = label[rows, columns]
        if chance(flip):
            image = image.flip(2)
            label = label.flip(1)
        pad = [0, 0, size - label.shape[1], size - label.shape[0]]  # left, top, right, bottom
        image = TF.pad(image, pad, fill=list(FILL))
        label = TF.pad(label[None], pad, fill=IGNORE)[0]
        return image, label
    return transform


def varied_crop(label, size, cat_max_ratio, tries=10):
    """Rows and columns, as slices, of a random crop in which no class fills cat_max_ratio of the labelled pixels.

    The last try is taken whatever it holds."""
    height, width = label.shape
    for _ in range(tries):
        top = torch.randint(max(height - size, 0) + 1, ()).item()
        left = torch.randint(max(width - size, 0) + 1, ()).item()
        rows = slice(top, top + size)
        columns = slice(left, left + size)
        counts = torch.bincount(label[rows, columns].flatten(), minlength=256)[:IGNORE]
        if counts.max() < cat_max_ratio * counts.sum():
            break
    return rows, columns


def distort(image, brightness=32, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18):
    """Brightness, saturation and hue, with contrast before or after the last two, each with probability 0.5.

    uint8 (3, H, W); brightness in grey levels, hue in OpenCV's half degrees; mmsegmentation's PhotoMetricDistortion."""
    if chance(0.5):
        image = linear(image, 1, uniform(-brightness, brightness))
    change_contrast = chance(0.5)
    contrast_first = chance(0.5)
    if change_contrast and contrast_first:
        image = linear(image, uniform(*contrast), 0)
    if chance(0.5):
        image = saturate(image, uniform(*saturation))
    if chance(0.5):
        image = TF.adjust_hue(image, uniform(-hue, hue) / 180)
    if change_contrast and not contrast_first:
        image = linear(image, uniform(*contrast), 0)
    return image


def linear(image, factor, offset):
    return (image * factor + offset).clamp_(0, 255).to(torch.uint8)


def saturate(image, factor):
    """Scale the S of HSV: the channels' distances to the largest one grow by the factor, until the smallest is 0."""
    brightest = image.amax(0).float()
    reach = brightest - image.amin(0)
    factor = torch.minimum(torch.full_like(reach, factor), brightest / reach.clamp(min=1))
    return (brightest - (brightest - image) * factor).round_().to(torch.uint8)


def detect_transform(image, label, size, visible=0.3):
    """Image and boxes together: the short edge scaled to size, a square crop, flip; uint8 (3, size, size), boxes.

    A box of which the crop shows less than the share `visible` is dropped."""
    boxes = BoundingBoxes(label[:, :4], format="XYXY", canvas_size=image.shape[1:])
    scale = size / min(image.shape[1:])
    together = Compose([Resize(size), RandomCrop(size), RandomHorizontalFlip()])
    image, seen = together(image, boxes)
    label = torch.cat([seen, label[:, 4:]], 1)
    label[box_area(seen) < visible * scale ** 2 * box_area(boxes)] = 0
    return image, label


def eval_transform(name):
    """Official test size of a dataset for the image; the label keeps its own (Mapillary's is halved)."""
    (entry,) = entries(name).values()

    def transform(image, label):
        if entry.eval_half:
            half = (image.shape[1] // 2, image.shape[2] // 2)
            image = resize(image, half, InterpolationMode.BICUBIC, antialias=True)
            label = resize_label(label, half)
        if entry.eval_size:
            height, width = image.shape[1:]
            long_edge, short_edge = entry.eval_size
            scale = min(long_edge / max(height, width), short_edge / min(height, width))
            image = resize(image, (round(height * scale), round(width * scale)))
        return image, label
    return transform


# --- Corruptions: an unseen domain for detectors --------------------------------------------------------------------
# Ten of the fifteen corruptions of Hendrycks and Dietterich (2019), over which Michaelis et al. (2019) average. The
# others need further packages or photographs: motion and glass blur, snow, frost, elastic.

CORRUPTIONS = {  # the constants of severity 1 to 5
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),                                   # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),                                                   # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),                                    # share of black and white
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),                # radius, deviation
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),    # farthest, step
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),                        # strength, decay
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),                                            # added to V of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),                                             # factor about the mean
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),                                             # scale
    "jpeg_compression": (25, 18, 15, 10, 7),                                            # quality
}


def corrupt(image, name, severity):
    """An image uint8 (3, H, W) under one of CORRUPTIONS; all that is random follows from its pixels."""
    c = CORRUPTIONS[name][severity - 1]
    x = image / 255
    height, width = image.shape[1:]
    generator = torch.Generator().manual_seed(zlib.crc32(image.contiguous().numpy()))
    if name == "gaussian_noise":
        x = x + c * torch.randn(x.shape, generator=generator)
    elif name == "shot_noise":
        x = torch.poisson(c * x, generator) / c
    elif name == "impulse_noise":
        noise = torch.rand(x.shape, generator=generator)
        x = x.masked_fill(noise < c / 2, 0).masked_fill(noise > 1 - c / 2, 1)
    elif name == "defocus_blur":
        radius, deviation = c
        reach = torch.arange(-radius, radius + 1) ** 2
        disk = (reach[:, None] + reach <= radius ** 2).float()
        padded = F.pad(x[:, None], [radius] * 4, mode="reflect")
        x = TF.gaussian_blur(F.conv2d(padded, disk[None, None] / disk.sum())[:, 0], 5, deviation)
    elif name == "zoom_blur":
        zooms = [TF.affine(x, 0, [0, 0], zoom, [0, 0], InterpolationMode.BILINEAR) for zoom in np.arange(1, *c)]
        x = torch.stack([x, *zooms]).mean(0)
    elif name == "fog":
        strength, decay = c
        x = (x + strength * clouds(height, width, decay, generator)) * x.max() / (x.max() + strength)
    elif name == "brightness":
        value = x.amax(0)
        brighter = (value + c).clamp(max=1)
        x = torch.where(value > 0, x * brighter / value, brighter)
    elif name == "contrast":
        x = x.mean((1, 2), keepdim=True).lerp(x, c)
    elif name == "pixelate":
        small = TF.to_pil_image(image).resize((int(c * width), int(c * height)), Image.Resampling.BOX)
        return TF.pil_to_tensor(small.resize((width, height), Image.Resampling.BOX))
    elif name == "jpeg_compression":
        return TF.jpeg(image, c)
    return (255 * x).round_().clamp_(0, 255).to(torch.uint8)


def clouds(height, width, decay, generator):
    """A plasma fractal in 0..1, (H, W): each new point is the mean of four around it, and noise that gets weaker."""
    x = torch.zeros(1, 1)
    for octave in range(math.ceil(math.log2(max(height, width)))):
        noise = decay ** (-2 * octave) * (torch.rand(3, *x.shape, generator=generator) - 0.5)
        centre = (x + x.roll(-1, 1) + x.roll(-1, 0) + x.roll((-1, -1), (0, 1))) / 4 + noise[0]
        across = (x + x.roll(-1, 1) + centre + centre.roll(1, 0)) / 4 + noise[1]
        down = (x + x.roll(-1, 0) + centre + centre.roll(1, 1)) / 4 + noise[2]
        x = F.pixel_shuffle(torch.stack([x, across, down, centre]), 2)[0]
    x = (x - x.min()) / (x.max() - x.min())
    return x[:height, :width]


# --- Storing a set at training size: python data.py --data gtav --root /data --cache 512 ----------------------------

def store(name, root, size, classes=0, workers=0):
    """Write the training split at short side `size` beside its folder: raw pixels that are mapped, not decoded.

    GTAV at 512 takes 48 GB, 12 of them labels. Crops smaller than `size` come out coarser than from the original."""
    for part, entry in entries(name, classes).items():
        if entry.generate or entry.tile or entry.boxes:
            raise UserError(f"--cache {size}: {part} is fast without")
        samples = gather(part, root, "train", bool(entry.decode), classes=classes)
        folder = samples.folder
        target = stored_folder(part, folder, size)
        if target.exists():
            raise UserError(f"--cache {size}: {target} exists; delete it to make it again")
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            job = partial(store_sample, folder=folder, target=unfinished, size=size)
            unreadable = sum(in_parallel(job, samples, workers, f"storing {part}"))
            made_from = {"from": str(folder), "short_side": size, "unreadable": unreadable,
                         "pixels": "uint8, bicubic with antialias; labels are class numbers, nearest pixel"}
            for kind, files in files_of(samples).items():
                made_from[kind] = names_and_sizes(folder, files)
                made_from[f"{kind}, times"] = some_bytes(files, times=True)
                made_from[f"{kind}, bytes"] = some_bytes(files)
            (unfinished / "made_from.json").write_text(json.dumps(made_from, indent=1))
            os.replace(unfinished, target)  # complete or absent
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        print(f"{target}: {len(samples) - unreadable} images")


def stored_folder(part, folder, size):
    return folder.resolve().parent / f"{part}-{size}"


def files_of(samples):
    """The files of a set: {"images": [Path]}, and if it is labelled "labels"."""
    files = {"images": [samples.folder / name for name in samples.images]}
    if samples.labels:
        files["labels"] = [samples.folder / name for name in samples.labels]
    return files


def names_and_sizes(folder, files):
    listed = "\n".join(f"{file.relative_to(folder)} {file.stat().st_size}" for file in files)
    return f"{len(files)} files, names and sizes have sha256 {hashlib.sha256(listed.encode()).hexdigest()}"


def some_bytes(files, times=False):
    """A text that changes with bytes of any of the files; times: with those of 256 files and the time of any."""
    digest = hashlib.sha256()
    step = math.ceil(len(files) / 256) if times else 1
    for i, file in enumerate(files):
        if times:
            digest.update(str(file.stat().st_mtime_ns).encode())
        if i % step == 0:
            digest.update(fingerprint(file).encode())
    return digest.hexdigest()


def made_from_these(made_from, samples):
    """Whether a stored set comes from these files as they are; a copy of them has other times, but the same bytes."""
    for kind, files in files_of(samples).items():
        if made_from.get(kind) != names_and_sizes(samples.folder, files):
            return False
        times = some_bytes(files, times=True)
        if made_from.get(f"{kind}, times", times) != times:     # older versions noted names and sizes only
            if made_from.get(f"{kind}, bytes") != some_bytes(files):
                return False
    return True


def store_sample(sample, folder, target, size):
    """Write image and label of one sample; returns whether the image is unreadable (training will skip it too)."""
    try:
        image = sample.read_image()
    except UserError as error:
        print(error, file=sys.stderr)
        return True
    height, width = image.shape[1:]
    scale = min(1, size / min(height, width))
    smaller = (round(height * scale), round(width * scale))
    image = resize(image, smaller, InterpolationMode.BICUBIC, antialias=True)
    stored = {sample.image: image.permute(1, 2, 0)}
    if sample.label:
        stored[sample.label] = resize_label(sample.read_label(), smaller)
    for original, pixels in stored.items():
        file = Path(f"{target / original.relative_to(folder)}.npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.ascontiguousarray(pixels))
    return False


def use_stored(samples, part, size):
    """The same samples with the stored files; UserError unless those were made from the files as they are now."""
    target = stored_folder(part, samples.folder, size)
    made_from = read_book(target / "made_from.json")
    if not from_the_first(made_from_these, made_from, samples):
        state = "was made from other files; delete it and run" if target.exists() else "is not there; run"
        raise UserError(f"--cache {size}: {target} {state} "
                        f"{preflight_command(part, samples.entry, samples.folder)} --cache {size}")
    return replace(samples, folder=target, ending=".npy")


def in_parallel(job, items, workers, title):
    """Results of job(item) in order, behind a bar."""
    if workers:
        pool = ProcessPoolExecutor(workers, initializer=begin_worker)
        try:
            yield from tqdm(pool.map(job, items, chunksize=8), title, len(items))
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        yield from tqdm(map(job, items), title, len(items))


def begin_worker():
    """One thread for each process; Ctrl-C is the business of the one that began it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- Preflight: python data.py --data gtav --root /data -------------------------------------------------------------

class Finding(NamedTuple):
    """What opening a sample's files showed."""
    problem: str = None  # what is wrong, in a line
    oddity: str = None  # what is odd, but known of this dataset
    counts: np.ndarray = np.zeros(256, np.int64)  # pixels of each label value, or objects of each class


def check_sample(sample):
    """Open both files of a sample."""
    try:
        image = sample.read_image()
        if not sample.label and not sample.entry.generate:
            return Finding()
        label = sample.read_label()
    except UserError as error:
        return Finding(problem=str(error))
    values = objects_of(label)[:, 4].int() if sample.entry.boxes else label.flatten()
    counts = np.bincount(values.numpy(), minlength=256)
    if sample.entry.boxes or label.shape == image.shape[1:]:
        return Finding(counts=counts)
    if sample.entry.resize_label:
        return Finding(oddity=f"{mismatch(sample, image, label)}, will be resized", counts=counts)
    return Finding(problem=mismatch(sample, image, label), counts=counts)


def preflight(name, root, out=None, classes=0, workers=0):
    """Open every file of every split that is there and print what was found; returns the number of problems."""
    if out and Path(out).suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: a picture's name ends in one of {' '.join(sorted(SUFFIXES))}")
    if out:
        check_place("--out", out)
    count = 0
    shown = []
    counts = np.zeros(256, np.int64)
    for part, entry in entries(name, classes).items():
        for split in splits_at_hand(entry, root):
            samples, alone = listing(part, entry, root, split, bool(entry.labels))
            findings = list(in_parallel(check_sample, samples, workers, f"{part} {split}"))
            problems = [f"{file}: has no partner, or several" for file in alone]
            problems += [finding.problem for finding in findings if finding.problem]
            oddities = [finding.oddity for finding in findings if finding.oddity]
            kind = "pairs" if entry.classes else "images"
            print(f"{part} {split}: {len(samples)} {kind}, {len(problems)} problems")
            for line in problems + oddities:
                print(f"  {line}")
            count += len(problems)
            counts += sum(finding.counts for finding in findings)
            good = [sample for sample, finding in zip(samples, findings) if not finding.problem]
            shown += good[::max(1, math.ceil(len(good) / 4))]  # 4 at most, evenly
    print_shares(entry.classes, counts, "objects" if entry.boxes else "pixels")
    if out and shown:
        with whole(Path(out)) as file:
            overview(shown).save(file)
    return count


def splits_at_hand(entry, root):
    """The splits that have images; if none has, the first, so that listing says what is missing."""
    if entry.generate:
        return list(entry.splits)
    folder = locate(root, entry)
    found = [split for split, text in entry.splits.items() if len(find(folder, entry.images, text)[0])]
    return found or list(entry.splits)[:1]


def print_shares(classes, counts, what):
    """A line for each class's share of the pixels or objects; of a set without labels nothing."""
    named = {name: counts[number] for number, name in enumerate(classes)}
    named["ignored"] = counts[IGNORE]
    total = sum(named.values())
    if not total:
        return
    width = max(map(len, named))
    print(f"share of the {what}, %")
    for name, count in named.items():
        print(f"  {name:{width}} {100 * count / total:6.2f}")


def palette(colors):
    """The colour of each class number as an array (256, 3), uint8: black for those that are none, as 255."""
    black = [(0, 0, 0)] * (256 - len(colors))
    return np.array([*colors, *black], np.uint8)


def overview(samples, width=300, gap=10):
    """Picture of some samples, each image above its label or with its boxes, four in a row."""
    blocks = [picture_of(sample, width) for sample in samples]
    columns = min(4, len(blocks))
    lines = math.ceil(len(blocks) / columns)
    height = max(block.height for block in blocks)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, lines * (height + gap) + gap), "white")
    for i, block in enumerate(blocks):
        x = gap + i % columns * (width + gap)
        y = gap + i // columns * (height + gap)
        sheet.paste(block, (x, y))
    return sheet


def picture_of(sample, width):
    """A sample's image, and below it its label in the classes' colours, or on it its boxes."""
    entry = sample.entry
    image = sample.read_image()
    if entry.boxes:
        return Image.fromarray(label_picture(sample.read_label(), image, entry.classes, entry.colors, width))
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
    height = min(max(1, round(width * image.height / image.width)), 3 * width)  # a narrow strip is not drawn in full
    if not entry.classes:
        return image.resize((width, height))
    label = Image.fromarray(palette(entry.colors)[sample.read_label().numpy()])
    both = Image.new("RGB", (width, 2 * height))
    both.paste(image.resize((width, height)), (0, 0))
    both.paste(label.resize((width, height), Image.Resampling.NEAREST), (0, height))
    return both


def label_picture(label, image, classes, colors, width=300, scored=False):
    """A label (H, W) in its classes' colours, or boxes (M, 6) on their image (3, H, W), which is scaled to a width.

    uint8, as an array (., ., 3). scored: the last number of a box is its score."""
    if not label.is_floating_point():  # classes of pixels
        return palette(colors)[label]
    scale = width / image.shape[2]
    image = TF.resize(image, [round(scale * image.shape[1]), width])
    for row in objects_of(label):
        kind = int(row[4])
        name = f"{classes[kind]} {row[5]:.2f}" if scored else classes[kind]
        image = draw_bounding_boxes(image, scale * row[None, :4], [name], tuple(colors[kind]), width=2,
                                    label_colors="white", fill_labels=True)
    return image.permute(1, 2, 0).numpy()


@dataclass
class Config:
    """Flags of the preflight and, with --cache, of storing a set."""
    data: str = "toy"           # one name of data.DATASETS, or several joined with +
    root: str = "data"          # holds one folder per dataset, or is the dataset's own folder
    classes: qsd.Classes = 0        # how many, for --data folder
    out: str = "preflight.png"  # picture of some samples: image above label, or with boxes
    cache: qsd.PixelsOr0 = 0    # instead store the training split at this short side, pixels
    workers: qsd.Workers = 0    # processes that open files


def main(argv=None):
    cfg = configure(Config, argv=argv)
    if cfg.cache:
        store(cfg.data, cfg.root, cfg.cache, cfg.classes, cfg.workers)
    elif preflight(cfg.data, cfg.root, cfg.out, cfg.classes, cfg.workers):
        sys.exit(1)


# --- Flags: every field of a Config is one --------------------------------------------------------------------------

def configure(Config, preset=None, argv=None):
    """A Config from its defaults, then what preset(given flags) says, then the command line."""
    given = vars(command_line(Config).parse_args(argv))
    values = preset(given) if preset else {}
    return Config(**(values | given))


@lru_cache
def command_line(Config):
    """The parser of a Config's flags; a field's comment is the flag's help."""
    help_of = {}
    for cls in Config.__mro__[-2::-1]:  # base classes first: a subclass may comment a field anew
        help_of |= dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = stop_parsing
    for field in dataclasses.fields(Config):
        _, limits, words, _ = parts_of(field.type)
        within = f"{limits}; " if limits else ""
        text = f"{help_of.get(field.name, '')} ({within}default {field.default})".replace("%", "%%")
        alone = {}
        if "yes" in words:  # --demo alone means yes
            alone = {"nargs": "?", "const": parse_value(field.type, "yes")}
        parser.add_argument(f"--{field.name}", type=partial(parse_value, field.type), default=argparse.SUPPRESS,
                            metavar="|".join(words) or "X", help=text, **alone)
    return parser


def stop_parsing(message):
    raise UserError(f"{message} (--help lists the flags)")


def parts_of(kind):
    """Takes a field's type apart: the plain type, its qsd.Range or None, words it allows, whether it may be none."""
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)   # like Count | None
    if optional:
        kind = typing.get_args(kind)[0]
    limits = None
    if typing.get_origin(kind) is typing.Annotated:
        kind, limits = typing.get_args(kind)
    words = ("yes", "no") if kind is bool else ()
    if typing.get_origin(kind) is Literal:
        words = typing.get_args(kind)
    return kind, limits, words, optional


def parse_value(kind, text):
    """One flag's text as the type that its field declares, within its range."""
    kind, limits, words, optional = parts_of(kind)
    if optional and text == "none":
        return None
    if words and text not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(words)}")
    if words:
        return text == "yes" if kind is bool else text
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no {kind.__name__}") from None
    if limits and value not in limits:
        raise argparse.ArgumentTypeError(f"{limits} was expected, not {text}")
    return value


def as_plain(cfg):
    """A Config as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def changed(cfg):
    """What preset and command line set over a Config's defaults, as text."""
    defaults = as_plain(type(cfg)())
    differing = [f"{name} {value}" for name, value in as_plain(cfg).items() if value != defaults[name]]
    return ", ".join(differing) or "nothing"


class Lasting:
    """A standard stream that outlives its reader: what `| head`, a closed terminal or a full disk refuses is lost."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *text):
        try:
            act(*text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_streams():
    """Standard streams that no write fails on, whatever locale, pipe or closed descriptor the script was given."""
    while os.open(os.devnull, os.O_RDWR) <= 2:  # a closed one would become the next file that is opened
        pass
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Lasting(stream))


AT_END = ExitStack()    # what is left to do when a script ends, by whatever


def cli(main):
    """Run a script's main; what is not the code's fault becomes one line on stderr and exit status 2.

    Of several processes that fail alike the first speaks; those that fail because another one did say nothing."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open_streams()
    status = 0
    line = ""
    try:
        main()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        line = "stopped by Ctrl-C"
    except Exception as error:
        status = 2
        line = reason_of(error)
        if line is None:
            status = 1
            traceback.print_exc()
    finally:
        AT_END.close()
    if not status:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    for child in multiprocessing.active_children():     # Python would wait for loading processes, and they for a signal
        child.kill()
        child.join()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)   # which torchrun sends as soon as another process has ended
        time.sleep(2)
    if line:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(status)    # destroying the group would wait for processes that wait for this one
    sys.exit(status)        # not within main, whose frame keeps its loading processes alive


def reason_of(error):
    """The line that tells a user why a script ended, "" where another process has told it; None for a bug."""
    text = first_line(error, 300)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):          # the world's fault: a full disk, a folder that is not ours, a lost network
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"not enough memory ({text}); lower --micro, --batch or --size"
    if isinstance(error, BrokenExecutor) or "DataLoader worker" in text:
        return "a process that reads images was killed, perhaps for its memory; use fewer --workers"
    closed = dist.is_initialized() and ("Connection closed" in text or "Connection reset" in text or "gloo" in text)
    return "" if closed or isinstance(error, dist.DistError) else None


def first_line(error, most=80):
    """The beginning of an exception's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:most]


# --- Processes: one, or as many as torchrun starts ------------------------------------------------------------------

PATIENCE = datetime.timedelta(hours=3)  # how long processes wait for one that saves or downloads

# fp32 products on CUDA, as of stage 2 and evaluation: "high" is TF32, which tensor cores have, "highest" is fp32
# proper, which they have not. QSD's logits bear it: under autocast their queries have bf16's 7 bits, and TF32 has 10.
FP32_PRODUCTS = "high"

STARTED_BY = "GKD_TABLE"    # eval.py sets it for the runs of a table: its process number


def launch():
    """Join the processes that torchrun started; a lone process needs no group, and no network. Returns the device."""
    local = torchrun_says("LOCAL_RANK", 0)
    number = torchrun_says("RANK", 0)
    world = torchrun_says("WORLD_SIZE", 1)
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} finds no GPU of its own: --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision(FP32_PRODUCTS)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get(STARTED_BY):
        threading.Thread(target=end_with_its_starter, args=[os.getppid()], daemon=True).start()
    if world > 1 and not dist.is_initialized():
        absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if absent or number >= world:
            raise UserError(f"RANK {number} of WORLD_SIZE {world}, and no {' '.join(absent) or 'such process'}: start "
                            "several processes with torchrun, or one without these variables")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def end_with_its_starter(parent):
    """Stop as after a signal once torchrun, or the table that this run belongs to, is gone."""
    table = int(os.environ.get(STARTED_BY, "0"))
    while os.getppid() == parent and (not table or Path(f"/proc/{table}").exists() or not Path("/proc").exists()):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def torchrun_says(name, alone):
    """One of the numbers that torchrun hands to its processes; `alone`: what it is without torchrun."""
    text = os.environ.get(name, str(alone))
    if not text.isdecimal():
        raise UserError(f"the environment's {name} is '{text}', where torchrun puts a number: unset it")
    return int(text)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor):
    """A tensor's sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(*values):
    """The largest of each value over all processes, as floats, so that all of them take the same decision."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def from_the_first(function, *args):
    """What a function returns in the first process, handed on to the others."""
    if not dist.is_initialized():
        return function(*args)
    found = [function(*args) if rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory():
    """The most memory held so far, in GiB: on CUDA by tensors, on a CPU by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def precision_on(precision, device):
    """What --precision means on this device: auto is bf16 on CUDA and fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def autocast(precision, device):
    """The context of --precision on this device."""
    precision = precision_on(precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that ask a process to end


def catch_signals():
    """A list that becomes non-empty at the first signal to end, so that a step can finish and be saved before."""
    caught = []
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda received, frame: caught.append(received))
    return caught


# --- What a step costs, and how many there are ----------------------------------------------------------------------

def count_flops(work):
    """Floating-point operations (2 per multiply-add) of calling work(), backward passes included.

    Convolutions, matrix products and attention count; sampling, resizing, norms and element-wise work do not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention would not count
        work()
    return counter.get_total_flops()


def two_images(size):
    """The smallest batch, black: images (2, 3, size, size) and their draw numbers (2,)."""
    return torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.arange(2)


def dry_run(learner, losses_of_two_images):
    """FLOPs per image of a training step; parameters that the step does not touch no longer require a gradient."""
    def step():
        loss = losses_of_two_images()["loss"]
        if not loss.isfinite():
            raise UserError(f"two black images have a loss of {loss.item()} before the first step: an encoder gives "
                            "numbers that are not finite; look at its file, or use --precision fp32")
        loss.backward()
    flops = count_flops(step)
    for parameter in learner.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    learner.zero_grad()
    return flops / 2


def parse_budget(text, steps_per_epoch):
    """A budget as (unit, amount): "600" and "300ep" in steps, "2h" and "30m" in seconds, "3e18flop" in flops."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)(ep|h|m|s|flop|)", text)
    if not match or not 0 < float(match[1]) < math.inf:
        raise UserError(f"--budget {text} is not one of 600 (steps), 300ep, 2h, 30m, 45s, 3e18flop")
    amount = float(match[1])
    if match[2] == "flop":
        return "flops", amount
    if match[2] in ("h", "m", "s"):
        return "seconds", amount * {"h": 3600, "m": 60, "s": 1}[match[2]]
    steps = amount * steps_per_epoch if match[2] == "ep" else amount
    return "steps", max(1, round(steps))


def passes_of(batch, micro, world, pairs=True):
    """Forward passes that a step takes on each process: none holds more than `micro` images, and all make up the batch.

    pairs: none holds an odd number of images."""
    least = 2 if pairs else 1
    if batch < 1 or batch % (least * world):
        raise UserError(f"--batch {batch} does not divide into {'pairs of ' if pairs else ''}images over {world} "
                        f"processes; use a multiple of {least * world}")
    own = batch // world
    for count in range(1, own + 1):
        if own % (least * count) == 0 and (own // count <= micro or own // count == least):
            return count


# --- Files: whole or absent -----------------------------------------------------------------------------------------

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


def save(path, state):
    """Write a checkpoint, whole or not at all."""
    with whole(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def write(path, text):
    """Write a text file, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text)


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


# --- Run folders ----------------------------------------------------------------------------------------------------

def check_folder(cfg, free):
    """Refuse --out if it holds another run or foreign files, and leave it as it is; `free`: see check_header."""
    out = Path(cfg.out)
    log = out / "log.jsonl"
    check_place("--out", out)
    if log.exists():
        check_header(log, cfg, free)
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder; choose another --out")
    elif out.exists() and any(path.name not in ("part.log.jsonl", "lock") for path in out.iterdir()):
        raise UserError(f"--out {out} is not empty and holds no log.jsonl of this script; choose another --out")


EARLIER = dict(geometry="centred", no_decay="all")  # what runs had before these constants existed; others: the default


def known_fields(Config, stored):
    """A stored Config {name: value} as Config takes it: what it lacks today is left out, EARLIER is filled in."""
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    known = {name: value for name, value in (EARLIER | stored).items() if name in kinds}
    for name, value in known.items():
        if not qsd.fits(kinds[name], value):
            raise UserError(f"its {name} is {value!r}, which is none")
    return known


RETIRED = dict(mask_every=2, val_every=0)  # constants that older runs hold and no Config has any more: their defaults


def check_header(log, cfg, free):
    """Refuse a run that the first line of its log says began with other constants than cfg, or with other files.

    A constant that one of the two lacks has its default there, or what RETIRED and EARLIER say; cfg is set to EARLIER.
    Those in `free`, and the folder's name, may differ; a file may have moved, if it is the same."""
    header = next((line for _, line in read_lines(log)), {})
    stored = dict_in(header, "config")
    files = dict_in(header, "files")
    if not stored:
        raise UserError(f"{log} is damaged: it does not begin with the constants of a run; choose another --out, or "
                        "delete the folder if nothing in it is needed")
    for name, value in EARLIER.items():
        if hasattr(cfg, name) and name not in stored:
            setattr(cfg, name, value)
    before = as_plain(type(cfg)()) | RETIRED | EARLIER | stored
    now = before | RETIRED | as_plain(cfg)
    differing = []
    for name, value in before.items():
        moved = name in files and file_of(now[name]) == files[name]
        if not moved and not same_value(value, now[name]) and name not in free and name != "out":
            differing.append(f"{name} {value} -> {now[name]}")
    if differing:
        raise UserError(f"--out {log.parent} holds a run with other constants ({', '.join(differing)}); "
                        "choose another --out")
    for name, text in files.items():
        value = as_plain(cfg).get(name)
        if (log.parent / "last.pt").exists() and text not in (None, file_of(value)):
            raise UserError(f"--{name} {value} is another file than when the run in --out {log.parent} began; "
                            "choose another --out")


def file_of(value):
    """The fingerprint of a file that a constant names, as those of teacher and student; None if it names none."""
    return fingerprint(value) if isinstance(value, str) and value and os.path.isfile(value) else None


def same_value(a, b):
    """Whether two constants are equal, or two spellings of one path."""
    return a == b or (isinstance(a, str) and isinstance(b, str) and os.path.abspath(a) == os.path.abspath(b))


def lock(folder):
    """Keep other processes out of a run's folder until this one ends, by whatever; UserError if one is in it.

    The operating system holds the lock, so that a killed process leaves none; the file says who has it."""
    file = AT_END.enter_context(locked(folder))
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    AT_END.callback((folder / "lock").unlink, missing_ok=True)


def locked(folder):
    """The file "lock" of a folder, open, and locked for as long as it is; UserError if another process has it."""
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"--out {folder} is in use by {file.read()}; wait for it, or choose another --out") from None
    except OSError:     # a network disk without locks
        pass
    return file


def load(path, instead=None):
    """A checkpoint of a run, None where there is none; a damaged one is an error unless there is another instead."""
    try:
        return qsd.open_checkpoint(path) if is_there(path) else None
    except UserError as error:
        if not instead:
            raise UserError(f"{path} cannot be read ({error}); nothing was changed. If it is damaged, delete it: the "
                            "same command then starts anew") from None
    qsd.say(f"{path} is damaged, and will be made again from last.pt")


def times_of(*paths):
    """When each of some files was written, None for those that are not there."""
    return [path.stat().st_mtime_ns if path.is_file() else None for path in paths]


def restore(path, saved, parts, spent, dataset):
    """Bring a run's parts to the state of its checkpoint; returns its ledger. UserError where it is another run's."""
    try:
        qsd.check_state(f"{path} does not fit the run", saved["learner"], parts["learner"].state_dict())
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        moments = [value for state in parts["optimizer"].state.values() for value in state.values()]
        if not all(value.isfinite().all() for value in moments):
            raise ValueError("its optimiser holds numbers that are not finite")
        spent = spent | saved["spent"]
        if not all(qsd.fits(qsd.Weight, amount) for amount in spent.values()):
            raise ValueError("its ledger is damaged")
        dataset.unreadable[saved.get("unreadable", [])] = True
    except UserError:
        raise
    except Exception as error:  # whatever is not as it was written
        raise UserError(f"{path} is no checkpoint of this run ({first_line(error)}); nothing was changed. If it is not "
                        "needed, delete it: the same command then starts anew") from None
    return spent


def contents_of(dataset):
    """A text that tells a set of images from another: their number, names of 4096, bytes of 64."""
    n = len(dataset)
    digest = hashlib.sha256(str(n).encode())
    for i in range(0, n, math.ceil(n / 4096)):
        for file in (dataset.samples[i].image, dataset.samples[i].label):
            digest.update((file.name if isinstance(file, Path) else str(file)).encode())
    for i in range(0, n, math.ceil(n / 64)):
        if isinstance(dataset.samples[i].image, Path):
            digest.update(fingerprint(dataset.samples[i].image).encode())
    return digest.hexdigest()


def compare_processes(out, found):
    """All processes must find the same state in --out; two machines without a shared disk would train apart."""
    most, minus_least = largest(found, -found)
    if most != -minus_least:
        raise UserError(f"--out {out}: some processes find a run there and others do not, or another step: give all "
                        "the same folder, on a shared disk and as an absolute path")


def of_each_step(batches_from, step, passes, workers):
    """The micro-batches of each step from one on; if a loading process fails, this one goes on alone."""
    batches = iter(batches_from(start_step=step, workers=workers))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # torch's would raise in the midst of a step
    while True:
        try:
            micro_batches = [next(batches) for _ in range(passes)]
        except (RuntimeError, OSError, EOFError) as error:      # whatever a killed process leaves of its pipe
            if not workers:
                raise
            reason = str(error).strip().splitlines()[-1]    # above it is the worker's traceback
            print(f"a loading process failed ({reason}); this process goes on alone", file=sys.stderr)
            workers = 0
            batches = iter(batches_from(start_step=step))
            continue
        yield micro_batches
        step += 1


def loss_of(probe):
    """The loss of a probe, in eager mode: its two images would be compiled anew."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return probe()["loss"].item()


def steps_of(checkpoint):
    """The step after which a checkpoint was written; 0 without one."""
    spent = checkpoint.get("spent") if checkpoint else dict(steps=0)
    if not isinstance(spent, dict) or not qsd.fits(qsd.CountOr0, spent.get("steps")):
        raise UserError("last.pt is no checkpoint of a run; if it is not needed, delete it: the same command then "
                        "starts anew")
    return spent["steps"]


def header_of(cfg, device):
    """The first line of a log: what a run was begun with."""
    config = as_plain(cfg)
    versions = dict(torch=torch.__version__, torchvision=torchvision.__version__, python=sys.version.split()[0])
    files = {name: file_of(value) for name, value in config.items() if name not in ("out", "root", "data")}
    files = {name: text for name, text in files.items() if text}
    return dict(config=config, command=" ".join(sys.argv), git=git_commit(), **versions,
                device=device_name(device), world=world_size(), files=files)


def cut(log, steps):
    """Cut a log back to a step."""
    header, *lines = read_lines(log)
    kept = [text for text, line in lines if qsd.fits(int, line.get("step", 0)) and line.get("step", 0) <= steps]
    write(log, "\n".join([header[0], *kept]) + "\n")


def append(log, lines):
    """Add lines to a log, all or none; returns those that a full disk did not take."""
    size = log.stat().st_size
    try:
        with open(log, "a") as file:
            file.writelines(lines)
    except OSError as error:
        os.truncate(log, size)
        print(f"{log}: {error.strerror}; tried again with the next line", file=sys.stderr)
        return lines
    return []


def count_unreadable(dataset, device):
    """How many images no process could read; from now on all know them, and too many end the run."""
    known = summed(dataset.unreadable.to(device, torch.int32))
    dataset.unreadable |= (known > 0).cpu()
    count = int(dataset.unreadable.sum())
    if count > BAD_SHARE * len(dataset):
        raise UserError(f"{count} of {len(dataset)} training images cannot be read: too many")
    return count


def git_commit():
    """The commit that this code stands at, or None."""
    if not shutil.which("git"):
        return None
    ask = ["git", "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(ask, capture_output=True, text=True, cwd=Path(__file__).parent)
    return answer.stdout.strip() or None


# --- Run: all of a training script that is not the method -----------------------------------------------------------

class Run:
    """A training run: its processes and device, its folder --out, its ledger and log, its checkpoints, its budget.

        run = Run(cfg, "student.pt", FREE)      # joins the processes, opens --out
        run.start(learner, optimizer, ...)      # weights, optimiser and order of the images: as --out left them
        for micro_batches in run.steps():       # until --budget is spent
            ...                                 # run.sync() and run.backward(losses) for each of them
            run.step()                          # the optimiser's step, then ledger, log, checkpoint, signals
        run.finish(checkpoint)                  # writes the result; what resuming needed is dropped

    --out holds log.jsonl (a header with the Config, then a line every log_every steps), last.pt while the run goes on
    and the result when it has ended. `free` names the constants that may change when a run resumes.
    """

    def __init__(self, cfg, result, free):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.result = self.out / result
        self.device = launch()
        self.autocast = autocast(cfg.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        parse_budget(cfg.budget, steps_per_epoch=1)
        check_folder(cfg, free)
        self.found = times_of(self.out / "last.pt", self.result)
        if rank() == 0 and (self.out / "lock").exists():
            locked(self.out).close()    # it is locked for good when the first file is written
        self.checkpoint = load(self.out / "last.pt")
        self.finished = bool(load(self.result, instead=self.checkpoint))
        compare_processes(self.out, math.inf if self.finished else steps_of(self.checkpoint))
        if self.finished:
            qsd.say(f"{self.result} is finished; nothing to do")
            self.tidy()
        else:
            qsd.say(f"{self.out}: set over the defaults: {changed(cfg)}")

    def start(self, learner, optimizer, dataset, probe, flops, tokens, repeats=1, pairs=True):
        """Continue where the checkpoint ends, or begin.

        probe() gives the losses of two black images; flops and tokens are those of one image."""
        cfg = self.cfg
        self.learner = learner
        self.optimizer = optimizer
        self.dataset = dataset
        self.probe = probe
        self.per_step = dict(steps=1, images=cfg.batch, tokens=cfg.batch * tokens, flops=cfg.batch * flops)
        self.ledger = dict(steps=0, images=0, tokens=0, flops=0.0, seconds=0.0, skipped=0, waited=0.0, peak_gb=0.0)
        self.contents = contents_of(dataset)
        self.sane = 1000 * max(1, loss_of(probe))
        if self.checkpoint:
            if self.checkpoint.get("contents", self.contents) != self.contents:
                raise UserError(f"--root {cfg.root}: {cfg.data} has other files there than when this run began")
            self.ledger = restore(self.out / "last.pt", self.checkpoint, self.parts(), self.ledger, dataset)
        self.model = DistributedDataParallel(learner) if dist.is_initialized() else learner

        self.unit, self.budget = parse_budget(cfg.budget, len(dataset) / cfg.batch)
        self.passes = passes_of(cfg.batch, cfg.micro, world_size(), pairs)
        self.batches_from = partial(loader, dataset, cfg.batch, seed=cfg.seed, rank=rank(), world=world_size(),
                                    accumulate=self.passes, repeats=repeats)
        if rank() == 0:
            self.start_log(gflop_per_image=flops / 1e9)
        self.bar = tqdm(initial=self.ledger["steps"], desc=str(self.out), disable=rank() > 0, unit="step",
                        dynamic_ncols=True)
        AT_END.callback(self.bar.close)
        self.signals = catch_signals()
        self.unwritten = []                 # lines of the log that a full disk did not take yet
        self.saved = time.time()
        self.kept = self.ledger["steps"]    # the step that the same command goes on from
        self.skips = 0                      # non-finite steps in a row

    def parts(self):
        """What a checkpoint keeps, beside the ledger."""
        return dict(learner=self.learner, optimizer=self.optimizer, scaler=self.scaler)

    # -- the loop --

    def steps(self):
        """For each step the list of its micro-batches, until the budget is spent."""
        batches = of_each_step(self.batches_from, self.ledger["steps"], self.passes, self.cfg.workers)
        while self.fraction < 1:
            self.began = time.time()
            self.losses = {}
            self.backwards = 0
            micro_batches = next(batches)
            self.waited = time.time() - self.began
            self.draws = micro_batches[-1][-1]
            yield micro_batches

    @property
    def fraction(self):
        """The share of the budget that is spent, in 0..1."""
        return self.ledger[self.unit] / self.budget

    def sync(self):
        """Context of a micro-batch: processes average their gradients in the backward pass of the last one only."""
        last = self.backwards == self.passes - 1
        return nullcontext() if last or not dist.is_initialized() else self.model.no_sync()

    def backward(self, losses):
        """Add a micro-batch's share to the gradients of losses["loss"], and its losses to those that are logged."""
        self.scaler.scale(losses["loss"] / self.passes).backward()
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach() / self.passes
        self.backwards += 1

    def step(self):
        """The optimiser's step, unless a gradient is not finite; then what every step leaves behind."""
        finite = self.update()
        stop = self.signals[0] if self.signals else 0
        due = time.time() - self.saved > 60 * self.cfg.save_minutes
        skipped, stop, due, seconds = largest(not finite, stop, due, time.time() - self.began)
        self.skips = self.skips + 1 if skipped else 0
        self.spend(seconds, skipped)
        self.report()
        diverged = self.skips == self.cfg.max_skips
        if stop or diverged or due:
            self.save_checkpoint()
        if stop:
            self.leave(int(stop))
        if diverged:
            self.give_up()

    def update(self):
        """The optimiser's step alone; False if a gradient was not finite and nothing was changed."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return finite

    # -- what a step leaves behind --

    def spend(self, seconds, skipped):
        """Add a step to the ledger."""
        for name, amount in dict(self.per_step, seconds=seconds, skipped=skipped, waited=self.waited).items():
            self.ledger[name] += amount
        self.ledger["peak_gb"] = max(self.ledger["peak_gb"], peak_memory())

    def report(self):
        """Move the bar; every log_every steps, and at the end, write a line of the log (means over all processes)."""
        spent = self.ledger
        self.bar.total = max(round(spent["steps"] / self.fraction), spent["steps"])
        self.bar.update(spent["steps"] - self.bar.n)
        if spent["steps"] % self.cfg.log_every and self.fraction < 1:
            return
        means = summed(torch.stack([value.double() for value in self.losses.values()])) / world_size()
        record = dict(step=spent["steps"])
        for name, mean in zip(self.losses, means.tolist()):
            record[name] = round(mean, 6) if math.isfinite(mean) else None      # JSON has no NaN
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        record["images_per_s"] = round(spent["images"] / spent["seconds"], 1)
        record["data_wait"] = round(spent["waited"] / spent["seconds"], 3)
        record["peak_gb"] = round(spent["peak_gb"], 2)
        record["skipped"] = int(spent["skipped"])
        record["unreadable"] = count_unreadable(self.dataset, self.device)
        record["flops"] = spent["flops"]
        record["seconds"] = round(spent["seconds"], 2)
        record["eta_s"] = round(spent["seconds"] * (1 / self.fraction - 1))
        self.bar.set_postfix(loss=record["loss"], data_wait=record["data_wait"])
        if rank() == 0:
            self.unwritten.append(json.dumps(record) + "\n")
            self.unwritten = append(self.out / "log.jsonl", self.unwritten)

    def start_log(self, **more):
        """Lock the folder; begin a fresh run's log, or cut a resumed one back to its checkpoint's step."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock(self.out)
        if times_of(self.out / "last.pt", self.result) != self.found:
            raise UserError(f"--out {self.out} was changed by another process; run the same command again")
        log = self.out / "log.jsonl"
        if self.ledger["steps"] and log.exists():
            cut(log, self.ledger["steps"])
        else:
            write(log, json.dumps(header_of(self.cfg, self.device) | more) + "\n")

    def healthy(self):
        """Whether the weights are of use: two black images have a loss that is not a thousand times the first one."""
        return loss_of(self.probe) < self.sane

    def save_checkpoint(self):
        """Write last.pt, unless a step has ruined the weights: then the one before is worth more."""
        self.saved = time.time()
        if self.healthy():
            self.kept = self.ledger["steps"]
            states = {name: part.state_dict() for name, part in self.parts().items()}
            more = dict(contents=self.contents, unreadable=self.dataset.unreadable.nonzero().flatten().tolist())
            if rank() == 0:
                save(self.out / "last.pt", states | dict(spent=self.ledger) | more)

    def leave(self, number):
        """End after a signal, the step finished and saved."""
        largest(0)                          # together: torchrun would kill a process that still saves
        if rank() == 0:
            print(f"stopped by signal {number} after step {self.ledger['steps']}; the same command goes on from step "
                  f"{self.kept}", file=sys.stderr)
        sys.exit(128 + number)

    def give_up(self):
        """End after too many non-finite steps in a row, naming the images of the last."""
        draws = self.batches_from().batch_sampler
        names = [str(self.dataset.samples[draws.index(draw)].image) for draw in self.draws.tolist()]
        kept = f"{self.out}/last.pt holds the weights before them: the same command goes on with the next images"
        if self.kept < self.ledger["steps"]:
            kept = f"the weights were ruined before them, so {self.out}/last.pt was left as it was at step {self.kept}"
        raise UserError(f"{self.skips} steps in a row had non-finite gradients and changed nothing; {kept}. Look at "
                        f"the last images ({', '.join(names[:8])}). A lower --lr or --precision fp32 needs a new --out")

    def finish(self, checkpoint):
        """Write the run's result and drop what resuming needed."""
        self.bar.close()
        if not self.healthy():
            raise UserError(f"the last step ruined the weights: no {self.result} is written. A lower --lr or "
                            "--precision fp32 wants another --out")
        if rank() == 0:
            save(self.result, checkpoint)
        self.tidy()

    def tidy(self):
        """Delete what resuming needed, and files that a kill left half-written."""
        if rank() == 0:
            halves = ["part.last.pt", "part.log.jsonl", f"part.{self.result.name}"]
            for name in [*halves, "last.pt", "prev.pt", "lock"]:    # prev.pt: of older runs
                (self.out / name).unlink(missing_ok=True)


if __name__ == "__main__":
    cli(main)
