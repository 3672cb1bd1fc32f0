// What is shown: the step, prompt, quantity, algorithms, filters and order that the URL asks for, where they exist.

const SORTS = [
  ['row', 'as sampled'], ['reward-high', 'reward, high first'], ['reward-low', 'reward, low first'],
  ['long', 'longest first'], ['short', 'shortest first'], ['uncertain', 'highest entropy first'],
];
const SCALES = [['step', 'all of this step'], ['prompt', 'this prompt'], ['run', 'whole run']];
const LIMITS = [
  ['lmin', 'Tokens from', (r, v) => r.length >= v], ['lmax', 'Tokens to', (r, v) => r.length <= v],
  ['hmin', 'Entropy from', (r, v) => r.entropy !== null && r.entropy >= v],
  ['hmax', 'Entropy to', (r, v) => r.entropy !== null && r.entropy <= v],
];
const ALL = 'all';

function choice() {
  const { variants } = DATA.tokens;
  const rows = store.rows;
  const steps = [...new Set(rows.map((r) => r.step))];
  const quantities = [...new Set(variants.flatMap((v) => v.quantities))];
  const asked = state.get('step') === null ? NaN : Number(state.get('step'));
  const step = steps[nearest(steps, Number.isFinite(asked) ? asked : steps.at(-1))];
  const here = rows.filter((r) => r.step === step);
  const known = (options, key) => (options.some(([k]) => k === state.get(key)) ? state.get(key) : options[0][0]);
  const quantity = quantities.includes(state.get('quantity')) ? state.get('quantity') : quantities[0] ?? '';
  const filters = rewardFilters(here);
  const reward = known(filters, 'reward');
  const limits = LIMITS.map(([key]) => [key, state.get(key) === null || state.get(key) === '' ? null : Number(state.get(key))]);
  const tests = [filters.find(([k]) => k === reward)[2]];
  limits.forEach(([, value], i) => { if (Number.isFinite(value)) tests.push((r) => LIMITS[i][2](r, value)); });
  const passing = here.filter((r) => tests.every((test) => test(r)));
  const groups = grouped(passing);
  const linked = passing.find((r) => String(r.row) === state.get('row'));
  const wanted = state.get('prompt') ?? (linked ? groupKey(linked) : null);
  const widest = groups.reduce((best, g) => (best === null || g.spread > best.spread ? g : best), null);
  const prompt = wanted === ALL ? ALL : (groups.find((g) => g.key === wanted) ?? widest)?.key ?? ALL;
  const sort = known(SORTS, 'sort');
  const shown = ordered(prompt === ALL ? passing : groups.find((g) => g.key === prompt).rows, sort);
  const usable = variants.map((v, i) => [String(i), v.name, v.reason]).filter(([, , reason]) => !reason);
  const algorithm = Number(known(usable, 'algorithm'));
  const against = Number(usable.some(([k]) => k === state.get('against')) ? state.get('against') : -1);
  const differs = against >= 0 && store.owner(algorithm, quantity) !== store.owner(against, quantity);
  const mode = differs ? known([['beside'], ['difference']], 'show') : 'one';
  const row = shown.find((r) => String(r.row) === state.get('row')) ?? shown[0] ?? null;
  return {
    step, steps, quantities, quantity, here, passing, groups, prompt, shown, row, sort, reward, filters, limits,
    algorithm, against, mode, scaleOver: known(SCALES, 'scale'), view: known([['text'], ['tree']], 'view'),
  };
}

function groupKey(row) { return row.group === null ? `p${row.prompt}` : String(row.group); }

function grouped(some) {
  const found = new Map();
  for (const row of some) {
    const key = groupKey(row);
    if (!found.has(key)) found.set(key, { key, prompt: row.prompt, rows: [] });
    found.get(key).rows.push(row);
  }
  return [...found.values()].map((g) => {
    const rewards = g.rows.map((r) => r.reward).filter((v) => v !== null);
    const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
    return { ...g, mean, spread: rewards.length ? Math.max(...rewards) - Math.min(...rewards) : 0 };
  });
}

function rewardFilters(here) {
  const all = [ALL, 'any', () => true];
  const rewards = [...new Set(here.map((r) => r.reward))].sort((a, b) => a - b);
  if (rewards.length <= 6) {
    return [all, ...rewards.map((v) => [String(v), v === null ? 'not scored' : number(v), (r) => r.reward === v])];
  }
  const scored = here.filter((r) => r.reward !== null);
  const mean = scored.reduce((sum, r) => sum + r.reward, 0) / (scored.length || 1);
  return [all, ['above', `above the mean (${number(mean)})`, (r) => r.reward > mean],
    ['below', 'at or below the mean', (r) => r.reward !== null && r.reward <= mean]];
}

function ordered(some, sort) {
  const by = {
    'reward-high': (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
    'reward-low': (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
    long: (a, b) => b.length - a.length,
    short: (a, b) => a.length - b.length,
    uncertain: (a, b) => (b.entropy ?? -Infinity) - (a.entropy ?? -Infinity),
    row: () => 0,
  }[sort];
  return [...some].sort((a, b) => by(a, b) || a.number - b.number);
}

// What a token is colored by: a quantity of one algorithm, or of one less that of another.
function colored(view, row, t, side = 0) {
  const variant = side ? view.against : view.algorithm;
  const value = store.value(variant, view.quantity, row, t);
  if (view.mode !== 'difference') return value ?? null;
  const other = store.value(view.against, view.quantity, row, t) ?? null;
  return value === null || value === undefined || other === null ? null : value - other;
}

// Values that a scale is made from; of a million tokens every so many are enough.
function sampleOf(view, rows) {
  const total = rows.reduce((sum, r) => sum + r.length, 0);
  const stride = Math.max(1, Math.floor(total / 60000));
  const values = [];
  let next = 0;
  let at = 0;
  for (const row of rows) {
    for (; next < at + row.length; next += stride) {
      const t = next - at;
      if (!store.sampled(row, t)) continue;
      values.push(colored(view, row, t));
      if (view.mode === 'beside') values.push(colored(view, row, t, 1));
    }
    at += row.length;
  }
  return values;
}
