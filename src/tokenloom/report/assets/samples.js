// The same held-out prompt before and after training, side by side, filtered by what became of it.

const OUTCOMES = {
  learned: 'newly right', lost: 'newly wrong', kept: 'still right', missed: 'still wrong', right: 'right', wrong: 'wrong',
};
const PAGE = 4;

function samples() {
  const { pairs: all, counts, before, after, cap } = DATA.samples;
  if (!all.length) {
    return section('samples', 'Answers before and after', null,
      el('p', { class: 'empty' }, 'No held-out answers on record (samples.jsonl).'));
  }
  const kinds = Object.keys(OUTCOMES).filter((kind) => counts[kind]);
  const list = el('div', { class: 'pairs-list' });
  const more = el('button', { class: 'more', type: 'button', click: () => { limit += 3 * PAGE; draw(); } });
  const filters = el('div', { class: 'chips', role: 'group', 'aria-label': 'Filter answers' });
  let limit = PAGE;

  function draw() {
    const asked = state.get('outcome');
    const kind = kinds.includes(asked) ? asked : 'all';
    const chosen = all.filter((pair) => kind === 'all' || pair.outcome === kind);
    filters.replaceChildren(...['all', ...kinds].map((key) => {
      const count = key === 'all' ? Object.values(counts).reduce((a, b) => a + b, 0) : counts[key];
      return el('button', {
        type: 'button', class: 'chip', 'aria-pressed': String(key === kind),
        click: () => { limit = PAGE; state.set({ outcome: key === 'all' ? null : key }); draw(); filters.querySelector('[aria-pressed=true]').focus(); },
      }, `${key === 'all' ? 'all' : OUTCOMES[key]} `, el('b', {}, String(count)));
    }));
    list.replaceChildren(...chosen.slice(0, limit).map(pairCard));
    more.hidden = chosen.length <= limit;
    more.textContent = `Show more (${chosen.length - limit} left)`;
  }

  function pairCard(pair) {
    return el('article', { class: 'pair card' },
      el('div', { class: 'prompt' },
        el('p', { class: 'text' }, visible(pair.prompt)),
        el('p', { class: 'muted' }, 'expected ', el('b', {}, visible(pair.expected ?? '\u2013')),
          el('span', { class: `badge ${['learned', 'kept', 'right'].includes(pair.outcome) ? 'good' : 'bad'}` }, OUTCOMES[pair.outcome]))),
      el('div', { class: 'sides' },
        before === null ? null : answer(`Before \u00b7 step ${before}`, pair.before),
        answer(`${before === null ? 'Step' : 'After \u00b7 step'} ${after}`, pair.after)));
  }

  function answer(title, side) {
    if (!side) return el('div', { class: 'side' }, el('h4', {}, title), el('p', { class: 'empty' }, 'not on record'));
    return el('div', { class: `side ${side.correct ? 'is-right' : 'is-wrong'}` },
      el('h4', {}, title, el('span', { class: 'verdict' }, `${side.correct ? '\u2713 right' : '\u2717 wrong'}`
        + (side.reward === null ? '' : ` \u00b7 reward ${number(side.reward)}`))),
      el('p', { class: 'text', tabindex: 0 }, visible(side.response)),
      side.answer === null ? null : el('p', { class: 'muted' }, 'read as ', el('code', {}, visible(side.answer))));
  }

  redraws.push(draw);
  const capped = kinds.some((kind) => counts[kind] > cap);
  const note = (before === null ? 'Only one evaluation is on record. ' : '')
    + `The first answer to each held-out prompt${capped ? `; at most ${cap} of each kind are in this page` : ''}.`;
  return section('samples', 'Answers before and after', note, filters, list, more);
}
