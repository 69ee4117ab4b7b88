// A web page in Chromium that asks a server of another origin (CORS).
import assert from "node:assert/strict";
import chromium from "@sparticuz/chromium";
import { chromium as driver } from "playwright-core";
import { HISTORY, MODEL, main } from "./scenario.mjs";

const ALLOWED = "http://localhost:3000"; // as the server is started, see server.py
const FOREIGN = "http://localhost:3001";

// What a page of that origin gets from a function that runs in it. No server answers for the page itself.
async function visit(origin, asks, ...given) {
  const page = await user.newPage();
  try {
    await page.route(`${origin}/`, (route) =>
      route.fulfill({ contentType: "text/html", body: "<title>page</title>" }));
    await page.goto(`${origin}/`);
    return await page.evaluate(asks, given);
  } finally {
    await page.close();
  }
}

async function chat([url, body]) {
  const answer = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: "Bearer any" },
    body: JSON.stringify(body),
  });
  return { status: answer.status, id: answer.headers.get("x-request-id"), text: await answer.text() };
}

async function a_page_of_an_allowed_origin_streams_a_chat(url) {
  const asked = { model: MODEL, messages: HISTORY, max_tokens: 16, stream: true };
  const answer = await visit(ALLOWED, chat, url, asked);
  assert.equal(answer.status, 200);
  assert.ok(answer.text.endsWith("data: [DONE]\n\n"), answer.text.slice(-80));
}

async function it_can_read_why_it_was_refused(url) {
  const answer = await visit(ALLOWED, chat, url, { model: "another", messages: HISTORY });
  assert.equal(answer.status, 404);
  assert.ok(JSON.parse(answer.text).error.message);
  assert.ok(answer.id, "x-request-id is not exposed");
}

async function it_lists_models(url) {
  const ask = async ([url]) => (await (await fetch(`${url}/v1/models`)).json()).data[0].id;
  assert.equal(await visit(ALLOWED, ask, url), MODEL);
}

async function a_page_of_another_origin_gets_nothing(url) {
  const asked = { model: MODEL, messages: HISTORY, max_tokens: 4 };
  await assert.rejects(visit(FOREIGN, chat, url, asked), /Failed to fetch/);
}

const browser = await driver.launch({
  executablePath: await chromium.executablePath(),
  args: ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
});
// Chromium asks its user whether a page may turn to this machine at all.
const user = await browser.newContext({ permissions: ["local-network-access"] });
await main([
  a_page_of_an_allowed_origin_streams_a_chat,
  it_can_read_why_it_was_refused,
  it_lists_models,
  a_page_of_another_origin_gets_nothing,
]);
await browser.close();
