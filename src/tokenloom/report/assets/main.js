// Which sections the page has, and the navigation between them.

// What follows the state in the URL; run once the page is in the document, since it measures.
const redraws = [];

// Light, dark, or what the system says. A link carries the choice; nothing is stored.
function themeSwitch() {
  const choices = [['auto', 'Auto'], ['light', 'Light'], ['dark', 'Dark']];
  const apply = (theme) => { document.documentElement.dataset.theme = theme; };
  const asked = choices.some(([k]) => k === state.get('theme')) ? state.get('theme') : 'auto';
  apply(asked);
  return el('div', { class: 'theme' }, select('Theme', 'theme', choices, asked, (v) => {
    state.set({ theme: v === 'auto' ? null : v });
    apply(v);
  }));
}

async function page() {
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
      el('span', { class: 'brand' }, 'Tokenloom'), el('div', { class: 'links' }, links.map(([id, text]) => el('a', { href: `#${id}` }, text))), themeSwitch())));
  const main = el('main', { class: 'wide' });
  // In the document before it is filled: charts measure their width when drawn.
  app.append(main);
  const sections = compared
    ? comparison()
    : [() => headline(run), () => notes(DATA.runs), curves, samples, tokenMap, () => settings(run)];
  // One section that fails must not take the others with it.
  const broken = (error) => el('p', { class: 'notes', 'data-error': true }, `A section could not be drawn: ${error.stack}`);
  const attempt = (make) => {
    try {
      return make();
    } catch (error) {
      return broken(error);
    }
  };
  const redraw = () => Promise.all(redraws.map(async (draw) => {
    try {
      await draw();
    } catch (error) {
      main.append(broken(error));
    }
  }));
  main.append(...sections.map(attempt).filter(Boolean));
  main.append(el('footer', { class: 'muted' }, 'One file, no network. Blue and orange are told apart with all common kinds of color vision.'));
  await redraw();
  addEventListener('hashchange', () => {
    if (!location.hash.includes('=')) return;
    state.read();
    redraw();
  });
  if (state.get('token') !== null || state.get('row') !== null) document.getElementById('tokens')?.scrollIntoView({ behavior: 'instant' });
  document.documentElement.dataset.ready = 'true';
}

page();
