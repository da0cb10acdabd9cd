"""Times one diffusers pipeline as asked, with the device's work finished before and after."""

import json
import platform
import time

import diffusers
import torch
import transformers
from safetensors.torch import load_file

PROMPT = "a portrait of a person with long red hair and glasses, smiling, wearing a blue shirt, picture {}"
GUIDANCE = 3.5


def dtype(o):
    # Processors have little use for 16-bit arithmetic.
    return torch.float32 if o.device == "cpu" else torch.bfloat16


def read_lora(file):
    """Its tensors in main memory. Mapped alone they would be read in the switch."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


class Peer:
    """`switch(tensors, scale)` puts a LoRA on, or takes it off if there are no tensors."""

    def __init__(self, o, pipe, switch=None):
        self.o, self.pipe, self.switch = o, pipe, switch
        self.prompts, self.opened = 0, {}
        settings = json.loads((o.folder / "tokenizer_2" / "tokenizer_config.json").read_text())
        self.tokens = min(512, settings["model_max_length"])

    def answer(self, request):
        with torch.no_grad():
            return getattr(self, request["run"])(request)

    # --- requests --------------------------------------------------------------------------------------------------------------------

    def about(self, _request):
        cuda = self.o.device != "cpu"
        return {"about": {
            "config": self.o.config, "device": torch.cuda.get_device_name() if cuda else platform.machine(), "dtype": str(dtype(self.o)),
            "torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__,
            "text_tokens": self.tokens, "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None}}

    def step(self, request):
        """One step more than asked for: the first is told apart, for it may have to compile."""
        inputs = self.inputs()
        times = [self.time(lambda: self.one_step(inputs)) for _ in range(request.get("count", 1) + 1)]
        return {"ms": times[1:], "first_ms": times[0]}

    def picture(self, request):
        return self.repeat(request, lambda: self.bytes(self.pipe(
            prompt=self.prompt(), height=self.o.pixels, width=self.o.pixels, num_inference_steps=request.get("steps", 28),
            guidance_scale=GUIDANCE, max_sequence_length=self.tokens, output_type="pt").images))

    def decode(self, request):
        vae = self.pipe.vae
        side = self.o.pixels // 8
        latents = torch.randn(1, 16, side, side, device=self.o.device, dtype=dtype(self.o))

        def run():
            z = latents / vae.config.scaling_factor + vae.config.shift_factor
            image = vae.decode(z, return_dict=False)[0]
            return self.bytes(self.pipe.image_processor.postprocess(image, output_type="pt"))

        return self.repeat(request, run)

    def encode(self, request):
        return self.repeat(request, lambda: self.pipe.encode_prompt(
            prompt=self.prompt(), prompt_2=None, device=torch.device(self.o.device), max_sequence_length=self.tokens))

    def lora(self, request):
        if self.switch is None:
            raise NotImplementedError(f"{self.o.config} is not raced with LoRAs")
        file, read = request.get("file"), 0.0
        if file and not request.get("resident"):
            start = time.perf_counter()
            self.opened[file] = read_lora(file)
            read = 1e3 * (time.perf_counter() - start)
        tensors = self.opened[file] if file else None
        return {"ms": [self.time(lambda: self.switch(tensors, request.get("scale", 1.0)))], "read_ms": read}

    # --- what they share -------------------------------------------------------------------------------------------------------------

    def inputs(self):
        """As the pipeline gives them, in type and form, so that one compiled model serves both."""
        o, config = self.o, self.pipe.transformer.config
        side, kind = o.pixels // 16, dict(device=o.device, dtype=dtype(o))
        ids = torch.zeros(side, side, 3, **kind)
        ids[..., 1] += torch.arange(side, **kind)[:, None]
        ids[..., 2] += torch.arange(side, **kind)[None]
        guidance = torch.full([1], GUIDANCE, device=o.device).expand(1) if config.guidance_embeds else None
        return dict(
            hidden_states=torch.randn(1, side * side, config.in_channels, **kind),
            timestep=torch.tensor([700.0], **kind) / 1000,
            guidance=guidance,
            pooled_projections=torch.randn(1, config.pooled_projection_dim, **kind),
            encoder_hidden_states=torch.randn(1, self.tokens, config.joint_attention_dim, **kind),
            txt_ids=torch.zeros(self.tokens, 3, **kind),
            img_ids=ids.reshape(-1, 3),
            joint_attention_kwargs={},
            return_dict=False,
        )

    def one_step(self, inputs):
        # The step before is done with: its CUDA graph's output may be written over.
        torch.compiler.cudagraph_mark_step_begin()
        self.pipe.transformer(**inputs)

    def prompt(self):
        """Never the same twice: darkroom remembers encoded prompts."""
        self.prompts += 1
        return PROMPT.format(self.prompts)

    @staticmethod
    def bytes(image):
        """Eight bits a channel in main memory, as darkroom's answer is; made on the card, which is faster than a PIL image."""
        return (image * 255).round().to(torch.uint8).cpu()

    def repeat(self, request, run):
        def one():
            torch.compiler.cudagraph_mark_step_begin()
            run()

        return {"ms": [self.time(one) for _ in range(request.get("count", 1))]}

    def time(self, run):
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def synchronize(self):
        if self.o.device != "cpu":
            torch.cuda.synchronize()
