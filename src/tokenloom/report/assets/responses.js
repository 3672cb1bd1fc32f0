// Responses as text, each token colored; one column, or two for two algorithms.

const templates = new Map();

// A token's box, made once for every distinct token.
function tokenBox(index) {
  let made = templates.get(index);
  if (!made) {
    const piece = DATA.tokens.pieces[index][1];
    made = { node: el('span', { class: 'tok' }, visible(piece, true)), word: piece.startsWith(' '), ends: piece.match(/\n*$/)[0] };
    templates.set(index, made);
  }
  return made;
}

function tint(node, row, t, value, scale) {
  if (!store.sampled(row, t)) node.classList.add('masked');
  else if (value === null) node.classList.add('unknown');
  else paint(node, value, scale);
}

function tokenText(view, scale, row, side) {
  const text = el('div', { class: 'text tokens', 'data-side': side });
  for (let t = 0; t < row.length; t++) {
    const box = tokenBox(store.index[row.offset + t]);
    const node = box.node.cloneNode(true);
    node.dataset.t = t;
    tint(node, row, t, colored(view, row, t, side), scale);
    // A line may break before a token that starts a word, as it would in the text itself.
    if (box.word) text.append(el('wbr'));
    text.append(node, box.ends);
  }
  return text;
}

function responseItem(view, scale, row) {
  const right = row.reward > 0;
  const facts = [
    row.reward === null ? null : `${right ? '\u2713' : '\u2717'} reward ${number(row.reward)}`,
    plural(row.length, 'token'),
    row.entropy === null ? null : `entropy ${number(row.entropy)}`,
  ].filter(Boolean);
  const { variants } = DATA.tokens;
  const body = view.mode === 'beside'
    ? el('div', { class: 'beside' }, [view.algorithm, view.against].map((variant, side) =>
      el('div', {}, el('h4', {}, visible(variants[variant].name)), tokenText(view, scale, row, side))))
    : tokenText(view, scale, row, 0);
  const node = el('article', { class: `response ${row.reward === null ? '' : right ? 'is-right' : 'is-wrong'}`, 'data-row': row.row, 'aria-label': `Response ${row.row}` },
    el('header', { class: 'response-head' },
      el('b', {}, row.reward === null ? 'not scored' : facts.shift()),
      el('span', { class: 'muted' }, `row ${row.row} \u00b7 ${facts.join(' \u00b7 ')}`),
      row.answer === null ? null : el('span', { class: 'muted' }, 'answer ', el('code', {}, visible(row.answer)))),
    body,
    row.omitted ? el('p', { class: 'warn' }, `${plural(row.omitted, 'more token')} of this response not in the page.`) : null);
  node.classList.toggle('current', row === view.row);
  return node;
}

// Its height before it is drawn: near enough for a scroll bar.
function guessHeight(view, row, width) {
  if (row.chars === undefined) {
    row.chars = 0;
    row.lines = 0;
    for (let t = 0; t < row.length; t++) {
      const piece = store.piece(row, t);
      row.chars += piece.length + 0.4;
      row.lines += piece.includes('\n') ? 0.8 : 0;
    }
  }
  const column = (view.mode === 'beside' && width > 700 ? width / 2 : width) - 40;
  const lines = Math.ceil(row.chars / Math.max(10, column / 8.5)) + Math.floor(row.lines);
  return 62 + 30 * lines * (view.mode === 'beside' && width <= 700 ? 2 : 1);
}
