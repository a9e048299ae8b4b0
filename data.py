"""Every dataset of the paper, read as downloaded, and the augmentations of both stages.

An image is uint8 (3, H, W), a label int64 (H, W) of classes and 255 = ignore, or boxes: see as_label.
A domain is a row of DATASETS; sources join with "+" (gtav+synthia). Check a download:

    python data.py --data gtav --root /data --out gtav.png  # exit status 1 if a file is wrong
"""
import argparse
import itertools
import math
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.ops import box_area
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import Compose, RandomCrop, RandomHorizontalFlip, Resize, functional as TF
from torchvision.tv_tensors import BoundingBoxes
from torchvision.utils import draw_bounding_boxes, make_grid
from tqdm import tqdm

from qsd import UserError, say

IGNORE = 255            # label of a pixel that no loss and no metric sees
UNKNOWN = 254           # a label value that the dataset's table does not name
FILL = (124, 116, 104)  # the mean as a pixel, for what lies outside an image
DARK = 32               # if no value is above it, 12 bits were saved as 16
TRIES = 10              # as many training images in a row may be unreadable
OBJECTS = 100           # rows of a label of boxes, as images of a batch need equally many
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_FOLDER = re.compile(r"(?i)(^|/)(gt|gts|gtfine|gts?_[^/]*|[^/]*labels[^/]*|masks|annotations)/")
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)  # of damaged files


# --- Files to pixels ------------------------------------------------------------------------------------------------

def read_image(path, own=False):
    """Read an image as RGB, uint8 (3, H, W); one's own upright, as EXIF says."""
    try:
        pixels = read_rgb(path, upright=True) if own else read_mapped(path)
        return torch.from_numpy(pixels).permute(2, 0, 1)
    except BROKEN as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def read_rgb(path, upright=False):
    """Read any kind of image with Pillow as uint8 (H, W, 3)."""
    with Image.open(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16-bit grey, which Pillow would cut off at 255
            values = np.asarray(image)
            if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError("which of its numbers is white? Save it with 8 or 16 bits")
            image = Image.fromarray((values / 257).round().astype(np.uint8))
        return np.array(image.convert("RGB"))


def read_mapped(path):
    """read_rgb, but TIFFs are unpacked once and mapped: a tile reads its own rows only."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return read_rgb(path)
    unpacked = path.with_name(f"{path.name}.npy")
    if not unpacked.exists() or unpacked.stat().st_mtime < path.stat().st_mtime:
        pixels = read_rgb(path)
        if not os.access(path.parent, os.W_OK):
            return pixels
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.npy")  # others may unpack it, too
        np.save(unfinished, pixels)
        os.replace(unfinished, unpacked)
    return np.load(unpacked, mmap_mode="c")


def resize_label(label, size):
    """Resize (H, W) to size (height, width): the class at each pixel's centre."""
    return TF.resize(label[None], size, InterpolationMode.NEAREST_EXACT)[0]


# --- Files to labels: each decoder takes a path and returns uint8 (H, W), 255 = ignore; ValueError if it cannot -----

def checked(label, values):
    """The label, unless some of the file's values are in no table."""
    if (label == UNKNOWN).any():
        listed = np.unique(values[label == UNKNOWN], axis=0)[:8].tolist()
        raise ValueError(f"values {listed} are not among the dataset's classes")
    return label


def lookup_table(values, ignored=()):
    """The class of each of 256 label values, from each class's value or list of values."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[[*ignored, IGNORE]] = IGNORE
    for number, values_of_class in enumerate(values):
        table[values_of_class] = number
    return table


def by_value(path, table):
    """Class = table[value]; of a palette file the indices are the values, not colours."""
    image = Image.open(path)
    if image.format == "JPEG" or image.mode not in ("L", "P"):
        raise ValueError(f"a {image.format} of mode {image.mode}, not a PNG with one 8-bit channel")
    values = np.asarray(image)
    return checked(table[values], values)


def by_color(path, colors, ignored=(), unknown=UNKNOWN):
    """Class = position of the pixel's colour in `colors`; an alpha channel is dropped."""
    rgb = read_rgb(path)
    packed = rgb @ np.array([1 << 16, 1 << 8, 1], np.int32)  # (H, W), 0xRRGGBB
    label = np.full(packed.shape, unknown, np.uint8)
    for number, (red, green, blue) in enumerate((*colors, *ignored)):
        label[packed == (red << 16 | green << 8 | blue)] = number if number < len(colors) else IGNORE
    return checked(label, rgb)


def cityscapes_label(path):
    """labelIds or labelTrainIds, as the file's name says; some mirrors of GTAV hold colours."""
    if "TrainIds" in path.name:
        return by_value(path, TRAIN_IDS)
    if Image.open(path).mode in ("RGB", "RGBA"):
        return by_color(path, CITYSCAPES_COLORS, unknown=IGNORE)
    return by_value(path, LABEL_IDS)


def synthia_label(path):
    """The low bytes of a 16-bit PNG's first channel; Pillow reads the high ones, zeros."""
    image = Image.open(path)
    image.tile = [(*where, mode.replace("RGB;16B", "RGB;16L")) for *where, mode in image.tile]
    values = np.asarray(image)[..., 0]
    return checked(SYNTHIA_IDS[values], values)


def isprs_label(path, *tile):
    """Six colours, black for void; cut at 127: tiles 4_12 and 6_7 hold shades."""
    rgb = read_mapped(path)[tile]
    red, green, blue = np.moveaxis(rgb > 127, 2, 0)
    return checked(ISPRS_CLASS_OF[red * 4 + green * 2 + blue], rgb)


# --- Files to boxes: the labels of a detection set ------------------------------------------------------------------

def as_label(objects):
    """(OBJECTS, 6): left, top, right, bottom, class, difficult (not to be counted), then zeros."""
    padding = (OBJECTS - len(objects)) * [6 * [0]]
    return np.array([*objects, *padding], np.float32)


def objects_of(label):
    """The rows that are objects: those with an area."""
    return label[label[:, 2] > label[:, 0]]


def voc_boxes(path):
    """The objects of an annotation, whose pixels are numbered from 1, the last one included."""
    objects = []
    for item in ElementTree.parse(path).iterfind("object"):
        # Of the item itself: a person's <part> has a bndbox, too.
        box = [float(item.findtext(f"bndbox/{border}", "")) for border in ("xmin", "ymin", "xmax", "ymax")]
        left, top, right, bottom = box
        if not (0 < left <= right and 0 < top <= bottom):
            raise ValueError(f"the box {box} has no area")
        number = VOC_CLASSES.index(item.findtext("name"))
        objects.append([left - 1, top - 1, right, bottom, number, item.findtext("difficult") == "1"])
    return as_label(objects)


# --- Class names, colours, lookup tables ----------------------------------------------------------------------------

def rgb(text):
    """The colours (red, green, blue) that a text names by hex numbers."""
    return tuple(tuple(bytes.fromhex(color)) for color in text.split())


CITYSCAPES_CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
                      "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
                      "bicycle")
CITYSCAPES_COLORS = rgb("804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 "
                        "00008e 000046 003c64 005064 0000e6 770b20")
ISPRS_CLASSES = ("impervious", "building", "low vegetation", "tree", "car", "clutter")
ISPRS_COLORS = rgb("ffffff 0000ff 00ffff 00ff00 ffff00 ff0000")
ENDOVIS_CLASSES = ("background", "instrument shaft", "instrument clasper", "instrument wrist", "kidney",
                   "covered kidney", "thread", "clamps", "needle", "suction", "small intestine")
ENDOVIS_COLORS = rgb("000000 00ff00 00ffff 7dff0c ff3700 18377d bb9b19 00ff7d ffff7d 7b0faf 7c9b05")
ENDOVIS_PROBE = rgb("0cff8d")  # the ultrasound probe, which is not evaluated
CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
                  "bicyclist")
CAMVID_COLORS = rgb("4682b4 464646 999999 804080 f423e8 6b8e23 dcdc00 be9999 00008e dc143c 770b20")
VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
               "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")

TRAIN_IDS = lookup_table(range(19))
URBANSYN_IDS = lookup_table(range(19), ignored=[19])
CAMVID_IDS = lookup_table(range(11), ignored=[11])
LABEL_IDS = lookup_table((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
                         ignored=range(35))  # Cityscapes, GTAV and ACDC
SYNTHIA_IDS = lookup_table((3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11), ignored=range(23))
MAPILLARY_IDS = lookup_table((
    [7, 8, 10, 13, 14, 23, 24],     # road: also bike and service lane, crosswalk, parking, markings
    [2, 9, 11, 15],                 # sidewalk: also curb, curb cut, pedestrian area
    17, 6, 3,                       # building, wall, fence
    [44, 45, 47],                   # pole: also street light, utility pole
    48,                             # traffic light
    [46, 49, 50],                   # traffic sign: its frame, back and front
    30, 29, 27, 19,                 # vegetation, terrain, sky, person
    [20, 21, 22],                   # rider: bicyclist, motorcyclist, other
    55, 61, 54, 58, 57, 52,         # car, truck, bus, train (on rails), motorcycle, bicycle
), ignored=range(66))
ISPRS_CLASS_OF = np.array([IGNORE, 1, 3, 2, 5, UNKNOWN, 4, 0], np.uint8)  # at red 4 + green 2 + blue


# --- The toy world: streets drawn on the fly, so that the method runs with no download ------------------------------
# A scene is a layout (which object covers which of 64 x 64 pixels) seen in a look (palette, texture, light, weather).
# The game is the labelled source, as GTAV is, arcade and diorama are further ones, the city's weathers are never
# trained on. Only rng.random() and exact arithmetic make a scene: it is the same on every machine.

TOY_CLASSES = ("sky", "building", "vegetation", "road", "pavement", "car", "pole", "person")
SKY, BUILDING, VEGETATION, ROAD, PAVEMENT, CAR, POLE, PERSON = range(8)
TOY_COLORS = rgb("4682b4 464646 6b8e23 804080 f423e8 00008e dcdc00 dc143c")

# Palettes: the colour of each of TOY_CLASSES, RGB in 0..1. The city has its own: it is not the game behind a filter.
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
    jitter=.08,         # how far an object's colour may lie from its class's
    texture=.10,        # contrast of each class's pattern
    gain=1.,            # brightness of the light
    tint=np.ones(3),    # its colour
    grey=0.,            # share of the colour that is lost
    fog=0.,             # share of the fog's colour in what is farthest away
    fog_color=np.full(3, .8),
    white=0.,           # how much snow lies on the ground and on plants
    dots=0.,            # share of the pixels that are falling flakes
    streaks=0.,         # share of the pixels that are streaks of rain
    lamps=0.,           # brightness of lamps on poles and of lights on cars
    noise=.02,          # of the camera
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
UNSEEN = ("night", "fog", "snow", "rain")


def toy_look(rng, domain):
    """One look: fixed for a named domain, random for "wide"."""
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
    """A scene while it is drawn, back to front."""
    def __init__(self, rng):
        self.rng = rng
        self.map = Image.new("L", (64, 64), 0)
        self.pen = ImageDraw.Draw(self.map)
        self.kinds = [SKY]  # object 0 is the sky, and
        self.distances = [1.0]  # as far away as anything can be; 0 is near

    def between(self, low, high):
        return low + (high - low) * self.rng.random()

    def one_of(self, *kinds):
        return kinds[int(self.between(0, len(kinds)))]

    def draw(self, shape, kind, distance, *corners):
        """Draw a new object over those before it; shape: a method of the pen."""
        self.kinds.append(kind)
        self.distances.append(distance)
        shape(corners, fill=len(self.kinds) - 1)

    def thing(self, kind, x, y, s, distance):
        """A thing that stands at (x, y), of size s in pixels."""
        pen = self.pen
        if kind == CAR:
            self.draw(pen.rectangle, CAR, distance, (x - s, y - .55 * s), (x + s, y))
            self.draw(pen.polygon, CAR, distance, (x - .7 * s, y - .5 * s), (x - .4 * s, y - s),
                      (x + .4 * s, y - s), (x + .7 * s, y - .5 * s))
        elif kind == POLE:
            self.draw(pen.rectangle, POLE, distance, (x, y - 3.2 * s), (x + .35 * s, y))
            if self.rng.random() < .6:  # a sign or a lamp on top
                self.draw(pen.rectangle, POLE, distance, (x - .4 * s, y - 3.6 * s), (x + .7 * s, y - 2.7 * s))
        elif kind == PERSON:
            self.draw(pen.rectangle, PERSON, distance, (x - .4 * s, y - 1.4 * s), (x + .4 * s, y))
            self.draw(pen.ellipse, PERSON, distance, (x - .35 * s, y - 2.1 * s), (x + .35 * s, y - 1.3 * s))
        elif kind == VEGETATION:
            self.draw(pen.ellipse, VEGETATION, distance, (x - .8 * s, y - 2 * s), (x + .8 * s, y))
        elif kind == BUILDING:
            height = self.between(1., 2.6) * s
            self.draw(pen.rectangle, BUILDING, distance, (x - s, y - height), (x + s, y))


def toy_layout(domain, index, jumble=False):
    """The object at each pixel (64, 64), objects' classes and distances, the look's generator."""
    rng = np.random.Generator(np.random.PCG64([0, index, sum(domain.encode())]))
    canvas = ToyCanvas(rng)
    draw = draw_jumble if jumble else draw_street
    draw(canvas)
    return np.array(canvas.map), np.array(canvas.kinds), np.array(canvas.distances), rng


def draw_jumble(canvas):
    """A scene of the proxy set: two grounds, and things anywhere at any size."""
    between = canvas.between
    grounds = (SKY, BUILDING, VEGETATION, ROAD, PAVEMENT)
    canvas.draw(canvas.pen.rectangle, canvas.one_of(*grounds), 1, (0, 0), (64, 64))
    canvas.draw(canvas.pen.polygon, canvas.one_of(*grounds), between(0, 1),
                (0, between(0, 64)), (64, between(0, 64)), (64, 64), (0, 64))
    for _ in range(int(between(4, 11))):
        kind = canvas.one_of(BUILDING, VEGETATION, CAR, POLE, PERSON)
        canvas.thing(kind, x=between(0, 64), y=between(16, 70), s=between(4, 15), distance=between(0, 1))


def draw_street(canvas):
    """A street that leads to a vanishing point, with things on it and beside it."""
    between = canvas.between
    draw = canvas.draw
    pen = canvas.pen
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
    draw(pen.rectangle, ground, .5, (0, horizon), (64, 64))
    right_curb = right + between(8, 24)
    left_curb = left - between(8, 24)
    draw(pen.polygon, PAVEMENT, .5, (vanish - 4, horizon), (vanish + 4, horizon), (right_curb, 64), (left_curb, 64))
    draw(pen.polygon, ROAD, .5, (vanish - 2, horizon), (vanish + 2, horizon), (right, 64), (left, 64))

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


@lru_cache(maxsize=8192)  # a scene takes longer to draw than to train on
def toy_scene(domain, index, jumble=False):
    """Image (64, 64, 3) and label (64, 64), uint8; domain: a key of LOOKS, or "wide"."""
    objects, kinds, distances, rng = toy_layout(domain, index, jumble)
    look = toy_look(rng, domain)
    label = kinds[objects]
    y, x = np.mgrid[:64, :64]

    # Materials: each object has its own shade of its class's colour, each class its pattern.
    fine = rng.random((64, 64)) - .5
    coarse = np.kron(rng.random((16, 16)), np.ones((4, 4))) - .5
    patterns = np.stack([
        (y - 24) / 64,                      # sky: brighter towards the horizon
        ((x % 5 < 2) & (y % 6 < 3)) - .3,   # building: windows
        coarse + fine,                      # vegetation: leaves
        fine,                               # road
        ((x + y) % 8 < 1) - .2,             # pavement: diagonal joints
        (y % 7 < 2) - .3,                   # car
        (y % 6 < 3) - .5,                   # pole: rings
        coarse,                             # person
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

    # Weather: colours fade, fog thickens with the distance, flakes and streaks fall before all but the camera's noise.
    image += look["grey"] * (image.mean(2, keepdims=True) - image)
    ground_distance = np.clip(1.6 - y / 40, 0, 1)  # road and pavement recede row by row
    distance = np.where(paved, ground_distance, distances[objects])
    image += (look["fog"] * distance)[..., None] * (look["fog_color"] - image)
    flakes = rng.random((64, 64)) < look["dots"]
    image += flakes[..., None] * (.95 - image)
    streaks = np.kron(rng.random((8, 64)) < look["streaks"], np.ones((8, 1)))
    image += .5 * streaks[..., None] * (.8 - image)
    image += look["noise"] * (rng.random((64, 64, 3)) + rng.random((64, 64, 3)) - 1) * 1.5
    image = np.clip(image, 0, 1) * 255 + .5
    return image.astype(np.uint8), label.astype(np.uint8)


@lru_cache(maxsize=8192)
def toy_things(domain, index, least=12):
    """toy_scene with boxes around what is seen of things; below `least` pixels one is difficult."""
    image, _ = toy_scene(domain, index)
    objects, kinds, distances, _ = toy_layout(domain, index)  # that scene's layout again
    found = []
    for kind, distance in sorted(set(zip(kinds, distances))):  # parts of one thing have both
        y, x = np.nonzero((kinds[objects] == kind) & (distances[objects] == distance))
        if kind >= CAR and len(x):
            found.append([x.min(), y.min(), x.max() + 1, y.max() + 1, kind - CAR, len(x) < least])
    return image, as_label(found)


# --- The datasets: one row each -------------------------------------------------------------------------------------
# A pattern names images below the dataset's folder, without their suffix: "*" stands for text within one name, "{a,b}"
# for either, "**/" for any folders, "<split>" for the row's text of that split. Image and label are a pair where "*"
# and "{}" stood for the same texts. Of several patterns, for several releases, the first that finds a file counts.

@dataclass(frozen=True)
class Dataset:
    folder: str                 # below --root, which may also be the folder itself
    images: str = ""            # patterns
    labels: str = ""
    splits: dict = None         # {split: text of "<split>"}, or {split: scene numbers}
    decode: Callable = None     # label file -> uint8 (H, W), or boxes
    classes: tuple = ()
    colors: tuple = ()
    eval_size: tuple = None     # evaluation fits images into (long edge, short edge)
    eval_half: bool = False     # evaluation first halves image and label
    tile: int = None            # images are cut into tiles of this side
    resize_label: bool = False  # some labels have another size than their image
    generate: Callable = None   # scene number -> image uint8 (H, W, 3) and label: no files
    own: bool = False           # one's own pictures: see read_image
    boxes: bool = False         # labels are boxes; "splits" name VOC's lists of images
    corrupted: bool = False     # every image comes in all CORRUPTIONS at all severities


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
              colors=CITYSCAPES_COLORS + rgb("ff8c00"))


def toy(domain, train=0, val=0, jumble=False, boxes=False, corrupted=False):
    """A toy domain with so many scenes; its boxes lie around cars, poles and persons."""
    splits = {"train": range(train), "val": range(10 ** 6, 10 ** 6 + val)}
    splits = {split: numbers for split, numbers in splits.items() if numbers}
    draw = partial(toy_things, domain) if boxes else partial(toy_scene, domain, jumble=jumble)
    first = CAR if boxes else SKY
    return Dataset("toy", splits=splits, generate=draw, classes=TOY_CLASSES[first:], colors=TOY_COLORS[first:],
                   boxes=boxes, corrupted=corrupted)


DATASETS = {
    "imagenet": Dataset("imagenet", "<split>/{**/}* {**/}*", splits=TRAIN_VAL, own=True),  # or any images
    "gtav": street("gtav", "images/*", "labels/*", TRAIN, cityscapes_label, resize_label=True),
    "synthia": street("synthia", "**/RGB/*", "**/GT/LABELS/*", TRAIN, synthia_label),
    "urbansyn": street("urbansyn", "rgb/**/rgb_*", "ss/**/ss_*", TRAIN, partial(by_value, table=URBANSYN_IDS)),
    "cityscapes": street("cityscapes", "leftImg8bit/<split>/*/*_leftImg8bit",
                         "gtFine/<split>/*/*_gtFine_labelIds gtFine/<split>/*/*_gtFine_labelTrainIds",
                         TRAIN_VAL, cityscapes_label, eval_size=(1024, 512)),
    "bdd100k": street("bdd100k", "images/10k/<split>/* seg/images/<split>/*",
                      "labels/sem_seg/masks/<split>/* seg/labels/<split>/*_train_id",
                      TRAIN_VAL, partial(by_value, table=TRAIN_IDS), eval_size=(1280, 720)),
    "mapillary": street("mapillary", "<split>/images/*", "<split>/v1.2/labels/* <split>/labels/*",
                        {"train": "training", "val": "validation"}, partial(by_value, table=MAPILLARY_IDS),
                        eval_size=(1024, 512), eval_half=True),
    **{f"acdc-{weather}": street("acdc", f"rgb_anon/{weather}/<split>/*/*_rgb_anon",
                                 f"gt/{weather}/<split>/*/*_gt_labelTrainIds gt/{weather}/<split>/*/*_gt_labelIds",
                                 TRAIN_VAL, cityscapes_label, eval_size=(960, 540))
       for weather in ("night", "snow", "fog", "rain")},
    "potsdam-rgb": isprs("potsdam", "**/top_potsdam_<split>_RGB", "**/top_potsdam_<split>_label_noBoundary", POTSDAM),
    "potsdam-irrg": isprs("potsdam", "**/top_potsdam_<split>_IRRG", "**/top_potsdam_<split>_label_noBoundary", POTSDAM),
    "vaihingen-irrg": isprs("vaihingen", "**/top_mosaic_09cm_area<split>", "**/top_mosaic_09cm_area<split>_noBoundary",
                            VAIHINGEN),
    "endovis18": Dataset("endovis18", "**/<split>/left_frames/*", "**/<split>/labels/*", ENDOVIS,
                         partial(by_color, colors=ENDOVIS_COLORS, ignored=ENDOVIS_PROBE), ENDOVIS_CLASSES,
                         ENDOVIS_COLORS),
    "camvid": camvid("camvid", "<split>/{0006R0,0016E5,Seq05VD}_*", "<split>annot/{0006R0,0016E5,Seq05VD}_*",
                     {"train": "train", "val": "test"}),
    "camvid-dusk": camvid("camvid", "<split>/0001TP_*", "<split>annot/0001TP_*", {"val": "{train,val,test}"}),
    "voc": voc,
    "voc-corruptions": replace(voc, corrupted=True),
    "folder": Dataset("folder", "images/<split>*", "masks/<split>*", {"train": "{train/,}", "val": "val/"}, own=True),
    "toy": toy("game", train=1000, val=100),
    **{f"toy-{look}": toy(look, val=100) for look in UNSEEN},
    **{f"toy-{look}": toy(look, train=1000, val=100) for look in ("arcade", "diorama")},
    "toy-wide": toy("wide", train=4000, val=100),
    "toy-proxy": toy("wide", train=2000, jumble=True),
    "toy-boxes": toy("game", train=1000, val=100, boxes=True),
    **{f"toy-boxes-{look}": toy(look, val=100, boxes=True) for look in UNSEEN},
    "toy-boxes-corruptions": toy("game", val=20, boxes=True, corrupted=True),
}
ACDC = ("acdc-night", "acdc-snow", "acdc-fog", "acdc-rain")
TOY_SOURCES = ("toy", "toy-arcade", "toy-diorama")
SETTINGS = {  # labelled source -> domains of the table row
    "gtav": ("gtav", ("cityscapes", "bdd100k", "mapillary")),
    "gtav-acdc": ("gtav", ACDC),
    "cityscapes": ("cityscapes", ACDC),
    "potsdam-rgb": ("potsdam-rgb", ("potsdam-irrg", "vaihingen-irrg")),
    "endovis18": ("endovis18", ("endovis18",)),  # other sequences are its unseen domain
    "camvid": ("camvid", ("camvid-dusk",)),
    "toy": ("toy", tuple(f"toy-{look}" for look in UNSEEN)),
    "voc": ("voc", ("voc-corruptions",)),
    "toy-boxes": ("toy-boxes", tuple(f"toy-boxes-{look}" for look in (*UNSEEN, "corruptions"))),
}


# --- Finding the files ----------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    """One image with its label: where they lie, and how they are read."""
    entry: Dataset
    image: object  # Path, or the number of a generated scene
    label: object = None  # Path
    tile: tuple = ()  # rows and columns, as slices
    corruption: tuple = None  # a key of CORRUPTIONS and a severity, 1 to 5

    def read_image(self):
        """uint8 (3, H, W); UserError names a file that is broken."""
        if self.entry.generate:
            image = torch.from_numpy(self.entry.generate(self.image)[0]).permute(2, 0, 1)
        else:
            image = read_image(self.image, self.entry.own)[(..., *self.tile)]
        return corrupt(image, *self.corruption) if self.corruption else image

    def read_label(self):
        """uint8 (H, W) of classes and 255, or boxes; UserError names a file of neither."""
        if self.entry.generate:
            return torch.from_numpy(self.entry.generate(self.image)[1])
        try:
            return torch.from_numpy(self.entry.decode(self.label, *self.tile))
        except BROKEN as error:
            raise UserError(f"{self.label}: cannot be read as a label ({error})") from None


def entries(name, classes=0, labelled=True):
    """{name: row of DATASETS} for a name like gtav+synthia; classes: of --data folder."""
    found = {}
    for word in name.split("+"):
        for part in ACDC if word == "acdc" else [word]:
            if part not in DATASETS:
                raise UserError(f"--data {part}: not one of {' '.join(DATASETS)}")
            if classes and (part != "folder" or not 0 < classes <= UNKNOWN):
                raise UserError(f"--classes {classes}: is for --data folder, at most {UNKNOWN}")
            found[part] = DATASETS[part]
            if classes:  # they have numbers for names and bright colours
                colors = np.random.default_rng(0).integers(40, 256, (classes, 3)).tolist()
                decode = partial(by_value, table=lookup_table(range(classes)))
                found[part] = replace(found[part], decode=decode, classes=tuple(map(str, range(classes))),
                                      colors=tuple(map(tuple, colors)))
    if labelled and len({entry.classes for entry in found.values()}) > 1:
        raise UserError(f"--data {name}: these sets have different classes")
    return found


def locate(root, entry):
    """The dataset's folder: below root, or root itself unless it holds other sets."""
    own = Path(root, entry.folder)
    if own.is_dir():
        return own
    if not Path(root).is_dir() or any(Path(root, other.folder).is_dir() for other in DATASETS.values()):
        raise UserError(f"--root {root}: no such folder as {own}")
    return Path(root)


class Samples:
    """The Samples of a set with files, made one by one from rows of names (image[, label])."""
    def __init__(self, entry, folder, rows):
        self.entry = entry
        self.folder = folder
        # One array: a million Python texts take 700 MB, and each loading process would copy them.
        self.names = np.array([list(map(os.fsencode, row)) for row in rows])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return Sample(self.entry, *[self.folder / os.fsdecode(name) for name in self.names[i]])


def find(folder, patterns, text, part=None):
    """Files by the first pattern that finds some, and its regex; if none and `part`, UserError."""
    patterns = patterns.replace("<split>", text).split()
    for pattern in patterns:
        regex = re.escape(pattern).replace(r"\{", "(").replace(r"\}", ")").replace(",", "|")
        regex = regex.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "([^/]*)")
        if not pattern.endswith("TrainIds"):
            regex += "(?<!_labelTrainIds)"  # which converters write beside the labels
        regex = re.compile(f"{regex}(?i:{'|'.join(map(re.escape, SUFFIXES))})")
        top = re.split(r"[*{]", pattern)[0].rpartition("/")[0]  # all its files lie below
        names = [name for name in files_below(folder, top) if regex.fullmatch(name)]
        if names:
            return names, regex
    if not part:
        return [], regex
    there = [*files_below(folder, top)] or [*files_below(folder, "")]
    instead = f"; there are {there[0]} and {len(there) - 1} others" if there else ""
    raise UserError(f"--data {part}: {folder} holds no files like {' or '.join(patterns)} "
                    f"({' '.join(SUFFIXES)}){instead}")


def files_below(folder, below):
    """The visible files in folder / below, as sorted names in folder; follows links."""
    if not Path(folder, below).is_dir():
        return
    visible = [item for item in os.scandir(folder / below) if not item.name.startswith((".", "__MACOSX"))]
    for item in sorted(visible, key=lambda item: (item.is_dir(), item.name)):
        name = f"{below}/{item.name}" if below else item.name
        if item.is_dir():
            yield from files_below(folder, name)
        else:
            yield name


def listing(part, entry, root, split, labelled):
    """The samples of one dataset, and a line on each file that is in no pair."""
    if split not in entry.splits:
        raise UserError(f"--data {part}: has no {split} split, only {' '.join(entry.splits)}")
    text = entry.splits[split]
    if entry.generate:
        return [Sample(entry, number) for number in text], []
    if labelled and not entry.decode:
        raise UserError(f"--data {part}: {'say how many --classes' if part == 'folder' else 'has no labels'}")
    folder = locate(root, entry)
    problems = []
    if entry.boxes:
        rows = voc_pairs(folder, text)
    else:
        images, regex = find(folder, entry.images, text, part)
        images = [name for name in images if not LABEL_FOLDER.search(name)] or images
        rows = zip(images)
        if labelled:
            rows, problems = paired(folder, (images, regex), find(folder, entry.labels, text, part))
    samples = Samples(entry, folder, rows)
    say(f"{part} {split}: {len(samples)} images in {folder}")
    return samples, problems


def paired(folder, images, labels):
    """The pairs among what `find` returned for both sides, a line on each other file."""
    groups = {}  # {texts for "*" and "{}": ([images], [labels])}
    for side, (names, regex) in enumerate((images, labels)):
        for name in names:
            groups.setdefault(regex.fullmatch(name).groups(), ([], []))[side].append(name)
    pairs = []
    problems = []
    for _, (here, there) in sorted(groups.items()):
        if len(here) == len(there) == 1:
            pairs.append(here + there)
        for names, partners in ((here, there), (there, here)):
            if len(partners) != 1:
                said = " or ".join(partners) or "missing"
                problems += [f"{folder / name}: its partner is {said}" for name in names]
    return pairs, problems


def voc_pairs(folder, lists):
    """The pairs that VOC's lists name, as VOC2007/trainval is one."""
    for text in lists.split():
        year, part = text.split("/")
        file = folder / year / f"ImageSets/Main/{part}.txt"
        if not file.is_file():
            raise UserError(f"{file} is not there")
        for name in file.read_text().split():
            yield f"{year}/JPEGImages/{name}.jpg", f"{year}/Annotations/{name}.xml"


def gather(name, root, split, labelled, classes=0):
    """All samples of a name like gtav+synthia, each tile, each corruption."""
    samples = []
    for part, entry in entries(name, classes, labelled).items():
        found, problems = listing(part, entry, root, split, labelled)
        if problems:
            raise UserError(f"{problems[0]} (one of {len(problems)} in {part} {split}; data.py lists them)")
        if entry.tile or entry.corrupted:
            found = list(itertools.chain.from_iterable(map(pieces, found)))
        samples.append(found)
    return ConcatDataset(samples)


def pieces(sample):
    """The tiles of a large image, the last ones flush with its border, or all corruptions."""
    if sample.entry.corrupted:
        return [sample._replace(corruption=pair) for pair in itertools.product(CORRUPTIONS, range(1, 6))]
    with Image.open(sample.image) as header:
        width, height = header.size
    side = sample.entry.tile
    lefts = [min(left, max(width - side, 0)) for left in range(0, width, side)]
    tops = [min(top, max(height - side, 0)) for top in range(0, height, side)]
    return [sample._replace(tile=(slice(top, top + side), slice(left, left + side)))
            for top, left in itertools.product(tops, lefts)]


# --- Datasets -------------------------------------------------------------------------------------------------------

class Scenes(torch.utils.data.Dataset):
    """Items (image[, label], draw) by key (index, draw) or index; random by (seed, draw)."""
    def __init__(self, samples, transform, labelled, training):
        self.samples = samples
        self.transform = transform
        self.labelled = labelled
        self.training = training
        self.seed = 0  # set by loader
        entry = samples[0].entry
        self.boxes = entry.boxes
        self.classes = entry.classes
        self.colors = entry.colors
        self.num_classes = len(entry.classes)

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
                    raise UserError(f"{sample.label}: {(*label.shape,)} pixels, its image {(*image.shape[1:],)}")
                label = resize_label(label, image.shape[1:])
        if self.transform:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would touch the GPU's generator, too.
                torch.default_generator.manual_seed(mix(self.seed, draw))
                image, label = self.transform(image, label)
        if self.labelled:
            return image.contiguous(), label if self.boxes else label.long(), draw
        return image.contiguous(), draw

    def read(self, index):
        """The sample at index with its image; while training the next one that can be read."""
        for _ in range(TRIES):
            sample = self.samples[index]
            try:
                return sample, sample.read_image()
            except UserError as error:
                if not self.training:
                    raise
                print(f"{error}: the next image takes its place", file=sys.stderr)
            index = (index + 1) % len(self)
        raise UserError(f"{sample.image}: cannot be read, like {TRIES - 1} before it: too many")


def images(name, root, transform=None, split="train"):
    """Images without labels, for distillation and for figures."""
    samples = gather(name, root, split, labelled=False)
    return looked_at(name, Scenes(samples, transform, labelled=False, training=split == "train"))


def scenes(name, root, split="train", transform=None, labels="1", classes=0):
    """Images with labels; labels="1/16" keeps a fixed random subset; classes: see entries."""
    share = Fraction(labels) if re.fullmatch(r"\d*\.?\d+|\d+/[1-9]\d*", labels) else 0
    if not 0 < share <= 1:
        raise UserError(f"--labels {labels}: a fraction like 1/16 was expected")
    samples = gather(name, root, split, True, classes)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))  # always the same
    count = max(1, round(share * len(samples)))
    kept = [samples[i] for i in sorted(order[:count].tolist())]
    return looked_at(name, Scenes(kept, transform, labelled=True, training=split == "train"))


def looked_at(name, dataset):
    """The dataset; what a hundred samples can hardly mean is said first."""
    entry = dataset.samples[0].entry
    if entry.generate or not (dataset.training or entry.own):
        return dataset
    counts = np.zeros(256, np.int64)
    brightest = 0
    step = 1 if entry.tile else math.ceil(len(dataset) / 100)  # neighbouring tiles lie in one file
    for i in range(0, len(dataset), step)[:100]:
        if dataset.labelled:
            counts += counts_of(dataset.samples[i].read_label(), entry)
        if brightest < DARK:
            brightest = max(brightest, dataset.read(i)[1].max().item())
    if entry.own and counts[0] and counts[IGNORE] and not counts[1:IGNORE].any():
        raise UserError(f"--data {name}: the labels hold 0 and 255 alone; 255 is void: save what it marks as 1")
    found = f"--data {name}: in {min(len(dataset), 100)} images looked at"
    missing = [kind for kind, count in zip(entry.classes, counts) if not count]
    void = counts[IGNORE] / max(1, counts.sum())
    if dataset.labelled and (missing or void > 0.5):
        say(f"{found} {void:.0%} is void (255), classes without a pixel: {', '.join(missing) or 'none'}; is the "
            "numbering this set's?")
    if brightest < DARK:
        say(f"{found} nothing is brighter than {brightest} of 255: scale 12 bits in 16 to all 16")
    return dataset


def counts_of(label, entry):
    """How many pixels or objects of a label have each of the 256 values."""
    values = objects_of(label)[:, 4].int() if entry.boxes else label.flatten()
    return np.bincount(values, minlength=256)


# --- Which image when -----------------------------------------------------------------------------------------------

ORDER, ERASED_BOX, ERASED_PIXELS, MASKS = range(1, 5)  # what random numbers of a draw are for


def mix(*numbers):
    """One seed from several numbers, of the 32 bits that torch's CPU generator reads."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batches(n, batch, seed=0, start_step=0, rank=0, world=1, passes=1, repeats=1):
    """Micro-batches of keys (index, draw), forever: this process's share of each step."""
    share = batch // world
    micro = share // passes
    for step in itertools.count(start_step):
        first = step * batch + rank * share
        for start in range(first, first + share, micro):
            yield [(image_of(draw, n, seed, repeats), draw) for draw in range(start, start + micro)]


def image_of(draw, n, seed=0, repeats=1):
    """The index of a draw's image: an epoch is a shuffle, each image `repeats` times in a row."""
    return order_of_epoch(n, seed, draw // n)[draw % n // repeats].item()


@lru_cache(maxsize=1)
def order_of_epoch(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, ORDER, epoch)))


def loader(dataset, batch, workers=0, seed=0, **order):
    """Image uint8 (B, 3, H, W)[, label int64 (B, H, W)], draw (B,), forever; order: of batches."""
    dataset.seed = seed
    return DataLoader(dataset, batch_sampler=batches(len(dataset), batch, seed, **order), num_workers=workers,
                      pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None,
                      worker_init_fn=outlast_signals)


def outlast_signals(worker):
    """Load on while the training process, signalled too, saves; a second SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


# --- Stage 1: crop, flip, RandAugment -------------------------------------------------------------------------------

def chance(p):
    return torch.rand(()).item() < p


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def distill_transform(image, label=None, size=224, randaugment=True):
    """Of both stages of distillation: crop, flip, RandAugment; uint8 (3, size, size)."""
    box = RandomResizedCrop.get_params(image, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    image = TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    if chance(0.5):
        image = image.flip(2)
    image = image.contiguous()
    if randaugment:
        image = rand_augment(image)
    return image, label


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


def shift(image, dx=0, dy=0):
    """Output pixel (x, y) shows input (x + dx, y + dy): 30 times as fast as warp."""
    pad = [max(-dx, 0), max(-dy, 0), max(dx, 0), max(dy, 0)]  # left, top, right, bottom
    padded = TF.pad(image, pad, fill=list(FILL))
    return TF.crop(padded, max(dy, 0), max(dx, 0), *image.shape[1:])


def rotate(image, signed):
    angle = math.radians(30 * signed)
    cos = math.cos(angle)
    sin = math.sin(angle)
    x = image.shape[2] / 2
    y = image.shape[1] / 2
    return warp(image, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


RAND_AUGMENT = (  # of an image x, a level in 0..1, and the level with a random sign
    lambda x, level, signed: rotate(x, signed),
    lambda x, level, signed: TF.posterize(x, bits=4 - int(4 * level)),
    lambda x, level, signed: TF.solarize(x, threshold=256 - int(256 * level)),
    lambda x, level, signed: torch.where(x < 128, x + int(110 * level), x),  # solarize, add
    lambda x, level, signed: TF.autocontrast(x),
    lambda x, level, signed: TF.equalize(x),
    lambda x, level, signed: TF.invert(x),
    lambda x, level, signed: TF.adjust_saturation(x, 1 + 0.9 * signed),
    lambda x, level, signed: TF.adjust_contrast(x, 1 + 0.9 * signed),
    lambda x, level, signed: TF.adjust_brightness(x, 1 + 0.9 * signed),
    lambda x, level, signed: TF.adjust_sharpness(x, 1 + 0.9 * signed),
    lambda x, level, signed: warp(x, b=0.3 * signed),
    lambda x, level, signed: warp(x, d=0.3 * signed),
    lambda x, level, signed: shift(x, dx=round(0.45 * signed * x.shape[2])),
    lambda x, level, signed: shift(x, dy=round(0.45 * signed * x.shape[1])),
)


# --- On the device: normalisation, random erasing, the noise of the masks -------------------------------------------

def normalize(image, mean, std):
    """uint8 (B, 3, H, W) to floats of mean 0 and deviation 1."""
    mean = 255 * torch.tensor(mean, device=image.device)[:, None, None]
    std = 255 * torch.tensor(std, device=image.device)[:, None, None]
    return (image - mean) / std


def renormalize(x, model, other):
    """Images normalised for one encoder, normalised for another instead."""
    if (model.mean, model.std) == (other.mean, other.std):
        return x
    scale = np.divide(model.std, other.std)
    offset = np.subtract(model.mean, other.mean) / other.std
    return x * x.new_tensor(scale)[:, None, None] + x.new_tensor(offset)[:, None, None]


def erase(x, draws, seed=0, p=0.25, area=(0.02, 1 / 3), ratio=(0.3, 3.3)):
    """Random erasing of x (B, 3, H, W), in place: a box of noise in a share p, by (seed, draw)."""
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
    """Random numbers in 0..1, (B, N), each row by (seed, draw) alone."""
    rows = []
    for draw in draws.tolist():
        generator = torch.Generator().manual_seed(mix(seed, MASKS, draw))
        rows.append(torch.rand(N, generator=generator))
    return torch.stack(rows)


# --- Stage 2: image and label together ------------------------------------------------------------------------------

def segment_transform(image, label, size=512, cat_max_ratio=0.75):
    """mmsegmentation's pipeline: scale, crop, flip, colours, padding; uint8 (., size, size)."""
    height, width = label.shape
    tenths = 5 + torch.randint(16, ()).item()
    short_edge = size * tenths // 10  # 0.5, 0.6, .. 2.0 sizes; the long edge is 4 at most
    scale = min(short_edge / min(height, width), 4 * size / max(height, width))
    scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = TF.resize(image, scaled, antialias=False)
    label = resize_label(label, scaled)
    rows, columns = varied_crop(label, size, cat_max_ratio)
    image = distort(image[:, rows, columns])
    label = label[rows, columns]
    if chance(0.5):
        image = image.flip(2)
        label = label.flip(1)
    pad = [0, 0, size - label.shape[1], size - label.shape[0]]  # left, top, right, bottom
    image = TF.pad(image, pad, fill=list(FILL))
    label = TF.pad(label[None], pad, fill=IGNORE)[0]
    return image, label


def varied_crop(label, size, cat_max_ratio, tries=10):
    """Rows and columns of a crop in which no class fills more, or of the last try."""
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
    """mmsegmentation's PhotoMetricDistortion; brightness in greys, hue in half degrees."""
    if chance(0.5):
        image = (image + uniform(-brightness, brightness)).clamp_(0, 255).to(torch.uint8)
    change_contrast = chance(0.5)
    contrast_first = chance(0.5)
    if change_contrast and contrast_first:
        image = TF.adjust_brightness(image, uniform(*contrast))  # a mere factor
    if chance(0.5):
        image = saturate(image, uniform(*saturation))
    if chance(0.5):
        image = TF.adjust_hue(image, uniform(-hue, hue) / 180)
    if change_contrast and not contrast_first:
        image = TF.adjust_brightness(image, uniform(*contrast))
    return image


def saturate(image, factor):
    """Scale the S of HSV: distances to the largest channel grow, until the smallest is 0."""
    brightest = image.amax(0).float()
    reach = brightest - image.amin(0)
    factor = torch.minimum(torch.full_like(reach, factor), brightest / reach.clamp(min=1))
    return (brightest - (brightest - image) * factor).round_().to(torch.uint8)


def detect_transform(image, label, size, visible=0.3):
    """Short edge to size, square crop, flip; a box that shows less than `visible` is dropped."""
    boxes = BoundingBoxes(label[:, :4], format="XYXY", canvas_size=image.shape[1:])
    scale = size / min(image.shape[1:])
    together = Compose([Resize(size), RandomCrop(size), RandomHorizontalFlip()])
    image, seen = together(image, boxes)
    label = torch.cat([seen, label[:, 4:]], 1)
    label[box_area(seen) < visible * scale ** 2 * box_area(boxes)] = 0
    return image, label


def eval_transform(image, label, name):
    """The dataset's official test size for the image; the label keeps its own, or is halved."""
    entry = DATASETS[name]
    if entry.eval_half:
        half = (image.shape[1] // 2, image.shape[2] // 2)
        image = TF.resize(image, half, InterpolationMode.BICUBIC, antialias=True)
        label = resize_label(label, half)
    if entry.eval_size:
        height, width = image.shape[1:]
        long_edge, short_edge = entry.eval_size
        scale = min(long_edge / max(height, width), short_edge / min(height, width))
        image = TF.resize(image, (round(height * scale), round(width * scale)), antialias=False)
    return image, label


# --- Corruptions: an unseen domain for detectors --------------------------------------------------------------------
# Ten of the fifteen of Hendrycks and Dietterich (2019); the others need further packages or photographs.

CORRUPTIONS = {  # the constants of severity 1 to 5
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of black and white
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, deviation
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # farthest, step
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # strength, decay
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to V of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor about the mean
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # scale
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
}


def corrupt(image, name, severity):
    """An image uint8 (3, H, W) under one of CORRUPTIONS, whose noise follows from its pixels."""
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
        zoomed = partial(TF.affine, x, 0, [0, 0], shear=[0, 0], interpolation=InterpolationMode.BILINEAR)
        zooms = [zoomed(scale=scale) for scale in np.arange(1, *c)]
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
    """A plasma fractal in 0..1, (H, W): a new point is the mean of four, and ever weaker noise."""
    x = torch.zeros(1, 1)
    for octave in range(math.ceil(math.log2(max(height, width)))):
        noise = decay ** (-2 * octave) * (torch.rand(3, *x.shape, generator=generator) - 0.5)
        centre = (x + x.roll(-1, 1) + x.roll(-1, 0) + x.roll((-1, -1), (0, 1))) / 4 + noise[0]
        across = (x + x.roll(-1, 1) + centre + centre.roll(1, 0)) / 4 + noise[1]
        down = (x + x.roll(-1, 0) + centre + centre.roll(1, 1)) / 4 + noise[2]
        x = F.pixel_shuffle(torch.stack([x, across, down, centre]), 2)[0]
    x = (x - x.min()) / (x.max() - x.min())
    return x[:height, :width]


# --- Preflight: python data.py --data gtav --root /data -------------------------------------------------------------

def check(sample):
    """Read a sample as training does: what is wrong, in a line, and counts_of its label."""
    entry = sample.entry
    try:
        item = Scenes([sample], None, bool(entry.classes), training=False)[0]
    except UserError as error:
        return str(error), 0
    return None, counts_of(item[1], entry) if entry.classes else 0


def preflight(name, root, out=None, classes=0, workers=0):
    """Open every file and print what was found; returns the number of problems."""
    count = 0
    shown = []
    total = np.zeros(256, np.int64)
    for part, entry in entries(name, classes).items():
        at_hand = [split for split, text in entry.splits.items()
                   if entry.generate or find(locate(root, entry), entry.images, text)[0]]
        for split in at_hand or [*entry.splits][:1]:  # if none is there, listing says what is missing
            samples, problems = listing(part, entry, root, split, bool(entry.labels))
            findings = DataLoader(samples, batch_size=None, num_workers=workers, collate_fn=check)
            findings = [*tqdm(findings, f"{part} {split}")]
            good = [sample for sample, (problem, _) in zip(samples, findings) if not problem]
            problems += [problem for problem, _ in findings if problem]
            total += sum(counts for _, counts in findings)
            count += len(problems)
            shown += good[::max(1, math.ceil(len(good) / 4))]  # 4 at most, evenly
            kind = "pairs" if entry.classes else "images"
            print(f"{part} {split}: {len(samples)} {kind}, {len(problems)} problems")
            for line in problems:
                print(f"  {line}")
            if good:
                looked_at(f"{part} {split}", Scenes(good, None, bool(entry.classes), training=True))
    if total.any():
        print(f"share of the {'objects' if entry.boxes else 'pixels'}, %")
        for number, kind in [*enumerate(entry.classes), (IGNORE, "ignored")]:
            print(f"  {kind:16} {100 * total[number] / total.sum():6.2f}")
    if out and shown:
        pictures = [*map(picture_of, shown)]
        TF.to_pil_image(make_grid(pictures, nrow=4, padding=10, pad_value=255)).save(out)
    return count


def palette(colors):
    """The colours of 256 class numbers (256, 3), uint8, black for those that are none."""
    black = [(0, 0, 0)] * (256 - len(colors))
    return np.array([*colors, *black], np.uint8)


def picture_of(sample, size=(300, 225)):
    """A sample's image above its label, or with its boxes, each fitted into size."""
    entry = sample.entry
    image = sample.read_image()
    pictures = [] if entry.boxes else [image.permute(1, 2, 0).numpy()]
    if entry.classes:
        pictures.append(label_picture(sample.read_label(), image, entry.classes, entry.colors))
    fitted = [ImageOps.pad(Image.fromarray(picture), size, Image.Resampling.NEAREST) for picture in pictures]
    return torch.cat([TF.pil_to_tensor(picture) for picture in fitted], 1)


def label_picture(label, image, classes, colors, width=300, scored=False):
    """A label (H, W) in its colours, or boxes (M, 6) on their image: uint8 (., ., 3)."""
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


def main(argv=None):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--data", default="toy", help="names of DATASETS, joined with +")
    parser.add_argument("--root", default="data", help="folder of all datasets, or of this")
    parser.add_argument("--classes", type=int, default=0, help="how many, for --data folder")
    parser.add_argument("--out", default="preflight.png", help="picture of some samples")
    parser.add_argument("--workers", type=int, default=0, help="processes that open files")
    args = parser.parse_args(argv)
    try:
        if preflight(args.data, args.root, args.out, args.classes, args.workers):
            sys.exit(1)
    except UserError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
