// Vercel's AI SDK, by its provider for compatible servers, and by OpenAI's for Responses.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { KEY, MODEL, TALE, main } from "./scenario.mjs";

const Weather = z.object({ city: z.enum(["Paris", "Oslo"]), days: z.number().int().max(9) });
const weather = tool({
  description: "The weather.",
  inputSchema: Weather,
  execute: async ({ days }) => `Snow for ${days} days.`,
});
// One call: a toy does not know when to stop.
const one = { providerOptions: { fastgen: { parallel_tool_calls: false } } };
const limits = { maxOutputTokens: 200, maxRetries: 0 };

function provider(url) {
  const settings = { name: "fastgen", baseURL: `${url}/v1`, apiKey: KEY };
  return createOpenAICompatible({ ...settings, supportsStructuredOutputs: true });
}

async function generates_text(url) {
  const answer = await generateText({ ...limits, model: provider(url)(MODEL), prompt: TALE });
  assert.ok(answer.text);
  assert.deepEqual(answer.warnings ?? [], []);
}

async function streams_text(url) {
  const parts = [];
  const answer = streamText({ ...limits, model: provider(url)(MODEL), prompt: TALE });
  for await (const part of answer.textStream) parts.push(part);
  assert.ok(parts.length > 1);
  assert.ok(["stop", "length"].includes(await answer.finishReason));
}

async function generates_an_object(url) {
  const model = provider(url)(MODEL);
  const answer = await generateObject({ ...limits, model, schema: Weather, prompt: TALE });
  Weather.parse(answer.object);
}

async function streams_an_object(url) {
  const model = provider(url)(MODEL);
  const answer = streamObject({ ...limits, model, schema: Weather, prompt: TALE });
  for await (const part of answer.partialObjectStream) assert.ok(part);
  Weather.parse(await answer.object);
}

async function calls_a_tool(url) {
  const asked = { ...limits, ...one, model: provider(url)(MODEL), prompt: TALE, tools: { weather } };
  const answer = await generateText({ ...asked, toolChoice: "required" });
  assert.match(answer.toolResults[0].output, /^Snow for \d+ days/);
}

async function streams_the_call_of_a_tool(url) {
  const asked = { ...limits, ...one, model: provider(url)(MODEL), prompt: TALE, tools: { weather } };
  const answer = streamText({ ...asked, toolChoice: { type: "tool", toolName: "weather" } });
  const kinds = new Set();
  for await (const part of answer.fullStream) kinds.add(part.type);
  assert.ok(kinds.has("tool-call") && kinds.has("tool-result"), [...kinds].join());
}

async function responds(url) {
  const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY }).responses(MODEL);
  assert.ok((await generateText({ ...limits, model, prompt: TALE })).text);
  const answer = await generateObject({ ...limits, model, schema: Weather, prompt: TALE });
  Weather.parse(answer.object);
}

async function embeds(url) {
  const model = provider(url).textEmbeddingModel(MODEL);
  const { embeddings } = await embedMany({ model, values: ["Tom", "Anna"], maxRetries: 0 });
  assert.equal(embeddings.length, 2);
}

await main([
  generates_text,
  streams_text,
  generates_an_object,
  streams_an_object,
  calls_a_tool,
  streams_the_call_of_a_tool,
  responds,
  embeds,
]);
