"""Stage 1 of GKD: distil a teacher's features into a student, on a proxy set or on source images; no labels.

    python distill.py --data toy-proxy --out runs/proxy              # the toy world, after `python eval.py --demo` has made its teacher
    torchrun --standalone --nproc_per_node=8 distill.py --data imagenet --root /data --out runs/proxy
    torchrun --standalone --nproc_per_node=8 distill.py --data gtav --root /data --student runs/proxy/student.pt --out runs/source

The proxy stage and the source stage are this same script; they differ only in the preset of --data. The same command resumes.
"""
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import qsd


@dataclass
class Config(qsd.LossConfig):
    """Every constant of stage 1; the constants of the objective itself are in qsd.LossConfig."""
    # who learns what from whom
    data: str = "toy"              # a name of data.DATASETS, or several joined with +; picks the preset below
    root: str = "data"             # the folder that holds the data sets
    teacher: str = "dinov2_vitb14"  # a name of qsd.ENCODERS or a checkpoint
    student: str = "deit_small_distilled"  # likewise; the source stage gets the proxy stage's student.pt
    pretrained: bool = True        # no: the student starts from random weights
    student_depth: int | None = None  # only the student's first k blocks
    keep_heads: bool = False       # start from the heads in the student's checkpoint; official: fresh heads in each stage
    out: str = "runs/distill"      # log.jsonl, last.pt, student.pt
    # images
    size: int = 512                # side of the square crop, pixels (proxy 224)
    patch: int = 16                # patch side of both ViTs, pixels (proxy 14); checkpoints are resized to it
    cache: int = 0                 # read the copy that `python data.py --cache SIZE` made with this short side; 0 = the originals
    randaugment: bool = True       # as the official code, in both stages
    erase: float = 0.25            # probability of RandomErasing
    repeats: int = 3               # draws of an image in a row (repeated augmentation, official); 1 = none
    workers: int = 8               # image-loading processes per training process; 0 = load in the training process
    # optimiser
    batch: int = 128               # global, whatever the number of processes (proxy 512)
    micro: int = 64                # most images of one forward pass; the rest is gradient accumulation
    budget: str = "300ep"          # 600 (steps), 300ep, 2h, 3e18flop: the schedule follows the fraction spent
    lr: float = 5e-4               # peak
    lr_rule: Literal["batch/512", "constant"] = "batch/512"  # official: lr x batch / 512; the paper's text: 5e-4 in both stages
    lr_min: float = 1e-5           # the cosine's end
    warmup: float = 0.0            # fraction of the budget; official 0, Proteus 5 of 100 epochs
    weight_decay: float = 0.05     # not on 1-d parameters; official: on pos_embed, cls_token and mask_token, too
    # running
    seed: int = 0                  # decides order, augmentation, masks and fresh weights
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU; losses are fp32 in any case
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    log_every: int = 10            # steps
    save_minutes: float = 10.0     # between checkpoints
    max_skips: int = 10            # non-finite steps in a row that end the run


FREE = {"root", "workers", "micro", "log_every", "save_minutes", "max_skips"}  # may change when a run resumes; all else is mathematics

PROXY = dict(size=224, patch=14, batch=512, budget="100ep")
TOY = dict(teacher="runs/toy/0/teacher/segmenter.pt", student="toy_small", size=64, patch=8, batch=16, budget="500", repeats=1, workers=1,
           lr=2e-3, lr_rule="constant", dcd_pool=1, log_every=20)
# all other sets: the defaults above, the paper's source stage
PRESETS = {"imagenet": PROXY, "toy-proxy": TOY} | dict.fromkeys(data.TOY_SOURCES, TOY | dict(lr=1e-3))


class Learner(nn.Module):
    """Student and objective as one module, so that one DDP wrapper sees every trained parameter."""

    def __init__(self, student, objective):
        super().__init__()
        self.student, self.objective = student, objective

    def forward(self, x, t, noise):
        s = self.student.run(x, layers=self.objective.layers_s) if self.objective.plain else None
        return self.objective(self.student, x, s, t, noise)


def weight_decay_groups(module, weight_decay):
    """AdamW's two groups: matrices decay, 1-d parameters (norms, biases, LayerScale) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]


def learning_rate(cfg, fraction):
    """Linear warm-up, then cosine from the peak to lr_min, as a function of the fraction of the budget spent."""
    peak = cfg.lr * (cfg.batch / 512 if cfg.lr_rule == "batch/512" else 1)
    if fraction < cfg.warmup:
        return peak * fraction / cfg.warmup
    return cfg.lr_min + (peak - cfg.lr_min) * 0.5 * (1 + math.cos(math.pi * (fraction - cfg.warmup) / (1 - cfg.warmup)))


def main(argv=None):
    cfg = data.configure(Config, PRESETS, argv)
    rank, world, device = data.launch()
    out, resumed = Path(cfg.out), data.open_run(cfg, "student.pt", FREE)
    if resumed == "finished":
        return print(f"{out}/student.pt is finished; nothing to do") if rank == 0 else None

    # the images, the two encoders, the objective
    torch.manual_seed(cfg.seed)
    dataset = data.images(cfg.data, cfg.root, data.distill_transform(cfg.size, cfg.randaugment), cache=cfg.cache or None)
    teacher = qsd.load_vit(cfg.teacher, cfg.size, cfg.patch).to(device).eval().requires_grad_(False)
    student = qsd.load_vit(cfg.student, cfg.size, cfg.patch, depth=cfg.student_depth, pretrained=cfg.pretrained).to(device)
    objective = qsd.LOSSES[cfg.loss](student, teacher, cfg).to(device)
    ancestors, heads = qsd.lineage(cfg.student)
    if cfg.keep_heads:
        try:
            objective.load_state_dict(heads or {})
        except RuntimeError:
            data.fail(f"--keep_heads: {cfg.student} holds no heads of this --loss, teacher and student")
    learner, run_teacher, autocast = Learner(student, objective), teacher.run, data.precision(cfg.precision, device)
    N = (cfg.size // cfg.patch) ** 2
    statistics = None
    if cfg.target_norm == "phis":
        statistics = qsd.target_statistics(teacher, data.first_images(dataset).to(device))

    def distil(model, images, draws):
        """The objective's losses on one batch of uint8 images (B, 3, H, W), their draw numbers (B) naming all randomness."""
        x = data.normalize(images.to(device, non_blocking=True), student.mean, student.std)
        x = data.erase(x, draws, cfg.seed, cfg.erase)                    # before both: teacher and student see the same pixels
        noise = data.noise(draws, N, cfg.seed).to(device)                # (B, N): decides which patches are hidden
        with autocast:
            with torch.no_grad():
                t = run_teacher(data.restate(x, student, teacher), layers=objective.layers_t)  # cls (B, C_t), patches (B, N, C_t), outs
            return model(x, qsd.normalize_targets(t, cfg.target_norm, statistics), noise)

    # two images through one step: what it costs, and which parameters this objective does not touch
    two = torch.zeros(2, 3, cfg.size, cfg.size, dtype=torch.uint8), torch.arange(2)
    cost = data.count_flops(lambda: distil(learner, *two)["loss"].backward()) / 2  # FLOPs per image
    for p in learner.parameters():
        p.requires_grad_(p.grad is not None)
    learner.zero_grad()

    if cfg.compile == "yes" or cfg.compile == "auto" and device.type == "cuda":
        learner.compile()
        run_teacher = torch.compile(teacher.run)
    model = DistributedDataParallel(learner)
    optimizer = torch.optim.AdamW(weight_decay_groups(learner, cfg.weight_decay), betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    parts = dict(learner=learner, optimizer=optimizer, scaler=scaler)
    spent = data.resume(resumed, **parts)                                # this stage's ledger
    unit, budget = data.parse_budget(cfg.budget, len(dataset) / cfg.batch)
    passes = data.passes(cfg.batch, cfg.micro, world)
    loader = data.loader(dataset, cfg.batch, cfg.seed, spent["steps"], rank, world, passes, cfg.repeats, cfg.workers)
    batches = iter(loader)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        data.start_log(cfg, spent["steps"], device=data.device_name(device), world=world, gflop_per_image=cost / 1e9)
    bar = tqdm(initial=spent["steps"], total=None, desc=str(out), disable=rank > 0, unit="step", dynamic_ncols=True)

    signals, skips, saved = data.catch_signals(), 0, time.time()
    while spent[unit] < budget:
        began = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, spent[unit] / budget)
        waited, totals = 0.0, {}
        for i in range(passes):
            asked = time.time()
            images, draws = next(batches)
            waited += time.time() - asked
            with model.no_sync() if i < passes - 1 else nullcontext():
                losses = distil(model, images, draws)                    # Eq. 4 on the proxy set, Eq. 5 on the source set
                scaler.scale(losses["loss"] / passes).backward()
            totals = {k: totals.get(k, 0) + v.detach() / passes for k, v in losses.items()}
        bad, stop, seconds = data.agree(not data.step(optimizer, scaler), signals[0] if signals else 0, time.time() - began)

        # the books: what has been spent, what is reported, what is kept
        data.spend(spent, steps=1, images=cfg.batch, tokens=cfg.batch * N, flops=cfg.batch * cost, seconds=seconds, skipped=bad, waited=waited)
        skips = skips + 1 if bad else 0
        data.report(cfg, bar, spent, unit, budget, totals, optimizer)
        saved = data.keep(cfg, saved, stop or skips == cfg.max_skips, spent, **parts)
        data.leave(cfg, spent, stop, skips, dataset, loader, draws)

    if rank == 0:
        data.finish(cfg, "student.pt", qsd.student_checkpoint(student) | dict(
            objective=objective.state_dict(), config=data.as_plain(cfg), ledger=ancestors + [dict(script="distill", data=cfg.data, **spent)]))
    bar.close()


if __name__ == "__main__":
    data.cli(main, qsd.UserError)
