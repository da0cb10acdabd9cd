"""The order of a race and its numbers. Knows no engine: sides are anything with `ask` and `timed`."""

import json
import os
import statistics
import time
import uuid

from child import Absent

# What a run asks for. `count` times are taken in one answer where one alone is short.
REQUESTS = {
    "step": {"run": "step", "count": 5},
    "picture": {"run": "picture", "steps": 28},
    "schnell": {"run": "picture", "steps": 4},
    "decode": {"run": "decode", "count": 3},
    "encode": {"run": "encode", "count": 3},
}
# CUDA graphs are recorded in the second run and played from the third on.
WARM_UPS = 3


def order(rounds):
    """A B, B A, A B, ...: what drifts with time drifts for both."""
    return [turn for i in range(rounds) for turn in ("AB" if i % 2 == 0 else "BA")]


def simple(request):
    """A turn of one request -> measure -> times."""
    def turn(side):
        answer, busy = side.timed(**request)
        return {"": answer["ms"]}, [busy]

    return turn


def renewed(path):
    """A copy of a LoRA's file with another header: the same tensors, and a content that no side has met, whatever it keeps of files."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = header.get("__metadata__", {}) | {"turn": uuid.uuid4().hex}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    copy, part = path.with_suffix(".turn.safetensors"), path.with_suffix(".part")
    part.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    # Not written over: a side may have mapped the copy before.
    os.replace(part, copy)
    return copy


def lora(files, scale, pixels):
    """A turn with LoRAs: on, its first step, steps with it, another in its place, back to the first one, off, steps without.

    Reading a file is told apart from its switch. The side has met neither file before; the first one it still has when it comes back.
    """
    step = dict(REQUESTS["step"], pixels=pixels)

    def turn(side):
        one, two = (str(renewed(file)) for file in files)
        times, busy = {"read": []}, []

        def ask(measure, **request):
            answer, stretch = side.timed(**request)
            times[measure] = answer["ms"]
            busy.append(stretch)
            return answer

        times["read"].append(ask("on", run="lora", file=one, scale=scale)["read_ms"])
        times["first step"] = [ask("step with it", **step)["first_ms"]]
        times["read"].append(ask("another", run="lora", file=two, scale=scale)["read_ms"])
        ask("back", run="lora", file=one, scale=scale, resident=True)
        ask("off", run="lora", file=None)
        ask("step without", **step)
        return times, busy

    return turn


def spread(values):
    return {"median": statistics.median(values), "fastest": min(values), "slowest": max(values), "times": values}


def race(sides, turn, rounds, warm_ups=WARM_UPS, clocks=None):
    """sides: "A" and "B" -> Child or None. -> per side either measures with their spread, or why it is absent.

    A side that fails drops out; the other one runs on alone, so that its numbers are there.
    """
    results, left, busy = {}, {}, {"A": [], "B": []}
    for key, side in sides.items():
        if side is None:
            results[key] = {"absent": "not asked for"}
            continue
        try:
            start = time.monotonic()
            turn(side)
            cold = time.monotonic() - start
            for _ in range(warm_ups - 1):
                turn(side)
            left[key] = side
            results[key] = {"first_turn_s": cold, "turns": []}
        except Absent as reason:
            results[key] = {"absent": str(reason)}
    for key in order(rounds):
        if key not in left:
            continue
        try:
            times, stretches = turn(left[key])
        except Absent as reason:
            results[key] = {"absent": str(reason)}
            del left[key]
            continue
        results[key]["turns"].append(times)
        busy[key] += stretches
    for key, result in results.items():
        if "absent" in result:
            continue
        turns = result.pop("turns")
        result["measures"] = {name: spread([ms for times in turns for ms in times[name]]) for name in turns[0]}
        result["turn_medians"] = {name: [statistics.median(times[name]) for times in turns] for name in turns[0]}
        result["clocks"] = clocks.of(busy[key]) if clocks else None
    return results


def ratio(results, measure):
    """How many times as long B takes as A, and the lowest and highest of the rounds; None if a side is absent."""
    if any("absent" in results[key] for key in "AB"):
        return None
    a, b = (results[key]["turn_medians"][measure] for key in "AB")
    pairs = sorted(y / x for x, y in zip(a, b))
    medians = [results[key]["measures"][measure]["median"] for key in "AB"]
    return {"median": medians[1] / medians[0], "lowest": pairs[0], "highest": pairs[-1]}
