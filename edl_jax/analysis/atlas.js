// Draws the figures in #data, by means of atlas_tables.js.

const data = JSON.parse(find("data").textContent);
const texts = data.texts;
const runs = data.runs.map((run) => ({
  ...run,
  share: unpack(run.share),
  together: unpack(run.together),
  next: unpack(run.next),
  divergence: unpack(run.divergence),
  examples: run.examples.map((example) => example && {
    tokens: example.tokens,
    expert: unpack(example.experts),
    probability: unpack(example.probabilities),
  }),
  total: run.tokens.reduce((sum, tokens) => sum + tokens, 0),
}));
const domains = runs[0].domains;
const state = { layer: 0, expert: 0, example: 0 };
for (const id of
  ["domain-order", "load-order", "pair-figure", "map-scope", "token-color"]) {
  state[id] = find(id).value;
}
state["expert-order"] = "main";

const numExperts = (run) => run.load[0].length;
const most = Math.max(...runs.map(numExperts));
const mainName = (run, layer, expert) => {
  const main = run.main[layer][expert];
  return main < 0 ? "none: it takes no token" : domains[main];
};
const loadShare = (run, layer, expert) =>
  run.load[layer][expert] / (run.total * run.active);

const shares = (run, layer) => range(domains.length).flatMap((d) =>
  range(numExperts(run)).map((e) => run.share(layer, d, e)));

// Orders of rows and columns.

function sortedBy(count, key) {
  const keys = range(count).map(key);
  return range(count).sort((a, b) => keys[a] - keys[b] || a - b);
}

function expertOrder(run, layer, order = state["expert-order"]) {
  const load = run.load[layer];
  const count = load.length;
  if (order === "number") return range(count);
  const byLoad = sortedBy(count, (e) => -load[e]);
  if (order === "load") return byLoad;
  if (order === "main") {
    const rank = run.main[layer].map((d) => (d < 0 ? domains.length : d));
    return byLoad.sort((a, b) => rank[a] - rank[b]);
  }
  return sortedBy(count, (e) => -run.share(layer, Number(order), e));
}

function domainOrder(run, layer) {
  const order = state["domain-order"];
  if (order === "given") return range(domains.length);
  if (order === "name") {
    return range(domains.length).sort((a, b) =>
      domains[a].localeCompare(domains[b]));
  }
  if (state.expert >= numExperts(run)) return range(domains.length);
  return sortedBy(domains.length, (d) => -run.share(layer, d, state.expert));
}

// Numbers of experts choose one; names of domains sort by them.
function expertButton(run, expert, index) {
  return element("button", {
    type: "button",
    "aria-pressed": String(state.expert === expert),
    "aria-label": `expert ${expert}`,
    "data-key": `${index} expert ${expert}`,
    click: () => change("expert", expert),
  }, String(expert));
}

function domainButton(domain, index) {
  return element("button", {
    type: "button",
    "aria-pressed": String(state["expert-order"] === String(domain)),
    title: "sort the experts by this domain",
    "data-key": `${index} domain ${domain}`,
    click: () => change("expert-order", String(domain)),
  }, domains[domain]);
}

const number = (expert) => element("span", {}, String(expert));

// The largest share of a pair: one scale for both runs. An expert shares all
// tokens with itself, which does not count.
function highestPair(name, layer, other) {
  let highest = 1e-9;
  for (const run of runs.filter((each) => other < each.layers.length)) {
    for (const [e, f] of everyPair(numExperts(run))) {
      if (layer === other && e === f) continue;
      highest = Math.max(highest, run[name](layer, e, f));
    }
  }
  return highest;
}

// What experts of a layer share with those of `other`, itself or the next.
function drawPairs(run, layer, name, other, where) {
  const [rows, columns] = [layer, other].map((l) => expertOrder(run, l));
  const lift = state["pair-figure"] === "lift";
  const share = run[name];
  const usual = (f) => run.load[other][f] / run.total;
  const figure = (e, f) =>
    share(layer, e, f) / (lift ? Math.max(usual(f), 1e-9) : 1);
  const [top, format] = lift ? [4, (x) => x.toFixed(1)]
    : [highestPair(name, layer, other), percent];
  return element("div", {}, element("h4", {}, `Experts of ${where}`), grid({
    label: `Shared tokens with ${where}, layer ${run.layers[layer]}, `
      + run.name,
    corner: "",
    rows: rows.map(number),
    columns: columns.map(number),
    top,
    cell(r, c) {
      const [e, f] = [rows[r], columns[c]];
      return layer === other && e === f ? null : {
        value: figure(e, f),
        text: format(figure(e, f)),
        tip: () => `expert ${e} (${mainName(run, layer, e)})\n`
          + `${exact(share(layer, e, f))} of its tokens use expert ${f} of `
          + `${where} (${mainName(run, other, f)})\n`
          + `of all tokens ${exact(usual(f))} do`,
      };
    },
  }), legend(top, format, lift ? " or more" : ""));
}

// The sections: each a function of a run, its layer and its index.

const sections = {
  experts(run, layer, index) {
    const experts = expertOrder(run, layer);
    const order = domainOrder(run, layer);
    const top = Math.max(1e-9, ...runs.flatMap((each) =>
      (layer < each.layers.length ? shares(each, layer) : [])));
    return [grid({
      label: `Experts by domain, layer ${run.layers[layer]}, ${run.name}`,
      corner: "",
      rows: order.map((d) => domainButton(d, index)),
      columns: experts.map((e) => expertButton(run, e, index)),
      top,
      cell(r, c) {
        const [d, e] = [order[r], experts[c]];
        const share = run.share(layer, d, e);
        const sent = share * run.tokens[d] * run.active;
        return {
          value: share,
          text: percent(share),
          mark: run.main[layer][e] === d && "main",
          tip: () => `${domains[d]}, expert ${e}\n`
            + `${exact(share)} of the domain's assignments\n`
            + `${exact(sent / Math.max(run.load[layer][e], 1))} of the `
            + `expert's assignments\nload ${exact(loadShare(run, layer, e))}, `
            + `main domain ${mainName(run, layer, e)}`,
        };
      },
    }), legend(top, percent)];
  },

  tokens(run, layer) {
    const experts = expertOrder(run, layer);
    const chosen = state.expert;
    const text = (place) =>
      element("span", { class: "token" }, texts[place]);
    const pairs = (list) => range(list.length / 2).map((i) =>
      [text(list[2 * i]), list[2 * i + 1]]);
    const all = plainTable(`All experts of the layer, ${run.name}`,
      ["expert", "main domain", "load", "typical tokens"],
      experts.map((e) => [
        expertButton(run, e, `tokens ${run.name}`),
        mainName(run, layer, e),
        exact(loadShare(run, layer, e)),
        element("span", { class: "list" }, ...pairs(run.typical[layer][e])
          .slice(0, 6).flatMap(([token]) => [token, " "])),
      ]));
    if (chosen >= numExperts(run)) return [all];
    const lists = [["Typical tokens", run.typical], ["Frequent tokens",
      run.frequent]].map(([title, lists]) => element("div", {},
      element("h4", {}, title),
      plainTable(`${title} of expert ${chosen}, ${run.name}`,
        ["token", "assignments"], pairs(lists[layer][chosen]))));
    const contexts = element("ol", { class: "contexts" },
      ...run.contexts[layer][chosen].map(([probability, d, own, tokens]) =>
        element("li", {}, element("span", { class: "token" },
          ...tokens.map((place, i) => (i === own
            ? element("mark", {}, texts[place]) : texts[place]))),
        ` ${domains[d]}, ${exact(probability)}`)));
    return [
      element("h4", {}, `Expert ${chosen}: load `
        + `${exact(loadShare(run, layer, chosen))}, main domain `
        + mainName(run, layer, chosen)),
      element("div", { class: "row" }, ...lists,
        element("div", {}, element("h4", {}, "Contexts"), contexts)),
      element("details", { open: "" },
        element("summary", {}, "All experts of the layer"), all),
    ];
  },

  load(run) {
    const mean = run.total * run.active / numExperts(run);
    const orders = run.load.map((_, l) =>
      expertOrder(run, l, state["load-order"]));
    const top = Math.max(...runs.flatMap((each) => each.load.flat().map((x) =>
      x * numExperts(each) / (each.total * each.active))), 1e-9);
    const ranks = state["load-order"] === "load";
    return [grid({
      label: `Load of experts by layer, ${run.name}`,
      corner: ranks ? "layer, rank" : "layer, expert",
      rows: run.layers.map(number),
      columns: range(numExperts(run)).map((i) => number(ranks ? i + 1 : i)),
      top,
      cell(l, c) {
        const e = orders[l][c];
        const load = run.load[l][e];
        return {
          value: load / mean,
          text: load ? (load / mean).toFixed(2) : "×",
          mark: !load && "dead",
          tip: () => `layer ${run.layers[l]}, expert ${e}\n`
            + (load ? `${(load / mean).toFixed(3)} times the mean, `
            + `${exact(loadShare(run, l, e))} of assignments\n`
            : "dead: no token\n") + `main domain ${mainName(run, l, e)}`,
        };
      },
    }), legend(top, (x) => x.toFixed(2)),
    plainTable(`Load by layer, ${run.name}`,
      ["layer", "dead experts", "effective share", "MaxVio"],
      run.layers.map((name, l) => [name, run.load[l].filter((x) => !x).length,
        run.effective[l], run.metrics.max_violation[l]]))];
  },

  pairs(run, layer) {
    const made = [drawPairs(run, layer, "together", layer, "the same layer")];
    if (layer + 1 < run.layers.length) {
      made.push(drawPairs(run, layer, "next", layer + 1, "the next layer"));
    }
    return [element("div", { class: "row" }, ...made)];
  },

  distances(run, layer) {
    const mean = state["map-scope"] === "mean";
    const over = mean ? range(run.layers.length) : [layer];
    const order = range(domains.length);
    const matrix = order.map((a) => order.map((b) =>
      over.reduce((sum, l) => sum + run.divergence(l, a, b), 0) / over.length));
    const distance = (a, b) => matrix[a][b];
    const of = mean ? "mean over layers" : `layer ${run.layers[layer]}`;
    const place = mean ? 0 : layer + 1;
    const half = Math.max(1e-9, ...runs.flatMap((each) =>
      each.map[place]?.flat().map(Math.abs) ?? []));
    const map = drawMap(run.map[place], half, distance,
      `Map of domains, ${of}, ${run.name}; the matrix has its distances`);
    return [element("div", { class: "row" },
      element("figure", {}, map, element("figcaption", {},
        `${of}: the two axes hold ${percent(run.mapShare[place])} of the `
        + "squared distances")),
      element("div", {}, grid({
        label: `JSD of domains in nats, ${of}, ${run.name}`,
        corner: "",
        upright: true,
        rows: order.map((d) => element("span", {}, domains[d])),
        columns: order.map((d) => element("span", {}, domains[d])),
        top: Math.LN2,
        cell: (a, b) => (a === b ? null : {
          value: distance(a, b),
          text: distance(a, b).toFixed(2),
          tip: () => `${domains[a]} and ${domains[b]}\n`
            + `JSD ${distance(a, b).toFixed(4)} nats`,
        }),
      }), legend(Math.LN2, (x) => x.toFixed(2))))];
  },

  text(run, layer) {
    const example = run.examples[state.example];
    if (!example) return ["This domain has no held-out text."];
    const byMain = state["token-color"] === "main";
    const used = new Set();
    const spans = example.tokens.map((place, t) => {
      const first = example.expert(layer, t, 0);
      const key = byMain ? run.main[layer][first] : first;
      used.add(key);
      const span = element("span", {
        class: "tinted",
        "--hue": hue(key),
        tabindex: -1,
        role: "listitem",
        "data-expert": first,
      }, texts[place]);
      described.set(span, () => range(run.active).map((a) => {
        const e = example.expert(layer, t, a);
        return `expert ${e}: ${exact(example.probability(layer, t, a))} `
          + `(${mainName(run, layer, e)})`;
      }).join("\n"));
      return span;
    });
    const text = element("div", { class: "text", role: "list",
      "aria-label": `Text of ${domains[state.example]}, ${run.name}` });
    spans.forEach((span) => text.append(span,
      ...(/\\n/.test(span.textContent) ? [element("br")] : [])));
    walk(text, [spans]);
    const names = [...used].filter((key) => key >= 0).sort((a, b) => a - b)
      .map((key) => element("span", { class: "tinted", "--hue": hue(key) },
        byMain ? domains[key] : `expert ${key}`));
    return [text, element("div", { class: "chips" }, ...names)];
  },
};

const space = (x, low, high, from, to) =>
  from + (to - from) * (high > low ? (x - low) / (high - low) : 0.5);

// Places points whose coordinates are `half` at most, in one scale.
function drawMap(points, half, distance, label) {
  const [width, height] = [420, 340];
  const svg = element("svg:svg", { viewBox: `0 0 ${width} ${height}`, width,
    height, class: "map", role: "group", "aria-label": label });
  const scale = Math.min(width / 2 - 60, height / 2 - 24) / half;
  const at = points.map(([x, y]) =>
    [width / 2 + scale * x, height / 2 - scale * y]);
  const taken = at.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const free = (box) => box[0] >= 0 && box[2] <= width && taken.every((t) =>
    box[2] < t[0] || box[0] > t[2] || box[3] < t[1] || box[1] > t[3]);
  at.forEach(([x, y], d) => {
    const long = 6.2 * domains[d].length + 4;
    // The first free place of four; a crowded map leaves some names out.
    const found = [[x + 9, y], [x - 9 - long, y], [x - long / 2, y - 14],
      [x - long / 2, y + 14]].find(([left, middle]) =>
      free([left, middle - 6, left + long, middle + 6]));
    if (found) {
      taken.push([found[0], found[1] - 6, found[0] + long, found[1] + 6]);
      svg.append(element("svg:text",
        { x: found[0], y: found[1] + 4, "aria-hidden": "true" }, domains[d]));
    }
    const near = sortedBy(domains.length, (other) =>
      (other === d ? Infinity : distance(d, other)));
    const text = () => [domains[d], ...near.slice(0, -1).slice(0, 3).map((n) =>
      `${distance(d, n).toFixed(3)} nats to ${domains[n]}`)].join("\n");
    const point = element("svg:circle", { cx: x, cy: y, r: 6, class: "point",
      tabindex: 0, role: "img", "aria-label": text() });
    described.set(point, text);
    svg.append(point);
  });
  return svg;
}

const CHARTS = {
  purity: "purity",
  inter: "D_inter (nats)",
  inter_fraction: "D_inter / D_total",
  diversity: "diversity",
  normalized_mutual_information: "NMI of domain and expert",
  token_information: "NMI of token and expert",
};

function drawChart(key) {
  const [width, height, left, bottom] = [215, 150, 34, 26];
  const count = Math.max(...runs.map((run) => run.layers.length));
  const top = Math.max(...runs.flatMap((run) => run.metrics[key]), 1e-9);
  const x = (l) => space(l, 0, count - 1, left + 8, width - 10);
  const y = (value) => space(value, 0, top, height - bottom, 10);
  const svg = element("svg:svg", { viewBox: `0 0 ${width} ${height}`, width,
    height, role: "img",
    "aria-label": `${CHARTS[key]} by layer; the table below has its figures` });
  for (const value of [0, top / 2, top]) {
    svg.append(element("svg:line", { class: "axis", x1: left, x2: width,
      y1: y(value), y2: y(value) }), element("svg:text", { class: "soft",
      x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  svg.append(element("svg:line", { class: "now", x1: x(state.layer),
    x2: x(state.layer), y1: 10, y2: height - bottom }));
  const every = Math.ceil(count / 8);
  range(count).filter((l) => l % every === 0).forEach((l) => svg.append(
    element("svg:text", { class: "soft", x: x(l), y: height - 8,
      "text-anchor": "middle" }, String(runs[0].layers[l] ?? l))));
  runs.forEach((run, index) => {
    const values = run.metrics[key];
    svg.append(element("svg:polyline", { class: `series series-${index}`,
      points: values.map((value, l) => `${x(l)},${y(value)}`).join(" ") }));
    values.forEach((value, l) => {
      const mark = index
        ? element("svg:rect", { x: x(l) - 4, y: y(value) - 4, width: 8,
          height: 8, class: "point mark-1" })
        : element("svg:circle", { cx: x(l), cy: y(value), r: 4.5,
          class: "point mark-0" });
      described.set(mark, () => `${run.name}, layer ${run.layers[l]}\n`
        + `${CHARTS[key]} ${value.toFixed(4)}`);
      svg.append(mark);
    });
  });
  return element("figure", {}, element("figcaption", {}, CHARTS[key]), svg);
}

function drawLayers() {
  const keys = Object.keys(CHARTS);
  const lines = runs.map((run, index) => element("span", {},
    element("span", { class: `key mark-${index}`, "aria-hidden": "true" },
      index ? "■ " : "● "), run.name));
  find("layers").querySelector(".body").replaceChildren(
    element("div", { class: "keys" }, ...lines),
    element("div", { class: "row" }, ...keys.map(drawChart)),
    element("details", {}, element("summary", {}, "Table of these figures"),
      plainTable("Figures by layer",
        ["run", "layer", ...Object.values(CHARTS)],
        runs.flatMap((run) => run.layers.map((name, l) =>
          [run.name, name, ...keys.map((key) => run.metrics[key][l])])))));
}

function drawRuns() {
  const names = Object.keys(runs[0].facts);
  find("runs").querySelector(".body").replaceChildren(plainTable("Runs",
    ["", ...runs.map((run) => run.name)],
    [["step", ...runs.map((run) => String(run.step))],
      ["layers", ...runs.map((run) => String(run.layers.length))],
      ["experts, active", ...runs.map((run) =>
        `${numExperts(run)}, ${run.active}`)],
      ...names.map((name) => [name,
        ...runs.map((run) => String(run.facts[name]))])]));
}

// Whether a section shows the chosen layer alone, not all.
const isOfLayer = (id) =>
  id !== "load" && !(id === "distances" && state["map-scope"] === "mean");

// Draws a section anew; what had the focus has it again.
function draw(id) {
  const key = document.activeElement?.dataset.key;
  const body = find(id).querySelector(".body");
  body.classList.add("runs");
  body.replaceChildren(...runs.map((run, index) => element("div",
    { class: "run" }, element("h3", {}, run.name),
    ...(state.layer < run.layers.length || !isOfLayer(id)
      ? sections[id](run, state.layer, index)
      : ["This run has no such layer."]))));
  if (key === undefined || body.contains(document.activeElement)) return;
  [...body.querySelectorAll("[data-key]")]
    .find((made) => made.dataset.key === key)?.focus();
}

// The sections that a setting changes.
const REDRAWN = {
  expert: ["experts", "tokens"],
  "expert-order": ["experts", "tokens", "pairs"],
  "domain-order": ["experts"],
  "load-order": ["load"],
  "pair-figure": ["pairs"],
  "map-scope": ["distances"],
  example: ["text"],
  "token-color": ["text"],
};

function change(setting, value) {
  state[setting] = value;
  find(setting).value = value;
  REDRAWN[setting].forEach(draw);
}

function changeLayer() {
  state.layer = Number(find("layer").value);
  const names = runs.flatMap((run) => run.layers[state.layer] ?? []);
  const count = Math.max(...runs.map((run) => run.layers.length));
  const shown = [...new Set(names)].join(" and ");
  find("layer-name").textContent = `${shown} (${state.layer + 1} of ${count})`;
  drawLayers();
  Object.keys(sections).filter(isOfLayer).forEach(draw);
}

const option = (value, text) => element("option", { value }, text);

function start() {
  document.title = `Expert atlas: ${runs.map((run) => run.name).join(", ")}`;
  find("main").classList.toggle("two", runs.length > 1);
  find("expert-order").append(option("main", "main domain"),
    option("load", "load"), option("number", "number"),
    element("optgroup", { label: "share of a domain" },
      ...domains.map((name, d) => option(d, name))));
  find("expert").append(...range(most).map((e) => option(e, String(e))));
  find("example").append(...domains.map((name, d) => option(d, name)));
  for (const setting of Object.keys(REDRAWN)) {
    const numeric = setting === "expert" || setting === "example";
    find(setting).addEventListener("change", ({ target }) =>
      change(setting, numeric ? Number(target.value) : target.value));
  }
  find("layer").max = Math.max(...runs.map((run) => run.layers.length)) - 1;
  find("layer").addEventListener("input", changeLayer);
  startTheme();
  drawRuns();
  changeLayer();
  Object.keys(sections).filter((id) => !isOfLayer(id)).forEach(draw);
}

start();
