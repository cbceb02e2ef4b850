// The table: what is found, in which order, and one page of it at a time.

class SampleTable {
  // `page` has: data, columns, isSelected(i), isBiased(i), shown() -> columns that the table shows.
  constructor(page) {
    this.page = page;
    this.head = document.querySelector("#samples thead");
    this.body = document.querySelector("#samples tbody");
    this.rows = [];
    this.number = 0;
    this.lowered = null;
    this.revealed = false;
    this.sort = { key: `score:${page.column}`, down: true };
    this.drawHead();
    this.listen();
  }

  listen() {
    const on = (name, event, act) => document.getElementById(name).addEventListener(event, act);
    on("query", "input", () => this.find());
    on("filter", "change", () => this.find());
    on("size", "change", () => this.turn(0));
    on("first", "click", () => this.turn(0));
    on("previous", "click", () => this.turn(this.number - 1));
    on("next", "click", () => this.turn(this.number + 1));
    on("last", "click", () => this.turn(Infinity));
    on("page", "change", (event) => this.turn(Number(event.target.value) - 1));
  }

  headings() {
    const { data, columns } = this.page;
    const scores = this.page.shown().map((k) => [`score:${k}`, columns[k].name, ""]);
    const found = [["id", "sample", "words"], ...scores];
    if (data.labels !== null) found.push(["label", "label", "words"]);
    return [...found, ["selected", "selected", "words"]];
  }

  drawHead() {
    const row = document.createElement("tr");
    row.setAttribute("role", "row");
    const cell = (kind) => {
      const heading = document.createElement("th");
      heading.scope = "col";
      heading.setAttribute("role", "columnheader");
      heading.className = kind;
      row.append(heading);
      return heading;
    };
    for (const [key, name, kind] of this.headings()) {
      const heading = cell(kind);
      heading.dataset.key = key;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => this.sortBy(key));
      heading.append(button);
    }
    if (this.page.data.texts !== null) cell("words").textContent = "text";
    this.head.replaceChildren(row);
    this.markSort();
  }

  markSort() {
    for (const heading of this.head.querySelectorAll("th[data-key]")) {
      if (heading.dataset.key !== this.sort.key) heading.removeAttribute("aria-sort");
      else heading.setAttribute("aria-sort", this.sort.down ? "descending" : "ascending");
    }
  }

  sortBy(key, down) {
    const again = this.sort.key === key;
    this.sort = { key, down: down ?? (again ? !this.sort.down : key !== "id") };
    this.markSort();
    this.find();
  }

  // A difference that puts samples in ascending order.
  comparison() {
    const { data, columns, isSelected, isBiased } = this.page;
    if (this.sort.key === "id") {
      const order = new Intl.Collator("en", { numeric: true });
      return (a, b) => order.compare(data.ids[a], data.ids[b]);
    }
    if (this.sort.key === "label") return (a, b) => isBiased(a) - isBiased(b);
    if (this.sort.key === "selected") return (a, b) => isSelected(a) - isSelected(b);
    const { values } = columns[Number(this.sort.key.slice("score:".length))];
    return (a, b) => values[a] - values[b];
  }

  keep() {
    const { isSelected, isBiased } = this.page;
    return {
      all: () => true,
      selected: isSelected,
      rest: (i) => !isSelected(i),
      biased: isBiased,
      missed: (i) => isBiased(i) && !isSelected(i),
      wrong: (i) => isSelected(i) && !isBiased(i),
    }[document.getElementById("filter").value];
  }

  // Chooses and orders the rows; ties stay in the order of the file.
  find() {
    const { data } = this.page;
    const asked = document.getElementById("query").value.trim().toLowerCase();
    this.lowered ??= data.ids.map((id, i) => `${id}\n${data.texts === null ? "" : data.texts[i]}`.toLowerCase());
    const keep = this.keep();
    this.rows = [];
    for (let i = 0; i < data.ids.length; i++) {
      if (keep(i) && (asked === "" || this.lowered[i].includes(asked))) this.rows.push(i);
    }
    const compare = this.comparison();
    const sign = this.sort.down ? -1 : 1;
    this.rows.sort((a, b) => sign * compare(a, b) || a - b);
    this.turn(0);
  }

  turn(number) {
    const size = Number(document.getElementById("size").value);
    const pages = Math.max(1, Math.ceil(this.rows.length / size));
    this.number = Math.min(pages - 1, Math.max(0, Math.floor(number) || 0));
    const start = this.number * size;
    const shown = this.rows.slice(start, start + size);
    this.body.replaceChildren(...shown.map((i) => this.row(i)));
    const range = shown.length ? `, ${formatCount(start + 1)} to ${formatCount(start + shown.length)} shown` : "";
    document.getElementById("found").textContent =
      `${formatCount(this.rows.length)} of ${formatCount(this.page.data.ids.length)} samples${range}`;
    document.getElementById("page").value = this.number + 1;
    document.getElementById("page").max = pages;
    document.getElementById("pages").textContent = `of ${formatCount(pages)}`;
    const ends = { first: 0, previous: 0, next: pages - 1, last: pages - 1 };
    for (const [name, end] of Object.entries(ends)) {
      document.getElementById(name).setAttribute("aria-disabled", String(this.number === end));
    }
  }

  // Whatever comes from the data goes in as text, never as markup.
  row(i) {
    const { data, columns, isSelected, isBiased } = this.page;
    const row = document.createElement("tr");
    row.setAttribute("role", "row");
    row.classList.toggle("selected", isSelected(i));
    const add = (text, kind, label) => {
      const cell = document.createElement("td");
      cell.setAttribute("role", "cell");
      cell.className = kind;
      cell.textContent = text;
      if (label !== undefined) cell.dataset.label = label;
      row.append(cell);
      return cell;
    };
    add(data.ids[i], "words").dir = "auto";
    for (const k of this.page.shown()) add(formatScore(columns[k].values[i]), "", columns[k].name);
    if (data.labels !== null) add(isBiased(i) ? "biased" : "other", isBiased(i) ? "words biased" : "words");
    add(isSelected(i) ? "selected" : "–", "words");
    if (data.texts === null) return row;
    if (this.revealed) add(data.texts[i], "words text").dir = "auto";
    else add("hidden", "words text soft");
    return row;
  }
}
