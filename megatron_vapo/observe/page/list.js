// The list of responses: filters, order, and the one that is chosen.

const OUTCOMES = {
  "": () => true,
  right: ({ right }) => right,
  wrong: ({ right }) => !right,
  truncated: ({ truncated }) => truncated,
  clipped: ({ clippedTokens }) => clippedTokens > 0,
};

class ResponseList {
  constructor(box, responses, onChoose) {
    Object.assign(this, { box, responses, onChoose, listed: [], chosen: 0 });
    this.rows = new VirtualRows(box, 24, (index) => this.#row(index));
    box.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show the responses that a filter lets through, in the order of one of their numbers. */
  show({ step, outcome, text, length, drop, sort, descending }, current) {
    this.listed = this.responses.filter((response) =>
      (step === null || response.step === step) && OUTCOMES[outcome](response) && response.length >= length
      && response.drop >= drop && response.text.includes(text));
    const direction = descending ? -1 : 1;
    this.listed.sort((a, b) => direction * (a[sort] - b[sort]) || a.order - b.order);
    this.chosen = Math.max(0, this.listed.indexOf(current));
    this.box.removeAttribute("aria-activedescendant");
    this.box.scrollTop = 0;
    this.rows.show(this.listed.length);
  }

  choose(index) {
    this.chosen = Math.max(0, Math.min(index, this.listed.length - 1));
    this.rows.redraw();
    if (!this.listed.length) return;
    this.rows.reveal(this.chosen);
    this.box.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    this.onChoose(this.listed[this.chosen]);
  }

  #row(index) {
    const response = this.listed[index];
    const { step, reward, length, drop, text } = response;
    const row = element("div");
    row.className = "row";
    row.id = `row-${index}`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-setsize", this.listed.length);
    row.setAttribute("aria-posinset", index + 1);
    row.setAttribute("aria-selected", index === this.chosen);
    const mark = element("span", `${markOf(response)} ${signed(reward)}`);
    mark.className = markClass(response);
    const cells = [length, drop.toFixed(2), visible(text.slice(0, 80))].map((words) => element("span", words));
    row.append(element("span", stepName(step).replace("pretraining ", "p")), mark, ...cells);
    row.addEventListener("click", () => this.choose(index));
    return row;
  }

  #key(event) {
    const { chosen, rows } = this;
    const to = {
      ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + rows.page, PageUp: chosen - rows.page,
      Home: 0, End: this.listed.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(to);
  }
}
