// Golden inputs and outputs: reads them, compares, times.
// safetensors: 8 bytes little-endian length of the header, the header as JSON ({name: {dtype, shape, data_offsets}}), raw data.

import { BundleError, parse } from "./bundle.js";

const TYPES = {
  F64: ["float64", Float64Array],
  F32: ["float32", Float32Array],
  F16: ["float16", globalThis.Float16Array],
  I64: ["int64", BigInt64Array],
  I32: ["int32", Int32Array],
  I16: ["int16", Int16Array],
  I8: ["int8", Int8Array],
  U64: ["uint64", BigUint64Array],
  U32: ["uint32", Uint32Array],
  U16: ["uint16", Uint16Array],
  U8: ["uint8", Uint8Array],
  BOOL: ["bool", Uint8Array],
};
const TIMED_MS = 1000;
const TIMED_CALLS = 50;

// [{name, input: {name: {type, shape, data}}, output: {…}}] in the order of their names.
export function goldenCases(content) {
  const start = 8 + Number(new DataView(content).getBigUint64(0, true));
  const cases = new Map();
  for (const [key, { dtype, shape, data_offsets: offsets }] of Object.entries(parse(content.slice(8, start)))) {
    if (key === "__metadata__") continue;
    const [, kind, name, tensor] = /^(input|output)\.([^.]*)\.(.+)$/s.exec(key);
    const [type, TypedArray] = TYPES[dtype] ?? [];
    if (!TypedArray) throw new BundleError(`Golden ${key} is of the type ${dtype}, which this browser has not.`);
    const data = new TypedArray(content.slice(start + offsets[0], start + offsets[1]));
    if (!cases.has(name)) cases.set(name, { name, input: {}, output: {} });
    cases.get(name)[kind][tensor] = { type, shape, data };
  }
  return [...cases.values()].sort((one, other) => (one.name < other.name ? -1 : 1));
}

// Rows of {what, found, good} for one case; run takes and gives {name: tensor}.
export async function checkCase(golden, run, { golden_tolerance: tolerances, golden_size: sizes = {} }, makeTensor) {
  const feeds = {};
  for (const [name, { type, data, shape }] of Object.entries(golden.input)) feeds[name] = makeTensor(type, data, shape);
  const found = await run(feeds);
  const rows = Object.entries(golden.output).map(([name, expected]) => {
    const allowed = tolerances[name] ?? NaN; // nothing is within NaN
    const far = difference(found[name], expected, sizes[name] ?? Infinity);
    return {
      what: `golden ${golden.name}`,
      found: `${name}: difference ${far.toPrecision(3)} (allowed ${allowed})`,
      good: far <= allowed,
    };
  });
  const milliseconds = await median(() => run(feeds));
  const shape = Object.values(golden.input)[0].shape.join(" × ");
  rows.push({ what: `latency ${golden.name}`, found: `${milliseconds.toFixed(1)} ms a call, inputs of ${shape}`, good: true });
  return rows;
}

const MASKED = 500;

// The largest of floats; of other numbers the share that is not equal.
// What is expected to be larger than size (a mask, -1e9) may differ by as large a share of itself as a number of this size. An expected infinity is a masked answer, for which any of its sign from MASKED on will do.
// Infinite where the shapes differ, NaN where either has one.
function difference(found, expected, size) {
  if (!found || String(found.dims) !== String(expected.shape)) return Infinity;
  let largest = 0;
  let others = 0;
  for (let index = 0; index < expected.data.length; index += 1) {
    if (found.data[index] === expected.data[index]) continue;
    const infinite = expected.type.startsWith("float") && Math.abs(expected.data[index]) === Infinity;
    if (infinite && found.data[index] * Math.sign(expected.data[index]) >= MASKED) continue;
    others += 1;
    const wanted = Math.abs(Number(expected.data[index]));
    const share = wanted > size && wanted !== Infinity ? size / wanted : 1;
    const here = Math.abs(Number(found.data[index]) - Number(expected.data[index])) * share;
    if (Number.isNaN(here)) return NaN;
    largest = Math.max(largest, here);
  }
  return expected.type.startsWith("float") || others === 0 ? largest : others / expected.data.length;
}

async function median(call) {
  const durations = [];
  const end = performance.now() + TIMED_MS;
  while (durations.length === 0 || (performance.now() < end && durations.length < TIMED_CALLS)) {
    const start = performance.now();
    await call();
    durations.push(performance.now() - start);
  }
  durations.sort((one, other) => one - other);
  return durations[Math.floor(durations.length / 2)];
}
