// The official client for node.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { HISTORY, KEY, MODEL, TALE, main } from "./scenario.mjs";

const Weather = z.object({ city: z.enum(["Paris", "Oslo"]), days: z.number().int() });
const TOOL = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { days: { type: "integer", minimum: 1, maximum: 9 } }, required: ["days"] },
  },
};
const client = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY, maxRetries: 0 });

async function lists_models(url) {
  const ids = [];
  for await (const model of client(url).models.list()) ids.push(model.id);
  assert.deepEqual(ids, [MODEL]);
}

async function chats(url) {
  const answer = await client(url).chat.completions.create({
    model: MODEL, messages: HISTORY, max_tokens: 12,
  });
  assert.ok(answer.choices[0].message.content);
  assert.equal(answer.usage.completion_tokens, 12);
}

async function streams(url) {
  const parts = [];
  const stream = await client(url).chat.completions.create({
    model: MODEL, messages: HISTORY, max_tokens: 24, stream: true,
  });
  for await (const chunk of stream) parts.push(chunk.choices[0].delta.content ?? "");
  assert.ok(parts.length > 1);
}

async function leaves_in_the_middle(url) {
  const stream = await client(url).chat.completions.create({
    model: MODEL, messages: HISTORY, max_tokens: 1000, stream: true,
  });
  for await (const chunk of stream) break;
  stream.controller.abort();
}

async function gets_its_exceptions(url) {
  const asked = client(url).chat.completions.create({ model: "another", messages: HISTORY });
  await assert.rejects(asked, OpenAI.NotFoundError);
}

async function must_call_a_tool(url) {
  const answer = await client(url).chat.completions.create({
    model: MODEL, messages: HISTORY, tools: [TOOL], tool_choice: "required", parallel_tool_calls: false,
  });
  const [call] = answer.choices[0].message.tool_calls;
  assert.ok(Number.isInteger(JSON.parse(call.function.arguments).days));
}

async function parses_a_structured_answer(url) {
  const answer = await client(url).chat.completions.parse({
    model: MODEL, messages: HISTORY, response_format: zodResponseFormat(Weather, "weather"),
  });
  Weather.parse(answer.choices[0].message.parsed);
}

async function responds(url) {
  const answer = await client(url).responses.create({
    model: MODEL, input: TALE, max_output_tokens: 16,
  });
  assert.ok(answer.output_text);
  const kinds = new Set();
  const stream = await client(url).responses.create({
    model: MODEL, input: TALE, max_output_tokens: 16, stream: true,
  });
  for await (const event of stream) kinds.add(event.type);
  assert.ok(kinds.has("response.created") && kinds.has("response.output_text.delta"));
}

async function embeds(url) {
  const answer = await client(url).embeddings.create({ model: MODEL, input: ["Tom", "Anna"] });
  const norm = answer.data[1].embedding.reduce((sum, x) => sum + x * x, 0);
  assert.ok(Math.abs(norm - 1) < 1e-3, `norm ${norm}`);
}

await main([
  lists_models,
  chats,
  streams,
  leaves_in_the_middle,
  gets_its_exceptions,
  must_call_a_tool,
  parses_a_structured_answer,
  responds,
  embeds,
]);
