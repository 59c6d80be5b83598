// The page's data: what a run stored, as numbers and text. Nothing of it is ever parsed as HTML.

/** Return the float32 numbers that Python wrote as base64 of little-endian bytes. */
function floats(base64) {
  return new Float32Array(Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer);
}

/** The numbers of a token: key in the data, label, unit, and how a colour follows from the number. */
const COLUMNS = [
  { key: "value", label: "value", scale: "diverging", about: "the critic's estimate of the reward" },
  { key: "change", label: "change of value", scale: "diverging", about: "once the token is written" },
  { key: "advantage", label: "advantage", scale: "diverging" },
  { key: "return", label: "return", scale: "diverging", about: "the critic's target" },
  { key: "logprob", label: "log-prob, actor", scale: "sequential", sign: -1, about: "nats" },
  { key: "rollout_logprob", label: "log-prob, engine", scale: "sequential", sign: -1, about: "nats" },
  { key: "difference", label: "actor - engine", scale: "diverging", about: "nats" },
  { key: "entropy", label: "entropy", scale: "sequential", sign: 1, about: "nats" },
  { key: "ratio", label: "ratio in update", scale: "ratio" },
  { key: "clipped", label: "clipped in update", scale: "names" },
];

function difference(one, other) {
  return one && other && one.map((number, index) => number - other[index]);
}

/** Return all responses of a step, each with its tokens' numbers as views into those of the step. */
function responsesOf(step, order) {
  const tensors = Object.fromEntries(Object.entries(step.tensors).map(([key, text]) => [key, floats(text)]));
  tensors.difference = difference(tensors.logprob, tensors.rollout_logprob);
  let start = 0;
  return step.rows.map((row, index) => {
    const end = start + row.tokens.length;
    const parts = Object.entries(tensors).map(([key, numbers]) => [key, numbers?.subarray(start, end)]);
    start = end;
    const numbers = Object.fromEntries(parts.filter(([, part]) => part));
    const { trained } = numbers;
    for (const { key } of trained ? COLUMNS : []) {
      numbers[key] = numbers[key]?.map((number, token) => (trained[token] ? number : NaN));
    }
    if (numbers.value) numbers.change = changesOf(numbers.value);
    const drops = dropsOf(numbers.change ?? []);
    return {
      ...row, step, index, order: order + index, numbers, drops, length: row.tokens.length,
      drop: drops.length ? drops[0].size : 0, text: row.tokens.join(""), right: row.outcome > 0,
      clippedTokens: (numbers.clipped ?? []).reduce((sum, bound) => sum + (bound > 0), 0),
    };
  });
}

/** Return by how much each token changes the value, which is that before the token, until the next one that has a value;
 *  NaN for the last. */
function changesOf(values) {
  const changes = new Float32Array(values.length);
  let next = NaN;
  for (let token = values.length - 1; token >= 0; token--) {
    changes[token] = next - values[token];
    if (!Number.isNaN(values[token])) next = values[token];
  }
  return changes;
}

/** Return the tokens that the value falls by, the largest fall first, at most 50 of them. */
function dropsOf(changes) {
  const drops = Array.from(changes, (change, token) => ({ token, size: -change })).filter(({ size }) => size > 0);
  return drops.sort((a, b) => b.size - a.size).slice(0, 50);
}

function quantile(numbers, share) {
  const sorted = Float64Array.from(numbers).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

/** Return the number at which each column's colour is full: the 99th percentile over the page, from a sample of it. */
function limitsOf(responses) {
  const stride = Math.ceil(responses.reduce((sum, { length }) => sum + length, 0) / 20000);
  const limits = {};
  for (const { key, scale } of COLUMNS) {
    const sizes = [];
    let token = 0;
    for (const { numbers } of responses) {
      for (const number of numbers[key] ?? []) {
        if (token++ % stride === 0) sizes.push(Math.abs(scale === "ratio" ? Math.log(number) : number));
      }
    }
    limits[key] = Math.max(quantile(sizes.filter(Number.isFinite), 0.99), 1e-6);
  }
  // Values estimate rewards: a critic that hardly differs from token to token shall look so.
  limits.value = limits.return = responses.reduce((most, { reward }) => Math.max(most, Math.abs(reward)), 1);
  return limits;
}

const stepName = ({ kind, step }) => (kind === "pretrain" ? `pretraining ${step}` : `${step}`);
const signed = (number) => (number > 0 ? "+" : "") + number.toFixed(2);

/** Return a number with as many digits as say something; "-" where there is none. */
function shown(key, number) {
  if (number === undefined || Number.isNaN(number)) return "-";
  if (key === "clipped") return data.clipped_by[number] === "nothing" ? "no" : data.clipped_by[number];
  return Number.isFinite(number) ? number.toFixed(Math.abs(number) < 0.01 && number !== 0 ? 6 : 4) : String(number);
}

/** Return text in which every character can be seen: controls and marks that would change the direction of others. */
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x20) return code === 10 ? "↵" : String.fromCodePoint(0x2400 + code);
    return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

const data = JSON.parse(document.getElementById("data").textContent);
