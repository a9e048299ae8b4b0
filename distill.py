"""Stage 1 of GKD: distil a teacher's features into a student, first on a proxy set, then on source images; no labels.

    python distill.py --data imagenet --root /data --out runs/proxy
    python distill.py --data gtav --root /data --student runs/proxy/student.pt --out runs/source
    python distill.py --data toy-proxy --out runs/mine   # on a CPU, nothing to download

With N GPUs write `torchrun --standalone --nproc_per_node=N` for `python`. Proxy stage and source stage are this same
script, --stage picks the preset. The same command resumes.

First come the constants and the step, then what segment.py shares. "Official" is what the authors' released code does.
"""
import argparse
import dataclasses
import datetime
import inspect
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import qsd
from qsd import UserError, say


@dataclasses.dataclass
class Config(qsd.LossConfig):
    """Every constant of stage 1, official unless said, without their unused EMA; the objective's: LossConfig."""
    # who learns what from whom
    data: str = "toy"               # a name of data.DATASETS, or several joined with +
    root: str = "data"              # the folder that holds the data sets
    stage: Literal["auto", "proxy", "source"] = "auto"  # which preset; auto: proxy for imagenet and toy-proxy
    teacher: str = "dinov2_vitb14"  # a name of qsd.ENCODERS or a checkpoint
    student: str = "deit_small_distilled"  # likewise, official; in the source stage the proxy stage's student.pt
    pretrained: bool = True         # no: the student starts from random weights
    student_depth: int | None = None  # only the student's first k blocks
    out: str = "runs/distill"       # log.jsonl, last.pt, student.pt
    # images
    size: int = 512                 # side of the square crop, pixels (proxy 224)
    patch: int = 16                 # patch side of both ViTs, pixels (proxy 14); checkpoints are resized to it
    hub_offset: float = 0.0         # added to a DINOv2 teacher's grid (interpolate_offset; official: proxy 0.1, else 0)
    randaugment: bool = True        # official, in both stages
    erase: float = 0.25             # probability of RandomErasing
    repeats: int = 3                # how often an image comes in a row; 3: an epoch shows a third of the images
    workers: int = 8                # image-loading processes per training process; 0: load in the training process
    # optimiser
    batch: int = 128                # global, whatever the number of processes (proxy 512)
    micro: int = 64                 # most images of a process at once; gradients of more are accumulated
    budget: str = "300ep"           # 600 (steps), 300ep, 2h, 3e18flop; the schedule follows the fraction spent
    lr: float = 5e-4                # peak, before lr_rule
    lr_rule: Literal["batch/512", "constant"] = "batch/512"  # official: lr x batch / 512; the paper's text: constant
    lr_min: float = 1e-5            # the cosine's end
    warmup: float = 0.0             # fraction of the budget; official 0, Proteus 5 of 100 epochs
    weight_decay: float = 0.05      # of matrices, pos_embed and tokens (official), not of 1-d parameters
    # running
    seed: int = 0                   # decides order, augmentation, masks and fresh weights
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU; losses are fp32
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA
    log_every: int = 10             # steps
    save_minutes: float = 10.0      # between checkpoints
    bench: Literal["no", "yes", "official"] = "no"  # only time a step, on random weights; official: the authors', too


TOY = dict(teacher="toy_teacher", student="toy_student", size=64, patch=8, batch=16, budget="1000",
           repeats=1, workers=1, lr=2e-3, lr_rule="constant", dcd_pool=1, log_every=20)
PRESETS = {
    "proxy": dict(size=224, patch=14, hub_offset=0.1, batch=512, budget="100ep"),
    "source": {},                   # the defaults above
    "toy proxy": TOY,
    "toy source": TOY | dict(lr=1e-3),
}


def preset(given):
    """The row of PRESETS for --stage and the first name of --data; a flag beats the preset, which beats the default."""
    name = given.get("data", Config.data).split("+")[0]
    stage = given.get("stage", Config.stage)
    if stage == "auto":
        stage = "proxy" if name in ("imagenet", "toy-proxy") else "source"
    return PRESETS[f"toy {stage}" if name.startswith("toy") else stage]


class Learner(nn.Module):
    """Student and objective as one module, so that one DDP wrapper sees every trained parameter."""
    def __init__(self, student, objective):
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, x, t, noise):
        """The losses, see qsd.Objective. s is the student's plain pass; an objective may run it again, masked."""
        s = self.student.tokens(x, layers=self.objective.layers_s) if self.objective.reads_s else None
        return self.objective(self.student, x, s, t, noise)


def weight_decay_groups(module, weight_decay):
    """AdamW's two groups: 1-d parameters (norms, biases, LayerScale) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    return [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]


def learning_rate(cfg, fraction):
    """Linear warm-up, then a cosine from the peak down to lr_min, over the fraction of the budget that is spent."""
    peak = cfg.lr * (cfg.batch / 512) if cfg.lr_rule == "batch/512" else cfg.lr
    if fraction < cfg.warmup:
        return peak * fraction / cfg.warmup
    after_warmup = (fraction - cfg.warmup) / (1 - cfg.warmup)
    rate = cfg.lr_min + (peak - cfg.lr_min) * 0.5 * (1 + math.cos(math.pi * after_warmup))
    return min(rate, peak)                                          # the peak of a tiny batch lies below lr_min


def main(argv=None):
    cfg = configure(Config, preset, argv)
    only_timed = cfg.bench != "no"
    if only_timed:
        cfg = dataclasses.replace(cfg, pretrained=False, out=os.devnull)    # nothing is found there or written
    run = Run(cfg, "student.pt")                                    # joins the processes, looks at --out
    if run.finished:
        return

    # the images, the two encoders, the objective between them
    torch.manual_seed(cfg.seed)
    transform = partial(data.distill_transform, size=cfg.size, randaugment=cfg.randaugment)
    dataset = None if only_timed else data.images(cfg.data, cfg.root, transform)
    load_vit = partial(qsd.load_vit, img_size=cfg.size, patch_size=cfg.patch)
    teacher = load_vit(cfg.teacher, pretrained=not only_timed, offset=cfg.hub_offset).to(run.device)
    teacher.eval().requires_grad_(False)
    student = load_vit(cfg.student, depth=cfg.student_depth, pretrained=cfg.pretrained).to(run.device)
    objective = qsd.build_objective(student, teacher, cfg).to(run.device)   # official: fresh heads in each stage
    ancestors = qsd.ledger_of(cfg.student)                          # what the stages before have cost
    learner = Learner(student, objective)
    N = (cfg.size // cfg.patch) ** 2

    def losses_of(model, images, draws):
        """The losses on uint8 images (B, 3, H, W) and their draws (B).

        A draw is an image's running number, 0, 1, 2, .. in a run. With the seed it decides which image this is and all
        that is random about it, on any number of processes. QSD masks even draws, or all.
        """
        x = data.normalize(images.to(run.device, non_blocking=True), student.mean, student.std)
        x = data.erase(x, draws, cfg.seed, cfg.erase)               # teacher and student see the same pixels
        noise = data.uniform_noise(draws, N, cfg.seed).to(run.device)   # (B, N), decides which patches to hide
        with run.autocast:
            with torch.no_grad():
                t = teacher.tokens(data.renormalize(x, student, teacher), layers=objective.layers_t)
                t = qsd.normalize_targets(t, cfg.target_norm)       # cls (B, C_t), patches (B, N, C_t), outs
            return model(x, t, noise)

    # two black images through one step: its cost per image; parameters that no loss reaches are frozen
    flops = dry_run(learner, partial(losses_of, learner, *two_images(cfg.size)))
    if cfg.compile == "yes" or (cfg.compile == "auto" and run.device.type == "cuda"):
        if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            raise UserError("--compile needs a C compiler: install gcc, or say --compile no")
        learner.compile(fullgraph=True)                             # one graph each, or an error: no silent slow path
        teacher.tokens = torch.compile(teacher.tokens, fullgraph=True)
    optimizer = torch.optim.AdamW(weight_decay_groups(learner, cfg.weight_decay), betas=(0.9, 0.999), fused=True)
    if only_timed:
        bench(cfg, run, learner, teacher, losses_of, optimizer, flops)
        return
    run.start(learner, optimizer, dataset, flops, tokens=N, repeats=cfg.repeats)

    with run:                                                       # signals now wait for the end of a step
        for micro_batches in run.steps():                           # until --budget is spent
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, run.fraction)
            for images, draws in micro_batches:                     # gradient accumulation; uint8 (B, 3, H, W), (B)
                with run.sync():                                    # processes average gradients in the last one only
                    losses = losses_of(run.model, images, draws)    # Eq. 4 on the proxy set, Eq. 5 on source images
                    run.scaler.scale(losses["loss"] / len(micro_batches)).backward()
                run.note(losses)
            if run.finite():                                        # else the step is skipped and counted
                run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad()
            run.after()                                             # ledger, log, checkpoint, signals

        ledger = ancestors + [dict(script="distill", data=cfg.data, **run.ledger)]
        checkpoint = qsd.student_checkpoint(student)                # timm's keys; the heads serve figure 7b
        run.finish(checkpoint | dict(objective=objective.state_dict(), config=dataclasses.asdict(cfg), ledger=ledger))


# --- Run: all of a training script that is not the method -----------------------------------------------------------

FREE = {"out", "root", "workers", "micro", "log_every", "save_minutes"}     # constants that may change on resuming
MAX_SKIPS = 10              # non-finite steps in a row that end a run


class Run:
    """A training run: its processes and device, its folder --out, its ledger and log, its checkpoints, its budget.

    --out holds log.jsonl (a header with the Config, then a line every log_every steps), last.pt while the run goes on
    and the result when it has ended. main above shows in which order its methods are called.
    """

    def __init__(self, cfg, result):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.log = self.out / "log.jsonl"
        self.last = self.out / "last.pt"
        self.result = self.out / result
        self.device = launch()
        self.autocast = autocast(cfg.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        parse_budget(cfg.budget, steps_per_epoch=1)                 # a mistake in it is told before the work
        check_folder(cfg)
        self.finished = from_the_first(self.result.exists())
        if self.finished:
            say(f"{self.result} is finished; nothing to do")
            self.tidy()
        else:
            changes = changes_of(cfg, dataclasses.asdict(type(cfg)()))
            say(f"{self.out}: " + (", ".join(changes.values()) or "all constants have their defaults"))

    def start(self, learner, optimizer, dataset, flops, tokens, repeats=1, pairs=True):
        """Continue where last.pt ends, or begin; flops and tokens are those of one image.

        pairs: micro-batches of even sizes, so that each begins with an even draw, as qsd.masked_images wants.
        """
        cfg = self.cfg
        self.learner = learner
        self.optimizer = optimizer
        self.parts = dict(learner=learner, optimizer=optimizer, scaler=self.scaler)     # whose states last.pt holds
        self.per_step = dict(steps=1, images=cfg.batch, tokens=cfg.batch * tokens, flops=cfg.batch * flops)
        self.ledger = dict(steps=0, images=0, tokens=0, flops=0.0, seconds=0.0, skipped=0, waited=0.0)
        self.passes = passes_of(cfg.batch, cfg.micro, world_size(), pairs)      # micro-batches of a step
        self.unit, self.budget = parse_budget(cfg.budget, len(dataset) / cfg.batch)
        self.skips = 0                                              # non-finite steps in a row
        self.resume_or_begin(flops)
        self.model = DistributedDataParallel(learner) if dist.is_initialized() else learner
        self.loader = data.loader(dataset, cfg.batch, cfg.workers, seed=cfg.seed, start_step=self.ledger["steps"],
                                  rank=rank(), world=world_size(), passes=self.passes, repeats=repeats)

    def resume_or_begin(self, flops):
        """Bring all parts to the state of last.pt and the log back to its step; or write the header of a new log."""
        first = rank() == 0
        saved = from_the_first(qsd.open_checkpoint(self.last) if first and self.last.exists() else None)
        if saved:                           # process 0's copy, as nodes may have disks of their own
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.ledger = saved["ledger"]
        if saved and first:
            os.truncate(self.log, saved["log_bytes"])
        elif first:
            header = dict(config=dataclasses.asdict(self.cfg), command=" ".join(sys.argv), torch=torch.__version__,
                          torchvision=torchvision.__version__, python=sys.version.split()[0],
                          device=device_name(self.device), world=world_size(), gflop_per_image=flops / 1e9)
            save(self.log, json.dumps(header) + "\n")

    def __enter__(self):
        """Catch the signals that ask a process to end, start the bar and the loading processes."""
        self.caught = []                                            # signals that have come
        self.handlers = {}                                          # what they did before
        if threading.current_thread() is threading.main_thread():   # no other thread may have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, lambda received, frame: self.caught.append(received))
        self.saved_at = time.monotonic()
        self.bar = tqdm(initial=self.ledger["steps"], desc=str(self.out), disable=rank() > 0, unit="step",
                        dynamic_ncols=True)
        self.batches = iter(self.loader)
        return self

    def __exit__(self, *error):
        """Leave signals, terminal and processes as they were, however the run ends."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        del self.batches                                            # ends the loading processes

    def steps(self):
        """For each step the list of its micro-batches, until the budget is spent."""
        while self.fraction < 1:
            self.began = time.monotonic()
            self.losses = {}
            self.left = self.passes                                 # micro-batches still to come
            micro_batches = [next(self.batches) for _ in range(self.passes)]
            self.waited = time.monotonic() - self.began
            yield micro_batches

    @property
    def fraction(self):
        """The share of the budget that is spent."""
        return self.ledger[self.unit] / self.budget

    def sync(self):
        """Context of a micro-batch: processes average their gradients in the backward pass of the last one only."""
        self.left -= 1
        return self.model.no_sync() if self.left and dist.is_initialized() else nullcontext()

    def note(self, losses):
        """Add a micro-batch's losses to those of the step, which are logged."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach() / self.passes

    def finite(self):
        """Unscales the gradients, tells whether all are finite; UserError after MAX_SKIPS steps in a row if not."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        finite = torch.nn.utils.get_total_norm(gradients).isfinite().item()
        self.skips = 0 if finite else self.skips + 1
        self.ledger["skipped"] += not finite
        if self.skips == MAX_SKIPS:
            raise UserError(f"--out {self.out}: {self.skips} steps in a row had gradients that are not finite; begin "
                            "again in a new --out with a lower --lr or --precision fp32")
        return finite

    def after(self):
        """What a step leaves behind: ledger, log, now and then last.pt; after a signal the process ends here."""
        seconds = time.monotonic() - self.began
        stop, seconds = largest(max(self.caught, default=0), seconds)   # all processes stop together
        for name, amount in dict(self.per_step, seconds=seconds, waited=self.waited).items():
            self.ledger[name] += amount
        self.bar.total = max(round(self.ledger["steps"] / self.fraction), self.ledger["steps"])
        self.bar.update()
        if self.ledger["steps"] % max(1, self.cfg.log_every) == 0 or self.fraction >= 1:
            self.report()
        if stop or time.monotonic() - self.saved_at > 60 * self.cfg.save_minutes:
            self.save()
        if stop:
            largest(0)                      # a barrier: torchrun ends all after an exit, process 0 must have saved
            if rank() == 0:
                told = f"stopped by signal {stop:.0f} after step {self.ledger['steps']}"
                self.bar.write(f"{told}; the same command goes on", file=sys.stderr)
            sys.exit(128 + int(stop))

    def report(self):
        """Write a line of the log: the step's losses, means over all processes, and what the run has cost so far."""
        spent = self.ledger
        means = summed(torch.stack([value.double() for value in self.losses.values()])) / world_size()
        record = dict(step=spent["steps"])
        for name, mean in zip(self.losses, means.tolist()):
            record[name] = round(mean, 6) if math.isfinite(mean) else None      # JSON has no NaN
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        record["images_per_s"] = round(spent["images"] / spent["seconds"], 1)
        record["data_wait"] = round(spent["waited"] / spent["seconds"], 3)      # share of the time
        record["skipped"] = spent["skipped"]
        record["flops"] = spent["flops"]
        record["seconds"] = round(spent["seconds"], 2)
        if self.device.type == "cuda":
            record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
        self.bar.set_postfix(loss=record["loss"], data_wait=record["data_wait"])
        if rank() == 0:
            with open(self.log, "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self):
        """Write last.pt, from which the same command goes on."""
        self.check_weights()
        self.saved_at = time.monotonic()
        if rank() == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            save(self.last, states | dict(ledger=self.ledger, log_bytes=self.log.stat().st_size))

    def finish(self, checkpoint):
        """Write the run's result and delete what resuming needed."""
        self.check_weights()
        if rank() == 0:
            save(self.result, checkpoint)
        self.tidy()

    def check_weights(self):
        """UserError if a step has left a weight infinite or NaN: it is neither saved nor a result."""
        if not all(parameter.isfinite().all() for parameter in self.learner.parameters()):
            raise UserError(f"--out {self.out}: step {self.ledger['steps']} left weights that are not finite, which "
                            "are not saved; begin again in a new --out with a lower --lr or --precision fp32")

    def tidy(self):
        """Delete what resuming needed, and what a kill has left half-written."""
        if rank() == 0:
            for path in [self.last, *self.out.glob("part.*")]:
                path.unlink(missing_ok=True)


def check_folder(cfg):
    """UserError if --out holds other things or another run; FREE constants may differ, newer ones count as defaults."""
    out = Path(cfg.out)
    log = out / "log.jsonl"
    if not log.exists():
        others = [path for path in out.glob("*") if not path.name.startswith("part.")]
        if others or out.is_file():
            raise UserError(f"--out {out} holds something else than a run; choose another --out")
        return
    with open(log) as file:
        stored = json.loads(file.readline())["config"]
    changes = changes_of(cfg, dataclasses.asdict(type(cfg)()) | stored)
    differing = ", ".join(text for name, text in changes.items() if name not in FREE)
    if differing:
        raise UserError(f"--out {out} holds a run with other constants ({differing}); choose another --out")


def changes_of(cfg, before):
    """{constant: "constant old -> new"} of those that differ between a dict of values and a Config."""
    return {name: f"{name} {before[name]} -> {value}" for name, value in vars(cfg).items() if value != before[name]}


def save(path, content):
    """Write a checkpoint, or text, beside its place, then rename it: no kill leaves half of it under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part.{path.name}")
    if isinstance(content, str):
        part.write_text(content)
    else:
        torch.save(content, part)
    os.replace(part, path)


# --- Flags: every field of a Config is one --------------------------------------------------------------------------

def configure(Config, preset, argv=None):
    """A Config from its defaults, then preset(flags that were given), then the flags; comments are their help."""
    comments = comments_of(Config)
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        parts = get_args(field.type)                         # the words of a Literal; of int | None both types
        takes = {}
        if get_origin(field.type) is Literal:
            takes = dict(choices=parts)
        elif field.type is bool:
            takes = dict(type=yes_or_no, nargs="?", const=True, metavar="yes|no")   # a flag alone means yes
        elif field.type is not str:
            takes = dict(type=partial(number, kind=parts[0] if parts else field.type))
        text = f"{comments.get(field.name, '')} (default {field.default})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **takes)
    given = vars(parser.parse_args(argv))
    return Config(**(preset(given) | given))


@cache  # eval.py's tables configure hundreds of runs
def comments_of(Config):
    """{field: the comment beside it} of a Config and what it inherits from."""
    source = "".join(inspect.getsource(cls) for cls in reversed(Config.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.M))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def yes_or_no(text):
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"yes or no was expected, not {text}")
    return text == "yes"


def number(text, kind):
    """A flag's text as int or float; NaN, infinite and negative numbers are mistakes."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number ({kind.__name__}) of 0 or more was expected, not {text}")
    return value


def cli(main):
    """Run a script's main: a user's mistake is one line on stderr and exit status 2, a bug is a traceback."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                                       # before the first step or after the last
        sys.exit(128 + signal.SIGINT)
    if dist.is_initialized():
        dist.destroy_process_group()


# --- Processes: one, or as many as torchrun starts ------------------------------------------------------------------

def launch():
    """Join the processes that torchrun started; a lone process needs no group, and no network. Returns the device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # fp32 products are TF32, precise enough for QSD's logits
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        patience = datetime.timedelta(hours=1)                      # while a process downloads or lists a slow disk
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device


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
        return [float(value) for value in values]                   # without making a GPU wait
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def from_the_first(value):
    """The first process's value, in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def autocast(precision, device):
    """The context of --precision on this device: auto is bf16 on CUDA and fp32 on a CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


# --- What a step costs, and how many there are ----------------------------------------------------------------------

def count_flops(work):
    """Floating-point operations (2 per multiply-add) of calling work(), backward passes included.

    Convolutions, matrix products and attention count; sampling, resizing, norms and element-wise work do not.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:   # the CPU's fused one is not counted
        work()
    return counter.get_total_flops()


def two_images(size):
    """One image to be masked and one not, black: images (2, 3, size, size) and their draws (2,)."""
    return torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.arange(2)


def dry_run(learner, losses_of_two_images):
    """FLOPs per image of a training step; freezes parameters without a gradient, for which DDP would wait."""
    flops = count_flops(lambda: losses_of_two_images()["loss"].backward())
    for parameter in learner.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    learner.zero_grad()
    return flops / 2


def parse_budget(text, steps_per_epoch):
    """A budget as (unit, amount): "600" and "300ep" in steps, "2h" and "30m" in seconds, "3e18flop" in flops."""
    units = {"": ("steps", 1), "ep": ("steps", steps_per_epoch), "flop": ("flops", 1),
             "h": ("seconds", 3600), "m": ("seconds", 60), "s": ("seconds", 1)}
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)(ep|h|m|s|flop|)", text)
    if not match or not 0 < float(match[1]) < math.inf:
        raise UserError(f"--budget {text} is not one of 600 (steps), 300ep, 2h, 30m, 45s, 3e18flop")
    unit, worth = units[match[2]]
    amount = float(match[1]) * worth
    return unit, max(1, round(amount)) if unit == "steps" else amount


def passes_of(batch, micro, world, pairs=True):
    """Micro-batches of a step on each process, of at most `micro` images; pairs: of an even number, 2 at least."""
    least = 2 if pairs else 1
    if batch < 1 or batch % (least * world):
        raise UserError(f"--batch {batch} does not divide into {'pairs of ' if pairs else ''}images over {world} "
                        f"processes; use a multiple of {least * world}")
    own = batch // world
    for count in range(1, own + 1):
        if own % (least * count) == 0 and (own // count <= micro or own // count == least):
            return count


# --- How fast a step is: python distill.py --bench yes --------------------------------------------------------------

class OfficialLearner(Learner):
    """The authors' step, without their EMA of weights and DDP's find_unused_parameters; our pass of the teacher."""
    def forward(self, x, t, noise):
        v_t_cls, v_t, _ = t
        which = qsd.masked_images(self.objective.config)
        mask = torch.zeros_like(noise, dtype=torch.bool)
        mask[which] = qsd.random_mask(noise[which], self.objective.config.mask_ratio)
        cls, v_s = self.student(x)
        _, v_s_mask = self.student(x, mask)             # all images again, masked or not
        cls = self.attend(self.objective.cls, cls[:, None], v_t_cls[:, None])
        feat = self.attend(self.objective.feat, v_s, v_t)
        L_cls = F.mse_loss(cls, v_t_cls[:, None])
        L_feat = F.mse_loss(torch.cat([cls, feat], 1), torch.cat([v_t_cls[:, None], v_t], 1))
        L_mask = F.mse_loss(self.attend(self.objective.mask, v_s_mask, v_t), v_t)
        losses = {"L_feat": L_feat, "L_mask": L_mask, "L_cls": L_cls, "loss": L_feat + L_mask + L_cls}
        for value in losses.values():
            value.item()                                # their log waits four times for the device
        return losses

    def attend(self, head, v_s, v_t):
        query = head.varphi(v_s)
        W = query @ v_t.mT.to(query.dtype)              # (B, N, N), in autocast's precision
        W = W.softmax(-1, dtype=v_t.dtype).to(query.dtype)
        return (W @ head.phi(v_s)).to(v_t.dtype)


def bench(cfg, run, learner, teacher, losses_of, optimizer, flops):
    """Print images/s, FLOP/s and what a step's time is spent on; --bench official: beside the authors' step."""
    usual = qsd.LossConfig(dcd_pool=cfg.dcd_pool)       # QSD ignores it, toy presets set it
    if cfg.bench == "official" and any(getattr(cfg, name) != value for name, value in vars(usual).items()):
        raise UserError("--bench official is about the paper's objective: leave --loss and its constants alone")
    on_cuda = run.device.type == "cuda"
    B = cfg.micro if on_cuda else min(cfg.micro, 8)
    images = torch.randint(0, 256, (B, 3, cfg.size, cfg.size), dtype=torch.uint8)
    draws = torch.arange(B)

    def seconds(work, *args):
        """How long work(*args) takes, on CUDA with all that it starts there."""
        began = time.perf_counter()
        work(*args)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def step(model, its_optimizer):
        losses_of(model, images, draws)["loss"].backward()
        its_optimizer.step()
        its_optimizer.zero_grad()

    seconds(step, learner, optimizer)                   # warms up, compiles
    times = [seconds(step, learner, optimizer) for _ in range(5)]
    whole = statistics.median(times)
    print(f"{device_name(run.device)}, --precision {cfg.precision}, {cfg.size} px, patch {cfg.patch}, "
          f"{B} images a step: {B / whole:.2f} images/s [{B / max(times):.2f}..{B / min(times):.2f}], "
          f"{B / whole * flops / 1e12:.3g} TFLOP/s")

    x = data.normalize(images.to(run.device), learner.student.mean, learner.student.std)
    with run.autocast, torch.no_grad():
        of_teacher = statistics.median(seconds(teacher.tokens, x) for _ in range(3)) / whole
    forward = statistics.median(seconds(losses_of, learner, images, draws) for _ in range(3)) / whole
    print(f"of a step: teacher {of_teacher:.0%}, rest of the forward pass {forward - of_teacher:.0%}, "
          f"backward pass and optimiser {1 - forward:.0%}")
    if cfg.bench == "yes":
        return

    official = OfficialLearner(learner.student, learner.objective)      # never compiled
    groups = weight_decay_groups(learner, cfg.weight_decay)
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    seconds(step, official, theirs)
    ratios = []
    for _ in range(7):                                  # by turns, so that a busy machine harms both
        ours = seconds(step, learner, optimizer)
        ratios.append(seconds(step, official, theirs) / ours)
    print(f"the authors' step: {statistics.median(ratios):.2f} times as long [{min(ratios):.2f}..{max(ratios):.2f}]")


if __name__ == "__main__":
    cli(main)
