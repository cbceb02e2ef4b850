// The page: which score and which samples are selected, and everything that follows from it.

const SHARES = [0.05, 0.15, 0.25, 0.35, 0.5, 0.65];
const byId = (name) => document.getElementById(name);

function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

class Page {
  constructor(data) {
    this.data = data;
    this.columns = data.columns.map(({ name, values }) => ({ name, values: decode(values) }));
    this.column = data.column;
    this.made = data.made === null ? null : new Set(data.made);
    this.asMade = this.made !== null;
    this.biased = data.labels === null ? 0 : [...data.labels].filter((mark) => mark === "1").length;
    this.isBiased = (i) => data.labels !== null && data.labels[i] === "1";
    this.isSelected = (i) => (this.asMade ? this.made.has(i) : this.ranks[i] < this.count);
    this.rank();
    this.count = data.count;
    this.table = new SampleTable(this);
    this.listen();
    this.refresh();
  }

  get samples() {
    return this.data.ids.length;
  }

  // How many samples a place of the slider, in thousandths, stands for.
  countAt(place) {
    return Math.round((place / 1000) * this.samples);
  }

  // The columns that the table shows.
  shown() {
    return byId("every").checked ? this.columns.map((_, k) => k) : [this.column];
  }

  // Order by the chosen score, highest first, ties in the order of the file.
  rank() {
    const { values } = this.columns[this.column];
    this.order = Array.from(values, (_, i) => i).sort((a, b) => values[b] - values[a] || a - b);
    this.ranks = new Uint32Array(this.order.length);
    this.hits = new Uint32Array(this.order.length + 1);
    this.order.forEach((i, place) => {
      this.ranks[i] = place;
      this.hits[place + 1] = this.hits[place] + this.isBiased(i);
    });
  }

  listen() {
    this.columns.forEach(({ name }, k) => byId("column").append(new Option(name, k)));
    byId("column").value = this.column;
    byId("column").addEventListener("change", (event) => this.choose(Number(event.target.value)));
    byId("share").addEventListener("input", (event) => this.select(this.countAt(event.target.value)));
    byId("count").addEventListener("change", (event) => this.select(Number(event.target.value)));
    byId("restore").addEventListener("click", () => this.restore());
    byId("every").addEventListener("change", () => {
      this.table.drawHead();
      this.table.turn(this.table.number);
    });
    byId("reveal")?.addEventListener("click", (event) => this.reveal(event.target));
    byId("save-text").addEventListener("click", () => this.save("selected.txt", `${this.selectedIds().join("\n")}\n`));
    byId("save-json").addEventListener("click", () => this.save("selected.json", JSON.stringify(this.selectedIds())));
    const drag = (event) => {
      const box = byId("histogram").getBoundingClientRect();
      const { values } = this.columns[this.column];
      const score = this.scoreAt(event.clientX - box.left);
      const first = this.order.findIndex((i) => values[i] < score);
      this.select(first < 0 ? this.samples : first);
    };
    byId("histogram").addEventListener("pointerdown", (event) => {
      byId("histogram").setPointerCapture(event.pointerId);
      drag(event);
    });
    byId("histogram").addEventListener("pointermove", (event) => event.buttons === 1 && drag(event));
    window.addEventListener("resize", () => this.drawFigures());
  }

  choose(column) {
    this.column = column;
    this.rank();
    this.table.sort = { key: `score:${column}`, down: true };
    this.table.drawHead();
    this.refresh();
  }

  select(count) {
    this.count = Math.min(this.samples, Math.max(0, Math.round(count) || 0));
    this.asMade = false;
    // A drag sends more events than the screen has pictures.
    this.awaited ??= requestAnimationFrame(() => {
      this.awaited = null;
      this.refresh();
    });
  }

  restore() {
    this.asMade = true;
    this.count = this.made.size;
    this.refresh();
    byId("share").focus();
  }

  reveal(button) {
    this.table.revealed = !this.table.revealed;
    button.setAttribute("aria-pressed", String(this.table.revealed));
    button.textContent = this.table.revealed ? "Hide the texts" : "Show the texts";
    this.table.turn(this.table.number);
  }

  selectedIds() {
    return this.order.filter(this.isSelected).map((i) => this.data.ids[i]);
  }

  save(name, content) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "application/octet-stream" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  // The lowest score above the threshold; null where the selection does not follow one.
  threshold() {
    if (this.asMade) return null;
    const { values } = this.columns[this.column];
    return this.count === 0 ? null : values[this.order[this.count - 1]];
  }

  // Coverage and precision of the present selection; null where they are not defined.
  point() {
    const hits = this.asMade ? [...this.made].filter(this.isBiased).length : this.hits[this.count];
    return {
      count: this.count,
      hits,
      coverage: this.biased ? hits / this.biased : null,
      precision: this.count ? hits / this.count : null,
    };
  }

  refresh() {
    // Left alone where it means this count already: with few samples a key moves it by less than one.
    if (this.countAt(byId("share").value) !== this.count) byId("share").value = (1000 * this.count) / this.samples;
    byId("share").setAttribute("aria-valuetext", `${formatCount(this.count)} samples`);
    byId("count").value = this.count;
    byId("restore").hidden = this.made === null || this.asMade;
    this.say();
    this.drawFigures();
    this.table.find();
  }

  say() {
    const [point, threshold] = [this.point(), this.threshold()];
    const share = formatPercent(this.count / this.samples);
    const rule = this.asMade
      ? "as the selection was made"
      : threshold === null
        ? "no score is above the threshold"
        : `a score of ${formatScore(threshold)} or more`;
    const lines = [`${formatCount(this.count)} of ${formatCount(this.samples)} samples are selected (${share}): ${rule}.`];
    if (point.coverage !== null) {
      const found = `${formatCount(point.hits)} of ${formatCount(this.biased)} biased samples are among them.`;
      lines.push(`Coverage ${formatPercent(point.coverage)}: ${found}`);
    }
    if (this.biased && point.precision !== null) {
      const base = formatPercent(this.biased / this.samples);
      lines.push(`Precision ${formatPercent(point.precision)}: of the selected that share is biased, against ${base} of all.`);
    }
    byId("verdict").replaceChildren(
      ...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })),
    );
    byId("selection").textContent = lines[0];
  }

  drawFigures() {
    const { name, values } = this.columns[this.column];
    const [high, low] = [values[this.order[0]], values[this.order[this.samples - 1]]];
    const room = high > low ? 0 : Math.abs(high) || 1;
    const words = `Histogram of the score ${name}, from ${formatScore(low)} to ${formatScore(high)}.`;
    this.scoreAt = drawHistogram(
      byId("histogram"), values, low - room, high + room, this.threshold(), this.isBiased, this.isSelected, words,
    );
    const known = this.data.labels !== null;
    legend(byId("histogram-legend"), [
      ...(known ? [["var(--series-2)", "biased"]] : []),
      ["var(--series-3)", known ? "other" : "samples"],
    ]);
    if (!known) return;
    legend(byId("curves-legend"), [["var(--series-2)", "coverage"], ["var(--series-3)", "precision"]]);
    if (this.biased) drawCurves(byId("curves"), this.hits, this.point(), "Coverage and precision; the table below has them.");
    this.tabulate();
  }

  tabulate() {
    const cells = (kind, values) => {
      const row = document.createElement("tr");
      row.append(...values.map((text) => Object.assign(document.createElement(kind), { textContent: text })));
      return row;
    };
    const rows = SHARES.map((share) => {
      const count = Math.round(share * this.samples);
      const [coverage, precision] = [this.hits[count] / this.biased, this.hits[count] / count];
      return [`${Math.round(100 * share)} %`, ...[coverage, precision].map((v) => (Number.isFinite(v) ? formatPercent(v) : "–"))];
    });
    byId("measures").replaceChildren(
      cells("th", ["selected", "coverage", "precision"]), ...rows.map((row) => cells("td", row)),
    );
    const area = this.areaUnderCurve();
    byId("area").textContent = area === null
      ? "With samples of one kind only there is no curve to draw."
      : `AUC ${area.toFixed(3)}: how often a biased sample scores above another one, ties counted half.`;
  }

  areaUnderCurve() {
    const [biased, others] = [this.biased, this.samples - this.biased];
    if (biased === 0 || others === 0) return null;
    const { values } = this.columns[this.column];
    let won = 0;
    for (let start = 0, end = 0; start < this.samples; start = end) {
      while (end < this.samples && values[this.order[end]] === values[this.order[start]]) end++;
      const here = this.hits[end] - this.hits[start];
      const below = others - (end - this.hits[end]);
      won += here * (below + (end - start - here) / 2);
    }
    return won / (biased * others);
  }
}

new Page(JSON.parse(byId("data").textContent));
