"""Train the pocket model from nothing, stage by stage, on a processor with two cores.

    python train.py data        --run RUN              # draw the portraits (10 minutes)
    python train.py vae         --run RUN --minutes 140 --batch 4 --lr 2e-3
    python train.py text        --run RUN --minutes 18 --lr 1.5e-3
    python train.py transformer --run RUN --minutes 150 --batch 16
    python train.py distill     --run RUN --minutes 25 --batch 8 --lr 4e-4
    python train.py schnell     --run RUN --minutes 25 --batch 8 --lr 4e-4   # optional: a twin of four steps
    python train.py export      --run RUN --output weights                   # --twin for the twin

Every training stage has a budget of minutes (of processor time of one of its processes), and its
learning rate falls to zero at the end of that budget. A stage that was stopped goes on from its last
checkpoint when started again. On two cores all of it takes half a day; a tenth of the
budgets makes a poor pocket that passes through every stage.
"""
import argparse
import sys

STAGES = {}


def stage(f):
    STAGES[f.__name__] = f
    return f


@stage
def data(o):
    import data as d
    import draw
    import train_flow
    d.make(f"{o.run}/plain", o.count, "plain", marks=False)
    d.make(f"{o.run}/marks", o.count // 8, "marks", marks=True)
    for shape in draw.SHAPES:
        count = train_flow.SQUARES if shape == "1:1" else train_flow.OTHERS
        d.make(train_flow.drawings(o.run, shape), count, f"flow-{shape}", marks=False, shape=shape)


@stage
def vae(o):
    import common, train_vae
    common.spawn(o, train_vae.train)


@stage
def text(o):
    import train_text
    train_text.train(o)


@stage
def transformer(o):
    import common, train_flow
    common.spawn(o, train_flow.train)


@stage
def distill(o):
    import common, train_flow
    common.spawn(o, train_flow.distill)


@stage
def schnell(o):
    import common, train_flow
    common.spawn(o, train_flow.schnell)


@stage
def export(o):
    import export as e
    e.export(o)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("stage", choices=STAGES, help="what to do; the order is the one above")
    ap.add_argument("--run", default="run", help="folder for data and checkpoints (several GB)")
    ap.add_argument("--output", default="weights", help="export: the diffusers folder to write")
    ap.add_argument("--count", type=int, default=16000, help="data: how many portraits to draw")
    ap.add_argument("--minutes", type=float, default=20, help="time budget of a training stage")
    ap.add_argument("--batch", type=int, default=32, help="pictures (or captions) per step and process")
    ap.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    ap.add_argument("--workers", type=int, default=2, help="vae, transformer, distill: processes")
    ap.add_argument("--threads", type=int, default=1, help="processor threads of each process")
    ap.add_argument("--seed", type=int, default=0, help="seed of weights, noise and captions")
    ap.add_argument("--guidance", type=float, default=3.0, help="schnell: guidance of the teacher; export: of the sample")
    ap.add_argument("--twin", action="store_true", help="export: the twin of four steps")
    o = ap.parse_args()
    import torch
    torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    sys.stdout.reconfigure(line_buffering=True)
    STAGES[o.stage](o)


if __name__ == "__main__":
    main()
