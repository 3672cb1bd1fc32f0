// Line charts. All charts share one cursor: pointing at a step in one reads that step off in all of them.

const cursor = {
  step: null,
  charts: [],
  pending: false,
  move(step) {
    this.step = step;
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      for (const chart of this.charts) chart.read(this.step);
    });
  },
};

const FRAME = { left: 46, right: 10, top: 8, bottom: 22 };

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(i * size);
  return found;
}

// Short enough for the margin: 1e-5 rather than 1.00e-5.
function tickText(value, unit) {
  if (Math.abs(value) < 1e-12) value = 0;
  return number(value, unit === '%' ? '%' : '').replace(/\.?0*e/, 'e');
}

function domain(chart) {
  const values = chart.series.flatMap((s) => s.values).filter((v) => v !== null);
  if (!values.length) return [0, 1];
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  if (chart.unit === '%' && chart.full && low >= 0 && high <= 1) return [0, 1];
  if (low >= 0 && low < 0.4 * high) low = 0;
  // A flat line sits in the middle of its chart, not on an edge.
  if (high - low < 1e-12) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  const pad = (high - low) * 0.06;
  return [low === 0 ? 0 : low - pad, high + pad];
}

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

// A centered running mean, for the eye only; gaps stay gaps.
function smooth(values) {
  const reach = Math.max(2, Math.round(values.length / 30));
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((v) => v !== null);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

// Whether the values go up and down so much that a running mean shows more than they do.
function isNoisy(values) {
  const finite = values.filter((v) => v !== null);
  if (finite.length <= 20) return false;
  const range = finite.reduce((a, b) => Math.max(a, b)) - finite.reduce((a, b) => Math.min(a, b));
  const path = finite.slice(1).reduce((sum, v, i) => sum + Math.abs(v - finite[i]), 0);
  return path > 2 * range;
}

// Parts of a line between gaps, as path data, and the lonely points that no line reaches.
function trace(steps, values, x, y) {
  let path = '';
  const lonely = [];
  values.forEach((value, i) => {
    if (value === null) return;
    const before = i > 0 && values[i - 1] !== null;
    if (!before && (i + 1 >= values.length || values[i + 1] === null)) lonely.push([x(steps[i]), y(value)]);
    path += `${before ? 'L' : 'M'}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
  });
  return { path, lonely };
}

// chart: {key, title, unit, about, full, height, series: [{label, color, steps, values, points, faint}]}
function lineChart(chart) {
  const many = chart.series.length > 1;
  const read = el('div', { class: 'readout' });
  const frame = el('div', { class: 'plot' });
  const steps = [...new Set(chart.series.flatMap((s) => s.steps))].sort((a, b) => a - b);
  const missing = chart.series.reduce((sum, s) => sum + s.values.filter((v) => v === null).length, 0);
  let geometry = null;

  function draw() {
    const width = Math.max(220, frame.clientWidth || 320);
    const height = chart.height || 150;
    const [low, high] = domain(chart);
    const [first, last] = [steps[0], steps.at(-1)];
    const inner = width - FRAME.left - FRAME.right;
    const x = (s) => FRAME.left + (last === first ? inner / 2 : ((s - first) / (last - first)) * inner);
    const y = (v) => FRAME.top + (1 - (v - low) / (high - low)) * (height - FRAME.top - FRAME.bottom);
    const root = svg('svg', {
      width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: 'img', 'aria-label': describe(),
      keydown: keys, pointermove: point, pointerdown: point, pointerleave: () => cursor.move(null),
      blur: () => cursor.move(null),
    });
    for (const value of ticks(low, high, height > 200 ? 5 : 4)) {
      root.append(
        svg('line', { class: 'grid', x1: FRAME.left, x2: width - FRAME.right, y1: y(value), y2: y(value) }),
        svg('text', { class: 'tick', x: FRAME.left - 6, y: y(value) + 3.5, 'text-anchor': 'end' },
          tickText(value, chart.unit)));
    }
    for (const value of ticks(first, last, Math.max(2, Math.floor(width / 90)))) {
      if (!Number.isInteger(value)) continue;
      const edge = x(value) + 4 * String(value).length > width;
      root.append(svg('text', {
        class: 'tick', x: edge ? width - 1 : x(value), y: height - 5, 'text-anchor': edge ? 'end' : 'middle',
      }, String(value)));
    }
    for (const series of chart.series) {
      const color = `color-${series.color}`;
      const noisy = !series.points && isNoisy(series.values);
      const raw = trace(series.steps, series.values, x, y);
      root.append(svg('path', { class: `line ${color}${noisy || series.faint ? ' faint' : ''}`, d: raw.path }));
      if (noisy && !series.faint) {
        root.append(svg('path', { class: `line ${color}`, d: trace(series.steps, smooth(series.values), x, y).path }));
      }
      const dots = series.points
        ? series.values.map((v, i) => [x(series.steps[i]), v === null ? null : y(v)]).filter((p) => p[1] !== null)
        : raw.lonely;
      for (const [cx, cy] of dots) root.append(svg('circle', { class: `dot ${color}`, cx, cy, r: 3.2 }));
    }
    const line = svg('line', { class: 'cursor', y1: FRAME.top, y2: height - FRAME.bottom, visibility: 'hidden' });
    const marks = chart.series.map((s) => svg('circle', { class: `mark color-${s.color}`, r: 4, visibility: 'hidden' }));
    root.append(line, ...marks);
    const focused = frame.contains(document.activeElement);
    frame.replaceChildren(root);
    if (focused) root.focus();
    geometry = { x, y, line, marks, first, last, width };
    show(cursor.step);
  }

  function describe() {
    const parts = chart.series.map((s) => {
      const finite = s.values.filter((v) => v !== null);
      const name = many ? `${s.label}: ` : '';
      return `${name}from ${number(finite[0], chart.unit)} to ${number(finite.at(-1), chart.unit)}`;
    });
    return `${chart.title}, ${parts.join('; ')}; steps ${steps[0]} to ${steps.at(-1)}. Arrow keys read values off.`;
  }

  function show(step) {
    const { x, y, line, marks } = geometry;
    const at = step === null ? null : steps[nearest(steps, step)];
    line.setAttribute('visibility', at === null ? 'hidden' : 'visible');
    if (at !== null) {
      line.setAttribute('x1', x(at));
      line.setAttribute('x2', x(at));
    }
    const shown = chart.series.map((s, i) => {
      const beyond = at !== null && (at < s.steps[0] || at > s.steps.at(-1));
      const index = at === null ? s.values.findLastIndex((v) => v !== null) : nearest(s.steps, at);
      const value = beyond ? null : s.values[index] ?? null;
      marks[i].setAttribute('visibility', at === null || value === null ? 'hidden' : 'visible');
      if (value !== null) {
        marks[i].setAttribute('cx', x(s.steps[index]));
        marks[i].setAttribute('cy', y(value));
      }
      const text = at !== null && value === null && !beyond ? 'not finite' : number(value, chart.unit);
      // A series without a value at this very step says which step its value is from.
      const from = at === null || beyond || s.steps[index] === at ? '' : ` @${s.steps[index]}`;
      return el('span', { class: 'value' },
        many ? el('i', { class: `key color-${s.color}` }) : null,
        many && chart.named ? el('span', { class: 'muted' }, s.label) : null,
        el('b', {}, text), from ? el('span', { class: 'muted' }, from) : null);
    });
    read.replaceChildren(...shown, el('span', { class: 'at' }, at === null ? 'last' : `step ${at}`));
  }

  function point(event) {
    const box = frame.getBoundingClientRect();
    const share = (event.clientX - box.left - FRAME.left) / (geometry.width - FRAME.left - FRAME.right);
    cursor.move(geometry.first + Math.min(1, Math.max(0, share)) * (geometry.last - geometry.first));
  }

  function keys(event) {
    const here = cursor.step === null ? steps.length - 1 : nearest(steps, cursor.step);
    const to = { ArrowLeft: here - (cursor.step !== null), ArrowRight: here + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === 'Escape') cursor.move(null);
    if (to === undefined) return;
    event.preventDefault();
    cursor.move(steps[Math.min(steps.length - 1, Math.max(0, to))]);
  }

  const card = el('figure', { class: 'chart card', 'data-key': chart.key },
    el('figcaption', {}, el('span', { class: 'name', title: chart.key }, visible(chart.title)), read),
    frame,
    missing ? el('p', { class: 'warn' }, `${plural(missing, 'value')} not finite (gaps in the line)`) : null,
    chart.about ? el('p', { class: 'about' }, chart.about) : null);
  cursor.charts.push({ read: show });
  let width = 0;
  new ResizeObserver(() => {
    if (frame.clientWidth !== width) { width = frame.clientWidth; draw(); }
  }).observe(frame);
  draw();
  return card;
}
