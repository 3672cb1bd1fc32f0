// Small building blocks. Text reaches the document through text nodes only: never as markup.

const DATA = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === 'function') node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props = {}, ...children) => fill(document.createElementNS(SVG, tag), props, children);

function number(value) {
  if (value === null || value === undefined) return '\u2013';
  if (value === 0) return '0';
  const size = Math.abs(value);
  const text = size >= 100 ? Math.round(value).toLocaleString('en') : size >= 10 ? value.toFixed(1)
    : size >= 0.01 ? value.toFixed(size < 0.1 ? 3 : 2) : value.toExponential(1);
  return text.replace('-', '\u2212');
}

// Where each [value, low, high] stands between the worst and the best, 0 to 1; on a log scale when values span decades.
// Null where there is no value, and for all when the best and the worst differ by less than the typical interval.
function shares(entries, better) {
  const known = entries.filter((e) => e[0] !== null);
  const values = known.map((e) => e[0]);
  const wide = known.length && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 30;
  const at = (v) => (wide ? Math.log(v) : v);
  const [low, high] = [Math.min(...values.map(at)), Math.max(...values.map(at))];
  const halves = known.filter((e) => e[1] !== null && (!wide || e[1] > 0)).map((e) => (at(e[2]) - at(e[1])) / 2).sort((a, b) => a - b);
  const typical = halves[Math.floor(halves.length / 2)] ?? 0;
  return entries.map(([v]) => {
    if (v === null || !(high - low > typical)) return null;
    const share = (at(v) - low) / (high - low);
    return better === 'high' ? share : 1 - share;
  });
}

// A horizontal or vertical scale from values to pixels, with ticks; `log` for positive values over decades.
function scale(values, from, to, { log = false, zero = false, unit = false } = {}) {
  const known = values.filter((v) => v !== null && (!log || v > 0));
  let low = unit ? 0 : Math.min(...known);
  let high = unit ? 1 : Math.max(...known);
  if (zero) low = Math.min(0, low);
  if (!known.length) [low, high] = log ? [1, 10] : [0, 1];
  if (log) {
    low = 10 ** Math.floor(Math.log10(low));
    high = 10 ** Math.ceil(Math.log10(high) + 1e-9);
    const place = (v) => from + ((Math.log10(v) - Math.log10(low)) / (Math.log10(high) - Math.log10(low))) * (to - from);
    const ticks = [];
    for (let t = low; t <= high * 1.001; t *= 10) ticks.push(t);
    return { place, ticks };
  }
  const pad = unit ? 0 : (high - low || 1) * 0.06;
  if (!zero || low < 0) low -= pad;
  high += pad;
  const raw = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + 1e-12; i++) ticks.push(i * size);
  return { place: (v) => from + ((v - low) / (high - low)) * (to - from), ticks };
}

const WIDTH = 560;
const HEIGHT = 340;
const FRAME = { left: 58, right: 14, top: 14, bottom: 44 };

// An empty plot with grid, ticks and axis titles; what it shows is appended to it.
function plot(x, y, xTitle, yTitle, label) {
  const root = svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label });
  for (const t of y.ticks) {
    root.append(svg('line', { class: 'grid', x1: FRAME.left, x2: WIDTH - FRAME.right, y1: y.place(t), y2: y.place(t) }),
      svg('text', { class: 'tick', x: FRAME.left - 7, y: y.place(t) + 4, 'text-anchor': 'end' }, number(t)));
  }
  for (const t of x.ticks) {
    root.append(svg('line', { class: 'grid', y1: FRAME.top, y2: HEIGHT - FRAME.bottom, x1: x.place(t), x2: x.place(t) }),
      svg('text', { class: 'tick', x: x.place(t), y: HEIGHT - FRAME.bottom + 16, 'text-anchor': 'middle' }, number(t)));
  }
  root.append(
    svg('text', { class: 'title', x: (FRAME.left + WIDTH - FRAME.right) / 2, y: HEIGHT - 8, 'text-anchor': 'middle' }, xTitle),
    svg('text', { class: 'title', x: 14, y: HEIGHT / 2 - 12, 'text-anchor': 'middle',
      transform: `rotate(-90 14 ${HEIGHT / 2 - 12})` }, yTitle));
  return root;
}

// Marks that differ in shape as well as in color.
function mark(style, x, y, size = 5) {
  const shapes = [
    () => svg('circle', { cx: x, cy: y, r: size }),
    () => svg('rect', { x: x - size, y: y - size, width: 2 * size, height: 2 * size }),
    () => svg('path', { d: `M${x} ${y - size * 1.3}L${x + size * 1.2} ${y + size}L${x - size * 1.2} ${y + size}Z` }),
    () => svg('path', { d: `M${x} ${y - size * 1.4}L${x + size * 1.4} ${y}L${x} ${y + size * 1.4}L${x - size * 1.4} ${y}Z` }),
    () => svg('path', { d: `M${x} ${y + size * 1.3}L${x + size * 1.2} ${y - size}L${x - size * 1.2} ${y - size}Z` }),
    () => svg('path', { d: `M${x - size} ${y - size / 2.5}H${x - size / 2.5}V${y - size}H${x + size / 2.5}V${y - size / 2.5}H${x + size}V${y + size / 2.5}H${x + size / 2.5}V${y + size}H${x - size / 2.5}V${y + size / 2.5}H${x - size}Z` }),
  ];
  return fill(shapes[style](), { class: `mark s${style}` }, []);
}
