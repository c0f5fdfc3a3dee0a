"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const many = page.runs.length > 5;
  const hidden = new Set();
  const logarithmic = new Map(page.charts.map((chart) => [chart.key, chart.log]));
  const complete = new Set();
  const offKinds = new Set();
  let plots = [];

  // ---- the data: base64 of differences of steps (uint16), or steps (uint32, float64), and of float32 values
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  function steps([form, text]) {
    if (form === "u") return Array.from(new Uint32Array(bytes(text)));
    if (form === "f") return Array.from(new Float64Array(bytes(text)));
    let sum = 0;
    return Array.from(new Uint16Array(bytes(text)), (d) => (sum += d));
  }
  const curve = (packed) => packed && { x: steps(packed[0]), y: Array.from(new Float32Array(bytes(packed[1]))) };
  for (const run of page.runs) {
    for (const key in run.curves) run.curves[key] = { raw: curve(run.curves[key][0]), smooth: curve(run.curves[key][1]) };
    run.marks = run.marks.map((mark) => ({ ...mark, x: steps(mark.x) }));
  }

  // ---- colours: those of the stylesheet, so that they follow the colour scheme
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function colourOf(run) {
    if (run.colour[0] === "c") return css("--c" + (run.colour[1] % 8));
    const t = run.colour[1] * 2, [a, b] = t < 1 ? ["--low", "--middle"] : ["--middle", "--high"];
    const [from, to] = [channels(css(a)), channels(css(b))];
    return "#" + from.map((c, i) => Math.round(c + (to[i] - c) * (t < 1 ? t : t - 1)).toString(16).padStart(2, "0")).join("");
  }
  const dashOf = (run) => (run.colour[0] === "c" && run.colour[1] >= 8 ? [6, 3] : undefined);
  const faint = (hex) => hex + (many ? "33" : "ff");

  const number = (v) => {
    if (v === null || v === undefined) return "-";
    const size = Math.abs(v);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? v.toExponential(2).replace(/\.?0+e/, "e") : String(+v.toPrecision(4));
  };
  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // ---- tables: sorted by a click on a column's name; what has no number comes last
  for (const table of document.querySelectorAll("table.values")) {
    const body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = element("button", "", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const of = (row) => row.cells[column];
        const rows = Array.from(body.rows).map((row) => ({ row, value: parseFloat(of(row).dataset.value), text: of(row).textContent }));
        const numbers = rows.some((each) => !isNaN(each.value));
        rows.sort((a, b) => {
          if (!numbers) return a.text.localeCompare(b.text, undefined, { numeric: true }) * (up ? 1 : -1);
          if (isNaN(a.value) || isNaN(b.value)) return isNaN(a.value) - isNaN(b.value);
          return (a.value - b.value) * (up ? 1 : -1);
        });
        body.append(...rows.map((each) => each.row));
      });
    });
  }
  const swatches = () => {
    for (const node of document.querySelectorAll("[data-run]")) {
      const run = page.runs[node.dataset.run];
      if (run) node.style.background = colourOf(run);
    }
  };

  const shown = (run) => !hidden.has(run.group);
  const charts = page.charts.filter((chart) => page.runs.some((run) => run.curves[chart.key]));
  const area = document.getElementById("charts");
  if (!charts.length && !page.runs.some((run) => run.marks.length)) return;
  area.hidden = false;

  // ---- the range of the steps, which all charts share
  let first = Infinity, last = -Infinity;
  for (const run of page.runs) {
    for (const key in run.curves) {
      const x = run.curves[key].raw.x;
      if (x.length) { first = Math.min(first, x[0]); last = Math.max(last, x[x.length - 1]); }
    }
    for (const mark of run.marks) if (mark.x.length) { first = Math.min(first, mark.x[0]); last = Math.max(last, mark.x[mark.x.length - 1]); }
  }
  if (first === last) last = first + 1;

  const sync = uPlot.sync("steps");
  const cursor = {
    sync: { key: "steps", scales: ["x", null] },
    y: false,
    points: { show: !many, size: 6 },
    drag: { x: true, y: false, setScale: true },
    // each curve has steps of its own: the value at the cursor is that of its nearest point
    dataIdx: (u, series, at) => {
      const x = u.data[0], y = u.data[series];
      if (series === 0 || !y || y[at] != null) return at;
      let before = at, after = at;
      while (before > 0 && y[before] == null) before--;
      while (after < y.length - 1 && y[after] == null) after++;
      if (y[before] == null) return after;
      if (y[after] == null) return before;
      return x[at] - x[before] <= x[after] - x[at] ? before : after;
    },
  };
  const axis = (extra) => ({
    stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 },
    font, ...extra,
  });
  const pen = document.createElement("canvas").getContext("2d");
  const font = "12px system-ui, sans-serif";
  const widthOf = (text) => ((pen.font = font), pen.measureText(text).width);
  // all charts begin at the same place, so that a step is above itself; their left axes have room for the names of rows
  const room = () => {
    const widest = Math.max(0, ...rowNames().map(widthOf)) + 24;
    return innerWidth < 600 ? Math.min(96, Math.max(46, widest)) : Math.min(220, Math.max(62, widest));
  };
  const rowNames = () => (!kinds.length ? [] : page.runs.length === 1 ? kinds.map((kind) => kind.label) : page.runs.filter((run) => run.marks.length).map((run) => run.name));
  function short(text, most) {  // both ends of a name stay: the seed is often at its end
    let kept = text.length;
    const cut = () => (kept === text.length ? text : text.slice(0, Math.ceil(kept / 2)) + "\u2026" + text.slice(text.length - Math.floor(kept / 2)));
    while (kept > 2 && widthOf(cut()) > most) kept--;
    return cut();
  }

  // the greatest value that a linear chart shows at first: a single outlier must not flatten the rest
  function ceiling(values) {
    const sorted = Float64Array.from(values).sort();
    const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
    const low = at(0.01), high = at(0.97), greatest = sorted[sorted.length - 1];
    const limit = high + 1.5 * (high - low);
    return high > low && greatest - low > 3 * (limit - low) ? limit : Infinity;
  }

  function usable(values, log) {
    return values.map((v) => (Number.isFinite(v) && (!log || v > 0) ? v : null));
  }

  const kinds = page.kinds.filter((kind) => page.runs.some((run) => run.marks.some((mark) => mark.kind === kind.key)));
  const kindOf = new Map(kinds.map((kind) => [kind.key, kind]));
  const marksOf = (run) => (shown(run) ? run.marks.filter((mark) => !offKinds.has(mark.kind)) : []);

  function drawShape(ctx, shape, x, y, size) {
    ctx.beginPath();
    if (shape === "cross") {
      ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
      ctx.moveTo(x - size, y + size); ctx.lineTo(x + size, y - size);
      ctx.stroke();
    } else if (shape === "tick") {
      ctx.moveTo(x, y - size); ctx.lineTo(x, y + size); ctx.stroke();
    } else if (shape === "circle") {
      ctx.arc(x, y, size, 0, 7); ctx.stroke();
    } else if (shape === "square") {
      ctx.rect(x - size, y - size, 2 * size, 2 * size); ctx.fill();
    } else {
      const up = shape === "back" ? [[size, -size], [size, size], [-size, 0]] : shape === "diamond"
        ? [[0, -size], [size, 0], [0, size], [-size, 0]] : [[0, -size], [size, size], [-size, size]];
      up.forEach(([dx, dy], i) => (i ? ctx.lineTo(x + dx, y + dy) : ctx.moveTo(x + dx, y + dy)));
      ctx.closePath(); ctx.fill();
    }
  }

  // 1, 2 or 5 times a power of ten, at or beyond a value
  function nice(value, direction) {
    const power = 10 ** Math.floor(Math.log10(value));
    const steps = [1, 2, 5, 10].map((factor) => factor * power);
    if (direction > 0) return steps.find((step) => step >= value * 1.0001) || steps[3];
    return steps.reverse().find((step) => step <= value * 0.9999) || power / 2;
  }
  function labels(u, at, log) {
    if (!log) return at.map(number);
    const decades = Math.log10(u.scales.y.max / u.scales.y.min), digits = decades > 8 ? "" : decades > 2.5 ? "1" : "125";
    const every = Math.ceil(decades / 8);
    return at.map((v) => {
      if (v === null) return "";
      const [digit, power] = v.toExponential(0).split("e");
      return digits ? (digits.includes(digit) ? number(v) : "") : digit === "1" && power % every === 0 ? number(v) : "";
    });
  }

  // ---- one chart
  function draw(chart) {
    const log = logarithmic.get(chart.key);
    const runs = page.runs.filter((run) => run.curves[chart.key] && shown(run));
    const figure = chart.figure, holder = figure.querySelector(".plot"), readout = figure.querySelector(".readout");
    const tables = [], series = [{}], owners = [null], strange = [];
    for (const smooth of [false, true]) {
      for (const run of runs) {
        const found = run.curves[chart.key], line = smooth ? found.smooth : found.raw;
        if (!line) continue;
        const y = usable(line.y, log);
        if (!smooth) line.y.forEach((v, i) => { if (!Number.isFinite(v)) strange.push([line.x[i], run]); });
        tables.push([line.x, y]);
        const colour = colourOf(run), covered = !smooth && found.smooth;
        series.push({
          label: run.name, stroke: covered ? faint(colour) : colour, width: smooth ? 2 : 1.25,
          dash: dashOf(run), points: { show: line.x.length < 40 && !covered, size: 4 }, spanGaps: false,
        });
        owners.push(covered ? null : run);
      }
    }
    const all = tables.flatMap((table) => table[1].filter((v) => v !== null));
    const limit = log || complete.has(chart.key) || !all.length ? Infinity : ceiling(all);
    const greatest = all.reduce((a, b) => Math.max(a, b), -Infinity);
    const tool = figure.querySelector(".all");
    tool.hidden = !(limit < Infinity || complete.has(chart.key));
    tool.textContent = limit < Infinity ? `values up to ${number(greatest)}: show all` : "show most";
    figure.querySelector(".strange").textContent = strange.length ? "\u2715 at the upper edge: not finite" : "";
    figure.querySelector(".log").textContent = log ? "log scale: switch to linear" : "linear scale: switch to log";
    const data = tables.length ? uPlot.join(tables) : [[first, last]];
    const plot = new uPlot({
      width: holder.clientWidth, height: chart.key === "loss" ? 320 : 210,
      legend: { show: false }, cursor, series,
      scales: {
        x: { time: false, range: (u, min, max) => (min === max || min === null ? [first, last] : [min, max]) },
        y: log ? { distr: 3, range: (u, min, max) => (min === null ? [0.1, 10] : [nice(min, -1), nice(max, 1)]) } : { range: (u, min, max) => (min === null ? [0, 1] : uPlot.rangeNum(min, Math.min(max, Math.max(limit, min + 1e-12)), 0.06, true)) },
      },
      axes: [axis({ label: chart.last ? "attempted step" : undefined, labelSize: 20, labelFont: font, size: 30 }),
        axis({ size: room(), values: (u, at) => labels(u, at, log) })],
      hooks: {
        draw: [(u) => marks(u, runs, strange)],
        setCursor: [(u) => tell(u, readout, owners)],
      },
    }, data, holder);
    plot.setScale("x", { min: first, max: last });
    sync.sub(plot);
    return plot;
  }

  // non-finite values and events at the upper edge; full lines for what changes the run, if there are few runs
  function marks(u, runs, strange) {
    const ctx = u.ctx, ratio = uPlot.pxRatio, { left, top, width, height } = u.bbox;
    ctx.save();
    ctx.beginPath(); ctx.rect(left, top - 6 * ratio, width, height + 6 * ratio); ctx.clip();
    ctx.lineWidth = 1.5 * ratio;
    for (const run of runs) {
      for (const mark of marksOf(run)) {
        const kind = kindOf.get(mark.kind);
        if (!kind.line || many) continue;
        ctx.strokeStyle = css(kind.colour); ctx.setLineDash([4 * ratio, 3 * ratio]);
        ctx.beginPath();
        for (const step of mark.x) {
          const x = u.valToPos(step, "x", true);
          ctx.moveTo(x, top); ctx.lineTo(x, top + height);
        }
        ctx.stroke();
      }
    }
    ctx.setLineDash([]);
    ctx.strokeStyle = ctx.fillStyle = css("--bad");
    for (const [step] of strange) drawShape(ctx, "cross", u.valToPos(step, "x", true), top + 5 * ratio, 3 * ratio);
    ctx.restore();
  }

  function tell(u, readout, owners) {
    const at = u.cursor.idx;
    readout.replaceChildren();
    if (at === null || at === undefined || u.cursor.left < 0) return;
    const near = [];
    owners.forEach((run, i) => {
      const idx = run && u.cursor.idxs[i], y = idx === null || idx === undefined ? null : u.data[i][idx];
      if (run && y != null) near.push({ run, y, away: Math.abs(u.valToPos(y, "y") - u.cursor.top) });
    });
    if (near.length > 5) { near.sort((a, b) => a.away - b.away); near.length = 3; }
    readout.append(`step ${Math.round(u.posToVal(u.cursor.left, "x"))}`);
    for (const { run, y } of near) {
      const swatch = element("span", "swatch");
      swatch.style.background = colourOf(run);
      readout.append("  \u00a0", swatch, `${run.name} `, element("b", "", number(y)));
    }
  }

  // ---- the events: one row for each run, or for each kind of a single run
  function drawEvents(figure) {
    const holder = figure.querySelector(".plot"), readout = figure.querySelector(".readout");
    const single = page.runs.length === 1;
    const runs = page.runs.filter((run) => shown(run) && run.marks.length);
    const rows = single ? kinds.filter((kind) => !offKinds.has(kind.key)).map((kind) => kind.label) : runs.map((run) => run.name);
    const rowOf = (run, mark) => (single ? rows.indexOf(kindOf.get(mark.kind).label) : runs.indexOf(run));
    const left = room();
    const plot = new uPlot({
      width: holder.clientWidth, height: Math.max(1, rows.length) * 18 + 52,
      legend: { show: false }, cursor: { ...cursor, points: { show: false } },
      series: [{}, { show: true, stroke: "transparent", points: { show: false } }],
      scales: {
        x: { time: false, range: (u, min, max) => (min === max || min === null ? [first, last] : [min, max]) },
        y: { range: () => [-0.5, Math.max(1, rows.length) - 0.5], dir: -1 },
      },
      axes: [axis({ label: "attempted step", labelSize: 20, labelFont: font, size: 30 }),
        axis({ size: left, splits: () => rows.map((_, i) => i), values: (u, at) => at.map((i) => short(rows[i] || "", left - 20)) })],
      hooks: {
        draw: [(u) => {
          const ctx = u.ctx, ratio = uPlot.pxRatio, { left, top, width, height } = u.bbox;
          ctx.save();
          ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
          ctx.lineWidth = 1.5 * ratio;
          for (const run of runs) for (const mark of marksOf(run).reverse()) {  // the rarest on top
            const kind = kindOf.get(mark.kind), row = rowOf(run, mark);
            if (row < 0) continue;
            ctx.strokeStyle = ctx.fillStyle = css(kind.colour);
            mark.x.forEach((step, i) => {
              ctx.globalAlpha = mark.count ? 0.25 + 0.75 * Math.min(1, mark.count[i] / mark.every) : kind.shape === "tick" ? 0.7 : 1;
              drawShape(ctx, kind.shape, u.valToPos(step, "x", true), u.valToPos(row, "y", true), 4 * ratio);
            });
          }
          ctx.restore();
        }],
        setCursor: [(u) => {
          readout.replaceChildren();
          if (u.cursor.left < 0 || u.cursor.left === null) return;
          const found = [];
          for (const run of runs) for (const mark of marksOf(run)) mark.x.forEach((step, i) => {
            const dx = Math.abs(u.valToPos(step, "x") - u.cursor.left), dy = Math.abs(u.valToPos(rowOf(run, mark), "y") - u.cursor.top);
            if (dx <= 6) found.push({ run, mark, step, i, dx, away: dy > 9, rank: kinds.indexOf(kindOf.get(mark.kind)) });
          });
          found.sort((a, b) => a.away - b.away || a.rank - b.rank || a.dx - b.dx);  // its row, then the rarest kind
          for (const { run, mark, step, i } of found.slice(0, 2)) {
            const count = mark.count ? ` \u00d7 ${mark.count[i]} within ${mark.every} steps` : "";
            const reason = mark.reasons && mark.reasons[i] ? `: ${mark.reasons[i]}` : "";
            readout.append(element("b", "", `${kindOf.get(mark.kind).label}${count}`), ` at step ${step}${single ? "" : " of " + run.name}${reason}  `);
          }
        }],
      },
    }, [[first, last], [null, null]], holder);
    plot.setScale("x", { min: first, max: last });
    sync.sub(plot);
    return plot;
  }

  // ---- the figures, once; what they show is drawn again when something changes
  function makeFigure(name, unit, tools) {
    const figure = element("figure"), caption = element("figcaption");
    caption.append(element("span", "name", name), element("span", "unit", unit), ...tools);
    figure.append(caption, element("div", "readout"), element("div", "plot"));
    area.append(figure);
    return figure;
  }
  function makeTool(className, action) {
    const button = element("button", `tool ${className}`);
    button.type = "button";
    button.addEventListener("click", () => { action(); redraw(); });
    return button;
  }
  const flip = (set, key) => (set.has(key) ? set.delete(key) : set.add(key));
  function makeChip(set, key, parts, explanation) {
    const chip = element("button", "chip");
    chip.type = "button";
    chip.append(...parts);
    chip.title = explanation;
    chip.setAttribute("aria-pressed", "true");
    chip.addEventListener("click", () => {
      flip(set, key);
      chip.setAttribute("aria-pressed", String(!set.has(key)));
      redraw();
    });
    return chip;
  }
  charts.forEach((chart, i) => {
    chart.last = i === charts.length - 1 && !kinds.length;
    chart.figure = makeFigure(chart.title, chart.unit, [
      makeTool("log", () => logarithmic.set(chart.key, !logarithmic.get(chart.key))),
      makeTool("all", () => flip(complete, chart.key)),
      element("span", "strange"),
    ]);
    chart.figure.dataset.chart = chart.key;
  });
  let events = null;
  if (kinds.length) {
    events = makeFigure("Events", "what the plugins did, and why", []);
    events.dataset.chart = "events";
    const list = element("div", "legend");
    for (const kind of kinds) {
      const icon = element("canvas");
      icon.width = icon.height = 24;
      icon.style.cssText = "width:12px;height:12px;margin-right:5px;vertical-align:middle";
      icon.dataset.kind = kind.key;
      list.append(makeChip(offKinds, kind.key, [icon, `${kind.label}: ${kind.meaning}`], "show or hide"));
    }
    events.querySelector("figcaption").after(list);
  }
  const legend = document.getElementById("legend");
  if (page.runs.length > 1) {
    for (const group of new Set(page.runs.map((run) => run.group))) {
      const members = page.runs.filter((run) => run.group === group), swatch = element("span", "swatch");
      swatch.dataset.run = page.runs.indexOf(members[0]);
      const count = members.length > 1 ? ` (${members.length} runs)` : "";
      legend.append(makeChip(hidden, group, [swatch, group + count], members.map((run) => run.name).join("\n")));
    }
  }

  function redraw() {
    const kept = plots.length && plots[0].scales.x;
    plots.forEach((plot) => { sync.unsub(plot); plot.destroy(); });
    plots = [...charts.map(draw), ...(events ? [drawEvents(events)] : [])];
    if (kept && kept.min !== null) plots.forEach((plot) => plot.setScale("x", { min: kept.min, max: kept.max }));
    swatches();
    for (const icon of document.querySelectorAll("canvas[data-kind]")) {
      const kind = kindOf.get(icon.dataset.kind), ctx = icon.getContext("2d");
      ctx.clearRect(0, 0, 24, 24);
      ctx.strokeStyle = ctx.fillStyle = css(kind.colour);
      ctx.lineWidth = 3;
      drawShape(ctx, kind.shape, 12, 12, 8);
    }
    document.documentElement.dataset.drawn = plots.length;
  }
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
})();
