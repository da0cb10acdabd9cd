// replicate for JavaScript, as its README uses it.
const assert = require("node:assert");
const http = require("node:http");
const { writeFile, readFile } = require("node:fs/promises");
const Replicate = require("replicate");
const { validateWebhook, parseProgressFromLogs } = Replicate;

const MODEL = "black-forest-labs/flux-dev-lora";
const SHORT = { prompt: "a person", num_inference_steps: 2, seed: 7, output_format: "png" };
const of = (auth, base) => new Replicate({ auth, baseUrl: base });
const isPng = (bytes) => Buffer.from(bytes).subarray(0, 4).equals(Buffer.from([0x89, 0x50, 0x4e, 0x47]));

(async () => {
  const replicate = of(process.env.KEY, process.env.BASE + "/v1");
  const [output] = await replicate.run(MODEL, { input: SHORT });
  await writeFile("portrait.png", output);
  assert(isPng(await readFile("portrait.png")), "a file");
  assert(output.url().href.startsWith("https://"));
  const first = Buffer.from(await (await fetch(output.url())).arrayBuffer());

  // Both spellings of the base address, and by version.
  const [other] = await of(process.env.KEY, process.env.BASE).run(MODEL, { input: SHORT });
  assert((await (await other.blob()).arrayBuffer()).byteLength === first.length);
  const { id } = (await replicate.models.get("black-forest-labs", "flux-dev-lora")).latest_version;
  const [again] = await replicate.run(`${MODEL}:${id}`, { input: SHORT, wait: { mode: "poll", interval: 100 } });
  const blob = await again.blob();
  assert.strictEqual(blob.type, "image/png");
  assert(Buffer.from(await blob.arrayBuffer()).equals(first), "a seed is a seed");

  // Progress from the logs while it polls.
  const seen = new Set();
  await replicate.run(MODEL, { input: { ...SHORT, num_inference_steps: 40, num_outputs: 4 }, wait: { mode: "block", timeout: 1 } }, (p) => {
    const progress = p.logs && parseProgressFromLogs(p);
    if (progress) seen.add(progress.percentage);
  });
  assert(seen.size > 1, "progress");

  // A LoRA; a Buffer that the client uploads.
  const [person] = await replicate.run(MODEL, { input: { ...SHORT, lora_weights: process.env.SITE + "/user1001.safetensors" } });
  assert(!Buffer.from(await (await person.blob()).arrayBuffer()).equals(first));
  const [changed] = await replicate.run(MODEL, { input: { ...SHORT, image: first, prompt_strength: 0.5 } });
  assert(isPng(await (await changed.blob()).arrayBuffer()));

  // Stopping: a JSON content type and no body. Files with metadata. Lists.
  let prediction = await replicate.predictions.create({ model: MODEL, input: { ...SHORT, num_inference_steps: 50, num_outputs: 4 } });
  await replicate.predictions.cancel(prediction.id);
  prediction = await replicate.wait(prediction, { interval: 50 });
  assert.strictEqual(prediction.status, "canceled");
  const file = await replicate.files.create(first, { a: "b" });
  assert.deepStrictEqual((await replicate.files.get(file.id)).metadata, { a: "b" });
  await replicate.files.delete(file.id);
  const pages = [];
  for await (const page of replicate.paginate(replicate.predictions.list)) pages.push(...page);
  assert(pages.some((p) => p.id === prediction.id));

  // Streams.
  const events = [];
  for await (const event of replicate.stream(MODEL, { input: SHORT })) events.push(event.event);
  assert.deepStrictEqual(events.slice(-2), ["output", "done"]);

  // What goes wrong.
  await assert.rejects(replicate.run(MODEL, { input: { ...SHORT, num_outputs: 9 } }), /422.*num_outputs/s);
  await assert.rejects(replicate.run(MODEL, { input: { ...SHORT, lora_weights: process.env.SITE + "/page.safetensors" } }), /not a safetensors file/);
  await assert.rejects(of("wrong", process.env.BASE + "/v1").run(MODEL, { input: SHORT }), /401/);

  // Webhooks by the client's own helper.
  const { key } = await replicate.webhooks.default.secret.get();
  const told = new Promise((resolve) => {
    const receiver = http.createServer((request, response) => {
      const parts = [];
      request.on("data", (part) => parts.push(part));
      request.on("end", () => { response.end(); receiver.close(); resolve({ headers: request.headers, body: Buffer.concat(parts).toString() }); });
    });
    receiver.listen(0, "127.0.0.1", () => {
      const webhook = `http://127.0.0.1:${receiver.address().port}/hook`;
      replicate.predictions.create({ model: MODEL, input: SHORT, webhook, webhook_events_filter: ["completed"] });
    });
  });
  const { headers, body } = await told;
  const sent = { id: headers["webhook-id"], timestamp: headers["webhook-timestamp"], signature: headers["webhook-signature"], secret: key };
  assert(await validateWebhook({ ...sent, body }));
  assert(!(await validateWebhook({ ...sent, body: body.replace("succeeded", "failed") })));
  console.log("all good");
})();
