"""Stage 1 of GKD: distil a teacher's features into a student, first on a proxy set, then on source images; no labels.

    python distill.py --data imagenet --root /data --out runs/proxy
    python distill.py --data gtav --root /data --student runs/proxy/student.pt --out runs/source
    python distill.py --data toy-proxy --out runs/mine   # on a CPU, nothing to download

With N GPUs write `torchrun --standalone --nproc_per_node=N` for `python`. Proxy stage and source stage are this same
script, --stage picks the preset. The same command resumes.
"""
import math
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C while torch is loaded: no traceback; see data.cli

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # where python -P does not look
import data
import qsd


@dataclass
class Config(qsd.LossConfig):
    """Every constant of stage 1; those of the objective itself are in qsd.LossConfig."""
    # who learns what from whom
    data: str = "toy"               # a name of data.DATASETS, or several joined with +
    root: str = "data"              # the folder that holds the data sets
    stage: Literal["auto", "proxy", "source"] = "auto"  # which preset; auto: proxy for imagenet and toy-proxy
    teacher: str = "dinov2_vitb14"  # a name of qsd.ENCODERS or a checkpoint
    student: str = "deit_small_distilled"  # likewise; the source stage gets the proxy stage's student.pt
    pretrained: bool = True         # no: the student starts from random weights
    official: bool = True           # a named encoder's file must have its SHA-256; no: whatever lies there is taken
    student_depth: qsd.Count | None = None  # only the student's first k blocks
    keep_heads: bool = False        # start from the heads in the student's checkpoint; official: fresh in each stage
    out: str = "runs/distill"       # log.jsonl, last.pt, student.pt
    # images
    size: qsd.Pixels = 512          # side of the square crop, pixels (proxy 224)
    patch: qsd.Pixels = 16          # patch side of both ViTs, pixels (proxy 14); checkpoints are resized to it
    hub_offset: qsd.Share = 0.0     # of a DINOv2 teacher's resized pos_embed; official: 0.1 in the proxy stage, else 0
    cache: qsd.PixelsOr0 = 0        # read what `python data.py --cache SIZE` stored at this short side; 0: originals
    randaugment: bool = True        # official, in both stages
    erase: qsd.Share = 0.25         # probability of RandomErasing
    repeats: qsd.Count = 3          # times that an image comes in a row (repeated augmentation, official); 1: none
    workers: qsd.Workers = 8        # image-loading processes per training process; 0: load in the training process
    # optimiser
    batch: qsd.Batch = 128          # global, whatever the number of processes (proxy 512)
    micro: qsd.Count = 64           # most images of one forward pass; the rest is gradient accumulation
    budget: str = "300ep"           # 600 (steps), 300ep, 2h, 3e18flop; the schedule follows the fraction spent
    lr: qsd.Positive = 5e-4         # peak
    lr_rule: Literal["batch/512", "constant"] = "batch/512"  # official: lr x batch / 512; the paper's text: constant
    lr_min: qsd.Weight = 1e-5       # the cosine's end
    warmup: qsd.Share = 0.0         # fraction of the budget; official 0, Proteus 5 of 100 epochs
    weight_decay: qsd.Weight = 0.05 # not of 1-d parameters; of pos_embed, cls_token and mask_token (official)
    # running
    seed: qsd.Seed = 0              # decides order, augmentation, masks and fresh weights
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU; losses are fp32
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    log_every: qsd.Count = 10       # steps
    save_minutes: qsd.Weight = 10.0 # between checkpoints
    max_skips: qsd.Count = 10       # non-finite steps in a row that end the run
    bench: Literal["no", "yes", "official"] = "no"  # only time a step, of random weights; official: and the authors'


FREE = {"root", "official", "workers", "micro", "log_every", "save_minutes", "max_skips"}  # may change on resuming

TOY = dict(teacher="toy_teacher", student="toy_small", size=64, patch=8, batch=16, budget="500",
           repeats=1, workers=1, lr=2e-3, lr_rule="constant", dcd_pool=1, log_every=20)
PRESETS = {
    "proxy": dict(size=224, patch=14, hub_offset=0.1, batch=512, budget="100ep"),
    "source": {},                   # the defaults above
    "toy proxy": TOY,
    "toy source": TOY | dict(lr=1e-3),
}


def preset(given):
    """The row of PRESETS for --data and --stage; a flag beats the preset, which beats the default."""
    name = given.get("data", Config.data).split("+")[0]
    stage = given.get("stage", Config.stage)
    if stage == "auto":
        stage = "proxy" if name in ("imagenet", "toy-proxy") else "source"
    return PRESETS[f"toy {stage}" if name.startswith("toy") else stage]


class Learner(nn.Module):
    """Student and objective as one module, so that one DDP wrapper sees every trained parameter.

    objective.plain: it reads a pass of the student over whole images; a pass over masked ones it makes itself.
    """
    def __init__(self, student, objective):
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, x, t, noise):
        s = self.student.run(x, layers=self.objective.layers_s) if self.objective.plain else None
        return self.objective(self.student, x, s, t, noise)


def weight_decay_groups(module, weight_decay):
    """AdamW's two groups: matrices decay, 1-d parameters (norms, biases, LayerScale) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


def learning_rate(cfg, fraction):
    """Linear warm-up, then a cosine from the peak to lr_min, over the fraction of the budget that is spent."""
    peak = cfg.lr * (cfg.batch / 512) if cfg.lr_rule == "batch/512" else cfg.lr
    if fraction < cfg.warmup:
        return peak * fraction / cfg.warmup
    after_warmup = (fraction - cfg.warmup) / (1 - cfg.warmup)
    return cfg.lr_min + (peak - cfg.lr_min) * 0.5 * (1 + math.cos(math.pi * after_warmup))


def main(argv=None):
    cfg = data.configure(Config, preset, argv)
    only_timed = cfg.bench != "no"
    if only_timed:                                                  # no --out, weights or images are read or written
        cfg = replace(cfg, out="--bench", pretrained=False)  # no folder of a user is called so
    run = data.Run(cfg, "student.pt", FREE)                         # joins the processes, opens --out
    if run.finished:
        return

    # the images, the two encoders, the objective between them
    torch.manual_seed(cfg.seed)
    transform = data.distill_transform(cfg.size, cfg.randaugment)
    dataset = None if only_timed else data.images(cfg.data, cfg.root, transform, cache=cfg.cache)
    load_vit = partial(qsd.load_vit, img_size=cfg.size, patch_size=cfg.patch, official=cfg.official)
    teacher = load_vit(cfg.teacher, pretrained=not only_timed, offset=cfg.hub_offset).to(run.device)
    teacher.eval().requires_grad_(False)
    student = load_vit(cfg.student, depth=cfg.student_depth, pretrained=cfg.pretrained).to(run.device)
    objective = qsd.build_objective(student, teacher, cfg).to(run.device)
    ancestors, heads = qsd.ledger_and_heads(cfg.student)
    if cfg.keep_heads:
        qsd.load_heads(objective, heads, cfg.student)
    learner = Learner(student, objective)
    run_teacher = teacher.run                                       # the name that losses_of calls, compiled below
    N = (cfg.size // cfg.patch) ** 2

    def losses_of(model, images, draws):
        """The losses on uint8 images (B, 3, H, W) and their draws (B).

        An image's draw is its number in the endless order in which a run draws images. With the seed it decides all
        that is random about it, on any number of processes.
        """
        x = data.normalize(images.to(run.device, non_blocking=True), student.mean, student.std)
        x = data.erase(x, draws, cfg.seed, cfg.erase)               # teacher and student see the same pixels
        noise = data.uniform_noise(draws, N, cfg.seed).to(run.device)   # (B, N), decides which patches to hide
        with run.autocast:
            with torch.no_grad():
                t = run_teacher(data.renormalize(x, student, teacher), layers=objective.layers_t)
                t = qsd.normalize_targets(t, cfg.target_norm)       # cls (B, C_t), patches (B, N, C_t), outs
            return model(x, t, noise)

    # two images through one step: its cost per image, and which parameters this objective does not train
    two_images = data.two_images(cfg.size)
    probe = partial(losses_of, learner, *two_images)
    flops = data.dry_run(learner, probe)
    compiled = cfg.compile == "yes" or (cfg.compile == "auto" and run.device.type == "cuda")
    if compiled:
        learner.compile(fullgraph=True)                             # one graph each, or an error: no silent slow path
        run_teacher = torch.compile(teacher.run, fullgraph=True)
    groups = weight_decay_groups(learner, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    if only_timed:
        bench(cfg, run, learner, teacher, losses_of, optimizer, flops, compiled)
        return
    run.start(learner, optimizer, dataset, probe, flops, tokens=N, repeats=cfg.repeats)

    for micro_batches in run.steps():                               # until --budget is spent
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, run.fraction)
        for images, draws in micro_batches:                         # gradient accumulation; uint8 (B, 3, H, W), (B)
            with run.sync():                                        # processes average gradients in the last one
                losses = losses_of(run.model, images, draws)        # Eq. 4 on the proxy set, Eq. 5 on source images
                run.backward(losses)                                # the gradients of losses["loss"], added up
        run.step()                                                  # AdamW; then ledger, log and checkpoint

    ledger = ancestors + [dict(script="distill", data=cfg.data, **run.ledger)]
    checkpoint = qsd.student_checkpoint(student)                    # timm's keys
    run.finish(checkpoint | dict(objective=objective.state_dict(), config=data.as_plain(cfg), ledger=ledger))


# --- How fast a step is: python distill.py --bench ------------------------------------------------------------------

class OfficialLearner(Learner):
    """The authors' step, which --bench official compares with: the same losses, with their additional work.

    That is the second pass of unmasked images, 16-bit logits and four waits for the device. Left out are their moving
    average of all weights and the search for unused parameters, which would make it slower; it is never compiled.
    """
    def forward(self, x, t, noise):
        v_t_cls, v_t, _ = t
        which = qsd.masked_images(self.objective.config)
        mask = torch.zeros_like(noise, dtype=torch.bool)
        mask[which] = qsd.random_mask(noise[which], self.objective.config.mask_ratio)
        cls, v_s = self.student(x)
        _, v_s_mask = self.student(x, mask)                         # all images again, masked or not
        cls = self.attend(self.objective.cls, cls[:, None], v_t_cls[:, None])
        feat = self.attend(self.objective.feat, v_s, v_t)
        L_cls = F.mse_loss(cls, v_t_cls[:, None])
        L_feat = F.mse_loss(torch.cat([cls, feat], 1), torch.cat([v_t_cls[:, None], v_t], 1))
        L_mask = F.mse_loss(self.attend(self.objective.mask, v_s_mask, v_t), v_t)
        losses = {"L_feat": L_feat, "L_mask": L_mask, "L_cls": L_cls, "loss": L_feat + L_mask + L_cls}
        for value in losses.values():
            value.item()                                            # their log waits four times for the device
        return losses

    def attend(self, head, v_s, v_t):
        query = head.varphi(v_s)
        W = query @ v_t.mT.to(query.dtype)                          # (B, N, N), in autocast's precision
        W = W.softmax(-1, dtype=v_t.dtype).to(query.dtype)
        return (W @ head.phi(v_s)).to(v_t.dtype)


class Stopwatch:
    """Seconds by part; while a part runs within another one, only the inner one's time goes on."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.part = "input"
        self.since = time.perf_counter()

    def switch(self, part):
        """From here on the time is `part`'s. Returns whose it was."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        before = self.part
        self.seconds[before] = self.seconds.get(before, 0) + now - self.since
        self.part = part
        self.since = now
        return before

    def around(self, part, function):
        """The function, its time being the part's."""
        def timed(*args, **more):
            before = self.switch(part)
            result = function(*args, **more)
            self.switch(before)
            return result
        return timed


def matrix_rate(run):
    """FLOP/s of this device in a product of two large matrices in the run's precision, the best of five."""
    n = 8192 if run.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=run.device)
    watch = Stopwatch(run.device)
    best = math.inf
    for _ in range(6):                                              # the first one warms up
        watch.seconds.clear()
        with run.autocast:
            watch.around("product", torch.mm)(a, a)
        best = min(best, watch.seconds["product"])
    return 2 * n ** 3 / best


def kept(losses_of, learner, size, B):
    """Bytes that a forward pass of B images keeps for its backward pass, the weights among them."""
    nbytes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()                          # views of one storage count once
        nbytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(B, 3, size, size, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = losses_of(learner, images, torch.arange(B))        # while they live, so does what is kept
    del losses
    return sum(nbytes.values())


def bench(cfg, run, learner, teacher, losses_of, optimizer, flops, compiled):
    """Print images/s, FLOP/s, memory and where a step's time goes; --bench official: beside the authors' step."""
    if cfg.bench == "official" and not asdict(qsd.LossConfig(dcd_pool=cfg.dcd_pool)).items() <= asdict(cfg).items():
        raise qsd.UserError("--bench official is about the paper's objective: leave --loss and its constants alone")
    device = run.device
    precision = data.precision_on(cfg.precision, device)
    rate = matrix_rate(run)
    watch = Stopwatch(device)
    run.passes = 1

    def step(model, its_optimizer, B):
        """A training step on B random images. Returns its seconds."""
        images = torch.randint(0, 256, (B, 3, cfg.size, cfg.size), dtype=torch.uint8)
        run.optimizer = its_optimizer
        run.losses = {}
        run.backwards = 0
        watch.switch("input")
        began = watch.since
        losses = losses_of(model, images, torch.arange(B))
        watch.switch("backward")
        run.backward(losses)
        watch.switch("optimiser")
        run.update()
        watch.switch("idle")
        return watch.since - began

    B = cfg.micro if device.type == "cuda" else 2
    step(learner, optimizer, B)
    seconds = step(learner, optimizer, B)
    while 2 * B <= cfg.micro and seconds * B < 3:                   # as many images as one pass takes, or 3 seconds do
        B *= 2
    step(learner, optimizer, B)
    times = [step(learner, optimizer, B) for _ in range(5)]
    speed = B / statistics.median(times)
    print(f"{data.device_name(device)}, {precision}, {cfg.size} px, patch {cfg.patch}, {B} images a step: "
          f"{speed:.2f} images/s [{B / max(times):.2f}..{B / min(times):.2f}], {speed * flops / 1e12:.3g} TFLOP/s, "
          f"{speed * flops / rate:.0%} of the {rate / 1e12:.3g} of a matrix product, peak {data.peak_memory():.2f} GiB")

    if cfg.bench == "official":
        official = OfficialLearner(learner.student, learner.objective)
        groups = weight_decay_groups(learner, cfg.weight_decay)
        theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False)   # one parameter after the other
        step(official, theirs, B)
        ratios = []
        for _ in range(7):                                          # by turns, so that a busy machine harms both
            seconds = step(learner, optimizer, B)
            ratios.append(step(official, theirs, B) / seconds)
        print(f"the authors' step: {statistics.median(ratios):.2f} times as long "
              f"[{min(ratios):.2f}..{max(ratios):.2f}]")
    if compiled:                                                    # the parts are one then
        return

    weights = sum(p.nbytes for p in teacher.parameters()) + 4 * sum(p.nbytes for p in learner.parameters())
    activations = kept(losses_of, learner, cfg.size, 4) - kept(losses_of, learner, cfg.size, 2)
    print(f"memory: {weights / 2 ** 20:.1f} MiB for weights, gradients and AdamW; "
          f"{activations / 2 / 2 ** 20:.1f} MiB for each image of a pass")

    teacher.tokens = watch.around("teacher", teacher.tokens)
    learner.student.tokens = watch.around("student", learner.student.tokens)
    learner.objective.forward = watch.around("heads and losses", learner.objective.forward)
    watch.seconds.clear()
    for _ in range(3):
        step(learner, optimizer, B)
    del watch.seconds["idle"]
    for part, seconds in watch.seconds.items():
        print(f"{part:>16} {seconds / 3 * 1000:8.0f} ms {seconds / sum(watch.seconds.values()):5.0%}")


if __name__ == "__main__":
    data.cli(main)
