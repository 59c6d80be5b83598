// Value and advantage along a response, as two charts above each other.

const LABEL = 14; // pixels above each chart

class Strip {
  constructor(canvas, limits, onSelect) {
    Object.assign(this, { canvas, limits, selected: 0, inSight: [0, 0], still: document.createElement("canvas") });
    const select = (event) => event.buttons && this.response && onSelect(this.#tokenAt(event.offsetX));
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      select(event);
    });
    canvas.addEventListener("pointermove", select);
    new ResizeObserver(() => this.redraw()).observe(canvas);
  }

  show(response) {
    this.response = response;
    const { value, advantage } = response.numbers;
    const [first, last] = ["find", "findLast"].map((end) => (numbers) =>
      numbers[end]((number) => !Number.isNaN(number)).toFixed(2));
    const fall = response.drops[0];
    this.canvas.setAttribute("aria-label", [
      value ? `Value from ${first(value)} to ${last(value)}` : "No values",
      fall ? `largest drop ${fall.size.toFixed(2)} at token ${fall.token + 1}` : "",
      advantage ? `advantage from ${first(advantage)} to ${last(advantage)}` : "",
    ].filter(Boolean).join(", "));
    this.redraw();
  }

  mark(token, inSight) {
    Object.assign(this, { selected: token, inSight });
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.#draw();
    });
  }

  /** Draw all anew: response, size or theme has changed. */
  redraw() {
    const { canvas, response, limits, still } = this;
    const { clientWidth: width, clientHeight: height } = canvas;
    if (!response || !width) return;
    this.colours = palette();
    for (const each of [canvas, still]) {
      each.width = width * devicePixelRatio;
      each.height = height * devicePixelRatio;
    }
    const context = still.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    context.font = "10px system-ui, sans-serif";
    const { value, advantage, return: target } = response.numbers;
    const upper = { top: LABEL, height: height * 0.58 - LABEL };
    const lower = { top: height * 0.6 + LABEL, height: height * 0.4 - LABEL - 3 };
    context.fillStyle = this.colours.raised;
    context.fillRect(0, 0, width, height);
    this.#zero(context, upper, width);
    this.#zero(context, lower, width);
    if (target) this.#line(context, upper, target, limits.return, "faint", [4, 3]);
    if (value) this.#line(context, upper, value, limits.value, "ink", []);
    if (advantage) this.#bars(context, lower, advantage, limits.advantage);
    this.#label(context, upper, `value (dashed: return), ±${limits.value.toPrecision(2)}`);
    this.#label(context, lower, `advantage, ±${limits.advantage.toPrecision(2)}`);
    this.#draw();
  }

  /** Draw what stands still, and over it which tokens are in sight and which one is selected. */
  #draw() {
    const { canvas, still, response, colours } = this;
    if (!response || !canvas.clientWidth) return;
    const { clientWidth: width, clientHeight: height } = canvas;
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(still, 0, 0);
    context.scale(devicePixelRatio, devicePixelRatio);
    const [first, last] = this.inSight;
    const step = width / response.length;
    context.fillStyle = colours.focus;
    context.globalAlpha = 0.12;
    const shaded = last - first + 1 < response.length ? Math.max(2, (last - first + 1) * step) : 0;
    context.fillRect(first * step, 0, shaded, height);
    context.globalAlpha = 1;
    context.fillRect(this.#x(this.selected) - 0.75, 0, 1.5, height);
  }

  #x(token) {
    return ((token + 0.5) / this.response.length) * this.canvas.clientWidth;
  }

  #tokenAt(x) {
    const token = Math.floor((x / this.canvas.clientWidth) * this.response.length);
    return Math.max(0, Math.min(token, this.response.length - 1));
  }

  #y({ top, height }, number, limit) {
    return top + (height / 2) * (1 - Math.max(-1, Math.min(1, number / limit)));
  }

  #zero(context, place, width) {
    context.fillStyle = this.colours.line;
    context.fillRect(0, this.#y(place, 0, 1), width, 1);
  }

  /** Write above a chart what it is. */
  #label(context, { top }, text) {
    context.textBaseline = "bottom";
    context.fillStyle = this.colours.faint;
    context.fillText(text, 3, top - 1);
  }

  #line(context, place, numbers, limit, colour, dash) {
    context.strokeStyle = this.colours[colour];
    context.setLineDash(dash);
    context.lineWidth = 1.2;
    context.beginPath();
    for (const [x, least, most] of this.#columns(numbers)) {
      context.lineTo(x, this.#y(place, least, limit));
      if (most !== least) context.lineTo(x, this.#y(place, most, limit));
    }
    context.stroke();
  }

  #bars(context, place, numbers, limit) {
    const wide = Math.max(1, this.canvas.clientWidth / numbers.length - 1);
    const zero = this.#y(place, 0, limit);
    for (const [x, least, most] of this.#columns(numbers)) {
      for (const [number, colour] of [[Math.min(least, 0), "negative"], [Math.max(most, 0), "positive"]]) {
        context.fillStyle = this.colours[colour];
        context.fillRect(x - wide / 2, zero, wide, this.#y(place, number, limit) - zero);
      }
    }
  }

  /** Yield x, the least and the largest number of the tokens that share a pixel, where one of them has a number. */
  *#columns(numbers) {
    const together = Math.max(1, Math.floor(numbers.length / this.canvas.clientWidth));
    for (let start = 0; start < numbers.length; start += together) {
      const part = numbers.subarray(start, start + together);
      const known = part.filter((number) => !Number.isNaN(number));
      if (known.length) yield [this.#x(start + (part.length - 1) / 2), Math.min(...known), Math.max(...known)];
    }
  }
}
