// The page for people in Chromium: chat, the engine's picture, the key, keyboard, phones.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import chromium from "@sparticuz/chromium";
import { chromium as driver } from "playwright-core";
import { MODEL, TALE, main } from "./scenario.mjs";

const SIZE = { width: 1280, height: 800 };
const PHONE = { width: 390, height: 844 };
const LOUD = "--no-sandbox --host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1";

// A page that is ready, in a browser profile of its own. What breaks the policy, is logged as an error or
// asks another host fails the scenario, whatever else it saw.
async function visit(url, does, options = {}) {
  const context = await browser.newContext({ viewport: SIZE, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(30000);
  const wrongs = [];
  page.on("console", (said) => ["error", "warning"].includes(said.type()) && wrongs.push(said.text()));
  page.on("pageerror", (error) => wrongs.push(String(error)));
  page.on("request", (request) => request.url().startsWith(url) || wrongs.push(request.url()));
  try {
    await page.goto(`${url}/`);
    await does(page, wrongs);
    assert.deepEqual(wrongs, []);
  } finally {
    await context.close();
  }
}

const ready = (page) => page.waitForFunction((model) => document.getElementById("model").textContent === model, MODEL);
const text = (page, selector) => page.locator(selector).innerText();

async function say(page, words) {
  await page.locator("#composer textarea").fill(words);
  await page.keyboard.press("Enter");
}

const answered = (page, n_messages) =>
  page.waitForFunction((n) => document.querySelectorAll("#messages li").length === n &&
    document.getElementById("send").textContent === "Send", n_messages);

// The answer does not end by itself.
const never_ending = (page) =>
  page.route("**/v1/chat/completions", (route) => {
    const body = { ...route.request().postDataJSON(), ignore_eos: true };
    route.continue({ postData: JSON.stringify(body) });
  });

async function an_answer_streams_and_says_how_fast_it_came(url) {
  await visit(url, async (page) => {
    await ready(page);
    await never_ending(page);
    await page.evaluate(() => {
      window.lengths = new Set();
      const note = () => {
        const said = document.querySelector(".assistant .text")?.textContent;
        if (said) window.lengths.add(said.length);
      };
      const messages = document.getElementById("messages");
      new MutationObserver(note).observe(messages, { childList: true, subtree: true, characterData: true });
    });
    await say(page, TALE);
    await answered(page, 2);
    const n_pieces = await page.evaluate(() => window.lengths.size);
    assert.ok(n_pieces > 2, `it came in ${n_pieces} pieces`);
    assert.match(await text(page, ".assistant .note"), /^\d+ tokens · \d+ tokens\/s · first token after \d+ ms/);
  });
}

async function an_answer_can_be_stopped_and_the_engine_stops_with_it(url) {
  await visit(url, async (page) => {
    await ready(page);
    await never_ending(page);
    await say(page, TALE);
    await page.waitForSelector(".assistant .token");
    await page.keyboard.press("Escape");
    await answered(page, 2);
    assert.match(await text(page, ".assistant .note"), /^stopped/);
    await page.waitForFunction(() => document.getElementById("running").textContent === "0");
  });
}

async function tokens_are_coloured_and_tell_their_alternatives_to_pointer_and_keyboard(url) {
  await visit(url, async (page) => {
    await ready(page);
    await say(page, TALE);
    await answered(page, 2);
    const content = await text(page, ".assistant .text");
    assert.ok(await page.locator(".token .p0").count());
    assert.ok(await page.locator(".token .p1, .token .p2, .token .p3, .token .p4").count());
    await page.locator(".token").nth(3).hover();
    assert.ok((await page.locator("#tip div").count()) >= 5);
    assert.match(await text(page, "#tip"), /\d %/);
    await page.locator(".token[tabindex='0']").focus();
    for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) await page.keyboard.press(key);
    assert.equal(await page.evaluate(() => document.activeElement === document.querySelectorAll(".token")[1]), true);
    await page.keyboard.press("Escape");
    assert.equal(await page.locator("#tip").isVisible(), false);
    await page.locator("#colouring").uncheck();
    assert.equal(await page.locator(".token").count(), 0);
    assert.equal(await text(page, ".assistant .text"), content);
  });
}

async function conversations_survive_a_reload_and_can_be_deleted(url) {
  await visit(url, async (page) => {
    await ready(page);
    for (const words of ["Tell me about Anna.", "Tell me about Ben."]) {
      await page.click("#new");
      await say(page, words);
      await answered(page, 2);
    }
    await page.reload();
    const titles = () => page.locator("#conversations option").allInnerTexts();
    assert.deepEqual(await titles(), ["Tell me about Ben.", "Tell me about Anna."]);
    await page.selectOption("#conversations", { label: "Tell me about Anna." });
    assert.equal(await text(page, ".user .text"), "Tell me about Anna.");
    assert.ok(await page.locator(".token").count());
    await page.click("#delete");
    assert.deepEqual(await titles(), ["Tell me about Ben."]);
  });
}

async function settings_reach_the_server_and_stay(url) {
  await visit(url, async (page) => {
    await ready(page);
    await page.click("#show-settings");
    await page.getByLabel("Max tokens").fill("3");
    await page.getByLabel("Temperature").fill("0");
    await page.getByLabel("System prompt").fill("Be brief.");
    const asked = page.waitForRequest("**/v1/chat/completions");
    await say(page, TALE);
    const { max_tokens, temperature, messages } = (await asked).postDataJSON();
    assert.deepEqual([max_tokens, temperature, messages[0].content], [3, 0, "Be brief."]);
    await answered(page, 2);
    assert.match(await text(page, ".assistant .note"), /^3 tokens .* cut at the limit$/);
    await page.reload();
    assert.equal(await page.getByLabel("Max tokens", { includeHidden: true }).inputValue(), "3");
  });
}

async function what_the_server_refuses_is_shown_with_its_words_and_can_be_tried_again(url) {
  await visit(url, async (page, wrongs) => {
    await ready(page);
    await page.click("#show-settings");
    await page.getByLabel("Max tokens").fill("100000");
    await say(page, TALE);
    await answered(page, 2);
    assert.match(await text(page, ".note.error"), /context length/);
    await page.getByLabel("Max tokens").fill("4");
    await page.getByRole("button", { name: "Try again" }).click();
    await answered(page, 2);
    assert.equal(await page.locator(".error").count(), 0);
    const failed = wrongs.splice(0); // the browser notes each answer that is none
    assert.ok(failed.every((line) => line.includes("400")), failed.join());
  });
}

async function markup_that_a_model_writes_is_text(url) {
  await visit(url, async (page) => {
    await ready(page);
    const evil = '<img src=x onerror="document.title=1"><script>document.title=1</script>';
    const event = { choices: [{ index: 0, delta: { content: evil }, finish_reason: "stop" }] };
    await page.route("**/v1/chat/completions", (route) => route.fulfill({
      contentType: "text/event-stream", body: `data: ${JSON.stringify(event)}\n\ndata: [DONE]\n\n`,
    }));
    await say(page, evil);
    await answered(page, 2);
    assert.equal(await text(page, ".assistant .text"), evil);
    assert.equal(await page.locator("#messages img, #messages script").count(), 0);
    assert.equal(await page.title(), "fastgen_jax");
  });
}

async function a_load_moves_the_steps_and_fills_blocks(url) {
  await visit(url, async (page) => {
    await ready(page);
    const picture = () => page.evaluate(() => document.getElementById("bars").toDataURL());
    const before = await picture();
    await page.click("#load");
    await page.waitForFunction(() => Number(document.getElementById("running").textContent) > 4);
    await page.waitForFunction(() => /[1-9]\d* decodes/.test(document.getElementById("step").textContent));
    await page.waitForFunction(() => /\d/.test(document.getElementById("generated-rate").textContent));
    await page.waitForFunction(() => document.querySelector("#classes .held b").textContent !== "0");
    assert.notEqual(await picture(), before);
    assert.match(await text(page, "#itl"), /\d+(\.\d)? ms/);
    await page.click("#load");
    await page.waitForFunction(() => document.getElementById("running").textContent === "0");
  });
}

async function the_picture_can_be_held_and_read_by_keyboard(url) {
  await visit(url, async (page) => {
    await ready(page);
    await say(page, TALE);
    await answered(page, 2);
    await page.locator("#bars").focus();
    await page.keyboard.press("ArrowLeft");
    const one = await text(page, "#step");
    await page.keyboard.press("ArrowLeft");
    const number = (words) => Number(words.match(/^step ([\d,]+)/)[1].replaceAll(",", ""));
    assert.equal(number(await text(page, "#step")), number(one) - 1);
    assert.match(await page.locator("#bars").getAttribute("aria-label"), /of \d+ tokens/);
  });
}

async function everything_is_reached_by_keyboard_and_shows_its_focus(url) {
  await visit(url, async (page) => {
    await ready(page);
    await page.waitForFunction(() => document.querySelectorAll("#conversations option").length);
    const reached = [];
    for (let i = 0; i < 30; i++) {
      await page.keyboard.press("Tab");
      reached.push(await page.evaluate(() => {
        const { id, name, parentElement } = document.activeElement;
        const isSeen = getComputedStyle(document.activeElement).outlineStyle !== "none";
        return [id || name || parentElement?.id || "body", isSeen];
      }));
    }
    const names = reached.map(([name]) => name);
    for (const name of ["conversations", "new", "delete", "show-settings", "text", "send", "colouring", "bars", "pause", "linear", "load"]) {
      assert.ok(names.includes(name), `${name} is not reached: ${names}`);
    }
    assert.ok(names.includes("body") || names.indexOf("conversations", 2) > 0, "the focus is trapped");
    assert.deepEqual(reached.filter(([name, isSeen]) => name !== "body" && !isSeen), []);
  });
}

async function a_phone_needs_no_sideways_scrolling(url) {
  const overflow = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
  await visit(url, async (page) => {
    await ready(page);
    await page.click("#show-settings");
    await say(page, TALE);
    await answered(page, 2);
    assert.equal(await page.evaluate(overflow), 0);
    await page.click("[data-shows='engine']");
    assert.ok(await page.locator("#bars").isVisible());
    assert.equal(await page.locator("#composer").isVisible(), false);
    assert.equal(await page.evaluate(overflow), 0);
  }, { viewport: PHONE, isMobile: true, hasTouch: true });
}

async function dark_mode_is_dark_and_both_are_legible(url) {
  for (const colorScheme of ["light", "dark"]) {
    await visit(url, async (page) => {
      await ready(page);
      const [paper, ink, muted] = await page.evaluate(() => {
        const style = getComputedStyle(document.documentElement);
        const luminance = (name) => {
          const hex = style.getPropertyValue(name).trim().slice(1);
          const full = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
          const [r, g, b] = full.match(/../g).map((pair) => {
            const c = parseInt(pair, 16) / 255;
            return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        return ["--sheet", "--ink", "--muted"].map(luminance);
      });
      const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      assert.equal(paper < 0.1, colorScheme === "dark");
      assert.ok(contrast(paper, ink) > 7 && contrast(paper, muted) > 4.5);
    }, { colorScheme });
  }
}

// The engine's stream needs the key too, and tells of a server that still compiles.
const connected = (page) => page.waitForFunction(() => /ready|loading|compiling/.test(document.getElementById("health").textContent));

async function a_key_is_asked_for_once_and_kept_in_the_tab(url) {
  const keyed = await serve("--api-key", "secret");
  try {
    await visit(keyed.url, async (page, wrongs) => {
      for (const key of ["wrong", "secret"]) {
        await page.waitForSelector("#key-dialog[open]");
        await page.getByLabel("API key", { exact: true }).last().fill(key);
        await page.keyboard.press("Enter");
        if (key === "wrong") await page.waitForFunction(() => document.getElementById("key-problem").textContent);
      }
      await connected(page);
      await page.reload();
      await connected(page);
      assert.equal(await page.locator("#key-dialog").isVisible(), false);
      const kept = await page.evaluate(() => JSON.stringify(localStorage));
      assert.ok(!kept.includes("secret"), "the key outlives the tab");
      const refused = wrongs.splice(0).filter((line) => !/50[03]/.test(line)); // it may still load
      assert.ok(refused.every((line) => line.includes("401")), refused.join());
    });
  } finally {
    keyed.stop();
  }
}

// Another server, small and with further flags.
async function serve(...flags) {
  const small = ["--port", "0", "--max-model-len", "512", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"];
  const child = spawn(process.env.PYTHON, ["-m", "fastgen_jax.serve", ...small, ...flags]);
  let said = "";
  const url = await new Promise((resolve, reject) => {
    for (const pipe of [child.stdout, child.stderr]) {
      pipe.on("data", (data) => {
        said += data;
        const found = said.match(/listen +(http:\/\/\S+)/);
        if (found) resolve(found[1]);
      });
    }
    child.on("exit", () => reject(new Error(`the server did not start: ${said}`)));
  });
  return { url, stop: () => child.kill() };
}

const browser = await driver.launch({ executablePath: await chromium.executablePath(), args: LOUD.split(/ (?=--)/) });
await main([
  an_answer_streams_and_says_how_fast_it_came,
  an_answer_can_be_stopped_and_the_engine_stops_with_it,
  tokens_are_coloured_and_tell_their_alternatives_to_pointer_and_keyboard,
  conversations_survive_a_reload_and_can_be_deleted,
  settings_reach_the_server_and_stay,
  what_the_server_refuses_is_shown_with_its_words_and_can_be_tried_again,
  markup_that_a_model_writes_is_text,
  a_load_moves_the_steps_and_fills_blocks,
  the_picture_can_be_held_and_read_by_keyboard,
  everything_is_reached_by_keyboard_and_shows_its_focus,
  a_phone_needs_no_sideways_scrolling,
  dark_mode_is_dark_and_both_are_legible,
  a_key_is_asked_for_once_and_kept_in_the_tab,
]);
await browser.close();
