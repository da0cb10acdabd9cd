"""diffusers in one configuration, told over stdin what to time: the other side of a race. README.md has the protocol.

Started by race.py; alone: echo '{"run":"step"}' | python diffusers_peer.py --config eager --folder DIR/dev --pixels 64 --device cpu
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import diffusers
import torch
import torch._inductor.config
from diffusers import FluxPipeline, FluxTransformer2DModel

from peer import Peer, dtype, read_lora

diffusers.utils.logging.set_verbosity_error()

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


# --- configurations: options -> Peer -------------------------------------------------------------------------------------------------

def eager(o):
    return Peer(o, load(o))


def compiled(o):
    """The strongest that changes no number: what flux-fast does, without its fp8."""
    pipe = load(o)
    pipe.transformer.fuse_qkv_projections()
    if pipe.vae is not None:
        pipe.vae.fuse_qkv_projections()
    return Peer(o, compile_all(o, pipe))


def fuse(o):
    """A LoRA added to the weights of the compiled model, which is not compiled again: only the weights' content changes.

    Taking it off by subtraction, as `unfuse_lora` does, drifts in bf16. Here the pristine weights are kept and copied back.
    """
    # No fused projections: LoRAs would be added to the three that are not read any more.
    pipe = compile_all(o, load(o))
    live = {name: p.data for name, p in pipe.transformer.named_parameters()}
    pristine, on = {}, []

    def switch(tensors, scale):
        nonlocal on
        if on:
            torch._foreach_copy_([live[name] for name in on], [pristine[name] for name in on], non_blocking=True)
        on = changed_by(tensors) if tensors else []
        for name in on:
            if name not in pristine:
                pristine[name] = copied(live[name])
        if tensors:
            load_lora(pipe, tensors)
            pipe.fuse_lora(lora_scale=scale)
            pipe.unload_lora_weights()

    return Peer(o, pipe, switch)


def hotswap(o):
    """A LoRA beside the weights, whose factors are overwritten by the next one's: nothing is compiled again."""
    pipe = load(o)
    pipe.enable_lora_hotswap(target_rank=16)
    load_lora(pipe, read_lora(o.lora))
    scales = [module.scaling["lora"] for module in pipe.transformer.modules() if hasattr(module, "lora_A")]
    compile_all(o, pipe)

    def switch(tensors, scale):
        if tensors:
            load_lora(pipe, tensors, hotswap=True)
        # `set_adapters` would put numbers in the place of the compiled model's tensors. The files' alpha is their rank.
        torch._foreach_zero_(scales)
        if tensors:
            torch._foreach_add_(scales, scale)

    peer = Peer(o, pipe, switch)
    switch(None, 0.0)
    return peer


def fp8(o):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    pipe = load(o)
    pipe.transformer.fuse_qkv_projections()

    def in_a_block(module, name):
        return isinstance(module, torch.nn.Linear) and "transformer_blocks." in name

    quantize_(pipe.transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_a_block)
    return Peer(o, compile_all(o, pipe))


def gguf(o):
    return Peer(o, load(o, gguf_transformer(o)))


def gguf_compiled(o):
    """Compiled, the weights are dequantised in fused kernels."""
    return Peer(o, compile_all(o, load(o, gguf_transformer(o))))


def offload(o):
    pipe = load(o, device="cpu")
    pipe.enable_model_cpu_offload(device=o.device)
    return Peer(o, pipe)


def group_offload(o):
    """Layer by layer, the next one copied while this one is computed."""
    pipe = load(o, device="cpu")
    pipe.enable_group_offload(onload_device=torch.device(o.device), offload_type="leaf_level", use_stream=True, record_stream=True)
    return Peer(o, pipe)


CONFIGS = {"eager": eager, "compile": compiled, "fuse": fuse, "hotswap": hotswap, "fp8": fp8, "gguf": gguf, "gguf_compile": gguf_compiled,
           "offload": offload, "group_offload": group_offload}


# --- what they are made of -----------------------------------------------------------------------------------------------------------

def load(o, transformer=None, device=None):
    """The pipeline with what the runs need and None for the rest: two models have to fit on the card."""
    parts = {} if transformer is None else {"transformer": transformer}
    if not {"picture", "encode"} & set(o.runs):
        parts |= dict.fromkeys(TEXT_PARTS)
    if not {"picture", "decode"} & set(o.runs):
        parts["vae"] = None
    pipe = FluxPipeline.from_pretrained(str(o.folder), dtype=dtype(o), local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    # Loading a LoRA sets this too, and a compiled model is compiled again when it changes.
    pipe.transformer.requires_grad_(False)
    return pipe.to(device or o.device)


def load_lora(pipe, tensors, **how):
    pipe.load_lora_weights(tensors, adapter_name="lora", **how)


def changed_by(tensors):
    """Names of the weights that a LoRA changes."""
    stems = [key.split(".lora_A.")[0] for key in tensors if ".lora_A." in key]
    return [stem.removeprefix("transformer.") + ".weight" for stem in stems]


def copied(tensor):
    try:
        return tensor.clone()
    except torch.OutOfMemoryError:
        return tensor.cpu().pin_memory()


def gguf_transformer(o):
    from diffusers import GGUFQuantizationConfig
    from gguf_names import any_width

    any_width()
    folder = o.folder / "transformer"
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no .gguf in {folder}")
    return FluxTransformer2DModel.from_single_file(
        str(files[0]), config=str(folder), quantization_config=GGUFQuantizationConfig(compute_dtype=dtype(o)), dtype=dtype(o))


def compile_all(o, pipe):
    """What flux-fast sets, on every model of the pipeline. Shapes are fixed, so nothing is compiled for others."""
    flags = torch._inductor.config
    flags.conv_1x1_as_mm = True
    flags.coordinate_descent_tuning = o.mode != "default"
    flags.coordinate_descent_check_all_directions = True
    flags.epilogue_fusion = False
    pipe.transformer.set_attention_backend(o.attention)
    how = dict(mode=o.mode, fullgraph=True, dynamic=False)
    pipe.transformer.to(memory_format=torch.channels_last)
    # In place: the pipeline and PEFT still find the model's own class.
    pipe.transformer.compile(**how)
    if pipe.vae is not None:
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.vae.decode = torch.compile(pipe.vae.decode, **how)
    if pipe.text_encoder is not None:
        # No CUDA graphs here: the next model's run would write over the encoded prompt, which every step reads.
        mode = o.mode.replace("max-autotune", "max-autotune-no-cudagraphs")
        pipe.text_encoder.compile(mode=mode, dynamic=False)
        pipe.text_encoder_2.compile(mode=mode, dynamic=False)
    return pipe


# --- the process ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=CONFIGS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=lambda text: text.split(","), default=["step"], help="what will be asked for; the rest is not loaded")
    parser.add_argument("--lora", help="a file of the kind that will be asked for; hotswap needs it before it compiles")
    parser.add_argument("--mode", help="torch.compile's; max-autotune on a card")
    parser.add_argument("--attention", help="diffusers' attention backend of the compiled configurations; cuDNN's on a card")
    o = parser.parse_args()
    cpu = o.device == "cpu"
    o.mode = o.mode or ("default" if cpu else "max-autotune")
    o.attention = o.attention or ("native" if cpu else "_native_cudnn")
    return o


def main():
    # Answers go where stdout was; what libraries print there goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    o = options()
    peer = failure = None
    try:
        with torch.no_grad():
            peer = CONFIGS[o.config](o)
    except Exception as error:
        failure = reason(error)
    for line in sys.stdin:
        try:
            answer = {"error": failure} if failure else peer.answer(json.loads(line))
        except Exception as error:
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


def reason(error):
    import traceback

    traceback.print_exception(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


if __name__ == "__main__":
    main()
