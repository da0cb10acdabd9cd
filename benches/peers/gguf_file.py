"""Writes a transformer's safetensors as GGUF in BFL's names: the blocks' matrices in Q8_0, vectors in F32, the rest in F16, as the
published files have it."""

import json
import sys
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "layouts"))

from convert import flux_to_bfl


def q8_0(x):
    """Rows of a multiple of 32 values -> per 32 of them an f16 scale and 32 signed bytes. gguf's own code takes minutes for 12 GB."""
    blocks = x.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    values = torch.where(scale > 0, blocks / scale, 0.0).round().to(torch.int8)
    raw = torch.cat([scale.to(torch.float16).view(torch.uint8), values.view(torch.uint8)], 1)
    return raw.reshape(x.shape[0], -1)


def stored(name, tensor, device):
    """-> type and array as written."""
    if tensor.dim() == 1:
        return Q.F32, tensor.float().numpy()
    if name.startswith(("double_blocks", "single_blocks")):
        return Q.Q8_0, q8_0(tensor.to(device)).cpu().numpy()
    return Q.F16, tensor.to(torch.float16).numpy()


def write(folder, path, device):
    files = {folder / file for file in json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"].values()}
    weights = {name: tensor for file in sorted(files) for name, tensor in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    tensors = flux_to_bfl(weights, config["num_layers"], config["num_single_layers"])
    del weights
    # The writer keeps what it is given until the end: what was quantised is let go as it goes along.
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name in list(tensors):
        kind, array = stored(name, tensors.pop(name), device)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
