// Texts to token ids, as onnxpress/runtime/tokenization.py makes them, and the model's outputs to answers.

// The library's tokenizer, mended where its normalizer is known to differ from Python's: JavaScript lowers a Σ at the end of a word
// to ς, and Chinese characters are padded with spaces by UTF-16 units, which leaves out those beyond 16 bits.
export function openTokenizer(Tokenizer, json) {
  const tokenizer = new Tokenizer(json, {}); // Python's does not read tokenizer_config.json either
  const normalize = tokenizer.normalizer;
  if (!normalize) return tokenizer;
  const lowers = normalize("Σ") !== "Σ";
  const pads = normalize("中") === " 中 ";
  tokenizer.normalizer = (text) => {
    const sigma = lowers ? text.replaceAll("Σ", "σ") : text;
    return normalize(pads ? sigma.replace(WIDE_CHINESE, " $& ") : sigma);
  };
  return tokenizer;
}

// As in the tokenizers library's BertNormalizer.
const WIDE_CHINESE = /[\u{20000}-\u{2A6DF}\u{2A700}-\u{2B73F}\u{2B740}-\u{2B81F}\u{2B920}-\u{2CEAF}\u{2F800}-\u{2FA1F}]/gu;

// {ids, types, truncated}: one text, cut to maxLength tokens, of which the special ones stay. Throws an Error in plain words.
export function encode(tokenizer, text, maxLength) {
  if (!text.trim()) throw new Error("The text is empty; there is nothing to answer.");
  if (text.isWellFormed?.() === false) throw new Error("The text holds half a character (a lone surrogate).");
  const { ids, token_type_ids: types = ids.map(() => 0) } = tokenizer.encode(text, { return_token_type_ids: true });
  if (ids.length === 0) throw new Error("The text has no tokens: the model's vocabulary holds none of its characters.");
  const excess = ids.length - maxLength;
  if (excess <= 0) return { ids, types, truncated: 0 };
  const bare = tokenizer.encode(text, { add_special_tokens: false }).ids;
  const before = ids.findIndex((_, start) => bare.every((id, index) => ids[start + index] === id));
  const end = before + bare.length; // what is cut off lies before it, and after what is kept
  return {
    ids: [...ids.slice(0, end - excess), ...ids.slice(end)],
    types: [...types.slice(0, end - excess), ...types.slice(end)],
    truncated: excess,
  };
}

// The first of the samples [{text, ids, type_ids}] whose tokens are others here than in Python, or undefined.
export function otherTokens(tokenizer, samples, maxLength) {
  return samples.find(({ text, ids, type_ids: types }) => {
    const here = encode(tokenizer, text, maxLength);
    return String(here.ids) !== String(ids) || String(here.types) !== String(types);
  });
}

// The vector of a text: as the model pools, or the mean over its tokens.
export function embedding(outputs, { pooled }) {
  if (pooled) return Array.from(outputs.embeddings.data);
  const [, length, width] = outputs.last_hidden_state.dims;
  const sums = new Array(width).fill(0);
  outputs.last_hidden_state.data.forEach((value, index) => (sums[index % width] += value));
  return sums.map((sum) => sum / length);
}

export function cosine(one, other) {
  const dot = (left, right) => left.reduce((sum, value, index) => sum + value * right[index], 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
}

// [[label, score]]: softmax for one label a text, a sigmoid each for several, and for a reranker's; a regression's numbers as they are.
export function scores(outputs, { labels, problem_type: kind, activation }) {
  const logits = Array.from(outputs.logits.data);
  const score = activation === "sigmoid" ? SCORES.multi_label_classification : SCORES[kind];
  return labels.map((label, index) => [label, score(logits, index)]);
}

const SCORES = {
  regression: (logits, index) => logits[index],
  multi_label_classification: (logits, index) => 1 / (1 + Math.exp(-logits[index])),
  single_label_classification: (logits, index) =>
    1 / logits.reduce((sum, logit) => sum + Math.exp(logit - logits[index]), 0),
};
