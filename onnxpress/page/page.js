// The page: checks the bundle, then answers what is typed. Nothing is answered by a bundle that did not pass.

import { BundleError, fetchBundle, parse } from "./bundle.js";
import { checkCase, goldenCases } from "./golden.js";
import { cosine, embedding, encode, openTokenizer, otherTokens, scores } from "./text.js";

const element = (id) => document.getElementById(id);
const memories = keepMemories();

main();

async function main() {
  tell("Fetching bundle.json");
  element("judgement").textContent = "Checking …";
  let good = true;
  const add = (what, found, well = true) => {
    addLine(what, found, well);
    good &&= well;
  };
  let model;
  try {
    model = await check(add);
  } catch (error) {
    add("failed", error instanceof BundleError ? error.message : `${error?.name ?? "Error"}: ${error?.message ?? error}`, false);
  }
  judge(good);
  if (good) offer(model);
}

// Adds the lines of the check; returns what answers. Throws where it cannot go on.
async function check(add) {
  const { description, files } = await fetchBundle(tell);
  const file = (name) => files.get(`${description.artifact}/${name}`);
  introduce(description);
  add("bundle", `${description.name} for ${description.target}: ${description.task}, ${description.precision}`);
  add("files", `${files.size} have the digests of bundle.json`);
  add("browser", navigator.userAgent);

  tell("Opening the model");
  const manifest = parse(file("manifest.json"));
  const ort = await import("./vendor/onnxruntime-web.js");
  ort.env.wasm.wasmBinary = files.get("vendor/ort-wasm-simd-threaded.wasm"); // the bytes that were compared
  const weights = file("model.onnx.data");
  const started = performance.now();
  const session = await ort.InferenceSession.create(new Uint8Array(file("model.onnx")), {
    executionProviders: ["wasm"],
    externalData: weights ? [{ path: "model.onnx.data", data: new Uint8Array(weights) }] : [],
    extra: { optimization: { disable_specified_optimizers: (manifest.session.disabled_optimizers ?? []).join(";") } },
  });
  const opened = performance.now() - started;
  const threads = ort.env.wasm.numThreads === 1 ? "1 thread" : `${ort.env.wasm.numThreads} threads`;
  add("runtime", `ONNX Runtime ${ort.env.versions.web}, WebAssembly, ${threads}; the model opened in ${opened.toFixed(0)} ms`);

  const makeTensor = (type, data, shape) => new ort.Tensor(type, data, shape);
  const run = (feeds) => session.run(feeds);
  for (const golden of goldenCases(file("golden.safetensors"))) {
    tell(`Running golden ${golden.name}`);
    await painted();
    for (const { what, found, good } of await checkCase(golden, run, manifest.options, makeTensor)) {
      add(what, found, good);
    }
  }
  const model = { manifest, run, makeTensor };
  if (files.has("texts.json")) {
    const { Tokenizer } = await import("./vendor/tokenizers.js");
    model.tokenizer = openTokenizer(Tokenizer, parse(file("tokenizer.json")));
    const texts = parse(files.get("texts.json"));
    const other = otherTokens(model.tokenizer, texts, manifest.options.max_length);
    if (other) add("tokens", `other ones than in Python for the text ${JSON.stringify(other.text)}`, false);
    else add("tokens", `those of Python for ${texts.length} texts in many scripts`);
  }
  const megabytes = memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0) / 1e6;
  files.clear(); // what has been opened has copies of its own
  add("memory", `${megabytes.toFixed(0)} MB of WebAssembly at most, beside the page's own`);
  return model;
}

// WebAssembly's memory only grows, so that its size is its peak; ONNX Runtime makes it, and does not show it.
function keepMemories() {
  const made = [];
  const Memory = WebAssembly.Memory;
  WebAssembly.Memory = function (options) {
    const memory = new Memory(options);
    made.push(memory);
    return memory;
  };
  WebAssembly.Memory.prototype = Memory.prototype;
  return made;
}

const TRIES = {
  "feature-extraction": { button: "Embed", answer: answerEmbeddings },
  "text-classification": { button: "Classify", answer: answerClassification },
};

// Lets people type, where the task is one that answers on this page.
function offer(model) {
  const { task } = model.manifest.signature;
  if (!model.tokenizer) {
    element("silent").textContent =
      task === "module"
        ? "This model takes arrays, not text: the check below is all that this page does."
        : `Answers to ${task} are not shown on this page: the check below is all that it does.`;
    element("silent").hidden = false;
    return;
  }
  const { button, answer } = TRIES[task];
  element("answer").textContent = button;
  element("second").hidden = task !== "feature-extraction";
  element("try").hidden = false;
  element("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    element("answer").disabled = true;
    try {
      element("answers").replaceChildren(...(await answer(model)));
    } catch (error) {
      element("answers").replaceChildren(make("p", "wrong", error.message));
    }
    element("answer").disabled = false;
  });
}

async function answerEmbeddings(model) {
  const texts = [element("text").value, element("other").value].filter((text, index) => index === 0 || text.trim());
  const vectors = [];
  const shown = [];
  for (const text of texts) {
    const { outputs, note } = await runText(model, text);
    const vector = embedding(outputs, model.manifest.options);
    vectors.push(vector);
    const numbers = vector.slice(0, 8).map((number) => number.toFixed(6));
    const more = vector.length > numbers.length ? ",\u00a0…" : "";
    shown.push(make("p", "numbers", numbers.join(", ") + more), make("p", "aside", `${vector.length} numbers; ${note}`));
  }
  if (vectors.length === 2) shown.unshift(make("p", "similarity", `cosine similarity ${cosine(...vectors).toFixed(4)}`));
  return shown;
}

async function answerClassification(model) {
  const { outputs, note } = await runText(model, element("text").value);
  const { options } = model.manifest;
  const list = make("dl", "bars");
  for (const [label, score] of scores(outputs, options).sort((one, other) => other[1] - one[1])) {
    const value = make("dd", "", score.toFixed(4));
    if (options.problem_type !== "regression") {
      const bar = make("span", "bar");
      bar.style.width = `${100 * score}%`;
      value.prepend(bar);
    }
    list.append(make("dt", "", label), value);
  }
  return [list, make("p", "aside", note)];
}

// One text through the model: its outputs, and a note of tokens and time.
async function runText({ manifest, run, makeTensor, tokenizer }, text) {
  const { max_length: limit, prompts = {}, default_prompt: prompt } = manifest.options;
  const { ids, types, truncated } = encode(tokenizer, (prompts[prompt] ?? "") + text, limit);
  const made = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: types };
  const feeds = {};
  for (const { name } of manifest.signature.inputs) {
    feeds[name] = makeTensor("int64", BigInt64Array.from(made[name], BigInt), [1, ids.length]);
  }
  const started = performance.now();
  const outputs = await run(feeds);
  const took = `${ids.length} tokens, ${(performance.now() - started).toFixed(1)} ms`;
  return { outputs, note: truncated ? `${took}; the text was too long, and lost ${truncated} tokens` : took };
}

function introduce({ name, task, precision, made_with: maker }) {
  document.title = `${name} in the browser`;
  element("name").textContent = name;
  element("about").textContent = `${task}, ${precision}. It runs on this machine; nothing you type leaves it.`;
  element("made").textContent = `Made with ${maker}.`;
}

function addLine(what, found, good) {
  const row = make("tr", good ? "good" : "bad");
  row.append(make("td", "mark", good ? "ok" : "BAD"), make("th", "", what), make("td", "found", found));
  row.querySelector("th").scope = "row";
  element("lines").append(row);
}

function judge(good) {
  element("verdict").className = good ? "good" : "bad";
  element("judgement").textContent = good ? "good" : "NOT GOOD";
  tell(
    good
      ? "Every file is whole, and the model answers here as it did when it was built."
      : "Do not rely on this bundle here; the check says why.",
  );
}

function tell(text) {
  element("progress").textContent = text;
}

function make(kind, className, text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

// Resolves when what was told can be seen; running a model blocks the page.
function painted() {
  return new Promise((resolve) => setTimeout(resolve, 20));
}
