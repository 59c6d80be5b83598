// Joins data and views: the list of responses, two panes with a response each, the charts.

const get = (id) => document.getElementById(id);
let counted = 0;
const responses = data.steps.flatMap((step) => {
  const made = responsesOf(step, counted);
  counted += made.length;
  return made;
});
const critic = data.critic.map((step) => ({
  ...step,
  calibration: step.calibration && floats(step.calibration),
  explained: floats(step.explained_variance_tenth),
  right: floats(step.value_right_tenth),
  wrong: floats(step.value_wrong_tenth),
}));
const sampled = data.steps.reduce((sum, step) => sum + step.responses, 0);
const colouring = new Colouring(limitsOf(responses));
const inGroup = ({ step, group }) => responses.filter((other) => other.step === step && other.group === group);
const panes = [0, 1].map((number) => new Pane(number, colouring, inGroup));
const list = new ResponseList(get("list"), responses, (response) => active.show(response));
let active = panes[0];

function activate(pane) {
  active = pane;
  for (const each of panes) each.root.classList.toggle("active", each === pane);
}

function filter() {
  const [step, outcome, text, sort] = ["step", "outcome", "text", "sort"].map((id) => get(id).value);
  const [length, drop] = ["length", "drop"].map((id) => Number(get(id).value));
  const descending = get("descending").checked;
  list.show({ step: data.steps[step] ?? null, outcome, text, length, drop, sort, descending }, active.response);
  const of = responses.length < sampled ? ` of ${sampled} sampled` : "";
  get("count").textContent = `${list.listed.length} of ${responses.length} kept${of}`;
}

/** Return a right and a wrong response to one prompt, with the largest drop; where no group has both, of one step. */
function rightAndWrong(step) {
  const byDrop = responses.filter((response) => response.step === step).sort((a, b) => b.drop - a.drop);
  const wrong = byDrop.filter(({ right }) => !right);
  for (const response of wrong) {
    const right = byDrop.find((other) => other.right && other.group === response.group);
    if (right) return [right, response];
  }
  return [byDrop.find(({ right }) => right) ?? byDrop[0], wrong[0] ?? byDrop.at(-1)];
}

/** Return the first responses of the first and of the last step of training. */
function firstAndLast() {
  const trained = data.steps.filter(({ kind }) => kind === "train");
  const steps = trained.length ? trained : data.steps;
  return [steps[0], steps.at(-1)].map((step) => responses.find((response) => response.step === step));
}

function beside(pair) {
  get("two").checked = true;
  showPanes();
  panes.forEach((pane, index) => pane.show(pair[index]));
  activate(panes[0]);
}

function showPanes() {
  panes[1].root.hidden = !get("two").checked;
  if (panes[1].root.hidden) activate(panes[0]);
}

function showCritic() {
  get("critic").hidden = !critic.length;
  if (!critic.length) return;
  const step = critic[get("critic-step").value];
  drawExplained(get("explained"), critic);
  drawCalibration(get("calibration"), step, critic[0]);
  drawPosition(get("position"), step, critic[0]);
}

function showAlarms() {
  const items = data.alarms.map(({ name, when, advice }) => {
    const item = element("li", undefined, element("strong", name), ` ${when}. ${advice}`);
    item.className = "alarm";
    return item;
  });
  get("alarm-list").replaceChildren(...(items.length ? items : [element("li", "none was raised")]));
}

function redraw() {
  colouring.legend(get("legend"));
  for (const pane of panes) pane.redraw();
}

function option(value, text) {
  const made = element("option", text);
  made.value = value;
  return made;
}

function fillControls() {
  get("name").textContent = data.run.name;
  get("about").textContent = data.run.about;
  get("critic-step").append(...critic.map((step, index) => option(index, stepName(step))));
  get("critic-step").value = critic.length - 1;
  get("step").append(option("", "all"), ...data.steps.map((step, index) => option(index, stepName(step))));
  get("step").value = data.open;
  const known = COLUMNS.filter(({ key }) => responses.some(({ numbers }) => numbers[key]));
  get("colour").append(...known.map(({ key, label }) => option(key, label)));
  colouring.choose(get("colour").value);
}

function listen() {
  for (const pane of panes) {
    for (const kind of ["focusin", "pointerdown"]) pane.root.addEventListener(kind, () => activate(pane));
  }
  for (const id of ["step", "outcome", "text", "length", "drop", "sort", "descending"]) {
    get(id).addEventListener("input", filter);
  }
  get("theme").addEventListener("change", ({ target }) => {
    document.documentElement.dataset.theme = target.value;
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  get("critic-step").addEventListener("change", showCritic);
  get("colour").addEventListener("change", ({ target }) => {
    colouring.choose(target.value);
    redraw();
  });
  get("right-wrong").addEventListener("click", () => beside(rightAndWrong(active.response.step)));
  get("first-last").addEventListener("click", () => beside(firstAndLast()));
  get("two").addEventListener("change", showPanes);
}

fillControls();
listen();
showAlarms();
showCritic();
beside(rightAndWrong(data.steps[data.open]));
colouring.legend(get("legend"));
filter();
document.documentElement.dataset.ready = "yes";
