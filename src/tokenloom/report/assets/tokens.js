// The token map: a response as text, each token colored by one of its quantities.

const SORTS = [
  ['group', 'prompt group'], ['reward-high', 'reward, high first'], ['reward-low', 'reward, low first'],
  ['long', 'longest first'], ['short', 'shortest first'], ['size', 'largest |quantity| first'],
];
const SCALES = [['step', 'all of this step'], ['response', 'this response'], ['run', 'whole run']];

function tokenMap() {
  const { rows, prompts, total, steps: stepCount } = DATA.tokens;
  if (!rows.length) {
    return section('tokens', 'Token map', null,
      el('p', { class: 'empty' }, 'No per-token dump on record (tokens.jsonl).'));
  }
  const steps = [...new Set(rows.map((r) => r.step))];
  const quantities = [...new Set(rows.flatMap((r) => Object.keys(r.q)))];
  const rewards = [...new Set(rows.map((r) => r.reward))].sort((a, b) => a - b);
  const tools = el('div', { class: 'toolbar' });
  const scaleBox = el('div');
  const list = el('div', { class: 'rows', role: 'listbox', 'aria-label': 'Responses', keydown: listKeys });
  const detail = el('div', { class: 'detail' });
  const tip = el('div', { class: 'tip card', role: 'status', hidden: true });
  let view = null;

  // What the URL asks for where it is possible, else the nearest thing that is.
  function resolve() {
    const asked = Number(state.get('step') ?? steps.at(-1));
    const step = steps[nearest(steps, Number.isFinite(asked) ? asked : steps.at(-1))];
    const quantity = quantities.includes(state.get('quantity')) ? state.get('quantity') : quantities[0] ?? '';
    const known = (options, key) => (options.some(([k]) => k === state.get(key)) ? state.get(key) : options[0][0]);
    const sort = known(SORTS, 'sort');
    const span = known(SCALES, 'scale');
    const filters = rewardFilters(rows.filter((r) => r.step === step));
    const reward = known(filters, 'reward');
    const test = filters.find(([k]) => k === reward)[2];
    const here = rows.filter((r) => r.step === step);
    const shown = order(here.filter(test), sort, quantity);
    const row = shown.find((r) => String(r.row) === state.get('row')) ?? shown[0] ?? null;
    const scope = { step: here, response: row ? [row] : [], run: rows }[span];
    const scale = makeScale(scope.flatMap((r) => tokenValues(r, quantity)), quantity);
    return { step, quantity, sort, span, reward, filters, here, shown, row, scale };
  }

  function rewardFilters(here) {
    const all = ['all', 'all', () => true];
    if (rewards.length <= 6) {
      return [all, ...rewards.map((v) => [String(v), v === null ? 'not scored' : number(v), (r) => r.reward === v])];
    }
    const known = here.filter((r) => r.reward !== null);
    const mean = known.reduce((sum, r) => sum + r.reward, 0) / (known.length || 1);
    return [all, ['above', `above the mean (${number(mean)})`, (r) => r.reward > mean],
      ['below', 'at or below the mean', (r) => r.reward !== null && r.reward <= mean]];
  }

  function tokenValues(row, quantity) {
    return (row.q[quantity] ?? []).filter((_, t) => !row.mask || row.mask[t]);
  }

  function order(some, sort, quantity) {
    const size = (r) => tokenValues(r, quantity).reduce((m, v) => Math.max(m, Math.abs(v ?? 0)), 0);
    const by = {
      'reward-high': (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
      'reward-low': (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
      long: (a, b) => b.pieces.length - a.pieces.length,
      short: (a, b) => a.pieces.length - b.pieces.length,
      size: (a, b) => size(b) - size(a),
      group: () => 0,
    }[sort];
    return [...some].sort((a, b) => by(a, b) || 0);
  }

  function change(changes) {
    state.set({ token: null, ...changes });
    draw();
  }

  function draw() {
    const active = document.activeElement;
    const keep = tools.contains(active) ? active.getAttribute('name') : null;
    view = resolve();
    const at = steps.indexOf(view.step);
    const jump = (by, text, title) => el('button', {
      type: 'button', name: title, class: 'step', 'aria-label': title, title, disabled: !steps[at + by] && steps[at + by] !== 0,
      click: () => change({ step: steps[at + by] }),
    }, text);
    tools.replaceChildren(
      el('div', { class: 'stepper' }, jump(-1, '\u2039', 'previous step'),
        select('Step', 'step', steps.map((s) => [String(s), String(s)]), String(view.step), (v) => change({ step: v })),
        jump(1, '\u203a', 'next step')),
      select('Color by', 'quantity', quantities.map((q) => [q, q]), view.quantity, (v) => change({ quantity: v })),
      select('Reward', 'reward', view.filters, view.reward, (v) => change({ reward: v === 'all' ? null : v })),
      select('Order', 'sort', SORTS, view.sort, (v) => change({ sort: v === 'group' ? null : v })),
      select('Scale over', 'scale', SCALES, view.span, (v) => change({ scale: v === 'step' ? null : v })));
    if (keep) tools.querySelector(`[name="${CSS.escape(keep)}"]`)?.focus();
    scaleBox.replaceChildren(legend(view.scale, view.quantity, view.here.some((r) => r.mask)));
    list.replaceChildren(...(view.shown.length ? view.shown.map(rowItem) : [el('p', { class: 'empty' }, 'No response of this step has that reward.')]));
    const chosen = list.querySelector('[aria-selected=true]');
    if (chosen) list.scrollTop = chosen.offsetTop - (list.clientHeight - chosen.offsetHeight) / 2;
    drawDetail();
  }

  function rowItem(row) {
    const chosen = row === view.row;
    const strip = el('span', { class: 'strip', 'aria-hidden': 'true' });
    const stride = Math.max(1, Math.ceil(row.pieces.length / 48));
    for (let t = 0; t < row.pieces.length; t += stride) {
      const cell = el('i');
      tint(cell, row, t);
      strip.append(cell);
    }
    return el('div', {
      class: 'row', role: 'option', 'aria-selected': String(chosen), tabindex: chosen ? 0 : -1, 'data-row': row.row,
      click: () => choose(row),
    },
    el('span', { class: 'row-head' },
      el('span', { class: `dotmark ${row.reward > 0 ? 'good' : row.reward === null ? 'none' : 'bad'}` }),
      el('b', {}, row.reward === null ? 'not scored' : `reward ${number(row.reward)}`),
      el('span', { class: 'muted' }, `${row.group === null ? '' : `group ${row.group} \u00b7 `}row ${row.row} \u00b7 ${row.pieces.length} tok`)),
    strip);
  }

  function choose(row) {
    change({ row: row.row });
    list.querySelector('[aria-selected=true]')?.focus({ preventScroll: false });
  }

  function listKeys(event) {
    const here = view.shown.indexOf(view.row);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: view.shown.length - 1 }[event.key];
    if (to === undefined || !view.shown.length) return;
    event.preventDefault();
    choose(view.shown[Math.min(view.shown.length - 1, Math.max(0, to))]);
  }

  function tint(node, row, t) {
    const value = row.q[view.quantity]?.[t] ?? null;
    if (row.mask && !row.mask[t]) node.classList.add('masked');
    else if (value === null) node.classList.add('unknown');
    else paint(node, value, view.scale);
  }

  function drawDetail() {
    const row = view.row;
    tip.hidden = true;
    if (!row) { detail.replaceChildren(); return; }
    const text = el('div', {
      class: 'text tokens', role: 'group', 'aria-label': 'Tokens; the arrow keys move from token to token',
      keydown: tokenKeys, pointerleave: settle,
    });
    row.pieces.forEach((piece, t) => {
      const token = el('span', { class: 'tok', 'data-t': t, tabindex: t ? -1 : 0, pointerenter: () => point(t), focus: () => point(t), click: () => pin(t) }, visible(piece, true));
      tint(token, row, t);
      // A line may break before a token that starts a word, as it would in the text itself.
      if (piece.startsWith(' ')) text.append(el('wbr'));
      text.append(token, piece.match(/\n*$/)[0]);
    });
    const values = tokenValues(row, view.quantity).filter((v) => v !== null);
    const mean = values.reduce((a, b) => a + b, 0) / (values.length || 1);
    const facts = [
      ['reward', number(row.reward)], ['answer', row.answer === null ? '\u2013' : row.answer], ['tokens', String(row.pieces.length)],
      [`mean ${view.quantity}`, values.length ? number(mean) : '\u2013'],
    ];
    detail.replaceChildren(
      el('details', { class: 'asked', open: true }, el('summary', {}, 'Prompt'), el('p', { class: 'text' }, visible(prompts[row.prompt]))),
      el('dl', { class: 'facts' }, facts.map(([k, v]) => el('div', {}, el('dt', {}, k), el('dd', {}, visible(v))))),
      text,
      row.omitted ? el('p', { class: 'warn' }, `${plural(row.omitted, 'more token')} of this response not in the page.`) : '',
      tip);
    settle();
  }

  // Back to the pinned token, or to none.
  function settle() {
    const pinned = state.get('token');
    if (pinned !== null && view.row && view.row.pieces[Number(pinned)] !== undefined) point(Number(pinned));
    else tip.hidden = true;
  }

  function pin(t) {
    state.set({ step: view.step, row: view.row.row, quantity: view.quantity, token: state.get('token') === String(t) ? null : t });
    settle();
  }

  function tokenKeys(event) {
    const tokens = [...detail.querySelectorAll('.tok')];
    const here = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (event.key === 'Escape') { state.set({ token: null }); settle(); }
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); pin(here); }
    if (to === undefined || here < 0) return;
    event.preventDefault();
    const next = tokens[Math.min(tokens.length - 1, Math.max(0, to))];
    tokens[here].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  function point(t) {
    const row = view.row;
    const masked = row.mask && !row.mask[t];
    tip.replaceChildren(
      el('p', { class: 'tip-head' }, el('code', {}, visible(row.pieces[t], true)),
        el('span', { class: 'muted' }, `token ${t} \u00b7 id ${row.ids[t] ?? '?'}${masked ? ' \u00b7 not sampled' : ''}`)),
      el('dl', { class: 'pairs' }, Object.entries(row.q).map(([name, values]) => [
        el('dt', name === view.quantity ? { class: 'now' } : {}, visible(name)), el('dd', {}, number(values[t]))])));
    tip.hidden = false;
    place(detail.querySelector(`.tok[data-t="${t}"]`));
    detail.querySelector('.tok.pointed')?.classList.remove('pointed');
    detail.querySelector(`.tok[data-t="${t}"]`).classList.add('pointed');
  }

  // Under the token, inside the panel.
  function place(token) {
    const box = detail.getBoundingClientRect();
    const at = [...token.getClientRects()].at(-1);
    if (!at) return;
    const left = Math.min(Math.max(0, at.left - box.left), Math.max(0, box.width - tip.offsetWidth));
    tip.style.left = `${left}px`;
    tip.style.top = `${at.bottom - box.top + 8}px`;
  }

  redraws.push(draw);
  const note = rows.length < total
    ? `${rows.length.toLocaleString('en')} of ${total.toLocaleString('en')} dumped responses are in this page, from ${steps.length} of ${stepCount} steps, `
      + `groups with mixed rewards first (a page holds at most ${DATA.tokens.maxResponses} responses and `
      + `${DATA.tokens.maxTokens.toLocaleString('en')} tokens; tokens.jsonl has all).`
    : `All ${plural(total, 'dumped response')}, from ${plural(stepCount, 'step')}.`;
  return section('tokens', 'Token map', `What the algorithm does to each token. ${note}`,
    el('div', { class: 'card map' }, tools, scaleBox, el('div', { class: 'map-body' }, list, detail)));
}
