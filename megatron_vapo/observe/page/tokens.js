// The tokens of a response as text: a listbox, whose rows are laid out once and drawn when in sight.

const measure = document.createElement("canvas").getContext("2d");

class TokenText {
  constructor(box, colourOf, onSelect) {
    Object.assign(this, { box, colourOf, onSelect, lines: [], lineOf: [], selected: 0 });
    this.rows = new VirtualRows(box, 22, (line) => this.#line(line));
    this.rows.drawn = () => this.#announce();
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("click", (event) => this.#at(event, (token) => this.select(token)));
    box.addEventListener("pointerover", (event) => this.#at(event, (token) => this.onSelect(token, false)));
    box.addEventListener("pointerleave", () => this.response && this.onSelect(this.selected, false));
    new ResizeObserver(() => this.response && this.width !== box.clientWidth && this.#layOut()).observe(box);
  }

  show(response) {
    this.response = response;
    this.box.setAttribute("aria-label", `Tokens of response ${response.order + 1}, ${response.length} in all`);
    this.box.scrollTop = 0;
    this.#layOut();
    this.select(0);
  }

  redraw() {
    this.rows.redraw();
  }

  /** place: which of the drops the token was reached as; -1 where it was not. */
  select(token, place = -1) {
    this.drop = place;
    this.selected = Math.max(0, Math.min(token, this.response.length - 1));
    this.rows.reveal(this.lineOf[this.selected]);
    this.#mark();
    this.onSelect(this.selected, true);
  }

  /** Return the first and the last token in sight. */
  get inSight() {
    const { box, rows, lines } = this;
    if (!lines.length) return [0, 0];
    // A box without height, as a pane that is hidden or not laid out yet has, shows its first line.
    const within = (line) => Math.max(0, Math.min(line, lines.length - 1));
    const first = within(Math.floor(box.scrollTop / rows.height));
    const last = Math.max(first, within(Math.ceil((box.scrollTop + box.clientHeight) / rows.height) - 1));
    return [lines[first][0].token, lines[last].at(-1).token];
  }

  /** Break the tokens into lines, after newlines and where the width ends. */
  #layOut() {
    this.width = this.box.clientWidth;
    measure.font = getComputedStyle(this.box).font;
    const one = measure.measureText("0").width;
    const width = (text) => 1 + (/^[ -~]*$/.test(text) ? text.length * one : measure.measureText(text).width);
    this.lines = [[]];
    this.lineOf = new Array(this.response.length);
    let used = 0;
    this.response.tokens.forEach((text, token) => {
      for (const part of text.split(/(?<=\n)/)) {
        const seen = visible(part) || "·"; // a part of a character has no text of its own
        if (used + width(seen) > this.width - 8 && this.lines.at(-1).length) used = 0 * this.lines.push([]);
        this.lines.at(-1).push({ token, seen, begins: this.lineOf[token] === undefined });
        this.lineOf[token] ??= this.lines.length - 1;
        used = part.endsWith("\n") ? 0 * this.lines.push([]) : used + width(seen);
      }
    });
    if (!this.lines.at(-1).length) this.lines.pop();
    this.rows.show(this.lines.length);
  }

  #line(index) {
    const line = document.createElement("div");
    line.className = "line";
    line.setAttribute("role", "presentation");
    line.append(...this.lines[index].map((part) => this.#part(part)));
    return line;
  }

  /** Return the element of a token's part on a line; its first is the option that screen readers meet. */
  #part({ token, seen, begins }) {
    const span = document.createElement("span");
    const { clipped, trained } = this.response.numbers;
    const read = trained?.[token] === 0;
    span.className = ["token", clipped?.[token] > 0 && "clipped", read && "read"].filter(Boolean).join(" ");
    span.textContent = seen;
    span.dataset.token = token;
    span.dataset.selected = token === this.selected;
    span.style.backgroundColor = this.colourOf.colour(this.response, token);
    span.setAttribute("role", begins ? "option" : "presentation");
    if (begins) {
      span.id = `${this.box.id}-${token}`;
      span.setAttribute("aria-setsize", this.response.length);
      span.setAttribute("aria-posinset", token + 1);
      span.setAttribute("aria-selected", token === this.selected);
      span.setAttribute("aria-label", `${seen}, ${read ? "only read" : this.colourOf.words(this.response, token)}`);
    }
    return span;
  }

  #mark() {
    for (const span of this.box.querySelectorAll(`[data-selected=true], [data-token="${this.selected}"]`)) {
      const selected = Number(span.dataset.token) === this.selected;
      span.dataset.selected = selected;
      if (span.id) span.setAttribute("aria-selected", selected);
    }
    this.#announce();
  }

  /** Name the selected token to screen readers, while it is in the document. */
  #announce() {
    const id = `${this.box.id}-${this.selected}`;
    if (document.getElementById(id)) this.box.setAttribute("aria-activedescendant", id);
    else this.box.removeAttribute("aria-activedescendant");
    this.onScroll?.();
  }

  #at(event, action) {
    const span = event.target.closest("[data-token]");
    if (span) action(Number(span.dataset.token));
  }

  /** Return the token of another line that stands below or above the selected one. */
  #vertical(lines) {
    const from = this.lineOf[this.selected];
    const to = Math.max(0, Math.min(from + lines, this.lines.length - 1));
    const place = this.lines[from].findIndex(({ token }) => token === this.selected);
    return this.lines[to][Math.min(place, this.lines[to].length - 1)].token;
  }

  /** Go to the next smaller drop, first to the largest, or back. */
  #goToDrop(direction) {
    const { drops } = this.response;
    const place = Math.max(0, Math.min(this.drop + direction, drops.length - 1));
    if (drops.length) this.select(drops[place].token, place);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const to = {
      ArrowRight: () => this.selected + 1, ArrowLeft: () => this.selected - 1,
      ArrowDown: () => this.#vertical(1), ArrowUp: () => this.#vertical(-1),
      PageDown: () => this.#vertical(this.rows.page), PageUp: () => this.#vertical(-this.rows.page),
      Home: () => 0, End: () => this.response.length - 1,
    }[event.key];
    const drop = { d: 1, D: -1 }[event.key];
    if (!this.response || !(to || drop)) return;
    event.preventDefault();
    if (to) this.select(to());
    else this.#goToDrop(drop);
  }
}
