// The numbers of one token, in a box beside it.

function tokenTip(tip, view, row, t) {
  const { variants } = DATA.tokens;
  const told = [view.algorithm, ...(view.against >= 0 && view.against !== view.algorithm ? [view.against] : [])];
  const entries = view.quantities.flatMap((quantity) => {
    const own = [...new Set(told.map((v) => store.owner(v, quantity)))];
    return own.map((variant) => {
      const value = store.value(variant, quantity, row, t);
      const name = own.length > 1 || variant ? `${quantity}, ${variants[variant].name}` : quantity;
      return { name, quantity, value };
    });
  });
  const difference = view.mode === 'difference' ? [{ name: 'difference', quantity: view.quantity, value: colored(view, row, t) }] : [];
  tip.replaceChildren(
    el('p', { class: 'tip-head' }, el('code', {}, visible(store.piece(row, t), true)),
      el('span', { class: 'muted' }, `token ${t} \u00b7 id ${store.id(row, t) ?? '?'}${store.sampled(row, t) ? '' : ' \u00b7 not sampled'}`)),
    el('dl', { class: 'pairs' }, [...difference, ...entries].map(({ name, quantity, value }) => [
      el('dt', quantity === view.quantity ? { class: 'now' } : {}, visible(name)),
      el('dd', {}, value === undefined ? '\u2026' : number(value))])));
}

// Under the token and inside the window; above it where there is no room below.
function placeTip(tip, token) {
  const rects = [...token.getClientRects()];
  if (!rects.length) return;
  tip.hidden = false;
  const at = rects.at(-1);
  const left = Math.min(Math.max(8, at.left), Math.max(8, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const below = at.bottom + 8;
  const fits = below + tip.offsetHeight <= innerHeight || rects[0].top < tip.offsetHeight + 16;
  tip.style.left = `${left}px`;
  tip.style.top = `${fits ? below : rects[0].top - tip.offsetHeight - 8}px`;
}
