// The prefix tree of a group: what its responses share, where they part, and what came of each branch.

// Nodes of {rows, from, to}: the tokens from..to of any of its rows are common to all of them.
function prefixTree(rows, from = 0) {
  const first = rows[0];
  let to = from;
  const token = (row) => (to < row.length ? store.index[row.offset + to] : -1);
  while (to < first.length && rows.every((row) => token(row) === token(first))) to++;
  const parts = new Map();
  for (const row of rows) {
    const key = token(row);
    if (!parts.has(key)) parts.set(key, []);
    parts.get(key).push(row);
  }
  // Responses that are equal to their last token end here together.
  const children = parts.size < 2 ? [] : [...parts.values()].map((some) => prefixTree(some, to));
  const rewards = rows.map((r) => r.reward).filter((v) => v !== null);
  return { rows, from, to, children, mean: rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null };
}

const SHOWN = 60;

function treeView(view, scale) {
  if (!view.shown.length) return el('p', { class: 'empty' }, 'No response to draw.');
  const root = prefixTree(view.shown);
  const widest = root.rows.reduce((m, r) => Math.max(m, r.reward === null || root.mean === null ? 0 : Math.abs(r.reward - root.mean)), 0);
  const shades = makeScale([widest || 1], 'advantage');
  return el('div', { class: 'tree', tabindex: 0, role: 'group', 'aria-label': 'Prefix tree' },
    el('p', { class: 'muted' }, 'A value is the mean reward of the responses through a branch; its color says how far it is above or below '
      + 'that of the group. Tokens are colored as in the text.'),
    el('ul', {}, branch(root)));

  function branch(node) {
    const row = node.rows[0];
    const text = el('span', { class: 'text tokens', 'data-row': row.row });
    for (let t = node.from; t < Math.min(node.to, node.from + SHOWN); t++) {
      const token = tokenBox(store.index[row.offset + t]).node.cloneNode(true);
      token.dataset.t = t;
      tint(token, row, t, colored(view, row, t), scale);
      text.append(token);
    }
    if (node.to - node.from > SHOWN) text.append(el('span', { class: 'muted' }, ` \u2026 ${plural(node.to - node.from - SHOWN, 'more token')}`));
    if (node.from === node.to) text.append(el('span', { class: 'muted' }, node.rows.length < view.shown.length ? 'ends here' : 'no common beginning'));
    const value = el('b', { class: 'node-value' }, number(node.mean));
    if (node.mean !== null) paint(value, node.mean - root.mean, shades);
    const label = [value, el('span', { class: 'muted' }, node.rows.length > 1 ? plural(node.rows.length, 'response') : `row ${row.row}`), text];
    return el('li', {}, node.children.length
      ? el('details', { open: true }, el('summary', {}, label), el('ul', {}, node.children.map(branch)))
      : el('div', { class: 'leaf' }, label));
  }
}
