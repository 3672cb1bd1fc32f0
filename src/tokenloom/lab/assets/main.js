// The leaderboard: one table that sorts, two plots, one table by family. What is chosen is kept in the URL.

const ALL = 'all families';
const MOST = 6;
const hash = new URLSearchParams(location.hash.slice(1));
const BOARDS = DATA.summary.boards;
const KINDS = { table: 'tables', transformer: 'a tiny transformer' };
const figure = (name) => DATA.figures.find((f) => f.name === name);
const known = (name, options, fallback) => (options.includes(hash.get(name)) ? hash.get(name) : fallback);
const familiesOf = (kind) => Object.keys(BOARDS[kind]?.families ?? {});
const methodsOf = (kind) => [...new Set(familiesOf(kind).flatMap((f) => Object.keys(BOARDS[kind].families[f])))];

const kind = known('kind', Object.keys(BOARDS), Object.keys(BOARDS)[0]);
const state = {
  kind,
  family: known('family', familiesOf(kind), ALL),
  sort: known('sort', ['method', ...DATA.figures.map((f) => f.name)], 'samples'),
  down: hash.get('down') === '1',
  figure: known('figure', DATA.figures.map((f) => f.name), 'cosine'),
  chosen: (hash.get('methods') ?? '').split(',').filter((m) => methodsOf(kind).includes(m)).slice(0, MOST),
};

const board = () => BOARDS[state.kind];

function rows() {
  return state.family === ALL ? board().overall : board().families[state.family];
}

function ordered() {
  const table = rows();
  const value = (m) => (state.sort === 'method' ? m : table[m][state.sort][0]);
  return Object.keys(table).sort((a, b) => {
    const [u, v] = [value(a), value(b)];
    if (u === null || v === null) return (u === null) - (v === null);
    return (u < v ? -1 : u > v ? 1 : 0) * (state.down ? -1 : 1);
  });
}

// The methods that stand out in the plots: those that were ticked, or the first of the table.
function highlighted() {
  const there = state.chosen.filter((m) => m in rows());
  return there.length ? there : ordered().slice(0, 4);
}

function keep() {
  const q = new URLSearchParams();
  if (Object.keys(BOARDS).length > 1) q.set('kind', state.kind);
  if (state.family !== ALL) q.set('family', state.family);
  q.set('sort', state.sort);
  if (state.down) q.set('down', '1');
  q.set('figure', state.figure);
  if (state.chosen.length) q.set('methods', state.chosen.join(','));
  history.replaceState(null, '', `#${q}`);
}

function choose(changes) {
  Object.assign(state, changes);
  if (changes.kind) Object.assign(state, { family: familiesOf(state.kind).includes(state.family) ? state.family : ALL, chosen: [] });
  keep();
  draw();
}

function sortBy(name) {
  const better = name === 'method' ? 'low' : figure(name).better;
  choose(state.sort === name ? { down: !state.down } : { sort: name, down: better === 'high' });
}

// -- the table ------------------------------------------------------------------------------------------------------

function heading(name, text, about) {
  const sorted = state.sort === name ? (state.down ? 'descending' : 'ascending') : null;
  return el('th', { scope: 'col', 'aria-sort': sorted, class: name === 'method' ? 'first' : null, title: about },
    el('button', { type: 'button', 'data-sort': name, click: () => sortBy(name) }, text));
}

function key(method) {
  const at = highlighted().indexOf(method);
  return at < 0 ? null : svg('svg', { class: 'key', viewBox: '0 0 18 10', 'aria-hidden': 'true' },
    svg('line', { class: `line s${at}`, x1: 0, x2: 18, y1: 5, y2: 5 }), mark(at, 9, 5, 3));
}

function tick(method) {
  const there = state.chosen.includes(method);
  const toggle = () => choose({ chosen: there ? state.chosen.filter((m) => m !== method) : [...state.chosen, method].slice(-MOST) });
  return el('label', {}, el('input', { type: 'checkbox', checked: there, change: toggle, 'data-method': method }), el('span', {}, method), key(method));
}

function cell(method, name, share) {
  const [value, low, high] = rows()[method][name];
  const reached = board().reached[state.family][method];
  const range = value === null || low === null ? null : `${number(low)} \u2013 ${number(high)}`;
  const note = name === 'samples' && reached < 1 ? `reached by ${Math.round(100 * reached)} %` : range;
  return el('td', { class: 'cell', title: value === null ? 'no part of the exact gradient was found in the method\u2019s' : range && `95 %: ${range}` },
    number(value), note ? el('span', { class: 'range' }, note) : null,
    share === null ? null : el('span', { class: 'bar', 'aria-hidden': 'true' }, styled(el('i'), 'width', `${(100 * share).toFixed(0)}%`)));
}

function styled(node, name, value) {
  node.style.setProperty(name, value);
  return node;
}

function leaderboard() {
  const table = rows();
  const order = ordered();
  const columns = DATA.figures.map((f) => shares(order.map((m) => table[m][f.name]), f.better));
  return el('div', { class: 'scroll card' }, el('table', { id: 'board' },
    el('thead', {}, el('tr', {}, heading('method', 'method', 'tick to see it in the plots'),
      DATA.figures.map((f) => heading(f.name, f.label, f.about)))),
    el('tbody', {}, order.map((m, i) => el('tr', {},
      el('th', { scope: 'row', class: 'first' }, tick(m)),
      DATA.figures.map((f, j) => cell(m, f.name, columns[j][i])))))));
}

// -- the plots ------------------------------------------------------------------------------------------------------

// A place for a name beside its mark where no other name stands: rows above it are tried in turn.
function namer() {
  const taken = [];
  return (x, y, text) => {
    const width = 6.6 * text.length;
    const end = x + width + 12 > WIDTH - FRAME.right;
    const left = end ? x - 9 - width : x + 9;
    let top = y + 4;
    while (taken.some(([l, w, t]) => left < l + w && l < left + width && Math.abs(t - top) < 13)) top -= 13;
    taken.push([left, width, top]);
    return { x: end ? x - 9 : x + 9, y: top, 'text-anchor': end ? 'end' : 'start' };
  };
}

function scatter() {
  const beside = namer();
  const table = rows();
  const points = Object.keys(table).map((m) => [m, table[m].bias[0], table[m].noise[0]]).filter((p) => p[1] !== null && p[2] !== null);
  const x = scale(points.map((p) => p[2]), FRAME.left, WIDTH - FRAME.right, { log: true });
  const y = scale(points.map((p) => p[1]), HEIGHT - FRAME.bottom, FRAME.top, { zero: true });
  const root = plot(x, y, 'noise: variance per sampled token', 'bias', `Bias against noise of ${points.length} methods`);
  const readout = el('p', { class: 'readout', 'aria-live': 'polite' }, 'Point at a method, or tab to it.');
  const tell = ([m, bias, noise]) => () => readout.replaceChildren(el('b', {}, m), ` bias ${number(bias)}, noise ${number(noise)}, `
    + `${number(table[m].samples[0])} samples to 95 %`);
  const bright = highlighted();
  for (const p of points.filter((q) => !bright.includes(q[0]))) {
    root.append(svg('circle', { class: 'dot', cx: x.place(p[2]), cy: y.place(p[1]), r: 4.5, tabindex: 0, role: 'img',
      'aria-label': `${p[0]}: bias ${number(p[1])}, noise ${number(p[2])}`, pointerenter: tell(p), focus: tell(p) }));
  }
  for (const p of points.filter((q) => bright.includes(q[0]))) {
    const [cx, cy] = [x.place(p[2]), y.place(p[1])];
    root.append(fill(mark(bright.indexOf(p[0]), cx, cy), { tabindex: 0, role: 'img', pointerenter: tell(p), focus: tell(p),
      'aria-label': `${p[0]}: bias ${number(p[1])}, noise ${number(p[2])}` }, []),
    svg('text', { class: 'name', ...beside(cx, cy, p[0]) }, p[0]));
  }
  return el('figure', { class: 'card', id: 'scatter' },
    el('figcaption', {}, 'Bias against noise', el('span', {}, 'Lower left is better. A method without any part along the exact gradient is not here.')),
    root, readout);
}

function meanCurve(method) {
  const found = (state.family === ALL ? familiesOf(state.kind) : [state.family]).map((f) => board().curves[f][method]).filter(Boolean);
  const mean = (k) => found[0][k].map((_, i) => found.reduce((sum, c) => sum + c[k][i], 0) / found.length);
  return [0, 1, 2, 3].map(mean);
}

function curves() {
  const all = Object.keys(rows()).map((m) => [m, meanCurve(m)]);
  const x = scale(all.flatMap(([, c]) => c[0]), FRAME.left, WIDTH - FRAME.right, { zero: true });
  const y = scale([], HEIGHT - FRAME.bottom, FRAME.top, { unit: true });
  const root = plot(x, y, 'samples', 'J over the best J', `Learning curves of ${all.length} methods`);
  const line = (xs, ys) => xs.map((v, i) => `${i ? 'L' : 'M'}${x.place(v).toFixed(1)} ${y.place(Math.min(1, ys[i])).toFixed(1)}`).join('');
  const bright = highlighted();
  for (const [m, c] of all.filter(([n]) => !bright.includes(n))) root.append(svg('path', { class: 'faint', d: line(c[0], c[1]) }, svg('title', {}, m)));
  root.append(svg('line', { class: 'axis', x1: FRAME.left, x2: WIDTH - FRAME.right, y1: y.place(0.95), y2: y.place(0.95), 'stroke-dasharray': '2 3' }));
  bright.forEach((m, i) => {
    const c = meanCurve(m);
    root.append(svg('path', { class: `band s${i}`, d: `${line(c[0], c[3])}${line([...c[0]].reverse(), [...c[2]].reverse()).replace('M', 'L')}Z` }),
      svg('path', { class: `line s${i}`, d: line(c[0], c[1]) }, svg('title', {}, m)));
  });
  return el('figure', { class: 'card', id: 'curves' },
    el('figcaption', {}, 'Learning', el('span', {}, 'Mean over seeds; bands from the lowest to the highest seed. The dotted line is 95 %.')),
    root,
    el('p', { class: 'readout' }, bright.map((m) => el('span', { class: 'entry' }, key(m), el('b', {}, m)))));
}

// -- by family ------------------------------------------------------------------------------------------------------

function byFamily() {
  const shown = figure(state.figure);
  const order = ordered();
  const families = familiesOf(state.kind);
  const at = (f, m) => board().families[f][m]?.[shown.name] ?? [null, null, null];
  const columns = families.map((f) => shares(order.map((m) => at(f, m)), shown.better));
  return el('div', { class: 'scroll card' }, el('table', { id: 'by-family' },
    el('thead', {}, el('tr', {}, el('th', { scope: 'col', class: 'first' }, 'method'),
      families.map((f) => el('th', { scope: 'col', title: DATA.claims[f] },
        el('button', { type: 'button', click: () => choose({ family: f, sort: shown.name, down: shown.better === 'high' }) }, f))))),
    el('tbody', {}, order.map((m, i) => el('tr', {}, el('th', { scope: 'row', class: 'first' }, m),
      families.map((f, j) => {
        const [value, low, high] = at(f, m);
        const share = columns[j][i];
        return styled(el('td', { class: share === null ? null : 'shade', title: low === null ? null : `95 %: ${number(low)} \u2013 ${number(high)}` },
          number(value)), '--share', `${(100 * (share ?? 0)).toFixed(0)}%`);
      }))))));
}

// -- the page -------------------------------------------------------------------------------------------------------

function select(label, options, value, name) {
  const box = el('select', { name, change: () => choose({ [name]: box.value }) }, options.map(([v, text]) => el('option', { value: v }, text)));
  box.value = value;
  return el('label', { class: 'field' }, el('span', {}, label), box);
}

function definitions(id, title, entries) {
  return el('section', { id }, el('h2', {}, title), el('dl', {}, entries.map(([name, text]) => [el('dt', {}, name), el('dd', {}, text)])));
}

function draw() {
  const focused = document.activeElement;
  const again = ['data-sort', 'data-method', 'name'].map((a) => [a, focused?.getAttribute?.(a)]).find(([, v]) => v);
  const families = familiesOf(state.kind);
  const methods = methodsOf(state.kind);
  const seeds = DATA.about.seeds;
  const kinds = Object.keys(BOARDS);
  document.getElementById('main').replaceChildren(...[
    el('h1', {}, 'Tokenloom laboratory'),
    el('p', { class: 'lead' }, `${methods.length} methods on ${families.length} families of token tasks whose values and gradient are known `
      + `exactly, ${seeds} seed${seeds === 1 ? '' : 's'} each. Small ranges are 95 % intervals over seeds.`),
    el('p', { class: 'muted' }, DATA.about.budgets[state.kind]),
    el('div', { class: 'toolbar' },
      kinds.length > 1 ? select('Policy', kinds.map((k) => [k, KINDS[k]]), state.kind, 'kind') : null,
      select('Task family', [ALL, ...families].map((f) => [f, f]), state.family, 'family'),
      el('p', { class: 'claim' }, state.family === ALL ? 'Averages over all families; a method appears here only if it ran on each.' : DATA.claims[state.family]),
      state.chosen.length ? el('button', { type: 'button', class: 'plain', click: () => choose({ chosen: [] }) }, 'clear ticks') : null),
    leaderboard(),
    el('section', {}, el('div', { class: 'charts' }, scatter(), curves())),
    el('section', { id: 'families' }, el('h2', {}, 'One figure, every family'),
      el('div', { class: 'toolbar' }, select('Figure', DATA.figures.map((f) => [f.name, f.label]), state.figure, 'figure'),
        el('p', { class: 'claim' }, `${figure(state.figure).about}. Shading: from the worst to the best of a column, where they differ by more than the typical interval.`)),
      byFamily()),
    DATA.summary.not_run.length ? definitions('not-run', 'Not in the table', DATA.summary.not_run.map((p) => [p.method, `${p.status}: ${p.reason}`])) : null,
    definitions('meanings', 'What the figures mean', DATA.figures.map((f) => [f.label, `${f.about} (${f.better === 'high' ? 'more' : 'less'} is better)`])),
    definitions('claims', 'What each family isolates', families.map((f) => [f, DATA.claims[f]])),
    el('section', { id: 'made-of' }, el('h2', {}, 'What each method is made of'),
      methods.map((m) => el('details', {}, el('summary', {}, m), el('pre', {}, DATA.compositions[m].join('\n'))))),
  ].filter(Boolean));
  if (again) document.querySelector(`[${again[0]}="${CSS.escape(again[1])}"]`)?.focus();
}

draw();
