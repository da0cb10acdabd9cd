"""replicate 1.x for Python, as its README uses it. BASE and KEY say where and as whom."""

import io
import os

import replicate
from replicate.exceptions import ModelError, ReplicateError
from replicate.webhook import Webhooks

client = replicate.Client(api_token=os.environ["KEY"], base_url=os.environ["BASE"])
MODEL = "black-forest-labs/flux-dev-lora"
SHORT = {"prompt": "a person", "num_inference_steps": 2, "seed": 7, "output_format": "png"}

# The README's three lines.
output = client.run(MODEL, input=SHORT)
open("portrait.png", "wb").write(output[0].read())
assert open("portrait.png", "rb").read().startswith(b"\x89PNG"), "a file"
assert output[0].url.startswith("https://")

# By version, bare and with its name; only the hash is sent.
version = client.models.get(MODEL).latest_version
assert version.openapi_schema["components"]["schemas"]["Input"]["properties"]["guidance"]["maximum"] == 10
again = client.run(f"{MODEL}:{version.id}", input=SHORT)
assert again[0].read() == output[0].read(), "a seed is a seed"
deployment = client.deployments.get(MODEL)
assert deployment.current_release.version == version.id and deployment.id in [d.id for d in client.deployments.list().results]
prediction = deployment.predictions.create(input=SHORT)
prediction.wait()
assert prediction.status == "succeeded", prediction.error

# Longer than the client waits for: it polls, and its progress bar moves.
prediction = client.predictions.create(
    model=MODEL, input=dict(SHORT, num_inference_steps=40, num_outputs=4), wait=1
)
assert prediction.status == "starting", prediction.status
seen = set()
while prediction.status not in ("succeeded", "failed", "canceled"):
    prediction.reload()
    if prediction.progress:
        seen.add(prediction.progress.percentage)
assert prediction.status == "succeeded" and len(prediction.output) == 4, prediction
assert "Using seed: 7" in prediction.logs and prediction.metrics["predict_time"] > 0
assert len(seen) > 1, "progress is read from the logs"

# Without waiting at all.
output = client.run(MODEL, input=SHORT, wait=False)
assert output[0].read().startswith(b"\x89PNG")

# A person's LoRA, and a file that the client uploads first.
person = client.run(MODEL, input=dict(SHORT, lora_weights=os.environ["SITE"] + "/user1001.safetensors"))
assert person[0].read() != again[0].read()
picture = io.BytesIO(again[0].read())
picture.name = "me.png"
changed = client.run(MODEL, input=dict(SHORT, image=picture, prompt_strength=0.5))
assert changed[0].read().startswith(b"\x89PNG")
file = client.files.create(io.BytesIO(again[0].read()), metadata={"a": "b"})
assert client.files.get(file.id).metadata == {"a": "b"} and any(f.id == file.id for f in client.files.list())
client.files.delete(file.id)

# Stopping, listing, streaming.
prediction = client.predictions.create(model=MODEL, input=dict(SHORT, num_inference_steps=50, num_outputs=4))
prediction.cancel()
prediction.wait()
assert prediction.status == "canceled", prediction.status
assert prediction.id in [p.id for p in client.predictions.list().results]
events = list(client.stream(MODEL, input=SHORT))
assert [str(e.event.value) for e in events][-2:] == ["output", "done"], events
assert client.accounts.current().username == "me"
mine = client.models.create(owner="me", name="mine", visibility="private", hardware="cpu")
assert client.models.get("me/mine").name == mine.name and client.models.get("me/mine").latest_version is None

# What goes wrong is told in the client's own words.
try:
    client.run(MODEL, input=dict(SHORT, lora_weights=os.environ["SITE"] + "/page.safetensors"))
    raise AssertionError("a web page is no LoRA")
except ModelError as error:
    assert "not a safetensors file" in str(error), error
for wrong, status in [(dict(SHORT, num_outputs=9), 422), ({}, 422)]:
    try:
        client.run(MODEL, input=wrong)
        raise AssertionError(f"{wrong} was accepted")
    except ReplicateError as error:
        assert error.status == status and error.title == "Input validation failed", error
try:
    replicate.Client(api_token="wrong", base_url=os.environ["BASE"]).run(MODEL, input=SHORT)
    raise AssertionError("a wrong key was accepted")
except ReplicateError as error:
    assert error.status == 401, error

# Webhooks are checked by the client's own helper, and by Standard Webhooks' own library.
import http.server  # noqa: E402
import threading  # noqa: E402

told = []


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        told.append((dict(self.headers), self.rfile.read(int(self.headers["content-length"])).decode()))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


receiver = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
threading.Thread(target=receiver.serve_forever, daemon=True).start()
hook = f"http://127.0.0.1:{receiver.server_port}/hook"
prediction = client.predictions.create(model=MODEL, input=SHORT, webhook=hook, webhook_events_filter=["completed"])
prediction.wait()
import time  # noqa: E402

begun = time.time()
while not told and time.time() - begun < 20:
    time.sleep(0.05)
secret = client.webhooks.default.secret()
from standardwebhooks import Webhook  # noqa: E402

headers, body = told[0]
headers = {name.lower(): value for name, value in headers.items()}
assert Webhook(secret.key).verify(body, headers)["id"] == prediction.id
Webhooks.validate(headers=headers, body=body, secret=secret)
try:
    Webhooks.validate(headers=headers, body=body.replace("succeeded", "failed"), secret=secret)
    raise AssertionError("a changed body was taken")
except ValueError:
    pass
print("all good")
