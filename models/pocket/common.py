"""What the training stages share: budget, checkpoints, averaged weights."""
import copy
import math
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist


def spawn(o, function):
    """Run `function(o)` in `o.workers` processes of one thread each. On few, busy cores this is
    faster than threads, which wait for each other after every operation."""
    if o.workers == 1:
        return function(o)
    import torch.multiprocessing as mp
    store = tempfile.mktemp(prefix="pocket-store-")
    mp.spawn(_worker, (o, function, store), nprocs=o.workers)


def _worker(rank, o, function, store):
    os.setsid()                         # a session each, so that the scheduler shares fairly
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(o.threads)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=o.workers)
    torch.manual_seed(o.seed)           # the same weights everywhere; noise is seeded later
    if rank:
        sys.stdout = open(os.devnull, "w")
    function(o)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(parameters):
    """One all-reduce of all gradients."""
    if dist.is_initialized():
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


class Budget:
    """Progress from 0 to 1 over a number of minutes of this process's work, kept across restarts.

    Time in which the process was paused or waited for a processor is not counted.
    """

    def __init__(self, minutes):
        self.seconds, self.spent, self.last = minutes * 60, 0.0, time.process_time()

    def progress(self):
        now = time.process_time()
        self.spent += now - self.last
        self.last = now
        value = torch.tensor([self.spent / self.seconds], dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(value, 0)
        return value.item()


def rate(progress, step, peak, warmup=100, floor=0.02):
    """Linear warm-up, then a cosine down to `floor` of the peak at the end of the budget."""
    cos = 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress))
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cos)


class Average:
    """An exponential moving average of a module's weights."""

    def __init__(self, module, decay):
        self.module, self.decay, self.n = copy.deepcopy(module).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module):
        self.n += 1
        d = min(self.decay, (1 + self.n) / (10 + self.n))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - d)


def save(path, **things):
    if rank():
        return
    torch.save(things, f"{path}.new")
    os.replace(f"{path}.new", path)


def load(path):
    return torch.load(path, map_location="cpu", weights_only=False) if os.path.exists(path) else None


def resume(path, model, opt, avg, budget):
    """Puts back what a stage saved last, if it did. Returns the steps it had made."""
    if not (old := load(path)):
        return 0
    model.load_state_dict(old["model"]), opt.load_state_dict(old["opt"])
    avg.module.load_state_dict(old["avg"])
    avg.n, budget.spent = old["step"], old["spent"]
    return old["step"]
