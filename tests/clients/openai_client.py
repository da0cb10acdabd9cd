"""openai for Python."""

import base64
import io
import os

import openai

client = openai.OpenAI(api_key=os.environ["KEY"], base_url=os.environ["BASE"] + "/v1")
SHORT = {"num_inference_steps": 2, "seed": 7}

made = client.images.generate(model="flux-dev-lora", prompt="a person", n=2, size="1024x1024", extra_body=SHORT)
first = base64.b64decode(made.data[0].b64_json)
assert first.startswith(b"\x89PNG") and len(made.data) == 2 and made.created > 1_700_000_000
lora = dict(SHORT, lora_weights=os.environ["SITE"] + "/user1001.safetensors", lora_scale=1.0)
person = client.images.generate(model="flux-dev-lora", prompt="a person", extra_body=lora)
assert base64.b64decode(person.data[0].b64_json) != first
url = client.images.generate(prompt="x", response_format="url", extra_body=SHORT).data[0].url
assert url.startswith("https://")

edited = client.images.edit(image=io.BytesIO(first), prompt="a hat", extra_body={"num_inference_steps": "4"})
assert base64.b64decode(edited.data[0].b64_json).startswith(b"\x89PNG")

events = list(client.images.generate(prompt="x", stream=True, partial_images=2, extra_body={"num_inference_steps": 40}))
assert [event.type for event in events][-1] == "image_generation.completed", events
assert any(event.type == "image_generation.partial_image" for event in events)

assert "flux-dev" in [model.id for model in client.models.list().data]
assert client.models.retrieve("flux-schnell").object == "model"
for wrong in [{"n": 11}, {"size": "1x1"}, {"model": "dall-e-3"}]:
    try:
        client.images.generate(**{"prompt": "x", **wrong})
        raise AssertionError(f"{wrong} was accepted")
    except openai.BadRequestError as error:
        assert error.param == list(wrong)[0] and error.request_id, error
try:
    client.images.generate(prompt="x", extra_body=dict(SHORT, lora_weights=os.environ["SITE"] + "/page.safetensors"))
    raise AssertionError("a web page is no LoRA")
except openai.BadRequestError as error:
    assert error.code == "lora_not_safetensors", error
try:
    openai.OpenAI(api_key="wrong", base_url=os.environ["BASE"] + "/v1").images.generate(prompt="x")
    raise AssertionError("a wrong key was accepted")
except openai.AuthenticationError:
    pass
print("all good")
