// openai for JavaScript.
const assert = require("node:assert");
const OpenAI = require("openai");

(async () => {
  const client = new OpenAI({ apiKey: process.env.KEY, baseURL: process.env.BASE + "/v1" });
  const made = await client.images.generate({ model: "flux-dev-lora", prompt: "a person", n: 2, seed: 7, num_inference_steps: 2 });
  const first = Buffer.from(made.data[0].b64_json, "base64");
  assert(first.subarray(1, 4).toString() === "PNG" && made.data.length === 2);
  // Sent in chunks, without a length.
  const image = await OpenAI.toFile(first, "me.png", { type: "image/png" });
  const edited = await client.images.edit({ image, prompt: "a hat", num_inference_steps: 4 });
  assert(Buffer.from(edited.data[0].b64_json, "base64").subarray(1, 4).toString() === "PNG");
  const types = [];
  for await (const event of await client.images.generate({ prompt: "x", stream: true, partial_images: 1, num_inference_steps: 40 })) types.push(event.type);
  assert.deepStrictEqual(types, ["image_generation.partial_image", "image_generation.completed"]);
  assert((await client.models.list()).data.some((model) => model.id === "flux-dev"));
  await assert.rejects(client.images.generate({ prompt: "x", n: 11 }), (error) => error.status === 400 && error.param === "n" && !!error.requestID);
  await assert.rejects(new OpenAI({ apiKey: "wrong", baseURL: process.env.BASE + "/v1" }).images.generate({ prompt: "x" }), /401/);
  console.log("all good");
})();
