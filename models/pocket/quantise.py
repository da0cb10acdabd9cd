"""Quantised pockets, to see what a person's LoRA does on them: fp8 (e4m3), Q8_0 and Q4_0.

    python quantise.py weights OUTPUT      # the diffusers folders pocket-fp8, pocket-q8_0, pocket-q4_0; needs gguf 0.19.0

The matrices of the transformer's blocks are quantised, as in the published files of FLUX.1; all the rest stays.
"""
import argparse
import shutil
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

PART = "transformer/diffusion_pytorch_model.safetensors"


def blocks(state):
    return [k for k, v in state.items() if "transformer_blocks" in k and v.ndim == 2]


def main(weights, output):
    state, out = load_file(weights / PART), output / "pocket-fp8"
    shutil.copytree(weights, out, dirs_exist_ok=True)
    save_file(state | {k: state[k].to(torch.float8_e4m3fn) for k in blocks(state)}, out / PART, {"format": "pt"})
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        out = output / f"pocket-{kind.name.lower()}"
        shutil.copytree(weights, out, dirs_exist_ok=True)
        (out / PART).unlink()
        writer = gguf.GGUFWriter(str((out / PART).with_suffix(".gguf")), "flux")
        for k, v in state.items():
            plain = v.float().numpy()
            if k in blocks(state):
                writer.add_tensor(k, gguf.quants.quantize(plain, kind), raw_dtype=kind)
            else:
                writer.add_tensor(k, plain)
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("weights", type=Path, help="diffusers folder")
    ap.add_argument("output", type=Path, help="folder for the three")
    o = ap.parse_args()
    main(o.weights, o.output)
