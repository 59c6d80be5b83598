// Rows of which only those in sight are in the document, however many there are.

class VirtualRows {
  /** make(index) returns the element of a row; each row is `height` pixels high. */
  constructor(box, height, make) {
    Object.assign(this, { box, height, make, count: 0, made: new Map() });
    this.filler = document.createElement("div");
    this.filler.setAttribute("role", "presentation");
    box.append(this.filler);
    box.addEventListener("scroll", () => this.#soon());
    new ResizeObserver(() => this.#soon()).observe(box);
  }

  /** Show so many rows, all made anew. */
  show(count) {
    this.count = count;
    this.filler.style.height = `${count * this.height}px`;
    this.redraw();
  }

  redraw() {
    for (const row of this.made.values()) row.remove();
    this.made.clear();
    this.draw();
  }

  draw() {
    const margin = 3;
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.height) - margin);
    const end = Math.min(this.count, Math.ceil((this.box.scrollTop + this.box.clientHeight) / this.height) + margin);
    for (const [index, row] of this.made) {
      if (index < first || index >= end) {
        row.remove();
        this.made.delete(index);
      }
    }
    for (let index = first; index < end; index++) {
      if (!this.made.has(index)) {
        const row = this.make(index);
        row.style.top = `${index * this.height}px`;
        this.made.set(index, row);
        this.box.append(row);
      }
    }
    this.drawn?.(first, end);
  }

  /** Scroll, as little as is needed, so that a row is in sight. */
  reveal(index) {
    const top = index * this.height;
    const least = top + this.height - this.box.clientHeight;
    this.box.scrollTop = Math.min(Math.max(this.box.scrollTop, least), top);
    this.draw();
  }

  get page() {
    return Math.max(1, Math.floor(this.box.clientHeight / this.height) - 1);
  }

  #soon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.draw();
    });
  }
}
