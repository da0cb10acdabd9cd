"""Small real inputs to begin from: adapters' keys and headers from the test fixtures, a trainer's tar, references.

    python3 fuzz/seeds.py
"""
import io
import json
import pathlib
import struct
import tarfile

root = pathlib.Path(__file__).parent
fixtures = root.parent / "tests" / "fixtures" / "lora"


def put(target, name, content):
    folder = root / "seeds" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


keys = set()
for path in sorted(fixtures.glob("*.safetensors")):
    if path.stem == "expected":
        continue
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    keys |= set(header)
    few = {k: header[k] for k in sorted(header)[:3]}
    put("precheck", path.stem, json.dumps(few))
    if len(data) < 40_000:
        put("adapter", path.stem, data)
for i, key in enumerate(sorted(keys)[::7]):
    put("keys", str(i), key)

tiny = json.dumps({"transformer_blocks.0.attn.to_q.lora_A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}).encode()
tiny = struct.pack("<Q", len(tiny)) + tiny + struct.pack("<2f", 1, 2)
put("adapter", "tiny", tiny)
for name, mode in [("plain", "w"), ("gzip", "w:gz")]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for member, content in [("output/flux_train_replicate/config.yaml", b"a: 1"), ("output/flux_train_replicate/lora.safetensors", tiny)]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    put("archive", name, out.getvalue())
for i, text in enumerate([
    "me.safetensors", "owner/repo@main/sub/a.safetensors", "https://huggingface.co/o/r/resolve/v1/a%20b.safetensors?download=true",
    "https://civitai.com/models/1/x?modelVersionId=2", "civitai:3", "urn:air:flux1:lora:civitai:1@2", "s3://bucket/key.tar",
    "data:application/octet-stream;base64,AAAA", "https://x.example/y.tar?X-Amz-Signature=z", "file:///x.tgz",
]):
    put("reference", str(i), text)
