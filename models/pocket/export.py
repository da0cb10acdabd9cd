"""Stage "export": write the diffusers folder, every weight in bf16, and check that it loads."""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import common
import train_flow


SCHEDULER = dict(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
                 num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True)
MODEL_INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(o):
    out = Path(o.output)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    norm, text, vae = common.load(f"{o.run}/latents.pt"), train_flow.Text(o.run), train_flow.load_vae(o.run)
    name = "schnell" if o.twin else "distill" if os.path.exists(f"{o.run}/distill.pt") else "transformer"
    flow, state = train_flow.build(guidance=not o.twin), common.load(f"{o.run}/{name}.pt")
    flow.load_state_dict(state["avg"])
    print(f"from stage {name}, step {state['step']}")
    vae.register_to_config(scaling_factor=round(norm["scale"], 5), shift_factor=round(norm["shift"], 5))
    for part, model in dict(text_encoder=text.clip, text_encoder_2=text.t5, transformer=flow, vae=vae).items():
        model.to(torch.bfloat16).save_pretrained(out / part)
        tidy(out / part, part)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(f"{o.run}/tok/{part}", out / part)
    (out / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0", **SCHEDULER}
    if o.twin:
        scheduler |= dict(shift=1.0, use_dynamic_shifting=False)
    (out / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    sizes = {p: p.stat().st_size for p in sorted(out.rglob("*.safetensors"))}
    for p, n in sizes.items():
        print(f"{n / 1e6:8.2f} MB  {p.relative_to(out)}")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB in all")
    check(o, out)


def tidy(folder, part):
    """The tensor names of the published FLUX models, whatever version of the library wrote them."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if part == "text_encoder" and not any(k.startswith("text_model.") for k in tensors):
            tensors = {f"text_model.{k}": v for k, v in tensors.items()}
        if part == "text_encoder_2":
            tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight"))
            tensors.pop("encoder.embed_tokens.weight", None)
        assert all(v.dtype == torch.bfloat16 for v in tensors.values()), part
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    if part.startswith("text"):
        config["torch_dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2) + "\n")


def check(o, out):
    """The pipeline must give the pictures that the training code gives."""
    import numpy as np
    from diffusers import FluxPipeline
    pipe = FluxPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt = train_flow.PROMPTS[0]
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    steps, shift = (train_flow.FAST_STEPS, 1.0) if o.twin else (20, train_flow.SHIFT)
    a = pipe(prompt, height=128, width=128, num_inference_steps=steps, guidance_scale=o.guidance,
             max_sequence_length=64, latents=noise, output_type="np").images[0]
    norm = dict(scale=pipe.vae.config.scaling_factor, shift=pipe.vae.config.shift_factor)
    text = train_flow.Text(o.run)
    text.clip.load_state_dict(pipe.text_encoder.state_dict())
    text.t5.load_state_dict(pipe.text_encoder_2.state_dict())
    b = train_flow.sample(pipe.transformer, text, pipe.vae, norm, [prompt], steps=steps, shift=shift,
                          guidance=None if o.twin else o.guidance)[0]
    print(f"largest difference between pipeline and training code: {np.abs(a * 255 - b).max():.2f} of 255")
