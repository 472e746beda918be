"use strict";
(async function () {
  const started = performance.now();
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const header = JSON.parse($("header").textContent);
  const rows = header.rows;

  // Light and dark: the system's choice until the button is pressed.
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (systemIsDark.matches ? "dark" : "light")) === "dark";
  const repaint = [];
  function themeChanged() {
    $("theme").textContent = isDark() ? "light" : "dark";
    repaint.forEach((paint) => paint());
  }
  $("theme").onclick = () => { root.dataset.theme = isDark() ? "light" : "dark"; themeChanged(); };
  systemIsDark.addEventListener("change", themeChanged);
  themeChanged();

  // The block of data: names, then the upper bytes of every column as planes, then the numbers of reasons.
  async function unpack() {
    const text = atob($("data").textContent);
    const packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const length = new DataView(bytes.buffer).getUint32(0, true);
    const names = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
    let at = 4 + length;
    const columns = new Map();
    for (const column of header.columns) {
      const raw = new Uint8Array(8 * rows);
      for (let plane = 0; plane < column.bytes; plane++, at += rows)
        for (let row = 0; row < rows; row++) raw[8 * row + 7 - plane] = bytes[at + row];
      const values = new Float64Array(raw.buffer);
      let reasons = null;
      if (column.reasons) {
        reasons = new Uint16Array(rows);
        for (let row = 0; row < rows; row++) reasons[row] = 256 * bytes[at + row] + bytes[at + rows + row];
        at += 2 * rows;
      }
      const missing = reasons ? (row) => reasons[row] > 0
        : column.nan_is_missing ? (row) => Number.isNaN(values[row]) : () => false;
      columns.set(column.name, { ...column, values, reasons, missing });
    }
    return { names, columns };
  }

  let data;
  try {
    data = await unpack();
  } catch (error) {
    $("notice").textContent = "The rows cannot be unpacked: " + error.message
      + ". This page needs a browser with DecompressionStream (from 2023 on).";
    return;
  }
  const { names, columns } = data;
  $("notice").hidden = true;
  $("by-depth").hidden = $("in-rows").hidden = false;

  function format(value) {
    if (Number.isNaN(value)) return "NaN";
    if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
  }
  // As result.elided: words in the middle go first; numbers and the last word stay.
  function elided(name, most) {
    if (name.length <= most) return name;
    const parts = name.split("."), centre = (parts.length - 1) / 2;
    const candidates = [...parts.keys()].slice(0, -1).filter((i) => !/\d/.test(parts[i]))
      .sort((i, j) => Math.abs(i - centre) - Math.abs(j - centre) || j - i);
    let text = name;
    for (const dropped of candidates) {
      parts[dropped] = "\u2026";
      text = parts.join(".").replace(/\.?\u2026(\.\u2026)*\.?/g, "\u2026");
      if (text.length <= most) return text;
    }
    const head = Math.floor((most - 1) / 2);
    return text.slice(0, head) + "\u2026" + text.slice(text.length - (most - 1 - head));
  }
  function element(kind, className, text) {
    const made = document.createElement(kind);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // ---- The plots ----

  let view = [0, Math.max(rows - 1, 1)];
  let hovered = null;
  const panels = [];
  const LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function setView(first, last) {
    const least = Math.min(4, Math.max(rows - 1, 1));
    let width = clamp(last - first, least, Math.max(rows - 1, 1));
    first = clamp(first, 0, Math.max(rows - 1, 1) - width);
    view = [first, first + width];
    const shown = [Math.ceil(view[0]), Math.min(Math.floor(view[1]), rows - 1)];
    $("range").textContent = shown[0] === 0 && shown[1] === rows - 1 ? `all ${rows.toLocaleString("en-US")} rows`
      : `rows ${(shown[0] + 1).toLocaleString("en-US")} to ${(shown[1] + 1).toLocaleString("en-US")}`;
    paintPanels();
    if ($("in-range").checked) select();
  }
  const zoom = (factor, centre = (view[0] + view[1]) / 2) =>
    setView(centre - (centre - view[0]) * factor, centre + (view[1] - centre) * factor);
  const pan = (share) => { const by = share * (view[1] - view[0]); setView(view[0] + by, view[1] + by); };
  $("closer").onclick = () => zoom(0.5);
  $("wider").onclick = () => zoom(2);
  $("earlier").onclick = () => pan(-0.5);
  $("later").onclick = () => pan(0.5);
  $("everything").onclick = () => setView(0, rows - 1);

  // Whether a column is better read on a log axis: no negative values, and more than a factor of 20 between them.
  function wantsLog(panel) {
    let least = Infinity, most = 0;
    for (const column of [panel.line, panel.lower, panel.upper].filter(Boolean))
      for (let row = 0; row < rows; row++) {
        const value = column.values[row];
        if (column.missing(row) || !Number.isFinite(value)) continue;
        if (value < 0) return false;
        if (value > 0) { least = Math.min(least, value); most = Math.max(most, value); }
      }
    return most > 20 * least;
  }

  function makePanel(description) {
    const box = element("div", "panel");
    const head = element("div", "panel-head");
    const canvas = element("canvas");
    const value = element("span", "value");
    const scale = element("button");
    scale.type = "button";
    const panel = { canvas, value, title: description.title };
    for (const role of ["line", "lower", "upper"])
      panel[role] = description[role] ? columns.get(description[role]) : null;
    panel.log = wantsLog(panel);
    const title = element("h3", "", description.title);
    title.title = [panel.line, panel.lower, panel.upper].filter(Boolean)
      .map((column) => column.name + ": " + column.meaning).join("\n");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", description.title + " by row");
    const label = () => { scale.textContent = panel.log ? "log" : "lin"; scale.title = "logarithmic or linear axis"; };
    scale.onclick = () => { panel.log = !panel.log; label(); paint(panel); };
    label();
    head.append(title, value, scale);
    box.append(head, canvas);
    $("panels").append(box);
    interact(panel);
    panels.push(panel);
  }

  const shownValue = (column, row) => column.missing(row) ? "\u2013" : format(column.values[row]);
  function paintPanels() {
    for (const panel of panels) paint(panel);
  }

  // Lowest and highest value of the rows in view, in the units of the axis (log10 on a log axis).
  function limits(panel, first, last) {
    let low = Infinity, high = -Infinity;
    const main = panel.line || panel.upper;
    const see = (column, least, most) => {
      for (let row = first; row <= last; row++) {
        let value = column.values[row];
        if (column.missing(row) || !Number.isFinite(value)) continue;
        if (panel.log) { if (value <= 0) continue; value = Math.log10(value); }
        low = Math.min(low, Math.max(value, least)); high = Math.max(high, Math.min(value, most));
      }
    };
    see(main, -Infinity, Infinity);
    if (low > high) { low = 0; high = 1; }
    // Bounds may be far away: they are shown as far as the line itself reaches, or two units beyond.
    const reach = Math.max(high - low, panel.log ? 1 : Math.abs(high) / 2);
    const [least, most] = [low - reach, high + reach];
    for (const column of [panel.lower, panel.upper].filter(Boolean)) see(column, least, most);
    if (!panel.log && low > 0 && low < 0.5 * high) low = 0;
    const room = high - low || (panel.log ? 1 : Math.abs(high) || 1);
    return low === high ? [low - room / 2, high + room / 2] : [low - 0.04 * room, high + 0.06 * room];
  }

  function ticks(low, high, log) {
    if (log) {
      const span = high - low;
      if (span < 2.4) {
        return (span < 1.2 ? [1, 2, 5] : [1, 3]).flatMap((digit) => Array.from({ length: Math.ceil(span) + 2 }, (_, i) =>
          Math.log10(digit) + Math.floor(low) + i)).filter((tick) => tick >= low && tick <= high)
          .map((tick) => [tick, format(Number((10 ** tick).toPrecision(2)))]);
      }
      const step = Math.max(1, Math.ceil(span / 5));
      const made = [];
      for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step)
        made.push([tick, tick >= -2 && tick <= 3 ? String(Number((10 ** tick).toPrecision(2))) : "1e" + tick]);
      return made;
    }
    const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
    const made = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) made.push([i * step, format(Number((i * step).toPrecision(4)))]);
    return made;
  }

  function paint(panel) {
    const { canvas } = panel, ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(name).trim();
    const ink = canvas.getContext("2d");
    ink.setTransform(ratio, 0, 0, ratio, 0, 0);
    ink.clearRect(0, 0, width, height);
    const first = clamp(Math.floor(view[0]), 0, rows - 1), last = clamp(Math.ceil(view[1]), 0, rows - 1);
    const [low, high] = limits(panel, first, last);
    const x = (row) => LEFT + (row - view[0]) / (view[1] - view[0]) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (high - value) / (high - low) * (height - TOP - BOTTOM);
    const floor = height - BOTTOM;
    ink.font = "11px system-ui, sans-serif";
    ink.lineWidth = 1;
    ink.strokeStyle = colour("--grid");
    ink.fillStyle = colour("--muted");
    ink.textBaseline = "middle";
    ink.textAlign = "right";
    for (const [tick, text] of ticks(low, high, panel.log)) {
      ink.beginPath(); ink.moveTo(LEFT, y(tick)); ink.lineTo(width - RIGHT, y(tick)); ink.stroke();
      ink.fillText(text, LEFT - 6, y(tick));
    }
    ink.textBaseline = "alphabetic";
    for (const [tick, text] of ticks(view[0] + 1, view[1] + 1, false)) {
      if (!Number.isInteger(tick)) continue;
      ink.textAlign = x(tick - 1) > width - 30 ? "right" : x(tick - 1) < LEFT + 10 ? "left" : "center";
      ink.fillText(text, x(tick - 1), height - 6);
    }
    ink.save();
    ink.beginPath(); ink.rect(LEFT - 3, 0, width - LEFT - RIGHT + 6, floor + 3); ink.clip();
    const axis = (value) => panel.log ? Math.log10(value) : value;
    const at = (column, row, instead) => {
      const value = column ? column.values[row] : NaN;
      return !column || column.missing(row) || !Number.isFinite(value) ? instead : y(clamp(axis(value), low, high));
    };
    if (panel.lower || panel.upper) {
      ink.fillStyle = colour("--band");
      const above = TOP, below = floor;
      ink.beginPath();
      const step = Math.max(1, Math.floor((last - first) / (2 * width)));
      for (let row = first; row <= last; row += step)
        ink.lineTo(x(row), panel.upper && panel.upper.missing(row) ? below : at(panel.upper, row, above));
      for (let row = last; row >= first; row -= step)
        ink.lineTo(x(row), panel.upper && panel.upper.missing(row) ? below : at(panel.lower, row, below));
      ink.fill();
    }
    const column = panel.line;
    if (column) {
      // More rows than pixels: the lowest and the highest value of each pixel, in the order of the rows.
      const perPixel = Math.max(1, Math.floor((last - first) / (2 * (width - LEFT - RIGHT))));
      ink.strokeStyle = ink.fillStyle = colour("--line");
      ink.lineWidth = 1.5;
      ink.lineJoin = "round";
      ink.beginPath();
      let isOpen = false, points = 0;
      const lost = [], zeros = [];
      for (let start = first; start <= last; start += perPixel) {
        let lowest = -1, highest = -1;
        for (let row = start; row < Math.min(start + perPixel, last + 1); row++) {
          if (column.missing(row)) continue;
          const value = column.values[row];
          if (!Number.isFinite(value)) { lost.push(row); isOpen = false; continue; }
          if (panel.log && value <= 0) { zeros.push(row); isOpen = false; continue; }
          if (lowest < 0 || value < column.values[lowest]) lowest = row;
          if (highest < 0 || value > column.values[highest]) highest = row;
        }
        if (lowest < 0) continue;
        for (const row of lowest === highest ? [lowest] : [Math.min(lowest, highest), Math.max(lowest, highest)]) {
          const spot = [x(row), y(axis(column.values[row]))];
          if (isOpen) ink.lineTo(...spot); else ink.moveTo(...spot);
          isOpen = true; points++;
        }
      }
      ink.stroke();
      if (points <= 60)
        for (let row = first; row <= last; row++)
          if (!column.missing(row) && Number.isFinite(column.values[row]) && !(panel.log && column.values[row] <= 0)) {
            ink.beginPath(); ink.arc(x(row), y(axis(column.values[row])), 2.4, 0, 7); ink.fill();
          }
      // Not a number or infinite: a bar at the ceiling. Zero or negative on a log axis: a bar at the floor.
      const mark = (places, top, words, baseline) => {
        if (!places.length) return;
        let previous = -10;
        for (const row of places)
          if (x(row) - previous >= 1) { previous = x(row); ink.fillRect(previous - 1, top, 2, 8); }
        ink.textBaseline = "middle";
        const begin = x(places[0]);
        ink.textAlign = begin > width / 2 ? "right" : "left";
        ink.fillText(words, begin + (begin > width / 2 ? -5 : 5), baseline);
      };
      ink.fillStyle = colour("--bad");
      mark(lost, TOP - 6, "inf or NaN", TOP + 10);
      mark(zeros, floor - 6, "0", floor - 12);
    }
    if (hovered !== null && hovered >= first && hovered <= last) {
      ink.strokeStyle = colour("--muted");
      ink.lineWidth = 1;
      ink.beginPath(); ink.moveTo(x(hovered), TOP); ink.lineTo(x(hovered), floor); ink.stroke();
    }
    if (panel.drag) {
      ink.fillStyle = colour("--band");
      ink.fillRect(Math.min(...panel.drag), TOP, Math.abs(panel.drag[1] - panel.drag[0]), floor - TOP);
    }
    ink.restore();
    if (hovered === null) panel.value.textContent = "";
    else {
      const values = [panel.lower, panel.line, panel.upper].filter(Boolean).map((each) => shownValue(each, hovered));
      panel.value.textContent = `${elided(names[hovered], 26)}  ${values.join("  <  ")}`;
      panel.value.title = names[hovered];
    }
  }

  function interact(panel) {
    const { canvas } = panel;
    const touches = new Map();
    let start = null, pinch = null;
    const rowAt = (x) => view[0] + (x - LEFT) / (canvas.clientWidth - LEFT - RIGHT) * (view[1] - view[0]);
    const hover = (x) => { hovered = clamp(Math.round(rowAt(x)), 0, rows - 1); paintPanels(); };
    canvas.addEventListener("pointerdown", (event) => {
      touches.set(event.pointerId, event.offsetX);
      if (touches.size === 2) {
        pinch = { spread: Math.abs([...touches.values()][0] - [...touches.values()][1]), view: [...view] };
        start = panel.drag = null;
        return;
      }
      start = event.offsetX;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (touches.has(event.pointerId)) touches.set(event.pointerId, event.offsetX);
      if (pinch && touches.size === 2) {
        const spread = Math.abs([...touches.values()][0] - [...touches.values()][1]);
        const centre = (pinch.view[0] + pinch.view[1]) / 2;
        const half = (pinch.view[1] - pinch.view[0]) / 2 * pinch.spread / Math.max(spread, 10);
        setView(centre - half, centre + half);
        return;
      }
      if (start !== null) panel.drag = Math.abs(event.offsetX - start) > 4 ? [start, event.offsetX] : null;
      hover(event.offsetX);
    });
    const end = (event) => {
      touches.delete(event.pointerId);
      if (pinch) { if (!touches.size) pinch = null; return; }
      if (start === null) return;
      const drag = panel.drag;
      start = panel.drag = null;
      if (drag) setView(rowAt(Math.min(...drag)), rowAt(Math.max(...drag)));
      else if (event.type === "pointerup") showRow(hovered);
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", (event) => { touches.delete(event.pointerId); start = panel.drag = pinch = null; });
    canvas.addEventListener("pointerleave", () => { if (start === null) { hovered = null; paintPanels(); } });
    canvas.addEventListener("dblclick", () => setView(0, rows - 1));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.3 : 1 / 1.3, rowAt(event.offsetX));
    }, { passive: false });
  }

  // ---- The table: only the visible rows are in the document. ----

  const ROW = 28;
  // Browsers limit the height of an element: beyond it, the place of the scrollbar is scaled.
  const MOST_HEIGHT = 8e6;
  let shown = Uint32Array.from({ length: rows }, (_, row) => row);
  let order = { column: "row", direction: 1 };
  let found = null;
  let shownColumns = [];

  function comparison(text) {
    const parts = /^([a-z_]\w*)(<=|>=|!=|=|<|>)(.+)$/i.exec(text);
    if (!parts) return null;
    const column = columns.get(parts[1]) || [...columns.values()].find((each) => each.name.startsWith(parts[1]));
    if (!column) throw new Error(`There is no column ${parts[1]}`);
    const word = parts[3].toLowerCase(), operator = parts[2];
    if (word === "missing") return (row) => column.missing(row) === (operator !== "!=");
    if (word === "nan") return (row) => (!column.missing(row) && Number.isNaN(column.values[row])) === (operator !== "!=");
    const limit = word === "inf" ? Infinity : word === "-inf" ? -Infinity : Number(word);
    if (Number.isNaN(limit)) throw new Error(`${parts[3]} is not a number`);
    const holds = { "<": (a) => a < limit, ">": (a) => a > limit, "<=": (a) => a <= limit, ">=": (a) => a >= limit,
      "=": (a) => a === limit, "!=": (a) => a !== limit }[operator];
    return (row) => !column.missing(row) && holds(column.values[row]);
  }

  function conditions(text) {
    const made = [];
    for (const [word] of text.trim().matchAll(/\/(?:\\.|[^/])+\/|\S+/g)) {
      if (word.length > 2 && word.startsWith("/") && word.endsWith("/")) {
        const pattern = new RegExp(word.slice(1, -1));
        made.push((row) => pattern.test(names[row]));
      } else {
        const lower = word.toLowerCase();
        made.push(comparison(word) || ((row) => names[row].toLowerCase().includes(lower)));
      }
    }
    return made;
  }

  function select() {
    let all;
    try {
      all = conditions($("filter").value);
      $("filter-error").hidden = true;
    } catch (error) {
      $("filter-error").hidden = false;
      $("filter-error").textContent = error.message;
      return;
    }
    if ($("in-range").checked) all.push((row) => row >= Math.ceil(view[0]) && row <= view[1]);
    const kept = [];
    for (let row = 0; row < rows; row++) if (all.every((holds) => holds(row))) kept.push(row);
    shown = Uint32Array.from(kept);
    sort();
  }

  function sort() {
    const { column, direction } = order;
    if (column === "row") {
      shown.sort();
      if (direction < 0) shown.reverse();
    } else if (column === "name") {
      const collator = new Intl.Collator("en", { numeric: true });
      shown.sort((a, b) => direction * collator.compare(names[a], names[b]) || a - b);
    } else {
      const { values, missing } = columns.get(column);
      // NaN is greater than infinity; missing figures are last in both directions.
      const key = (row) => Number.isNaN(values[row]) ? Infinity : values[row];
      const isNaN_ = (row) => Number.isNaN(values[row]) ? 1 : 0;
      shown.sort((a, b) => {
        const gone = missing(a) - missing(b);
        if (gone || missing(a)) return gone || a - b;
        const [one, other] = [key(a), key(b)];
        return direction * (one < other ? -1 : one > other ? 1 : isNaN_(a) - isNaN_(b)) || a - b;
      });
    }
    $("count").textContent = shown.length === rows ? `${rows.toLocaleString("en-US")}`
      : `${shown.length.toLocaleString("en-US")} of ${rows.toLocaleString("en-US")}`;
    for (const cell of $("head").children)
      cell.setAttribute("aria-sort", cell.dataset.column !== column ? "none" : direction > 0 ? "ascending" : "descending");
    layOut();
    $("scroller").scrollTop = 0;
    paintRows();
  }

  function paintHead() {
    const withEmpty = $("all-columns").checked;
    shownColumns = [...columns.values()].filter((column) => withEmpty || !column.empty);
    $("head").replaceChildren();
    const titles = [["row", "row", "the place among the rows"], ["name", "name", "module; #2, #3, ... for further calls"],
      ...shownColumns.map((column) => [column.name, column.name.replaceAll("_", " "), column.meaning])];
    for (const [column, title, meaning] of titles) {
      const cell = element("div", "", title);
      cell.title = meaning;
      cell.dataset.column = column;
      cell.setAttribute("role", "columnheader");
      cell.tabIndex = 0;
      const byThis = () => {
        const isSame = order.column === column;
        // Figures begin with the largest, names and places with the first.
        order = { column, direction: isSame ? -order.direction : columns.has(column) ? -1 : 1 };
        sort();
      };
      cell.onclick = byThis;
      cell.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); byThis(); } };
      $("head").append(cell);
    }
  }

  const fullHeight = () => Math.min(shown.length * ROW, MOST_HEIGHT);
  function layOut() {
    $("spacer").style.height = fullHeight() + "px";
    $("spacer").style.width = $("head").scrollWidth + "px";
  }

  const ruler = document.createElement("canvas").getContext("2d");
  function fitting(name, room) {
    ruler.font = getComputedStyle($("scroller")).font;
    let text = name;
    for (let most = name.length; most > 8 && ruler.measureText(text).width > room;) {
      most = Math.min(most - 1, Math.ceil(most * room / ruler.measureText(text).width));
      text = elided(name, most);
    }
    return text;
  }

  function paintRows() {
    const scroller = $("scroller"), visible = Math.ceil(scroller.clientHeight / ROW) + 2;
    const most = Math.max(shown.length * ROW - scroller.clientHeight, 0);
    const scaled = fullHeight() < shown.length * ROW;
    const top = scaled ? scroller.scrollTop / (fullHeight() - scroller.clientHeight) * most : scroller.scrollTop;
    // An even first row keeps the stripes in place.
    const first = Math.max(0, Math.floor(top / ROW) - 1) & ~1;
    const room = $("head").children[1].clientWidth - 21;
    const cells = document.createDocumentFragment();
    for (let i = first; i < Math.min(first + visible + 2, shown.length); i++) {
      const row = shown[i], line = element("div", row === found ? "row found" : "row");
      line.dataset.row = row;
      line.setAttribute("role", "row");
      line.append(element("div", "", (row + 1).toLocaleString("en-US")));
      const name = element("div", "", fitting(names[row], room));
      name.title = names[row];
      line.append(name);
      for (const column of shownColumns) {
        const missing = column.missing(row), value = column.values[row];
        const cell = element("div", missing ? "none" : Number.isFinite(value) ? "" : "bad", shownValue(column, row));
        if (missing && column.reasons) cell.title = header.reasons[column.reasons[row] - 1] || "missing";
        line.append(cell);
      }
      cells.append(line);
    }
    $("body").style.transform = `translateY(${scaled ? scroller.scrollTop - (top - first * ROW) : first * ROW}px)`;
    $("body").replaceChildren(cells);
  }

  function showRow(row) {
    if (row === null) return;
    let place = shown.indexOf(row);
    if (place < 0) {
      $("filter").value = "";
      $("in-range").checked = false;
      select();
      place = shown.indexOf(row);
    }
    found = row;
    const scroller = $("scroller"), room = scroller.clientHeight;
    const share = fullHeight() < shown.length * ROW ? (fullHeight() - room) / (shown.length * ROW - room) : 1;
    scroller.scrollTop = Math.max(0, (place * ROW - room / 2) * share);
    paintRows();
    scroller.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  let asked = false;
  $("scroller").addEventListener("scroll", () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; paintRows(); });
  });
  let waiting = null;
  $("filter").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(select, 80); });
  $("in-range").addEventListener("change", select);
  $("all-columns").addEventListener("change", () => { paintHead(); sort(); });
  new ResizeObserver(() => { paintPanels(); layOut(); paintRows(); }).observe(document.body);

  paintHead();
  header.panels.forEach(makePanel);
  repaint.push(paintPanels);
  setView(0, Math.max(rows - 1, 1));
  sort();
  for (const section of ["missing"]) if (!$(section).querySelector("dt")) $(section).hidden = true;
  root.dataset.ready = Math.round(performance.now() - started);
})();
