"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const at = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = new Map(); // id of an element -> what draws it

  function setTheme(name) {
    root.dataset.theme = name;
    drawAll();
  }
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const isNarrow = () => innerWidth < 700;

  function layout(extra) {
    const axis = { gridcolor: color("line"), linecolor: color("line"), zerolinecolor: color("line"), automargin: true };
    const { xaxis = {}, yaxis = {}, ...rest } = extra;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("text"), size: 12 },
      margin: { l: 50, r: 12, t: 34, b: 44 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { font: { size: 12 } }, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }

  function draw(id, traces, extra) {
    return Plotly.react(at(id), traces, layout(extra), { responsive: true, displaylogo: false, displayModeBar: false });
  }

  function drawAll() {
    if (typeof Plotly === "undefined") return;
    for (const [id, make] of plots) if (at(id)) make(id);
  }

  // Long names end in dots on the axis; the whole name is in the hover text.
  function names(list) {
    const most = isNarrow() ? 14 : 24;
    return {
      tickvals: list, ticktext: list.map((n) => (n.length > most ? "…" + n.slice(1 - most) : n)), tickangle: -50,
      showticklabels: list.length <= (isNarrow() ? 24 : 70), type: "category",
    };
  }

  function drawNoise(id) {
    const x = data.layers.map((l) => l.name);
    const line = (key, name, tint, dash, symbol) => ({
      x, y: data.layers.map((l) => l[key]), name, mode: "lines+markers", connectgaps: true,
      line: { color: color(tint), dash, width: 2 }, marker: { size: 6, symbol }, hovertemplate: "%{x}<br>%{y:.1f} dB",
    });
    const all = [
      line("propagated", "propagated", "accent", "solid", "circle"), line("local", "local", "second", "dot", "diamond"),
      line("weight", "weight alone", "third", "dash", "square"),
    ];
    draw(id, all.filter((t) => t.y.some((v) => v !== null)), {
      xaxis: names(x), yaxis: { title: { text: "SQNR, dB" } }, hovermode: "closest",
    });
  }

  function drawHistogram(id, found, title) {
    if (!found) {
      draw(id, [], {
        title: { text: title, font: { size: 13 } }, xaxis: { visible: false }, yaxis: { visible: false },
        annotations: [{ text: "float: no grid", showarrow: false, font: { color: color("soft") } }],
      });
      return;
    }
    const width = (found.greatest - found.least) / found.counts.length || 1;
    const total = found.counts.reduce((a, b) => a + b, 0) || 1;
    const lines = [found.low, found.high].map((x) => ({
      type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: color("bad"), width: 1.5, dash: "dash" },
    }));
    const codes = found.step ? Math.round((found.high - found.low) / found.step) : Infinity;
    for (let code = 1; codes <= 64 && code < codes; code++) {
      const x = found.low + code * found.step;
      lines.push({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below", opacity: 0.4, line: { color: color("third"), width: 1 } });
    }
    const band = { type: "rect", x0: found.low, x1: found.high, y0: 0, y1: 1, yref: "paper", layer: "below", line: { width: 0 }, fillcolor: color("band") };
    const bar = {
      type: "bar", x: found.counts.map((_, i) => found.least + (i + 0.5) * width), width: width,
      y: found.counts.map((c) => (c ? (100 * c) / total : null)), marker: { color: color("accent"), line: { width: 0 } }, hovertemplate: "%{x:.4g}<br>%{y:.3g} %<extra></extra>",
    };
    const clipped = found.clipped ? `, ${(100 * found.clipped).toPrecision(2)} % clipped` : ", nothing clipped";
    const step = found.step ? `, step ${found.step.toPrecision(3)}` : "";
    draw(id, [bar], {
      title: { text: `${title}: ${found.bits} bits${step}${clipped}`, font: { size: 13 }, x: 0, xref: "paper" },
      xaxis: { title: { text: "value" } }, yaxis: { title: { text: "% of values" }, type: "log", dtick: 1 }, showlegend: false,
      shapes: [band, ...lines], bargap: 0,
    });
  }

  function drawChannels(id, found) {
    at(id).style.display = found ? "" : "none";
    if (!found) return;
    const x = found.least.map((_, i) => Math.round((i * (found.channels - 1)) / Math.max(1, found.least.length - 1)));
    const edge = (y, name) => ({ x, y, name, mode: "lines", line: { color: color("bad"), width: 1.2, shape: "hvh", dash: "dot" }, showlegend: name !== "", hoverinfo: "skip" });
    const bars = {
      type: "bar", name: "weights", x, base: found.least, y: found.greatest.map((v, i) => v - found.least[i]),
      marker: { color: color("accent"), line: { width: 0 } }, customdata: found.greatest, hovertemplate: "channel %{x}<br>%{base:.4g} to %{customdata:.4g}<extra></extra>",
    };
    draw(id, [bars, edge(found.high, "ends of the grid"), edge(found.low, "")], {
      title: { text: `Range of each of ${found.channels} output channels`, font: { size: 13 }, x: 0, xref: "paper", y: 0.98 },
      margin: { l: 50, r: 12, t: 58, b: 44 },
      xaxis: { title: { text: "channel" } }, yaxis: { title: { text: "weight" } }, bargap: 0.15,
    });
  }

  function drawLayer() {
    const name = at("layer").value;
    const { weights, activations, channels } = data.pictures;
    drawHistogram("plot-weights", weights.find((h) => h.tensor === name), "Weight");
    drawHistogram("plot-inputs", activations.find((h) => h.layers.includes(name)), "Input");
    drawChannels("plot-channels", channels.find((c) => c.layer === name));
    document.querySelectorAll("tr[data-layer]").forEach((row) => row.classList.toggle("chosen", row.dataset.layer === name));
  }

  function drawSensitivity(id) {
    const power = (db) => (db === null ? 0 : 10 ** (-db / 10));
    const layers = [...data.sensitivity.layers].sort((a, b) => power(b.alone_db) - power(a.alone_db)).slice(0, 60);
    const total = data.sensitivity.layers.reduce((sum, l) => sum + power(l.alone_db), 0) || 1;
    const kept = new Set(data.sensitivity.proposal.layers);
    const bars = (list, name, tint) => ({
      type: "bar", name, x: list.map((l) => l.name), y: list.map((l) => (100 * power(l.alone_db)) / total), marker: { color: color(tint) },
      customdata: list.map((l) => [l.alone_db, l.left_out_db, l.local_db]),
      hovertemplate: "%{x}<br>%{y:.1f} % of the noise<br>alone %{customdata[0]:.1f} dB, left out %{customdata[1]:.1f} dB, local %{customdata[2]:.1f} dB<extra></extra>",
    });
    const traces = [bars(layers.filter((l) => !kept.has(l.name)), "layer", "accent")];
    if (kept.size) traces.push(bars(layers.filter((l) => kept.has(l.name)), "proposed to keep", "second"));
    const order = layers.map((l) => l.name);
    draw(id, traces, {
      xaxis: { ...names(order), categoryorder: "array", categoryarray: order }, showlegend: kept.size > 0,
      yaxis: { title: { text: "% of the outputs' noise" } }, barmode: "overlay",
    });
  }

  function drawPareto(id) {
    const { points, cost, value } = data.pareto;
    const front = points.filter((p) => p.front).sort((a, b) => a.x - b.x);
    const middle = (Math.min(...points.map((p) => p.x)) + Math.max(...points.map((p) => p.x))) / 2;
    const trace = (list, more) => ({
      x: list.map((p) => p.x), y: list.map((p) => p.y), text: list.map((p) => p.label),
      hovertemplate: `%{text}<br>${cost} %{x}<br>${value} %{y}<extra></extra>`, ...more,
    });
    const exact = data.pareto.float === null || !points.length ? [] : [{
      x: [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))], y: [data.pareto.float, data.pareto.float],
      name: "float model", mode: "lines", line: { color: color("second"), dash: "dash", width: 2 }, hovertemplate: `float model<br>${value} %{y}<extra></extra>`,
    }];
    draw(id, [
      ...exact,
      trace(points.filter((p) => !p.front), { name: "others", mode: "markers", marker: { color: color("third"), size: 8, opacity: 0.7 } }),
      trace(front, {
        name: "best", mode: isNarrow() ? "lines+markers" : "lines+markers+text", line: { color: color("accent"), shape: "hv", width: 2 },
        marker: { color: color("accent"), size: 10 }, cliponaxis: false,
        textposition: front.map((p) => (p.x < middle ? "bottom right" : "bottom left")), // within the plot
      }),
    ], { xaxis: { title: { text: cost } }, yaxis: { title: { text: value } }, hovermode: "closest" });
  }

  function sort(table, column, heading) {
    const down = heading.getAttribute("aria-sort") === "ascending";
    const key = (row) => {
      const cell = row.cells[column];
      const text = cell.dataset.value ?? cell.textContent.trim();
      return text === "-" || text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
    };
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what has no number comes last, either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      return down ? -order : order;
    });
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      heading.tabIndex = 0;
      heading.addEventListener("click", () => sort(table, column, heading));
      heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(table, column, heading); });
    });
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.nextElementSibling;
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "copied";
      } catch { // a page opened as a file may not write to the clipboard: select it instead
        getSelection().selectAllChildren(text);
        button.textContent = "selected: press Ctrl-C";
      }
    });
  }
  at("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));

  if (at("plot-sqnr")) plots.set("plot-sqnr", drawNoise);
  if (data.pictures && at("layer")) {
    const shown = data.layers.map((l) => l.name).filter((n) => data.pictures.weights.some((h) => h.tensor === n) || data.pictures.activations.some((h) => h.layers.includes(n)));
    at("layer").append(...shown.map((n) => new Option(n)));
    at("layer").addEventListener("change", drawLayer);
    for (const row of document.querySelectorAll("tr[data-layer]")) {
      row.addEventListener("click", () => {
        if (!shown.includes(row.dataset.layer)) return;
        at("layer").value = row.dataset.layer;
        drawLayer();
      });
    }
    plots.set("plot-weights", drawLayer);
  }
  if (data.sensitivity && at("plot-sensitivity")) plots.set("plot-sensitivity", drawSensitivity);
  if (data.pareto) plots.set("plot-pareto", drawPareto);
  setTheme(dark.matches ? "dark" : "light");

  async function start() {
    const packed = Uint8Array.from(atob(at("plotly").textContent), (c) => c.charCodeAt(0));
    const script = document.createElement("script");
    script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
    drawAll();
    root.dataset.drawn = plots.size; // for whoever waits for the plots
  }
  start();
})();
