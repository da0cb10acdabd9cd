"""Makes the model that both sides of a race load: FLUX.1's sizes, random weights, no downloads.

    python weights.py --folder DIR --size dev|tiny [--gguf]

DIR/dev and DIR/schnell are folders in the diffusers layout that share their weights (schnell is dev without the guidance embedder),
DIR/gguf is dev with a Q8_0 transformer, DIR/loras holds two LoRAs of each kind so that a switch never finds its file's content in place.
`dev` takes 34 GB on disk in bf16 and 13 GB more with --gguf; `tiny` a few MB in f32.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
RANK = 16
SHARD_BYTES = 4 << 30

SIZES = {
    "dev": dict(
        dtype=torch.bfloat16,
        transformer=dict(num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
                         joint_attention_dim=4096, pooled_projection_dim=768, axes_dims_rope=(16, 56, 56)),
        t5=dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
        clip=dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
        vae=dict(block_out_channels=(128, 256, 512, 512), norm_num_groups=32, sample_size=1024),
    ),
    # Quantised blocks hold 32 values, and LoRAs of rank 16 must fit: nothing is narrower than 32 but the autoencoder.
    "tiny": dict(
        dtype=torch.float32,
        transformer=dict(num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
                         joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 14, 14)),
        t5=dict(vocab_size=256, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=4),
        clip=dict(vocab_size=704, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, projection_dim=32),
        vae=dict(block_out_channels=(4, 8, 12, 16), norm_num_groups=4, sample_size=64),
    ),
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000}
INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def configs(size):
    """Each component's class and configuration."""
    transformer = dict(in_channels=64, guidance_embeds=True, **size["transformer"])
    t5 = T5Config(feed_forward_proj="gated-gelu", relative_attention_num_buckets=32, relative_attention_max_distance=128,
                  layer_norm_epsilon=1e-6, **size["t5"])
    # eos_token_id 2 is what FLUX.1's own file says: the pooled token is the one of the highest id.
    clip = CLIPTextConfig(max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=2,
                          pad_token_id=1, **size["clip"])
    vae = dict(in_channels=3, out_channels=3, latent_channels=16, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
               up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611,
               shift_factor=0.1159, force_upcast=True, **size["vae"])
    with torch.device("meta"):
        return {"transformer": FluxTransformer2DModel(**transformer), "text_encoder_2": T5EncoderModel(t5),
                "text_encoder": CLIPTextModel(clip), "vae": AutoencoderKL(**vae)}


def shapes(part, model):
    """Name -> shape, under the names of the published files."""
    found = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    if part == "text_encoder":
        return {"text_model." + name.removeprefix("text_model."): shape for name, shape in found.items()}
    return found


def random(name, shape, generator, dtype):
    """About what trained weights look like, so that a card draws the power it draws for them: a product with zeros is faster."""
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1:
        value = 1 + 0.05 * noise if name.endswith("weight") else 0.02 * noise
    elif any(table in name for table in ("token_embedding", "position_embedding", "shared", "relative_attention_bias")):
        value = 0.5 * noise
    else:
        fan_in = noise[0].numel()
        # Narrow layers need more for their output not to vanish.
        value = noise * max(0.02, fan_in**-0.5)
    return value.to(dtype).cpu()


def shards(names, dtype):
    """Lists of names, each list one file. The guidance embedder has a file of its own, which schnell does without."""
    apart = [name for name in names if "guidance_embedder" in name]
    lists, size = [[]], 0
    for name in (name for name in names if name not in apart):
        bytes_ = torch.Size(names[name]).numel() * dtype.itemsize
        if size and size + bytes_ > SHARD_BYTES:
            lists.append([])
            size = 0
        lists[-1].append(name)
        size += bytes_
    return lists + ([apart] if apart else [])


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_part(folder, part, model, dtype, generator):
    folder.mkdir(parents=True)
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
    names = shapes(part, model)
    stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
    lists = shards(names, dtype)
    files = {}
    for i, of_shard in enumerate(lists):
        file = f"{stem}.safetensors" if len(lists) == 1 else f"{stem}-{i + 1:05}-of-{len(lists):05}.safetensors"
        tensors = {name: random(name, names[name], generator, dtype) for name in of_shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(of_shard, file)
    if len(lists) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": files})


def link(folder, target, names):
    for name in names:
        (folder / name).symlink_to(os.path.relpath(target / name, folder))


def make_dev(folder, size, generator):
    for part, model in configs(size).items():
        write_part(folder / part, part, model, size["dtype"], generator)
    # The vocabulary is that of the tiny fixtures: what a token is called changes no time, how many there are does.
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(FIXTURES / "tiny-dev" / tokenizer, folder / tokenizer)
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"shift": 3.0, "use_dynamic_shifting": True})


def make_schnell(folder, dev):
    (folder / "transformer").mkdir(parents=True)
    link(folder, dev, ["text_encoder", "text_encoder_2", "vae", "tokenizer", "model_index.json"])
    shutil.copytree(FIXTURES / "tiny-schnell" / "tokenizer_2", folder / "tokenizer_2")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False})
    config = json.loads((dev / "transformer" / "config.json").read_text())
    write_json(folder / "transformer" / "config.json", config | {"guidance_embeds": False})
    name = "diffusion_pytorch_model.safetensors.index.json"
    files = json.loads((dev / "transformer" / name).read_text())["weight_map"]
    files = {tensor: file for tensor, file in files.items() if "guidance_embedder" not in tensor}
    write_json(folder / "transformer" / name, {"metadata": {}, "weight_map": files})
    link(folder / "transformer", dev / "transformer", sorted(set(files.values())))


def make_loras(folder, size, generator):
    def draw(*shape):
        return torch.randn(shape, generator=generator, device=generator.device)

    folder.mkdir(parents=True)
    blocks = {name: shape for name, shape in shapes("transformer", configs(size)["transformer"]).items()
              if "transformer_blocks." in name and len(shape) == 2}
    kinds = {"all": blocks, "attention": {n: s for n, s in blocks.items() if n.removesuffix(".weight").split("attn.")[-1] in ATTENTION}}
    for kind, modules in kinds.items():
        for copy in ("one", "two"):
            tensors = {}
            for name, (rows, columns) in modules.items():
                stem = "transformer." + name.removesuffix(".weight")
                tensors[f"{stem}.lora_A.weight"] = (draw(RANK, columns) * columns**-0.5).to(torch.bfloat16).cpu()
                tensors[f"{stem}.lora_B.weight"] = (draw(rows, RANK) * 0.02).to(torch.bfloat16).cpu()
            save_file(tensors, folder / f"{kind}-{copy}.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="draws the numbers")
    options = parser.parse_args()

    size, made = SIZES[options.size], options.folder / "made.json"
    wanted = {"size": options.size, "seed": options.seed}
    if not made.is_file():
        # What was broken off is made anew.
        for part in ("dev", "schnell", "loras", "gguf"):
            shutil.rmtree(options.folder / part, ignore_errors=True)
        generator = torch.Generator(options.device).manual_seed(options.seed)
        make_dev(options.folder / "dev", size, generator)
        make_schnell(options.folder / "schnell", options.folder / "dev")
        make_loras(options.folder / "loras", size, generator)
        # Last: a folder without this file is not whole.
        write_json(made, wanted)
    elif json.loads(made.read_text()) != wanted:
        raise SystemExit(f"{options.folder} holds other weights ({made.read_text().split()}); give another folder or remove it")
    gguf = options.folder / "gguf"
    if options.gguf and not (gguf / "model_index.json").is_symlink():
        from gguf_file import write

        shutil.rmtree(gguf, ignore_errors=True)
        (gguf / "transformer").mkdir(parents=True)
        write(options.folder / "dev" / "transformer", gguf / "transformer" / "flux-Q8_0.gguf", options.device)
        link(gguf / "transformer", options.folder / "dev" / "transformer", ["config.json"])
        link(gguf, options.folder / "dev", ["text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2", "scheduler", "model_index.json"])


if __name__ == "__main__":
    main()
