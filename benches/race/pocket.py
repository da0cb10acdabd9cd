"""One step of pocket in darkroom and in diffusers, in turn, on the same cores.

    cargo build --release
    pip install torch==2.15.0 diffusers==0.42.1   # CPU builds do
    python benches/race/pocket.py [--darkroom target/release/darkroom] [--rounds 7] [--json]

Both run in f32 on all cores, 128 x 128, one prompt of 64 text tokens (pocket's own limit), 20 steps a round after a warm-up.
darkroom's time is what `generate --json` states for the stage, sampler included; diffusers' is the transformer's forward alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time

import torch
from diffusers import FluxTransformer2DModel

STEPS = 20
PROMPT = "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, yellow background"


def diffusers_step(model, length):
    config = model.config
    side = 8
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    inputs = dict(
        hidden_states=torch.randn(1, side * side, config.in_channels),
        encoder_hidden_states=torch.randn(1, length, config.joint_attention_dim),
        pooled_projections=torch.randn(1, config.pooled_projection_dim),
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]),
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(length, 3),
    )

    def run():
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(STEPS):
                model(**inputs)
        return (time.perf_counter() - start) / STEPS

    return run


def darkroom_step(binary, folder):
    def run():
        command = [binary, "generate", PROMPT, "--steps", str(STEPS), "--seed", "1", "--json", "--quiet", "-o", f"{folder}/x.png", "--force"]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return result["timings"]["denoise"] / STEPS

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--darkroom", default="target/release/darkroom")
    parser.add_argument("--weights", default=os.path.join(os.path.dirname(__file__), "../../models/pocket/weights"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(os.cpu_count())
    model = FluxTransformer2DModel.from_pretrained(options.weights, subfolder="transformer", torch_dtype=torch.float32).eval()
    with open(os.path.join(options.weights, "tokenizer_2/tokenizer_config.json")) as file:
        length = min(512, json.load(file)["model_max_length"])
    with tempfile.TemporaryDirectory() as folder:
        runs = {"diffusers": diffusers_step(model, length), "darkroom": darkroom_step(options.darkroom, folder)}
        for run in runs.values():
            run()
        times = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                times[name].append(1e3 * run())
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["darkroom"] / median["diffusers"]
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "torch": torch.__version__, "text_tokens": length, "ms": times, "ratio": ratio}))
    else:
        for name, values in times.items():
            print(f"{name:<10} {median[name]:6.1f} ms a step (fastest {min(values):.1f}, slowest {max(values):.1f})")
        print(f"darkroom takes {ratio:.2f} of diffusers' time on {os.cpu_count()} cores, {length} text tokens")


if __name__ == "__main__":
    main()
