"""litellm, which forwards OpenAI's calls."""

import base64
import io
import os

import litellm

litellm.suppress_debug_info = True
HERE = {"api_base": os.environ["BASE"] + "/v1", "api_key": os.environ["KEY"]}

made = litellm.image_generation(model="openai/flux-dev-lora", prompt="a person", n=1, size="1024x1024", seed=7, num_inference_steps=2, **HERE)
first = base64.b64decode(made.data[0].b64_json)
assert first.startswith(b"\x89PNG")
person = litellm.image_generation(
    model="openai/flux-dev-lora", prompt="a person", seed=7, num_inference_steps=2,
    lora_weights=os.environ["SITE"] + "/user1001.safetensors", **HERE,
)
assert base64.b64decode(person.data[0].b64_json) != first
edited = litellm.image_edit(model="openai/flux-dev", image=io.BytesIO(first), prompt="a hat", **HERE)
assert base64.b64decode(edited.data[0].b64_json).startswith(b"\x89PNG")
try:
    litellm.image_generation(model="openai/flux-dev", prompt="x", n=11, **HERE)
    raise AssertionError("n=11 was accepted")
except litellm.BadRequestError as error:
    assert "from 1 to 10" in str(error), error
print("all good")
