"use strict";

// Asked for every second; a plot shows half a minute at first, and two minutes at most.
const SAMPLES = 120;
const FEWEST = 30;
const PERIOD = 1000;
const WIDTH = 300, HEIGHT = 80;

const count = number => Math.round(number).toLocaleString("en");
const rate = number => (number < 10 ? number.toFixed(1) : count(number)) + "/s";
const milliseconds = seconds => (1000 * seconds).toFixed(1) + " ms";

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return number.toFixed(unit ? 1 : 0) + " " + units[unit];
}

const sum = object => Object.values(object).reduce((total, number) => total + number, 0);
const inKernel = stats => stats.bytes_sendfile + stats.bytes_spliced + stats.bytes_copy_file_range;

// A series is [name, what it is of the figures]; with perSecond, how fast that grows is shown.
const PLOTS = [
  {
    title: "Throughput", format: number => bytes(number) + "/s", perSecond: true, least: 1024,
    series: [["in the kernel", inKernel], ["through Python", stats => stats.bytes_copied]],
  },
  {
    title: "Responses under way", format: count, least: 4,
    series: [["responses", stats => stats.responses]],
  },
  {
    title: "Pipes", format: count, least: 4,
    series: [["in use", stats => stats.pipes_in_use], ["idle", stats => stats.pipes_idle]],
  },
  {
    title: "Hub stall", format: milliseconds, least: 0.01,
    series: [["longest", stats => stats.hub_stall]],
  },
  {
    title: "Fast way and fallbacks", format: rate, perSecond: true, least: 4,
    series: [["transfers", stats => stats.transfers], ["fallbacks", stats => sum(stats.fallbacks)]],
  },
];

const TABLES = [
  {title: "Bytes", rate: true, rows: stats => numbers(stats, name => name.startsWith("bytes_"))},
  {title: "Pipes", rows: stats => numbers(stats, name => /^(pipes|acquired)_/.test(name))},
  {title: "Transfers", rows: stats => numbers(stats, name => /^(transfers|offloads)$/.test(name))},
  {
    title: "Fallbacks to the original function",
    rows: stats => Object.entries(stats.fallbacks).map(([name, value]) => ["fallback " + name, value]),
  },
];

const numbers = (stats, belongs) => Object.entries(stats).filter(([name]) => belongs(name));

function add(parent, tag, text = "", attributes = {}) {
  const space = /^(svg|path)$/.test(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = parent.appendChild(document.createElementNS(space, tag));
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

class Plot {
  constructor(parent, plot) {
    Object.assign(this, plot);
    const figure = add(parent, "section", "", {class: "plot"});
    add(figure, "h2", this.title);
    const list = add(figure, "dl");
    this.values = this.series.map(([name]) => {
      const pair = add(list, "div");
      add(pair, "dt", name);
      return add(pair, "dd", "–");
    });
    this.svg = add(figure, "svg", "", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
      "aria-label": this.title,
    });
    this.paths = this.series.map(() => add(this.svg, "path"));
    this.scale = add(figure, "p", "", {class: "scale"});
    this.most = add(this.scale, "span");
    this.span = add(this.scale, "span");
    this.history = this.series.map(() => []);
  }

  show(stats, before, seconds) {
    this.series.forEach(([, of], i) => {
      let value = of(stats);
      if (this.perSecond) value = before ? Math.max(0, value - of(before)) / seconds : 0;
      this.history[i].push(value);
      if (this.history[i].length > SAMPLES) this.history[i].shift();
      this.values[i].textContent = this.format(value);
    });
    const most = Math.max(this.least, ...this.history.flat());
    const span = Math.max(FEWEST, this.history[0].length);
    this.history.forEach((values, i) => {
      const points = values.map((value, at) => {
        const x = WIDTH * (span - values.length + at) / (span - 1);
        const y = (HEIGHT - 2) * (1 - value / most) + 1;
        return `${x.toFixed(1)} ${y.toFixed(1)}`;
      });
      this.paths[i].setAttribute("d", "M" + points.join("L"));
    });
    this.most.textContent = "scale: 0 to " + this.format(most);
    this.span.textContent = `last ${span * PERIOD / 1000} s`;
    const now = this.series.map(([name], i) => `${name} ${this.values[i].textContent}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}, now: ${now}`);
  }
}

class Table {
  constructor(parent, table) {
    Object.assign(this, table);
    const element = add(parent, "table", "", {class: "counters"});
    add(element, "caption", this.title);
    const head = add(add(element, "thead"), "tr");
    add(head, "th", "Name", {scope: "col"});
    for (const text of this.rate ? ["Per second", "Total"] : ["Count"]) {
      add(head, "th", text, {scope: "col", class: "number"});
    }
    this.body = add(element, "tbody");
    this.cells = new Map();
  }

  // Cells are changed, not made anew: what somebody has selected, or is reading, stays.
  show(stats, before, seconds) {
    const rows = this.rows(stats);
    const earlier = before ? new Map(this.rows(before)) : new Map(rows);
    for (const [name, value] of rows) {
      if (!this.cells.has(name)) {
        const row = add(this.body, "tr");
        add(row, "th", name.replace(/^fallback /, "").replaceAll("_", " "), {scope: "row"});
        this.cells.set(name, (this.rate ? [0, 1] : [0]).map(() => add(row, "td", "", {class: "number"})));
      }
      const growth = before ? Math.max(0, value - (earlier.get(name) || 0)) / seconds : 0;
      const texts = this.rate ? [bytes(growth) + "/s", bytes(value)] : [count(value)];
      this.cells.get(name).forEach((cell, i) => {
        if (cell.textContent !== texts[i]) cell.textContent = texts[i];
      });
    }
  }
}

const views = [
  ...PLOTS.map(plot => new Plot(document.getElementById("plots"), plot)),
  ...TABLES.map(table => new Table(document.getElementById("tables"), table)),
];
const state = document.getElementById("state");
const pause = document.getElementById("pause");
let before = null;
let paused = false;

function say(text, lost = false) {
  if (state.textContent !== text) state.textContent = text;  // which screen readers read out
  state.toggleAttribute("data-lost", lost);
}

async function update() {
  try {
    const answer = await fetch(".stats.json", {cache: "no-store", signal: AbortSignal.timeout(5000)});
    if (!answer.ok) throw new Error(answer.status);
    const stats = await answer.json();
    const time = performance.now();
    const seconds = before ? (time - before.time) / 1000 : 0;
    for (const view of views) view.show(stats, before && before.stats, seconds);
    before = {stats, time};
    say("Updated every second.");
  } catch {
    say("The server does not answer; trying again every second.", true);
  }
}

async function poll() {
  if (!paused && !document.hidden) await update();
  setTimeout(poll, PERIOD);
}

pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", paused);
  say(paused ? "Paused." : "Updated every second.");
});
poll();
