// From a token's number to its colour, and a legend for it.

/** Return the colours that CSS properties of the page stand for in the present theme, for canvases. */
function palette() {
  const probe = document.createElement("span");
  document.body.append(probe);
  const names = ["raised", "ink", "faint", "line", "focus", "positive", "negative"];
  const colours = Object.fromEntries(names.map((name) => {
    probe.style.color = `var(--${name})`;
    return [name, getComputedStyle(probe).color];
  }));
  probe.remove();
  return colours;
}

const mixed = (name, share) => `color-mix(in srgb, var(--${name}) ${Math.round(share * 100)}%, transparent)`;
const STRONGEST = 0.5; // text on it keeps a contrast of 4.5 in both themes
const BOUNDS = { low: "negative", high: "positive", dual: "third" };

class Colouring {
  constructor(limits) {
    Object.assign(this, { limits, column: COLUMNS[0] });
  }

  choose(key) {
    this.column = COLUMNS.find((column) => column.key === key);
  }

  colour({ numbers }, token) {
    const number = numbers[this.column.key]?.[token];
    return number === undefined || Number.isNaN(number) ? "" : this.#of(number);
  }

  words({ numbers }, token) {
    const { key, label } = this.column;
    return `${label} ${shown(key, numbers[key]?.[token])}`;
  }

  #of(number) {
    const { key, scale, sign } = this.column;
    if (scale === "names") return number > 0 ? mixed(BOUNDS[data.clipped_by[number]], STRONGEST) : "";
    const share = (scale === "ratio" ? Math.log(number) : number) / this.limits[key];
    if (scale === "sequential") return mixed("positive", STRONGEST * Math.min(1, Math.max(0, sign * share)));
    return mixed(share < 0 ? "negative" : "positive", STRONGEST * Math.min(1, Math.abs(share)));
  }

  /** Draw the legend: a swatch and its number for each end of the scale. */
  legend(box) {
    const { key, scale, sign, about } = this.column;
    const limit = this.limits[key];
    const ends = {
      names: () => [1, 2, 3].map((bound) => [bound, data.clipped_by[bound]]),
      sequential: () => [0, sign * limit / 2, sign * limit].map((number) => [number, number.toFixed(2)]),
      ratio: () => [-limit, 0, limit].map((log) => [Math.exp(log), Math.exp(log).toFixed(3)]),
      diverging: () => [-limit, 0, limit].map((number) => [number, number.toFixed(limit < 0.1 ? 5 : 2)]),
    }[scale]();
    box.replaceChildren(...ends.flatMap(([number, text]) => {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.backgroundColor = this.#of(number);
      return [swatch, element("span", text)];
    }), element("span", about ? `(${about})` : ""));
  }
}
