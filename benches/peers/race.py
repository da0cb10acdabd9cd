"""Races darkroom against diffusers on one card, in one run, with the same weights. README.md says how to run it and what it means.

    python race.py --folder DIR [--size dev] [--darkroom BINARY] [--peers eager,compile] [--runs step,picture] [--json FILE]
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import libraries
import report
from child import Absent, Child
from clocks import Clocks, card_name
from rounds import REQUESTS, lora, race, simple

HERE = Path(__file__).resolve().parent

# Model folder and runs that a peer makes with one loaded model. A new process for each: hotswap compiles for one kind of LoRA.
GROUPS = [
    ("dev", ["step", "picture", "decode", "encode"]),
    ("schnell", ["schnell"]),
    ("dev", ["lora-all"]),
    ("dev", ["lora-attention"]),
]
LORA = ["lora-all", "lora-attention"]
PEERS = {
    "eager": ["step", "picture", "decode", "encode", "schnell"],
    "compile": ["step", "picture", "decode", "encode", "schnell"],
    "fuse": LORA,
    "hotswap": LORA,
    "fp8": ["step", "picture"],
    "gguf": ["step", "picture"],
    "gguf_compile": ["step", "picture"],
    "offload": ["picture"],
    "group_offload": ["step", "picture"],
}
# darkroom itself with other arguments (`--against`): what a memory plan or a precision costs.
ITSELF = ["step", "picture", "decode", "encode", "schnell"]
# What darkroom's side is told besides, so that a race in fewer bits is one of both sides.
OURS = {"fp8": ["--keep", "fp8-products"]}
RUNS = list(REQUESTS) + LORA
PIXELS = {"dev": 1024, "tiny": 64}
SCALE = 0.9


def options():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def listed(allowed):
        def names(text):
            wrong = [name for name in text.split(",") if name not in allowed]
            return parser.error(f"{wrong[0]} is none of {', '.join(allowed)}") if wrong else text.split(",")

        return names

    parser.add_argument("--folder", type=Path, required=True, help="where the weights are, or are put (34 GB for dev)")
    parser.add_argument("--size", choices=PIXELS, default="dev")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--darkroom", help="the binary of the bench gpu; without it the peers run alone")
    parser.add_argument("--darkroom-arguments", type=shlex.split, default=[], help="more arguments for it")
    parser.add_argument("--against", metavar="ARGUMENTS", help="race darkroom with --darkroom-arguments against itself with these, and no other peer unless --peers names one")
    parser.add_argument("--peers", type=listed(list(PEERS)), default=None, help=f"some of {', '.join(PEERS)}; all unless --against is given")
    parser.add_argument("--runs", type=listed(RUNS), default=RUNS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=28, help="of a picture with dev")
    parser.add_argument("--warm-ups", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="that has torch and diffusers")
    parser.add_argument("--peer-arguments", type=shlex.split, default=[], help='more arguments for diffusers_peer.py, such as "--mode default"')
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one answer, compilation included")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="folder for what the sides write to stderr")
    o = parser.parse_args()
    if min(o.rounds, o.warm_ups) < 1:
        parser.error("--rounds and --warm-ups are 1 or more")
    if o.against is not None and not o.darkroom:
        parser.error("--against needs --darkroom")
    o.peers = o.peers or ([] if o.against is not None else list(PEERS))
    if o.logs:
        o.logs.mkdir(parents=True, exist_ok=True)
    if o.json:
        o.json.parent.mkdir(parents=True, exist_ok=True)
    return o


def make_weights(o):
    """Without torch if there is nothing to make."""
    gguf, made = any(peer.startswith("gguf") for peer in o.peers), o.folder / "made.json"
    if made.is_file() and (not gguf or (o.folder / "gguf" / "model_index.json").is_symlink()):
        size = json.loads(made.read_text())["size"]
        if size != o.size:
            raise SystemExit(f"{o.folder} holds the weights of --size {size}")
        return
    make = [o.python, str(HERE / "weights.py"), "--folder", str(o.folder), "--size", o.size]
    subprocess.run(make + ["--gguf"] * gguf, check=True)


def start_darkroom(o, folder, arguments, name="darkroom"):
    if o.darkroom is None:
        return None
    device, dtype = ("cpu", "f32") if o.device == "cpu" else ("0", "bf16")
    command = [o.darkroom, "--serve", "--model", str(folder), "--device", device, "--dtype", dtype, *arguments]
    return Child(name, command, o.timeout, {**os.environ, "LD_LIBRARY_PATH": libraries.path()}, o.logs)


def start_peer(o, peer, folder, runs):
    if peer == itself(o):
        return start_darkroom(o, folder, shlex.split(o.against), "itself")
    asked = ["step" if run in LORA else "picture" if run == "schnell" else run for run in runs]
    command = [o.python, str(HERE / "diffusers_peer.py"), "--config", peer, "--folder", str(folder), "--device", o.device,
               "--pixels", str(PIXELS[o.size]), "--runs", ",".join(asked)]
    if runs[0] in LORA:
        command += ["--lora", str(files(o, runs[0])[0])]
    return Child(peer, command + o.peer_arguments, o.timeout, logs=o.logs)


def itself(o):
    """The name of darkroom with other arguments, which tells races of several kinds apart."""
    return None if o.against is None else f"darkroom {o.against}".strip()


def files(o, run):
    return [o.folder / "loras" / f"{run.removeprefix('lora-')}-{copy}.safetensors" for copy in ("one", "two")]


def turn_of(o, run):
    pixels = PIXELS[o.size]
    if run in LORA:
        return lora(files(o, run), SCALE, pixels)
    request = REQUESTS[run] | {"pixels": pixels}
    return simple(request | {"steps": o.steps} if run == "picture" else request)


def about(child):
    """What a side says of itself once it is loaded."""
    if child is None:
        return None
    try:
        return child.ask(run="about")["about"]
    except Absent as reason:
        return {"absent": str(reason)}


def warn_of_difference(one, other):
    lengths = {side.get("text_tokens") for side in (one, other) if side and "absent" not in side}
    return f"the sides read {sorted(lengths)} text tokens: this is no race" if len(lengths) > 1 else None


def pair(o, clocks, darkroom, peer, folder, runs, told):
    """All runs that one peer makes with one loaded model, against darkroom."""
    # darkroom is loaded before: how much memory is free then decides where it keeps what LoRAs change.
    sides = {"A": about(darkroom)}
    child = start_peer(o, peer, folder, runs)
    try:
        sides["B"] = about(child)
        for run in runs:
            results = race({"A": darkroom, "B": child}, turn_of(o, run), o.rounds, o.warm_ups, clocks)
            # Asked again: how much memory it took by now.
            sides["B"] = about(child)
            told({"peer": peer, "run": run, "model": folder.name, "sides": results, "about": dict(sides),
                  "warning": warn_of_difference(*sides.values())})
    finally:
        child.stop()


def run_all(o, clocks, told):
    raced = False
    for folder, runs in GROUPS:
        runs = [run for run in runs if run in o.runs]
        chosen = [(peer, [run for run in runs if run in PEERS[peer]]) for peer in o.peers]
        if itself(o) is not None:
            chosen.append((itself(o), [run for run in runs if run in ITSELF]))
        # darkroom stays for all peers that it meets with the same model and arguments.
        ways = {}
        for peer, runs_of_peer in chosen:
            if runs_of_peer:
                way = "gguf" if peer.startswith("gguf") else folder, (*OURS.get(peer, ()), *o.darkroom_arguments)
                ways.setdefault(way, []).append((peer, runs_of_peer))
        for (model, arguments), racing in ways.items():
            darkroom = start_darkroom(o, o.folder / model, arguments)
            try:
                # Hours of peers alone are not what was asked for.
                if not raced and darkroom and "absent" in (said := about(darkroom)):
                    raise SystemExit(f"darkroom does not run here: {said['absent']}")
                raced = True
                for peer, runs_of_peer in racing:
                    pair(o, clocks, darkroom, peer, o.folder / model, runs_of_peer, told)
                    if darkroom and darkroom.gone:
                        darkroom = start_darkroom(o, o.folder / model, arguments)
            finally:
                if darkroom:
                    darkroom.stop()


def kept(o):
    """Races of before, on a card and of a size that are the same."""
    if not (o.json and o.json.is_file()):
        return []
    before = json.loads(o.json.read_text())
    return before["races"] if (before["size"], before["card"]) == (o.size, card_name()) else []


def main():
    o = options()
    make_weights(o)
    clocks, card = Clocks(), card_name()
    found = kept(o)
    print(report.heading(o, card), flush=True)

    def told(result):
        # A race that is run again takes the place of what it was.
        found[:] = [race for race in found if (race["peer"], race["run"]) != (result["peer"], result["run"])] + [result]
        print("\n".join(report.lines(result)), flush=True)
        # After every race: what a later crash takes away is not lost.
        if o.json:
            written = o.json.with_suffix(".part")
            written.write_text(json.dumps({"size": o.size, "card": card, "clocks": clocks.reason, "rounds": o.rounds, "races": found}, indent=1) + "\n")
            written.replace(o.json)

    try:
        run_all(o, clocks, told)
    finally:
        clocks.stop()
    print("\n".join(report.ending(found, clocks.reason)))


if __name__ == "__main__":
    main()
