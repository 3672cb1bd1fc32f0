// Headline, notes, curves, settings: everything that is about whole runs.

function headline(run) {
  const title = [run.model, run.task].filter(Boolean).join(' on ') || run.name;
  const meta = [
    run.algorithm, `${run.planned ? `${run.steps} of ${run.planned}` : run.steps} steps`,
    run.seconds === null ? null : run.time,
    run.tokens_per_second === null ? null : `${number(run.tokens_per_second)} tokens/s`,
    run.seed ? `seed ${run.seed}` : null,
  ].filter(Boolean);
  return el('header', { class: 'hero', id: 'overview' },
    el('p', { class: 'eyebrow' }, 'Training run ', el('b', {}, visible(run.name)),
      el('span', { class: run.status === 'finished' ? 'badge good' : 'badge bad' }, run.status)),
    el('h1', {}, breakable(title)),
    el('p', { class: 'meta' }, meta.map((text) => el('span', {}, visible(text)))),
    el('div', { class: 'stats' }, stat('Greedy accuracy', run.greedy), stat('Sampled accuracy', run.sampled)));
}

function stat(label, change) {
  if (!change) {
    return el('div', { class: 'stat card' }, el('h3', {}, label), el('p', { class: 'muted' }, 'No evaluation on record.'));
  }
  const delta = change.before === null ? null : change.after - change.before;
  const details = [
    change.problems ? plural(change.problems, 'held-out problem') : 'held-out problems',
    change.samples ? `${change.samples} samples each` : null,
    change.interval ? `95 % interval ${number(change.interval[0], '%')} to ${number(change.interval[1], '%')}` : null,
    change.best > change.after ? `best ${number(change.best, '%')} at step ${change.best_step}` : null,
  ].filter(Boolean).join(' · ');
  return el('div', { class: 'stat card' },
    el('h3', {}, label),
    el('p', { class: 'big' },
      change.before === null ? null : [el('span', { class: 'before' }, number(change.before, '%')),
        el('span', { class: 'arrow', 'aria-label': 'to' }, '\u2192')],
      el('span', { class: 'after' }, number(change.after, '%')),
      delta === null ? null : el('span', { class: `delta ${delta >= 0 ? 'up' : 'down'}` }, signed(delta, '%'))),
    change.before === null
      ? el('p', { class: 'muted' }, `Only one evaluation on record (step ${change.after_step}).`)
      : meter(change),
    el('p', { class: 'muted' }, details));
}

// Before, after and the interval on one axis from 0 to 100 %.
function meter(change) {
  const at = (v) => 100 * Math.min(1, Math.max(0, v));
  const [low, high] = [Math.min(change.before, change.after), Math.max(change.before, change.after)];
  return svg('svg', { class: 'meter', viewBox: '0 0 100 6', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    svg('rect', { class: 'rail', x: 0, y: 2, width: 100, height: 2 }),
    change.interval
      ? svg('rect', { class: 'interval', x: at(change.interval[0]), y: 0, width: at(change.interval[1]) - at(change.interval[0]), height: 6 })
      : null,
    svg('rect', { class: change.after >= change.before ? 'gain' : 'loss', x: at(low), y: 2, width: at(high) - at(low), height: 2 }),
    svg('rect', { class: 'end', x: at(change.after) - 0.25, y: 0, width: 0.5, height: 6 }));
}

function notes(runs) {
  const all = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  return all.length
    ? el('aside', { class: 'notes', id: 'notes' },
      el('h2', {}, 'About this run folder'), el('ul', {}, all.map((note) => el('li', {}, visible(note)))))
    : null;
}

function curves() {
  const compared = DATA.runs.length > 1;
  const label = (index) => DATA.runs[index].name;
  const groups = new Map();
  for (const chart of DATA.charts) {
    const heldOut = chart.group === 'Held-out';
    const series = chart.series.map((s) => ({ ...s, label: label(s.run), color: s.run, points: heldOut }));
    if (!groups.has(chart.group)) groups.set(chart.group, []);
    groups.get(chart.group).push({ ...chart, title: chart.key.slice(chart.key.indexOf('/') + 1), series, named: false });
  }
  const heldOut = groups.get('Held-out') || [];
  const body = [];
  if (!compared) {
    const lead = leadChart(heldOut);
    if (lead) {
      body.push(lineChart(lead));
      groups.set('Held-out', heldOut.filter((c) => !['eval/greedy', 'eval/sampled'].includes(c.key)));
    }
  } else {
    body.push(el('ul', { class: 'legend' }, DATA.runs.map((run, i) =>
      el('li', {}, el('i', { class: `key color-${i}` }), visible(run.name)))));
  }
  const blocks = [...groups].filter(([, charts]) => charts.length).map(([group, charts]) =>
    el('div', { class: `group span-${Math.min(3, charts.length)}` },
      el('h3', {}, visible(group)), el('div', { class: 'charts' }, charts.map(lineChart))));
  if (blocks.length) body.push(el('div', { class: 'groups' }, blocks));
  if (!body.length) body.push(el('p', { class: 'empty' }, 'No metric on record yet.'));
  return section('curves', 'Curves', 'Point at a step, or focus a chart and use the arrow keys, to read it off everywhere. '
    + 'Noisy curves: values faint, running mean strong.'
    + (DATA.charts.some((c) => c.thinned) ? ' Very long curves keep the smallest and the largest value of each stretch.' : ''), body);
}

// Greedy and sampled held-out accuracy, over the accuracy in training.
function leadChart(heldOut) {
  const pick = (key, text, color, extra) => {
    const chart = DATA.charts.find((c) => c.key === key);
    return chart ? { ...chart.series[0], label: text, color, ...extra } : null;
  };
  const series = [
    pick('eval/greedy', 'greedy', 0, { points: true }),
    pick('eval/sampled', 'sampled', 1, { points: true }),
    pick('accuracy', 'in training', 'quiet', { faint: true }),
  ].filter(Boolean);
  return heldOut.length
    ? { key: 'lead', title: 'Held-out accuracy', unit: '%', full: true, named: true, height: 260, series }
    : null;
}

function settings(run) {
  const facts = [...run.facts, ...run.machine];
  return section('settings', 'Settings', 'The resolved recipe reproduces this run on the same machine and versions.',
    run.description.length
      ? el('div', { class: 'card pad' }, el('h3', {}, 'Algorithm ', el('code', {}, visible(run.algorithm || ''))),
        el('pre', { tabindex: 0 }, visible(run.description.join('\n'))))
      : null,
    el('div', { class: 'columns' },
      el('div', { class: 'card pad' }, el('h3', {}, 'Recipe'),
        run.recipe ? el('pre', { class: 'recipe', tabindex: 0 }, visible(run.recipe)) : el('p', { class: 'empty' }, 'No recipe on record.')),
      el('div', {},
        el('div', { class: 'card pad' }, el('h3', {}, 'Run and machine'), pairs(facts)),
        el('div', { class: 'card pad' }, el('h3', {}, 'Versions'), pairs(run.versions)))));
}

function pairs(rows) {
  if (!rows.length) return el('p', { class: 'empty' }, 'Not on record.');
  return el('dl', { class: 'pairs' }, rows.map(([k, v]) => [el('dt', {}, visible(k)), el('dd', {}, visible(v))]));
}

// The sections of a comparison, each as a function that makes it.
function comparison() {
  const names = () => DATA.runs.map((run, i) => el('th', { scope: 'col' }, el('i', { class: `key color-${i}` }), visible(run.name)));
  const two = DATA.runs.length === 2;
  const table = (head, rows) => el('div', { class: 'card scroll', tabindex: 0 }, el('table', {}, el('thead', {}, head), el('tbody', {}, rows)));
  return [
    () => el('header', { class: 'hero', id: 'overview' },
      el('p', { class: 'eyebrow' }, 'Comparison'),
      el('h1', {}, DATA.runs.map((run, i) => [i ? el('span', { class: 'versus' }, ' vs ') : null, el('span', {}, visible(run.name))])),
      el('div', { class: 'stats' }, DATA.runs.map((run, i) => el('div', { class: 'stat card' },
        el('h3', {}, el('i', { class: `key color-${i}` }), visible(run.name)),
        el('p', { class: 'meta' }, [run.model, run.task, run.algorithm, plural(run.steps, 'step'), run.time, run.status]
          .filter(Boolean).map((text) => el('span', {}, visible(text))))))),
    ),
    () => notes(DATA.runs),
    () => section('numbers', 'Final numbers', 'Held-out: the last evaluation. Training metrics: the mean of the last tenth of the steps.',
      table(el('tr', {}, el('th', { scope: 'col' }, 'Metric'), names(), two ? el('th', { scope: 'col' }, 'Difference') : null),
        DATA.finals.map((row) => el('tr', {},
          el('th', { scope: 'row' }, visible(row.key)),
          row.values.map((v) => el('td', {}, number(v, row.unit))),
          two ? el('td', {}, row.values.includes(null) ? '\u2013' : signed(row.values[1] - row.values[0], row.unit)) : null)))),
    curves,
    () => section('recipe', 'Recipe differences', null, DATA.differences.length
      ? table(el('tr', {}, el('th', { scope: 'col' }, 'Setting'), names()), DATA.differences.map((row) =>
        el('tr', {}, el('th', { scope: 'row' }, visible(row.key)), row.values.map((v) => el('td', { class: 'text' }, visible(v))))))
      : el('p', { class: 'empty' }, 'The recipes do not differ.')),
  ];
}
