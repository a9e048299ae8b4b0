"""How assets/toy_student.pt was made: the toy world's DeiT, trained on image-level labels of the proxy set.

    python assets/toy_student.py        # from the project's root, four minutes on a core

The labels say which of the eight classes an image shows at all, and which fill much of it. Unseen looks and the labels
of the game enter nothing.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn.functional as F

import data
import qsd

IMAGES = 2000           # of the proxy set, whose last 200 only measure
STEPS = 3000            # of 32 images; after 8,000 it has overfitted
PEAK = 1.5e-3           # learning rate, a cosine down to 1e-5

torch.manual_seed(0)
vit = qsd.load_vit("toy_small", img_size=64, patch_size=8)
head = torch.nn.Linear(64, 16)
images = []
labels = []
for index in range(IMAGES):
    image, label = data.toy_scene("wide", index, jumble=True)
    area = np.bincount(label.ravel(), minlength=8)                      # pixels of each class
    images.append(torch.from_numpy(image).permute(2, 0, 1))
    labels.append(np.concatenate([area > 30, area > 500]))
images = torch.stack(images)                                            # (2000, 3, 64, 64)
labels = torch.from_numpy(np.stack(labels)).float()                     # (2000, 16)

optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=PEAK, weight_decay=0.05)
for step in range(STEPS):
    for group in optimizer.param_groups:
        group["lr"] = 1e-5 + PEAK * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    chosen = torch.randint(IMAGES - 200, (32,))
    x = images[chosen]
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    cls, _ = vit(data.normalize(x, vit.mean, vit.std))
    loss = F.binary_cross_entropy_with_logits(head(cls), labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    cls, _ = vit(data.normalize(images[-200:], vit.mean, vit.std))
    right = ((head(cls) > 0) == labels[-200:].bool()).float().mean().item()
print(f"{100 * right:.1f} % of the answers right on 200 other images")
torch.save({name: tensor.half() for name, tensor in vit.state_dict().items()}, Path(__file__).with_suffix(".pt"))
