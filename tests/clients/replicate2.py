"""replicate 2.x for Python (pre-release). Its base address ends in /v1."""

import os

# `replicate.use` knows no client but its own, which the environment sets up.
os.environ.update(REPLICATE_API_TOKEN=os.environ["KEY"], REPLICATE_BASE_URL=os.environ["BASE"] + "/v1")
import replicate  # noqa: E402

client = replicate.Replicate(bearer_token=os.environ["KEY"], base_url=os.environ["BASE"] + "/v1")
MODEL = "black-forest-labs/flux-dev-lora"
SHORT = {"prompt": "a person", "num_inference_steps": 2, "seed": 7, "output_format": "png"}

output = client.run(MODEL, input=SHORT)
assert output[0].read().startswith(b"\x89PNG"), output
version = client.models.get(model_owner="black-forest-labs", model_name="flux-dev-lora").latest_version
again = client.run(f"{MODEL}:{version['id'] if isinstance(version, dict) else version.id}", input=SHORT)
assert again[0].read() == output[0].read()

prediction = client.predictions.create(version=MODEL, input=dict(SHORT, num_inference_steps=50, num_outputs=4))
assert prediction.status == "starting", prediction.status
client.predictions.cancel(prediction_id=prediction.id)
while (prediction := client.predictions.get(prediction_id=prediction.id)).status not in ("canceled", "succeeded"):
    pass
assert prediction.status == "canceled", prediction.status
file = client.files.create(content=b"abc", filename="a.txt", type="text/plain", metadata={"a": "b"})
assert client.files.get(file_id=file.id).size == 3
client.files.delete(file_id=file.id)
assert client.account.get().username == "me"
assert client.webhooks.default.secret.get().key.startswith("whsec_")

# `use` reads the model's schema and calls it like a function; also with the base address of the older client.
dev = replicate.use(MODEL)
pictures = dev(**SHORT)
assert os.path.getsize(pictures[0]) > 1000, pictures
other = replicate.Replicate(bearer_token=os.environ["KEY"], base_url=os.environ["BASE"])
assert other.run(MODEL, input=SHORT)[0].read() == output[0].read()

for wrong, error in [(dict(SHORT, num_outputs=9), replicate.UnprocessableEntityError), ({}, replicate.UnprocessableEntityError)]:
    try:
        client.run(MODEL, input=wrong)
        raise AssertionError(f"{wrong} was accepted")
    except error:
        pass
try:
    replicate.Replicate(bearer_token="wrong", base_url=os.environ["BASE"] + "/v1").run(MODEL, input=SHORT)
    raise AssertionError("a wrong key was accepted")
except replicate.AuthenticationError:
    pass
print("all good")
