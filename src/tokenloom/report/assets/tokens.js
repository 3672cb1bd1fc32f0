// The token view: prompts, the responses to the chosen one as colored text or as a prefix tree, and its controls.

function tokenMap() {
  const { rows, variants, prompts, total, steps: stepCount } = DATA.tokens;
  if (!rows.length) {
    return section('tokens', 'Token map', null,
      el('p', { class: 'empty' }, 'No per-token dump on record (tokens.jsonl).'));
  }
  const tools = el('div', { class: 'toolbar' });
  const filterBox = el('details', { class: 'filters' });
  const scaleBox = el('div');
  const promptBox = el('div', { class: 'prompts virtual', role: 'listbox', 'aria-label': 'Prompts', tabindex: 0, keydown: promptKeys });
  const head = el('div', { class: 'group-head' });
  const stream = el('div', {
    class: 'stream virtual', role: 'group', tabindex: 0, keydown: streamKeys, pointerover: over, pointerleave: settle, click: clicked,
    'aria-label': 'Responses. Up and down arrows move between responses, left and right between tokens, Enter pins a token.',
  });
  const treeBox = el('div', { class: 'tree-box', pointerover: over, pointerleave: settle });
  const tip = el('div', { class: 'tip card', role: 'status', hidden: true });
  const map = el('div', { class: 'card map' }, tools, filterBox, scaleBox,
    el('div', { class: 'map-body' }, promptBox, el('div', { class: 'group' }, head, stream, treeBox)), tip);
  let view = null;
  let scale = null;
  let turn = 0;
  let cursorToken = null;
  const scales = new Map();
  let promptList = null;
  let responseList = null;

  function change(changes) {
    state.set({ token: null, ...changes });
    cursorToken = null;
    return draw();
  }

  async function draw() {
    const mine = ++turn;
    await store.open();
    view = choice();
    await Promise.all([store.load(view.algorithm, view.quantity), store.load(Math.max(0, view.against), view.quantity)]);
    // Another choice was made while the numbers were being inflated.
    if (mine !== turn) return;
    scale = scaleOf();
    drawTools();
    drawFilters();
    scaleBox.replaceChildren(legend(scale, view, variants));
    map.classList.toggle('signed', scale.low < 0 && scale.high > 0);
    drawPrompts();
    drawHead();
    stream.hidden = view.view === 'tree';
    treeBox.hidden = !stream.hidden;
    if (stream.hidden) {
      treeBox.replaceChildren(view.prompt === ALL
        ? el('p', { class: 'empty' }, 'A prefix tree belongs to one prompt: choose one.') : treeView(view, scale));
    } else {
      responseList ??= new VirtualList(stream, (row) => responseItem(view, scale, row), (row, width) => guessHeight(view, row, width));
      responseList.set(view.shown, Math.max(0, view.shown.indexOf(view.row)));
    }
    cursorToken = state.get('token') === null ? null : Number(state.get('token'));
    settle();
  }

  function scaleOf() {
    const among = { step: view.here, prompt: view.shown, run: store.rows }[view.scaleOver];
    const key = [view.scaleOver, view.step, view.scaleOver === 'prompt' ? view.shown.map((r) => r.number).join() : '', view.quantity,
      view.algorithm, view.mode === 'one' ? '' : view.against, view.mode].join('/');
    if (!scales.has(key)) scales.set(key, makeScale(sampleOf(view, among), view.mode === 'difference' || SIGNED.includes(view.quantity)));
    return scales.get(key);
  }

  function drawTools() {
    const keep = tools.contains(document.activeElement) ? document.activeElement.getAttribute('name') : null;
    const at = view.steps.indexOf(view.step);
    const jump = (by, text, title) => el('button', {
      type: 'button', name: title, class: 'step', 'aria-label': title, title, disabled: view.steps[at + by] === undefined,
      click: () => change({ step: view.steps[at + by], prompt: null, row: null }),
    }, text);
    const named = variants.map((v, i) => [String(i), v.name, v.reason]);
    const others = [['-1', 'nothing'], ...named.filter(([i]) => i !== String(view.algorithm))];
    tools.replaceChildren(
      el('div', { class: 'stepper' }, jump(-1, '\u2039', 'previous step'),
        select('Step', 'step', view.steps.map((s) => [String(s), String(s)]), String(view.step), (v) => change({ step: v, prompt: null, row: null })),
        jump(1, '\u203a', 'next step')),
      select('Color by', 'quantity', view.quantities.map((q) => [q, q]), view.quantity, (v) => change({ quantity: v })),
      ...(variants.length > 1 ? [
        select('Algorithm', 'algorithm', named, String(view.algorithm), (v) => change({ algorithm: v === '0' ? null : v })),
        select('Compare with', 'against', others, String(view.against), (v) => change({ against: v === '-1' ? null : v })),
        select('Show', 'show', [['beside', 'side by side'], ['difference', 'difference']], view.mode === 'difference' ? 'difference' : 'beside',
          (v) => change({ show: v === 'beside' ? null : v })),
      ] : []),
      select('Scale over', 'scale', SCALES, view.scaleOver, (v) => change({ scale: v === 'step' ? null : v })));
    const show = tools.querySelector('[name=show]');
    if (show) show.disabled = view.mode === 'one';
    if (keep) tools.querySelector(`[name="${CSS.escape(keep)}"]`)?.focus();
  }

  function drawFilters() {
    const active = view.reward !== ALL || view.limits.some(([, v]) => v !== null);
    const keep = filterBox.contains(document.activeElement) ? document.activeElement.getAttribute('name') : null;
    filterBox.replaceChildren(
      el('summary', {}, 'Filter and order', el('span', { class: 'muted' },
        ` \u00b7 ${view.passing.length.toLocaleString('en')} of ${plural(view.here.length, 'response')} of this step`)),
      el('div', { class: 'toolbar' },
        select('Reward', 'reward', view.filters.map(([k, text]) => [k, text]), view.reward, (v) => change({ reward: v === ALL ? null : v })),
        view.limits.map(([key, value], i) => {
          const box = el('input', {
            type: 'number', name: key, min: 0, step: 'any', value: value ?? '', change: () => change({ [key]: box.value === '' ? null : box.value }),
          });
          return el('label', { class: 'field' }, el('span', {}, LIMITS[i][1]), box);
        }),
        select('Order', 'sort', SORTS, view.sort, (v) => change({ sort: v === 'row' ? null : v })),
        el('button', {
          type: 'button', class: 'chip', disabled: !active,
          click: () => change({ reward: null, lmin: null, lmax: null, hmin: null, hmax: null }),
        }, 'Clear filters')));
    if (active) filterBox.open = true;
    if (keep) filterBox.querySelector(`[name="${CSS.escape(keep)}"]`)?.focus();
  }

  function drawPrompts() {
    const items = [{ key: ALL, rows: view.passing, mean: null, prompt: null }, ...view.groups];
    const at = items.findIndex((g) => g.key === view.prompt);
    promptList ??= new VirtualList(promptBox, promptItem, () => 66);
    promptList.set(items, 0);
    if (at >= 0) promptList.reveal(at);
    promptBox.setAttribute('aria-activedescendant', promptBox.querySelector('[aria-selected=true]')?.id ?? '');
  }

  function promptItem(group) {
    const chosen = group.key === view.prompt;
    return el('div', {
      class: 'prompt-item', role: 'option', id: `prompt-${group.key}`, 'aria-selected': String(chosen), 'data-key': group.key,
      click: () => change({ prompt: group.key, row: null }),
    },
    el('p', { class: 'prompt-text' }, group.prompt === null ? 'All prompts' : visible(clip(prompts[group.prompt]))),
    el('p', { class: 'muted' }, plural(group.rows.length, 'row'), group.mean === null ? '' : ` \u00b7 reward ${number(Math.round(100 * group.mean) / 100)}`,
      group.spread ? el('span', { class: 'mixed', title: 'rewards differ within the group' }, ' \u00b7 mixed') : ''));
  }

  // The end of a prompt is where the question usually is.
  function clip(text) { return text.length > 120 ? `\u2026${text.slice(-118)}` : text; }

  function drawHead() {
    const group = view.groups.find((g) => g.key === view.prompt);
    const tab = (key, text) => el('button', {
      type: 'button', class: 'chip', 'aria-pressed': String(view.view === key), click: () => change({ view: key === 'text' ? null : key }),
    }, text);
    const off = variants.filter((v) => v.reason);
    head.replaceChildren(
      off.length ? el('ul', { class: 'reasons' }, off.map((v) => el('li', {}, el('b', {}, visible(v.name)), ' cannot be shown: ', visible(v.reason)))) : '',
      view.against >= 0 && view.mode === 'one'
        ? el('p', { class: 'muted' }, `${view.quantity} does not depend on the algorithm: nothing to compare.`) : '',
      el('div', { class: 'chips', role: 'group', 'aria-label': 'View' }, tab('text', 'Responses'), tab('tree', 'Prefix tree')),
      group ? el('details', { class: 'asked', open: true }, el('summary', {}, 'Prompt'), el('p', { class: 'text', tabindex: 0 }, visible(prompts[group.prompt]))) : '',
      view.shown.length ? '' : el('p', { class: 'empty' }, 'No response of this step passes the filters.'));
  }

  function promptKeys(event) {
    const items = promptList.items;
    const here = items.findIndex((g) => g.key === view.prompt);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: items.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    change({ prompt: items[Math.min(items.length - 1, Math.max(0, to))].key, row: null });
  }

  function streamKeys(event) {
    if (!view?.row) return;
    const at = view.shown.indexOf(view.row);
    const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const last = view.row.length - 1;
    const here = cursorToken ?? -1;
    const to = { ArrowRight: here + 1, ArrowLeft: here < 0 ? 0 : here - 1, Home: 0, End: last }[event.key];
    if (event.key === 'Escape') { cursorToken = null; state.set({ token: null }); settle(); return; }
    if (event.key === 'Enter' && cursorToken !== null) { pin(view.row, cursorToken); return; }
    if (down === undefined && to === undefined) return;
    event.preventDefault();
    if (down !== undefined) {
      current(view.shown[Math.min(view.shown.length - 1, Math.max(0, at + down))]);
      if (cursorToken !== null) cursorToken = Math.min(cursorToken, view.row.length - 1);
    } else cursorToken = Math.min(last, Math.max(0, to));
    reach();
  }

  function current(row) {
    view.row = row;
    state.set({ step: view.step, row: row.row, token: null });
    for (const node of stream.querySelectorAll('.response')) node.classList.toggle('current', node.dataset.row === String(row.row));
  }

  // Bring the current response, and the token under the keyboard, into view.
  function reach() {
    responseList.reveal(view.shown.indexOf(view.row));
    const token = tokenNode(view.row, cursorToken);
    if (token) {
      const [box, at] = [stream.getBoundingClientRect(), token.getBoundingClientRect()];
      if (at.top < box.top || at.bottom > box.bottom) {
        stream.scrollTop += at.top - box.top - stream.clientHeight / 3;
        responseList.render();
      }
    }
    settle();
  }

  function tokenNode(row, t) {
    return row && t !== null ? map.querySelector(`.stream .response[data-row="${row.row}"] .tok[data-t="${t}"]`) : null;
  }

  // Back to the token under the keyboard or the pinned one, or to none.
  function settle() {
    const node = stream.hidden ? null : tokenNode(view?.row, cursorToken);
    const [box, at] = [stream.getBoundingClientRect(), node?.getBoundingClientRect()];
    if (node && at.bottom > box.top && at.top < box.bottom) point(node, view.row, cursorToken);
    else hide();
  }

  function hide() {
    tip.hidden = true;
    map.querySelector('.pointed')?.classList.remove('pointed');
  }

  function point(node, row, t) {
    map.querySelector('.pointed')?.classList.remove('pointed');
    node.classList.add('pointed');
    tokenTip(tip, view, row, t);
    placeTip(tip, node);
    const packed = [...new Set([view.algorithm, Math.max(0, view.against)])].flatMap((v) => view.quantities.map((q) => [v, q]))
      .filter(([v, q]) => store.value(v, q, row, t) === undefined);
    if (!packed.length) return;
    Promise.all(packed.map(([v, q]) => store.load(v, q))).then(() => {
      if (!node.classList.contains('pointed')) return;
      tokenTip(tip, view, row, t);
      placeTip(tip, node);
    });
  }

  function found(event) {
    const node = event.target.closest('.tok[data-t]');
    const holder = node?.closest('[data-row]');
    const row = holder ? view.shown.find((r) => String(r.row) === holder.dataset.row) : null;
    return row ? { node, row, t: Number(node.dataset.t) } : null;
  }

  function over(event) {
    const at = found(event);
    if (at) point(at.node, at.row, at.t);
    else settle();
  }

  function clicked(event) {
    const at = found(event);
    if (at) { pin(at.row, at.t); return; }
    const holder = event.target.closest('.response');
    const row = holder ? view.shown.find((r) => String(r.row) === holder.dataset.row) : null;
    if (row) current(row);
  }

  function pin(row, t) {
    const same = state.get('token') === String(t) && view.row === row;
    current(row);
    cursorToken = same ? null : t;
    state.set({ quantity: view.quantity, token: cursorToken });
    settle();
  }

  document.addEventListener('scroll', () => { if (!tip.hidden) settle(); }, { capture: true, passive: true });
  redraws.push(draw);
  const note = rows.length < total
    ? `${rows.length.toLocaleString('en')} of ${total.toLocaleString('en')} dumped responses are in this page, groups with mixed rewards first `
      + `(a page holds at most ${DATA.tokens.maxResponses.toLocaleString('en')} responses and ${DATA.tokens.maxTokens.toLocaleString('en')} tokens; tokens.jsonl has all).`
    : `All ${plural(total, 'dumped response')}, from ${plural(stepCount, 'step')}.`;
  return section('tokens', 'Token map', `What the algorithm does to each token. ${note} Numbers are kept in 8 bits, within half a percent of the row\u2019s range.`, map);
}
