// Which sections the page has, and the navigation between them.

// What follows the state in the URL; run once the page is in the document, since it measures.
const redraws = [];

function page() {
  state.read();
  const compared = DATA.runs.length > 1;
  const app = document.getElementById('app');
  const links = compared
    ? [['overview', 'Overview'], ['numbers', 'Numbers'], ['curves', 'Curves'], ['recipe', 'Recipe']]
    : [['overview', 'Overview'], ['curves', 'Curves'], ['samples', 'Answers'], ['tokens', 'Tokens'], ['settings', 'Settings']];
  const run = DATA.runs[0];
  document.title = `${DATA.runs.map((r) => r.name).join(' vs ')} \u00b7 Tokenloom`;
  app.append(
    el('nav', { 'aria-label': 'Sections' }, el('div', { class: 'wide' },
      el('span', { class: 'brand' }, 'Tokenloom'), el('div', { class: 'links' }, links.map(([id, text]) => el('a', { href: `#${id}` }, text))))));
  const main = el('main', { class: 'wide' });
  // In the document before it is filled: charts measure their width when drawn.
  app.append(main);
  const sections = compared
    ? comparison()
    : [() => headline(run), () => notes(DATA.runs), curves, samples, tokenMap, () => settings(run)];
  // One section that fails must not take the others with it.
  const attempt = (make) => {
    try {
      return make();
    } catch (error) {
      return el('p', { class: 'notes', 'data-error': true }, `A section could not be drawn: ${error.stack}`);
    }
  };
  const redraw = () => main.append(...redraws.map(attempt).filter(Boolean));
  main.append(...sections.map(attempt).filter(Boolean));
  main.append(el('footer', { class: 'muted' }, 'One file, no network. Blue and orange are told apart with all common kinds of color vision.'));
  redraw();
  addEventListener('hashchange', () => {
    if (!location.hash.includes('=')) return;
    state.read();
    redraw();
  });
  if (state.get('token') !== null || state.get('row') !== null) document.getElementById('tokens')?.scrollIntoView({ behavior: 'instant' });
  document.documentElement.dataset.ready = 'true';
}

page();
