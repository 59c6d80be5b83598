// A response with its prompt, its group, the strip, its tokens and the numbers of one of them.

const visibleLines = (text) => text.split("\n").map(visible).join("\n");
const markOf = ({ right }) => (right ? "✓" : "✗");
const markClass = ({ right }) => (right ? "right-mark" : "wrong-mark");

class Pane {
  /** others(response) returns the responses to the same prompt. */
  constructor(number, colouring, others) {
    this.root = document.getElementById("pane").content.cloneNode(true).firstElementChild;
    document.getElementById("panes").append(this.root);
    this.others = others;
    const part = (name) => this.root.querySelector(name);
    this.title = part("h3");
    this.prompt = part(".prompt pre");
    this.group = part(".group");
    this.plain = part(".plain pre");
    this.facts = part(".facts");
    this.spoken = part(".spoken");
    part(".tokens").id = `tokens-${number}`;
    this.strip = new Strip(part(".strip"), colouring.limits, (token) => this.tokens.select(token));
    this.tokens = new TokenText(part(".tokens"), colouring, (token, selected) => this.#token(token, selected));
    this.tokens.onScroll = () => this.#mark();
  }

  show(response) {
    this.response = response;
    const { step, right, reward, length, truncated, version } = response;
    const words = [
      `step ${stepName(step)}`, `${markOf(response)} ${right ? "right" : "wrong"}`, `reward ${signed(reward)}`,
      `${length} tokens`, truncated && "truncated", version !== null && `begun by weights ${version}`,
    ];
    this.title.textContent = words.filter(Boolean).join(" · ");
    this.title.className = markClass(response);
    const answer = visibleLines(response.answer) || "not known";
    this.prompt.textContent = `${visibleLines(step.prompts[response.prompt])}\n\nreference answer: ${answer}`;
    this.plain.textContent = visibleLines(response.text);
    this.group.replaceChildren(...this.others(response).map((other) => this.#button(other)));
    this.strip.show(response);
    this.tokens.show(response);
  }

  redraw() {
    if (!this.response) return;
    this.tokens.redraw();
    this.strip.redraw();
  }

  /** Return the button that shows another response of the group. */
  #button(response) {
    const { right, length, reward } = response;
    const button = element("button", `${markOf(response)} ${length}`);
    button.type = "button";
    button.className = markClass(response);
    button.setAttribute("aria-pressed", response === this.response);
    button.setAttribute("aria-label", `${right ? "right" : "wrong"}, ${length} tokens, reward ${signed(reward)}`);
    button.addEventListener("click", () => {
      this.show(response);
      this.group.querySelector("[aria-pressed=true]").focus();
    });
    return button;
  }

  /** Show the numbers of a token: the selected one, or that under the pointer. */
  #token(token, selected) {
    const { numbers, tokens, length } = this.response;
    const facts = COLUMNS.map(({ key, label }) => [label, shown(key, numbers[key]?.[token])]);
    if (numbers.trained) facts.unshift(["written by", numbers.trained[token] ? "the policy" : "others: only read"]);
    if (numbers.reward?.[token]) facts.push(["reward here", signed(numbers.reward[token])]);
    const text = visible(tokens[token]) || "part of a character";
    this.facts.replaceChildren(...[[`token ${token + 1} of ${length}`, text], ...facts].map(([name, words]) =>
      element("div", undefined, element("dt", name), element("dd", words))));
    if (!selected) return;
    this.spoken.textContent = facts.map(([name, words]) => `${name} ${words}`).join(", ");
    this.#mark();
  }

  #mark() {
    if (this.response) this.strip.mark(this.tokens.selected, this.tokens.inSight);
  }
}
